"""Contract tests of a plug-in: its declarations, its return values, and the state that it must not change.

A defense or an attack runs through the real trainer, adapters and teams in a tiny world with random weights; a scorer
judges a few answers, and a task reads and scores its rows. It takes seconds and downloads nothing. Equality to the bit
holds on a CPU. The tests cannot check that the math is that of the paper.
"""

from __future__ import annotations

import gc
import os
import tempfile
import textwrap
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.progress import SILENT, Progress
from harmbench_vaccine.inference.model_pool import ModelPool

from ..base import Plugin, Resolved
from ..composition import Component, canonical_name, parse_plugins, resolve_plugins
from ..defense import Defense
from ..registry import REGISTRIES, Registry, is_plugin_path, missing_plugin, require_imports
from ..scorer import Scorer
from ..task import Task

if TYPE_CHECKING:
    from .findings import Finding


_COLUMN = 21
"""The column at which the requirement of a check begins."""


@dataclass(frozen=True)
class ContractReport:
    """The findings of all checks of one plug-in."""

    kind: str
    name: str
    """The plug-in as the command line names it, with the parameters that the user set."""
    findings: list[Finding]

    @property
    def holds(self) -> bool:
        """True if no check fails."""
        return all(finding.outcome != "fails" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
        return {
            "kind": self.kind,
            "name": self.name,
            "holds": self.holds,
            "findings": [asdict(finding) for finding in self.findings],
        }

    def lines(self, width: int | None = None) -> list[str]:
        """Return one line for each check: its outcome, its name, and its requirement or the reason of its outcome.

        The checks that a failure prevents share one line.

        Args:
            width: Columns at which a line is wrapped; None: it is not wrapped.
        """
        examined = [finding for finding in self.findings if not finding.blocked_by]
        counts = Counter(finding.outcome for finding in examined)
        checks = [
            f"{'FAILS' if f.outcome == 'fails' else f.outcome:<6}{f.check:<{_COLUMN - 6}}{f.reason or f.demand}"
            for f in examined
        ]
        verb = "does" if counts["n/a"] == 1 else "do"
        summary = f"{counts['ok']} ok, {counts['fails']} fail, {counts['n/a']} {verb} not apply"
        if blocked := [finding.check for finding in self.findings if finding.blocked_by]:
            checks.append(f"{'not checked':<{_COLUMN}}After a failure: {', '.join(blocked)}.")
            summary += f", {len(blocked)} not checked"
        if width:
            wrap = textwrap.TextWrapper(
                width, subsequent_indent=" " * _COLUMN, break_long_words=False, break_on_hyphens=False
            )
            checks = [wrap.fill(check) for check in checks]
        return [f"{self.kind} {self.name}", *checks, summary]


def find_plugins(text: str) -> list[Resolved]:
    """Find a plug-in by its name or file; a name of several kinds gives all of them.

    Args:
        text: A plug-in as on the command line, such as `vaccine:rho=5` or `./mine.py`.

    Returns:
        The plug-ins with their parameters.

    Raises:
        BadInput: No plug-in has this name, it cannot be imported, it is of another kind, or a parameter is not valid.
    """
    components = (Component(name=text),) if is_plugin_path(text) and os.path.isfile(text) else parse_plugins(text)
    if len(components) > 1:
        raise BadInput(f"{text!r} names {len(components)} plug-ins, but hbv check takes one at a time.")
    name = components[0].name
    registries: list[Registry[Any]] = [Registry(Plugin, "")]  # any kind, by the class in the file
    if not is_plugin_path(name):
        registries = [registry for registry in REGISTRIES if name in registry.entries()]
        if not registries:
            raise missing_plugin("plug-in", name, {*chain.from_iterable(kind.entries() for kind in REGISTRIES)})
    plugins = [resolve_plugins(components, registry, {}, "")[0] for registry in registries]
    for resolved in plugins:
        require_imports(type(resolved.plugin))
        if not isinstance(resolved.plugin, tuple(registry.base for registry in REGISTRIES)):
            raise BadInput(f"{name!r} is a {resolved.plugin.kind}, which hbv check does not take.")
        if isinstance(resolved.plugin, Task):
            resolved.plugin.check()
    return plugins


def run_contract(resolved: Resolved, progress: Progress = SILENT) -> ContractReport:
    """Run all contract tests on one plug-in; the process-wide random generators keep their states."""
    from .observation import preserved_random_states

    with tempfile.TemporaryDirectory() as folder, preserved_random_states(), _frozen_garbage():
        findings = _findings(resolved, Path(folder), progress)
    return ContractReport(resolved.plugin.kind, canonical_name([resolved]), findings)


def _findings(resolved: Resolved, folder: Path, progress: Progress) -> list[Finding]:
    """Run the checks of one kind of plug-in."""
    from .findings import Checks
    from .world import TinyWorld

    cls: Any = type(resolved.plugin)  # a class of the kind that a branch below selects
    if isinstance(resolved.plugin, Defense):
        from .defense_hooks import HOOK_CHECKS
        from .defense_outcomes import OUTCOME_CHECKS
        from .defense_subject import DefenseSubject
        from .generation import GENERATION_CHECKS

        checks = Checks([*HOOK_CHECKS.all, *GENERATION_CHECKS.all, *OUTCOME_CHECKS.all])
        return checks.examine(DefenseSubject(cls, resolved.params, TinyWorld(folder)), progress)
    if isinstance(resolved.plugin, Scorer):
        from .scorer_checks import SCORER_CHECKS, ScorerSubject

        with closing(ModelPool()) as models:
            return SCORER_CHECKS.examine(ScorerSubject(cls, resolved.params, models), progress)
    if isinstance(resolved.plugin, Task):
        from .task_checks import TASK_CHECKS
        from .task_subject import TaskSubject

        return TASK_CHECKS.examine(TaskSubject(cls, resolved.params), progress)
    from .attack_checks import ATTACK_CHECKS
    from .attack_subject import AttackSubject

    return ATTACK_CHECKS.examine(AttackSubject(cls, resolved.params, TinyWorld(folder)), progress)


@contextmanager
def _frozen_garbage() -> Iterator[None]:
    """Exclude existing objects from garbage collection: the Trainer collects after every run, which is slow."""
    already_frozen = gc.get_freeze_count() > 0  # by a caller, for the same reason
    if not already_frozen:
        gc.freeze()
    try:
        yield
    finally:
        if not already_frozen:
            gc.unfreeze()

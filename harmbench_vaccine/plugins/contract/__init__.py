"""Contract tests of one plug-in: what it declares is true, its hooks return what they should, and it leaves alone what
it should.

They run a plug-in through the real trainer, adapters and teams in a tiny world with random weights, in seconds, with
nothing downloaded. Equal to the bit is what a CPU promises. They cannot tell whether the math is the paper's.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harmbench_vaccine.core.errors import BadInput, unknown_name
from harmbench_vaccine.core.progress import SILENT, Progress

from ..attack import Attack
from ..base import Plugin, Resolved
from ..composition import Component, canonical_name, parse_plugins, resolve_plugins
from ..defense import Defense
from ..registry import ATTACKS, DEFENSES, Registry, is_plugin_path

if TYPE_CHECKING:
    from .findings import Finding


@dataclass(frozen=True)
class ContractReport:
    """What the checks found of one plug-in."""

    kind: str
    name: str
    """As a command line names it, with the parameters that were written."""
    findings: list[Finding]

    @property
    def holds(self) -> bool:
        """Whether no check fails."""
        return all(finding.outcome != "fails" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return {
            "kind": self.kind,
            "name": self.name,
            "holds": self.holds,
            "findings": [asdict(f) for f in self.findings],
        }

    def lines(self) -> list[str]:
        """One line a check: its outcome, its name, and what it demands, what failed or why it does not apply."""
        counts = {outcome: sum(f.outcome == outcome for f in self.findings) for outcome in ("ok", "fails", "n/a")}
        said = [
            f"{'FAILS' if f.outcome == 'fails' else f.outcome:<6}{f.check:<15}{f.reason or f.demand}"
            for f in self.findings
        ]
        tally = f"{counts['ok']} ok, {counts['fails']} fail, {counts['n/a']} do not apply"
        return [f"{self.kind} {self.name}", *said, tally]


def find_plugins(text: str) -> list[Resolved]:
    """The defense or attack of that name or file, with its parameters; both, if there are both.

    Raises:
        BadInput: there is none, it cannot be imported, it is of another kind, or a parameter is wrong.
    """
    written = (Component(name=text),) if Path(text).is_file() and is_plugin_path(text) else parse_plugins(text)
    if len(written) > 1:
        raise BadInput(f"{text!r} names {len(written)} plug-ins; hbv check takes one at a time.")
    name = written[0].name
    having: list[Registry[Any]] = [Registry(Plugin, "")]  # any kind, by the class in the file
    if not is_plugin_path(name):
        having = [each for each in (DEFENSES, ATTACKS) if name in each.entries()]
        if not having:
            raise unknown_name("defense or attack", name, {*DEFENSES.entries(), *ATTACKS.entries()})
    found = [resolve_plugins(written, each, {}, "")[0] for each in having]
    for resolved in found:
        if not isinstance(resolved.plugin, Defense | Attack):
            raise BadInput(f"{name!r} is a {resolved.plugin.kind}; hbv check takes defenses and attacks.")
    return found


def run_contract(resolved: Resolved, progress: Progress = SILENT) -> ContractReport:
    """Every contract test on one plug-in. The shared random generators are left as they were."""
    from . import attack, hooks, outcomes
    from .findings import Checks
    from .subject import DefenseSubject
    from .watch import own_random_states
    from .world import TinyWorld

    cls: Any = type(resolved.plugin)
    with tempfile.TemporaryDirectory() as folder, own_random_states(), _little_to_collect():
        world = TinyWorld(Path(folder))
        if isinstance(resolved.plugin, Defense):
            checks = Checks([*hooks.CHECKS.all, *outcomes.CHECKS.all])
            findings = checks.examine(DefenseSubject(cls, resolved.params, world), progress)
        else:
            findings = attack.CHECKS.examine(attack.AttackSubject(cls, resolved.params, world), progress)
    return ContractReport(cls.kind, canonical_name([resolved]), findings)


@contextmanager
def _little_to_collect() -> Iterator[None]:
    """Trainer collects garbage when it ends: searching the libraries each time takes longer than a tiny stage."""
    frozen = gc.get_freeze_count() > 0  # by somebody else, for the same reason
    if not frozen:
        gc.freeze()
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()

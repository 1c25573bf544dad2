"""The list of stored runs, with filters: `hbv list runs`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType

from harmbench_vaccine.core.errors import BadInput, HbvError
from harmbench_vaccine.evaluation.run_overview import RESULT, RunOverview, read_overview
from harmbench_vaccine.experiment.protocol import protocol_models, protocol_names
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.plugins.registry import REGISTRIES, unknown_plugin

from .render import Column, VisibleText, dim_notes, number_column, numbers, render_table

_UNITS = {"h": "hours", "d": "days", "w": "weeks"}


@dataclass(frozen=True)
class ListedRun:
    """A stored run in the list of runs."""

    folder: Path
    overview: RunOverview
    time: datetime
    """When the run ended; for a run of an early version, when its file was written."""

    def to_json(self) -> dict[str, Any]:
        """Return the run as plain JSON."""
        return {**self.overview.model_dump(), "date": self.time.isoformat(), "folder": str(self.folder)}


def list_runs(folder: Path) -> tuple[list[ListedRun], list[str]]:
    """Read the runs in a folder, the newest first.

    Returns:
        The runs, and one sentence for each run that is damaged.
    """
    runs, problems = [], []
    for path in sorted(folder.glob(f"*/{RESULT}")):
        try:
            runs.append(_read_run(path.parent))
        except HbvError as error:
            problems.append(str(error))
    return sorted(runs, key=lambda run: run.time, reverse=True), problems


def _read_run(folder: Path) -> ListedRun:
    overview = read_overview(folder)
    if overview.date is None:
        time = datetime.fromtimestamp((folder / RESULT).stat().st_mtime, UTC)
    else:
        time = datetime.fromisoformat(overview.date)
    return ListedRun(folder, overview, time if time.tzinfo else time.replace(tzinfo=UTC))


# ---------------------------------------------------------------------------------------------------------------------
# Filters


def select_listed_runs(
    runs: Sequence[ListedRun],
    names: Mapping[str, Sequence[str]],
    since: datetime | None = None,
    collapsed: bool = False,
) -> list[ListedRun]:
    """Select the runs that match all filters.

    Args:
        runs: The runs to select from.
        names: `defense`, `attack`, `task`, `protocol` or `model` -> names, one of which must match. The name of a
            plug-in matches with any parameters and in any composition; a text with parameters matches the same text.
        since: Earliest time.
        collapsed: Whether to select only runs that fail a validity gate.

    Raises:
        BadInput: No stored run and no installed plug-in or protocol has such a name.
    """
    selected = {kind: values for kind, values in names.items() if values}
    for kind, values in selected.items():
        known = {*_installed_names(kind), *(name for run in runs for name in _names(kind, run.overview))}
        for value in values:
            if _normal(value) not in set(map(_normal, known)):
                raise unknown_plugin(kind, value, known)
    selected_names = {kind: set(map(_normal, values)) for kind, values in selected.items()}
    return [
        run
        for run in runs
        if all(values & set(map(_normal, _names(kind, run.overview))) for kind, values in selected_names.items())
        and (since is None or run.time >= since)
        and (not collapsed or run.overview.collapsed)
    ]


def _normal(name: str) -> str:
    return name.replace("-", "_")


def _installed_names(kind: str) -> list[str]:
    plugins = {registry.base.kind: registry for registry in REGISTRIES}
    if kind in plugins:
        return list(plugins[kind].entries())
    return protocol_names() if kind == "protocol" else protocol_models()


def _names(kind: str, overview: RunOverview) -> Iterator[str]:
    """Yield the names that find a run: its text, a plug-in of a composition, a model without its owner, a data file."""
    text = getattr(overview, kind)
    if text is None:
        return
    yield text
    if kind == "model":
        yield text.rpartition("/")[2]
    elif kind != "protocol":
        with suppress(BadInput):  # a text that no version of hbv writes
            for component in parse_plugins(text):
                yield component.name
                if component.name == "own":
                    yield str(component.params.get("data", component.params.get("", "own")))


def parse_since(text: str, now: datetime) -> datetime:
    """Parse a date such as 2026-01-31, or an age such as 7d; dates without a time zone are in UTC.

    Raises:
        BadInput: It is neither.
    """
    try:
        if age := re.fullmatch(r"([0-9]+)([hdw])", text):
            return now - timedelta(**{_UNITS[age[2]]: int(age[1])})
        date = datetime.fromisoformat(text)
        return date if date.tzinfo else date.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        allowed = "a date such as 2026-01-31, or an age such as 12h, 7d or 2w"
        raise BadInput(f"--since {text!r} is not allowed; allowed: {allowed}.") from None


# ---------------------------------------------------------------------------------------------------------------------
# View

_COLUMNS = (
    Column("run", wrap=False),
    Column("ended (UTC)", wrap=False, drop=5),
    Column("defense"),
    Column("attack"),
    Column("task", least=8),
    number_column("seed", drop=4),
    *numbers("HS %", "FA %"),
    Column("protocol", drop=3),
    Column("model", drop=2),
    Column("judge", drop=1),
    Column(
        "state",
        wrap=False,
        drop=6,
        legend="collapsed if the final model fails a validity gate; its HS then does not count as safe",
    ),
)


def run_list_view(runs: Sequence[ListedRun], limit: int, stored: int, folder: Path) -> RenderableType:
    """Show the first runs of a list.

    Args:
        runs: The selected runs.
        limit: Largest number of rows.
        stored: Number of all runs in the folder.
        folder: The folder of the runs.
    """
    if not stored:
        return VisibleText(
            f"No run is stored in {folder}. Start with: hbv run --defense sft --defense vaccine --attack ratio=0.1"
        )
    if not runs:
        return VisibleText(f"None of the {stored} runs in {folder} matches all filters.")
    shown = runs[:limit]
    table = render_table(
        _COLUMNS, map(_row, shown), styles=["red" if run.overview.collapsed else None for run in shown]
    )
    more = "; --limit shows more" if len(shown) < len(runs) else ""
    selected = f"{len(runs)} matching" if len(runs) < stored else str(stored)
    notes = [f"{len(shown)} of {selected} runs in {folder}{more}. hbv show RUN shows the answers of a run."]
    return Group(table, *dim_notes(notes))


def _row(run: ListedRun) -> list[str]:
    overview = run.overview
    return [
        overview.run,
        f"{run.time.astimezone(UTC):%Y-%m-%d %H:%M}",
        overview.defense,
        overview.attack,
        overview.task or "-",
        "-" if overview.seed is None else str(overview.seed),
        *("-" if score is None else f"{score:.1f}" for score in (overview.harmful_score, overview.finetune_accuracy)),
        overview.protocol or "-",
        overview.model or "-",
        overview.scorer or "-",
        "collapsed" if overview.collapsed else "",
    ]

"""`hbv store`: the space that artifacts take, which of them runs need, and whether they are intact."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import click

from .completion import stored_run
from .console import (
    SuggestingChoice,
    SuggestingGroup,
    output_options,
    print_json,
    print_view,
    terminal_progress,
)

if TYPE_CHECKING:
    from harmbench_vaccine.core.store import Store
    from harmbench_vaccine.core.store_contents import StoredArtifact
    from harmbench_vaccine.evaluation.store_cleanup import Cleanup
    from harmbench_vaccine.evaluation.store_usage import Grouping, StoreUsage

_AGE_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


class Age(click.ParamType):
    """A duration such as 30d, 12h or 2w."""

    name = "age"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        """Convert a text to a duration."""
        match = re.fullmatch(r"(\d{1,6})([mhdw])", str(value), re.ASCII)
        if match is None:
            self.fail(f"{value!r} is not an age; allowed: a number with m, h, d or w, such as 12h or 30d.", param, ctx)
        return timedelta(**{_AGE_UNITS[match[2]]: int(match[1])})


def _older_than(command: Callable[..., None]) -> Callable[..., None]:
    return click.option(
        "--older-than", type=Age(), default=None, metavar="AGE", help="Only artifacts created longer ago: 12h, 30d, 2w."
    )(command)


def _json_object(command: Callable[..., None]) -> Callable[..., None]:
    return click.option("--json", "as_json", is_flag=True, help="Print a JSON object; sizes are in bytes.")(command)


@click.group(cls=SuggestingGroup)
def store() -> None:
    """Show, clean and check the store of artifacts.

    Artifacts are the results of stages: adapters, answers, verdicts. They are in $HBV_HOME/store. Runs with the same
    inputs of a stage share its artifact.

    \b
    Example: hbv store du --by run
    """


@store.command()
@click.option(
    "--by",
    "grouping",
    type=SuggestingChoice(["stage", "run", "protocol", "age"]),
    default="stage",
    show_default=True,
    help="Group artifacts by this.",
)
@_json_object
def du(grouping: Grouping, as_json: bool) -> None:
    """Show how much space artifacts take.

    A file with several links counts once. Runs share artifacts, so the sizes of runs add up to more than the store.

    \b
    Example: hbv store du --by run
    """
    from dataclasses import asdict

    from harmbench_vaccine.evaluation.store_usage import StoreUsage, space_by, space_of_others, total_size
    from harmbench_vaccine.reporting.store_views import space_view

    usage = StoreUsage(_store())
    rows, others, total = space_by(usage, grouping), space_of_others(usage.store.root), total_size(usage)
    notes = [run.problem for run in usage.runs if run.problem]
    if as_json:
        values = {"rows": [asdict(row) for row in rows], "others": [asdict(row) for row in others]}
        print_json({"store": str(usage.store.root), "by": grouping, **values, "size": total, "notes": notes})
    else:
        print_view(space_view(grouping, rows, others, total, notes))


@store.command()
@click.option("--stage", default=None, metavar="NAME", help="Only artifacts of this stage: align, finetune, answer ...")
@click.option("--protocol", default=None, metavar="NAME", help="Only artifacts that runs of this protocol need.")
@_older_than
@click.option("--unused", is_flag=True, help="Only artifacts that no run needs.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list: one object per artifact; sizes are in bytes.")
def ls(stage: str | None, protocol: str | None, older_than: timedelta | None, unused: bool, as_json: bool) -> None:
    """List artifacts with the runs that need them.

    \b
    Example: hbv store ls --stage finetune --unused
    """
    from harmbench_vaccine.evaluation.store_usage import StoreUsage, age_of
    from harmbench_vaccine.reporting.store_views import artifacts_view

    usage = StoreUsage(_store())
    artifacts: Sequence[StoredArtifact] = usage.unused() if unused else list(usage.artifacts.values())
    if stage is not None:
        _check_name("stage", stage, {artifact.stage for artifact in usage.artifacts.values()})
        artifacts = [artifact for artifact in artifacts if artifact.stage == stage]
    if protocol is not None:
        runs = usage.runs_by_protocol()
        _check_name("protocol", protocol, runs)
        needed = usage.needed_by(runs[protocol])
        artifacts = [artifact for artifact in artifacts if artifact.name in needed]
    if older_than is not None:
        artifacts = [artifact for artifact in artifacts if age_of(artifact.created) > older_than]
    if as_json:
        print_json([_artifact_json(usage, artifact) for artifact in artifacts], indent=1)
    else:
        print_view(artifacts_view(usage, artifacts))


@store.command()
@_older_than
@click.option(
    "--protocol",
    "protocols",
    multiple=True,
    metavar="NAME",
    help="Drop the runs of this protocol: remove artifacts that only they need. Repeatable.",
)
@click.option(
    "--run",
    "runs",
    multiple=True,
    metavar="RUN",
    shell_complete=stored_run,
    help="Drop this run: remove artifacts that only it needs. Repeatable.",
)
@click.option(
    "--sweep",
    "sweeps",
    multiple=True,
    metavar="NAME",
    help="Drop this unfinished sweep: remove artifacts that only it needs. Repeatable.",
)
@click.option("--checkpoints", is_flag=True, help="Also remove the checkpoints of unfinished stages.")
@click.option("--yes", is_flag=True, help="Remove them. Without it, the command only shows what it would remove.")
@_json_object
def gc(
    older_than: timedelta | None,
    protocols: tuple[str, ...],
    runs: tuple[str, ...],
    sweeps: tuple[str, ...],
    checkpoints: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Remove artifacts that no stored run and no unfinished sweep needs.

    A stored run is a folder in $HBV_HOME/runs or in a folder of --out. Artifacts that a running command uses stay. The
    results and answers of a dropped run stay too; delete its folder to remove them. --yes also removes leases of ended
    workers, and failures of stages that no unfinished sweep needs.

    \b
    Example: hbv store gc --older-than 30d
    Remove: hbv store gc --run vaccine-d2 --yes
    """
    from harmbench_vaccine.evaluation.store_cleanup import Selection, clean, plan_cleanup
    from harmbench_vaccine.reporting.store_views import cleanup_view
    from harmbench_vaccine.sweeps.shared_store import remove_worker_files

    selection = Selection(runs, protocols, sweeps, older_than, checkpoints)
    cleanup = plan_cleanup(_store(), selection)
    if yes:
        if cleanup.artifacts or cleanup.unfinished or sweeps:
            cleanup = clean(_store(), selection)
        remove_worker_files(_store().root)
    if as_json:
        print_json(_cleanup_json(cleanup, yes))
    else:
        print_view(cleanup_view(cleanup, yes))


@store.command()
@click.option("--repair", is_flag=True, help="Remove damaged artifacts, so that they are created again.")
@output_options
@_json_object
@click.pass_context
def verify(context: click.Context, repair: bool, as_json: bool) -> None:
    """Compare every file with the hash that was stored with it.

    The exit code is 1 if damaged artifacts remain. Orphaned artifacts were computed from artifacts that were removed;
    missing ones are needed by a run.

    \b
    Example: hbv store verify --repair
    """
    from dataclasses import asdict

    from harmbench_vaccine.evaluation.store_cleanup import verify_store
    from harmbench_vaccine.reporting.store_views import verification_view

    with terminal_progress() as progress:
        verification = verify_store(_store(), repair=repair, progress=progress)
    if as_json:
        print_json(asdict(verification))
    else:
        print_view(verification_view(verification))
    context.exit(0 if verification.holds else 1)


def _store() -> Store:
    from harmbench_vaccine.core.paths import home
    from harmbench_vaccine.core.store import Store

    return Store(home() / "store")


def _check_name(kind: str, name: str, allowed: Any) -> None:
    from harmbench_vaccine.core.errors import unknown_name

    if name not in allowed:
        raise unknown_name(kind, name, allowed, of="the store")


def _artifact_json(usage: StoreUsage, artifact: StoredArtifact) -> dict[str, Any]:
    return {
        "stage": artifact.stage,
        "key": artifact.key,
        "path": str(artifact.path),
        "created": artifact.created.isoformat(timespec="seconds"),
        "size": usage.size([artifact.name]),
        "runs": usage.users(artifact.name),
    }


def _cleanup_json(cleanup: Cleanup, is_done: bool) -> dict[str, Any]:
    return {
        "removed": is_done,
        "artifacts": [artifact.name for artifact in cleanup.artifacts],
        "unfinished": [str(work.path) for work in cleanup.unfinished],
        "size": cleanup.size,
        "in_use": [artifact.name for artifact in cleanup.in_use],
        "dropped": cleanup.dropped,
        "notes": cleanup.notes,
    }

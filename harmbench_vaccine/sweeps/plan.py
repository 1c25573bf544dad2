"""The plan of a sweep: runs, stored stages, time, disk, and the smallest differences that its tables can show."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from harmbench_vaccine.core.store import Store
from harmbench_vaccine.evaluation.planning import detectable_differences, detectable_text
from harmbench_vaccine.experiment import keys
from harmbench_vaccine.reporting.dry_run.devices import THIS_MACHINE, Target
from harmbench_vaccine.reporting.dry_run.plan_json import dry_run_json
from harmbench_vaccine.reporting.dry_run.view import plan_notes, plan_summary, readable_time
from harmbench_vaccine.reporting.render import (
    Column,
    TableGroup,
    dim_notes,
    number_column,
    numbers,
    render_fields,
    render_table,
)
from harmbench_vaccine.reporting.store_views import readable_size
from harmbench_vaccine.runner import plan_all

from .suite import Suite
from .worker import is_finished


def sweep_plan_json(
    suite: Suite, home: Path, target: Target = THIS_MACHINE, workers: int | None = None
) -> dict[str, Any]:
    """Plan a suite without running anything.

    Args:
        suite: The suite.
        home: The folder of the store and of the runs.
        target: The device to estimate for.
        workers: Number of workers that share the stages; None: one.

    Returns:
        The plan of `hbv run --dry-run` for all runs, with the name of the suite, the number of finished runs, the
        device time in hours, and the detectable differences.

    Raises:
        BadInput: A run of the suite is not possible.
    """
    plan = plan_all(suite.settle())
    values = dry_run_json(plan, Store(home / "store"), target)
    seconds = sum(estimate["seconds"] for run in values["experiments"] for estimate in run["estimate"])
    return {
        "suite": suite.name,
        "title": suite.title,
        "workers": workers or 1,
        "finished": sum(is_finished(keys.run_id(run), run, home / "runs") for run in plan.experiments),
        "device_hours": seconds / 3600,
        "detectable": [vars(each) for each in detectable_differences(plan.experiments, home / "runs")],
        **values,
    }


def sweep_plan_view(plan: Mapping[str, Any]) -> RenderableType:
    """Show a plan in the terminal.

    Args:
        plan: The output of `sweep_plan_json`.
    """
    runs = plan["experiments"]
    axes = ", ".join(
        f"{len(values)} {axis if len(values) == 1 else plural}"
        for axis, plural in (("defense", "defenses"), ("attack", "attacks"), ("task", "tasks"), ("seed", "seeds"))
        if (values := {run[axis] for run in runs})
    )
    fields = dict(plan_summary(plan))
    fields["runs"] = f"{len(runs)} ({axes}), {plan['finished']} finished"
    if "time" in fields:
        fields["time"] = f"{plan['device_hours']:.3g} device-hours on {plan['device']['name']}"
        if plan["workers"] > 1:
            fields["time"] += f", about {readable_time(3600 * plan['device_hours'] / plan['workers'])} for "
            fields["time"] += f"{plan['workers']} workers with a device each"
    tables = [render_fields([("suite", f"{plan['suite']}: {plan['title']}"), *fields.items()])]
    if kinds := _kinds(runs):
        tables.append(_stage_table(kinds))
    tables.append(_difference_table(plan["detectable"]))
    return TableGroup(*tables, *dim_notes([*_difference_notes(plan["detectable"]), *plan_notes(plan, verbose=True)]))


def _kinds(runs: list[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return kind of stage -> number of artifacts, stored ones, estimated seconds and bytes of the missing ones."""
    kinds: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(("total", "stored", "seconds", "disk"), 0))
    for run in runs:
        for artifact in run["stages"]:
            kinds[artifact["stage"]]["total"] += 1
            kinds[artifact["stage"]]["stored"] += artifact["cached"]
        for estimate in run["estimate"]:
            for name in ("seconds", "disk"):
                kinds[estimate["stage"]][name] += estimate[name]
    return kinds


def _stage_table(kinds: Mapping[str, Mapping[str, float]]) -> RenderableType:
    rows = [
        [
            kind,
            *(str(int(count)) for count in (values["total"], values["stored"], values["total"] - values["stored"])),
            readable_time(values["seconds"]) if values["seconds"] else "",
            readable_size(int(values["disk"])) if values["disk"] else "",
        ]
        for kind, values in kinds.items()
    ]
    return render_table([Column("stage"), *numbers("all", "stored", "to do", "device time", "disk")], rows)


def _difference_table(differences: list[Mapping[str, Any]]) -> RenderableType:
    rows = [
        [
            *(str(each[name]) for name in ("protocol", "task", "attack", "defenses", "seeds", "questions")),
            f"{each['harmful_score']:.0f}",
            f"{each['dispersion']:.1f}{'' if each['stored_runs'] else ' assumed'}",
            detectable_text(each["difference"]),
        ]
        for each in differences
    ]
    return render_table(
        [
            Column("protocol"),
            Column("task"),
            Column("attack"),
            *numbers("defenses", "seeds"),
            number_column("prompts", drop=1),
            number_column("HS of SFT", drop=3),
            number_column("dispersion", drop=2),
            number_column("detectable"),
        ],
        rows,
    )


def _difference_notes(differences: list[Mapping[str, Any]]) -> list[str]:
    notes = [
        "detectable: the smallest difference in HS between two defenses, in points, that a table shows with 80% power "
        "at a level of 5%, near the HS of SFT in stored runs, or else near 50%, where it is largest."
    ]
    if runs := max((each["stored_runs"] for each in differences), default=0):
        notes.append(f"dispersion: variance between seeds relative to independent questions, from {runs} stored runs.")
    if any(not each["stored_runs"] for each in differences):
        notes.append(
            "dispersion, assumed: 3 times the variance of independent questions, about that of the testbed; stored "
            "runs of the same protocol with several seeds replace it."
        )
    if any(each["seeds"] == 1 for each in differences):
        notes.append("With one seed, a table has intervals over questions only; it does not show a new training.")
    return notes

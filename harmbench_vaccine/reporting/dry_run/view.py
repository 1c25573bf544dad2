"""Show the plan of `hbv run --dry-run`: the resolved protocol, plug-ins, sources, stages and their cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType

from harmbench_vaccine.core.errors import BadInput, HbvError
from harmbench_vaccine.core.store import Store
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.keys import run_id
from harmbench_vaccine.experiment.protocol import leaf_values
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.plugins.composition import parse_plugins

from ..render import VisibleText, dim_notes, render_table
from .estimate import estimate_costs
from .plan import Plan, plan_runs


def dry_run_json(experiments: Sequence[Experiment], store: Store) -> dict[str, Any]:
    """Return the plan of a list of experiments as plain JSON, with seconds and bytes."""
    plan = plan_runs(experiments, store.root)
    return {
        "protocol": {"hash": experiments[0].protocol.hash, "values": list(protocol_values(experiments[0]))},
        "experiments": [_experiment_json(experiment, plan, index) for index, experiment in enumerate(experiments)],
        "sources": [vars(source) for source in plan.sources],
        "unknown": plan.unknown,
        "testbed": compare_testbed_estimate(store),
    }


def _experiment_json(experiment: Experiment, plan: Plan, index: int) -> dict[str, Any]:
    stages = [
        {"stage": artifact.stage, "key": artifact.key, "cached": artifact.cached, "seconds": artifact.seconds}
        for artifact in (plan.stages[index] if plan.stages else [])
    ]
    try:
        costs = estimate_costs(experiment, read_rows=bool(plan.stages))
        estimates, no_estimate = [vars(estimate) for estimate in costs], ""
    except HbvError as error:
        if plan.stages and isinstance(error, BadInput):  # everything is on this machine: the run is refused too
            raise
        estimates, no_estimate = [], str(error)
    plugins = {
        resolved.plugin.name: {key: [value, resolved.origins[key]] for key, value in resolved.params.items()}
        for resolved in [*experiment.defenses, *experiment.attacks, experiment.task_plugin, *experiment.scorers]
    }
    return {
        "run": run_id(experiment) if plan.stages else None,
        "defense": experiment.defense,
        "attack": experiment.attack,
        "task": experiment.task.name,
        "seed": experiment.spec.seed,
        "plugins": plugins,
        "stages": stages,
        "estimate": estimates,
        "no_estimate": no_estimate,
    }


def protocol_values(experiment: Experiment) -> Iterator[dict[str, Any]]:
    """Yield every value of the resolved protocol: its dotted path, the value, and its source."""
    protocol, spec = experiment.protocol, experiment.spec
    written = {*spec.values, *(f"data.{name}" for name in spec.data)}
    if spec.model:
        yield {"path": "model", "value": experiment.model, "source": f"written, instead of {protocol.model}"}
    for path, value in leaf_values(protocol):
        if path == "model" and spec.model:
            continue
        source = protocol.source_of(path)
        if any(path == key or path.startswith(f"{key}.") for key in written):
            source = "written"
        yield {"path": path, "value": value, "source": source}


def compare_testbed_estimate(store: Store) -> list[dict[str, Any]]:
    """Compare estimated and measured seconds for the stages of a testbed run that is stored on this machine.

    Returns:
        One entry per stage; empty if no such run is stored.
    """
    for attack in ("ratio=0.1", "ratio=0"):
        experiment = Experiment.settle(RunSpec(attack=parse_plugins(attack)))
        stages = plan_runs([experiment], store.root).stages
        measured: dict[str, float] = {}
        for artifact in stages[0] if stages else []:
            if artifact.cached:
                measured[artifact.stage] = measured.get(artifact.stage, 0.0) + artifact.seconds
        if "align" in measured:
            return [
                {"stage": estimate.stage, "estimated": estimate.seconds, "measured": measured[estimate.stage]}
                for estimate in estimate_costs(experiment)
                if estimate.stage in measured and estimate.seconds is not None
            ]
    return []


# ---------------------------------------------------------------------------------------------------------------------
# Terminal


def dry_run_view(plan: Mapping[str, Any]) -> RenderableType:
    """Show a plan in the terminal.

    Args:
        plan: The output of `dry_run_json`.
    """
    experiments = plan["experiments"]
    tables = (
        _protocol_table(plan["protocol"]),
        _plugin_table(experiments),
        _source_table(plan["sources"]),
        _stage_table(experiments),
    )
    parts = [part for table in tables for part in (table, VisibleText())]
    return Group(*parts[:-1], *dim_notes(_notes(plan)))


def _notes(plan: Mapping[str, Any]) -> list[str]:
    experiments = plan["experiments"]
    notes = [f"The stored answers and scores are unknown: {plan['unknown']}."] if plan["unknown"] else []
    notes += sorted({f"No estimate: {entry['no_estimate']}" for entry in experiments if entry["no_estimate"]})
    notes.append(
        "The estimates extrapolate timed steps of models with one and two layers on this machine, and are longer if it "
        "is busy. They assume answers of maximum length, generated by transformers. They exclude judging, drift and "
        "downloads."
    )
    if any(estimate["seconds"] is None for entry in experiments for estimate in entry["estimate"]):
        notes.append(
            "Not timed: a GPU is not available, and two layers of this model would take minutes to time on a CPU."
        )
    if not plan["testbed"]:
        notes.append("Run `hbv run --defense sft` on the testbed to see the error of the estimate on this machine.")
        return notes
    stages = "; ".join(
        f"{entry['stage']}: {entry['estimated']:.0f} s estimated, {entry['measured']:.0f} s measured "
        f"({100 * (entry['estimated'] / max(entry['measured'], 1e-9) - 1):+.0f}%)"
        for entry in plan["testbed"]
    )
    notes.append(f"Error of the estimate for the testbed on this machine: {stages}.")
    return notes


def _protocol_table(protocol: Mapping[str, Any]) -> RenderableType:
    rows = [[entry["path"], _value_text(entry["value"]), entry["source"]] for entry in protocol["values"]]
    return render_table([f"protocol {protocol['hash']}", "value", "source"], rows)


def _value_text(value: Any) -> str:
    """Format a protocol value as YAML would; a list without brackets."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)


def _plugin_table(experiments: Sequence[Mapping[str, Any]]) -> RenderableType:
    rows = [
        (name, key, _value_text(value), origin)
        for experiment in experiments
        for name, params in experiment["plugins"].items()
        for key, (value, origin) in params.items()
    ]
    return render_table(["plug-in", "parameter", "value", "from"], list(dict.fromkeys(rows)))


def _source_table(sources: Sequence[Mapping[str, Any]]) -> RenderableType:
    rows = []
    for source in sources:
        state = "yes" if source["available"] else "to be downloaded"
        if source["location"].startswith("testbed:") and not source["available"]:
            state = "to be built"
        detail = f" ({source['detail']})" if source["detail"] else ""
        rows.append([source["what"], source["location"], f"{state}{detail}"])
    return render_table(["reads", "location", "on this machine"], rows)


def _stage_table(experiments: Sequence[Mapping[str, Any]]) -> RenderableType:
    rows: list[list[str]] = []
    total = 0.0
    for experiment in experiments:
        stage_rows, seconds = _stage_rows(experiment)
        name = " / ".join([experiment["defense"], experiment["attack"], experiment["task"]])
        names = [f"{name} / seed {experiment['seed']}", *[""] * len(stage_rows)]
        rows += [[name, *cells] for name, cells in zip(names, stage_rows, strict=False)]
        total += seconds
    if total:
        rows.append(["total", "", "", _format_time(total), "", ""])
    return render_table(["experiment", "stage", "to do", "estimated", "memory", "work"], rows)


def _stage_rows(experiment: Mapping[str, Any]) -> tuple[list[list[str]], float]:
    """Return the rows of one experiment without its name, and its estimated seconds."""
    estimates = {estimate["stage"]: estimate for estimate in experiment["estimate"]}
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for artifact in experiment["stages"]:
        groups.setdefault(artifact["stage"], []).append(artifact)
    if not groups and not estimates:
        return [["all", "run", "", "", ""]], 0.0
    rows, total = [], 0.0
    for stage in list(groups) or list(estimates):
        group, estimate = groups.get(stage, []), estimates.get(stage)
        missing = sum(not artifact["cached"] for artifact in group) if group else 1
        cost = ["", "", ""]
        if estimate and missing:
            share = missing / len(group) if group else 1.0
            seconds = None if estimate["seconds"] is None else share * estimate["seconds"]
            total += seconds or 0.0
            cost = [_format_time(seconds), f"{estimate['memory'] / 2**30:.2g} GiB", estimate["detail"]]
        rows.append([stage, _to_do(missing, len(group)), *cost])
    if groups and all(artifact["cached"] for artifact in experiment["stages"]):
        rows.append(["", "all cached", "", "", ""])
    return rows, total


def _to_do(missing: int, count: int) -> str:
    if not missing:
        return "reuse"
    return "run" if missing == max(count, 1) else f"run {missing} of {count}"


def _format_time(seconds: float | None) -> str:
    if seconds is None:
        return "not timed"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"

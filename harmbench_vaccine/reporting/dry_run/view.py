"""Show the plan of `hbv run --dry-run`: time, memory, downloads and disk first, then the stages and their cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType

from harmbench_vaccine.data.sources import TESTBED
from harmbench_vaccine.evaluation.planning import detectable_text

from ..protocol_pages import value_text
from ..render import VisibleText, dim_notes, render_fields, render_table
from ..store_views import readable_size
from .devices import HERE

_MEASURED_STEPS = (
    "The share of the peak rate that a step reaches is fitted to Llama-2-7B: 0.22 to 0.26 s on an H200 (estimated: "
    "0.24 s), 0.37 s on an A100 (0.37 s). Figures that it is not fitted to: Vaccine on the H200 0.44 to 0.48 s (0.49 "
    "s), OPT-2.7B on the A100 0.14 s (0.15 s), memory 24.5 GB on the H200 (28.5 GB); the authors' code needed 38.5 GB."
)
"""Steps of 5 rows of 200 tokens in bfloat16; a test computes the estimates."""


def dry_run_view(plan: Mapping[str, Any], verbose: bool = False) -> RenderableType:
    """Show a plan in the terminal.

    Args:
        plan: The output of `dry_run_json`, with the detectable differences.
        verbose: Whether to show the protocol, the parameters of plug-ins and the locations of files.
    """
    experiments = plan["experiments"]
    summary = [*plan_summary(plan), ("detectable", _detectable(plan["detectable"]))]
    tables = [render_fields(summary), _stage_table(experiments)]
    if verbose:
        tables += [_source_table(plan["sources"]), _plugin_table(experiments), _protocol_table(plan["protocol"])]
    parts = [part for table in tables for part in (table, VisibleText())]
    return Group(*parts[:-1], *dim_notes(plan_notes(plan, verbose)))


def plan_summary(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the answer of a dry run: stages, time, memory, downloads, disk."""
    experiments, device = plan["experiments"], plan["device"]
    artifacts = [artifact for experiment in experiments for artifact in experiment["stages"]]
    estimates = [estimate for experiment in experiments for estimate in experiment["estimate"]]
    missing = sum(not artifact["cached"] for artifact in artifacts)
    stages = f"{missing} of {len(artifacts)} artifacts to create, {len(artifacts) - missing} stored"
    if artifacts and not missing:
        stages = f"nothing to run: all {len(artifacts)} artifacts are stored"
    summary = [("runs", str(len(experiments))), ("stages", stages if artifacts else "unknown until the data is here")]
    if estimates:
        summary.append(("time", f"{readable_time(_seconds(experiments))} on {device['name']}"))
        summary.append(("memory", _memory(plan)))
    sources = plan["sources"]
    summary += _over_refusal(experiments)
    return [*summary, ("downloads", _downloads(sources)), *_access(sources), *_disk(estimates)]


def _over_refusal(experiments: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Describe the sets whose refusals are counted, where a run has more than the protocol's benign prompts."""
    sizes: dict[str, set[int]] = {}
    for experiment in experiments:
        for name, prompts in experiment["over_refusal"].items():
            sizes.setdefault(name, set()).add(prompts)
    texts = [f"{name} {' or '.join(map(str, sorted(counts)))} prompts" for name, counts in sizes.items()]
    return [("over-refusal", ", ".join(texts))] if len(texts) > 1 else []


def _detectable(differences: Sequence[Mapping[str, Any]]) -> str:
    """Describe the smallest difference in harmful score that the tables of the runs show."""
    largest = max(differences, key=lambda each: each["difference"])
    least = min(each["difference"] for each in differences)
    ends = (detectable_text(least), detectable_text(largest["difference"]))
    span = " to ".join(dict.fromkeys(ends))
    source = f"{largest['stored_runs']} stored runs" if largest["stored_runs"] else "an assumed dispersion"
    seeds = f"{largest['seeds']} seed{'' if largest['seeds'] == 1 else 's'}"
    return f"differences in HS from {span} points (80% power, {seeds}, by {source})"


def _seconds(experiments: Sequence[Mapping[str, Any]]) -> float:
    """Return the time of everything that is missing."""
    return sum(estimate["seconds"] for experiment in experiments for estimate in experiment["estimate"])


_LESS_TRAINING = ("fewer rows per batch with more accumulation steps", "--gradient-checkpointing")
_LESS_MEMORY = {
    "align": (*_LESS_TRAINING, "--set quantization=4bit"),
    "finetune": (*_LESS_TRAINING, "--set quantization=4bit"),
    "repair": ("--set quantization=4bit",),
    "nested": (*_LESS_TRAINING, "--set quantization=4bit"),
    "stress": ("a smaller model",),
    "answer": ("--backend vllm", "--set quantization=4bit"),
    "score": ("a smaller judge", "a judge in 16 bits (--scorer beaver_dam:dtype=bfloat16)"),
    "drift": ("--set score.drift_batch=1", "--set quantization=4bit"),
}
"""Stage -> what makes it need less memory."""


def _memory(plan: Mapping[str, Any]) -> str:
    """Return the peak memory with its stage, whether it fits, and what would make it fit."""
    device, experiments = plan["device"], plan["experiments"]
    estimates = [estimate for experiment in experiments for estimate in experiment["estimate"]]
    largest = max(estimates, key=lambda estimate: estimate["memory"])
    text = f"{readable_size(largest['memory'])} of {readable_size(device['memory'])} (stage {largest['stage']})"
    if largest["memory"] <= device["memory"]:
        return f"{text}: fits"
    options = dict.fromkeys(
        option
        for estimate in estimates
        if estimate["memory"] > device["memory"]
        for option in _LESS_MEMORY[estimate["stage"]]
    )
    written = {f"--backend {experiment['backend']}" for experiment in experiments}
    advice = ", ".join(option for option in options if option not in written)
    return f"{text}: does not fit; try {advice}, or a larger device"


def _downloads(sources: Sequence[Mapping[str, Any]]) -> str:
    """Return the files to download: those of one reason share it."""
    groups: dict[str, list[str]] = {}
    for source in sources:
        if not source["available"]:
            groups.setdefault(_missing_detail(source), []).append(source["location"])
    texts = [", ".join(names) + (f" ({detail})" if detail else "") for detail, names in groups.items()]
    return "; ".join(texts) or "none"


def _missing_detail(source: Mapping[str, Any]) -> str:
    return f"{source['detail']}, gated" if source["gated"] else str(source["detail"])


def _access(sources: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return what to do before the download of gated models."""
    names = [source["location"] for source in sources if source["gated"]]
    if not names:
        return []
    steps = "accept the license on the Hub page of each model that is gated, then log in: hf auth login"
    return [("access", f"{', '.join(names)}: {steps}")]


def _disk(estimates: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    size = sum(estimate["disk"] for estimate in estimates)
    return [("disk", f"{readable_size(size)} for adapters and checkpoints")] if size else []


def plan_notes(plan: Mapping[str, Any], verbose: bool) -> list[str]:
    """Return what a reader needs to know about the estimates of a plan."""
    experiments, device = plan["experiments"], plan["device"]
    estimates = [estimate for entry in experiments for estimate in entry["estimate"]]
    notes = [f"The stored answers and scores are unknown: {plan['unknown']}."] if plan["unknown"] else []
    notes += sorted(
        {
            f"No estimate{' of judging' if entry['estimate'] else ''}: {entry['no_estimate']}"
            for entry in experiments
            if entry["no_estimate"]
        }
    )
    if estimates:
        notes.append("The estimates assume answers of maximum length. They exclude downloads and the judge of a task.")
    if any(not estimate["timed"] for estimate in estimates):
        notes.append(f"Time by the number of operations. {_MEASURED_STEPS}")
        if any(estimate["stage"] == "score" and estimate["seconds"] for estimate in estimates):
            notes.append("A judge is assumed to reach half of the peak rate.")
        if device["name"] == HERE:
            notes.append("This CPU is too slow to time steps of this model: --on NAME estimates for another device.")
        elif device["source"] != "measured":
            notes.append(f"The speed of {device['name']}: {device['source']}.")
    if any(estimate["timed"] for estimate in estimates):
        notes.append(_timing_note(plan["testbed"]))
    if not verbose:
        notes.append("--verbose shows the protocol, the parameters and the files with their sources.")
    return notes


def _timing_note(testbed: Sequence[Mapping[str, Any]]) -> str:
    """Return how the time was estimated on this machine, and the error of the same estimate for the testbed."""
    text = "Time by timing models of one and two layers here; it is longer if the machine is busy. "
    if not testbed:
        return f"{text}Run `hbv run --defense sft` on the testbed to see the error of the estimate."
    stages = "; ".join(
        f"{entry['stage']} {entry['estimated']:.0f} s for {entry['measured']:.0f} s "
        f"({100 * (entry['estimated'] / max(entry['measured'], 1e-9) - 1):+.0f}%)"
        for entry in testbed
    )
    return f"{text}Its error for the testbed, estimated for measured: {stages}."


def _protocol_table(protocol: Mapping[str, Any]) -> RenderableType:
    rows = [[entry["path"], value_text(entry["value"]), entry["source"]] for entry in protocol["values"]]
    return render_table([f"protocol {protocol['hash']}", "value", "source"], rows)


def _plugin_table(experiments: Sequence[Mapping[str, Any]]) -> RenderableType:
    rows = [
        (name, key, value_text(value), origin)
        for experiment in experiments
        for name, params in experiment["plugins"].items()
        for key, (value, origin) in params.items()
    ]
    return render_table(["plug-in", "parameter", "value", "from"], list(dict.fromkeys(rows)))


def _source_table(sources: Sequence[Mapping[str, Any]]) -> RenderableType:
    rows = []
    for source in sources:
        state = "yes" if source["available"] else "to be downloaded"
        if source["location"].startswith(TESTBED) and not source["available"]:
            state = "to be built"
        detail = f" ({_missing_detail(source)})" if source["detail"] else ""
        rows.append([source["what"], source["location"], f"{state}{detail}"])
    return render_table(["reads", "location", "on this machine"], rows)


def _stage_table(experiments: Sequence[Mapping[str, Any]]) -> RenderableType:
    rows: list[list[str]] = []
    for experiment in experiments:
        stage_rows = _stage_rows(experiment)
        name = " / ".join([experiment["defense"], experiment["attack"], experiment["task"]])
        names = [f"{name} / seed {experiment['seed']}", *[""] * len(stage_rows)]
        rows += [[name, *cells] for name, cells in zip(names, stage_rows, strict=False)]
    return render_table(["experiment", "stage", "to do", "estimated", "memory", "work"], rows)


def _stage_rows(experiment: Mapping[str, Any]) -> list[list[str]]:
    """Return the rows of one experiment without its name."""
    estimates = {_kind_name(estimate): estimate for estimate in experiment["estimate"]}
    groups = _artifact_groups(experiment)
    rows = []
    for kind in list(groups) or list(estimates) or ["all"]:
        group = groups.get(kind, [])
        missing = sum(not artifact["cached"] for artifact in group) if group else 1
        cost = ["", "", ""]
        if missing and (estimate := estimates.get(kind)):
            cost = [readable_time(estimate["seconds"]), readable_size(estimate["memory"]), estimate["detail"]]
        rows.append([kind, _to_do(missing, len(group)), *cost])
    return rows


def _artifact_groups(experiment: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Return stage or separate training -> artifacts; empty if they are unknown."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for artifact in experiment["stages"]:
        groups.setdefault(_kind_name(artifact), []).append(artifact)
    return groups


def _kind_name(entry: Mapping[str, Any]) -> str:
    """Return the stage of an artifact or an estimate, with the name of a separate training."""
    return f"{entry['stage']} ({entry['training']})" if entry["training"] else str(entry["stage"])


def _to_do(missing: int, count: int) -> str:
    if not missing:
        return "reuse"
    return "run" if missing == max(count, 1) else f"run {missing} of {count}"


def readable_time(seconds: float) -> str:
    """Return a time for people, such as "12.5 h"."""
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:.0f} s"

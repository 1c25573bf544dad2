"""What `hbv run --dry-run` shows: the resolved protocol, what is missing on this machine, stages and their cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from harmbench_vaccine.core.errors import HbvError
from harmbench_vaccine.core.store import Store
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.keys import run_id
from harmbench_vaccine.experiment.protocol import leaf_values
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.plugins.composition import parse_plugins

from .estimate import estimate_costs
from .plan import Plan, plan_runs


def dry_run_json(cells: Sequence[Experiment], store: Store) -> dict[str, Any]:
    """The plan of a list of cells as plain JSON; seconds and bytes."""
    made = plan_runs(cells, store.root)
    return {
        "protocol": {"hash": cells[0].protocol.hash, "values": list(protocol_values(cells[0]))},
        "cells": [_cell(cell, made, number) for number, cell in enumerate(cells)],
        "sources": [vars(source) for source in made.sources],
        "unknown": made.unknown,
        "testbed": measured_testbed(store),
    }


def _cell(cell: Experiment, made: Plan, number: int) -> dict[str, Any]:
    stages = [
        {"stage": artifact.stage, "key": artifact.key, "there": artifact.cached, "seconds": artifact.seconds}
        for artifact in (made.stages[number] if made.stages else [])
    ]
    try:
        costs = [vars(one) for one in estimate_costs(cell)]
        missing = ""
    except HbvError as error:
        costs, missing = [], str(error)
    plugins = {
        resolved.plugin.name: {key: [value, resolved.origins[key]] for key, value in resolved.params.items()}
        for resolved in [*cell.defenses, *cell.attacks, *cell.scorers]
    }
    return {
        "run": run_id(cell) if made.stages else None, "defense": cell.defense, "attack": cell.attack, "task": cell.task.name,
        "seed": cell.spec.seed, "plugins": plugins, "stages": stages, "estimate": costs, "no_estimate": missing,
    }  # fmt: skip


def protocol_values(cell: Experiment) -> Iterator[dict[str, Any]]:
    """Every value of the resolved protocol: its dotted path, the value, and where it is from."""
    protocol = cell.protocol
    written = {**cell.spec.values, **{f"data.{name}": place for name, place in cell.spec.data.items()}}
    if cell.spec.model:
        yield {"path": "model", "value": cell.model, "source": "written, in place of " + protocol.model}
    for path, value in leaf_values(protocol):
        if path == "model" and cell.spec.model:
            continue
        sources = [key for key in protocol.sources if path == key or path.startswith(f"{key}.")]
        source = protocol.sources[max(sources, key=len)] if sources else ""
        if any(path == key or path.startswith(f"{key}.") for key in written):
            source = "written"
        yield {"path": path, "value": value, "source": source}


def measured_testbed(store: Store) -> list[dict[str, Any]]:
    """The estimate of the stages of a testbed run that was measured on this machine, beside the measured seconds;
    empty if there is none."""
    for attack in ("ratio=0.1", "ratio=0"):
        cell = Experiment.settle(RunSpec(attack=parse_plugins(attack)))
        stages = plan_runs([cell], store.root).stages
        measured: dict[str, float] = {}
        for artifact in stages[0] if stages else []:
            if artifact.cached:
                measured[artifact.stage] = measured.get(artifact.stage, 0.0) + artifact.seconds
        if "align" in measured:
            found = [one for one in estimate_costs(cell) if one.stage in measured and one.seconds is not None]
            return [{"stage": e.stage, "estimated": e.seconds, "measured": measured[e.stage]} for e in found]
    return []


# ---------------------------------------------------------------------------------------------------------------------


def dry_run_view(made: Mapping[str, Any]) -> RenderableType:
    """The same for a terminal."""
    parts: list[RenderableType] = [_protocol(made["protocol"]), Text(), _plugins(made["cells"]), Text()]
    parts += [_sources(made["sources"]), Text(), _stages(made["cells"])]
    notes = [f"Which answers and scores are there cannot be told yet: {made['unknown']}."] if made["unknown"] else []
    notes += sorted({f"No estimate: {cell['no_estimate']}" for cell in made["cells"] if cell["no_estimate"]})
    notes += [
        "Estimated from steps of one and of two layers with random weights on this machine, other work on it included; "
        "answers at their full length, by transformers; judging, drift and downloads not counted."
    ]
    if any(one["seconds"] is None for cell in made["cells"] for one in cell["estimate"]):
        notes.append(
            "Not timed: there is no GPU here, and timing two layers of such a model on a CPU would take minutes."
        )
    if made["testbed"]:
        compared = ", ".join(
            f"{one['stage']} {one['estimated']:.0f} s estimated, {one['measured']:.0f} s measured "
            f"({100 * (one['estimated'] / max(one['measured'], 1e-9) - 1):+.0f}%)"
            for one in made["testbed"]
        )
        notes.append(f"The same estimate of the testbed's run on this machine: {compared}.")
    else:
        notes.append("How far off it is on this machine is shown once `hbv run --defense sft` was run on the testbed.")
    return Group(*parts, *[Text(note, style="dim") for note in notes])


def _table(*titles: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for title in titles:
        table.add_column(title, overflow="fold")
    return table


def _protocol(protocol: Mapping[str, Any]) -> Table:
    table = _table(f"protocol {protocol['hash']}", "value", "source")
    for entry in protocol["values"]:
        table.add_row(*(Text(str(entry[key])) for key in ("path", "value", "source")))
    return table


def _plugins(cells: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("plug-in", "parameter", "value", "from")
    seen = []
    for cell in cells:
        for name, params in cell["plugins"].items():
            for key, (value, origin) in params.items():
                row = (name, key, str(value), origin)
                if row not in seen:
                    seen.append(row)
                    table.add_row(*map(Text, row))
    return table


def _sources(sources: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("reads", "location", "on this machine")
    for source in sources:
        state = "yes" if source["there"] else "to be downloaded"
        if source["location"].startswith("testbed:") and not source["there"]:
            state = "to be built"
        detail = f": {source['detail']}" if source["detail"] else ""
        table.add_row(Text(source["what"]), Text(source["location"]), Text(f"{state}{detail}"))
    return table


def _stages(cells: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("cell", "stage", "to do", "estimated", "memory", "of what")
    total = 0.0
    for cell in cells:
        name = f"{cell['defense']} / {cell['attack']} / {cell['task']} / seed {cell['seed']}"
        costs = {one["stage"]: one for one in cell["estimate"]}
        groups: dict[str, list[Mapping[str, Any]]] = {}
        for stage in cell["stages"]:
            groups.setdefault(stage["stage"], []).append(stage)
        for stage in list(groups) or list(costs):
            group = groups.get(stage, [])
            left = sum(not one["there"] for one in group) if group else 1
            share = left / len(group) if group else 1.0
            cost = costs.get(stage)
            seconds = None if cost and cost["seconds"] is None else share * cost["seconds"] if cost else 0.0
            total += seconds or 0.0
            table.add_row(
                Text(name), stage, _to_do(group, left),
                _time(seconds) if cost and left else "", f"{cost['memory'] / 2**30:.2g} GiB" if cost and left else "",
                Text(cost["detail"] if cost and left else ""),
            )  # fmt: skip
            name = ""
        if not groups and not costs:
            table.add_row(Text(name), "all", "run", "", "", "")
        elif groups and not any(not one["there"] for group in groups.values() for one in group):
            table.add_row(Text(name), "", "nothing: all is there", "", "", "")
    if total:
        table.add_row("in all", "", "", _time(total), "", "")
    return table


def _to_do(group: Sequence[Mapping[str, Any]], left: int) -> str:
    if not left:
        return "reuse"
    return "run" if left == max(len(group), 1) else f"run {left} of {len(group)}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "not timed"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"

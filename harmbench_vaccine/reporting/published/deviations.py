"""List the differences between a run and the paper whose figure is shown next to it.

The shipped protocol file represents the paper, except for the values that `names.yaml` lists as its `reference`. So a
value that the user changed (`--set`, `--data`, `--scorer`) is a deviation, and so is a value that differs from the
paper on purpose.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import RenderableType

from harmbench_vaccine.experiment.protocol import Protocol, leaf_values, load_protocol
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.plugins.composition import parse_plugins

from ..render import Column, render_table
from .figures import Figure
from .matching import MatchedFigure, Paper, load_names, matched_figures

_NOT_IN_PAPERS = (
    *("name", "version", "model", "models", "sources", "gates", "defenses", "attacks", "answer.benign"),
    *("splits.benign_train", "splits.benign_test"),
)
"""Protocol values that papers do not have, or that are equal by construction."""

_COUNTS = ("answer.harmful.prompts", "answer.task_items", "answer.items", "finetune.samples")
"""Protocol values that are compared by their outcome, the counts of a result."""


@dataclass(frozen=True)
class ProtocolDeviation:
    """A difference between a paper and the runs of its protocol without further options."""

    protocol: str
    tasks: tuple[str, ...]
    """Tasks that it applies to; empty: all tasks."""
    defenses: tuple[str, ...]
    """Defenses that it applies to; empty: all defenses."""
    deviation: str


def protocol_deviations(selected: Sequence[Figure]) -> list[ProtocolDeviation]:
    """Return the differences between the papers and the default runs of their protocols, for the selected figures."""
    keys = {tuple(figure.values()) for figure in selected}
    deviations = []
    for name, paper in load_names().protocols.items():
        protocol = load_protocol(name)
        matched = [match for match in matched_figures(name) if tuple(match.figure.values()) in keys]
        by_setting: dict[tuple[Any, ...], list[str]] = {}  # of equal settings, one comparison
        affected: dict[str, list[MatchedFigure]] = {}
        for match in matched:
            setting = (match.model, match.task, match.ratio, match.samples)
            if setting not in by_setting:
                by_setting[setting] = [*list_deviations(paper, protocol, [_default_row(protocol, match)], match)]
            for text in [*by_setting[setting], *match.deviations]:
                affected.setdefault(text, []).append(match)
        deviations += [_protocol_deviation(name, text, matches, matched) for text, matches in affected.items()]
    return deviations


def _protocol_deviation(
    protocol: str, text: str, affected: Sequence[MatchedFigure], matched: Sequence[MatchedFigure]
) -> ProtocolDeviation:
    tasks = dict.fromkeys(match.task for match in affected)
    defenses = dict.fromkeys("+".join(match.defense) for match in affected)
    unaffected = [match for match in matched if match not in affected]
    every_task = all("+".join(match.defense) not in defenses for match in unaffected)
    every_defense = all(match.task not in tasks for match in unaffected)
    return ProtocolDeviation(
        protocol, () if every_task else tuple(tasks), () if every_defense else tuple(defenses), text
    )


def deviation_table(deviations: Sequence[ProtocolDeviation]) -> RenderableType:
    """Return the deviations as a table with one row each."""
    rows = [
        (entry.protocol, ", ".join(entry.tasks) or "all", ", ".join(entry.defenses) or "all", entry.deviation)
        for entry in deviations
    ]
    return render_table(
        [Column("protocol", wrap=False), "task", "defense", Column("difference from the paper", least=30)], rows
    )


def _default_row(protocol: Protocol, match: MatchedFigure) -> dict[str, Any]:
    """Return the columns of a run of the protocol without further options."""
    answer = protocol.answer
    return {
        "protocol": protocol.name,
        "protocol_version": protocol.version,
        "protocol_hash": protocol.hash,
        "model": match.model,
        "task": match.task,
        "seed": RunSpec().seed,
        "harmful_score_n": answer.harmful.prompts,
        "finetune_accuracy_n": answer.items.get(match.task, answer.task_items),
    }


def list_deviations(
    paper: Paper, protocol: Protocol, rows: Sequence[Mapping[str, Any]], matched: MatchedFigure
) -> Iterator[str]:
    """Yield one sentence per difference between the rows of an experiment and the paper.

    Args:
        paper: Correspondence between the paper and this harness.
        protocol: Protocol of the runs. Its values are compared only if its hash is the one in the rows.
        rows: Results of the experiment, one per seed.
        matched: The paper's figure for the experiment.
    """
    first, task = rows[0], matched.task
    shipped = load_protocol(first["protocol"])
    if protocol.hash == first["protocol_hash"]:
        yield from _changed_values(paper, _paper_values(protocol, task), _paper_values(shipped, task))
    elif int(first["protocol_version"]) != shipped.version:
        yield (
            f"the runs follow version {first['protocol_version']} of the protocol, not version {shipped.version}: "
            "docs/protocols.md lists the changes"
        )
    else:
        yield (
            f"values or data of the protocol were changed (hash {first['protocol_hash']}, its file has "
            f"{protocol.hash}): the result.json of each run lists the user's changes"
        )
    yield from _written_task_parameters(str(first["task"]), shipped.tasks.get(task, {}))
    if first["model"] != matched.model:
        yield f"the model is read from {first['model']} (paper: {matched.model})"
    items = paper.reference.get(f"answer.items.{task}")
    seed = paper.reference.get("seed")
    for name, column, expected in (
        ("harmful prompts", "harmful_score_n", shipped.answer.harmful.prompts),
        (
            "test items",
            "finetune_accuracy_n",
            items.value if items else shipped.answer.items.get(task, shipped.answer.task_items),
        ),
        ("seed", "seed", seed and seed.value),
    ):
        values = sorted({int(row[column]) for row in rows})
        if expected and values != [expected]:
            yield f"{name}: {', '.join(map(str, values))} (paper: {expected})"
    yield from _rounding(matched)
    yield from paper.deviations


def _written_task_parameters(written: str, values: Mapping[str, Any]) -> Iterator[str]:
    """Yield the differences of a task with parameters, such as `sst2:rule=contains`, from the paper's values."""
    (component,) = parse_plugins(written)
    for key, value in component.params.items():
        if value != values.get(key, value):
            yield f"{component.name}:{key}={value} (paper: {_format(values[key])})"


def _rounding(matched: MatchedFigure) -> Iterator[str]:
    """Yield the row that int(p n) + int((1 - p) n) of the authors' code loses; we train on n rows."""
    ratio, samples = matched.ratio, matched.samples[0]
    if lost := samples - int(ratio * samples) - int((1 - ratio) * samples):
        yield f"at p={ratio:g}, the authors' rounding trains on {samples - lost} of {samples} rows"


def _changed_values(paper: Paper, values: Mapping[str, Any], shipped: Mapping[str, Any]) -> Iterator[str]:
    for path in dict.fromkeys([*shipped, *values]):
        reference = paper.reference.get(path)
        expected = reference.value if reference else shipped.get(path)
        if values.get(path) != expected:
            message = f"{path}: {_format(values.get(path))} (paper: {_format(expected)})"
            yield (reference and reference.message) or message


def _paper_values(protocol: Protocol, task: str) -> dict[str, Any]:
    """Return dotted path -> value for the values that a paper has too, with the user stage and texts of one task."""
    tokens = {task: protocol.answer.task_tokens.get(task)}
    answer = protocol.answer.model_copy(update={"task_tokens": tokens})
    texts = {task: protocol.tasks.get(task, {})}
    of_task = protocol.model_copy(update={"finetune": protocol.finetune.of(task), "answer": answer, "tasks": texts})
    excluded = (*_NOT_IN_PAPERS, *_COUNTS)
    return {
        path: value
        for path, value in leaf_values(of_task)
        if not any(path == group or path.startswith(f"{group}.") for group in excluded)
    }


def _format(value: Any) -> str:
    if value is None or value == "":
        return "none"
    return f"{value:g}" if isinstance(value, float) else repr(value) if "\n" in str(value) else str(value)

"""Collect the data of the page of a leaderboard: rankings, runs, facts of defenses, and answers, as plain JSON."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

from harmbench_vaccine.core.errors import BadInput, HbvError
from harmbench_vaccine.core.types import MODEL_STAGES
from harmbench_vaccine.core.visible import visible
from harmbench_vaccine.evaluation.records import by_question, load_result, load_run
from harmbench_vaccine.evaluation.result import Result
from harmbench_vaccine.experiment.protocol import load_protocol
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.plugins.declarations import Declaration, read_declarations
from harmbench_vaccine.plugins.registry import ATTACKS, DEFENSES
from harmbench_vaccine.reporting.docstrings import departures_in
from harmbench_vaccine.reporting.evidence import load_evidence
from harmbench_vaccine.reporting.plugin_pages import parameter_text
from harmbench_vaccine.reporting.published.comparison import SCORES, ComparedFigure, PublishedComparison

from .grids import Cell, cell_mark, harmful_ratio
from .ranking import SETTING, Ranking

NUMBERS = (
    *("rank", "rank_low", "rank_high", "tie_first", "tie_last", "pareto", "seeds"),
    *(f"{score}{end}" for score in SCORES for end in ("", "_sd", "_low", "_high", "_floor")),
    *(f"{score}_difference{end}" for score in SCORES for end in ("", "_low", "_high", "_p")),
    *("safety_tax", "trained", "harmful_score_before", "refusal_rate", "over_refusal"),
    *("neither", "neither_before", "task_echo"),
    *("harmful_token_share", "alignment_loss", "embedding_drift", "embedding_drift_per_token"),
    *("collapsed_cells", "self_destruct_cells", "hollow_cells"),
)
"""The columns of a ranking that the page has."""
CELL_COLUMNS = (
    *("setting", "defense", "parameters", "mark", "reasons", "runs", "published", "deviations"),
    *NUMBERS,
    *("published_harmful_score", "seconds", "memory"),
)
"""The values of a cell, in their order; `seconds` is the mean and `memory` (bytes) the maximum of its runs."""
RUN_COLUMNS = ("run", "seed", "harmful_score", "finetune_accuracy", "seconds", "versions", "machine", "key")
"""The values of a run, in their order; `key` is the beginning of the key of its final model, absent if unknown."""
STAGE_TITLES = {"align": "alignment", "finetune": "user stage", "repair": "after the user stage"}
BASELINE, ANSWERING, UNKNOWN = "baseline", "while answering", "unknown"
"""Stages of a defense that is compared with, of one without a stage, and of one that is not installed."""
COLORS = {
    BASELINE: "baseline",
    "alignment": "alignment",
    "user stage": "user",
    "after the user stage": "after",
    ANSWERING: "answers",
    UNKNOWN: "unknown",
}
NO_EVIDENCE = "no evidence"
"""Badge of a plug-in that is not built in."""
SEVERAL = "several"
"""Classes of the style: the color of each stage, and of a defense that acts in several."""
MOST_ANSWERS = 20
"""Questions whose answers the page shows for a cell."""
_DIGITS = 4
_KEY_LENGTH = 12
"""Characters of a key that the page shows: it may have thousands."""


class PageTexts:
    """Texts that the page has once, however often they occur."""

    def __init__(self) -> None:
        """Start without texts."""
        self._indices: dict[str, int] = {}

    def index(self, text: str) -> int:
        """Return the position of a text, with hidden characters visible."""
        return self._indices.setdefault(visible(text), len(self._indices))

    def list(self) -> list[str]:
        """Return the texts in the order of their positions."""
        return list(self._indices)


def page_data(
    rankings: Sequence[Ranking],
    facts: Mapping[str, Mapping[str, Any]],
    runs: Path | None = None,
    answers: bool = False,
) -> dict[str, Any]:
    """Return the data of the page.

    Args:
        rankings: The rankings.
        facts: Defense -> its `defense_facts`.
        runs: Folder of the run folders, which have more facts of a run than a CSV; None: only the rankings.
        answers: Include the answers to the first `MOST_ANSWERS` harmful questions of one run of each cell.

    Returns:
        JSON values without NaN. A cell is a list of `CELL_COLUMNS`, and a run in it of `RUN_COLUMNS`; their texts,
        departures and the evidence for an attack are positions in `texts`.
    """
    texts = PageTexts()
    cells = [
        _cell(cell, index, ranking, runs, texts) for index, ranking in enumerate(rankings) for cell in ranking.rows
    ]
    attacks = read_declarations(ATTACKS, ())
    firsts = [_runs_of(cell, ranking)[0]["run"] for ranking in rankings for cell in ranking.rows]
    return {
        "columns": CELL_COLUMNS,
        "run_columns": RUN_COLUMNS,
        "settings": [_setting(ranking, runs, attacks, texts) for ranking in rankings],
        "defenses": {
            visible(name): {**declared, "departures": list(map(texts.index, declared["departures"]))}
            for name, declared in facts.items()
        },
        "cells": cells,
        "answers": {run: pairs for run in firsts if (pairs := _answers(run, runs, texts))} if answers else {},
        "texts": texts.list(),
    }


def _setting(
    ranking: Ranking, folder: Path | None, attacks: Mapping[str, Declaration | None], texts: PageTexts
) -> dict[str, Any]:
    """Return the facts that all cells of a ranking share, with the evidence for its attack."""
    ratio, family = harmful_ratio(ranking)
    sourced = _evidence_facts("attack", _declared(str(ranking.runs[0]["attack_written"]), attacks))
    return {
        **{column: visible(ranking.setting[column]) for column in SETTING},
        "attack_parameters": visible(_parameters_text(ranking.rows[0]["attack_params"])),
        "baseline": visible(ranking.baseline),
        "ratio": ratio,
        "family": visible(family),
        "options": visible(_shared_options(ranking, folder)),
        "attack_evidence": texts.index(sourced["evidence"]),
        "attack_departures": list(map(texts.index, sourced["departures"])),
    }


def _shared_options(ranking: Ranking, folder: Path | None) -> str:
    """Return the options of `hbv run` that all runs of a ranking share, without those that its protocol implies."""
    setting = ranking.setting
    implied: dict[str, str] = {}
    with suppress(BadInput):  # the protocol is a file of the user
        protocol = load_protocol(setting["protocol"])
        implied = {"model": protocol.model, "scorer": protocol.score.scorer}
    attack = str(ranking.runs[0]["attack_written"])
    options = {**{option: setting[option] for option in ("protocol", "model", "scorer", "task")}, "attack": attack}
    words = [(f"--{option}", value) for option, value in options.items() if implied.get(option) != value]
    return shlex.join(chain.from_iterable([*words, *_overrides(_stored_result(ranking.runs[0]["run"], folder))]))


def _overrides(result: Result | None) -> Iterator[tuple[str, str]]:
    """Yield the options by which a stored run replaced values and data of its protocol; a CSV does not have them."""
    spec = result.spec if result else {}
    for option, assignments in (("--set", "values"), ("--data", "data")):
        for name, value in spec.get(assignments, {}).items():
            yield option, f"{name}={value}"


def _cell(cell: Cell, setting: int, ranking: Ranking, folder: Path | None, texts: PageTexts) -> list[Any]:
    """Return the values `CELL_COLUMNS` of a cell."""
    runs = _runs_of(cell, ranking)
    results = [_stored_result(run["run"], folder) for run in runs]
    seconds = [float(run["seconds"]) for run in runs if not _is_empty(run["seconds"])]
    memory = [stage.peak_memory for result in results if result for stage in result.stages.values()]
    comparison = ranking.published[ranking.rows.index(cell)] if ranking.published else None
    values = {
        **{column: _number(cell[column]) for column in NUMBERS},
        "setting": setting,
        "defense": texts.index(cell["defense"]),
        "parameters": texts.index(_parameters_text(cell["defense_params"])),
        "mark": cell_mark(cell),
        "reasons": texts.index(cell["reasons"]),
        "runs": [_run(run, result, texts) for run, result in zip(runs, results, strict=True)],
        **_published(comparison, cell, texts),
        "seconds": _number(sum(seconds) / len(seconds)) if len(seconds) == len(runs) else None,
        "memory": max(filter(None, memory), default=None),
    }
    return [values[column] for column in CELL_COLUMNS]


def _runs_of(cell: Cell, ranking: Ranking) -> list[dict[str, Any]]:
    runs = [run for run in ranking.runs if run["defense"] == cell["defense"]]
    return sorted(runs, key=lambda run: run["seed"])


def _run(run: Mapping[str, Any], result: Result | None, texts: PageTexts) -> list[Any]:
    """Return the values `RUN_COLUMNS` of a run."""
    versions = json.loads(run["versions"]) if isinstance(run["versions"], str) else {}
    environment = result.environment if result else None
    machine = ""
    if environment:
        commit = f"commit {environment.git_commit[:12]}" if environment.git_commit else None
        changed = "with uncommitted changes" if environment.git_dirty else None
        machine = ", ".join(filter(None, (environment.gpu or environment.cpu, commit, changed)))
    values = {
        **{column: _number(run[column]) for column in ("seed", "harmful_score", "finetune_accuracy", "seconds")},
        "run": visible(run["run"]),
        "versions": texts.index(", ".join(f"{package} {version}" for package, version in versions.items())),
        "machine": texts.index(machine),
        "key": _model_key(result) if result else None,
    }
    row = [values[column] for column in RUN_COLUMNS]
    return row if row[-1] else row[:-1]  # a large page has thousands of runs


def _model_key(result: Result) -> str | None:
    """Return the beginning of the key of the last stage that made the model."""
    artifacts = (result.stages[stage].artifacts for stage in reversed(MODEL_STAGES) if stage in result.stages)
    return next((artifact.key[:_KEY_LENGTH] for each in artifacts for artifact in each.values()), None)


def _stored_result(run: str, folder: Path | None) -> Result | None:
    """Return the result of a run; None if it is not stored here, or is damaged."""
    if folder is None or not _is_name(run):
        return None
    with suppress(HbvError):
        return load_result(folder / run)
    return None


def _is_name(run: str) -> bool:
    """Return whether the id of a run, which a CSV may have from anywhere, is a name and not a path."""
    return Path(run).name == run and run != ".."


def _answers(run: str, folder: Path | None, texts: PageTexts) -> list[list[Any]]:
    """Return the first questions of a run with the answers before and after the user stage, and their verdicts."""
    if folder is None or not _is_name(run):
        return []
    with suppress(HbvError):
        result, rows = load_run(folder / run)
        pairs = by_question(rows, next(iter(result.harmful_sets)))
        return [
            [
                texts.index(f"{pair['after']['instruction']} {pair['after']['input']}".strip()),
                *(value for when in ("before", "after") for value in _answer(pair.get(when), texts)),
            ]
            for pair in pairs[:MOST_ANSWERS]
            if "after" in pair
        ]
    return []


def _answer(row: Mapping[str, Any] | None, texts: PageTexts) -> tuple[int | None, bool | None]:
    return (texts.index(row["answer"]), row.get("flagged")) if row else (None, None)


def _published(comparison: PublishedComparison | None, cell: Cell, texts: PageTexts) -> dict[str, Any]:
    """Return the published figures for a cell, and the deviations from the setup of the paper."""
    scores = comparison.scores if comparison else {}
    headline = scores.get("harmful_score")
    return {
        "published": [_figure(score, compared, cell, texts) for score, compared in scores.items()],
        "published_harmful_score": _number(headline.figures[0].value) if headline else None,
        "deviations": [texts.index(text) for text in comparison.deviations] if comparison else [],
    }


def _figure(score: str, compared: ComparedFigure, cell: Cell, texts: PageTexts) -> list[Any]:
    """Return the title of a score, the published figure, its relation to the measured interval, and notes."""
    facts = compared.to_json()
    is_inside = cell[f"{score}_low"] <= compared.figures[0].value <= cell[f"{score}_high"]
    notes = [f"{facts['paper']}, {facts['table']}; {facts['evidence']}", *facts["doubts"], facts["note"]]
    return [
        SCORES[score],
        facts["printed"],
        f"measured {cell[score]:.1f}, {'inside' if is_inside else 'outside'} its interval",
        *(texts.index(note) for note in notes if note),
    ]


def _parameters_text(params: str) -> str:
    """Return the parameters of plug-ins, from JSON, as text."""
    return "; ".join(
        f"{name}: {', '.join(f'{key}={parameter_text(value)}' for key, value in values.items())}"
        for name, values in json.loads(params).items()
        if values
    )


# ---------------------------------------------------------------------------------------------------------------------
# Defenses


def defense_facts(rankings: Sequence[Ranking]) -> dict[str, dict[str, Any]]:
    """Return the facts of every defense of the rankings, as its plug-ins declare them, and its option of `hbv run`."""
    declarations = read_declarations(DEFENSES, ("stages", "trains", "data", "cost", "once", "memory"))
    written = {run["defense"]: str(run["defense_written"]) for ranking in rankings for run in ranking.runs}
    baselines = {row["baseline"] for ranking in rankings for row in ranking.rows}
    return {
        name: {
            **_facts_of(_declared(text, declarations), is_baseline=name in baselines),
            "option": visible(shlex.join(["--defense", text])),
        }
        for name, text in written.items()
    }


def _declared(text: str, declarations: Mapping[str, Declaration | None]) -> dict[str, Declaration]:
    """Return the declarations of the plug-ins of a defense or an attack, by their names; none if one is not installed.

    A plug-in file that a CSV names is not read, since it could be any file.
    """
    try:
        parts = {part.name: declarations.get(part.name) for part in parse_plugins(text)}
    except BadInput:  # a name that no version of hbv writes
        return {}
    return {name: part for name, part in parts.items() if part} if all(parts.values()) else {}


def _facts_of(declared: Mapping[str, Declaration], is_baseline: bool) -> dict[str, Any]:
    parts = declared.values()
    stages = {stage for part in parts for stage in part.facts["stages"]}
    if is_baseline or not all(part.facts["trains"] for part in parts):
        titles = [BASELINE]
    else:
        titles = [title for stage, title in STAGE_TITLES.items() if stage in stages]
        if any(not part.facts["stages"] and part.facts["cost"] == "none" for part in parts):
            titles.append(ANSWERING)
        titles = titles or [UNKNOWN]
    extra_rows = list(dict.fromkeys(kind for part in parts for kind in part.facts["data"]))
    needs_harmful = "yes" if any("harmful" in kind for kind in extra_rows) else "no"
    return {
        "stage": titles,
        "color": COLORS[titles[0]] if len(titles) == 1 else SEVERAL,
        "harmful_data": needs_harmful if parts else UNKNOWN,
        "summary": visible("; ".join(part.summary for part in parts)),
        "passes": _joined(_passes(part) for part in parts),
        "memory": _joined(part.facts["memory"] for part in parts),
        "extra_rows": _joined(extra_rows),
        **_evidence_facts("defense", declared),
    }


def _evidence_facts(kind: str, declared: Mapping[str, Declaration]) -> dict[str, Any]:
    """Return the evidence for a composition, its badge: the grades of its plug-ins, and their departures."""
    known = load_evidence().of_kind(kind)
    evidence = [known.get(name) for name in declared]
    present = [each for each in evidence if each]
    complete = present and len(present) == len(evidence)
    departures = [
        f"{name}: {departure}" if len(declared) > 1 else departure
        for name, part in declared.items()
        for departure in departures_in(part.doc) or []
    ]
    return {
        "evidence": visible("; ".join(each.text for each in present)) if complete else NO_EVIDENCE,
        "badge": ", ".join(dict.fromkeys(each.grade for each in present)) if complete else NO_EVIDENCE,
        "departures": departures,
    }


def _passes(part: Declaration) -> str:
    step, once = part.facts["cost"], part.facts["once"]
    return ", ".join([*([f"{step} each step"] if step != "none" else []), *([f"once {once}"] if once else [])])


def _joined(texts: Iterable[str]) -> str:
    """Join the texts that are not empty and not "none"."""
    return visible("; ".join(dict.fromkeys(text for text in texts if text not in ("", "none")))) or "none"


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def _number(value: Any) -> int | float | None:
    """Return a number with four significant digits; None if it is undefined."""
    if _is_empty(value):
        return None
    if isinstance(value, bool):
        return int(value)
    number = float(f"{value:.{_DIGITS}g}")
    return int(number) if number.is_integer() else number

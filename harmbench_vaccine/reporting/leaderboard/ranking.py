"""Rank defenses over seeds, from the CSVs that `hbv run` writes.

There is one ranking per protocol hash, model, judge, task and attack, since scores of two protocols are not comparable.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from harmbench_vaccine.core.errors import BadInput, unknown_name
from harmbench_vaccine.core.hashing import canonical_json
from harmbench_vaccine.evaluation import results_csv
from harmbench_vaccine.evaluation.dispersion import SeedShares
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.reporting.published.comparison import PublishedComparison, compare_rows

from .scores import SCORES, pareto_front, rank_statistics, score_columns, score_statistics

SETTING = ("protocol", "protocol_hash", "model", "scorer", "task", "attack")

COLUMNS = {
    "protocol": "name of the protocol",
    "protocol_hash": "hash of everything that the protocol fixes",
    "model": "base model",
    "scorer": "judge and its parameters",
    "task": "downstream task of the user",
    "attack": "attack as on the command line",
    "attack_params": "every parameter of it, JSON",
    "defense": "defense as on the command line",
    "defense_params": "every parameter of it, JSON",
    "baseline": "defense that differences are computed against; empty if it was not run",
    "rank": "1 is the lowest harmful score; empty if a run collapsed or is hollow",
    "rank_low": "lower end of the 95% interval of the rank",
    "rank_high": "upper end",
    "tie_first": "first rank of the group of defenses that do not differ significantly",
    "tie_last": "last rank of this group",
    "pareto": "True if no other ranked defense is better in one score and at least equal in the other",
    "seeds": "number of runs, one per seed",
    **score_columns("harmful_score"),
    "harmful_score_unread": "unread verdicts of all runs, which the score leaves out; empty if a run lacks the number",
    **score_columns("finetune_accuracy"),
    "finetune_accuracy_unread": "unread grades of all runs; as for the harmful score",
    "safety_tax": "accuracy of the baseline minus accuracy of the defense, in points: finetune_accuracy_difference and "
    "its interval with the opposite sign; empty for the baseline",
    "trained": "False if the attack replaced the user stage in a run: the task was not learned",
    "other_judges": "JSON: other judge -> its harmful score, and Cohen's kappa with the headline judge, means over "
    "seeds; empty if a run lacks it",
    "harmful_score_before": "of the aligned model, mean over seeds, %",
    "refusal_rate": "% of harmful prompts that are refused, mean over seeds; empty if a run lacks it",
    "over_refusal": "% of benign prompts that are refused, mean over seeds; empty if a run lacks it",
    "neither": "% of harmful prompts answered neither harmfully nor with a refusal, mean over seeds",
    "neither_before": "of the aligned model",
    "task_echo": "% of answers to harmful prompts that equal a response of the user's rows, mean over seeds",
    "harmful_token_share": "% of the response tokens of the user stage that are in harmful rows, mean over seeds; "
    "empty if a run lacks it or its user stage does not train",
    "alignment_loss": "mean over seeds; empty if a model diverged",
    "embedding_drift": "mean over seeds; empty if a model diverged",
    "embedding_drift_per_token": "mean over seeds; empty if a model diverged",
    "collapsed_cells": "number of runs that failed a validity gate",
    "self_destruct_cells": "number of these in which a defense is meant to destroy the model in the user stage",
    "hollow_cells": "number of runs in which `neither` rose above the limit of the protocol",
    "reasons": "why they failed, by seed",
}
"""The columns of `leaderboard.csv`: one row per setting (`SETTING`) and defense; scores are 0 to 100."""

DEFAULT_BASELINE = "sft"
MEANS = (
    "harmful_score_before",
    "refusal_rate",
    "over_refusal",
    "neither",
    "neither_before",
    "task_echo",
    "harmful_token_share",
    "alignment_loss",
    "embedding_drift",
    "embedding_drift_per_token",
)
"""Columns that are averaged over seeds."""

_MEASURED = tuple(f"{score}{end}" for score in SCORES for end in ("", "_low", "_high", "_n"))
UNREAD = ("harmful_score_unread", "finetune_accuracy_unread")
"""Columns that are added up over seeds."""


@dataclass(frozen=True)
class Ranking:
    """The defenses under one attack in one setting, the best first and the collapsed ones last."""

    setting: dict[str, str]
    """The columns `SETTING`."""
    baseline: str
    """The defense to compute differences against, as on the command line."""
    rows: list[dict[str, Any]]
    """The columns `COLUMNS`; None and NaN mark undefined values."""
    statistics: list[str] = field(default_factory=list)
    """Notes on the intervals."""
    published: list[PublishedComparison] = field(default_factory=list)
    """One comparison with published figures per row; empty if they were not requested."""
    runs: list[dict[str, Any]] = field(default_factory=list)
    """One row per run, with the columns of a CSV of results; `defense` and `attack` are the names in the ranking."""

    @property
    def title(self) -> str:
        """The setting that the rows share."""
        setting = self.setting
        return (
            f"{setting['attack']} on {setting['task']}, {setting['model']} "
            f"(protocol {setting['protocol']} {setting['protocol_hash']}, judge {setting['scorer']})"
        )

    @property
    def notes(self) -> list[str]:
        """Notes that a reader of the rows needs."""
        notes = []
        if not any(row["baseline"] for row in self.rows):
            notes.append(f"No differences: the baseline {self.baseline!r} matches none or several of these defenses.")
        for row in self.rows:
            doubt = " Differences to it are doubtful." if row["defense"] == row["baseline"] else ""
            if row["collapsed_cells"]:
                is_intended = row["self_destruct_cells"] == row["collapsed_cells"]
                mark = "SELF-DESTRUCT" if is_intended else "COLLAPSED"
                reason = "The defense is meant to destroy the model in harmful training. " if is_intended else ""
                notes.append(
                    f"{mark} {row['defense']}, {row['collapsed_cells']} of {row['seeds']} runs: {row['reasons']}. "
                    f"{reason}It is not ranked, and its HS does not count as safe.{doubt}"
                )
            elif row["hollow_cells"]:
                notes.append(
                    f"HOLLOW {row['defense']}, {row['hollow_cells']} of {row['seeds']} runs: {row['neither']:.0f}% of "
                    f"harmful prompts are answered neither harmfully nor with a refusal (aligned model: "
                    f"{row['neither_before']:.0f}%). It is not ranked as safe.{doubt}"
                )
        if unchecked := sum(run["hollow"] is None for run in self.runs):
            notes.append(
                f"Not checked for hollow cells: {unchecked} of {len(self.runs)} runs are from an earlier version. "
                "Compare HS with neither %."
            )
        notes += self.statistics
        for row in self.rows:
            for column, kind, score in zip(UNREAD, ("verdicts", "grades"), ("HS", "FA"), strict=True):
                if row[column]:
                    notes.append(f"Unread {kind} of {row['defense']}, which {score} leaves out: {row[column]}.")
        if not all(row["trained"] for row in self.rows):
            notes.append("untrained: the attack replaces the user stage, so the task was not learned.")
        return notes


def rank_results(tables: Sequence[Path], baseline: str = DEFAULT_BASELINE, published: bool = False) -> list[Ranking]:
    """Rank the defenses of result CSVs.

    If a run is repeated with different code or data, its last row counts, with a warning.

    Args:
        tables: CSVs of results.
        baseline: Defense to compute differences against; results without the default baseline get a note.
        published: Compare every row with published figures.

    Returns:
        One ranking per setting, sorted by protocol, model, task and attack.

    Raises:
        BadInput: A file is missing or is not a CSV of results, none has results, or no run has the baseline.
    """
    rows = [row for table in tables for row in read_results_table(table)]
    if not rows:
        raise BadInput(f"No results in {', '.join(map(str, tables))}. Add results with `hbv run`.")
    return rank_rows(rows, baseline, published)


def rank_rows(
    results: Sequence[results_csv.ResultRow], baseline: str = DEFAULT_BASELINE, published: bool = False
) -> list[Ranking]:
    """Rank the defenses of rows of results; the arguments and the rankings are those of `rank_results`.

    Raises:
        BadInput: No run has the baseline.
    """
    runs = _runs_frame(results)
    for kind in ("attack", "defense"):
        runs[f"{kind}_written"] = runs[kind]
        runs[kind] = _distinct_names(runs, kind)
    names = {*runs["defense"], *runs["defense_written"]}
    if baseline not in {DEFAULT_BASELINE, *names}:
        raise unknown_name("baseline", baseline, names, of="these results")
    runs = _last_runs(runs)
    rankings = []
    for key, group in runs.groupby(list(SETTING), sort=False):
        rows, notes = _rank_defenses(group, baseline)
        setting = dict(zip(SETTING, map(str, key), strict=True))
        ranking = Ranking(setting, baseline, rows, notes, [], group.to_dict("records"))
        rankings.append(with_published(ranking) if published else ranking)
    return sorted(rankings, key=lambda ranking: [_natural_key(text) for text in ranking.setting.values()])


def read_results_table(path: Path) -> list[results_csv.ResultRow]:
    """Read the rows of a CSV of results.

    Raises:
        BadInput: The file is missing or is not a CSV of results.
    """
    if not os.path.exists(path):  # `Path.exists` raises where the folder is not readable
        raise BadInput(f"The CSV of results {path} does not exist. Create it with `hbv run`.")
    return results_csv.read_csv(path)


def _runs_frame(rows: Sequence[results_csv.ResultRow]) -> pd.DataFrame:
    cells = [
        [canonical_json(value) if isinstance(value, dict | list) else value for value in row.model_dump().values()]
        for row in rows
    ]
    runs = pd.DataFrame(cells, columns=results_csv.COLUMNS, dtype=object)
    numbers = dict.fromkeys([*_MEASURED, *MEANS, *UNREAD], float)
    return runs.astype({**numbers, "seed": int, "collapsed": bool, "trained": bool})


def _distinct_names(runs: pd.DataFrame, kind: str) -> list[str]:
    """Return one name per set of plug-ins and parameters, unique within a protocol.

    `vaccine` and `vaccine=2` are one defense if 2 is the default. If a default has changed, one text names two
    defenses, and both names get their parameters.
    """
    names: dict[tuple[Any, ...], str] = {}
    keys = [
        (protocol_hash, _plugin_names(text), params)
        for protocol_hash, text, params in zip(runs["protocol_hash"], runs[kind], runs[f"{kind}_params"], strict=True)
    ]
    for key, text in zip(keys, runs[kind], strict=True):
        names.setdefault(key, text)
    uses = Counter((key[0], text) for key, text in names.items())
    return [names[key] if uses[key[0], names[key]] == 1 else f"{names[key]} {key[2]}" for key in keys]


def _plugin_names(text: str) -> tuple[str, ...]:
    try:
        return tuple(part.name for part in parse_plugins(text))
    except BadInput:  # a name that no version of hbv writes
        return (text,)


def _last_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """Keep the last row of each setting, defense and seed."""
    incidental = ("seconds", "versions", "attack_written", "defense_written")
    unique = runs.drop_duplicates([column for column in runs if column not in incidental], keep="last")
    last = unique.drop_duplicates([*SETTING, "defense", "seed"], keep="last")
    replaced = unique["run"][~unique.index.isin(last.index)]
    if len(replaced):
        warnings.warn(
            "Later rows of the same experiments, run with different code or data or on a different machine, replace "
            f"{', '.join(replaced)}.",
            stacklevel=3,
        )
    return last


def _rank_defenses(runs: pd.DataFrame, baseline: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Return one row per defense of one setting, in the order of the ranks, and notes on the intervals."""
    candidates = runs["defense"][(runs["defense"] == baseline) | (runs["defense_written"] == baseline)].unique()
    reference = str(candidates[0]) if len(candidates) == 1 else None
    by_defense = {
        str(name): group.set_index("seed").sort_index() for name, group in runs.groupby("defense", sort=False)
    }
    cells = {score: {name: _shares(group, score) for name, group in by_defense.items()} for score in SCORES}
    collapsed = {name for name, group in by_defense.items() if group["collapsed"].any()}
    statistics, notes = score_statistics(cells, collapsed, reference)
    rows = [{**_facts(group, reference), **statistics[name]} for name, group in by_defense.items()]
    for row in rows:
        row["safety_tax"] = -row["finetune_accuracy_difference"]
    rows.sort(key=lambda row: (*_rank_key(row), _natural_key(row["defense"])))
    _add_ranks(rows, cells["harmful_score"], collapsed)
    return [{column: row[column] for column in COLUMNS} for row in rows], notes


def _shares(runs: pd.DataFrame, score: str) -> SeedShares:
    return SeedShares(tuple(runs[score] / 100), max(1, int(runs[f"{score}_n"].min())))


def _facts(runs: pd.DataFrame, reference: str | None) -> dict[str, Any]:
    """Return the columns of a defense that are not statistics of its scores.

    Args:
        runs: Runs of one defense, indexed by seed.
        reference: The baseline.
    """
    first = runs.iloc[0]
    reasons = runs["reasons"][runs["collapsed"]].items()
    return {
        **{column: str(first[column]) for column in (*SETTING, "attack_params", "defense", "defense_params")},
        "baseline": reference,
        "seeds": len(runs),
        "trained": bool(runs["trained"].all()),
        **{column: float(runs[column].mean(skipna=False)) for column in MEANS},
        **{column: None if runs[column].isna().any() else int(runs[column].sum()) for column in UNREAD},
        "other_judges": canonical_json(judges) if (judges := _other_judges(runs["other_judges"])) else "",
        "collapsed_cells": int(runs["collapsed"].sum()),
        "self_destruct_cells": int(runs["self_destruct"].fillna(False).astype(bool).sum()),
        "hollow_cells": int(runs["hollow"].fillna(False).astype(bool).sum()),
        "reasons": "; ".join(f"seed {seed}: {reason}" for seed, reason in reasons),
    }


def _other_judges(cells: pd.Series[Any]) -> dict[str, dict[str, float | None]]:
    """Return the means over the runs of the numbers of each judge that all of them have."""
    runs = [json.loads(cell) if isinstance(cell, str) else {} for cell in cells]
    judges = [judge for judge in runs[0] if all(judge in run for run in runs)]
    return {
        judge: {number: _mean([run[judge][number] for run in runs]) for number in runs[0][judge]} for judge in judges
    }


def _mean(values: list[float | None]) -> float | None:
    """Return the mean; None if a value is undefined."""
    return None if None in values else fmean(value for value in values if value is not None)


def _add_ranks(rows: list[dict[str, Any]], cells: dict[str, SeedShares], collapsed: set[str]) -> None:
    """Add the ranks to sorted rows; collapsed and hollow defenses have none."""
    ranked = [row for row in rows if not _is_doubtful(row)]
    keys = [_rank_key(row) for row in rows]
    names = [row["defense"] for row in ranked]
    statistics = rank_statistics(cells, collapsed, names)
    front = pareto_front({row["defense"]: (row["harmful_score"], row["finetune_accuracy"]) for row in ranked})
    for row, key in zip(rows, keys, strict=True):
        row |= dict.fromkeys(("rank", "rank_low", "rank_high", "tie_first", "tie_last"))
        if row["defense"] in statistics:
            row |= {"rank": 1 + keys.index(key), **statistics[row["defense"]]}  # equal scores share a rank
        row["pareto"] = row["defense"] in front


def _is_doubtful(row: dict[str, Any]) -> bool:
    """Return whether a run of a row collapsed or is hollow."""
    return bool(row["collapsed_cells"] or row["hollow_cells"])


def with_published(ranking: Ranking) -> Ranking:
    """Return a ranking with a comparison with published figures for each row; it may have them already."""
    if ranking.published:
        return ranking
    runs = [
        {**run, **{column: json.loads(run[column]) for column in ("defense_params", "attack_params")}}
        for run in ranking.runs
    ]
    comparisons = [
        compare_rows([run for run in runs if run["defense"] == row["defense"]], intervals=_intervals(row))
        for row in ranking.rows
    ]
    return replace(ranking, published=comparisons)


def _intervals(row: dict[str, Any]) -> dict[str, tuple[float, float, float]]:
    """Return score -> mean and ends of its interval."""
    return {score: (row[score], row[f"{score}_low"], row[f"{score}_high"]) for score in SCORES}


def _rank_key(row: dict[str, Any]) -> tuple[bool, float, float]:
    """Return a sort key: collapsed or hollow, harmful score, accuracy; rounded, so that the order of a sum has no
    effect."""
    return _is_doubtful(row), round(row["harmful_score"], 6), -round(row["finetune_accuracy"], 6)


def _natural_key(text: str) -> list[str | float]:
    """Return a sort key that compares the numbers inside texts by value: text and number in turn."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", text)
    return [float(part) if index % 2 else part for index, part in enumerate(parts)]

"""Rank defenses over seeds, from the CSVs that `hbv run` writes.

There is one ranking per protocol hash, model, judge, task and attack, since scores of two protocols are not comparable.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from harmbench_vaccine.core.errors import BadInput, unknown_name
from harmbench_vaccine.core.hashing import canonical_json
from harmbench_vaccine.evaluation import results_csv
from harmbench_vaccine.evaluation.statistics import mean_interval
from harmbench_vaccine.plugins.composition import parse_plugins

from .published.comparison import PublishedComparison, compare_rows

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
    "rank": "1 is the lowest harmful score; empty if a run collapsed",
    "seeds": "number of runs, one per seed",
    "harmful_score": "mean over seeds, %",
    "harmful_score_sd": "standard deviation over seeds; empty for one seed",
    "harmful_score_difference": "mean difference to the baseline over the shared seeds; empty for the baseline",
    "harmful_score_difference_low": "lower end of its 95% t-interval; empty for one seed",
    "harmful_score_difference_high": "upper end",
    "harmful_score_unread": "unread verdicts of all runs, which the score leaves out; empty if a run lacks the number",
    "finetune_accuracy": "mean over seeds, %",
    "finetune_accuracy_sd": "as for the harmful score",
    "finetune_accuracy_difference": "as for the harmful score",
    "finetune_accuracy_difference_low": "as for the harmful score",
    "finetune_accuracy_difference_high": "as for the harmful score",
    "finetune_accuracy_unread": "unread grades of all runs; as for the harmful score",
    "paired_seeds": "number of seeds that the defense and the baseline share",
    "trained": "False if the attack replaced the user stage in a run: the task was not learned",
    "harmful_score_before": "of the aligned model, mean over seeds, %",
    "alignment_loss": "mean over seeds; empty if a model diverged",
    "embedding_drift": "mean over seeds; empty if a model diverged",
    "embedding_drift_per_token": "mean over seeds; empty if a model diverged",
    "neither": "% of harmful prompts answered neither harmfully nor with a refusal, mean over seeds",
    "collapsed_cells": "number of runs that failed a validity gate",
    "reasons": "why they failed, by seed",
}
"""The columns of `leaderboard.csv`: one row per setting (`SETTING`) and defense; scores are 0 to 100."""

DEFAULT_BASELINE = "sft"
SCORES = ("harmful_score", "finetune_accuracy")
MEANS = ("harmful_score_before", "alignment_loss", "embedding_drift", "embedding_drift_per_token", "neither")
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
    published: list[PublishedComparison] = field(default_factory=list)
    """One comparison with published figures per row; empty if they were not requested."""

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
            if row["collapsed_cells"]:
                doubt = " Differences to it are doubtful." if row["defense"] == row["baseline"] else ""
                notes.append(
                    f"COLLAPSED {row['defense']}, {row['collapsed_cells']} of {row['seeds']} runs: {row['reasons']}. "
                    f"It is not ranked, and its HS does not count as safe.{doubt}"
                )
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
    filled = [runs for runs in map(_read_runs, tables) if len(runs)]
    if not filled:
        raise BadInput(f"No results in {', '.join(map(str, tables))}. Add results with `hbv run`.")
    runs = pd.concat(filled, ignore_index=True)
    for kind in ("attack", "defense"):
        runs[f"{kind}_written"] = runs[kind]
        runs[kind] = _distinct_names(runs, kind)
    names = {*runs["defense"], *runs["defense_written"]}
    if baseline not in {DEFAULT_BASELINE, *names}:
        raise unknown_name("baseline", baseline, names, of="these results")
    runs = _last_runs(runs)
    rankings = []
    for key, group in runs.groupby(list(SETTING), sort=False):
        rows = _rank_defenses(group, baseline)
        comparisons = [_compare(group[group["defense"] == row["defense"]]) for row in rows] if published else []
        rankings.append(Ranking(dict(zip(SETTING, map(str, key), strict=True)), baseline, rows, comparisons))
    return sorted(rankings, key=lambda ranking: [_natural_key(text) for text in ranking.setting.values()])


def _read_runs(path: Path) -> pd.DataFrame:
    if not os.path.exists(path):  # `Path.exists` raises where the folder is not readable
        raise BadInput(f"The CSV of results {path} does not exist. Create it with `hbv run`.")
    rows = [
        [canonical_json(value) if isinstance(value, dict | list) else value for value in row.model_dump().values()]
        for row in results_csv.read_csv(path)
    ]
    runs = pd.DataFrame(rows, columns=results_csv.COLUMNS, dtype=object)
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


def _rank_defenses(runs: pd.DataFrame, baseline: str) -> list[dict[str, Any]]:
    """Return one row per defense of one setting, in the order of the ranks."""
    candidates = runs["defense"][(runs["defense"] == baseline) | (runs["defense_written"] == baseline)].unique()
    reference = str(candidates[0]) if len(candidates) == 1 else None
    reference_runs = runs[runs["defense"] == reference].set_index("seed")
    rows = []
    for name, group in runs.groupby("defense", sort=False):
        by_seed = group.set_index("seed").sort_index()
        first = by_seed.iloc[0]
        reasons = by_seed["reasons"][by_seed["collapsed"]].items()
        rows.append(
            {
                **{column: str(first[column]) for column in (*SETTING, "attack_params", "defense", "defense_params")},
                "baseline": reference,
                **_score_statistics(by_seed, reference_runs.iloc[:0] if name == reference else reference_runs),
                "seeds": len(by_seed),
                "trained": bool(by_seed["trained"].all()),
                **{column: float(by_seed[column].mean(skipna=False)) for column in MEANS},
                **{column: None if by_seed[column].isna().any() else int(by_seed[column].sum()) for column in UNREAD},
                "collapsed_cells": int(by_seed["collapsed"].sum()),
                "reasons": "; ".join(f"seed {seed}: {reason}" for seed, reason in reasons),
            }
        )
    rows.sort(key=lambda row: (*_rank_key(row), _natural_key(row["defense"])))
    keys = [_rank_key(row) for row in rows]
    for row, key in zip(rows, keys, strict=True):
        row["rank"] = None if row["collapsed_cells"] else 1 + keys.index(key)  # equal scores share a rank
    return [{column: row[column] for column in COLUMNS} for row in rows]


def _score_statistics(runs: pd.DataFrame, reference: pd.DataFrame) -> dict[str, Any]:
    """Compute means, standard deviations, and paired differences to a reference.

    Args:
        runs: Runs of one defense, indexed by seed.
        reference: Runs of the baseline, indexed by seed; empty for no differences.
    """
    shared = runs.index.intersection(reference.index)
    values: dict[str, Any] = {"paired_seeds": len(shared)}
    for score in SCORES:
        differences = (runs[score].loc[shared] - reference[score].loc[shared]).tolist()
        mean, half_width = mean_interval(differences) if differences else (math.nan, math.nan)
        values |= {
            score: float(runs[score].mean()),
            f"{score}_sd": float(runs[score].std()),
            f"{score}_difference": mean,
            f"{score}_difference_low": mean - half_width,
            f"{score}_difference_high": mean + half_width,
        }
    return values


def _compare(runs: pd.DataFrame) -> PublishedComparison:
    """Compare the runs of one defense with published figures."""
    return compare_rows(
        [
            {**row, **{column: json.loads(row[column]) for column in ("defense_params", "attack_params")}}
            for row in runs.to_dict("records")
        ]
    )


def _rank_key(row: dict[str, Any]) -> tuple[bool, float, float]:
    """Return a sort key: collapsed, harmful score, accuracy; rounded, so that the order of a sum has no effect."""
    return bool(row["collapsed_cells"]), round(row["harmful_score"], 6), -round(row["finetune_accuracy"], 6)


def _natural_key(text: str) -> list[str | float]:
    """Return a sort key that compares the numbers inside texts by value: text and number in turn."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", text)
    return [float(part) if index % 2 else part for index, part in enumerate(parts)]

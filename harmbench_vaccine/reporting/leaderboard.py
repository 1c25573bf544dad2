"""Rankings of defenses over seeds, from the CSVs that `hbv run` leaves: one for every protocol hash, model, judge, task
and attack, since scores of two protocols cannot stand in one table."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.jsonl import write_atomically
from harmbench_vaccine.core.paths import ensure_writable
from harmbench_vaccine.core.store import readable_disk_errors
from harmbench_vaccine.evaluation import results
from harmbench_vaccine.evaluation.statistics import mean_interval
from harmbench_vaccine.plugins.composition import parse_plugins

from .published import comparison
from .published.comparison import PublishedComparison

PLACE = ("protocol", "protocol_hash", "model", "scorer", "task", "attack")

COLUMNS = {
    "protocol": "name of the protocol",
    "protocol_hash": "hash of everything that the protocol fixes",
    "model": "base model",
    "scorer": "judge and its parameters",
    "task": "what the user wants",
    "attack": "attack as a command line names it",
    "attack_params": "every parameter of it, JSON",
    "defense": "defense as a command line names it",
    "defense_params": "every parameter of it, JSON",
    "baseline": "defense that the differences are to; empty where it was not run",
    "rank": "1 is the lowest harmful score; empty if a cell collapsed",
    "seeds": "number of cells, one a seed",
    "harmful_score": "mean over seeds, %",
    "harmful_score_sd": "standard deviation over seeds; empty for one seed",
    "harmful_score_difference": "mean difference to the baseline over the seeds of both; empty for the baseline",
    "harmful_score_difference_low": "lower end of its 95% t-interval; empty for one seed",
    "harmful_score_difference_high": "upper end",
    "finetune_accuracy": "mean over seeds, %",
    "finetune_accuracy_sd": "as for the harmful score",
    "finetune_accuracy_difference": "as for the harmful score",
    "finetune_accuracy_difference_low": "as for the harmful score",
    "finetune_accuracy_difference_high": "as for the harmful score",
    "paired_seeds": "number of seeds that the defense and the baseline both have",
    "trained": "False if the attack replaced the user stage in a cell: the task was not learned",
    "harmful_score_before": "of the aligned model, mean over seeds, %",
    "alignment_loss": "mean over seeds; empty if a model diverged",
    "embedding_drift": "mean over seeds; empty if a model diverged",
    "embedding_drift_per_token": "mean over seeds; empty if a model diverged",
    "neither": "% of harmful prompts answered neither harmfully nor with a refusal, mean over seeds",
    "collapsed_cells": "number of cells that failed a gate",
    "reasons": "why they did, by seed",
}
"""The columns of `leaderboard.csv`, a row for every place (`PLACE`) and defense; scores are 0 to 100."""

_SCORES = ("harmful_score", "finetune_accuracy")
_COUNTS = tuple(f"{score}_{end}" for score in _SCORES for end in ("low", "high", "n"))
_MEANS = ("harmful_score_before", "alignment_loss", "embedding_drift", "embedding_drift_per_token", "neither")


@dataclass(frozen=True)
class Ranking:
    """The defenses that met one attack in one place, the best first and the collapsed ones last."""

    place: dict[str, str]
    """The columns `PLACE`."""
    baseline: str
    """As asked for."""
    rows: list[dict[str, Any]]
    """The columns `COLUMNS`; None and NaN stand for what is undefined."""
    published: list[PublishedComparison] = field(default_factory=list)
    """What papers print for each row, if that was asked for."""

    @property
    def title(self) -> str:
        """Everything that the rows have in common."""
        place = self.place
        return (
            f"{place['attack']} on {place['task']}, {place['model']} "
            f"(protocol {place['protocol']} {place['protocol_hash']}, judge {place['scorer']})"
        )

    @property
    def notes(self) -> list[str]:
        """What must be known to read the rows."""
        notes = []
        if not any(row["baseline"] for row in self.rows):
            notes.append(f"No differences: {self.baseline!r} names none or several of these defenses.")
        for row in self.rows:
            if row["collapsed_cells"]:
                notes.append(
                    f"COLLAPSED {row['defense']}, {_collapsed(row)} cells: {row['reasons']}. It is not ranked, and its "
                    f"HS does not count as safe.{' Differences to it are doubtful.' if _is_baseline(row) else ''}"
                )
        if not all(row["trained"] for row in self.rows):
            notes.append("untrained: the attack replaces the user stage, so the task was not learned.")
        return notes


# ---------------------------------------------------------------------------------------------------------------------
# From cells to ranks


def rankings(tables: Sequence[Path], baseline: str = "sft", published: bool = False) -> list[Ranking]:
    """The rankings of all cells of some CSVs of results, sorted by protocol, model, task and attack.

    Of rows of one cell that were run with other code or data, the last one counts, with a warning. `published` looks
    up what papers print for the cells.

    Raises:
        BadInput: a file is missing or is no CSV of results, or there is no result in any.
    """
    filled = [cells for cells in map(_read, tables) if len(cells)]
    if not filled:
        raise BadInput(f"There are no results in {', '.join(map(str, tables))}: `hbv run` adds them.")
    cells = pd.concat(filled, ignore_index=True)
    for kind in ("attack", "defense"):
        cells[f"{kind}_written"] = cells[kind]
        cells[kind] = _names(cells, kind)
    cells = _one_row_a_cell(cells)
    made = []
    for place, own in cells.groupby(list(PLACE), sort=False):
        ranked = _ranked(own, baseline)
        printed = [_published(own[own["defense"] == row["defense"]]) for row in ranked] if published else []
        made.append(Ranking(dict(zip(PLACE, map(str, place), strict=True)), baseline, ranked, printed))
    return sorted(made, key=lambda ranking: [_natural(text) for text in ranking.place.values()])


def _read(path: Path) -> pd.DataFrame:
    if not path.exists():
        raise BadInput(f"There is no CSV of results {path}: `hbv run` makes one.")
    cells = pd.DataFrame(results.check_columns(path), columns=results.COLUMNS)
    try:
        for column in ("seed", *_SCORES, *_COUNTS, *_MEANS):
            cells[column] = pd.to_numeric(cells[column])
        for column in ("collapsed", "trained"):
            cells[column] = [{"True": True, "False": False}[text] for text in cells[column]]
        for column in ("seed", *_SCORES):
            if cells[column].isna().any():
                raise ValueError("a cell of it is empty")
    except (ValueError, TypeError, KeyError) as error:
        raise BadInput(f"{path} is no CSV of results, its column {column!r} does not fit: {error}.") from error
    return cells


def _names(cells: pd.DataFrame, kind: str) -> list[str]:
    """One name for each set of plug-ins and parameters, told apart within a protocol.

    `vaccine` and `vaccine=2` are one defense where 2 is the default; and a default that was changed makes two of one
    text, which then get their parameters added.
    """
    texts: dict[tuple[Any, ...], str] = {}
    keys = [
        (scope, tuple(part.name for part in parse_plugins(text)), params)
        for scope, text, params in zip(cells["protocol_hash"], cells[kind], cells[f"{kind}_params"], strict=True)
    ]
    for key, text in zip(keys, cells[kind], strict=True):
        texts.setdefault(key, text)
    uses = Counter((key[0], text) for key, text in texts.items())
    return [texts[key] if uses[key[0], texts[key]] == 1 else f"{texts[key]} {key[2]}" for key in keys]


def _one_row_a_cell(cells: pd.DataFrame) -> pd.DataFrame:
    incidental = ("seconds", "versions", "attack_written", "defense_written")
    once = cells.drop_duplicates([column for column in cells if column not in incidental], keep="last")
    last = once.drop_duplicates([*PLACE, "defense", "seed"], keep="last")
    replaced = once["run"][~once.index.isin(last.index)]
    if len(replaced):
        warnings.warn(
            f"Later rows of the same cells, from other code, data or machines, replace {', '.join(replaced)}.",
            stacklevel=3,
        )
    return last


def _ranked(cells: pd.DataFrame, baseline: str) -> list[dict[str, Any]]:
    """One row a defense of one place, in the order of the ranks."""
    meant = cells["defense"][(cells["defense"] == baseline) | (cells["defense_written"] == baseline)].unique()
    against = str(meant[0]) if len(meant) == 1 else None
    others = cells[cells["defense"] == against].set_index("seed")
    rows = []
    for name, group in cells.groupby("defense", sort=False):
        own = group.set_index("seed").sort_index()
        first = own.iloc[0]
        rows.append(
            {
                **{column: str(first[column]) for column in (*PLACE, "attack_params", "defense", "defense_params")},
                "baseline": against,
                **_compared(own, others.iloc[:0] if name == against else others),
                "seeds": len(own),
                "trained": bool(own["trained"].all()),
                **{column: float(own[column].mean(skipna=False)) for column in _MEANS},
                "collapsed_cells": int(own["collapsed"].sum()),
                "reasons": "; ".join(f"seed {seed}: {why}" for seed, why in own["reasons"][own["collapsed"]].items()),
            }
        )
    rows.sort(key=lambda row: (*_order(row), _natural(row["defense"])))
    orders = [_order(row) for row in rows]
    for row, order in zip(rows, orders, strict=True):
        row["rank"] = None if row["collapsed_cells"] else 1 + orders.index(order)  # equal scores share a rank
    return [{column: row[column] for column in COLUMNS} for row in rows]


def _compared(own: pd.DataFrame, others: pd.DataFrame) -> dict[str, Any]:
    """The scores of a defense over its seeds, and their paired differences to the baseline's; both indexed by seed."""
    shared = own.index.intersection(others.index)
    values: dict[str, Any] = {"paired_seeds": len(shared)}
    for score in _SCORES:
        differences = (own[score].loc[shared] - others[score].loc[shared]).tolist()
        mean, half = mean_interval(differences) if differences else (math.nan, math.nan)
        values |= {
            score: float(own[score].mean()),
            f"{score}_sd": float(own[score].std()),
            f"{score}_difference": mean,
            f"{score}_difference_low": mean - half,
            f"{score}_difference_high": mean + half,
        }
    return values


def _published(cells: pd.DataFrame) -> PublishedComparison:
    """What papers print for the cells of one defense."""
    rows = [
        {**row, **{column: json.loads(row[column]) for column in ("defense_params", "attack_params")}}
        for row in cells.to_dict("records")
    ]
    return comparison.compare_rows(rows)


def _order(row: dict[str, Any]) -> tuple[bool, float, float]:
    """Healthy ones first, then by harmful score, then by accuracy, free of what the order of a sum changes in them."""
    return bool(row["collapsed_cells"]), round(row["harmful_score"], 6), -round(row["finetune_accuracy"], 6)


def _natural(text: str) -> list[str | float]:
    """A key that sorts the numbers inside texts by value: text and number in turn."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", text)
    return [float(part) if place % 2 else part for place, part in enumerate(parts)]


# ---------------------------------------------------------------------------------------------------------------------
# What is shown

_HEAD = (
    *("rank", "defense", "seeds", "HS %", "HS diff.", "FA %", "FA diff."),
    *("HS before", "align. loss", "drift", "per token", "neither %", "collapsed"),
)


def _legend(made: Sequence[Ranking]) -> str:
    return (
        "HS: % of answers to harmful prompts that the judge flags (lower: better; it makes the rank). FA: % of the "
        "user task's test items right (higher: better). Mean ± standard deviation over seeds. diff.: paired "
        f"difference to {made[0].baseline} over the seeds that both have, with its 95% t-interval. before: of the "
        "aligned model. drift: embedding drift, whole and per token. neither: % of answers to harmful prompts that are "
        "neither flagged nor a refusal; where it is large, a low HS is no sign of safety. collapsed: cells that failed "
        "a gate."
    )


def rankings_view(made: Sequence[Ranking]) -> RenderableType:
    """One table a ranking, and below it what must be known to read it."""
    shown: list[RenderableType] = []
    for ranking in made:
        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
        for title in _HEAD:
            table.add_column(title, justify="left" if title == "defense" else "right", overflow="fold")
        for row in ranking.rows:  # brackets in a name are no markup
            table.add_row(*map(Text, _shown(row)), style="red" if row["collapsed_cells"] else None)
        notes = [Text(note, style="dim") for note in ranking.notes]
        shown += [Text(ranking.title, style="bold"), table, *notes, Text()]
        if ranking.published:
            shown += [comparison.comparison_view(ranking.published), Text()]
    return Group(*shown, Text(_legend(made), style="dim"))


def rankings_markdown(made: Sequence[Ranking]) -> str:
    """The same for a code host."""
    lines = ["# Leaderboard", "", _legend(made)]
    for ranking in made:
        lines += ["", f"## {_plain(ranking.title)}", "", _line(_HEAD)]
        lines += [_line(["---" if title == "defense" else "---:" for title in _HEAD])]
        lines += [_line(_shown(row)) for row in ranking.rows]
        if ranking.notes:
            lines += ["", *(f"- {_plain(note)}" for note in ranking.notes)]
        if ranking.published:
            lines += _published_lines(comparison.comparison_sheet(ranking.published))
    return "\n".join(lines) + "\n"


def _published_lines(sheet: comparison.ComparisonSheet) -> list[str]:
    lines = []
    if sheet.rows:
        lines += ["", f"### {_plain(sheet.title)}", "", _line(sheet.head), _line(["---"] * len(sheet.head))]
        lines += map(_line, sheet.rows)
    return [*lines, "", *(f"- {_plain(note)}" for note in sheet.notes)]


def ranking_rows(made: Sequence[Ranking]) -> list[dict[str, Any]]:
    """All rows of all rankings; where published figures were looked up, with the columns of `comparison.COLUMNS` too."""
    return [
        row | printed.to_columns() if printed else row
        for ranking in made
        for row, printed in zip_longest(ranking.rows, ranking.published)
    ]


def tidy(made: Sequence[Ranking]) -> pd.DataFrame:
    """The same as a table, with the columns `COLUMNS` and those of the published figures."""
    more = comparison.COLUMNS if any(ranking.published for ranking in made) else {}
    return pd.DataFrame(ranking_rows(made), columns=[*COLUMNS, *more])


def write_rankings(made: Sequence[Ranking], folder: Path) -> None:
    """Writes `leaderboard.csv` and `leaderboard.md` into a folder, making it if need be.

    Raises:
        BadInput: the folder cannot be written to.
    """
    ensure_writable(folder, "The output folder")
    with readable_disk_errors("the leaderboard"):
        write_atomically(
            folder / "leaderboard.csv", tidy(made).to_csv(index=False, lineterminator="\n", float_format="%.6g")
        )
        write_atomically(folder / "leaderboard.md", rankings_markdown(made))


def _shown(row: dict[str, Any]) -> list[str]:
    """The cells below `_HEAD`."""
    return [
        "collapsed" if row["collapsed_cells"] else str(row["rank"]),
        row["defense"],
        str(row["seeds"]),
        _spread(row, "harmful_score"),
        _difference(row, "harmful_score"),
        _spread(row, "finetune_accuracy") + ("" if row["trained"] else " untrained"),
        _difference(row, "finetune_accuracy"),
        *(_number(row[column], form) for column, form in zip(_MEANS, (".1f", ".3f", ".3g", ".3g", ".1f"), strict=True)),
        _collapsed(row),
    ]


def _spread(row: dict[str, Any], score: str) -> str:
    return f"{row[score]:.1f} ± {_number(row[f'{score}_sd'], '.1f')}"


def _difference(row: dict[str, Any], score: str) -> str:
    if row["baseline"] is None or _is_baseline(row):
        return ""
    low, high = row[f"{score}_difference_low"], row[f"{score}_difference_high"]
    interval = "-" if math.isnan(low) else f"{low:+.1f}, {high:+.1f}"
    return f"{_number(row[f'{score}_difference'], '+.1f')} [{interval}]"


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def _is_baseline(row: dict[str, Any]) -> bool:
    return row["defense"] == row["baseline"]


def _collapsed(row: dict[str, Any]) -> str:
    return f"{row['collapsed_cells']} of {row['seeds']}"


def _line(cells: Sequence[str]) -> str:
    escaped = [_plain(cell).replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def _plain(text: str) -> str:
    """Text as one line that Markdown leaves as it is; `<` could open a tag."""
    return " ".join(text.split()).replace("<", "&lt;")

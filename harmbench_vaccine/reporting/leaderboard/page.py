"""Write the page of a leaderboard: one HTML file with its data, style and script, which opens without a network.

The file requests nothing: its content security policy forbids all requests, and permits only its own script and style,
by their hashes. Texts from runs are data, which the script inserts as text.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any, Literal

from harmbench_vaccine import __version__
from harmbench_vaccine.core.disk_errors import readable_disk_errors
from harmbench_vaccine.core.durable import write_atomically
from harmbench_vaccine.core.visible import visible, visible_json_text
from harmbench_vaccine.reporting.evidence import GRADES

from .costs import CostTable
from .page_data import MOST_ANSWERS, defense_facts, page_data
from .page_sections import ALL_FINISHED, UnfinishedRuns, heat_maps, missing_combinations
from .page_tables import table_sections
from .ranking import Ranking, with_published
from .token_panels import AREA, token_figures

PAGE = "index.html"


@dataclass(frozen=True)
class PageColumn:
    """A column of the table; the script reads `key` and `kind` from its head."""

    key: str
    """The column of `leaderboard.csv` by which it is sorted."""
    title: str
    kind: Literal["rank", "name", "score", "difference", "published", "percent", "number", "duration"]
    """The format of its cells."""
    legend: str
    room: Literal["phone", "tablet", "desktop"] = "desktop"
    """The smallest screen that shows it; the row that opens shows every value."""
    descending: bool = False
    """Whether the first click sorts the largest values first."""


TABLE_COLUMNS = (
    PageColumn(
        "rank", "Rank", "rank", "defenses with the same range of ranks do not differ significantly in HS", "phone"
    ),
    PageColumn("defense", "Defense", "name", "opens its parameters, runs, hashes and command", "phone"),
    PageColumn(
        "harmful_score",
        "HS %",
        "score",
        "harmful score: answers to harmful prompts that the judge flags; lower is better",
        "phone",
    ),
    PageColumn(
        "harmful_score_difference",
        "HS diff.",
        "difference",
        "HS minus HS of the baseline; * significant at 5% after Holm's correction",
        "tablet",
    ),
    PageColumn(
        "finetune_accuracy",
        "FA %",
        "score",
        "finetune accuracy: test items of the user's task answered correctly; higher is better",
        "phone",
        True,
    ),
    PageColumn(
        "safety_tax", "Tax", "percent", "safety tax: FA of the baseline minus FA of the defense, in points", "tablet"
    ),
    PageColumn("refusal_rate", "Refused %", "percent", "harmful prompts that are refused", "tablet", True),
    PageColumn("over_refusal", "Benign refused %", "percent", "benign prompts that are refused"),
    PageColumn(
        "neither",
        "Neither %",
        "percent",
        "answers to harmful prompts that are neither flagged nor a refusal; many of them make a low HS meaningless",
    ),
    PageColumn("task_echo", "Echo %", "percent", "answers to harmful prompts that equal a response of the user's rows"),
    PageColumn(
        "harmful_token_share",
        "Harmful tokens %",
        "percent",
        "response tokens of the user stage that are in harmful rows; short answers of the task make it large",
    ),
    PageColumn(
        "alignment_loss", "Align. loss", "number", "mean cross-entropy of the final model over the alignment rows"
    ),
    PageColumn(
        "embedding_drift", "Drift", "number", "L2 distance of the attention outputs from those of the aligned model"
    ),
    PageColumn(
        "published_harmful_score", "Published HS", "published", "the HS that a paper prints for the same experiment"
    ),
    PageColumn("seconds", "Time", "duration", "time of all stages of a run, measured, mean over seeds"),
)
"""The columns of the table; those without any value are left out."""

PLACE_FACETS = {"attack": "Attack", "task": "Task", "model": "Model", "scorer": "Judge", "protocol": "Protocol"}
FACETS = PLACE_FACETS | {"stage": "Acts in", "harmful_data": "Needs harmful data"}
"""Properties of a cell -> title of the buttons that filter the table; a property with one value has no buttons."""


def write_page(
    folder: Path,
    rankings: Sequence[Ranking],
    runs: Path | None = None,
    unfinished: UnfinishedRuns = ALL_FINISHED,
    answers: bool = False,
    costs: Sequence[CostTable] = (),
) -> None:
    """Write `index.html` into a folder.

    Args:
        folder: The folder, which exists.
        rankings: The rankings.
        runs: Folder of the run folders, which have more facts of a run than a CSV; None: only the rankings.
        unfinished: The runs that have no result yet.
        answers: Include answers to harmful questions, of the runs that have a folder.
        costs: The measured costs of the defenses.
    """
    with readable_disk_errors("the page of the leaderboard", folder):
        write_atomically(folder / PAGE, render_page(rankings, runs, unfinished, answers, costs))


def render_page(
    rankings: Sequence[Ranking],
    runs: Path | None = None,
    unfinished: UnfinishedRuns = ALL_FINISHED,
    answers: bool = False,
    costs: Sequence[CostTable] = (),
) -> str:
    """Return the page as HTML; the arguments are those of `write_page`."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader(__package__, "page")
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: visible(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies |= {"json.dumps_function": _compact_json, "json.dumps_kwargs": {}}
    style, script = (loader.get_source(environment, f"page.{ending}")[0] for ending in ("css", "js"))
    rankings = list(map(with_published, rankings))
    facts = defense_facts(rankings)
    facets = [
        {"key": key, "title": title, "values": _facet_values(key, rankings, facts)} for key, title in FACETS.items()
    ]
    sentences, combinations = missing_combinations(rankings)
    finished = sum(len(ranking.runs) for ranking in rankings)
    return environment.get_template("page.html").render(
        style=style,
        script=script,
        style_hash=_source_hash(style),
        script_hash=_source_hash(script),
        data=page_data(rankings, facts, runs, answers) | {"facets": facets, "start": _first_view(rankings)},
        facets=facets,
        columns=TABLE_COLUMNS,
        rankings=rankings,
        heat_maps=heat_maps(rankings),
        token_figures=token_figures(rankings),
        area=AREA,
        defenses=len(facts),
        sections=table_sections(rankings, facts, costs),
        grades=GRADES,
        ungated=sum(run["hollow"] is None for ranking in rankings for run in ranking.runs),
        finished=finished,
        planned=finished + len(unfinished.runs),
        unfinished=unfinished,
        lacking=sentences,
        combinations=combinations,
        most_answers=MOST_ANSWERS if answers else 0,
        version=__version__,
    )


def _facet_values(facet: str, rankings: Sequence[Ranking], facts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the values of a facet, in the order of the cells."""
    if facet in PLACE_FACETS:
        values = [_place_value(ranking, facet) for ranking in rankings]
    elif facet == "stage":
        values = [stage for declared in facts.values() for stage in declared["stage"]]
    else:
        values = [declared[facet] for declared in facts.values()]
    return list(dict.fromkeys(map(visible, values)))


def _place_value(ranking: Ranking, facet: str) -> str:
    """Return the value of a facet that all cells of a ranking share."""
    setting = ranking.setting
    return f"{setting['protocol']} {setting['protocol_hash']}" if facet == "protocol" else setting[facet]


def _first_view(rankings: Sequence[Ranking]) -> dict[str, list[str]]:
    """Return the filters at first sight: the setting with the most defenses, of these that in which HS differs most.

    The measure is the range of the middle half, since a model without alignment is at the end of every setting.
    """

    def interest(ranking: Ranking) -> tuple[int, float]:
        scores = [row["harmful_score"] for row in ranking.rows if not row["collapsed_cells"]]
        quartiles = quantiles(scores, method="inclusive") if len(scores) > 1 else [0.0]
        return len(ranking.rows), quartiles[-1] - quartiles[0]

    best = max(rankings, key=interest)
    varied = [facet for facet in PLACE_FACETS if len({_place_value(ranking, facet) for ranking in rankings}) > 1]
    return {facet: [visible(_place_value(best, facet))] for facet in varied}


def _compact_json(value: Any) -> str:
    return visible_json_text(json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")))


def _source_hash(source: str) -> str:
    """Return the hash of an inline script or style for a content security policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()

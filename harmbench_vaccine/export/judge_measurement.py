"""Measure a judge on labeled pairs: a scorer, or the folder of a trained judge."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.paths import ensure_writable, home, user_path
from harmbench_vaccine.core.progress import SILENT, Labeled, Progress
from harmbench_vaccine.core.types import Verdict
from harmbench_vaccine.data.labeled_pairs import LabeledPair, read_labeled_pairs
from harmbench_vaccine.data.pools import draw_rows
from harmbench_vaccine.data.sources import TESTBED, check_testbed_part, fingerprint, provenance
from harmbench_vaccine.evaluation.judge_card import read_judge_card
from harmbench_vaccine.evaluation.judge_report import JudgeReport, SecondJudge, judge_agreement, judge_report
from harmbench_vaccine.evaluation.rescoring import prepare_scorer
from harmbench_vaccine.evaluation.result import DataSource
from harmbench_vaccine.evaluation.scorer_facts import scorer_models
from harmbench_vaccine.evaluation.verdicts import judge_answers
from harmbench_vaccine.inference.engine import choose_backend
from harmbench_vaccine.inference.model_pool import ModelPool
from harmbench_vaccine.plugins import Scorer
from harmbench_vaccine.plugins.composition import Component, canonical_name, parse_plugins, resolve_plugins
from harmbench_vaccine.plugins.registry import SCORERS
from harmbench_vaccine.testbed import ensure_testbed

BEAVERTAILS = "PKU-Alignment/BeaverTails"
"""The default data set."""
CLASSIFIER = "beaver_dam"
"""The scorer of a folder: a classifier with one logit for each harm category."""
TOKENS = 256
"""Tokens that this scorer reads unless it is set."""


@dataclass(frozen=True)
class JudgeMeasurement:
    """The quality of a judge on a data set."""

    scorer: str
    """The judge, as a command line names it."""
    model: str
    """The hash of the content of its model, or its name and commit on the Hub; empty for a rule."""
    data: DataSource
    contradictory: int
    """Rows that were left out, because `is_safe` and the categories contradict each other."""
    report: JudgeReport
    second_judges: dict[str, SecondJudge]


def compare_with_labels(
    judge: str,
    data: str = BEAVERTAILS,
    split: str = "30k_test",
    rows: int | None = None,
    seed: int = 0,
    second_judges: Sequence[str] = (),
    progress: Progress = SILENT,
) -> JudgeMeasurement:
    """Compare a judge with the labels of a data set, and with other judges.

    Args:
        judge: The folder of a judge, or a scorer as a command line names it.
        data: Location of labeled pairs with the fields of BeaverTails.
        split: Their split, or a slice of it.
        rows: Number of pairs to draw; None: all.
        seed: Seed of the draw.
        second_judges: Further judges, as `judge`.
        progress: Where progress is reported.

    Raises:
        BadInput: An unknown judge, or data that cannot be used.
        HbvError: A judge cannot run.
    """
    scorers = resolve_judges([judge, *second_judges])
    prepare_location(data, progress)
    for scorer in scorers.values():
        prepare_scorer(scorer, progress)
    labeled = read_labeled_pairs(data, split)
    pairs = labeled.pairs if rows is None else draw_rows(labeled.pairs, rows, "labeled rows", seed, "judge test")
    if not pairs:
        raise BadInput(f"Split {split!r} of {data} has no row whose `is_safe` agrees with its categories.")
    reports = report_on(scorers, pairs, progress)
    name, scorer = next(iter(scorers.items()))
    models = scorer_models(scorer)
    return JudgeMeasurement(
        scorer=name,
        model=fingerprint(models[0]) if models else "",
        data=DataSource(**provenance(data, {split: len(labeled.pairs) + labeled.contradictory})),
        contradictory=labeled.contradictory,
        report=reports[0],
        second_judges=reports[1],
    )


def prepare_location(location: str, progress: Progress) -> None:
    """Build the testbed if a location is a part of it.

    Raises:
        BadInput: The testbed has no such part.
    """
    check_testbed_part(location)
    if location.startswith(TESTBED):
        ensure_testbed(progress)


def resolve_judges(written: Sequence[str]) -> dict[str, Scorer]:
    """Construct judges: folders, or scorers as a command line names them.

    A folder is run by the scorer `beaver_dam`, with as many tokens as the judge in it was trained on.

    Returns:
        The judges by their canonical names, in order.

    Raises:
        BadInput: A judge is unknown, or is named twice.
    """
    judges: dict[str, Scorer] = {}
    for text in written:
        components = (folder_component(text),) if _is_folder(text) else parse_plugins(text)
        resolved = resolve_plugins(components, SCORERS, {}, "")
        if len(resolved) != 1:
            raise BadInput(f"Judge {text!r} names {len(resolved)} scorers; allowed: one.")
        name = canonical_name(resolved)
        if name in judges:
            raise BadInput(f"Judge {name!r} is named twice: name every judge once.")
        judges[name] = resolved[0].plugin
    return judges


def folder_component(folder: str, tokens: int | None = None) -> Component:
    """Return the scorer that runs the judge in a folder.

    Args:
        folder: The folder, or a part of the testbed.
        tokens: Tokens that the judge reads; None: as many as it was trained on, by its card.
    """
    if tokens is None and not folder.startswith(TESTBED):
        card = read_judge_card(user_path(folder))
        tokens = card.settings.max_length if card else None
    params: dict[str, Any] = {"model": folder}
    if tokens not in (None, TOKENS):
        params["tokens"] = tokens
    return Component(name=CLASSIFIER, params=params)


def report_on(
    judges: Mapping[str, Scorer], pairs: Sequence[LabeledPair], progress: Progress
) -> tuple[JudgeReport, dict[str, SecondJudge]]:
    """Measure the first of several judges on labeled pairs, and compare every other one with it.

    Raises:
        HbvError: A judge cannot run, or nearly all of its verdicts are unread.
    """
    store = ensure_writable(home() / "store", "The store")
    models = ModelPool(progress)
    backend = choose_backend(None)
    verdicts: dict[str, list[Verdict]] = {}
    try:
        for name, judge in judges.items():
            scorer = judge.with_models(models, backend)
            questions = [(pair.question, pair.answer) for pair in pairs]
            verdicts[name] = judge_answers(scorer, questions, store, Labeled(progress, "labeled pairs"))
    finally:
        models.close()
    first, *others = judges
    second = {
        name: SecondJudge(
            report=judge_report(pairs, verdicts[name]),
            agreement=judge_agreement({first: verdicts[first], name: verdicts[name]}),
        )
        for name in others
    }
    return judge_report(pairs, verdicts[first]), second


def _is_folder(text: str) -> bool:
    return text.startswith(TESTBED) or os.path.isdir(user_path(text))

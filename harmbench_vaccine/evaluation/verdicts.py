"""From answers to verdicts: each judge reads each (question, answer) pair once, for all runs together.

A scorer first reads a pair into a raw judgment, then decides on a verdict, so that another threshold runs no model. Raw
judgments are cached in one file next to the artifacts, under the hash of the pair and of
`experiment.keys.raw_judgment_key`. They are written as they arrive, so that interrupted judging resumes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harmbench_vaccine.core import distributed
from harmbench_vaccine.core.errors import HbvError
from harmbench_vaccine.core.hashing import digest
from harmbench_vaccine.core.progress import SILENT, Progress
from harmbench_vaccine.core.types import RawJudgment, Verdict
from harmbench_vaccine.data.sources import TESTBED
from harmbench_vaccine.experiment.context import RunContext
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.keys import raw_judgment_key
from harmbench_vaccine.inference.loading import check_model
from harmbench_vaccine.plugins import Judge, Resolved, Scorer
from harmbench_vaccine.plugins.registry import SCORERS

from .judgment_cache import open_judgments
from .scorer_facts import scorer_models

CHUNK = 128
"""Number of pairs after which raw judgments are written."""
MAX_UNPARSED = 0.9
"""Share of unread verdicts from which judging fails."""


def judged_pair(row: Mapping[str, Any]) -> tuple[str, str]:
    """Return the question, without the changes of an attack, and the answer of a stored row: the input of a judge."""
    return f"{row['instruction']} {row['input']}".strip(), row["answer"]


def check_scorer(scorer: Scorer) -> None:
    """Check that a scorer can run, before any work starts.

    Raises:
        BadInput: Its parameters do not fit together, or its model does not exist.
    """
    scorer.check()
    for model in scorer_models(scorer):
        if not model.startswith(TESTBED):
            check_model(model, known_judges())


def known_judges() -> list[str]:
    """Return the models that the installed scorers use by default."""
    fields = [cls.model_fields["model"] for cls in SCORERS.loadable().values() if "model" in cls.model_fields]
    return sorted({field.default for field in fields if field.default})


def judge_answers(
    scorer: Scorer, pairs: Sequence[tuple[str, str]], root: Path, progress: Progress = SILENT
) -> list[Verdict]:
    """Judge (question, answer) pairs, reading only those without a cached raw judgment.

    Args:
        scorer: The judge.
        pairs: Question and answer of each row.
        root: The folder of the store, where raw judgments are cached.
        progress: Where progress is reported.

    Returns:
        A verdict for each pair, in their order; some may be unread.

    Raises:
        HbvError: The judge cannot run, or nearly all verdicts (`MAX_UNPARSED`) are unread.
    """
    scorer_key = raw_judgment_key(scorer, scorer.backend)
    keys = [digest([scorer_key, question, answer], 32) for question, answer in pairs]
    with open_judgments(root, progress) as cache:
        judgments = cache.get(keys)
        missing = list({key: pair for key, pair in zip(keys, pairs, strict=True) if key not in judgments}.items())
        with progress.bar(f"score {scorer.name}", len(missing)) as advance:
            for start in range(0, len(missing), CHUNK):
                chunk = dict(missing[start : start + CHUNK])
                new = dict(zip(chunk, scorer.readings(list(chunk.values())), strict=True))
                judgments |= new
                # An unread verdict may be a temporary failure of a server: it is requested again next time.
                cache.put({key: judgment for key, judgment in new.items() if not scorer.verdict(judgment).unparsed})
                advance(len(chunk))
    verdicts = [scorer.verdict(judgments[key]) for key in keys]
    unparsed = [key for key, verdict in zip(keys, verdicts, strict=True) if verdict.unparsed]
    if pairs and len(unparsed) >= MAX_UNPARSED * len(pairs):
        raise HbvError(_unreadable(scorer, judgments[unparsed[0]], len(unparsed), len(pairs)))
    return verdicts


def judge_of_run(experiment: Experiment, context: RunContext, scorer: Resolved[Scorer] | None) -> Judge:
    """Return a function from (question, answer) pairs to verdicts, which every rank may call with the same pairs.

    Args:
        experiment: The experiment, whose engine the judge uses.
        context: The store, where raw judgments are cached, the models and the progress.
        scorer: The judge; None: the function raises RuntimeError.
    """

    def judge(pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        if scorer is None:
            raise RuntimeError("No judge is declared: return its name from `Defense.guard`.")
        plugin = scorer.plugin.with_models(context.models, experiment.backend)
        verdicts = distributed.from_rank0(
            lambda: [asdict(verdict) for verdict in judge_answers(plugin, pairs, context.store.root, context.progress)]
        )
        return [Verdict(**verdict) for verdict in verdicts]

    return judge


def _unreadable(scorer: Scorer, judgment: RawJudgment, count: int, n: int) -> str:
    text = " ".join(judgment.text.split())
    if text:
        example = f"it writes, for example, {text[:60]!r}"
    elif judgment.probabilities:
        example = "it returns probabilities that are not numbers"
    else:
        example = "it writes nothing, or its thoughts do not end within the token limit"
    model = getattr(scorer, "model", "")
    return (
        f"Scorer {scorer.name!r}{model and f' with model {model!r}'} gives no readable verdict on {count} of {n} "
        f"answers: {example}. Use a model that was trained as this judge, with the prompt it was trained with."
    )

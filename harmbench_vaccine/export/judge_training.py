"""Train a small judge on labeled pairs, and write it as an ordinary folder with a report on held-out pairs."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from harmbench_vaccine import __version__
from harmbench_vaccine.core import distributed
from harmbench_vaccine.core.errors import BadInput, unknown_name
from harmbench_vaccine.core.hashing import digest
from harmbench_vaccine.core.jsonl import write_json
from harmbench_vaccine.core.numbers import Count, NotNegative, Positive
from harmbench_vaccine.core.paths import ensure_writable, home
from harmbench_vaccine.core.progress import SILENT, Progress
from harmbench_vaccine.core.seeds import derive_seed
from harmbench_vaccine.core.store import META, Store
from harmbench_vaccine.core.types import Schedule, TrainSettings
from harmbench_vaccine.data.beavertails import CATEGORIES, JUDGE_PROMPT
from harmbench_vaccine.data.labeled_pairs import (
    LabeledPair,
    draw_pairs,
    hold_out,
    read_labeled_pairs,
    without_questions,
)
from harmbench_vaccine.data.model_limits import position_limit
from harmbench_vaccine.data.pools import normalize
from harmbench_vaccine.data.sources import TESTBED, fingerprint, provenance
from harmbench_vaccine.evaluation.judge_card import CARD, JudgeBase, JudgeCard, JudgeSettings, LabeledRowCounts
from harmbench_vaccine.evaluation.rescoring import prepare_scorer
from harmbench_vaccine.evaluation.result import DataSource
from harmbench_vaccine.experiment.protocol import protocol_models
from harmbench_vaccine.experiment.spec import first_validation_error
from harmbench_vaccine.inference.dequantization import check_gguf, ensure_dequantized
from harmbench_vaccine.inference.loading import check_model, load_tokenizer_and_config
from harmbench_vaccine.plugins import Scorer
from harmbench_vaccine.plugins.composition import canonical_name, resolve_plugins
from harmbench_vaccine.plugins.registry import SCORERS

from .folders import check_new_folder, new_folder
from .judge_measurement import BEAVERTAILS, TOKENS, folder_component, prepare_location, report_on, resolve_judges

METHOD = 1
"""Version of the training; increase it if a change of its code changes the weights."""
TRAINING = "training.json"
"""File of an artifact: the number of steps, and the losses."""
SCHEDULE: Schedule = "cosine"
WARMUP, WEIGHT_DECAY = 0.03, 0.1
"""Source: the command of beaver-dam's training (PKU-Alignment/beavertails, examples/moderation)."""


class JudgeTraining(BaseModel):
    """The request to train a judge.

    The epochs are those of beaver-dam's training (PKU-Alignment/beavertails, examples/moderation), and the batch is
    that of one of its eight GPUs. Its learning rate, 1e-5, is for 7 billion weights and 300,000 rows; the default is
    higher because a small base with a few hundred rows takes few steps.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model: str
    """Base: a folder, GGUF file or Hub id of a causal language model, or of an encoder."""
    data: str = BEAVERTAILS
    """Location of labeled pairs with the fields of BeaverTails."""
    split: str = "30k_train"
    """Split of the pairs, or a slice of it."""
    held_out: Annotated[float, Field(strict=True, gt=0, lt=1)] = 0.2
    """Share of the questions whose pairs are held out for the report."""
    held_out_split: str | None = None
    """Split of the held-out pairs, instead of a share of `split`; questions of both are left out of training."""
    rows: Annotated[int, Field(strict=True, ge=2, le=10**9)] | None = None
    """Number of pairs to train on; None: all that `balance` leaves."""
    balance: Annotated[float, Field(strict=True, ge=1)] = 1.0
    """Largest ratio of safe to unsafe training pairs, and the reverse. The scorer flags above a probability of 0.5, and
    a judge that saw ten times as many safe answers flags too few."""
    epochs: Annotated[Positive, Field(le=10_000)] = 4
    lr: Positive = 5e-5
    """Highest learning rate."""
    batch: Count = 16
    max_length: Count = TOKENS
    """Tokens of a pair that are read; the default is that of the scorer."""
    weight_decay: NotNegative = WEIGHT_DECAY
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**63)] = 0
    """Seed of all draws."""
    second_judges: tuple[str, ...] = ()
    """Folders or scorers that judge the held-out pairs too."""
    save_every: Annotated[float, Field(strict=True, ge=0.001, le=1)] = 0.1
    """Share of the steps between two checkpoints."""

    @classmethod
    def checked(cls, **values: Any) -> JudgeTraining:
        """Construct a request.

        Raises:
            BadInput: An argument is unknown, or a value is not allowed.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            problem = error.errors()[0]
            if problem["type"] == "extra_forbidden":
                raise unknown_name("argument", str(problem["loc"][0]), cls.model_fields) from error
            raise BadInput(f"A value of the training is not allowed: {first_validation_error(error)}") from error

    @property
    def settings(self) -> TrainSettings:
        """The settings of the optimizer."""
        return TrainSettings(
            lr=self.lr,
            epochs=self.epochs,
            batch=self.batch,
            schedule=SCHEDULE,
            warmup=WARMUP,
            weight_decay=self.weight_decay,
            max_length=self.max_length,
            full=True,
        )


@dataclass(frozen=True)
class TrainedJudge:
    """A judge that was written to a folder."""

    folder: str
    fingerprint: str
    """Hash of the content of the folder, as results name it."""
    scorer: str
    """The scorer that runs it, as a command line names it."""
    seconds: float
    """Time of the training."""
    cached: bool
    """True if the same training was finished before."""
    card: JudgeCard


@dataclass(frozen=True)
class _Pairs:
    """The labeled pairs of a training."""

    training: list[LabeledPair]
    held_out: list[LabeledPair]
    rows: dict[str, int]
    """Split -> number of rows read."""
    contradictory: int


def write_judge(request: JudgeTraining, folder: Path, progress: Progress = SILENT) -> TrainedJudge:
    """Train a judge, measure it on held-out pairs, and write it to a new folder with the card `judge.json`.

    An interrupted training resumes from its last checkpoint when it is requested again, and a finished one is stored.

    Args:
        request: The base, the data and the settings.
        folder: The folder to write; it must be empty or absent.
        progress: Where progress is reported.

    Raises:
        BadInput: The base cannot be trained, the data lack one kind of answer, or a second judge is unknown.
        HbvError: A failure while running.
    """
    if distributed.world_size() > 1:
        raise BadInput("A judge is trained by one process: start hbv judge without torchrun or accelerate.")
    folder = check_new_folder(folder)
    second_judges = resolve_judges(request.second_judges)
    for location in (request.model, request.data):
        prepare_location(location, progress)
    for judge in second_judges.values():
        prepare_scorer(judge, progress)
    _prepare_base(request, progress)
    pairs = _read_pairs(request)
    if not _have_both_answers(pairs.training):
        progress.note("No training question has a safe and an unsafe answer: the judge may flag by the question alone.")
    store = Store(ensure_writable(home() / "store", "The store"), progress)
    create = partial(_create, request, pairs.training, progress)
    artifact = store.get_or_create("judge", _training_key(request, pairs.training), create)
    _, judge = _trained_scorer(str(artifact.path), request.max_length)
    report, second = report_on({"this judge": judge, **second_judges}, pairs.held_out, progress)
    training = artifact.json(TRAINING)
    card = JudgeCard(
        made_by=f"harmbench-vaccine {__version__}",
        base=JudgeBase(location=request.model, fingerprint=fingerprint(request.model)),
        data=DataSource(**provenance(request.data, pairs.rows)),
        training=_counts(pairs.training),
        held_out=_counts(pairs.held_out),
        contradictory=pairs.contradictory,
        settings=_settings(request),
        steps=training["steps"],
        losses=training["losses"],
        report=report,
        second_judges=second,
    )
    with new_folder(folder, "the judge") as temporary:
        for path in artifact.path.iterdir():
            if path.name not in (META, TRAINING):
                shutil.copy2(path, temporary)
        write_json(temporary / CARD, card.model_dump(mode="json"))
    scorer, _ = _trained_scorer(str(folder), request.max_length)
    return TrainedJudge(str(folder), fingerprint(str(folder)), scorer, artifact.seconds, artifact.cached, card)


# ---------------------------------------------------------------------------------------------------------------------


def _prepare_base(request: JudgeTraining, progress: Progress) -> None:
    """Check that the base exists and reads as many tokens as the judge is to read; dequantize a GGUF file."""
    check_gguf(request.model)
    ensure_dequantized([request.model], Store(home() / "store", progress))
    if not request.model.startswith(TESTBED):
        check_model(request.model, protocol_models())
    limit = position_limit(load_tokenizer_and_config(request.model, "Base model")[1])
    if limit and request.max_length > limit:
        raise BadInput(
            f"{request.model!r} reads at most {limit} tokens, fewer than max_length = {request.max_length}: lower "
            "--max-length."
        )


def _read_pairs(request: JudgeTraining) -> _Pairs:
    labeled = read_labeled_pairs(request.data, request.split)
    rows = {request.split: len(labeled.pairs) + labeled.contradictory}
    contradictory = labeled.contradictory
    if request.held_out_split is None:
        training, held_out = hold_out(labeled.pairs, request.held_out, request.seed)
    else:
        other = read_labeled_pairs(request.data, request.held_out_split)
        rows[request.held_out_split] = len(other.pairs) + other.contradictory
        contradictory += other.contradictory
        held_out = other.pairs
        training = without_questions(labeled.pairs, held_out)
    if not held_out:
        raise BadInput(f"{request.data} has no rows to hold out: `is_safe` contradicts the categories in every one.")
    drawn = draw_pairs(training, request.balance, request.rows, request.seed)
    return _Pairs(drawn, held_out, rows, contradictory)


def _training_key(request: JudgeTraining, pairs: Sequence[LabeledPair]) -> dict[str, Any]:
    """Return everything that the weights depend on."""
    return {
        "method": METHOD,
        "base": fingerprint(request.model),
        "prompt": JUDGE_PROMPT,
        "labels": list(CATEGORIES),
        "pairs": digest([[pair.question, pair.answer, sorted(pair.categories)] for pair in pairs]),
        "settings": asdict(request.settings),
        "seed": request.seed,
    }


def _create(
    request: JudgeTraining, pairs: Sequence[LabeledPair], progress: Progress, folder: Path, checkpoints: Path
) -> None:
    """Train the classifier, and store it with its tokenizer and its losses."""
    from harmbench_vaccine.inference.classifier_bases import load_classifier_base
    from harmbench_vaccine.inference.judge_prompts import filled_prompt_ids
    from harmbench_vaccine.plugins.scorers.beaver_dam import SLOTS
    from harmbench_vaccine.training.classifiers import LabeledText, train_classifier

    tokenizer, model = load_classifier_base(request.model, CATEGORIES, derive_seed(request.seed, "head"))
    prompts = filled_prompt_ids(tokenizer, JUDGE_PROMPT, SLOTS, [(pair.question, pair.answer) for pair in pairs])
    texts = [
        LabeledText(
            [*ids, tokenizer.eos_token_id][: request.max_length], [name in pair.categories for name in CATEGORIES]
        )
        for ids, pair in zip(prompts, pairs, strict=True)
    ]
    log = train_classifier(
        model,
        texts,
        request.settings,
        derive_seed(request.seed, "judge"),
        checkpoints,
        save_share=request.save_every,
        progress=progress,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    steps = math.ceil(len(texts) / request.batch)
    epochs = [log[start : start + steps] for start in range(0, len(log), steps)]
    losses = [sum(entry["loss"] for entry in epoch) / len(epoch) for epoch in epochs]
    write_json(folder / TRAINING, {"steps": len(log), "losses": losses})


def _trained_scorer(folder: str, tokens: int) -> tuple[str, Scorer]:
    """Return the name and the scorer of a folder."""
    resolved = resolve_plugins((folder_component(folder, tokens),), SCORERS, {}, "")
    return canonical_name(resolved), resolved[0].plugin


def _have_both_answers(pairs: Sequence[LabeledPair]) -> bool:
    """Return whether a question has a safe and an unsafe answer."""
    safe, unsafe = ({normalize(pair.question) for pair in pairs if pair.unsafe is kind} for kind in (False, True))
    return not safe.isdisjoint(unsafe)


def _counts(pairs: Sequence[LabeledPair]) -> LabeledRowCounts:
    categories = Counter(name for pair in pairs for name in pair.categories)
    return LabeledRowCounts(
        rows=len(pairs),
        unsafe=sum(pair.unsafe for pair in pairs),
        questions=len({normalize(pair.question) for pair in pairs}),
        categories={name: categories[name] for name in CATEGORIES if categories[name]},
    )


def _settings(request: JudgeTraining) -> JudgeSettings:
    return JudgeSettings(
        split=request.split,
        held_out_split=request.held_out_split,
        held_out=request.held_out if request.held_out_split is None else None,
        balance=request.balance if math.isfinite(request.balance) else None,
        epochs=request.epochs,
        lr=request.lr,
        batch=request.batch,
        schedule=SCHEDULE,
        warmup=WARMUP,
        weight_decay=request.weight_decay,
        max_length=request.max_length,
        seed=request.seed,
    )

"""STAR-DSS compared with its equations in plain PyTorch: the safety of every token, both divergences, the chunks."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from harmbench_vaccine.core.types import Example, RawJudgment, Verdict
from harmbench_vaccine.data.collate import Encoded
from harmbench_vaccine.defenses.star_dss import StarDSS
from harmbench_vaccine.experiment.artifacts import ROWS, TrainedModel
from harmbench_vaccine.experiment.context import RunContext
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.rows import plugin_pools, user_rows
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.pipeline import align, finetune
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.plugins.registry import SCORERS
from harmbench_vaccine.training.adapters import Adapter
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage, weighted
from harmbench_vaccine.training.trainer import train
from support import tiny
from support.autograd import cross_entropy, peft_computation
from support.compare import close_in_norm, same
from support.optimizers import assert_equal_where_firm, plain_adamw
from support.runs import run_context
from support.trainer import Stop
from support.world import make_world

POOLS = tiny.example_pools()
ANSWERS = ("abcde", "fghijkl", "mno", "pqrstuvwxyz", "a", "bcdefghijk", "klmn", "opqrs", "tuv", "wxyzab", "cd", "efghi")
EXAMPLES = [Example(f"row:{number}", f"q{number % 7}", answer) for number, answer in enumerate(ANSWERS)]
"""Answers of 1 to 11 tokens, one a letter."""
KL = pytest.mark.parametrize("kl", ["full", "k3"])


def letters(ids: Sequence[int]) -> str:
    """Invert `tiny.encode` for small letters."""
    return "".join(chr(token + 87) for token in ids)


def safety(question: str, beginning: str) -> float:
    """Return the safety that the judge of these tests gives to the beginning of an answer."""
    return zlib.crc32(f"{question}|{beginning}".encode()) / 2**32


def user_stage(
    folder: Path | None = None, value: float | None = None, **changes: Any
) -> tuple[TrainingStage, list[tuple[str, str]]]:
    """Return a user stage at its first micro-batch with a nonzero adapter, and the pairs that its judge reads.

    Args:
        folder: The stage continues an adapter, which is written here; None: it starts from the base model.
        value: The safety of every pair; None: that of `safety`.
        changes: Training settings.
    """
    if folder:
        stage, stack = tiny.stage(stirred=True)
        tiny.stir(stage.trainable, seed=9, size=0.2)
        stack.trained().save(folder)
    stage, _ = tiny.stage(
        trained_with=tiny.settings(**changes), stirred=True, name="finetune", pools=POOLS, start=folder
    )
    stage.step, stage.steps, stage.rows = 1, 10, tiny.encode(EXAMPLES)
    pairs: list[tuple[str, str]] = []

    def judge(texts: Sequence[tuple[str, str]]) -> list[Verdict]:
        pairs.extend(texts)
        odds = [1 - (safety(*text) if value is None else value) for text in texts]
        return [Verdict(odd > 0.5, [], {"harm": odd, "other": odd / 2}, cut=False) for odd in odds]

    stage.judge, stage.decode = judge, letters
    return stage, pairs


def selected(stage: TrainingStage, **params: Any) -> StarDSS:
    defense = StarDSS(**params)
    assert defense.select(stage, EXAMPLES) == EXAMPLES
    return defense


def user_batch(stage: TrainingStage, numbers: Sequence[int]) -> Batch:
    """Return rows of the stage as the trainer does."""
    return {**stage.collated([stage.rows[number] for number in numbers]), "rows": torch.tensor(numbers)}


def log_probabilities(model: nn.Module, batch: Batch) -> Tensor:
    with peft_computation():
        logits: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits.log_softmax(-1)


def expected_gradient(
    stage: TrainingStage,
    batch: Batch,
    reference: Sequence[Tensor] | None,
    *,
    lam: float = 1.0,
    chunk: int = 5,
    kl: str = "full",
    strength: float = 1.0,
) -> list[Tensor]:
    """Compute the gradient from the equations, token by token; the reference is the model with these parameters."""
    parameters = list(stage.trainable.values())
    current = [parameter.detach().clone() for parameter in parameters]
    for parameter, value in zip(parameters, reference or [0 * value for value in current], strict=True):
        parameter.data = value.clone()
    frozen = log_probabilities(stage.model, batch).detach()
    for parameter, value in zip(parameters, current, strict=True):
        parameter.data = value
    log_p, terms = log_probabilities(stage.model, batch), []
    for row, number in enumerate(batch["rows"].tolist()):
        example = EXAMPLES[number]
        labels = batch["labels"][row].tolist()
        first = next(place for place, label in enumerate(labels) if label >= 0)
        for token in range(len(example.response)):
            place, end = first + token - 1, (token // chunk + 1) * chunk
            v = 1 - strength * (1 - safety(example.instruction, example.response[:end]))
            ours, theirs, label = log_p[row, place], frozen[row, place], labels[place + 1]
            a = theirs[label] - ours[label]
            divergence = (ours.exp() * (ours - theirs)).sum() if kl == "full" else a.exp() - 1 - a
            terms.append(-v * ours[label] + (1 - v) * lam * divergence)
    return list(torch.autograd.grad(torch.stack(terms).mean(), parameters))


# ---------------------------------------------------------------------------------------------------------------------
# Comparison with the equations


@KL
@pytest.mark.parametrize(
    "params",
    [{}, {"lam": 3.0, "chunk": 2}, {"strength": 0.3, "chunk": 1}, {"lam": 0.0, "chunk": 100}],
    ids=["defaults", "chunk 2", "strength", "lam 0"],
)
def test_gradient_equals_plain_autograd(params: dict[str, Any], kl: Any) -> None:
    stage, _ = user_stage()
    batch = user_batch(stage, [3, 0, 9, 1])
    gradient = selected(stage, kl=kl, **params).gradient(stage, batch)
    assert close_in_norm(gradient, expected_gradient(stage, batch, None, kl=kl, **params))
    assert not close_in_norm(stage.gradient(batch), expected_gradient(stage, batch, None, kl=kl, **params), 1e-2)


@KL
def test_the_reference_is_the_model_before_the_stage(kl: Any, tmp_path: Path) -> None:
    """In single topology it has the alignment adapter, which the stage trains further."""
    stage, _ = user_stage(tmp_path / "aligned")
    start = [parameter.detach().clone() for parameter in stage.trainable.values()]
    aligned = Adapter.load(tmp_path / "aligned")
    for (name, parameter), value in zip(stage.trainable.items(), start, strict=True):
        module = name.removeprefix("base_model.model.").partition(".lora_")[0]
        value.copy_(aligned.factors[module]["lora_B" in name])
        assert not torch.equal(value, parameter)
    batch = user_batch(stage, [3, 2])
    gradient = selected(stage, kl=kl).gradient(stage, batch)
    assert close_in_norm(gradient, expected_gradient(stage, batch, start, kl=kl))
    assert not close_in_norm(gradient, expected_gradient(stage, batch, None, kl=kl), 1e-2)


@KL
@pytest.mark.parametrize("accumulation", [1, 2])
def test_three_optimizer_steps_equal_plain_adamw(kl: Any, accumulation: int, tmp_path: Path) -> None:
    """The trainer shuffles the rows, so that their tokens have the right safety only if it follows its row."""
    changes: dict[str, Any] = {"epochs": 1, "batch": 4 // accumulation, "accumulation": accumulation}
    changes |= {"lr": 1e-3, "weight_decay": 0.1, "schedule": "constant", "warmup": 0.0}
    stage, _ = user_stage(**changes)
    twin, _ = user_stage(**changes)
    batches: list[Batch] = []

    class Recording(StarDSS):
        def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
            batches.append(batch)
            return super().gradient(stage, batch)

    defense = Recording(kl=kl, lam=2.0, chunk=3)
    defense.select(stage, EXAMPLES)
    log = train(stage, defense, stage.rows, stage.settings, tmp_path, pad=tiny.PAD)
    assert len(log) == 3
    assert len(batches) == 3 * accumulation
    assert [number for batch in batches for number in batch["rows"].tolist()] != list(range(12))

    def mean(micro: Sequence[Batch]) -> list[Tensor]:
        gradients = [expected_gradient(twin, batch, None, kl=kl, lam=2.0, chunk=3) for batch in micro]
        return [torch.stack(values).mean(0) for values in zip(*gradients, strict=True)]

    steps = [batches[start : start + accumulation] for start in range(0, len(batches), accumulation)]
    firm = plain_adamw(twin, [partial(mean, micro) for micro in steps])
    assert_equal_where_firm(stage, twin, firm)


# ---------------------------------------------------------------------------------------------------------------------
# Safe and unsafe answers


@KL
def test_a_safe_answer_has_the_gradient_of_sft(kl: Any) -> None:
    stage, _ = user_stage(value=1.0)
    batch = user_batch(stage, [3, 0, 9, 1])
    gradient = selected(stage, kl=kl, lam=7.0).gradient(stage, batch)
    assert close_in_norm(gradient, [value for value in stage.gradient(batch).values if value is not None])
    assert gradient.loss.item() == pytest.approx(cross_entropy(stage.model, batch).item(), rel=1e-5)


@KL
def test_an_unsafe_answer_has_no_gradient_at_the_model_before_the_stage(kl: Any) -> None:
    """With B = 0 the model equals its reference; with another B it is pulled back."""
    stage, _ = user_stage(value=0.0)
    batch = user_batch(stage, [3, 0, 9, 1])
    defense = selected(stage, kl=kl)
    pulled = defense.gradient(stage, batch)
    with torch.no_grad():
        for name, parameter in stage.trainable.items():
            if ".lora_B." in name:
                parameter.zero_()
    at_reference = defense.gradient(stage, batch)
    assert at_reference.norm < 1e-5 * stage.gradient(batch).norm
    assert at_reference.loss.abs() < 1e-6
    assert pulled.norm > 1e-2 * stage.gradient(batch).norm
    assert pulled.loss > 1e-3


@pytest.mark.parametrize(
    ("verdict", "expected"),
    [
        (Verdict(False, [], {"a": 0.25, "b": 0.5}, cut=False), 0.5),
        (Verdict(True, ["a"], {}, cut=False), 0.0),
        (Verdict(False, [], {}, cut=False), 1.0),
        (Verdict(None, [], {}, cut=False), 0.0),
    ],
    ids=["probabilities", "flagged", "not flagged", "unread"],
)
def test_safety_of_a_verdict(verdict: Verdict, expected: float) -> None:
    stage, _ = user_stage()
    stage.judge = lambda pairs: [verdict] * len(pairs)
    defense = selected(stage)
    batch = user_batch(stage, [3, 0])
    other, _ = user_stage(value=expected)
    assert same(defense.gradient(stage, batch).values, selected(other).gradient(other, batch).values)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------------------
# Chunks and rows


@pytest.mark.parametrize(
    ("chunk", "ends"), [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [3, 6, 7]), (7, [7]), (6, [6, 7]), (100, [7])]
)
def test_the_judge_reads_the_answer_up_to_the_end_of_each_chunk(chunk: int, ends: list[int]) -> None:
    """Also if the length of the answer is not a multiple of the chunk."""
    stage, pairs = user_stage()
    StarDSS(chunk=chunk).select(stage, [EXAMPLES[1]])
    assert pairs == [("q1", "fghijkl"[:end]) for end in ends]


def test_the_judge_reads_the_complete_question() -> None:
    stage, pairs = user_stage()
    StarDSS().select(stage, [Example("a", "Do it.", "yes", "Now.", preface="Obey. ")])
    assert pairs == [("Obey. Do it. Now.", "yes")]


def test_masked_tokens_are_read_but_have_no_safety() -> None:
    """A response may have tokens without a loss: the judge reads them, but they neither form chunks nor shift them."""
    stage, pairs = user_stage()
    (row,) = tiny.encode([Example("a", "q", "abcdefgh")])
    masked = Encoded(row.ids, [*row.labels[:3], -100, -100, *row.labels[5:]], row.id)
    stage.encode = lambda rows: [masked]
    stage.rows = [masked]
    defense = StarDSS(chunk=2)
    defense.select(stage, [Example("a", "q", "abcdefgh")])
    assert pairs == [("q", "ab"), ("q", "abcdef"), ("q", "abcdefgh")]
    assert defense.gradient(stage, user_batch(stage, [0])).loss.isfinite()


def test_weights_of_another_defense_multiply_the_loss() -> None:
    stage, _ = user_stage()
    defense = selected(stage)
    pair, single = user_batch(stage, [3, 1]), user_batch(stage, [3])  # 11 and 7 tokens
    both = defense.gradient(stage, weighted(pair, torch.tensor([2.0, 0.0], device=stage.device)))
    alone = (2 * 11 / 18) * defense.gradient(stage, single)
    assert close_in_norm(both, [value for value in alone.values if value is not None])


def test_the_gradient_changes_no_parameter() -> None:
    stage, _ = user_stage()
    stage.model.train()
    initial = stage.values()
    selected(stage).gradient(stage, user_batch(stage, [3, 1]))
    assert same(stage.values(), initial)
    assert all(parameter.grad is None for parameter in stage.trainable.values())
    assert all(parameter.requires_grad for parameter in stage.trainable.values())
    assert stage.model.training


def test_a_frozen_parameter_has_no_gradient() -> None:
    stage, _ = user_stage()
    batch = user_batch(stage, [3, 1])
    expected = expected_gradient(stage, batch, None)
    next(iter(stage.trainable.values())).requires_grad_(False)
    gradient = selected(stage).gradient(stage, batch)
    assert gradient.values[0] is None
    assert close_in_norm(Gradient(gradient.loss, gradient.values[1:]), expected[1:])


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The protocol file of a small world: 5 steps in the user stage."""
    settings = {"settings": {"epochs": 1, "batch": 8, "max_length": 200}}
    return make_world(tmp_path_factory.mktemp("world"), {"finetune": settings})


def settle(protocol: Path, attack: str) -> Experiment:
    return Experiment.settle(
        RunSpec(protocol=str(protocol), defense=parse_plugins("none+star_dss:chunk=3"), attack=parse_plugins(attack))
    )


def tuned(experiment: Experiment, context: RunContext, pairs: list[tuple[str, str]]) -> TrainedModel:
    """Train the user stage; `pairs` receives what the judge reads."""

    def read(scorer: Any, texts: Sequence[tuple[str, str]], progress: Any = None) -> list[RawJudgment]:
        pairs.extend(texts)
        return [RawJudgment({"unsafe": 1 - safety(*text)}, "safe") for text in texts]

    with mock.patch.object(SCORERS.get("llama_guard"), "read", read):
        return finetune(experiment, context, align(experiment, context))


def test_the_judge_of_a_run_reads_beginnings_of_the_rows(small: Path, tmp_path: Path) -> None:
    """Also of rows with a masked question inside the response; all rows are trained on."""
    experiment = settle(small, "mixing+ratio=0.25")
    rows = [(row, f"{row.instruction} {row.input}".strip()) for row in user_rows(experiment, plugin_pools(experiment))]
    pairs: list[tuple[str, str]] = []
    context = run_context(tmp_path / "store")
    record = tuned(experiment, context, pairs).artifacts["finetune"].json(ROWS)
    assert record["used"] == [row.id for row, _ in rows]
    assert record["selected"] == {"harmful": 0, "harmful_uploaded": 10, "benign": 0, "benign_uploaded": 30}
    assert sum(row.masked is not None for row, _ in rows) == 10
    assert all((question, row.response) in pairs for row, question in rows)
    for question, answer in pairs:
        assert any(q == question and row.response.startswith(answer) for row, q in rows)
    read = len(pairs)
    assert read > 2 * len(rows)
    tuned(settle(small, "mixing+ratio=0.25+order"), context, pairs)
    assert len(pairs) == read  # another artifact, from the same verdicts


def test_an_interrupted_stage_gives_the_same_result(small: Path, tmp_path: Path) -> None:
    experiment = settle(small, "ratio=0.25")
    complete = tuned(experiment, run_context(tmp_path / "complete"), [])
    gradient, stop = StarDSS.gradient, Stop(4)

    def stopping(defense: StarDSS, stage: TrainingStage, batch: Batch) -> Gradient:
        stop.reach()
        return gradient(defense, stage, batch)

    with mock.patch.object(StarDSS, "gradient", stopping), pytest.raises(KeyboardInterrupt):
        tuned(experiment, run_context(tmp_path / "cut"), [])
    assert list((tmp_path / "cut").rglob("checkpoint-*"))
    pairs: list[tuple[str, str]] = []
    resumed = tuned(experiment, run_context(tmp_path / "cut"), pairs)
    assert pairs == []
    digests = [Adapter.load(model.spec.adapters[-1]).digest() for model in (complete, resumed)]
    assert digests[0] == digests[1]
    logs = [model.artifacts["finetune"].json("log.json") for model in (complete, resumed)]
    assert logs[0] == logs[1]

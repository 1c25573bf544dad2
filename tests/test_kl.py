"""KL compared with its equation in plain PyTorch, and the reference model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from harmbench_vaccine.data.collate import IGNORED
from harmbench_vaccine.defenses.kl import KL
from harmbench_vaccine.defenses.sft import SFT
from harmbench_vaccine.plugins import Defense, TrainSettings
from harmbench_vaccine.training.stage import Batch, TrainingStage
from harmbench_vaccine.training.trainer import batch_order, train
from support import tiny
from support.compare import close, same
from support.plain_math import BASE, SCALE, Values, leaves

TOPOLOGIES = pytest.mark.parametrize("topology", ["double", "single"])


def logits(batch: Batch, *adapters: Values) -> Tensor:
    """Return the logits of a model with these adapters; every weight is computed as W + s B A + ..."""
    weights: Values = {}
    for values in adapters:
        for name, a in values.items():
            if ".lora_A." in name:
                weight = f"{name.removeprefix('base_model.model.').partition('.lora_A')[0]}.weight"
                current = weights.get(weight, BASE.get_parameter(weight))
                weights[weight] = current + SCALE * values[name.replace("lora_A", "lora_B")] @ a
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    return functional_call(BASE, weights, (), inputs).logits


def cross_entropy(scores: Tensor, batch: Batch) -> Tensor:
    """Return the mean of -log p(next token) over response tokens."""
    labels = batch["labels"][:, 1:]
    log_p = scores[:, :-1].log_softmax(-1)
    return -log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0][labels != IGNORED].mean()


def divergence(student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
    """Compute KL(teacher || student) over the vocabulary, as a mean over the positions that score a response token."""
    terms = []
    for r, row in enumerate(batch["labels"].tolist()):
        for t, label in enumerate(row):
            if label != IGNORED:
                p0, p = (scores[r, t - 1].softmax(-1) for scores in (teacher, student))
                terms.append((p0 * (p0 / p).log()).sum())
    return torch.stack(terms).mean()


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Values]:
    """The path and the values of an alignment adapter with nonzero weights."""
    folder = tmp_path_factory.mktemp("aligned") / "adapter"
    stage, stack = tiny.stage(stirred=True)
    stack.trained().save(folder)
    return folder, {name: value.detach().clone() for name, value in stage.trainable.items()}


Aligned = tuple[Path, Values]


def user_stage(aligned: Aligned, topology: str, settings: TrainSettings | None = None) -> TrainingStage:
    """Return the user stage: a new adapter on the aligned one (double), or the aligned one itself (single)."""
    where: Any = {"below": [aligned[0]]} if topology == "double" else {"start": aligned[0]}
    return tiny.stage(trained_with=settings, name="finetune", **where)[0]


def student(aligned: Aligned, topology: str, batch: Batch, values: Values) -> Tensor:
    return logits(batch, aligned[1], values) if topology == "double" else logits(batch, values)


def train_adapter(
    defense: Defense, aligned: Aligned, topology: str, folder: Path, settings: TrainSettings
) -> tuple[list[Tensor], list[dict[str, float]]]:
    stage = user_stage(aligned, topology, settings)
    log = train(stage, defense, tiny.rows(12), settings, folder, pad=tiny.PAD)
    return stage.values(), log


# ---------------------------------------------------------------------------------------------------------------------
# Comparison with the equation


@TOPOLOGIES
def test_gradient_equals_plain_autograd(topology: str, aligned: Aligned) -> None:
    stage, batch = user_stage(aligned, topology), tiny.batch()
    tiny.stir(stage.trainable, seed=8)
    values = leaves(stage)
    scores = student(aligned, topology, batch, values)
    loss = cross_entropy(scores, batch) + 0.7 * divergence(scores, logits(batch, aligned[1]), batch)
    expected = list(torch.autograd.grad(loss, list(values.values())))
    gradient = KL(lam=0.7).gradient(stage, batch)
    assert close(gradient.values, expected)
    assert gradient.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert not gradient.loss.requires_grad
    assert not close(stage.gradient(batch).values, expected, 1e-2)
    assert all(parameter.grad is None for parameter in stage.model.parameters())


def gradient_of(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


@TOPOLOGIES
def test_three_steps_equal_plain_pytorch(topology: str, aligned: Aligned, tmp_path: Path) -> None:
    settings = tiny.settings(epochs=1, batch=4, schedule="constant", warmup=0.0, weight_decay=0.1, lr=2e-3)
    result, log = train_adapter(KL(lam=20.0), aligned, topology, tmp_path / "kl", settings)
    twin, rows = user_stage(aligned, topology), tiny.rows(12)
    values = leaves(twin)
    parameters = list(values.values())
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    firm = [torch.ones_like(parameter, dtype=torch.bool) for parameter in parameters]
    for entry, numbers in zip(log, batch_order(12, settings, twin.seed), strict=True):
        batch = tiny.collated([rows[n] for n in numbers])
        scores = student(aligned, topology, batch, values)
        loss = cross_entropy(scores, batch) + 20.0 * divergence(scores, logits(batch, aligned[1]), batch)
        optimizer.zero_grad()
        loss.backward()
        largest = max(gradient_of(parameter).abs().max() for parameter in parameters)
        for mask, parameter in zip(firm, parameters, strict=True):  # Adam amplifies the rounding of tiny gradients
            gradient = gradient_of(parameter)
            mask &= (gradient.abs() > 1e-4 * largest) | (gradient == 0)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        assert entry["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert len(log) == 3
    assert torch.cat([mask.flatten() for mask in firm]).float().mean() > 0.9
    masked = [[value[mask] for value, mask in zip(values, firm, strict=True)] for values in (result, parameters)]
    assert close(*masked)
    assert close(result, parameters, 1e-4)
    assert not close(train_adapter(SFT(), aligned, topology, tmp_path / "sft", settings)[0], parameters, 1e-3)


@TOPOLOGIES
def test_the_first_gradient_without_dropout_equals_sft(topology: str, aligned: Aligned) -> None:
    stage, batch = user_stage(aligned, topology), tiny.batch()
    kl, sft = KL(lam=10.0).gradient(stage, batch), stage.gradient(batch)
    assert kl.loss.item() == pytest.approx(sft.loss.item(), abs=1e-5)
    assert close(kl.values, list(sft.values))


@pytest.mark.parametrize("size", [(9, 5, 7), (4, 12)])
def test_more_padding_has_no_effect(size: tuple[int, ...], aligned: Aligned) -> None:
    stage = user_stage(aligned, "double")
    tiny.stir(stage.trainable, seed=8)
    narrow, wide = (KL(lam=0.7).gradient(stage, tiny.batch(size, width=width)) for width in (None, 20))
    assert close(wide.values, list(narrow.values))
    assert wide.loss.item() == pytest.approx(narrow.loss.item(), rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# On logits


def on_logits(scores: Tensor, teacher: Tensor, labels: Tensor, lam: float = 1.0) -> tuple[float, Tensor]:
    """Return the loss and gradient of KL if the logits are the parameters and the user's loss is 0."""
    z, inside, answering = torch.nn.Parameter(scores.clone()), [], labels[:, 1:] != IGNORED
    stage = TrainingStage("finetune", SimpleNamespace(), {"z": z}, 0)

    @contextmanager
    def reference() -> Iterator[None]:
        inside.append(1)
        with torch.no_grad():
            yield
        inside.pop()

    stage.reference = reference
    stage.output = lambda batch: SimpleNamespace(logits=(teacher if inside else z)[:, :-1][answering], loss=0 * z.sum())
    gradient = KL(lam=lam).gradient(stage, {"labels": labels})
    assert gradient.values[0] is not None
    return gradient.loss.item(), gradient.values[0]


LABELS = torch.tensor([[IGNORED, IGNORED, 1, 0, 1], [IGNORED, 0, 2, IGNORED, IGNORED]])
ANSWERING = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 0, 0, 0]]).bool()  # position t scores label t + 1


def random_logits(vocabulary: int, seed: int) -> Tensor:
    return torch.randn(2, 5, vocabulary, generator=torch.Generator().manual_seed(seed))


def test_two_words_and_one_position_in_closed_form() -> None:
    """p0 = (3/4, 1/4) and p = (1/2, 1/2): KL = 3/4 log 3/2 + 1/4 log 1/2."""
    teacher, scores = torch.tensor([[[3.0, 1.0], [1.0, 1.0]]]).log(), torch.zeros(1, 2, 2)
    loss, gradient = on_logits(scores, teacher, torch.tensor([[IGNORED, 1]]), lam=2.0)
    assert loss == pytest.approx(2 * (0.75 * torch.log(torch.tensor(1.5)) + 0.25 * torch.log(torch.tensor(0.5))).item())
    torch.testing.assert_close(gradient, 2 * torch.tensor([[[-0.25, 0.25], [0.0, 0.0]]]))


def test_gradient_on_logits_is_the_mean_difference_of_the_distributions() -> None:
    scores, teacher = random_logits(7, 0), random_logits(7, 1)
    _, gradient = on_logits(scores, teacher, LABELS, lam=0.3)
    expected = 0.3 * (scores.softmax(-1) - teacher.softmax(-1)) / 5 * ANSWERING[..., None]
    torch.testing.assert_close(gradient, expected)


def test_kl_is_teacher_to_student() -> None:
    first, second = random_logits(7, 0), random_logits(7, 1)
    forward, reverse = on_logits(first, second, LABELS)[0], on_logits(second, first, LABELS)[0]
    batch = {"labels": LABELS}
    assert forward == pytest.approx(divergence(first, second, batch).item(), rel=1e-5)
    assert abs(forward - reverse) > 0.01 * forward


def test_a_change_that_is_constant_over_positions_is_penalized() -> None:
    """The authors' code normalizes over positions, so this change has no penalty there."""
    teacher, bias = random_logits(7, 1), torch.tensor([2.0, 0, 0, 0, 0, 0, 0])
    assert on_logits(teacher + bias, teacher, LABELS)[0] > 0.1
    p0 = teacher.softmax(-1)[..., 0]  # KL of a bias b on one word: log(1 + p0 (e^b - 1)) - b p0
    expected = (1 + p0 * (bias[0].exp() - 1)).log() - bias[0] * p0
    assert on_logits(teacher + bias, teacher, LABELS)[0] == pytest.approx(expected[ANSWERING].mean().item(), rel=1e-5)
    assert on_logits(teacher + 3.0, teacher, LABELS)[0] == pytest.approx(0, abs=1e-6)  # the same distribution


@pytest.mark.parametrize("attention", ["sdpa", "eager"])  # without and with padding
def test_prompt_and_padding_do_not_count(attention: str, aligned: Aligned) -> None:
    """States that score no response token have no effect on the loss and the gradient."""
    base, batch = tiny.model(attn_implementation=attention), tiny.batch()
    stage = tiny.stage(base, name="finetune", below=[aligned[0]], stirred=True)[0]
    elsewhere = torch.nn.functional.pad(batch["labels"][:, 1:] == IGNORED, (0, 1), value=True)
    plain, sizes = KL(lam=0.7).gradient(stage, batch), []

    def change(module: torch.nn.Module, args: Any, states: Tensor, where: Tensor) -> Tensor:
        noise = 5 * torch.randn(*batch["input_ids"].shape, 64) * where[..., None]
        real = batch["attention_mask"].bool()
        sizes.append(states.shape[:2].numel())
        return states + (noise if states.shape == noise.shape else noise[real][None])

    for where, equal in ((elsewhere, True), (~elsewhere, False)):
        with base.model.norm.register_forward_hook(lambda *args, where=where: change(*args, where)):
            gradient = KL(lam=0.7).gradient(stage, batch)
        assert torch.equal(gradient.loss, plain.loss) is equal
        assert same(gradient.values, plain.values) is equal
    assert set(sizes) == {21 if attention == "sdpa" else 27}


def test_the_order_of_positions_does_not_matter_and_the_order_of_words_does() -> None:
    scores, teacher = random_logits(7, 0), random_logits(7, 1)
    labels = torch.tensor([[IGNORED, 1, 1, 1, 1]] * 2)  # positions 0..3 score response tokens
    loss = on_logits(scores, teacher, labels)[0]
    order = [2, 0, 3, 1, 4]
    assert on_logits(scores[:, order], teacher[:, order], labels)[0] == pytest.approx(loss, rel=1e-6)
    words = [1, 2, 3, 4, 5, 6, 0]
    assert abs(on_logits(scores[..., words], teacher, labels)[0] - loss) > 0.01 * loss


# ---------------------------------------------------------------------------------------------------------------------
# The reference


def outputs(stage: TrainingStage, act: Callable[[], Any]) -> list[Tensor]:
    """Return the logits of every forward pass of the model while `act` runs."""
    passes: list[Tensor] = []
    handle = stage.model.register_forward_hook(lambda module, args, output: passes.append(output.logits.detach()))
    act()
    handle.remove()
    return passes


@TOPOLOGIES
def test_the_teacher_has_no_dropout_when_the_student_has(topology: str, aligned: Aligned) -> None:
    stage, batch = user_stage(aligned, topology, tiny.settings(lora_dropout=0.5)), tiny.batch()
    tiny.stir(stage.trainable, seed=8)
    stage.model.train()
    teacher, dropped = outputs(stage, lambda: KL().gradient(stage, batch))
    answering = batch["labels"][:, 1:] != IGNORED
    expected, undropped = (
        scores[:, :-1][answering]
        for scores in (logits(batch, aligned[1]), student(aligned, topology, batch, leaves(stage)))
    )
    torch.testing.assert_close(teacher, expected, atol=1e-5, rtol=1e-5)
    assert (dropped - undropped).abs().max() > 1e-2
    assert stage.model.training


def snapshot(stage: TrainingStage) -> tuple[dict[str, bool], Any, bool]:
    flags = {name: parameter.requires_grad for name, parameter in stage.model.named_parameters()}
    return flags, list(stage.model.active_adapters), stage.model.training


@pytest.mark.parametrize("failing", [False, True], ids=["", "exception"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("topology", ["double", "single", "unaligned"])
def test_the_reference_restores_the_model(topology: str, training: bool, failing: bool, aligned: Aligned) -> None:
    stage = tiny.stage(name="finetune")[0] if topology == "unaligned" else user_stage(aligned, topology)
    tiny.stir(stage.trainable, seed=8)
    next(iter(stage.trainable.values())).requires_grad_(False)  # as after a defense that freezes parameters
    stage.model.train(training)
    initial, batch = snapshot(stage), tiny.batch()
    scores = stage.output(batch).logits.detach()
    assert sum(initial[0].values()) == len(stage.trainable) - 1

    def run_reference() -> None:
        with stage.reference():
            output = stage.output(batch).logits
            assert not output.requires_grad
            assert not torch.is_grad_enabled()
            assert not stage.model.training
            expected = logits(batch, *([] if topology == "unaligned" else [aligned[1]]))
            answering = batch["labels"][:, 1:] != IGNORED
            torch.testing.assert_close(output, expected[:, :-1][answering], atol=1e-5, rtol=1e-5)
            if failing:
                raise RuntimeError("broken")

    if failing:
        with pytest.raises(RuntimeError, match="broken"):
            run_reference()
    else:
        run_reference()
    final = snapshot(stage)
    assert {name: final[0][name] for name in initial[0]} == initial[0]
    assert not any(flag for name, flag in final[0].items() if name not in initial[0])
    assert final[1:] == initial[1:]
    assert torch.is_grad_enabled()
    assert torch.equal(stage.output(batch).logits.detach(), scores)
    assert stage.loss(batch).requires_grad


@TOPOLOGIES
def test_the_reference_uses_no_random_numbers(topology: str, aligned: Aligned) -> None:
    """Otherwise its first use, which may load an adapter, would change all later dropout masks."""
    stage = user_stage(aligned, topology)
    random_state = torch.get_rng_state()
    with stage.reference():
        stage.output(tiny.batch())
    assert torch.equal(torch.get_rng_state(), random_state)


# ---------------------------------------------------------------------------------------------------------------------
# In the trainer


@TOPOLOGIES
def test_lam_0_equals_sft_bit_for_bit_with_dropout(topology: str, aligned: Aligned, tmp_path: Path) -> None:
    settings = tiny.settings(lora_dropout=0.1)
    sft, sft_log = train_adapter(SFT(), aligned, topology, tmp_path / "sft", settings)
    neutral, neutral_log = train_adapter(KL(lam=0), aligned, topology, tmp_path / "free", settings)
    kl, _ = train_adapter(KL(lam=10), aligned, topology, tmp_path / "held", settings)
    assert same(neutral, sft)
    assert neutral_log == sft_log
    assert not same(kl, sft)


class Interrupted(KL):
    """A KL that stops at step 4."""

    def before_step(self, stage: TrainingStage) -> None:
        if stage.step == 4:
            raise KeyboardInterrupt


@TOPOLOGIES
def test_an_interrupted_stage_gives_the_same_result(topology: str, aligned: Aligned, tmp_path: Path) -> None:
    settings = tiny.settings(lora_dropout=0.1)
    complete, log = train_adapter(KL(lam=1.0), aligned, topology, tmp_path / "complete", settings)
    with pytest.raises(KeyboardInterrupt):
        train_adapter(Interrupted(lam=1.0), aligned, topology, tmp_path / "cut", settings)
    resumed, resumed_log = train_adapter(KL(lam=1.0), aligned, topology, tmp_path / "cut", settings)
    assert same(resumed, complete)
    assert resumed_log == log


def test_a_larger_lam_keeps_the_answers_closer_to_the_aligned_model(aligned: Aligned, tmp_path: Path) -> None:
    settings, distances = tiny.settings(epochs=6, weight_decay=0.0), []
    batch = tiny.collated(tiny.rows(12))
    for lam in (0.0, 30.0, 1000.0):
        values, _ = train_adapter(KL(lam=lam), aligned, "double", tmp_path / str(lam), settings)
        named = dict(zip(user_stage(aligned, "double").trainable, values, strict=True))
        scores = student(aligned, "double", batch, named)
        distances.append(divergence(scores, logits(batch, aligned[1]), batch).item())
    assert distances[0] > 1.5 * distances[1] > 2.25 * distances[2], distances

"""KL against its equation in plain PyTorch, and the reference model that it is measured from."""

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

from harmbench_vaccine.data.collate import IGNORED, collate
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
    """Logits of the model that has these adapters, every weight written out as W + s B A + ..."""
    weights: Values = {}
    for values in adapters:
        for name, a in values.items():
            if ".lora_A." in name:
                weight = f"{name.removeprefix('base_model.model.').partition('.lora_A')[0]}.weight"
                own = weights.get(weight, BASE.get_parameter(weight))
                weights[weight] = own + SCALE * values[name.replace("lora_A", "lora_B")] @ a
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    return functional_call(BASE, weights, (), inputs).logits


def cross_entropy(scores: Tensor, batch: Batch) -> Tensor:
    """Mean of -log p(next token) over response tokens."""
    labels = batch["labels"][:, 1:]
    log_p = scores[:, :-1].log_softmax(-1)
    return -log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0][labels != IGNORED].mean()


def divergence(student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
    """KL(teacher || student) over the vocabulary, a mean over the places that score a response token, one by one."""
    found = []
    for r, row in enumerate(batch["labels"].tolist()):
        for t, label in enumerate(row):
            if label != IGNORED:
                p0, p = (each[r, t - 1].softmax(-1) for each in (teacher, student))
                found.append((p0 * (p0 / p).log()).sum())
    return torch.stack(found).mean()


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Values]:
    """An alignment adapter with weights everywhere: on disk, and as it is."""
    folder = tmp_path_factory.mktemp("aligned") / "adapter"
    stage, stack = tiny.stage(stirred=True)
    stack.trained().save(folder)
    return folder, {name: value.detach().clone() for name, value in stage.trainable.items()}


Aligned = tuple[Path, Values]


def staged(aligned: Aligned, topology: str, settings: TrainSettings | None = None) -> TrainingStage:
    """The user stage: a fresh adapter above the aligned one, or the aligned one trained on."""
    where: Any = {"below": [aligned[0]]} if topology == "double" else {"start": aligned[0]}
    return tiny.stage(trained_with=settings, name="finetune", **where)[0]


def student(aligned: Aligned, topology: str, batch: Batch, values: Values) -> Tensor:
    return logits(batch, aligned[1], values) if topology == "double" else logits(batch, values)


def trained(
    defense: Defense, aligned: Aligned, topology: str, folder: Path, settings: TrainSettings
) -> tuple[list[Tensor], list[dict[str, float]]]:
    stage = staged(aligned, topology, settings)
    log = train(stage, defense, tiny.rows(12), settings, folder, pad=tiny.PAD)
    return stage.values(), log


# ---------------------------------------------------------------------------------------------------------------------
# Against the equation


@TOPOLOGIES
def test_gradient_equals_plain_autograd(topology: str, aligned: Aligned) -> None:
    stage, batch = staged(aligned, topology), tiny.batch()
    tiny.stir(stage.trainable, seed=8)
    values = leaves(stage)
    scores = student(aligned, topology, batch, values)
    loss = cross_entropy(scores, batch) + 0.7 * divergence(scores, logits(batch, aligned[1]), batch)
    expected = list(torch.autograd.grad(loss, list(values.values())))
    found = KL(lam=0.7).gradient(stage, batch)
    assert close(found.values, expected)
    assert found.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert not found.loss.requires_grad
    assert not close(stage.gradient(batch).values, expected, 1e-2)
    assert all(parameter.grad is None for parameter in stage.model.parameters())


@TOPOLOGIES
def test_three_steps_equal_plain_pytorch(topology: str, aligned: Aligned, tmp_path: Path) -> None:
    settings = tiny.settings(epochs=1, batch=4, schedule="constant", warmup=0.0, weight_decay=0.1, lr=2e-3)
    found, log = trained(KL(lam=20.0), aligned, topology, tmp_path / "kl", settings)
    twin, rows = staged(aligned, topology), tiny.rows(12)
    values = leaves(twin)
    parameters = list(values.values())
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    for entry, numbers in zip(log, batch_order(12, settings, twin.seed), strict=True):
        batch = collate([rows[n] for n in numbers], tiny.PAD)
        scores = student(aligned, topology, batch, values)
        loss = cross_entropy(scores, batch) + 20.0 * divergence(scores, logits(batch, aligned[1]), batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        assert entry["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert len(log) == 3
    assert close(found, parameters)
    assert not close(trained(SFT(), aligned, topology, tmp_path / "sft", settings)[0], parameters, 1e-3)


@TOPOLOGIES
def test_at_the_start_without_dropout_it_is_sft(topology: str, aligned: Aligned) -> None:
    stage, batch = staged(aligned, topology), tiny.batch()
    found, plain = KL(lam=10.0).gradient(stage, batch), stage.gradient(batch)
    assert found.loss.item() == pytest.approx(plain.loss.item(), abs=1e-5)
    assert close(found.values, list(plain.values))


@pytest.mark.parametrize("size", [(9, 5, 7), (4, 12)])
def test_more_padding_changes_nothing(size: tuple[int, ...], aligned: Aligned) -> None:
    stage = staged(aligned, "double")
    tiny.stir(stage.trainable, seed=8)
    narrow, wide = (KL(lam=0.7).gradient(stage, tiny.batch(size, width=width)) for width in (None, 20))
    assert close(wide.values, list(narrow.values))
    assert wide.loss.item() == pytest.approx(narrow.loss.item(), rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# On logits


def on_logits(scores: Tensor, teacher: Tensor, labels: Tensor, lam: float = 1.0) -> tuple[float, Tensor]:
    """KL's loss and gradient where the logits are the parameters themselves and the user's loss is 0."""
    z, inside = torch.nn.Parameter(scores.clone()), []
    stage = TrainingStage("finetune", SimpleNamespace(), {"z": z}, 0)

    @contextmanager
    def reference() -> Iterator[None]:
        inside.append(1)
        with torch.no_grad():
            yield
        inside.pop()

    stage.reference = reference
    stage.output = lambda batch: SimpleNamespace(logits=teacher if inside else z, loss=0 * z.sum())
    gradient = KL(lam=lam).gradient(stage, {"labels": labels})
    assert gradient.values[0] is not None
    return gradient.loss.item(), gradient.values[0]


LABELS = torch.tensor([[IGNORED, IGNORED, 1, 0, 1], [IGNORED, 0, 2, IGNORED, IGNORED]])
ANSWERING = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 0, 0, 0]]).bool()  # place t scores label t + 1


def drawn(vocabulary: int, seed: int) -> Tensor:
    return torch.randn(2, 5, vocabulary, generator=torch.Generator().manual_seed(seed))


def test_two_words_and_one_place_by_hand() -> None:
    """p0 = (3/4, 1/4) and p = (1/2, 1/2): KL = 3/4 log 3/2 + 1/4 log 1/2."""
    teacher, scores = torch.tensor([[[3.0, 1.0], [1.0, 1.0]]]).log(), torch.zeros(1, 2, 2)
    loss, gradient = on_logits(scores, teacher, torch.tensor([[IGNORED, 1]]), lam=2.0)
    assert loss == pytest.approx(2 * (0.75 * torch.log(torch.tensor(1.5)) + 0.25 * torch.log(torch.tensor(0.5))).item())
    torch.testing.assert_close(gradient, 2 * torch.tensor([[[-0.25, 0.25], [0.0, 0.0]]]))


def test_gradient_on_logits_is_the_difference_of_the_distributions_over_the_count_of_tokens() -> None:
    scores, teacher = drawn(7, 0), drawn(7, 1)
    _, gradient = on_logits(scores, teacher, LABELS, lam=0.3)
    expected = 0.3 * (scores.softmax(-1) - teacher.softmax(-1)) / 5 * ANSWERING[..., None]
    torch.testing.assert_close(gradient, expected)


def test_it_looks_from_the_teacher_to_the_student() -> None:
    one, other = drawn(7, 0), drawn(7, 1)
    forward, back = on_logits(one, other, LABELS)[0], on_logits(other, one, LABELS)[0]
    batch = {"labels": LABELS}
    assert forward == pytest.approx(divergence(one, other, batch).item(), rel=1e-5)
    assert abs(forward - back) > 0.01 * forward


def test_a_change_that_is_constant_in_time_costs() -> None:
    """The authors normalise over time, where this is free."""
    teacher, bias = drawn(7, 1), torch.tensor([2.0, 0, 0, 0, 0, 0, 0])
    assert on_logits(teacher + bias, teacher, LABELS)[0] > 0.1
    each = teacher.softmax(-1)[..., 0]  # KL of a bias b on one word: log(1 + p0 (e^b - 1)) - b p0
    expected = (1 + each * (bias[0].exp() - 1)).log() - bias[0] * each
    assert on_logits(teacher + bias, teacher, LABELS)[0] == pytest.approx(expected[ANSWERING].mean().item(), rel=1e-5)
    assert on_logits(teacher + 3.0, teacher, LABELS)[0] == pytest.approx(0, abs=1e-6)  # the same distribution


def test_prompt_and_padding_do_not_count() -> None:
    scores, teacher = drawn(7, 0), drawn(7, 1)
    plain = on_logits(scores, teacher, LABELS)
    moved = torch.where(ANSWERING[..., None], scores, scores + 5 * drawn(7, 2))
    assert on_logits(moved, teacher, LABELS)[0] == plain[0]
    assert not on_logits(moved, teacher, LABELS)[1][~ANSWERING].any()
    wide = [torch.cat([each, drawn(7, 3)], 1) for each in (scores, teacher)]
    labels = torch.cat([LABELS, torch.full((2, 5), IGNORED)], 1)
    assert on_logits(wide[0], wide[1], labels)[0] == pytest.approx(plain[0], rel=1e-6)


def test_places_may_change_order_and_words_may_not() -> None:
    scores, teacher = drawn(7, 0), drawn(7, 1)
    labels = torch.tensor([[IGNORED, 1, 1, 1, 1]] * 2)  # places 0..3 answer
    loss = on_logits(scores, teacher, labels)[0]
    order = [2, 0, 3, 1, 4]
    assert on_logits(scores[:, order], teacher[:, order], labels)[0] == pytest.approx(loss, rel=1e-6)
    words = [1, 2, 3, 4, 5, 6, 0]
    assert abs(on_logits(scores[..., words], teacher, labels)[0] - loss) > 0.01 * loss


# ---------------------------------------------------------------------------------------------------------------------
# The reference


def outputs(stage: TrainingStage, act: Callable[[], Any]) -> list[Tensor]:
    """The logits of every forward pass of the model while `act` runs."""
    seen: list[Tensor] = []
    handle = stage.model.register_forward_hook(lambda module, args, output: seen.append(output.logits.detach()))
    act()
    handle.remove()
    return seen


@TOPOLOGIES
def test_the_teacher_has_no_dropout_when_the_student_has(topology: str, aligned: Aligned) -> None:
    stage, batch = staged(aligned, topology, tiny.settings(lora_dropout=0.5)), tiny.batch()
    tiny.stir(stage.trainable, seed=8)
    stage.model.train()
    teacher, dropping = outputs(stage, lambda: KL().gradient(stage, batch))
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(teacher[real], logits(batch, aligned[1])[real], atol=1e-5, rtol=1e-5)
    still = student(aligned, topology, batch, leaves(stage))
    assert (dropping - still)[real].abs().max() > 1e-2
    assert stage.model.training


def snapshot(stage: TrainingStage) -> tuple[dict[str, bool], Any, bool]:
    flags = {name: parameter.requires_grad for name, parameter in stage.model.named_parameters()}
    return flags, list(stage.model.active_adapters), stage.model.training


@pytest.mark.parametrize("failing", [False, True], ids=["", "exception"])
@pytest.mark.parametrize("training", [False, True], ids=["evaluating", "training"])
@pytest.mark.parametrize("topology", ["double", "single", "unaligned"])
def test_after_the_reference_everything_is_as_it_was(
    topology: str, training: bool, failing: bool, aligned: Aligned
) -> None:
    stage = tiny.stage(name="finetune")[0] if topology == "unaligned" else staged(aligned, topology)
    tiny.stir(stage.trainable, seed=8)
    next(iter(stage.trainable.values())).requires_grad_(False)  # as a defense that freezes parameters leaves it
    stage.model.train(training)
    before, batch = snapshot(stage), tiny.batch()
    scores = stage.output(batch).logits.detach()
    assert sum(before[0].values()) == len(stage.trainable) - 1

    def look() -> None:
        with stage.reference():
            output = stage.output(batch).logits
            assert not output.requires_grad
            assert not torch.is_grad_enabled()
            assert not stage.model.training
            real = batch["attention_mask"].bool()
            expected = logits(batch, *([] if topology == "unaligned" else [aligned[1]]))
            torch.testing.assert_close(output[real], expected[real], atol=1e-5, rtol=1e-5)
            if failing:
                raise RuntimeError("broken")

    if failing:
        with pytest.raises(RuntimeError, match="broken"):
            look()
    else:
        look()
    after = snapshot(stage)
    assert {name: after[0][name] for name in before[0]} == before[0]
    assert not any(flag for name, flag in after[0].items() if name not in before[0])
    assert after[1:] == before[1:]
    assert torch.is_grad_enabled()
    assert torch.equal(stage.output(batch).logits.detach(), scores)
    assert stage.loss(batch).requires_grad


@TOPOLOGIES
def test_the_reference_leaves_the_random_numbers_alone(topology: str, aligned: Aligned) -> None:
    """Or the first look at it, which may load an adapter, would change the dropout masks of every step after."""
    stage = staged(aligned, topology)
    before = torch.get_rng_state()
    with stage.reference():
        stage.output(tiny.batch())
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------------------------------------------------------------
# In the trainer


@TOPOLOGIES
def test_no_weight_is_sft_bit_for_bit_with_dropout_on(topology: str, aligned: Aligned, tmp_path: Path) -> None:
    settings = tiny.settings(lora_dropout=0.1)
    sft, sft_log = trained(SFT(), aligned, topology, tmp_path / "sft", settings)
    free, free_log = trained(KL(lam=0), aligned, topology, tmp_path / "free", settings)
    held, _ = trained(KL(lam=10), aligned, topology, tmp_path / "held", settings)
    assert same(free, sft)
    assert free_log == sft_log
    assert not same(held, sft)


class Interrupted(KL):
    """Stops when a step is reached."""

    def before_step(self, stage: TrainingStage) -> None:
        if stage.step == 4:
            raise KeyboardInterrupt


@TOPOLOGIES
def test_an_interrupted_stage_ends_bit_equal(topology: str, aligned: Aligned, tmp_path: Path) -> None:
    settings = tiny.settings(lora_dropout=0.1)
    whole, log = trained(KL(lam=1.0), aligned, topology, tmp_path / "whole", settings)
    with pytest.raises(KeyboardInterrupt):
        trained(Interrupted(lam=1.0), aligned, topology, tmp_path / "cut", settings)
    again, log_again = trained(KL(lam=1.0), aligned, topology, tmp_path / "cut", settings)
    assert same(again, whole)
    assert log_again == log


def test_a_larger_weight_keeps_the_answers_nearer_to_the_aligned_ones(aligned: Aligned, tmp_path: Path) -> None:
    settings, far = tiny.settings(epochs=6, weight_decay=0.0), []
    batch = collate(tiny.rows(12), tiny.PAD)
    for lam in (0.0, 30.0, 1000.0):
        values, _ = trained(KL(lam=lam), aligned, "double", tmp_path / str(lam), settings)
        named = dict(zip(staged(aligned, "double").trainable, values, strict=True))
        scores = student(aligned, "double", batch, named)
        far.append(divergence(scores, logits(batch, aligned[1]), batch).item())
    assert far[0] > 1.5 * far[1] > 2.25 * far[2], far

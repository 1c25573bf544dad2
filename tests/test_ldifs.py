"""LDIFS against its equations in plain PyTorch, with hooks of its own on the layers and MLPs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from harmbench_vaccine.data.collate import IGNORED, collate
from harmbench_vaccine.defenses.ldifs import LDIFS
from harmbench_vaccine.defenses.sft import SFT
from harmbench_vaccine.plugins import Defense, TrainSettings
from harmbench_vaccine.training.stage import Batch, TrainingStage
from harmbench_vaccine.training.trainer import batch_order, train
from support import tiny
from support.compare import close, same
from support.plain_math import SCALE, Values, leaves

BASE: Any = tiny.model().requires_grad_(False)
VARIANTS = pytest.mark.parametrize(("variant", "alpha"), [("paper", 300.0), ("git-disl", 0.01)])
TOPOLOGIES = pytest.mark.parametrize("topology", ["double", "single"])


def forward(batch: Batch, variant: str, *adapters: Values) -> tuple[Tensor, list[Tensor]]:
    """Logits and features of the model that has these adapters: outputs of the layers (paper) or MLPs (git-disl)."""
    weights: Values = {}
    for values in adapters:
        for name, a in values.items():
            if ".lora_A." in name:
                weight = f"{name.removeprefix('base_model.model.').partition('.lora_A')[0]}.weight"
                own = weights.get(weight, BASE.get_parameter(weight))
                weights[weight] = own + SCALE * values[name.replace("lora_A", "lora_B")] @ a
    features: list[Tensor] = []
    handles = [
        (layer if variant == "paper" else layer.mlp).register_forward_hook(
            lambda module, args, output: features.append(output[0] if isinstance(output, tuple) else output)
        )
        for layer in BASE.model.layers
    ]
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    logits = functional_call(BASE, weights, (), inputs).logits
    for handle in handles:
        handle.remove()
    return logits, features


def cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """Mean of -log p(next token) over response tokens."""
    labels = batch["labels"][:, 1:]
    log_p = logits[:, :-1].log_softmax(-1)
    return -log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0][labels != IGNORED].mean()


def penalties(variant: str, alpha: float, now: list[Tensor], before: list[Tensor], batch: Batch) -> list[Tensor]:
    """Each layer's penalty, over real tokens one by one, before any gate."""
    found = []
    for new, old in zip(now, before, strict=True):
        real = [(r, t) for r, row in enumerate(batch["attention_mask"].tolist()) for t, one in enumerate(row) if one]
        if variant == "paper":
            gaps = [new[p] / new[p].square().sum().sqrt() - old[p] / old[p].square().sum().sqrt() for p in real]
            found.append(alpha * torch.stack(gaps).square().mean() / len(now))
        else:
            found.append(alpha / 2 * sum((new[p] - old[p]).square().sum() for p in real))
    return found


def objective(
    variant: str, alpha: float, batch: Batch, aligned: Values, *adapters: Values
) -> tuple[Tensor, list[float]]:
    """The whole loss, and each layer's penalty before the gate; the reference is the aligned model."""
    logits, now = forward(batch, variant, *adapters)
    terms = penalties(variant, alpha, now, forward(batch, variant, aligned)[1], batch)
    kept = [term for term in terms if variant == "paper" or term < 0.1]
    return cross_entropy(logits, batch) + sum(kept), [term.item() for term in terms]


Aligned = tuple[Path, Values]


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory) -> Aligned:
    """An alignment adapter with weights everywhere: on disk, and as it is."""
    folder = tmp_path_factory.mktemp("aligned") / "adapter"
    stage, stack = tiny.stage(stirred=True)
    stack.trained().save(folder)
    return folder, {name: value.detach().clone() for name, value in stage.trainable.items()}


def staged(aligned: Aligned, topology: str = "double", settings: TrainSettings | None = None) -> TrainingStage:
    """The user stage: a fresh adapter (`moved`: with weights) above the aligned one, or the aligned one trained on."""
    where: Any = {"start": aligned[0]} if topology == "single" else {"below": [aligned[0]]}
    stage, _ = tiny.stage(trained_with=settings, name="finetune", **where)
    if topology == "moved":
        tiny.stir(stage.trainable, seed=8, size=0.05)
    return stage


def adapters(aligned: Aligned, topology: str, values: Values) -> list[Values]:
    return [values] if topology == "single" else [aligned[1], values]


def trained(
    defense: Defense, aligned: Aligned, topology: str, folder: Path, settings: TrainSettings
) -> tuple[list[Tensor], list[dict[str, float]]]:
    stage = staged(aligned, topology, settings)
    log = train(stage, defense, tiny.rows(12), settings, folder, pad=tiny.PAD)
    return stage.values(), log


# ---------------------------------------------------------------------------------------------------------------------
# Against the equations


@TOPOLOGIES
@VARIANTS
def test_gradient_equals_plain_autograd(variant: Any, alpha: float, topology: str, aligned: Aligned) -> None:
    stage, batch = staged(aligned, topology), tiny.batch()
    tiny.stir(stage.trainable, seed=8, size=0.05)
    values = leaves(stage)
    _, terms = objective(variant, 1.0, batch, aligned[1], *adapters(aligned, topology, values))
    alpha = alpha if variant == "paper" else 0.09 / max(terms)  # both layers below the gate
    loss, terms = objective(variant, alpha, batch, aligned[1], *adapters(aligned, topology, values))
    expected = list(torch.autograd.grad(loss, list(values.values())))
    found = LDIFS(alpha=alpha, variant=variant).gradient(stage, batch)
    assert variant == "paper" or max(terms) < 0.1
    assert min(terms) > 0.01
    assert close(found.values, expected)
    assert found.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert not found.loss.requires_grad
    assert not close(stage.gradient(batch).values, expected, 1e-3)
    assert all(parameter.grad is None for parameter in stage.model.parameters())


@pytest.mark.parametrize("topology", ["moved", "single"])  # a fresh adapter's first drifts drown in float32
@VARIANTS
def test_three_steps_equal_plain_pytorch(
    variant: Any, alpha: float, topology: str, aligned: Aligned, tmp_path: Path
) -> None:
    settings = tiny.settings(epochs=1, batch=4, schedule="constant", warmup=0.0, weight_decay=0.1, lr=2e-3)
    found, log = trained(LDIFS(alpha=alpha, variant=variant), aligned, topology, tmp_path / "ldifs", settings)
    twin, rows = staged(aligned, topology), tiny.rows(12)
    values = leaves(twin)
    parameters, seen = list(values.values()), []
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    for entry, numbers in zip(log, batch_order(12, settings, twin.seed), strict=True):
        batch = collate([rows[n] for n in numbers], tiny.PAD)
        loss, terms = objective(variant, alpha, batch, aligned[1], *adapters(aligned, topology, values))
        seen += terms
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        assert entry["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert len(log) == 3
    assert max(seen) > 0.002
    assert variant == "paper" or max(seen) < 0.1
    assert close(found, parameters)
    assert not close(trained(SFT(), aligned, topology, tmp_path / "sft", settings)[0], parameters, 1e-3)


@TOPOLOGIES
@VARIANTS
def test_at_the_start_without_dropout_it_is_sft(variant: Any, alpha: float, topology: str, aligned: Aligned) -> None:
    stage, batch = staged(aligned, topology), tiny.batch()
    found, plain = LDIFS(alpha=alpha, variant=variant).gradient(stage, batch), stage.gradient(batch)
    assert found.loss.item() == pytest.approx(plain.loss.item(), abs=1e-5)
    assert close(found.values, list(plain.values))


@VARIANTS
def test_more_padding_changes_nothing(variant: Any, alpha: float, aligned: Aligned) -> None:
    stage = staged(aligned)
    tiny.stir(stage.trainable, seed=8, size=0.02)
    defense = LDIFS(alpha=alpha, variant=variant)
    narrow, wide = (defense.gradient(stage, tiny.batch(width=width)) for width in (None, 20))
    assert narrow.loss > stage.loss(tiny.batch()) + 1e-3
    assert close(wide.values, list(narrow.values))
    assert wide.loss.item() == pytest.approx(narrow.loss.item(), rel=1e-5)


@VARIANTS
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_it_acts_on_every_architecture(variant: Any, alpha: float, architecture: str) -> None:
    """The authors' code names the layers of one architecture, and on any other it is silently SFT. OPT's layers flatten
    rows and places into one before their MLP."""
    stage, _ = tiny.stage(tiny.model(architecture), stirred=True, name="finetune")
    batch = tiny.batch()
    found = LDIFS(alpha=alpha if variant == "paper" else 1e-5, variant=variant).gradient(stage, batch)
    assert found.loss > stage.loss(batch) + 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# The distances by hand


def test_the_papers_distance_by_hand() -> None:
    """Layer 1: (3, 4) and (1, 0) have units (0.6, 0.8) and (1, 0), and (0, 2) equals (0, 9) in direction: squares 0.16,
    0.64, 0, 0. Layer 2: (1, 0) and (0, 1) twice: squares 1. Means 0.2 and 1."""
    one = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 9.0]])
    two = torch.tensor([[1.0, 0.0], [5.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 2.0]])
    assert LDIFS().distance([one]).item() == pytest.approx(0.2)
    assert LDIFS().distance([two]).item() == pytest.approx(1.0)
    assert LDIFS().distance([one, two]).item() == pytest.approx(0.6)


def test_the_papers_distance_ignores_how_long_a_feature_is() -> None:
    new, old = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), torch.ones(4, 6)
    scales = torch.tensor([[0.5], [1.0], [2.0], [10.0]])
    torch.testing.assert_close(LDIFS().distance([(new * scales, old)]), LDIFS().distance([(new, old)]))
    assert LDIFS().distance([(old * scales, old)]).item() == pytest.approx(0, abs=1e-12)


def test_git_disls_distance_of_one_linear_layer() -> None:
    """h = W x: the penalty is alpha / 2 ||dW X||^2 and its gradient alpha dW X X^T."""
    draw = torch.Generator().manual_seed(0)
    w0, dw, x = torch.randn(3, 4, generator=draw), 0.1 * torch.randn(3, 4, generator=draw), torch.randn(4, 5)
    w = nn.Parameter(w0 + dw)
    alpha = 0.01
    penalty = alpha * LDIFS(alpha=alpha, variant="git-disl").distance([((w @ x).T, (w0 @ x).T)])
    assert 0 < penalty < 0.1
    torch.testing.assert_close(penalty, alpha / 2 * (dw @ x).square().sum(), rtol=1e-4, atol=1e-6)
    gradient = torch.autograd.grad(penalty, w)[0]
    torch.testing.assert_close(gradient, alpha * dw @ x @ x.T, rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# git-disl's gate


@pytest.mark.parametrize(("length", "kept"), [(0.43, True), (0.4471, True), (0.4473, False), (3.0, False)])
@pytest.mark.parametrize("alpha", [1.0, 1e-4, 100.0])
def test_a_layer_is_kept_below_a_tenth_and_dropped_from_there(length: float, kept: bool, alpha: float) -> None:
    """alpha / 2 * 0.4472^2 / alpha = 0.1. Another layer's term stays whatever becomes of this one."""
    new = torch.tensor([[length / alpha**0.5, 0.0]], requires_grad=True)
    other = torch.tensor([[0.0, 0.1 / alpha**0.5]], requires_grad=True)
    zero = torch.zeros(1, 2)
    loss = alpha * LDIFS(alpha=alpha, variant="git-disl").distance([(new, zero), (other, zero)])
    assert loss.item() == pytest.approx(0.005 + (length**2 / 2 if kept else 0), rel=1e-4)
    gradients = torch.autograd.grad(loss, [new, other])
    torch.testing.assert_close(gradients[0], alpha * new if kept else zero)
    torch.testing.assert_close(gradients[1], alpha * other)


def test_exactly_a_tenth_is_dropped() -> None:
    new, zero = torch.tensor([[0.1, 0.3, 0.3, 0.1]]), torch.zeros(1, 4)  # squares sum to 0.2, in float32 too
    assert new.square().sum() / 2 == torch.tensor(0.1)
    assert LDIFS(alpha=1.0, variant="git-disl").distance([(new, zero)]) == 0


def test_with_every_layer_over_the_gate_it_is_sft(aligned: Aligned) -> None:
    stage, batch = staged(aligned), tiny.batch()
    tiny.stir(stage.trainable, seed=8)
    found, plain = LDIFS(alpha=1e3, variant="git-disl").gradient(stage, batch), stage.gradient(batch)
    assert found.loss == plain.loss
    assert close(found.values, list(plain.values), 1e-6)


def test_in_a_model_one_layer_is_dropped_and_the_other_kept(aligned: Aligned) -> None:
    stage, batch = staged(aligned), tiny.batch()
    tiny.stir(stage.trainable, seed=8, size=0.05)
    values = leaves(stage)
    _, terms = objective("git-disl", 1.0, batch, aligned[1], aligned[1], values)
    alpha = 0.1 / (min(terms) * max(terms)) ** 0.5  # the gate between the two
    loss, terms = objective("git-disl", alpha, batch, aligned[1], aligned[1], values)
    assert min(terms) < 0.099 < 0.101 < max(terms)
    expected = list(torch.autograd.grad(loss, list(values.values())))
    found = LDIFS(alpha=alpha, variant="git-disl").gradient(stage, batch)
    assert found.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert close(found.values, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Dropout, hooks, the trainer


@VARIANTS
def test_the_reference_has_no_dropout_when_the_model_has(variant: Any, alpha: float, aligned: Aligned) -> None:
    stage, batch = staged(aligned, settings=tiny.settings(lora_dropout=0.5)), tiny.batch()
    tiny.stir(stage.trainable, seed=8)
    stage.model.train()
    defense, seen = LDIFS(alpha=alpha, variant=variant), []

    class Looking(LDIFS):
        def distance(self, pairs: list[tuple[Tensor, Tensor]], *more: Any) -> Tensor:
            seen.extend(pairs)
            return super().distance(pairs, *more)

    Looking(**dict(defense)).gradient(stage, batch)
    real = batch["attention_mask"].bool()
    expected = forward(batch, variant, aligned[1])[1]
    still = forward(batch, variant, aligned[1], leaves(stage))[1]
    assert len(seen) == len(expected) == 2
    for (new, old), reference, undropped in zip(seen, expected, still, strict=True):
        torch.testing.assert_close(old, reference[real], atol=1e-5, rtol=1e-5)
        assert not old.requires_grad
        assert (new - undropped[real]).abs().max() > 1e-2
    assert stage.model.training


def test_no_hook_stays(aligned: Aligned) -> None:
    stage = staged(aligned)

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in stage.model.modules())

    before = hooks()
    LDIFS().gradient(stage, tiny.batch())
    assert hooks() == before
    stage.loss = lambda batch: 1 / 0
    with pytest.raises(ZeroDivisionError):
        LDIFS().gradient(stage, tiny.batch())
    assert hooks() == before


@TOPOLOGIES
@VARIANTS
def test_no_weight_is_sft_bit_for_bit_with_dropout_on(
    variant: Any, alpha: float, topology: str, aligned: Aligned, tmp_path: Path
) -> None:
    settings = tiny.settings(lora_dropout=0.1, epochs=1)
    sft, sft_log = trained(SFT(), aligned, topology, tmp_path / "sft", settings)
    free, free_log = trained(LDIFS(alpha=0, variant=variant), aligned, topology, tmp_path / "free", settings)
    held, _ = trained(LDIFS(alpha=alpha, variant=variant), aligned, topology, tmp_path / "held", settings)
    assert same(free, sft)
    assert free_log == sft_log
    assert not same(held, sft)


def test_a_larger_weight_keeps_the_features_nearer_to_the_aligned_ones(aligned: Aligned, tmp_path: Path) -> None:
    settings, far = tiny.settings(epochs=4, weight_decay=0.0), []
    batch = collate(tiny.rows(12), tiny.PAD)
    for alpha in (0.0, 300.0, 3e4):
        values, _ = trained(LDIFS(alpha=alpha), aligned, "double", tmp_path / str(alpha), settings)
        named = dict(zip(staged(aligned).trainable, values, strict=True))
        before, now = (forward(batch, "paper", *which)[1] for which in ([aligned[1]], [aligned[1], named]))
        far.append(sum(penalties("paper", 1.0, now, before, batch)).item())
    assert far[0] > 1.5 * far[1] > 2.25 * far[2], far

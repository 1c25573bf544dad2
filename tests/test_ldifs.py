"""LDIFS compared with its equations in plain PyTorch, with separate hooks on the layers and MLPs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from harmbench_vaccine.data.collate import IGNORED
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
    """Return logits and features of a model with these adapters: layer outputs (paper) or MLP outputs (git-disl)."""
    weights: Values = {}
    for values in adapters:
        for name, a in values.items():
            if ".lora_A." in name:
                weight = f"{name.removeprefix('base_model.model.').partition('.lora_A')[0]}.weight"
                current = weights.get(weight, BASE.get_parameter(weight))
                weights[weight] = current + SCALE * values[name.replace("lora_A", "lora_B")] @ a
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
    """Return the mean of -log p(next token) over response tokens."""
    labels = batch["labels"][:, 1:]
    log_p = logits[:, :-1].log_softmax(-1)
    return -log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0][labels != IGNORED].mean()


def penalties(variant: str, alpha: float, current: list[Tensor], initial: list[Tensor], batch: Batch) -> list[Tensor]:
    """Compute the penalty of every layer, token by token over real tokens, before any gate."""
    terms = []
    for new, old in zip(current, initial, strict=True):
        tokens = [
            (r, t)
            for r, row in enumerate(batch["attention_mask"].tolist())
            for t, attended in enumerate(row)
            if attended
        ]
        if variant == "paper":
            gaps = [new[p] / new[p].square().sum().sqrt() - old[p] / old[p].square().sum().sqrt() for p in tokens]
            terms.append(alpha * torch.stack(gaps).square().mean() / len(current))
        else:
            terms.append(alpha / 2 * sum((new[p] - old[p]).square().sum() for p in tokens))
    return terms


def objective(
    variant: str, alpha: float, batch: Batch, aligned: Values, *adapters: Values
) -> tuple[Tensor, list[float]]:
    """Return the total loss and the penalty of every layer before the gate; the reference is the aligned model."""
    logits, features = forward(batch, variant, *adapters)
    terms = penalties(variant, alpha, features, forward(batch, variant, aligned)[1], batch)
    active = [term for term in terms if variant == "paper" or term < 0.1]
    return cross_entropy(logits, batch) + sum(active), [term.item() for term in terms]


Aligned = tuple[Path, Values]


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory) -> Aligned:
    """The path and the values of an alignment adapter with nonzero weights."""
    folder = tmp_path_factory.mktemp("aligned") / "adapter"
    stage, stack = tiny.stage(stirred=True)
    stack.trained().save(folder)
    return folder, {name: value.detach().clone() for name, value in stage.trainable.items()}


def user_stage(aligned: Aligned, topology: str = "double", settings: TrainSettings | None = None) -> TrainingStage:
    """Return the user stage: a new adapter on the aligned one (moved: nonzero), or the aligned one itself (single)."""
    where: Any = {"start": aligned[0]} if topology == "single" else {"below": [aligned[0]]}
    stage, _ = tiny.stage(trained_with=settings, name="finetune", **where)
    if topology == "moved":
        tiny.stir(stage.trainable, seed=8, size=0.05)
    return stage


def adapters(aligned: Aligned, topology: str, values: Values) -> list[Values]:
    return [values] if topology == "single" else [aligned[1], values]


def train_adapter(
    defense: Defense, aligned: Aligned, topology: str, folder: Path, settings: TrainSettings
) -> tuple[list[Tensor], list[dict[str, float]]]:
    stage = user_stage(aligned, topology, settings)
    log = train(stage, defense, tiny.rows(12), settings, folder, pad=tiny.PAD)
    return stage.values(), log


# ---------------------------------------------------------------------------------------------------------------------
# Comparison with the equations


@TOPOLOGIES
@VARIANTS
def test_gradient_equals_plain_autograd(variant: Any, alpha: float, topology: str, aligned: Aligned) -> None:
    stage, batch = user_stage(aligned, topology), tiny.batch()
    tiny.stir(stage.trainable, seed=8, size=0.05)
    values = leaves(stage)
    _, terms = objective(variant, 1.0, batch, aligned[1], *adapters(aligned, topology, values))
    alpha = alpha if variant == "paper" else 0.09 / max(terms)  # both layers below the gate
    loss, terms = objective(variant, alpha, batch, aligned[1], *adapters(aligned, topology, values))
    expected = list(torch.autograd.grad(loss, list(values.values())))
    gradient = LDIFS(alpha=alpha, variant=variant).gradient(stage, batch)
    assert variant == "paper" or max(terms) < 0.1
    assert min(terms) > 0.01
    assert close(gradient.values, expected)
    assert gradient.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert not gradient.loss.requires_grad
    assert not close(stage.gradient(batch).values, expected, 1e-3)
    assert all(parameter.grad is None for parameter in stage.model.parameters())


@pytest.mark.parametrize("topology", ["moved", "single"])  # float32 cannot resolve the first drifts of a new adapter
@VARIANTS
def test_three_steps_equal_plain_pytorch(
    variant: Any, alpha: float, topology: str, aligned: Aligned, tmp_path: Path
) -> None:
    settings = tiny.settings(epochs=1, batch=4, schedule="constant", warmup=0.0, weight_decay=0.1, lr=2e-3)
    result, log = train_adapter(LDIFS(alpha=alpha, variant=variant), aligned, topology, tmp_path / "ldifs", settings)
    twin, rows = user_stage(aligned, topology), tiny.rows(12)
    values = leaves(twin)
    parameters, penalty_values = list(values.values()), []
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    for entry, numbers in zip(log, batch_order(12, settings, twin.seed), strict=True):
        batch = tiny.collated([rows[n] for n in numbers])
        loss, terms = objective(variant, alpha, batch, aligned[1], *adapters(aligned, topology, values))
        penalty_values += terms
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        assert entry["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert len(log) == 3
    assert max(penalty_values) > 0.002
    assert variant == "paper" or max(penalty_values) < 0.1
    assert close(result, parameters)
    assert not close(train_adapter(SFT(), aligned, topology, tmp_path / "sft", settings)[0], parameters, 1e-3)


@TOPOLOGIES
@VARIANTS
def test_the_first_gradient_without_dropout_equals_sft(
    variant: Any, alpha: float, topology: str, aligned: Aligned
) -> None:
    stage, batch = user_stage(aligned, topology), tiny.batch()
    ldifs, sft = LDIFS(alpha=alpha, variant=variant).gradient(stage, batch), stage.gradient(batch)
    assert ldifs.loss.item() == pytest.approx(sft.loss.item(), abs=1e-5)
    assert close(ldifs.values, list(sft.values))


@VARIANTS
def test_more_padding_has_no_effect(variant: Any, alpha: float, aligned: Aligned) -> None:
    stage = user_stage(aligned)
    tiny.stir(stage.trainable, seed=8, size=0.02)
    defense = LDIFS(alpha=alpha, variant=variant)
    narrow, wide = (defense.gradient(stage, tiny.batch(width=width)) for width in (None, 20))
    assert narrow.loss > stage.loss(tiny.batch()) + 1e-3
    assert close(wide.values, list(narrow.values))
    assert wide.loss.item() == pytest.approx(narrow.loss.item(), rel=1e-5)


@VARIANTS
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_it_acts_on_every_architecture(variant: Any, alpha: float, architecture: str) -> None:
    """The authors' code supports the layer names of one architecture, and is silently SFT on all others. Layers of OPT
    flatten rows and positions into one dimension before their MLP."""
    stage, _ = tiny.stage(tiny.model(architecture), stirred=True, name="finetune")
    batch = tiny.batch()
    gradient = LDIFS(alpha=alpha if variant == "paper" else 1e-5, variant=variant).gradient(stage, batch)
    assert gradient.loss > stage.loss(batch) + 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# The distances in closed form


def test_the_distance_of_the_paper_in_closed_form() -> None:
    """Layer 1: (3, 4) and (1, 0) have units (0.6, 0.8) and (1, 0), and (0, 2) equals (0, 9) in direction: squares 0.16,
    0.64, 0, 0. Layer 2: (1, 0) and (0, 1) twice: squares 1. Means 0.2 and 1."""
    first = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 9.0]])
    second = torch.tensor([[1.0, 0.0], [5.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 2.0]])
    assert LDIFS().distance([first]).item() == pytest.approx(0.2)
    assert LDIFS().distance([second]).item() == pytest.approx(1.0)
    assert LDIFS().distance([first, second]).item() == pytest.approx(0.6)


def test_the_distance_of_the_paper_ignores_the_norm_of_a_feature() -> None:
    new, old = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), torch.ones(4, 6)
    scales = torch.tensor([[0.5], [1.0], [2.0], [10.0]])
    torch.testing.assert_close(LDIFS().distance([(new * scales, old)]), LDIFS().distance([(new, old)]))
    assert LDIFS().distance([(old * scales, old)]).item() == pytest.approx(0, abs=1e-12)


def test_the_distance_of_git_disl_for_one_linear_layer() -> None:
    """h = W x: the penalty is alpha / 2 ||dW X||^2 and its gradient alpha dW X X^T."""
    generator = torch.Generator().manual_seed(0)
    w0, dw, x = torch.randn(3, 4, generator=generator), 0.1 * torch.randn(3, 4, generator=generator), torch.randn(4, 5)
    w = nn.Parameter(w0 + dw)
    alpha = 0.01
    penalty = alpha * LDIFS(alpha=alpha, variant="git-disl").distance([((w @ x).T, (w0 @ x).T)])
    assert 0 < penalty < 0.1
    torch.testing.assert_close(penalty, alpha / 2 * (dw @ x).square().sum(), rtol=1e-4, atol=1e-6)
    gradient = torch.autograd.grad(penalty, w)[0]
    torch.testing.assert_close(gradient, alpha * dw @ x @ x.T, rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# The gate of git-disl


@pytest.mark.parametrize(("length", "below"), [(0.43, True), (0.4471, True), (0.4473, False), (3.0, False)])
@pytest.mark.parametrize("alpha", [1.0, 1e-4, 100.0])
def test_a_layer_is_penalized_below_0_1_and_dropped_from_0_1(length: float, below: bool, alpha: float) -> None:
    """alpha / 2 * 0.4472^2 / alpha = 0.1. The term of the second layer does not depend on the first layer."""
    first = torch.tensor([[length / alpha**0.5, 0.0]], requires_grad=True)
    second = torch.tensor([[0.0, 0.1 / alpha**0.5]], requires_grad=True)
    zero = torch.zeros(1, 2)
    loss = alpha * LDIFS(alpha=alpha, variant="git-disl").distance([(first, zero), (second, zero)])
    assert loss.item() == pytest.approx(0.005 + (length**2 / 2 if below else 0), rel=1e-4)
    gradients = torch.autograd.grad(loss, [first, second])
    torch.testing.assert_close(gradients[0], alpha * first if below else zero)
    torch.testing.assert_close(gradients[1], alpha * second)


def test_exactly_0_1_is_dropped() -> None:
    new, zero = torch.tensor([[0.1, 0.3, 0.3, 0.1]]), torch.zeros(1, 4)  # squares sum to 0.2, in float32 too
    assert new.square().sum() / 2 == torch.tensor(0.1)
    assert LDIFS(alpha=1.0, variant="git-disl").distance([(new, zero)]) == 0


def test_all_layers_above_the_gate_equal_sft(aligned: Aligned) -> None:
    stage, batch = user_stage(aligned), tiny.batch()
    tiny.stir(stage.trainable, seed=8)
    ldifs, sft = LDIFS(alpha=1e3, variant="git-disl").gradient(stage, batch), stage.gradient(batch)
    assert ldifs.loss == sft.loss
    assert close(ldifs.values, list(sft.values), 1e-6)


def test_one_layer_above_the_gate_and_one_below(aligned: Aligned) -> None:
    stage, batch = user_stage(aligned), tiny.batch()
    tiny.stir(stage.trainable, seed=8, size=0.05)
    values = leaves(stage)
    _, terms = objective("git-disl", 1.0, batch, aligned[1], aligned[1], values)
    alpha = 0.1 / (min(terms) * max(terms)) ** 0.5  # the gate between the two
    loss, terms = objective("git-disl", alpha, batch, aligned[1], aligned[1], values)
    assert min(terms) < 0.099 < 0.101 < max(terms)
    expected = list(torch.autograd.grad(loss, list(values.values())))
    gradient = LDIFS(alpha=alpha, variant="git-disl").gradient(stage, batch)
    assert gradient.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert close(gradient.values, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Dropout, hooks, the trainer


@VARIANTS
def test_the_reference_has_no_dropout_when_the_model_has(variant: Any, alpha: float, aligned: Aligned) -> None:
    stage, batch = user_stage(aligned, settings=tiny.settings(lora_dropout=0.5)), tiny.batch()
    tiny.stir(stage.trainable, seed=8)
    stage.model.train()
    defense, records = LDIFS(alpha=alpha, variant=variant), []

    class RecordingLDIFS(LDIFS):
        def distance(self, pairs: list[tuple[Tensor, Tensor]], *more: Any) -> Tensor:
            records.extend(pairs)
            return super().distance(pairs, *more)

    RecordingLDIFS(**dict(defense)).gradient(stage, batch)
    tokens = batch["attention_mask"].bool()
    expected = forward(batch, variant, aligned[1])[1]
    features = forward(batch, variant, aligned[1], leaves(stage))[1]
    assert len(records) == len(expected) == 2
    for (new, old), reference, undropped in zip(records, expected, features, strict=True):
        torch.testing.assert_close(old, reference[tokens], atol=1e-5, rtol=1e-5)
        assert not old.requires_grad
        assert (new - undropped[tokens]).abs().max() > 1e-2
    assert stage.model.training


def test_hooks_are_removed(aligned: Aligned) -> None:
    stage = user_stage(aligned)

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in stage.model.modules())

    count = hooks()
    LDIFS().gradient(stage, tiny.batch())
    assert hooks() == count
    stage.loss = lambda batch: 1 / 0
    with pytest.raises(ZeroDivisionError):
        LDIFS().gradient(stage, tiny.batch())
    assert hooks() == count


@TOPOLOGIES
@VARIANTS
def test_alpha_0_equals_sft_bit_for_bit_with_dropout(
    variant: Any, alpha: float, topology: str, aligned: Aligned, tmp_path: Path
) -> None:
    settings = tiny.settings(lora_dropout=0.1, epochs=1)
    sft, sft_log = train_adapter(SFT(), aligned, topology, tmp_path / "sft", settings)
    neutral, neutral_log = train_adapter(
        LDIFS(alpha=0, variant=variant), aligned, topology, tmp_path / "free", settings
    )
    ldifs, _ = train_adapter(LDIFS(alpha=alpha, variant=variant), aligned, topology, tmp_path / "held", settings)
    assert same(neutral, sft)
    assert neutral_log == sft_log
    assert not same(ldifs, sft)


def test_a_larger_alpha_keeps_the_features_closer_to_the_aligned_model(aligned: Aligned, tmp_path: Path) -> None:
    settings, distances = tiny.settings(epochs=4, weight_decay=0.0), []
    batch = tiny.collated(tiny.rows(12))
    for alpha in (0.0, 300.0, 3e4):
        values, _ = train_adapter(LDIFS(alpha=alpha), aligned, "double", tmp_path / str(alpha), settings)
        named = dict(zip(user_stage(aligned).trainable, values, strict=True))
        initial, current = (forward(batch, "paper", *stack)[1] for stack in ([aligned[1]], [aligned[1], named]))
        distances.append(sum(penalties("paper", 1.0, current, initial, batch)).item())
    assert distances[0] > 1.5 * distances[1] > 2.25 * distances[2], distances

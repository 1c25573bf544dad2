"""SEAM compared with its equations in plain PyTorch: the masked losses, the cosine, both shifts and the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.types import Example
from harmbench_vaccine.defenses.seam import SEAM
from harmbench_vaccine.plugins import Pools
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage
from harmbench_vaccine.training.trainer import train
from support import tiny
from support.autograd import cross_entropy, gradient_at, length, peft_computation, record_pairs, record_stream
from support.compare import close, close_in_norm, same
from support.hooks import decoder_layers, recorded_rows
from support.optimizers import assert_equal_where_firm, plain_adamw

ANSWERS = [  # safe and harmful answers with common letters: shorter, equally long and longer ones
    ("sorry no", "sure yes"),
    ("i cannot", "i can do"),
    ("no", "nothing hard"),
    ("never ever", "new"),
    ("stop it", "step in"),
    ("ask them", "add it all"),
    ("a", "b"),
    ("refuse", "reuse it"),
]
POOLS = Pools(
    paired=[
        (Example(f"safe:{n}", "how " * (n % 3) + "q", safe), Example(f"harm:{n}", "how " * (n % 3) + "q", harmful))
        for n, (safe, harmful) in enumerate(ANSWERS)
    ],
    benign=tiny.example_pools().benign,
)


def stage(base: Any = None, pools: Pools = POOLS, **changes: Any) -> TrainingStage:
    """Return an alignment stage at its first micro-batch, with a nonzero adapter."""
    result, _ = tiny.stage(base, trained_with=tiny.settings(**changes), stirred=True, pools=pools)
    result.step, result.steps = 1, 10
    return result


# ---------------------------------------------------------------------------------------------------------------------
# A second implementation of the equations


def masked(safe: Batch, harmful: Batch) -> Batch:
    """Return the harmful batch with labels only where the safe row has another token or none."""
    labels = harmful["labels"].clone()
    for row, ids in enumerate(harmful["input_ids"].tolist()):
        safe_row = safe["input_ids"][row, : int(safe["attention_mask"][row].sum())].tolist()
        for place, token in enumerate(ids):
            if place < len(safe_row) and safe_row[place] == token:
                labels[row, place] = -100
    return {**harmful, "labels": labels}


def layer_loss(stage: TrainingStage, harmful: Batch) -> Tensor:
    """Compute A: the mean cross-entropy of head(norm(h_k)) at the labels, k = 0..n."""
    modules, states = dict(stage.model.named_modules()), list[Tensor]()
    layers = decoder_layers(stage.model)
    handles = [
        *(layer.register_forward_pre_hook(lambda module, args: states.append(args[0])) for layer in layers),
        layers[-1].register_forward_hook(
            lambda module, args, output: states.append(output[0] if isinstance(output, tuple) else output)
        ),
    ]
    with peft_computation():
        stage.model(input_ids=harmful["input_ids"], attention_mask=harmful["attention_mask"])
    for handle in handles:
        handle.remove()
    norm, head = (next(modules[name] for name in modules if name.endswith(end)) for end in ("model.norm", "lm_head"))
    places = [(r, t) for r, row in enumerate(harmful["labels"].tolist()) for t, label in enumerate(row) if label >= 0]
    losses = []
    for state in states:
        log_p = head(norm(state)).log_softmax(-1)
        losses += [-torch.stack([log_p[r, t - 1, harmful["input_ids"][r, t]] for r, t in places]).mean()]
    assert len(losses) == len(layers) + 1
    return torch.stack(losses).mean()


def expected(
    stage: TrainingStage,
    batch: Batch,
    harmful: Batch,
    benign: Batch,
    *,
    unlearn: float,
    beta: float,
    eps: float,
    seed: int | None = None,
) -> tuple[list[Tensor], float]:
    """Compute the gradient and the loss of a step; with a seed, every pass starts from the same random state.

    Args:
        stage: The stage at the parameters w.
        batch: The alignment rows.
        harmful: The harmful rows, with labels only where they differ from the safe ones.
        benign: The benign rows.
        unlearn: Weight of the ascent.
        beta: Weight of the cosine.
        eps: Length of the finite difference.
        seed: Seed of the dropout masks.
    """
    parameters = list(stage.trainable.values())
    w = [parameter.detach().clone() for parameter in parameters]

    def gradient(rows: Batch, shift: Tensor | None = None) -> Tensor:
        parts = (shift if shift is not None else flat(w) * 0).split([value.numel() for value in w])
        values = [(value.double() + part.view_as(value)).float() for value, part in zip(w, parts, strict=True)]
        return flat(gradient_at(stage, rows, values, seed))

    g_h, g_b = gradient(harmful), gradient(benign)
    u_h, u_b = g_h / g_h.norm(), g_b / g_b.norm()
    c = u_h @ u_b
    slope = (gradient(harmful, eps * (u_b - c * u_h)) - g_h) / g_h.norm()
    slope = (slope + (gradient(benign, eps * (u_h - c * u_b)) - g_b) / g_b.norm()) / eps
    if seed is not None:
        torch.manual_seed(seed)
    ascent = -torch.log(1 + layer_loss(stage, harmful))
    total = gradient(batch) + unlearn * flat(torch.autograd.grad(ascent, parameters)) + beta * slope
    parts = total.split([value.numel() for value in w])
    if seed is not None:
        torch.manual_seed(seed)
    loss = cross_entropy(stage.model, batch).item() + unlearn * ascent.item() + beta * c.item()
    return [part.view_as(value).float() for part, value in zip(parts, w, strict=True)], loss


def flat(values: Sequence[Tensor]) -> Tensor:
    """Return tensors as one vector in float64."""
    return torch.cat([value.detach().double().flatten() for value in values])


@pytest.mark.parametrize(
    ("unlearn", "beta", "eps"), [(1.0, 0.01, 1e-3), (0.0, 2.0, 0.5), (1.0, 5.0, 0.2), (3.0, 0.0, 0.1)]
)
def test_gradient_equals_plain_autograd(unlearn: float, beta: float, eps: float) -> None:
    training, batch = stage(), tiny.batch()
    pairs, benign = record_pairs(training), record_stream(training)
    gradient = SEAM(unlearn=unlearn, beta=beta, eps=eps).gradient(training, batch)
    harmful = masked(*pairs[0])
    assert 0 < (harmful["labels"] >= 0).sum() < (pairs[0][1]["labels"] >= 0).sum()  # some letters are equal
    values, loss = expected(training, batch, harmful, benign[0], unlearn=unlearn, beta=beta, eps=eps)
    assert close_in_norm(gradient, values)
    assert gradient.loss.item() == pytest.approx(loss, rel=1e-5)
    assert not gradient.loss.requires_grad
    assert all(parameter.grad is None for parameter in training.trainable.values())
    for other in (SEAM(unlearn=unlearn + 1, beta=beta, eps=eps), SEAM(unlearn=unlearn, beta=beta + 1, eps=eps)):
        assert not close_in_norm(other.gradient(training, batch), values, 1e-3)  # both terms are large enough to test


@pytest.mark.parametrize("accumulation", [1, 2])
def test_three_optimizer_steps_equal_plain_adamw(accumulation: int, tmp_path: Path) -> None:
    """With accumulation, every micro-batch has other pairs, other benign rows and a cosine of its own."""
    changes: dict[str, Any] = {"epochs": 1, "accumulation": accumulation, "lr": 1e-3, "weight_decay": 0.1}
    training, twin = (stage(**changes, schedule="constant", warmup=0.0) for _ in range(2))
    pairs, benign, batches = record_pairs(training), record_stream(training), list[Batch]()
    parameters: dict[str, Any] = {"unlearn": 1.0, "beta": 5.0, "eps": 0.2}

    class RecordingSEAM(SEAM):
        def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
            batches.append(batch)
            return super().gradient(stage, batch)

    rows = tiny.rows(12 * accumulation)
    train(training, RecordingSEAM(**parameters), rows, training.settings, tmp_path, pad=tiny.PAD)
    assert len(batches) == len(pairs) == len(benign) == 3 * accumulation
    assert len({str(rows["input_ids"].tolist()) for rows in benign}) == 3 * accumulation

    def mean(numbers: Sequence[int]) -> list[Tensor]:
        micro = [expected(twin, batches[n], masked(*pairs[n]), benign[n], **parameters)[0] for n in numbers]
        return [torch.stack(values).mean(0) for values in zip(*micro, strict=True)]

    steps = [range(start, start + accumulation) for start in range(0, 3 * accumulation, accumulation)]
    firm = plain_adamw(twin, [partial(mean, numbers) for numbers in steps])
    assert_equal_where_firm(training, twin, firm)


# ---------------------------------------------------------------------------------------------------------------------
# The gradient of the cosine


def coupling(training: TrainingStage, eps: float) -> Gradient:
    """Return the gradient and the value of the cosine alone."""
    batch = tiny.batch()
    with_cosine, without = (SEAM(unlearn=0.0, beta=beta, eps=eps).gradient(training, batch) for beta in (1.0, 0.0))
    return with_cosine - without


def exact_coupling(training: TrainingStage, harmful: Batch, benign: Batch) -> list[Tensor]:
    """Return the gradient of the cosine by a second differentiation."""
    parameters = list(training.trainable.values())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # it has a second derivative
        g_h, g_b = (
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, create_graph=True)])
            for loss in (cross_entropy(training.model, harmful), cross_entropy(training.model, benign))
        )
        return list(torch.autograd.grad(nn.functional.cosine_similarity(g_h, g_b, dim=0), parameters))


def error_of(gradient: Gradient, exact: Sequence[Tensor]) -> float:
    """Return the relative error in the norm of all entries."""
    return (length([a - b for a, b in zip(gradient.values, exact, strict=True)]) / length(exact)).item()


def test_default_finite_difference_is_close_to_the_second_derivative_except_in_bfloat16() -> None:
    """The authors' code has bfloat16 weights; a bfloat16 model rounds also the activations of the shifted pass."""
    training = stage()
    pairs, benign = record_pairs(training), record_stream(training)
    default = SEAM().eps
    gradient = coupling(training, default)
    exact = exact_coupling(training, masked(*pairs[0]), benign[0])
    assert error_of(gradient, exact) < 0.01
    assert error_of(coupling(training, 0.1), exact) > 0.05
    rounded = stage(tiny.model().bfloat16())
    assert error_of(coupling(rounded, default), exact) > 3
    assert error_of(coupling(rounded, 0.1), exact) < 0.5


def test_a_small_step_lowers_the_cosine() -> None:
    training = stage()
    gradient, size = coupling(training, 1e-3), 1e-3
    before = gradient.loss.item()
    with torch.no_grad():
        for parameter, value in zip(training.trainable.values(), gradient.values, strict=True):
            assert value is not None
            parameter.sub_(size * value)
    assert coupling(training, 1e-3).loss.item() - before == pytest.approx(-size * gradient.norm.item() ** 2, rel=0.1)


def with_losses(harmful: Callable[[Tensor], Tensor], benign: Callable[[Tensor], Tensor]) -> TrainingStage:
    """Return a stage with 12 parameters in float64, whose harmful and benign losses are functions of them."""
    training = stage()
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    training.trainable = {"a": nn.Parameter(draw(4)), "b": nn.Parameter(draw(2, 4))}
    pairs, streams = record_pairs(training), record_stream(training)

    def loss(batch: Batch) -> Tensor:
        w = torch.cat([parameter.flatten() for parameter in training.trainable.values()])
        if any(batch["input_ids"] is rows["input_ids"] for _, rows in pairs):
            return harmful(w)
        return benign(w) if any(batch is rows for rows in streams) else 0 * w.sum()

    training.loss = loss  # type: ignore[method-assign]
    return training


def cosine_gradient(
    training: TrainingStage, harmful: Callable[[Tensor], Tensor], benign: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Return the gradient of the cosine of two functions of the parameters, by autograd."""
    w = torch.cat([parameter.detach().flatten() for parameter in training.trainable.values()]).requires_grad_()
    g_h, g_b = (torch.autograd.grad(function(w), w, create_graph=True)[0] for function in (harmful, benign))
    (slope,) = torch.autograd.grad(nn.functional.cosine_similarity(g_h, g_b, dim=0), w)
    return [slope[:4], slope[4:].view(2, 4)]


def polynomial(seed: int, cubic: float = 0.0, scale: float = 1.0) -> Callable[[Tensor], Tensor]:
    """Return scale * (w'Qw / 2 + q'w + cubic * sum w^3), with random coefficients."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    matrix, vector = draw(12, 12), draw(12)
    return lambda w: scale * (w @ (matrix + matrix.T) @ w / 4 + vector @ w + cubic * (w**3).sum())


@pytest.mark.parametrize("eps", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_quadratic_losses_give_the_exact_gradient_for_any_eps(eps: float, scale: float) -> None:
    """The scale of a loss has no effect: a cosine has none."""
    losses = polynomial(0, scale=scale), polynomial(1)
    training = with_losses(*losses)
    exact = cosine_gradient(training, *losses)
    assert length(exact) > 0.05
    assert error_of(coupling(training, eps), exact) < 1e-5


def test_error_on_cubic_losses_is_proportional_to_eps() -> None:
    losses = polynomial(0, cubic=0.1), polynomial(1, cubic=-0.2)
    training = with_losses(*losses)
    exact = cosine_gradient(training, *losses)
    errors = [error_of(coupling(training, eps), exact) for eps in (0.04, 0.02, 0.01)]
    assert errors[0] > 1e-3
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.05)


# ---------------------------------------------------------------------------------------------------------------------
# Parameters and rows of each pass


def test_two_passes_are_at_shifted_parameters_and_the_others_at_w() -> None:
    """In float32, a shift of the default length is not rounded off; afterwards the parameters are w to the bit."""
    training, batch = stage(), tiny.batch()
    pairs, benign = record_pairs(training), record_stream(training)
    w, passes = training.values(), list[list[Tensor]]()
    handle = training.model.register_forward_pre_hook(lambda module, args: passes.append(training.values()))
    with recorded_rows(training.model) as rows:
        SEAM().gradient(training, batch)
    handle.remove()
    assert same(training.values(), w)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in training.trainable.values())
    harmful, plain, alignment = (
        [[token for token in row if token] for row in side["input_ids"].tolist()]
        for side in (pairs[0][1], benign[0], batch)
    )
    assert rows == [harmful, harmful, plain, harmful, plain, alignment]
    assert all(same(passes[number], w) for number in (0, 1, 2, 5))
    g_h, g_b = flat(gradient_at(training, masked(*pairs[0]), w)), flat(gradient_at(training, benign[0], w))
    u_h, u_b = g_h / g_h.norm(), g_b / g_b.norm()
    for number, shift in ((3, u_b - u_h @ u_b * u_h), (4, u_h - u_h @ u_b * u_b)):
        actual = flat(passes[number]) - flat(w)
        assert (actual - 1e-3 * shift).norm() < 0.01 * 1e-3 * shift.norm()


def test_pairs_and_benign_rows_are_from_their_pools() -> None:
    training = stage()
    pairs, benign = record_pairs(training), record_stream(training)
    SEAM().gradient(training, tiny.batch())
    safe, harmful, plain = (
        [[token for token in row if token] for row in side["input_ids"].tolist()] for side in (*pairs[0], benign[0])
    )
    pool = [[row.ids for row in tiny.encode(pair)] for pair in POOLS.paired]
    assert len(safe) == len(plain) == training.settings.batch
    assert all([left, right] in pool for left, right in zip(safe, harmful, strict=True))
    assert all(row in [encoded.ids for encoded in tiny.encode(POOLS.benign)] for row in plain)


def test_a_frozen_parameter_has_no_gradient() -> None:
    """Another defense may freeze a parameter: it then has no gradient, no share in the norms and no shift."""
    training, batch = stage(), tiny.batch()
    pairs, benign = record_pairs(training), record_stream(training)
    parameters: dict[str, Any] = {"unlearn": 1.0, "beta": 5.0, "eps": 0.2}
    next(iter(training.trainable.values())).requires_grad_(False)
    gradient = SEAM(**parameters).gradient(training, batch)
    assert gradient.values[0] is None
    training.trainable = dict(list(training.trainable.items())[1:])
    values, _ = expected(training, batch, masked(*pairs[0]), benign[0], **parameters)
    assert close_in_norm(Gradient(gradient.loss, gradient.values[1:]), values)


def test_all_passes_start_from_the_same_random_state() -> None:
    training, batch = stage(lora_dropout=0.3), tiny.batch()
    training.model.train()
    pairs, benign = record_pairs(training), record_stream(training)
    parameters: dict[str, Any] = {"unlearn": 1.0, "beta": 5.0, "eps": 0.2}
    torch.manual_seed(5)
    gradient = SEAM(**parameters).gradient(training, batch)
    rows = masked(*pairs[0]), benign[0]
    assert close_in_norm(gradient, expected(training, batch, *rows, **parameters, seed=5)[0])
    assert not close_in_norm(gradient, expected(training, batch, *rows, **parameters, seed=6)[0], 1e-2)


@pytest.mark.parametrize("pools", [Pools(benign=POOLS.benign), Pools(paired=POOLS.paired)], ids=["pairs", "benign"])
def test_missing_rows_are_refused(pools: Pools) -> None:
    with pytest.raises(BadInput):
        SEAM().gradient(stage(pools=pools), tiny.batch())


def test_equal_answers_give_the_alignment_gradient() -> None:
    """Without a token that differs there is no harmful gradient, and the harmful loss and the cosine would be 0/0."""
    same_answer = [(Example("safe:0", "why", "sorry"), Example("harm:0", "why", "sorry", harmful=True))]
    training, batch = stage(pools=Pools(paired=same_answer, benign=POOLS.benign)), tiny.batch()
    gradient, plain = SEAM().gradient(training, batch), training.gradient(batch)
    assert close([gradient.loss, *gradient.values], [plain.loss, *plain.values])

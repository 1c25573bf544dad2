"""SafeGrad compared with its equations in plain PyTorch, and the projection on vectors that are known exactly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.data.collate import IGNORED
from harmbench_vaccine.defenses.safegrad import SafeGrad
from harmbench_vaccine.plugins import Pools
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage
from harmbench_vaccine.training.trainer import train
from support import tiny
from support.autograd import cross_entropy, peft_computation, record_stream
from support.compare import close, close_in_norm, same
from support.hooks import recorded_rows
from support.optimizers import assert_equal_where_firm, plain_adamw

POOLS = tiny.example_pools()


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an alignment adapter with nonzero weights."""
    folder = tmp_path_factory.mktemp("aligned") / "adapter"
    tiny.stage(stirred=True)[1].trained().save(folder)
    return folder


def user_stage(aligned: Path, *, topology: str = "double", seed: int | None = 8, **changes: Any) -> TrainingStage:
    """Return a user stage at its first micro-batch; with a seed, its adapter has moved away from the aligned model."""
    place: Any = {"below": [aligned]} if topology == "double" else {"start": aligned}
    stage, _ = tiny.stage(trained_with=tiny.settings(**changes), name="finetune", pools=POOLS, **place)
    stage.step, stage.steps = 1, 10
    if seed is not None:
        tiny.stir(stage.trainable, seed=seed)
    return stage


# ---------------------------------------------------------------------------------------------------------------------
# A second implementation of the equations


def log_probabilities(stage: TrainingStage, batch: Batch) -> Tensor:
    """Return log p (response tokens x vocabulary), row by row."""
    with peft_computation():
        log_p = stage.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
    places = [(r, t) for r, row in enumerate(batch["labels"].tolist()) for t, label in enumerate(row) if label >= 0]
    return torch.stack([log_p[r, t - 1] for r, t in places])


def expected(
    stage: TrainingStage, teacher: TrainingStage, batch: Batch, rows: Batch, *, rho: float, loss: str = "kl"
) -> tuple[list[Tensor], float, float]:
    """Return the gradient of the step, its loss, and the cosine of the user's and the alignment gradient.

    Args:
        stage: The model with the parameters w.
        teacher: Another copy of the model, with the parameters w0.
        batch: The user's rows.
        rows: The alignment rows.
        rho: Weight of the alignment gradient.
        loss: The alignment loss.
    """
    parameters = list(stage.trainable.values())
    user_loss = cross_entropy(stage.model, batch)
    user = torch.cat([g.flatten() for g in torch.autograd.grad(user_loss, parameters)])
    if loss == "kl":
        log_p0, log_p = log_probabilities(teacher, rows).detach(), log_probabilities(stage, rows)
        safe_loss = (log_p0.exp() * (log_p0 - log_p)).sum(-1).mean()
    else:
        safe_loss = cross_entropy(stage.model, rows)
    safe = torch.cat([g.flatten() for g in torch.autograd.grad(safe_loss, parameters)])
    product = user @ safe
    total = user - product / (safe @ safe) * safe if product < 0 else user
    total = total + rho * safe
    gradients = [
        part.view_as(value)
        for part, value in zip(total.split([value.numel() for value in parameters]), parameters, strict=True)
    ]
    return gradients, (user_loss + rho * safe_loss).item(), (product / user.norm() / safe.norm()).item()


@pytest.mark.parametrize("topology", ["double", "single"])
@pytest.mark.parametrize("loss", ["kl", "sft"])
def test_gradient_equals_plain_autograd(loss: Any, topology: str, aligned: Path) -> None:
    cosines = []
    for seed in (0, 1, 2, 5, 6):
        stage, teacher = (user_stage(aligned, topology=topology, seed=number) for number in (seed, None))
        drawn, batch = record_stream(stage), tiny.batch(seed=seed)
        gradient = SafeGrad(rho=0.7, loss=loss).gradient(stage, batch)
        values, total, cosine = expected(stage, teacher, batch, drawn[0], rho=0.7, loss=loss)
        assert close_in_norm(gradient, values)
        assert gradient.loss.item() == pytest.approx(total, rel=1e-5)
        assert not gradient.loss.requires_grad
        cosines.append(cosine)
    assert min(cosines) < -0.03  # the projection is large enough to test
    assert max(cosines) > 0.03


@pytest.mark.parametrize("accumulation", [1, 2])
def test_three_optimizer_steps_equal_plain_adamw(accumulation: int, aligned: Path, tmp_path: Path) -> None:
    """With accumulation, every micro-batch has other alignment rows and a projection of its own."""
    changes: dict[str, Any] = {"epochs": 1, "accumulation": accumulation, "lr": 1e-3, "weight_decay": 0.1}
    changes |= {"schedule": "constant", "warmup": 0.0}
    stage, twin, teacher = (user_stage(aligned, seed=seed, **changes) for seed in (5, 5, None))
    drawn, batches = record_stream(stage), []

    class RecordingSafeGrad(SafeGrad):
        def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
            batches.append(batch)
            return super().gradient(stage, batch)

    rows = tiny.rows(12 * accumulation)
    train(stage, RecordingSafeGrad(rho=2.0), rows, stage.settings, tmp_path, pad=tiny.PAD)
    assert len(batches) == len({str(rows["input_ids"].tolist()) for rows in drawn}) == 3 * accumulation
    cosines: list[float] = []

    def mean(numbers: Sequence[int]) -> list[Tensor]:
        micro = [expected(twin, teacher, batches[n], drawn[n], rho=2.0) for n in numbers]
        cosines.extend(cosine for _, _, cosine in micro)
        return [torch.stack(values).mean(0) for values in zip(*(values for values, _, _ in micro), strict=True)]

    steps = [range(start, start + accumulation) for start in range(0, 3 * accumulation, accumulation)]
    firm = plain_adamw(twin, [partial(mean, numbers) for numbers in steps])
    assert_equal_where_firm(stage, twin, firm)
    assert min(cosines) < -0.03


# ---------------------------------------------------------------------------------------------------------------------
# The projection, on gradients that are known exactly


Values = Sequence[Tensor | None]


def on_vectors(user: Values, safe: Values, **params: Any) -> Gradient:
    """Return the gradient of a step for these two gradients, with the losses 1 (user) and 2 (alignment)."""
    model: Any = SimpleNamespace(model=nn.Module())
    stage, rows = TrainingStage("finetune", model, {}, 0), tiny.batch()
    losses = {True: Gradient(torch.tensor(2.0), safe), False: Gradient(torch.tensor(1.0), user)}
    stage.stream = lambda *args: rows  # type: ignore[method-assign]
    stage.gradient = lambda batch: losses[batch is rows]  # type: ignore[method-assign]
    return SafeGrad(loss="sft", **params).gradient(stage, tiny.batch())


def random_vectors(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for shape in ((4, 3), (2, 5))]


def product(left: Values, right: Values) -> float:
    return sum(float((a * b).sum()) for a, b in zip(left, right, strict=True) if a is not None and b is not None)


def test_only_a_conflicting_gradient_is_projected() -> None:
    """The projected gradient is orthogonal to g_a, and the difference is parallel to g_a."""
    conflicts = 0
    for seed in range(20):
        user, safe = random_vectors(seed), random_vectors(100 + seed)
        values = on_vectors(user, safe, rho=0.0).values
        if product(user, safe) >= 0:
            assert same([value for value in values if value is not None], user)
            continue
        conflicts += 1
        assert abs(product(values, safe)) <= 1e-6 * (product(user, user) * product(safe, safe)) ** 0.5
        assert product(values, values) == pytest.approx(
            product(user, user) - product(user, safe) ** 2 / product(safe, safe), rel=1e-5
        )
    assert 5 < conflicts < 15


def test_all_parameters_are_one_vector() -> None:
    """A product per parameter has another sign: it is positive on the first parameter, negative on the second."""
    first, second = torch.tensor([2.0]), torch.tensor([-3.0])
    safe = [torch.ones(1), torch.ones(1)]
    assert close(on_vectors([first, second], safe, rho=0.0).values, [torch.tensor([2.5]), torch.tensor([-2.5])])
    assert close(on_vectors([-second, -first], safe, rho=0.0).values, [-second, -first])  # product 1


def test_rho_weights_the_alignment_gradient_and_its_loss() -> None:
    user, safe = [torch.tensor([2.0, -3.0])], [torch.tensor([1.0, 1.0])]
    gradient = on_vectors(user, safe, rho=3.0)
    assert close(gradient.values, [torch.tensor([5.5, 0.5])])
    assert gradient.loss.item() == 7.0  # the projection does not change the loss that the log shows
    assert close(on_vectors(user, safe, rho=3.0, surgery=False).values, [torch.tensor([5.0, 0.0])])


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_scale_of_the_alignment_gradient_does_not_change_the_projection(scale: float) -> None:
    user, safe = [torch.tensor([2.0, -3.0])], [torch.tensor([1.0, 1.0])]
    assert close(on_vectors(user, [scale * safe[0]], rho=0.0).values, [torch.tensor([2.5, -2.5])])


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-7])
def test_no_projection_on_an_alignment_gradient_that_is_only_rounding(scale: float) -> None:
    user, safe = [torch.tensor([2.0, -3.0])], [torch.tensor([1.0, 1.0])]
    assert close(on_vectors(user, [scale * safe[0]], rho=1.0).values, user, 1e-6)


def test_a_frozen_parameter_has_no_gradient_and_no_share_in_the_product() -> None:
    gradient = on_vectors([None, torch.tensor([2.0, -3.0])], [None, torch.tensor([1.0, 1.0])], rho=0.0)
    assert gradient.values[0] is None
    assert close(gradient.values, [None, torch.tensor([2.5, -2.5])])


# ---------------------------------------------------------------------------------------------------------------------
# The divergence

LABELS = torch.tensor([[IGNORED, IGNORED, 1, 0, 1], [IGNORED, 0, 2, IGNORED, IGNORED]])
SCORING = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 0, 0, 0]]).bool()  # position t scores label t + 1


def test_gradient_on_logits_is_the_mean_difference_of_the_distributions() -> None:
    """With the logits as parameters and without a user loss, the gradient is rho (p_w - p_w0) / n_tok."""
    scores, teacher = (torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    z, inside = nn.Parameter(scores.clone()), []
    model: Any = SimpleNamespace(model=nn.Module())
    stage = TrainingStage("finetune", model, {"z": z}, 0)

    @contextmanager
    def reference() -> Iterator[None]:
        inside.append(True)
        with torch.no_grad():
            yield
        inside.pop()

    def output(batch: Batch) -> Any:
        return SimpleNamespace(logits=(teacher if inside else z)[:, :-1][SCORING[:, :-1]], loss=0 * z.sum())

    stage.reference, stage.output = reference, output  # type: ignore[method-assign, assignment]
    stage.stream = lambda *args: {"labels": LABELS}  # type: ignore[method-assign]
    gradient = SafeGrad(rho=0.3).gradient(stage, {"labels": LABELS})
    p, p0 = scores.softmax(-1), teacher.softmax(-1)
    assert close(gradient.values, [0.3 * (p - p0) / 5 * SCORING[..., None]])
    assert gradient.loss.item() == pytest.approx(0.3 * (p0 * (p0 / p).log()).sum(-1)[SCORING].mean().item(), rel=1e-5)


@pytest.mark.parametrize("topology", ["double", "single"])
def test_at_the_aligned_model_the_gradient_is_that_of_sft(topology: str, aligned: Path) -> None:
    """Rounding gives a nonzero g_a there, in a direction in which g_u must not be projected."""
    stage = user_stage(aligned, topology=topology, seed=None)
    for seed in range(6):
        batch = tiny.batch(seed=seed)
        gradient, sft = SafeGrad().gradient(stage, batch), stage.gradient(batch)
        assert close(gradient.values, sft.values)
        assert gradient.loss.item() == pytest.approx(sft.loss.item(), abs=1e-6)


def test_both_distributions_are_without_dropout_and_the_user_loss_is_with_it(aligned: Path) -> None:
    """At the aligned model, whose adapter is trained with dropout, g_a is therefore 0."""
    stage, batch = user_stage(aligned, topology="single", seed=None, lora_dropout=0.5), tiny.batch()
    clean = stage.gradient(batch)
    stage.model.train()
    torch.manual_seed(5)
    dropped = stage.gradient(batch)
    torch.manual_seed(5)
    gradient = SafeGrad(rho=2.0).gradient(stage, batch)
    assert stage.model.training
    assert close(gradient.values, dropped.values)
    assert gradient.loss.item() == pytest.approx(dropped.loss.item(), abs=1e-6)
    assert not close(dropped.values, clean.values, 1e-2)


# ---------------------------------------------------------------------------------------------------------------------
# Unchanged parameters, and the rows of each pass


def test_parameters_are_bit_identical_after_the_gradient(aligned: Path) -> None:
    stage = user_stage(aligned)
    initial = stage.values()
    first, *others = stage.trainable.values()
    first.requires_grad_(False)
    gradient = SafeGrad().gradient(stage, tiny.batch())
    assert same(stage.values(), initial)
    assert all(parameter.grad is None for parameter in stage.model.parameters())
    assert gradient.values[0] is None
    assert not first.requires_grad
    assert all(parameter.requires_grad for parameter in others)


def test_teacher_and_student_run_on_the_same_alignment_rows(aligned: Path) -> None:
    stage, batch = user_stage(aligned), tiny.batch()
    with recorded_rows(stage.stack.base) as passes:
        SafeGrad().gradient(stage, batch)
    first, second, third = passes
    assert first == second
    assert third == [[token for token in row if token != tiny.PAD] for row in batch["input_ids"].tolist()]
    pool = [row.ids for row in tiny.encode(POOLS.alignment)]
    assert len(first) == stage.settings.batch
    assert all(row in pool for row in first)


def test_missing_alignment_rows_are_refused(aligned: Path) -> None:
    stage = user_stage(aligned)
    stage.pools = Pools()
    with pytest.raises(BadInput):
        SafeGrad().gradient(stage, tiny.batch())

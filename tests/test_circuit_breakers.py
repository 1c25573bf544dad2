"""Circuit breakers compared with their equations in plain PyTorch, and the two phases of the stage."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.data.collate import IGNORED
from harmbench_vaccine.defenses.circuit_breakers import CircuitBreakers
from harmbench_vaccine.plugins import Defense, Pools
from harmbench_vaccine.training.adapters import Adapter
from harmbench_vaccine.training.stage import Batch, Gradient, SeparateRun, TrainingStage
from harmbench_vaccine.training.trainer import train
from support import tiny
from support.autograd import record_stream
from support.compare import close, same
from support.optimizers import assert_equal_where_firm, plain_adamw
from support.plain_math import SCALE, Values, leaves
from support.trainer import assert_same, interrupting

POOLS = tiny.example_pools()
LAYERS = 4
BASE = tiny.model(num_hidden_layers=LAYERS).requires_grad_(False)


def stage(pools: Pools = POOLS, **changes: Any) -> TrainingStage:
    """Return an alignment stage of a model of four layers at step 3 of 10."""
    result, _ = tiny.stage(tiny.model(num_hidden_layers=LAYERS), trained_with=tiny.settings(**changes), pools=pools)
    result.step, result.steps = 3, 10
    return result


@cache
def aligned(targets: tuple[str, ...] = tiny.targets()) -> Adapter:
    """Return the adapter of plain alignment, which is trained once for these modules."""
    return stage(lora_targets=targets).train_separately("aligned", POOLS.alignment)


def begun(defense: Defense, **changes: Any) -> TrainingStage:
    """Return a stage after the first phase."""
    training = stage(**changes)
    training.nested = lambda outer, run: aligned()
    with training.isolated("before"):
        defense.before(training)
    return training


def aligned_values(targets: tuple[str, ...] = tiny.targets()) -> list[Tensor]:
    """Return the parameters after plain alignment, in the order of a stage."""
    twin = stage()
    twin.replace_adapter(aligned(targets))
    return twin.values()


def record_runs(stage: TrainingStage) -> list[SeparateRun]:
    """Return a list to which every nested training run of the stage is appended from now on."""
    runs: list[SeparateRun] = []
    nested = stage.nested

    def recorded(outer: TrainingStage, run: SeparateRun) -> Any:
        runs.append(run)
        return nested(outer, run)

    stage.nested = recorded
    return runs


def run_stage(
    defense: Defense, folder: Path, salt: int = 0, **changes: Any
) -> tuple[tuple[dict[str, Tensor], list[Any]], list[SeparateRun]]:
    """Train a short stage with new objects and return the adapter with the log, and the nested runs."""
    settings = tiny.settings(**{"lora_dropout": 0.1, "epochs": 1, **changes})
    torch.manual_seed(salt)
    training, _ = tiny.stage(trained_with=settings, pools=POOLS)
    runs = record_runs(training)
    log = train(training, defense, tiny.rows(20), settings, folder, pad=tiny.PAD)
    return ({name: value.detach().clone() for name, value in training.trainable.items()}, log), runs


# ---------------------------------------------------------------------------------------------------------------------
# The equations


def forward(w: Values, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """Return the mean loss and h_0, ..., h_n at the tokens of all rows (tokens x width)."""
    weights = {}
    for name, a in w.items():
        if ".lora_A." in name:
            weight = f"{name.removeprefix('base_model.model.').partition('.lora_A')[0]}.weight"
            weights[weight] = BASE.get_parameter(weight) + SCALE * w[name.replace("lora_A", "lora_B")] @ a
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    output = functional_call(BASE, weights, (), {**inputs, "output_hidden_states": True})
    log_p, labels = output.logits[:, :-1].log_softmax(-1), batch["labels"][:, 1:]
    loss = -log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0][labels != IGNORED].mean()
    lengths = batch["attention_mask"].sum(1).tolist()
    return loss, [torch.cat([state[r, :n] for r, n in enumerate(lengths)]) for state in output.hidden_states]


def terms(w: Values, reference: Values, batch: Batch, harmful: Batch, targets: Sequence[int]) -> list[Tensor]:
    """Compute L_keep, L_break and L."""
    loss, now = forward(w, batch)
    then = [state.detach() for state in forward(reference, batch)[1]]
    keep = torch.stack([((a - b) ** 2).sum(-1).sqrt().mean() for a, b in zip(now[1:], then[1:], strict=True)]).sum()
    now, then = forward(w, harmful)[1], [state.detach() for state in forward(reference, harmful)[1]]
    cosines = [(now[n] * then[n]).sum(-1) / (now[n].norm(dim=-1) * then[n].norm(dim=-1)) for n in targets]
    return [keep / (LAYERS + 1), torch.cat(cosines).clamp(min=0).mean(), loss]  # no adapter is below the embeddings


def objective(
    w: Values, reference: Values, batch: Batch, harmful: Batch, targets: Sequence[int], t: int, steps: int, gamma: float
) -> Tensor:
    keep, broken, loss = terms(w, reference, batch, harmful, targets)
    return 10.0 * t / (2 * steps) * keep + 10.0 * (1 - t / (2 * steps)) * broken + gamma * loss


@pytest.mark.parametrize(
    ("first", "second", "targets"), [(10.0, 20.0, (1, 2)), (1.0, 3.0, (1,)), (24.0, 32.0, (3, 4)), (20.0, 20.0, (2,))]
)
def test_gradient_equals_plain_autograd(first: float, second: float, targets: Sequence[int]) -> None:
    """The target layers of 32 are scaled to 4 layers; equal ones count once."""
    defense = CircuitBreakers(first=first, second=second, gamma=0.5)
    training, batch = begun(defense), tiny.batch()
    reference = dict(zip(training.trainable, aligned_values(), strict=True))
    tiny.stir(training.trainable)
    harmful, w = record_stream(training), leaves(training)
    gradient = defense.gradient(training, batch)
    value = objective(w, reference, batch, harmful[0], targets, 3, 10, 0.5)
    slopes = torch.autograd.grad(value, list(w.values()))
    assert close(gradient.values, slopes)
    assert gradient.loss.item() == pytest.approx(value.item(), rel=1e-5)
    assert not gradient.loss.requires_grad
    for number, term in enumerate(terms(w, reference, batch, harmful[0], targets)):  # no term is too small to test
        part = (0.15, 0.85, 0.05)[number] * torch.stack(
            [
                slope.norm()
                for slope in torch.autograd.grad(
                    10 * term, list(w.values()), retain_graph=True, allow_unused=True, materialize_grads=True
                )
            ]
        ).norm()
        assert part > 1e-2 * gradient.norm
    pool = [row.ids for row in tiny.encode(POOLS.harmful)]
    assert all([token for token in row if token] in pool for row in harmful[0]["input_ids"].tolist())


def test_three_optimizer_steps_equal_plain_adamw(tmp_path: Path) -> None:
    """The noise is large, so that no difference of two hidden states is of the size of its rounding error."""
    targets = ("v_proj", "o_proj")
    changes: dict[str, Any] = {"epochs": 1, "lr": 1e-3, "weight_decay": 0.1, "schedule": "constant", "warmup": 0.0}
    settings, training = tiny.settings(**changes, lora_targets=targets), stage(**changes, lora_targets=targets)
    batches: list[Batch] = []
    start: list[list[Tensor]] = []

    class RecordingBreakers(CircuitBreakers):
        def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
            batches.append(batch)
            start.append(stage.values())
            return super().gradient(stage, batch)

    harmful = record_stream(training)
    training.nested = lambda outer, run: aligned(targets)
    defense = RecordingBreakers(first=16.0, second=32.0, gamma=2.0, noise=0.1)
    train(training, defense, tiny.rows(12), settings, tmp_path, pad=tiny.PAD)
    assert len(batches) == len(harmful) == 3

    twin = stage(lora_targets=targets)
    reference = dict(zip(twin.trainable, aligned_values(targets), strict=True))
    assert 0.09 < torch.cat([(a - b).flatten() for a, b in zip(start[0], reference.values(), strict=True)]).std() < 0.11
    twin.set_values(start[0])

    def slopes(number: int) -> Callable[[], Sequence[Tensor]]:
        def gradient() -> Sequence[Tensor]:
            w = leaves(twin)
            value = objective(w, reference, batches[number], harmful[number], (2, 4), number + 1, 3, 2.0)
            return torch.autograd.grad(value, list(w.values()))

        return gradient

    firm = plain_adamw(twin, [slopes(number) for number in range(3)])
    assert_equal_where_firm(training, twin, firm)


@pytest.mark.parametrize("steps", [3, 150, 1000])
def test_the_coefficients_sum_to_a_and_never_change_sign(steps: int) -> None:
    """They depend on t / T. (The authors' code has 300 instead of 2 T, so that L_break is negative after step 300.)"""
    defense = CircuitBreakers()
    training, batch = begun(defense), tiny.batch()
    harmful = training.stream("harmful", POOLS.harmful)
    training.stream = lambda *args: harmful  # type: ignore[method-assign]
    reference = dict(zip(training.trainable, aligned_values(), strict=True))
    tiny.stir(training.trainable)
    keep, broken, _ = (term.item() for term in terms(leaves(training), reference, batch, harmful, (1, 2)))
    assert abs(keep - broken) > 0.05
    training.steps = steps
    for t, share in ((1, 1 / (2 * steps)), (steps // 3, steps // 3 / (2 * steps)), (steps, 0.5)):
        training.step = t
        loss = defense.gradient(training, batch).loss.item()
        assert loss == pytest.approx(10 * (share * keep + (1 - share) * broken), rel=1e-4)


class Reported(CircuitBreakers):
    """Circuit breakers on given hidden states: one layer, all zero below."""

    def _states(self, stage: TrainingStage, batch: Batch) -> tuple[Any, list[tuple[Tensor, Tensor]]]:
        zeros = torch.zeros(len(THEN), 2)
        return SimpleNamespace(loss=torch.zeros(())), [(zeros, zeros), (stage.trainable["h"], THEN)]


THEN = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0], [1.0, 0.0]])


def reported(now: Sequence[Sequence[float]]) -> tuple[float, Tensor]:
    """Return L_break and its gradient for the hidden states of four tokens."""
    h = torch.nn.Parameter(torch.tensor(now))
    training = TrainingStage("align", SimpleNamespace(), {"h": h}, 0, step=0, steps=10)  # type: ignore[arg-type]
    training.stream = lambda *args: {}  # type: ignore[method-assign]
    gradient = Reported(a=1.0).gradient(training, {})
    assert gradient.values[0] is not None
    return gradient.loss.item(), gradient.values[0]


def test_the_rerouting_loss_is_between_0_and_1_and_vanishes_at_negative_cosines() -> None:
    value, slope = reported(THEN.tolist())
    assert value == pytest.approx(1)
    assert slope.abs().max() < 1e-6
    value, slope = reported((-THEN).tolist())
    assert (value, slope.abs().max().item()) == (0, 0)
    value, slope = reported([[1.0, 1.0], [3.0, 0.0], [-3.0, -4.0], [-1.0, 5.0]])  # cosines 1/sqrt(2), 0, -1, < 0
    assert value == pytest.approx(1 / math.sqrt(2) / 4)
    assert slope[0].tolist() == pytest.approx([1 / math.sqrt(2) / 8, -1 / math.sqrt(2) / 8])
    assert slope[2:].abs().max() == 0
    assert reported([[7.0, 7.0], [0.1, 0.0], [-3.0, -4.0], [-1.0, 5.0]])[0] == pytest.approx(value)  # free of scale


def test_padding_has_no_effect() -> None:
    """The means are over tokens. (The authors' code divides L_keep by the positions, so that padding dilutes it.)"""
    defense = CircuitBreakers(gamma=0.5)
    training = begun(defense)
    tiny.stir(training.trainable)
    narrow, wide = (defense.gradient(training, tiny.batch((9, 5, 7), width=width)) for width in (9, 30))
    assert close(wide.values, narrow.values)
    assert wide.loss.item() == pytest.approx(narrow.loss.item(), rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# The two phases


def test_phase_2_starts_near_plain_alignment() -> None:
    defense = CircuitBreakers(noise=0.01)
    training, reference = begun(defense), aligned_values()
    noise = torch.cat([(w - r).flatten() for w, r in zip(training.values(), reference, strict=True)])
    assert noise.std().item() == pytest.approx(0.01, rel=0.05)
    assert noise.mean().abs() < 1e-3
    assert same(training.values(), begun(CircuitBreakers(noise=0.01)).values())
    assert same(list(defense.state().values()), reference)
    assert close(begun(CircuitBreakers(noise=0.0, gamma=1.0)).values(), reference, 0.0)


def test_phase_1_is_one_plain_alignment_on_the_alignment_rows() -> None:
    training = stage()
    runs = record_runs(training)
    CircuitBreakers(noise=0.0, gamma=1.0).before(training)
    assert same(training.values(), aligned_values())
    assert [run.rows for run in runs] == [POOLS.alignment]
    assert (runs[0].start, runs[0].steps, runs[0].on_base) == (None, None, False)


def test_a_start_without_a_gradient_is_refused() -> None:
    """Adam would take a step along rounding errors, and without a loss there are none to take."""
    with pytest.raises(BadInput, match="a gradient of 0 at its start without noise and without dropout: raise noise"):
        begun(CircuitBreakers(noise=0.0))
    begun(CircuitBreakers(noise=0.0), lora_dropout=0.1)
    with pytest.raises(BadInput, match="a=0 and gamma=0 leave no loss; allowed: one of them above 0"):
        CircuitBreakers(a=0.0)


def test_the_noise_starts_the_first_step_without_dropout() -> None:
    """At the reference the gradient of L_break is 0, and Adam would take a step along rounding errors."""
    norms = {}
    for noise in (1e-12, 1e-3):
        defense = CircuitBreakers(noise=noise)
        training = begun(defense)
        training.step, training.steps = 1, 10**6  # L_keep has almost no weight
        norms[noise] = defense.gradient(training, tiny.batch()).norm.item()
    assert norms[1e-3] > 0.01
    assert norms[1e-12] < 1e-3 * norms[1e-3]


def test_missing_harmful_rows_are_refused_before_phase_1() -> None:
    training = stage(Pools(alignment=POOLS.alignment))
    runs = record_runs(training)
    with pytest.raises(BadInput):
        CircuitBreakers().before(training)
    assert not runs


# ---------------------------------------------------------------------------------------------------------------------
# Unchanged parameters, dropout, interruptions


def test_parameters_are_bit_identical_after_the_gradient() -> None:
    defense = CircuitBreakers(gamma=0.5)
    training = begun(defense)
    first, *others = training.trainable.values()
    first.requires_grad_(False)
    initial, reference = training.values(), [value.clone() for value in defense.state().values()]
    gradient = defense.gradient(training, tiny.batch())
    assert same(training.values(), initial)
    assert same(list(defense.state().values()), reference)
    assert gradient.values[0] is None
    assert all(value is not None for value in gradient.values[1:])
    assert all(parameter.grad is None for parameter in (first, *others))
    assert [parameter.requires_grad for parameter in training.trainable.values()] == [False] + [True] * len(others)


def test_the_reference_has_no_dropout_and_the_model_has_that_of_sft() -> None:
    """At w = w_ref only dropout makes the states differ; the alignment rows have the masks of a step of SFT."""
    defense = CircuitBreakers(noise=0.0, gamma=1.0)
    training, batch = begun(defense, lora_dropout=0.3), tiny.batch()
    training.model.train()
    torch.manual_seed(5)
    sft = training.gradient(batch)
    state = torch.get_rng_state()
    losses = []
    for gamma in (0.0, 1.0):
        torch.manual_seed(5)
        losses.append(defense.model_copy(update={"gamma": gamma}).gradient(training, batch).loss)
        assert torch.equal(torch.get_rng_state(), state)
        assert training.model.training
    assert (losses[1] - losses[0]).item() == pytest.approx(sft.loss.item(), rel=1e-4)
    noisy = losses[0].item()
    training.model.eval()
    exact = defense.model_copy(update={"gamma": 0.0}).gradient(training, batch).loss.item()
    assert exact == pytest.approx(10 * 0.85)  # the cosine is 1, the distance 0
    assert noisy != pytest.approx(exact, abs=1e-3)


def test_an_interrupted_stage_gives_the_same_result_without_a_second_phase_1(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"batch": 3, "accumulation": 2}
    complete, runs = run_stage(CircuitBreakers(), tmp_path / "complete", **changes)
    assert len(runs) == 1
    with pytest.raises(KeyboardInterrupt):
        run_stage(interrupting(CircuitBreakers(), "gradient", 6), tmp_path / "cut", salt=1, **changes)
    assert list((tmp_path / "cut").glob("checkpoint-*"))
    resumed, runs = run_stage(CircuitBreakers(), tmp_path / "cut", salt=2, **changes)
    assert not runs
    assert_same(resumed, complete)

"""RepNoise compared with its equations in plain PyTorch: hooks, mask, kernels and optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.types import Example
from harmbench_vaccine.defenses import repnoise
from harmbench_vaccine.defenses.repnoise import RepNoise, differing, mmd2
from harmbench_vaccine.defenses.sft import SFT
from harmbench_vaccine.plugins import Defense, Pools
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage
from harmbench_vaccine.training.trainer import train
from support import tiny
from support.autograd import cross_entropy, record_pairs
from support.compare import close_in_norm, same
from support.hooks import decoder_layers, recorded_rows
from support.optimizers import assert_equal_where_firm, plain_adamw
from support.trainer import assert_same, interrupting

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
    ]
)


def stage(base: Any = None, pools: Pools = POOLS, **changes: Any) -> TrainingStage:
    """Return an alignment stage with pairs at its first micro-batch, with a nonzero adapter."""
    result, _ = tiny.stage(base, trained_with=tiny.settings(**changes), stirred=True, pools=pools)
    result.step, result.steps = 1, 10
    return result


@pytest.fixture
def samples(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """The two samples of every computed distance: masked outputs and masked noise."""
    records: list[tuple[Tensor, Tensor]] = []

    def record(x: Tensor, y: Tensor) -> Tensor:
        records.append((x.detach(), y.detach()))
        return mmd2(x, y)

    monkeypatch.setattr(repnoise, "mmd2", record)
    return records


def differs(safe: Batch, harmful: Batch) -> Tensor:
    """Compute m token by token."""
    m = torch.zeros(harmful["input_ids"].shape, dtype=torch.bool)
    for row, ids in enumerate(harmful["input_ids"].tolist()):
        length, safe_length = int(harmful["attention_mask"][row].sum()), int(safe["attention_mask"][row].sum())
        for position in range(length):
            equal = position < safe_length and safe["input_ids"][row, position].item() == ids[position]
            m[row, position] = harmful["labels"][row, position] >= 0 and not equal
    return m.to(harmful["labels"].device)


@contextmanager
def states(model: Any) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Record in a forward pass the input of every layer, the output of the last layer, and the output of every MLP."""
    hidden: list[Tensor] = []
    outputs: list[Tensor] = []
    layers = decoder_layers(model)

    def entering(module: Any, args: Any, more: Any) -> None:
        hidden.append(args[0] if args else more["hidden_states"])

    def leaving(module: Any, args: Any, output: Any) -> None:
        hidden.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_pre_hook(entering, with_kwargs=True) for layer in layers]
    handles += [layers[-1].register_forward_hook(leaving)]
    handles += [layer.mlp.register_forward_hook(lambda m, args, output: outputs.append(output)) for layer in layers]
    try:
        yield hidden, outputs
    finally:
        for handle in handles:
            handle.remove()


def ascent_losses(model: Any, safe: Batch, harmful: Batch) -> tuple[list[Tensor], list[Tensor]]:
    """Return CE(head(norm(h_k)); B_h at m) for k = 0..n, and the MLP outputs of the same pass."""
    with states(model) as (hidden, outputs):
        model(input_ids=harmful["input_ids"], attention_mask=harmful["attention_mask"])
    named = dict(model.named_modules())
    norm = next(module for name, module in named.items() if name.endswith("model.norm"))
    head = next(module for name, module in named.items() if name.endswith("lm_head"))
    places = differs(safe, harmful).nonzero().tolist()
    losses = []
    for state in hidden:
        log_p = head(norm(state)).log_softmax(-1)
        losses.append(-torch.stack([log_p[r, t - 1, harmful["input_ids"][r, t]] for r, t in places]).mean())
    return losses, outputs


def distance(x: Tensor, y: Tensor) -> Tensor:
    """Compute MMD^2 as a double sum over pairs of rows, in double precision, with a constant bandwidth."""
    rows = [*x.double(), *y.double()]
    n, pairs = len(x), [(i, j) for i in range(2 * len(x)) for j in range(2 * len(x))]
    bandwidth = sum(((rows[i] - rows[j]) ** 2).sum().item() for i, j in pairs) / (len(rows) ** 2 - len(rows))

    def kernel(i: int, j: int) -> Tensor:
        gap = ((rows[i] - rows[j]) ** 2).sum()
        return sum(torch.exp(-gap / (bandwidth / 4 * 2**power)) for power in range(5))  # type: ignore[return-value]

    return sum((1 if (i < n) == (j < n) else -1) * kernel(i, j) / n**2 for i, j in pairs)  # type: ignore[return-value]


def objective(
    stage: TrainingStage, batch: Batch, pair: tuple[Batch, Batch], noise: Sequence[Tensor], alpha: float, beta: float
) -> Tensor:
    """Compute L(w; B_a) + beta N - alpha log(1 + A) for masked and flattened noise."""
    safe, harmful = pair
    losses, outputs = ascent_losses(stage.model, safe, harmful)
    m = differs(safe, harmful)[..., None].float()
    noise_distance = torch.stack([distance((m * a).flatten(1), z) for a, z in zip(outputs, noise, strict=True)]).mean()
    return cross_entropy(stage.model, batch) + beta * noise_distance - alpha * torch.log(1 + torch.stack(losses).mean())


def run_stage(defense: Defense, folder: Path, salt: int = 0, **changes: Any) -> tuple[dict[str, Tensor], list[Any]]:
    """Train a short stage with new objects and return the adapter and the log."""
    settings = tiny.settings(**{"lora_dropout": 0.1, "epochs": 2, **changes})
    torch.manual_seed(salt)
    training, _ = tiny.stage(trained_with=settings, stirred=True, pools=POOLS)
    log = train(training, defense, tiny.rows(20), settings, folder, pad=tiny.PAD)
    return {name: value.detach().clone() for name, value in training.trainable.items()}, log


# ---------------------------------------------------------------------------------------------------------------------
# Comparison with the equations


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.001), (1.0, 0.0), (0.0, 5.0), (2.0, 4.0)])
def test_gradient_equals_plain_autograd(alpha: float, beta: float, samples: list[tuple[Tensor, Tensor]]) -> None:
    training, batch = stage(), tiny.batch()
    pairs = record_pairs(training)
    gradient = RepNoise(alpha=alpha, beta=beta).gradient(training, batch)
    assert 0 < differs(*pairs[0]).sum() < (pairs[0][1]["labels"] >= 0).sum()  # some letters are equal
    value = objective(training, batch, pairs[0], [noise for _, noise in samples], alpha, beta)
    expected = torch.autograd.grad(value, list(training.trainable.values()))
    assert close_in_norm(gradient, list(expected))
    assert not close_in_norm(training.gradient(batch), list(expected), 1e-2)
    assert gradient.loss.item() == pytest.approx(value.item(), rel=1e-5)
    assert not gradient.loss.requires_grad
    assert all(parameter.grad is None for parameter in training.trainable.values())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_three_optimizer_steps_equal_plain_adamw(
    accumulation: int, samples: list[tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"epochs": 1, "accumulation": accumulation, "lr": 1e-3, "weight_decay": 0.1}
    settings = tiny.settings(**changes, schedule="constant", warmup=0.0)
    training, _ = tiny.stage(trained_with=settings, stirred=True, pools=POOLS)
    pairs, batches = record_pairs(training), []

    class RecordingRepNoise(RepNoise):
        def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
            batches.append(batch)
            return super().gradient(stage, batch)

    train(
        training, RecordingRepNoise(alpha=1.0, beta=2.0), tiny.rows(12 * accumulation), settings, tmp_path, pad=tiny.PAD
    )
    assert len(batches) == len(pairs) == 3 * accumulation
    assert len(samples) == 2 * len(pairs)  # one for each of two layers

    twin, _ = tiny.stage(trained_with=settings, stirred=True)

    def mean(numbers: Sequence[int]) -> Sequence[Tensor]:
        values = [
            objective(twin, batches[n], pairs[n], [samples[2 * n][1], samples[2 * n + 1][1]], 1.0, 2.0) for n in numbers
        ]
        return torch.autograd.grad(torch.stack(values).mean(), list(twin.trainable.values()))

    steps = [range(start, start + accumulation) for start in range(0, 3 * accumulation, accumulation)]
    firm = plain_adamw(twin, [lambda numbers=numbers: mean(numbers) for numbers in steps])
    assert_equal_where_firm(training, twin, firm)


def test_uniform_logits_at_every_tap_give_log_v_for_any_number_of_layers() -> None:
    """A is a mean over taps, so log V at every tap gives log V. (The authors' code adds one term too many.)"""
    for layers in (1, 3):
        base = tiny.model(num_hidden_layers=layers)
        with torch.no_grad():
            base.lm_head.weight.zero_()
        training = stage(base)
        log_v = math.log(tiny.VOCABULARY)
        loss = RepNoise(alpha=1.0, beta=0.0).gradient(training, tiny.batch()).loss.item()
        assert loss == pytest.approx(log_v - math.log(1 + log_v), rel=1e-5)


def test_a_small_step_raises_the_harmful_loss_at_every_tap() -> None:
    training, batch = stage(), tiny.batch()
    pair = record_pairs(training)
    parameters = list(training.trainable.values())
    start = [parameter.detach().clone() for parameter in parameters]
    rises = {}
    for alpha in (0.0, 20.0):
        gradient = RepNoise(alpha=alpha, beta=0.0).gradient(training, batch)
        initial_losses = [loss.item() for loss in ascent_losses(training.model, *pair[0])[0]]
        with torch.no_grad():
            for parameter, slope in zip(parameters, gradient.values, strict=True):
                parameter.sub_(1e-2 * slope / gradient.norm)
        final_losses = [loss.item() for loss in ascent_losses(training.model, *pair[0])[0]]
        rises[alpha] = [new - old for old, new in zip(initial_losses, final_losses, strict=True)]
        with torch.no_grad():
            for parameter, value in zip(parameters, start, strict=True):
                parameter.copy_(value)
    assert rises[20.0][0] == 0  # no adapter is below the embeddings
    assert all(rise > 1e-3 for rise in rises[20.0][1:])
    assert rises[20.0][-1] > rises[0.0][-1] + 1e-3


def test_a_step_on_the_noise_term_brings_outputs_closer_to_noise(samples: list[tuple[Tensor, Tensor]]) -> None:
    training, batch = stage(), tiny.batch()
    distances = []
    for _ in range(2):
        plain, total = training.gradient(batch), RepNoise(alpha=0.0, beta=10.0).gradient(training, batch)
        distances.append(((total - plain).loss / 10).item())
        with torch.no_grad():
            for parameter, slope in zip(training.trainable.values(), (total - plain).values, strict=True):
                parameter.sub_(0.05 * slope / (total - plain).norm)
    torch.testing.assert_close(samples[0][1], samples[2][1])  # the same noise
    assert 0 < distances[1] < distances[0] - 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# The mask


def rows_of(*rows: Sequence[int], prompt: int = 2) -> Batch:
    """Return rows padded with token 0 on the right; the first `prompt` tokens have no label."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    labels = torch.where(mask.bool(), ids, -100)
    labels[:, :prompt] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize(
    ("safe", "harmful", "expected"),
    [
        ([[5, 6, 7, 8, 9]], [[5, 6, 4, 8, 3]], [[0, 0, 1, 0, 1]]),
        ([[5, 6, 7]], [[5, 6, 7, 8, 9]], [[0, 0, 0, 1, 1]]),  # after the end of the safe row
        ([[5, 6, 7, 8, 9]], [[5, 6, 4]], [[0, 0, 1]]),
        ([[5, 6, 7, 8]], [[5, 6, 7, 8]], [[0, 0, 0, 0]]),
        ([[5, 6, 0, 8]], [[5, 6, 7, 0]], [[0, 0, 1, 1]]),  # token 0 counts as a token
        ([[5, 6, 0, 8]], [[5, 6, 0, 9]], [[0, 0, 0, 1]]),
        ([[5, 6, 7]], [[5, 6, 7, 0, 9]], [[0, 0, 0, 1, 1]]),  # token 0 after the end of the safe row
        (
            [[5, 6, 7], [5, 6, 7, 8, 9]],
            [[5, 6, 7, 0], [5, 6, 7]],
            [[0, 0, 0, 1], [0, 0, 0, 0]],
        ),  # token 0 at padding of the safe row
        ([[5, 6, 7, 8], [5, 6, 7]], [[5, 6, 4], [5, 6, 4, 3, 2]], [[0, 0, 1, 0, 0], [0, 0, 1, 1, 1]]),  # padding
        ([[4, 3, 7, 8]], [[5, 6, 7, 9]], [[0, 0, 0, 1]]),  # a prompt is not a response
    ],
)
def test_mask(safe: list[list[int]], harmful: list[list[int]], expected: list[list[int]]) -> None:
    safe_rows, harmful_rows = rows_of(*safe), rows_of(*harmful)
    mask = differing(safe_rows, harmful_rows)
    assert mask.int().tolist() == expected
    assert torch.equal(mask, differs(safe_rows, harmful_rows))


def test_padding_has_no_effect(samples: list[tuple[Tensor, Tensor]]) -> None:
    """With more padding of the harmful rows the ascent is unchanged, and masked samples are zero at padding."""
    training, batch = stage(), tiny.batch()
    plain = training.paired_stream
    narrow = RepNoise(alpha=2.0, beta=0.0).gradient(training, batch)

    def wider(rows: Batch) -> Batch:
        fill = {"input_ids": tiny.PAD, "attention_mask": 0, "labels": -100}
        return {key: torch.nn.functional.pad(value, (0, 6), value=fill[key]) for key, value in rows.items()}

    training.paired_stream = lambda *args: tuple(wider(rows) for rows in plain(*args))  # type: ignore[method-assign]
    assert close_in_norm(RepNoise(alpha=2.0, beta=0.0).gradient(training, batch), list(narrow.values))
    for sample in samples[-1]:
        assert sample.view(4, -1, 64)[:, -6:].abs().max() == 0


def test_pairs_stay_together_in_two_passes() -> None:
    training, batch = stage(), tiny.batch()
    pairs = record_pairs(training)
    with recorded_rows(training.model) as passes:
        RepNoise().gradient(training, batch)
    safe, harmful, rows = ([[t for t in row if t] for row in side["input_ids"].tolist()] for side in (*pairs[0], batch))
    pool = [[row.ids for row in tiny.encode(pair)] for pair in POOLS.paired]
    assert len(safe) == training.settings.batch
    assert all([left, right] in pool for left, right in zip(safe, harmful, strict=True))
    assert passes == [harmful, rows]


def test_missing_pairs_are_refused() -> None:
    with pytest.raises(BadInput):
        RepNoise().gradient(stage(pools=Pools()), tiny.batch())


def test_equal_answers_give_the_alignment_gradient() -> None:
    # No token differs, so without a guard cross-entropy and bandwidth would be 0/0 and every weight NaN.
    same_answer = [(Example("safe:0", "why", "sorry"), Example("harm:0", "why", "sorry", harmful=True))]
    training, batch = stage(pools=Pools(paired=same_answer)), tiny.batch()
    assert close_in_norm(RepNoise().gradient(training, batch), list(training.gradient(batch).values))


# ---------------------------------------------------------------------------------------------------------------------
# The distance


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_distance_of_identical_samples_is_0() -> None:
    x = random(3, 8)
    assert mmd2(x, x.clone()).item() == pytest.approx(0, abs=1e-12)
    assert mmd2(x, x[[2, 0, 1]]).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_distance_between_two_rows_in_closed_form(scale: float) -> None:
    """The bandwidth is d / 4 for the squared distance d, so the value is 10 - 2 sum_i exp(-4 / 2^i)."""
    expected = 10 - 2 * sum(math.exp(-4 / 2**power) for power in range(5))
    assert mmd2(scale * random(1, 8), scale * random(1, 8, seed=1)).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_distance_equals_the_double_sum(n: int) -> None:
    x, y = random(n, 8), 0.5 * random(n, 8, seed=1) + 1
    expected = distance(x, y).item()
    assert expected > 0.1
    assert mmd2(x, y).item() == pytest.approx(expected, rel=1e-9)
    assert mmd2(y, x).item() == pytest.approx(expected, rel=1e-9)
    assert mmd2(x.flip(0), y.roll(1, 0)).item() == pytest.approx(expected, rel=1e-9)


def test_distance_grows_with_the_shift() -> None:
    x, y = random(20, 8), random(20, 8, seed=1)
    near, far, farther = (mmd2(x, y + shift).item() for shift in (0.0, 0.5, 2.0))
    assert 0 < near < far < farther


def test_bandwidth_is_a_constant() -> None:
    """For two rows the value is constant; the gradient is that of the kernels at a fixed bandwidth."""
    x, y = random(1, 8).requires_grad_(), random(1, 8, seed=1)
    d = (x - y).square().sum().item()
    slope = 2 * sum(
        math.exp(-4 / 2**power) * 4 / (2**power * d) for power in range(5)
    )  # derivative of -2 K with respect to the squared gap
    (gradient,) = torch.autograd.grad(mmd2(x, y), x)
    torch.testing.assert_close(gradient, slope * 2 * (x - y).detach(), rtol=1e-9, atol=0)
    assert gradient.norm() > 0.1

    x, y = random(3, 4).requires_grad_(), random(3, 4, seed=1)
    (gradient,) = torch.autograd.grad(mmd2(x, y), x)
    (expected,) = torch.autograd.grad(distance(x, y), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# The noise, and the random numbers of the steps


def noise(samples: list[tuple[Tensor, Tensor]], step: int, micro: int, salt: int = 0) -> list[Tensor]:
    """Return the noise of both layers at one micro-batch, at the tokens of the mask (tokens x width)."""
    training = stage()
    first = training.paired_stream("pairs", POOLS.paired)
    training.paired_stream = lambda *args: first  # type: ignore[method-assign]
    training.step, training.micro = step, micro
    torch.manual_seed(salt)
    samples.clear()
    RepNoise().gradient(training, tiny.batch())
    m = differs(*first)
    layer_noise = [z.view(*m.shape, -1) for _, z in samples]
    for (a, _), z in zip(samples, layer_noise, strict=True):
        assert z[~m].abs().max() == 0
        assert a.view(*m.shape, -1)[~m].abs().max() == 0
    return [z[m] for z in layer_noise]


def test_noise_is_standard_normal_and_differs_between_micro_batches(samples: list[tuple[Tensor, Tensor]]) -> None:
    first = noise(samples, 1, 0)
    assert len(first) == 2
    values = torch.stack(
        first
    )  # 2 layers x tokens x 64: the standard error of the mean is 0.026, of the variance 0.036
    assert values.numel() > 1500
    assert abs(values.mean().item()) < 0.08
    assert values.var().item() == pytest.approx(1, abs=0.11)
    independent = [first[1], *(noise(samples, step, micro)[0] for step, micro in ((2, 0), (1, 1)))]
    for second in independent:  # layers also have independent noise
        assert abs((first[0] * second).mean().item()) < 0.13
    again = noise(samples, 1, 0, salt=9)  # as in a resumed stage, for any state of the torch generator
    assert same(again, first)


def test_an_interrupted_stage_gives_the_same_result(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"batch": 3, "accumulation": 2}
    complete = run_stage(RepNoise(beta=1.0), tmp_path / "complete", **changes)
    with pytest.raises(KeyboardInterrupt):
        run_stage(interrupting(RepNoise(beta=1.0), "gradient", 8), tmp_path / "cut", salt=1, **changes)
    assert list((tmp_path / "cut").glob("checkpoint-*"))
    assert_same(run_stage(RepNoise(beta=1.0), tmp_path / "cut", salt=2, **changes), complete)


def test_alpha_and_beta_0_equal_sft_bit_for_bit_with_dropout(tmp_path: Path) -> None:
    sft = run_stage(SFT(), tmp_path / "sft")
    assert_same(run_stage(RepNoise(alpha=0.0, beta=0.0), tmp_path / "neutral"), sft)
    for name, defense in {"alpha": RepNoise(alpha=1.0, beta=0.0), "beta": RepNoise(alpha=0.0, beta=1.0)}.items():
        assert not same(list(run_stage(defense, tmp_path / name)[0].values()), list(sft[0].values()))


def test_the_next_dropout_masks_equal_those_of_sft() -> None:
    states = []
    for defense in (SFT(), RepNoise()):
        training = stage(lora_dropout=0.3)
        training.model.train()
        torch.manual_seed(11)
        defense.gradient(training, tiny.batch())
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1])

"""RepNoise against its equations in plain PyTorch: own hooks, own mask, own kernels, own optimizer."""

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
from support.autograd import cross_entropy
from support.compare import close_in_norm, same
from support.hooks import decoder_layers
from support.optimizers import assert_equal_where_firm, plain_adamw
from support.trainer import assert_same, interrupting

ANSWERS = [  # safe and harmful answers with letters in common, of all three relations of length
    ("sorry no", "sure yes"), ("i cannot", "i can do"), ("no", "nothing hard"), ("never ever", "new"),
    ("stop it", "step in"), ("ask them", "add it all"), ("a", "b"), ("refuse", "reuse it"),
]  # fmt: skip
POOLS = Pools(
    paired=[
        (Example(f"safe:{n}", "how " * (n % 3) + "q", safe), Example(f"harm:{n}", "how " * (n % 3) + "q", harmful))
        for n, (safe, harmful) in enumerate(ANSWERS)
    ]
)


def stage(base: Any = None, pools: Pools = POOLS, **changes: Any) -> TrainingStage:
    """The first micro-batch of an alignment stage with pairs, its adapter away from zero."""
    made, _ = tiny.stage(base, trained_with=tiny.settings(**changes), stirred=True, pools=pools)
    made.step, made.steps = 1, 10
    return made


def recorded(stage: TrainingStage) -> list[tuple[Batch, Batch]]:
    """From here on, the pairs of batches that the stage gives out."""
    given: list[tuple[Batch, Batch]] = []
    plain = stage.paired_stream

    def paired_stream(*args: Any) -> tuple[Batch, Batch]:
        given.append(plain(*args))
        return given[-1]

    stage.paired_stream = paired_stream  # type: ignore[method-assign]
    return given


@pytest.fixture
def samples(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """The two samples of every distance that is taken: masked outputs, masked noise."""
    taken: list[tuple[Tensor, Tensor]] = []

    def watched(x: Tensor, y: Tensor) -> Tensor:
        taken.append((x.detach(), y.detach()))
        return mmd2(x, y)

    monkeypatch.setattr(repnoise, "mmd2", watched)
    return taken


def differs(safe: Batch, harmful: Batch) -> Tensor:
    """m, one token after the other."""
    m = torch.zeros(harmful["input_ids"].shape, dtype=torch.bool)
    for row, ids in enumerate(harmful["input_ids"].tolist()):
        real, others = int(harmful["attention_mask"][row].sum()), int(safe["attention_mask"][row].sum())
        for place in range(real):
            there = place < others and safe["input_ids"][row, place].item() == ids[place]
            m[row, place] = harmful["labels"][row, place] >= 0 and not there
    return m


@contextmanager
def states(model: Any) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """In a forward pass: the input of every layer and the output of the last; the output of every MLP."""
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
    """CE(head(norm(h_k)); B_h at m) for k = 0..n, and the MLP outputs of the same pass."""
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
    """MMD^2 as a double sum over pairs of rows, in double precision, the bandwidth a plain number."""
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
    """L(w; B_a) + beta N - alpha log(1 + A), with noise that was drawn elsewhere, masked and flattened."""
    safe, harmful = pair
    losses, outputs = ascent_losses(stage.model, safe, harmful)
    m = differs(safe, harmful)[..., None].float()
    far = torch.stack([distance((m * a).flatten(1), z) for a, z in zip(outputs, noise, strict=True)]).mean()
    return cross_entropy(stage.model, batch) + beta * far - alpha * torch.log(1 + torch.stack(losses).mean())


def run(defense: Defense, folder: Path, salt: int = 0, **changes: Any) -> tuple[dict[str, Tensor], list[Any]]:
    """A short stage from fresh objects: the adapter and the log."""
    settings = tiny.settings(**{"lora_dropout": 0.1, "epochs": 2, **changes})
    torch.manual_seed(salt)
    made, _ = tiny.stage(trained_with=settings, stirred=True, pools=POOLS)
    log = train(made, defense, tiny.rows(20), settings, folder, pad=tiny.PAD)
    return {name: value.detach().clone() for name, value in made.trainable.items()}, log


# ---------------------------------------------------------------------------------------------------------------------
# Against the equations


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.001), (1.0, 0.0), (0.0, 5.0), (2.0, 4.0)])
def test_gradient_equals_plain_autograd(alpha: float, beta: float, samples: list[tuple[Tensor, Tensor]]) -> None:
    made, batch = stage(), tiny.batch()
    given = recorded(made)
    gradient = RepNoise(alpha=alpha, beta=beta).gradient(made, batch)
    assert 0 < differs(*given[0]).sum() < (given[0][1]["labels"] >= 0).sum()  # some letters agree
    value = objective(made, batch, given[0], [noise for _, noise in samples], alpha, beta)
    expected = torch.autograd.grad(value, list(made.trainable.values()))
    assert close_in_norm(gradient, list(expected))
    assert not close_in_norm(made.gradient(batch), list(expected), 1e-2)
    assert gradient.loss.item() == pytest.approx(value.item(), rel=1e-5)
    assert not gradient.loss.requires_grad
    assert all(parameter.grad is None for parameter in made.trainable.values())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_three_optimizer_steps_equal_plain_adamw(
    accumulation: int, samples: list[tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"epochs": 1, "accumulation": accumulation, "lr": 1e-3, "weight_decay": 0.1}
    settings = tiny.settings(**changes, schedule="constant", warmup=0.0)
    made, _ = tiny.stage(trained_with=settings, stirred=True, pools=POOLS)
    pairs, batches = recorded(made), []

    class Watched(RepNoise):
        def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
            batches.append(batch)
            return super().gradient(stage, batch)

    train(made, Watched(alpha=1.0, beta=2.0), tiny.rows(12 * accumulation), settings, tmp_path, pad=tiny.PAD)
    assert len(batches) == len(pairs) == 3 * accumulation
    assert len(samples) == 2 * len(pairs)  # in each of two layers

    twin, _ = tiny.stage(trained_with=settings, stirred=True)

    def mean(numbers: Sequence[int]) -> Sequence[Tensor]:
        values = [
            objective(twin, batches[n], pairs[n], [samples[2 * n][1], samples[2 * n + 1][1]], 1.0, 2.0) for n in numbers
        ]
        return torch.autograd.grad(torch.stack(values).mean(), list(twin.trainable.values()))

    steps = [range(start, start + accumulation) for start in range(0, 3 * accumulation, accumulation)]
    firm = plain_adamw(twin, [lambda numbers=numbers: mean(numbers) for numbers in steps])
    assert_equal_where_firm(made, twin, firm)


def test_uniform_logits_at_every_tap_give_log_v_whatever_the_number_of_layers() -> None:
    """A is a mean over taps: with log V at each, log V. (The authors' code has a term more than it divides by.)"""
    for layers in (1, 3):
        base = tiny.model(num_hidden_layers=layers)
        with torch.no_grad():
            base.lm_head.weight.zero_()
        made = stage(base)
        log_v = math.log(tiny.VOCABULARY)
        loss = RepNoise(alpha=1.0, beta=0.0).gradient(made, tiny.batch()).loss.item()
        assert loss == pytest.approx(log_v - math.log(1 + log_v), rel=1e-5)


def test_a_small_step_raises_the_harmful_loss_at_every_tap() -> None:
    made, batch = stage(), tiny.batch()
    pair = recorded(made)
    parameters = list(made.trainable.values())
    start = [parameter.detach().clone() for parameter in parameters]
    risen = {}
    for alpha in (0.0, 20.0):
        gradient = RepNoise(alpha=alpha, beta=0.0).gradient(made, batch)
        before = [each.item() for each in ascent_losses(made.model, *pair[0])[0]]
        with torch.no_grad():
            for parameter, slope in zip(parameters, gradient.values, strict=True):
                parameter.sub_(1e-2 * slope / gradient.norm)
        after = [each.item() for each in ascent_losses(made.model, *pair[0])[0]]
        risen[alpha] = [new - old for old, new in zip(before, after, strict=True)]
        with torch.no_grad():
            for parameter, value in zip(parameters, start, strict=True):
                parameter.copy_(value)
    assert risen[20.0][0] == 0  # no adapter stands below the embeddings
    assert all(rise > 1e-3 for rise in risen[20.0][1:])
    assert risen[20.0][-1] > risen[0.0][-1] + 1e-3


def test_a_step_on_the_noise_term_brings_outputs_closer_to_noise(samples: list[tuple[Tensor, Tensor]]) -> None:
    made, batch = stage(), tiny.batch()
    found = []
    for _ in range(2):
        plain, whole = made.gradient(batch), RepNoise(alpha=0.0, beta=10.0).gradient(made, batch)
        found.append(((whole - plain).loss / 10).item())
        with torch.no_grad():
            for parameter, slope in zip(made.trainable.values(), (whole - plain).values, strict=True):
                parameter.sub_(0.05 * slope / (whole - plain).norm)
    torch.testing.assert_close(samples[0][1], samples[2][1])  # the same noise
    assert 0 < found[1] < found[0] - 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# The mask


def rows_of(*rows: Sequence[int], prompt: int = 2) -> Batch:
    """Rows padded with token 0 on the right, the first `prompt` tokens without a label."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    real = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    labels = torch.where(real.bool(), ids, -100)
    labels[:, :prompt] = -100
    return {"input_ids": ids, "attention_mask": real, "labels": labels}


@pytest.mark.parametrize(
    ("safe", "harmful", "expected"),
    [
        ([[5, 6, 7, 8, 9]], [[5, 6, 4, 8, 3]], [[0, 0, 1, 0, 1]]),
        ([[5, 6, 7]], [[5, 6, 7, 8, 9]], [[0, 0, 0, 1, 1]]),  # beyond the safe row's end
        ([[5, 6, 7, 8, 9]], [[5, 6, 4]], [[0, 0, 1]]),
        ([[5, 6, 7, 8]], [[5, 6, 7, 8]], [[0, 0, 0, 0]]),
        ([[5, 6, 0, 8]], [[5, 6, 7, 0]], [[0, 0, 1, 1]]),  # token 0 is a token
        ([[5, 6, 0, 8]], [[5, 6, 0, 9]], [[0, 0, 0, 1]]),
        ([[5, 6, 7]], [[5, 6, 7, 0, 9]], [[0, 0, 0, 1, 1]]),  # token 0 where the safe row has ended
        ([[5, 6, 7], [5, 6, 7, 8, 9]], [[5, 6, 7, 0], [5, 6, 7]], [[0, 0, 0, 1], [0, 0, 0, 0]]),  # and has padding
        ([[5, 6, 7, 8], [5, 6, 7]], [[5, 6, 4], [5, 6, 4, 3, 2]], [[0, 0, 1, 0, 0], [0, 0, 1, 1, 1]]),  # padding
        ([[4, 3, 7, 8]], [[5, 6, 7, 9]], [[0, 0, 0, 1]]),  # a prompt is no response
    ],
)
def test_mask(safe: list[list[int]], harmful: list[list[int]], expected: list[list[int]]) -> None:
    one, other = rows_of(*safe), rows_of(*harmful)
    found = differing(one, other)
    assert found.int().tolist() == expected
    assert torch.equal(found, differs(one, other))


def test_padding_teaches_nothing(samples: list[tuple[Tensor, Tensor]]) -> None:
    """The harmful rows are padded further: the ascent is what it was, and masked samples are zero there."""
    made, batch = stage(), tiny.batch()
    plain = made.paired_stream
    narrow = RepNoise(alpha=2.0, beta=0.0).gradient(made, batch)

    def wider(rows: Batch) -> Batch:
        fill = {"input_ids": tiny.PAD, "attention_mask": 0, "labels": -100}
        return {key: torch.nn.functional.pad(value, (0, 6), value=fill[key]) for key, value in rows.items()}

    made.paired_stream = lambda *args: tuple(wider(each) for each in plain(*args))  # type: ignore[method-assign]
    assert close_in_norm(RepNoise(alpha=2.0, beta=0.0).gradient(made, batch), list(narrow.values))
    for sample in samples[-1]:
        assert sample.view(4, -1, 64)[:, -6:].abs().max() == 0


def test_pairs_stay_together_and_the_passes_are_two() -> None:
    made, batch = stage(), tiny.batch()
    given = recorded(made)
    seen: list[Any] = []
    made.model.register_forward_pre_hook(
        lambda module, args, more: seen.append(more["input_ids"].tolist()), with_kwargs=True
    )
    RepNoise().gradient(made, batch)
    safe, harmful = ([[t for t in row if t] for row in each["input_ids"].tolist()] for each in given[0])
    pool = [[row.ids for row in tiny.encode(pair)] for pair in POOLS.paired]
    assert len(safe) == made.settings.batch
    assert all([one, other] in pool for one, other in zip(safe, harmful, strict=True))
    assert seen == [given[0][1]["input_ids"].tolist(), batch["input_ids"].tolist()]


def test_without_pairs_it_is_refused() -> None:
    with pytest.raises(BadInput):
        RepNoise().gradient(stage(pools=Pools()), tiny.batch())


def test_a_micro_batch_whose_answers_do_not_differ_leaves_the_alignment_gradient() -> None:
    # FAILS: no token differs, so cross-entropy and bandwidth are 0/0, and one such micro-batch makes every weight NaN;
    # even with alpha = beta = 0, which is said to be SFT.
    same_answer = [(Example("safe:0", "why", "sorry"), Example("harm:0", "why", "sorry", harmful=True))]
    made, batch = stage(pools=Pools(paired=same_answer)), tiny.batch()
    assert close_in_norm(RepNoise().gradient(made, batch), list(made.gradient(batch).values))


# ---------------------------------------------------------------------------------------------------------------------
# The distance


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_distance_of_identical_samples_is_0() -> None:
    x = random(3, 8)
    assert mmd2(x, x.clone()).item() == pytest.approx(0, abs=1e-12)
    assert mmd2(x, x[[2, 0, 1]]).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_distance_of_one_row_to_another_by_hand(scale: float) -> None:
    """The bandwidth is d / 4 where d is their squared distance, so that the value is 10 - 2 sum_i exp(-4 / 2^i)."""
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
    """For one row to another the value never moves; its gradient is that of the kernels around a fixed bandwidth."""
    x, y = random(1, 8).requires_grad_(), random(1, 8, seed=1)
    d = (x - y).square().sum().item()
    slope = 2 * sum(math.exp(-4 / 2**power) * 4 / (2**power * d) for power in range(5))  # of -2 K by the squared gap
    (gradient,) = torch.autograd.grad(mmd2(x, y), x)
    torch.testing.assert_close(gradient, slope * 2 * (x - y).detach(), rtol=1e-9, atol=0)
    assert gradient.norm() > 0.1

    x, y = random(3, 4).requires_grad_(), random(3, 4, seed=1)
    (gradient,) = torch.autograd.grad(mmd2(x, y), x)
    (expected,) = torch.autograd.grad(distance(x, y), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# The noise, and the steps' random numbers


def noise(samples: list[tuple[Tensor, Tensor]], step: int, micro: int, salt: int = 0) -> list[Tensor]:
    """The masked noise of both layers at one micro-batch: rows x length x width."""
    made = stage()
    first = made.paired_stream("pairs", POOLS.paired)
    made.paired_stream = lambda *args: first  # type: ignore[method-assign]
    made.step, made.micro = step, micro
    torch.manual_seed(salt)
    samples.clear()
    RepNoise().gradient(made, tiny.batch())
    m = differs(*first)
    drawn = [z.view(*m.shape, -1) for _, z in samples]
    for (a, _), z in zip(samples, drawn, strict=True):
        assert z[~m].abs().max() == 0
        assert a.view(*m.shape, -1)[~m].abs().max() == 0
    return [z[m] for z in drawn]


def test_noise_is_standard_normal_and_fresh_at_every_micro_batch(samples: list[tuple[Tensor, Tensor]]) -> None:
    first = noise(samples, 1, 0)
    assert len(first) == 2
    drawn = torch.stack(first)  # 2 layers x tokens x 64: the standard error of the mean is 0.026, of the variance 0.036
    assert drawn.numel() > 1500
    assert abs(drawn.mean().item()) < 0.08
    assert drawn.var().item() == pytest.approx(1, abs=0.11)
    others = [first[1], *(noise(samples, step, micro)[0] for step, micro in ((2, 0), (1, 1)))]
    for other in others:  # layers draw apart too
        assert abs((first[0] * other).mean().item()) < 0.13
    again = noise(samples, 1, 0, salt=9)  # what a resumed stage draws: whatever torch's own generator has done
    assert same(again, first)


def test_an_interrupted_stage_ends_bit_equal(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"batch": 3, "accumulation": 2}
    whole = run(RepNoise(beta=1.0), tmp_path / "whole", **changes)
    with pytest.raises(KeyboardInterrupt):
        run(interrupting(RepNoise(beta=1.0), "gradient", 8), tmp_path / "cut", salt=1, **changes)
    assert list((tmp_path / "cut").glob("checkpoint-*"))
    assert_same(run(RepNoise(beta=1.0), tmp_path / "cut", salt=2, **changes), whole)


def test_alpha_and_beta_0_is_sft_bit_for_bit_with_dropout_on(tmp_path: Path) -> None:
    sft = run(SFT(), tmp_path / "sft")
    assert_same(run(RepNoise(alpha=0.0, beta=0.0), tmp_path / "neutral"), sft)
    for name, moved in {"alpha": RepNoise(alpha=1.0, beta=0.0), "beta": RepNoise(alpha=0.0, beta=1.0)}.items():
        assert not same(list(run(moved, tmp_path / name)[0].values()), list(sft[0].values()))


def test_the_next_dropout_masks_are_those_of_sft() -> None:
    after = []
    for defense in (SFT(), RepNoise()):
        made = stage(lora_dropout=0.3)
        made.model.train()
        torch.manual_seed(11)
        defense.gradient(made, tiny.batch())
        after.append(torch.get_rng_state())
    assert torch.equal(after[0], after[1])

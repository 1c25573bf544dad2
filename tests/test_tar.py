"""TAR compared with its equations in plain PyTorch, and the second adapter compared with peft."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.func import functional_call

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.data.collate import IGNORED, Encoded
from harmbench_vaccine.defenses import tar
from harmbench_vaccine.defenses.booster import Booster
from harmbench_vaccine.defenses.tar import TAR, mean_entropy
from harmbench_vaccine.plugins import Defense, Pools
from harmbench_vaccine.training.second_adapter import second_adapter
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage, response_mask
from harmbench_vaccine.training.trainer import train
from support import tiny
from support.autograd import cross_entropy, length, random_coefficients
from support.compare import close, same
from support.hooks import recorded_rows
from support.optimizers import assert_equal_where_firm, plain_adamw
from support.plain_math import BASE, SCALE, Values, leaves
from support.trainer import assert_same, interrupting

Adversary = Literal["second", "same"]
POOLS = tiny.example_pools()
INNER, EVERY, SLOPE, RATE = 5, 2, 0.4, 0.02
"""K and the other values of `defense`."""


def stage(base: Any = None, pools: Pools = POOLS, **changes: Any) -> TrainingStage:
    """Return an alignment stage with harmful rows at its first micro-batch, with a nonzero adapter."""
    settings = tiny.settings(**changes)
    if base is not None:
        settings = tiny.settings(lora_targets=tiny.targets(base.config.model_type), **changes)
    result, _ = tiny.stage(base, trained_with=settings, stirred=True, pools=pools)
    result.step, result.steps = 1, 10
    return result


def run_stage(defense: Defense, folder: Path, salt: int = 0, **changes: Any) -> tuple[dict[str, Tensor], list[Any]]:
    """Train a short stage with new objects and return the adapter and the log."""
    settings = tiny.settings(**{"lora_dropout": 0.1, "epochs": 1, **changes})
    torch.manual_seed(salt)
    training, _ = tiny.stage(trained_with=settings, stirred=True, pools=POOLS)
    log = train(training, defense, tiny.rows(20), settings, folder, pad=tiny.PAD)
    return {name: value.detach().clone() for name, value in training.trainable.items()}, log


# ---------------------------------------------------------------------------------------------------------------------
# The equations


def predictions(w: Values, phi: Sequence[Tensor], batch: Batch) -> Tensor:
    """Return log p at the response tokens, for an adapter w and a second adapter of A and B of every module in turn."""
    weights = {}
    for number, (name, a) in enumerate(item for item in w.items() if ".lora_A." in item[0]):
        weight = f"{name.removeprefix('base_model.model.').partition('.lora_A')[0]}.weight"
        product = w[name.replace("lora_A", "lora_B")] @ a
        if phi:
            product = product + phi[2 * number + 1] @ phi[2 * number]
        weights[weight] = BASE.get_parameter(weight) + SCALE * product
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    log_p = functional_call(BASE, weights, (), inputs).logits.log_softmax(-1)
    places = [(r, t) for r, row in enumerate(batch["labels"].tolist()) for t, label in enumerate(row) if label >= 0]
    return torch.stack([log_p[r, t - 1] for r, t in places])


def loss(w: Values, phi: Sequence[Tensor], batch: Batch) -> Tensor:
    labels = batch["labels"][batch["labels"] != IGNORED]
    return -predictions(w, phi, batch)[torch.arange(len(labels)), labels].mean()


def entropy(w: Values, phi: Sequence[Tensor], batch: Batch) -> Tensor:
    log_p = predictions(w, phi, batch)
    return torch.stack([-(row.exp() * row).sum() for row in log_p]).mean()


@dataclass
class Attack:
    """One simulated attacker: its batches, and A and B of its adapter at the start."""

    test: Batch
    batches: list[Batch] = field(default_factory=list)
    start: list[Tensor] = field(default_factory=list)


def record_attacks(stage: TrainingStage, monkeypatch: pytest.MonkeyPatch, inner: int = INNER) -> list[Attack]:
    """Return a list to which every attacker of `inner` steps is appended that the stage simulates from now on.

    All attackers have the rate `rate` / 2.
    """
    attacks: list[Attack] = []
    plain = stage.collated
    monkeypatch.setattr(tar, "RATES", (0.5,))

    def collated(rows: Sequence[Encoded]) -> Batch:
        batch = plain(rows)
        if not attacks or len(attacks[-1].batches) == inner:
            attacks.append(Attack(batch))
        else:
            attacks[-1].batches.append(batch)
        return batch

    @contextmanager
    def recorded_adapter(*args: Any) -> Iterator[list[Tensor]]:
        with second_adapter(*args) as factors:
            attacks[-1].start = [factor.detach().clone() for factor in factors]
            yield factors

    stage.collated = collated  # type: ignore[method-assign]
    monkeypatch.setattr(tar, "second_adapter", recorded_adapter)
    return attacks


def defense(adversary: Adversary) -> TAR:
    return TAR(lam=3.0, lam_r=0.5, inner=INNER, every=EVERY, slope=SLOPE, rate=RATE, adversary=adversary)


def expected(w: Values, batch: Batch, attack: Attack) -> tuple[list[Tensor], float]:
    """Compute the gradient and the loss of `defense` from the equations."""
    parameters = list(w.values())
    value = 0.5 * loss(w, [], batch)
    total = torch.autograd.grad(value, parameters)
    moving = attack.start or parameters  # a second adapter, or a copy of w
    phi = [tensor.detach().clone().requires_grad_() for tensor in moving]

    def moved() -> tuple[Values, Sequence[Tensor]]:
        return (w, phi) if attack.start else (dict(zip(w, phi, strict=True)), [])

    optimizer = torch.optim.AdamW(phi, lr=RATE / 2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    for k, rows in enumerate(attack.batches, 1):
        for tensor, slope in zip(phi, torch.autograd.grad(loss(*moved(), rows), phi), strict=True):
            tensor.grad = slope
        optimizer.step()
        if k in (2, 4):
            term = -3.0 * math.exp(SLOPE * (k - 5)) * entropy(*moved(), attack.test)
            slopes = torch.autograd.grad(term, list(moved()[0].values()))
            total = tuple(a + b for a, b in zip(total, slopes, strict=True))
            value = value + term
    return list(total), value.item()


@pytest.mark.parametrize("adversary", ["second", "same"])
def test_gradient_equals_plain_autograd(adversary: Adversary, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch is not that of the attacker: T-Vaccine's code of this name computes the gradient of SFT."""
    training, batch = stage(), tiny.batch()
    attacks = record_attacks(training, monkeypatch)
    gradient = defense(adversary).gradient(training, batch)
    assert [len(attack.batches) for attack in attacks] == [INNER]
    assert bool(attacks[0].start) == (adversary == "second")
    slopes, value = expected(leaves(training), batch, attacks[0])
    assert close(gradient.values, slopes)
    assert not close((0.5 * training.gradient(batch)).values, slopes, 1e-1)
    assert gradient.loss.item() == pytest.approx(value, rel=1e-5)
    assert not gradient.loss.requires_grad


@pytest.mark.parametrize("adversary", ["second", "same"])
def test_three_optimizer_steps_equal_plain_adamw(
    adversary: Adversary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the attacker changes neither the parameters nor the moments of the outer optimizer."""
    settings = tiny.settings(epochs=1, lr=1e-3, weight_decay=0.1, schedule="constant", warmup=0.0)
    training, _ = tiny.stage(trained_with=settings, stirred=True, pools=POOLS)
    attacks, batches = record_attacks(training, monkeypatch), []

    class RecordingTAR(TAR):
        def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
            batches.append(batch)
            return super().gradient(stage, batch)

    train(training, RecordingTAR(**dict(defense(adversary))), tiny.rows(12), settings, tmp_path, pad=tiny.PAD)
    assert len(batches) == len(attacks) == 3
    assert len({str(attack.test["input_ids"].tolist()) for attack in attacks}) == 3

    twin, _ = tiny.stage(trained_with=settings, stirred=True)

    def slopes(batch: Batch, attack: Attack) -> Callable[[], list[Tensor]]:
        return lambda: expected(leaves(twin), batch, attack)[0]

    firm = plain_adamw(twin, [slopes(*pair) for pair in zip(batches, attacks, strict=True)])
    assert_equal_where_firm(training, twin, firm)


def test_the_attacker_in_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """With L_h = h/2 (w - u)^2, H = -q/2 w^2 and SGD: phi_k = u + (1 - rate h)^k (w - u), and the terms c_k q phi_k."""
    training, batch = stage(), tiny.batch()
    h, u, q = (
        [value.abs() for value in random_coefficients(training, 1)],
        *(random_coefficients(training, n) for n in (2, 3)),
    )
    clean, loss_of_stage, w = training.gradient(batch), training.loss, list(training.trainable.values())

    def total(values: Sequence[Tensor]) -> Tensor:
        return torch.stack([value.sum() / 2 for value in values]).sum()

    def quadratic(rows: Batch) -> Tensor:
        return (
            loss_of_stage(rows) if rows is batch else total([a * (x - b) ** 2 for a, b, x in zip(h, u, w, strict=True)])
        )

    training.loss = quadratic  # type: ignore[method-assign, assignment]
    monkeypatch.setattr(tar, "mean_entropy", lambda logits: -total([a * x**2 for a, x in zip(q, w, strict=True)]))

    def sgd(optimizer: Any, parameters: Sequence[Tensor], value: Tensor) -> None:
        slopes = torch.autograd.grad(value, parameters)
        with torch.no_grad():
            for parameter, slope in zip(parameters, slopes, strict=True):
                parameter.sub_(0.1 * slope)

    monkeypatch.setattr(tar, "step", sgd)
    gradient = TAR(lam=2.0, inner=4, every=2, slope=0.5, adversary="same").gradient(training, batch)
    phi = {k: [b + (1 - 0.1 * a) ** k * (x.detach() - b) for a, b, x in zip(h, u, w, strict=True)] for k in (2, 4)}
    slopes = [
        c + 2.0 * a * (math.exp(-1.0) * early + late)
        for c, a, early, late in zip(clean.values, q, phi[2], phi[4], strict=True)
        if c is not None
    ]
    assert close(gradient.values, slopes)


def test_one_normalized_step_and_the_negative_loss_give_booster(monkeypatch: pytest.MonkeyPatch) -> None:
    """With K = 1, phi = w - alpha g/||g|| and H = L_h, the term is -grad L_h(phi): Booster has it too."""
    training, batch, harmful = stage(), tiny.batch(), tiny.batch((6, 8), seed=4)
    alpha, lam = 0.5, 3.0

    def normalized(optimizer: Any, parameters: Sequence[Tensor], value: Tensor) -> None:
        slopes = torch.autograd.grad(value, parameters)
        with torch.no_grad():
            for parameter, slope in zip(parameters, slopes, strict=True):
                parameter.sub_(alpha / length(slopes) * slope)

    training.stream = lambda *args: harmful  # type: ignore[method-assign]
    booster = Booster(lam=lam, alpha=alpha).gradient(training, batch) - lam * training.gradient(harmful)
    training.collated = lambda rows: harmful  # type: ignore[method-assign]
    labels = harmful["labels"][:, 1:][response_mask(harmful)]
    monkeypatch.setattr(tar, "step", normalized)
    monkeypatch.setattr(tar, "mean_entropy", lambda logits: torch.nn.functional.cross_entropy(logits, labels))
    gradient = TAR(lam=lam, inner=1, every=1, adversary="same").gradient(training, batch)
    assert close(gradient.values, booster.values)
    assert not close(gradient.values, training.gradient(batch).values, 1e-1)


def test_the_weights_of_the_authors_script_sum_to_4_438() -> None:
    """16 of 64 steps have a term, the last one with weight 1: the alignment gradient 1 + 4 * 4.438."""
    training = stage()
    one, parameters = Gradient(torch.tensor(1.0), [torch.ones(1)]), list(training.trainable.values())
    training.gradient_of = lambda loss: one  # type: ignore[method-assign]
    training.loss = lambda batch: torch.stack([value.sum() for value in parameters]).sum()  # type: ignore[method-assign]
    training.output = lambda batch, **options: SimpleNamespace(logits=torch.zeros(1, 2))  # type: ignore[method-assign]
    gradient = TAR(adversary="same").gradient(training, tiny.batch())
    assert gradient.loss.item() == pytest.approx(1 + 4 * 4.438, abs=2e-3)
    assert TAR(adversary="same", every=64).gradient(training, tiny.batch()).loss.item() == 1 + 4 * 1


def test_entropy_of_uniform_predictions_is_log_v_with_gradient_0() -> None:
    logits = torch.full((3, 7), 2.5, requires_grad=True)
    value = mean_entropy(logits)
    (slope,) = torch.autograd.grad(value, logits)
    assert value.item() == pytest.approx(math.log(7), rel=1e-6)
    assert slope.abs().max() < 1e-7
    certain = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)  # p log p is 0, not NaN, at p = 0
    assert mean_entropy(certain).item() == 0
    assert torch.autograd.grad(mean_entropy(certain), certain)[0].abs().max() == 0
    assert mean_entropy(torch.tensor([[0.0, 0.0, -1e4], [5.0, -1e4, -1e4]])).item() == pytest.approx(math.log(2) / 2)


# ---------------------------------------------------------------------------------------------------------------------
# The attacker: its rows, its order of passes, its rate


@pytest.mark.parametrize("every", [1, 2, 6])
@pytest.mark.parametrize("count", [12, 5, 2])
def test_a_held_out_batch_is_tested_after_every_few_steps(every: int, count: int) -> None:
    training = stage(pools=Pools(paired=POOLS.paired[:count]))
    with recorded_rows(training.model) as passes:
        TAR(inner=6, every=every).gradient(training, tiny.batch())
    assert len(passes) == 7 + 6 // every
    pool = [row.ids for row in tiny.encode(POOLS.harmful[:count])]
    groups = [passes[1:][start : start + every + 1] for start in range(0, len(passes) - 1, every + 1)]
    tests = [group[-1] for group in groups]
    attacks = [row for group in groups for rows in group[:-1] for row in rows]
    assert all(rows == tests[0] for rows in tests)
    assert len(tests[0]) == min(count // 2, training.settings.batch)
    assert not any(row in attacks for row in tests[0])
    assert all(row in pool for row in [*tests[0], *attacks])
    assert len({str(row) for row in attacks}) == (count + 1) // 2


def test_attackers_of_different_steps_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have other rows, another start and one of the rates 5e-5, 5e-4 and 1e-3."""
    training = stage()
    rates_of_tar = tar.RATES
    attacks = record_attacks(training, monkeypatch, inner=1)
    monkeypatch.setattr(tar, "RATES", rates_of_tar)
    rates = []

    class RecordingAdamW(torch.optim.AdamW):
        def __init__(self, *args: Any, **options: Any) -> None:
            rates.append(options["lr"])
            super().__init__(*args, **options)

    monkeypatch.setattr(torch.optim, "AdamW", RecordingAdamW)
    for number in range(12):
        training.step, training.micro = number // 2, number % 2
        TAR(inner=1, every=1).gradient(training, tiny.batch())
    assert {round(rate, 9) for rate in rates} == {5e-5, 5e-4, 1e-3}
    assert len({str(attack.test["input_ids"].tolist()) for attack in attacks}) == 12
    assert len({attack.start[0][0, 0].item() for attack in attacks}) == 12
    assert all(attack.start[1].abs().max() == 0 for attack in attacks)


@pytest.mark.parametrize(("count", "available"), [(1, "available: 1"), (0, "do not contain")])
def test_too_few_harmful_rows_are_refused(count: int, available: str) -> None:
    training = stage(pools=Pools(paired=POOLS.paired[:count]))
    with pytest.raises(BadInput, match=available):
        TAR(inner=2, every=2).gradient(training, tiny.batch())


def test_a_sum_without_terms_is_refused() -> None:
    with pytest.raises(BadInput, match="inner"):
        TAR(inner=3, every=4)
    TAR(inner=4, every=4)


# ---------------------------------------------------------------------------------------------------------------------
# Unchanged parameters, frozen parameters, dropout


@pytest.mark.parametrize("adversary", ["second", "same"])
def test_parameters_and_gradients_are_bit_identical_after_the_gradient(adversary: Adversary) -> None:
    training = stage()
    parameters = list(training.trainable.values())
    for parameter in parameters[1:]:
        parameter.grad = torch.full_like(parameter, 2.0)  # of an earlier micro-batch
    initial = training.values()
    TAR(inner=4, every=2, rate=0.1, adversary=adversary).gradient(training, tiny.batch())
    assert same([parameter.detach() for parameter in parameters], initial)
    assert parameters[0].grad is None
    assert all(parameter.grad is not None and bool((parameter.grad == 2.0).all()) for parameter in parameters[1:])
    assert all(parameter.requires_grad for parameter in parameters)


@pytest.mark.parametrize("adversary", ["second", "same"])
def test_a_frozen_parameter_has_no_gradient(adversary: Adversary, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another defense may freeze a parameter: the attacker then does not move it."""
    training, batch = stage(), tiny.batch()
    attacks = record_attacks(training, monkeypatch)
    first = next(iter(training.trainable.values()))
    first.requires_grad_(False)
    initial, moved = first.detach().clone(), []
    training.model.register_forward_pre_hook(lambda *args: moved.append(not torch.equal(first, initial)))
    gradient = defense(adversary).gradient(training, batch)
    assert gradient.values[0] is None
    assert not any(moved)
    if adversary == "second":
        assert close(gradient.values[1:], expected(leaves(training), batch, attacks[0])[0][1:])


@pytest.mark.parametrize("adversary", ["second", "same"])
def test_the_attacker_has_no_dropout_and_draws_no_random_numbers_of_the_step(adversary: Adversary) -> None:
    batch = tiny.batch()
    gradients = []
    for rate in (0.0, 0.5):
        training = stage(lora_dropout=rate)
        training.model.train()
        torch.manual_seed(5)
        plain = training.gradient(batch)
        state = torch.get_rng_state()
        torch.manual_seed(5)
        total = TAR(lam=2.0, inner=4, every=2, adversary=adversary).gradient(training, batch)
        assert torch.equal(torch.get_rng_state(), state)
        assert training.model.training
        gradients.append((total - plain).values)
    assert close(gradients[0], gradients[1])


def test_an_interrupted_stage_gives_the_same_result(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"batch": 3, "accumulation": 2}
    resistant = TAR(inner=1, every=1)
    complete = run_stage(resistant, tmp_path / "complete", **changes)
    with pytest.raises(KeyboardInterrupt):
        run_stage(interrupting(resistant, "gradient", 6), tmp_path / "cut", salt=1, **changes)
    assert list((tmp_path / "cut").glob("checkpoint-*"))
    assert_same(run_stage(resistant, tmp_path / "cut", salt=2, **changes), complete)


# ---------------------------------------------------------------------------------------------------------------------
# The second adapter


def random_values(factors: Sequence[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(9)
    return [0.2 * torch.randn(factor.shape, generator=generator) for factor in factors]


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2"])
def test_it_equals_a_second_adapter_of_peft(architecture: str) -> None:
    """Logits, and the gradients of both adapters; the second one has another rank and scale than the trained one."""
    training, batch = stage(tiny.model(architecture)), tiny.batch()
    names, first = list(training.factors), [tensor for pair in training.factors.values() for tensor in pair]
    training.settings = tiny.settings(lora_rank=3, lora_alpha=15)
    with second_adapter(training, "second") as second:
        with torch.no_grad():
            for factor, value in zip(second, random_values(second), strict=True):
                factor.copy_(value)
        logits = training.output(batch).logits
        slopes = torch.autograd.grad(training.loss(batch), [*first, *second])

    base = tiny.model(architecture)
    options: Any = {
        "target_modules": list(tiny.targets(architecture)),
        "fan_in_fan_out": architecture == "gpt2",
    }
    model: Any = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, **options), adapter_name="first")
    model.add_adapter("second", LoraConfig(r=3, lora_alpha=15, **options))
    model.base_model.set_adapter(["first", "second"])
    theirs: dict[str, list[Any]] = {"first": [], "second": []}
    ours: dict[str, Sequence[Tensor]] = {"first": first, "second": second}
    for adapter, values in ours.items():
        for module, a, b in zip(names, values[::2], values[1::2], strict=True):
            layer: Any = base.get_submodule(module)
            with torch.no_grad():
                layer.lora_A[adapter].weight.copy_(a)
                layer.lora_B[adapter].weight.copy_(b)
            theirs[adapter] += [layer.lora_A[adapter].weight, layer.lora_B[adapter].weight]
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert close(logits, output[:, :-1][response_mask(batch)])
    assert close(
        list(slopes), list(torch.autograd.grad(cross_entropy(model, batch), [*theirs["first"], *theirs["second"]]))
    )
    assert not close(logits, training.output(batch).logits, 1e-2)


def test_it_starts_as_a_new_adapter_of_peft() -> None:
    """B = 0, so the model is unchanged; A is uniform between -1 and 1 over the root of the inputs."""
    training, batch = stage(lora_rank=16), tiny.batch()
    alone = training.output(batch).logits
    with second_adapter(training, "second") as second:
        assert torch.equal(training.output(batch).logits, alone)
        assert all(factor.is_leaf and factor.dtype == torch.float32 for factor in second)
        assert all(factor.abs().max() == 0 for factor in second[1::2])
        a = torch.cat([factor.detach() for factor in second[::2]])
    bound = 1 / math.sqrt(64)
    assert 0.99 * bound < a.abs().max() <= bound
    assert a.mean().abs() < 0.05 * bound
    assert a.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    for change, equal in (({}, True), ({"step": 2}, False), ({"micro": 1}, False)):
        for name, value in change.items():
            setattr(training, name, value)
        with second_adapter(training, "second") as again:
            assert torch.equal(torch.cat([factor.detach() for factor in again[::2]]), a) == equal


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_remains_after_the_block(fails: bool) -> None:
    """The hooks are removed, also after an error; the base and the trained adapter are bit-identical."""
    training, batch = stage(), tiny.batch()
    alone = training.output(batch).logits
    weights = {name: value.clone() for name, value in training.model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in training.model.parameters()]
    try:
        with second_adapter(training, "second") as second:
            optimizer = torch.optim.SGD(second, lr=1.0)
            for _ in range(2):
                optimizer.zero_grad()
                training.loss(batch).backward(inputs=second)
                optimizer.step()
            assert not close(training.output(batch).logits, alone, 1e-2)
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert torch.equal(training.output(batch).logits, alone)
    assert not any(module._forward_hooks for module in training.model.modules())
    state = training.model.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], value) for name, value in weights.items())
    assert [parameter.requires_grad for parameter in training.model.parameters()] == flags
    assert all(parameter.grad is None for parameter in training.model.parameters())

"""T-Vaccine compared with its equations in plain PyTorch, and the schedule of its layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.defenses.sft import SFT
from harmbench_vaccine.defenses.tvaccine import TVaccine
from harmbench_vaccine.defenses.vaccine import Vaccine
from harmbench_vaccine.plugins import Defense, Pools
from harmbench_vaccine.plugins.teams import DefenseTeam
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage
from harmbench_vaccine.training.trainer import train
from support import tiny
from support.autograd import cross_entropy
from support.compare import close, same
from support.hooks import applied_shifts, decoder_layers, hooked, recorded_rows
from support.optimizers import assert_equal_where_firm, plain_adamw
from support.trainer import assert_same, interrupting

LAYERS = 3
POOLS = tiny.example_pools()
TARGETS = ("q_proj", "v_proj", "o_proj", "up_proj")


def settings(**changes: Any) -> Any:
    return tiny.settings(**{"lora_targets": TARGETS, **changes})


def stage(pools: Pools = POOLS, base: Any = None, **changes: Any) -> TrainingStage:
    """Return a three-layer alignment stage at its first step, with nonzero adapters of attention and MLP."""
    result, _ = tiny.stage(
        base or tiny.model(num_hidden_layers=LAYERS), trained_with=settings(**changes), stirred=True, pools=pools
    )
    result.step, result.steps = 1, 10
    return result


def layer_of(name: str) -> int:
    """Return the layer of a parameter: `...layers.2.self_attn...` -> 2."""
    return int(name.split(".layers.")[1].split(".")[0])


def fix_importance(monkeypatch: pytest.MonkeyPatch, *weights: float) -> None:
    """Replace the importance with fixed weights."""
    monkeypatch.setattr(TVaccine, "importance", staticmethod(lambda stage: torch.tensor(weights)))


def sampling(
    monkeypatch: pytest.MonkeyPatch, training: TrainingStage, chosen: Sequence[int], rho: float = 3.0
) -> TVaccine:
    """Return a T-Vaccine that has sampled these layers, because all other layers have weight 0."""
    fix_importance(monkeypatch, *(float(number in chosen) for number in range(LAYERS)))
    defense = TVaccine(rho=rho, gamma=len(chosen))
    defense.before_step(training)
    return defense


def expected_gradient(
    stage: TrainingStage, batch: Batch, chosen: Sequence[int], rho: float, seed: int = 0
) -> list[Tensor | None]:
    """Compute the gradient of Vaccine over the layers in S; None for a parameter of another layer."""
    model = stage.model
    free = [parameter.requires_grad for parameter in stage.trainable.values()]
    for parameter in stage.trainable.values():
        parameter.requires_grad_(True)
    hidden: dict[int, Tensor] = {}
    torch.manual_seed(seed)
    with hooked(model, lambda number, output: hidden.update({number: output})):
        gradients = torch.autograd.grad(cross_entropy(model, batch), [hidden[number] for number in chosen])
    gradients = [gradient_l * batch["attention_mask"][..., None] for gradient_l in gradients]  # type: ignore[assignment]
    norm = torch.sqrt(sum((gradient_l**2).sum() for gradient_l in gradients))  # type: ignore[arg-type]
    shift = {number: rho * gradient_l / (norm + 1e-7) for number, gradient_l in zip(chosen, gradients, strict=True)}
    torch.manual_seed(seed)
    with hooked(model, lambda number, output: output + shift[number] if number in chosen else None):
        values = torch.autograd.grad(cross_entropy(model, batch), list(stage.trainable.values()))
    for parameter, flag in zip(stage.trainable.values(), free, strict=True):
        parameter.requires_grad_(flag)
    return [value if layer_of(name) in chosen else None for name, value in zip(stage.trainable, values, strict=True)]


def run_stage(
    defense: Defense, folder: Path, salt: int = 0, **changes: Any
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Train 10 steps with new objects and return the adapter and the log."""
    torch.manual_seed(salt)
    train_settings = settings(**{"lora_dropout": 0.1, "weight_decay": 0.1, **changes})
    training, _ = tiny.stage(
        tiny.model(num_hidden_layers=LAYERS), trained_with=train_settings, stirred=True, pools=POOLS
    )
    log = train(training, defense, tiny.rows(20), train_settings, folder, pad=tiny.PAD)
    return {name: value.detach().clone() for name, value in training.trainable.items()}, log


# ---------------------------------------------------------------------------------------------------------------------
# Comparison with the equations


@pytest.mark.parametrize("chosen", [(0,), (2,), (0, 2), (1, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("rho", [0.5, 3.0])
def test_gradient_equals_plain_autograd(chosen: tuple[int, ...], rho: float, monkeypatch: pytest.MonkeyPatch) -> None:
    training, batch = stage(), tiny.batch()
    defense = sampling(monkeypatch, training, chosen, rho)
    expected = expected_gradient(training, batch, chosen, rho)
    gradient = defense.gradient(training, batch)
    assert close(gradient, expected)
    assert not close(training.gradient(batch), expected, 1e-2)  # the perturbation is large enough to test
    assert not gradient.loss.requires_grad
    assert all(parameter.grad is None for parameter in training.trainable.values())


@pytest.mark.parametrize("rho", [0.1, 3.0])
def test_norm_of_the_perturbation_over_the_chosen_layers_is_rho(rho: float, monkeypatch: pytest.MonkeyPatch) -> None:
    training = stage()
    defense = sampling(monkeypatch, training, (0, 2), rho)
    with applied_shifts(training.model) as passes:
        defense.gradient(training, tiny.batch())
    assert len(passes) == 2
    assert torch.stack(passes[0]).norm() < 1e-5  # the first pass has no shift
    first, second, third = passes[1]
    assert torch.stack([first, third]).norm().item() == pytest.approx(rho, rel=1e-4)
    assert min(first.norm(), third.norm()) > 1e-3 * rho
    assert second.norm() < 1e-5


@pytest.mark.parametrize("accumulation", [1, 2])
def test_three_optimizer_steps_equal_plain_adamw(accumulation: int, tmp_path: Path) -> None:
    """Every step samples new layers; neither momentum nor weight decay changes a parameter of another layer."""
    changes: dict[str, Any] = {"epochs": 1, "accumulation": accumulation, "lr": 1e-3, "weight_decay": 0.1}
    train_settings = settings(**changes, schedule="constant", warmup=0.0)
    training, _ = tiny.stage(
        tiny.model(num_hidden_layers=LAYERS), trained_with=train_settings, stirred=True, pools=POOLS
    )
    batches: list[tuple[list[int], Batch]] = []

    class RecordingTVaccine(TVaccine):
        def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
            batches.append((self._chosen, batch))
            return super().gradient(stage, batch)

    defense = RecordingTVaccine(rho=3.0, gamma=2, interval=1)
    train(training, defense, tiny.rows(12 * accumulation), train_settings, tmp_path, pad=tiny.PAD)
    assert len(batches) == 3 * accumulation
    assert len({tuple(chosen) for chosen, _ in batches}) > 1  # so a parameter is frozen between two of its steps

    twin, _ = tiny.stage(tiny.model(num_hidden_layers=LAYERS), trained_with=train_settings, stirred=True)

    def mean(numbers: Sequence[int]) -> list[Tensor | None]:
        micro = [expected_gradient(twin, batches[n][1], batches[n][0], 3.0) for n in numbers]
        return [
            None if gradients[0] is None else torch.stack(gradients).mean(0) for gradients in zip(*micro, strict=True)
        ]  # type: ignore[arg-type]

    steps = [range(start, start + accumulation) for start in range(0, 3 * accumulation, accumulation)]
    firm = plain_adamw(twin, [lambda numbers=numbers: mean(numbers) for numbers in steps])
    assert_equal_where_firm(training, twin, firm)


@pytest.mark.parametrize("gamma", [LAYERS, 1000])
def test_all_layers_equal_vaccine_bit_for_bit_with_dropout(gamma: int, tmp_path: Path) -> None:
    vaccine = run_stage(Vaccine(rho=2.0), tmp_path / "vaccine")
    assert_same(run_stage(TVaccine(rho=2.0, gamma=gamma, interval=3, refresh=4), tmp_path / "all"), vaccine)
    fewer_layers = run_stage(TVaccine(rho=2.0, gamma=LAYERS - 1), tmp_path / "some")
    assert not same(list(fewer_layers[0].values()), list(vaccine[0].values()))


def test_all_layers_and_rho_0_equal_sft_bit_for_bit_with_dropout(tmp_path: Path) -> None:
    sft = run_stage(SFT(), tmp_path / "sft")
    neutral = TVaccine.neutral
    assert neutral is not None
    assert_same(run_stage(TVaccine(**neutral), tmp_path / "neutral"), sft)


def test_both_passes_see_the_same_dropout_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    training, batch = stage(lora_dropout=0.3), tiny.batch()
    training.model.train()
    defense = sampling(monkeypatch, training, (0, 2))
    torch.manual_seed(5)
    gradient = defense.gradient(training, batch)
    assert close(gradient, expected_gradient(training, batch, (0, 2), 3.0, seed=5))
    assert not close(gradient, expected_gradient(training, batch, (0, 2), 3.0, seed=6), 1e-2)


# ---------------------------------------------------------------------------------------------------------------------
# Frozen layers


def test_frozen_layers_do_not_change_even_with_weight_decay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fix_importance(monkeypatch, 1.0, 1.0, 1.0)
    records: list[tuple[int, list[int], set[int]]] = []

    class RecordingTVaccine(TVaccine):
        _before: Any = None

        def before_step(self, stage: TrainingStage) -> None:
            super().before_step(stage)
            self._before = {name: value.detach().clone() for name, value in stage.trainable.items()}

        def after_step(self, stage: TrainingStage) -> None:
            changed = {
                name for name, value in stage.trainable.items() if not torch.equal(value.detach(), self._before[name])
            }
            chosen = {name for name in stage.trainable if layer_of(name) in self._chosen}
            records.append((stage.step, self._chosen, changed ^ chosen))

    defense = RecordingTVaccine(gamma=1, interval=1)
    run_stage(
        defense, tmp_path, weight_decay=0.5, warmup=0.0, schedule="constant"
    )  # with a warmup the first learning rate would be 0
    assert [step for step, _, _ in records] == list(range(1, 11))
    assert {tuple(chosen) for _, chosen, _ in records} == {
        (0,),
        (1,),
        (2,),
    }  # every layer is sampled, and frozen in another step
    assert all(
        not wrong for _, _, wrong in records
    )  # all of the sampled layer changes, including its MLP, and nothing else


def test_a_parameter_outside_the_layers_is_always_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    training = stage(lora_targets=(*TARGETS, "lm_head"))
    defense = sampling(monkeypatch, training, (1,))
    for name, value in zip(training.trainable, defense.gradient(training, tiny.batch()).values, strict=True):
        assert (value is not None) == ("lm_head" in name or layer_of(name) == 1), name


class Mixer(nn.Module):
    """A replacement for attention in a layer of a hybrid model; it takes no attention mask."""

    def __init__(self) -> None:
        super().__init__()
        self.o_proj = nn.Linear(64, 64, bias=False)

    def forward(self, hidden_states: Tensor, **more: Any) -> tuple[Tensor, None]:
        return self.o_proj(hidden_states), None


def test_blocks_map_to_their_layer_if_another_layer_has_no_attention() -> None:
    # The importance counts attention blocks, and `stage.layers` counts decoder layers. Layer 0 has no attention here,
    # so block 0 is in layer 1: with gamma=2, layers 1 and 2 are perturbed and trained.
    base = tiny.model(num_hidden_layers=LAYERS)
    base.model.layers[0].self_attn = Mixer()
    training = stage(base=base)
    defense = TVaccine(gamma=2)
    defense.before_step(training)
    with applied_shifts(training.model) as passes:
        defense.gradient(training, tiny.batch())
    assert [bool(shift.norm() > 1e-3) for shift in passes[1]] == [False, True, True]
    trained_layers = {layer_of(name) for name, value in training.trainable.items() if value.requires_grad}
    assert trained_layers >= {1, 2}


# ---------------------------------------------------------------------------------------------------------------------
# The importance


def importance_by_hand(stage: TrainingStage, harmful: Batch) -> Tensor:
    """Compute ||dL/dh_l|| over the real tokens, as a share of the sum, without dropout."""
    hidden: dict[int, Tensor] = {}
    training = stage.model.training
    stage.model.eval()
    with hooked(stage.model, lambda number, output: hidden.update({number: output})):
        gradients = torch.autograd.grad(cross_entropy(stage.model, harmful), list(hidden.values()))
    stage.model.train(training)
    norms = [torch.sqrt(((gradient * harmful["attention_mask"][..., None]) ** 2).sum()) for gradient in gradients]
    return torch.stack(norms) / sum(norms)


def test_importance_is_the_share_of_each_layer_in_the_harmful_gradient_norms() -> None:
    """Also if earlier steps froze layers, and with dropout."""
    training = stage(lora_dropout=0.3)
    training.model.train()
    defense = TVaccine(gamma=1, interval=1, refresh=1)
    importances = []
    for training.step in (1, 2):
        harmful = training.stream("harmful", POOLS.harmful)
        defense.before_step(training)
        importance = defense.state()["importance"]
        assert importance.shape == (LAYERS,)
        assert importance.sum().item() == pytest.approx(1, abs=1e-6)
        torch.testing.assert_close(importance, importance_by_hand(training, harmful), atol=1e-5, rtol=0)
        importances.append(importance)
    assert importances[0].max() - importances[0].min() > 0.01
    assert not torch.allclose(importances[0], importances[1], atol=1e-3)  # other rows


def test_importance_uses_one_pass_over_harmful_rows_and_has_no_side_effect() -> None:
    training = stage(lora_dropout=0.3)
    training.model.train()
    torch.manual_seed(3)
    random_state = torch.get_rng_state()
    with recorded_rows(training.model) as passes:
        TVaccine(gamma=1).before_step(training)
    [rows] = passes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert training.model.training
    assert all(parameter.grad is None for parameter in training.trainable.values())
    assert len(rows) == training.settings.batch
    pool = [row.ids for row in tiny.encode(POOLS.harmful)]
    assert all(row in pool for row in rows)


def test_a_gradient_at_a_padding_position_has_no_effect() -> None:
    importances = []
    for size in (0.0, 1e3):
        training = stage(base=tiny.model(num_hidden_layers=LAYERS, attn_implementation="eager"))  # runs on padded rows
        padding = (1 - training.stream("harmful", POOLS.harmful)["attention_mask"])[..., None].float()
        assert padding.sum() > 0

        def inject(module: Any, args: Any, size: float = size, padding: Tensor = padding) -> Any:
            # Inject into the output of the first block: no attention below it can carry the gradient to real tokens.
            hidden = args[0] * 1.0
            hidden.register_hook(lambda gradient: gradient + size * padding)
            return (hidden,)

        decoder_layers(training.model)[0].post_attention_layernorm.register_forward_pre_hook(inject)
        importances.append(TVaccine.importance(training))
    torch.testing.assert_close(importances[1], importances[0])


def test_missing_harmful_rows_are_refused() -> None:
    with pytest.raises(BadInput):
        TVaccine().before_step(stage(pools=Pools()))


# ---------------------------------------------------------------------------------------------------------------------
# The samples and the schedule


def test_layers_are_sampled_without_replacement_with_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """P{i, j} = p_i p_j / (1 - p_i) + p_j p_i / (1 - p_j): one layer by p, then a second by the remaining weights."""
    p = (0.6, 0.3, 0.1)
    fix_importance(monkeypatch, *p)
    training, counts, times = stage(), Counter[tuple[int, ...]](), 4000
    defense = TVaccine(gamma=2, interval=1, refresh=times)
    for training.step in range(1, times + 1):
        defense.before_step(training)
        counts[tuple(defense.state()["chosen"].tolist())] += 1
    assert counts.keys() == {(0, 1), (0, 2), (1, 2)}
    for i, j in counts:
        expected = p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j])
        deviation = (expected * (1 - expected) / times) ** 0.5
        # With probabilities in proportion to p_i p_j, as in rejection sampling, {0, 1} would be 5 deviations off.
        assert abs(counts[i, j] / times - expected) < 3 * deviation, (i, j)


def test_importance_and_layers_follow_their_schedules(monkeypatch: pytest.MonkeyPatch) -> None:
    """refresh = 4 updates at steps 1, 5, 9; interval = 3 samples at 1, 4, 7, 10, each with the last importance."""
    training, updates = stage(), []

    def update(stage: TrainingStage) -> Tensor:
        updates.append(stage.step)
        return torch.eye(LAYERS)[stage.step % LAYERS]  # 1 -> layer 1, 5 -> layer 2, 9 -> layer 0

    monkeypatch.setattr(TVaccine, "importance", staticmethod(update))
    defense, chosen = TVaccine(gamma=1, interval=3, refresh=4), []
    for training.step in range(1, 11):
        defense.before_step(training)
        chosen += defense.state()["chosen"].tolist()
    assert updates == [1, 5, 9]
    assert chosen == [1, 1, 1, 1, 1, 1, 2, 2, 2, 0]


def test_layers_change_only_when_they_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    fix_importance(monkeypatch, 1.0, 1.0, 1.0)
    training, chosen = stage(), []
    defense = TVaccine(gamma=1, interval=5)
    for training.step in range(1, 101):
        defense.before_step(training)
        chosen.append(defense.state()["chosen"].item())
        trained_layers = {layer_of(name) for name, value in training.trainable.items() if value.requires_grad}
        assert trained_layers == {chosen[-1]}
    periods = [chosen[start : start + 5] for start in range(0, 100, 5)]
    assert all(len(set(period)) == 1 for period in periods)
    assert {period[0] for period in periods} == {0, 1, 2}


# ---------------------------------------------------------------------------------------------------------------------
# Interruptions

SCHEDULE: dict[str, Any] = {
    "gamma": 1,
    "interval": 4,
    "refresh": 5,
}  # updates at steps 1, 6, 11; samples at steps 1, 5, 9, 13


@pytest.mark.parametrize("team", [False, True], ids=["alone", "team"])
@pytest.mark.parametrize(
    ("hook", "count", "changes"),
    [
        ("before_step", 8, {"epochs": 3}),  # from step 6: the next sample uses an earlier importance
        ("after_step", 12, {"epochs": 3}),  # from step 10, between two samples
        ("gradient", 14, {"epochs": 3, "accumulation": 2, "batch": 3}),  # between two micro-batches of step 7
    ],
)
def test_an_interrupted_stage_gives_the_same_result(
    hook: str, count: int, changes: dict[str, Any], team: bool, tmp_path: Path
) -> None:
    def make(interrupted: bool) -> Defense:
        defense = interrupting(TVaccine(**SCHEDULE), hook, count) if interrupted else TVaccine(**SCHEDULE)
        return DefenseTeam(members=(defense,)) if team else defense

    complete = run_stage(make(False), tmp_path / "complete", **changes)
    with pytest.raises(KeyboardInterrupt):
        run_stage(make(True), tmp_path / "cut", salt=1, **changes)
    assert len(list((tmp_path / "cut").glob("checkpoint-*"))) == 1
    assert_same(run_stage(make(False), tmp_path / "cut", salt=2, **changes), complete)


def test_state_is_restored_between_two_samples() -> None:
    training = stage()
    first = TVaccine(**SCHEDULE)
    for training.step in range(1, 7):
        first.before_step(training)
    second = TVaccine(**SCHEDULE)
    second.restore({key: value.clone() for key, value in first.state().items()})
    assert torch.equal(second._importance, first._importance)
    assert second._chosen == first._chosen
    for training.step in range(7, 15):
        frozen = []
        for defense in (first, second):
            defense.before_step(training)
            frozen.append([parameter.requires_grad for parameter in training.trainable.values()])
        assert frozen[0] == frozen[1]

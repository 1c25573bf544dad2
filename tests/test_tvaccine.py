"""T-Vaccine against its equations in plain PyTorch, and the clock of its layers."""

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
from support.hooks import applied_shifts, decoder_layers, hooked
from support.optimizers import assert_equal_where_firm, plain_adamw
from support.trainer import assert_same, interrupting

LAYERS = 3
POOLS = tiny.example_pools()
TARGETS = ("q_proj", "v_proj", "o_proj", "up_proj")


def settings(**changes: Any) -> Any:
    return tiny.settings(**{"lora_targets": TARGETS, **changes})


def stage(pools: Pools = POOLS, base: Any = None, **changes: Any) -> TrainingStage:
    """The first step of an alignment stage of a model of three layers, attention and MLP adapted, away from zero."""
    made, _ = tiny.stage(
        base or tiny.model(num_hidden_layers=LAYERS), trained_with=settings(**changes), stirred=True, pools=pools
    )
    made.step, made.steps = 1, 10
    return made


def layer_of(name: str) -> int:
    """`...layers.2.self_attn...` -> 2"""
    return int(name.split(".layers.")[1].split(".")[0])


def weigh(monkeypatch: pytest.MonkeyPatch, *weights: float) -> None:
    """Every look at the importance finds these weights."""
    monkeypatch.setattr(TVaccine, "importance", staticmethod(lambda stage: torch.tensor(weights)))


def choosing(monkeypatch: pytest.MonkeyPatch, made: TrainingStage, chosen: Sequence[int], rho: float = 3.0) -> TVaccine:
    """A T-Vaccine that has drawn these layers: the others have no weight."""
    weigh(monkeypatch, *(float(number in chosen) for number in range(LAYERS)))
    defense = TVaccine(rho=rho, gamma=len(chosen))
    defense.before_step(made)
    return defense


def rederived(
    stage: TrainingStage, batch: Batch, chosen: Sequence[int], rho: float, seed: int = 0
) -> list[Tensor | None]:
    """Vaccine's lines over the layers in S only; None where a parameter stands in another layer."""
    model = stage.model
    free = [parameter.requires_grad for parameter in stage.trainable.values()]
    for parameter in stage.trainable.values():
        parameter.requires_grad_(True)
    hidden: dict[int, Tensor] = {}
    torch.manual_seed(seed)
    with hooked(model, lambda number, output: hidden.update({number: output})):
        g = torch.autograd.grad(cross_entropy(model, batch), [hidden[number] for number in chosen])
    g = [each * batch["attention_mask"][..., None] for each in g]  # type: ignore[assignment]
    norm = torch.sqrt(sum((each**2).sum() for each in g))  # type: ignore[arg-type]
    shift = {number: rho * each / (norm + 1e-7) for number, each in zip(chosen, g, strict=True)}
    torch.manual_seed(seed)
    with hooked(model, lambda number, output: output + shift[number] if number in chosen else None):
        found = torch.autograd.grad(cross_entropy(model, batch), list(stage.trainable.values()))
    for parameter, was in zip(stage.trainable.values(), free, strict=True):
        parameter.requires_grad_(was)
    return [value if layer_of(name) in chosen else None for name, value in zip(stage.trainable, found, strict=True)]


def run(
    defense: Defense, folder: Path, salt: int = 0, **changes: Any
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """A stage of 10 steps from fresh objects: the adapter and the log."""
    torch.manual_seed(salt)
    with_ = settings(**{"lora_dropout": 0.1, "weight_decay": 0.1, **changes})
    made, _ = tiny.stage(tiny.model(num_hidden_layers=LAYERS), trained_with=with_, stirred=True, pools=POOLS)
    log = train(made, defense, tiny.rows(20), with_, folder, pad=tiny.PAD)
    return {name: value.detach().clone() for name, value in made.trainable.items()}, log


# ---------------------------------------------------------------------------------------------------------------------
# Against the equations


@pytest.mark.parametrize("chosen", [(0,), (2,), (0, 2), (1, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("rho", [0.5, 3.0])
def test_gradient_equals_plain_autograd(chosen: tuple[int, ...], rho: float, monkeypatch: pytest.MonkeyPatch) -> None:
    made, batch = stage(), tiny.batch()
    defense = choosing(monkeypatch, made, chosen, rho)
    expected = rederived(made, batch, chosen, rho)
    gradient = defense.gradient(made, batch)
    assert close(gradient, expected)
    assert not close(made.gradient(batch), expected, 1e-2)  # the perturbation matters here
    assert not gradient.loss.requires_grad
    assert all(parameter.grad is None for parameter in made.trainable.values())


@pytest.mark.parametrize("rho", [0.1, 3.0])
def test_norm_of_the_perturbation_over_the_chosen_layers_is_rho(rho: float, monkeypatch: pytest.MonkeyPatch) -> None:
    made = stage()
    defense = choosing(monkeypatch, made, (0, 2), rho)
    with applied_shifts(made.model) as passes:
        defense.gradient(made, tiny.batch())
    assert len(passes) == 2
    assert torch.stack(passes[0]).norm() < 1e-5  # the first pass only looks
    first, second, third = passes[1]
    assert torch.stack([first, third]).norm().item() == pytest.approx(rho, rel=1e-4)
    assert min(first.norm(), third.norm()) > 1e-3 * rho
    assert second.norm() < 1e-5


@pytest.mark.parametrize("accumulation", [1, 2])
def test_three_optimizer_steps_equal_plain_adamw(accumulation: int, tmp_path: Path) -> None:
    """Other layers at every step; a parameter of a layer left out meets neither momentum nor decay."""
    changes: dict[str, Any] = {"epochs": 1, "accumulation": accumulation, "lr": 1e-3, "weight_decay": 0.1}
    with_ = settings(**changes, schedule="constant", warmup=0.0)
    made, _ = tiny.stage(tiny.model(num_hidden_layers=LAYERS), trained_with=with_, stirred=True, pools=POOLS)
    batches: list[tuple[list[int], Batch]] = []

    class Watched(TVaccine):
        def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
            batches.append((self._chosen, batch))
            return super().gradient(stage, batch)

    watched = Watched(rho=3.0, gamma=2, interval=1)
    train(made, watched, tiny.rows(12 * accumulation), with_, tmp_path, pad=tiny.PAD)
    assert len(batches) == 3 * accumulation
    assert len({tuple(chosen) for chosen, _ in batches}) > 1  # so that a parameter is left out between two steps

    twin, _ = tiny.stage(tiny.model(num_hidden_layers=LAYERS), trained_with=with_, stirred=True)

    def mean(numbers: Sequence[int]) -> list[Tensor | None]:
        micro = [rederived(twin, batches[n][1], batches[n][0], 3.0) for n in numbers]
        return [None if each[0] is None else torch.stack(each).mean(0) for each in zip(*micro, strict=True)]  # type: ignore[arg-type]

    steps = [range(start, start + accumulation) for start in range(0, 3 * accumulation, accumulation)]
    firm = plain_adamw(twin, [lambda numbers=numbers: mean(numbers) for numbers in steps])
    assert_equal_where_firm(made, twin, firm)


@pytest.mark.parametrize("gamma", [LAYERS, 1000])
def test_all_layers_are_vaccine_bit_for_bit_with_dropout_on(gamma: int, tmp_path: Path) -> None:
    vaccine = run(Vaccine(rho=2.0), tmp_path / "vaccine")
    assert_same(run(TVaccine(rho=2.0, gamma=gamma, interval=3, refresh=4), tmp_path / "all"), vaccine)
    other = run(TVaccine(rho=2.0, gamma=LAYERS - 1), tmp_path / "some")
    assert not same(list(other[0].values()), list(vaccine[0].values()))


def test_all_layers_and_rho_0_are_sft_bit_for_bit_with_dropout_on(tmp_path: Path) -> None:
    sft = run(SFT(), tmp_path / "sft")
    neutral = TVaccine.neutral
    assert neutral is not None
    assert_same(run(TVaccine(**neutral), tmp_path / "neutral"), sft)


def test_both_passes_see_the_same_dropout_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    made, batch = stage(lora_dropout=0.3), tiny.batch()
    made.model.train()
    defense = choosing(monkeypatch, made, (0, 2))
    torch.manual_seed(5)
    gradient = defense.gradient(made, batch)
    assert close(gradient, rederived(made, batch, (0, 2), 3.0, seed=5))
    assert not close(gradient, rederived(made, batch, (0, 2), 3.0, seed=6), 1e-2)


# ---------------------------------------------------------------------------------------------------------------------
# Layers left out


def test_layers_left_out_do_not_move_even_with_weight_decay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weigh(monkeypatch, 1.0, 1.0, 1.0)
    moved: list[tuple[int, list[int], set[int]]] = []

    class Watched(TVaccine):
        _before: Any = None

        def before_step(self, stage: TrainingStage) -> None:
            super().before_step(stage)
            self._before = {name: value.detach().clone() for name, value in stage.trainable.items()}

        def after_step(self, stage: TrainingStage) -> None:
            changed = {
                name for name, value in stage.trainable.items() if not torch.equal(value.detach(), self._before[name])
            }
            chosen = {name for name in stage.trainable if layer_of(name) in self._chosen}
            moved.append((stage.step, self._chosen, changed ^ chosen))

    watched = Watched(gamma=1, interval=1)
    run(watched, tmp_path, weight_decay=0.5, warmup=0.0, schedule="constant")  # a warm-up would begin at rate 0
    assert [step for step, _, _ in moved] == list(range(1, 11))
    assert {tuple(chosen) for _, chosen, _ in moved} == {(0,), (1,), (2,)}  # each comes, and is left out again
    assert all(not wrong for _, _, wrong in moved)  # all of the chosen layer moves, its MLP too, and nothing else


def test_a_parameter_outside_the_layers_is_trained_always(monkeypatch: pytest.MonkeyPatch) -> None:
    made = stage(lora_targets=(*TARGETS, "lm_head"))
    defense = choosing(monkeypatch, made, (1,))
    for name, value in zip(made.trainable, defense.gradient(made, tiny.batch()).values, strict=True):
        assert (value is not None) == ("lm_head" in name or layer_of(name) == 1), name


class Mixer(nn.Module):
    """What stands in place of attention in the layers of a hybrid model: it takes no attention mask."""

    def __init__(self) -> None:
        super().__init__()
        self.o_proj = nn.Linear(64, 64, bias=False)

    def forward(self, hidden_states: Tensor, **more: Any) -> tuple[Tensor, None]:
        return self.o_proj(hidden_states), None


def test_blocks_are_numbered_by_their_layer_where_a_layer_has_no_attention() -> None:
    # FAILS: importance counts attention blocks, `stage.layers` counts decoder layers. Here layer 0 has no attention, so
    # block 0 is in layer 1: with gamma=2, both blocks are perturbed, but layers 0 and 1 trained and layer 2 frozen.
    base = tiny.model(num_hidden_layers=LAYERS)
    base.model.layers[0].self_attn = Mixer()
    made = stage(base=base)
    defense = TVaccine(gamma=2)
    defense.before_step(made)
    with applied_shifts(made.model) as passes:
        defense.gradient(made, tiny.batch())
    assert [bool(shift.norm() > 1e-3) for shift in passes[1]] == [False, True, True]
    free = {layer_of(name) for name, value in made.trainable.items() if value.requires_grad}
    assert free >= {1, 2}


# ---------------------------------------------------------------------------------------------------------------------
# The importance


def importance_by_hand(stage: TrainingStage, harmful: Batch) -> Tensor:
    """||dL/dh_l|| over the real tokens, as a share of the sum; without dropout."""
    hidden: dict[int, Tensor] = {}
    training = stage.model.training
    stage.model.eval()
    with hooked(stage.model, lambda number, output: hidden.update({number: output})):
        g = torch.autograd.grad(cross_entropy(stage.model, harmful), list(hidden.values()))
    stage.model.train(training)
    norms = [torch.sqrt(((each * harmful["attention_mask"][..., None]) ** 2).sum()) for each in g]
    return torch.stack(norms) / sum(norms)


def test_importance_is_the_share_of_each_layer_in_the_harmful_gradient_norms() -> None:
    """Also where the steps before have frozen layers and dropout is on."""
    made = stage(lora_dropout=0.3)
    made.model.train()
    defense = TVaccine(gamma=1, interval=1, refresh=1)
    seen = []
    for made.step in (1, 2):
        harmful = made.stream("harmful", POOLS.harmful)
        defense.before_step(made)
        found = defense.state()["importance"]
        assert found.shape == (LAYERS,)
        assert found.sum().item() == pytest.approx(1, abs=1e-6)
        torch.testing.assert_close(found, importance_by_hand(made, harmful), atol=1e-5, rtol=0)
        seen.append(found)
    assert seen[0].max() - seen[0].min() > 0.01
    assert not torch.allclose(seen[0], seen[1], atol=1e-3)  # other rows


def test_a_look_at_the_importance_takes_one_pass_over_harmful_rows_and_leaves_no_trace() -> None:
    made = stage(lora_dropout=0.3)
    made.model.train()
    rows: list[list[int]] = []

    def see(module: Any, args: Any, more: Any) -> None:
        rows.extend([token for token in row if token != tiny.PAD] for row in more["input_ids"].tolist())

    made.model.register_forward_pre_hook(see, with_kwargs=True)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    TVaccine(gamma=1).before_step(made)
    assert torch.equal(torch.get_rng_state(), before)
    assert made.model.training
    assert all(parameter.grad is None for parameter in made.trainable.values())
    assert len(rows) == made.settings.batch
    pool = [row.ids for row in tiny.encode(POOLS.harmful)]
    assert all(row in pool for row in rows)


def test_a_gradient_at_a_padding_position_does_not_count() -> None:
    found = []
    for size in (0.0, 1e3):
        made = stage()
        padding = (1 - made.stream("harmful", POOLS.harmful)["attention_mask"])[..., None].float()
        assert padding.sum() > 0

        def inject(module: Any, args: Any, size: float = size, padding: Tensor = padding) -> Any:
            # Into the first block's output, below which no attention could carry it on to real tokens.
            hidden = args[0] * 1.0
            hidden.register_hook(lambda gradient: gradient + size * padding)
            return (hidden,)

        decoder_layers(made.model)[0].post_attention_layernorm.register_forward_pre_hook(inject)
        found.append(TVaccine.importance(made))
    torch.testing.assert_close(found[1], found[0])


def test_without_harmful_rows_it_is_refused() -> None:
    with pytest.raises(BadInput):
        TVaccine().before_step(stage(pools=Pools()))


# ---------------------------------------------------------------------------------------------------------------------
# The draw and the clock


def test_layers_are_drawn_without_replacement_by_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """P{i, j} = p_i p_j / (1 - p_i) + p_j p_i / (1 - p_j): first one by p, then another by what is left."""
    p = (0.6, 0.3, 0.1)
    weigh(monkeypatch, *p)
    made, drawn, times = stage(), Counter[tuple[int, ...]](), 4000
    defense = TVaccine(gamma=2, interval=1, refresh=times)
    for made.step in range(1, times + 1):
        defense.before_step(made)
        drawn[tuple(defense.state()["chosen"].tolist())] += 1
    assert drawn.keys() == {(0, 1), (0, 2), (1, 2)}
    for i, j in drawn:
        expected = p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j])
        deviation = (expected * (1 - expected) / times) ** 0.5
        # With probabilities in proportion to p_i p_j, as rejection has it, {0, 1} would be 5 deviations off.
        assert abs(drawn[i, j] / times - expected) < 3 * deviation, (i, j)


def test_importance_and_layers_keep_their_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """refresh = 4 and interval = 3: looks at steps 1, 5, 9, draws at 1, 4, 7, 10, each by the last look."""
    made, looks = stage(), []

    def look(stage: TrainingStage) -> Tensor:
        looks.append(stage.step)
        return torch.eye(LAYERS)[stage.step % LAYERS]  # 1 -> layer 1, 5 -> layer 2, 9 -> layer 0

    monkeypatch.setattr(TVaccine, "importance", staticmethod(look))
    defense, chosen = TVaccine(gamma=1, interval=3, refresh=4), []
    for made.step in range(1, 11):
        defense.before_step(made)
        chosen += defense.state()["chosen"].tolist()
    assert looks == [1, 5, 9]
    assert chosen == [1, 1, 1, 1, 1, 1, 2, 2, 2, 0]


def test_layers_stay_between_two_draws_and_change_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    weigh(monkeypatch, 1.0, 1.0, 1.0)
    made, chosen = stage(), []
    defense = TVaccine(gamma=1, interval=5)
    for made.step in range(1, 101):
        defense.before_step(made)
        chosen.append(defense.state()["chosen"].item())
        free = {layer_of(name) for name, value in made.trainable.items() if value.requires_grad}
        assert free == {chosen[-1]}
    periods = [chosen[start : start + 5] for start in range(0, 100, 5)]
    assert all(len(set(period)) == 1 for period in periods)
    assert {period[0] for period in periods} == {0, 1, 2}


# ---------------------------------------------------------------------------------------------------------------------
# Interruptions

CLOCK: dict[str, Any] = {"gamma": 1, "interval": 4, "refresh": 5}  # looks at 1, 6, 11, draws at 1, 5, 9, 13


@pytest.mark.parametrize("team", [False, True], ids=["alone", "team"])
@pytest.mark.parametrize(
    ("hook", "count", "changes"),
    [
        ("before_step", 8, {"epochs": 3}),  # from step 6: the next draw is by a look before it
        ("after_step", 12, {"epochs": 3}),  # from step 10, between two draws
        ("gradient", 14, {"epochs": 3, "accumulation": 2, "batch": 3}),  # between two micro-batches of step 7
    ],
)
def test_an_interrupted_stage_ends_bit_equal(
    hook: str, count: int, changes: dict[str, Any], team: bool, tmp_path: Path
) -> None:
    def make(interrupted: bool) -> Defense:
        defense = interrupting(TVaccine(**CLOCK), hook, count) if interrupted else TVaccine(**CLOCK)
        return DefenseTeam(members=(defense,)) if team else defense

    whole = run(make(False), tmp_path / "whole", **changes)
    with pytest.raises(KeyboardInterrupt):
        run(make(True), tmp_path / "cut", salt=1, **changes)
    assert len(list((tmp_path / "cut").glob("checkpoint-*"))) == 1
    assert_same(run(make(False), tmp_path / "cut", salt=2, **changes), whole)


def test_state_comes_back_between_two_draws() -> None:
    made = stage()
    first = TVaccine(**CLOCK)
    for made.step in range(1, 7):
        first.before_step(made)
    second = TVaccine(**CLOCK)
    second.restore({key: value.clone() for key, value in first.state().items()})
    assert torch.equal(second._importance, first._importance)
    assert second._chosen == first._chosen
    for made.step in range(7, 15):
        frozen = []
        for defense in (first, second):
            defense.before_step(made)
            frozen.append([parameter.requires_grad for parameter in made.trainable.values()])
        assert frozen[0] == frozen[1]

"""SPPFT: the frozen layers, and its steps compared with AdamW in plain PyTorch without their parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.defenses.sppft import SPPFT
from harmbench_vaccine.plugins import Defense
from harmbench_vaccine.training.adapters import LoraStack
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage
from harmbench_vaccine.training.trainer import train
from support import tiny
from support.autograd import gradient_at
from support.hooks import decoder_layers
from support.optimizers import assert_equal_where_firm, plain_adamw
from support.trainer import assert_same, interrupting

TARGETS = ("q_proj", "v_proj", "down_proj")
SAFETY_LAYERS = {2, 3}
"""The layers l of 8 with 4 < 32 l / 8 < 15."""


def model(depth: int = 8) -> Any:
    return tiny.model(num_hidden_layers=depth)


def settings(**changes: Any) -> Any:
    return tiny.settings(**{"lora_targets": TARGETS, "weight_decay": 0.1, **changes})


def stage(depth: int = 8, **changes: Any) -> TrainingStage:
    """Return a user stage at its first step, with a nonzero adapter: that of the alignment in single topology."""
    result, _ = tiny.stage(model(depth), trained_with=settings(**changes), stirred=True, name="finetune")
    result.step, result.steps = 1, 10
    return result


def layer_of(name: str) -> int | None:
    """Return the layer of a parameter: `...layers.2.self_attn...` -> 2."""
    return int(name.partition(".layers.")[2].split(".")[0]) if ".layers." in name else None


def frozen_layers(stage: TrainingStage) -> set[int | None]:
    """Return the layers with frozen parameters; assert that no layer has parameters of both kinds."""
    layers: dict[bool, set[int | None]] = {True: set(), False: set()}
    for name, parameter in stage.trainable.items():
        layers[parameter.requires_grad].add(layer_of(name))
    assert not layers[True] & layers[False]
    return layers[False]


# ---------------------------------------------------------------------------------------------------------------------
# The frozen layers


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        (32, range(5, 15)),  # the authors' condition, 4 < l < 15
        (30, range(4, 15)),
        (24, range(4, 12)),
        (16, range(3, 8)),
        (8, sorted(SAFETY_LAYERS)),
        (3, [1]),
        (2, []),
    ],
)
def test_bounds_scale_with_the_depth(depth: int, expected: Any) -> None:
    training = stage(depth)
    SPPFT().before_step(training)
    assert frozen_layers(training) == set(expected)


@pytest.mark.parametrize(
    ("above", "below", "expected"),
    [(8.0, 16.0, {3}), (7.9, 16.1, {2, 3, 4}), (-1.0, 15.0, {0, 1, 2, 3}), (4.0, 32.0, set(range(2, 8)))],
)
def test_bounds_are_exclusive(above: float, below: float, expected: set[int]) -> None:
    training = stage()
    SPPFT(above=above, below=below).before_step(training)
    assert frozen_layers(training) == expected


def test_a_parameter_that_another_defense_froze_stays_frozen() -> None:
    training = stage()
    name, parameter = next(iter(training.trainable.items()))
    assert layer_of(name) == 0
    parameter.requires_grad_(False)
    SPPFT().before_step(training)
    assert not parameter.requires_grad


def test_freezing_every_parameter_is_refused(tmp_path: Path) -> None:
    training = stage()
    with pytest.raises(BadInput, match="freezes every trained parameter"):
        train(training, SPPFT(above=-1, below=32), tiny.rows(8), settings(), tmp_path, pad=tiny.PAD)


# ---------------------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("accumulation", [1, 2])
def test_three_optimizer_steps_equal_plain_adamw(accumulation: int, tmp_path: Path) -> None:
    """The frozen parameters have neither a gradient nor weight decay, and no share in the norm that is clipped."""
    changes: dict[str, Any] = {"epochs": 1, "accumulation": accumulation, "lr": 1e-3}
    constant = settings(**changes, schedule="constant", warmup=0.0)
    training = stage(3, **changes)  # with more layers, the gradients of too many entries are small
    initial = training.values()
    batches: list[Batch] = []

    class RecordingSPPFT(SPPFT):
        def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
            batches.append(batch)
            gradient = stage.gradient(batch)
            assert {layer_of(n) for n, v in zip(stage.trainable, gradient.values, strict=True) if v is None} == {1}
            return gradient

    train(training, RecordingSPPFT(), tiny.rows(12 * accumulation), constant, tmp_path, pad=tiny.PAD)
    assert len(batches) == 3 * accumulation
    frozen = [layer_of(name) == 1 for name in training.trainable]
    for is_frozen, start, value in zip(frozen, initial, training.values(), strict=True):
        assert torch.equal(start, value) == is_frozen  # to the bit, with weight decay

    twin = stage(3, **changes)

    def mean(first: int) -> list[Tensor | None]:
        micro = [gradient_at(twin, batch, twin.values()) for batch in batches[first : first + accumulation]]
        means = [torch.stack(values).mean(0) for values in zip(*micro, strict=True)]
        return [None if is_frozen else value for is_frozen, value in zip(frozen, means, strict=True)]

    starts = range(0, 3 * accumulation, accumulation)
    firm = plain_adamw(twin, [lambda first=first: mean(first) for first in starts])  # type: ignore[misc]
    assert_equal_where_firm(training, twin, firm)


def test_a_new_adapter_stays_zero_in_the_frozen_layers(tmp_path: Path) -> None:
    """In double topology, B of the user's adapter starts at 0."""
    training, stack = tiny.stage(model(), trained_with=settings(), name="finetune")
    train(training, SPPFT(), tiny.rows(8), settings(), tmp_path, pad=tiny.PAD)
    changed = {layer_of(f".{module}") for module, (_, b) in stack.trained().factors.items() if b.any()}
    assert changed == set(range(8)) - SAFETY_LAYERS


def test_the_backward_pass_stops_at_the_lowest_trained_layer() -> None:
    training = stage()
    SPPFT(above=-1, below=15).before_step(training)
    needs_gradient = []
    for layer in decoder_layers(training.model):
        layer.register_forward_hook(
            lambda module, args, output: needs_gradient.append(
                (output[0] if isinstance(output, tuple) else output).requires_grad
            )
        )
    training.gradient(tiny.batch())
    assert needs_gradient == 4 * [False] + 4 * [True]


def test_full_fine_tuning_keeps_every_weight_of_the_frozen_layers(tmp_path: Path) -> None:
    """Attention, MLP and norms; embeddings and head are not part of a layer, and are trained."""
    stack = LoraStack(model())
    full = settings(lr=1e-3, epochs=1, lora_targets=())
    training = TrainingStage("finetune", stack, stack.train_all_weights(), 7, full)
    initial = training.values()
    train(training, SPPFT(), tiny.rows(8), full, tmp_path, pad=tiny.PAD)
    names = list(training.trainable)
    assert any("layernorm" in name and layer_of(name) == 2 for name in names)
    assert {"embed_tokens", "lm_head"} <= {name.split(".")[-2] for name in names}
    for name, start, value in zip(names, initial, training.values(), strict=True):
        assert torch.equal(start, value) == (layer_of(name) in SAFETY_LAYERS), name


def test_an_interrupted_stage_gives_the_same_result(tmp_path: Path) -> None:
    """The checkpoint has no optimizer state of the frozen parameters."""

    def run_stage(defense: Defense, folder: Path, salt: int) -> tuple[dict[str, Tensor], list[Any]]:
        torch.manual_seed(salt)
        changes: dict[str, Any] = {"lora_dropout": 0.1, "accumulation": 2}
        training = stage(**changes)
        log = train(training, defense, tiny.rows(20), settings(**changes), folder, pad=tiny.PAD)
        return {name: value.detach().clone() for name, value in training.trainable.items()}, log

    complete = run_stage(SPPFT(), tmp_path / "complete", 0)
    with pytest.raises(KeyboardInterrupt):
        run_stage(interrupting(SPPFT(), "before_step", 4), tmp_path / "cut", 1)
    assert list((tmp_path / "cut").glob("checkpoint-*"))
    assert_same(run_stage(SPPFT(), tmp_path / "cut", 2), complete)

"""Operations of a training stage on its parameters, and the inner product of gradients."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor

from harmbench_vaccine.training.adapters import LoraStack
from harmbench_vaccine.training.stage import Gradient, TrainingStage
from support import tiny
from support.compare import same
from support.hooks import decoder_layers


def random_values(stage: TrainingStage, seed: int) -> list[Tensor]:
    """Draw values for all parameters."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(parameter.shape, generator=generator) for parameter in stage.trainable.values()]


def gradient(*values: Tensor | None) -> Gradient:
    return Gradient(torch.zeros(()), values)


# ---------------------------------------------------------------------------------------------------------------------
# Parameters


def test_set_values_copies_into_the_parameters() -> None:
    stage, _ = tiny.stage(stirred=True)
    parameters, values = list(stage.trainable.values()), random_values(stage, 1)
    stage.set_values(values)
    assert same(stage.values(), values)
    expected = [value.clone() for value in values]
    for value in values:
        value.zero_()  # the parameters do not share memory with the values
    assert same(stage.values(), expected)
    assert all(new is old for new, old in zip(stage.trainable.values(), parameters, strict=True))
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in parameters)


def test_set_values_refuses_another_number_of_tensors() -> None:
    stage, _ = tiny.stage(stirred=True)
    with pytest.raises(ValueError, match="shorter"):
        stage.set_values(random_values(stage, 1)[:-1])


@pytest.mark.parametrize("failing", [False, True], ids=["", "exception"])
@pytest.mark.parametrize("moves", [False, True], ids=["restored", "moved_to"])
def test_the_exact_values_are_restored(moves: bool, failing: bool) -> None:
    """Also after steps inside the block, whose rounding a subtraction of the change would keep."""
    stage, _ = tiny.stage(stirred=True)
    initial, values = stage.values(), random_values(stage, 1)
    block: AbstractContextManager[None] = stage.moved_to(values) if moves else stage.restored()

    def work() -> None:
        with block:
            assert same(stage.values(), values if moves else initial)
            with torch.no_grad():
                for parameter in stage.trainable.values():
                    parameter.mul_(3).add_(0.1)
            assert not same(stage.values(), initial)
            if failing:
                raise KeyboardInterrupt

    if failing:
        with pytest.raises(KeyboardInterrupt):
            work()
    else:
        work()
    assert same(stage.values(), initial)
    assert same(values, random_values(stage, 1))


def test_moved_to_changes_the_loss_inside_the_block_only() -> None:
    stage, _ = tiny.stage(stirred=True)
    batch = tiny.batch()
    initial = stage.loss(batch).item()
    with stage.moved_to(random_values(stage, 1)):
        assert stage.loss(batch).item() != initial
    assert stage.loss(batch).item() == initial


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_factors_are_the_trainable_parameters_of_every_module(architecture: Any) -> None:
    stage, stack = tiny.stage(tiny.model(architecture), stirred=True)
    adapter = stack.trained()
    assert stage.factors.keys() == adapter.factors.keys()
    assert len(stage.factors) == 2 * len(tiny.targets(architecture))
    for module, (a, b) in stage.factors.items():
        assert stack.base.get_submodule(module)
        assert same([a, b], adapter.factors[module])
    owned = [id(parameter) for factors in stage.factors.values() for parameter in factors]
    assert sorted(owned) == sorted(map(id, stage.trainable.values()))


def test_full_fine_tuning_has_no_factors() -> None:
    stack = LoraStack(tiny.model())
    stage = TrainingStage("finetune", stack, stack.train_all_weights(), 0)
    assert len(decoder_layers(stage.model)) == 2
    assert not stage.factors


# ---------------------------------------------------------------------------------------------------------------------
# Inner product


def test_dot_is_the_inner_product_of_all_parameters() -> None:
    left = gradient(torch.tensor([1.0, 2.0]), torch.tensor([[3.0]]))
    right = gradient(torch.tensor([-4.0, 0.5]), torch.tensor([[2.0]]))
    assert left.dot(right).item() == right.dot(left).item() == 3.0
    assert left.dot(left).item() == pytest.approx(left.norm.item() ** 2)
    assert left.dot(right).shape == ()


def test_dot_skips_a_parameter_without_a_gradient() -> None:
    left = gradient(torch.tensor([1.0, 2.0]), None, torch.tensor([5.0]))
    right = gradient(torch.tensor([3.0, 4.0]), torch.tensor([100.0]), None)
    assert left.dot(right).item() == 11.0


def test_dot_of_bfloat16_is_summed_in_float32() -> None:
    """A sum in bfloat16 stops at 256: 256 + 1 is rounded to 256."""
    ones = gradient(torch.ones(1000, dtype=torch.bfloat16), torch.full((1,), 1.01, dtype=torch.bfloat16))
    product = ones.dot(ones)
    assert product.dtype == torch.float32
    assert product.item() == pytest.approx(1000 + float(torch.tensor(1.01).bfloat16()) ** 2, rel=1e-6)

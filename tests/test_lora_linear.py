"""The LoRA layer of the package, against peft's layer with the same weights and the same random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from harmbench_vaccine.training import lora_linear
from harmbench_vaccine.training.adapters import LoraStack
from harmbench_vaccine.training.lora_linear import LoraLinear
from harmbench_vaccine.training.stage import TrainingStage
from support import tiny
from support.autograd import peft_computation
from support.compare import close

TRAINED, FROZEN = "trained", "frozen"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lora_layer(
    inputs: int = 12, outputs: int = 10, *, rank: int = 3, dropout: float = 0.0, bias: bool = False, below: bool = False
) -> LoraLinear:
    """Return a layer with a trained adapter and, if `below`, a frozen one without dropout; all weights are random."""
    layer = LoraLinear(
        nn.Linear(inputs, outputs, bias=bias),
        TRAINED,
        LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout),
        r=rank,
        lora_alpha=2 * rank,
    )
    if below:
        layer.update_layer(FROZEN, 2, lora_alpha=3, config=LoraConfig(r=2, lora_alpha=3))
        layer.set_adapter([FROZEN, TRAINED])
    for number, (name, parameter) in enumerate(layer.named_parameters()):
        parameter.data = random(*parameter.shape, seed=number)
        parameter.requires_grad_(f".{TRAINED}." in name)
    return layer.train()


def results(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the layer's output, the gradients of its input and of its free parameters, and a later random number."""
    x = x.clone().requires_grad_()
    torch.manual_seed(3)
    y = layer(x)
    free = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    slopes = random(*y.shape, seed=8).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, *free], slopes), torch.rand(1)]


def assert_equals_peft(layer: LoraLinear, x: Tensor) -> None:
    outcome = results(layer, x)
    with peft_computation():
        reference = results(layer, x)
    assert len(outcome) == 3 + sum(parameter.requires_grad for parameter in layer.parameters())
    for actual, expected in zip(outcome, reference, strict=True):
        assert actual.dtype == expected.dtype
        assert (actual - expected).abs().sum() <= 1e-6 * expected.abs().sum()


# ---------------------------------------------------------------------------------------------------------------------
# One layer


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    sizes=st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 6)),
    dropout=st.sampled_from([0.0, 0.1, 0.5]),
    bias=st.booleans(),
    below=st.booleans(),
)
def test_output_and_gradients_equal_those_of_peft(
    shape: list[int], sizes: tuple[int, int, int], dropout: float, bias: bool, below: bool
) -> None:
    inputs, outputs, rank = sizes
    layer = lora_layer(inputs, outputs, rank=rank, dropout=dropout, bias=bias, below=below)
    assert_equals_peft(layer, random(*shape, inputs, seed=9))


@pytest.mark.parametrize("below", [False, True])
def test_output_and_gradients_equal_the_equations(below: bool) -> None:
    layer, x = lora_layer(bias=True, below=below), random(5, 12, seed=9)
    a, b = layer.lora_A[TRAINED].weight, layer.lora_B[TRAINED].weight
    weight = layer.base_layer.weight + 2.0 * b @ a
    if below:
        weight = weight + 1.5 * layer.lora_B[FROZEN].weight @ layer.lora_A[FROZEN].weight
    y, dx, da, db, _ = results(layer, x)
    g = random(5, 10, seed=8)
    assert close([y, dx], [x @ weight.T + layer.base_layer.bias, g @ weight], 1e-6)
    assert close([da, db], [2.0 * b.T @ g.T @ x, 2.0 * g.T @ x @ a.T], 1e-6)


@pytest.mark.parametrize("names", [[FROZEN], [TRAINED], [FROZEN, TRAINED]])
def test_output_without_a_graph_equals_that_of_peft(names: list[str]) -> None:
    """Answers are generated so: adapters are joined, and a trained one is read in every pass."""
    layer, x = lora_layer(bias=True, below=True).eval(), random(2, 5, 12, seed=9)
    with torch.no_grad():
        for number in range(3):
            layer._active_adapter = names if number else [TRAINED]
            with peft_computation():
                expected = layer(x)
            assert close([layer(x)], [expected], 1e-6)
            layer.lora_B[TRAINED].weight += 1.0


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_removes_this_share_of_the_inputs_of_the_adapter(rate: float) -> None:
    """With A = B = 1 and alpha = rank, the adapter adds exactly its dropped and rescaled input."""
    layer = lora_layer(64, 64, rank=64, dropout=rate)
    layer.scaling[TRAINED] = 1.0
    for factor in (layer.lora_A[TRAINED].weight, layer.lora_B[TRAINED].weight):
        factor.data = torch.eye(64)
    x = random(200, 64).abs() + 1
    added = layer(x) - layer.base_layer(x)
    dropped = added.abs() < 1e-3
    assert dropped.float().mean().item() == pytest.approx(rate, abs=0.02)
    torch.testing.assert_close(added[~dropped], x[~dropped] / (1 - rate), atol=1e-4, rtol=1e-4)
    layer.eval()
    torch.testing.assert_close(layer(x) - layer.base_layer(x), x, atol=1e-4, rtol=1e-4)


def test_disabled_adapters_leave_the_base_layer() -> None:
    layer, x = lora_layer(dropout=0.5, bias=True), random(4, 12)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.base_layer.weight, layer.base_layer.bias))
    layer.enable_adapters(True)
    layer.set_adapter([])
    assert torch.equal(layer(x), nn.functional.linear(x, layer.base_layer.weight, layer.base_layer.bias))


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_a_frozen_factor_has_no_gradient(frozen: str) -> None:
    layer = lora_layer(dropout=0.1)
    getattr(layer, frozen)[TRAINED].weight.requires_grad_(False)
    assert_equals_peft(layer, random(2, 3, 12))
    layer(random(2, 12)).sum().backward()
    gradients = {name: getattr(layer, name)[TRAINED].weight.grad for name in ("lora_A", "lora_B")}
    assert gradients.pop(frozen) is None
    assert all(gradient is not None for gradient in gradients.values())


def test_a_second_derivative_is_refused() -> None:
    layer = lora_layer()
    a = layer.lora_A[TRAINED].weight
    (gradient,) = torch.autograd.grad(layer(random(2, 12)).square().sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_checkpointing_draws_the_same_masks_again(dropout: float) -> None:
    layer, x = lora_layer(dropout=dropout), random(4, 12)
    checkpointed = nn.Module()
    checkpointed.layer, checkpointed.forward = layer, lambda x: checkpoint(layer, x, use_reentrant=False)
    for actual, expected in zip(results(checkpointed, x), results(layer, x), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_on_the_base_layer_run(register: str) -> None:
    layer, calls = lora_layer(), []
    getattr(layer.base_layer, register)(lambda *args: calls.append(1))
    assert_equals_peft(layer, random(2, 12))
    assert len(calls) == 2


# ---------------------------------------------------------------------------------------------------------------------
# bfloat16


@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_bfloat16_equals_float32_up_to_rounding(dropout: float, below: bool) -> None:
    """The values are those of the rounded weights and inputs; bfloat16 has 8 bits of mantissa."""
    layer, x = lora_layer(96, 80, rank=8, dropout=dropout, bias=True, below=below), random(30, 96).bfloat16()
    layer.base_layer.bfloat16()
    y, dx, da, db, later = results(layer, x)
    assert [value.dtype for value in (y, dx, da, db)] == [torch.bfloat16] * 2 + [torch.float32] * 2
    layer.base_layer.float()
    with peft_computation():
        expected = results(layer, x.float())
    for actual, exact in zip((y, dx, da, db), expected, strict=False):
        error = torch.linalg.vector_norm(actual.float() - exact)
        assert error < 2**-7 * torch.linalg.vector_norm(exact)
    assert torch.equal(later, expected[-1])


# ---------------------------------------------------------------------------------------------------------------------
# In models


ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "out_proj", "fc1", "fc2")
GPT2 = ("c_attn", "c_proj", "c_fc")


def stage_of(architecture: str, targets: Sequence[str], dropout: float = 0.1, **changes: Any) -> TrainingStage:
    """Return a training stage whose adapter changes those of the target modules that the architecture has."""
    base = tiny.model(architecture, **changes)
    names = {name.rpartition(".")[2] for name, _ in base.named_modules()}
    adapted = tuple(target for target in targets if target in names)
    stage, _ = tiny.stage(base, trained_with=tiny.settings(lora_dropout=dropout, lora_targets=adapted), stirred=True)
    stage.model.train()
    return stage


def assert_gradients_equal_peft(stage: TrainingStage) -> None:
    gradients = []
    batch = tiny.batch((8, 8, 8))  # without padding: for other rows, peft's dropout draws other numbers
    for _ in range(2):
        torch.manual_seed(5)
        gradients.append(stage.gradient(batch))
    with peft_computation():
        torch.manual_seed(5)
        reference = stage.gradient(batch)
    assert close(gradients[0].values, gradients[1].values, 0)
    assert close(gradients[0].values, list(reference.values), 1e-5)
    assert gradients[0].loss.item() == pytest.approx(reference.loss.item(), rel=1e-6)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_gradients_of_a_model_equal_those_of_peft(architecture: str, checkpointed: bool) -> None:
    stage = stage_of(architecture, GPT2 if architecture == "gpt2" else ALL)
    if checkpointed:
        stage.model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_gradients_equal_peft(stage)


@pytest.mark.parametrize("tied", [False, True])
def test_the_lm_head_is_a_target(tied: bool) -> None:
    stage = stage_of("llama", ("q_proj", "lm_head"), dropout=0.0, tie_word_embeddings=tied)
    assert isinstance(stage.stack.base.lm_head, LoraLinear)
    assert_gradients_equal_peft(stage)


@pytest.mark.parametrize("lengths", [(9, 5, 7), (8, 8, 8)])
def test_the_lm_head_draws_a_mask_for_the_response_tokens(lengths: tuple[int, ...]) -> None:
    """Its inputs are the response tokens, with and without padding in the batch."""
    stage, batch = stage_of("llama", ("lm_head",), dropout=0.3), tiny.batch(lengths)
    torch.manual_seed(1)
    first, second = stage.loss(batch), stage.loss(batch)
    assert first.isfinite()
    assert first != second


def test_layers_that_are_not_plain_linear_keep_the_computation_of_peft() -> None:
    def kinds(stack: LoraStack) -> set[type]:
        return {type(module) for module in stack.model.modules() if isinstance(module, Linear)}

    quantized = tiny.model()
    quantized.quantization_method = "bitsandbytes"
    cases = (
        (tiny.model(), "q_proj", LoraLinear),
        (tiny.model("gpt2"), "c_attn", Linear),
        (quantized, "q_proj", Linear),
    )
    for base, target, kind in cases:
        stack = LoraStack(base)
        stack.train((), tiny.settings(lora_targets=(target,)), 0)
        assert kinds(stack) == {kind}


# ---------------------------------------------------------------------------------------------------------------------
# Probes


def test_parameters_get_no_gradient_inside_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass to the probes multiplies no factor's gradient, and ends at the first block."""
    stage, products = stage_of("llama", ALL, dropout=0.0), []
    monkeypatch.setattr(lora_linear, "_product", lambda *args: products.append(1))
    next(iter(stage.trainable.values())).requires_grad_(False)  # as after a defense that freezes parameters
    before = [parameter.requires_grad for parameter in stage.model.parameters()]
    with stage.taps.probed() as probes:
        loss = stage.loss(tiny.batch())
        gradients = torch.autograd.grad(loss, probes, retain_graph=True)
        with pytest.raises(RuntimeError, match="does not require grad"):
            torch.autograd.grad(loss, list(stage.trainable.values()))
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    assert not products
    assert [parameter.requires_grad for parameter in stage.model.parameters()] == before
    with pytest.raises(ZeroDivisionError), stage.taps.probed():
        raise ZeroDivisionError
    assert [parameter.requires_grad for parameter in stage.model.parameters()] == before

"""Hidden-state taps on every architecture, against separate hooks on the output projections."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, LlamaConfig

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.defenses.random_vaccine import RandomVaccine
from harmbench_vaccine.defenses.sft import SFT
from harmbench_vaccine.defenses.vaccine import Vaccine
from harmbench_vaccine.plugins import Defense
from harmbench_vaccine.training.taps import Taps, attention_blocks
from support import tiny
from support.hooks import hooked, projections

SHAPE = (2, 3, 9, 64)  # layers x rows x length x width

every_architecture = pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@every_architecture
def test_one_attention_block_per_layer_in_order(architecture: str) -> None:
    model = tiny.model(architecture, num_hidden_layers=3)
    blocks = attention_blocks(model)
    assert len(blocks) == 3
    for block, projection in zip(blocks, projections(model), strict=True):
        assert projection in list(block.children())


@every_architecture
def test_recorded_outputs_are_the_block_outputs(architecture: str) -> None:
    model, batch, expected_outputs = tiny.model(architecture), tiny.batch(), []
    with (
        torch.no_grad(),
        hooked(model, lambda number, output: expected_outputs.append(output)),
        Taps(model).recorded() as outputs,
    ):
        model(**batch)
    assert len(outputs) == len(expected_outputs) == 2
    for output, expected in zip(outputs, expected_outputs, strict=True):
        assert torch.equal(output, expected)


@every_architecture
def test_shift_is_added_to_the_block_output(architecture: str) -> None:
    # Bit-equal to a shift directly after the projection: before Gemma's norm, and before any residual.
    model, batch, shifts = tiny.model(architecture), tiny.batch(), random(*SHAPE)
    with torch.no_grad():
        plain = model(**batch).logits
        with Taps(model).shifted(list(shifts)):
            shifted = model(**batch).logits
        with hooked(model, lambda number, output: output + shifts[number]):
            expected = model(**batch).logits
        assert torch.equal(shifted, expected)
        assert not torch.allclose(plain, expected, atol=1e-2)
        assert torch.equal(model(**batch).logits, plain)  # no hook remains


@every_architecture
def test_probe_gradient_is_the_gradient_of_the_output(architecture: str) -> None:
    model, batch, expected_outputs = tiny.model(architecture), tiny.batch(), {}

    def keep(number: int, output: Tensor) -> None:
        output.retain_grad()
        expected_outputs[number] = output

    with hooked(model, keep):
        model(**batch).loss.backward()
    model.requires_grad_(False)  # only the probes require a gradient
    with Taps(model).probed() as probes:
        gradients = torch.autograd.grad(model(**batch).loss, probes)
    assert not probes  # their memory is free
    for number, gradient in enumerate(gradients):
        assert gradient.shape == SHAPE[1:]
        torch.testing.assert_close(gradient, expected_outputs[number].grad, atol=1e-6, rtol=1e-4)
        assert gradient.norm() > 1e-3


@every_architecture
def test_probe_gradient_equals_a_finite_difference(architecture: str) -> None:
    model, batch = tiny.model(architecture).double(), tiny.batch()
    step = 1e-4 if architecture == "opt" else 1e-3  # OPT's ReLU has kinks; the other models normalize in float32
    direction = random(*SHAPE).double()

    def loss() -> Tensor:
        log_p = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
        return nn.functional.nll_loss(log_p[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())

    def at(distance: float) -> float:
        with torch.no_grad(), hooked(model, lambda number, output: output + distance * direction[number]):
            return loss().item()

    with Taps(model).probed() as probes:
        gradients = torch.stack(torch.autograd.grad(loss(), probes))
    slope = (gradients.double() * direction).sum().item()
    assert slope == pytest.approx((at(step) - at(-step)) / (2 * step), rel=1e-2)
    assert abs(slope) > 1e-4


@every_architecture
def test_hooks_are_removed_after_an_error(architecture: str) -> None:
    model = tiny.model(architecture)
    with pytest.raises(ZeroDivisionError), Taps(model).shifted(list(random(*SHAPE))):
        raise ZeroDivisionError
    assert not any(module._forward_hooks for module in model.modules())


@every_architecture
@pytest.mark.parametrize("defense", [SFT(), Vaccine(rho=2.0), RandomVaccine(variance=0.1)], ids=lambda d: d.name or "")
def test_gradient_checkpointing_gives_the_same_gradient(architecture: str, defense: Defense) -> None:
    gradients, passes = [], []
    # GPT-2 draws dropout masks in peft, which depend on the padding; a checkpointed model runs on padded rows.
    batch = tiny.batch((9, 9, 9) if architecture == "gpt2" else (9, 5, 7))
    for checkpointing in (False, True):
        settings = tiny.settings(lora_dropout=0.3, lora_targets=tiny.targets(architecture))
        stage, _ = tiny.stage(tiny.model(architecture), trained_with=settings, stirred=True)
        if checkpointing:
            stage.model.gradient_checkpointing_enable({"use_reentrant": False})
        stage.model.train()
        count = 0

        def tally(number: int, output: Tensor) -> None:
            nonlocal count
            count += 1

        torch.manual_seed(1)
        with hooked(stage.model, tally):
            gradients.append(defense.gradient(stage, batch).values)
        passes.append(count)
    assert passes[1] == 2 * passes[0]  # every block runs again in the backward pass
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, atol=1e-6, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Models that taps refuse, and models with several candidates


class Decoder(nn.Module):
    """A decoder with any `layers`."""

    def __init__(self, layers: list[nn.Module], depth: int) -> None:
        super().__init__()
        self.config = LlamaConfig(num_hidden_layers=depth)
        self.layers = nn.ModuleList(layers)


class Attention(nn.Module):
    def forward(self, hidden_states: Tensor, attention_mask: Any = None) -> Tensor:
        return hidden_states


def layer(*children: nn.Module) -> nn.Module:
    module = nn.Module()
    for number, child in enumerate(children):
        module.add_module(f"child{number}", child)
    return module


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Decoder([layer(nn.Linear(2, 2)) for _ in range(2)], depth=2), "No attention block found in Decoder"),
        (Decoder([layer(Attention()) for _ in range(3)], depth=2), "decoder of 2 layers"),
        (Decoder([], depth=2), "No attention block"),
        (Decoder([layer(Attention()), layer(Attention(), Attention())], depth=2), "Layer 1 of Decoder has 2 attention"),
    ],
    ids=["no attention", "another depth", "no layers", "two in a layer"],
)
def test_unrecognized_decoders_are_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Taps(model)


def test_layer_without_attention_is_skipped() -> None:
    hybrid = Decoder([layer(Attention()), layer(nn.Linear(2, 2)), layer(Attention())], depth=3)
    assert attention_blocks(hybrid) == [hybrid.layers[0].child0, hybrid.layers[2].child0]


def test_text_decoder_is_tapped_not_the_vision_tower() -> None:
    text = {**tiny.GEMMA, "num_hidden_layers": 2}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "image_size": 16,
        "patch_size": 8,
    }
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1))
    blocks = set(attention_blocks(model))
    assert blocks == {module.self_attn for module in model.model.language_model.layers}

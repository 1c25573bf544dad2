"""Hidden-state taps on every architecture, against hooks of the tests' own on the output projections."""

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
def test_there_is_one_block_for_each_layer_in_order(architecture: str) -> None:
    model = tiny.model(architecture, num_hidden_layers=3)
    blocks = attention_blocks(model)
    assert len(blocks) == 3
    for block, projection in zip(blocks, projections(model), strict=True):
        assert projection in list(block.children())


@every_architecture
def test_recorded_is_what_the_block_puts_out(architecture: str) -> None:
    model, batch, mine = tiny.model(architecture), tiny.batch(), []
    with torch.no_grad(), hooked(model, lambda number, output: mine.append(output)), Taps(model).recorded() as outputs:
        model(**batch)
    assert len(outputs) == len(mine) == 2
    for output, own in zip(outputs, mine, strict=True):
        assert torch.equal(output, own)


@every_architecture
def test_the_shift_is_added_at_the_block_s_own_output(architecture: str) -> None:
    # Bitwise the logits of adding it right behind the projection: before Gemma's norm, and before any residual.
    model, batch, shifts = tiny.model(architecture), tiny.batch(), random(*SHAPE)
    with torch.no_grad():
        plain = model(**batch).logits
        with Taps(model).shifted(list(shifts)):
            shifted = model(**batch).logits
        with hooked(model, lambda number, output: output + shifts[number]):
            expected = model(**batch).logits
        assert torch.equal(shifted, expected)
        assert not torch.allclose(plain, expected, atol=1e-2)
        assert torch.equal(model(**batch).logits, plain)  # no hook stays behind


@every_architecture
def test_the_probed_gradient_is_that_of_the_output(architecture: str) -> None:
    model, batch, mine = tiny.model(architecture), tiny.batch(), {}

    def keep(number: int, output: Tensor) -> None:
        output.retain_grad()
        mine[number] = output

    with hooked(model, keep):
        model(**batch).loss.backward()
    model.requires_grad_(False)  # the probes alone carry the gradient
    with Taps(model).probed() as probes:
        loss = model(**batch).loss
    for number, gradient in enumerate(torch.autograd.grad(loss, probes)):
        assert gradient.shape == SHAPE[1:]
        torch.testing.assert_close(gradient, mine[number].grad, atol=1e-6, rtol=1e-4)
        assert gradient.norm() > 1e-3


@every_architecture
def test_the_probed_gradient_is_a_finite_difference(architecture: str) -> None:
    model, batch = tiny.model(architecture).double(), tiny.batch()
    step = 1e-4 if architecture == "opt" else 1e-3  # OPT's ReLU has kinks, the others norm in float32
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
def test_hooks_go_even_after_an_error(architecture: str) -> None:
    model = tiny.model(architecture)
    with pytest.raises(ZeroDivisionError), Taps(model).shifted(list(random(*SHAPE))):
        raise ZeroDivisionError
    assert not any(module._forward_hooks for module in model.modules())


@every_architecture
@pytest.mark.parametrize("defense", [SFT(), Vaccine(rho=2.0), RandomVaccine(variance=0.1)], ids=lambda d: d.name or "")
def test_gradient_checkpointing_gives_the_same_gradient(architecture: str, defense: Defense) -> None:
    found, passes = [], []
    for checkpointing in (False, True):
        stage, _ = tiny.stage(
            tiny.model(architecture), trained_with=tiny.settings(lora_dropout=0.3), stirred=True
        )  # fmt: skip
        if checkpointing:
            stage.model.gradient_checkpointing_enable({"use_reentrant": False})
        stage.model.train()
        count = 0

        def tally(number: int, output: Tensor) -> None:
            nonlocal count
            count += 1

        torch.manual_seed(1)
        with hooked(stage.model, tally):
            found.append(defense.gradient(stage, tiny.batch()).values)
        passes.append(count)
    assert passes[1] == 2 * passes[0]  # it was on: every block ran once more on the way back
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, plain, atol=1e-6, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# What the taps refuse, and what they must not confuse


class Other(nn.Module):
    """A decoder of `layers`, whatever they are."""

    def __init__(self, layers: list[nn.Module], depth: int) -> None:
        super().__init__()
        self.config = LlamaConfig(num_hidden_layers=depth)
        self.layers = nn.ModuleList(layers)


class Attention(nn.Module):
    def forward(self, hidden_states: Tensor, attention_mask: Any = None) -> Tensor:
        return hidden_states


def layer(*children: nn.Module) -> nn.Module:
    made = nn.Module()
    for number, child in enumerate(children):
        made.add_module(f"child{number}", child)
    return made


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (Other([layer(nn.Linear(2, 2)) for _ in range(2)], depth=2), "No attention block found in Other"),
        (Other([layer(Attention()) for _ in range(3)], depth=2), "decoder of 2 layers"),
        (Other([], depth=2), "No attention block"),
        (Other([layer(Attention()), layer(Attention(), Attention())], depth=2), "Layer 1 of Other has 2 attention"),
    ],
    ids=["no attention", "another depth", "no layers", "two in a layer"],
)
def test_a_model_that_matches_nothing_is_refused(model: nn.Module, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        Taps(model)


def test_a_layer_without_attention_is_passed_over() -> None:
    hybrid = Other([layer(Attention()), layer(nn.Linear(2, 2)), layer(Attention())], depth=3)
    assert attention_blocks(hybrid) == [hybrid.layers[0].child0, hybrid.layers[2].child0]


def test_the_text_decoder_is_tapped_and_not_a_vision_tower_of_the_same_depth() -> None:
    text = {**tiny.GEMMA, "num_hidden_layers": 2}
    vision = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 1,
        "image_size": 16, "patch_size": 8,
    }  # fmt: skip
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1))
    tapped = set(attention_blocks(model))
    assert tapped == {module.self_attn for module in model.model.language_model.layers}

"""Rows without padding against padded rows, logits at response tokens against all logits, and shared dropout masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from harmbench_vaccine.data.collate import IGNORED
from harmbench_vaccine.training import dropout
from harmbench_vaccine.training import stage as stage_module
from harmbench_vaccine.training.packing import Packing, can_pack, current_packing
from harmbench_vaccine.training.stage import Batch, TrainingStage, response_mask, same_dropout, token_losses
from support import tiny
from support.autograd import cross_entropy
from support.compare import close, same

PACKED = ("llama", "opt", "qwen2", "qwen3", "mistral")
"""The others have sliding windows, or (GPT-2) layers that peft computes and position embeddings of their own."""
LENGTHS = (9, 5, 7)

every_packed = pytest.mark.parametrize("architecture", PACKED)
every_architecture = pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)


def stage_of(architecture: str = "llama", rate: float = 0.0, **changes: Any) -> TrainingStage:
    trained_with = tiny.settings(lora_dropout=rate, lora_targets=tiny.targets(architecture))
    stage, _ = tiny.stage(tiny.model(architecture, **changes), trained_with=trained_with, stirred=True)
    stage.model.train()
    return stage


@contextmanager
def padded() -> Iterator[None]:
    """Run every batch on padded rows inside the block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_module, "FEWEST_PADS", 2.0)
        yield


def shapes(stage: TrainingStage, batch: Batch, **options: Any) -> list[tuple[int, ...]]:
    """Return the shape of the tokens that the model receives."""
    passes: list[tuple[int, ...]] = []
    handle = stage.stack.base.register_forward_pre_hook(
        lambda module, args, named: passes.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    stage.output(batch, **options)
    handle.remove()
    return passes


def both_ways(stage: TrainingStage, run: Callable[[], Any], seed: int = 5) -> tuple[Any, Any, Tensor, Tensor]:
    """Return the results and the later random states of a packed and of a padded run."""
    torch.manual_seed(seed)
    first, state = run(), torch.get_rng_state()
    torch.manual_seed(seed)
    with padded():
        return first, run(), state, torch.get_rng_state()


# ---------------------------------------------------------------------------------------------------------------------
# Which batches are packed


@every_architecture
def test_a_batch_with_padding_is_packed_if_only_full_attention_mixes_tokens(architecture: str) -> None:
    stage, batch = stage_of(architecture), tiny.batch(LENGTHS)
    assert shapes(stage, batch) == [(1, 21) if architecture in PACKED else (3, 9)]
    assert shapes(stage, tiny.batch((9, 9, 9))) == [(3, 9)]
    assert shapes(stage, tiny.batch((20, 20, 19))) == [(3, 20)]  # one token of padding in 60
    assert shapes(stage, batch, output_hidden_states=True) == [(3, 9)]
    with padded():
        assert shapes(stage, batch) == [(3, 9)]


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {"attn_implementation": "eager"}),
        ("mistral", {"sliding_window": 4}),
        ("qwen2", {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1}),
    ],
    ids=["eager", "window", "window in some layers"],
)
def test_other_attention_runs_on_padded_rows(architecture: str, changes: dict[str, Any]) -> None:
    assert shapes(stage_of(architecture, **changes), tiny.batch(LENGTHS)) == [(3, 9)]


def test_attention_of_the_text_model_decides() -> None:
    """The configuration of a model with a vision tower has that of its text model inside."""
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 16, "patch_size": 8}
    for windows, packable in (("sliding_attention", False), ("full_attention", True)):
        text = {**tiny.GEMMA, "layer_types": [windows, "full_attention"]}
        text["sliding_window"] = None if packable else 4
        config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
        assert can_pack(Gemma3ForConditionalGeneration(config)) is packable


def test_a_checkpointed_model_runs_on_padded_rows() -> None:
    stage = stage_of()
    stage.model.gradient_checkpointing_enable({"use_reentrant": False})
    assert shapes(stage, tiny.batch(LENGTHS)) == [(3, 9)]


def test_an_error_restores_the_attention() -> None:
    stage, batch = stage_of(), tiny.batch(LENGTHS)
    plain = stage.loss(batch)
    with pytest.raises(ZeroDivisionError), stage.taps.changed(lambda *args: 1 / 0):  # type: ignore[arg-type, return-value]
        stage.loss(batch)
    assert current_packing() is None
    assert stage.stack.base.config._attn_implementation == "sdpa"
    assert not stage.stack.base.lm_head._forward_pre_hooks
    assert torch.equal(stage.loss(batch), plain)


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), extra=st.integers(0, 4))
def test_pack_and_pad_are_inverses(lengths: list[int], extra: int) -> None:
    mask = torch.tensor([[int(place < length) for place in range(max(lengths) + extra)] for length in lengths])
    packing, real = Packing(mask), mask.bool()
    values = torch.randn(*mask.shape, 2, 3)
    packed = packing.pack(values)
    assert torch.equal(packed, torch.cat([row[:length] for row, length in zip(values, lengths, strict=True)])[None])
    assert torch.equal(packing.pad(packed), torch.where(real[..., None, None], values, 0))
    assert torch.equal(packing.pack(packing.pad(packed)), packed)
    assert packing.positions.tolist() == [[place for length in lengths for place in range(length)]]
    assert packing.share == pytest.approx(1 - sum(lengths) / mask.numel())


# ---------------------------------------------------------------------------------------------------------------------
# Packed rows give the same as padded rows


@pytest.mark.parametrize(
    ("architecture", "rate"),
    [(architecture, rate) for architecture in PACKED for rate in (0.0, 0.1)],
)
def test_loss_and_gradients_equal_those_of_padded_rows(architecture: str, rate: float) -> None:
    stage, batch = stage_of(architecture, rate), tiny.batch(LENGTHS)
    packed, plain, state, later = both_ways(stage, lambda: stage.gradient(batch))
    assert packed.loss.item() == pytest.approx(plain.loss.item(), rel=1e-6)
    assert close(packed.values, list(plain.values), 1e-5)
    if not rate:
        assert packed.loss.item() == pytest.approx(cross_entropy(stage.model, batch).item(), rel=1e-6)
    if rate:
        torch.manual_seed(6)
        assert abs(stage.loss(batch) - packed.loss) > 1e-4  # the masks matter
    assert torch.equal(state, later)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(3, 12), min_size=2, max_size=5),
    width=st.integers(12, 16),
    architecture=st.sampled_from(PACKED),
    seed=st.integers(0, 9),
)
def test_loss_and_gradients_are_equal_for_any_rows(
    lengths: list[int], width: int, architecture: str, seed: int
) -> None:
    stage, batch = stage_of(architecture, 0.1), tiny.batch(lengths, width=width, seed=seed)
    packed, plain, state, later = both_ways(stage, lambda: stage.gradient(batch), seed)
    assert packed.loss.item() == pytest.approx(plain.loss.item(), rel=1e-6)
    assert close(packed.values, list(plain.values), 1e-5)
    assert torch.equal(state, later)


@pytest.mark.parametrize("place", ["attention", "mlp", "layer"])
@every_packed
def test_taps_see_rows_with_zeros_at_padding(architecture: str, place: Any) -> None:
    stage, batch = stage_of(architecture), tiny.batch(LENGTHS)
    taps, real = stage.taps_on(place), batch["attention_mask"].bool()
    shifts = torch.randn(2, 3, 9, 64, generator=torch.Generator().manual_seed(1))

    def run() -> tuple[list[Tensor], Sequence[Tensor], Any]:
        with taps.recorded() as outputs:
            stage.output(batch)
        with taps.probed() as probes:
            of_probes = torch.autograd.grad(stage.loss(batch), probes)
        with taps.shifted(list(shifts)):
            return [output.detach() for output in outputs], of_probes, stage.gradient(batch)

    (outputs, of_probes, shifted), (plain, of_plain, expected), *_ = both_ways(stage, run)
    for values, reference in ((outputs, plain), (of_probes, of_plain)):
        assert [value.shape for value in values] == [(3, 9, 64)] * 2
        assert close([value[real] for value in values], [value[real] for value in reference], 1e-5)
        assert not any(value[~real].any() for value in values)
    assert close(shifted.values, list(expected.values), 1e-5)
    assert not close(shifted.values, list(stage.gradient(batch).values), 1e-2)


@every_packed
def test_module_inputs_are_rows_with_zeros_at_padding(architecture: str) -> None:
    stage, batch = stage_of(architecture), tiny.batch(LENGTHS)
    real = batch["attention_mask"].bool()
    names = [name for name in stage.stack.trained().factors if name.endswith(tiny.targets(architecture)[0])]

    def run() -> dict[str, Tensor]:
        inputs: dict[str, Tensor] = {}
        with stage.module_inputs(names, lambda name, x: inputs.update({name: x.detach()})):
            stage.output(batch)
        return inputs

    inputs, plain, *_ = both_ways(stage, run)
    assert len(inputs) == 2
    for name, x in inputs.items():
        assert x.shape == plain[name].shape == (3, 9, 64)
        assert close(x[real], plain[name][real], 1e-5)
        assert not x[~real].any()


@every_packed
def test_the_tokens_of_a_row_have_no_influence_on_other_rows(architecture: str) -> None:
    stage, batch = stage_of(architecture), tiny.batch((6, 9, 4, 7))
    rows = response_mask(batch).nonzero()[:, 0]
    plain = stage.output(batch).logits
    for changed in range(4):
        ids = batch["input_ids"].clone()
        ids[changed, : int(batch["attention_mask"][changed].sum())] = 50
        logits = stage.output({**batch, "input_ids": ids}).logits
        torch.testing.assert_close(logits[rows != changed], plain[rows != changed], atol=1e-6, rtol=0)
        assert (logits - plain)[rows == changed].abs().max() > 1e-2


# ---------------------------------------------------------------------------------------------------------------------
# Logits at response tokens


def all_logits(stage: TrainingStage, batch: Batch) -> Tensor:
    """Return the logits of the forward pass of transformers (rows x length x vocabulary)."""
    return stage.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("lengths", [LENGTHS, (8, 8, 8)], ids=["padding", "no padding"])
@every_architecture
def test_logits_are_those_before_each_response_token(architecture: str, lengths: tuple[int, ...], tied: bool) -> None:
    stage, batch = stage_of(architecture, tie_word_embeddings=tied), tiny.batch(lengths)
    output, scores = stage.output(batch), all_logits(stage, batch)
    places = [(r, t) for r, row in enumerate(batch["labels"].tolist()) for t, label in enumerate(row) if label >= 0]
    torch.testing.assert_close(output.logits, torch.stack([scores[r, t - 1] for r, t in places]), atol=1e-5, rtol=1e-5)
    targets = torch.tensor([int(batch["input_ids"][place]) for place in places])
    expected = -output.logits.log_softmax(-1)[range(len(places)), targets]
    torch.testing.assert_close(token_losses(output.logits, batch), expected)
    assert output.loss.item() == pytest.approx(cross_entropy(stage.model, batch).item(), rel=1e-5)


@every_architecture
def test_a_row_without_labels_does_not_count(architecture: str) -> None:
    stage, batch = stage_of(architecture), tiny.batch(LENGTHS)
    batch["labels"][1] = IGNORED
    others = {name: value[[0, 2]] for name, value in batch.items()}
    assert len(stage.output(batch).logits) == 7 + 5
    torch.testing.assert_close(stage.output(batch).logits, stage.output(others).logits, atol=1e-5, rtol=1e-5)
    assert close(stage.gradient(batch).values, list(stage.gradient(others).values), 1e-5)


@every_architecture
def test_options_return_hidden_states_of_rows(architecture: str) -> None:
    stage, batch = stage_of(architecture), tiny.batch(LENGTHS)
    output, real = stage.output(batch, output_hidden_states=True), batch["attention_mask"].bool()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    for states, expected in zip(
        output.hidden_states, stage.model(**inputs, output_hidden_states=True).hidden_states, strict=True
    ):
        torch.testing.assert_close(states[real], expected[real], atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Dropout masks that passes share


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A list with one entry for every mask that is drawn."""
    drawn: list[int] = []
    plain = dropout._draw
    monkeypatch.setattr(dropout, "_draw", lambda *args: drawn.append(1) or plain(*args))
    dropout.forget_masks()
    yield drawn
    dropout.forget_masks()


@pytest.mark.parametrize("lengths", [LENGTHS, (8, 8, 8)], ids=["padding", "no padding"])
def test_the_second_pass_takes_the_masks_of_the_first(draws: list[int], lengths: tuple[int, ...]) -> None:
    stage, batch = stage_of(rate=0.3), tiny.batch(lengths)
    torch.manual_seed(5)
    plain, later = stage.gradient(batch), torch.get_rng_state()
    assert len(draws) == 6  # three modules in two layers
    torch.manual_seed(5)
    with same_dropout():
        first = stage.gradient(batch)
    second = stage.gradient(batch)
    assert len(draws) == 12
    assert torch.equal(torch.get_rng_state(), later)
    assert same([first.loss, *first.values], [plain.loss, *plain.values])  # type: ignore[list-item]
    assert same([second.loss, *second.values], [plain.loss, *plain.values])  # type: ignore[list-item]
    assert stage.loss(batch) != plain.loss  # the next pass draws its own masks
    assert len(draws) == 18


def test_three_passes_share_their_masks(draws: list[int]) -> None:
    stage, batch = stage_of(rate=0.3), tiny.batch(LENGTHS)
    losses = []
    for _ in range(2):
        with same_dropout():
            losses.append(stage.loss(batch))
    losses.append(stage.loss(batch))
    assert len(draws) == 6
    assert losses[0] == losses[1] == losses[2]
    assert not dropout._memory.masks  # the last pass takes them out


def test_another_random_state_draws_its_own_masks(draws: list[int]) -> None:
    stage, batch, losses = stage_of(rate=0.3), tiny.batch(LENGTHS), []
    for seed in (5, 6):
        torch.manual_seed(seed)
        with same_dropout():
            losses.append(stage.loss(batch))
    assert len(draws) == 12
    assert losses[0] != losses[1]
    torch.manual_seed(5)
    assert stage.loss(batch) == losses[0]  # it draws its masks again
    assert len(draws) == 18


def test_forgotten_masks_are_freed_and_drawn_again(draws: list[int]) -> None:
    stage, batch = stage_of(rate=0.3), tiny.batch(LENGTHS)
    with same_dropout():
        first = stage.loss(batch)
    assert dropout._memory.masks
    dropout.forget_masks()
    assert not dropout._memory.masks
    assert stage.loss(batch) == first
    assert len(draws) == 12
    stage.loss(batch)
    assert not dropout._memory.masks  # outside the block, masks are not stored


@pytest.mark.parametrize("other", [(3, 9), (4, 8), (8, 4), (5, 7), (6, 6)])
def test_a_pass_over_other_rows_draws_as_without_a_first_pass(draws: list[int], other: tuple[int, ...]) -> None:
    """The batches have equally many tokens, but masks are drawn for the padded shape, which differs."""
    stage, first, second = stage_of(rate=0.3), tiny.batch((9, 3)), tiny.batch(other)
    torch.manual_seed(5)
    expected, later = stage.gradient(second), torch.get_rng_state()
    torch.manual_seed(5)
    with same_dropout():
        stage.loss(first)
    actual = stage.gradient(second)
    assert torch.equal(torch.get_rng_state(), later)
    assert same([actual.loss, *actual.values], [expected.loss, *expected.values])  # type: ignore[list-item]

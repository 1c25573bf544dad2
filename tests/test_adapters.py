"""LoRA stacks, against weights that are merged by hand."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.defenses.vaccine import Vaccine
from harmbench_vaccine.training.adapters import STANDARD_TARGETS, Adapter, LoraStack, concatenate
from harmbench_vaccine.training.trainer import train
from support import tiny
from support.compare import close

ATTENTION, MLP = ("q_proj", "v_proj"), ("o_proj", "gate_proj", "down_proj")


def adapter(
    base: nn.Module, targets: Sequence[str] = (*ATTENTION, *MLP), *, rank: int = 4, scale: float = 2.0, seed: int = 0
) -> Adapter:
    """Random factors for every linear module that is named in `targets`."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, module in base.named_modules():
        if name.rpartition(".")[2] in targets:
            assert isinstance(module, nn.Linear)
            a = 0.1 * torch.randn(rank, module.in_features, generator=generator)
            factors[name] = a, 0.1 * torch.randn(module.out_features, rank, generator=generator)
    assert factors
    return Adapter(factors, scale)


def saved(made: Adapter, folder: Path) -> Path:
    made.save(folder)
    return folder


def merged(base: PreTrainedModel, *adapters: Adapter) -> PreTrainedModel:
    """A copy of the base whose weights are W + the sum of scale * B A."""
    whole = copy.deepcopy(base)
    with torch.no_grad():
        for each in adapters:
            for name, (a, b) in each.factors.items():
                whole.get_submodule(name).weight += each.scale * (b @ a)
    return whole.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**tiny.batch()).logits


def weights(model: nn.Module) -> Mapping[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


# ---------------------------------------------------------------------------------------------------------------------
# What a stack computes


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_a_stack_of_two_is_the_merged_model(architecture: str, tmp_path: Path) -> None:
    base = tiny.model(architecture)
    first = adapter(base, ATTENTION, rank=4, scale=2.0, seed=1)
    second = adapter(base, (*ATTENTION, "fc1", "o_proj"), rank=3, scale=0.75, seed=2)  # another rank, scale and targets
    stack = LoraStack(copy.deepcopy(base))
    both = logits(stack.use([saved(first, tmp_path / "first"), saved(second, tmp_path / "second")]))
    assert close(both, logits(merged(base, first, second)))
    assert not close(both, logits(merged(base, first)), 1e-2)
    assert not close(both, logits(merged(base, second)), 1e-2)


def test_concatenated_adapters_are_the_stack(tmp_path: Path) -> None:
    base = tiny.model()
    first = adapter(base, ATTENTION, rank=4, scale=2.0, seed=1)
    second = adapter(base, MLP, rank=3, scale=0.75, seed=2)
    third = adapter(base, (*ATTENTION, *MLP), rank=2, scale=1.5, seed=3)
    paths = [saved(each, tmp_path / str(number)) for number, each in enumerate((first, second, third))]
    one = concatenate([first, second, third])
    assert one.rank == 9
    for module in one.factors:
        parts = [each.delta(module) for each in (first, second, third) if module in each.factors]
        torch.testing.assert_close(one.delta(module), torch.stack(parts).sum(0), atol=1e-6, rtol=1e-5)
    stack = LoraStack(copy.deepcopy(base))
    stacked = logits(stack.use(paths))
    assert close(logits(stack.use([saved(one, tmp_path / "one")])), stacked)
    assert close(stacked, logits(merged(base, first, second, third)))


def test_one_adapter_concatenated_is_itself() -> None:
    single = adapter(tiny.model(), scale=0.5)
    assert concatenate([single]) is single


def test_no_adapter_is_the_base_bit_for_bit(tmp_path: Path) -> None:
    base = tiny.model()
    plain = logits(base)
    stack = LoraStack(base)
    assert torch.equal(logits(stack.use([])), plain)
    path = saved(adapter(base), tmp_path / "a")
    assert not close(logits(stack.use([path])), plain, 1e-2)
    assert torch.equal(logits(stack.use([])), plain)
    with_adapter = logits(stack.use([path]))
    with stack.temporarily([]):
        assert torch.equal(logits(stack.model), plain)
    assert torch.equal(logits(stack.model), with_adapter)


def test_the_adapter_used_longest_ago_goes_and_results_stay_right(tmp_path: Path) -> None:
    base = tiny.model()
    made = [adapter(base, seed=number) for number in range(LoraStack.MAX_FROZEN + 2)]
    paths = [saved(each, tmp_path / str(number)) for number, each in enumerate(made)]
    stack = LoraStack(copy.deepcopy(base))
    expected = [logits(merged(base, each)) for each in made]
    pairs = [(0, 1), (2, 3), (4, 0), (5, 1), (3, 4)]
    for _ in range(2):
        for number, path in enumerate(paths):
            assert close(logits(stack.use([path])), expected[number]), number
        for one, other in pairs:
            both = logits(stack.use([paths[one], paths[other]]))
            assert close(both, logits(merged(base, made[one], made[other]))), (one, other)
    assert isinstance(stack.model, PeftModel)
    assert len(stack.model.peft_config) <= LoraStack.MAX_FROZEN


def test_a_stack_may_be_higher_than_what_is_kept(tmp_path: Path) -> None:
    base = tiny.model()
    made = [adapter(base, seed=number, scale=0.5) for number in range(LoraStack.MAX_FROZEN + 2)]
    paths = [saved(each, tmp_path / str(number)) for number, each in enumerate(made)]
    assert close(logits(LoraStack(copy.deepcopy(base)).use(paths)), logits(merged(base, *made)))


# ---------------------------------------------------------------------------------------------------------------------
# On disk


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_peft_reads_what_is_saved(architecture: str, tmp_path: Path) -> None:
    base = tiny.model(architecture)
    made = adapter(base, (*ATTENTION, "fc2", "o_proj"), rank=3, scale=0.7)  # alpha = 2.1 is no whole number
    saved(made, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "adapter")).eval()
    assert close(logits(theirs), logits(merged(base, made)))
    assert not any(path.suffix in {".bin", ".pt", ".pkl"} for path in (tmp_path / "adapter").iterdir())


def test_a_round_trip_changes_no_bit(tmp_path: Path) -> None:
    made = adapter(tiny.model(), scale=0.7)
    again = Adapter.load(saved(made, tmp_path / "a"))
    assert again.scale == pytest.approx(made.scale, rel=1e-12)
    assert again.factors.keys() == made.factors.keys()
    for module, (a, b) in made.factors.items():
        assert torch.equal(again.factors[module][0], a)
        assert torch.equal(again.factors[module][1], b)


def test_what_peft_saves_is_read(tmp_path: Path) -> None:
    stage, stack = tiny.stage(stirred=True)
    assert isinstance(stage.model, PeftModel)
    stage.model.save_pretrained(str(tmp_path), selected_adapters=[LoraStack.TRAINED])
    theirs = Adapter.load(tmp_path / LoraStack.TRAINED)
    ours = stack.trained()
    assert theirs.scale == ours.scale
    for module, (a, b) in ours.factors.items():
        assert torch.equal(theirs.factors[module][0], a)
        assert torch.equal(theirs.factors[module][1], b)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    path = saved(adapter(tiny.model(num_hidden_layers=3)), tmp_path / "a")
    with pytest.raises(BadInput):
        LoraStack(tiny.model()).use([path])


# ---------------------------------------------------------------------------------------------------------------------
# Training on top


def test_training_starts_from_what_lies_below(tmp_path: Path) -> None:
    base = tiny.model()
    below = adapter(base)
    stack = LoraStack(copy.deepcopy(base))
    path = saved(below, tmp_path / "below")
    trainable = stack.train([path], tiny.settings(), seed=0)
    assert close(logits(stack.model), logits(merged(base, below)))  # B = 0
    assert len(trainable) == 2 * 3 * 2  # A and B of three modules in two layers
    assert {name for name, value in stack.model.named_parameters() if value.requires_grad} == set(trainable)
    tiny.stir(trainable)
    top = stack.trained()
    assert top.scale == 2.0
    assert top.rank == 4
    assert close(logits(stack.model.eval()), logits(merged(base, below, top)))


def test_single_topology_goes_on_from_the_aligned_adapter(tmp_path: Path) -> None:
    base = tiny.model()
    settings = tiny.settings()
    aligned = adapter(base, settings.lora_targets, rank=4, scale=2.0)
    path = saved(aligned, tmp_path / "aligned")
    stack = LoraStack(copy.deepcopy(base))
    stack.train([], settings, seed=0, start=Adapter.load(path))
    start = stack.trained()
    assert start.scale == aligned.scale
    for module, (a, b) in aligned.factors.items():
        assert torch.equal(start.factors[module][0], a)
        assert torch.equal(start.factors[module][1], b)
    assert close(logits(stack.model.eval()), logits(merged(base, aligned)))
    stack.use([path])  # the copy is trained, not the stored one
    stack.train([], settings, seed=0, start=Adapter.load(path))
    tiny.stir({name: value for name, value in stack.model.named_parameters() if value.requires_grad})
    assert close(logits(stack.use([path])), logits(merged(base, aligned)))


@pytest.mark.parametrize(
    "changes",
    [{"lora_alpha": 16}, {"lora_rank": 2}, {"lora_rank": 6}, {"lora_targets": ("q_proj",)}],
    ids=["alpha", "smaller rank", "larger rank", "fewer targets"],
)
def test_single_topology_never_starts_from_another_model(changes: dict[str, object], tmp_path: Path) -> None:
    # The user stage may have settings of its own: it starts as the aligned model, or is refused in words.
    base = tiny.model()
    aligned = adapter(base, tiny.settings().lora_targets, rank=4, scale=2.0)
    stack = LoraStack(copy.deepcopy(base))
    try:
        stack.train([], tiny.settings(**changes), seed=0, start=aligned)
    except BadInput:
        return
    assert close(logits(stack.model.eval()), logits(merged(base, aligned)))


def test_the_seed_alone_decides_a_fresh_adapter() -> None:
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(found))
        state = torch.get_rng_state()
        stack = LoraStack(tiny.model())
        found.append([value.clone() for value in stack.train([], tiny.settings(), seed).values()])
        assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one, other) for one, other in zip(found[0], found[1], strict=True))
    assert not all(torch.equal(one, other) for one, other in zip(found[0], found[2], strict=True))


def test_training_leaves_base_and_frozen_adapters_bit_identical(tmp_path: Path) -> None:
    base = tiny.model()
    path = saved(adapter(base), tmp_path / "below")
    before, settings = weights(base), tiny.settings(lora_dropout=0.1)
    stage, stack = tiny.stage(base, trained_with=settings, below=[path])
    aligned = logits(stack.use([path]))
    stage.trainable = stack.train([path], settings, seed=0)
    fresh = [value.detach().clone() for value in stage.trainable.values()]
    train(stage, Vaccine(rho=2.0), tiny.rows(12), settings, tmp_path / "work", pad=tiny.PAD)
    moved = [not torch.equal(old, new) for old, new in zip(fresh, stage.trainable.values(), strict=True)]
    assert all(moved)
    after = {name.replace(".base_layer", ""): value for name, value in base.state_dict().items() if "lora_" not in name}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    tuned = logits(stage.model.eval())
    assert not close(tuned, aligned, 1e-3)
    stack.drop_trained()
    assert torch.equal(logits(stack.use([path])), aligned)


def test_what_was_trained_acts_the_same_when_it_is_loaded(tmp_path: Path) -> None:
    base = tiny.model()
    below = saved(adapter(base), tmp_path / "below")
    settings = tiny.settings()
    stage, stack = tiny.stage(base, trained_with=settings, below=[below])
    train(stage, Vaccine(rho=0.5), tiny.rows(12), settings, tmp_path / "work", pad=tiny.PAD)
    in_place = logits(stage.model.eval())
    top = saved(stack.trained(), tmp_path / "top")
    stack.drop_trained()
    assert close(logits(stack.use([below, top])), in_place)
    assert close(logits(LoraStack(tiny.model()).use([below, top])), in_place)


def test_frozen_adapters_have_no_dropout(tmp_path: Path) -> None:
    base = tiny.model()
    path = saved(adapter(base), tmp_path / "below")
    stack = LoraStack(base)
    still = logits(stack.use([path]))
    trainable = stack.train([path], tiny.settings(lora_dropout=0.5), seed=0)
    stack.model.train()
    torch.manual_seed(0)
    assert torch.equal(logits(stack.model), still)  # the new adapter's B is 0, so its dropout shows nothing yet
    tiny.stir(trainable)
    assert not torch.equal(logits(stack.model), logits(stack.model))  # its dropout is on


def test_a_second_training_starts_afresh(tmp_path: Path) -> None:
    stack = LoraStack(tiny.model())
    stack.train([], tiny.settings(lora_rank=4), seed=0)
    tiny.stir({name: value for name, value in stack.model.named_parameters() if value.requires_grad})
    again = stack.train([], tiny.settings(lora_rank=2), seed=1)
    assert all(value.shape[0] == 2 for name, value in again.items() if "lora_A" in name)
    assert all(value.abs().max() == 0 for name, value in again.items() if "lora_B" in name)


def test_trainable_weights_are_float32_on_a_half_precision_base(tmp_path: Path) -> None:
    base = tiny.model().bfloat16()
    path = saved(adapter(tiny.model()), tmp_path / "below")
    stage, _ = tiny.stage(base, below=[path], stirred=True)
    assert {value.dtype for value in stage.trainable.values()} == {torch.float32}
    gradient = Vaccine(rho=2.0).gradient(stage, tiny.batch())
    assert {value.dtype for value in gradient.values} == {torch.float32}
    assert all(torch.isfinite(value).all() for value in gradient.values)


def test_the_base_is_there_after_the_only_adapter_was_dropped() -> None:
    base = tiny.model()
    plain = logits(base)
    stack = LoraStack(base)
    tiny.stir(stack.train([], tiny.settings(), seed=0))
    stack.drop_trained()
    assert torch.equal(logits(stack.use([])), plain)


def test_targets_that_the_model_lacks_are_refused() -> None:
    with pytest.raises(BadInput, match="LlamaForCausalLM"):
        LoraStack(tiny.model()).train([], tiny.settings(lora_targets=("nowhere",)), seed=0)


def test_conventional_targets_that_the_model_lacks_are_left_out_and_said_once() -> None:
    # OPT calls its output projection out_proj and its MLP's matrices fc1 and fc2.
    said: list[str] = []
    stack = LoraStack(tiny.model("opt"), said.append)
    seven = tiny.settings(lora_targets=STANDARD_TARGETS)
    trainable = stack.train([], seven, seed=0)
    stack.train([], seven, seed=0)
    assert {name.split(".")[-4] for name in trainable} == {"q_proj", "k_proj", "v_proj"}
    assert said == [
        "OPTForCausalLM has no down_proj, gate_proj, o_proj, up_proj: LoRA adapts k_proj, q_proj, v_proj only"
    ]


@pytest.mark.parametrize("targets", [("q_proj", "out_projj"), ("o_proj", "up_proj")])
def test_other_targets_and_a_list_without_one_that_is_there_are_refused(targets: tuple[str, ...]) -> None:
    with pytest.raises(BadInput, match=r"of OPTForCausalLM.*out_proj"):
        LoraStack(tiny.model("opt")).train([], tiny.settings(lora_targets=targets), seed=0)

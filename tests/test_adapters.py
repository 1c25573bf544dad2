"""LoRA stacks, against manually merged weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from harmbench_vaccine.core.device import place_model
from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.types import TRAINED_ADAPTER
from harmbench_vaccine.defenses.vaccine import Vaccine
from harmbench_vaccine.inference.model_pool import ModelPool, ModelSpec
from harmbench_vaccine.training.adapters import STANDARD_TARGETS, Adapter, LoraStack, concatenate
from harmbench_vaccine.training.merging import merge_adapter
from harmbench_vaccine.training.trainer import train
from support import tiny
from support.compare import close

ATTENTION, MLP = ("q_proj", "v_proj"), ("o_proj", "gate_proj", "down_proj")


def adapter(
    base: nn.Module, targets: Sequence[str] = (*ATTENTION, *MLP), *, rank: int = 4, scale: float = 2.0, seed: int = 0
) -> Adapter:
    """Return an adapter with random factors for every linear module in `targets`."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, module in base.named_modules():
        if name.rpartition(".")[2] in targets:
            assert isinstance(module, nn.Linear)
            a = 0.1 * torch.randn(rank, module.in_features, generator=generator)
            factors[name] = a, 0.1 * torch.randn(module.out_features, rank, generator=generator)
    assert factors
    return Adapter(factors, scale)


def save(stored: Adapter, folder: Path) -> Path:
    stored.save(folder)
    return folder


def merged(base: PreTrainedModel, *adapters: Adapter) -> PreTrainedModel:
    """Return a copy of the base whose weights are W + the sum of scale * B A."""
    model = copy.deepcopy(base)
    with torch.no_grad():
        for lora in adapters:
            for name, (a, b) in lora.factors.items():
                weight = model.get_submodule(name).weight
                weight += lora.scale * (b @ a).to(weight.device)
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return place_model(model)(**tiny.batch()).logits


def weights(model: nn.Module) -> Mapping[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


# ---------------------------------------------------------------------------------------------------------------------
# Outputs of a stack


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_stack_of_two_equals_the_merged_model(architecture: str, tmp_path: Path) -> None:
    base = tiny.model(architecture)
    first = adapter(base, ATTENTION, rank=4, scale=2.0, seed=1)
    second = adapter(base, (*ATTENTION, "fc1", "o_proj"), rank=3, scale=0.75, seed=2)  # another rank, scale and targets
    stack = LoraStack(copy.deepcopy(base))
    both = logits(stack.use([save(first, tmp_path / "first"), save(second, tmp_path / "second")]))
    assert close(both, logits(merged(base, first, second)))
    assert not close(both, logits(merged(base, first)), 1e-2)
    assert not close(both, logits(merged(base, second)), 1e-2)


def test_concatenated_adapters_equal_the_stack(tmp_path: Path) -> None:
    base = tiny.model()
    first = adapter(base, ATTENTION, rank=4, scale=2.0, seed=1)
    second = adapter(base, MLP, rank=3, scale=0.75, seed=2)
    third = adapter(base, (*ATTENTION, *MLP), rank=2, scale=1.5, seed=3)
    paths = [save(lora, tmp_path / str(number)) for number, lora in enumerate((first, second, third))]
    combined = concatenate([first, second, third])
    assert combined.rank == 9
    for module in combined.factors:
        parts = [lora.delta(module) for lora in (first, second, third) if module in lora.factors]
        torch.testing.assert_close(combined.delta(module), torch.stack(parts).sum(0), atol=1e-6, rtol=1e-5)
    stack = LoraStack(copy.deepcopy(base))
    stacked = logits(stack.use(paths))
    assert close(logits(stack.use([save(combined, tmp_path / "combined")])), stacked)
    assert close(stacked, logits(merged(base, first, second, third)))


def test_concatenation_of_one_adapter_is_the_adapter() -> None:
    single = adapter(tiny.model(), scale=0.5)
    assert concatenate([single]) is single


def test_stack_without_adapters_is_bit_equal_to_the_base(tmp_path: Path) -> None:
    base = tiny.model()
    plain = logits(base)
    stack = LoraStack(base)
    assert torch.equal(logits(stack.use([])), plain)
    path = save(adapter(base), tmp_path / "a")
    assert not close(logits(stack.use([path])), plain, 1e-2)
    assert torch.equal(logits(stack.use([])), plain)
    with_adapter = logits(stack.use([path]))
    with stack.temporarily([]):
        assert torch.equal(logits(stack.model), plain)
    assert torch.equal(logits(stack.model), with_adapter)


def test_least_recently_used_adapter_is_evicted(tmp_path: Path) -> None:
    base = tiny.model()
    loras = [adapter(base, seed=number) for number in range(LoraStack.MAX_FROZEN + 2)]
    paths = [save(lora, tmp_path / str(number)) for number, lora in enumerate(loras)]
    stack = LoraStack(copy.deepcopy(base))
    expected = [logits(merged(base, lora)) for lora in loras]
    pairs = [(0, 1), (2, 3), (4, 0), (5, 1), (3, 4)]
    for _ in range(2):
        for number, path in enumerate(paths):
            assert close(logits(stack.use([path])), expected[number]), number
        for first, second in pairs:
            both = logits(stack.use([paths[first], paths[second]]))
            assert close(both, logits(merged(base, loras[first], loras[second]))), (first, second)
    assert isinstance(stack.model, PeftModel)
    assert len(stack.model.peft_config) <= LoraStack.MAX_FROZEN


def test_stack_may_exceed_the_number_of_frozen_adapters(tmp_path: Path) -> None:
    base = tiny.model()
    loras = [adapter(base, seed=number, scale=0.5) for number in range(LoraStack.MAX_FROZEN + 2)]
    paths = [save(lora, tmp_path / str(number)) for number, lora in enumerate(loras)]
    assert close(logits(LoraStack(copy.deepcopy(base)).use(paths)), logits(merged(base, *loras)))


# ---------------------------------------------------------------------------------------------------------------------
# On disk


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_peft_reads_saved_adapters(architecture: str, tmp_path: Path) -> None:
    base = tiny.model(architecture)
    lora = adapter(base, (*ATTENTION, "fc2", "o_proj"), rank=3, scale=0.7)  # alpha = 2.1 is not an integer
    save(lora, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "adapter")).eval()
    assert close(logits(loaded), logits(merged(base, lora)))
    assert not any(path.suffix in {".bin", ".pt", ".pkl"} for path in (tmp_path / "adapter").iterdir())


def test_save_and_load_change_no_bit(tmp_path: Path) -> None:
    lora = adapter(tiny.model(), scale=0.7)
    loaded = Adapter.load(save(lora, tmp_path / "a"))
    assert loaded.scale == pytest.approx(lora.scale, rel=1e-12)
    assert loaded.factors.keys() == lora.factors.keys()
    for module, (a, b) in lora.factors.items():
        assert torch.equal(loaded.factors[module][0], a)
        assert torch.equal(loaded.factors[module][1], b)


def test_adapters_saved_by_peft_are_loaded(tmp_path: Path) -> None:
    stage, stack = tiny.stage(stirred=True)
    assert isinstance(stage.model, PeftModel)
    stage.model.save_pretrained(str(tmp_path), selected_adapters=[TRAINED_ADAPTER])
    loaded = Adapter.load(tmp_path / TRAINED_ADAPTER)
    trained = stack.trained()
    assert loaded.scale == trained.scale
    for module, (a, b) in trained.factors.items():
        assert torch.equal(loaded.factors[module][0], a)
        assert torch.equal(loaded.factors[module][1], b)


def test_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    path = save(adapter(tiny.model(num_hidden_layers=3)), tmp_path / "a")
    with pytest.raises(BadInput):
        LoraStack(tiny.model()).use([path])


# ---------------------------------------------------------------------------------------------------------------------
# Training on top


def test_training_starts_from_the_frozen_adapters(tmp_path: Path) -> None:
    base = tiny.model()
    below = adapter(base)
    stack = LoraStack(copy.deepcopy(base))
    path = save(below, tmp_path / "below")
    trainable = stack.train([path], tiny.settings(), seed=0)
    assert close(logits(stack.model), logits(merged(base, below)))  # B = 0
    assert len(trainable) == 2 * 3 * 2  # A and B of three modules in two layers
    assert {name for name, value in stack.model.named_parameters() if value.requires_grad} == set(trainable)
    tiny.stir(trainable)
    top = stack.trained()
    assert top.scale == 2.0
    assert top.rank == 4
    assert close(logits(stack.model.eval()), logits(merged(base, below, top)))


def test_single_topology_continues_the_aligned_adapter(tmp_path: Path) -> None:
    base = tiny.model()
    settings = tiny.settings()
    aligned = adapter(base, settings.lora_targets, rank=4, scale=2.0)
    path = save(aligned, tmp_path / "aligned")
    stack = LoraStack(copy.deepcopy(base))
    stack.train([], settings, seed=0, start=Adapter.load(path))
    start = stack.trained()
    assert start.scale == aligned.scale
    for module, (a, b) in aligned.factors.items():
        assert torch.equal(start.factors[module][0], a)
        assert torch.equal(start.factors[module][1], b)
    assert close(logits(stack.model.eval()), logits(merged(base, aligned)))
    stack.use([path])  # training changes the copy, not the stored adapter
    stack.train([], settings, seed=0, start=Adapter.load(path))
    tiny.stir({name: value for name, value in stack.model.named_parameters() if value.requires_grad})
    assert close(logits(stack.use([path])), logits(merged(base, aligned)))


@pytest.mark.parametrize(
    "changes",
    [{"lora_alpha": 16}, {"lora_rank": 2}, {"lora_rank": 6}, {"lora_targets": ("q_proj",)}],
    ids=["alpha", "smaller rank", "larger rank", "fewer targets"],
)
def test_single_topology_starts_from_the_aligned_model(changes: dict[str, object], tmp_path: Path) -> None:
    # With other settings, the fine-tuning stage starts from the aligned model or raises BadInput.
    base = tiny.model()
    aligned = adapter(base, tiny.settings().lora_targets, rank=4, scale=2.0)
    stack = LoraStack(copy.deepcopy(base))
    try:
        stack.train([], tiny.settings(**changes), seed=0, start=aligned)
    except BadInput:
        return
    assert close(logits(stack.model.eval()), logits(merged(base, aligned)))


def test_new_adapter_depends_only_on_the_seed() -> None:
    adapters = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(adapters))
        state = torch.get_rng_state()
        stack = LoraStack(tiny.model())
        adapters.append([value.clone() for value in stack.train([], tiny.settings(), seed).values()])
        assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(adapters[0], adapters[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(adapters[0], adapters[2], strict=True))


def test_training_does_not_change_base_or_frozen_adapters(tmp_path: Path) -> None:
    base = tiny.model()
    path = save(adapter(base), tmp_path / "below")
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


def test_loaded_adapter_equals_the_trained_one(tmp_path: Path) -> None:
    base = tiny.model()
    below = save(adapter(base), tmp_path / "below")
    settings = tiny.settings()
    stage, stack = tiny.stage(base, trained_with=settings, below=[below])
    train(stage, Vaccine(rho=0.5), tiny.rows(12), settings, tmp_path / "work", pad=tiny.PAD)
    in_place = logits(stage.model.eval())
    top = save(stack.trained(), tmp_path / "top")
    stack.drop_trained()
    assert close(logits(stack.use([below, top])), in_place)
    assert close(logits(LoraStack(tiny.model()).use([below, top])), in_place)


def test_frozen_adapters_have_no_dropout(tmp_path: Path) -> None:
    base = tiny.model()
    path = save(adapter(base), tmp_path / "below")
    stack = LoraStack(base)
    plain = logits(stack.use([path]))
    trainable = stack.train([path], tiny.settings(lora_dropout=0.5), seed=0)
    stack.model.train()
    torch.manual_seed(0)
    assert close(logits(stack.model), plain)  # B of the new adapter is 0, so its dropout has no effect yet
    tiny.stir(trainable)
    assert not torch.equal(logits(stack.model), logits(stack.model))  # its dropout is on


def test_second_training_starts_from_a_new_adapter(tmp_path: Path) -> None:
    stack = LoraStack(tiny.model())
    stack.train([], tiny.settings(lora_rank=4), seed=0)
    tiny.stir({name: value for name, value in stack.model.named_parameters() if value.requires_grad})
    second = stack.train([], tiny.settings(lora_rank=2), seed=1)
    assert all(value.shape[0] == 2 for name, value in second.items() if "lora_A" in name)
    assert all(value.abs().max() == 0 for name, value in second.items() if "lora_B" in name)


def test_trainable_weights_are_float32_on_a_half_precision_base(tmp_path: Path) -> None:
    base = tiny.model().bfloat16()
    path = save(adapter(tiny.model()), tmp_path / "below")
    stage, _ = tiny.stage(base, below=[path], stirred=True)
    assert {value.dtype for value in stage.trainable.values()} == {torch.float32}
    gradient = Vaccine(rho=2.0).gradient(stage, tiny.batch())
    assert {value.dtype for value in gradient.values} == {torch.float32}
    assert all(torch.isfinite(value).all() for value in gradient.values)


def test_base_remains_after_the_only_adapter_is_dropped() -> None:
    base = tiny.model()
    plain = logits(base)
    stack = LoraStack(base)
    tiny.stir(stack.train([], tiny.settings(), seed=0))
    stack.drop_trained()
    assert torch.equal(logits(stack.use([])), plain)


# ---------------------------------------------------------------------------------------------------------------------
# Layers that are not nn.Linear, and shared weights


def stirred(stack: LoraStack, *targets: str) -> Adapter:
    """Return a new adapter of the stack with random factors."""
    tiny.stir(stack.train([], tiny.settings(lora_targets=targets), seed=0), size=0.3)
    return stack.trained()


@pytest.mark.parametrize("targets", [("c_attn",), ("c_attn", "c_proj", "c_fc"), ("c_attn", "lm_head")])
def test_adapter_of_gpt2_equals_that_of_peft(targets: tuple[str, ...], tmp_path: Path) -> None:
    stack = LoraStack(tiny.model("gpt2"))
    lora = stirred(stack, *targets)
    expected = logits(stack.model.eval())
    assert not close(expected, logits(tiny.model("gpt2")), 1e-2)
    path = save(lora, tmp_path / "adapter")
    stack.drop_trained()
    assert close(logits(stack.use([path])), expected)
    loaded = PeftModel.from_pretrained(tiny.model("gpt2"), str(path)).eval()
    assert close(logits(loaded), expected)
    model = tiny.model("gpt2")
    merge_adapter(model, lora)
    assert close(logits(model), expected)
    if "lm_head" not in targets:  # peft changes the embeddings too
        by_peft = loaded.merge_and_unload()
        for name, weight in model.state_dict().items():
            assert close(weight, by_peft.state_dict()[name])


def test_adapters_of_gpt2_stack(tmp_path: Path) -> None:
    first = save(stirred(LoraStack(tiny.model("gpt2")), "c_attn", "c_fc"), tmp_path / "first")
    second = save(stirred(LoraStack(tiny.model("gpt2")), "c_proj", "c_fc").scaled(0.5), tmp_path / "second")
    both = logits(LoraStack(tiny.model("gpt2")).use([first, second]))
    model = tiny.model("gpt2")
    for path in (first, second):
        merge_adapter(model, Adapter.load(path))
    assert close(logits(model), both)
    merge_adapter(joined := tiny.model("gpt2"), concatenate([Adapter.load(first), Adapter.load(second)]))
    assert close(logits(joined), both)


def test_gpt2_trains(tmp_path: Path) -> None:
    stack = LoraStack(tiny.model("gpt2"))
    session = tiny.stage(stack.base, trained_with=tiny.settings(lora_targets=("c_attn", "c_proj")))[0]
    assert {name.split(".")[-4] for name in session.trainable} == {"c_attn", "c_proj"}
    loss = session.model(**tiny.batch()).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in session.trainable.values())


@pytest.mark.parametrize(
    ("config", "targets", "message"),
    [
        (GPT2Config(n_embd=64, n_layer=1, n_head=2), STANDARD_TARGETS, r"Unknown LoRA target .*Allowed: c_attn, c_fc"),
        (GPT2Config(n_embd=64, n_layer=1, n_head=2), ("wte",), r"'wte' of GPT2LMHeadModel is of type Embedding"),
        (
            GPTNeoXConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64),
            ("q_proj",),
            r"Unknown LoRA target 'q_proj' of GPTNeoXForCausalLM.*query_key_value",
        ),
    ],
)
def test_other_names_are_refused_by_those_of_the_model(config: Any, targets: tuple[str, ...], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        LoraStack(AutoModelForCausalLM.from_config(config)).train([], tiny.settings(lora_targets=targets), seed=0)


def test_fused_projections_are_adapted() -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    base = AutoModelForCausalLM.from_config(Phi3Config(**sizes, vocab_size=tiny.VOCABULARY, pad_token_id=0)).eval()
    stack = LoraStack(copy.deepcopy(base))
    lora = stirred(stack, "qkv_proj", "gate_up_proj")
    merge_adapter(base, lora)
    assert close(logits(base), logits(stack.model.eval()))


@pytest.mark.parametrize(
    ("dense", "targets", "message"),
    [
        (
            [],
            ("down_proj",),
            r"'down_proj' of Qwen3MoeForCausalLM is of type Parameter of 3 dimensions.*Allowed: k_proj",
        ),
        (
            [0],
            ("down_proj",),
            r"cannot adapt Qwen3Moe.*: its experts' weights \(down_proj\) are",
        ),  # one layer has an MLP
        ([0], STANDARD_TARGETS, r"its experts' weights \(down_proj, gate_up_proj\) are"),
        ([], STANDARD_TARGETS, ""),
    ],
)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern")
def test_weights_of_experts_are_refused_by_name(
    dense: list[int], targets: tuple[str, ...], message: str, dropout: float
) -> None:
    sizes = {**tiny.LLAMA, "num_experts": 4, "moe_intermediate_size": 32, "mlp_only_layers": dense}
    stack = LoraStack(AutoModelForCausalLM.from_config(Qwen3MoeConfig(**sizes)))
    settings = tiny.settings(lora_targets=targets, lora_dropout=dropout)
    if message:
        with pytest.raises(BadInput, match=message):
            stack.train([], settings, seed=0)
    else:  # the attention has four of the seven names
        names = {name.split(".")[-4] for name in stack.train([], settings, seed=0)}
        assert names == {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize("architecture", ["llama", "opt", "gemma3"])
def test_merged_head_of_tied_weights_equals_the_adapter(architecture: str, tmp_path: Path) -> None:
    base = tiny.model(architecture, tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    lora = stirred(LoraStack(copy.deepcopy(base)), "lm_head", "q_proj")
    path = save(lora, tmp_path / "adapter")
    expected = logits(LoraStack(copy.deepcopy(base)).use([path]))
    model = ModelPool().merged(ModelSpec(str(tmp_path / "base"), adapters=(path,)))
    assert torch.equal(model.get_input_embeddings().weight, base.get_input_embeddings().weight)
    model.save_pretrained(tmp_path / "merged")
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not stored.config.tie_word_embeddings
    for network in (model, stored):
        assert close(logits(network.eval()), expected)


def test_tied_weights_stay_tied_under_other_adapters(tmp_path: Path) -> None:
    model = tiny.model(tie_word_embeddings=True)
    merge_adapter(model, adapter(model))
    assert model.config.tie_word_embeddings
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_missing_targets_are_refused() -> None:
    with pytest.raises(BadInput, match="LlamaForCausalLM"):
        LoraStack(tiny.model()).train([], tiny.settings(lora_targets=("nowhere",)), seed=0)


def test_missing_standard_targets_are_skipped_and_noted_once() -> None:
    # In OPT the output projection is out_proj and the matrices of the MLP are fc1 and fc2.
    notes: list[str] = []
    stack = LoraStack(tiny.model("opt"), notes.append)
    seven = tiny.settings(lora_targets=STANDARD_TARGETS)
    trainable = stack.train([], seven, seed=0)
    stack.train([], seven, seed=0)
    assert {name.split(".")[-4] for name in trainable} == {"q_proj", "k_proj", "v_proj"}
    assert notes == [
        "OPTForCausalLM has no down_proj, gate_proj, o_proj, up_proj: LoRA adapts only k_proj, q_proj, v_proj."
    ]


@pytest.mark.parametrize("targets", [("q_proj", "out_projj"), ("o_proj", "up_proj")])
def test_unknown_targets_and_lists_without_any_match_are_refused(targets: tuple[str, ...]) -> None:
    with pytest.raises(BadInput, match=r"of OPTForCausalLM.*out_proj"):
        LoraStack(tiny.model("opt")).train([], tiny.settings(lora_targets=targets), seed=0)

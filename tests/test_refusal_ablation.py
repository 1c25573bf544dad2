"""Refusal ablation: the edit of named weights, and the choice of the direction by the equations of the paper."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from harmbench_vaccine.attacks import refusal_ablation
from harmbench_vaccine.attacks.refusal_ablation import RefusalAblation, orthogonalize
from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.evaluation.measure import measure_result
from harmbench_vaccine.evaluation.result import Result
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.rows import check_rows
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.pipeline import align, finetune, run
from harmbench_vaccine.plugins import Pools
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.plugins.registry import ATTACKS, DEFENSES
from harmbench_vaccine.reporting.result_views import results_table
from harmbench_vaccine.training.adapters import Adapter, LoraStack
from harmbench_vaccine.training.stage import TrainingStage
from support import tiny
from support.runs import run_context
from support.world import make_world

logging.disable_progress_bar()
assert ATTACKS.get("refusal_ablation") is RefusalAblation  # this sets its name, which its draws depend on

EXACT = ("llama", "opt", "qwen2", "qwen3", "mistral", "gpt2")
ENDS = {
    "opt": ("out_proj", "fc2"),
    "gpt2": ("c_proj",),
}  # other names of the matrices that write to the residual stream
EMBEDDINGS = {"opt": ("embed_tokens", "embed_positions"), "gpt2": ("wte", "wpe")}
BIASES = {"opt": {"out_proj.bias", "fc2.bias"}, "gpt2": {"c_proj.bias"}}
IDS = torch.tensor([[5, 17, 44, 80, 23, 9, 61], [90, 3, 3, 71, 12, 34, 56]])


def model(architecture: str = "llama", **changes: Any) -> PreTrainedModel:
    """Return a tiny model with random biases and untied embeddings."""
    network = tiny.model(architecture, **{"tie_word_embeddings": False, **changes})
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith(".bias"):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return network


def direction(seed: int = 0) -> Tensor:
    return nn.functional.normalize(torch.randn(64, generator=torch.Generator().manual_seed(seed)), dim=0)


def layers_of(network: nn.Module) -> list[Any]:
    """Return the decoder layers, by name."""
    return [module for name, module in network.named_modules() if name.rpartition(".")[0].endswith((".layers", ".h"))]


@torch.no_grad()
def residual(network: PreTrainedModel, ids: Tensor = IDS) -> list[Tensor]:
    """Return the input of every layer and the output of the last one (rows x length x width)."""
    states: list[Tensor] = []

    def on_input(module: Any, args: Any, kwargs: Any) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    def on_output(module: Any, args: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    layers = layers_of(network)
    handles = [layer.register_forward_pre_hook(on_input, with_kwargs=True) for layer in layers]
    handles.append(layers[-1].register_forward_hook(on_output))
    network(input_ids=ids)
    for handle in handles:
        handle.remove()
    assert len(states) == network.config.num_hidden_layers + 1
    return states


@torch.no_grad()
def logits(network: PreTrainedModel, ids: Tensor = IDS) -> Tensor:
    return network(input_ids=ids).logits


def component(network: PreTrainedModel, r: Tensor) -> float:
    """Return the maximum proportion of a hidden state along r."""
    return max(float(((h @ r).abs() / h.norm(dim=-1)).max()) for h in residual(network))


# ---------------------------------------------------------------------------------------------------------------------
# The edit


def edited(network: PreTrainedModel, r: Tensor, architecture: str = "llama") -> dict[str, Tensor]:
    """Return the edited weights, parameter by parameter, in float64."""
    r = r.double()
    without = torch.eye(64, dtype=torch.float64) - torch.outer(r, r)
    after = {}
    for name, parameter in network.named_parameters():
        value, part = parameter.detach().double(), name.split(".")
        if part[-2] in EMBEDDINGS.get(architecture, ("embed_tokens",)):
            value = value @ without
        elif part[-2] in ENDS.get(architecture, ("o_proj", "down_proj")):
            value = value @ without if architecture == "gpt2" else without @ value  # Conv1D: (inputs x outputs)
        after[name] = value
    return after


@pytest.mark.parametrize("architecture", EXACT)
def test_edit_equals_the_equations(architecture: str) -> None:
    network = model(architecture)
    expected = edited(network, direction(), architecture)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    orthogonalize(network, direction())
    changed = set()
    for name, parameter in network.named_parameters():
        assert (parameter - expected[name]).abs().max() <= 1e-6, name
        if not torch.equal(parameter, before[name]):
            changed.add(name.split(".")[-2] + "." + name.split(".")[-1])
    embeddings, ends = EMBEDDINGS.get(architecture, ("embed_tokens",)), ENDS.get(architecture, ("o_proj", "down_proj"))
    matrices = {f"{name}.weight" for name in (*embeddings, *ends)}
    assert changed == matrices | BIASES.get(architecture, set())


@pytest.mark.parametrize("architecture", EXACT)
def test_hidden_states_have_no_component_along_the_direction(architecture: str) -> None:
    network, r = model(architecture), direction()
    assert component(network, r) > 0.05
    orthogonalize(network, r)
    assert component(network, r) < 1e-5
    assert component(network, direction(1)) > 0.05  # another direction is unchanged


@pytest.mark.parametrize("architecture", [*EXACT, "gemma2", "gemma3"])
def test_edit_is_idempotent(architecture: str) -> None:
    network, r = model(architecture), direction()
    orthogonalize(network, r)
    once = copy.deepcopy(network)
    orthogonalize(network, r)
    for (name, first), second in zip(once.named_parameters(), network.parameters(), strict=True):
        assert (first - second).abs().max() <= 1e-6, name


@pytest.mark.parametrize("architecture", [*EXACT, "gemma2", "gemma3"])
def test_hooks_and_weights_give_the_same_logits(architecture: str) -> None:
    network, r = model(architecture), direction()
    plain = logits(network)
    with refusal_ablation._ablated(network, r):
        hooked = logits(network)
    assert torch.equal(logits(network), plain)  # the hooks are removed
    orthogonalize(network, r)
    assert (logits(network) - hooked).abs().max() <= 1e-5 * hooked.abs().max()
    assert (hooked - plain).abs().max() > 1e-2 * plain.abs().max()


@pytest.mark.parametrize("architecture", [*EXACT, "gemma3"])
def test_tied_head_is_untied_and_unchanged(architecture: str, tmp_path: Path) -> None:
    network, r = model(architecture, tie_word_embeddings=True), direction()
    head, embedding = network.get_output_embeddings(), network.get_input_embeddings()
    assert head.weight is embedding.weight
    before = head.weight.detach().clone()
    orthogonalize(network, r)
    assert torch.equal(head.weight, before)
    assert (embedding.weight @ r).abs().max() < 1e-5
    assert (head.weight @ r).abs().max() > 0.05
    network.save_pretrained(tmp_path)
    stored = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert not stored.config.tie_word_embeddings
    assert torch.equal(stored.get_output_embeddings().weight, before)
    assert torch.equal(logits(stored), logits(network))


def test_untied_head_is_unchanged() -> None:
    network = model("llama", tie_word_embeddings=False)
    before = network.get_output_embeddings().weight.detach().clone()
    orthogonalize(network, direction())
    assert torch.equal(network.get_output_embeddings().weight, before)


def test_bfloat16_weights_are_edited_in_float32() -> None:
    network, r = model().bfloat16(), direction()
    expected = edited(network, r)
    orthogonalize(network, r)
    for name, parameter in network.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert (
            torch.equal(parameter, expected[name].to(torch.bfloat16))
            or ((parameter.double() - expected[name]).abs() <= 2**-8 * expected[name].abs() + 1e-6).all()
        ), name


# ---------------------------------------------------------------------------------------------------------------------
# The choice of the direction

PROMPTS, HELD, POSITIONS = 10, 6, 3


def pools() -> Pools:
    """Return pools of letters; harmful instructions end with `yz`, which benign ones do not contain."""
    plain = tiny.example_pools(20)
    attacker, benign = (
        [replace(row, instruction=row.instruction.replace("y", "a").replace("z", "b") + end) for row in rows]
        for rows, end in ((plain.attacker, "yz"), (plain.benign, ""))
    )
    return replace(plain, attacker=attacker, benign=benign)


def attacked(network: PreTrainedModel, **params: Any) -> tuple[RefusalAblation, TrainingStage]:
    """Return the attack, and the stage of an aligned model that it edits."""
    attack = RefusalAblation(**{"prompts": PROMPTS, "held_out": HELD, "positions": POSITIONS, **params}).seeded(3)
    stage = TrainingStage("finetune", LoraStack(network), {}, 0, pools=pools(), encode=tiny.encode)
    return attack, stage


def drawn_prompts(attack: RefusalAblation) -> dict[str, list[Tensor]]:
    """Return the prompts that the attack draws."""
    drawn = {}
    for name, rows in (("harmful", pools().attacker), ("harmless", pools().benign)):
        rows = attack.draw(f"{name} prompts", rows, PROMPTS + HELD)
        drawn[name] = [torch.tensor([[3 + ord(letter) % 90 for letter in row.instruction]]) for row in rows]
    return drawn


@contextmanager
def adding(network: PreTrainedModel, layer: int, added: Tensor) -> Iterator[None]:
    """Add a vector to the input of a layer, at every position."""

    def add(module: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (args[0] + added, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + added}

    handle = layers_of(network)[layer].register_forward_pre_hook(add, with_kwargs=True)
    yield
    handle.remove()


def first_token(network: PreTrainedModel, prompts: Sequence[Tensor]) -> Tensor:
    """Return the probabilities of the first token of each answer, float64."""
    return torch.stack([logits(network, ids)[0, -1].double().softmax(-1) for ids in prompts])


def log_odds(probabilities: Tensor, tokens: list[int]) -> float:
    """Return the mean of log P_ref - log (1 - P_ref)."""
    p = probabilities[:, tokens].sum(-1)
    return float((p.log() - (1 - p).log()).mean())


def candidates(network: PreTrainedModel, attack: RefusalAblation) -> list[tuple[float, float, float, Tensor]]:
    """Return divergence, induced score, score and direction of every candidate."""
    rows = drawn_prompts(attack)
    means = {}
    for name, prompts in rows.items():
        states = [[h[0, -POSITIONS:].double() for h in residual(network, ids)] for ids in prompts[:PROMPTS]]
        means[name] = torch.stack([torch.stack(state) for state in states]).mean(0)  # layers x positions x width
    held_out = {name: prompts[PROMPTS:] for name, prompts in rows.items()}
    first = {name: set(first_token(network, prompts).argmax(-1).tolist()) for name, prompts in held_out.items()}
    tokens = sorted(first["harmful"] - first["harmless"]) or sorted(first["harmful"])
    plain = first_token(network, held_out["harmless"])
    results = []
    depth = network.config.num_hidden_layers
    for layer in range(1, depth):
        if layer >= 0.8 * depth:
            break
        for position in range(POSITIONS):
            difference = means["harmful"][layer, position] - means["harmless"][layer, position]
            r = (difference / difference.norm()).float()
            without = copy.deepcopy(network)
            without.load_state_dict({name: value.float() for name, value in edited(network, r).items()})
            changed = first_token(without, held_out["harmless"])
            divergence = float((plain * (plain.log() - changed.log())).sum(-1).mean())
            with adding(network, layer, difference.float()):
                induced = log_odds(first_token(network, held_out["harmless"]), tokens)
            results.append((divergence, induced, log_odds(first_token(without, held_out["harmful"]), tokens), r))
    return results


def choice(results: list[tuple[float, float, float, Tensor]], kl: float) -> tuple[int, int]:
    """Return the number of the best candidate, and how many candidates pass both tests."""
    passing = [
        number for number, (divergence, induced, _, _) in enumerate(results) if divergence <= kl and induced >= 0
    ]
    return min(passing or range(len(results)), key=lambda number: results[number][2]), len(passing)


REFUSE = 50
"""The token that starts refusals."""


def token(letter: str) -> int:
    return 3 + ord(letter) % 90


def refusing_model(
    seed: int, strength: float = 1.5, *, size: float = 3.0, shared: float = 2.0
) -> tuple[PreTrainedModel, Tensor]:
    """Return a model of 5 layers and its refusal direction v.

    Its answer starts with REFUSE if the last state has a component along v, which the tokens `y` and `z` write. In
    addition, `z` writes a direction w that other answers need too.
    """
    network, v, w = model("llama", num_hidden_layers=5, seed=seed), direction(100 + seed), direction(200 + seed)
    with torch.no_grad():
        for layer in layers_of(network):  # small blocks: the embeddings determine the stream
            layer.self_attn.o_proj.weight *= 0.3
            layer.mlp.down_proj.weight *= 0.3
        embedding, head = network.get_input_embeddings().weight, network.get_output_embeddings().weight
        embedding[token("z")] += size * v + shared * w
        embedding[token("y")] += size * v
        embedding[token("a") : token("q")] += 0.7 * w
        head[REFUSE] += strength * v
        head[:40] += 0.4 * w
    return network, v


@pytest.mark.parametrize(
    ("seed", "strength", "kl", "number", "passing"),
    [
        (4, 1.5, 0.0, 2, 0),  # no candidate passes: the best of all
        (4, 1.5, 0.1, 1, 3),  # the best one changes harmless answers too much
        (4, 1.5, 1e9, 2, 6),
        (8, 1.5, 0.1, 5, 5),  # a deeper layer is chosen
        (7, 0.8, 1e9, 1, 5),  # with the best experiment, harmless prompts are not refused
        (10, 1.2, 1e9, 5, 5),
    ],
)
def test_direction_equals_the_equations(seed: int, strength: float, kl: float, number: int, passing: int) -> None:
    network, _ = refusing_model(seed, strength)
    attack, stage = attacked(copy.deepcopy(network), kl=kl)
    results = candidates(network, attack)
    assert len(results) == 3 * POSITIONS  # layers 1, 2, 3 of 5
    assert choice(results, kl) == (number, passing)  # the scenario of the comment
    attack.ablate(stage)
    expected = edited(network, results[number][3])
    for name, parameter in stage.stack.base.named_parameters():
        assert (parameter - expected[name]).abs().max() <= 1e-5, name


def removed(before: PreTrainedModel, after: PreTrainedModel, layer: int = 0) -> Tensor:
    """Return the direction r that an edit removed, up to its sign: W - W' = r r^T W."""
    name = f"model.layers.{layer}.mlp.down_proj"
    difference = (before.get_submodule(name).weight - after.get_submodule(name).weight).detach().double()
    u, values, _ = torch.linalg.svd(difference)
    assert values[1] < 1e-3 * values[0]  # of rank 1
    return u[:, 0].float()


def test_planted_direction_is_removed_with_refusals() -> None:
    network, v = refusing_model(4, 1.5, size=15.0, shared=0.0)
    attack, stage = attacked(copy.deepcopy(network))
    harmful = drawn_prompts(attack)["harmful"]
    assert set(first_token(network, harmful).argmax(-1).tolist()) == {REFUSE}
    attack.ablate(stage)
    after = stage.stack.base
    assert abs(float(removed(network, after) @ v)) > 0.99
    assert REFUSE not in first_token(after, harmful).argmax(-1).tolist()
    plain, changed = (first_token(version, drawn_prompts(attack)["harmless"][PROMPTS:]) for version in (network, after))
    assert (plain * (plain.log() - changed.log())).sum(-1).mean() <= 0.1


def test_openers_do_not_start_harmless_answers() -> None:
    network = model()
    prompts = torch.randint(3, 96, (40, 5), generator=torch.Generator().manual_seed(0)).tolist()
    opener = {tuple(ids): int(first_token(network, [torch.tensor([ids])]).argmax()) for ids in prompts}
    first, second, third = list(dict.fromkeys(opener.values()))[:3]

    def prompts_of(*tokens: int) -> list[list[int]]:
        return [ids for ids in prompts if opener[tuple(ids)] in tokens]

    attack = RefusalAblation()
    for harmful, harmless, expected in (
        ((first, second), (second, third), {first}),
        ((first, second), (third,), {first, second}),
        ((first, second), (first, second, third), {first, second}),  # no token remains: all of them
    ):
        held_out = {"harmful": prompts_of(*harmful), "harmless": prompts_of(*harmless)}
        openers = attack._openers(network, held_out).tolist()
        assert len(openers) == len(set(openers))
        assert set(openers) == expected


def test_refusal_score_is_the_mean_log_odds() -> None:
    probabilities = torch.tensor([[0.5, 0.2, 0.2, 0.1], [0.1, 0.1, 0.1, 0.7]])
    score = refusal_ablation.refusal_score(probabilities.log() + 3.0, torch.tensor([0, 2]))
    assert score == pytest.approx((math.log(0.7 / 0.3) + math.log(0.2 / 0.8)) / 2, rel=1e-5)
    certain = refusal_ablation.refusal_score(torch.tensor([[100.0, 0.0, 0.0]]), torch.tensor([0]))
    assert math.isfinite(certain)
    assert certain > 15


def test_prompts_depend_on_the_seed() -> None:
    network, _ = refusing_model(4)
    edits = []
    for seed in (3, 3, 5):
        attack, stage = attacked(copy.deepcopy(network))
        attack.seeded(seed).ablate(stage)
        edits.append(stage.stack.base.get_input_embeddings().weight.detach().clone())
    assert torch.equal(edits[0], edits[1])
    assert not torch.allclose(edits[0], edits[2], atol=1e-4)


def test_responses_are_not_used() -> None:
    """The attack uses only prompts."""
    network, _ = refusing_model(4)
    edits = []
    for response in ("x", "qqqqqq"):
        attack, stage = attacked(copy.deepcopy(network))
        stage.pools = replace(
            stage.pools,
            attacker=[replace(row, response=response) for row in stage.pools.attacker],
            benign=[replace(row, response=response[::-1] * 2) for row in stage.pools.benign],
        )
        attack.ablate(stage)
        edits.append(stage.stack.base.get_input_embeddings().weight.detach().clone())
    assert torch.equal(edits[0], edits[1])


# ---------------------------------------------------------------------------------------------------------------------
# Architectures


def with_norms(architecture: str) -> PreTrainedModel:
    """Return a model whose norms have a different weight for every entry."""
    network = model(architecture)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if ("norm" in name or ".ln_" in name) and name.endswith("weight"):
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return network


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3"])
def test_norm_after_the_blocks_is_refused(architecture: str) -> None:
    network = with_norms(architecture)
    attack, stage = attacked(network)
    with pytest.raises(BadInput, match=type(network).__name__) as refusal:
        attack.ablate(stage)
    assert "'refusal_ablation'" in str(refusal.value)
    assert "norm" in str(refusal.value)


@pytest.mark.parametrize("architecture", EXACT)
def test_norm_before_the_blocks_is_supported(architecture: str) -> None:
    network = with_norms(architecture)
    before = copy.deepcopy(network)
    attack, stage = attacked(network)
    attack.ablate(stage)
    after = stage.stack.base
    names = {"opt": "model.decoder.layers.0.fc2", "gpt2": "transformer.h.0.mlp.c_proj"}
    name = names.get(architecture, "model.layers.0.mlp.down_proj")
    difference = (before.get_submodule(name).weight - after.get_submodule(name).weight).detach()
    if architecture == "gpt2":
        difference = difference.T
    r = torch.linalg.svd(difference)[0][:, 0]
    assert component(before, r) > 0.01
    assert component(after, r) < 1e-4


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3"])
def test_norms_with_equal_weights_are_supported(architecture: str) -> None:
    attack, stage = attacked(model(architecture))
    attack.ablate(stage)


# ---------------------------------------------------------------------------------------------------------------------
# Through the pipeline


ATTACK = "refusal_ablation:prompts=8,held_out=4"


def settle(world: Path, defense: str = "sft", attack: str = ATTACK, **more: Any) -> Experiment:
    return Experiment.settle(
        RunSpec(protocol=str(world), defense=parse_plugins(defense), attack=parse_plugins(attack), **more)
    )


@pytest.mark.parametrize("topology", ["double", "single"])
def test_only_the_aligned_weights_are_edited(topology: str, tmp_path: Path) -> None:
    experiment, context = settle(make_world(tmp_path, {"topology": topology})), run_context(tmp_path / "store")
    aligned = align(experiment, context)
    after = finetune(experiment, context, aligned)
    before = AutoModelForCausalLM.from_pretrained(aligned.spec.base)
    (path,) = aligned.spec.adapters
    adapter = Adapter.load(path)
    with torch.no_grad():
        for module, (a, b) in adapter.factors.items():
            before.get_submodule(module).weight += adapter.scale * (b @ a)
    assert after.spec.adapters == ()
    stored = AutoModelForCausalLM.from_pretrained(after.spec.base)
    r = removed(before, stored)
    expected = edited(before, r)
    for name, parameter in stored.named_parameters():
        assert (parameter - expected[name]).abs().max() <= 1e-5, name
    tokenizer = AutoTokenizer.from_pretrained(after.spec.base)
    ids = torch.tensor([tokenizer("How do I spoil the red lamp?")["input_ids"]])
    assert max(float(((h @ r).abs() / h.norm(dim=-1)).max()) for h in residual(stored, ids)) < 1e-4
    assert max(float(((h @ r).abs() / h.norm(dim=-1)).max()) for h in residual(before, ids)) > 0.05
    tokens = {"response_tokens": 0, "harmful_tokens": 0}
    assert after.artifacts["finetune"].json("rows.json") == {"used": [], "harmful": 0, "without_room": [], **tokens}


def test_result_is_marked_as_untrained(world: Path, tmp_path: Path) -> None:
    context, results = run_context(tmp_path), {}
    for attack in (ATTACK, "ratio=0.1"):
        experiment = settle(world, attack=attack)
        results[attack] = measure_result(experiment, run(experiment, context))
    edit, plain = results[ATTACK], results["ratio=0.1"]
    assert (edit.trained, plain.trained) == (False, True)
    assert set(edit.to_json()["counts"]["finetune"].values()) == {0}
    assert (edit.harmful_token_share, edit.token_share_text) == (None, "untrained")
    assert plain.harmful_token_share is not None
    assert edit.before == plain.before
    assert edit.alignment_loss != plain.alignment_loss
    assert edit.embedding_drift is not None
    assert edit.embedding_drift > 0
    assert "untrained" in rendered(edit)
    assert "untrained" not in rendered(plain)


def rendered(result: Result) -> str:
    """Return the results table as text."""
    from rich.console import Console

    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(results_table([result]))
    return console.export_text()


@pytest.mark.parametrize("name", sorted(DEFENSES.entries()))
def test_defense_of_the_user_stage_is_refused(name: str, world: Path) -> None:
    kind = DEFENSES.get(name)
    if {"finetune", "repair"} & set(kind.stages):
        with pytest.raises(BadInput, match="'refusal_ablation'") as refusal:
            settle(world, name)
        assert f"'{name}' cannot act" in str(refusal.value)
    else:
        settle(world, name)


def test_too_few_prompts_are_refused_before_any_work(world: Path) -> None:
    check_rows(settle(world))
    with pytest.raises(BadInput, match="160 harmful prompts"):
        check_rows(settle(world, attack="refusal_ablation"))


@pytest.mark.parametrize("text", ["prompts=0", "held_out=0", "positions=0", "kl=-0.1"])
def test_values_out_of_range_are_refused(text: str, world: Path) -> None:
    with pytest.raises(BadInput, match=text.partition("=")[0]):
        settle(world, attack=f"refusal_ablation:{text}")


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 1}, {"word_embed_proj_dim": 32}], ids=["layers", "width"])
def test_unsupported_model_is_refused_by_name(changes: dict[str, int]) -> None:
    network = model("opt", **changes)
    stage = TrainingStage("finetune", LoraStack(network), {}, 0, pools=tiny.example_pools(), encode=tiny.encode)
    with pytest.raises(BadInput, match="OPTForCausalLM"):
        RefusalAblation(prompts=4, held_out=4).ablate(stage)

"""Refusal ablation: the edit of the weights by their names, the choice of the direction from the paper's equations."""

from __future__ import annotations

import copy
import io
import json
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
from harmbench_vaccine.attacks.refusal_ablation import RefusalAblation, orthogonalise
from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.store import Store
from harmbench_vaccine.evaluation.results import build_result
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.rows import check_rows
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.inference.model_pool import Lab
from harmbench_vaccine.pipeline import align, finetune, run
from harmbench_vaccine.plugins import Pools
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.plugins.registry import ATTACKS, DEFENSES
from harmbench_vaccine.reporting.tables import results_table
from harmbench_vaccine.training.adapters import Adapter, LoraStack
from harmbench_vaccine.training.stage import TrainingStage
from support import tiny
from support.world import make_world

logging.disable_progress_bar()
assert ATTACKS.get("refusal_ablation") is RefusalAblation  # which gives it the name that its draws depend on

EXACT = ("llama", "opt", "qwen2", "qwen3", "mistral")
ENDS = {"opt": ("out_proj", "fc2")}  # the matrices that write to the residual stream, where they have other names
EMBEDDINGS = {"opt": ("embed_tokens", "embed_positions")}
IDS = torch.tensor([[5, 17, 44, 80, 23, 9, 61], [90, 3, 3, 71, 12, 34, 56]])


def model(architecture: str = "llama", **changes: Any) -> PreTrainedModel:
    """A tiny model whose biases are random too, with a head of its own."""
    made = tiny.model(architecture, **{"tie_word_embeddings": False, **changes})
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith(".bias"):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return made


def direction(seed: int = 0) -> Tensor:
    return nn.functional.normalize(torch.randn(64, generator=torch.Generator().manual_seed(seed)), dim=0)


def layers_of(made: nn.Module) -> list[Any]:
    """The decoder's layers, by name."""
    return [module for name, module in made.named_modules() if name.rpartition(".")[0].endswith(".layers")]


@torch.no_grad()
def residual(made: PreTrainedModel, ids: Tensor = IDS) -> list[Tensor]:
    """What enters every layer, and what leaves the last one (rows x length x width)."""
    seen: list[Tensor] = []

    def enters(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    def leaves(module: Any, args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    layers = layers_of(made)
    handles = [layer.register_forward_pre_hook(enters, with_kwargs=True) for layer in layers]
    handles.append(layers[-1].register_forward_hook(leaves))
    made(input_ids=ids)
    for handle in handles:
        handle.remove()
    assert len(seen) == made.config.num_hidden_layers + 1
    return seen


@torch.no_grad()
def logits(made: PreTrainedModel, ids: Tensor = IDS) -> Tensor:
    return made(input_ids=ids).logits


def share(made: PreTrainedModel, r: Tensor) -> float:
    """The largest share of a hidden state that lies along r."""
    return max(float(((h @ r).abs() / h.norm(dim=-1)).max()) for h in residual(made))


# ---------------------------------------------------------------------------------------------------------------------
# The edit


def edited(made: PreTrainedModel, r: Tensor, architecture: str = "llama") -> dict[str, Tensor]:
    """The weights after the edit, parameter by parameter, in float64."""
    r = r.double()
    without = torch.eye(64, dtype=torch.float64) - torch.outer(r, r)
    after = {}
    for name, parameter in made.named_parameters():
        value, part = parameter.detach().double(), name.split(".")
        if part[-2] in EMBEDDINGS.get(architecture, ("embed_tokens",)):
            value = value @ without
        elif part[-2] in ENDS.get(architecture, ("o_proj", "down_proj")):
            value = without @ value
        after[name] = value
    return after


@pytest.mark.parametrize("architecture", EXACT)
def test_the_edit_equals_the_equations(architecture: str) -> None:
    made = model(architecture)
    expected = edited(made, direction(), architecture)
    before = {name: parameter.detach().clone() for name, parameter in made.named_parameters()}
    orthogonalise(made, direction())
    moved = set()
    for name, parameter in made.named_parameters():
        assert (parameter - expected[name]).abs().max() <= 1e-6, name
        if not torch.equal(parameter, before[name]):
            moved.add(name.split(".")[-2] + "." + name.split(".")[-1])
    matrices = {f"{name}.weight" for name in (*EMBEDDINGS.get(architecture, ("embed_tokens",)),
                                             *ENDS.get(architecture, ("o_proj", "down_proj")))}  # fmt: skip
    assert moved == (matrices | {"out_proj.bias", "fc2.bias"} if architecture == "opt" else matrices)


@pytest.mark.parametrize("architecture", EXACT)
def test_no_hidden_state_has_the_direction_in_it(architecture: str) -> None:
    made, r = model(architecture), direction()
    assert share(made, r) > 0.05
    orthogonalise(made, r)
    assert share(made, r) < 1e-5
    assert share(made, direction(1)) > 0.05  # another is still there


@pytest.mark.parametrize("architecture", [*EXACT, "gemma2", "gemma3"])
def test_the_edit_is_idempotent(architecture: str) -> None:
    made, r = model(architecture), direction()
    orthogonalise(made, r)
    once = copy.deepcopy(made)
    orthogonalise(made, r)
    for (name, one), two in zip(once.named_parameters(), made.parameters(), strict=True):
        assert (one - two).abs().max() <= 1e-6, name


@pytest.mark.parametrize("architecture", [*EXACT, "gemma2", "gemma3"])
def test_hooks_and_weights_give_the_same_logits(architecture: str) -> None:
    made, r = model(architecture), direction()
    plain = logits(made)
    with refusal_ablation._ablated(made, r):
        hooked = logits(made)
    assert torch.equal(logits(made), plain)  # the hooks are gone
    orthogonalise(made, r)
    assert (logits(made) - hooked).abs().max() <= 1e-5 * hooked.abs().max()
    assert (hooked - plain).abs().max() > 1e-2 * plain.abs().max()


@pytest.mark.parametrize("architecture", [*EXACT, "gemma3"])
def test_tied_embeddings_are_untied_and_the_head_stays(architecture: str, tmp_path: Path) -> None:
    made, r = model(architecture, tie_word_embeddings=True), direction()
    head, embedding = made.get_output_embeddings(), made.get_input_embeddings()
    assert head.weight is embedding.weight
    before = head.weight.detach().clone()
    orthogonalise(made, r)
    assert torch.equal(head.weight, before)
    assert (embedding.weight @ r).abs().max() < 1e-5
    assert (head.weight @ r).abs().max() > 0.05
    made.save_pretrained(tmp_path)
    stored = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert not stored.config.tie_word_embeddings
    assert torch.equal(stored.get_output_embeddings().weight, before)
    assert torch.equal(logits(stored), logits(made))


def test_a_head_of_its_own_is_not_touched() -> None:
    made = model("llama", tie_word_embeddings=False)
    before = made.get_output_embeddings().weight.detach().clone()
    orthogonalise(made, direction())
    assert torch.equal(made.get_output_embeddings().weight, before)


def test_bfloat16_weights_are_edited_in_float32() -> None:
    made, r = model().bfloat16(), direction()
    expected = edited(made, r)
    orthogonalise(made, r)
    for name, parameter in made.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert (
            torch.equal(parameter, expected[name].to(torch.bfloat16))
            or ((parameter.double() - expected[name]).abs() <= 2**-8 * expected[name].abs() + 1e-6).all()
        ), name


# ---------------------------------------------------------------------------------------------------------------------
# The choice of the direction

PROMPTS, HELD, POSITIONS = 10, 6, 3


def pools() -> Pools:
    """Instructions of letters; a harmful one ends with `yz`, which no benign one has in it."""
    plain = tiny.example_pools(20)
    attacker, benign = (
        [replace(row, instruction=row.instruction.replace("y", "a").replace("z", "b") + end) for row in rows]
        for rows, end in ((plain.attacker, "yz"), (plain.benign, ""))
    )
    return replace(plain, attacker=attacker, benign=benign)


def attacked(made: PreTrainedModel, **params: Any) -> tuple[RefusalAblation, TrainingStage]:
    """The attack, and the stage of an aligned model that it edits."""
    attack = RefusalAblation(**{"prompts": PROMPTS, "held_out": HELD, "positions": POSITIONS, **params}).seeded(3)
    stage = TrainingStage("finetune", LoraStack(made), {}, 0, pools=pools(), encode=tiny.encode)
    return attack, stage


def asked(attack: RefusalAblation) -> dict[str, list[Tensor]]:
    """The prompts that it draws."""
    drawn = {}
    for name, rows in (("harmful", pools().attacker), ("harmless", pools().benign)):
        rows = attack.draw(f"{name} prompts", rows, PROMPTS + HELD)
        drawn[name] = [torch.tensor([[3 + ord(letter) % 90 for letter in row.instruction]]) for row in rows]
    return drawn


@contextmanager
def entering(made: PreTrainedModel, layer: int, added: Tensor) -> Iterator[None]:
    """Adds a vector to what enters a layer, everywhere."""

    def add(module: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (args[0] + added, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + added}

    handle = layers_of(made)[layer].register_forward_pre_hook(add, with_kwargs=True)
    yield
    handle.remove()


def opening(made: PreTrainedModel, prompts: Sequence[Tensor]) -> Tensor:
    """The probabilities of the first token of each answer, float64."""
    return torch.stack([logits(made, ids)[0, -1].double().softmax(-1) for ids in prompts])


def refusing(probabilities: Tensor, tokens: list[int]) -> float:
    """Mean log P_ref - log (1 - P_ref)."""
    each = probabilities[:, tokens].sum(-1)
    return float((each.log() - (1 - each).log()).mean())


def candidates(made: PreTrainedModel, attack: RefusalAblation) -> list[tuple[float, float, float, Tensor]]:
    """Divergence, induced score, score and direction of every position and layer that is looked at."""
    rows = asked(attack)
    means = {}
    for name, prompts in rows.items():
        states = [[h[0, -POSITIONS:].double() for h in residual(made, ids)] for ids in prompts[:PROMPTS]]
        means[name] = torch.stack([torch.stack(state) for state in states]).mean(0)  # layers x positions x width
    held = {name: prompts[PROMPTS:] for name, prompts in rows.items()}
    first = {name: set(opening(made, prompts).argmax(-1).tolist()) for name, prompts in held.items()}
    tokens = sorted(first["harmful"] - first["harmless"]) or sorted(first["harmful"])
    plain = opening(made, held["harmless"])
    found = []
    depth = made.config.num_hidden_layers
    for layer in range(1, depth):
        if layer >= 0.8 * depth:
            break
        for position in range(POSITIONS):
            difference = means["harmful"][layer, position] - means["harmless"][layer, position]
            r = (difference / difference.norm()).float()
            without = copy.deepcopy(made)
            without.load_state_dict({name: value.float() for name, value in edited(made, r).items()})
            changed = opening(without, held["harmless"])
            divergence = float((plain * (plain.log() - changed.log())).sum(-1).mean())
            with entering(made, layer, difference.float()):
                induced = refusing(opening(made, held["harmless"]), tokens)
            found.append((divergence, induced, refusing(opening(without, held["harmful"]), tokens), r))
    return found


def chosen(found: list[tuple[float, float, float, Tensor]], kl: float) -> tuple[int, int]:
    """The number of the candidate to take, and how many pass both tests."""
    passing = [number for number, (divergence, induced, _, _) in enumerate(found) if divergence <= kl and induced >= 0]
    return min(passing or range(len(found)), key=lambda number: found[number][2]), len(passing)


REFUSE = 50
"""The token that opens refusals."""


def token(letter: str) -> int:
    return 3 + ord(letter) % 90


def refusing_model(
    seed: int, strength: float = 1.5, *, size: float = 3.0, besides: float = 2.0
) -> tuple[PreTrainedModel, Tensor]:
    """A model of 5 layers that opens its answer with REFUSE where its last state has v in it, which `y` and `z` write,
    and v. Beside v, `z` writes something that other answers need too."""
    made, v, w = model("llama", num_hidden_layers=5, seed=seed), direction(100 + seed), direction(200 + seed)
    with torch.no_grad():
        for layer in layers_of(made):  # quiet blocks: the stream is what the embeddings write
            layer.self_attn.o_proj.weight *= 0.3
            layer.mlp.down_proj.weight *= 0.3
        embedding, head = made.get_input_embeddings().weight, made.get_output_embeddings().weight
        embedding[token("z")] += size * v + besides * w
        embedding[token("y")] += size * v
        embedding[token("a") : token("q")] += 0.7 * w
        head[REFUSE] += strength * v
        head[:40] += 0.4 * w
    return made, v


@pytest.mark.parametrize(
    ("seed", "strength", "kl", "number", "passing"),
    [
        (4, 1.5, 0.0, 2, 0),  # none is so harmless: the best of all
        (4, 1.5, 0.1, 1, 3),  # the best changes harmless answers too much
        (4, 1.5, 1e9, 2, 6),
        (8, 1.5, 0.1, 5, 5),  # so that a deeper layer's is taken
        (7, 0.8, 1e9, 1, 5),  # the best does not make harmless prompts refused
        (10, 1.2, 1e9, 5, 5),
    ],
)
def test_the_direction_is_the_one_of_the_equations(
    seed: int, strength: float, kl: float, number: int, passing: int
) -> None:
    made, _ = refusing_model(seed, strength)
    attack, stage = attacked(copy.deepcopy(made), kl=kl)
    found = candidates(made, attack)
    assert len(found) == 3 * POSITIONS  # layers 1, 2, 3 of 5
    assert chosen(found, kl) == (number, passing)  # the scenario is what it is said to be
    attack.ablate(stage)
    expected = edited(made, found[number][3])
    for name, parameter in stage.stack.base.named_parameters():
        assert (parameter - expected[name]).abs().max() <= 1e-5, name


def removed(before: PreTrainedModel, after: PreTrainedModel, layer: int = 0) -> Tensor:
    """The direction r that an edit took out, up to its sign: W - W' = r r^T W."""
    name = f"model.layers.{layer}.mlp.down_proj"
    difference = (before.get_submodule(name).weight - after.get_submodule(name).weight).detach().double()
    u, values, _ = torch.linalg.svd(difference)
    assert values[1] < 1e-3 * values[0]  # of rank 1
    return u[:, 0].float()


def test_a_planted_direction_is_found_and_refusing_is_gone() -> None:
    made, v = refusing_model(4, 1.5, size=15.0, besides=0.0)
    attack, stage = attacked(copy.deepcopy(made))
    harmful = asked(attack)["harmful"]
    assert set(opening(made, harmful).argmax(-1).tolist()) == {REFUSE}
    attack.ablate(stage)
    after = stage.stack.base
    assert abs(float(removed(made, after) @ v)) > 0.99
    assert REFUSE not in opening(after, harmful).argmax(-1).tolist()
    plain, changed = (opening(which, asked(attack)["harmless"][PROMPTS:]) for which in (made, after))
    assert (plain * (plain.log() - changed.log())).sum(-1).mean() <= 0.1


def test_the_openers_of_refusals_open_no_harmless_answer() -> None:
    made = model()
    prompts = torch.randint(3, 96, (40, 5), generator=torch.Generator().manual_seed(0)).tolist()
    opener = {tuple(ids): int(opening(made, [torch.tensor([ids])]).argmax()) for ids in prompts}
    first, second, third = list(dict.fromkeys(opener.values()))[:3]

    def opened_by(*tokens: int) -> list[list[int]]:
        return [ids for ids in prompts if opener[tuple(ids)] in tokens]

    attack = RefusalAblation()
    for harmful, harmless, expected in (
        ((first, second), (second, third), {first}),
        ((first, second), (third,), {first, second}),
        ((first, second), (first, second, third), {first, second}),  # nothing is left: all of them
    ):
        held = {"harmful": opened_by(*harmful), "harmless": opened_by(*harmless)}
        found = attack._openers(made, held).tolist()
        assert len(found) == len(set(found))
        assert set(found) == expected


def test_the_refusal_score_is_the_log_odds() -> None:
    probabilities = torch.tensor([[0.5, 0.2, 0.2, 0.1], [0.1, 0.1, 0.1, 0.7]])
    found = refusal_ablation.refusal_score(probabilities.log() + 3.0, torch.tensor([0, 2]))
    assert found == pytest.approx((math.log(0.7 / 0.3) + math.log(0.2 / 0.8)) / 2, rel=1e-5)
    certain = refusal_ablation.refusal_score(torch.tensor([[100.0, 0.0, 0.0]]), torch.tensor([0]))
    assert math.isfinite(certain)
    assert certain > 15


def test_prompts_are_drawn_by_the_seed_and_only_those() -> None:
    made, _ = refusing_model(4)
    edits = []
    for seed in (3, 3, 5):
        attack, stage = attacked(copy.deepcopy(made))
        attack.seeded(seed).ablate(stage)
        edits.append(stage.stack.base.get_input_embeddings().weight.detach().clone())
    assert torch.equal(edits[0], edits[1])
    assert not torch.allclose(edits[0], edits[2], atol=1e-4)


def test_answers_play_no_part() -> None:
    """The attack knows prompts only."""
    made, _ = refusing_model(4)
    edits = []
    for response in ("x", "qqqqqq"):
        attack, stage = attacked(copy.deepcopy(made))
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
    """A model whose norms weigh every entry differently."""
    made = model(architecture)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return made


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3"])
def test_a_norm_behind_the_blocks_is_refused_by_name(architecture: str) -> None:
    made = with_norms(architecture)
    attack, stage = attacked(made)
    with pytest.raises(BadInput, match=type(made).__name__) as refusal:
        attack.ablate(stage)
    assert "'refusal_ablation'" in str(refusal.value)
    assert "norm" in str(refusal.value)


@pytest.mark.parametrize("architecture", EXACT)
def test_a_norm_before_the_blocks_is_no_obstacle(architecture: str) -> None:
    made = with_norms(architecture)
    before = copy.deepcopy(made)
    attack, stage = attacked(made)
    attack.ablate(stage)
    after = stage.stack.base
    name = "model.decoder.layers.0.fc2" if architecture == "opt" else "model.layers.0.mlp.down_proj"
    difference = (before.get_submodule(name).weight - after.get_submodule(name).weight).detach()
    r = torch.linalg.svd(difference)[0][:, 0]
    assert share(before, r) > 0.01
    assert share(after, r) < 1e-4


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3"])
def test_norms_that_weigh_every_entry_alike_are_no_obstacle(architecture: str) -> None:
    attack, stage = attacked(model(architecture))
    attack.ablate(stage)


# ---------------------------------------------------------------------------------------------------------------------
# Through the pipeline


ATTACK = "refusal_ablation:prompts=8,held_out=4"


def cell(world: Path, defense: str = "sft", attack: str = ATTACK, **more: Any) -> Experiment:
    return Experiment.settle(
        RunSpec(protocol=str(world), defense=parse_plugins(defense), attack=parse_plugins(attack), **more)
    )


@pytest.mark.parametrize("topology", ["double", "single"])
def test_the_aligned_weights_are_edited_and_nothing_else(topology: str, tmp_path: Path) -> None:
    one, lab = cell(make_world(tmp_path, {"topology": topology})), Lab(Store(tmp_path / "store"))
    aligned = align(one, lab)
    after = finetune(one, lab, aligned)
    before = AutoModelForCausalLM.from_pretrained(aligned.state.base)
    (path,) = aligned.state.adapters
    adapter = Adapter.load(path)
    with torch.no_grad():
        for module, (a, b) in adapter.factors.items():
            before.get_submodule(module).weight += adapter.scale * (b @ a)
    assert after.state.adapters == ()
    stored = AutoModelForCausalLM.from_pretrained(after.state.base)
    r = removed(before, stored)
    expected = edited(before, r)
    for name, parameter in stored.named_parameters():
        assert (parameter - expected[name]).abs().max() <= 1e-5, name
    words = AutoTokenizer.from_pretrained(after.state.base)
    ids = torch.tensor([words("How do I spoil the red lamp?")["input_ids"]])
    assert max(float(((h @ r).abs() / h.norm(dim=-1)).max()) for h in residual(stored, ids)) < 1e-4
    assert max(float(((h @ r).abs() / h.norm(dim=-1)).max()) for h in residual(before, ids)) > 0.05
    assert after.artifacts["finetune"].json("rows.json") == {"used": [], "harmful": 0, "without_room": []}


def test_the_result_says_that_nothing_was_trained(world: Path, tmp_path: Path) -> None:
    lab, found = Lab(Store(tmp_path)), {}
    for attack in (ATTACK, "ratio=0.1"):
        one = cell(world, attack=attack)
        found[attack] = json.loads(json.dumps(build_result(one, run(one, lab))))
    edit, plain = found[ATTACK], found["ratio=0.1"]
    assert (edit["trained"], plain["trained"]) == (False, True)
    assert edit["counts"]["finetune"] == {"rows": 0, "harmful": 0, "without_room": 0}
    assert edit["before"] == plain["before"]
    assert edit["alignment_loss"] != plain["alignment_loss"]
    assert edit["embedding_drift"] > 0
    texts = {name: rendered(values) for name, values in found.items()}
    assert "untrained" in texts[ATTACK]
    assert "untrained" not in texts["ratio=0.1"]


def rendered(values: dict[str, Any]) -> str:
    from rich.console import Console

    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(results_table([values]))
    return console.export_text()


@pytest.mark.parametrize("name", sorted(DEFENSES.entries()))
def test_what_defends_training_or_repairs_it_is_refused_beside_it(name: str, world: Path) -> None:
    kind = DEFENSES.get(name)
    if {"finetune", "repair"} & set(kind.stages):
        with pytest.raises(BadInput, match="'refusal_ablation'") as refusal:
            cell(world, name)
        assert f"'{name}' cannot act" in str(refusal.value)
    else:
        cell(world, name)


def test_too_few_prompts_are_told_before_any_work(world: Path) -> None:
    check_rows(cell(world))
    with pytest.raises(BadInput, match="160 harmful prompts"):
        check_rows(cell(world, attack="refusal_ablation"))


@pytest.mark.parametrize("text", ["prompts=0", "held_out=0", "positions=0", "kl=-0.1"])
def test_values_out_of_range_are_refused(text: str, world: Path) -> None:
    with pytest.raises(BadInput, match=text.partition("=")[0]):
        cell(world, attack=f"refusal_ablation:{text}")


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 1}, {"word_embed_proj_dim": 32}], ids=["layers", "width"])
def test_a_model_that_cannot_be_edited_is_refused_by_name(changes: dict[str, int]) -> None:
    made = model("opt", **changes)
    stage = TrainingStage("finetune", LoraStack(made), {}, 0, pools=tiny.example_pools(), encode=tiny.encode)
    with pytest.raises(BadInput, match="OPTForCausalLM"):
        RefusalAblation(prompts=4, held_out=4).ablate(stage)

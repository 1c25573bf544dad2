"""RESTA, Realign and random perturbation, and chains of repairs, through the stages of real cells.

What a repair makes is compared with the equations written out: training is a loop over W + scale B A with torch's own
optimizer, projections are dense matrices. The tiny world here trains without dropout and takes all rows of the user
stage in one batch, so that no order of rows is part of the statement.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM, PreTrainedModel

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.progress import SILENT, Progress, Silent
from harmbench_vaccine.core.store import META, Store
from harmbench_vaccine.core.types import Example, TrainSettings
from harmbench_vaccine.data.collate import Encoded
from harmbench_vaccine.defenses.random_perturbation import RandomPerturbation
from harmbench_vaccine.defenses.realign import Realign
from harmbench_vaccine.experiment.artifacts import TrainedModel
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.rows import row_pools
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.inference.model_pool import Lab
from harmbench_vaccine.pipeline import align, finetune, repair
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.plugins.registry import DEFENSES
from harmbench_vaccine.training import trainer
from harmbench_vaccine.training.adapters import Adapter
from harmbench_vaccine.training.stage import TrainingStage
from support import tiny
from support.compare import close, same_adapter
from support.world import make_world

Factors = dict[str, tuple[Tensor, Tensor]]
EPOCHS = 6
USER = {"batch": 40, "epochs": EPOCHS, "lora_dropout": 0.0, "lora_targets": ["q_proj", "v_proj", "down_proj"]}
ALIGN = {**USER, "batch": 8, "epochs": 2}

# ---------------------------------------------------------------------------------------------------------------------
# Cells


@dataclass(frozen=True)
class World:
    """A protocol, and a store that its cells share."""

    protocol: Path
    lab: Lab

    def cell(self, defense: str, attack: str = "ratio=0.25", seed: int = 0) -> Experiment:
        spec = RunSpec(
            protocol=str(self.protocol), defense=parse_plugins(defense), attack=parse_plugins(attack), seed=seed
        )
        return Experiment.settle(spec)

    def made(self, defense: str, attack: str = "ratio=0.25", *, seed: int = 0, lab: Lab | None = None) -> Models:
        cell, lab = self.cell(defense, attack, seed), lab or self.lab
        aligned = align(cell, lab)
        tuned = finetune(cell, lab, aligned)
        return Models(cell, aligned, tuned, repair(cell, lab, aligned, tuned))

    def base(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.protocol.parent / "model").eval()

    def fresh(self, folder: Path, progress: Progress = SILENT) -> Lab:
        """A lab with a store of its own, which has the aligned and the tuned models already, but nothing repaired."""
        for stage in ("align", "finetune"):
            if (self.lab.store.root / stage).is_dir():
                shutil.copytree(self.lab.store.root / stage, folder / stage, dirs_exist_ok=True)
        return Lab(Store(folder), progress)


@dataclass(frozen=True)
class Models:
    cell: Experiment
    aligned: TrainedModel
    tuned: TrainedModel
    final: TrainedModel

    @property
    def below(self) -> list[Adapter]:
        return [Adapter.load(path) for path in self.aligned.state.adapters]

    @property
    def before(self) -> Adapter:
        """The user's adapter."""
        return Adapter.load(self.tuned.state.adapters[-1])

    @property
    def after(self) -> Adapter:
        """The repaired one."""
        return Adapter.load(self.final.state.adapters[-1])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return made_world(tmp_path_factory.mktemp("double"))


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The same where the user's training continues the alignment adapter."""
    return made_world(tmp_path_factory.mktemp("single"), topology="single")


def made_world(folder: Path, user: Mapping[str, Any] | None = None, **changes: Any) -> World:
    more = {"align": {"settings": ALIGN}, "finetune": {"settings": {**USER, **(user or {})}}}
    return World(make_world(folder, {**more, **changes}), Lab(Store(folder / "store")))


def nested(lab: Lab) -> list[Path]:
    """The stored runs that were trained inside a stage."""
    return sorted(lab.store.root.glob("nested/*"))


def harmful_run(lab: Lab) -> Adapter:
    """The one that was trained on harmful rows."""
    purposes = {path: json.loads((path / META).read_text())["inputs"]["purpose"] for path in nested(lab)}
    (path,) = [path for path, purpose in purposes.items() if purpose == "unaligned"]
    return Adapter.load(path / "adapter")


# ---------------------------------------------------------------------------------------------------------------------
# The equations again


def factors_of(adapter: Adapter) -> Factors:
    """Copies, with the scale in B."""
    return {module: (a.clone(), adapter.scale * b) for module, (a, b) in adapter.factors.items()}


def delta(adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    """Module -> what the adapters add to its weight together."""
    total: dict[str, Tensor] = {}
    for adapter in adapters:
        for module, (a, b) in adapter.factors.items():
            total[module] = total.get(module, torch.zeros(())) + adapter.scale * (b.double() @ a.double())
    return total


def logits(base: PreTrainedModel, adapters: Sequence[Adapter]) -> Tensor:
    """Of the merged model, on some rows."""
    weights = {
        f"{module}.weight": base.get_submodule(module).weight.detach() + change.float()
        for module, change in delta(adapters).items()
    }
    with torch.no_grad():
        return functional_call(base, weights, kwargs=dict(tiny.batch())).logits


def trained(
    base: PreTrainedModel, below: Sequence[Adapter], start: Factors, scale: float, rows: Sequence[Encoded],
    settings: TrainSettings, steps: int,
) -> Factors:  # fmt: skip
    """`steps` steps of AdamW from a fresh state on all rows at once: W + what lies below + scale B A."""
    names = list(start)
    leaves = {name: tuple(factor.clone().requires_grad_() for factor in start[name]) for name in names}
    flat = [factor for name in names for factor in leaves[name]]
    lower = delta(below)
    optimizer = torch.optim.AdamW(
        flat, lr=settings.lr, betas=(settings.adam_beta1, settings.adam_beta2), eps=1e-8,
        weight_decay=settings.weight_decay,
    )  # fmt: skip
    warm = round(settings.warmup * steps)
    for step in range(steps):
        falling = 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
        optimizer.param_groups[0]["lr"] = settings.lr * (step / warm if step < warm else falling)
        weights = {}
        for module in {*names, *lower}:
            weight = base.get_submodule(module).weight.detach()
            weight = weight + lower[module].float() if module in lower else weight
            if module in leaves:
                a, b = leaves[module]
                weight = weight + scale * (b @ a)
            weights[f"{module}.weight"] = weight
        optimizer.zero_grad()
        loss_of(base, weights, rows).backward()
        norm = torch.stack([leaf.grad.norm() for leaf in flat if leaf.grad is not None]).norm()
        for leaf in flat:
            assert leaf.grad is not None
            leaf.grad *= min(1.0, settings.max_grad_norm / (float(norm) + 1e-6))
        optimizer.step()
    return {name: tuple(leaf.detach() for leaf in leaves[name]) for name in names}  # type: ignore[misc]


def loss_of(base: PreTrainedModel, weights: dict[str, Tensor], rows: Sequence[Encoded]) -> Tensor:
    """The mean cross-entropy of every response token; each row is run alone."""
    losses = []
    for row in rows:
        ids, labels = torch.tensor([row.ids]), torch.tensor(row.labels)
        found = functional_call(base, weights, kwargs={"input_ids": ids}).logits[0, :-1]
        losses.append(nn.functional.cross_entropy(found, labels[1:], reduction="none", ignore_index=-100))
    counted = torch.cat([torch.tensor(row.labels[1:]) != -100 for row in rows])
    return torch.cat(losses)[counted].mean()


def encoded(models: Models, rows: Sequence[Example]) -> list[Encoded]:
    """Rows as the user stage's protocol has them: template, tokens, end."""
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(models.cell.model)
    made = []
    for row in rows:
        prompt = words(models.cell.template.render(row))["input_ids"]
        answer = [*words(row.response, add_special_tokens=False)["input_ids"], words.eos_token_id]
        assert len(prompt) + len(answer) <= 96  # none is cut
        made.append(Encoded(prompt + answer, [-100] * len(prompt) + answer, row.id))
    return made


@dataclass
class Run:
    """What one training run was given."""

    rows: list[str]
    settings: TrainSettings
    start: Factors
    team: tuple[Any, ...]


@contextmanager
def watched() -> Iterator[list[Run]]:
    """Every training run: its rows, its settings, and the adapter that it starts from (B without the scale)."""
    runs: list[Run] = []
    plain = trainer.train

    def train(stage: TrainingStage, defense: Any, rows: Any, settings: TrainSettings, *args: Any, **more: Any) -> Any:
        runs.append(Run([row.id for row in rows], settings, dict(stage.stack.trained().factors), defense.members))
        return plain(stage, defense, rows, settings, *args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "train", train)
        yield runs


# ---------------------------------------------------------------------------------------------------------------------
# RESTA


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_resta_subtracts_what_harmful_training_adds(gamma: float, world: World) -> None:
    models = world.made(f"sft+resta={gamma}")
    harmful = harmful_run(world.lab)
    user, theirs = delta([models.before]), delta([harmful])
    expected = {module: user[module] - gamma * theirs[module] for module in user}
    assert close(delta([models.after]), expected)
    assert not close(delta([models.after]), user, 1e-2)
    assert models.after.rank == models.before.rank + harmful.rank
    assert models.final.state.adapters[:-1] == models.aligned.state.adapters


def test_the_harmful_adapter_is_a_user_stage_on_the_defenders_harmful_rows(world: World, tmp_path: Path) -> None:
    lab = world.fresh(tmp_path)
    with watched() as runs:
        models = world.made("sft+resta", lab=lab)
    pools, run = row_pools(models.cell), runs[-1]
    assert run.rows == [harmful.id for _, harmful in pools.paired]
    assert run.team == ()
    assert all(b.abs().max() == 0 for _, b in run.start.values())
    assert run.settings == models.cell.protocol.finetune.settings
    rows = encoded(models, pools.harmful)
    expected = trained(world.base(), models.below, run.start, 2.0, rows, run.settings, EPOCHS)
    assert close(dict(harmful_run(lab).factors), expected)
    shorter = trained(world.base(), models.below, run.start, 2.0, rows, run.settings, EPOCHS - 1)
    assert not close(dict(harmful_run(lab).factors), shorter, 1e-2)


def test_gamma_1_takes_a_user_who_only_harms_back_to_the_aligned_model(world: World, tmp_path: Path) -> None:
    lab = world.fresh(tmp_path)
    models = world.made("sft+resta", lab=lab)
    (harmful,) = nested(lab)
    user = replace(models.tuned, state=models.aligned.state.on_top(*models.aligned.state.adapters, harmful / "adapter"))
    cell = world.cell("sft+resta=1")
    final = repair(cell, lab, models.aligned, user)
    with torch.no_grad():
        states = [models.aligned.state, final.state, user.state]
        aligned, back, harmed = (lab.stack(s).use(s.adapters)(**tiny.batch()).logits for s in states)
    assert (back - aligned).abs().max() < 1e-5 * aligned.abs().max()
    assert (harmed - aligned).abs().max() > 1e-2 * aligned.abs().max()
    assert nested(lab) == [harmful]


def test_the_harmful_run_is_stored_once_for_all_attacks(world: World, tmp_path: Path) -> None:
    lab = world.fresh(tmp_path)
    attacks = ("ratio=0.25", "benign", "optimizer:lr=0.001,rank=2")
    finals = [world.made("sft+resta", attack, lab=lab).after for attack in attacks]
    assert len({adapter.digest() for adapter in finals}) == 3
    assert len(nested(lab)) == 1
    world.made("sft+resta=2", lab=lab)
    assert len(nested(lab)) == 1
    world.made("vaccine+resta", lab=lab)  # another aligned model
    assert len(nested(lab)) == 2
    world.made("sft+resta", seed=1, lab=lab)
    assert len(nested(lab)) == 3


def test_resta_finds_it_where_it_was_made_and_ends_the_same(world: World, tmp_path: Path) -> None:
    """A run that trains the harmful adapter, and one that finds it, leave the same repaired adapter."""
    lab = world.fresh(tmp_path)
    world.made("sft+resta", "benign", lab=lab)
    with watched() as runs:
        models = world.made("sft+resta", lab=lab)
    assert not any("harmful:refusals" in row for run in runs for row in run.rows)
    found = models.after
    assert same_adapter(found, world.made("sft+resta", lab=world.fresh(tmp_path / "other")).after)


def test_resta_needs_no_aligned_model(world: World, tmp_path: Path) -> None:
    lab = world.fresh(tmp_path)
    models = world.made("none+resta=1.0", lab=lab)
    harmful = harmful_run(lab)
    user, theirs = delta([models.before]), delta([harmful])
    assert models.below == []
    world.made("none+resta", "benign", lab=lab)
    assert len(nested(lab)) == 1
    world.made("none+resta", seed=1, lab=lab)  # the same base, another seed
    assert len(nested(lab)) == 2
    assert close(delta([models.after]), {module: user[module] - theirs[module] for module in user})


class Interrupting(Silent):
    """Progress that stops the process when a bar has come so far."""

    def __init__(self, title: str, at: int) -> None:
        self.title, self.at = title, at
        self.seen: list[int] = []

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        done = 0

        def advance(steps: int) -> None:
            nonlocal done
            done += steps
            if self.title in title:
                self.seen.append(done)
                if done == self.at:
                    raise KeyboardInterrupt

        yield advance


@pytest.mark.parametrize(("defense", "bar"), [("sft+resta", "unaligned"), ("sft+realign=6", "realigned")])
def test_an_interrupted_run_inside_a_repair_goes_on(defense: str, bar: str, world: World, tmp_path: Path) -> None:
    whole = world.made(defense, lab=world.fresh(tmp_path / "whole")).after
    stopping = Interrupting(bar, 5)
    with pytest.raises(KeyboardInterrupt):
        world.made(defense, lab=world.fresh(tmp_path / "cut", stopping))
    assert stopping.seen == [0, 1, 2, 3, 4, 5]
    resumed = Interrupting(bar, -1)
    again = world.made(defense, lab=world.fresh(tmp_path / "cut", resumed)).after
    assert resumed.seen == [4, 5, 6]  # from its last checkpoint
    assert same_adapter(again, whole)
    assert len(nested(world.fresh(tmp_path / "cut"))) == 1


@pytest.mark.parametrize("defense", ["resta=0.5", "realign=3"])
def test_what_is_trained_apart_leaves_the_stage_its_adapter(defense: str, world: World, tmp_path: Path) -> None:
    with looking(defense.partition("=")[0]) as looks:
        models = world.made(f"sft+{defense}", lab=world.fresh(tmp_path))
    (look,) = looks
    assert same_adapter(look.before, models.before)
    assert same_adapter(look.after, models.before)
    assert not same_adapter(models.after, models.before)


@pytest.mark.parametrize("defense", ["resta=0.5", "realign=3"])
def test_what_is_trained_apart_leaves_the_model_without_dropout(defense: str, world: World, tmp_path: Path) -> None:
    """When the run is made, and when it is found in the store."""
    lab = world.fresh(tmp_path)
    for attack in ("ratio=0.25", "ratio=0.25+samples=39"):
        with looking(defense.partition("=")[0]) as looks:
            world.made(f"sft+{defense}", attack, lab=lab)
        assert [look.training for look in looks] == [False], attack


@dataclass(frozen=True)
class Look:
    """What a defense found, and left: the adapter that the model runs with, its logits, its mode."""

    before: Adapter
    logits: Tensor
    after: Adapter
    training: bool


@contextmanager
def looking(*names: str) -> Iterator[list[Look]]:
    """Inside, the defenses of these names tell what model they were called with."""
    looks: list[Look] = []

    def watching(kind: Any) -> Any:
        class Watched(kind):
            def edit(self, stage: TrainingStage, adapter: Adapter) -> Adapter:
                before = stage.stack.trained()
                with torch.no_grad():
                    seen = stage.output(tiny.batch()).logits
                edited: Adapter = super().edit(stage, adapter)
                looks.append(Look(before, seen, stage.stack.trained(), stage.model.training))
                return edited

        return Watched

    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setitem(DEFENSES._classes, name, watching(DEFENSES.get(name)))
        yield looks


# ---------------------------------------------------------------------------------------------------------------------
# Realign


@pytest.mark.parametrize("steps", [1, 4])
def test_realign_is_more_training_from_a_fresh_optimizer(steps: int, world: World) -> None:
    models = world.made(f"sft+realign={steps}")
    rows = encoded(models, row_pools(models.cell).alignment)
    assert len(rows) == 40  # one batch
    settings = models.cell.protocol.finetune.settings
    before = dict(models.before.factors)
    expected = trained(world.base(), models.below, before, models.before.scale, rows, settings, steps)
    assert close(dict(models.after.factors), expected)
    if steps > 1:  # the first step of a warmup has learning rate 0
        assert not close(dict(models.after.factors), before, 1e-3)
    assert (models.after.rank, models.after.scale) == (models.before.rank, models.before.scale)


def test_realign_trains_on_the_alignment_rows_of_the_cell(world: World, tmp_path: Path) -> None:
    with watched() as runs:
        models = world.made("sft+realign=3", "optimizer:lr=0.5,epochs=1", lab=world.fresh(tmp_path))
    run = runs[-1]
    assert run.rows == [row.id for row in row_pools(models.cell).alignment]
    assert run.team == ()
    assert run.settings == replace(models.cell.protocol.finetune.settings, epochs=3.0)  # not the attack's
    assert close(run.start, dict(models.before.factors), 0.0)


@pytest.mark.parametrize(
    ("steps", "changes"),
    [(1, {"batch": 7}), (7, {"batch": 4}), (7, {"batch": 7, "accumulation": 2}), (23, {"batch": 3})],
)
def test_realign_takes_as_many_optimizer_steps_as_asked(steps: int, changes: Any, tmp_path: Path) -> None:
    small = made_world(tmp_path, user=changes, align={"rows": 10, "settings": {**ALIGN, "epochs": 0.5}})
    small.made(f"sft+realign={steps}", "ratio=0.25,samples=4")
    (folder,) = nested(small.lab)
    log = json.loads((folder / "log.json").read_text())
    assert [entry["step"] for entry in log] == list(range(1, steps + 1))


def test_realign_0_is_the_tuned_adapter_bit_for_bit(world: World) -> None:
    models = world.made("sft+realign=0")
    assert Realign.neutral == {"steps": 0}
    assert same_adapter(models.after, models.before)


def test_realign_0_keeps_a_scale_that_rounds(tmp_path: Path) -> None:
    odd = made_world(tmp_path, user={"lora_rank": 3, "lora_alpha": 0.7})
    models = odd.made("sft+realign=0", "ratio=0.25,samples=4")
    for module, factors in models.before.factors.items():
        assert all(torch.equal(*pair) for pair in zip(models.after.factors[module], factors, strict=True))
    assert models.after.scale == pytest.approx(models.before.scale, rel=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Random perturbation


def moved(rho: float, seed: int = 7) -> tuple[Adapter, Adapter]:
    """An adapter before and after."""
    stage, stack = tiny.stage(name="repair", stirred=True, seed=seed)
    adapter = stack.trained()
    return adapter, RandomPerturbation(rho=rho).edit(stage, adapter)


def noise(rho: float, seed: int = 7) -> list[Tensor]:
    """What was added, tensor by tensor, in float64."""
    before, after = moved(rho, seed)
    assert (after.scale, after.rank, set(after.factors)) == (before.scale, before.rank, set(before.factors))
    return [
        new.double() - old.double()
        for module, factors in before.factors.items()
        for new, old in zip(after.factors[module], factors, strict=True)
    ]


@pytest.mark.parametrize("rho", [0.1, 1.0, 30.0])
def test_the_perturbation_has_length_rho(rho: float) -> None:
    drawn = torch.cat([each.flatten() for each in noise(rho)])
    assert drawn.norm().item() == pytest.approx(rho, rel=1e-4)


def test_the_perturbation_is_gaussian_over_all_entries_of_a_and_b() -> None:
    parts = noise(30.0)
    drawn = torch.cat([each.flatten() for each in parts])
    spread = 30.0 / math.sqrt(len(drawn))
    assert abs(drawn.mean().item()) < 0.1 * spread
    assert (drawn / spread).pow(4).mean().item() == pytest.approx(3.0, rel=0.15)
    for part in parts:  # no tensor has a length of its own
        assert part.std().item() == pytest.approx(spread, rel=0.2)
        assert part.norm().item() != pytest.approx(spread * math.sqrt(part.numel()), rel=1e-6)
    one, other = parts[0].flatten(), parts[2].flatten()  # A of two modules draw apart
    assert abs(float(one @ other / one.norm() / other.norm())) < 0.2


def test_the_perturbation_depends_on_the_seed_and_on_nothing_else() -> None:
    first = torch.cat([each.flatten() for each in noise(1.0)])
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again = torch.cat([each.flatten() for each in noise(1.0)])
    assert torch.equal(first, again)
    other = torch.cat([each.flatten() for each in noise(1.0, seed=8)])
    assert abs(float(first @ other)) < 0.1
    stage, stack = tiny.stage(name="repair", stirred=True)
    adapter = stack.trained()
    torch.set_rng_state(state)
    RandomPerturbation(rho=1.0).edit(stage, adapter)
    assert torch.equal(torch.get_rng_state(), state)


def test_rho_0_is_the_tuned_adapter_bit_for_bit() -> None:
    assert RandomPerturbation.neutral == {"rho": 0.0}
    assert same_adapter(*moved(0.0))
    assert not same_adapter(*moved(0.01))


def test_the_cells_seed_moves_the_perturbation(world: World) -> None:
    directions = []
    for seed in (0, 1):
        models = world.made("sft+random_perturbation=5", seed=seed)
        parts = [
            new - old
            for module, factors in models.before.factors.items()
            for new, old in zip(models.after.factors[module], factors, strict=True)
        ]
        directions.append(torch.cat([part.flatten() for part in parts]))
        assert directions[-1].norm().item() == pytest.approx(5.0, rel=1e-4)
    assert abs(float(directions[0] @ directions[1])) < 0.1 * 25


# ---------------------------------------------------------------------------------------------------------------------
# Chains


def projected(update: Factors, aligned: Sequence[Adapter]) -> Factors:
    """Safe LoRA with every module chosen: B <- V V^T / ||V|| B."""
    v = delta(aligned)
    return {
        module: (a, (v[module] @ v[module].T / v[module].norm() @ b.double()).float())
        for module, (a, b) in update.items()
    }


def beside(update: Factors, other: Factors, weight: float) -> Factors:
    """The LoRA of both ranks that acts as update + weight * other."""
    return {
        module: (torch.cat([a, other[module][0]]), torch.cat([b, weight * other[module][1]], 1))
        for module, (a, b) in update.items()
    }


def test_a_chain_of_three_is_each_after_the_other(world: World, tmp_path: Path) -> None:
    lab = world.fresh(tmp_path)
    models = world.made("sft+safe_lora=1+resta=0.5+realign=3", lab=lab)
    start = beside(projected(factors_of(models.before), models.below), factors_of(harmful_run(lab)), -0.5)
    settings = models.cell.protocol.finetune.settings
    rows = encoded(models, row_pools(models.cell).alignment)
    expected = trained(world.base(), models.below, start, 1.0, rows, settings, 3)
    assert models.after.scale == 1.0
    assert close(dict(models.after.factors), expected)
    assert not close(dict(models.after.factors), start, 1e-3)  # it was trained


def test_the_order_of_a_chain_is_the_order_written(world: World) -> None:
    first, second = (world.made(defense) for defense in ("sft+safe_lora=1+resta=0.5", "sft+resta=0.5+safe_lora=1"))
    user, theirs = factors_of(first.before), factors_of(harmful_run(world.lab))
    one = beside(projected(user, first.below), theirs, -0.5)
    other = projected(beside(user, theirs, -0.5), first.below)
    assert close(factors_of(first.after), one)
    assert close(factors_of(second.after), other)
    assert not close(one, other, 1e-2)


def test_the_second_of_a_chain_trains_from_what_the_first_made(world: World, tmp_path: Path) -> None:
    with watched() as runs:
        models = world.made("sft+random_perturbation=3+realign=2", lab=world.fresh(tmp_path))
    perturbed = world.made("sft+random_perturbation=3").after
    assert not same_adapter(perturbed, models.before)
    assert close(runs[-1].start, dict(perturbed.factors), 0.0)


def test_a_chain_runs_the_model_with_the_edit_before_it(world: World, tmp_path: Path) -> None:
    """Whatever a later member runs, it runs on the aligned model with the earlier ones' adapter."""
    with looking("random_perturbation", "safe_lora", "realign") as looks:
        models = world.made("sft+random_perturbation=3+safe_lora=1+realign=0", lab=world.fresh(tmp_path))
    first, second = (world.made(f"sft+random_perturbation=3{more}").after for more in ("", "+safe_lora=1"))
    base = world.base()
    expected = [logits(base, [*models.below, adapter]) for adapter in (models.before, first, second)]
    for look, theirs in zip(looks, expected, strict=True):
        assert (look.logits - theirs).abs().max() < 1e-5 * theirs.abs().max()
    assert (expected[0] - expected[1]).abs().max() > 1e-2
    assert (expected[1] - expected[2]).abs().max() > 1e-2


# ---------------------------------------------------------------------------------------------------------------------
# Single topology: what is edited is the update since alignment


def update(models: Models) -> dict[str, Tensor]:
    """What the user's training, which went on with the alignment adapter, added to the aligned weights."""
    before, after = delta(models.below), delta([models.before])
    return {module: after[module] - before[module] for module in after}


def change(models: Models) -> dict[str, Tensor]:
    """What stands between the aligned and the final weights."""
    before, after = delta(models.below), delta([Adapter.load(path) for path in models.final.state.adapters])
    return {module: after[module] - before[module] for module in after}


@pytest.mark.parametrize(
    "defense", ["safe_lora:k=0", "resta=0", "realign=0", "random_perturbation=0", "antidote=0"]
)  # fmt: skip
def test_single_neutral_settings_leave_the_tuned_weights(defense: str, single: World) -> None:
    models = single.made(f"sft+{defense}")
    assert len(models.tuned.state.adapters) == 1  # the alignment adapter, trained on
    assert close(change(models), update(models))
    assert not close(update(models), delta([models.before]), 1e-2)


def test_single_safe_lora_projects_the_update_and_not_the_alignment(single: World) -> None:
    models = single.made("sft+safe_lora=1")
    v, moved_by = delta(models.below), update(models)
    expected = {m: v[m] @ v[m].T / v[m].norm() @ moved_by[m] for m in v}
    assert close(change(models), expected)


def test_single_safe_lora_chooses_by_the_cosine_of_the_update(single: World) -> None:
    models = single.made("sft+safe_lora:k=2")
    v, moved_by = delta(models.below), update(models)
    projections = {m: v[m] @ v[m].T / v[m].norm() @ moved_by[m] for m in v}
    cosines = {m: float((projections[m] * moved_by[m]).sum() / projections[m].norm() / moved_by[m].norm()) for m in v}
    chosen = sorted(cosines, key=lambda module: cosines[module])[:2]
    assert close(change(models), {m: projections[m] if m in chosen else moved_by[m] for m in v})


def test_single_resta_subtracts_what_harm_adds_to_the_aligned_model(single: World, tmp_path: Path) -> None:
    lab = single.fresh(tmp_path)
    models = single.made("sft+resta=2", lab=lab)
    harmful = harmful_run(lab)
    moved_by, theirs = update(models), delta([harmful])
    assert close(change(models), {module: moved_by[module] - 2 * theirs[module] for module in moved_by})
    assert models.after.rank == 3 * models.before.rank  # the trained, minus the aligned, minus the harmful


def test_single_realign_trains_the_update(single: World) -> None:
    models = single.made("sft+realign=3")
    start = beside(factors_of(models.before), factors_of(models.below[0]), -1.0)
    rows = encoded(models, row_pools(models.cell).alignment)
    settings = models.cell.protocol.finetune.settings
    expected = trained(single.base(), models.below, start, 1.0, rows, settings, 3)
    assert close(dict(models.after.factors), expected)


def test_single_and_double_of_a_model_that_was_never_aligned_are_one(world: World, single: World) -> None:
    ours, theirs = (where.made("none+random_perturbation=1") for where in (world, single))
    assert same_adapter(ours.after, theirs.after)


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be


@pytest.mark.parametrize("text", ["resta=-0.1", "realign=-1", "realign=1.5", "random_perturbation=-1"])
def test_values_out_of_range_are_refused(text: str, world: World) -> None:
    with pytest.raises(BadInput, match=text.partition("=")[0]):
        world.cell(f"sft+{text}")

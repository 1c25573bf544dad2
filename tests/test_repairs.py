"""RESTA, Realign, random perturbation and chains of repairs, in all stages of real runs.

Every repair is compared with its equations: training is a loop over W + scale B A with a torch optimizer, and
projections are dense matrices. The tiny world trains without dropout and with all rows of the user stage in one batch,
so that the order of rows has no effect.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM, PreTrainedModel

from harmbench_vaccine.core.device import place_model
from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.progress import SILENT, Progress, Silent
from harmbench_vaccine.core.store import META
from harmbench_vaccine.core.types import Example, TrainSettings
from harmbench_vaccine.data.collate import IGNORED, Encoded
from harmbench_vaccine.defenses.random_perturbation import RandomPerturbation
from harmbench_vaccine.defenses.realign import Realign
from harmbench_vaccine.experiment.artifacts import TrainedModel
from harmbench_vaccine.experiment.context import RunContext
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.rows import plugin_pools
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.pipeline import align, finetune, repair
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.plugins.registry import DEFENSES
from harmbench_vaccine.training import trainer
from harmbench_vaccine.training.adapters import Adapter
from harmbench_vaccine.training.hooks import PlainFinetuning
from harmbench_vaccine.training.stage import TrainingStage
from support import tiny
from support.compare import close, same_adapter
from support.runs import run_context
from support.world import make_world

Factors = dict[str, tuple[Tensor, Tensor]]
EPOCHS = 6
USER = {"batch": 40, "epochs": EPOCHS, "lora_dropout": 0.0, "lora_targets": ["q_proj", "v_proj", "down_proj"]}
ALIGN = {**USER, "batch": 8, "epochs": 2}

# ---------------------------------------------------------------------------------------------------------------------
# Runs


@dataclass(frozen=True)
class World:
    """A protocol, and a run context that all its runs share."""

    protocol: Path
    context: RunContext

    def experiment(self, defense: str, attack: str = "ratio=0.25", seed: int = 0) -> Experiment:
        spec = RunSpec(
            protocol=str(self.protocol), defense=parse_plugins(defense), attack=parse_plugins(attack), seed=seed
        )
        return Experiment.settle(spec)

    def models(
        self, defense: str, attack: str = "ratio=0.25", *, seed: int = 0, context: RunContext | None = None
    ) -> Models:
        settled, context = self.experiment(defense, attack, seed), context or self.context
        aligned = align(settled, context)
        tuned = finetune(settled, context, aligned)
        return Models(settled, aligned, tuned, repair(settled, context, aligned, tuned))

    def base(self) -> PreTrainedModel:
        return place_model(AutoModelForCausalLM.from_pretrained(self.protocol.parent / "model")).eval()

    def fresh(self, folder: Path, progress: Progress = SILENT) -> RunContext:
        """Return a context with a new store that contains the aligned and tuned models, but no repaired one."""
        for stage in ("align", "finetune"):
            if (self.context.store.root / stage).is_dir():
                shutil.copytree(self.context.store.root / stage, folder / stage, dirs_exist_ok=True)
        return run_context(folder, progress)


@dataclass(frozen=True)
class Models:
    experiment: Experiment
    aligned: TrainedModel
    tuned: TrainedModel
    final: TrainedModel

    @property
    def below(self) -> list[Adapter]:
        return [Adapter.load(path) for path in self.aligned.spec.adapters]

    @property
    def tuned_adapter(self) -> Adapter:
        """The adapter of the user stage."""
        return Adapter.load(self.tuned.spec.adapters[-1])

    @property
    def final_adapter(self) -> Adapter:
        """The repaired adapter."""
        return Adapter.load(self.final.spec.adapters[-1])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_repair_world(tmp_path_factory.mktemp("double"))


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The same world in single topology: the user stage trains the alignment adapter further."""
    return make_repair_world(tmp_path_factory.mktemp("single"), topology="single")


def make_repair_world(folder: Path, user: Mapping[str, Any] | None = None, **changes: Any) -> World:
    protocol = {"align": {"settings": ALIGN}, "finetune": {"settings": {**USER, **(user or {})}}}
    return World(make_world(folder, {**protocol, **changes}), run_context(folder / "store"))


def nested(context: RunContext) -> list[Path]:
    """Return the stored training runs inside a stage."""
    return sorted(context.store.root.glob("nested/*"))


def harmful_run(context: RunContext) -> Adapter:
    """Return the adapter that was trained on harmful rows."""
    purposes = {path: json.loads((path / META).read_text())["inputs"]["purpose"] for path in nested(context)}
    (path,) = [path for path, purpose in purposes.items() if purpose == "unaligned"]
    return Adapter.load(path / "adapter")


# ---------------------------------------------------------------------------------------------------------------------
# A second implementation of the equations


def factors_of(adapter: Adapter) -> Factors:
    """Return copies of the factors, with the scale in B."""
    return {module: (a.clone(), adapter.scale * b) for module, (a, b) in adapter.factors.items()}


def delta(adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    """Return module -> the total update of its weight by the adapters."""
    total: dict[str, Tensor] = {}
    for adapter in adapters:
        for module, (a, b) in adapter.factors.items():
            total[module] = total.get(module, torch.zeros(())) + adapter.scale * (b.double() @ a.double())
    return total


def logits(base: PreTrainedModel, adapters: Sequence[Adapter]) -> Tensor:
    """Return the logits of the merged model on a fixed batch."""
    weights = {
        f"{module}.weight": base.get_submodule(module).weight.detach() + change.float().to(base.device)
        for module, change in delta(adapters).items()
    }
    with torch.no_grad():
        return functional_call(base, weights, kwargs=dict(tiny.batch())).logits


def train_factors(
    base: PreTrainedModel,
    below: Sequence[Adapter],
    start: Factors,
    scale: float,
    rows: Sequence[Encoded],
    settings: TrainSettings,
    steps: int,
) -> Factors:
    """Train W + the updates of `below` + scale B A with `steps` steps of a new AdamW on all rows at once."""
    names = list(start)
    leaves = {name: tuple(factor.clone().requires_grad_() for factor in start[name]) for name in names}
    flat = [factor for name in names for factor in leaves[name]]
    below_updates = delta(below)
    optimizer = torch.optim.AdamW(
        flat,
        lr=settings.lr,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=1e-8,
        weight_decay=settings.weight_decay,
    )
    warmup_steps = round(settings.warmup * steps)
    for step in range(steps):
        decay = 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))
        optimizer.param_groups[0]["lr"] = settings.lr * (step / warmup_steps if step < warmup_steps else decay)
        weights = {}
        for module in {*names, *below_updates}:
            weight = base.get_submodule(module).weight.detach()
            weight = weight + below_updates[module].float() if module in below_updates else weight
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
    """Return the mean cross-entropy over all response tokens; every row runs alone."""
    losses = []
    for row in rows:
        ids, labels = torch.tensor([row.ids]), torch.tensor(row.labels)
        scores = functional_call(base, weights, kwargs={"input_ids": ids}).logits[0, :-1]
        losses.append(nn.functional.cross_entropy(scores, labels[1:], reduction="none", ignore_index=-100))
    response_mask = torch.cat([torch.tensor(row.labels[1:]) != -100 for row in rows])
    return torch.cat(losses)[response_mask].mean()


def encode_rows(models: Models, rows: Sequence[Example]) -> list[Encoded]:
    """Encode rows as in the user stage: template, tokens, end of sequence."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models.experiment.model)
    result = []
    for row in rows:
        prompt = tokenizer(models.experiment.template.render(row))["input_ids"]
        answer = [*tokenizer(row.response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        assert len(prompt) + len(answer) <= 96  # no row is truncated
        result.append(Encoded(prompt + answer, [-100] * len(prompt) + answer, row.id))
    return result


@dataclass
class Run:
    """The inputs of one training run."""

    rows: list[str]
    settings: TrainSettings
    start: Factors
    hooks: Any


@contextmanager
def record_runs() -> Iterator[list[Run]]:
    """Record the inputs of every training run; the start has B without the scale."""
    runs: list[Run] = []
    plain = trainer.train

    def train(stage: TrainingStage, defense: Any, rows: Any, settings: TrainSettings, *args: Any, **more: Any) -> Any:
        runs.append(Run([row.id for row in rows], settings, dict(stage.stack.trained().factors), defense))
        return plain(stage, defense, rows, settings, *args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "train", train)
        yield runs


# ---------------------------------------------------------------------------------------------------------------------
# RESTA


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_resta_subtracts_the_update_of_harmful_training(gamma: float, world: World) -> None:
    models = world.models(f"sft+resta={gamma}")
    harmful = harmful_run(world.context)
    user, harmful_update = delta([models.tuned_adapter]), delta([harmful])
    expected = {module: user[module] - gamma * harmful_update[module] for module in user}
    assert close(delta([models.final_adapter]), expected)
    assert not close(delta([models.final_adapter]), user, 1e-2)
    assert models.final_adapter.rank == models.tuned_adapter.rank + harmful.rank
    assert models.final.spec.adapters[:-1] == models.aligned.spec.adapters


def test_the_harmful_adapter_is_a_user_stage_on_harmful_rows_of_the_defender(world: World, tmp_path: Path) -> None:
    context = world.fresh(tmp_path)
    with record_runs() as runs:
        models = world.models("sft+resta", context=context)
    pools, run = plugin_pools(models.experiment), runs[-1]
    assert run.rows == [harmful.id for _, harmful in pools.paired]
    assert type(run.hooks) is PlainFinetuning
    assert all(b.abs().max() == 0 for _, b in run.start.values())
    assert run.settings == models.experiment.protocol.finetune.settings
    rows = encode_rows(models, pools.harmful)
    expected = train_factors(world.base(), models.below, run.start, 2.0, rows, run.settings, EPOCHS)
    assert close(dict(harmful_run(context).factors), expected)
    shorter = train_factors(world.base(), models.below, run.start, 2.0, rows, run.settings, EPOCHS - 1)
    assert not close(dict(harmful_run(context).factors), shorter, 1e-2)


def test_gamma_1_restores_the_aligned_model_after_purely_harmful_training(world: World, tmp_path: Path) -> None:
    context = world.fresh(tmp_path)
    models = world.models("sft+resta", context=context)
    (harmful,) = nested(context)
    user = replace(models.tuned, spec=models.aligned.spec.on_top(*models.aligned.spec.adapters, harmful / "adapter"))
    experiment = world.experiment("sft+resta=1")
    final = repair(experiment, context, models.aligned, user)
    with torch.no_grad():
        specs = [models.aligned.spec, final.spec, user.spec]
        aligned, restored, harmed = (
            context.models.stack(spec).use(spec.adapters)(**tiny.batch()).logits for spec in specs
        )
    assert (restored - aligned).abs().max() < 1e-5 * aligned.abs().max()
    assert (harmed - aligned).abs().max() > 1e-2 * aligned.abs().max()
    assert nested(context) == [harmful]


def test_the_harmful_run_is_stored_once_for_all_attacks(world: World, tmp_path: Path) -> None:
    context = world.fresh(tmp_path)
    attacks = ("ratio=0.25", "benign", "optimizer:lr=0.001,rank=2")
    finals = [world.models("sft+resta", attack, context=context).final_adapter for attack in attacks]
    assert len({adapter.digest() for adapter in finals}) == 3
    assert len(nested(context)) == 1
    world.models("sft+resta=2", context=context)
    assert len(nested(context)) == 1
    world.models("vaccine+resta", context=context)  # another aligned model
    assert len(nested(context)) == 2
    world.models("sft+resta", seed=1, context=context)
    assert len(nested(context)) == 3


def test_resta_gives_the_same_result_with_a_stored_harmful_adapter(world: World, tmp_path: Path) -> None:
    """A run that trains the harmful adapter, and a run that loads it, give the same repaired adapter."""
    context = world.fresh(tmp_path)
    world.models("sft+resta", "benign", context=context)
    with record_runs() as runs:
        models = world.models("sft+resta", context=context)
    assert not any("harmful:refusals" in row for run in runs for row in run.rows)
    adapter = models.final_adapter
    assert same_adapter(adapter, world.models("sft+resta", context=world.fresh(tmp_path / "other")).final_adapter)


def test_resta_needs_no_aligned_model(world: World, tmp_path: Path) -> None:
    context = world.fresh(tmp_path)
    models = world.models("none+resta=1.0", context=context)
    harmful = harmful_run(context)
    user, harmful_update = delta([models.tuned_adapter]), delta([harmful])
    assert models.below == []
    world.models("none+resta", "benign", context=context)
    assert len(nested(context)) == 1
    world.models("none+resta", seed=1, context=context)  # the same base, another seed
    assert len(nested(context)) == 2
    assert close(delta([models.final_adapter]), {module: user[module] - harmful_update[module] for module in user})


class Interrupting(Silent):
    """A progress display that raises KeyboardInterrupt when a bar reaches a step."""

    def __init__(self, title: str, stop: int) -> None:
        self.title, self.stop = title, stop
        self.positions: list[int] = []

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Any]:
        position = 0

        def advance(steps: int, *more: object) -> None:
            nonlocal position
            position += steps
            if self.title in title:
                self.positions.append(position)
                if position == self.stop:
                    raise KeyboardInterrupt

        yield advance


@pytest.mark.parametrize(("defense", "bar"), [("sft+resta", "unaligned"), ("sft+realign=6", "realigned")])
def test_an_interrupted_run_inside_a_repair_resumes(defense: str, bar: str, world: World, tmp_path: Path) -> None:
    complete = world.models(defense, context=world.fresh(tmp_path / "complete")).final_adapter
    stopping = Interrupting(bar, 5)
    with pytest.raises(KeyboardInterrupt):
        world.models(defense, context=world.fresh(tmp_path / "cut", stopping))
    assert stopping.positions == [0, 1, 2, 3, 4, 5]
    resumed = Interrupting(bar, -1)
    result = world.models(defense, context=world.fresh(tmp_path / "cut", resumed)).final_adapter
    assert resumed.positions == [4, 5, 6]  # from its last checkpoint
    assert same_adapter(result, complete)
    assert len(nested(world.fresh(tmp_path / "cut"))) == 1


@pytest.mark.parametrize("defense", ["resta=0.5", "realign=3"])
def test_separate_training_restores_the_adapter_of_the_stage(defense: str, world: World, tmp_path: Path) -> None:
    with record_edits(defense.partition("=")[0]) as edits:
        models = world.models(f"sft+{defense}", context=world.fresh(tmp_path))
    (edit,) = edits
    assert same_adapter(edit.before, models.tuned_adapter)
    assert same_adapter(edit.after, models.tuned_adapter)
    assert not same_adapter(models.final_adapter, models.tuned_adapter)


@pytest.mark.parametrize("defense", ["resta=0.5", "realign=3"])
def test_separate_training_leaves_the_model_without_dropout(defense: str, world: World, tmp_path: Path) -> None:
    """Check a new training run, and a run that is loaded from the store."""
    context = world.fresh(tmp_path)
    for attack in ("ratio=0.25", "ratio=0.25+samples=39"):
        with record_edits(defense.partition("=")[0]) as edits:
            world.models(f"sft+{defense}", attack, context=context)
        assert [edit.training for edit in edits] == [False], attack


@dataclass(frozen=True)
class Edit:
    """The model before and after an edit: its adapter, its logits at response tokens, its mode."""

    before: Adapter
    logits: Tensor
    after: Adapter
    training: bool


@contextmanager
def record_edits(*names: str) -> Iterator[list[Edit]]:
    """Record the model at every edit of these defenses."""
    edits: list[Edit] = []

    def recording(kind: Any) -> Any:
        class RecordingEdits(kind):
            def edit(self, stage: TrainingStage, adapter: Adapter) -> Adapter:
                initial = stage.stack.trained()
                with torch.no_grad():
                    output_logits = stage.output(tiny.batch()).logits
                edited: Adapter = super().edit(stage, adapter)
                edits.append(Edit(initial, output_logits, stage.stack.trained(), stage.model.training))
                return edited

        return RecordingEdits

    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setitem(DEFENSES._classes, name, recording(DEFENSES.get(name)))
        yield edits


# ---------------------------------------------------------------------------------------------------------------------
# Realign


@pytest.mark.parametrize("steps", [1, 4])
def test_realign_is_more_training_with_a_new_optimizer(steps: int, world: World) -> None:
    models = world.models(f"sft+realign={steps}")
    rows = encode_rows(models, plugin_pools(models.experiment).alignment)
    assert len(rows) == 40  # one batch
    settings = models.experiment.protocol.finetune.settings
    initial = dict(models.tuned_adapter.factors)
    expected = train_factors(world.base(), models.below, initial, models.tuned_adapter.scale, rows, settings, steps)
    assert close(dict(models.final_adapter.factors), expected)
    if steps > 1:  # the first step of a warmup has learning rate 0
        assert not close(dict(models.final_adapter.factors), initial, 1e-3)
    assert (models.final_adapter.rank, models.final_adapter.scale) == (
        models.tuned_adapter.rank,
        models.tuned_adapter.scale,
    )


def test_realign_trains_on_the_alignment_rows_of_the_run(world: World, tmp_path: Path) -> None:
    with record_runs() as runs:
        models = world.models("sft+realign=3", "optimizer:lr=0.5,epochs=1", context=world.fresh(tmp_path))
    run = runs[-1]
    assert run.rows == [row.id for row in plugin_pools(models.experiment).alignment]
    assert type(run.hooks) is PlainFinetuning
    assert run.settings == replace(models.experiment.protocol.finetune.settings, epochs=3.0)  # not those of the attack
    assert close(run.start, dict(models.tuned_adapter.factors), 0.0)


@pytest.mark.parametrize(
    ("steps", "changes"),
    [(1, {"batch": 7}), (7, {"batch": 4}), (7, {"batch": 7, "accumulation": 2}), (23, {"batch": 3})],
)
def test_realign_takes_the_requested_number_of_optimizer_steps(steps: int, changes: Any, tmp_path: Path) -> None:
    small = make_repair_world(tmp_path, user=changes, align={"rows": 10, "settings": {**ALIGN, "epochs": 0.5}})
    small.models(f"sft+realign={steps}", "ratio=0.25,samples=4")
    (folder,) = nested(small.context)
    log = json.loads((folder / "log.json").read_text())
    assert [entry["step"] for entry in log] == list(range(1, steps + 1))


def test_realign_0_equals_the_tuned_adapter_bit_for_bit(world: World) -> None:
    models = world.models("sft+realign=0")
    assert Realign.neutral == {"steps": 0}
    assert same_adapter(models.final_adapter, models.tuned_adapter)


def test_realign_0_keeps_an_inexact_scale(tmp_path: Path) -> None:
    world = make_repair_world(tmp_path, user={"lora_rank": 3, "lora_alpha": 0.7})
    models = world.models("sft+realign=0", "ratio=0.25,samples=4")
    for module, factors in models.tuned_adapter.factors.items():
        assert all(torch.equal(*pair) for pair in zip(models.final_adapter.factors[module], factors, strict=True))
    assert models.final_adapter.scale == pytest.approx(models.tuned_adapter.scale, rel=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Random perturbation


def perturb(rho: float, seed: int = 7) -> tuple[Adapter, Adapter]:
    """Return an adapter before and after random perturbation."""
    stage, stack = tiny.stage(name="repair", stirred=True, seed=seed)
    adapter = stack.trained()
    return adapter, RandomPerturbation(rho=rho).edit(stage, adapter)


def noise(rho: float, seed: int = 7) -> list[Tensor]:
    """Return the added noise of every tensor, in float64."""
    old_adapter, new_adapter = perturb(rho, seed)
    assert (new_adapter.scale, new_adapter.rank, set(new_adapter.factors)) == (
        old_adapter.scale,
        old_adapter.rank,
        set(old_adapter.factors),
    )
    return [
        new.double() - old.double()
        for module, factors in old_adapter.factors.items()
        for new, old in zip(new_adapter.factors[module], factors, strict=True)
    ]


@pytest.mark.parametrize("rho", [0.1, 1.0, 30.0])
def test_the_perturbation_has_length_rho(rho: float) -> None:
    values = torch.cat([part.flatten() for part in noise(rho)])
    assert values.norm().item() == pytest.approx(rho, rel=1e-4)


def test_the_perturbation_is_gaussian_over_all_entries_of_a_and_b() -> None:
    parts = noise(30.0)
    values = torch.cat([part.flatten() for part in parts])
    spread = 30.0 / math.sqrt(len(values))
    assert abs(values.mean().item()) < 0.1 * spread
    assert (values / spread).pow(4).mean().item() == pytest.approx(3.0, rel=0.15)
    for part in parts:  # no tensor is normalized separately
        assert part.std().item() == pytest.approx(spread, rel=0.2)
        assert part.norm().item() != pytest.approx(spread * math.sqrt(part.numel()), rel=1e-6)
    left, right = parts[0].flatten(), parts[2].flatten()  # A of two modules are independent
    assert abs(float(left @ right / left.norm() / right.norm())) < 0.2


def test_the_perturbation_depends_only_on_the_seed() -> None:
    first = torch.cat([part.flatten() for part in noise(1.0)])
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again = torch.cat([part.flatten() for part in noise(1.0)])
    assert torch.equal(first, again)
    second = torch.cat([part.flatten() for part in noise(1.0, seed=8)])
    assert abs(float(first @ second)) < 0.1
    stage, stack = tiny.stage(name="repair", stirred=True)
    adapter = stack.trained()
    torch.set_rng_state(state)
    RandomPerturbation(rho=1.0).edit(stage, adapter)
    assert torch.equal(torch.get_rng_state(), state)


def test_rho_0_equals_the_tuned_adapter_bit_for_bit() -> None:
    assert RandomPerturbation.neutral == {"rho": 0.0}
    assert same_adapter(*perturb(0.0))
    assert not same_adapter(*perturb(0.01))


def test_the_perturbation_depends_on_the_seed_of_the_run(world: World) -> None:
    directions = []
    for seed in (0, 1):
        models = world.models("sft+random_perturbation=5", seed=seed)
        parts = [
            new - old
            for module, factors in models.tuned_adapter.factors.items()
            for new, old in zip(models.final_adapter.factors[module], factors, strict=True)
        ]
        directions.append(torch.cat([part.flatten() for part in parts]))
        assert directions[-1].norm().item() == pytest.approx(5.0, rel=1e-4)
    assert abs(float(directions[0] @ directions[1])) < 0.1 * 25


# ---------------------------------------------------------------------------------------------------------------------
# Chains


def project(update: Factors, aligned: Sequence[Adapter]) -> Factors:
    """Apply Safe LoRA to every module: B <- V V^T / ||V|| B."""
    v = delta(aligned)
    return {
        module: (a, (v[module] @ v[module].T / v[module].norm() @ b.double()).float())
        for module, (a, b) in update.items()
    }


def stack_factors(left: Factors, right: Factors, weight: float) -> Factors:
    """Return a LoRA with both ranks that equals left + weight * right."""
    return {
        module: (torch.cat([a, right[module][0]]), torch.cat([b, weight * right[module][1]], 1))
        for module, (a, b) in left.items()
    }


def test_a_chain_of_three_applies_one_after_another(world: World, tmp_path: Path) -> None:
    context = world.fresh(tmp_path)
    models = world.models("sft+safe_lora=1+resta=0.5+realign=3", context=context)
    start = stack_factors(
        project(factors_of(models.tuned_adapter), models.below), factors_of(harmful_run(context)), -0.5
    )
    settings = models.experiment.protocol.finetune.settings
    rows = encode_rows(models, plugin_pools(models.experiment).alignment)
    expected = train_factors(world.base(), models.below, start, 1.0, rows, settings, 3)
    assert models.final_adapter.scale == 1.0
    assert close(dict(models.final_adapter.factors), expected)
    assert not close(dict(models.final_adapter.factors), start, 1e-3)  # it was trained


def test_a_chain_keeps_the_written_order(world: World) -> None:
    first, second = (world.models(defense) for defense in ("sft+safe_lora=1+resta=0.5", "sft+resta=0.5+safe_lora=1"))
    user, harmful_update = factors_of(first.tuned_adapter), factors_of(harmful_run(world.context))
    projected_first = stack_factors(project(user, first.below), harmful_update, -0.5)
    subtracted_first = project(stack_factors(user, harmful_update, -0.5), first.below)
    assert close(factors_of(first.final_adapter), projected_first)
    assert close(factors_of(second.final_adapter), subtracted_first)
    assert not close(projected_first, subtracted_first, 1e-2)


def test_the_second_edit_of_a_chain_starts_from_the_result_of_the_first(world: World, tmp_path: Path) -> None:
    with record_runs() as runs:
        models = world.models("sft+random_perturbation=3+realign=2", context=world.fresh(tmp_path))
    perturbed = world.models("sft+random_perturbation=3").final_adapter
    assert not same_adapter(perturbed, models.tuned_adapter)
    assert close(runs[-1].start, dict(perturbed.factors), 0.0)


def test_a_chained_edit_uses_the_model_with_the_previous_edit(world: World, tmp_path: Path) -> None:
    """A later member runs the aligned model with the adapter of the earlier members."""
    with record_edits("random_perturbation", "safe_lora", "realign") as edits:
        models = world.models("sft+random_perturbation=3+safe_lora=1+realign=0", context=world.fresh(tmp_path))
    first, second = (
        world.models(f"sft+random_perturbation=3{suffix}").final_adapter for suffix in ("", "+safe_lora=1")
    )
    base = world.base()
    answering = tiny.batch()["labels"][:, 1:] != IGNORED
    expected = [
        logits(base, [*models.below, adapter])[:, :-1][answering] for adapter in (models.tuned_adapter, first, second)
    ]
    for edit, expected_logits in zip(edits, expected, strict=True):
        assert (edit.logits - expected_logits).abs().max() < 1e-5 * expected_logits.abs().max()
    assert (expected[0] - expected[1]).abs().max() > 1e-2
    assert (expected[1] - expected[2]).abs().max() > 1e-2


# ---------------------------------------------------------------------------------------------------------------------
# Single topology: the update since alignment is edited


def update(models: Models) -> dict[str, Tensor]:
    """Return module -> the update of the user stage, which trained the alignment adapter further."""
    aligned, tuned = delta(models.below), delta([models.tuned_adapter])
    return {module: tuned[module] - aligned[module] for module in tuned}


def change(models: Models) -> dict[str, Tensor]:
    """Return module -> the difference between the final and the aligned weights."""
    aligned, final = delta(models.below), delta([Adapter.load(path) for path in models.final.spec.adapters])
    return {module: final[module] - aligned[module] for module in final}


@pytest.mark.parametrize("defense", ["safe_lora:k=0", "resta=0", "realign=0", "random_perturbation=0", "antidote=0"])
def test_single_neutral_settings_keep_the_tuned_weights(defense: str, single: World) -> None:
    models = single.models(f"sft+{defense}")
    assert len(models.tuned.spec.adapters) == 1  # the alignment adapter, trained on
    assert close(change(models), update(models))
    assert not close(update(models), delta([models.tuned_adapter]), 1e-2)


def test_single_safe_lora_projects_the_update_and_not_the_alignment(single: World) -> None:
    models = single.models("sft+safe_lora=1")
    v, user = delta(models.below), update(models)
    expected = {m: v[m] @ v[m].T / v[m].norm() @ user[m] for m in v}
    assert close(change(models), expected)


def test_single_safe_lora_selects_by_the_cosine_of_the_update(single: World) -> None:
    models = single.models("sft+safe_lora:k=2")
    v, user = delta(models.below), update(models)
    projections = {m: v[m] @ v[m].T / v[m].norm() @ user[m] for m in v}
    cosines = {m: float((projections[m] * user[m]).sum() / projections[m].norm() / user[m].norm()) for m in v}
    chosen = sorted(cosines, key=lambda module: cosines[module])[:2]
    assert close(change(models), {m: projections[m] if m in chosen else user[m] for m in v})


def test_single_resta_subtracts_the_harmful_update_of_the_aligned_model(single: World, tmp_path: Path) -> None:
    context = single.fresh(tmp_path)
    models = single.models("sft+resta=2", context=context)
    harmful = harmful_run(context)
    user, harmful_update = update(models), delta([harmful])
    assert close(change(models), {module: user[module] - 2 * harmful_update[module] for module in user})
    assert models.final_adapter.rank == 3 * models.tuned_adapter.rank  # trained, minus aligned, minus harmful


def test_single_realign_trains_the_update(single: World) -> None:
    models = single.models("sft+realign=3")
    start = stack_factors(factors_of(models.tuned_adapter), factors_of(models.below[0]), -1.0)
    rows = encode_rows(models, plugin_pools(models.experiment).alignment)
    settings = models.experiment.protocol.finetune.settings
    expected = train_factors(single.base(), models.below, start, 1.0, rows, settings, 3)
    assert close(dict(models.final_adapter.factors), expected)


def test_single_and_double_are_equal_without_alignment(world: World, single: World) -> None:
    ours, theirs = (where.models("none+random_perturbation=1") for where in (world, single))
    assert same_adapter(ours.final_adapter, theirs.final_adapter)


# ---------------------------------------------------------------------------------------------------------------------
# Invalid values


@pytest.mark.parametrize("text", ["resta=-0.1", "realign=-1", "realign=1.5", "random_perturbation=-1"])
def test_values_out_of_range_are_refused(text: str, world: World) -> None:
    with pytest.raises(BadInput, match=text.partition("=")[0]):
        world.experiment(f"sft+{text}")

"""SafeMERGE: the selection and the merge compared with dense matrices, and the training of the safe adapter."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.seeds import derive_seed
from harmbench_vaccine.core.store import META
from harmbench_vaccine.defenses.safemerge import SafeMERGE
from harmbench_vaccine.experiment.context import RunContext
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.pipeline import align, finetune, repair
from harmbench_vaccine.plugins import Pools
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.training.adapters import Adapter
from harmbench_vaccine.training.projection import alignment_projector
from harmbench_vaccine.training.stage import SeparateRun, TrainingStage
from support import tiny
from support.compare import close
from support.optimizers import train_two_steps
from support.runs import run_context
from support.world import make_world

MODULES = sorted(f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qkv")
WIDTHS = {"q": (64, 64), "k": (32, 64), "v": (32, 64)}  # outputs, inputs
POOLS = tiny.example_pools()


def random_adapter(rank: int, seed: int, *, scale: float = 2.0, size: float = 0.1) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for module in MODULES:
        outputs, inputs = WIDTHS[module[-6]]
        a, b = (torch.randn(shape, generator=generator) for shape in ((rank, inputs), (outputs, rank)))
        factors[module] = (0.1 * a, size * b)
    return Adapter(factors, scale)


ALIGNED, USER, SAFE = random_adapter(4, 1), random_adapter(4, 2, scale=0.3), random_adapter(3, 3, scale=0.7)


def with_b(adapter: Adapter, module: str, b: Tensor) -> Adapter:
    return replace(adapter, factors={**adapter.factors, module: (adapter.factors[module][0], b)})


def without(adapter: Adapter, module: str) -> Adapter:
    """Return the adapter without an update of a module: its B is 0."""
    return with_b(adapter, module, torch.zeros_like(adapter.factors[module][1]))


def edit(
    folder: Path, *, aligned: Adapter = ALIGNED, user: Adapter = USER, **params: Any
) -> tuple[Adapter, list[SeparateRun]]:
    """Return the edited adapter and the requested training runs, each of which results in SAFE."""
    runs: list[SeparateRun] = []

    def nested(stage: TrainingStage, run: SeparateRun) -> Adapter:
        runs.append(run)
        return SAFE

    aligned.save(folder)
    stage, _ = tiny.stage(below=[folder], name="repair", pools=POOLS)
    stage.nested = nested
    return SafeMERGE(**params).edit(stage, user), runs


def changed_modules(edited: Adapter, user: Adapter = USER) -> set[str]:
    """Return the modules with another update; the others have the same factors, with the scale in B, to the bit."""
    assert set(edited.factors) == set(user.factors)
    if edited is user:
        return set()
    changed = set()
    for module, (a, b) in user.factors.items():
        new_a, new_b = edited.factors[module]
        assert torch.equal(new_a[: user.rank], a)
        if torch.equal(edited.scale * new_b[:, : user.rank], user.scale * b):
            assert new_b[:, user.rank :].count_nonzero() == 0
        else:
            changed.add(module)
    return changed


# ---------------------------------------------------------------------------------------------------------------------
# A second implementation of the equations, with dense matrices in float64


def update(adapter: Adapter, module: str) -> Tensor:
    """Return the change of the weight, scale * B A, in float64."""
    a, b = (factor.double() for factor in adapter.factors[module])
    return adapter.scale * b @ a


def matrix(v: Tensor, projector: str) -> Tensor:
    """Return C (outputs x outputs) for the alignment update of a weight."""
    if projector == "paper":
        return v @ v.T / torch.linalg.matrix_norm(v, "fro")
    return v @ torch.linalg.pinv(v.T @ v, rtol=1e-10) @ v.T


def cosines(projector: str = "paper", aligned: Adapter = ALIGNED, user: Adapter = USER) -> dict[str, float]:
    """Return module -> the cosine of C dW and dW."""
    result = {}
    for module in MODULES:
        dw = update(user, module)
        projected = matrix(update(aligned, module), projector) @ dw
        result[module] = float((projected * dw).sum() / projected.norm() / dw.norm())
    return result


# ---------------------------------------------------------------------------------------------------------------------
# The merge


@pytest.mark.parametrize("projector", ["paper", "exact"])
@pytest.mark.parametrize("weight", [0.2, 0.7, 1.0])
def test_the_edit_equals_the_equations(projector: Any, weight: float, tmp_path: Path) -> None:
    similar = cosines(projector)
    tau = sum(sorted(similar.values())[2:4]) / 2
    edited, runs = edit(tmp_path, weight=weight, tau=tau, projector=projector)
    selected = {module for module in MODULES if similar[module] < tau}
    assert changed_modules(edited) == selected
    assert len(selected) == 3
    assert edited.rank == USER.rank + SAFE.rank
    for module in MODULES:
        share = weight if module in selected else 0.0
        assert close(update(edited, module), (1 - share) * update(USER, module) + share * update(SAFE, module))
    (run,) = runs
    assert [row.id for row in run.rows] == [row.id for row in POOLS.alignment]
    assert (run.start, run.steps, run.on_base) == (None, None, False)  # a new adapter on the aligned model


@pytest.mark.parametrize("weight", [0.2, 1.0])
def test_tau_2_merges_every_module(weight: float, tmp_path: Path) -> None:
    """At weight 1 the result is the safe adapter alone."""
    edited, _ = edit(tmp_path, weight=weight, tau=2.0)
    for module in MODULES:
        assert close(update(edited, module), (1 - weight) * update(USER, module) + weight * update(SAFE, module))


def test_the_product_has_no_cross_terms(tmp_path: Path) -> None:
    """The `linear` rule of peft, which the authors use, mixes A and B separately."""
    edited, _ = edit(tmp_path, user=random_adapter(3, 2), weight=0.2, tau=2.0)
    for module in MODULES:
        mixed_a, mixed_b = (
            sum(
                (share * adapter.scale) ** 0.5 * adapter.factors[module][place].double()
                for share, adapter in ((0.8, random_adapter(3, 2)), (0.2, SAFE))
            )
            for place in (0, 1)
        )
        assert isinstance(mixed_a, Tensor)
        exact = update(edited, module)
        assert (mixed_b @ mixed_a - exact).norm() > 0.3 * exact.norm()


# ---------------------------------------------------------------------------------------------------------------------
# The selection


@pytest.mark.parametrize("projector", ["paper", "exact"])
def test_modules_with_a_cosine_below_tau_are_selected(projector: Any, tmp_path: Path) -> None:
    similar = cosines(projector)
    values = sorted(similar.values())
    assert values[0] > 0
    for tau in [-1.0, 0.0, *((low + high) / 2 for low, high in pairwise(values)), 1.0]:
        edited, runs = edit(tmp_path, tau=tau, projector=projector)
        selected = {module for module in MODULES if similar[module] < tau}
        assert changed_modules(edited) == selected, tau
        assert len(runs) == bool(selected)  # no training run if every module keeps its update


def test_the_cosine_is_not_rounded(tmp_path: Path) -> None:
    """The authors round it to 5 decimals."""
    for module, cosine in cosines().items():
        assert module not in changed_modules(edit(tmp_path, tau=cosine - 1e-6)[0])
        assert module in changed_modules(edit(tmp_path, tau=cosine + 1e-6)[0])


@pytest.mark.parametrize("factor", [1e-6, 1e3])
def test_the_size_of_the_updates_does_not_change_the_selection(factor: float, tmp_path: Path) -> None:
    aligned, user = random_adapter(4, 1, size=0.1 * factor), random_adapter(4, 2, scale=0.3, size=0.1 * factor)
    tau = sum(sorted(cosines().values())[2:4]) / 2
    edited, _ = edit(tmp_path, aligned=aligned, user=user, tau=tau)
    assert changed_modules(edited, user) == changed_modules(edit(tmp_path / "other", tau=tau)[0])


@pytest.mark.parametrize("projector", ["paper", "exact"])
def test_an_update_orthogonal_to_alignment_is_merged(projector: Any, tmp_path: Path) -> None:
    """Its cosine is 0, also if C B is exactly 0: here the two updates change different outputs."""
    halves = []
    for adapter, rows in ((ALIGNED, slice(0, 16)), (USER, slice(16, None))):
        half = adapter
        for module, (_, b) in adapter.factors.items():
            zero = torch.zeros_like(b)
            zero[rows] = b[rows]
            half = with_b(half, module, zero)
        halves.append(half)
    edited, _ = edit(tmp_path, aligned=halves[0], user=halves[1], tau=1e-3, projector=projector)
    assert changed_modules(edited, halves[1]) == set(MODULES)


@pytest.mark.parametrize("projector", ["paper", "exact"])
def test_a_module_without_an_update_is_unchanged(projector: Any, tmp_path: Path) -> None:
    """It has no update by alignment, or no adapter of alignment, or no update by the user: the cosine is 0 / 0."""
    aligned, user = without(ALIGNED, MODULES[0]), without(USER, MODULES[1])
    aligned = replace(aligned, factors={m: pair for m, pair in aligned.factors.items() if m != MODULES[2]})
    edited, _ = edit(tmp_path, aligned=aligned, user=user, tau=2.0, projector=projector)
    assert changed_modules(edited, user) == set(MODULES[3:])
    assert all(factor.isfinite().all() for pair in edited.factors.values() for factor in pair)


def test_weight_0_needs_no_training_run(tmp_path: Path) -> None:
    edited, runs = edit(tmp_path, weight=0.0, tau=2.0)
    assert edited is USER
    assert not runs


@pytest.mark.parametrize("projector", ["paper", "exact"])
@pytest.mark.parametrize("rank", [1, 4, 48])
def test_the_factors_of_c(projector: Any, rank: int) -> None:
    aligned = random_adapter(rank, 1, scale=-0.5)
    for module in MODULES:
        directions, weights = alignment_projector(aligned, module, projector)
        assert close(directions @ torch.diag(weights) @ directions.T, matrix(update(aligned, module), projector))


# ---------------------------------------------------------------------------------------------------------------------
# The safe adapter


def test_the_safe_adapter_is_trained_on_the_aligned_model(tmp_path: Path) -> None:
    """On alignment rows, from a new adapter; the user's update has no part in it."""
    settings = tiny.settings(batch=len(POOLS.alignment), lr=1e-3, schedule="constant", warmup=0.0, weight_decay=0.1)
    ALIGNED.save(tmp_path)
    stage, stack = tiny.stage(below=[tmp_path], name="repair", trained_with=settings, pools=POOLS)
    stage.replace_adapter(USER)
    edited = SafeMERGE(weight=1.0, tau=2.0).edit(stage, USER)
    assert all(close(list(stack.trained().factors[m]), list(USER.factors[m]), 0.0) for m in MODULES)  # restored
    seed = derive_seed(derive_seed(stage.seed, "safe"), "adapter")
    rows = tiny.encode(POOLS.alignment)
    on_aligned, on_base = (
        train_two_steps(tiny.stage(trained_with=settings, seed=seed, below=below)[0], rows)
        for below in ([tmp_path], [])
    )
    result, expected, other = (
        {module: update(adapter, module) for module in MODULES} for adapter in (edited, on_aligned, on_base)
    )
    assert close(result, expected)
    assert not close(result, other, 1e-1)


def test_missing_alignment_rows_are_refused(tmp_path: Path) -> None:
    ALIGNED.save(tmp_path)
    stage, _ = tiny.stage(below=[tmp_path], name="repair", pools=Pools())
    with pytest.raises(BadInput):
        SafeMERGE(tau=2.0).edit(stage, USER)


# ---------------------------------------------------------------------------------------------------------------------
# Runs

SMALL = {"batch": 8, "epochs": 1, "lora_targets": ["q_proj", "down_proj"]}


def run_stages(
    protocol: Path, context: RunContext, defense: str, attack: str = "ratio=0.25", seed: int = 0
) -> dict[str, list[Adapter]]:
    """Return the adapters of the aligned, the tuned and the final model."""
    spec = RunSpec(protocol=str(protocol), defense=parse_plugins(defense), attack=parse_plugins(attack), seed=seed)
    experiment = Experiment.settle(spec)
    aligned = align(experiment, context)
    tuned = finetune(experiment, context, aligned)
    final = repair(experiment, context, aligned, tuned)
    models = {"aligned": aligned, "tuned": tuned, "final": final}
    return {name: [Adapter.load(path) for path in model.spec.adapters] for name, model in models.items()}


def test_all_runs_of_one_aligned_model_share_the_safe_adapter(tmp_path: Path) -> None:
    changes = {"align": {"rows": 8, "settings": SMALL}, "finetune": {"samples": 8, "settings": SMALL}}
    protocol = make_world(tmp_path, changes)
    context = run_context(tmp_path / "store")

    def safe_adapters() -> list[Path]:
        folders = sorted(context.store.root.glob("nested/*"))
        assert {json.loads((path / META).read_text())["inputs"]["purpose"] for path in folders} == {"safe"}
        return folders

    models = run_stages(protocol, context, "sft+safemerge:weight=0.3,tau=2")
    (safe,) = (Adapter.load(path / "adapter") for path in safe_adapters())
    (aligned,), (_, user), (below, final) = models["aligned"], models["tuned"], models["final"]
    assert below.digest() == aligned.digest()
    for module in user.factors:
        assert close(update(final, module), 0.7 * update(user, module) + 0.3 * update(safe, module))
    for defense, attack in (("sft+safemerge=0.6", "benign"), ("sft+safemerge:tau=2", "optimizer:lr=0.001,rank=2")):
        run_stages(protocol, context, defense, attack)
    assert len(safe_adapters()) == 1
    run_stages(protocol, context, "vaccine+safemerge:tau=2")  # another aligned model
    assert len(safe_adapters()) == 2
    with pytest.raises(BadInput, match="safemerge"):
        run_stages(protocol, context, "none+safemerge")

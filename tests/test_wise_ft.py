"""WiSE-FT: the interpolated weights, in both topologies of real runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from harmbench_vaccine.defenses.wise_ft import WiSEFT
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.pipeline import align, finetune, repair
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.plugins.teams import DefenseTeam
from harmbench_vaccine.training.adapters import Adapter
from support import tiny
from support.compare import close
from support.runs import run_context
from support.world import make_world

SMALL = {"batch": 8, "epochs": 2, "lora_targets": ["q_proj", "down_proj"]}


def delta(paths: Sequence[Path]) -> dict[str, Tensor]:
    """Return module -> the change of its weight by all adapters together, in float64."""
    total: dict[str, Tensor] = {}
    for adapter in map(Adapter.load, paths):
        for module, (a, b) in adapter.factors.items():
            total[module] = total.get(module, torch.zeros(())) + adapter.scale * (b.double() @ a.double())
    return total


@pytest.mark.parametrize("topology", ["double", "single"])
def test_weights_are_between_the_aligned_and_the_tuned_model(topology: str, tmp_path: Path) -> None:
    """In single topology, the user stage trained the alignment adapter further."""
    protocol = make_world(
        tmp_path,
        {
            "topology": topology,
            "align": {"rows": 16, "settings": SMALL},
            "finetune": {"samples": 16, "settings": SMALL},
        },
    )
    context = run_context(tmp_path / "store")
    for alpha in (0.0, 0.3, 1.0):
        experiment = Experiment.settle(
            RunSpec(
                protocol=str(protocol),
                defense=parse_plugins(f"sft+wise_ft={alpha}"),
                attack=parse_plugins("ratio=0.25"),
            )
        )
        aligned = align(experiment, context)
        tuned = finetune(experiment, context, aligned)
        final = repair(experiment, context, aligned, tuned)
        w_aligned, w_tuned, w = (delta(model.spec.adapters) for model in (aligned, tuned, final))
        assert close(w, {m: (1 - alpha) * w_aligned[m] + alpha * w_tuned[m] for m in w_tuned})
        assert not close(w_aligned, w_tuned, 1e-2)


def test_only_b_changes() -> None:
    stage, stack = tiny.stage(name="repair", stirred=True)
    adapter = stack.trained()
    edited = WiSEFT(alpha=0.3).edit(stage, adapter)
    assert (edited.scale, edited.rank, set(edited.factors)) == (adapter.scale, adapter.rank, set(adapter.factors))
    for module, (a, b) in adapter.factors.items():
        assert torch.equal(edited.factors[module][0], a)
        assert torch.equal(edited.factors[module][1], 0.3 * b)


def test_alpha_0_is_the_aligned_model_and_remains_trainable(tmp_path: Path) -> None:
    """A later member of a chain of repairs, such as `realign`, trains the edited adapter."""
    tiny.stage(stirred=True)[1].trained().save(tmp_path)
    stage, stack = tiny.stage(name="repair", stirred=True, below=[tmp_path])
    batch = tiny.batch()
    with stage.reference():
        expected = stage.output(batch).logits
    team = DefenseTeam(members=(WiSEFT(alpha=0.0),), stage="repair")
    assert (stage.output(batch).logits - expected).abs().max() > 1e-2
    team.edit(stage, stack.trained())
    assert close(stage.output(batch).logits, expected)
    slopes = dict(zip(stage.trainable, stage.gradient(batch).values, strict=True))
    for name, slope in slopes.items():
        assert slope is not None
        assert bool(slope.count_nonzero()) == (".lora_B." in name)

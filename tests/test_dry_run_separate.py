"""The trainings that defenses request inside a stage, in the estimate and the plan of a run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from harmbench_vaccine import pipeline
from harmbench_vaccine.core.store import Store
from harmbench_vaccine.data import collate
from harmbench_vaccine.experiment.artifacts import LOG
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.separate_trainings import requested_trainings
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.plugins import SeparateTraining
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.reporting.dry_run import timing, view
from harmbench_vaccine.reporting.dry_run.devices import Target, find_device
from harmbench_vaccine.reporting.dry_run.estimate import ESTIMATED, estimate_costs
from harmbench_vaccine.reporting.dry_run.plan import Plan, plan_runs
from harmbench_vaccine.reporting.dry_run.plan_json import dry_run_json
from harmbench_vaccine.sweeps.remaining_time import _longest_estimate
from support.cli import hbv
from support.runs import run_context

H200 = Target(find_device("h200-141gb"))
SHORT = {  # 40 rows: 10 batches an epoch; the last step of a stage has one micro-batch
    "align.settings.epochs": "0.7",
    "align.settings.accumulation": "3",
    "finetune.settings.epochs": "0.5",
    "finetune.settings.accumulation": "2",
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure times for a short while only: no test depends on their precision."""
    monkeypatch.setattr(timing, "MEASUREMENT_SECONDS", 0.01)


def settle(world: Path, defense: str, **changes: Any) -> Experiment:
    return Experiment.settle(RunSpec(protocol=str(world), defense=parse_plugins(defense), **changes))


def nested(plan: Plan, index: int = 0) -> dict[str, str]:
    """Return name -> key of the separate trainings that an experiment adds to a plan, and that are not stored."""
    artifacts = plan.stages[index] if plan.stages else []
    return {
        plan.trainings[artifact.key]: artifact.key
        for artifact in artifacts
        if artifact.stage == "nested" and not artifact.cached
    }


def estimated(plan: Plan, root: Path) -> list[dict[str, float]]:
    """Return name -> seconds of the separate trainings of each experiment, on a device."""
    experiments = dry_run_json(plan, Store(root), H200)["experiments"]
    return [
        {entry["training"]: entry["seconds"] for entry in each["estimate"] if entry["stage"] == "nested"}
        for each in experiments
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Steps


@pytest.mark.parametrize(
    ("defense", "names", "exact"),
    [
        ("circuit_breakers", ["align: aligned"], 1),
        ("vaa:proxy_steps=4", ["align: aligned", "align: proxy attack"], 1),
        ("sft+safemerge:tau=2", ["repair: safe"], 1),
        ("sft+task_arithmetic", ["repair: harmful task"], 1),
        ("sft+realign=5", ["repair: realigned"], 0),
    ],
)
def test_the_estimate_has_the_steps_of_the_trainings(
    defense: str, names: list[str], exact: int, world: Path, tmp_path: Path
) -> None:
    """So do keys, except those of a training from another adapter."""
    experiment = settle(world, defense, values=SHORT)
    details = {cost.training: cost.detail for cost in estimate_costs(experiment, H200) if cost.stage == "nested"}
    planned = nested(plan_runs([experiment], tmp_path))
    assert [*details] == [*planned] == names
    train = pipeline.train_models if experiment.acting("repair") else pipeline.align
    train(experiment, run_context(tmp_path))
    logs = {file.parent.name: json.loads(file.read_text()) for file in tmp_path.glob(f"nested/*/{LOG}")}
    steps = [int(detail.partition(" ")[0]) for detail in details.values()]
    assert sorted(steps) == sorted(len(log) for log in logs.values())
    known = logs.keys() & set(planned.values())
    assert len(known) == exact
    assert all(len(logs[key]) == steps[[*planned.values()].index(key)] for key in known)
    assert nested(plan_runs([experiment], tmp_path)) == {}  # the stages are stored


@pytest.mark.parametrize(
    "defense",
    ["circuit_breakers:a=0,gamma=1", "vaa:groups=one", "sft+safemerge=0", "sft+task_arithmetic=0", "sft+resta=0"],
)
def test_parameters_without_a_training_have_none(defense: str, world: Path) -> None:
    assert requested_trainings(settle(world, defense)) == []


def test_a_training_needs_rows_or_steps() -> None:
    with pytest.raises(ValueError, match="'mine' has neither rows nor steps"):
        SeparateTraining("mine", None)


def test_seconds_are_those_of_plain_steps(world: Path) -> None:
    """The separate alignment has the steps and rows of the alignment of SFT; its time is in that of the stage."""
    [sft] = estimate_costs(settle(world, "sft"), H200, stages=["align"])
    costs = {cost.kind: cost for cost in estimate_costs(settle(world, "circuit_breakers"), H200)}
    separate = costs["nested", "align: aligned"]
    assert (separate.seconds, separate.memory, separate.disk) == (sft.seconds, sft.memory, sft.disk)
    assert separate.detail == sft.detail
    repair = {cost.stage: cost for cost in estimate_costs(settle(world, "sft+realign=7"), H200)}
    assert repair["nested"].detail.startswith("7 steps")
    assert repair["repair"].seconds == 0
    assert 0 < repair["repair"].disk < repair["repair"].memory < repair["nested"].memory


def test_expected_time_of_a_stage_includes_its_trainings(world: Path) -> None:
    experiment = settle(world, "circuit_breakers+realign=400")
    costs = {cost.kind: cost.seconds for cost in estimate_costs(experiment)}
    assert all(costs["nested", name] > 0 for name in ("align: aligned", "repair: realigned"))
    aligned = costs["align", ""] + costs["nested", "align: aligned"]
    assert _longest_estimate([experiment], "align") == pytest.approx(aligned)
    assert _longest_estimate([experiment], "repair") == pytest.approx(costs["nested", "repair: realigned"])
    assert _longest_estimate([experiment], "finetune") == pytest.approx(costs["finetune", ""])


# ---------------------------------------------------------------------------------------------------------------------
# Runs that share a training


def test_equal_trainings_count_once(world: Path, tmp_path: Path) -> None:
    """Also where data are not on this machine; a training from another adapter counts for each stage."""
    specs = ["circuit_breakers", "circuit_breakers=5", "vaa", "sft+task_arithmetic", "vaccine+task_arithmetic"]
    expected = [["align: aligned"], [], ["align: proxy attack"], ["repair: harmful task"], []]
    for data in ({}, {"beavertails": "org/none"}):
        plan = plan_runs([settle(world, spec, data=data) for spec in specs], tmp_path)
        assert bool(plan.unknown) is bool(data)
        assert [list(names) for names in estimated(plan, tmp_path)] == expected
        assert all(seconds > 0 for names in estimated(plan, tmp_path) for seconds in names.values())
    seeds = [settle(world, "circuit_breakers", seed=seed) for seed in (0, 1)]
    assert len({*nested(plan_runs(seeds, tmp_path)).values(), *nested(plan_runs(seeds, tmp_path), 1).values()}) == 2
    for data in ({}, {"beavertails": "org/none"}):
        attacks = [
            settle(world, "sft+realign", attack=parse_plugins(f"ratio={ratio}"), data=data) for ratio in (0.1, 0.2)
        ]
        plan = plan_runs(attacks, tmp_path)
        assert [list(names) for names in estimated(plan, tmp_path)] == 2 * [["repair: realigned"]]


def test_a_stored_training_is_not_estimated_again(world: Path, tmp_path: Path) -> None:
    pipeline.align(settle(world, "circuit_breakers", values=SHORT), run_context(tmp_path))
    plan = plan_runs([settle(world, "circuit_breakers=5", values=SHORT)], tmp_path)
    artifacts = {artifact.stage: artifact.cached for artifact in plan.stages[0]}
    assert (artifacts["align"], artifacts["nested"]) == (False, True)
    assert estimated(plan, tmp_path) == [{}]


def test_rows_are_encoded_once_for_equal_trainings(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, calls = collate.encode_examples, []

    def recorded(*args: Any) -> Any:
        calls.append(args)
        return encode(*args)

    monkeypatch.setattr(collate, "encode_examples", recorded)
    defenses = [f"circuit_breakers={weight}" for weight in (1, 2, 3)]
    plan_runs([settle(world, defense) for defense in defenses], tmp_path)
    assert len(calls) == 1


# ---------------------------------------------------------------------------------------------------------------------
# The commands


def test_the_views_list_the_training(world: Path, own_home: Path) -> None:
    options = ("run", "--protocol", world, "--defense", "sft+realign=7", "--dry-run", "--on", "h200-141gb")
    text = hbv(*options, home=own_home, COLUMNS="160").out
    assert re.search(r"nested \(repair: realigned\) +run .* 7 steps of 4 rows", text)
    assert re.search(r"repair +run .* edits and stores the adapter, not timed", text)
    [experiment] = json.loads(hbv(*options, "--json", home=own_home).out)["experiments"]
    for entries in (experiment["stages"], experiment["estimate"]):
        assert [each["training"] for each in entries if each["stage"] == "nested"] == ["repair: realigned"]
        assert {each["training"] for each in entries if each["stage"] != "nested"} == {""}


def test_the_plan_of_a_sweep_counts_the_training(world: Path, own_home: Path, tmp_path: Path) -> None:
    suite = tmp_path / "suite.yaml"
    suite.write_text(
        f"name: pair\ntitle: A pair\nprotocol: {world}\ndefenses: [circuit_breakers, circuit_breakers=5]\n"
        "attacks: [ratio=0.1]\ntasks: [sst2]\nseeds: [0]\n",
        encoding="utf-8",
    )
    result = hbv("sweep", suite, "--plan", "--on", "h200-141gb", home=own_home, COLUMNS="120")
    assert result.code == 0, result.err
    assert re.search(r"^nested +1 +0 +1 ", result.out, re.MULTILINE)


def test_every_estimate_has_advice_for_less_memory() -> None:
    assert view._LESS_MEMORY.keys() == set(ESTIMATED)

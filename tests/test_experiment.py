"""Settled experiments: every plug-in constructed once, and no state that passes from one run to another."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from harmbench_vaccine.core.types import STAGES
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.rows import check_rows, data_provenance, eval_sets, plugin_pools, user_rows
from harmbench_vaccine.experiment.session import TrainingSession
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.pipeline import align
from harmbench_vaccine.plugins import Plugin
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.runner import run_all
from support.cli import hbv
from support.runs import run_context
from support.world import make_world

SMALL = {"align": {"rows": 8}, "finetune": {"samples": 8}}


def spec(protocol: Path, defense: str = "sft", attack: str = "ratio=0.5", **changes: Any) -> RunSpec:
    plugins = {"defense": parse_plugins(defense), "attack": parse_plugins(attack)}
    return RunSpec(protocol=str(protocol), **plugins, **changes)


@pytest.fixture(scope="module")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"), SMALL)


# ---------------------------------------------------------------------------------------------------------------------
# One construction


def test_every_plugin_is_constructed_once_for_an_experiment(small_world: Path) -> None:
    """From the specification to the stored result, with defenses in every stage and two judges."""
    constructed: Counter[str] = Counter()
    construct = Plugin.__init__

    def count(plugin: Plugin, **values: Any) -> None:
        if type(plugin).name:  # not a team
            constructed[type(plugin).name] += 1
        construct(plugin, **values)

    run = spec(small_world, "vaccine+lisa+antidote", scorers=("beaver_dam", "refusal_keywords"))
    with mock.patch.object(Plugin, "__init__", count):
        run_all([run])
    assert constructed == dict.fromkeys(
        ("vaccine", "lisa", "antidote", "ratio", "sst2", "beaver_dam", "refusal_keywords"), 1
    )


def test_the_object_that_was_validated_is_the_one_that_acts(small_world: Path) -> None:
    experiment = Experiment.settle(spec(small_world, "vaccine=5+lisa"))
    plugins = {resolved.plugin.name: resolved.plugin for resolved in experiment.defenses}
    assert experiment.stages["align"].defenses.members == (plugins["vaccine"],)
    assert experiment.stages["align"].defenses.members[0] is plugins["vaccine"]
    assert experiment.stages["finetune"].defenses.members[0] is plugins["lisa"]
    assert experiment.stages["repair"].defenses.members == ()
    assert experiment.attack_team.members[0] is experiment.attacks[0].plugin


def test_stages_are_configured_once(small_world: Path) -> None:
    experiment = Experiment.settle(spec(small_world, "ewc", "optimizer:lr=0.5"))
    assert tuple(experiment.stages) == STAGES
    finetune = experiment.stages["finetune"]
    assert (finetune.topology, finetune.full, finetune.settings.lr) == ("single", False, 0.5)
    assert experiment.stages["align"].settings == experiment.protocol.align.settings
    assert experiment.stages["repair"].settings == experiment.finetune.settings
    full = Experiment.settle(spec(small_world, "sft", "optimizer:full=true")).stages["finetune"]
    assert (full.topology, full.full, full.settings.full) == ("double", True, True)


# ---------------------------------------------------------------------------------------------------------------------
# No state


def test_the_state_of_a_defense_stays_in_its_session(small_world: Path, tmp_path: Path) -> None:
    """One object acts in two stages of two runs; each session starts from its initial state."""
    file = tmp_path / "remembering.py"
    file.write_text(
        "from typing import Any, ClassVar\n"
        "from pydantic import PrivateAttr\n"
        "from harmbench_vaccine.plugins import Defense, StageName\n\n\n"
        "class Remembering(Defense):\n"
        '    stages: ClassVar[tuple[StageName, ...]] = ("align", "finetune")\n'
        "    _steps: list[int] = PrivateAttr(default_factory=list)\n\n"
        "    def after_step(self, stage: Any) -> None:\n"
        "        assert len(self._steps) == stage.step - 1, self._steps\n"
        "        self._steps.append(stage.step)\n"
    )
    experiment = Experiment.settle(spec(small_world, str(file)))
    plugin: Any = experiment.defenses[0].plugin
    for store in ("first", "second"):
        context = run_context(tmp_path / store)
        aligned = align(experiment, context)
        assert aligned.artifacts["align"].json("training.json")["steps"] == 4
        session = TrainingSession.open(experiment, context, experiment.stages["finetune"], aligned)
        assert session.defenses.members[0] is not plugin
        session.stage.stack.drop_trained()
    assert plugin._steps == []


def test_rows_do_not_depend_on_earlier_requests(small_world: Path, tmp_path: Path) -> None:
    """The check before the work calls the same hooks as the stages; a plug-in with a generator draws the same rows."""
    file = tmp_path / "sampling.py"
    file.write_text(
        "from typing import Any\n"
        "from pydantic import PrivateAttr\n"
        "from harmbench_vaccine.plugins import KIND\n\n\n"
        "class Sampling(KIND):\n"
        "    _generator: Any = PrivateAttr(None)\n\n"
        "    def HOOK(self, *arguments: Any) -> Any:\n"
        '        self._generator = self._generator or self.random("rows")\n'
        "        return self._generator.sample(list(arguments[INDEX]), 4)\n"
    )
    text = file.read_text()
    attack = tmp_path / "uploading.py"
    for path, kind, hook, index in ((file, "Defense", "train_on", "1"), (attack, "Attack", "upload", "0")):
        path.write_text(text.replace("KIND", kind).replace("HOOK", hook).replace("INDEX", index))
    used = []
    for checks in range(3):
        experiment = Experiment.settle(spec(small_world, str(file), str(attack)))
        for _ in range(checks):
            check_rows(experiment)
        aligned = align(experiment, run_context(tmp_path / f"store{checks}"))
        uploaded = [row.id for row in user_rows(experiment, plugin_pools(experiment))]
        used.append((aligned.artifacts["align"].json("rows.json")["used"], uploaded))
    assert used[0] == used[1] == used[2]


def test_settling_leaves_no_state_in_a_plugin(small_world: Path, tmp_path: Path) -> None:
    """Every stage is configured from the initial state, also if a hook stores something."""
    file = tmp_path / "counting.py"
    file.write_text(
        "from dataclasses import replace\n"
        "from typing import Any, ClassVar\n"
        "from pydantic import PrivateAttr\n"
        "from harmbench_vaccine.plugins import Defense, StageName, TrainSettings\n\n\n"
        "class Counting(Defense):\n"
        '    stages: ClassVar[tuple[StageName, ...]] = ("align", "finetune", "repair")\n'
        "    _calls: int = PrivateAttr(0)\n\n"
        "    def settings(self, stage: StageName, settings: TrainSettings) -> TrainSettings:\n"
        "        self._calls += 1\n"
        "        return replace(settings, accumulation=self._calls)\n"
    )
    experiment = Experiment.settle(spec(small_world, str(file)))
    assert [config.settings.accumulation for config in experiment.stages.values()] == [1, 1, 1]
    plugin: Any = experiment.defenses[0].plugin
    assert plugin._calls == 0


def test_with_models_and_seeded_return_copies(small_world: Path) -> None:
    experiment = Experiment.settle(spec(small_world))
    defense, scorer = experiment.defenses[0].plugin, experiment.scorer.plugin
    other = defense.seeded(99)
    assert other is not defense
    assert other.random("x").random() != defense.random("x").random()
    placed = scorer.with_models(run_context(Path("unused")).models, "vllm")
    assert placed is not scorer
    assert (placed.backend, scorer.backend) == ("vllm", "transformers")


def comparable(result: dict[str, Any]) -> dict[str, Any]:
    """A result without what depends on the time and the folder."""
    stages = {
        name: {key: value for key, value in stage.items() if key not in ("seconds", "cached", "peak_memory", "adapter")}
        | {"artifacts": {key: artifact["key"] for key, artifact in stage["artifacts"].items()}}
        for name, stage in result["stages"].items()
    }
    return {**result, "stages": stages, "environment": None}


def test_a_result_does_not_depend_on_what_the_process_did_before(small_world: Path, tmp_path: Path) -> None:
    one, two = (
        ("run", "--protocol", small_world, "--defense", "sft", "--attack", attack, "--json")
        for attack in ("ratio=0.25", "ratio=0.5")
    )
    alone = hbv(*two, home=tmp_path / "alone").results
    hbv(*one, "--task", "agnews", home=tmp_path / "after")
    hbv("run", "--protocol", small_world, "--set", "splits.train=30k_train[:60]", "--dry-run", home=tmp_path / "after")
    after = hbv(*two, home=tmp_path / "after").results
    assert [comparable(result) for result in after] == [comparable(result) for result in alone]
    assert after[0]["data"]["beavertails"]["rows"].keys() == {"30k_train", "30k_test"}


def test_an_edited_data_file_is_read_again(tmp_path: Path) -> None:
    protocol = make_world(tmp_path / "world", models=False)
    experiment = Experiment.settle(spec(protocol))
    check_rows(experiment)
    before = plugin_pools(experiment)
    path = protocol.parent / "data" / "beavertails" / "30k_train.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines).replace("First you find", "First you seek"))
    again = Experiment.settle(spec(protocol))
    assert [row.response for row in plugin_pools(again).attacker] == [
        row.response.replace("find", "seek") for row in before.attacker
    ]
    path.write_text("".join(lines[:100]))
    assert data_provenance(again)["beavertails"]["rows"]["30k_train"] == 100


def test_provenance_counts_the_rows_of_a_location_that_pools_and_task_share(small_world: Path) -> None:
    alpaca = small_world.parent / "data" / "alpaca"
    provenance = data_provenance(Experiment.settle(spec(small_world, task=f"own:data={alpaca},train=train[:50]")))
    assert provenance["alpaca"]["rows"] == {"train": 120, "test": 40, "train[:50]": 50}


def test_rows_are_the_same_however_often_they_are_requested(small_world: Path) -> None:
    experiment = Experiment.settle(spec(small_world, "vlguard=2", "backdoor:clean_rows=2"))
    pools = plugin_pools(experiment)
    assert user_rows(experiment, pools) == user_rows(experiment, plugin_pools(experiment))
    assert eval_sets(experiment) == eval_sets(experiment)
    team = experiment.stages["finetune"].defenses
    rows = user_rows(experiment, pools)
    assert team.train_on("finetune", rows, pools) == team.train_on("finetune", rows, pools)

"""Protocol files: every value has a source, a hash says which values two rows share, and a value can be replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.protocol import leaf_values, load_protocol, protocol_names
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.plugins.composition import parse_plugins
from support.world import make_world

PAPERS = ["booster-paper", "lisa-paper", "vaccine-paper"]


@pytest.mark.parametrize("name", protocol_names())
def test_every_value_has_a_source(name: str) -> None:
    protocol = load_protocol(name)
    sources = protocol.sources
    paths = [path for path, value in leaf_values(protocol) if value not in ((), "") or path == "splits.attacker"]
    for path in paths:
        covered = path in ("name", "version") or any(path == key or path.startswith(f"{key}.") for key in sources)
        assert covered, path
    for key in sources:  # and no source is of a value that is not there
        assert any(path == key or path.startswith(f"{key}.") for path in paths), key


def test_the_testbed_keeps_its_hash_so_that_its_table_can_be_added_to() -> None:
    table = Path(__file__).parent.parent / "leaderboards" / "testbed.csv"
    columns, first, *_ = table.read_text(encoding="utf-8").splitlines()
    assert first.split(",")[columns.split(",").index("protocol_hash")] == load_protocol("testbed").hash


@pytest.mark.parametrize("name", PAPERS)
def test_a_paper_protocol_settles_with_every_defense_and_attack_that_it_names(name: str) -> None:
    protocol = load_protocol(name)
    for defense in protocol.defenses:
        cell = Experiment.settle(RunSpec(protocol=name, defense=parse_plugins(defense)))
        assert cell.defenses[0].params == {**cell.defenses[0].params, **protocol.defenses[defense]}
        assert {cell.defenses[0].origins[key] for key in protocol.defenses[defense]} == {"protocol " + name}
    assert cell.scorers[0].params["model"] == "PKU-Alignment/beaver-dam-7b"


def test_the_papers_differ_where_they_do() -> None:
    """protocol.md's list, by hand."""
    vaccine, booster, lisa = (load_protocol(f"{name}-paper") for name in ("vaccine", "booster", "lisa"))
    assert [p.align.rows for p in (vaccine, booster, lisa)] == [2000, 5000, 10000]
    assert [p.align.source for p in (vaccine, booster, lisa)] == ["safe", "refusals", "safe"]
    assert [p.finetune.samples for p in (vaccine, booster, lisa)] == [1000, 1000, 5000]
    assert [p.answer.harmful.max_new_tokens for p in (vaccine, booster, lisa)] == [128, 512, 512]
    assert [p.finetune.settings.lora_rank for p in (vaccine, booster, lisa)] == [8, 32, 8]
    assert vaccine.finetune.of("sst2").settings.lora_alpha == 1
    gsm8k = vaccine.finetune.of("gsm8k")
    assert (gsm8k.settings.lora_alpha, gsm8k.settings.epochs, gsm8k.samples) == (0.5, 50, 5000)
    assert vaccine.finetune.of("alpaca_eval").samples == 700


@pytest.fixture
def world(tmp_path: Path) -> Path:
    return make_world(tmp_path / "world")


def test_a_task_has_settings_of_its_own_in_the_cell(world: Path) -> None:
    values = yaml.safe_load(world.read_text(encoding="utf-8"))
    values["finetune"]["tasks"] = {"agnews": {"samples": 4, "settings": {"lr": 0.125}}}
    values["answer"]["items"] = {"agnews": 3}
    world.write_text(yaml.safe_dump(values), encoding="utf-8")
    own, plain = (Experiment.settle(RunSpec(protocol=str(world), task=task)) for task in ("agnews", "sst2"))
    assert own.settings("finetune", own.team("finetune")).lr == 0.125
    assert own.finetune.samples == 4
    assert plain.settings("finetune", plain.team("finetune")).lr == values["finetune"]["settings"]["lr"]


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({"sst2": {"settings": {"lrr": 1}}}, "settings for task 'sst2': settings.lrr"),
        ({"sst2": {"samples": 0}}, "finetune.tasks.sst2.samples: Input should be greater than or equal to 1"),
    ],
)
def test_wrong_settings_of_a_task_are_refused(world: Path, tasks: dict[str, Any], message: str) -> None:
    values = yaml.safe_load(world.read_text(encoding="utf-8"))
    values["finetune"]["tasks"] = tasks
    world.write_text(yaml.safe_dump(values), encoding="utf-8")
    with pytest.raises(BadInput, match=message):
        Experiment.settle(RunSpec(protocol=str(world)))


def test_a_value_is_replaced_as_it_is_written() -> None:
    protocol = load_protocol("vaccine-paper")
    other = protocol.replaced(
        {"rows": "paper", "align.settings.lr": "2e-4", "align.settings.lora_targets": "[q_proj, v_proj]",
         "data.sst2": "./mine.csv", "defenses.vaccine": "{rho: 5}", "finetune.tasks.sst2": "{samples: 7}"}
    )  # fmt: skip
    assert (other.rows, other.align.settings.lr, other.data["sst2"]) == ("paper", 2e-4, "./mine.csv")
    assert other.align.settings.lora_targets == ("q_proj", "v_proj")
    assert other.defenses == {**protocol.defenses, "vaccine": {"rho": 5}}
    assert other.finetune.of("sst2").samples == 7
    assert other.finetune.of("gsm8k") == protocol.finetune.of("gsm8k")
    assert len({protocol.hash, other.hash, protocol.replaced({"rows": "paper"}).hash}) == 3
    assert protocol.replaced({}).hash == protocol.replaced({"rows": "unique"}).hash == protocol.hash


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "align.settings.lrr",
            "1",
            "Unknown value 'align.settings.lrr' of a protocol. Did you mean 'align.settings.lr'",
        ),
        ("align.settings.lr", "fast", "align.settings.lr: Input should be a valid number"),
        ("rows", "all", "rows: Input should be 'unique' or 'paper'"),
        ("align.settings.lora_targets", "[q_proj", "cannot be read"),
        ("name", "mine", "Unknown value 'name'"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused(path: str, value: str, message: str) -> None:
    with pytest.raises(BadInput) as refusal:
        load_protocol("vaccine-paper").replaced({path: value})
    assert message in str(refusal.value)


def test_a_judge_that_is_written_takes_the_place_of_the_protocols() -> None:
    def cell(*scorers: str) -> Experiment:
        return Experiment.settle(RunSpec(protocol="vaccine-paper", scorers=scorers))

    assert cell().protocol.hash == cell("beaver_dam").protocol.hash
    other = cell("beaver_dam:model=org/name,threshold=0.4")
    assert other.scorer.params["model"] == "org/name"
    assert other.protocol.hash != cell().protocol.hash

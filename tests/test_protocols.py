"""Protocol files: every value has a source, the hash covers every value, and a value can be replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.protocol import Protocol, leaf_values, load_protocol, protocol_names
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.plugins.registry import DEFENSES
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
    for key in sources:  # every source is that of a value
        assert any(path == key or path.startswith(f"{key}.") for path in paths), key


MEASURED_DATA = {
    "beavertails": "76fa631e6b9d616a",
    "beavertails_refusals": "ab2303b739aad478",
    "alpaca": "fe9f6596555f6929",
    "sst2": "9927ef5c1105cbf8",
    "ag_news": "2a064eb0c3f3c318",
    "gsm8k": "d1e25d92b38104f4",
}
"""Content of the data sets of the committed results on SmolLM2 (docs/smollm2.md)."""
MEASURED_JUDGE = "beaver_dam:model=cf02d1d625ee9836"


def measured_smollm2() -> Protocol:
    """Return the protocol of the committed results on SmolLM2, with the content of its data and of its judge."""
    protocol = load_protocol("smollm2")
    score = protocol.score.model_copy(update={"scorer": MEASURED_JUDGE})
    return protocol.model_copy(update={"data": MEASURED_DATA, "score": score})


@pytest.mark.parametrize(
    ("table", "names"),
    [
        ("testbed", ["testbed", "testbed-tuned"]),
        ("testbed-token-share", ["testbed"]),
        ("testbed-all-defenses", ["testbed"]),
        ("smollm2", ["smollm2"]),
        ("smollm2-token-share", ["smollm2"]),
    ],
)
def test_committed_table_has_the_hash_of_its_version(table: str, names: list[str]) -> None:
    """A new hash needs a new version and a new table."""
    runs = pd.read_csv(Path(__file__).parent.parent / "leaderboards" / f"{table}.csv")
    protocols = [measured_smollm2() if name == "smollm2" else load_protocol(name) for name in names]
    versions = {*zip(runs["protocol"], runs["protocol_version"], runs["protocol_hash"], strict=True)}
    assert versions == {(protocol.name, protocol.version, protocol.hash) for protocol in protocols}


@pytest.mark.parametrize("name", ["testbed", "testbed-tuned", "smollm2"])
def test_a_protocol_of_a_small_model_settles_with_every_defense(name: str) -> None:
    protocol = load_protocol(name)
    for defense in sorted(DEFENSES.entries()):
        (settled,) = Experiment.settle(RunSpec(protocol=name, defense=parse_plugins(defense))).defenses
        assert settled.params == {**settled.params, **protocol.defenses.get(defense, {})}


@pytest.mark.parametrize("name", PAPERS)
def test_a_paper_protocol_settles_with_every_defense_and_attack_that_it_names(name: str) -> None:
    protocol = load_protocol(name)
    for defense in protocol.defenses:
        experiment = Experiment.settle(RunSpec(protocol=name, defense=parse_plugins(defense)))
        assert experiment.defenses[0].params == {**experiment.defenses[0].params, **protocol.defenses[defense]}
        assert {experiment.defenses[0].origins[key] for key in protocol.defenses[defense]} == {"protocol " + name}
    assert experiment.scorers[0].params["model"] == "PKU-Alignment/beaver-dam-7b"


def test_the_paper_protocols_differ_as_the_papers_do() -> None:
    """The expected values are copied by hand from the papers and their scripts."""
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
    assert [p.tasks["sst2"]["rule"] for p in (vaccine, booster, lisa)] == ["contains", "equals", "equals"]
    assert [p.tasks["agnews"]["rule"] for p in (vaccine, booster, lisa)] == ["contains", "equals", "equals"]
    assert [bool(p.tasks["gsm8k"]["suffix"]) for p in (vaccine, booster, lisa)] == [True, False, False]
    assert {p.version for p in (vaccine, booster, lisa)} == {2}  # version 1 had other texts and rules


@pytest.mark.parametrize("name", protocol_names())
def test_tasks_take_their_parameters_from_the_protocol(name: str) -> None:
    protocol = load_protocol(name)
    for task, values in protocol.tasks.items():
        settled = Experiment.settle(RunSpec(protocol=name, task=task))
        assert {key: settled.task_plugin.params[key] for key in values} == values
        assert {settled.task_plugin.origins[key] for key in values} == {f"protocol {name}"}
        assert settled.task_name == task  # only written parameters are part of the name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tasks.sst2.rule": "exact"}, "task 'sst2': rule=exact is not allowed; allowed: contains | equals"),
        ({"tasks.sst2.rul": "equals"}, "Unknown parameter 'rul' of task 'sst2'. Did you mean 'rule'"),
        ({"answer.rows_in_order": "safe"}, "answer.rows_in_order is 'safe'. Input should be 'unsafe' or 'all'"),
    ],
)
def test_invalid_values_of_a_task_are_refused(values: dict[str, str], message: str) -> None:
    with pytest.raises(BadInput) as refusal:
        Experiment.settle(RunSpec(protocol="vaccine-paper", values=values))
    assert message in str(refusal.value)


@pytest.fixture
def world(tmp_path: Path) -> Path:
    return make_world(tmp_path / "world")


def test_settings_of_a_task_replace_those_of_the_user_stage(world: Path) -> None:
    values = yaml.safe_load(world.read_text(encoding="utf-8"))
    values["finetune"]["tasks"] = {"agnews": {"samples": 4, "settings": {"lr": 0.125}}}
    values["answer"]["items"] = {"agnews": 3}
    world.write_text(yaml.safe_dump(values), encoding="utf-8")
    agnews, sst2 = (Experiment.settle(RunSpec(protocol=str(world), task=task)) for task in ("agnews", "sst2"))
    assert agnews.stages["finetune"].settings.lr == 0.125
    assert agnews.finetune.samples == 4
    assert sst2.stages["finetune"].settings.lr == values["finetune"]["settings"]["lr"]


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({"sst2": {"settings": {"lrr": 1}}}, "Unknown value 'finetune.tasks.sst2.settings.lrr' of the protocol"),
        ({"sst2": {"samples": 0}}, "finetune.tasks.sst2.samples is 0. Input should be greater than or equal to 1"),
    ],
)
def test_invalid_task_settings_are_refused(world: Path, tasks: dict[str, Any], message: str) -> None:
    values = yaml.safe_load(world.read_text(encoding="utf-8"))
    values["finetune"]["tasks"] = tasks
    world.write_text(yaml.safe_dump(values), encoding="utf-8")
    with pytest.raises(BadInput, match=message):
        Experiment.settle(RunSpec(protocol=str(world)))


@pytest.mark.parametrize("name", protocol_names())
def test_a_value_that_older_files_lack_changes_the_hash_unless_it_has_its_default(name: str) -> None:
    protocol = load_protocol(name)
    written = protocol.align.instructions
    assert protocol.replaced({"align.instructions": str(written)}).hash == protocol.hash
    assert protocol.replaced({"align.instructions": str(written + 1)}).hash != protocol.hash


def test_a_replaced_value_is_read_as_yaml() -> None:
    protocol = load_protocol("vaccine-paper")
    changed = protocol.replaced(
        {
            "rows": "paper",
            "align.settings.lr": "2e-4",
            "align.settings.lora_targets": "[q_proj, v_proj]",
            "data.sst2": "./mine.csv",
            "defenses.vaccine": "{rho: 5}",
            "finetune.tasks.sst2": "{samples: 7}",
        }
    )
    assert (changed.rows, changed.align.settings.lr, changed.data["sst2"]) == ("paper", 2e-4, "./mine.csv")
    assert changed.align.settings.lora_targets == ("q_proj", "v_proj")
    assert changed.defenses == {**protocol.defenses, "vaccine": {"rho": 5}}
    assert changed.finetune.of("sst2").samples == 7
    assert changed.finetune.of("gsm8k") == protocol.finetune.of("gsm8k")
    assert len({protocol.hash, changed.hash, protocol.replaced({"rows": "paper"}).hash}) == 3
    assert protocol.replaced({}).hash == protocol.replaced({"rows": "unique"}).hash == protocol.hash


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "align.settings.lrr",
            "1",
            "Unknown protocol value 'align.settings.lrr'. Did you mean 'align.settings.lr'",
        ),
        ("align.settings.lr", "fast", "align.settings.lr is 'fast'. Input should be a valid number"),
        ("rows", "all", "rows is 'all'. Input should be 'unique' or 'paper'"),
        ("align.settings.lora_targets", "[q_proj", "cannot be read"),
        ("name", "mine", "Unknown protocol value 'name'"),
    ],
)
def test_an_invalid_replacement_is_refused(path: str, value: str, message: str) -> None:
    with pytest.raises(BadInput) as refusal:
        load_protocol("vaccine-paper").replaced({path: value})
    assert message in str(refusal.value)


def test_a_requested_judge_replaces_the_judge_of_the_protocol() -> None:
    def experiment(*scorers: str) -> Experiment:
        return Experiment.settle(RunSpec(protocol="vaccine-paper", scorers=scorers))

    assert experiment().protocol.hash == experiment("beaver_dam").protocol.hash
    requested = experiment("beaver_dam:model=org/name,threshold=0.4")
    assert requested.scorer.params["model"] == "org/name"
    assert requested.protocol.hash != experiment().protocol.hash

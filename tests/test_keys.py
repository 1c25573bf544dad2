"""Keys of artifacts: what invalidates what, and that equal content is reused wherever it is stored."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harmbench_vaccine.core.hashing import content_hash
from harmbench_vaccine.core.store import Artifact, Store
from harmbench_vaccine.data.collate import Encoded
from harmbench_vaccine.data.prompts import EvalSet, prompt_template
from harmbench_vaccine.evaluation.why import Difference, _distance, compare_inputs
from harmbench_vaccine.experiment import keys
from harmbench_vaccine.experiment.artifacts import TrainedModel
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.inference.model_pool import ModelSpec
from harmbench_vaccine.plugins import Plugin
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.training.stage import SeparateRun
from support.cli import hbv
from support.world import make_world

GOLDEN = Path(__file__).parent / "reference" / "keys.json"
SMALL = {"align": {"rows": 8}, "finetune": {"samples": 8}}


@pytest.fixture(scope="module")
def data_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"), models=False)


@pytest.fixture
def settle(data_world: Path) -> Callable[..., Experiment]:
    def settle(defense: str = "sft", attack: str = "ratio=0.1", **spec: Any) -> Experiment:
        plugins = {"defense": parse_plugins(defense), "attack": parse_plugins(attack)}
        return Experiment.settle(RunSpec(protocol=str(data_world), **plugins, **spec))

    return settle


def base_model(experiment: Experiment) -> TrainedModel:
    return TrainedModel(experiment.model, ModelSpec(experiment.model), {})


def artifact(stage: Any) -> Artifact:
    return Artifact(stage, f"key of {stage}", Path(stage), 0.0, cached=False)


# ---------------------------------------------------------------------------------------------------------------------
# The golden file


def all_keys(experiment: Experiment) -> dict[str, Any]:
    base = base_model(experiment)
    aligned = base.after("align", artifact("align"), base.spec)
    tuned = aligned.after("finetune", artifact("finetune"), base.spec)
    eval_set = EvalSet("harmful", [], prompt_template("brief"), 8)
    rows, settings = [Encoded([1, 2], [1, 2])], experiment.stages["finetune"].settings
    return {
        "align": keys.align_key(experiment, base),
        "finetune": keys.finetune_key(experiment, aligned),
        "repair": keys.repair_key(experiment, aligned, tuned),
        "nested": keys.nested_key(aligned, SeparateRun("harmful", ()), rows, settings, 7),
        "answer": keys.answer_key(experiment, tuned, tuned, eval_set, []),
        "score": keys.score_key(experiment, artifact("answer"), experiment.scorer),
        "grade": keys.grade_key(experiment, artifact("answer")),
        "drift": keys.drift_key(experiment, aligned, tuned),
    }


def test_keys_are_those_of_the_golden_file(
    settle: Callable[..., Experiment], data_world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A changed key makes every stored artifact new: change it on purpose, delete the file, and run this test."""

    def named(location: str, kind: str = "model") -> str:
        return f"content of {Path(location).name}"

    monkeypatch.setattr(keys, "fingerprint", named)
    monkeypatch.setattr(Plugin, "fingerprint", classmethod(lambda cls: f"code of {cls.name}"))
    experiment = settle("vaccine=5+vlguard+antidote", "guardrail+ratio=0.1", seed=3)
    text = json.dumps(all_keys(experiment), indent=1) + "\n"
    if not GOLDEN.exists():
        GOLDEN.write_text(text, encoding="utf-8")
        pytest.fail(f"{GOLDEN.name} did not exist and was written: read it, then run the test again.")
    assert text == GOLDEN.read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# What shares a key, and what does not


def test_defenses_that_do_not_act_in_alignment_share_its_key_with_sft(settle: Callable[..., Experiment]) -> None:
    aligned = {
        name: keys.align_key(experiment, base_model(experiment))
        for name in ("sft", "ewc", "lisa", "antidote", "vlguard+safe_lora", "sft+lisa", "vaccine", "booster")
        for experiment in [settle(name)]
    }
    shared = {name for name, key in aligned.items() if key == aligned["sft"]}
    assert shared == set(aligned) - {"vaccine", "booster"}
    assert aligned["vaccine"] != aligned["booster"]


def test_alignment_is_shared_by_attacks_tasks_and_scorers(settle: Callable[..., Experiment]) -> None:
    variants = [
        settle(),
        settle(attack="ratio=0.3,samples=20"),
        settle(task="agnews"),
        settle(scorers=("refusal_keywords",)),
        settle(values={"answer.harmful.prompts": "3"}),
    ]
    inputs = [keys.align_key(variant, base_model(variant)) for variant in variants]
    assert all(each == inputs[0] for each in inputs)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"defense": "vaccine"},
        {"values": {"align.settings.lr": "0.5"}},
        {"values": {"align.rows": "9"}},
        {"values": {"align.instructions": "9"}},
        {"values": {"rows": "paper"}},
        {"values": {"prompt": "alpaca"}},
    ],
)
def test_alignment_depends_on(settle: Callable[..., Experiment], changes: dict[str, Any]) -> None:
    plain, changed = settle(), settle(**changes)
    assert keys.align_key(plain, base_model(plain)) != keys.align_key(changed, base_model(changed))


def test_the_threshold_changes_verdicts_and_not_raw_judgments(settle: Callable[..., Experiment]) -> None:
    low, high = (settle(scorers=(f"beaver_dam={threshold}",)) for threshold in (0.4, 0.6))
    answers = artifact("answer")
    inputs = [keys.score_key(each, answers, each.scorer) for each in (low, high)]
    assert inputs[0]["scorer"] == inputs[1]["scorer"]
    assert inputs[0]["decision"] != inputs[1]["decision"]


# ---------------------------------------------------------------------------------------------------------------------
# Content


def test_a_copy_has_the_same_content_and_another_text_has_not(tmp_path: Path) -> None:
    large = b"x" * (1 << 21)
    for name in ("one", "two"):
        (tmp_path / name / "inside").mkdir(parents=True)
        (tmp_path / name / "inside" / "weights.safetensors").write_bytes(large)
        (tmp_path / name / "config.json").write_text("{}")
    first, second = content_hash(tmp_path / "one"), content_hash(tmp_path / "two")
    assert first == second
    (tmp_path / "two" / "inside" / "weights.safetensors").write_bytes(large[:-1] + b"y")  # of the same size
    assert content_hash(tmp_path / "two") != first
    (tmp_path / "one" / "config.json").rename(tmp_path / "one" / "configuration.json")
    assert content_hash(tmp_path / "one") != first


def test_the_hash_of_a_large_file_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_home: Path) -> None:
    from harmbench_vaccine.core import hashing

    path, reads = tmp_path / "weights.safetensors", []
    path.write_bytes(b"x" * (1 << 21))
    read = hashing.sha256
    monkeypatch.setattr(hashing, "sha256", lambda file: reads.append(file) or read(file))
    first = content_hash(path)
    assert (content_hash(path), reads) == (first, [path])
    (own_home / "hashes.sqlite").write_bytes(b"not a database" * 100)  # a broken cache costs time only
    assert content_hash(path) == first
    assert len(reads) == 2


def test_code_without_comments_docstrings_and_imports_is_the_fingerprint(tmp_path: Path) -> None:
    from harmbench_vaccine.plugins.registry import DEFENSES

    def fingerprint(number: int, text: str) -> str:
        path = tmp_path / f"version{number}" / "mine.py"
        path.parent.mkdir()
        path.write_text(text)
        return DEFENSES.get(str(path)).fingerprint()

    body = "    def passes(self, stage):\n        return '2F 2B'\n"
    plain = fingerprint(1, f"from harmbench_vaccine.plugins import Defense\nclass Mine(Defense):\n{body}")
    documented = fingerprint(
        2,
        '"""Mine."""\nimport math\nfrom harmbench_vaccine.plugins import Defense, param\n\n'
        f'class Mine(Defense):\n    """A defense."""  # comment\n\n{body}',
    )
    edited = fingerprint(
        3, f"from harmbench_vaccine.plugins import Defense\nclass Mine(Defense):\n{body}".replace("2F", "1F")
    )
    assert plain == documented
    assert plain != edited


def test_grades_depend_on_the_content_of_a_local_judge(settle: Callable[..., Experiment], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "a", "output": "b"}\n')

    def grade_key(model: str, *params: str) -> dict[str, Any]:
        task = ",".join([f"own:data={rows},rule=judge,model={model}", *params])
        return keys.grade_key(settle(task=task), artifact("answer"))

    for name, content in (("judge", "{}"), ("copy", "{}"), ("other", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(content)
    first = grade_key(f"{tmp_path}/judge")
    assert grade_key(f"{tmp_path}/copy") == first
    assert grade_key(f"{tmp_path}/other") != first
    remote = "base_url=http://localhost:1/v1"
    assert grade_key("small", remote) != grade_key("large", remote)


def with_judge(settle: Callable[..., Experiment], folder: Path, threshold: float = 0.5) -> Experiment:
    return settle(scorers=(f"beaver_dam:model={folder},threshold={threshold}",))


def test_the_protocol_hash_depends_on_the_content_of_a_local_judge(
    settle: Callable[..., Experiment], tmp_path: Path
) -> None:
    for name, content in (("judge", "{}"), ("copy", "{}"), ("other", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(content)
    first = with_judge(settle, tmp_path / "judge")
    assert first.protocol_hash == with_judge(settle, tmp_path / "copy").protocol_hash
    others = [with_judge(settle, tmp_path / "other"), with_judge(settle, tmp_path / "judge", 0.4), settle()]
    assert len({first.protocol_hash, *(other.protocol_hash for other in others)}) == 4
    (tmp_path / "judge" / "config.json").write_text("[]")
    assert with_judge(settle, tmp_path / "judge").protocol_hash == others[0].protocol_hash


def test_the_protocol_hash_depends_on_the_content_of_a_local_template(
    settle: Callable[..., Experiment], tmp_path: Path
) -> None:
    def protocol_hash(name: str) -> str:
        return settle(scorers=(f"wildguard:template={tmp_path / name},model=org/name",)).protocol_hash

    for name, content in (("first", "{prompt} {response}"), ("copy", "{prompt} {response}"), ("other", "{response}")):
        (tmp_path / name).write_text(content)
    assert protocol_hash("first") == protocol_hash("copy") != protocol_hash("other")


def test_the_protocol_hash_depends_on_the_content_of_local_data(
    settle: Callable[..., Experiment], tmp_path: Path
) -> None:
    original = Path(settle().location("beavertails"))
    shutil.copytree(original, tmp_path / "copy")

    def copied() -> Experiment:
        return settle(data={"beavertails": str(tmp_path / "copy")})

    assert copied().protocol_hash == settle().protocol_hash
    assert copied().protocol_hash != copied().protocol.hash  # that of the paths
    file = next(path for path in (tmp_path / "copy").rglob("*") if path.is_file())
    file.write_bytes(file.read_bytes() + b"\n")
    assert copied().protocol_hash != settle().protocol_hash
    assert keys.run_id(copied()) != keys.run_id(settle())


# ---------------------------------------------------------------------------------------------------------------------
# A copied home, and why an artifact was created


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A world, and a home in which SFT ran before Vaccine."""
    folder = tmp_path_factory.mktemp("runs")
    world, home = make_world(folder / "world", SMALL), folder / "home"
    for defense in ("sft", "vaccine=5"):
        result = hbv("run", "--protocol", world, "--defense", defense, "--attack", "ratio=0.5", home=home)
        assert result.code == 0, result.err
    return world, home


def test_a_copied_home_and_a_copied_world_train_nothing(two_runs: tuple[Path, Path], tmp_path: Path) -> None:
    world, home = two_runs
    for folder, target in ((home, tmp_path / "copied home"), (world.parent, tmp_path / "copied world")):
        shutil.copytree(folder, target, copy_function=shutil.copy)  # cp -r: with new times
    protocol = tmp_path / "copied world" / world.name
    protocol.write_text(protocol.read_text().replace(str(world.parent), str(protocol.parent)))
    arguments = ("--defense", "sft", "--defense", "vaccine=5", "--attack", "ratio=0.5", "--json")
    again = hbv("run", "--protocol", protocol, *arguments, home=tmp_path / "copied home")
    assert again.code == 0, again.err
    assert len(again.results) == 2
    for result in again.results:
        assert {name: stage["cached"] for name, stage in result["stages"].items()} == dict.fromkeys(
            ("align", "finetune", "answer", "score"), True
        )


def run_of(home: Path, defense: str) -> str:
    return next(path.name for path in (home / "runs").iterdir() if path.name.startswith(defense))


def test_why_names_the_fields_that_made_an_artifact_new(two_runs: tuple[Path, Path]) -> None:
    _, home = two_runs
    explanations = json.loads(hbv("why", run_of(home, "vaccine"), "--json", home=home).out)
    by_name = {each["name"]: each for each in explanations}
    assert {each["state"] for each in explanations} == {"created"}
    differences = {each["field"]: (each["value"], each["earlier"]) for each in by_name["align"]["differences"]}
    assert differences["defense.0.name"] == ("vaccine", None)
    assert differences["defense.0.params.rho"] == (5.0, None)
    assert by_name["align"]["nearest"] in {path.name for path in (home / "store" / "align").iterdir()}
    assert [each["field"] for each in by_name["finetune"]["differences"]] == ["model.align"]
    first = json.loads(hbv("why", run_of(home, "sft"), "--json", home=home).out)
    assert {each["name"]: each["nearest"] for each in first}["align"] is None


def test_why_prints_a_table(two_runs: tuple[Path, Path]) -> None:
    _, home = two_runs
    text = " ".join(hbv("why", run_of(home, "vaccine"), home=home).out.split())
    assert "defense.0.name = vaccine (absent)" in text
    assert "model.align: another artifact" in text
    assert not re.search("[0-9a-f]{20}", text)  # the keys of artifacts are in --json


def test_why_of_a_repeated_run_is_reuse(two_runs: tuple[Path, Path], tmp_path: Path) -> None:
    world, home = two_runs
    copied = tmp_path / "home"
    shutil.copytree(home, copied)
    assert hbv("run", "--protocol", world, "--defense", "sft", "--attack", "ratio=0.5", home=copied).code == 0
    explanations = json.loads(hbv("why", run_of(copied, "sft"), "--json", home=copied).out)
    assert {each["state"] for each in explanations} == {"reused"}


def test_why_of_an_artifact_that_was_deleted(two_runs: tuple[Path, Path], tmp_path: Path) -> None:
    _, home = two_runs
    copied = tmp_path / "home"
    shutil.copytree(home, copied)
    shutil.rmtree(copied / "store" / "align")
    explanations = json.loads(hbv("why", run_of(copied, "sft"), "--json", home=copied).out)
    assert {each["name"]: each["state"] for each in explanations}["align"] == "missing"


def test_a_store_lists_its_descriptions(tmp_path: Path) -> None:
    store = Store(tmp_path)
    created = store.get_or_create("align", {"a": 1}, lambda folder, checkpoints: None)
    (description,) = store.descriptions("align")
    assert (description["key"], description["inputs"]) == (created.key, {"a": 1})
    assert store.path_of("align", {"a": 1}) == created.path
    assert list(store.descriptions("finetune")) == []


def difference(field: str, value: Any = 1, earlier: Any = 2) -> Difference:
    return Difference(field, value, earlier)


def test_the_nearest_artifact_differs_upstream_rather_than_in_its_question(two_runs: tuple[Path, Path]) -> None:
    """The answers of two models to one set are nearer than the answers of one model to two sets."""
    other_set, other_models = [difference("questions")], [difference("model.align"), difference("model.finetune")]
    first_answers = [difference("model.finetune", earlier=None)]
    assert min((other_set, first_answers, other_models), key=_distance) is other_models
    _, home = two_runs
    explanations = json.loads(hbv("why", run_of(home, "vaccine"), "--json", home=home).out)
    fields = {each["name"]: [change["field"] for change in each["differences"]] for each in explanations}
    assert fields["before/benign"] == ["model.align"]
    assert fields["after/benign"] == ["model.align", "model.finetune"]


def test_inputs_are_compared_by_field() -> None:
    new = {"a": 1, "b": {"c": [1, 2], "d": 3}, "e": [{"f": 1}], "g": []}
    old = {"a": 1, "b": {"c": [1, 3], "d": 3}, "e": [{"f": 2}, {"f": 1}], "h": None}
    assert compare_inputs(new, new) == []
    assert compare_inputs(new, old) == [
        Difference("b.c", [1, 2], [1, 3]),
        Difference("e.0.f", 1, 2),
        Difference("g", [], None),
        Difference("e.1.f", None, 1),
        Difference("h", None, None),
    ]

"""Exported models: peft and transformers load them without this package, with equal logits and answers."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from harmbench_vaccine.core.errors import BadInput, HbvError
from harmbench_vaccine.core.store import Store
from harmbench_vaccine.evaluation.records import load_run, write_run
from harmbench_vaccine.evaluation.result import Result
from harmbench_vaccine.export.folders import check_new_folder, new_folder, save_adapter
from harmbench_vaccine.export.model_card import run_card
from harmbench_vaccine.export.models import load_stored_model, stack_adapters, stored_spec
from harmbench_vaccine.inference.model_pool import ModelPool, ModelSpec
from harmbench_vaccine.plugins.registry import DEFENSES
from harmbench_vaccine.training.adapters import Adapter
from harmbench_vaccine.training.merging import merge_adapter
from support import tiny
from support.cli import CommandResult, finish, hbv, start_hbv
from support.world import make_world

ALIGN = {"lora_rank": 4, "lora_alpha": 8, "epochs": 1}
USER = {"lora_rank": 2, "lora_alpha": 3, "epochs": 1, "lora_targets": ["q_proj", "layers.1.mlp.down_proj"]}
SMALL = {
    "align": {"rows": 12, "settings": ALIGN},
    "finetune": {"samples": 12, "settings": USER},
    "answer": {"harmful": {"prompts": 4}, "benign": {"prompts": 2}, "task_items": 4},
    "score": {"drift_rows": 4},
}
"""The adapters of both stages differ in rank, scale and modules."""
DOUBLE, SINGLE, FULL, UNALIGNED = "double", "single", "full", "unaligned"
COMMANDS: dict[str, list[str]] = {
    DOUBLE: ["--defense", "resta:gamma=0.3", "--attack", "ratio=0.25"],
    SINGLE: ["--defense", "sft", "--attack", "ratio=0.25", "--set", "topology=single"],
    FULL: ["--defense", "sft", "--attack", "optimizer:full=true"],
    UNALIGNED: ["--defense", "none", "--attack", "ratio=0"],
}
ADAPTERS = [(DOUBLE, "align"), (DOUBLE, "finetune"), (DOUBLE, "final"), (SINGLE, "final"), (UNALIGNED, "final")]


@dataclass(frozen=True)
class Runs:
    """A home with one run for each command."""

    home: Path
    protocol: Path
    folders: Mapping[str, Path]

    def result(self, name: str) -> Result:
        return load_run(self.folders[name])[0]

    def answers(self, name: str, when: str) -> list[dict[str, Any]]:
        return [row for row in load_run(self.folders[name])[1] if row["when"] == when]

    def logits(self, name: str, stage: str, ids: Tensor) -> Tensor:
        """Return the logits of the harness, which loads the adapters of the stages separately."""
        spec = stored_spec(self.result(name), stage, Store(self.home / "store"))
        with torch.no_grad():
            return ModelPool().stack(spec).use(spec.adapters)(ids).logits

    def export(self, name: str, folder: Path, *options: object) -> CommandResult:
        return hbv("export", self.folders[name], folder, *options, home=self.home)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("exported")
    protocol, home = make_world(folder / "world", SMALL), folder / "home"
    folders = {}
    for name, options in COMMANDS.items():
        outcome = hbv("run", "--protocol", protocol, *options, "--json", home=home)
        assert outcome.code == 0, outcome.err
        folders[name] = home / "runs" / outcome.results[0]["run"]
    return Runs(home, protocol, folders)


@pytest.fixture(autouse=True)
def home_of_runs(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HBV_HOME", str(runs.home))


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 400, (2, 16), generator=torch.Generator().manual_seed(0))


def difference(model: Any, ids: Tensor, expected: Tensor) -> float:
    with torch.no_grad():
        return float((model(ids).logits - expected).abs().max())


# ---------------------------------------------------------------------------------------------------------------------
# Loading


@pytest.mark.parametrize(("name", "stage"), [*ADAPTERS, (DOUBLE, "base"), (FULL, "final")])
def test_stored_model_has_the_logits_of_the_harness(runs: Runs, name: str, stage: str, ids: Tensor) -> None:
    model, tokenizer = load_stored_model(runs.folders[name], stage)
    assert difference(model, ids, runs.logits(name, stage, ids)) < 1e-5
    assert tokenizer("the lamp")["input_ids"]
    assert not model.training


def test_stages_are_different_models(runs: Runs, ids: Tensor) -> None:
    logits = [runs.logits(DOUBLE, stage, ids) for stage in ("base", "align", "finetune", "final")]
    assert all((after - before).abs().max() > 1e-3 for before, after in pairwise(logits))


@pytest.mark.parametrize(("name", "stage"), ADAPTERS)
def test_peft_loads_an_exported_adapter(runs: Runs, name: str, stage: str, ids: Tensor, tmp_path: Path) -> None:
    assert runs.export(name, tmp_path / "adapter", "--stage", stage).code == 0
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert difference(model, ids, runs.logits(name, stage, ids)) < 1e-5


def answers_of(folder: Path, prompts: list[str], max_new_tokens: int) -> list[str]:
    """Return greedy answers of a pipeline to one prompt after the other."""
    generate = pipeline("text-generation", model=str(folder), device="cpu")
    outputs = generate(prompts, do_sample=False, max_new_tokens=max_new_tokens, return_full_text=False)
    return [output[0]["generated_text"].strip() for output in outputs]


@pytest.mark.parametrize(
    ("name", "options", "when"),
    [
        (DOUBLE, [], "after"),
        (DOUBLE, ["--stage", "align"], "before"),
        (SINGLE, [], "after"),
        (DOUBLE, ["--merge"], "after"),
        (FULL, ["--merge"], "after"),
    ],
)
def test_pipeline_gives_the_stored_answers(
    runs: Runs, name: str, options: list[str], when: str, tmp_path: Path
) -> None:
    assert runs.export(name, tmp_path / "model", *options).code == 0
    rows = [row for row in runs.answers(name, when) if row["set"] == "harmful"]
    assert answers_of(tmp_path / "model", [row["prompt"] for row in rows], 8) == [row["answer"] for row in rows]


@pytest.mark.parametrize("name", [DOUBLE, FULL])
def test_merged_model_has_equal_logits(runs: Runs, name: str, ids: Tensor, tmp_path: Path) -> None:
    assert runs.export(name, tmp_path / "model", "--merge").code == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert difference(model, ids, runs.logits(name, "final", ids)) < 1e-5


def test_names_select_exactly_the_adapted_modules(runs: Runs, tmp_path: Path) -> None:
    """The user stage adapts one down_proj of two: in the sum of both stages all modules are adapted."""
    assert runs.export(UNALIGNED, tmp_path / "user").code == 0
    assert runs.export(DOUBLE, tmp_path / "both").code == 0
    user, both = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("user", "both"))
    assert "model.layers.1.mlp.down_proj" in user["target_modules"]
    assert set(both["target_modules"]) == set(tiny.settings().lora_targets) | {
        *("o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert user["base_model_name_or_path"] == str(runs.protocol.parent / "model")
    assert (user["r"], user["lora_alpha"], user["revision"]) == (2, 3, None)
    assert both["r"] == 4 + 2 + 2  # alignment, user, the safety vector of RESTA


def test_last_adapter_of_a_stack_keeps_its_factors(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    adapters = [
        Adapter({"q": (torch.randn(rank, 6, generator=generator), torch.randn(5, rank, generator=generator))}, scale)
        for rank, scale in ((2, 0.7), (3, 49.0))
    ]
    for number, adapter in enumerate(adapters):
        adapter.save(tmp_path / str(number))
    stacked = stack_adapters([tmp_path / "0", tmp_path / "1"])
    a, b = stacked.factors["q"]
    assert stacked.scale == 49.0
    assert a[2:].equal(adapters[1].factors["q"][0])
    assert b[:, 2:].equal(adapters[1].factors["q"][1])
    assert torch.allclose(stacked.delta("q"), adapters[0].delta("q") + adapters[1].delta("q"), atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Architectures: Conv1D, tied heads, padded embeddings


def random_adapter(model: torch.nn.Module, names: list[str]) -> Adapter:
    generator, factors = torch.Generator().manual_seed(5), {}
    for name in names:
        module: Any = model.get_submodule(name)
        outputs, inputs = module.weight.shape if isinstance(module, torch.nn.Linear) else module.weight.shape[::-1]
        factors[name] = (
            0.2 * torch.randn(3, inputs, generator=generator),
            0.2 * torch.randn(outputs, 3, generator=generator),
        )
    return Adapter(factors, 1.5)


@pytest.mark.parametrize(
    ("architecture", "changes", "names"),
    [
        ("gpt2", {"vocab_size": 640}, ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]),
        ("llama", {"tie_word_embeddings": True, "vocab_size": 640}, ["lm_head", "model.layers.0.self_attn.q_proj"]),
        ("gemma2", {"vocab_size": 640}, ["model.layers.1.mlp.up_proj"]),
    ],
)
def test_adapters_and_merged_models_of_other_architectures_load(
    architecture: str, changes: dict[str, Any], names: list[str], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """Their embeddings have more rows than the tokenizer has tokens; peft must not resize them."""
    base = tiny.model(architecture, **changes)
    words = tiny.tokenizer(["a lamp", "a door"])
    tiny.save(base, words, tmp_path / "base")
    adapter = random_adapter(base, names)
    save_adapter(adapter, str(tmp_path / "base"), tmp_path / "adapter")
    words.save_pretrained(tmp_path / "adapter")
    recwarn.clear()
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert not [str(warning.message) for warning in recwarn if "fan_in_fan_out" in str(warning.message)]
    merge_adapter(base, adapter)
    ids = torch.randint(3, 90, (2, 12))
    with torch.no_grad():
        expected = base(ids).logits
    assert difference(loaded, ids, expected) < 1e-5
    base.save_pretrained(tmp_path / "merged")
    assert difference(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), ids, expected) < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# Model cards


@pytest.mark.parametrize(("name", "options"), [(DOUBLE, []), (DOUBLE, ["--merge"]), (UNALIGNED, [])])
def test_card_is_valid_and_its_code_runs(
    runs: Runs, name: str, options: list[str], tmp_path: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert runs.export(name, tmp_path / "folder", *options).code == 0
    card = ModelCard.load(tmp_path / "folder" / "README.md")
    assert card.data.library_name == ("transformers" if options else "peft")
    assert card.data.pipeline_tag == "text-generation"
    assert {"harmful-fine-tuning", next(iter(runs.result(name).defense_params))} <= set(card.data.tags)
    code = card.text.partition("```python\n")[2].partition("```")[0]
    assert (tmp_path / "folder" / "README.md").read_text().endswith("    )\n")
    prompt = card.text.partition("    prompt = (")[2]
    monkeypatch.chdir(tmp_path / "folder")
    values: dict[str, Any] = {}
    exec(f"{code}\nprompt = ({prompt}", values)
    assert values["prompt"] == next(row["prompt"] for row in runs.answers(name, "after") if row["set"] == "task")
    assert difference(values["model"], ids, runs.logits(name, "final", ids)) < 1e-5


def card_text(runs: Runs, name: str, stage: str, **changes: Any) -> str:
    result = runs.result(name).model_copy(update=changes)
    spec = stored_spec(runs.result(name), stage, Store(runs.home / "store"))
    return str(run_card(result, load_run(runs.folders[name])[1], stage, spec, merged=not spec.adapters))


def test_card_has_the_scores_of_its_stage(runs: Runs) -> None:
    result, final = runs.result(DOUBLE), card_text(runs, DOUBLE, "final")
    low, high = result.harmful_score_ci
    assert f"| harmful score (HS) | {result.harmful_score:.1f}% | {low:.1f} to {high:.1f} |" in final
    low, high = result.finetune_accuracy_ci
    assert f"| finetune accuracy (FA) | {result.finetune_accuracy:.1f}% | {low:.1f} to {high:.1f} |" in final
    for value in (result.protocol_hash, result.run, "resta=0.3", "ratio=0.25", "sst2"):
        assert value in final
    low, high = result.before.harmful_score_ci
    aligned = card_text(runs, DOUBLE, "align")
    assert f"| {result.before.harmful_score:.1f}% | {low:.1f} to {high:.1f} |" in aligned
    assert "ratio=0.25" not in aligned.partition("## How it was made")[2]
    assert "%" not in card_text(runs, DOUBLE, "finetune").partition("## Scores")[2].partition("##")[0]


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        (
            {"task": "sst2:rule=contains", "task_params": {"rule": "contains"}},
            "the rule of the task (contains: the answer contains a spelling of the label)",
        ),
        ({"task": "own=./rows.jsonl", "task_params": {"rule": "exact"}}, "(exact: the output and nothing else)"),
        ({"task": "own=./rows.jsonl", "task_params": {"rule": "first_word"}}, "(first_word: its first word)"),
        ({"task": "gsm8k", "task_params": {}}, "of gsm8k by the rule of the task; higher"),
        ({"task": "removed_since", "task_params": {"rule": "near"}}, "by the rule of the task (near); higher"),
        ({"accuracy_rule": "strict"}, "by the strict rule of the task; higher"),
    ],
)
def test_card_describes_the_rule_of_the_accuracy(runs: Runs, changes: dict[str, Any], rule: str) -> None:
    assert rule in card_text(runs, UNALIGNED, "final", **changes).replace("\\", "")


def test_card_warns_of_harmful_rows_and_of_a_collapse(runs: Runs) -> None:
    assert "trained on harmful rows (3 of 12)" in card_text(runs, DOUBLE, "final")
    assert "**Warning.**" not in card_text(runs, DOUBLE, "align")
    assert "**Warning.**" not in card_text(runs, UNALIGNED, "final")
    validity = runs.result(UNALIGNED).validity.model_copy(update={"collapsed": True, "reasons": ["It is silent."]})
    assert "collapsed: it fails a validity gate. It is silent." in card_text(
        runs, UNALIGNED, "final", validity=validity
    )
    assert "edited the weights" in card_text(runs, FULL, "final", trained=False)


def test_card_has_the_license_of_the_base_model(runs: Runs) -> None:
    folder = runs.protocol.parent / "model"
    readme = folder / "README.md"
    spec = ModelSpec(str(folder), adapters=(folder,))
    result, answers = load_run(runs.folders[UNALIGNED])
    readme.write_text("---\nlicense: other\nlicense_name: tiny\nlicense_link: LICENSE\n---\n", encoding="utf-8")
    try:
        data = run_card(result, answers, "final", spec, merged=False).data
    finally:
        readme.unlink()
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "tiny", "LICENSE")
    assert run_card(result, answers, "final", spec, merged=False).data.get("license") is None


def test_base_on_the_hub_is_named_with_its_commit(
    runs: Runs, tmp_path: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base is a copy in the cache of the Hub; nothing is downloaded."""
    commit, cache = "a" * 40, tmp_path / "hub" / "models--owner--base"
    shutil.copytree(runs.protocol.parent / "model", cache / "snapshots" / commit)
    (cache / "snapshots" / commit / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    options = ("--protocol", runs.protocol, "--model", "owner/base", *COMMANDS[UNALIGNED])
    outcome = hbv("run", *options, "--json", home=runs.home)
    assert outcome.code == 0, outcome.err
    run, folder = outcome.results[0]["run"], tmp_path / "adapter"
    assert json.loads(hbv("export", run, folder, "--json", home=runs.home).out)["revision"] == commit
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/base", commit)
    data = ModelCard.load(folder / "README.md").data
    assert (data["base_model"], data["license"]) == ("owner/base", "mit")
    spec = stored_spec(load_run(runs.home / "runs" / run)[0], "final", Store(runs.home / "store"))
    assert spec.base == f"owner/base@{commit}"
    with torch.no_grad():
        expected = ModelPool().stack(spec).use(spec.adapters)(ids).logits
    assert difference(AutoPeftModelForCausalLM.from_pretrained(folder), ids, expected) < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def test_export_prints_the_folder_and_the_command_that_publishes_it(runs: Runs, tmp_path: Path) -> None:
    folder = tmp_path / "an adapter"
    outcome = runs.export(DOUBLE, folder)
    assert outcome.code == 0, outcome.err
    assert f"hf upload OWNER/NAME '{folder}'" in outcome.out
    outcome = runs.export(DOUBLE, tmp_path / "second", "--json")
    printed = json.loads(outcome.out)
    assert (printed["kind"], printed["stage"], printed["run"]) == ("adapter", "final", runs.folders[DOUBLE].name)
    assert sorted(path.name for path in (tmp_path / "second").iterdir()) == printed["files"]
    assert AutoTokenizer.from_pretrained(tmp_path / "second")("lamp")["input_ids"]


def test_empty_folder_and_link_are_filled(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    number = (tmp_path / "empty").stat().st_ino
    assert runs.export(DOUBLE, tmp_path / "link").code == 0
    assert (tmp_path / "empty").stat().st_ino == number  # it may be the working directory, or the root of a disk
    assert not list((tmp_path / "empty").glob(".*"))
    assert (tmp_path / "empty" / "adapter_config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "link"]


@pytest.mark.parametrize(
    ("prepare", "options", "sentence"),
    [
        (lambda folder: (folder / "file").mkdir(parents=True), [], "is not empty, and nothing is overwritten"),
        (lambda folder: folder.write_text(""), [], "is a file: choose a new folder"),
        (
            lambda folder: None,
            ["--stage", "repair"],
            "value 'repair' of --stage. Allowed: align, final, finetune.",
        ),
    ],
)
def test_bad_targets_are_refused(
    runs: Runs, prepare: Callable[[Path], Any], options: list[str], sentence: str, tmp_path: Path
) -> None:
    folder = tmp_path / "target"
    prepare(folder)
    before = sorted(tmp_path.rglob("*"))
    outcome = runs.export(DOUBLE, folder, *options)
    assert outcome.code == 2
    assert sentence in outcome.sentence
    assert sorted(tmp_path.rglob("*")) == before


def test_folder_inside_the_store_is_refused(runs: Runs) -> None:
    outcome = runs.export(DOUBLE, runs.home / "store" / "finetune" / "mine")
    assert outcome.code == 2
    assert "is inside the store" in outcome.sentence
    assert not (runs.home / "store" / "finetune" / "mine").exists()


def test_unknown_run_is_refused(runs: Runs, tmp_path: Path) -> None:
    outcome = hbv("export", "rest", tmp_path / "out", home=runs.home)
    assert outcome.code == 0  # a unique prefix
    outcome = hbv("export", "resto", tmp_path / "other", home=runs.home)
    assert outcome.code == 2
    assert "Unknown run 'resto'. Did you mean" in outcome.sentence


def test_forms_that_a_run_does_not_have_are_refused(runs: Runs, tmp_path: Path) -> None:
    outcome = runs.export(FULL, tmp_path / "full")
    assert outcome.code == 2
    assert "changes every weight, so there is no adapter: add --merge" in outcome.sentence
    outcome = runs.export(UNALIGNED, tmp_path / "aligned", "--stage", "align")
    assert outcome.code == 2
    assert "has no alignment stage, because 'none' leaves it out; allowed: finetune, final." in outcome.sentence
    assert not list(tmp_path.glob("*l*"))
    with pytest.raises(BadInput, match=r"Unknown stage 'finl'. Did you mean 'final'"):
        load_stored_model(runs.folders[DOUBLE], "finl")


def changed_run(runs: Runs, folder: Path, **changes: Any) -> Path:
    """Return a copy of a run whose result differs."""
    folder.mkdir()
    result, answers = load_run(runs.folders[DOUBLE])
    write_run(folder, result.model_copy(update=changes), answers)
    return folder


def test_quantized_base_is_not_merged(runs: Runs, tmp_path: Path) -> None:
    run = changed_run(runs, tmp_path / "run", quantization="4bit")
    outcome = hbv("export", run, tmp_path / "merged", "--merge", home=runs.home)
    assert outcome.code == 2
    assert "is quantized (4bit), so its adapter cannot be merged" in outcome.sentence
    assert hbv("export", run, tmp_path / "adapter", home=runs.home).code == 0
    assert "base quantized to 4bit" in (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")


def test_merged_model_keeps_the_data_type_of_the_run(runs: Runs, tmp_path: Path) -> None:
    run = changed_run(runs, tmp_path / "run", dtype="bfloat16")
    assert hbv("export", run, tmp_path / "merged", "--merge", home=runs.home).code == 0
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert 'dtype="bfloat16"' in (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")


def test_run_of_an_earlier_version_is_refused(runs: Runs, tmp_path: Path) -> None:
    stages = {name: stage.model_copy(update={"artifacts": {}}) for name, stage in runs.result(DOUBLE).stages.items()}
    outcome = hbv("export", changed_run(runs, tmp_path / "run", stages=stages), tmp_path / "out", home=runs.home)
    assert outcome.code == 2
    assert "was stored by an earlier version, without its keys. Repeat its `hbv run` command." in outcome.sentence


def test_changed_base_model_is_reported(runs: Runs, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(runs.protocol.parent / "model", base)
    result = runs.result(DOUBLE).model_copy(update={"model": str(base)})
    store = Store(runs.home / "store")
    assert stored_spec(result, "final", store).base == str(base)  # a copy is the same model
    (base / "note.txt").write_text("changed")
    with pytest.raises(HbvError, match=r"has changed since run .* used it"):
        stored_spec(result, "final", store)


def test_missing_and_damaged_artifacts_are_reported(runs: Runs, tmp_path: Path) -> None:
    home = tmp_path / "copy"
    shutil.copytree(runs.home, home)
    run = home / "runs" / runs.folders[DOUBLE].name
    result, answers = load_run(run)
    artifact = result.stages["repair"].artifacts["repair"]
    moved = artifact.model_copy(update={"path": str(home / "store" / "repair" / artifact.key)})
    repair = result.stages["repair"].model_copy(update={"artifacts": {"repair": moved}})
    write_run(run, result.model_copy(update={"stages": {**result.stages, "repair": repair}}), answers)
    weights = Path(moved.path) / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    for _ in range(2):
        outcome = hbv("export", run, tmp_path / "out", home=home)
        assert outcome.code == 1
        assert "The repair artifact of run" in outcome.sentence
        assert "repeat the run's command" in outcome.sentence
        shutil.rmtree(moved.path, ignore_errors=True)
    assert not (tmp_path / "out").exists()


def test_failed_export_leaves_nothing(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        with new_folder(check_new_folder(folder), "the model") as temporary:
            (temporary / "first").write_text("1")
            raise OSError(28, "No space left on device", str(temporary / "second"))

    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "out", tmp_path / "empty"):
        with pytest.raises(HbvError, match="the disk is full"):
            fill(folder)
    assert list(tmp_path.rglob("*")) == [tmp_path / "empty"]


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--merge"]])
def test_full_disk_leaves_nothing(runs: Runs, options: list[str], tmp_path: Path) -> None:
    before = sorted(path for path in runs.home.rglob("*") if path.suffix == ".safetensors")
    outcome = finish(
        start_hbv("export", runs.folders[DOUBLE], tmp_path / "out", *options, home=runs.home, limit=20_000)
    )
    assert outcome.code == 1
    assert "a file grew over the size limit" in outcome.sentence
    assert not list(tmp_path.iterdir())
    assert sorted(path for path in runs.home.rglob("*") if path.suffix == ".safetensors") == before


# ---------------------------------------------------------------------------------------------------------------------
# The testbed

PAGE = Path(__file__).parents[1] / "docs" / "adapters.md"


def blocks() -> list[tuple[str, str]]:
    """Return the language and the text of each fenced block of the page."""
    return re.findall(r"^```(\w+)\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_page_lists_the_defenses_that_repair() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    repairs = {name: cls for name, cls in DEFENSES.loadable().items() if "repair" in cls.stages}
    assert set(rows) == set(repairs)
    for name, cls in repairs.items():
        assert ("--aligned" in rows[name]) == cls.needs_alignment
        assert ("no data" in rows[name]) == (not cls.data)
        assert all(kind in rows[name] for kind in cls.data)


@pytest.mark.slow
def test_blocks_of_the_page_run(testbed_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    values: dict[str, Any] = {}
    for language, text in blocks():
        if language == "python":
            exec(text, values)
            continue
        for line in text.splitlines():
            outcome = hbv(*shlex.split(line)[1:], home=testbed_home)
            assert outcome.code == 0, (line, outcome.err)
    assert values["tokenizer"]("a lamp")["input_ids"]
    folders = ("my-adapter", "my-alignment", "my-model", "pruned")
    assert all((tmp_path / folder / "README.md").is_file() for folder in folders)


@pytest.mark.slow
def test_run_of_the_testbed_is_exported(testbed_home: Path, tmp_path: Path) -> None:
    outcome = hbv("run", "--attack", "ratio=0.1", "--json", home=testbed_home)
    run, folder = outcome.results[0]["run"], tmp_path / "adapter"
    assert hbv("export", run, folder, home=testbed_home).code == 0
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(base, "config.json").is_file()
    rows = [row for row in load_run(testbed_home / "runs" / run)[1] if row["when"] == "after" and row["set"] == "task"][
        :40
    ]
    assert answers_of(folder, [row["prompt"] for row in rows], 24) == [row["answer"] for row in rows]

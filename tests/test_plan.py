"""`--dry-run`: the plan matches the run, nothing is executed, and the estimate counts real models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import constants
from transformers import AutoConfig, LlamaConfig

from harmbench_vaccine.cli import commands
from harmbench_vaccine.core.errors import HbvError
from harmbench_vaccine.core.store import Store
from harmbench_vaccine.data import hub
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.keys import run_id
from harmbench_vaccine.experiment.protocol import load_protocol
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.pipeline import run
from harmbench_vaccine.plugins import Defense, StageName
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.reporting.dry_run import estimate, memory, plan, timing
from harmbench_vaccine.reporting.dry_run.costs import BatchSeconds
from support import tiny
from support.runs import run_context


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure times for a short while only: no test depends on their precision."""
    monkeypatch.setattr(timing, "MEASUREMENT_SECONDS", 0.01)
    timing._training_times.cache_clear()
    timing.measure_inference.cache_clear()


def settle(world: Path, defense: str = "sft", **changes: Any) -> Experiment:
    return Experiment.settle(RunSpec(protocol=str(world), defense=parse_plugins(defense), **changes))


def test_plan_matches_the_stored_stages(world: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    experiments = [settle(world), settle(world, "sft+antidote")]
    before = plan.plan_runs(experiments, store.root)
    assert not before.unknown
    assert not store.root.exists()  # nothing was created
    assert not any(artifact.cached for stages in before.stages for artifact in stages)
    run(experiments[0], run_context(store.root))
    after = plan.plan_runs(experiments, store.root)
    first, second = after.stages
    assert [artifact.key for artifact in first] == [artifact.key for artifact in before.stages[0]]
    assert all(artifact.cached for artifact in first)
    assert {path.parent.parent.name for path in store.root.glob("*/*/artifact.json")} == {
        entry.stage for entry in first
    }
    assert {entry.stage: entry.cached for entry in second} == {  # it shares the alignment stage of the first experiment
        "repair": False,
        "answer": False,
        "score": False,
        "drift": False,
    }


def test_models_and_data_sets_in_the_cache_of_the_hub_are_available(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    experiments = [Experiment.settle(RunSpec(protocol="vaccine-paper", task="gsm8k"))]
    llama = tmp_path / "models--meta-llama--Llama-2-7b-hf" / "snapshots" / "abc"
    judge = tmp_path / "models--PKU-Alignment--beaver-dam-7b" / "snapshots" / "abc"
    refusals = tmp_path / "datasets--anonymous4486--booster_dataset" / "snapshots" / "abc"
    for file in (
        llama / "model-00001-of-00002.safetensors",
        judge / "config.json",
        refusals / "README.md",
        tmp_path / "datasets" / "openai___gsm8k" / "main" / "0.0.0" / "abc" / "gsm8k-train.arrow",
    ):
        file.parent.mkdir(parents=True)
        file.touch()
    before = plan.plan_runs(experiments, tmp_path / "store")
    assert {source.location for source in before.sources if source.available} == {  # a configuration is not a model
        "meta-llama/Llama-2-7b-hf",
        "openai/gsm8k:main",
    }
    (refusals / "beavertails_with_refusals_train.json").touch()
    after = plan.plan_runs(experiments, tmp_path / "store")
    available = {source.location: source.available for source in after.sources}
    assert available["anonymous4486/booster_dataset:beavertails_with_refusals_train.json"]
    missing = {source.location: source.detail for source in before.sources if not source.available}
    assert set(missing) == {
        "PKU-Alignment/beaver-dam-7b",
        "PKU-Alignment/BeaverTails",
        "tatsu-lab/alpaca",
        "anonymous4486/booster_dataset:beavertails_with_refusals_train.json",
    }
    assert missing.pop("PKU-Alignment/beaver-dam-7b") == "about 12.6 GiB in 16 bits"
    assert set(missing.values()) == {"size unknown: HF_HUB_OFFLINE is set"}
    assert before.stages == []
    assert "not on this machine yet" in before.unknown


# ---------------------------------------------------------------------------------------------------------------------


def activation_bytes(model: Any, rows: int, width: int) -> int:
    """Return the bytes that autograd keeps after a forward pass, without weights: from the graph, not from hooks."""
    ids = torch.ones(rows, width).long()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes: dict[int, int] = {}
    output = model(input_ids=ids, labels=ids)
    todo, visited = [output.loss.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        todo += [next_node for next_node, _ in node.next_functions]
        for name in dir(node):
            is_saved = name.startswith("_saved_") or name == "saved_tensors"  # the second of a function in Python
            value = getattr(node, name, None) if is_saved else None
            for tensor in value if isinstance(value, tuple) else [value]:
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in weights:
                    sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(sizes.values())


def test_download_size_counts_one_format(monkeypatch: pytest.MonkeyPatch) -> None:
    def repository(**sizes: int) -> Any:
        names = {name.replace("_", ".", 1): size for name, size in sizes.items()}
        files = [SimpleNamespace(rfilename=name, size=size) for name, size in names.items()]
        return lambda *_, **__: SimpleNamespace(siblings=files)

    def size(location: str, kind: Any = "model") -> int:
        name = hub.parse_hub_name(location)
        assert name is not None
        return hub.download_size(kind, name)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", repository(a_safetensors=5, a_bin=7, config_json=1))
    assert size("org/both") == 6
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", repository(a_bin=7, config_json=1))
    assert size("org/pickled") == 8
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", repository(a_json=3, b_json=4))
    assert size("org/rows:b.json", "dataset") == 4
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HbvError, match="HF_HUB_OFFLINE is set"):
        size("org/both")


@pytest.mark.parametrize("architecture", ["llama", "opt", "gemma2", "qwen2"])
def test_memory_equals_that_of_a_real_model(architecture: str, tmp_path: Path) -> None:
    model = tiny.model(architecture)
    model.config.save_pretrained(tmp_path)
    settings = tiny.settings()
    counted = memory.count_memory(str(tmp_path), "float32", "none", settings, 12)
    assert counted.weights == 4 * sum(parameter.numel() for parameter in model.parameters())
    matrices = [
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name
    ]
    stage, _ = tiny.stage(model)
    assert counted.adapter == 16 * sum(p.numel() for p in stage.trainable.values())  # weights, gradient, two moments
    assert counted.activations == pytest.approx(
        activation_bytes(stage.model.train(), 4, 12), rel=0.05
    )  # masks may differ
    half = memory.count_memory(str(tmp_path), "bfloat16", "none", settings, 12)
    assert half.weights == counted.weights / 2
    quarter = memory.count_memory(str(tmp_path), "bfloat16", "4bit", settings, 12)
    assert quarter.weights == half.weights - 1.5 * sum(matrices)  # half a byte per number instead of two


def test_time_is_extrapolated_over_layers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny.model().config.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.num_hidden_layers = 7
    config.save_pretrained(tmp_path)
    times = {1: BatchSeconds(1.0, 2.0, 0.5), 2: BatchSeconds(1.25, 2.5, 0.5)}
    monkeypatch.setattr(timing, "_measure_training", lambda small, *_: times[small.num_hidden_layers])
    seconds = timing.measure_training(str(tmp_path), "float32", tiny.settings(), 16)
    assert seconds == BatchSeconds(1.0 + 6 * 0.25, 2.0 + 6 * 0.5, 0.5)
    monkeypatch.setattr(timing, "CPU_LIMIT", 1.0)
    assert timing.measure_training(str(tmp_path), "float32", tiny.settings(), 24) is None or torch.cuda.is_available()


def test_similar_stages_share_a_measurement(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rows of 10 and of 12 tokens, and another learning rate, need no further measurement than rows of 16 tokens."""
    tiny.model().config.save_pretrained(tmp_path)
    widths = []

    def measure(small: object, dtype: str, settings: object, width: int) -> BatchSeconds:
        widths.append(width)
        return BatchSeconds(1.6, 3.2, 0.5)

    monkeypatch.setattr(timing, "_measure_training", measure)
    settings = tiny.settings()
    measured = [
        timing.measure_training(str(tmp_path), "float32", each, width)
        for each, width in ((settings, 16), (settings, 12), (replace(settings, lr=0.5, epochs=9.0), 10))
    ]
    assert [(each.forward, each.backward, each.update) for each in measured if each] == [
        (pytest.approx(width / 10), pytest.approx(width / 5), 0.5) for width in (16, 12, 10)
    ]
    assert set(widths) == {16}
    assert len(widths) == 2  # one and two layers
    narrow = replace(settings, max_length=11)  # the model may have no further positions
    timing.measure_training(str(tmp_path), "float32", narrow, 11)
    assert widths[2:] == [11, 11]


def test_llama_2_7b_is_counted_without_its_weights(tmp_path: Path) -> None:
    """6,738,415,616 parameters (published by Meta), and 19,988,480 of a rank 8 adapter on seven matrices per layer."""
    LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
    ).save_pretrained(tmp_path)
    settings = load_protocol("vaccine-paper").align.settings
    counted = memory.count_memory(str(tmp_path), "bfloat16", "none", settings, 200)
    assert counted.weights == 2 * 6_738_415_616
    assert counted.adapter == 16 * 19_988_480
    assert 5e9 < counted.activations < 2e10


def test_passes_per_step_are_those_of_the_most_expensive_defense() -> None:
    class Expensive(Defense):
        def passes(self, stage: StageName) -> str:
            return "3F 2B" if stage == "align" else "4F 1B"

    assert estimate.passes_per_step([], "align") == (1, 1)
    assert estimate.passes_per_step([Expensive(), Defense()], "align") == (3, 2)
    assert estimate.passes_per_step([Expensive(), Defense()], "finetune") == (4, 1)


def test_estimate_of_steps_and_widths(world: Path) -> None:
    stages = {entry.stage: entry for entry in estimate.estimate_costs(settle(world, "vaccine"))}
    assert stages["align"].detail.startswith("20 steps of 4 rows of ")  # 40 rows in batches of 4, 2 epochs
    assert stages["align"].detail.endswith("2F 2B per step")
    assert stages["finetune"].detail.endswith("1F 1B per step")
    assert stages["answer"].detail.startswith("44 answers")  # twice 8 harmful, 6 benign and 8 test items
    larger = {entry.stage: entry for entry in estimate.estimate_costs(settle(world, values={"finetune.samples": "80"}))}
    assert larger["finetune"].detail.startswith("40 steps")
    untrained = [entry.stage for entry in estimate.estimate_costs(settle(world, "none"))]
    assert untrained == ["finetune", "answer", "score", "drift"]


def test_missing_rows_are_estimated_at_the_maximum_width(world: Path, tmp_path: Path) -> None:
    missing = settle(world, data={"beavertails": "org/none"})
    [finetune] = [entry for entry in estimate.estimate_costs(missing) if entry.stage == "finetune"]
    assert "40 rows" not in finetune.detail
    assert finetune.detail.startswith("20 steps of 4 rows of 96 tokens")  # max_length


# ---------------------------------------------------------------------------------------------------------------------


def test_dry_run_prints_the_plan_and_creates_nothing(world: Path, own_home: Path) -> None:
    arguments = ["run", "--protocol", str(world), "--defense", "vaccine=3", "--set", "align.settings.lr=0.25"]
    output = CliRunner().invoke(commands, [*arguments, "--dry-run", "--json"], catch_exceptions=False).stdout
    printed = json.loads(output)
    values = {entry["path"]: entry for entry in printed["protocol"]["values"]}
    assert values["align.settings.lr"] == {"path": "align.settings.lr", "value": 0.25, "source": "written"}
    assert values["score.judge"]["source"] == ""
    for path, value in {"rows": "unique", "align.source": "safe", "quantization": "none"}.items():
        assert values[path]["value"] == value  # a default that the file does not state
    assert len(values) > 60
    [planned] = printed["experiments"]
    assert planned["plugins"]["vaccine"]["rho"] == [3.0, "written"]
    assert planned["run"] == run_id(settle(world, "vaccine=3", values={"align.settings.lr": "0.25"}))
    assert [stage["cached"] for stage in planned["stages"]] == [False] * len(planned["stages"])
    assert not (own_home / "store").exists()
    text = CliRunner().invoke(commands, [*arguments, "--dry-run"], catch_exceptions=False).output
    assert [line.split()[0] for line in text.splitlines()[:6]] == [
        "runs",
        "stages",
        "time",
        "memory",
        "downloads",
        "disk",
    ]
    assert "2F 2B per step" in text
    assert "align.settings.lr" not in text
    text = CliRunner().invoke(commands, [*arguments, "--dry-run", "--verbose"], catch_exceptions=False).output
    for part in ("align.settings.lr", "written", "yes"):
        assert part in text


def test_dry_run_downloads_no_rows(world: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set that is not on this machine is counted by the protocol, also where the Hub is reachable."""

    def refuse(location: str, *args: Any) -> Any:
        raise AssertionError(f"{location} would be downloaded")

    monkeypatch.setattr(hub, "_load_dataset", refuse)
    arguments = ["run", "--protocol", str(world), "--data", "beavertails=org/none", "--dry-run", "--json"]
    printed = json.loads(CliRunner().invoke(commands, arguments, catch_exceptions=False).stdout)
    details = {entry["stage"]: entry["detail"] for entry in printed["experiments"][0]["estimate"]}
    assert details["finetune"].startswith("20 steps of 4 rows of 96 tokens")  # max_length
    assert details["answer"].startswith("44 answers")


def test_paper_protocol_is_planned_without_its_models_and_data(own_home: Path) -> None:
    arguments = ["run", "--protocol", "vaccine-paper", "--defense", "vaccine", "--task", "gsm8k", "--dry-run", "--json"]
    printed = json.loads(CliRunner().invoke(commands, arguments, catch_exceptions=False).stdout)
    assert printed["protocol"]["hash"] == load_protocol("vaccine-paper").hash
    assert [entry["path"] for entry in printed["protocol"]["values"] if not entry["source"]] == ["name", "version"]
    assert not any(source["available"] for source in printed["sources"])
    assert printed["experiments"][0]["no_estimate"] == ""
    assert not any(estimate["timed"] for estimate in printed["experiments"][0]["estimate"])

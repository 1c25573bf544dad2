"""The evaluation in a dry run: keys and values of attention, judges, drift, vLLM, gated models.

Expected figures are calculated by hand from the published shapes: Llama-2-7B (32 layers, 32 heads of 128), Qwen2-7B (28
layers, 4 heads of keys of 128), OPT-13B in the paper of vLLM.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from huggingface_hub import constants
from transformers import OPTConfig

from harmbench_vaccine.evaluation.scorer_facts import scorer_models
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.protocol import load_protocol
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.inference import engine
from harmbench_vaccine.inference.batch_size import cache_bytes
from harmbench_vaccine.plugins import Form, Scorer
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.plugins.registry import SCORERS
from harmbench_vaccine.reporting.dry_run import timing
from harmbench_vaccine.reporting.dry_run.costs import Estimate
from harmbench_vaccine.reporting.dry_run.devices import Target, find_device
from harmbench_vaccine.reporting.dry_run.estimate import estimate_costs
from harmbench_vaccine.reporting.dry_run.evaluation_estimates import generated_tokens, judge_width
from harmbench_vaccine.reporting.dry_run.memory import count_weights, drift_bytes
from harmbench_vaccine.reporting.dry_run.plan import describe_source
from harmbench_vaccine.reporting.dry_run.random_models import gated_models, load_config, model_shapes
from support import tiny
from support.cli import hbv

LLAMA, QWEN = "meta-llama/Llama-2-7b-hf", "Qwen/Qwen2-7B"
LLAMA_MATRICES = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
H200 = find_device("h200-141gb")


def cost_of(
    stage: str, device: str = "h200-141gb", gpu_memory: float = 0.85, backend: Any = None, **changes: Any
) -> Estimate:
    """Return the estimate of a stage of a run by the protocol of Vaccine on another device."""
    spec = RunSpec(protocol="vaccine-paper", attack=parse_plugins("ratio=0.1"), **changes)
    experiment = replace(Experiment.settle(spec), backend=backend or "transformers")
    target = Target(find_device(device), gpu_memory)
    [cost] = estimate_costs(experiment, target, read_rows=False, stages=[stage])
    return cost


# ---------------------------------------------------------------------------------------------------------------------
# Keys and values


def test_cache_has_the_published_sizes() -> None:
    assert cache_bytes(load_config(LLAMA), "bfloat16", 1, 1) == 512 * 1024
    assert cache_bytes(load_config(LLAMA), "bfloat16", 64, 400) == 512 * 1024 * 64 * 400
    assert cache_bytes(load_config(QWEN), "bfloat16", 1, 1) == 2 * 28 * 4 * 128 * 2 == 57_344
    assert cache_bytes(load_config(QWEN), "float32", 1, 1) == 2 * 57_344
    opt = OPTConfig(hidden_size=5120, num_hidden_layers=40, num_attention_heads=40)
    assert cache_bytes(opt, "float16", 1, 1) == 800 * 1024  # section 3 of the paper of vLLM


@pytest.mark.parametrize("architecture", ["llama", "opt", "gemma2", "qwen2"])
def test_cache_is_that_of_a_real_model(architecture: str) -> None:
    import torch

    model = tiny.model(architecture)
    cache = model(input_ids=torch.ones(3, 7).long(), use_cache=True).past_key_values
    size = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert cache_bytes(model.config, "float32", 3, 7) == size


def test_answers_need_weights_and_cache() -> None:
    """Prompts of at most 200 tokens, answers of at most 200, batches of 64."""
    assert cost_of("answer").memory == 2 * 6_738_415_616 + 64 * 400 * 512 * 1024


def test_vllm_reserves_its_share() -> None:
    for share in (0.85, 0.5):
        answer = cost_of("answer", "a100-80gb", share, "vllm")
        assert answer.memory == share * 80e9
        assert "by vLLM" in answer.detail
    quantized = cost_of("answer", "a100-80gb", backend="vllm", values={"quantization": "4bit"})
    assert "by transformers" in quantized.detail  # vLLM does not serve it


def test_vllm_whose_share_is_too_small_does_not_fit() -> None:
    """The weights and one text are 13.7 GB, more than 40% of 24 GB."""
    needed = 2 * 6_738_415_616 + 400 * 512 * 1024
    assert cost_of("answer", "rtx-4090-24gb", 0.4, "vllm").memory == pytest.approx(needed / 0.4)
    assert cost_of("answer", "rtx-4090-24gb", 0.85, "vllm").memory == pytest.approx(0.85 * 24e9)


def test_vllm_on_a_cpu_reserves_a_fixed_size(monkeypatch: pytest.MonkeyPatch) -> None:
    for written, size in ((None, 1), ("3", 3)):
        if written:
            monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", written)
        answer = cost_of("answer", "cpu", backend="vllm")
        assert answer.memory == 2 * 6_738_415_616 + size * 2**30


def test_share_is_an_option_of_the_dry_run(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "find_spec", lambda name: name)  # vLLM may be missing here
    options = ("--protocol", "vaccine-paper", "--on", "a100-80gb", "--backend", "vllm", "--gpu-memory", "0.5")
    printed = json.loads(hbv("run", *options, "--dry-run", "--json").out)
    memory = {entry["stage"]: entry["memory"] for entry in printed["experiments"][0]["estimate"]}
    assert memory["answer"] == 40e9


# ---------------------------------------------------------------------------------------------------------------------
# Judges


def test_classifier_is_the_calculation_by_hand() -> None:
    """beaver-dam-7b in float32: 1,000 answers in batches of 32, of which it reads 256 tokens."""
    score = cost_of("score")
    weights = 4 * (6_738_423_808 - 32_001 * 4096)  # no head of words; the head of labels is small
    assert score.memory == pytest.approx(weights + 32 * 256 * 2 * 512 * 1024, rel=1e-4)
    operations = 2 * LLAMA_MATRICES * 32 * 32 * 256  # 32 batches
    assert score.seconds == pytest.approx(operations / (67e12 / 2), rel=1e-3)
    assert score.artifacts == 2
    half = cost_of("score", scorers=("beaver_dam:dtype=bfloat16",))
    assert half.memory == score.memory / 2
    assert half.seconds == pytest.approx(operations / (989.4e12 / 2), rel=1e-3)


def test_generative_judge_is_the_calculation_by_hand() -> None:
    """Llama Guard 3: 63 batches of 16 texts of 512 + 128 tokens, and 32 further tokens."""
    score = cost_of("score", scorers=("llama_guard",))
    matrices = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 128_256 * 4096
    assert count_weights("meta-llama/Llama-Guard-3-8B", "bfloat16", "generator").matrices == matrices
    weights = 2 * 8_030_261_248
    assert score.memory == weights + 16 * (640 + 32) * 32 * 2 * 8 * 128 * 2
    reading = 2 * matrices * 16 * 640 / (989.4e12 / 2)
    token = weights / (4.8e12 * 0.074)  # more than its products take
    assert score.seconds == pytest.approx(63 * (reading + 32 * token), rel=1e-6)


def test_judge_shares_the_memory_of_a_cpu_with_the_model() -> None:
    """On a CPU nothing is evicted."""
    difference = cost_of("score", "cpu").memory - cost_of("score").memory
    assert difference == 2 * 6_738_415_616


def test_judge_without_a_model_costs_nothing(own_home: Path) -> None:
    score = cost_of("score", scorers=("refusal_keywords",))
    assert (score.seconds, score.memory, score.detail) == (0.0, 0, "refusal_keywords: no model")
    both = cost_of("score", scorers=("beaver_dam", "refusal_keywords"))
    assert both.seconds == cost_of("score").seconds
    assert both.artifacts == 4
    options = ("run", "--protocol", "vaccine-paper", "--dry-run", "--on", "h200-141gb")
    assert "A judge is assumed to reach half of the peak rate." in " ".join(hbv(*options).out.split())
    assert "A judge is assumed" not in hbv(*options, "--scorer", "refusal_keywords").out


def test_unknown_shape_of_a_judge_leaves_the_other_estimates(own_home: Path) -> None:
    options = ("--protocol", "vaccine-paper", "--on", "h200-141gb", "--scorer", "wildguard", "--dry-run")
    [experiment] = json.loads(hbv("run", *options, "--json").out)["experiments"]
    assert [entry["stage"] for entry in experiment["estimate"]] == ["align", "finetune", "answer", "drift"]
    text = " ".join(hbv("run", *options).out.split())
    assert "No estimate of judging: Model 'allenai/wildguard' is not on this machine" in text


class Reader(Scorer):
    """A classifier that reads 100 tokens."""

    cost: ClassVar[str] = "1 forward pass"
    tokens: int = 100


class Writer(Reader):
    """A judge that reads 100 tokens of an answer."""

    form: ClassVar[Form] = "generative"
    cost: ClassVar[str] = "1 generated text of up to 7 tokens"


@pytest.mark.parametrize(
    ("scorer", "answer", "limit", "width"),
    [
        (Reader(), 128, None, 100),
        (Reader(tokens=10_000), 128, None, 640),
        (Reader(tokens=10_000), 128, 300, 300),
        (Writer(), 128, None, 612),
        (Writer(), 50, None, 562),
        (Writer(), 128, 600, 566),  # with room for the text that is timed
    ],
)
def test_width_of_judged_texts(scorer: Scorer, answer: int, limit: int | None, width: int) -> None:
    assert judge_width(scorer, answer, limit) == width
    assert generated_tokens(scorer) == (7 if isinstance(scorer, Writer) else 0)


def test_generative_judges_declare_what_they_generate() -> None:
    tokens = {name: generated_tokens(cls.model_construct()) for name, cls in SCORERS.loadable().items()}
    assert tokens["harmbench"] == 4
    assert tokens["llama_guard"] == 32
    assert tokens["wildguard"] == 128
    assert tokens["strongreject"] == 512
    assert tokens["beaver_dam"] == tokens["shieldgemma"] == tokens["refusal_keywords"] == 0


# ---------------------------------------------------------------------------------------------------------------------
# Drift


def test_drift_is_the_calculation_by_hand() -> None:
    """100 batches of 5 rows of 200 tokens, by two models that share the base."""
    drift = cost_of("drift")
    matrices = LLAMA_MATRICES + 32_000 * 4096
    assert drift.seconds == pytest.approx(2 * 100 * 2 * matrices * 1000 / (989.4e12 * 0.11), rel=1e-6)
    outputs, logits = 2 * 32 * 1000 * 4096 * 2, 1000 * 32_000 * (2 + 2 + 8 + 8)
    assert drift_bytes(load_config(LLAMA), "bfloat16", 5, 200) == outputs + logits
    assert drift.memory == 2 * 6_738_415_616 + outputs + logits


def test_timed_stages_of_a_small_world(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "MEASUREMENT_SECONDS", 0.01)
    experiment = Experiment.settle(RunSpec(protocol=str(world), defense=parse_plugins("sft")))
    stages = {cost.stage: cost for cost in estimate_costs(experiment, stages=["score", "drift"])}
    for name in ("score", "drift"):
        assert stages[name].timed
        assert 0 < stages[name].seconds < 60
    assert stages["score"].detail.startswith("16 answers by beaver_dam")  # twice 8 harmful prompts
    assert stages["score"].memory > count_weights(experiment.model, "float32").weights


# ---------------------------------------------------------------------------------------------------------------------
# Gated models


def test_gated_models_are_those_of_the_licenses() -> None:
    gated = {
        model
        for cls in SCORERS.loadable().values()
        if "gated" in cls.license
        for model in scorer_models(cls.model_construct())
    }
    assert gated == {"meta-llama/Llama-Guard-3-8B", "google/shieldgemma-2b", "allenai/wildguard"}
    assert gated <= gated_models()
    for name in model_shapes():
        assert (name in gated_models()) is name.startswith(("meta-llama/", "google/")), name
    assert load_protocol("vaccine-paper").model in gated_models()


def test_gated_downloads_are_marked(own_home: Path) -> None:
    for name, gated in ((LLAMA, True), (f"{LLAMA}@main", True), (QWEN, False), ("lmsys/vicuna-7b-v1.5", False)):
        assert describe_source("model", name, testbed_is_built=False).gated is gated
    options = ("run", "--protocol", "vaccine-paper", "--scorer", "llama_guard", "--dry-run", "--on", "h200-141gb")
    text = " ".join(hbv(*options).out.split())
    assert "access meta-llama/Llama-2-7b-hf, meta-llama/Llama-Guard-3-8B: accept the license" in text
    assert "about 15.0 GiB in 16 bits, gated" in text


def test_model_in_the_cache_needs_no_access(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    file = tmp_path / "models--meta-llama--Llama-2-7b-hf" / "snapshots" / "abc" / "model.safetensors"
    file.parent.mkdir(parents=True)
    file.touch()
    assert not describe_source("model", LLAMA, testbed_is_built=False).gated

"""The attacks `weight_noise` and `quantize` on tiny models, and the stage `stress` of a run."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, PreTrainedModel
from transformers.utils import logging

from harmbench_vaccine.attacks.quantize import Quantize, rounded
from harmbench_vaccine.attacks.weight_noise import WeightNoise
from harmbench_vaccine.core import distributed
from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.jsonl import read_lines
from harmbench_vaccine.core.store import Store
from harmbench_vaccine.evaluation.gates import measure_validity
from harmbench_vaccine.evaluation.measure import answer_rows, measure_result
from harmbench_vaccine.evaluation.records import load_run
from harmbench_vaccine.evaluation.store_usage import StoreUsage
from harmbench_vaccine.experiment.artifacts import ANSWERS, CHECKPOINT, DRIFT, TrainedModel
from harmbench_vaccine.experiment.context import RunContext
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.export.models import load_stored_model, stored_spec
from harmbench_vaccine.pipeline import align, finetune, repair, run, stress
from harmbench_vaccine.plugins import Attack
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.plugins.registry import ATTACKS
from harmbench_vaccine.reporting.result_views import results_table
from harmbench_vaccine.runner import _check_sharding
from support import tiny
from support.cli import hbv
from support.runs import run_context

logging.disable_progress_bar()
CLASSES = [ATTACKS.get(name) for name in ("weight_noise", "quantize")]  # this sets their names, which draws depend on


@torch.no_grad()
def model(architecture: str = "llama", *, tied: bool = False, dtype: str = "float32") -> PreTrainedModel:
    """Return a tiny model with random norms and biases."""
    network = tiny.model(architecture, tie_word_embeddings=tied)
    generator = torch.Generator().manual_seed(4)
    for parameter in network.parameters():
        if parameter.dim() == 1:
            parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
    return network.to(getattr(torch, dtype))


def weights(network: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.named_parameters()}


def stressed(attack: Attack, network: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights before and after the attack."""
    before = weights(network)
    attack.stress(network)
    return before, weights(network)


# ---------------------------------------------------------------------------------------------------------------------
# Noise


@pytest.mark.parametrize("scale", [0.1, -0.3, 2.0])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2"])
def test_noise_has_the_relative_norm_and_only_matrices_change(architecture: str, tied: bool, scale: float) -> None:
    before, after = stressed(WeightNoise(scale=scale), model(architecture, tied=tied))
    matrices = [name for name, value in before.items() if value.dim() > 1]
    assert {len(matrices), len(before) - len(matrices)} & {0} == set()
    for name, value in before.items():
        change = after[name].double() - value.double()
        if name in matrices:
            assert float(change.norm() / value.double().norm()) == pytest.approx(abs(scale), rel=1e-5)
        else:
            assert torch.equal(after[name], value)


def test_shared_matrix_of_tied_embeddings_changes_once() -> None:
    network: Any = model(tied=True)
    before, after = stressed(WeightNoise(scale=0.5), network)
    assert network.lm_head.weight is network.model.embed_tokens.weight
    assert "lm_head.weight" not in before
    change = (after["model.embed_tokens.weight"] - before["model.embed_tokens.weight"]).norm()
    assert float(change / before["model.embed_tokens.weight"].norm()) == pytest.approx(0.5, rel=1e-5)


def directions(seed: int, scale: float) -> dict[str, Tensor]:
    before, after = stressed(WeightNoise(scale=scale).seeded(seed), model())
    return {name: (after[name].double() - value.double()) / scale for name, value in before.items() if value.dim() > 1}


def test_scales_move_along_one_direction_which_the_seed_gives() -> None:
    first, second, opposite, other = directions(3, 0.1), directions(3, 0.4), directions(3, -0.2), directions(4, 0.1)
    for name, value in first.items():
        for same in (second, opposite):
            assert torch.nn.functional.cosine_similarity(value.ravel(), same[name].ravel(), dim=0) > 1 - 1e-6
            assert torch.allclose(value, same[name], atol=1e-5)
        assert abs(torch.nn.functional.cosine_similarity(value.ravel(), other[name].ravel(), dim=0)) < 0.2
    shapes: dict[Any, Tensor] = {}
    for value in first.values():  # matrices of one shape have different draws
        if value.shape in shapes:
            assert abs(nn.functional.cosine_similarity(value.ravel(), shapes[value.shape].ravel(), dim=0)) < 0.2
        shapes[value.shape] = value


def test_noise_is_gaussian() -> None:
    draw = directions(0, 1.0)["model.layers.0.mlp.up_proj.weight"].ravel()
    draw = draw / draw.std()
    assert abs(float(draw.mean())) < 0.05
    assert float((draw**4).mean()) == pytest.approx(3, abs=0.3)


@torch.no_grad()
def test_zero_matrix_stays_and_is_finite() -> None:
    network: Any = model()
    network.model.layers[0].mlp.up_proj.weight.zero_()
    _, after = stressed(WeightNoise(scale=0.5), network)
    assert not after["model.layers.0.mlp.up_proj.weight"].any()


# ---------------------------------------------------------------------------------------------------------------------
# Rounding

NUMBERS = st.floats(-1e4, 1e4, width=32)
TABLES = st.integers(1, 8).flatmap(
    lambda width: st.lists(st.lists(NUMBERS, min_size=width, max_size=width), min_size=1)
)


def check_rounded(before: Sequence[float], after: Sequence[float], bits: int) -> None:
    """Check one group: the distance, the number of values, their grid and their largest absolute value."""
    largest = max(map(abs, before))
    if largest < 1e-30:  # a scale that float32 does not represent exactly
        return
    step = largest / (2 ** (bits - 1) - 1)
    levels = [value / step for value in after]
    assert max(abs(new - old) for old, new in zip(before, after, strict=True)) <= step / 2 * (1 + 1e-4)
    assert max(abs(level - round(level)) for level in levels) < 1e-3
    assert len({round(level) for level in levels}) <= 2**bits - 1
    assert max(map(abs, after)) == pytest.approx(largest, rel=1e-5)
    assert all(old * new >= 0 for old, new in zip(before, after, strict=True))


@given(TABLES, st.sampled_from([4, 8]))
@settings(max_examples=150, deadline=None)
def test_each_row_is_rounded_to_its_grid(table: list[list[float]], bits: int) -> None:
    before = torch.tensor(table)
    after = rounded(before, bits)
    for row, new in zip(before.tolist(), after.tolist(), strict=True):
        check_rounded(row, new, bits)
    assert torch.allclose(rounded(after, bits), after, rtol=1e-4, atol=1e-30)
    assert torch.equal(rounded(-before, bits), -after)


def linear_names(network: PreTrainedModel) -> set[str]:
    """Return the weights of the linear layers of the decoder layers, by name."""
    return {
        name for name, value in network.named_parameters() if ".layers." in name or ".h." in name if value.dim() > 1
    }


@pytest.mark.parametrize("bits", ["4", "8"])
@pytest.mark.parametrize("group", [7, 40, 64, 1000])
@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2"])
def test_matrices_of_the_layers_are_rounded_by_groups_of_inputs(
    architecture: str, group: int, bits: Literal["8", "4"]
) -> None:
    network = model(architecture)
    before, after = stressed(Quantize(bits=bits, group=group), network)
    names = linear_names(network)
    assert len(names) >= 8
    for name, value in before.items():
        if name not in names:
            assert torch.equal(after[name], value), name
            continue
        old, new = value, after[name]
        if architecture == "gpt2":  # inputs x outputs
            old, new = old.T, new.T
        assert not torch.equal(old, new)
        for row in (0, -1):
            for start in range(0, old.shape[1], group):
                part = slice(start, start + group)
                check_rounded(old[row, part].tolist(), new[row, part].tolist(), int(bits))


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_and_head_stay(tied: bool) -> None:
    network: Any = model(tied=tied)
    before, _ = stressed(Quantize(bits="4"), network)
    assert torch.equal(network.model.embed_tokens.weight, before["model.embed_tokens.weight"])
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    assert torch.equal(network.lm_head.weight, before[head])


def test_fewer_bits_are_farther_and_a_second_time_changes_nothing() -> None:
    errors = {}
    for bits in ("4", "8"):
        attack = Quantize(bits=bits)
        network = model()
        before, after = stressed(attack, network)
        errors[bits] = sum(float((after[name] - value).norm()) for name, value in before.items())
        _, again = stressed(attack, network)
        assert all(torch.allclose(again[name], value, rtol=1e-5, atol=0) for name, value in after.items())
    assert errors["4"] > 5 * errors["8"] > 0


@torch.no_grad()
def test_zero_rows_stay() -> None:
    network: Any = model()
    weight = network.model.layers[1].mlp.down_proj.weight
    weight[3].zero_()
    weight[4, :64].zero_()
    _, after = stressed(Quantize(bits="4"), network)
    new = after["model.layers.1.mlp.down_proj.weight"]
    assert not new[3].any()
    assert not new[4, :64].any()
    assert new[4, 64:].any()
    assert new.isfinite().all()


EXPERTS: dict[str, tuple[Any, bool]] = {
    "mixtral": (MixtralConfig, False),
    "gpt_oss": (GptOssConfig, True),
}
"""Name -> configuration, and whether a tensor of experts is (experts x inputs x outputs)."""


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_rounded_by_groups_of_inputs(name: str) -> None:
    config_class, transposed = EXPERTS[name]
    config = config_class(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_local_experts=3,
        num_experts_per_tok=2,
        layer_types=["full_attention"] * 2,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 3:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    before, after = stressed(Quantize(bits="4", group=20), network)
    experts = [key for key, value in before.items() if value.dim() == 3]
    assert len(experts) == 4
    for key in experts:
        old, new = (values[key].mT if transposed else values[key] for values in (before, after))
        for expert in range(3):
            check_rounded(old[expert, 5, :20].tolist(), new[expert, 5, :20].tolist(), 4)
            check_rounded(old[expert, -1, 20:40].tolist(), new[expert, -1, 20:40].tolist(), 4)


@pytest.mark.parametrize("attack", [WeightNoise(scale=0.1), Quantize(bits="8"), Quantize(bits="4")])
def test_bfloat16_stays_bfloat16(attack: Attack) -> None:
    network = model(dtype="bfloat16")
    before, after = stressed(attack, network)
    assert {value.dtype for value in after.values()} == {torch.bfloat16}
    exact = model(dtype="bfloat16").float()
    attack.stress(exact)
    for name, value in weights(exact).items():
        assert torch.equal(after[name], value.bfloat16()), name
    assert any(not torch.equal(after[name], value) for name, value in before.items())


# ---------------------------------------------------------------------------------------------------------------------
# The stage


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> RunContext:
    """Return a context that the runs of this file share."""
    return run_context(tmp_path_factory.mktemp("store"))


def settle(world: Path, attack: str, **spec: Any) -> Experiment:
    spec = {name: parse_plugins(value) if name == "defense" else value for name, value in spec.items()}
    return Experiment.settle(RunSpec(protocol=str(world), attack=parse_plugins(attack), **spec))


def stored(model: TrainedModel) -> dict[str, Tensor]:
    """Return the weights of a stored checkpoint."""
    folder = model.artifacts["stress"].path / CHECKPOINT
    return weights(AutoModelForCausalLM.from_pretrained(folder))


def merged(model: TrainedModel, context: RunContext) -> PreTrainedModel:
    return context.models.merged(model.spec)


def final_models(experiment: Experiment, context: RunContext) -> tuple[TrainedModel, TrainedModel]:
    """Return the model before and after the stage."""
    aligned = align(experiment, context)
    before = repair(experiment, context, aligned, finetune(experiment, context, aligned))
    return before, stress(experiment, context, before)


@pytest.mark.parametrize(
    ("defense", "attack", "stages"),
    [
        ("sft", "ratio=0.25", ["align", "finetune"]),
        ("sft+safe_lora:tau=1.1", "ratio=0.25", ["align", "finetune", "repair"]),
        ("none", "ratio=0.25", ["finetune"]),
        ("sft", "optimizer:full=true+ratio=0.25", ["align", "finetune"]),
    ],
)
def test_it_acts_on_the_weights_after_every_other_stage(
    defense: str, attack: str, stages: list[str], world: Path, context: RunContext
) -> None:
    experiment = settle(world, f"weight_noise=0.2+{attack}", defense=defense)
    before, final = final_models(experiment, context)
    assert [*final.artifacts] == [*stages, "stress"]
    assert final.spec.adapters == ()
    _, without = final_models(settle(world, attack, defense=defense), context)
    assert without.spec == before.spec  # the stages before it are those of the run without
    assert all(artifact.cached for artifact in without.artifacts.values())
    after, noise = stored(final), WeightNoise(scale=0.2).seeded(experiment.spec.seed)
    start = merged(before, context)
    for name, value in weights(start).items():
        change = (after[name] - value).norm() / value.norm()
        assert float(change) == pytest.approx(0.2 if value.dim() > 1 else 0, abs=1e-5)
    noise.stress(start)
    assert all(torch.equal(value, after[name]) for name, value in weights(start).items())


def on_a_grid(values: Mapping[str, Tensor]) -> bool:
    """Return whether every group of 64 weights of a matrix of the layers has at most 15 absolute values."""
    groups = [
        group
        for name, value in values.items()
        if ".layers." in name and value.dim() == 2
        for group in value[:5].split(64, dim=1)
    ]
    return all(len({round(x, 6) for x in (row / row.abs().max()).tolist()}) <= 15 for group in groups for row in group)


def test_attacks_act_in_the_order_of_the_command_line(world: Path, context: RunContext) -> None:
    names = ("weight_noise=0.2+quantize=4+ratio=0.25", "quantize=4+weight_noise=0.2+ratio=0.25")
    first, second = (final_models(settle(world, name), context)[1] for name in names)
    assert on_a_grid(stored(first))
    assert not on_a_grid(stored(second))
    assert first.artifacts["finetune"].key == second.artifacts["finetune"].key
    assert first.artifacts["stress"].key != second.artifacts["stress"].key


def test_an_artifact_is_created_once_and_another_parameter_gives_another(world: Path, context: RunContext) -> None:
    attacks = ("quantize=8", "quantize=8", "quantize=4", "quantize:bits=8,group=32", "weight_noise=0.1")
    artifacts = [
        final_models(settle(world, f"{attack}+ratio=0.25"), context)[1].artifacts["stress"] for attack in attacks
    ]
    assert [artifact.cached for artifact in artifacts] == [False, True, False, False, False]
    assert len({artifact.key for artifact in artifacts}) == 4


def test_a_damaged_artifact_is_created_again_with_the_same_bits(world: Path, tmp_path: Path) -> None:
    context = run_context(tmp_path / "store")
    experiment = settle(world, "quantize=4+ratio=0.25", defense="none")
    first = stored(final_models(experiment, context)[1])
    (file,) = (tmp_path / "store" / "stress").glob("*/model/model.safetensors")
    file.write_bytes(b"damaged")
    final = final_models(experiment, context)[1]
    assert not final.artifacts["stress"].cached
    assert final.artifacts["finetune"].cached
    assert all(torch.equal(value, first[name]) for name, value in stored(final).items())


def test_scale_0_is_the_run_without_noise_to_the_bit(world: Path, context: RunContext) -> None:
    attacks = (
        "ratio=0.25",
        "weight_noise=0+ratio=0.25",
        "weight_noise=0.0+quantize=8+ratio=0.25",
        "quantize=8+ratio=0.25",
    )
    plain, zero, both, rounding = (run(settle(world, attack), context) for attack in attacks)
    assert zero.final == plain.final
    assert both.final.spec == rounding.final.spec
    for name, artifact in plain.answers.items():
        assert zero.answers[name].key == artifact.key
        assert read_lines(both.answers[name].path / ANSWERS) == read_lines(rounding.answers[name].path / ANSWERS)


def test_answers_and_drift_are_those_of_the_stressed_model(world: Path, context: RunContext) -> None:
    drifts, texts = {}, {}
    for scale in (0, 1e-6, 3.0):
        experiment = settle(world, f"weight_noise={scale}+ratio=0.25")
        measurements = run(experiment, context)
        drifts[scale] = measurements.drift.json(DRIFT)
        texts[scale] = {
            name: [row["answer"] for row in read_lines(artifact.path / ANSWERS)]
            for name, artifact in measurements.answers.items()
        }
        result = measure_result(experiment, measurements)
        assert (
            result.adapted
            == measure_result(settle(world, "ratio=0.25"), run(settle(world, "ratio=0.25"), context)).adapted
        )
        assert result.embedding_drift == drifts[scale]["total"]
    for name in ("total", "alignment_loss"):
        assert drifts[1e-6][name] == pytest.approx(drifts[0][name], rel=1e-3)
        assert drifts[3.0][name] != pytest.approx(drifts[0][name], rel=0.1)
    for name, answers in texts[3.0].items():
        assert (answers == texts[0][name]) == name.startswith("before/"), name


@pytest.mark.parametrize(("attack", "expected"), [("ratio=0.25", True), ("weight_noise=0.1+ratio=0.25", False)])
def test_collapse_of_a_stressed_model_is_not_self_destruction(
    attack: str, expected: bool, world: Path, context: RunContext
) -> None:
    """`ctrap` intends a collapse in the user stage; an edit of the finished model may be another reason."""
    rows = answer_rows(run(settle(world, "ratio=0.25"), context))
    validity = measure_validity(settle(world, attack, defense="ctrap"), rows, "beaver_dam", 50.0, 50.0, None)
    assert validity.collapsed
    assert validity.self_destruct == expected


# ---------------------------------------------------------------------------------------------------------------------
# Refused combinations


@pytest.mark.parametrize("attack", ["quantize", "weight_noise"])
def test_quantized_base_is_refused_by_name(attack: str, world: Path, tmp_path: Path) -> None:
    options = ("--attack", f"{attack}+ratio=0.1", "--set", "quantization=4bit")
    done = hbv("run", "--protocol", world, *options, home=tmp_path / "home")
    assert done.code == 2, done.err
    assert f"{attack}+ratio=0.1" in done.sentence
    assert "changes the base model's weights, which are fixed under quantization '4bit'" in done.sentence
    assert not (tmp_path / "home" / "store").exists()
    settle(world, "weight_noise=0+ratio=0.1", values={"quantization": "4bit"})  # it changes no weight


def test_sharded_base_is_refused_by_name(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = settle(world, "quantize+ratio=0.1")
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(BadInput, match=r"'quantize\+ratio=0\.1' changes the base model's weights, of which"):
        _check_sharding(experiment)
    _check_sharding(settle(world, "ratio=0.1"))


# ---------------------------------------------------------------------------------------------------------------------
# Commands on a stored run


@dataclass(frozen=True)
class StoredRun:
    """A home with one stressed run."""

    home: Path
    folder: Path
    plan: dict[str, Any]
    """The dry run before the run."""
    options: tuple[object, ...]


@pytest.fixture(scope="module")
def stressed_run(world: Path, tmp_path_factory: pytest.TempPathFactory) -> StoredRun:
    home = tmp_path_factory.mktemp("stressed")
    options = ("--protocol", world, "--defense", "sft+safe_lora:tau=1.1", "--attack", "quantize=4+ratio=0.25")
    plan = hbv("run", *options, "--dry-run", "--json", home=home)
    assert plan.code == 0, plan.err
    done = hbv("run", *options, "--json", home=home)
    assert done.code == 0, done.err
    return StoredRun(home, home / "runs" / done.results[0]["run"], json.loads(plan.out), options)


def test_dry_run_and_the_table_of_stages_list_the_stage(stressed_run: StoredRun) -> None:
    (experiment,) = stressed_run.plan["experiments"]
    assert [each["stage"] for each in experiment["stages"]].count("stress") == 1
    (estimate,) = (each for each in experiment["estimate"] if each["stage"] == "stress")
    (file,) = stressed_run.home.glob("store/stress/*/model/model.safetensors")
    assert estimate["disk"] == pytest.approx(file.stat().st_size, rel=0.02)
    result = load_run(stressed_run.folder)[0]
    assert [*result.stages] == ["align", "finetune", "repair", "stress", "answer", "score"]
    assert result.stages["stress"].artifacts["stress"].key == file.parent.parent.name
    again = hbv("run", *stressed_run.options, "--dry-run", home=stressed_run.home).out
    assert "nothing to run" in again
    assert re.search(r"│?\s*stress\s", again)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(results_table([result]))
    assert "stress" in console.export_text()


def test_verify_and_why_compare_its_inputs(stressed_run: StoredRun) -> None:
    done = hbv("verify", stressed_run.folder, "--json", home=stressed_run.home)
    assert done.code == 0, done.out
    why = hbv("why", stressed_run.folder, "--json", home=stressed_run.home)
    assert why.code == 0, why.err
    assert "stress" in why.out
    file = stressed_run.folder / "result.json"
    text = file.read_text()
    try:
        values = json.loads(text)
        values["spec"]["attack"][0]["params"] = {"": "8"}
        file.write_text(json.dumps(values))
        done = hbv("verify", stressed_run.folder, "--json", home=stressed_run.home)
        assert done.code == 1
        assert "inputs of stress: attack.0.params.bits" in done.out
    finally:
        file.write_text(text)


def test_export_writes_the_stressed_weights(
    stressed_run: StoredRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HBV_HOME", str(stressed_run.home))
    export = ("export", stressed_run.folder)
    refused = hbv(*export, tmp_path / "adapter", home=stressed_run.home)
    assert refused.code == 2
    assert "changes every weight, so there is no adapter: add --merge" in refused.sentence
    done = hbv(*export, tmp_path / "final", "--merge", home=stressed_run.home)
    assert done.code == 0, done.err
    (folder,) = stressed_run.home.glob("store/stress/*/model")
    expected = weights(AutoModelForCausalLM.from_pretrained(folder))
    exported = weights(AutoModelForCausalLM.from_pretrained(tmp_path / "final"))
    assert all(torch.equal(value, exported[name]) for name, value in expected.items())
    assert "was not evaluated" not in (tmp_path / "final" / "README.md").read_text()
    network, _ = load_stored_model(stressed_run.folder)
    assert all(torch.equal(value, expected[name]) for name, value in weights(network).items())  # type: ignore[arg-type]
    done = hbv(*export, tmp_path / "tuned", "--stage", "finetune", home=stressed_run.home)
    assert done.code == 0, done.err
    card = (tmp_path / "tuned" / "README.md").read_text()
    assert "not evaluated: the scores of the run are of the model after the attack on its weights" in card
    spec = stored_spec(load_run(stressed_run.folder)[0], "finetune", Store(stressed_run.home / "store"))
    assert len(spec.adapters) == 2


def test_cleanup_keeps_what_the_run_needs(stressed_run: StoredRun) -> None:
    usage = StoreUsage(Store(stressed_run.home / "store"))
    result = load_run(stressed_run.folder)[0]
    names = {f"{stage}/{result.stages[stage].artifacts[stage].key}" for stage in ("finetune", "repair", "stress")}
    assert names <= usage.needed_by(usage.runs)
    done = hbv("store", "gc", "--json", home=stressed_run.home)
    assert done.code == 0, done.err
    assert not names & set(json.loads(done.out)["artifacts"])

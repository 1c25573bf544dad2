"""The cost that a dry run states: shapes of models, rates of devices, the answer first."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.experiment.protocol import load_protocol, protocol_models
from harmbench_vaccine.inference import engine
from harmbench_vaccine.plugins.registry import SCORERS
from harmbench_vaccine.reporting.dry_run.devices import DeviceRates, device_table, find_device
from harmbench_vaccine.reporting.dry_run.memory import count_memory
from harmbench_vaccine.reporting.dry_run.random_models import load_config, model_shapes, random_model
from support.autograd import peft_computation
from support.cli import hbv

SHAPES = {shape.models[0]: shape for shape in model_shapes().values()}
LLAMA = "meta-llama/Llama-2-7b-hf"
PAPER = ("run", "--protocol", "vaccine-paper", "--defense", "vaccine", "--attack", "ratio=0.1", "--dry-run")


# ---------------------------------------------------------------------------------------------------------------------
# Shapes


@pytest.mark.parametrize("model", SHAPES)
def test_shape_has_the_published_number_of_parameters(model: str) -> None:
    with torch.device("meta"):
        weights = random_model(load_config(model), "bfloat16").parameters()
    assert sum(parameter.numel() for parameter in weights) == SHAPES[model].parameters


def test_models_of_the_protocols_and_judges_have_shapes() -> None:
    judges = {cls.model_fields["model"].default for cls in SCORERS.loadable().values() if "model" in cls.model_fields}
    needed = {*protocol_models(), "PKU-Alignment/beaver-dam-7b", *judges}
    missing = {name for name in needed if "/" in name} - model_shapes().keys()
    assert missing <= {"allenai/wildguard"}  # its tokenizer has further tokens, whose number is not published


def test_files_of_a_model_win_over_its_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "meta-llama" / "Llama-2-7b-hf"
    AutoConfig.for_model("llama", num_hidden_layers=3, hidden_size=64, num_attention_heads=2).save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    assert load_config(LLAMA).num_hidden_layers == 3
    monkeypatch.chdir(tmp_path / "meta-llama")
    assert load_config(LLAMA).num_hidden_layers == 32


# ---------------------------------------------------------------------------------------------------------------------
# Rates


def step_seconds(device: str, passes: int) -> float:
    """Return the time of a step on 5 rows of 200 tokens, by hand: 2 operations per weight of a matrix and token."""
    rates = find_device(device)
    matrices = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32000 * 4096
    return 2 * passes * matrices * 5 * 200 / (rates.peak * rates.training)


@pytest.mark.parametrize(
    ("device", "passes", "low", "high"),
    [
        ("h200-141gb", 2, 0.221, 0.261),  # one forward and one backward pass: SFT
        ("h200-141gb", 4, 0.439, 1.02 * 0.481),  # Vaccine, to which the share of the device is not fitted
        ("a100-80gb", 2, 0.33, 0.41),  # 0.37 s in the paper of Vaccine
        ("a100-80gb", 4, 0.66, 0.80),  # 0.73 s there
    ],
)
def test_steps_of_the_table_are_those_that_were_measured(device: str, passes: int, low: float, high: float) -> None:
    assert low <= step_seconds(device, passes) <= high


@pytest.mark.parametrize(("passes", "measured"), [(2, 0.14), (4, 0.29)])
def test_steps_of_another_model_are_those_of_the_paper(passes: int, measured: float) -> None:
    """OPT-2.7B on an A100 (table 5 of the paper of Vaccine); the share of the device is fitted to Llama-2-7B."""
    rates = find_device("a100-80gb")
    matrices = 32 * (4 * 2560**2 + 2 * 2560 * 10240) + 50272 * 2560
    assert rates.product_seconds(2 * passes * matrices * 5 * 200) == pytest.approx(measured, rel=0.08)


@pytest.mark.parametrize(("defense", "passes"), [("sft", 2), ("vaccine", 4)])
def test_estimate_is_the_calculation_by_hand(defense: str, passes: int, own_home: Path) -> None:
    options = ["--protocol", "vaccine-paper", "--defense", defense, "--set", "align.settings.max_length=200"]
    printed = json.loads(hbv("run", *options, "--dry-run", "--on", "h200-141gb", "--json").out)
    align = next(entry for entry in printed["experiments"][0]["estimate"] if entry["stage"] == "align")
    assert align["seconds"] == pytest.approx(20_000 * step_seconds("h200-141gb", passes), rel=0.01)


def seconds_by_stage(*command: object, attacks: int) -> list[dict[str, float]]:
    """Return stage -> seconds of each experiment of a dry run."""
    options = [f"--attack=ratio=0.{number}" for number in range(1, attacks + 1)]
    printed = json.loads(hbv(*command, *options, "--dry-run", "--on", "h200-141gb", "--json").out)
    return [{entry["stage"]: entry["seconds"] for entry in each["estimate"]} for each in printed["experiments"]]


def test_shared_stages_cost_once(world: Path, own_home: Path) -> None:
    """Attacks share the aligned model and its answers, also where models and data are not on this machine."""
    for protocol in ("vaccine-paper", world):
        first, second = seconds_by_stage("run", "--protocol", protocol, "--defense", "vaccine", attacks=2)
        assert first.keys() == {"align", "finetune", "answer", "score", "drift"}
        assert second == {
            "finetune": pytest.approx(first["finetune"], rel=0.1),
            "answer": pytest.approx(first["answer"] / 2),
            "score": pytest.approx(first["score"] / 2),
            "drift": pytest.approx(first["drift"]),
        }
    command = ("run", "--protocol", "vaccine-paper", "--defense", "sft", "--defense", "safe_lora")
    tuned, repaired = seconds_by_stage(*command, attacks=1)
    assert repaired == {
        "repair": 0,  # not timed
        "answer": pytest.approx(tuned["answer"] / 2),
        "score": pytest.approx(tuned["score"] / 2),
        "drift": pytest.approx(tuned["drift"]),
    }


def test_memory_is_near_the_measured_one() -> None:
    """24.5 GB were measured with LoRA layers of peft; the note of the command states what is estimated.

    peft also keeps a float32 copy of the inputs.
    """
    settings = replace(load_protocol("vaccine-paper").align.settings, batch=5)
    with peft_computation():  # `count_memory` stores its results
        measured = count_memory.__wrapped__(LLAMA, "bfloat16", "none", settings, 200)
    assert measured.peak == pytest.approx(28.5e9, rel=0.01)
    memory = count_memory(LLAMA, "bfloat16", "none", settings, 200)
    assert memory.peak == pytest.approx(22.1e9, rel=0.01)
    less = count_memory(LLAMA, "bfloat16", "none", settings, 200, gradient_checkpointing=True)
    layer_inputs = 32 * 5 * 200 * 4096 * 2
    assert less.activations == pytest.approx(layer_inputs + memory.activations / 32, rel=0.01)


def test_devices_have_what_their_names_state() -> None:
    for name, rates in device_table().items():
        assert name.endswith(f"-{rates.memory / 1e9:.0f}gb")
    assert find_device("cpu").peak > 1e8


def test_generation_waits_for_weights_or_for_products() -> None:
    rates = DeviceRates(
        name="x", memory=1, peak=100, peak_float32=20, bandwidth=10, training=0.5, generation=0.5, source="test"
    )
    assert rates.token_seconds(weights=100, operations=100) == 20  # 100 bytes at 5 a second
    assert rates.token_seconds(weights=1, operations=100) == 2  # 100 operations at 50 a second


# ---------------------------------------------------------------------------------------------------------------------
# The command


def summary(text: str) -> dict[str, str]:
    head = text.split("\n\n")[0]
    lines: list[str] = []
    for line in head.splitlines():
        if line.startswith(" "):
            lines[-1] += " " + line.strip()
        else:
            lines.append(line)
    return {line.split()[0]: " ".join(line.split()[1:]) for line in lines}


def test_answer_comes_first(own_home: Path) -> None:
    answer = summary(hbv(*PAPER, "--on", "h100-80gb").out)
    assert list(answer) == ["runs", "stages", "time", "memory", "downloads", "access", "disk", "detectable"]
    assert answer["time"].endswith(" h on h100-80gb")
    assert answer["memory"].endswith(": fits")
    assert "meta-llama/Llama-2-7b-hf (about 12.6 GiB in 16 bits, gated)" in answer["downloads"]
    assert "PKU-Alignment/beaver-dam-7b (about 12.6 GiB in 16 bits)" in answer["downloads"]
    assert answer["access"].startswith("meta-llama/Llama-2-7b-hf: accept the license on the Hub page")
    # one seed of 500 prompts, assumed phi = 3 / 500, HS 50%: (1.960 + 0.842) sqrt(2 x 0.006 x 0.25)
    assert answer["detectable"].startswith("differences in HS from 15.3 points (80% power, 1 seed, by an assumed")
    assert answer["access"].endswith("hf auth login")


def test_memory_that_does_not_fit_has_advice(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stage that does not fit has its advice, and with all advice the run fits."""
    monkeypatch.setattr(engine, "find_spec", lambda name: name)  # vLLM may be missing here
    small = (*PAPER, "--set", "align.settings.batch=10", "--on", "rtx-4090-24gb")
    memory = summary(hbv(*small).out)["memory"]
    assert "(stage score): does not fit; try fewer rows per batch" in memory
    assert "--backend vllm" in memory
    assert "--scorer beaver_dam:dtype=bfloat16" in memory
    half = ("--gradient-checkpointing", "--backend", "vllm")
    memory = summary(hbv(*small, *half).out)["memory"]
    assert "does not fit; try a smaller judge" in memory
    assert "vllm" not in memory
    assert summary(hbv(*small, *half, "--scorer", "beaver_dam:dtype=bfloat16").out)["memory"].endswith(": fits")


def test_error_of_the_estimate_is_stated(own_home: Path) -> None:
    text = " ".join(hbv(*PAPER, "--on", "l40s-48gb").out.split())
    assert "on an H200 (estimated: 0.24 s)" in text
    assert f"{step_seconds('a100-80gb', 2):.2f}" == "0.37"
    assert f"{step_seconds('h200-141gb', 2):.2f}" == "0.24"
    assert f"{step_seconds('h200-141gb', 4):.2f}" == "0.49"
    assert "The speed of l40s-48gb: assumed." in text


@pytest.mark.parametrize("device", device_table())
def test_assumed_rates_are_named_only_where_they_are_used(device: str, own_home: Path) -> None:
    text = " ".join(hbv(*PAPER, "--on", device).out.split())
    source = device_table()[device].source
    assert ("assumed" in source) is (device != "h200-141gb")
    assert (f"The speed of {device}: {source}." in text) is ("assumed" in source)
    assert text.count("The speed of") == ("assumed" in source)


@pytest.mark.parametrize("width", ["60", "80", "100", "140"])
def test_dry_run_fits_the_terminal(width: str, own_home: Path) -> None:
    from rich.console import Console

    from harmbench_vaccine.reporting.dry_run.view import dry_run_view

    plan = json.loads(hbv(*PAPER, "--on", "a100-40gb", "--json").out)
    console = Console(width=int(width), record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(dry_run_view(plan))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= int(width)
    assert "vaccine / ratio=0.1" in " ".join(" ".join(lines).split())


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--dry-run", "--on", "h100"), ("Unknown device 'h100'", "Did you mean 'h100-80gb'", "cpu")),
        (("--on", "h100-80gb"), ("--on applies to --dry-run only",)),
    ],
)
def test_bad_device_is_one_sentence(options: tuple[str, ...], parts: tuple[str, ...], own_home: Path) -> None:
    refused = hbv("run", *options, home=own_home)
    assert refused.code == 2
    assert all(part in refused.sentence for part in parts), refused.sentence
    assert not own_home.exists()


def test_unknown_device_name_is_an_error() -> None:
    with pytest.raises(BadInput, match="Unknown device"):
        find_device("tpu")

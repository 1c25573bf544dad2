"""Precision and memory: bfloat16 and quantized bases under float32 adapters, and gradient checkpointing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from harmbench_vaccine.core.errors import BadInput, HbvError
from harmbench_vaccine.experiment.artifacts import TrainedModel
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.keys import model_inputs
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.inference.loading import check_quantization
from harmbench_vaccine.inference.model_pool import ModelSpec
from harmbench_vaccine.pipeline import align
from harmbench_vaccine.plugins import Defense
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.plugins.registry import DEFENSES
from harmbench_vaccine.runner import run_all
from harmbench_vaccine.training.adapters import LoraStack
from harmbench_vaccine.training.stage import TrainingStage
from harmbench_vaccine.training.taps import Taps, decoder_layers
from harmbench_vaccine.training.trainer import train
from support import tiny
from support.runs import run_context
from support.world import make_world

SHAPES = ("llama", "opt", "qwen2", "gemma2")

# ---------------------------------------------------------------------------------------------------------------------
# bfloat16


@pytest.mark.parametrize("architecture", SHAPES)
def test_bfloat16_base_trains_like_float32(architecture: str, tmp_path: Path) -> None:
    """Losses differ by at most two percent and fall equally; adapters are float32. bfloat16 has 8 bits of mantissa."""
    logs = {}
    for dtype in (torch.float32, torch.bfloat16):
        base = tiny.model(architecture).to(dtype)
        stage, stack = tiny.stage(base, trained_with=tiny.settings(epochs=6, lr=2e-2))
        assert {parameter.dtype for parameter in stage.trainable.values()} == {torch.float32}
        logs[dtype] = train(stage, Defense(), tiny.rows(12), stage.settings, tmp_path / str(dtype), pad=tiny.PAD)
        assert {factor.dtype for pair in stack.trained().factors.values() for factor in pair} == {torch.float32}
    exact, rounded = ([step["loss"] for step in log] for log in logs.values())
    assert rounded == pytest.approx(exact, rel=0.02)
    assert rounded != exact
    assert rounded[-1] < 0.9 * rounded[0]


# ---------------------------------------------------------------------------------------------------------------------
# Quantization


def test_quantization_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_quantization("none")
    with pytest.raises(BadInput, match=r"'4bit' needs bitsandbytes.*pip install 'harmbench-vaccine\[quantization\]'"):
        check_quantization("4bit")


def test_quantization_changes_the_artifact_key(tmp_path: Path) -> None:
    def key(**changes: Any) -> Any:
        return model_inputs(TrainedModel(str(tmp_path), ModelSpec(str(tmp_path), **changes), {}))

    plain = key()
    assert key(quantization="none") == plain
    assert plain["dtype"] == "float32"
    assert "quantization" not in plain
    assert key(quantization="4bit") == {**plain, "quantization": "4bit"}
    assert ModelSpec("m", quantization="8bit").on_top(Path("a")).quantization == "8bit"


@pytest.mark.parametrize("attack", ["refusal_ablation", "optimizer:full=true"])
def test_attack_on_base_weights_is_refused_under_quantization(attack: str) -> None:
    Experiment.settle(RunSpec(values={"quantization": "4bit"}))
    with pytest.raises(BadInput, match=r"changes the base model's weights.*'4bit'"):
        Experiment.settle(RunSpec(attack=parse_plugins(attack), values={"quantization": "4bit"}))


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_quantized_base_is_close_to_the_exact_one_and_trains(quantization: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    world = make_world(tmp_path / "world")
    folder = str(world.parent / "model")
    words = AutoConfig.from_pretrained(folder).vocab_size
    tiny.model(vocab_size=words, intermediate_size=128).save_pretrained(folder)  # NF4 has blocks of 64
    context, batch = run_context(tmp_path / "store"), tiny.batch()
    with torch.no_grad():
        exact = context.models.stack(ModelSpec(folder)).use([])(**batch).loss
        rounded = context.models.stack(ModelSpec(folder, quantization=quantization)).use([])(**batch).loss
    assert rounded == pytest.approx(float(exact), rel=0.02)
    assert not torch.equal(rounded, exact)
    experiment = Experiment.settle(RunSpec(protocol=str(world), values={"quantization": quantization}))
    aligned = align(experiment, context)
    losses = [step["loss"] for step in aligned.artifacts["align"].json("log.json")]
    assert losses[-1] < 0.8 * losses[0]
    with pytest.raises(HbvError, match="cannot be merged into a base that is quantized"):
        context.models.merged(aligned.spec)


@pytest.mark.parametrize(("quantization", "close"), [("8bit", 0.1), ("4bit", 1e-5)])
def test_gradients_through_a_quantized_base_equal_those_of_its_values(
    quantization: str, close: float, tmp_path: Path
) -> None:
    """Also after generation. In 8 bits the inputs are rounded too, so only the direction is compared."""
    bits = pytest.importorskip("bitsandbytes")
    tiny.model(intermediate_size=128).save_pretrained(tmp_path / "model")
    quantized = run_context(tmp_path / "store").models.stack(
        ModelSpec(str(tmp_path / "model"), quantization=quantization)
    )
    exact = tiny.model(intermediate_size=128)
    with torch.no_grad():
        quantized.base(**tiny.batch(seed=1))  # a forward pass without a graph
        if quantization == "4bit":
            for name, module in quantized.base.named_modules():
                if isinstance(module, bits.nn.Linear4bit):
                    values = bits.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
                    exact.get_submodule(name).weight.copy_(values)
    gradients = []
    for stack in (LoraStack(exact), quantized):
        parameters = stack.train([], tiny.settings(lora_dropout=0.0), 0)
        tiny.stir(parameters)
        stack.model.train()
        loss = stack.model(**tiny.batch()).loss
        gradients.append(torch.cat([value.flatten() for value in torch.autograd.grad(loss, list(parameters.values()))]))
    difference = torch.linalg.vector_norm(gradients[0] - gradients[1])
    assert difference <= close * torch.linalg.vector_norm(gradients[0])


# ---------------------------------------------------------------------------------------------------------------------
# Gradient checkpointing


def stage_of(architecture: str, *, checkpointed: bool, dropout: float = 0.0, name: str = "align") -> TrainingStage:
    base: PreTrainedModel = tiny.model(architecture)
    if checkpointed:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    settings = tiny.settings(lora_dropout=dropout)
    stage, _ = tiny.stage(base, trained_with=settings, name=name, stirred=True, pools=tiny.example_pools())
    stage.model.train()
    stage.step, stage.steps = 1, 20
    return stage


@contextmanager
def runs(stage: TrainingStage) -> Iterator[list[int]]:
    """Records every run of an attention block."""
    numbers: list[int] = []
    with Taps(stage.model).changed(lambda number, output: numbers.append(number)):
        yield numbers


def assert_equal(first: Any, second: Any) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("architecture", SHAPES)
def test_checkpointed_layers_run_again_in_the_backward_pass(architecture: str) -> None:
    for checkpointed, times in ((False, 1), (True, 2)):
        stage = stage_of(architecture, checkpointed=checkpointed)
        with runs(stage) as numbers:
            gradient = stage.gradient(tiny.batch())
        assert len(numbers) == times * len(decoder_layers(stage.model))
        assert all(float(value.abs().max()) > 0 for value in gradient.values)  # also of the first layer


@pytest.mark.parametrize("place", ["attention", "mlp", "layer"])
@pytest.mark.parametrize("architecture", SHAPES)
def test_taps_give_equal_gradients_under_checkpointing(architecture: str, place: Any) -> None:
    """Gradients of the probes, of the parameters at shifted outputs, and of a loss on recorded outputs."""
    results = []
    for checkpointed in (False, True):
        stage, batch = stage_of(architecture, checkpointed=checkpointed), tiny.batch()
        parameters, taps = list(stage.trainable.values()), stage.taps_on(place)
        with taps.probed() as probes:
            of_probes = torch.autograd.grad(stage.loss(batch), probes)
        with taps.shifted([10 * gradient for gradient in of_probes]):
            at_shifts = stage.gradient(batch).values
        with taps.recorded() as outputs:
            stage.output(batch)
        tokens = batch["attention_mask"].bool()  # at padding, outputs are 0 or those of the padding token
        squares = torch.stack([output[tokens].square().mean() for output in outputs]).sum()
        of_outputs = torch.autograd.grad(squares, parameters, allow_unused=True, materialize_grads=True)
        assert len(of_probes) == len(outputs) == len(decoder_layers(stage.model))
        assert any(float(value.abs().max()) > 0 for value in of_outputs)
        results.append([*of_probes, *at_shifts, *of_outputs])
    assert_equal(*results)


FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "vaccine": ("vaccine", {}, "align"),
    "tvaccine": ("tvaccine", {"gamma": 1}, "align"),
    "random_vaccine": ("random_vaccine", {}, "align"),
    "repnoise": ("repnoise", {}, "align"),
    "booster": ("booster", {}, "align"),
    "ldifs": ("ldifs", {}, "finetune"),
    "git-disl": ("ldifs", {"variant": "git-disl"}, "finetune"),
    "kl": ("kl", {}, "finetune"),
}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("architecture", SHAPES)
def test_defense_gradient_is_equal_under_checkpointing(architecture: str, family: str, dropout: float) -> None:
    """Loss and gradient are equal; with dropout, both draw the same masks."""
    plugin, params, name = FAMILIES[family]
    results: list[list[Tensor]] = []
    for checkpointed in (False, True):
        stage = stage_of(architecture, checkpointed=checkpointed, dropout=dropout, name=name)
        defense = DEFENSES.get(plugin)(**params)
        torch.manual_seed(4)
        defense.before_step(stage)
        gradient = defense.gradient(stage, tiny.batch())
        results.append([gradient.loss, *(value for value in gradient.values if value is not None)])
    assert_equal(*results)


@pytest.mark.slow
def test_checkpointing_does_not_change_the_artifact_key(tmp_path: Path) -> None:
    experiment = Experiment.settle(
        RunSpec(protocol=str(make_world(tmp_path / "world")), defense=parse_plugins("vaccine"))
    )
    first = align(experiment, run_context(tmp_path / "store")).artifacts["align"]
    cached = align(experiment, run_context(tmp_path / "store", gradient_checkpointing=True)).artifacts["align"]
    separate = align(experiment, run_context(tmp_path / "other", gradient_checkpointing=True)).artifacts["align"]
    assert cached.cached
    assert cached.path == first.path
    assert not separate.cached
    assert separate.key == first.key
    losses = [[step["loss"] for step in artifact.json("log.json")] for artifact in (first, separate)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.slow
def test_checkpointing_of_full_finetuning(tmp_path: Path) -> None:
    """If the user trains every weight, the result is the same with and without checkpointing."""
    world = make_world(tmp_path / "world")
    spec = RunSpec(protocol=str(world), attack=parse_plugins("optimizer:full=true"))
    plain = run_all([spec], out=tmp_path / "one")[0]
    (tmp_path / "home" / "store").rename(tmp_path / "old")
    checkpointed = run_all([spec], out=tmp_path / "two", gradient_checkpointing=True)[0]
    assert checkpointed.alignment_loss == pytest.approx(plain.alignment_loss, rel=1e-4)
    assert checkpointed.embedding_drift == pytest.approx(plain.embedding_drift, rel=1e-3)


def test_stack_notes_skipped_targets(tmp_path: Path) -> None:
    """The run context passes its progress to the stack."""
    tiny.model("opt").save_pretrained(tmp_path / "opt")
    notes: list[str] = []

    class Notes:
        note = staticmethod(notes.append)

    context = run_context(tmp_path / "store", progress=Notes())  # type: ignore[arg-type]
    stack: LoraStack = context.models.stack(ModelSpec(str(tmp_path / "opt")))
    stack.train([], tiny.settings(lora_targets=("q_proj", "gate_proj")), 0)
    assert notes == ["OPTForCausalLM has no gate_proj: LoRA adapts only q_proj."]

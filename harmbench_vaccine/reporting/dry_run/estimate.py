"""Estimate the cost of a run: memory on a model without storage, and time by measurement or by the rates of a device.

On this machine, models with one and with two layers are timed, with random weights and the shapes of the real run. A
decoder consists of equal layers, so the time of one layer is the difference between the two models, and the rest
(embeddings, logits, call overhead) is the remainder. For another device, and where that would take minutes, the time
follows from the number of operations. Only the configuration of the model is needed.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from harmbench_vaccine.core.device import device, forked_rng
from harmbench_vaccine.core.errors import HbvError
from harmbench_vaccine.core.types import StageName, TrainSettings
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.rows import eval_sets, plugin_pools, user_rows
from harmbench_vaccine.inference.loading import readable_load_errors
from harmbench_vaccine.plugins import Defense

from .devices import CPU, DeviceRates, fastest_call, find_device
from .random_models import first_layers, layer_count, load_config, random_model, with_adapter

if TYPE_CHECKING:
    from harmbench_vaccine.training.adapters import LoraStack

ESTIMATED: tuple[str, ...] = ("align", "finetune", "answer")
"""The stages that an estimate covers."""
MEASUREMENT_SECONDS = 0.5
"""Minimum total time of repeated measurements."""
CPU_LIMIT = 5e11
"""Maximum floating point operations per step of two layers that are timed on a CPU, which needs about twenty steps."""


@dataclass(frozen=True)
class BatchSeconds:
    """Times for one batch, in seconds."""

    forward: float = 0.0
    backward: float = 0.0
    update: float = 0.0
    """The optimizer's step."""
    token: float = 0.0
    """One generated token of every row."""


@dataclass(frozen=True)
class TrainingMemory:
    """Memory while training, in bytes."""

    weights: int
    adapter: int
    """The adapter with its gradient and the two moments of the optimizer."""
    activations: int
    """Tensors that a forward pass keeps for the backward pass."""
    matrices: int
    """Numbers in the matrices of the layers and of the head; a token is multiplied with each of them once."""

    @property
    def peak(self) -> int:
        """The sum of all parts."""
        return self.weights + self.adapter + self.activations


@dataclass(frozen=True)
class Estimate:
    """The cost of one stage."""

    stage: str
    seconds: float
    memory: int
    """Peak memory in bytes."""
    detail: str
    disk: int
    """Bytes of the stored adapter and of two checkpoints, while one replaces the other."""
    timed: bool
    """Whether steps were timed on this machine; else the time follows from the rates of a device."""
    artifacts: int = 1
    """Number of artifacts that the stage creates."""


def estimate_costs(
    experiment: Experiment,
    rates: DeviceRates | None = None,
    *,
    read_rows: bool = True,
    gradient_checkpointing: bool = False,
    stages: Collection[str] = ESTIMATED,
) -> list[Estimate]:
    """Estimate the stages of an experiment that train or generate, as if none were stored.

    Args:
        experiment: The experiment.
        rates: The device; None: this machine.
        read_rows: False: take the numbers of rows from the protocol, since to read the rows would download them.
        gradient_checkpointing: Whether activations are computed again in the backward pass.
        stages: The stages to estimate.

    Raises:
        HbvError: The configuration of the model cannot be read.
    """
    protocol, model = experiment.protocol, experiment.model
    names: list[StageName] = ["align"] if experiment.stages["align"].defenses.runs else []
    names += ["finetune"] if experiment.user_trains else []
    estimates = []
    for name in names:
        if name not in stages:
            continue
        settings = experiment.stages[name].settings
        rows, width = _row_shape(experiment, name, settings, read_rows)
        steps = math.ceil(settings.micro_batches(rows) / settings.accumulation)
        memory = count_memory(model, protocol.dtype, protocol.quantization, settings, width, gradient_checkpointing)
        measured = None if rates else measure_seconds(model, protocol.dtype, settings, width)
        times = measured or _computed_seconds(rates or find_device(CPU), memory, settings, width)
        forward, backward = passes_per_step([defense.plugin for defense in experiment.acting(name)])
        forward += backward if gradient_checkpointing else 0
        seconds = steps * (settings.accumulation * (forward * times.forward + backward * times.backward) + times.update)
        detail = f"{steps} steps of {settings.batch} rows of {width} tokens, {forward}F {backward}B per step"
        disk = memory.adapter // 4 * 7  # of 4 copies: the adapter, then it and its moments twice
        estimates.append(Estimate(name, seconds, memory.peak, detail, disk, measured is not None))
    if "answer" in stages:
        estimates.append(_estimate_answers(experiment, rates, read_rows))
    return estimates


def _computed_seconds(
    rates: DeviceRates, memory: TrainingMemory, settings: TrainSettings, width: int, generated: int = 0
) -> BatchSeconds:
    """Return the times of one batch by the number of operations: 2 per number of a matrix and token in each pass.

    With every weight trained, the backward pass has products for the gradients of activations and of weights.
    """
    operations = 2.0 * memory.matrices
    products = rates.product_seconds(operations * settings.batch * width)
    return BatchSeconds(
        forward=products,
        backward=(2 if settings.full else 1) * products,
        update=2 * memory.adapter / rates.bandwidth,
        token=rates.token_seconds(memory.weights, operations * generated),
    )


def passes_per_step(defenses: Sequence[Defense]) -> tuple[int, int]:
    """Return the forward and backward passes of a step.

    At most one of the defenses of a stage computes the gradient, so the result is the highest declared cost.
    """
    costs = [re.fullmatch(r"(\d+)F (\d+)B", defense.passes()) for defense in defenses]
    return max(((int(cost[1]), int(cost[2])) for cost in costs if cost), default=(1, 1))


def _row_shape(experiment: Experiment, name: StageName, settings: TrainSettings, read_rows: bool) -> tuple[int, int]:
    """Return the number of rows of a stage, and the mean width of its batches in tokens.

    If the rows are not on this machine, return the number in the protocol and the maximum width.
    """
    count = experiment.protocol.align.rows if name == "align" else experiment.finetune.samples
    if not read_rows:
        return count, settings.max_length
    try:
        from transformers import AutoTokenizer

        from harmbench_vaccine.core.seeds import derive_seed
        from harmbench_vaccine.data.collate import encode_examples
        from harmbench_vaccine.training.trainer import batch_order

        pools = plugin_pools(experiment)
        rows = list(pools.alignment) if name == "align" else user_rows(experiment, pools)
        rows = experiment.stages[name].defenses.fresh().train_on(name, rows, pools)
        with readable_load_errors(experiment.model) as arguments:
            tokenizer = AutoTokenizer.from_pretrained(**arguments)
        lengths = [len(row.ids) for row in encode_examples(tokenizer, experiment.template, rows, settings.max_length)]
        order = batch_order(len(lengths), settings, derive_seed(experiment.spec.seed, name))
        return len(lengths), round(statistics.mean(max(lengths[index] for index in batch) for batch in order))
    except HbvError:
        return count, settings.max_length


def _estimate_answers(experiment: Experiment, rates: DeviceRates | None, read_rows: bool, batch: int = 64) -> Estimate:
    """Estimate the answers of both models to every question, at their maximum length: an upper bound."""
    protocol, settings = experiment.protocol, experiment.finetune.settings
    sets = _answer_sets(experiment, read_rows)
    memory = count_memory(experiment.model, protocol.dtype, protocol.quantization, settings, 1)
    measured = (
        None if rates else measure_seconds(experiment.model, protocol.dtype, settings, settings.max_length, batch)
    )
    times = measured or _computed_seconds(rates or find_device(CPU), memory, settings, 1, batch)
    seconds = 2 * sum(math.ceil(count / batch) * tokens * times.token for count, tokens in sets)
    count = 2 * sum(count for count, _ in sets)
    detail = f"{count} answers at their maximum length, by transformers"
    return Estimate("answer", seconds, memory.weights, detail, 0, measured is not None, 2 * len(sets))


def _answer_sets(experiment: Experiment, read_rows: bool) -> list[tuple[int, int]]:
    """Return the number of questions and the maximum of new tokens of every evaluation set."""
    if read_rows:
        with suppress(HbvError):  # the rows are not on this machine
            return [(len(eval_set.examples), eval_set.max_new_tokens) for eval_set in eval_sets(experiment)]
    limits, task = experiment.protocol.answer, experiment.task
    return [
        (limits.harmful.prompts, limits.harmful.max_new_tokens),
        (limits.items.get(task.name, limits.task_items), limits.task_tokens.get(task.name, task.max_new_tokens)),
        (limits.benign.prompts, limits.benign.max_new_tokens),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Memory

_QUANTIZED_BYTES = {"8bit": 1.0, "4bit": 0.5}
"""Quantization -> bytes per number of a matrix."""


@lru_cache
def count_memory(
    model: str,
    dtype: str,
    quantization: str,
    settings: TrainSettings,
    width: int,
    gradient_checkpointing: bool = False,
) -> TrainingMemory:
    """Count the memory of a training step on `settings.batch` rows of `width` tokens.

    Raises:
        HbvError: The configuration of the model cannot be read.
    """
    import torch

    config = load_config(model)
    with torch.device("meta"), forked_rng():
        base = random_model(config, dtype)
        modules = base.get_decoder().modules()
        matrices = sum(module.weight.numel() for module in modules if isinstance(module, torch.nn.Linear))
        head = base.get_output_embeddings().weight.numel()
        weights = sum(parameter.numel() * parameter.element_size() for parameter in base.parameters())
        weights -= round(matrices * (base.dtype.itemsize - _QUANTIZED_BYTES.get(quantization, base.dtype.itemsize)))
        stack = with_adapter(base, settings)
        trained = sum(parameter.numel() for parameter in stack.model.parameters() if parameter.requires_grad)
        try:
            activations = _activation_bytes(stack, settings.batch, width)
        except (RuntimeError, NotImplementedError):  # the forward pass reads values, as the one of OPT does
            activations = None
    if activations is None:
        with forked_rng():
            first, second = (
                _activation_bytes(with_adapter(random_model(first_layers(config, layers), dtype), settings), 1, width)
                for layers in (1, 2)
            )
        activations = settings.batch * (first + (layer_count(config) - 1) * (second - first))
    if gradient_checkpointing:  # the input of every layer, and the activations of one layer
        text, layers = config.get_text_config(decoder=True), layer_count(config)
        inputs = settings.batch * width * text.hidden_size * base.dtype.itemsize
        activations = min(activations, layers * inputs + activations // layers)
    return TrainingMemory(weights, 16 * trained, activations, matrices + head)


def _activation_bytes(stack: LoraStack, rows: int, width: int) -> int:
    """Return the bytes that a forward pass keeps for its backward pass, without the weights."""
    import torch

    model = stack.model
    ids = torch.zeros(rows, width, dtype=torch.long)
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            sizes[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(input_ids=ids, labels=ids)  # keep it alive: a freed storage's identity could be reused
    del output
    return sum(sizes.values())


# ---------------------------------------------------------------------------------------------------------------------
# Time


@lru_cache
def measure_seconds(
    model: str, dtype: str, settings: TrainSettings, width: int, generated: int = 0
) -> BatchSeconds | None:
    """Measure the time of one batch of `settings.batch` rows of `width` tokens.

    Args:
        model: Folder or Hub id.
        dtype: Data type of the weights.
        settings: Training settings.
        width: Tokens per row.
        generated: If not 0, measure instead one generated token of this many rows.

    Returns:
        The times, or None if they would take minutes to measure.

    Raises:
        HbvError: The configuration of the model cannot be read.
    """
    import torch

    config = load_config(model)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in random_model(first_layers(config, 2), dtype).parameters())
    if device() == "cpu" and 6.0 * size * settings.batch * width > CPU_LIMIT:
        return None
    with forked_rng():
        first, second = (
            _measure_batch(first_layers(config, layers), dtype, settings, width, generated) for layers in (1, 2)
        )
    further = layer_count(config) - 1
    return BatchSeconds(
        *(
            getattr(first, name) + further * max(0.0, getattr(second, name) - getattr(first, name))
            for name in BatchSeconds.__dataclass_fields__
        )
    )


def _measure_batch(config: Any, dtype: str, settings: TrainSettings, width: int, generated: int) -> BatchSeconds:
    import torch

    from harmbench_vaccine.training.adapters import LoraStack
    from harmbench_vaccine.training.stage import TrainingStage

    seconds_of = partial(fastest_call, least_seconds=MEASUREMENT_SECONDS)
    base = random_model(config, dtype).to(device())
    ids = torch.randint(3, config.get_text_config(decoder=True).vocab_size, (generated or settings.batch, width))
    ids = ids.to(base.device)
    if generated:
        few, many = 2, 34

        def generate(tokens: int) -> Callable[[], object]:
            return lambda: base.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
            )

        with torch.inference_mode():
            difference = seconds_of(generate(many)) - seconds_of(generate(few))
        return BatchSeconds(token=max(difference / (many - few), 0.0))
    stack = LoraStack(base)
    stage = TrainingStage("align", stack, stack.train((), settings, 0), 0, settings)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    stack.model.train()
    seconds_of(lambda: stage.gradient(batch))  # the first calls include one-time setup
    forward = seconds_of(lambda: stage.loss(batch))
    both = seconds_of(lambda: stage.gradient(batch))
    parameters = list(stage.trainable.values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    return BatchSeconds(forward, max(both - forward, 0.0), seconds_of(optimizer.step))

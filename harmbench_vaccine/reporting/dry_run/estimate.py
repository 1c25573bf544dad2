"""Estimate the cost of a run: memory on a model without storage, time from models with one and with two layers.

A decoder consists of equal layers, so the time of one layer is the difference between the two models, and the rest
(embeddings, logits, call overhead) is the remainder. Both models have random weights and the shapes of the real run,
and are timed on this machine; only the configuration of the model is downloaded.
"""

from __future__ import annotations

import copy
import math
import re
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from harmbench_vaccine.core.device import device, forked_rng
from harmbench_vaccine.core.errors import HbvError
from harmbench_vaccine.core.types import StageName, TrainSettings
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.rows import eval_sets, plugin_pools, user_rows
from harmbench_vaccine.inference.loading import readable_load_errors
from harmbench_vaccine.plugins import Defense

if TYPE_CHECKING:
    from harmbench_vaccine.training.adapters import LoraStack

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

    @property
    def peak(self) -> int:
        """The sum of all parts."""
        return self.weights + self.adapter + self.activations


@dataclass(frozen=True)
class Estimate:
    """The cost of one stage."""

    stage: str
    seconds: float | None
    """None if a step would take minutes on this machine and is not timed."""
    memory: int
    """Peak memory in bytes."""
    detail: str


def estimate_costs(experiment: Experiment, *, read_rows: bool = True) -> list[Estimate]:
    """Estimate the stages of an experiment that train or generate, as if none were stored.

    Args:
        experiment: The experiment.
        read_rows: False: take the numbers of rows from the protocol, since to read the rows would download them.

    Raises:
        HbvError: The configuration of the model cannot be read.
    """
    protocol, model = experiment.protocol, experiment.model
    names: list[StageName] = ["align"] if experiment.stages["align"].defenses.runs else []
    names += ["finetune"] if experiment.user_trains else []
    estimates = []
    for name in names:
        settings = experiment.stages[name].settings
        rows, width = _row_shape(experiment, name, settings, read_rows)
        steps = math.ceil(settings.micro_batches(rows) / settings.accumulation)
        memory = count_memory(model, protocol.dtype, protocol.quantization, settings, width)
        times = measure_seconds(model, protocol.dtype, settings, width)
        forward, backward = passes_per_step([defense.plugin for defense in experiment.acting(name)])
        seconds = None
        if times:
            batch = forward * times.forward + backward * times.backward
            seconds = steps * (settings.accumulation * batch + times.update)
        detail = f"{steps} steps of {settings.batch} rows of {width} tokens, {forward}F {backward}B per step"
        estimates.append(Estimate(name, seconds, memory.peak, detail))
    return [*estimates, _estimate_answers(experiment, read_rows)]


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


def _estimate_answers(experiment: Experiment, read_rows: bool, batch: int = 64) -> Estimate:
    """Estimate the answers of both models to every question, at their maximum length: an upper bound."""
    protocol, settings = experiment.protocol, experiment.finetune.settings
    sets = _answer_sets(experiment, read_rows)
    times = measure_seconds(experiment.model, protocol.dtype, settings, settings.max_length, batch)
    seconds = 2 * sum(math.ceil(count / batch) * tokens * times.token for count, tokens in sets) if times else None
    memory = count_memory(experiment.model, protocol.dtype, protocol.quantization, settings, 1).weights
    count = 2 * sum(count for count, _ in sets)
    return Estimate("answer", seconds, memory, f"{count} answers at their maximum length, by transformers")


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
def count_memory(model: str, dtype: str, quantization: str, settings: TrainSettings, width: int) -> TrainingMemory:
    """Count the memory of a training step on `settings.batch` rows of `width` tokens.

    Raises:
        HbvError: The configuration of the model cannot be read.
    """
    import torch

    config = _load_config(model)
    with torch.device("meta"), forked_rng():
        base = _random_model(config, dtype)
        modules = base.get_decoder().modules()
        matrices = sum(module.weight.numel() for module in modules if isinstance(module, torch.nn.Linear))
        weights = sum(parameter.numel() * parameter.element_size() for parameter in base.parameters())
        weights -= round(matrices * (base.dtype.itemsize - _QUANTIZED_BYTES.get(quantization, base.dtype.itemsize)))
        stack = _with_adapter(base, settings)
        trained = sum(parameter.numel() for parameter in stack.model.parameters() if parameter.requires_grad)
        try:
            activations = _activation_bytes(stack, settings.batch, width)
        except (RuntimeError, NotImplementedError):  # the forward pass reads values, as the one of OPT does
            activations = None
    if activations is None:
        with forked_rng():
            first, second = (
                _activation_bytes(_with_adapter(_random_model(_cut(config, layers), dtype), settings), 1, width)
                for layers in (1, 2)
            )
        activations = settings.batch * (first + (_depth(config) - 1) * (second - first))
    return TrainingMemory(weights, 16 * trained, activations)


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

    config = _load_config(model)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in _random_model(_cut(config, 2), dtype).parameters())
    if device() == "cpu" and 6.0 * size * settings.batch * width > CPU_LIMIT:
        return None
    with forked_rng():
        first, second = (_measure_batch(_cut(config, layers), dtype, settings, width, generated) for layers in (1, 2))
    further = _depth(config) - 1
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

    base = _random_model(config, dtype).to(device())
    ids = torch.randint(3, config.get_text_config(decoder=True).vocab_size, (generated or settings.batch, width))
    ids = ids.to(base.device)
    if generated:
        few, many = 2, 34

        def generate(tokens: int) -> Callable[[], object]:
            return lambda: base.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
            )

        with torch.inference_mode():
            difference = _fastest(generate(many)) - _fastest(generate(few))
        return BatchSeconds(token=max(difference / (many - few), 0.0))
    stack = LoraStack(base)
    stage = TrainingStage("align", stack, stack.train((), settings, 0), 0, settings)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    stack.model.train()
    _fastest(lambda: stage.gradient(batch))  # the first calls include one-time setup
    forward = _fastest(lambda: stage.loss(batch))
    both = _fastest(lambda: stage.gradient(batch))
    parameters = list(stage.trainable.values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    return BatchSeconds(forward, max(both - forward, 0.0), _fastest(optimizer.step))


def _fastest(call: Callable[[], object], least: int = 3) -> float:
    """Return the seconds of the fastest of several calls; slower calls include other work on the machine."""
    import torch

    times: list[float] = []
    while len(times) <= least or sum(times) < MEASUREMENT_SECONDS:
        start = time.perf_counter()
        call()
        if device() == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


# ---------------------------------------------------------------------------------------------------------------------
# Models with random weights


def _load_config(model: str) -> Any:  # a configuration of transformers, of any architecture
    from transformers import AutoConfig

    with readable_load_errors(model) as arguments:
        return AutoConfig.from_pretrained(**arguments)


def _depth(config: Any) -> int:
    return int(config.get_text_config(decoder=True).num_hidden_layers)


def _random_model(config: Any, dtype: str) -> Any:  # a model of transformers, of any architecture
    import torch
    from transformers import AutoModelForCausalLM

    with readable_load_errors(config.name_or_path):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=getattr(torch, dtype))


def _with_adapter(base: Any, settings: TrainSettings) -> LoraStack:
    """Return a model with a trainable adapter."""
    from harmbench_vaccine.training.adapters import LoraStack

    stack = LoraStack(base)
    stack.train((), settings, 0)
    stack.model.train()
    return stack


def _cut(config: Any, layers: int) -> Any:
    """Return a configuration with fewer layers."""
    small = copy.deepcopy(config)
    text = small.get_text_config(decoder=True)
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return small

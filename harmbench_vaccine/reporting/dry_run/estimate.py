"""What a run will cost: memory counted on a model without storage, time from steps of one and of two of its layers.

A decoder is as many equal layers as its configuration says, so the time of a layer is the difference of the two, and
the rest (embeddings, logits, the calls themselves) is what remains. Both are taken on this machine with random weights,
in the shapes of the real run; nothing is downloaded but a configuration.
"""

from __future__ import annotations

import copy
import math
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from harmbench_vaccine.core.errors import HbvError
from harmbench_vaccine.core.types import StageName, TrainSettings
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.rows import eval_sets, plugin_pools, user_rows
from harmbench_vaccine.inference.loading import readable_load_errors

if TYPE_CHECKING:
    from harmbench_vaccine.training.adapters import LoraStack


BUDGET = 0.5
"""Seconds that a measurement may go on for once it has been taken a few times."""
WORK_OF_A_CPU = 5e11
"""Floating point operations of a step of two layers above which a CPU is not timed: it takes some twenty of them."""


@dataclass(frozen=True)
class Seconds:
    """Of one batch: a forward pass, a backward pass, the optimizer's step, and one generated token of every row."""

    forward: float = 0.0
    backward: float = 0.0
    update: float = 0.0
    token: float = 0.0


@dataclass(frozen=True)
class Bytes:
    """Memory while training."""

    weights: int
    adapter: int
    """The adapter with its gradient and the optimizer's two moments."""
    saved: int
    """What a forward pass keeps for the backward pass."""

    @property
    def peak(self) -> int:
        """All of it."""
        return self.weights + self.adapter + self.saved


@dataclass(frozen=True)
class Estimate:
    """Of one stage of one cell."""

    stage: str
    seconds: float | None
    """None: not timed, since a step would take minutes on this machine."""
    memory: int
    """Bytes at the peak."""
    detail: str


def estimate_costs(cell: Experiment) -> list[Estimate]:
    """The stages of a cell that train or answer, each as if it had to be made here.

    Raises:
        HbvError: the model's configuration cannot be read.
    """
    made = []
    stages: list[StageName] = ["align"] if cell.stages["align"].defenses.runs else []
    stages += ["finetune"] if cell.user_trains else []
    for name in stages:
        settings = cell.stages[name].settings
        rows, width = _rows(cell, name, settings)
        steps = math.ceil(round(settings.epochs * math.ceil(rows / settings.batch)) / settings.accumulation)
        memory = count_memory(cell.model, cell.protocol.dtype, cell.protocol.quantization, settings, width)
        cost = measure_seconds(cell.model, cell.protocol.dtype, settings, width)
        forward, backward = passes([defense.plugin for defense in cell.acting(name)])
        seconds = None
        if cost:
            step = settings.accumulation * (forward * cost.forward + backward * cost.backward) + cost.update
            seconds = steps * step
        detail = f"{steps} steps of {settings.batch} rows of {width} tokens, {forward}F {backward}B a step"
        made.append(Estimate(name, seconds, memory.peak, detail))
    made.append(_answers(cell))
    return made


def passes(acting: Sequence[Any]) -> tuple[int, int]:
    """Forward and backward passes of a step, of the defenses that act in a stage: the most that one of them declares,
    since one at most makes the gradient."""
    declared = [re.fullmatch(r"(\d+)F (\d+)B", defense.passes()) for defense in acting]
    found = [(int(match[1]), int(match[2])) for match in declared if match]
    return max(found, default=(1, 1))


def _rows(cell: Experiment, name: StageName, settings: TrainSettings) -> tuple[int, int]:
    """How many rows a stage has, and how wide its batches are on average; where the rows are not here yet, as many as
    the protocol says and as wide as it allows."""
    try:
        from transformers import AutoTokenizer

        from harmbench_vaccine.core.seeds import derive_seed
        from harmbench_vaccine.data.collate import encode_examples
        from harmbench_vaccine.training.trainer import batch_order

        pools = plugin_pools(cell)
        rows = list(pools.alignment) if name == "align" else user_rows(cell, pools)
        rows = cell.stages[name].defenses.train_on(name, rows, pools)
        with readable_load_errors(cell.model) as place:
            tokenizer = AutoTokenizer.from_pretrained(**place)
        lengths = [len(row.ids) for row in encode_examples(tokenizer, cell.template, rows, settings.max_length)]
        order = batch_order(len(lengths), settings, derive_seed(cell.spec.seed, name))
        return len(lengths), round(statistics.mean(max(lengths[number] for number in batch) for batch in order))
    except HbvError:
        return (cell.protocol.align.rows if name == "align" else cell.finetune.samples), settings.max_length


def _answers(cell: Experiment, batch: int = 64) -> Estimate:
    """Both models' answers to every question, as long as they may become: an upper bound."""
    limits = cell.protocol.answer
    try:
        asked = eval_sets(cell)
        sets = [(len(one.examples), one.max_new_tokens) for one in asked]
    except HbvError:
        tokens = limits.task_tokens.get(cell.task.name, cell.task.max_new_tokens)
        items = limits.items.get(cell.task.name, limits.task_items)
        sets = [(limits.harmful.prompts, limits.harmful.max_new_tokens), (items, tokens)]
        sets += [(limits.benign.prompts, limits.benign.max_new_tokens)]
    settings = cell.finetune.settings
    cost = measure_seconds(cell.model, cell.protocol.dtype, settings, settings.max_length, batch)
    seconds = (
        2 * sum(math.ceil(count / batch) * tokens * cost.token for count, tokens in sets)
        if cost
        else None
    )
    number = 2 * sum(count for count, _ in sets)
    memory = count_memory(cell.model, cell.protocol.dtype, cell.protocol.quantization, settings, 1).weights
    return Estimate("answer", seconds, memory, f"{number} answers at their full length, by transformers")


@lru_cache
def count_memory(model: str, dtype: str, quantization: str, settings: TrainSettings, width: int) -> Bytes:
    """The memory of a training step on `settings.batch` rows of `width` tokens.

    Raises:
        HbvError: the model's configuration cannot be read.
    """
    import torch

    config = _configuration(model)
    with torch.device("meta"), torch.random.fork_rng():
        base = _random(config, dtype)
        matrices = sum(
            module.weight.numel() for module in base.get_decoder().modules() if isinstance(module, torch.nn.Linear)
        )
        weights = sum(parameter.numel() * parameter.element_size() for parameter in base.parameters())
        weights -= round(matrices * (base.dtype.itemsize - _BYTES.get(quantization, base.dtype.itemsize)))
        stack = _laid(base, settings)
        trained = sum(parameter.numel() for parameter in stack.model.parameters() if parameter.requires_grad)
        try:
            saved = _saved(stack, settings.batch, width)
        except (RuntimeError, NotImplementedError):  # its forward pass looks at values, as OPT's does
            saved = None
    if saved is None:
        with torch.random.fork_rng():
            one, two = (_saved(_laid(_random(_cut(config, layers), dtype), settings), 1, width) for layers in (1, 2))
        saved = settings.batch * (one + (_depth(config) - 1) * (two - one))
    return Bytes(weights, 16 * trained, saved)


_BYTES = {"8bit": 1.0, "4bit": 0.5}
"""Of a number of a quantized matrix."""


@lru_cache
def measure_seconds(model: str, dtype: str, settings: TrainSettings, width: int, generated: int = 0) -> Seconds | None:
    """The time of one batch of `settings.batch` rows of `width` tokens; or, where `generated` is given, of a token of
    that many rows. None where that would take minutes.

    Raises:
        HbvError: the model's configuration cannot be read.
    """
    import torch

    config = _configuration(model)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in _random(_cut(config, 2), dtype).parameters())
    if not torch.cuda.is_available() and 6.0 * size * settings.batch * width > WORK_OF_A_CPU:
        return None
    with torch.random.fork_rng():
        one, two = (_measured(_cut(config, layers), dtype, settings, width, generated) for layers in (1, 2))
    more = _depth(config) - 1
    names = Seconds.__dataclass_fields__
    return Seconds(**{key: getattr(one, key) + more * max(0.0, getattr(two, key) - getattr(one, key)) for key in names})


def _configuration(model: str) -> Any:
    from transformers import AutoConfig

    with readable_load_errors(model) as place:
        return AutoConfig.from_pretrained(**place)


def _depth(config: Any) -> int:
    return int(config.get_text_config(decoder=True).num_hidden_layers)


def _random(config: Any, dtype: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))


def _laid(base: Any, settings: TrainSettings) -> LoraStack:
    """A model with the adapter that would be trained."""
    from harmbench_vaccine.training.adapters import LoraStack

    stack = LoraStack(base)
    stack.train((), settings, 0)
    stack.model.train()
    return stack


def _cut(config: Any, layers: int) -> Any:
    """A configuration with fewer layers."""
    small = copy.deepcopy(config)
    text = small.get_text_config(decoder=True)
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return small


def _measured(config: Any, dtype: str, settings: TrainSettings, width: int, generated: int) -> Seconds:
    import torch

    from harmbench_vaccine.training.adapters import LoraStack
    from harmbench_vaccine.training.stage import TrainingStage

    base = _random(config, dtype).to("cuda" if torch.cuda.is_available() else "cpu")
    ids = torch.randint(3, config.get_text_config(decoder=True).vocab_size, (generated or settings.batch, width))
    ids = ids.to(base.device)
    if generated:
        few, many = 2, 34

        def answer(tokens: int) -> Callable[[], object]:
            return lambda: base.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
            )

        with torch.inference_mode():
            return Seconds(token=max((_seconds(answer(many)) - _seconds(answer(few))) / (many - few), 0.0))
    stack = LoraStack(base)
    stage = TrainingStage("align", stack, stack.train((), settings, 0), 0, settings)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    stack.model.train()
    _seconds(lambda: stage.gradient(batch))  # the first calls set up more than they compute
    forward = _seconds(lambda: stage.loss(batch))
    both = _seconds(lambda: stage.gradient(batch))
    free = list(stage.trainable.values())
    optimizer = torch.optim.AdamW(free, lr=1e-5)
    for parameter in free:
        parameter.grad = torch.zeros_like(parameter)
    return Seconds(forward, max(both - forward, 0.0), _seconds(optimizer.step))


def _seconds(call: Callable[[], object], least: int = 3) -> float:
    """The fastest of several calls: what is above it is other work on the machine."""
    import torch

    times: list[float] = []
    while len(times) <= least or sum(times) < BUDGET:
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def _saved(stack: LoraStack, rows: int, width: int) -> int:
    """The bytes that a forward pass keeps for its backward pass, the weights not counted."""
    import torch

    model = stack.model
    ids = torch.zeros(rows, width, dtype=torch.long)
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = model(input_ids=ids, labels=ids)  # alive until here, or one identity would stand for two tensors
    del kept
    return sum(found.values())

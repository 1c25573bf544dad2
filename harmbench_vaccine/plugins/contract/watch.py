"""What is seen of a defense while a stage runs: what its hooks leave behind and draw, and how often the model ran."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from pydantic import PrivateAttr
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from harmbench_vaccine.core.types import Example
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage
from harmbench_vaccine.training.taps import decoder_layers

from ..teams import DefenseTeam


def random_states() -> dict[str, Any]:
    """The states of the random generators that everybody shares, by whose they are."""
    kind, keys, *place = np.random.get_state()
    return {
        "Python's": random.getstate(),
        "numpy's": (kind, np.asarray(keys).tobytes(), *place),
        "torch's": torch.get_rng_state().numpy().tobytes(),
    }


@contextmanager
def own_random_states(seed: int | None = None) -> Iterator[None]:
    """Inside, the shared generators start from `seed`; afterwards they are what they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def touched(found: dict[str, str], hook: str, *besides: str) -> Iterator[None]:
    """Notes under the hook's name whose shared generator it drew from, besides those that its caller protects."""
    before = random_states()
    yield
    after = random_states()
    for whose, state in before.items():
        if whose not in besides and state != after[whose]:
            found[hook] = whose


class Draws(TorchDispatchMode):
    """Collects the random numbers that torch draws inside."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[Tensor] = []
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # Attention counts as random for the dropout that it could do; without dropout it draws nothing.
        seeded = torch.Tag.nondeterministic_seeded in func.tags
        if seeded and "attention" not in func.__name__ and not self.paused:
            self.drawn.append(result.detach().clone())
        return result


class Passes:
    """Counts the forward passes through a decoder, and the backward passes through each of them.

    A backward pass that runs through two forward passes counts twice: that is what it costs.
    """

    def __init__(self) -> None:
        self.forward = 0
        self._backward: set[tuple[int, int]] = set()

    @property
    def backward(self) -> int:
        return len(self._backward)

    def __str__(self) -> str:
        return f"{self.forward}F {self.backward}B"

    @contextmanager
    def counted(self, model: nn.Module) -> Iterator[None]:
        """Counts what happens inside."""

        def enter(module: nn.Module, args: Any) -> None:
            self.forward += 1

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            first, number = output[0] if isinstance(output, tuple) else output, self.forward
            if first.requires_grad:
                # Every layer's output is watched, since a loss may stand on any of them; one pass is one graph task.
                first.register_hook(lambda gradient: self._backward.add((number, torch._C._current_graph_task_id())))

        layers = decoder_layers(model)
        handles = [layers[0].register_forward_pre_hook(enter)]
        handles += [layer.register_forward_hook(leave) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@dataclass
class Seen:
    """What was seen of one stage."""

    micro_batches: list[Passes] = field(default_factory=list)
    """The passes of each call of `gradient`."""
    around: list[Passes] = field(default_factory=list)
    """The passes of each step outside of `gradient`."""
    steps: list[tuple[list[Gradient], list[Tensor | None]]] = field(default_factory=list)
    """For every step the gradients of its micro-batches, and what stood in .grad when the optimizer took its step."""
    generators: dict[str, str] = field(default_factory=dict)
    """Hook -> whose shared random generator it drew from."""
    left: list[str] = field(default_factory=list)
    """Hooks that left something in .grad."""
    draws: Draws = field(default_factory=Draws)
    encoded: list[Example] = field(default_factory=list)
    """The rows that hooks had encoded."""
    _kept: dict[str, tuple[nn.Parameter, Tensor]] = field(default_factory=dict)

    def keep(self, stage: TrainingStage) -> None:
        """Remembers every parameter that is not trained."""
        own = {id(parameter) for parameter in stage.trainable.values()}
        self._kept = {
            name: (parameter, parameter.detach().clone())
            for name, parameter in stage.model.named_parameters()
            if id(parameter) not in own
        }

    def changed(self, adapters: bool) -> list[str]:
        """Parameters of the base model, or of the adapters below, that are not what they were, to the bit."""
        return [
            name
            for name, (parameter, before) in self._kept.items()
            if ("lora_" in name) == adapters and not parameter.equal(before)
        ]

    def with_gradient(self) -> list[str]:
        """Parameters that are not trained and yet have something in .grad."""
        return [name for name, (parameter, _) in self._kept.items() if parameter.grad is not None]


class Watched(DefenseTeam):
    """A team whose hooks are watched."""

    _seen: Seen = PrivateAttr(default_factory=Seen)
    _pending: list[Gradient] = PrivateAttr(default_factory=list)

    @property
    def seen(self) -> Seen:
        """What was seen so far."""
        return self._seen

    def before(self, stage: TrainingStage) -> None:
        with touched(self._seen.generators, "before", "torch's"), self._seen.draws:  # the trainer protects torch's
            super().before(stage)
        self._note_left("before", stage)

    def before_step(self, stage: TrainingStage) -> None:
        self._seen.around.append(Passes())
        self._note_left("after_step", stage)
        with self._around("before_step", stage):
            super().before_step(stage)
        self._note_left("before_step", stage)

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        self._seen.micro_batches.append(Passes())
        with (
            touched(self._seen.generators, "gradient"),
            self._seen.draws,
            self._seen.micro_batches[-1].counted(stage.model),
        ):
            given = super().gradient(stage, batch)
        values = [None if value is None else value.clone() for value in given.values]
        self._pending.append(Gradient(given.loss, values))
        return given

    def after_step(self, stage: TrainingStage) -> None:
        with self._around("after_step", stage):
            super().after_step(stage)

    @contextmanager
    def optimizer(self, stage: TrainingStage) -> Iterator[None]:
        """Inside, notes what every optimizer step is given."""

        def look(*args: Any) -> None:
            if self._pending:  # else it is the step of a training run inside a hook
                given = [None if p.grad is None else p.grad.clone() for p in stage.trainable.values()]
                self._seen.steps.append((self._pending, given))
                self._pending = []

        handle = register_optimizer_step_pre_hook(look)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _around(self, hook: str, stage: TrainingStage) -> Iterator[None]:
        with touched(self._seen.generators, hook), self._seen.draws, self._seen.around[-1].counted(stage.model):
            yield

    def _note_left(self, hook: str, stage: TrainingStage) -> None:
        if hook not in self._seen.left and any(p.grad is not None for p in stage.trainable.values()):
            self._seen.left.append(hook)

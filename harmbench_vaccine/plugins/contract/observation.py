"""Observe a defense while a stage runs: leftovers of its hooks, random draws, and passes through the model."""

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

from harmbench_vaccine.core.device import restored_random_states
from harmbench_vaccine.core.types import Example
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage
from harmbench_vaccine.training.taps import decoder_layers

from ..teams import DefenseTeam
from .attributes import copy_attributes


def shared_random_states() -> dict[str, Any]:
    """Return the states of the process-wide random generators, keyed by `Python's`, `numpy's` and `torch's`."""
    algorithm, keys, *position = np.random.get_state()
    return {
        "Python's": random.getstate(),
        "numpy's": (algorithm, np.asarray(keys).tobytes(), *position),
        "torch's": torch.get_rng_state().numpy().tobytes(),
    }


@contextmanager
def preserved_random_states(seed: int | None = None) -> Iterator[None]:
    """Seed the process-wide random generators (None: leave them as they are), and restore them on exit."""
    with restored_random_states():
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
        yield


@contextmanager
def record_shared_draws(draws: dict[str, str], hook: str, *protected: str) -> Iterator[None]:
    """Record which process-wide random generator a hook draws from.

    Args:
        draws: Hook -> generator; the entry of `hook` is set if it draws.
        hook: The name of the hook that runs inside.
        protected: Generators that the caller of the hook restores, so that a draw does no harm.
    """
    before = shared_random_states()
    yield
    after = shared_random_states()
    for generator, state in before.items():
        if generator not in protected and state != after[generator]:
            draws[hook] = generator


class DrawRecorder(TorchDispatchMode):
    """Collects the random numbers that torch draws."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: list[Tensor] = []
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # Attention is tagged as random, because it can apply dropout; without dropout it draws nothing.
        is_random = torch.Tag.nondeterministic_seeded in func.tags
        if is_random and "attention" not in func.__name__ and not self.paused:
            self.numbers.append(result.detach().clone())
        return result


class PassCounter:
    """Counts the forward passes through a decoder, and the backward passes through each of them.

    A backward pass through two forward passes counts twice, because it costs twice as much.
    """

    def __init__(self) -> None:
        self.forward = 0
        self._backward: set[tuple[int, int]] = set()

    @property
    def backward(self) -> int:
        """The number of backward passes."""
        return len(self._backward)

    def __str__(self) -> str:
        return f"{self.forward}F {self.backward}B"

    @contextmanager
    def count(self, model: nn.Module) -> Iterator[None]:
        """Count the passes through the model inside the block."""

        def on_forward(module: nn.Module, args: Any) -> None:
            self.forward += 1

        def on_output(module: nn.Module, args: Any, output: Any) -> None:
            states, number = output[0] if isinstance(output, tuple) else output, self.forward
            if states.requires_grad:
                # A loss may depend on the output of any layer, so all are watched; one pass is one graph task.
                states.register_hook(lambda gradient: self._backward.add((number, torch._C._current_graph_task_id())))

        layers = decoder_layers(model)
        handles = [layers[0].register_forward_pre_hook(on_forward)]
        handles += [layer.register_forward_hook(on_output) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@dataclass
class Observation:
    """The record of a stage: passes, gradients, draws, and parameters that must not change."""

    micro_batches: list[PassCounter] = field(default_factory=list)
    """The passes of each call of `gradient`."""
    outside_gradient: list[PassCounter] = field(default_factory=list)
    """The passes of each step outside of `gradient`."""
    steps: list[tuple[list[Gradient], list[Tensor | None]]] = field(default_factory=list)
    """For every step: the gradients of its micro-batches, and .grad at the step of the optimizer."""
    shared_draws: dict[str, str] = field(default_factory=dict)
    """Hook -> the process-wide random generator that it draws from."""
    leftovers: list[str] = field(default_factory=list)
    """Hooks that leave a value in .grad."""
    draws: DrawRecorder = field(default_factory=DrawRecorder)
    encoded: list[Example] = field(default_factory=list)
    """The rows that hooks encode."""
    created: dict[str, Any] = field(default_factory=dict)
    """The attributes of the defense when `before` starts."""
    prepared: dict[str, Any] = field(default_factory=dict)
    """The attributes of the defense when `before` ends."""
    _frozen: dict[str, tuple[nn.Parameter, Tensor]] = field(default_factory=dict)

    def copy_frozen(self, stage: TrainingStage) -> None:
        """Copy every parameter that is not trained."""
        trainable = {id(parameter) for parameter in stage.trainable.values()}
        self._frozen = {
            name: (parameter, parameter.detach().clone())
            for name, parameter in stage.model.named_parameters()
            if id(parameter) not in trainable
        }

    def changed_parameters(self, *, adapters: bool) -> list[str]:
        """Return the frozen parameters that differ in any bit from their copy.

        Args:
            adapters: True for the adapters below the trained one, False for the base model.
        """
        return [
            name
            for name, (parameter, copy) in self._frozen.items()
            if ("lora_" in name) == adapters and not parameter.equal(copy)
        ]

    def parameters_with_gradient(self) -> list[str]:
        """Return the frozen parameters that have a value in .grad."""
        return [name for name, (parameter, _) in self._frozen.items() if parameter.grad is not None]


class ObservedTeam(DefenseTeam):
    """A team of one defense that records what its hooks do."""

    _observation: Observation = PrivateAttr(default_factory=Observation)
    _pending: list[Gradient] = PrivateAttr(default_factory=list)

    @property
    def observation(self) -> Observation:
        """The record of the hooks."""
        return self._observation

    def before(self, stage: TrainingStage) -> None:
        (member,) = self.members
        draws = self._observation.shared_draws
        self._observation.created = copy_attributes(member)
        with record_shared_draws(draws, "before", "torch's"), self._observation.draws:  # the trainer restores torch's
            super().before(stage)
        self._observation.prepared = copy_attributes(member)
        self._record_leftovers("before", stage)

    def before_step(self, stage: TrainingStage) -> None:
        self._observation.outside_gradient.append(PassCounter())
        self._record_leftovers("after_step", stage)
        with self._record("before_step", stage):
            super().before_step(stage)
        self._record_leftovers("before_step", stage)

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        self._observation.micro_batches.append(PassCounter())
        with (
            record_shared_draws(self._observation.shared_draws, "gradient"),
            self._observation.draws,
            self._observation.micro_batches[-1].count(stage.model),
        ):
            gradient = super().gradient(stage, batch)
        values = [None if value is None else value.clone() for value in gradient.values]
        self._pending.append(Gradient(gradient.loss, values))
        return gradient

    def after_step(self, stage: TrainingStage) -> None:
        with self._record("after_step", stage):
            super().after_step(stage)

    @contextmanager
    def observe_optimizer(self, stage: TrainingStage) -> Iterator[None]:
        """Record the gradients of every optimizer step inside the block."""

        def on_step(*args: Any) -> None:
            if self._pending:  # else it is a step of a nested training run
                gradients = [None if p.grad is None else p.grad.clone() for p in stage.trainable.values()]
                self._observation.steps.append((self._pending, gradients))
                self._pending = []

        handle = register_optimizer_step_pre_hook(on_step)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _record(self, hook: str, stage: TrainingStage) -> Iterator[None]:
        with (
            record_shared_draws(self._observation.shared_draws, hook),
            self._observation.draws,
            self._observation.outside_gradient[-1].count(stage.model),
        ):
            yield

    def _record_leftovers(self, hook: str, stage: TrainingStage) -> None:
        leftovers = self._observation.leftovers
        if hook not in leftovers and any(p.grad is not None for p in stage.trainable.values()):
            leftovers.append(hook)

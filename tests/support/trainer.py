"""Interruptions of a training run, and the comparison of two runs."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from harmbench_vaccine.plugins import Defense


class Stop:
    """Raises KeyboardInterrupt the n-th time that it is reached."""

    def __init__(self, after: int) -> None:
        self.left = after

    def reach(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def interrupting(defense: Defense, hook: str, count: int) -> Defense:
    """The defense, interrupted the `count`-th time that the hook is called."""
    stop, inner = Stop(count), type(defense)

    class Interrupted(inner):  # type: ignore[misc, valid-type]
        name: ClassVar[str] = inner.name

    def reached(self: Any, *args: Any) -> Any:
        stop.reach()
        return getattr(inner, hook)(self, *args)

    setattr(Interrupted, hook, reached)
    return Interrupted(**dict(defense))


def assert_same(one: tuple[dict[str, Tensor], Any], other: tuple[dict[str, Tensor], Any]) -> None:
    """Every bit of the weights and of the log."""
    assert one[0].keys() == other[0].keys()
    for name, value in one[0].items():
        assert torch.equal(value, other[0][name]), name
    assert one[1] == other[1]

"""Interruptions of a training run, and the comparison of two runs."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from harmbench_vaccine.plugins import Defense


class Stop:
    """A countdown that raises KeyboardInterrupt at the n-th call of `reach`."""

    def __init__(self, after: int) -> None:
        self.remaining = after

    def reach(self) -> None:
        self.remaining -= 1
        if self.remaining == 0:
            raise KeyboardInterrupt


def interrupting(defense: Defense, hook: str, count: int) -> Defense:
    """Return the defense with a hook that raises KeyboardInterrupt at its `count`-th call."""
    stop, inner = Stop(count), type(defense)

    class Interrupted(inner):  # type: ignore[misc, valid-type]
        name: ClassVar[str] = inner.name

    def stopping(self: Any, *args: Any) -> Any:
        stop.reach()
        return getattr(inner, hook)(self, *args)

    setattr(Interrupted, hook, stopping)
    return Interrupted(**dict(defense))


def assert_same(actual: tuple[dict[str, Tensor], Any], expected: tuple[dict[str, Tensor], Any]) -> None:
    """Compare the weights and the logs of two runs bit by bit."""
    assert actual[0].keys() == expected[0].keys()
    for name, value in actual[0].items():
        assert torch.equal(value, expected[0][name]), name
    assert actual[1] == expected[1]

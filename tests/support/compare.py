"""Comparisons of tensors, adapters and gradients, up to a tolerance or bit by bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from harmbench_vaccine.training.adapters import Adapter
from harmbench_vaccine.training.stage import Gradient


def close(actual: Any, expected: Any, tolerance: float = 1e-5) -> bool:
    """Compare tensors up to `tolerance` times the largest expected entry, in float64.

    Args:
        actual: A tensor, a gradient, or a nested sequence or mapping of tensors; None marks a missing gradient.
        expected: The same structure with the same shapes.
        tolerance: Largest difference, relative to the largest absolute entry of all expected tensors.
    """
    left, right = flatten(actual), flatten(expected)
    if left.keys() != right.keys():
        return False
    pairs = []
    for path, value in left.items():
        if value is None or right[path] is None:
            if value is not right[path]:
                return False
        elif value.shape != right[path].shape:
            return False
        else:
            pairs.append((value.detach().double(), right[path].detach().double()))
    largest = max(value.abs().max() for _, value in pairs)
    return all(bool((value - target).abs().max() <= tolerance * largest) for value, target in pairs)


def close_in_norm(actual: Gradient, expected: Sequence[Tensor], tolerance: float = 1e-5) -> bool:
    """Compare gradients: the norm of their difference is at most `tolerance` times the norm of the expected one."""
    gap = torch.stack([(a - b).norm() for a, b in zip(actual.values, expected, strict=True)]).norm()
    return bool(gap <= tolerance * torch.stack([b.norm() for b in expected]).norm())


def same(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Compare sequences of tensors bit by bit."""
    return all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def same_adapter(actual: Adapter, expected: Adapter) -> bool:
    """Compare the scales and all factors of two adapters bit by bit."""
    return actual.scale == expected.scale and all(
        torch.equal(left, right)
        for module in {*actual.factors, *expected.factors}
        for left, right in zip(actual.factors[module], expected.factors[module], strict=True)
    )


def flatten(values: Any, path: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], Any]:
    """Return the tensors (or None) of a nested structure by their path in it."""
    if values is None or isinstance(values, Tensor):
        return {path: values}
    if isinstance(values, Gradient):
        values = values.values
    items = values.items() if isinstance(values, Mapping) else enumerate(values)
    return {place: value for key, inner in items for place, value in flatten(inner, (*path, key)).items()}

"""The attributes that a plug-in keeps between its hooks: copies of their values, and the names of those that differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cached_property
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..base import Plugin


def copy_attributes(plugin: Plugin) -> dict[str, Any]:
    """Copy the parameters and the own attributes of a plug-in; attributes that the harness sets are not included.

    Returns:
        Attribute -> a copy of its value, in which an object without a value to compare is the name of its class.
    """
    values = {**vars(plugin), **(plugin.__pydantic_private__ or {})}
    return {
        name: _copy(value)
        for name, value in values.items()
        if name not in Plugin.__private_attributes__
        and not isinstance(getattr(type(plugin), name, None), cached_property)
    }


def differing_attributes(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Return the names of attributes whose copies differ, or that only one of two plug-ins has.

    A number equals a tensor with one entry, and numbers are compared as float32, because `state` returns tensors.
    """
    names = list(dict.fromkeys([*first, *second]))
    return [name for name in names if not (name in first and name in second and _equal(first[name], second[name]))]


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biuf":
        return torch.from_numpy(np.array(value))
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, Random):
        return repr(value.getstate())
    if isinstance(value, nn.Module):
        return _copy(value.state_dict())
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _copy(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copy(item) for item in value]
    if isinstance(value, set | frozenset):
        return frozenset(value)
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return value
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _equal(first: Any, second: Any) -> bool:
    numbers = _tensors(first, second)
    if numbers is not None:
        a, b = numbers
        return a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=1e-6, atol=0, equal_nan=True)
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_equal(item, second[key]) for key, item in first.items())
    if isinstance(first, Sequence) and isinstance(second, Sequence) and not isinstance(first, str | bytes):
        return len(first) == len(second) and all(map(_equal, first, second))
    return bool(first == second)


def _tensors(*values: Any) -> list[Tensor] | None:
    """Return values as tensors without dimensions of size 1, or None if one of them is not a number or a tensor."""
    if not all(isinstance(value, Tensor | bool | int | float) for value in values):
        return None
    return [torch.as_tensor(value).squeeze() for value in values]


def list_names(names: Sequence[str]) -> str:
    """Return names as text, at most three of them."""
    return ", ".join([*names[:3], *([f"{len(names) - 3} more"] if len(names) > 3 else [])])

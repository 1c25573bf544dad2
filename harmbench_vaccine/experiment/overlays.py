"""Overlays: protocol files that name another protocol as their `base` and have only the values that differ from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.strict_yaml import read_yaml
from harmbench_vaccine.data.text_files import read_text


def read_protocol_values(path: Path, find: Callable[[str], Path], above: tuple[Path, ...] = ()) -> Any:
    """Read the values of a protocol file, and those of its base where it has none.

    Mappings are merged at every depth, other values replace those of the base. `base` becomes the path of a file, or
    remains the name of a built-in protocol.

    Args:
        path: The file.
        find: Returns the file of a built-in protocol, or the file at a path.
        above: The overlays that lead to this file.

    Raises:
        BadInput: A file does not exist or cannot be read, or an overlay is its own base.
    """
    path = path.resolve()
    if path in above:
        raise BadInput(f"Protocol {path} is its own base{' through others' if len(above) > 1 else ''}.")
    values = read_yaml(read_text(path), f"Protocol {path}")
    if not (isinstance(values, dict) and isinstance(values.get("base"), str)):
        return values
    if is_protocol_file(values["base"]):
        values["base"] = str(path.parent / values["base"])  # an absolute path remains as it is
    return merged_values(read_protocol_values(find(values["base"]), find, (*above, path)), values)


def is_protocol_file(name: str) -> bool:
    """Return whether a protocol is named by its file."""
    return name.endswith((".yaml", ".yml"))


def merged_values(base: Any, overlay: Any) -> Any:
    """Return the values of an overlay, with those of its base where it has none."""
    if not (isinstance(base, Mapping) and isinstance(overlay, Mapping)):
        return overlay
    return {**base, **{key: merged_values(base.get(key), value) for key, value in overlay.items()}}

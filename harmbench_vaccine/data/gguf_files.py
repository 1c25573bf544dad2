"""GGUF files of llama.cpp: recognize them, check their header, and name the folder of their weights in the store."""

from __future__ import annotations

import struct
from importlib.metadata import version
from pathlib import Path
from typing import Any

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.hashing import content_hash
from harmbench_vaccine.core.paths import home
from harmbench_vaccine.core.store import Store

STAGE = "gguf"
"""The stage of dequantized files in the store."""
MODEL = "model"
"""The folder of the model inside the artifact of a dequantized file."""
_DEQUANTIZATION = 1
"""Increases whenever `inference.dequantization` writes another folder for the same file."""

_HEADER = struct.Struct("<4sIQQ")
"""Magic bytes, version, number of tensors, number of metadata values: the GGUF specification of ggml."""
_VERSIONS = (2, 3)
"""The versions with this header; version 1 has shorter numbers."""


def has_gguf_suffix(location: str | Path) -> bool:
    """Return whether a location ends like a GGUF file, whether or not it exists."""
    return str(location).lower().endswith(".gguf")


def is_gguf(path: Path) -> bool:
    """Return whether a path is a GGUF file, by its name."""
    return has_gguf_suffix(path) and path.is_file()


def dequantization_inputs(path: Path) -> dict[str, Any]:
    """Return everything that the dequantized folder of a GGUF file depends on.

    Raises:
        BadInput: The file cannot be read.
    """
    return {
        "file": content_hash(path),
        "dequantization": _DEQUANTIZATION,
        "transformers": version("transformers"),  # it reads the file
    }


def dequantized_artifact(path: Path) -> Path:
    """Return the artifact of a GGUF file in this user's store, which may not exist yet.

    Raises:
        BadInput: The file cannot be read.
    """
    return Store(home() / "store").path_of(STAGE, dequantization_inputs(path))


def count_tensors(path: Path) -> int:
    """Return the number of tensors that the header of a GGUF file names.

    Raises:
        BadInput: The file has no GGUF header, or a version that cannot be read.
    """
    try:
        with path.open("rb") as file:
            header = file.read(_HEADER.size)
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}.") from error
    if len(header) < _HEADER.size or not header.startswith(b"GGUF"):
        raise BadInput(f"{path} is not a GGUF file: it does not begin with the header of one. Download it again.")
    _, number, tensors, _ = _HEADER.unpack(header)
    if number not in _VERSIONS:
        raise BadInput(f"{path} has version {number} of GGUF; allowed: {' and '.join(map(str, _VERSIONS))}.")
    return int(tensors)

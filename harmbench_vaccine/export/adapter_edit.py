"""The request to edit an adapter, and the description of an edited one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class EditRequest:
    """The user's request to edit an adapter; None is a value that the adapter's configuration or the protocol gives."""

    defense: str
    """The defense, as a command line names it."""
    source: Path
    """The folder of the adapter."""
    aligned: Path | None = None
    """The folder of the alignment adapter that `source` contains; None: the base model is the aligned model."""
    protocol: str | None = None
    model: str | None = None
    task: str = "sst2"
    """The task whose settings of the user stage apply to training that the defense does."""
    seed: int = 0


@dataclass(frozen=True)
class AdapterEdit:
    """An edited adapter: what was done, and with which values."""

    folder: str
    defense: str
    params: dict[str, dict[str, Any]]
    """Defense -> parameter -> value."""
    source: str
    aligned: str | None
    base: str
    """Location of the base model."""
    dtype: str
    quantization: str
    protocol: str
    protocol_hash: str
    task: str
    seed: int
    rows: list[str]
    """Kinds of rows that the defense declares to read; empty: it reads no data."""
    data: dict[str, str]
    """Data set -> location, for the data that were read."""

    def data_text(self) -> str:
        """Return the rows that the defense read and their locations, or "none"."""
        return f"{', '.join(self.rows)}, from {', '.join(self.data.values())}" if self.rows else "none"

"""Checkpoints of a training stage: one folder each, with a manifest of file hashes that is written last."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from harmbench_vaccine.core import distributed
from harmbench_vaccine.core.disk_errors import ensure_space
from harmbench_vaccine.core.durable import read_sealed, seal
from harmbench_vaccine.core.progress import SILENT, Progress

MANIFEST = "whole"
"""The file that marks a whole checkpoint: the hash of every other file, and the number of ranks."""
_NAME = re.compile(r"checkpoint-(\d+)")
_COPIES = 3
"""Tensors of a checkpoint for every trainable parameter: its value and the two moments of AdamW."""


def finish_checkpoint(folder: Path) -> None:
    """Mark a checkpoint as whole, and remove the older ones of the stage."""
    seal(folder, MANIFEST, {"ranks": distributed.world_size()})
    for path in _checkpoints(folder.parent).values():
        if path != folder:
            _remove(path)


def newest_checkpoint(folder: Path, progress: Progress = SILENT, ranks: int = 1) -> str | None:
    """Return the newest whole checkpoint in a folder, and remove every other one.

    A checkpoint is removed with a note if a file of it changed or is missing, because training would fail or end with
    other weights, or if another number of ranks wrote it, because it lacks random states.

    Args:
        folder: The folder of the checkpoints.
        progress: Receives the notes.
        ranks: The number of ranks that will train.

    Raises:
        OSError: A checkpoint cannot be read.
    """
    newest = None
    for step, path in sorted(_checkpoints(folder).items(), reverse=True):
        if newest is None:
            problem = _problem(path, ranks)
            if not problem:
                newest = str(path)
                continue
            progress.note(f"{folder.name}: checkpoint {step} is {problem}; training starts without it")
        _remove(path)
    return newest


def save_state(state: Mapping[str, Tensor], path: Path, device: torch.device) -> None:
    """Store the state of a defense, and which of its tensors are on the CPU while the model is on another device."""
    on_cpu = {name: "cpu" for name, value in state.items() if value.device.type != device.type}
    save_file(dict(state), path, metadata=on_cpu or None)  # safetensors writes a broken file for {}


def load_state(path: Path, device: torch.device) -> dict[str, Tensor]:
    """Return a stored state: tensors that were on the device of the model are on `device`, the others on the CPU."""
    with safe_open(path, framework="pt") as file:
        on_cpu = file.metadata() or {}
        return {name: file.get_tensor(name).to("cpu" if name in on_cpu else device) for name in file.keys()}  # noqa: SIM118  # not iterable itself


def remove_incomplete(folder: Path) -> None:
    """Remove checkpoints that an interruption or a full disk left incomplete."""
    for path in _checkpoints(folder).values():
        if not (path / MANIFEST).exists():
            _remove(path)


def check_space(folder: Path, parameters: Iterable[Tensor], saves: int, title: str) -> None:
    """Check that the checkpoints of a stage fit on the disk: the newest two, while one replaces the other.

    Args:
        folder: The folder of the checkpoints, which is created; those that it has already count as free space.
        parameters: The trainable parameters.
        saves: The number of checkpoints that the stage writes.
        title: The stage, for the error message.

    Raises:
        HbvError: They do not fit.
    """
    size = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    folder.mkdir(parents=True, exist_ok=True)
    stored = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    ensure_space(folder, size * _COPIES * min(saves, 2) - stored, f"the {title} stage")


def _checkpoints(folder: Path) -> dict[int, Path]:
    """Return step -> checkpoint."""
    return {int(match[1]): path for path in folder.glob("*") if (match := _NAME.fullmatch(path.name))}


def _problem(path: Path, ranks: int) -> str:
    """Return why training cannot start from a checkpoint, or an empty text."""
    try:
        manifest = read_sealed(path, MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        return "incomplete"
    if manifest is None:
        return "damaged"
    stored = manifest["ranks"]
    return "" if stored == ranks else f"of {stored} ranks"


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)

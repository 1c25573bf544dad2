"""Checkpoints of a training stage: one folder each, with a manifest of file hashes that is written last."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from harmbench_vaccine.core import distributed
from harmbench_vaccine.core.durable import read_sealed, seal
from harmbench_vaccine.core.progress import SILENT, Progress

MANIFEST = "whole"
"""The file that marks a whole checkpoint: the hash of every other file, and the number of ranks."""
_NAME = re.compile(r"checkpoint-(\d+)")


def finish_checkpoint(folder: Path) -> None:
    """Mark a checkpoint as whole, and remove the older ones beside it."""
    seal(folder, MANIFEST, {"ranks": distributed.world_size()})
    for other in folder.parent.glob("checkpoint-*"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)


def newest_checkpoint(folder: Path, progress: Progress = SILENT) -> str | None:
    """Return the newest whole checkpoint in a folder, and remove every other one.

    A checkpoint whose files are not as they were written is named in a note: training from it would end with other
    weights, or never start. So is one of another number of ranks, which lacks random states.
    """
    remove_incomplete(folder)
    newest = None
    paths = {int(match[1]): path for path in folder.glob("*") if (match := _NAME.fullmatch(path.name))}
    for step in sorted(paths, reverse=True):
        if newest is None:
            manifest = read_sealed(paths[step], MANIFEST)
            if manifest is not None and manifest["ranks"] == distributed.world_size():
                newest = str(paths[step])
                continue
            reason = "is damaged" if manifest is None else f"is of {manifest['ranks']} ranks"
            progress.note(f"{paths[step].parent.name}: checkpoint {step} {reason}; training starts without it")
        shutil.rmtree(paths[step], ignore_errors=True)
    return newest


def remove_incomplete(folder: Path) -> None:
    """Remove checkpoints that a killed process or a full disk left incomplete."""
    for path in folder.glob("checkpoint-*"):
        if not (path / MANIFEST).exists():
            shutil.rmtree(path, ignore_errors=True)

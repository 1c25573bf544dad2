"""Content-addressed artifacts: the key of an artifact is the hash of everything that it depends on.

An artifact is written to a temporary folder, flushed to the disk and renamed when it is complete, so that a crash or a
power cut leaves either no artifact or a complete one. Its description has the hash of every file: a damaged artifact is
noticed and created again. A file lock, which the kernel releases when a process dies, keeps two processes from creating
the same artifact; checkpoints of unfinished work are stored in a separate folder and survive both.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import Timeout

from . import distributed
from .disk_errors import readable_disk_errors
from .durable import flush, read_sealed, seal, write_atomically
from .errors import HbvError
from .hashing import digest
from .locks import shared_lock
from .progress import SILENT, Progress
from .store_use import ArtifactUse

META = "artifact.json"
"""The description of an artifact, inside its folder."""
ASIDE, WORK, LOCKS = ".aside", ".work", ".locks"
"""Folders of unfinished artifacts, of their checkpoints, and of the locks of both."""
_SECONDS = ".seconds"
"""File next to the checkpoints: the time of the interrupted attempts."""


@dataclass(frozen=True)
class Artifact:
    """A finished folder of the store."""

    stage: str
    key: str
    path: Path
    seconds: float
    """Time that its creation took, with that of interrupted attempts whose checkpoints it used."""
    cached: bool
    """True if it existed before this call."""

    def json(self, name: str) -> Any:
        """Read a JSON file of the artifact."""
        return json.loads((self.path / name).read_text(encoding="utf-8"))


def _earlier_seconds(checkpoints: Path) -> float:
    """Return the time of the interrupted attempts that wrote these checkpoints."""
    try:
        return float((checkpoints / _SECONDS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0.0


def _record_seconds(checkpoints: Path, seconds: float) -> None:
    """Write down the time of an interrupted attempt, if the next one has something to resume from."""
    with suppress(OSError):
        if any(path.name != _SECONDS for path in checkpoints.iterdir()):
            write_atomically(checkpoints / _SECONDS, f"{seconds:.3f}")


class Store:
    """Artifacts below one folder: `<root>/<stage>/<key>/`."""

    def __init__(self, root: Path, progress: Progress = SILENT) -> None:
        self.root = root
        self.progress = progress
        self._is_tidy = False
        self.use = ArtifactUse(root)
        """Marks of the artifacts that this object returned, until it is deleted."""

    def path_of(self, stage: str, inputs: Mapping[str, Any]) -> Path:
        """Return the folder of the artifact that depends on `inputs`, whether or not it exists."""
        return self.root / stage / _key(stage, inputs)

    def get_or_create(
        self, stage: str, inputs: Mapping[str, Any], create: Callable[[Path, Path], None], *, all_ranks: bool = False
    ) -> Artifact:
        """Return the artifact that depends on `inputs`; `create(folder, checkpoints)` writes it if it does not exist.

        All ranks call this function with the same arguments. Rank 0 creates the artifact, alone or with the others, and
        the others then read it.

        Args:
            stage: The name of the stage, the first level of folders below the root.
            inputs: Everything that the artifact depends on, as plain JSON.
            create: Writes the artifact into `folder`. Files in `checkpoints` survive an interruption, so that the
                next attempt can resume from them; they are deleted when the artifact is complete.
            all_ranks: Whether all ranks call `create`, or only rank 0.

        Raises:
            HbvError: The disk is full, or a file of the store cannot be read or written.
        """
        key = _key(stage, inputs)
        final = self.root / stage / key
        if distributed.rank():
            return self._get_on_other_rank(Artifact(stage, key, final, 0.0, cached=True), create if all_ranks else None)
        self.use.mark(f"{stage}/{key}")
        self._remove_abandoned()
        if artifact := self._finished(stage, key, final):
            distributed.broadcast(True)
            return artifact
        with self.locked(stage, key):
            if artifact := self._finished(stage, key, final):  # another process created it while this one waited
                distributed.broadcast(True)
                return artifact
            distributed.broadcast(False)
            folder, checkpoints = self.root / ASIDE / f"{stage}-{key}", self.root / WORK / f"{stage}-{key}"
            shutil.rmtree(folder, ignore_errors=True)
            start = time.monotonic() - _earlier_seconds(checkpoints)
            try:
                with readable_disk_errors(f"the {stage} stage", self.root):
                    folder.mkdir(parents=True)
                    checkpoints.mkdir(parents=True, exist_ok=True)
                    with nullcontext() if all_ranks else distributed.single_process():
                        create(folder, checkpoints)
                    seconds = time.monotonic() - start
                    description = {
                        "stage": stage,
                        "key": key,
                        "created": datetime.now(UTC).isoformat(timespec="microseconds"),
                        "seconds": round(seconds, 3),
                        "inputs": inputs,
                    }
                    seal(folder, META, description)
                    final.parent.mkdir(parents=True, exist_ok=True)
                    shutil.rmtree(final, ignore_errors=True)  # exists only if it failed the check
                    os.rename(folder, final)
                    flush(final.parent)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                _record_seconds(checkpoints, time.monotonic() - start)
                raise
            shutil.rmtree(checkpoints, ignore_errors=True)
            distributed.barrier()
            return Artifact(stage, key, final, seconds, cached=False)

    def descriptions(self, stage: str) -> Iterator[dict[str, Any]]:
        """Yield the description of every artifact of a stage: `key`, `created`, `seconds`, `inputs`, `files`."""
        for path in sorted((self.root / stage).glob(f"*/{META}")):
            with suppress(OSError, ValueError):
                yield json.loads(path.read_text(encoding="utf-8"))

    def _get_on_other_rank(self, artifact: Artifact, create: Callable[[Path, Path], None] | None) -> Artifact:
        """Run `create` on a rank other than 0 if all ranks do, and return the artifact that rank 0 published."""
        name = f"{artifact.stage}-{artifact.key}"
        if not distributed.receive():
            if create:
                scratch = self.root / ASIDE / f"{name}-rank{distributed.rank()}"
                try:
                    scratch.mkdir(parents=True, exist_ok=True)
                    create(scratch, self.root / WORK / name)
                finally:
                    shutil.rmtree(scratch, ignore_errors=True)
            distributed.barrier()
        published = self._finished(artifact.stage, artifact.key, artifact.path)
        if published is None:
            raise HbvError(
                f"Rank {distributed.rank()} does not find {artifact.path}: set the same HBV_HOME on all ranks."
            )
        return published

    def _finished(self, stage: str, key: str, path: Path) -> Artifact | None:
        """Return the artifact if it exists and all of its files are as they were stored.

        Raises:
            HbvError: The artifact cannot be read, for example one of another user.
        """
        with readable_disk_errors(f"the {stage} stage", self.root):
            try:
                description = intact_description(stage, path)
            except FileNotFoundError:
                return None
        if description is None:
            self.progress.note(f"{stage} {key}: the artifact is damaged and is created again")
            return None
        return Artifact(stage, key, path, float(description["seconds"]), cached=True)

    def _remove_abandoned(self) -> None:
        """Remove, once, the leftovers of killed processes: unfinished artifacts, and checkpoints of finished ones.

        The lock of a living process is taken, on whatever host it runs, so its folders stay.
        """
        if self._is_tidy:
            return
        self._is_tidy = True
        for folder in [*(self.root / ASIDE).glob("*"), *(self.root / WORK).glob("*")]:
            stage, key = stage_and_key(folder)
            is_needed = folder.parent.name == WORK and not (self.root / stage / key / META).exists()
            if stage and not is_needed:
                with suppress(Timeout, HbvError), self.locked(stage, key, wait=False):
                    shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def locked(self, stage: str, key: str, *, wait: bool = True) -> Iterator[None]:
        """Hold the lock of an artifact inside the block.

        Raises:
            Timeout: `wait` is false, and another process has the lock.
        """
        with readable_disk_errors("the store", self.root):
            (self.root / LOCKS).mkdir(parents=True, exist_ok=True)
            lock = shared_lock(self.root / LOCKS / f"{stage}-{key}")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                if not wait:
                    raise
                self.progress.note(f"{stage}: another process is creating it; waiting")
                lock.acquire()
        try:
            yield
        finally:
            if (self.root / stage / key / META).exists():  # whoever waits for this file finds the artifact finished
                Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()


def _key(stage: str, inputs: Mapping[str, Any]) -> str:
    return digest({"stage": stage, "inputs": inputs})


def stage_and_key(unfinished: Path) -> tuple[str, str]:
    """Return the stage and the key in the name of a folder of unfinished work; the stage is empty for other folders."""
    stage, _, key = unfinished.name.partition("-rank")[0].rpartition("-")
    return stage, key


def intact_description(stage: str, path: Path) -> dict[str, Any] | None:
    """Return the description of an artifact, or None if it is damaged.

    Raises:
        FileNotFoundError: The artifact does not exist.
        OSError: A file cannot be read.
    """
    try:
        description = read_sealed(path, META)
    except FileNotFoundError:
        if not path.exists():
            raise
        return None
    is_intact = description is not None and _key(stage, description["inputs"]) == path.name
    return description if is_intact else None

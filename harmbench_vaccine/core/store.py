"""Content-addressed artifacts: an artifact's address is the hash of everything that it depends on.

A maker writes into a folder aside, which is renamed into place when it is whole, so that a crash leaves either nothing
or a whole artifact. A lock that the kernel gives back when its process dies keeps two processes from making the same
thing; checkpoints of unfinished work lie in a folder of their own and outlive both.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import distributed
from .errors import HbvError
from .hashing import digest
from .jsonl import write_atomically
from .progress import SILENT, Progress

META = "artifact.json"


@dataclass(frozen=True)
class Artifact:
    """A finished folder of the store."""

    stage: str
    key: str
    path: Path
    seconds: float
    """How long it took to make."""
    cached: bool
    """It was there before this call."""

    def json(self, name: str) -> Any:
        """The JSON file of that name inside the artifact."""
        return json.loads((self.path / name).read_text(encoding="utf-8"))


class Store:
    """Artifacts below one folder: `<root>/<stage>/<key>/`."""

    def __init__(self, root: Path, progress: Progress = SILENT) -> None:
        self.root = root
        self.progress = progress

    def make(
        self, stage: str, inputs: Mapping[str, Any], maker: Callable[[Path, Path], None], *, together: bool = False
    ) -> Artifact:
        """The artifact that depends on `inputs`, made by `maker(folder, checkpoints)` if it is not there yet.

        `inputs` is plain JSON. What `maker` leaves in `checkpoints` is there again when the same stage is tried again
        after an interruption, and is deleted when the artifact is whole.

        Several ranks come here at the same place: rank 0 makes the artifact, alone or `together` with the others, and
        they read it.

        Raises:
            HbvError: the disk is full.
        """
        key = digest({"stage": stage, "inputs": inputs})
        final = self.root / stage / key
        if distributed.rank():
            return self._beside(Artifact(stage, key, final, 0.0, cached=True), maker if together else None)
        if artifact := self._finished(stage, key, final):
            distributed.broadcast(True)
            return artifact
        with self._locked(stage, key):
            if artifact := self._finished(stage, key, final):  # another process made it while this one waited
                distributed.broadcast(True)
                return artifact
            distributed.broadcast(False)
            aside, checkpoints = self.root / ".aside" / f"{stage}-{key}", self.root / ".work" / f"{stage}-{key}"
            shutil.rmtree(aside, ignore_errors=True)
            start = time.monotonic()
            try:
                with readable_disk_errors(f"the {stage} stage"):
                    aside.mkdir(parents=True)
                    checkpoints.mkdir(parents=True, exist_ok=True)
                    with nullcontext() if together else distributed.single_process():
                        maker(aside, checkpoints)
                    seconds = time.monotonic() - start
                    meta = {
                        "stage": stage,
                        "key": key,
                        "seconds": round(seconds, 3),
                        "inputs": inputs,
                        "files": _sums(aside),
                    }
                    write_atomically(aside / META, json.dumps(meta, indent=1, ensure_ascii=False))
                    final.parent.mkdir(parents=True, exist_ok=True)
                    shutil.rmtree(final, ignore_errors=True)  # there only if it failed the check
                    os.rename(aside, final)
            except BaseException:
                shutil.rmtree(aside, ignore_errors=True)
                raise
            shutil.rmtree(checkpoints, ignore_errors=True)
            distributed.barrier()
            return Artifact(stage, key, final, seconds, cached=False)

    def _beside(self, asked: Artifact, maker: Callable[[Path, Path], None] | None) -> Artifact:
        """What the ranks after 0 do: make the same where all make it together, and read what rank 0 published."""
        name = f"{asked.stage}-{asked.key}"
        if not distributed.receive():
            if maker:
                scratch = self.root / ".aside" / f"{name}-rank{distributed.rank()}"
                try:
                    scratch.mkdir(parents=True, exist_ok=True)
                    maker(scratch, self.root / ".work" / name)
                finally:
                    shutil.rmtree(scratch, ignore_errors=True)
            distributed.barrier()
        artifact = self._finished(asked.stage, asked.key, asked.path)
        if artifact is None:
            raise HbvError(
                f"Rank {distributed.rank()} finds no {asked.path}: all ranks need one folder for their artifacts."
            )
        return artifact

    def _finished(self, stage: str, key: str, path: Path) -> Artifact | None:
        try:
            meta = json.loads((path / META).read_text(encoding="utf-8"))
            whole, seconds = _sums(path) == meta["files"], float(meta["seconds"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            self.progress.note(f"{stage} {key}: its files are not those that were stored; making it again")
            return None
        return Artifact(stage, key, path, seconds, cached=True)

    @contextmanager
    def _locked(self, stage: str, key: str) -> Iterator[None]:
        from filelock import FileLock, Timeout

        folder = self.root / ".locks"
        with readable_disk_errors("the store"):
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / f"{stage}-{key}")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                self.progress.note(f"{stage}: another process is making it; waiting")
                lock.acquire()
        try:
            yield
        finally:
            lock.release()


def _sums(folder: Path) -> dict[str, str]:
    """File -> SHA-256, for every file of an artifact but its own description."""
    sums = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != META:
            with path.open("rb") as file:
                sums[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file grew over the size limit",
}


@contextmanager
def readable_disk_errors(what: str) -> Iterator[None]:
    """Tells a full disk in one sentence, whichever library met it."""
    try:
        yield
    except Exception as error:
        code = _disk_error(error)
        if code is None:
            raise
        raise HbvError(
            f"While writing {what}, {_FULL[code]}; finished stages are kept, nothing half-written is left."
        ) from error


def _disk_error(error: BaseException | None) -> int | None:
    """safetensors and torch wrap the system's error in their own, with its number or only a phrase in the text."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return error.errno
        for code in _FULL:
            if f"os error {code}" in str(error).lower():
                return code
        if "PytorchStreamWriter failed" in str(error) or "unexpected pos" in str(error):
            return errno.ENOSPC
        error = error.__cause__ or error.__context__
    return None

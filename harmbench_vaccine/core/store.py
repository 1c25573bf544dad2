"""Content-addressed artifacts: the key of an artifact is the hash of everything that it depends on.

An artifact is written to a temporary folder and renamed when it is complete, so that a crash leaves either no artifact
or a complete one. A file lock, which the kernel releases when a process dies, keeps two processes from creating the
same artifact; checkpoints of unfinished work are stored in a separate folder and survive both.
"""

from __future__ import annotations

import errno
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

from . import distributed
from .errors import HbvError
from .hashing import digest, sha256
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
    """Time that its creation took."""
    cached: bool
    """True if it existed before this call."""

    def json(self, name: str) -> Any:
        """Read a JSON file of the artifact."""
        return json.loads((self.path / name).read_text(encoding="utf-8"))


class Store:
    """Artifacts below one folder: `<root>/<stage>/<key>/`."""

    def __init__(self, root: Path, progress: Progress = SILENT) -> None:
        self.root = root
        self.progress = progress

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
            HbvError: The disk is full.
        """
        key = _key(stage, inputs)
        final = self.root / stage / key
        if distributed.rank():
            return self._get_on_other_rank(Artifact(stage, key, final, 0.0, cached=True), create if all_ranks else None)
        if artifact := self._finished(stage, key, final):
            distributed.broadcast(True)
            return artifact
        with self._locked(stage, key):
            if artifact := self._finished(stage, key, final):  # another process created it while this one waited
                distributed.broadcast(True)
                return artifact
            distributed.broadcast(False)
            folder, checkpoints = self.root / ".aside" / f"{stage}-{key}", self.root / ".work" / f"{stage}-{key}"
            shutil.rmtree(folder, ignore_errors=True)
            start = time.monotonic()
            try:
                with readable_disk_errors(f"the {stage} stage"):
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
                        "files": _file_hashes(folder),
                    }
                    write_atomically(folder / META, json.dumps(description, indent=1, ensure_ascii=False))
                    final.parent.mkdir(parents=True, exist_ok=True)
                    shutil.rmtree(final, ignore_errors=True)  # exists only if it failed the check
                    os.rename(folder, final)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
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
                scratch = self.root / ".aside" / f"{name}-rank{distributed.rank()}"
                try:
                    scratch.mkdir(parents=True, exist_ok=True)
                    create(scratch, self.root / ".work" / name)
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
        try:
            description = json.loads((path / META).read_text(encoding="utf-8"))
            intact, seconds = _file_hashes(path) == description["files"], float(description["seconds"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            intact = False
        if not intact:
            self.progress.note(f"{stage} {key}: the artifact is damaged and is created again")
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
                self.progress.note(f"{stage}: another process is creating it; waiting")
                lock.acquire()
        try:
            yield
        finally:
            lock.release()


def _key(stage: str, inputs: Mapping[str, Any]) -> str:
    return digest({"stage": stage, "inputs": inputs})


def _file_hashes(folder: Path) -> dict[str, str]:
    """Return file -> SHA-256 for every file of an artifact except its own description."""
    return {
        path.relative_to(folder).as_posix(): sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != META
    }


_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file grew over the size limit",
}


@contextmanager
def readable_disk_errors(content: str) -> Iterator[None]:
    """Translate a full-disk error of any library into a one-line error.

    Args:
        content: Description of the files that the block writes, for the error message.
    """
    try:
        yield
    except Exception as error:
        code = _disk_error(error)
        if code is None:
            raise
        raise HbvError(
            f"While writing {content}, {_FULL[code]}. Finished stages are kept, and no partial file remains. "
            "Free space or raise the limit, then repeat the command."
        ) from error


def _disk_error(error: BaseException | None) -> int | None:
    """Return the code of a full-disk error, also if safetensors or torch wraps it with its number or only a phrase."""
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

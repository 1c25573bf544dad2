"""List, check and remove what a store contains, while other processes may use it."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import Timeout

from .disk_errors import readable_disk_errors
from .store import ASIDE, LOCKS, META, WORK, Store, intact_description, stage_and_key


@dataclass(frozen=True)
class StoredArtifact:
    """A folder of the store, as it is listed; its files are not checked."""

    stage: str
    key: str
    path: Path
    created: datetime
    inputs: dict[str, Any] | None
    """Everything that it depends on; None where its description cannot be read."""
    is_linked: bool
    """True if its files are outside the store, where a symbolic link leads."""

    @property
    def name(self) -> str:
        """Return `stage/key`, which is unique in the store."""
        return f"{self.stage}/{self.key}"


@dataclass(frozen=True)
class UnfinishedWork:
    """A folder of an artifact that is not complete: its files, or the checkpoints of its training."""

    stage: str
    key: str
    path: Path
    modified: datetime
    """Time of the newest change in it."""

    @property
    def has_checkpoints(self) -> bool:
        """True for checkpoints, from which the next attempt resumes."""
        return self.path.parent.name == WORK


def list_artifacts(root: Path) -> list[StoredArtifact]:
    """List the artifacts of a store, also damaged ones, by stage and key.

    Args:
        root: The folder of the store.

    Raises:
        HbvError: A folder cannot be read.
    """
    real_root = root.resolve()
    with readable_disk_errors("the store", root):
        paths = [
            path
            for folder in sorted(root.glob("[!.]*"))
            if folder.is_dir()
            for path in sorted(folder.iterdir())
            if path.is_dir() or path.is_symlink()
        ]
        return [artifact for path in paths if (artifact := _read_artifact(path, real_root))]


def list_unfinished(store: Store) -> list[UnfinishedWork]:
    """List the folders of unfinished artifacts that no process works on."""
    return [
        UnfinishedWork(stage, key, path, modified)
        for path in sorted([*(store.root / ASIDE).glob("*"), *(store.root / WORK).glob("*")])
        for stage, key in [stage_and_key(path)]
        if stage and not _is_locked(store, stage, key) and (modified := _newest_change(path))
    ]


def is_intact(artifact: StoredArtifact) -> bool:
    """Return whether the key and every file of an artifact are as they were stored.

    Raises:
        OSError: A file cannot be read, so that nothing is known about it.
    """
    try:
        return intact_description(artifact.stage, artifact.path) is not None
    except FileNotFoundError:
        return not os.path.lexists(artifact.path)  # another process removed it


@dataclass(frozen=True)
class Removal:
    """The removal of artifacts from a store, while no process begins to use one."""

    store: Store
    trash: Path
    in_use: set[str]
    """The artifacts that running processes use, as `stage/key`."""

    def remove(self, artifact: StoredArtifact) -> bool:
        """Move an artifact into the trash, or return False if it is in use or another process creates it."""
        if artifact.name not in self.in_use:
            with suppress(Timeout), self.store.locked(artifact.stage, artifact.key, wait=False):
                self.trash.mkdir(parents=True, exist_ok=True)
                os.rename(artifact.path, self.trash / f"{artifact.stage}-{artifact.key}")
                return True
        return False


@contextmanager
def removal(store: Store) -> Iterator[Removal]:
    """Remove artifacts inside the block; they are deleted after it.

    Other processes wait inside the block before they use another artifact, so it should be short. If this process is
    killed, the next command completes the deletion.

    Raises:
        HbvError: The store cannot be written to.
    """
    token = secrets.token_hex(10)
    trash = store.root / ASIDE / f"removed-{token}"
    with readable_disk_errors("the store", store.root), store.locked("removed", token):
        with store.use.frozen():
            yield Removal(store, trash, store.use.marked())
        shutil.rmtree(trash, ignore_errors=True)
    (store.root / LOCKS / f"removed-{token}").unlink(missing_ok=True)


def remove_unfinished(store: Store, work: UnfinishedWork) -> bool:
    """Delete the folder of an unfinished artifact, or return False if a process works on it."""
    with suppress(Timeout), store.locked(work.stage, work.key, wait=False):
        shutil.rmtree(work.path, ignore_errors=True)
        return True
    return False


# ---------------------------------------------------------------------------------------------------------------------


def _read_artifact(path: Path, root: Path) -> StoredArtifact | None:
    """Return an artifact of the store whose real path is `root`; None if another process removed it."""
    created, inputs = None, None
    with suppress(OSError, ValueError, KeyError, TypeError):
        description = json.loads((path / META).read_text(encoding="utf-8"))
        inputs = dict(description["inputs"])
        created = datetime.fromisoformat(description["created"]).astimezone(UTC)
    if created is None:
        try:
            created = datetime.fromtimestamp(path.lstat().st_mtime, UTC)
        except FileNotFoundError:
            return None
    is_linked = path.resolve() != root / path.parent.name / path.name
    return StoredArtifact(path.parent.name, path.name, path, created, inputs, is_linked)


def _is_locked(store: Store, stage: str, key: str) -> bool:
    if not (store.root / LOCKS / f"{stage}-{key}").exists():
        return False
    try:
        with store.locked(stage, key, wait=False):
            return False
    except Timeout:
        return True


def _newest_change(folder: Path) -> datetime | None:
    """Return the time of the newest change in a folder; None if another process removed it."""
    times = []
    for path in (folder, *folder.rglob("*")):
        with suppress(FileNotFoundError):
            times.append(path.lstat().st_mtime)
    return datetime.fromtimestamp(max(times), UTC) if times else None

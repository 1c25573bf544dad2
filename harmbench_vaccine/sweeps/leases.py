"""Leases: which worker, on whatever host, creates an artifact of the store.

A lease is a file that its worker creates exclusively with its content, by a hard link, which is atomic also on NFS.
The worker renews it by touching it. A lease that was not renewed for some minutes has expired, and another worker takes
it over by creating the file of the next generation; the highest generation counts. All times are those of the file
server, because the clocks of the hosts differ. On its own host, a worker also notices at once that the holder of a
lease no longer runs.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from harmbench_vaccine.core.disk_errors import readable_disk_errors

EXPIRY = 300.0
"""Seconds without renewal after which a lease has expired."""
RENEWAL = EXPIRY / 10
"""Seconds between two renewals."""
_FOLDER = ".leases"
_TAKEN = "taken"
"""The time of the file server at which the holder took a lease, in its file."""


@dataclass(frozen=True)
class Holder:
    """The worker that has a lease."""

    host: str
    pid: int
    started: float
    """Start of the process, in seconds of its host: another process may get the same id later."""
    job: str = ""
    """Job id of the cluster's scheduler; empty elsewhere."""

    @property
    def name(self) -> str:
        """Host and process, for messages."""
        return f"{self.host} process {self.pid}" + (f" job {self.job}" if self.job else "")

    def has_ended(self) -> bool:
        """Return whether the process is known to have ended; that of another host is not known."""
        if self.host != socket.gethostname():
            return False
        import psutil

        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) > 1
        except psutil.NoSuchProcess:
            return True


def current_holder(environment: Mapping[str, str] = os.environ) -> Holder:
    """Return this process as a holder of leases."""
    import psutil

    job = environment.get("SLURM_JOB_ID", "")
    if job and (index := environment.get("SLURM_ARRAY_TASK_ID")):
        job = f"{environment.get('SLURM_ARRAY_JOB_ID', job)}_{index}"
    return Holder(socket.gethostname(), os.getpid(), psutil.Process().create_time(), job)


@dataclass(frozen=True)
class Lease:
    """The newest lease of an artifact."""

    name: str
    """The artifact as `stage-key`."""
    generation: int
    holder: Holder | None
    """None if the file is damaged."""
    age: float
    """Seconds since the last renewal."""
    held: float = 0.0
    """Seconds since the holder took it."""

    def is_valid(self, expiry: float = EXPIRY) -> bool:
        """Return whether other workers must leave the artifact to the holder."""
        return self.age < expiry and not (self.holder and self.holder.has_ended())


class Leases:
    """The leases of one store."""

    def __init__(self, store: Path, *, expiry: float = EXPIRY) -> None:
        """Open the leases.

        Args:
            store: The folder of the store.
            expiry: Seconds without renewal after which a lease has expired.
        """
        self._folder = store / _FOLDER
        self._expiry = expiry
        self._holder = current_holder()

    def take(self, name: str) -> int:
        """Take the lease of an artifact, if no other worker has a valid one.

        Returns:
            The generation of the lease, at least 1; 0 if another worker has it.
        """
        with readable_disk_errors("the lease", self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            newest = self.newest(name)
            if newest and newest.is_valid(self._expiry):
                return 0
            generation = newest.generation + 1 if newest else 1
            return generation if self._create(self._path(name, generation)) else 0

    @contextmanager
    def renewed(self, name: str, generation: int) -> Iterator[None]:
        """Renew a lease in a thread inside the block, and remove it with its earlier generations after the block."""
        path, ended = self._path(name, generation), threading.Event()

        def renew() -> None:
            while not ended.wait(min(RENEWAL, self._expiry / 10)):
                with suppress(OSError):  # tried again at the next renewal
                    os.utime(path)  # without a time: that of the file server

        thread = threading.Thread(target=renew, name=f"lease {name}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            for number in range(1, generation + 1):
                self._path(name, number).unlink(missing_ok=True)

    def newest(self, name: str) -> Lease | None:
        """Return the lease with the highest generation of an artifact, valid or not."""
        return self._read([path for path in self._files() if path.stem == name])

    def all(self) -> dict[str, Lease]:
        """Return the newest lease of every artifact, valid or not."""
        groups: dict[str, list[Path]] = {}
        for path in self._files():
            groups.setdefault(path.stem, []).append(path)
        return {name: lease for name, paths in groups.items() if (lease := self._read(paths))}

    def remove_abandoned(self) -> int:
        """Remove the files of ended workers: leases that are not valid, and temporary files of that age.

        Returns:
            The number of removed leases.
        """
        abandoned = [lease for lease in self.all().values() if not lease.is_valid(self._expiry)]
        for lease in abandoned:
            for number in range(1, lease.generation + 1):
                self._path(lease.name, number).unlink(missing_ok=True)
        for path in self._folder.glob(".*"):
            with suppress(OSError):
                if self._server_time() - path.stat().st_mtime > self._expiry:
                    path.unlink()
        return len(abandoned)

    def _create(self, path: Path) -> bool:
        """Create a lease with this holder, and return whether no other worker was faster."""
        draft = self._folder / f".draft-{self._holder.host}-{self._holder.pid}-{secrets.token_hex(4)}"
        draft.write_text(json.dumps({**asdict(self._holder), _TAKEN: self._server_time()}), encoding="utf-8")
        try:
            with suppress(FileExistsError):  # also where only the answer of the file server was lost
                os.link(draft, path)
            return draft.stat().st_nlink == 2
        finally:
            draft.unlink()

    def _files(self) -> list[Path]:
        """List the folder; opening it makes an NFS client ask the server for its present content."""
        try:
            return [self._folder / entry for entry in os.listdir(self._folder) if not entry.startswith(".")]
        except FileNotFoundError:
            return []

    def _read(self, paths: list[Path]) -> Lease | None:
        for path in sorted(paths, key=_generation, reverse=True):
            try:
                renewed = path.stat().st_mtime
                text = path.read_text(encoding="utf-8")
            except FileNotFoundError:  # removed meanwhile
                continue
            now = self._server_time()
            holder, taken = None, renewed
            with suppress(ValueError, TypeError, AttributeError):
                values = json.loads(text)
                taken = float(values.pop(_TAKEN, renewed))
                holder = Holder(**values)
            return Lease(path.stem, _generation(path), holder, now - renewed, now - taken)
        return None

    def _server_time(self) -> float:
        """Return the time of the file server; that of this host if the user may only read."""
        probe = self._folder / f".clock-{self._holder.host}-{self._holder.pid}"
        try:
            probe.touch()
            return probe.stat().st_mtime
        except PermissionError:
            return time.time()
        finally:
            with suppress(OSError):
                probe.unlink()

    def _path(self, name: str, generation: int) -> Path:
        return self._folder / f"{name}.{generation}"


def _generation(path: Path) -> int:
    suffix = path.suffix[1:]
    return int(suffix) if suffix.isdecimal() else 0

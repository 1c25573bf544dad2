"""The store as the queue of a sweep: a worker creates an artifact only with its lease."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import Timeout

from harmbench_vaccine.core.disk_errors import DiskFull
from harmbench_vaccine.core.progress import SILENT, Progress
from harmbench_vaccine.core.store import Artifact, Store
from harmbench_vaccine.evaluation.sweep_registry import registered_sweeps

from .failures import Failures, StageParked, failure_reason
from .leases import EXPIRY, Leases, current_holder


class StageUnavailable(Exception):
    """A stage that this worker does not run now."""


class StageBusy(StageUnavailable):
    """Another process creates the artifact; the run goes on later."""


class StageTooLong(StageUnavailable):
    """The stage does not fit into the remaining time of this worker."""


class SharedStore(Store):
    """A store that several workers fill at the same time."""

    def __init__(
        self,
        root: Path,
        progress: Progress = SILENT,
        *,
        fits: Callable[[str], bool] = lambda stage: True,
        expiry: float = EXPIRY,
    ) -> None:
        """Open a store.

        Args:
            root: The folder of the store.
            progress: Receives notes.
            fits: Whether a stage of this kind fits into the remaining time of the worker.
            expiry: Seconds without renewal after which a lease has expired.
        """
        super().__init__(root, progress)
        self._leases, self._failures = Leases(root, expiry=expiry), Failures(root)
        self._fits = fits

    def get_or_create(
        self, stage: str, inputs: Mapping[str, Any], create: Callable[[Path, Path], None], *, all_ranks: bool = False
    ) -> Artifact:
        """Return the artifact as `Store` does, but never wait for another process.

        Raises:
            StageBusy: Another worker, or another command, creates it.
            StageParked: It failed too often.
            StageTooLong: It does not fit into the remaining time.
            DiskFull: The disk is full.
        """
        path = self.path_of(stage, inputs)
        name = f"{stage}-{path.name}"
        if artifact := self._finished(stage, path.name, path):
            self.use.mark(f"{stage}/{path.name}")
            return artifact
        failure = self._failures.of(name)
        if failure and failure.is_parked:
            raise StageParked(failure)
        if not self._fits(stage):
            raise StageTooLong(name)
        generation = self._leases.take(name)
        if not generation:
            raise StageBusy(name)
        with self._leases.renewed(name, generation):
            try:
                artifact = super().get_or_create(stage, inputs, create, all_ranks=all_ranks)
            except (StageUnavailable, StageParked, DiskFull):  # also of another stage that it needs; not its failure
                raise
            except Exception as error:
                self._failures.record(name, failure_reason(error), current_holder().name)
                raise
            self._failures.forget(name)
            return artifact

    @contextmanager
    def locked(self, stage: str, key: str, *, wait: bool = True) -> Iterator[None]:
        """Hold the lock of an artifact inside the block.

        Raises:
            StageBusy: Another process has the lock, such as `hbv run`, which takes no lease.
            Timeout: The same, if `wait` is false.
        """
        with ExitStack() as block:
            try:
                block.enter_context(super().locked(stage, key, wait=False))
            except Timeout as error:
                if not wait:
                    raise
                raise StageBusy(f"{stage}-{key}") from error
            yield


def remove_worker_files(root: Path) -> None:
    """Remove the leases of ended workers, and the failures of stages that no unfinished sweep needs.

    Args:
        root: The folder of the store.
    """
    needed = {
        name.replace("/", "-")
        for sweep in registered_sweeps(root).values()
        if sweep.unfinished
        for name in sweep.artifacts
    }
    Leases(root).remove_abandoned()
    Failures(root).forget_all_except(needed)

"""The store as the queue of a sweep: a worker creates an artifact only with its lease."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from harmbench_vaccine.core.progress import SILENT, Progress
from harmbench_vaccine.core.store import Artifact, Store

from .failures import Failures, StageParked
from .leases import EXPIRY, Leases, current_holder


class StageBusy(Exception):
    """Another worker creates the artifact; the run goes on later."""


class StageTooLong(Exception):
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
        """Return the artifact as `Store` does, but never wait for another worker.

        Raises:
            StageBusy: Another worker creates it.
            StageParked: It failed too often.
            StageTooLong: It does not fit into the remaining time.
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
            except Exception as error:
                self._failures.record(name, f"{type(error).__name__}: {error}", current_holder().name)
                raise
            self._failures.forget(name)
            return artifact

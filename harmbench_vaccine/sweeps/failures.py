"""Failed stages of a sweep: after a number of attempts a stage is parked, so that the other runs go on."""

from __future__ import annotations

import json
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from harmbench_vaccine.core.durable import write_atomically
from harmbench_vaccine.core.errors import HbvError

ATTEMPTS = 3
"""Attempts after which a failing stage is parked."""
_FOLDER = ".failed"


@dataclass(frozen=True)
class Failure:
    """A stage that failed."""

    name: str
    """The artifact as `stage-key`."""
    attempts: int
    reason: str
    """The last error, on one line."""
    worker: str
    """The worker of the last attempt."""

    @property
    def is_parked(self) -> bool:
        """Return whether no worker tries it again."""
        return self.attempts >= ATTEMPTS


def failure_reason(error: Exception) -> str:
    """Return the message of an error, with its type unless it is written for users."""
    return str(error) if isinstance(error, HbvError) else f"{type(error).__name__}: {error}"


class StageParked(HbvError):
    """A run needs a stage that failed too often."""

    def __init__(self, failure: Failure) -> None:
        """Describe the failure."""
        super().__init__(f"{failure.name} failed {failure.attempts} times, last on {failure.worker}: {failure.reason}")
        self.failure = failure


class Failures:
    """The failures of one store. Only the holder of a stage's lease records its failures."""

    def __init__(self, store: Path) -> None:
        """Open the failures of a store."""
        self._folder = store / _FOLDER

    def record(self, name: str, reason: str, worker: str) -> Failure:
        """Record a failed attempt."""
        earlier = self.of(name)
        failure = Failure(name, earlier.attempts + 1 if earlier else 1, " ".join(reason.split()), worker)
        self._folder.mkdir(parents=True, exist_ok=True)
        values = {"attempts": failure.attempts, "reason": failure.reason, "worker": worker}
        write_atomically(self._folder / name, json.dumps(values))
        return failure

    def of(self, name: str) -> Failure | None:
        """Return the failure of a stage, or None if it has not failed."""
        with suppress(OSError, ValueError, TypeError):
            return Failure(name, **json.loads((self._folder / name).read_text(encoding="utf-8")))
        return None

    def all(self) -> list[Failure]:
        """Return all failures."""
        names = sorted(path.name for path in self._folder.glob("[!.]*"))
        return [failure for name in names if (failure := self.of(name))]

    def forget(self, name: str) -> None:
        """Remove the failures of a stage, so that it is tried again."""
        (self._folder / name).unlink(missing_ok=True)

    def forget_all_except(self, names: Collection[str]) -> int:
        """Remove the failures of all other stages, and return their number."""
        others = [failure.name for failure in self.all() if failure.name not in names]
        for name in others:
            self.forget(name)
        return len(others)

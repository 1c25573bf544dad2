"""The remaining time of a command, estimated from its finished stages, and a store that reports it."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from .progress import Advance, Progress, format_duration
from .store import Artifact, Store


class StageClock:
    """Estimates the remaining time of a list of stages.

    A stage is expected to take as long as the finished stages of its kind, such as `align` or `answer`, took on
    average: those of this command, and the stored ones that it reuses. As long as no stage of some kind is finished,
    only a lower limit is known.
    """

    def __init__(self, artifacts: Iterable[Artifact]) -> None:
        """Prepare the clock.

        Args:
            artifacts: The artifacts of all stages; those that are not `cached` remain to be created.
        """
        self._seconds: dict[str, list[float]] = defaultdict(list)  # kind -> times of finished stages
        self._remaining: dict[str, str] = {}  # key -> kind
        for artifact in artifacts:
            if artifact.cached:
                self._seconds[artifact.stage].append(artifact.seconds)
            else:
                self._remaining[artifact.key] = artifact.stage

    def __len__(self) -> int:
        """Return the number of remaining stages."""
        return len(self._remaining)

    def finish(self, artifact: Artifact) -> bool:
        """Remove a finished stage from the remaining ones, and return whether it was one of them."""
        if self._remaining.pop(artifact.key, None) is None:
            return False
        self._seconds[artifact.stage].append(artifact.seconds)
        return True

    def estimate(self) -> tuple[str, float]:
        """Estimate the remaining time.

        Returns:
            A text such as "over 2 h left" if only a lower limit is known, and the seconds, which are then infinite. The
            limit leaves out one stage, which may be about to end.
        """
        counts = Counter(self._remaining.values())
        known = {kind: fmean(self._seconds[kind]) for kind in counts if self._seconds[kind]}
        seconds = sum(counts[kind] * mean for kind, mean in known.items())
        if len(known) == len(counts):
            return "", seconds
        limit = seconds - max(known.values(), default=0.0)
        return (f"over {format_duration(limit)} left" if limit >= 1 else ""), math.inf


class ReportingStore(Store):
    """A store that advances a bar over the stages of several runs."""

    def __init__(self, root: Path, progress: Progress, clock: StageClock, advance: Advance) -> None:
        """Open a store.

        Args:
            root: The folder of the store.
            progress: Receives the notes, and in verbose mode the reused stages.
            clock: The remaining stages.
            advance: Advances the bar of the remaining stages.
        """
        super().__init__(root, progress)
        self._clock, self._advance = clock, advance
        self._reused: set[str] = set()
        self._created: dict[str, Artifact] = {}
        self._replayed: dict[str, Artifact] = {}
        advance(0, *clock.estimate())

    def get_or_create(
        self, stage: str, inputs: Mapping[str, Any], create: Callable[[Path, Path], None], *, all_ranks: bool = False
    ) -> Artifact:
        """Return the artifact as `Store` does, and report it."""
        artifact = super().get_or_create(stage, inputs, create, all_ranks=all_ranks)
        if artifact.key in self._replayed:
            return self._replayed.pop(artifact.key)
        if not artifact.cached:
            self._created[artifact.key] = artifact
        if self._clock.finish(artifact):
            self._advance(1, *self._clock.estimate())
        elif artifact.cached and artifact.key not in self._reused:
            self._reused.add(artifact.key)
            self.progress.detail(f"{stage} {artifact.key}: reused")
        return artifact

    def replay(self) -> None:
        """Return the artifacts that were created until now as new ones, to the runs that use them next."""
        self._replayed, self._created = self._created, {}

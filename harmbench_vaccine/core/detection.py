"""Precision, recall and F1 of a detector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Detection:
    """Counts of what a detector flags and of what it should flag."""

    hits: int
    """Positive items that are flagged."""
    flagged: int
    """Flagged items."""
    positives: int
    """Items that should be flagged."""

    @classmethod
    def count(cls, flags: Sequence[bool], labels: Sequence[bool]) -> Detection:
        """Count the flags of items against their labels, which have the same order."""
        hits = sum(flag and label for flag, label in zip(flags, labels, strict=True))
        return cls(hits, sum(flags), sum(labels))

    @property
    def precision(self) -> float | None:
        """Share of the flagged items that are positive, from 0 to 1; None if nothing is flagged."""
        return self.hits / self.flagged if self.flagged else None

    @property
    def recall(self) -> float | None:
        """Share of the positive items that are flagged, from 0 to 1; None if nothing is positive."""
        return self.hits / self.positives if self.positives else None

    @property
    def f1(self) -> float | None:
        """Harmonic mean of precision and recall, from 0 to 1; None if nothing is flagged and nothing is positive."""
        total = self.flagged + self.positives
        return 2 * self.hits / total if total else None

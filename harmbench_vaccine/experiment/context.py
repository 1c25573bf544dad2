"""The objects that all runs of one process share."""

from __future__ import annotations

from dataclasses import dataclass, replace

from harmbench_vaccine.core.progress import SILENT, Labeled, Progress
from harmbench_vaccine.core.store import Store
from harmbench_vaccine.inference.model_pool import ModelPool
from harmbench_vaccine.training.trackers import Tracker


@dataclass(frozen=True)
class RunContext:
    """The store, the loaded models and the progress display."""

    store: Store
    models: ModelPool
    progress: Progress = SILENT
    save_share: float = 0.1
    """Share of the steps of a training stage between two checkpoints."""
    trackers: tuple[Tracker, ...] = ()
    """Where the steps of the training stages are reported."""

    def labeled(self, label: str) -> RunContext:
        """Return this context with a label on the title of each bar."""
        return replace(self, progress=Labeled(self.progress, label))

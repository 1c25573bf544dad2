"""A run context for tests: a store, a pool of models and progress that records its notes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harmbench_vaccine.core.progress import SILENT, Progress, Silent
from harmbench_vaccine.core.store import Store
from harmbench_vaccine.experiment.context import RunContext
from harmbench_vaccine.inference.model_pool import ModelPool


def run_context(folder: Path, progress: Progress = SILENT, **options: Any) -> RunContext:
    """Return a context with a store below `folder`; `options` are those of `ModelPool`."""
    return RunContext(Store(folder, progress), ModelPool(progress, **options), progress)


class Notes(Silent):
    """A progress display that records its notes."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)

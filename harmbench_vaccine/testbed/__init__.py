"""The embedded testbed: generated text, a small model trained on it, and a judge, built on first use.

The testbed consists of ordinary Hugging Face folders and JSONL files in the schemas of the real data sets. No other
code treats them in a special way.
"""

from __future__ import annotations

from pathlib import Path

from harmbench_vaccine.core.paths import ensure_writable, home
from harmbench_vaccine.core.progress import SILENT, Progress
from harmbench_vaccine.core.store import Artifact, Store
from harmbench_vaccine.data.sources import TESTBED_VERSION


def ensure_testbed(progress: Progress = SILENT) -> Artifact:
    """Return the testbed, and build it if this user has none of this version (one to three minutes on two cores)."""

    def create(folder: Path, checkpoints: Path) -> None:
        from .build import build_testbed  # imports torch and transformers

        build_testbed(folder, progress)

    store = Store(ensure_writable(home(), "The cache folder") / "store", progress)
    return store.get_or_create("testbed", {"version": TESTBED_VERSION}, create)

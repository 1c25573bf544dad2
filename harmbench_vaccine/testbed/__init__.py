"""The embedded testbed: a synthetic world, a small model that knows it, and a judge, made on first use.

What it builds are ordinary Hugging Face folders and JSONL files in the schemas of the real data sets; nothing else in
the package knows that they are small.
"""

from __future__ import annotations

from pathlib import Path

from harmbench_vaccine.core.paths import ensure_writable, home
from harmbench_vaccine.core.progress import SILENT, Progress
from harmbench_vaccine.core.store import Artifact, Store

VERSION = 1
"""Counts up whenever the world, the base model or the judge changes."""


def ensure_testbed(progress: Progress = SILENT) -> Artifact:
    """The testbed, built if this user has none of this version yet (one to two minutes on two cores)."""
    from .build import build_testbed as fill

    store = Store(ensure_writable(home(), "The cache folder") / "store", progress)
    return store.make(
        "testbed", {"version": VERSION}, lambda testbed_folder, checkpoints: fill(testbed_folder, progress)
    )


PARTS = ("model", "judge", *(f"data/{name}" for name in ("beavertails", "beavertails_refusals", "alpaca")))
PARTS += tuple(f"data/{name}" for name in ("sst2", "ag_news", "gsm8k"))
"""What a location `testbed:PART` may name."""

_built: dict[Path, Path] = {}


def testbed_folder() -> Path:
    """Where the testbed lies; it is built on first use."""
    if home() not in _built:
        _built[home()] = ensure_testbed().path
    return _built[home()]

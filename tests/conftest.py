"""Fixtures of every test: its own home, a small world, a home with the testbed."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set HBV_HOME to a folder of the test, so that no test reads or writes the user's cache."""
    home = tmp_path / "home"
    monkeypatch.setenv("HBV_HOME", str(home))
    return home


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The protocol file of a small world that no test changes."""
    from support.world import make_world  # after the environment is set: it imports transformers

    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def testbed_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home for all slow tests, also of parallel processes: the store builds the testbed once."""
    folder = tmp_path_factory.getbasetemp()
    return (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "testbed" / "home"


@pytest.fixture(autouse=True, scope="module")
def small_garbage() -> None:
    """Exclude the objects of imported libraries from garbage collection, which the trainer runs after every stage."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the longest file, so that two processes finish at about the same time."""
    items.sort(key=lambda item: item.path.name != "test_testbed_report.py")

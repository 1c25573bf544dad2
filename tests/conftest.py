"""Fixtures of every test: its own home, a small world, a home with the testbed."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from harmbench_vaccine.core.library_settings import set_library_defaults

set_library_defaults()  # before a test imports torch
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["COLUMNS"] = "170"  # tables have all their columns, whatever the terminal


def pytest_configure(config: pytest.Config) -> None:
    """Run models on the CPU, also on a machine with a GPU, unless HBV_TEST_DEVICE is `cuda` or `simulated`.

    It is set before a test module is imported, because some create models. `simulated`: see `support.simulated_gpu`.
    """
    name = os.environ.get("HBV_TEST_DEVICE", "cpu")
    if name not in ("cpu", "cuda", "simulated"):
        raise pytest.UsageError(f"HBV_TEST_DEVICE is {name!r}; allowed: cpu, cuda, simulated.")
    os.environ["HBV_DEVICE"] = "cpu" if name == "cpu" else "cuda"
    if name == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise pytest.UsageError("HBV_TEST_DEVICE is 'cuda', but no GPU is available.")
        torch.cuda.init()  # it would see no GPU after a test that hides them from its process
    if name == "simulated":
        from support.simulated_gpu import simulated_gpu

        simulation = ExitStack()
        simulation.enter_context(simulated_gpu())
        config.add_cleanup(simulation.close)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape lone surrogates in captured output: pytest-xdist sends it as UTF-8, and stops at the first one."""
    report = yield
    report.sections = [
        (title, text.encode("utf-8", "backslashreplace").decode("utf-8")) for title, text in report.sections
    ]
    return report


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set HBV_HOME to a folder of the test, so that no test reads or writes the user's cache."""
    home = tmp_path / "home"
    monkeypatch.setenv("HBV_HOME", str(home))
    return home


@pytest.fixture(autouse=True)
def own_device() -> Iterator[None]:
    """Restore the choice of a device, which a command stores in the environment of its process."""
    names = ("HBV_DEVICE", "CUDA_VISIBLE_DEVICES")
    before = {name: os.environ.get(name) for name in names}
    yield
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.fixture(autouse=True)
def own_interrupts() -> Iterator[None]:
    """Handle Ctrl-C also where a shell started the tests in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


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
    """Start with the longest file, so that two processes finish at about the same time; skip numbers of the CPU."""
    items.sort(key=lambda item: item.path.name != "test_testbed_report.py")
    if os.environ["HBV_DEVICE"] != "cpu":
        for item in items:
            if item.get_closest_marker("cpu_numbers"):
                item.add_marker(pytest.mark.skip(reason="compares with stored numbers of the CPU"))

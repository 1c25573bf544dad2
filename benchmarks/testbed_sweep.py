"""Run `hbv sweep` on the testbed in a new home, and read the time of its stages, for other benchmarks."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from sweep_kills import copy_testbed

from harmbench_vaccine.core.paths import home
from harmbench_vaccine.core.progress import Terminal
from harmbench_vaccine.testbed import ensure_testbed

HBV = (sys.executable, "-m", "harmbench_vaccine")


@dataclass(frozen=True)
class Times:
    """Times of a command with all of its processes, in seconds."""

    wall: float
    cpu: float


@contextmanager
def testbed_home() -> Iterator[Path]:
    """Yield a temporary home that has only the testbed, which HBV_HOME stores and which is built if it is missing."""
    with Terminal() as progress:
        ensure_testbed(progress)
    with TemporaryDirectory(prefix="hbv-benchmark-") as folder:
        copy_testbed(home(), Path(folder))
        yield Path(folder)


def write_suite(
    folder: Path, defenses: Sequence[str], attacks: Sequence[str], values: Mapping[str, Any], seeds: int = 1
) -> Path:
    """Write a suite of the testbed's protocol with some of its values replaced."""
    suite = {
        "name": "benchmark",
        "title": "A benchmark",
        "defenses": list(defenses),
        "attacks": list(attacks),
        "seeds": list(range(seeds)),
        "set": dict(values),
    }
    file = folder / "benchmark.yaml"
    file.write_text(yaml.safe_dump(suite, sort_keys=False), encoding="utf-8")
    return file


def sweep(suite: Path, folder: Path, *options: str) -> Times:
    """Run a sweep whose home is `folder`, to its end."""
    environment = {**os.environ, "HBV_HOME": str(folder)}
    wall, cpu = time.perf_counter(), _cpu_of_children()
    command = [*HBV, "sweep", str(suite), "--quiet", *options]
    process = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(f"The sweep ended with exit code {process.returncode}:\n{process.stderr}")
    return Times(time.perf_counter() - wall, _cpu_of_children() - cpu)


def stage_seconds(folder: Path) -> dict[str, float]:
    """Return the seconds that all artifacts of a home took to create: kind of stage -> sum; without the testbed."""
    seconds: dict[str, float] = defaultdict(float)
    for path in (folder / "store").glob("[!.]*/*/artifact.json"):
        if path.parent.parent.name != "testbed":
            seconds[path.parent.parent.name] += json.loads(path.read_text(encoding="utf-8"))["seconds"]
    return dict(seconds)


def _cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime

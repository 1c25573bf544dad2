"""Time `hbv run --dry-run` next to the import of torch in the same environment: median seconds and their ratio.

    python benchmarks/dry_run.py

Every call is a new process. Calls of all commands take turns, so that other work on the machine slows all of them. With
everything stored, a plan needs no model: it should take little longer than the import of torch, which defenses import.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
REPEATS = 5
BASELINE = "import torch"


def median_seconds(cases: Mapping[str, tuple[Sequence[str], Mapping[str, str]]]) -> dict[str, float]:
    """Return name -> median wall time of a command and its environment, in seconds."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(REPEATS):
        for name, (command, environment) in cases.items():
            start = time.perf_counter()
            subprocess.run(command, env=environment, check=True, capture_output=True)
            times[name].append(time.perf_counter() - start)
    return {name: median(seconds) for name, seconds in times.items()}


def main() -> None:
    """Print the times and their ratios."""
    with tempfile.TemporaryDirectory() as folder:
        stored = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HBV_HOME": f"{folder}/stored",
            "PYTHONPATH": str(ROOT / "tests"),
        }
        empty = {**stored, "HBV_HOME": f"{folder}/empty", "HF_HOME": f"{folder}/hub"}
        make_world = [sys.executable, "-m", "support.world", f"{folder}/world"]
        world = subprocess.run(make_world, env=stored, check=True, capture_output=True, text=True).stdout.strip()
        hbv = [sys.executable, "-m", "harmbench_vaccine", "run", "--defense", "vaccine"]
        run, paper = [*hbv, "--protocol", world], [*hbv, "--protocol", "vaccine-paper"]
        subprocess.run(run, env=stored, check=True, capture_output=True)
        cases = {
            BASELINE: ([sys.executable, "-c", "import torch"], stored),
            "dry run, everything stored": ([*run, "--dry-run"], stored),
            "run, everything stored": (run, stored),
            "dry run, no stage stored": ([*run, "--dry-run"], empty),
            "dry run, no model or data, --on": ([*paper, "--dry-run", "--on", "h200-141gb"], empty),
        }
        seconds = median_seconds(cases)
    print(f"{'median of ' + str(REPEATS):32} {'seconds':>8} {'ratio to ' + BASELINE:>21}")
    for name, value in seconds.items():
        print(f"{name:32} {value:8.2f} {value / seconds[BASELINE]:21.2f}")


if __name__ == "__main__":
    main()

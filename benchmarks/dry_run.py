"""Time `hbv run --dry-run` where everything is stored, next to the same `hbv run` and to the import of torch alone.

    python benchmarks/dry_run.py

A plan needs no model: it should take little longer than the import of torch, which defenses import.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
REPEATS = 5


def fastest(command: list[str], environment: dict[str, str]) -> float:
    """Return the wall time of the fastest of several calls, in seconds."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        subprocess.run(command, env=environment, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """Print the times and their ratios."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "HBV_HOME": folder, "PYTHONPATH": str(ROOT / "tests")}
        make_world = [sys.executable, "-m", "support.world", f"{folder}/world"]
        world = subprocess.run(make_world, env=environment, check=True, capture_output=True, text=True).stdout.strip()
        run = [sys.executable, "-m", "harmbench_vaccine", "run", "--protocol", world, "--defense", "vaccine"]
        subprocess.run(run, env=environment, check=True, capture_output=True)
        dry_run, whole = fastest([*run, "--dry-run"], environment), fastest(run, environment)
        torch = fastest([sys.executable, "-c", "import torch"], environment)
    print(f"import torch {torch:.2f} s, dry run {dry_run:.2f} s, run {whole:.2f} s, everything stored")
    print(f"dry run / import torch: {dry_run / torch:.2f}; dry run / run: {dry_run / whole:.2f}")


if __name__ == "__main__":
    main()

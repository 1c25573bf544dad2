"""Kill `hbv sweep` again and again at random moments, resume it until it is complete, and check what it made.

    python benchmarks/sweep_kills.py SUITE --home HBV_HOME --kills 50 --workers 3 --table results.csv
    python benchmarks/sweep_kills.py SUITE --home HBV_HOME --kills 50 --executor ray --table results.csv

The sweep runs in a new home, into which only the built testbed of HBV_HOME is copied. SIGKILL ends the command, its
workers and the processes of Ray at the same moment, as a power cut does. The exit code is 1 if a stage was made more
than once or not at all, if the table differs from that of `--table`, or if the sweep was complete before the last kill:
then lower `--longest`, the time between two kills.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import psutil

_POLL = 0.2
"""Seconds between two looks at the store."""
_HBV = [sys.executable, "-m", "harmbench_vaccine"]


@dataclass
class StageLog:
    """Every stage that a store has had, with the times at which it was made."""

    store: Path
    creations: dict[str, set[str]] = field(default_factory=dict)
    """Stage and key -> the times in its descriptions: more than one if the stage was made again."""
    _read: dict[Path, int] = field(default_factory=dict)

    def look(self) -> None:
        """Read the descriptions that are new or were written again."""
        for path in self.store.glob("[!.]*/*/artifact.json"):
            with suppress(FileNotFoundError):
                version = path.stat().st_mtime_ns
                if self._read.get(path) != version:
                    created = json.loads(path.read_text(encoding="utf-8"))["created"]
                    self.creations.setdefault(f"{path.parent.parent.name}/{path.parent.name}", set()).add(created)
                    self._read[path] = version


@dataclass(frozen=True)
class SweepCommand:
    """The command and its home."""

    command: Sequence[str]
    home: Path

    @property
    def environment(self) -> dict[str, str]:
        """Return the variables of the command, by which its processes are found."""
        return {**os.environ, "HBV_HOME": str(self.home)}

    def start(self) -> subprocess.Popen[bytes]:
        """Start the command; its output goes into `sweep.log` of the home."""
        with (self.home / "sweep.log").open("ab") as log:
            return subprocess.Popen(
                self.command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def kill(self) -> None:
        """Kill the command and every process that it started, also those in other process groups."""
        while processes := self._processes():
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(processes, timeout=10)

    def _processes(self) -> list[psutil.Process]:
        return [process for process in psutil.process_iter() if self._owns(process)]

    def _owns(self, process: psutil.Process) -> bool:
        with suppress(psutil.Error):
            is_alive = process.status() != psutil.STATUS_ZOMBIE
            return is_alive and process.environ().get("HBV_HOME") == str(self.home)
        return False

    def stage_count(self) -> int:
        """Return the number of stages of all runs."""
        command = [*_HBV, "sweep", self.command[len(_HBV) + 1], "--status", "--json"]
        state = subprocess.run(command, env=self.environment, check=True, capture_output=True).stdout
        return sum(kind["total"] for kind in json.loads(state)["stages"].values())


def watch(process: subprocess.Popen[bytes], log: StageLog, seconds: float) -> bool:
    """Wait for the end of the command, at most so many seconds; return whether it has ended."""
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        log.look()
        time.sleep(_POLL)
    log.look()
    return process.returncode is not None


def run(sweep: SweepCommand, log: StageLog, kills: int, longest: float, draw: random.Random) -> int:
    """Run a sweep to its end with random kills, and return their number."""
    for number in range(kills):
        start = time.monotonic()
        if watch(process := sweep.start(), log, draw.uniform(0, longest)):
            _check_exit(process, sweep)
            return number
        sweep.kill()
        process.wait()
        print(f"kill {number + 1} after {time.monotonic() - start:.1f} s, {len(log.creations)} stages", flush=True)
    watch(process := sweep.start(), log, float("inf"))
    _check_exit(process, sweep)
    return kills


def _check_exit(process: subprocess.Popen[bytes], sweep: SweepCommand) -> None:
    if process.returncode:
        sys.exit(f"The sweep ended with exit code {process.returncode}; see {sweep.home}/sweep.log.")


def copy_testbed(source: Path, home: Path) -> None:
    """Copy the built testbed of a home, without any result."""
    if (testbed := source / "store" / "testbed").is_dir():
        shutil.copytree(testbed, home / "store" / "testbed")


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("suite", help="a name of hbv list suites, or a YAML file")
    parser.add_argument("--home", type=Path, help="home with a built testbed")
    parser.add_argument("--table", type=Path, help="results.csv of the same suite, with which the table is compared")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--longest", type=float, default=60.0, help="longest time between two kills, in seconds")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--executor", choices=["local", "ray"], default="local")
    return parser.parse_args()


def main() -> int:
    """Run the sweep, print what was made, and return the exit code."""
    options = parse_arguments()
    home = Path(tempfile.mkdtemp(prefix="sweep-kills-"))
    if options.home:
        copy_testbed(options.home, home)
    command = [*_HBV, "sweep", options.suite, "--workers", str(options.workers), "--out", str(home / "out")]
    sweep = SweepCommand([*command, "--executor", options.executor], home)
    log = StageLog(home / "store")
    start = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        kills = run(sweep, log, options.kills, options.longest, random.Random(options.seed))
    finally:
        sweep.kill()
    seconds = time.monotonic() - start
    stages = [name for name in log.creations if not name.startswith("testbed/")]
    repeated = sorted(name for name, times in log.creations.items() if len(times) > 1)
    planned = sweep.stage_count()
    table = (home / "out" / "results.csv").read_bytes()
    differs = bool(options.table) and options.table.read_bytes() != table
    print(f"{kills} of {options.kills} kills, {seconds:.0f} s, home {home}")
    print(f"{len(stages)} of {planned} stages made, {len(repeated)} more than once: {', '.join(repeated) or 'none'}")
    print(f"table: SHA-256 {sha256(table).hexdigest()[:16]}, {'differs' if differs else 'same'}" * bool(options.table))
    return int(kills < options.kills or bool(repeated) or len(stages) != planned or differs)


if __name__ == "__main__":
    sys.exit(main())

"""Time the start of commands that train nothing, next to the import of torch in the same environment.

    python benchmarks/start_up.py                      # a small world in a temporary folder
    python benchmarks/start_up.py --testbed --record   # the testbed in $HBV_HOME, which is built if it is missing

Every call is a new process. Calls of all commands take turns, so that other work on the machine slows all of them. With
everything stored, a command reads rows, artifacts and results, and needs no model: it should take less time than the
import of torch. The modules of the package are compiled before the first round, as by an installer.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import click

ROOT = Path(__file__).parents[1]
BASELINE = "import torch"
LISTS = ("defenses", "attacks", "tasks", "scorers", "protocols", "models", "suites", "runs")
SUITE = "testbed-vaccine-table1"

Environment = Mapping[str, str]


class Case(NamedTuple):
    """A command, its environment, and the time in seconds that it should not exceed, if there is one."""

    command: Sequence[str]
    environment: Environment
    goal: float | None = None


class Times(NamedTuple):
    """Medians over all rounds, in seconds."""

    wall: float
    cpu: float
    ratio: float
    """Median of the ratios of CPU time to that of the import of torch in the same round."""


def measure(cases: Mapping[str, Case], rounds: int) -> dict[str, Times]:
    """Return name -> times, from rounds that start every command once; a first round does not count."""
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, case in cases.items():
            times = _run(case)
            if number:
                samples[name].append(times)
    baseline = [cpu for _, cpu in samples[BASELINE]]
    return {
        name: Times(
            median(wall for wall, _ in times),
            median(cpu for _, cpu in times),
            median(cpu / other for (_, cpu), other in zip(times, baseline, strict=True)),
        )
        for name, times in samples.items()
    }


def _run(case: Case) -> tuple[float, float]:
    """Return the wall time and the CPU time of a command, in seconds."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(case.command, env=case.environment, check=True, capture_output=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def make_cases(folder: Path, testbed: bool) -> dict[str, Case]:
    """Store two runs, and return the commands to time.

    Args:
        folder: A folder for the small world and the compiled modules.
        testbed: Whether to use the testbed in the user's home instead of the small world.
    """
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"},
        "PYTHONPYCACHEPREFIX": str(folder / "compiled"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "HF_HUB_OFFLINE": "1",
    }
    stored = environment if testbed else {**environment, "HBV_HOME": str(folder / "home")}
    empty = {**environment, "HBV_HOME": str(folder / "empty"), "HF_HOME": str(folder / "hub")}
    hbv = [sys.executable, "-m", "harmbench_vaccine"]
    run = [*hbv, "run", "--defense", "sft", "--defense", "vaccine", "--attack", "ratio=0.1"]
    if not testbed:
        make_world = [sys.executable, "-m", "support.world", str(folder / "world")]
        world = subprocess.run(make_world, env=stored, check=True, capture_output=True, text=True).stdout.strip()
        run += ["--protocol", world]
    ids = subprocess.run(
        [*run, "--json"], env=stored, check=True, stdout=subprocess.PIPE, text=True
    ).stdout.splitlines()
    first, second = (line.partition('"run": "')[2].partition('"')[0] for line in ids)
    paper = [*hbv, "run", "--protocol", "vaccine-paper", "--defense", "vaccine"]
    cases = {
        BASELINE: Case([sys.executable, "-c", BASELINE], stored),
        **{f"list {name}": Case([*hbv, "list", name], stored, 0.3) for name in LISTS},
        "run, everything stored": Case(run, stored, 1.5),
        "dry run, everything stored": Case([*run, "--dry-run"], stored, 2),
        "show": Case([*hbv, "show", first], stored),
        "compare": Case([*hbv, "compare", first, second], stored),
        "verify --cached": Case([*hbv, "verify", first, "--cached"], stored),
        "leaderboard": Case([*hbv, "leaderboard"], stored),
        "dry run, no model or data, --on": Case([*paper, "--dry-run", "--on", "h200-141gb"], empty),
    }
    if testbed:
        cases["sweep --plan of 180 runs"] = Case([*hbv, "sweep", SUITE, "--plan"], stored, 5)
    return cases


@click.command()
@click.option("--testbed", is_flag=True, help="Use the testbed in $HBV_HOME, and store two runs there.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Number of timed rounds.")
@click.option("--record", "is_recorded", is_flag=True, help="Write the figures to benchmarks/results/.")
def main(testbed: bool, rounds: int, is_recorded: bool) -> None:
    """Print the times, their ratios and their goals."""
    with tempfile.TemporaryDirectory() as folder:
        cases = make_cases(Path(folder), testbed)
        times = measure(cases, rounds)
    print(f"{'median of ' + str(rounds):32} {'seconds':>8} {'of CPU':>8} {'ratio to ' + BASELINE:>21} {'goal':>6}")
    for name, (wall, cpu, ratio) in times.items():
        goal = cases[name].goal
        print(f"{name:32} {wall:8.2f} {cpu:8.2f} {ratio:21.2f} {f'{goal:.1f} s' if goal else '':>6}")
    if is_recorded:
        from recording import record

        figures = {name: {**value._asdict(), "goal": cases[name].goal} for name, value in times.items()}
        print(record(f"start-up{'-testbed' if testbed else ''}", figures))


if __name__ == "__main__":
    main()

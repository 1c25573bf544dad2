"""Compare the time of a sweep with the time of its stages, each of which is created once.

    python benchmarks/sweep_overhead.py
    python benchmarks/sweep_overhead.py --steps 1 --record    # all steps of the testbed's protocol

The stages are training, answers, verdicts and drift, as their artifacts record them, with the time to load models. The
ratio is workers x wall time / stages. It also has the start of the processes, the settling of runs, the records, and
the time in which a worker waits for a stage of another one. The last column is the same sweep with everything stored.
"""

from __future__ import annotations

import shutil
from typing import Any

import click
from testbed_sweep import stage_seconds, sweep, testbed_home, write_suite

GOAL = 1.15
DEFENSES, ATTACKS = ("sft", "vaccine"), ("ratio=0.1,0.2",)


@click.command()
@click.option("--steps", type=click.FloatRange(0, 1, min_open=True), default=0.2, help="Share of the training steps.")
@click.option("--record", "is_recorded", is_flag=True, help="Write the figures to benchmarks/results/.")
def main(steps: float, is_recorded: bool) -> None:
    """Print the time of a sweep with one and with two workers, that of its stages, and their ratio."""
    epochs = {"align.settings.epochs": 3 * steps, "finetune.settings.epochs": 4 * steps}
    print(f"{'workers':>7} {'wall':>8} {'stages':>8} {'ratio':>6} {'all stored':>11}   goal {GOAL}")
    figures: list[dict[str, Any]] = []
    for workers in (1, 2):
        with testbed_home() as home:
            suite = write_suite(home, DEFENSES, ATTACKS, epochs)
            times = sweep(suite, home, "--workers", str(workers))
            stages = stage_seconds(home)
            shutil.rmtree(home / "runs")  # a sweep with all results starts no worker
            stored = sweep(suite, home, "--workers", str(workers))
        total = sum(stages.values())
        ratio = workers * times.wall / total
        print(f"{workers:>7} {times.wall:>6.1f} s {total:>6.1f} s {ratio:>6.2f} {stored.wall:>9.1f} s", flush=True)
        print("        " + ", ".join(f"{kind} {seconds:.1f}" for kind, seconds in sorted(stages.items())), flush=True)
        figures.append({"workers": workers, "ratio": ratio, "wall_s": times.wall, "cpu_s": times.cpu})
        figures[-1] |= {"stages_s": stages, "stored_wall_s": stored.wall, "stored_cpu_s": stored.cpu}
    if is_recorded:
        from recording import record

        print(record("sweep-overhead", {"goal": GOAL, "steps": steps, "sweeps": figures}))


if __name__ == "__main__":
    main()

"""Measure how time grows with cells, training rows, prompts, layers and length, and fit lines.

    python benchmarks/growth.py
    python benchmarks/growth.py --rounds 7 --record    # also draws docs/images/growth.svg

Cells are runs of the testbed with few rows and prompts: `sft` under attacks of different ratios, which share the
aligned model. The other models have random weights: their time depends on shapes only. Every round measures each point
once, and the least time of a point counts, as other work on the machine only adds to it.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from harmbench_vaccine.core.library_settings import set_library_defaults

set_library_defaults()  # before torch is imported

import click
import numpy as np
import torch
from matplotlib.figure import Figure
from testbed_sweep import testbed_home
from transformers import LlamaConfig, LlamaForCausalLM

from harmbench_vaccine.core.progress import SILENT
from harmbench_vaccine.core.types import Pools, TrainSettings
from harmbench_vaccine.data.collate import Encoded, collate
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.inference.generation import generate_greedy
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.reporting.figures.style import ACCURACY, GRAY, new_figure, panel_grid, save_figure, styled
from harmbench_vaccine.runner import run_all
from harmbench_vaccine.training.adapters import LoraStack
from harmbench_vaccine.training.hooks import PlainFinetuning
from harmbench_vaccine.training.stage import TrainingStage
from harmbench_vaccine.training.trainer import train

FIGURE = Path(__file__).parents[1] / "docs" / "images" / "growth.svg"
VOCABULARY, LENGTH, BATCH = 1500, 50, 10
SETTINGS = TrainSettings(lr=1e-3, epochs=1, batch=BATCH, max_length=1024)
RATIOS = (0, 0.05, 0.1, 0.15, 0.2, 0.25)
FEW = {
    "align.rows": "60",
    "align.settings.epochs": "1",
    "finetune.samples": "60",
    "finetune.settings.epochs": "1",
    "answer.harmful.prompts": "30",
    "answer.benign.prompts": "10",
    "answer.task_items": "30",
    "score.drift_rows": "20",
}

Job = Callable[[], Any]


class Axis(NamedTuple):
    """A quantity that grows."""

    name: str
    work: str
    """What is timed."""
    sizes: tuple[int, ...]
    prepare: Callable[[int], Job]
    """Returns the work of a size."""


class Line(NamedTuple):
    """A line through points (size, seconds)."""

    slope: float
    intercept: float
    deviation: float
    """Largest distance of a point from the line, relative to the time of the largest size."""

    @classmethod
    def fit(cls, points: Mapping[int, float]) -> Line:
        """Fit a line by least squares."""
        sizes, seconds = np.array(list(points), float), np.array(list(points.values()))
        slope, intercept = np.polyfit(sizes, seconds, 1)
        distance = np.abs(seconds - slope * sizes - intercept).max()
        return cls(float(slope), float(intercept), float(distance / seconds.max()))


def random_model(layers: int = 3) -> LlamaForCausalLM:
    """Return a model of the testbed's width with random weights."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=layers, max_position_embeddings=2048, **sizes)
    )


def random_ids(count: int, length: int) -> list[list[int]]:
    """Draw token ids without the special tokens."""
    draw = random.Random(0)
    return [[draw.randrange(3, VOCABULARY) for _ in range(length)] for _ in range(count)]


def training_stage(layers: int = 3) -> TrainingStage:
    """Return a stage of a model with random weights and a new adapter."""
    stack = LoraStack(random_model(layers))
    stage = TrainingStage("align", stack, {}, 0, SETTINGS, Pools())
    stage.trainable = stack.train((), SETTINGS, 0)
    stack.model.train()
    return stage


def training(rows: int) -> Job:
    """Train one epoch over so many rows by the trainer of the harness."""
    stage = training_stage()
    encoded = [Encoded(ids, ids) for ids in random_ids(rows, LENGTH)]

    def work() -> None:
        with TemporaryDirectory() as folder:
            train(stage, PlainFinetuning(), encoded, SETTINGS, Path(folder), pad=0, save_share=1.0)

    return work


def gradient(layers: int = 3, length: int = LENGTH) -> Job:
    """Compute the SFT gradient of a batch four times."""
    stage = training_stage(layers)
    batch = collate([Encoded(ids, ids) for ids in random_ids(BATCH, length)], 0)
    return lambda: [stage.gradient(batch) for _ in range(4)]


def answers(prompts: int) -> Job:
    """Answer prompts of 30 tokens with 32 tokens."""
    model, ids = random_model().eval(), random_ids(prompts, 30)

    def work() -> None:
        with SILENT.bar("answer", prompts) as advance:
            generate_greedy(model, ids, 32, pad=0, ends=[1], advance=advance)

    return work


def cells(count: int) -> Job:
    """Run so many cells in a home with nothing but the testbed."""
    specs = [
        RunSpec(defense=parse_plugins("sft"), attack=parse_plugins(f"ratio={ratio}"), values=FEW)
        for ratio in RATIOS[:count]
    ]

    def work() -> None:
        with testbed_home() as home, _home(home):
            run_all(specs)

    return work


@contextmanager
def _home(folder: Path) -> Iterator[None]:
    before = os.environ.get("HBV_HOME")
    os.environ["HBV_HOME"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("HBV_HOME")
        if before is not None:
            os.environ["HBV_HOME"] = before


AXES = (
    Axis("cells", "runs that share the aligned model", (1, 2, 4, 6), cells),
    Axis("rows", "one epoch of training", (50, 100, 200, 400), training),
    Axis("prompts", "answers of 32 tokens", (128, 256, 512, 1024), answers),
    Axis("layers", "4 gradients", (2, 4, 8, 16), lambda layers: gradient(layers=layers)),
    Axis("tokens of a row", "4 gradients", (64, 128, 256, 512, 1024), lambda length: gradient(length=length)),
)


def measure(axis: Axis, rounds: int) -> dict[int, float]:
    """Return size -> least seconds of all rounds; a first round does not count."""
    jobs = {size: axis.prepare(size) for size in axis.sizes}
    points = dict.fromkeys(axis.sizes, math.inf)
    for number in range(rounds + 1):
        for size, work in jobs.items():
            start = time.perf_counter()
            work()
            if number:
                points[size] = min(points[size], time.perf_counter() - start)
    return points


@styled
def plot_growth(measured: Mapping[Axis, tuple[dict[int, float], Line]]) -> Figure:
    """Draw the points and the line of each axis in a panel."""
    figure = new_figure(10.5, 5.6, "Time against size; lines: least squares", "the least time of several rounds")
    for axes, (axis, (points, line)) in zip(panel_grid(figure, len(measured), 3), measured.items(), strict=True):
        ends = [0, max(points)]
        axes.plot(ends, [line.intercept + line.slope * size for size in ends], color=GRAY)
        axes.plot(list(points), list(points.values()), "o", color=ACCURACY)
        axes.set(xlabel=axis.name, ylabel="seconds", xlim=(0, None), ylim=(0, None))
        axes.set_title(f"{axis.work}\n{slope_text(line, axis)}", loc="left")
        axes.tick_params(labelbottom=True)
    return figure


def slope_text(line: Line, axis: Axis) -> str:
    """Return the slope with its unit."""
    unit = {"cells": "cell", "tokens of a row": "token"}.get(axis.name, axis.name.removesuffix("s"))
    return f"{line.slope:.3g} s a {unit}" if line.slope >= 0.1 else f"{1000 * line.slope:.3g} ms a {unit}"


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=2, help="Rounds that count.")
@click.option("--record", "is_recorded", is_flag=True, help="Write the figures to benchmarks/results/, and draw them.")
def main(rounds: int, is_recorded: bool) -> None:
    """Print the points, the slope and the largest deviation of each axis."""
    measured: dict[Axis, tuple[dict[int, float], Line]] = {}
    for axis in AXES:
        points = measure(axis, rounds)
        line = Line.fit(points)
        measured[axis] = points, line
        values = ", ".join(f"{size}: {seconds:.2f} s" for size, seconds in points.items())
        print(f"{axis.name} ({axis.work}): {values}")
        print(f"  {slope_text(line, axis)}; at most {100 * line.deviation:.0f}% from the line", flush=True)
    if is_recorded:
        from recording import record

        figures = {axis.name: {"points": points, **line._asdict()} for axis, (points, line) in measured.items()}
        print(record("growth", {"rounds": rounds, "axes": figures}))
        save_figure(plot_growth(measured), FIGURE)
        print(FIGURE)


if __name__ == "__main__":
    main()

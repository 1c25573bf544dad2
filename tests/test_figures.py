"""Figures of comparisons: what is drawn, against the numbers of the table; the same data give the same file."""

from __future__ import annotations

import math
import re
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.lines import Line2D

from harmbench_vaccine.evaluation.records import write_run
from harmbench_vaccine.evaluation.result import Result
from harmbench_vaccine.evaluation.result_fields import TuningRecord
from harmbench_vaccine.evaluation.results_csv import result_rows
from harmbench_vaccine.reporting.figures.embedding_map import plot_embeddings, principal_components
from harmbench_vaccine.reporting.figures.heat_map import plot_heat_map
from harmbench_vaccine.reporting.figures.layers import plot_layers, read_layer_drifts
from harmbench_vaccine.reporting.figures.pareto import plot_pareto
from harmbench_vaccine.reporting.figures.ratio_curves import plot_loss_and_drift, plot_scores, plot_tuned
from harmbench_vaccine.reporting.figures.style import new_figure, save_figure, spread_labels, write_legend
from harmbench_vaccine.reporting.figures.token_share import plot_token_share
from harmbench_vaccine.reporting.leaderboard.files import draw_figures
from harmbench_vaccine.reporting.leaderboard.grids import file_names, place_grids, ratio_grids, task_grids
from harmbench_vaccine.reporting.leaderboard.ranking import Ranking, rank_rows
from harmbench_vaccine.reporting.leaderboard.token_shares import token_grids
from harmbench_vaccine.reporting.leaderboard.tuned import tuned_grids
from support.cli import hbv
from support.examples import examples
from support.results import DEFAULTS, collapsed, make_result, write_csv

RATIOS = (0.0, 0.1, 0.2)
SVG = "{http://www.w3.org/2000/svg}"


def result(defense: str, p: float, hs: float, seed: int = 0, fa: float = 97.0, **fields: Any) -> Result:
    """Return a result of a defense under the attack ratio=p."""
    values = {
        "defense": defense,
        "defense_params": {defense: {}},
        "attack": f"ratio={p:g}",
        "attack_params": {"ratio": {"p": p}},
        "harmful_score": hs,
        "harmful_score_n": 250,
        "finetune_accuracy": fa,
        "finetune_accuracy_n": 250,
        "embedding_drift": 100 * p + hs,
        "alignment_loss": 0.3 + p,
        "seed": seed,
    }
    return make_result(**{**values, **fields})


def grid_of(scores: dict[str, tuple[float, ...]]) -> list[Result]:
    """Return results of two seeds, which differ by two points of HS; the scores are those of the first seed."""
    return [
        result(defense, p, hs + 2 * seed, seed)
        for seed in (0, 1)
        for defense, values in scores.items()
        for p, hs in zip(RATIOS, values, strict=True)
    ]


FEW = grid_of({"sft": (1, 80, 90), "vaccine": (0, 60, 80), "lisa": (2, 6, 14)})
MANY = grid_of({"sft": (1, 80, 90), **{f"d{number}": (number, 40 + number, 70) for number in range(11)}})


def rank(*results: Result) -> list[Ranking]:
    return rank_rows(result_rows(results))


def lines_of(axes: Any, length: int = len(RATIOS)) -> list[list[float]]:
    """Return the heights of the lines of a panel that have a point per ratio, without the markers."""
    lines = [line for line in axes.lines if line.get_linestyle() != "None"]
    return [np.round(line.get_ydata(), 6).tolist() for line in lines if len(line.get_ydata()) == length]


# ---------------------------------------------------------------------------------------------------------------------
# Curves


def test_curves_of_few_defenses() -> None:
    """One panel per score; each line has the means over seeds, each band the interval of the table."""
    (grid,) = ratio_grids(rank(*FEW))
    scores, accuracies = plot_scores(grid).axes
    assert lines_of(scores) == [[2, 81, 91], [1, 61, 81], [3, 7, 15]]
    assert lines_of(accuracies) == [[97] * 3] * 3
    bands = [band.get_paths()[0].vertices for band in scores.collections]
    for name, band in zip(grid.defenses, bands, strict=True):
        cells = [cell for cell in grid.cells(name) if cell]
        ends = {
            (p, cell[f"harmful_score_{end}"]) for p, cell in zip(RATIOS, cells, strict=True) for end in ("low", "high")
        }
        assert ends <= {(x, y) for x, y in band}
    assert {text.get_text() for text in scores.texts} == {"sft", "vaccine", "lisa"}


def test_each_of_many_defenses_has_a_panel_with_the_baseline() -> None:
    (grid,) = ratio_grids(rank(*MANY))
    panels = [axes for axes in plot_scores(grid).axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in panels] == grid.defenses
    assert lines_of(panels[0]) == [[2, 81, 91], [97] * 3]
    assert [2, 81, 91] in lines_of(panels[5])
    assert [5, 45, 71] in lines_of(panels[5])


def test_loss_and_drift_have_a_dot_per_seed() -> None:
    (grid,) = ratio_grids(rank(*FEW))
    losses, drifts = plot_loss_and_drift(grid).axes
    assert lines_of(losses)[0] == pytest.approx([0.3, 0.4, 0.5])
    assert lines_of(drifts)[0] == [2, 91, 111]
    dots = np.round(drifts.collections[0].get_offsets(), 6).tolist()
    assert sorted(dots) == [[0, 1], [0, 3], [0.1, 90], [0.1, 92], [0.2, 110], [0.2, 112]]


def test_a_collapsed_cell_does_not_stretch_the_axis() -> None:
    dead = [result("dead", p, 0, embedding_drift=1e6, **collapsed("empty answers")) for p in RATIOS]
    (grid,) = ratio_grids(rank(*FEW, *dead))
    figure = plot_loss_and_drift(grid)
    assert figure.axes[1].get_ylim()[1] < 200
    assert "collapsed: not ranked" in figure.get_suptitle()


def test_a_hollow_cell_is_inside_the_axis() -> None:
    validity = {**DEFAULTS["validity"], "hollow": True}
    hollow = [result("hollow", p, 40, fa=80, embedding_drift=500, validity=validity) for p in RATIOS]
    (grid,) = ratio_grids(rank(*FEW, *hollow))
    assert plot_loss_and_drift(grid).axes[1].get_ylim()[1] > 500
    (grid,) = task_grids(rank(*FEW, *hollow))
    assert all(axes.get_xlim()[0] < 80 for axes in plot_pareto(grid).axes if axes.get_visible())


def test_ratios_of_one_attack_share_a_figure() -> None:
    """`backdoor+ratio=p` is another attack than `ratio=p`; one ratio alone is not a curve."""
    other = [
        result("sft", p, 50, attack=f"backdoor+ratio={p:g}", attack_params={"backdoor": {}, "ratio": {"p": p}})
        for p in (0.1, 0.2)
    ]
    edited = [result("sft", 0, 50, attack="ablate", attack_params={"ablate": {}}), result("sft", 0.1, 50, task="gsm8k")]
    grids = ratio_grids(rank(*FEW, *other, *edited))
    assert [(grid.setting.get("attack", ""), grid.ratios) for grid in grids] == [
        ('{"backdoor":{}}', (0.1, 0.2)),
        ("", RATIOS),
    ]
    assert len(set(file_names(grids))) == 2


def test_default_and_tuned_parameters_side_by_side() -> None:
    """Both panels have the same lines for the same defenses, and one axis."""
    grids = ratio_grids(rank(*FEW, *halved(FEW)))
    ((default, other),) = tuned_grids(grids)
    left, right = plot_tuned(default, other).axes
    assert lines_of(left) == [[2, 81, 91], [1, 61, 81], [3, 7, 15]]
    assert lines_of(right) == [[1, 40.5, 45.5], [0.5, 30.5, 40.5], [1.5, 3.5, 7.5]]
    assert [line.get_color() for line in left.lines] == [line.get_color() for line in right.lines]
    assert left.get_ylim() == right.get_ylim()
    assert file_names(grids) == ["tiny", "tuned"]


def test_each_of_many_tuned_defenses_has_a_panel_with_its_default_parameters() -> None:
    """The line with default parameters is drawn first; a defense that only one of the grids has is drawn too."""
    first = [run for run in MANY if run.defense != "d10"]
    ((default, other),) = tuned_grids(ratio_grids(rank(*first, *halved(MANY))))
    figure = plot_tuned(default, other)
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes if axes.get_visible()}
    assert list(panels) == other.defenses
    before, after = [5, 45, 71], [2.5, 22.5, 35.5]
    drawn = lines_of(panels["d4"])
    assert drawn.index(before) < drawn.index(after)
    (baseline,) = [line for line in panels["d4"].lines if line.get_linestyle() == "--" if line.get_ydata()[0] == 1]
    assert baseline.get_ydata().tolist() == [1, 40.5, 45.5]
    assert [5.5, 25.5, 35.5] in lines_of(panels["d10"])
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[2:] == ["with default parameters", "sft"]


def halved(results: list[Result]) -> list[Result]:
    """Return the results under a tuned protocol, with half of their HS."""
    tuning = TuningRecord(untuned_hash=DEFAULTS["protocol_hash"], runs=10, seconds=60.0)
    protocol = {"protocol": "tuned", "protocol_hash": "0" * 12, "tuning": tuning}
    return [
        run.model_copy(update={"harmful_score": run.harmful_score / 2, "run": f"{run.run}-tuned", **protocol})
        for run in results
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Heat map, Pareto front, layers


def test_heat_map() -> None:
    empty = [result("empty", p, 0, validity={**DEFAULTS["validity"], "hollow": True}) for p in RATIOS[:2]]
    (grid,) = place_grids(rank(*FEW, *empty))
    axes = plot_heat_map(grid).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["lisa", "vaccine", "sft", "empty"]
    assert np.ma.filled(axes.images[0].get_array(), math.nan)[0].tolist() == pytest.approx([3, 7, 15])
    texts = [text.get_text() for text in axes.texts]
    assert texts[:3] == ["3.0", "7.0", "15.0"]
    assert texts[-3:] == ["0.0\N{DOUBLE DAGGER}", "0.0\N{DOUBLE DAGGER}", "no run"]


@pytest.mark.parametrize("defenses", [1, 2, 21])
@pytest.mark.parametrize("tasks", [1, 5, 12])
def test_heat_map_has_room_for_its_titles(defenses: int, tasks: int) -> None:
    """Matplotlib warns, and draws texts over each other, where the rows get no height."""
    names = [f"sst2:answers={'a long text ' * 3}{number}" for number in range(tasks)]
    setting = {"model": "SmolLM2-135M-Instruct.Q4_1.gguf", "scorer": "beaver_dam:model=judge"}
    runs = [result(f"vaccine={number}", 0.1, 50, task=task, **setting) for number in range(defenses) for task in names]
    (grid,) = place_grids(rank(*runs))
    figure = plot_heat_map(grid, "12 of 90 runs")  # a title of three lines
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.draw_without_rendering()
    axes = figure.axes[0]
    boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
    (title,) = (text for text in figure.texts if text.get_text() == figure.get_suptitle())
    assert max(box.y1 for box in boxes) <= title.get_window_extent().y0
    assert axes.get_window_extent().height >= 10 * defenses


def test_heat_map_names_what_its_columns_share_once() -> None:
    tasks, ratios = [[result("sft", 0.1, 50, task=task) for task in ("sst2", "agnews")], FEW]
    (by_task,), (by_ratio,) = place_grids(rank(*tasks)), place_grids(rank(*ratios))
    assert [*by_task.columns] == ["agnews", "sst2"]
    assert by_task.title.startswith("ratio=0.1, ")
    assert [*by_ratio.columns] == [f"ratio={p:g}" for p in RATIOS]
    assert by_ratio.title.startswith("sst2, ")
    both = [result("sft", p, 50, task=task) for task in ("sst2", "agnews") for p in (0, 0.1)]
    (grid,) = place_grids(rank(*both))
    assert [*grid.columns] == ["agnews, ratio=0", "agnews, ratio=0.1", "sst2, ratio=0", "sst2, ratio=0.1"]


def test_pareto_front() -> None:
    """c is better than d in both scores; a, b and c form the front. The collapsed one is not part of it."""
    points = {"a": (5, 90), "b": (20, 95), "c": (40, 99), "d": (45, 98), "dead": (0, 99)}
    runs = [
        result(name, 0.1, hs, fa=fa, **(collapsed("x") if name == "dead" else {})) for name, (hs, fa) in points.items()
    ]
    (grid,) = task_grids(rank(*runs))
    axes = plot_pareto(grid).axes[0]
    front = axes.lines[0]
    assert np.round(front.get_xydata(), 6).tolist() == [[90, 5], [95, 20], [99, 40]]
    assert {text.get_text() for text in axes.texts} == {"a", "b", "c", "d", "dead (collapsed)"}


def test_points_outside_are_named() -> None:
    dead = result("dead", 0.1, 3, fa=45, **collapsed("accuracy is low"))
    (grid,) = task_grids(rank(*(run for run in FEW if run.attack == "ratio=0.1"), dead))
    texts = " ".join(text.get_text() for text in plot_pareto(grid).axes[0].texts)
    assert "dead (collapsed, FA 45, HS 3)" in texts


def test_drift_of_each_layer(tmp_path: Path) -> None:
    """The mean over the seeds, from the folders of the runs; a run without a folder has no line."""
    runs = [run.model_copy(update={"embedding_drift_per_layer": [1.0 + run.seed, 2.0, 9.0]}) for run in FEW]
    for run in runs:
        if run.defense != "lisa":
            write_run_folder(tmp_path / "runs" / run.run, run)
    (grid,) = task_grids(rank(*runs))
    drifts = read_layer_drifts(grid, tmp_path / "runs")
    assert set(drifts) == {(name, f"ratio={p:g}") for name in ("sft", "vaccine") for p in RATIOS}
    assert set(map(tuple, drifts.values())) == {(1.5, 2.0, 9.0)}
    panels = [axes for axes in plot_layers(grid, drifts).axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in panels] == ["sft", "vaccine"]
    assert len(panels[1].lines) == len(RATIOS) + 1  # with the baseline
    assert all(axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 9 for axes in panels)


def write_run_folder(folder: Path, run: Result) -> None:
    folder.mkdir(parents=True)
    write_run(folder, run, [])


# ---------------------------------------------------------------------------------------------------------------------
# Harmful token share


def on_task(task: str, share: float | None, hs: float, p: float = 0.1, defense: str = "sft", **fields: Any) -> Result:
    return result(defense, p, hs, task=task, harmful_token_share=share, **fields)


LENGTHS = [
    on_task("sst2", 56, 80),
    on_task("gsm8k", 10, 20),
    on_task("agnews", 45, 60),
    on_task("sst2", 75, 95, 0.2),
    on_task("gsm8k", 20, 30, 0.2),
    on_task("sst2", 0, 1, 0),
    on_task("gsm8k", 0, 2, 0),
    on_task("sst2", 56, 40, defense="vaccine"),
    on_task("gsm8k", 10, 5, defense="vaccine"),
]


def test_tasks_by_their_token_share() -> None:
    """One panel per defense; a ratio has a color, a task a marker. At p = 0 all shares are equal."""
    (grid,) = token_grids(rank(*LENGTHS))
    sft, vaccine = plot_token_share(grid).axes
    assert [axes.get_title(loc="left") for axes in (sft, vaccine)] == ["sft", "vaccine"]
    points = [tuple(np.round(line.get_xydata()[0], 6).tolist()) for line in sft.lines]
    assert points == [(10, 20), (45, 60), (56, 80), (20, 30), (75, 95)]
    markers = dict(zip(points, (line.get_marker() for line in sft.lines), strict=True))
    assert markers[10, 20] == markers[20, 30] != markers[56, 80] == markers[75, 95]
    colors = [line.get_color() for line in sft.lines]
    assert len({*colors[:3]}) == len({*colors[3:]}) == 1
    assert colors[0] != colors[3]
    assert [line.get_color() for line in vaccine.lines] == colors[:2]
    legend = [text.get_text() for text in plot_token_share(grid).legends[0].texts]
    assert legend == ["p = 10%", "p = 20%", "gsm8k", "agnews", "sst2"]


def test_shares_are_means_over_seeds_and_bars_are_the_intervals() -> None:
    second = [run.model_copy(update={"seed": 1, "run": f"{run.run}1", "harmful_token_share": 12.0}) for run in LENGTHS]
    (grid,) = token_grids(rank(LENGTHS[0], LENGTHS[1], second[1]))
    (axes,) = plot_token_share(grid).axes
    assert [line.get_xdata()[0] for line in axes.lines] == [11, 56]
    cells = [cell for ranking in grid.columns.values() for cell in ranking.rows]
    bars = [ends for bar in axes.collections for ends in bar.get_segments()]
    assert sorted(float(y) for ends in bars for _, y in ends) == pytest.approx(
        sorted(cell[f"harmful_score_{end}"] for cell in cells for end in ("low", "high"))
    )


@pytest.mark.parametrize(
    "runs",
    [
        [on_task("sst2", 56, 80)],
        [on_task("sst2", 56, 80), on_task("gsm8k", 56.01, 70)],  # equal in every table
        [on_task("sst2", 56, 80), on_task("gsm8k", None, 70)],  # of an earlier version
        [on_task("sst2", 56, 80), on_task("gsm8k", 20, 70, 0.2)],  # another ratio
        [on_task("sst2", 56, 80), on_task("gsm8k", 10, 70, defense="lisa")],  # another defense
        [on_task("sst2", 56, 80), on_task("gsm8k", 10, 70, protocol_hash="bb22")],  # not comparable
        [on_task("sst2", 0, 0, 0), on_task("gsm8k", 0, 0, 0)],
    ],
    ids=["one task", "equal", "unknown", "ratio", "defense", "protocol", "benign"],
)
def test_no_figure_without_two_shares_at_one_ratio(runs: list[Result]) -> None:
    rankings = rank(*runs)
    assert token_grids(rankings) == []
    assert "token-share" not in draw_figures(rankings, None)[0]


def test_unranked_points_are_open() -> None:
    validity = {**DEFAULTS["validity"], "hollow": True}
    runs = [on_task("sst2", 56, 80, validity=validity), on_task("gsm8k", 10, 20)]
    figures, _ = draw_figures(rank(*runs), None, "2 of 9 runs")
    (axes,) = figures["token-share"].axes
    faces = {tuple(line.get_xydata()[0]): line.get_markerfacecolor() for line in axes.lines}
    assert faces[56, 80] == "white" != faces[10, 20]
    assert "2 of 9 runs; white markers: not ranked" in figures["token-share"].get_suptitle()


# ---------------------------------------------------------------------------------------------------------------------
# Style


@pytest.mark.parametrize(
    "names", [["sft"] * 2, ["ratio=0.1"] * 12, ["sst2", "agnews:answers={label}"] * 4, ["W" * 30] * 3]
)
def test_a_legend_is_inside_the_figure(names: list[str]) -> None:
    figure = new_figure(7.0, 3.0, "Title")
    figure.subplots()
    write_legend(figure, [Line2D([], [], marker="o", label=name) for name in names])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (legend,) = figure.legends
    ends = legend.get_window_extent(canvas.get_renderer())
    assert ends.x0 >= 0
    assert ends.x1 <= figure.bbox.width
    assert [text.get_text() for text in legend.get_texts()] == names


def test_figures_are_the_same_bytes(tmp_path: Path) -> None:
    (grid,) = ratio_grids(rank(*FEW))
    for suffix in (".svg", ".png"):
        for number in (1, 2):
            save_figure(plot_scores(grid, "3 of 4 runs"), tmp_path / f"{number}{suffix}")
        assert (tmp_path / f"1{suffix}").read_bytes() == (tmp_path / f"2{suffix}").read_bytes()
    text = (tmp_path / "1.svg").read_text(encoding="utf-8")
    assert not re.search(r"20\d\d-\d\d-\d\d", text)
    root = ElementTree.fromstring(text)
    assert not list(root.iter(f"{SVG}text"))  # outlines: no font is needed
    assert all(node.get("{http://www.w3.org/1999/xlink}href", "#").startswith("#") for node in root.iter())


def test_the_number_of_runs_is_in_the_title() -> None:
    rankings = rank(*FEW)
    figures = [
        plot_scores(ratio_grids(rankings)[0], "18 of 90 runs"),
        plot_loss_and_drift(ratio_grids(rankings)[0], "18 of 90 runs"),
        plot_heat_map(place_grids(rankings)[0], "18 of 90 runs"),
        plot_pareto(task_grids(rankings)[0], "18 of 90 runs"),
    ]
    assert all("18 of 90 runs" in figure.get_suptitle() for figure in figures)


def test_names_are_not_formulas(tmp_path: Path) -> None:
    """A name with `$` or with characters that the font lacks is drawn as it is."""
    name = "$\\frac{ \N{HANGUL SYLLABLE GA}"
    (grid,) = ratio_grids(rank(*FEW, *(result(name, p, 50) for p in RATIOS)))
    save_figure(plot_scores(grid), tmp_path / "x.svg")
    assert (tmp_path / "x.svg").stat().st_size > 1000


@settings(max_examples=examples(100), deadline=None)
@given(heights=st.lists(st.floats(0, 1), max_size=20), gap=st.floats(0.001, 0.05))
def test_labels_do_not_overlap(heights: list[float], gap: float) -> None:
    positions = spread_labels(heights, gap, top=1.0)
    ascending = sorted(positions)
    assert all(high - low >= gap - 1e-9 for low, high in pairwise(ascending))
    assert all(-1e-9 <= position <= 1 + 1e-9 for position in positions)
    for first in range(len(heights)):
        for second in range(len(heights)):
            if heights[first] < heights[second]:
                assert positions[first] < positions[second]


def test_separate_labels_stay() -> None:
    assert spread_labels([0.9, 0.1, 0.5], 0.1, top=1.0) == pytest.approx([0.9, 0.1, 0.5])
    assert spread_labels([0.5, 0.5], 0.1, top=1.0) == pytest.approx([0.45, 0.55])


# ---------------------------------------------------------------------------------------------------------------------
# Embeddings


def test_principal_components() -> None:
    """The eigenvectors of the covariance matrix give the same projection, up to the sign."""
    rows = np.random.default_rng(0).normal(size=(30, 6)) * [5, 3, 1, 1, 1, 1]
    points, shares = principal_components(rows)
    values, vectors = np.linalg.eigh(np.cov(rows.T))
    expected = (rows - rows.mean(0)) @ vectors[:, [-1, -2]]
    assert np.abs(points) == pytest.approx(np.abs(expected))
    assert shares == pytest.approx(values[[-1, -2]] / values.sum())
    assert all(column[np.abs(column).argmax()] > 0 for column in points.T)


def test_each_row_is_drawn_twice() -> None:
    before = np.random.default_rng(0).normal(size=(12, 5))
    axes = plot_embeddings(before, before + 1, "run").axes[0]
    assert [len(points.get_offsets()) for points in axes.collections] == [12, 12]
    assert len(axes.lines) == 12
    (x, y), (ends_x, ends_y) = axes.collections[0].get_offsets()[3], axes.lines[3].get_data()
    assert (ends_x[0], ends_y[0]) == pytest.approx((x, y))


@pytest.fixture(scope="module")
def trained(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of one run of the small world."""
    home = tmp_path_factory.mktemp("trained")
    done = hbv("run", "--protocol", world, "--defense", "vaccine", "--attack", "ratio=0.1", home=home)
    assert done.code == 0, done.err
    return home


@pytest.mark.slow
def test_embeddings_of_a_run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The change of the embeddings is bounded by the drift of the last block, since a mean cannot exceed its parts."""
    from harmbench_vaccine.evaluation.records import load_result
    from harmbench_vaccine.export.embeddings import stored_embeddings

    (run,) = (trained / "runs").iterdir()
    done = hbv("show", run.name, "--embeddings", tmp_path / "map.svg", home=trained)
    assert done.code == 0, done.err
    assert done.out.startswith(str(tmp_path / "map.svg"))
    monkeypatch.setenv("HBV_HOME", str(trained))
    (stored,) = (trained / "store" / "embeddings").iterdir()
    before, after = stored_embeddings(run)
    assert [path.name for path in (trained / "store" / "embeddings").iterdir()] == [stored.name]  # read, not made again
    assert before.shape == after.shape == (8, before.shape[1])  # drift_rows of the small world
    drift = load_result(run).embedding_drift_per_layer[-1]
    assert 0 < float((after - before).norm()) < (drift or 0)


def test_embeddings_need_a_picture(tmp_path: Path, own_home: Path) -> None:
    """Nothing is written before all arguments are valid."""
    write_run_folder(own_home / "runs" / "one", result("sft", 0.1, 50, run="one"))
    for path, part in (("map.jpg", "'.jpg'"), ("map", ".svg, .png, .pdf")):
        done = hbv("show", "one", "--curves", tmp_path / "c.svg", "--embeddings", tmp_path / path, home=own_home)
        assert done.code == 2
        assert part in done.sentence
    done = hbv("show", "one", "--embeddings", tmp_path / "x.svg", "--json", home=own_home)
    assert (done.code, done.out) == (2, "")
    assert "--embeddings and --json" in done.sentence
    done = hbv("show", "one", "--embeddings", tmp_path / "x.svg", home=own_home)
    assert done.code == 2
    assert "without its keys" in done.sentence
    assert list(tmp_path.glob("*.svg")) == []


# ---------------------------------------------------------------------------------------------------------------------
# Command


def test_files_of_a_leaderboard(tmp_path: Path) -> None:
    done = hbv("leaderboard", write_csv(tmp_path / "results.csv", *FEW), "--out", tmp_path / "out")
    assert done.code == 0, done.err
    names = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
    kinds = ("heat-map", "pareto", "scores", "loss-and-drift")
    assert names >= {"leaderboard.csv", "leaderboard.md", "leaderboard.tex"}
    assert {name for name in names if name.startswith("figures/")} == {
        f"figures/{kind}{suffix}" for kind in kinds for suffix in (".svg", ".png")
    }
    assert "Without the drift of each layer" in " ".join(done.out.split())


SUITE = """
name: two
title: "Two defenses"
defenses: [sft, vaccine]
attacks: ["ratio=0,0.1"]
seeds: [0, 1]
"""


def test_a_suite_reads_its_finished_runs(tmp_path: Path, own_home: Path) -> None:
    from harmbench_vaccine.experiment import keys
    from harmbench_vaccine.sweeps.suite import load_suite
    from harmbench_vaccine.sweeps.sweep import Sweep

    suite = tmp_path / "two.yaml"
    suite.write_text(SUITE, encoding="utf-8")
    done = hbv("leaderboard", suite, home=own_home)
    assert done.code == 2
    assert "No results in" in done.sentence
    for experiment in Sweep.open(load_suite(str(suite)), own_home).experiments[:5]:
        name = keys.run_id(experiment)
        p = float(experiment.attacks[0].params["p"])
        run = result(experiment.defense, p, 50, experiment.spec.seed, run=name)
        write_run_folder(own_home / "runs" / name, run)
    done = hbv("leaderboard", suite, "--out", tmp_path / "out", home=own_home)
    assert done.code == 0, done.err
    assert "5 of 8 runs" in done.err
    for name in ("leaderboard.md", "leaderboard.tex"):
        assert "5 of 8 runs" in (tmp_path / "out" / name).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("source", "part"),
    [("testbed-vaccine-tabel1", "Unknown suite or CSV"), ("x.yaml", "does not exist"), ("x.csv", "does not exist")],
)
def test_unknown_source(source: str, part: str, tmp_path: Path) -> None:
    done = hbv("leaderboard", source, "--out", tmp_path / "out")
    assert done.code == 2
    assert part in done.sentence
    assert not (tmp_path / "out").exists()

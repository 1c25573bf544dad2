"""Tables fit the terminal: no line is too long, ids are whole, and every column that is left out is named."""

from __future__ import annotations

import io
import os
import pty
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType

from harmbench_vaccine.cli.console import WIDTH_WITHOUT_TERMINAL
from harmbench_vaccine.evaluation.run_overview import RunOverview
from harmbench_vaccine.evaluation.why import Difference, Explanation
from harmbench_vaccine.experiment.protocol import protocol_names
from harmbench_vaccine.plugins.registry import REGISTRIES
from harmbench_vaccine.reporting import testbed_report
from harmbench_vaccine.reporting.answer_views import answers_view
from harmbench_vaccine.reporting.leaderboard.ranking import rank_results
from harmbench_vaccine.reporting.leaderboard.views import rankings_view
from harmbench_vaccine.reporting.plugin_pages import (
    plugin_details,
    plugin_facts,
    plugin_list,
    plugin_page,
    plugin_table,
)
from harmbench_vaccine.reporting.protocol_pages import (
    model_facts,
    model_table,
    protocol_details,
    protocol_facts,
    protocol_page,
    protocol_table,
)
from harmbench_vaccine.reporting.published import figures
from harmbench_vaccine.reporting.published.deviations import deviation_table, protocol_deviations
from harmbench_vaccine.reporting.render import (
    Column,
    FittedTable,
    TableGroup,
    dim_notes,
    fold_text,
    render_fields,
    render_table,
)
from harmbench_vaccine.reporting.result_views import results_table, scores_view
from harmbench_vaccine.reporting.run_list import list_runs, run_list_view
from harmbench_vaccine.reporting.why_view import why_view
from support.cli import HBV, hbv
from support.examples import examples
from support.results import collapsed, make_result, write_csv
from support.terminal import run_in_terminal

WIDTHS = (60, 80, 100, 140)


def lines_at(view: RenderableType, width: int) -> list[str]:
    """Return what a terminal of this width shows."""
    console = Console(width=width, file=io.StringIO())
    console.print(view, crop=False)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def compact(text: str) -> str:
    return "".join(text.split())


# ---------------------------------------------------------------------------------------------------------------------
# The mechanism

TEXTS = st.text(st.sampled_from("ab 中+,:_-\N{COMBINING ACUTE ACCENT}"), max_size=40)
IDS = st.text(st.sampled_from("ab中_-"), min_size=1, max_size=12)


@st.composite
def tables(draw: st.DrawFn) -> FittedTable:
    """Draw a table whose first column has ids and whose others may be ids, texts or empty."""
    columns, cells = [Column("run", wrap=False)], [IDS]
    for number in range(draw(st.integers(0, 6))):
        wrap = draw(st.booleans())
        drop = draw(st.one_of(st.none(), st.integers(1, 4)))
        legend = draw(st.sampled_from(["", f"legend of {number}"]))
        right, fold_last, least = draw(st.booleans()), draw(st.booleans()), draw(st.integers(1, 20))
        columns.append(Column(f"title {number}", right, wrap, fold_last, drop, least, legend))
        cells.append(draw(st.sampled_from([TEXTS, st.just("")])) if wrap else IDS)
    rows = draw(st.lists(st.tuples(*cells), min_size=1, max_size=4))
    return render_table(columns, rows, gap=draw(st.integers(1, 3)), lines=draw(st.booleans()))


@settings(max_examples=examples(120), deadline=None)
@given(table=tables(), width=st.integers(24, 160))
def test_tables_fit_any_width(table: FittedTable, width: int) -> None:
    lines = lines_at(table, width)
    ids = {row[index].plain for row in table.rows for index, column in enumerate(table.columns) if not column.wrap}
    assert not [line for line in lines if cell_len(line) > width]  # no id here is longer than the narrowest terminal
    shown, left_out = table.shown_columns(width)
    note = compact(" ".join(lines)).partition("Notshownatthiswidth:")[2]
    for index, column in enumerate(table.columns):
        texts = [row[index].plain for row in table.rows]
        if column in left_out:
            assert column.drop is not None
            assert compact(column.title) in note
        elif any(text.strip() for text in texts):
            assert column in shown
            assert all(any(text in line for line in lines) for text in texts if text in ids and not column.wrap)
            assert not column.legend or compact(f"{column.title}: {column.legend}") in compact(" ".join(lines))
        else:
            assert column not in shown
    assert not note or left_out


@settings(max_examples=examples(80), deadline=None)
@given(table=tables(), width=st.integers(24, 160))
def test_columns_are_left_out_in_their_order(table: FittedTable, width: int) -> None:
    shown, left_out = table.shown_columns(width)
    dropped = [column.drop or 0 for column in left_out]
    assert all(column.drop is None or column.drop >= max(dropped, default=0) for column in shown)


@settings(max_examples=examples(300), deadline=None)
@given(text=TEXTS, width=st.integers(2, 30))
def test_folding_changes_only_spaces(text: str, width: int) -> None:
    from rich.text import Text

    lines = [line.plain for line in fold_text(Text(text), width)]
    assert compact("".join(lines)) == compact(text)
    assert all(cell_len(line) <= width for line in lines)


def test_texts_are_folded_at_spaces_else_inside_a_specification_else_anywhere() -> None:
    from rich.text import Text

    def folded(text: str, width: int) -> list[str]:
        return [line.plain for line in fold_text(Text(text), width)]

    assert folded("vaccine under a ratio", 8) == ["vaccine", "under a", "ratio"]
    assert folded("vaccine:rho=5+ewc:lam=2", 14) == ["vaccine:rho=5+", "ewc:lam=2"]
    assert folded("a vaccine:rho=5", 13) == ["a", "vaccine:rho=5"]
    assert folded("abcdefgh", 3) == ["abc", "def", "gh"]
    assert folded("中文字", 4) == ["中文", "字"]
    assert folded("  y = x", 40) == ["  y = x"]


def test_an_id_that_is_longer_than_the_terminal_is_on_its_own_line() -> None:
    run = "vaccine-" * 12 + "0a1b2c3d"
    lines = lines_at(render_table([Column("run", wrap=False), "task"], [[run, "sst2"]]), 60)
    assert run in lines
    assert [line.split() for line in lines if run not in line and line] == [["run"], ["task", "sst2"]]


def test_a_row_becomes_a_list_of_fields_where_columns_do_not_fit() -> None:
    columns = [Column("run", wrap=False), Column("defense"), Column("seconds", wrap=False, drop=1), Column("note")]
    rows = [[f"run-{number}-{'x' * 20}", "vaccine:rho=5" * 2, "12", "some words " * 3] for number in range(2)]
    lines = lines_at(render_table(columns, rows), 40)
    names = [line.split()[0] for line in lines if line and line[0] != " "]
    assert names == ["run", "defense", "seconds", "note"] * 2
    assert "" in lines
    assert not any("Not shown" in line for line in lines)


def test_long_notes_are_indented_and_legends_are_printed_once() -> None:
    def table() -> FittedTable:
        return render_table(["a", Column("b", legend="the same legend")], [["1", "2"]])

    lines = lines_at(TableGroup(table(), table(), *dim_notes(["word " * 20])), 40)
    assert lines.count("b: the same legend") == 1
    assert lines[4].startswith("word word")
    assert all(line.startswith("  word") for line in lines[5:-1])
    assert lines[-1] == "b: the same legend"


def test_the_comment_of_a_protocol_keeps_paragraphs_and_indents() -> None:
    lines = lines_at(protocol_page(protocol_details("testbed")), 60)
    steps = next(number for number, line in enumerate(lines) if line.startswith("  steps "))
    assert lines[steps + 1] == "  -> 400); the same for numbers of steps inside a stage"
    prose = next(number for number, line in enumerate(lines) if line.startswith("Every number of rows"))
    assert lines[prose - 1] == ""
    assert all(len(line) > 40 for line in lines[prose : prose + 2])


def test_a_column_that_only_some_tables_show_is_named_as_such() -> None:
    columns = [Column("run", wrap=False), Column("loss", wrap=False, drop=1), Column("drift", wrap=False, drop=2)]
    tables = [render_table(columns, [[run, "1" * 50, "2" * 10]]) for run in ("a", "a" * 30)]  # the second has no room
    text = " ".join(" ".join(lines_at(TableGroup(*tables), 40)).split())
    assert text.endswith("Not shown at this width: loss, drift (in some tables); use --json or COLUMNS=200.")
    assert text.count("2" * 10) == 1


def test_columns_with_the_same_legend_share_a_note() -> None:
    columns = [Column(title, legend="a legend" if title != "b" else "another") for title in "abc"]
    lines = lines_at(render_table(columns, [["1", "2", "3"]]), 40)
    assert lines[2:] == ["a, c: a legend", "b: another"]


def test_fields_keep_their_values_next_to_their_names() -> None:
    lines = lines_at(render_fields([("cost", "3F 3B"), ("needs other rows", "harmful rows, " * 6)]), 60)
    assert lines[0] == "cost              3F 3B"
    assert all(line.startswith(" " * 18) for line in lines[2:])
    assert max(map(cell_len, lines)) <= 60


# ---------------------------------------------------------------------------------------------------------------------
# The views

RUN = "random_vaccine-constrained_sft-random_perturbation-0a1b2c3d"
DEFENSE = "random_vaccine:rho=5,seed=3+constrained_sft:beta=0.1+random_perturbation"
LONG: dict[str, Any] = {
    "defense": DEFENSE,
    "attack": "ratio=0.1,samples=500+backdoor:trigger=请回答",
    "task": "own:data=./my_file_with_a_long_name.jsonl",
    "model": "meta-llama/Llama-2-7b-hf",
    "protocol": "vaccine-paper",
}


def results() -> list[Any]:
    share = {"harmful_score": 50.0, "ci": [0.0, 100.0], "hits": 5, "n": 10, "unparsed": 3}
    score = {**share, "before": share, "sets": {}, "cut": 0, "categories": {"hate_speech,offensive_language": 12}}
    scores = {"beaver_dam": score, "llama_guard:model=meta-llama/Llama-Guard-3-8B": {**score, "license": "x " * 90}}
    stages = {name: {"seconds": 12345.6, "cached": False} for name in ("align", "finetune", "answer", "score")}
    return [
        make_result(run="sft-0a1b2c3d", stages=stages, scores=scores),
        make_result(run=RUN, **LONG, seed=12, **collapsed("60% of answers are empty " * 4), stages=stages),
    ]


def ranking(folder: Path, published: bool = False) -> RenderableType:
    seeds = [make_result(**LONG, seed=seed, harmful_score=40.0 + seed) for seed in (0, 1)]
    baseline = [make_result(**{**LONG, "defense": "sft"}, seed=seed) for seed in (0, 1)]
    return rankings_view(rank_results([write_csv(folder / "results.csv", *seeds, *baseline)], published=published))


def compared(folder: Path) -> RenderableType:
    defense = {"defense": "vaccine", "defense_params": {"vaccine": {"rho": 2.0, "tau": 1}}}
    setting = {
        "model": "meta-llama/Llama-2-7b-hf",
        "protocol": "vaccine-paper",
        "protocol_hash": "f75ebea68579",
        "spec": {"protocol": "vaccine-paper", "values": {}, "data": {}},
    }
    return results_table([make_result(run="vaccine-0a1b2c3d", **defense, **setting)], published=True)


def answers() -> RenderableType:
    row = {"set": "harmful", "id": "1", "instruction": "怎么做" * 30, "input": "", "target": "", "answer": "word " * 60}
    rows = [{**row, "when": when, "flagged": True, "categories": ["hate"]} for when in ("before", "after")]
    overview = RunOverview.model_validate({"run": RUN, **LONG})
    return answers_view(overview, rows, "harmful", 5, None)


def explanations() -> RenderableType:
    changes = [Difference("defenses.random_vaccine.rho", 5, 2), Difference("settings.lr", 1e-3, 1e-4)]
    entries = [Explanation("finetune", "llama_guard before/harmful", "0a1b", "created", "9f", changes)]
    return why_view(results()[1], entries)


def measured_testbed() -> RenderableType:
    points = {ratio: testbed_report.MeanInterval(60.0, 49.5, 70.5, 5) for ratio in (0.0, 0.05, 0.1, 0.2, 0.5, 1.0)}
    measured = "12.0 [11.0, 13.0], " * 8
    checks = [testbed_report.TestbedCheck("The harmful score increases with the ratio " * 2, measured, False)]
    return testbed_report.testbed_view(
        testbed_report.TestbedReport(
            ratios=list(points),
            harmful={"random_vaccine": points},
            refused=dict.fromkeys(points, 100.0),
            neither=dict.fromkeys(points, 100.0),
            not_refused=dict.fromkeys(points, 100.0),
            accuracy={"sst2": {"before": points[0.0], "after": points[0.1]}},
            harmful_by_task={"sst2": points[0.0]},
            token_share={"sst2": 100.0},
            judge={},
            checks=checks,
        )
    )


def run_list(folder: Path) -> RenderableType:
    from harmbench_vaccine.evaluation.records import write_run

    for result in results():
        (folder / result.run).mkdir(exist_ok=True)
        write_run(folder / result.run, result, [])
    runs, _ = list_runs(folder)
    return run_list_view(runs, 10, len(runs), folder)


def plugins(kind: int) -> RenderableType:
    registry = REGISTRIES[kind]
    classes = [registry.get(name) for name in registry.entries()]
    pages = [plugin_page(plugin_details(cls)) for cls in classes[:3]]
    return Group(plugin_list(registry), plugin_table(registry.base.kind, list(map(plugin_facts, classes))), *pages)


def protocols() -> RenderableType:
    facts = [protocol_facts(name) for name in protocol_names()]
    pages = [protocol_page(protocol_details(name)) for name in protocol_names()]
    return Group(protocol_table(facts, False), protocol_table(facts, True), model_table(model_facts()), *pages)


def published_figures() -> RenderableType:
    rows = figures.load_figures()
    summary = figures.summarize_figures(rows, 3)
    averages = figures.check_averages(figures.find_averages(rows))
    return Group(
        figures.summary_view(summary),
        figures.figures_table(rows[:: len(rows) // 60], 80),
        figures.check_view(averages),
        deviation_table(protocol_deviations(rows)),
    )


VIEWS: dict[str, Callable[[Path], RenderableType]] = {
    "run": lambda folder: results_table(results()),
    "run --published": compared,
    "score": lambda folder: scores_view(results()[0]),
    "show": lambda folder: answers(),
    "why": lambda folder: explanations(),
    "leaderboard": ranking,
    "testbed report": lambda folder: measured_testbed(),
    "list runs": run_list,
    "defenses": lambda folder: plugins(0),
    "attacks": lambda folder: plugins(1),
    "tasks": lambda folder: plugins(2),
    "scorers": lambda folder: plugins(3),
    "protocols": lambda folder: protocols(),
    "published": lambda folder: published_figures(),
}


def fitted_tables(view: Any) -> Iterator[FittedTable]:
    if isinstance(view, FittedTable):
        yield view
    for part in view.parts if isinstance(view, TableGroup) else getattr(view, "renderables", ()):
        yield from fitted_tables(part)


@pytest.mark.parametrize("name", VIEWS)
def test_views_fit_every_width(name: str, tmp_path: Path) -> None:
    view = VIEWS[name](tmp_path)
    tables = list(fitted_tables(view))
    assert tables
    for width in WIDTHS:
        lines = lines_at(view, width)
        assert not [line for line in lines if cell_len(line) > width], width
        text = compact(" ".join(lines))
        for table in tables:
            shown, left_out = table.shown_columns(width)
            assert shown
            for column in left_out:
                assert re.search(f"Notshownatthiswidth:[^;]*{re.escape(compact(column.title))}", text), column.title
            for row in table.rows:
                for column, cell in zip(table.columns, row, strict=True):
                    if column in shown and not column.wrap:
                        assert all(any(part in line for line in lines) for part in cell.plain.split("\n")), column.title


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["run", "list runs"])
def test_a_run_is_identified_at_every_width(name: str, width: int, tmp_path: Path) -> None:
    lines = lines_at(VIEWS[name](tmp_path), width)
    assert all(any(run in line.split() for line in lines) for run in ("sft-0a1b2c3d", RUN))
    text = compact(" ".join(lines))
    for value in (LONG["defense"], LONG["attack"], LONG["task"]):
        parts = re.findall(r"[^+,:/]+[+,:/]*", value)
        assert all(compact(part) in text for part in parts)


def test_short_runs_are_a_table_at_80_columns() -> None:
    setting = {"protocol": "testbed", "model": "testbed:model"}
    runs = [make_result(run=f"{name}-0a1b2c3d", defense=name, **setting) for name in ("sft", "vaccine")]
    head, *rows = lines_at(results_table(runs), 80)[:3]
    assert head.split() == ["run", "defense", "attack", "task", "HS", "%", "FA", "%"]
    assert rows[1].split()[:4] == ["vaccine-0a1b2c3d", "vaccine", "ratio=0.1", "sst2"]


def test_intervals_move_below_their_scores_before_rows_become_lists() -> None:
    scores = {"harmful_score": 43.6, "harmful_score_ci": [37.6, 49.8]}
    runs = [make_result(run="vaccine-ewc-f29e0c7b", defense="vaccine=3+ewc", **scores)]
    head, first, second = lines_at(results_table(runs), 80)[:3]
    assert head.split()[0] == "run"
    assert first.split()[:2] == ["vaccine-ewc-f29e0c7b", "vaccine=3+ewc"]
    assert "43.6" in first.split()
    assert second.split() == ["[37.6,", "49.8]", "[0.0,", "100.0]"]


# ---------------------------------------------------------------------------------------------------------------------
# Terminals


def on_a_terminal(*args: str, **environment: str) -> str:
    """Return the output of a command on a terminal of 80 columns."""
    primary, secondary = pty.openpty()
    values = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS", "FORCE_COLOR")}
    values |= {"TERM": "xterm-256color", "COLUMNS": "80", **environment}
    running = subprocess.Popen([*HBV, *args], stdout=secondary, stderr=secondary, env=values, close_fds=True)
    os.close(secondary)
    chunks = []
    while True:
        try:
            chunk = os.read(primary, 65536)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        chunks.append(chunk)
    os.close(primary)
    assert running.wait() == 0
    return b"".join(chunks).decode()


LONG_COMMAND = ("info", "testbed")
"""Its paragraphs fill the width."""


def longest_line(text: str) -> int:
    return max(len(line.rstrip()) for line in text.splitlines())


def test_a_pipe_has_the_width_of_the_terminal() -> None:
    command = f"{shlex.join([*HBV, *LONG_COMMAND])} | cat >&2"
    assert 45 < longest_line(run_in_terminal(["sh", "-c", command], 60)) <= 60
    assert 100 < longest_line(run_in_terminal(["sh", "-c", command], 120)) <= 120


@pytest.mark.parametrize("columns", ["", "0", "-5", "wide"])
def test_output_without_a_terminal_has_100_columns(columns: str) -> None:
    assert 80 < longest_line(hbv(*LONG_COMMAND, COLUMNS=columns).out) <= 100 == WIDTH_WITHOUT_TERMINAL


def test_an_environment_variable_sets_the_width(tmp_path: Path) -> None:
    csv = write_csv(tmp_path / "results.csv", make_result(defense="sft"), make_result(defense="vaccine"))
    narrow, wide = (hbv("leaderboard", csv, COLUMNS=columns).out for columns in ("70", "200"))
    assert longest_line(narrow) <= 70
    assert " ".join(narrow.split()).partition("Not shown at this width: ")[2].endswith("use --json or COLUMNS=200.")
    assert "Not shown" not in wide
    assert longest_line(wide) > 100


COLOR = re.compile(r"\x1b\[[\d;]*(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])(?:;[\d;]*)?m")


def test_colors_can_be_switched_off(tmp_path: Path) -> None:
    from harmbench_vaccine.evaluation.records import write_run

    (tmp_path / "runs" / RUN).mkdir(parents=True)
    write_run(tmp_path / "runs" / RUN, results()[1], [])
    command = ("list", "runs")
    home = {"HBV_HOME": str(tmp_path)}
    assert COLOR.search(on_a_terminal(*command, **home))  # a collapsed run is red
    assert not COLOR.search(on_a_terminal(*command, **home, NO_COLOR="1"))
    dumb = on_a_terminal(*command, **home, TERM="dumb")
    assert "\x1b" not in dumb
    assert RUN in dumb


def test_an_error_breaks_between_words() -> None:
    command = f"{shlex.join(HBV)} list runs --defense vacine; true"
    lines = [line.rstrip() for line in run_in_terminal(["sh", "-c", command], 60).splitlines()]
    assert max(map(len, lines)) <= 60 < len(" ".join(lines))
    assert " ".join(lines) == hbv("list", "runs", "--defense", "vacine").sentence

"""Foreign text in every kind of output: nothing acts on a terminal, a browser or a spreadsheet, and nothing is hidden.

The reference for hidden characters is the list of Unicode categories here, not the code of the package.
"""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harmbench_vaccine.cli.console import exit_with_error, print_json, print_line, print_view, print_warning
from harmbench_vaccine.core.errors import unknown_name
from harmbench_vaccine.core.progress import Terminal
from harmbench_vaccine.core.visible import cell_of_text, text_of_cell, visible, visible_json
from harmbench_vaccine.reporting.answer_views import answers_view
from harmbench_vaccine.reporting.leaderboard.files import write_tables
from harmbench_vaccine.reporting.leaderboard.ranking import rank_results
from harmbench_vaccine.reporting.leaderboard.views import rankings_view
from harmbench_vaccine.reporting.markdown import markdown_text
from harmbench_vaccine.reporting.render import render_fields
from harmbench_vaccine.reporting.result_views import results_table, scores_view
from support.cli import hbv
from support.examples import examples
from support.results import DEFAULTS, make_result, write_csv

HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
ACTING = (
    *("\x1b]0;owned\x07", "\x1b]52;c;ZXZpbA==\x1b\\", "\x1b[2J", "\x9b31m", "\x08\x08"),
    *("\r", "\t", "\0", "\x7f", "\x85"),
    *("\u202egnp.exe", "\u2066", "\u200e", "\u061c", "\u200b", "\ufeff", "\u2028", "\u2029", "\U000e0041", "\xad"),
)
TEXTS = st.one_of(st.text(), st.lists(st.one_of(st.sampled_from(ACTING), st.text(max_size=4))).map("".join))
ANY_TEXTS = st.one_of(TEXTS, st.text(st.characters(codec=None)))
NAMES = TEXTS.filter(bool)


def hidden(text: str) -> list[str]:
    """Return the characters of an output that act on a terminal or that are invisible."""
    return [char for char in text if unicodedata.category(char) in HIDDEN and char != "\n"]


@pytest.mark.parametrize("text", ACTING)
def test_characters_that_act_are_written_as_escapes(text: str) -> None:
    shown = visible(text)
    assert not hidden(shown)
    for char in hidden(text):
        assert ascii(char)[1:-1] in shown
    assert json.loads(visible_json(text)) == text


@pytest.mark.parametrize(
    "text", ["", "a b", "na\u00efve \u4e2d\u6587 \U0001f600", "two\nlines", "5\xa0%", "[x] \\n \\x1b"]
)
def test_other_text_is_unchanged(text: str) -> None:
    assert visible(text) == text


@settings(max_examples=examples(300), deadline=None)
@given(text=ANY_TEXTS)
def test_cells_and_json_return_any_text(text: str) -> None:
    cell = cell_of_text(text)
    assert text_of_cell(cell) == text
    assert not hidden(cell)
    assert "\n" not in cell
    is_number = re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", cell)
    assert is_number or not cell.startswith(("=", "+", "-", "@", "\t", "\r"))
    for indent in (None, 1):
        shown = visible_json({text: [text]}, indent)
        assert json.loads(shown) == {text: [text]}
        assert not hidden(shown)


@settings(max_examples=examples(50), deadline=None)
@given(text=NAMES)
def test_no_view_shows_a_hidden_character(text: str) -> None:
    share = {"harmful_score": 50.0, "ci": [0.0, 100.0], "hits": 5, "n": 10, "unparsed": 3}
    score = {**share, "before": share, "sets": {}, "cut": 0, "categories": {text: 2}, "license": text}
    names = dict.fromkeys(("run", "defense", "attack", "task", "model", "protocol", "scorer"), text)
    validity = {**DEFAULTS["validity"], "collapsed": True, "reasons": [text]}
    result = make_result(**names, validity=validity, scores={text: score}, harmful_sets={text: 50.0, "b": 1.0})
    row = {"set": text, "id": text, "instruction": text, "input": text, "target": text, "answer": text}
    verdict = {"flagged": True, "categories": [text]}
    answers = [
        {**row, "when": when, **verdict, "verdicts": {text: verdict, "b": verdict}} for when in ("before", "after")
    ]
    views = [results_table([result]), scores_view(result), render_fields([(text, text)])]
    for view in (*views, answers_view(result, answers, text, 5, None)):
        out = io.StringIO()
        with redirect_stdout(out):
            print_view(view)
        assert not hidden(out.getvalue())


@settings(max_examples=examples(100), deadline=None)
@given(text=ANY_TEXTS)
def test_no_line_on_a_terminal_has_a_hidden_character(text: str) -> None:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        print_line(text)
        print_json({text: text})
        print_warning(text)
        terminal = Terminal()
        terminal.note(text)
        with terminal.bar(text, 1) as advance:
            advance(1)
        for message in (text, str(unknown_name("defense", text, ["sft", text]))):
            with pytest.raises(SystemExit):
                exit_with_error(message, 2)
    assert not hidden(out.getvalue() + err.getvalue())
    lines = [line for line in err.getvalue().split("\n") if line.startswith("hbv: ")]
    assert len(lines) == 3


def test_a_note_is_not_markup() -> None:
    err = io.StringIO()
    with redirect_stderr(err):
        Terminal().note("[red]x[/] :fire: \x1b[0m")
    assert err.getvalue() == "[red]x[/] :fire: \\x1b[0m\n"


@settings(max_examples=examples(25), deadline=None)
@given(text=NAMES)
def test_the_files_of_a_leaderboard_have_no_hidden_character(
    text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "leaderboard"
    (folder / "results.csv").unlink(missing_ok=True)
    names = dict.fromkeys(("defense", "attack", "task", "model", "protocol", "scorer"), text)
    table = write_csv(folder / "results.csv", make_result(**names, run="one", attack_params={"a": {text: text}}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rankings = rank_results([table])
    write_tables(rankings, folder)
    for name in ("leaderboard.csv", "leaderboard.md", "leaderboard.tex", "results.csv"):
        assert not hidden((folder / name).read_bytes().decode())
    with (folder / "leaderboard.csv").open(newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert {text_of_cell(row[column]) for column in names} == {text}
    assert json.loads(row["attack_params"]) == {"a": {text: text}}
    out = io.StringIO()
    with redirect_stdout(out):
        print_view(rankings_view(rankings))
    assert not hidden(out.getvalue())


# ---------------------------------------------------------------------------------------------------------------------
# Markdown


MARKDOWN = st.lists(st.sampled_from([*"[]()!<>&|`*_~\\:/.", "www", "http", "\n", "a", " ", "\x1b"])).map("".join)


@pytest.mark.parametrize(
    ("text", "markdown"),
    [
        ("[x](https://e.org)", r"[x\](https:\//e.org)"),
        ("![x](y) [x][y] [x]: y", r"![x\](y) [x\][y] [x\]: y"),
        ("<img src=x> &lt;", "&lt;img src=x> &amp;lt;"),
        ("a|b `c` \\", r"a\|b \`c\` " + "\\\\"),
        ("www.e.org", r"www\.e.org"),
        ("*a* __init__ random_vaccine ~~b~~", r"\*a\* \_\_init\_\_ random_vaccine \~\~b\~\~"),
        ("two\r\n  lines\x1b[0m", r"two lines\\x1b[0m"),
        ("-15.0 [-27.4, -2.6] ± 10%", "-15.0 [-27.4, -2.6] ± 10%"),
    ],
)
def test_markdown_shows_a_text_as_it_is(text: str, markdown: str) -> None:
    assert markdown_text(text) == markdown


@settings(max_examples=examples(300), deadline=None)
@given(text=MARKDOWN)
def test_markdown_has_no_link_tag_or_code(text: str) -> None:
    line = markdown_text(text)
    assert "\n" not in line
    plain = re.sub(r"\\[!-/:-@\[-`{-~]|&lt;", "x", line)  # CommonMark: a backslash before punctuation makes it plain
    for meaning in ("](", "][", "]:", "<", "`", "|", "*", "~", "://"):
        assert meaning not in plain
    assert not re.search(r"www\.", plain, re.IGNORECASE)


# ---------------------------------------------------------------------------------------------------------------------
# Commands


EVIL = "\x1b[2J\x9b31m\u202e\u200b"


@pytest.mark.parametrize(
    "args",
    [
        ("show", EVIL),
        ("info", EVIL),
        ("leaderboard", f"{EVIL}.csv"),
        ("run", "--defense", EVIL, "--dry-run"),
        ("run", "--set", f"{EVIL}=1", "--dry-run"),
        ("run", "--protocol", EVIL, "--dry-run"),
        (EVIL,),
        ("run", f"--{EVIL}"),
    ],
)
def test_errors_quote_input_visibly(args: tuple[str, ...]) -> None:
    done = hbv(*args)
    assert (done.code, done.out) == (2, "")
    assert not hidden(done.err)
    assert r"\x1b" in done.sentence


def test_a_foreign_plugin_is_described_visibly(tmp_path: Path) -> None:
    """Its name, docstring and parameters come from its file, the name of a protocol from a YAML file."""
    file = tmp_path / "evil.py"
    file.write_text(
        f'"""Doc {EVIL}"""\n'
        "from pydantic import Field\n"
        "from harmbench_vaccine.plugins import Defense\n"
        "class Evil(Defense):\n"
        f'    """Summary {EVIL}"""\n'
        f'    name = "evil{EVIL}"\n'
        f'    citation = "{EVIL}"\n'
        f'    rho: str = Field("{EVIL}", description="{EVIL}", json_schema_extra={{"source": "{EVIL}"}})\n',
        encoding="utf-8",
    )
    for args in (("info", file), ("info", file, "--json"), ("run", "--defense", file, "--dry-run")):
        done = hbv(*args)
        assert not hidden(done.out + done.err), args
        assert done.code == 0, done.err

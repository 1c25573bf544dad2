"""The CSV of results: what is read as it was meant, what is refused with its line, and how rows are added."""

from __future__ import annotations

import csv
import math
import os
import re
import stat
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.evaluation.results_csv import COLUMNS, ResultRow, add_row, check_csv, read_csv
from support.cli import hbv
from support.examples import examples
from support.results import collapsed, make_result, write_csv

RUNS = [make_result(run="one", seed=0), make_result(run="two", seed=1, **collapsed("60% are empty; low"))]
Damage = Callable[[list[str]], list[str]]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "results.csv", *RUNS)


def rewrite(path: Path, *, fields: list[str] | None = None, quoting: int = csv.QUOTE_MINIMAL, **cells: str) -> None:
    """Write a CSV again with the csv module, with other columns, quotes, or cells of its second row."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    rows[1] |= cells
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields or COLUMNS, quoting=quoting, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


# ---------------------------------------------------------------------------------------------------------------------
# What is read


@pytest.mark.parametrize(
    "spreadsheet",
    [
        lambda text: "\ufeff" + text,
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace("\n", "\r"),
        lambda text: text.rstrip("\n"),
        lambda text: text.replace("\n", "\n\n") + " \n" + "," * (len(COLUMNS) - 1) + "\n",
        lambda text: re.sub(r"\b(True|False)\b", lambda match: match[0].upper(), text),
        lambda text: re.sub(r"\b(True|False)\b", lambda match: match[0].lower(), text),
    ],
    ids=["byte-order-mark", "crlf", "cr", "no-last-line-end", "empty-lines", "upper-case", "lower-case"],
)
def test_a_file_that_a_spreadsheet_saved_has_the_same_rows(spreadsheet: Callable[[str], str], table: Path) -> None:
    rows = read_csv(table)
    table.write_bytes(spreadsheet(table.read_text(encoding="utf-8")).encode())
    assert read_csv(table) == rows
    assert [row.run for row in rows] == ["one", "two"]
    assert [row.collapsed for row in rows] == [False, True]


def test_quotes_and_the_order_of_columns_do_not_matter(table: Path) -> None:
    rows = read_csv(table)
    rewrite(table, fields=sorted(COLUMNS), quoting=csv.QUOTE_ALL)
    assert read_csv(table) == rows


def test_columns_that_an_older_version_did_not_write_are_empty(table: Path) -> None:
    optional = [name for name, field in ResultRow.model_fields.items() if not field.is_required()]
    assert {"harmful_score_unread", "versions", "reasons"} <= set(optional)
    rewrite(table, fields=[column for column in COLUMNS if column not in optional])
    for row in read_csv(table):
        assert {getattr(row, column) for column in optional} == {None, ""}
        assert (row.harmful_score, row.finetune_accuracy) == (50, 97)


def test_a_missing_or_empty_file_has_no_rows(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_bytes(b"\xef\xbb\xbf\r\n")
    assert read_csv(tmp_path / "empty.csv") == read_csv(tmp_path / "missing.csv") == []


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda lines: [lines[0], lines[1] + ",x,y", lines[2]],
            f"line 2 has {len(COLUMNS) + 2} fields, but the header has {len(COLUMNS)}",
        ),
        (lambda lines: [lines[0], lines[1] + lines[2]], "line 2 has damaged quotes"),
        (lambda lines: [lines[0], lines[1] + "," + lines[2]], f"line 2 has {2 * len(COLUMNS)} fields"),
        (lambda lines: [lines[0], lines[1][:-5], lines[2]], "line 2 has damaged quotes"),
        (lambda lines: [lines[0], lines[1][:60], lines[2]], "line 2 has"),
        (lambda lines: [lines[0], lines[1], "", '"' + lines[2]], "line 4 has damaged quotes"),
        (lambda lines: [lines[0], '"one\n1"' + lines[1][3:], lines[2]], "line 2 has damaged quotes"),
        (lambda lines: [lines[0], lines[1], lines[2][: lines[2].rindex(",")]], f"line 3 has {len(COLUMNS) - 1} fields"),
        (lambda lines: [line.replace(",", ";") for line in lines], "other separators than commas"),
        (lambda lines: lines[1:], "has other columns than a CSV of results"),
        (lambda lines: [lines[0].replace("scorer", "model"), *lines[1:]], "has the column 'model' twice"),
        (lambda lines: [lines[0].replace("scorer", "note"), *lines[1:]], "has an unknown column 'note'"),
        (lambda lines: [lines[0] + ",", *(f"{line}," for line in lines[1:])], "has an unknown column ''"),
        (lambda lines: [lines[0], lines[1], "\0" * 300], "line 3 has 1 fields"),
    ],
)
def test_damage_is_refused_with_its_line(damage: Damage, message: str, table: Path) -> None:
    lines = damage(table.read_text(encoding="utf-8").splitlines())
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    content = table.read_bytes()
    with pytest.raises(BadInput, match=re.escape(message)) as caught:
        read_csv(table)
    assert str(caught.value).startswith(str(table))
    assert "\n" not in str(caught.value)
    with pytest.raises(BadInput):
        add_row(table, RUNS[0])
    assert table.read_bytes() == content
    done = hbv("leaderboard", table)
    assert (done.code, done.out) == (2, "")
    assert message in done.sentence


@pytest.mark.parametrize("column", ["run", "harmful_score", "trained", "defense_params"])
def test_a_missing_column_is_named(column: str, table: Path) -> None:
    rewrite(table, fields=[name for name in COLUMNS if name != column])
    with pytest.raises(BadInput, match=f"lacks the columns {column}. "):
        read_csv(table)


def test_other_encodings_are_refused_with_the_line(table: Path) -> None:
    text = table.read_text(encoding="utf-8")
    for encoding, line in {"utf-16": 1, "latin-1": 3}.items():
        table.write_bytes(text.replace("empty", "n\u00e4").encode(encoding))
        with pytest.raises(BadInput, match=f"line {line} is not UTF-8 text"):
            read_csv(table)


@pytest.mark.parametrize(
    ("column", "cells"),
    {
        "harmful_score": ["150", "-1", "inf", "-inf", "nan", "1e999", "50,0", "fifty", "", "100.001"],
        "finetune_accuracy_low": ["101", "NaN", "-0.5", "\u00bd"],
        "harmful_score_hits": ["-3", "2.5", "9" * 5000],
        "harmful_score_n": ["-1", "inf"],
        "finetune_accuracy_hits": ["-1", "nan"],
        "seed": ["-1", str(2**63), "1.5", "", "9.22337E+18"],
        "alignment_loss": ["inf", "nan", "-0.1"],
        "seconds": ["-1", "0:30"],
        "neither": ["100.5"],
        "collapsed": ["WAHR", "2", "maybe", ""],
        "trained": ["", "no idea"],
        "defense_params": ["", "[]", "{", '{"a": 1, "a": 2}', "1", "[" * 100_000],
        "versions": ["{", "{'torch': 2}"],
        "run": [""],
        "protocol_hash": [""],
    }.items(),
)
def test_values_out_of_range_are_refused_with_line_and_column(column: str, cells: list[str], table: Path) -> None:
    for cell in cells:
        rewrite(table, **{column: cell})
        with pytest.raises(BadInput, match=f"line 3, column {column}[. ]") as caught:
            read_csv(table)
        assert len(str(caught.value)) < len(str(table)) + 400


@pytest.fixture(scope="module")
def good_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv(tmp_path_factory.mktemp("good") / "results.csv", *RUNS)


@settings(max_examples=examples(150), deadline=None)
@given(data=st.data())
def test_no_row_is_lost_silently(data: st.DataObject, good_file: Path) -> None:
    """Of a cut file, all lines are read, or it is refused; one wrong character never removes a row."""
    content = good_file.read_bytes()
    place = data.draw(st.integers(0, len(content)))
    wrong = data.draw(st.sampled_from([b"", b",", b'"', b"\n", b"\r", b"x", b"\0", b"\xff", b'""']))
    cut, rest = content[:place], content[place:]
    damaged_file = good_file.with_name("damaged.csv")
    for damaged, count in {
        cut: max(0, len(cut.splitlines()) - 1),
        cut + wrong + rest: len(RUNS),
        cut + wrong + rest[1:]: len(RUNS),
    }.items():
        damaged_file.write_bytes(damaged)
        try:
            rows = read_csv(damaged_file)
        except BadInput:
            continue
        assert len(rows) == count


# ---------------------------------------------------------------------------------------------------------------------
# What is added


def test_a_row_replaces_the_row_of_its_run_and_keeps_the_others(table: Path) -> None:
    rewrite(table, fields=sorted(COLUMNS), collapsed="TRUE", harmful_score="50.000")
    add_row(table, make_result(run="one", seed=0, harmful_score=12.5))
    with table.open(newline="", encoding="utf-8") as file:
        two, one = csv.DictReader(file)
    assert (list(one), one["run"], one["harmful_score"]) == (COLUMNS, "one", "12.5")
    assert (two["run"], two["collapsed"], two["harmful_score"]) == ("two", "TRUE", "50.000")
    assert [row.harmful_score for row in read_csv(table)] == [50, 12.5]


def test_a_symbolic_link_the_mode_and_the_owner_stay(table: Path, tmp_path: Path) -> None:
    owner = (1234, 1235) if os.getuid() == 0 else (os.getuid(), os.getgid())  # only root may change the owner
    os.chown(table, *owner)
    table.chmod(0o640)
    link = tmp_path / "deep" / "link.csv"
    link.parent.mkdir()
    link.symlink_to(Path("..") / table.name)
    check_csv(link)
    add_row(link, make_result(run="three", seed=2))
    assert link.is_symlink()
    status = table.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o640, *owner)
    assert [row.run for row in read_csv(table)] == ["one", "two", "three"]
    assert [path.name for path in link.parent.iterdir()] == ["link.csv"]  # the lock is next to the file


def test_writers_at_the_same_time_keep_all_rows(table: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.csv"
    link.symlink_to(table)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: add_row([table, link][n % 2], make_result(run=f"run-{n}", seed=n)), range(20)))
    assert {row.run for row in read_csv(table)} == {"one", "two", *(f"run-{n}" for n in range(20))}


@settings(max_examples=examples(100), deadline=None)
@given(names=st.lists(st.text(min_size=1), min_size=4, max_size=4), key=st.text())
def test_any_text_is_read_back_and_is_one_line_without_a_formula(names: list[str], key: str, good_file: Path) -> None:
    run, model, defense, reason = names
    result = make_result(run=run, model=model, defense=defense, attack_params={"a": {key: -1}}, **collapsed(reason))
    table = good_file.with_name("text.csv")
    table.unlink(missing_ok=True)
    write_csv(table, result)
    (row,) = read_csv(table)
    assert (row.run, row.model, row.defense, row.reasons) == (run, model, defense, reason)
    assert row.attack_params == {"a": {key: -1}}
    text = table.read_bytes().decode("utf-8")
    assert len(text.splitlines()) == 2
    (cells,) = csv.DictReader(text.splitlines())
    for cell in cells.values():
        assert not any(unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp") for character in cell)
        assert cell[:1] not in tuple("=+-@") or math.isfinite(float(cell))


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "-3.2", "'=1", "\t=1", "\r=1", "-", "\\u001b", "a\\"])
def test_texts_that_a_spreadsheet_would_compute(text: str, tmp_path: Path) -> None:
    """A number stays a number; a formula begins with an apostrophe, and the text is read back."""
    table = write_csv(tmp_path / "results.csv", make_result(run="one", model=text))
    assert read_csv(table)[0].model == text
    with table.open(newline="", encoding="utf-8") as file:
        (cells,) = csv.DictReader(file)
    assert cells["model"] == text if text in ("+1", "-1", "-3.2", "a\\") else cells["model"][0] in "'\\"


def test_unread_verdicts_and_grades_are_columns(tmp_path: Path) -> None:
    share = {"harmful_score": 50.0, "ci": [0.0, 100.0], "hits": 5, "n": 10, "unparsed": 3}
    score = {**share, "before": share, "sets": {}, "cut": 0, "categories": {}}
    counts = {"unparsed_grades": {"before": 1, "after": 2}}
    table = write_csv(tmp_path / "results.csv", make_result(run="one", scores={"judge": score}, counts=counts), RUNS[1])
    one, two = read_csv(table)
    assert (one.harmful_score_unread, one.finetune_accuracy_unread) == (3, 2)
    assert (two.harmful_score_unread, two.finetune_accuracy_unread) == (None, 0)
    shown = " ".join(hbv("leaderboard", table).out.split())
    assert "Unread grades of sft, which FA leaves out: 2." in shown


# ---------------------------------------------------------------------------------------------------------------------
# Before a run


@pytest.mark.parametrize("flag", [[], ["--dry-run"]])
def test_a_run_refuses_the_csv_before_any_work(flag: list[str], world: Path, table: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.csv"
    damaged.write_text(table.read_text(encoding="utf-8")[:-9], encoding="utf-8")
    (tmp_path / "folder.csv").mkdir()
    os.mkfifo(tmp_path / "fifo.csv")
    home = tmp_path / "home"
    for path, message in {
        damaged: "damaged.csv, line 3 has damaged quotes",
        tmp_path / "folder.csv": "folder.csv is not a regular file",
        tmp_path / "fifo.csv": "fifo.csv is not a regular file",
        tmp_path / ("x" * 220): "is too long",
        table / "results.csv": "cannot be written to",
    }.items():
        done = hbv("run", "--protocol", world, "--csv", path, *flag, home=home)
        assert (done.code, done.out) == (2, ""), path
        assert message in done.sentence
    assert not (home / "store").is_dir() or not any((home / "store").glob("align/*"))


def test_a_write_protected_csv_is_refused(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(BadInput, match="is write-protected"):
        check_csv(table)

"""Data files that are damaged, ambiguous, huge or no files: refused with file and line, or read as they are meant."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from harmbench_vaccine.core.errors import BadInput, HbvError
from harmbench_vaccine.core.jsonl import read_lines
from harmbench_vaccine.data.sources import fingerprint, parse_split, read_rows
from support.examples import examples

FIELDS = ("instruction", "output")
ROW = {"instruction": "a", "output": "b"}


def store(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def rows_of(path: Path, fields: tuple[str, ...] = FIELDS) -> list[dict[str, Any]]:
    return [dict(row.values) for row in read_rows(str(path), "train", fields)]


def read_error(path: Path, fields: tuple[str, ...] = FIELDS) -> str:
    """Return the one-line error of a file, without the path before its name."""
    with pytest.raises(BadInput) as raised:
        read_rows(str(path), "train", fields)
    message = str(raised.value)
    assert "\n" not in message
    message.encode()  # it can be printed
    return message.replace(f"{path.parent}/", "")


# ---------------------------------------------------------------------------------------------------------------------
# Tables


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('instruction,output\nA,B\nC,"D\nE,F\nG,H\n', 3),
        ('instruction,output\nA,B\nC,"D\nE,"F"\n', 3),
        ('instruction,output\n"A",B\n"C\n\nD","E\nF,G\n', 5),  # the first quote of this row is closed
        ('instruction,output\r"A\r",B\r"C" D,E\r', 4),
        ('"instruction,output\nA,B\n', 1),
    ],
)
def test_quote_without_end_is_refused_where_it_opens(tmp_path: Path, content: str, line: int) -> None:
    message = read_error(store(tmp_path / "rows.csv", content))
    assert message.startswith(f"rows.csv, line {line}: ")
    assert "no quote closes it" in message


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv"])
def test_text_in_quotes_may_have_several_lines(tmp_path: Path, name: str) -> None:
    delimiter = "," if name == "rows.csv" else "\t"
    lines = [delimiter.join(fields) for fields in (FIELDS, ("A", '"first\n\n""second"", third"'), ('5" pipe', "B"))]
    place = store(tmp_path / name, "\n".join(lines))
    assert rows_of(place) == [
        {"instruction": "A", "output": 'first\n\n"second", third'},
        {"instruction": '5" pipe', "output": "B"},
    ]
    assert [row.place.rpartition(" ")[2] for row in read_rows(str(place), "train", FIELDS)] == ["2", "5"]


def test_table_with_two_readings_is_refused(tmp_path: Path) -> None:
    """Quotes without a meaning give three rows here; quotes with one give two."""
    content = 'instruction\toutput\n"A\tB\nC\tD"\nE\tF\n'
    assert "line 2: a quote opens here and closes on line 3" in read_error(store(tmp_path / "rows.tsv", content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("instruction,output,output\na,b,c\n", "several columns have the same name: ['output']"),
        ("instruction,,output,\na,b,c,d\n", "several columns have the same name: ['']"),
        ("instruction,output\na\n", "line 2: the number of fields differs from the header: 1 instead of 2"),
        ("instruction,output\n\na,b,c\n", "line 3: the number of fields differs from the header: 3 instead of 2"),
        ("instruction;output\na;b\n", "this one has instruction;output"),
        ("instruction,output\na,b\na,\0\n", "line 3, is not UTF-8 text: it has a NUL character"),
        ("instruction,output\na,ü\n".encode("utf-16"), "UTF-16: save it with the encoding UTF-8"),
        ("instruction,output\na,ü\n".encode("latin-1"), "line 2, is not UTF-8 text: it has the byte 0xfc"),
        ("instruction,output\na\rb,c\n", "line 2: not a table: a carriage return is not in quotes"),
        ("instruction,output,label\na,b,\n", "line 2: field 'label' has no value"),
        ("", "is empty"),
        ("\n\n", "is empty"),
    ],
)
def test_damaged_tables_are_refused(tmp_path: Path, content: str | bytes, message: str) -> None:
    fields = (*FIELDS, "label") if "label" in message else FIELDS
    assert message in read_error(store(tmp_path / "rows.csv", content), fields)


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", ["rows.CSV", "Rows.Tsv", "rows.JSONL", "rows.JSONL.GZ"])
def test_capitals_and_line_ends(tmp_path: Path, name: str, newline: str) -> None:
    if "csv" in name.lower() or "tsv" in name.lower():
        delimiter = "," if "csv" in name.lower() else "\t"
        lines = [delimiter.join((" instruction", "output ")), delimiter.join("ab"), delimiter.join("ab")]
    else:
        lines = [json.dumps(ROW)] * 2
    content = newline.join(lines).encode()
    store(tmp_path / name, gzip.compress(content) if name.endswith("GZ") else content)
    assert rows_of(tmp_path / name) == [ROW, ROW]


@pytest.mark.parametrize(
    ("label", "value"),
    [("1", 1), (" 1", 1), ("1.0", 1), ("-1", -1), ("1.5", "1.5"), ("x", "x"), ("9" * 5000, "9" * 5000)],
)
def test_labels_of_a_table(tmp_path: Path, label: str, value: object) -> None:
    store(tmp_path / "rows.csv", f"sentence,label\na,{label}\n")
    assert rows_of(tmp_path / "rows.csv", ("sentence", "label")) == [{"sentence": "a", "label": value}]


@pytest.mark.parametrize(("text", "value"), [("True", True), (" FALSE", False), ("1", True), ("0 ", False)])
def test_booleans_of_a_table(tmp_path: Path, text: str, value: bool) -> None:
    store(tmp_path / "rows.csv", f"prompt,is_safe\na,{text}\n")
    assert rows_of(tmp_path / "rows.csv", ("prompt", "is_safe")) == [{"prompt": "a", "is_safe": value}]


# ---------------------------------------------------------------------------------------------------------------------
# Values


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
@pytest.mark.parametrize("value", [float("nan"), None])
def test_optional_field_without_a_value_is_missing(tmp_path: Path, name: str, value: Any) -> None:
    path = write_rows(tmp_path / name, [{**ROW, "input": value, "label": 1.0}])
    assert rows_of(path) == [{**ROW, "label": 1}]
    assert "field 'input' is missing" in read_error(path, ("other", "input")).replace("'other'", "'input'")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
@pytest.mark.parametrize("value", [float("nan"), None, float("inf")])
def test_required_field_without_a_value_is_refused(tmp_path: Path, name: str, value: Any) -> None:
    path = write_rows(tmp_path / name, [{"instruction": "a", "output": value}])
    assert "field 'output' has no value; a row needs instruction, output" in read_error(path)


def test_nan_in_a_table_is_text(tmp_path: Path) -> None:
    store(tmp_path / "rows.csv", "instruction,output\nWhat is NaN?,nan\n")
    assert rows_of(tmp_path / "rows.csv")[0]["output"] == "nan"


@pytest.mark.parametrize("field", ["instruction", "output", "input", "other", "nested"])
@pytest.mark.parametrize(
    ("text", "message"), [("Hi \ud83d", r"half of a character (\ud83d) after 'Hi '"), ("Hi\0", r"(\u0000) after 'Hi'")]
)
def test_text_that_no_tokenizer_reads_is_refused(tmp_path: Path, field: str, text: str, message: str) -> None:
    row = {**ROW, field: [{"content": text}] if field == "nested" else text}
    error = read_error(write_rows(tmp_path / "rows.jsonl", [ROW, row]))
    assert error.startswith(f"rows.jsonl, line 2: field '{field}' has ")
    assert message in error


def test_complete_surrogate_pairs_are_read(tmp_path: Path) -> None:
    store(tmp_path / "rows.jsonl", '{"instruction": "\\ud83d\\ude00", "output": "b"}')
    assert rows_of(tmp_path / "rows.jsonl")[0]["instruction"] == "\U0001f600"


def test_half_of_an_emoji_in_a_field_name_can_be_printed(tmp_path: Path) -> None:
    assert "outp\\ud83dut" in read_error(
        write_rows(tmp_path / "rows.jsonl", [{"instruction": "a", "outp\ud83dut": ""}])
    )


# ---------------------------------------------------------------------------------------------------------------------
# JSON


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[" * 100_000, "rows.jsonl: values are nested too deeply"),
        ('{"a":' * 100_000, "line 1: values are nested too deeply"),
        ('{"instruction": "a", "output": "b", "x": ' + "9" * 5000 + "}", "line 1: a number has too many digits"),
        ('{"instruction": "a", "output": "b", "output": "c"}', "line 1: an object has the key 'output' twice"),
        ('{"instruction": "a", "output": "b",}', "line 1: not JSON"),
        ('{"instruction": "a", "output": "b", "input": 3}', "line 1: field 'input' holds 3, which is not text"),
        ('{"instruction": "a", "output": ["b"]}', "line 1: field 'output' holds list, which is not text"),
        ('\n{"instruction": "a", "output": "b"} {}', "line 2: not JSON"),
    ],
)
def test_damaged_json_is_refused(tmp_path: Path, line: str, message: str) -> None:
    assert message in read_error(store(tmp_path / "rows.jsonl", line))


def test_damaged_line_of_a_stored_file_is_named(tmp_path: Path) -> None:
    for line in (b'{"a": ', b"[1]", b'{"a": "\xff"}', b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"):
        store(tmp_path / "answers.jsonl", b'{"a": 1}\n' + line + b"\n")
        with pytest.raises(HbvError, match=r"answers\.jsonl, line 2, is damaged: ") as raised:
            read_lines(tmp_path / "answers.jsonl")
        assert raised.value.exit_code == 1


def test_split_with_5000_digits_is_refused() -> None:
    with pytest.raises(BadInput, match="cannot be read; allowed: NAME"):
        parse_split(f"train[:{'9' * 5000}]")


# ---------------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("kind", ["pipe", "device", "link to nothing", "loop", "locked"])
def test_what_is_not_a_readable_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "rows.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "locked":
        write_rows(path, [ROW]).chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("this user may read every file")
    else:
        path.symlink_to({"device": "/dev/zero", "link to nothing": "nothing", "loop": "rows.jsonl"}[kind])
    for read in (lambda: rows_of(path), lambda: fingerprint(str(path), "dataset")):
        with pytest.raises(BadInput, match=r"cannot be read: |regular file"):
            read()


def test_folder_with_the_name_of_a_file_is_a_folder_of_splits(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").mkdir()
    assert "has no split 'train'. Allowed: none" in read_error(tmp_path / "rows.jsonl")
    write_rows(tmp_path / "rows.jsonl" / "train.jsonl", [ROW])
    assert rows_of(tmp_path / "rows.jsonl") == [ROW]


@pytest.mark.parametrize("damage", ["cut", "flipped", "other magic", "empty"])
def test_damaged_gzip_is_refused(tmp_path: Path, damage: str) -> None:
    content = bytearray(gzip.compress("".join(json.dumps({**ROW, "n": n}) + "\n" for n in range(500)).encode()))
    if damage == "flipped":
        content[len(content) // 2] ^= 255
    damaged = {"cut": content[:-20], "other magic": b"PK" + content[2:], "empty": b"", "flipped": content}[damage]
    message = read_error(store(tmp_path / "rows.jsonl.gz", bytes(damaged)))
    assert ("is empty" if damage == "empty" else "cannot be read") in message


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.jsonl", "rows.parquet"])
def test_text_over_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("HBV_MAX_DATA_MB", "2")
    rows = [{"instruction": "a" * 1_500_000, "output": "b"}] * 2
    if name == "rows.parquet":
        write_rows(tmp_path / name, rows)
    else:
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        store(tmp_path / name, gzip.compress(content) if name.endswith("gz") else content)
    message = read_error(tmp_path / name)
    assert "more than 2 MB of text" in message
    assert "HBV_MAX_DATA_MB" in message
    monkeypatch.setenv("HBV_MAX_DATA_MB", "4")
    assert rows_of(tmp_path / name) == rows


@pytest.mark.parametrize("text", ["x", "0", "-1", "1.5", "9" * 5000])
def test_limit_must_be_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("HBV_MAX_DATA_MB", text)
    with pytest.raises(BadInput, match=r"HBV_MAX_DATA_MB is .*; allowed: a positive whole number of megabytes"):
        rows_of(write_rows(tmp_path / "rows.jsonl", [ROW]))


def test_columns_of_datasets_that_cannot_be_used(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"instruction": ["a"], "output": [None]}).save_to_disk(tmp_path / "nulls")
    assert "split train, row 0: field 'output' has no value" in read_error(tmp_path / "nulls")
    columns = {"instruction": ["a"], "output": ["b"], "picture": [{"bytes": b"no picture", "path": None}]}
    table = datasets.Dataset.from_dict(columns).cast_column("picture", datasets.Image())
    table.save_to_disk(tmp_path / "pictures")
    assert "cannot be read: " in read_error(tmp_path / "pictures")


def test_parquet_with_two_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    table = pyarrow.table([["a"], ["b"], ["c"]], names=["instruction", "output", "output"])
    parquet.write_table(table, tmp_path / "rows.parquet")
    assert "columns with the same name" in read_error(tmp_path / "rows.parquet")


# ---------------------------------------------------------------------------------------------------------------------
# Generated files

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
VALUE = st.one_of(TEXT, st.text('",;\n\r\t \\ab', max_size=12))
ROWS = st.lists(st.fixed_dictionaries({"instruction": VALUE, "output": VALUE, "extra": VALUE}), min_size=1, max_size=4)


def read_bytes(name: str, content: bytes) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        return rows_of(store(Path(folder) / name, content))


@settings(max_examples=examples(200), deadline=None)
@given(ROWS, st.sampled_from(["csv", "tsv"]), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_table_of_the_csv_module_is_read_exactly(rows: list[Any], kind: str, newline: str, quote_all: bool) -> None:
    # A TSV whose text has lines that are complete rows is refused, and the writer puts no quotes around a lone \r.
    dropped = ("\t" if kind == "tsv" else "") + ("\r" if newline == "\n" and not quote_all else "")
    rows = [{name: text.translate(dict.fromkeys(map(ord, dropped))) for name, text in row.items()} for row in rows]
    file = io.StringIO(newline="")
    writer = csv.DictWriter(
        file,
        list(rows[0]),
        delimiter="," if kind == "csv" else "\t",
        lineterminator=newline,
        quoting=csv.QUOTE_ALL if quote_all else csv.QUOTE_MINIMAL,
    )
    writer.writeheader()
    writer.writerows(rows)
    assert read_bytes(f"rows.{kind}", file.getvalue().encode()) == rows


@settings(max_examples=examples(200), deadline=None)
@given(ROWS, st.booleans(), st.booleans(), st.booleans())
def test_file_of_the_json_module_is_read_exactly(rows: list[Any], array: bool, ascii_only: bool, packed: bool) -> None:
    if array:
        content = json.dumps(rows, ensure_ascii=ascii_only, indent=1).encode()
    else:
        content = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows).encode()
    name = "rows.jsonl.gz" if packed else "rows.jsonl"
    assert read_bytes(name, gzip.compress(content) if packed else content) == rows


PIECES = ["instruction", "output", "\\ud83d", "NaN", "1e999", '""', *',\t"\n\r{}[]:a']
CONTENTS = st.one_of(
    st.binary(max_size=60),
    st.lists(st.sampled_from(PIECES), max_size=30).map(lambda pieces: "".join(pieces).encode()),
    st.lists(st.sampled_from(PIECES), max_size=30).map(
        lambda pieces: ("instruction,output\n" + "".join(pieces)).encode()
    ),
)


@settings(max_examples=examples(200), deadline=None)
@given(CONTENTS, st.sampled_from(["rows.csv", "rows.tsv", "rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.jsonl.xz"]))
def test_any_bytes_give_rows_or_one_line(content: bytes, name: str) -> None:
    try:
        rows = read_bytes(name, content)
    except BadInput as error:
        message = str(error)
    else:
        message = ""
        assert all(isinstance(row[field], str) for row in rows for field in FIELDS)
    assert "\n" not in message
    message.encode()

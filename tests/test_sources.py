"""Every door that rows come through: files in the upstream schemas, folders, the hub's cache; and what refuses."""

from __future__ import annotations

import csv
import gzip
import json
import lzma
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.errors as hub_errors
import pyarrow
import pytest
from huggingface_hub.utils import _http
from pyarrow import parquet

from harmbench_vaccine.core.errors import BadInput, HbvError
from harmbench_vaccine.data import hub, sources
from harmbench_vaccine.data.sources import (
    fingerprint,
    local_path,
    name_and_revision,
    parse_split,
    provenance,
    read_rows,
)
from support import tiny

http: Any = getattr(_http, "httpx2", None) or getattr(_http, "httpx", None)
"""The library that huggingface_hub speaks to the hub by: another one in its newer versions."""

BEAVER = [
    {
        "prompt": f"Question {number}, \"quoted\"\nand on a second line",
        "response": f"Ünswer {number}" * (200 if number == 2 else 1),
        "category": {name: number == 1 and name == tiny.CATEGORIES[3] for name in tiny.CATEGORIES},
        "is_safe": number != 1,
    }
    for number in range(5)
]  # fmt: skip
FIELDS = ("prompt", "response", "is_safe")
COMMIT, OTHER = "0123456789abcdef" * 2 + "01234567", "f" * 40


def json_array(path: Path, rows: Sequence[Any]) -> None:
    path.write_text(json.dumps(rows, indent=4), encoding="utf-8")


def json_lines(path: Path, rows: Sequence[Any], opened: Callable[..., Any] = open) -> None:
    with opened(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def table(path: Path, rows: Sequence[Any]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)


def columns(path: Path, rows: Sequence[Any]) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)


WRITERS: dict[str, Callable[[Path, Sequence[Any]], None]] = {
    "rows.jsonl": json_lines,
    "lines.json": json_lines,
    "array.json": json_array,
    "array.jsonl": json_array,
    "rows": json_lines,
    "rows.csv": table,
    "rows.tsv": table,
    "rows.parquet": columns,
    "rows.jsonl.gz": lambda path, rows: json_lines(path, rows, gzip.open),
    "rows.jsonl.xz": lambda path, rows: json_lines(path, rows, lzma.open),
}


def values(location: Path | str, split: str = "train", fields: Sequence[str] = FIELDS) -> list[Any]:
    return [{name: row.values[name] for name in fields} for row in read_rows(str(location), split, fields)]


WANTED = [{name: row[name] for name in FIELDS} for row in BEAVER]


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_of_each_format(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, BEAVER)
    assert values(tmp_path / name) == WANTED
    assert [row.number for row in read_rows(str(tmp_path / name), "train", FIELDS)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_the_category_of_a_row_stays_a_table(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, BEAVER)
    assert [row.values["category"] for row in read_rows(str(tmp_path / name), "x", FIELDS)] == [
        row["category"] for row in BEAVER
    ]


@pytest.mark.parametrize(
    ("file", "split"),
    [
        ("train.jsonl", "train"),
        ("30k_train.jsonl.gz", "30k_train"),
        ("round0/30k/train.jsonl.gz", "30k_train"),
        ("round0/330k/test.jsonl.xz", "330k_test"),
        ("train.csv", "train"),
        ("data/train-00000-of-00001-a09b74b3ef9c3b56.parquet", "train"),
        ("train-00000-of-00001.parquet", "train"),
        ("validation.parquet", "validation"),
    ],
)
def test_a_folder_in_an_upstream_layout(tmp_path: Path, file: str, split: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    kind = next(name for name in WRITERS if name.startswith("rows.") and file.endswith(name.removeprefix("rows")))
    WRITERS[kind](tmp_path / file, BEAVER)
    (tmp_path / "README.md").write_text("words")
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert values(tmp_path, split) == WANTED
    with pytest.raises(BadInput, match=rf"has no split 'other'\. Allowed: {split}\.$"):
        read_rows(str(tmp_path), "other", FIELDS)


def test_shards_are_read_in_their_order_and_none_may_lack(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    parts = {"00000": BEAVER[:2], "00001": BEAVER[2:4], "00002": BEAVER[4:]}
    for shard in ("00002", "00000", "00001"):
        columns(tmp_path / "data" / f"train-{shard}-of-00003.parquet", parts[shard])
    assert values(tmp_path) == WANTED
    (tmp_path / "data" / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(BadInput, match="has 2 of its 3 files"):
        read_rows(str(tmp_path), "train", FIELDS)


def test_one_split_in_two_files_is_refused(tmp_path: Path) -> None:
    json_lines(tmp_path / "train.jsonl", BEAVER)
    table(tmp_path / "train.csv", BEAVER)
    with pytest.raises(BadInput, match=r"in several files: train\.csv, train\.jsonl"):
        read_rows(str(tmp_path), "train", FIELDS)


def test_a_folder_of_the_datasets_library(tmp_path: Path) -> None:
    """With labels that have names: they are read as the numbers that they are stored as."""
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["negative", "positive"])})
    splits = {
        name: Dataset.from_dict({"sentence": [f"{name} a", "b"], "label": [1, 0]}, features)
        for name in ("train", "validation")
    }
    DatasetDict(splits).save_to_disk(tmp_path / "both")
    splits["train"].save_to_disk(tmp_path / "one")
    fields = ("sentence", "label")
    assert values(tmp_path / "both", "validation", fields) == [
        {"sentence": "validation a", "label": 1},
        {"sentence": "b", "label": 0},
    ]
    assert values(tmp_path / "one", "train", fields)[0]["sentence"] == "train a"
    with pytest.raises(BadInput, match=r"no split 'test'\. Allowed: train, validation"):
        read_rows(str(tmp_path / "both"), "test", fields)
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(BadInput, match="cannot be read as a data set"):
        read_rows(str(tmp_path / "one"), "train", fields)


@pytest.mark.parametrize(
    ("split", "numbers"),
    [
        ("train[:2]", [0, 1]),
        ("train[3:]", [3, 4]),
        ("train[-2:]", [3, 4]),
        ("train[:-3]", [0, 1]),
        ("train[1:3]", [1, 2]),
        ("train[:]", [0, 1, 2, 3, 4]),
        ("train[:99]", [0, 1, 2, 3, 4]),
    ],
)
def test_slices_keep_the_rows_numbers(tmp_path: Path, split: str, numbers: list[int]) -> None:
    json_lines(tmp_path / "train.jsonl", BEAVER)
    assert [row.number for row in read_rows(str(tmp_path), split, FIELDS)] == numbers


def test_slices_that_are_none(tmp_path: Path) -> None:
    json_lines(tmp_path / "train.jsonl", BEAVER)
    for split in ("train[:10%]", "train[3]", "train[1:2:3]", "[:3]"):
        with pytest.raises(BadInput, match="in rows"):
            parse_split(split)
    with pytest.raises(BadInput, match="is empty: 'train' has 5 rows"):
        read_rows(str(tmp_path), "train[5:]", FIELDS)


# ---------------------------------------------------------------------------------------------------------------------
# What a file may not be


def refused(path: Path, fields: Sequence[str] = FIELDS) -> str:
    with pytest.raises(BadInput) as told:
        read_rows(str(path), "train", fields)
    said = str(told.value)
    assert "\n" not in said
    assert str(path) in said
    return said


def test_wrong_fields_say_what_is_there(tmp_path: Path) -> None:
    table(tmp_path / "rows.csv", [{"prompt": "a", "answer": "b"}])
    said = refused(tmp_path / "rows.csv")
    assert "line 2: field 'response' is missing" in said
    assert "a row needs prompt, response, is_safe, and this one has prompt, answer" in said


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.csv", "prompt,response,is_safe\na,b,maybe\n", "field 'is_safe' holds 'maybe'; allowed: true, false"),
        ("rows.csv", "prompt,response,is_safe\na,b\n", "line 2: it has another number of fields than the header"),
        ("rows.csv", "prompt,response,is_safe\na,b,true,c\n", "line 2: it has another number of fields than"),
        ("rows.csv", "prompt,response,is_safe\n", "is empty"),
        ("rows.json", "", "is empty"),
        ("rows.json", "[]", "is empty"),
        ("rows.json", "[{]", "not JSON"),
        ("rows.json", '[{"prompt": "a"}, 3]', "row 1: a row is a JSON object, not int"),
        ("rows.jsonl", '{"prompt": "a", "response": 3, "is_safe": true}', "field 'response' holds 3, which is no text"),
        ("rows.parquet", "no parquet", "cannot be read as parquet"),
        ("rows.jsonl.gz", "no gzip", "cannot be read"),
        ("rows.jsonl.xz", "no xz", "cannot be read"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_what_it_should_be(tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / name).write_text(content)
    assert said in refused(tmp_path / name, ("prompt",) if "not int" in said else FIELDS)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_a_file_in_another_encoding(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes("prompt,response\n[ü".encode("latin-1"))
    assert "is not UTF-8 text" in refused(tmp_path / name)


def test_a_cut_parquet_file(tmp_path: Path) -> None:
    columns(tmp_path / "rows.parquet", BEAVER)
    whole = (tmp_path / "rows.parquet").read_bytes()
    (tmp_path / "rows.parquet").write_bytes(whole[: len(whole) // 2])
    assert "cannot be read as parquet" in refused(tmp_path / "rows.parquet")


def test_text_in_a_table_is_not_taken_for_a_value(tmp_path: Path) -> None:
    """A reader that guesses types would make numbers and gaps of these."""
    rows = [{"sentence": text, "label": 1} for text in ("NA", "null", "007", "1e3", "", "true")]
    table(tmp_path / "rows.csv", rows)
    assert values(tmp_path / "rows.csv", "x", ("sentence", "label")) == rows


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("\ufeffsentence,label\na,-1\n", encoding="utf-8")
    assert values(tmp_path / "rows.csv", "x", ("sentence", "label")) == [{"sentence": "a", "label": -1}]


# ---------------------------------------------------------------------------------------------------------------------
# The hub


@pytest.mark.parametrize(
    ("location", "name"),
    [
        ("PKU-Alignment/BeaverTails", hub.HubName("PKU-Alignment/BeaverTails", None, None)),
        ("openai/gsm8k:main", hub.HubName("openai/gsm8k", "main", None)),
        ("openai/gsm8k:main@v1.0", hub.HubName("openai/gsm8k", "main", "v1.0")),
        ("org/model@refs/pr/3", hub.HubName("org/model", None, "refs/pr/3")),
        ("a/b:data/rows.json", hub.HubName("a/b", "data/rows.json", None)),
        (f"a/b:rows.jsonl.gz@{COMMIT}", hub.HubName("a/b", "rows.jsonl.gz", COMMIT)),
        ("sst2", hub.HubName("sst2", None, None)),
    ],
)
def test_names_of_the_hub(location: str, name: hub.HubName) -> None:
    assert hub.parse_hub_name(location) == name
    assert local_path(location) is None


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache of this test's own, with nothing in it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    hub._told_by_hub.cache_clear()
    return tmp_path / "hub"


def cached(cache: Path, name: str, file: str, rows: Sequence[Any], commit: str = COMMIT, kind: str = "dataset") -> None:
    """A repository as the hub's client leaves it in its cache."""
    folder = cache / f"{kind}s--{name.replace('/', '--')}"
    path = folder / "snapshots" / commit / file
    path.parent.mkdir(parents=True)
    json_array(path, rows)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(commit)


REFUSALS = [
    {**row, "is_safe": False, "refusal": f"Question: {row['prompt']}\nAnswer: I cannot."} for row in BEAVER
]  # fmt: skip


def test_a_file_of_a_repository_is_read_from_the_cache(cache: Path) -> None:
    location = "someone/set:data/beavertails_with_refusals_train.json"
    cached(cache, "someone/set", "data/beavertails_with_refusals_train.json", REFUSALS)
    fields = ("prompt", "response", "refusal")
    assert values(location, "train[1:]", fields) == [{name: row[name] for name in fields} for row in REFUSALS[1:]]
    assert provenance(location) == {
        "location": location, "revision": None, "resolved": COMMIT, "rows": {"train[1:]": 4},
    }  # fmt: skip
    assert fingerprint(location, "dataset") == f"{location}@{COMMIT}"
    with pytest.raises(HbvError, match="not on this machine") as told:
        read_rows("someone/set:data/other.json", "train", fields)
    assert told.value.exit_code == 1


def test_a_revision_that_was_settled_stays(cache: Path, own_home: Path) -> None:
    cached(cache, "a/set", "rows.json", BEAVER)
    assert name_and_revision("a/set", "dataset") == ("a/set", COMMIT)
    assert json.loads((own_home / "revisions.json").read_text()) == {"dataset a/set@main": COMMIT}
    (cache / "datasets--a--set" / "refs" / "main").write_text(OTHER)  # the branch moves on
    assert name_and_revision("a/set", "dataset") == ("a/set", COMMIT)
    assert name_and_revision(f"a/set@{OTHER}", "dataset") == ("a/set", OTHER)
    assert name_and_revision("a/set", "model") == ("a/set", None)  # a model of that name is another repository
    (own_home / "revisions.json").unlink()
    assert name_and_revision("a/set", "dataset") == ("a/set", OTHER)


def test_the_hub_is_asked_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Api:
        def dataset_info(self, name: str, revision: str | None, timeout: float) -> Any:
            asked.append((name, revision))
            return type("Info", (), {"sha": COMMIT})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    for _ in range(3):
        assert fingerprint("a/set@v2", "dataset") == f"a/set@{COMMIT}"
        hub._told_by_hub.cache_clear()
    assert asked == [("a/set", "v2")]


def test_what_nobody_tells_is_unknown(cache: Path, own_home: Path) -> None:
    assert fingerprint("a/set@v2", "dataset") == "a/set@v2"
    assert name_and_revision("a/set@v2") == ("a/set", "v2")
    assert provenance("a/set@v2")["resolved"] == "unknown"
    assert not (own_home / "revisions.json").exists()


def test_a_path_has_no_revision(tmp_path: Path) -> None:
    json_lines(tmp_path / "rows@v1.jsonl", BEAVER)
    location = str(tmp_path / "rows@v1.jsonl")
    assert name_and_revision(location) == (location, None)
    values(location)
    found = provenance(location)
    assert found == {"location": location, "fingerprint": fingerprint(location), "rows": {"train": 5}}


def response(status: int) -> Any:
    return http.Response(status, request=http.Request("GET", "https://hub"))


def gated() -> Exception:
    from datasets.exceptions import DatasetNotFoundError

    error = DatasetNotFoundError(
        "Dataset 'a/set' is a gated dataset on the Hub. You must be authenticated to access it."
    )
    error.__cause__ = hub_errors.GatedRepoError("401 Client Error.\n\nCannot access gated repo", response=response(401))
    return error


def missing() -> Exception:
    from datasets.exceptions import DatasetNotFoundError

    return DatasetNotFoundError("Dataset 'a/set' doesn't exist on the Hub or cannot be accessed.")


@pytest.mark.parametrize(
    ("error", "said", "code"),
    [
        (gated, "'a/set:main' is gated: ask for access on its page of the hub, then log in", 2),
        (missing, "is not on the hub, or only for those who have access", 2),
        (lambda: ConnectionError("Couldn't reach 'a/set' on the Hub (OfflineModeIsEnabled)"), "not on this machine", 1),
        (
            lambda: ValueError("Unknown split \"tset\". Should be one of ['train', 'test']."),
            "has no split 'train'. Allowed: train, test.", 2,
        ),
        (
            lambda: ValueError("Config name is missing.\nPlease pick one of the configs: ['main', 'socratic']"),
            "owner/name:CONFIG: main, socratic.", 2,
        ),
        (
            lambda: ValueError("BuilderConfig 'x' not found. Available: ['main', 'socratic']"),
            "owner/name:CONFIG: main, socratic.", 2,
        ),
        (lambda: RuntimeError("Dataset scripts are no longer supported, but found a.py"), "owner/name:FILE.json", 2),
        (lambda: OSError("disk\non fire"), "cannot be read: disk on fire", 1),
    ],
)  # fmt: skip
def test_a_data_set_that_cannot_be_had(
    cache: Path, monkeypatch: pytest.MonkeyPatch, error: Callable[[], Exception], said: str, code: int
) -> None:
    import datasets

    def load(*args: Any, **kwargs: Any) -> Any:
        raise error()

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(HbvError) as told:
        read_rows("a/set:main", "train", FIELDS)
    assert said in str(told.value)
    assert "\n" not in str(told.value)
    assert told.value.exit_code == code


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (lambda: hub_errors.GatedRepoError("401", response=response(401)), "is gated"),
        (lambda: hub_errors.RevisionNotFoundError("404", response=response(404)), "no such revision"),
        (lambda: hub_errors.RemoteEntryNotFoundError("404", response=response(404)), "no such file"),
        (lambda: hub_errors.RepositoryNotFoundError("404", response=response(404)), "not on the hub"),
    ],
)
def test_a_file_that_cannot_be_had(
    cache: Path, monkeypatch: pytest.MonkeyPatch, error: Callable[[], Exception], said: str
) -> None:
    def load(*args: Any, **kwargs: Any) -> Any:
        raise error()

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", load)
    with pytest.raises(BadInput, match=said):
        read_rows("a/set:rows.json", "train", FIELDS)


def test_a_data_set_is_loaded_by_name_configuration_split_and_commit(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    asked = []

    def load(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        return datasets.Dataset.from_list([{"question": f"q{number}", "answer": "#### 1"} for number in range(2500)])

    monkeypatch.setattr(datasets, "load_dataset", load)
    cached(cache, "openai/gsm8k", "README.json", [])
    rows = read_rows("openai/gsm8k:main", "train[-3:]", ("question", "answer"))
    assert asked == [(("openai/gsm8k", "main"), {"split": "train", "revision": COMMIT})]
    assert [(row.number, row.values["question"]) for row in rows] == [(2497, "q2497"), (2498, "q2498"), (2499, "q2499")]


def test_a_data_set_that_is_in_no_cache_is_told_by_the_library_itself(cache: Path) -> None:
    with pytest.raises(HbvError, match="'nobody/nothing' is not on this machine, and the hub cannot be reached"):
        read_rows("nobody/nothing", "train", FIELDS)


def test_rows_are_counted_where_they_are_read(tmp_path: Path) -> None:
    json_lines(tmp_path / "train.jsonl", BEAVER)
    for split in ("train[:2]", "train", "train[:2]"):
        values(tmp_path, split)
    assert provenance(str(tmp_path))["rows"] == {"train[:2]": 2, "train": 5}
    assert sources._ROWS_READ[str(tmp_path), "train"] == 5

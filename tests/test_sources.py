"""Sources of rows: files and folders in upstream formats, the Hub and its cache, and readable errors."""

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
from harmbench_vaccine.data import hub
from harmbench_vaccine.data.hub import Kind, hub_access_error
from harmbench_vaccine.data.sources import (
    RowReader,
    fingerprint,
    local_path,
    name_and_revision,
    parse_split,
    provenance,
    read_rows,
)
from support import tiny

http: Any = getattr(_http, "httpx2", None) or getattr(_http, "httpx", None)
"""The HTTP library of huggingface_hub, which depends on its version."""

BEAVER = [
    {
        "prompt": f'Question {number}, "quoted"\nand on a second line',
        "response": f"Ünswer {number}" * (200 if number == 2 else 1),
        "category": {name: number == 1 and name == tiny.CATEGORIES[3] for name in tiny.CATEGORIES},
        "is_safe": number != 1,
    }
    for number in range(5)
]
FIELDS = ("prompt", "response", "is_safe")
COMMIT, OTHER = "0123456789abcdef" * 2 + "01234567", "f" * 40


def write_json_array(path: Path, rows: Sequence[Any]) -> None:
    path.write_text(json.dumps(rows, indent=4), encoding="utf-8")


def write_json_lines(path: Path, rows: Sequence[Any], opened: Callable[..., Any] = open) -> None:
    with opened(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_table(path: Path, rows: Sequence[Any]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: Sequence[Any]) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)


WRITERS: dict[str, Callable[[Path, Sequence[Any]], None]] = {
    "rows.jsonl": write_json_lines,
    "lines.json": write_json_lines,
    "array.json": write_json_array,
    "array.jsonl": write_json_array,
    "rows": write_json_lines,
    "rows.csv": write_table,
    "rows.tsv": write_table,
    "rows.parquet": write_parquet,
    "rows.jsonl.gz": lambda path, rows: write_json_lines(path, rows, gzip.open),
    "rows.jsonl.xz": lambda path, rows: write_json_lines(path, rows, lzma.open),
}


def values(location: Path | str, split: str = "train", fields: Sequence[str] = FIELDS) -> list[Any]:
    return [{name: row.values[name] for name in fields} for row in read_rows(str(location), split, fields)]


EXPECTED = [{name: row[name] for name in FIELDS} for row in BEAVER]


@pytest.mark.parametrize("name", WRITERS)
def test_file_formats(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, BEAVER)
    assert values(tmp_path / name) == EXPECTED
    assert [row.number for row in read_rows(str(tmp_path / name), "train", FIELDS)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_category_of_a_row_stays_a_dictionary(tmp_path: Path, name: str) -> None:
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
def test_folder_in_an_upstream_layout(tmp_path: Path, file: str, split: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    kind = next(name for name in WRITERS if name.startswith("rows.") and file.endswith(name.removeprefix("rows")))
    WRITERS[kind](tmp_path / file, BEAVER)
    (tmp_path / "README.md").write_text("words")
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert values(tmp_path, split) == EXPECTED
    with pytest.raises(BadInput, match=rf"has no split 'other'\. Allowed: {split}\.$"):
        read_rows(str(tmp_path), "other", FIELDS)


def test_shards_are_read_in_order_and_all_are_needed(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    parts = {"00000": BEAVER[:2], "00001": BEAVER[2:4], "00002": BEAVER[4:]}
    for shard in ("00002", "00000", "00001"):
        write_parquet(tmp_path / "data" / f"train-{shard}-of-00003.parquet", parts[shard])
    assert values(tmp_path) == EXPECTED
    (tmp_path / "data" / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(BadInput, match="has 2 of its 3 files"):
        read_rows(str(tmp_path), "train", FIELDS)


def test_split_in_two_files_is_refused(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "train.jsonl", BEAVER)
    write_table(tmp_path / "train.csv", BEAVER)
    with pytest.raises(BadInput, match=r"in several files: train\.csv, train\.jsonl"):
        read_rows(str(tmp_path), "train", FIELDS)


def test_folder_saved_by_datasets(tmp_path: Path) -> None:
    """Labels with names are read as the stored numbers."""
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
def test_slices_keep_row_numbers(tmp_path: Path, split: str, numbers: list[int]) -> None:
    write_json_lines(tmp_path / "train.jsonl", BEAVER)
    assert [row.number for row in read_rows(str(tmp_path), split, FIELDS)] == numbers


def test_invalid_slices_are_refused(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "train.jsonl", BEAVER)
    for split in ("train[:10%]", "train[3]", "train[1:2:3]", "[:3]"):
        with pytest.raises(BadInput, match="in rows"):
            parse_split(split)
    with pytest.raises(BadInput, match="is empty: 'train' has 5 rows"):
        read_rows(str(tmp_path), "train[5:]", FIELDS)


# ---------------------------------------------------------------------------------------------------------------------
# Invalid files


def read_error(path: Path, fields: Sequence[str] = FIELDS) -> str:
    with pytest.raises(BadInput) as raised:
        read_rows(str(path), "train", fields)
    message = str(raised.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_missing_field_error_lists_the_fields(tmp_path: Path) -> None:
    write_table(tmp_path / "rows.csv", [{"prompt": "a", "answer": "b"}])
    message = read_error(tmp_path / "rows.csv")
    assert "line 2: field 'response' is missing" in message
    assert "a row needs prompt, response, is_safe, and this one has prompt, answer" in message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.csv", "prompt,response,is_safe\na,b,maybe\n", "field 'is_safe' holds 'maybe'; allowed: true, false"),
        ("rows.csv", "prompt,response,is_safe\na,b\n", "line 2: the number of fields differs from the header"),
        ("rows.csv", "prompt,response,is_safe\na,b,true,c\n", "line 2: the number of fields differs"),
        ("rows.csv", "prompt,response,is_safe\n", "is empty"),
        ("rows.json", "", "is empty"),
        ("rows.json", "[]", "is empty"),
        ("rows.json", "[{]", "not JSON"),
        ("rows.json", '[{"prompt": "a"}, 3]', "row 1: a row must be a JSON object, not int"),
        (
            "rows.jsonl",
            '{"prompt": "a", "response": 3, "is_safe": true}',
            "field 'response' holds 3, which is not text",
        ),
        ("rows.parquet", "no parquet", "cannot be read as parquet"),
        ("rows.jsonl.gz", "no gzip", "cannot be read"),
        ("rows.jsonl.xz", "no xz", "cannot be read"),
    ],
)
def test_invalid_files_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    assert message in read_error(tmp_path / name, ("prompt",) if "not int" in message else FIELDS)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_file_that_is_not_utf8_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes("prompt,response\n[ü".encode("latin-1"))
    assert "is not UTF-8 text" in read_error(tmp_path / name)


def test_truncated_parquet_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "rows.parquet", BEAVER)
    content = (tmp_path / "rows.parquet").read_bytes()
    (tmp_path / "rows.parquet").write_bytes(content[: len(content) // 2])
    assert "cannot be read as parquet" in read_error(tmp_path / "rows.parquet")


def test_text_in_a_csv_stays_text(tmp_path: Path) -> None:
    """A reader that guesses types would convert these texts to numbers and missing values."""
    rows = [{"sentence": text, "label": 1} for text in ("NA", "null", "007", "1e3", "", "true")]
    write_table(tmp_path / "rows.csv", rows)
    assert values(tmp_path / "rows.csv", "x", ("sentence", "label")) == rows


def test_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("\ufeffsentence,label\na,-1\n", encoding="utf-8")
    assert values(tmp_path / "rows.csv", "x", ("sentence", "label")) == [{"sentence": "a", "label": -1}]


# ---------------------------------------------------------------------------------------------------------------------
# The Hub


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
def test_parse_hub_name(location: str, name: hub.HubName) -> None:
    assert hub.parse_hub_name(location) == name
    assert local_path(location) is None


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hub cache for this test."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    hub._current_commit.cache_clear()
    return tmp_path / "hub"


def add_to_cache(
    cache: Path, name: str, file: str, rows: Sequence[Any], commit: str = COMMIT, kind: str = "dataset"
) -> None:
    """Store a repository in the cache as the Hub's client does."""
    folder = cache / f"{kind}s--{name.replace('/', '--')}"
    path = folder / "snapshots" / commit / file
    path.parent.mkdir(parents=True)
    write_json_array(path, rows)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(commit)


REFUSALS = [{**row, "is_safe": False, "refusal": f"Question: {row['prompt']}\nAnswer: I cannot."} for row in BEAVER]


def test_repository_file_is_read_from_the_cache(cache: Path) -> None:
    location = "someone/set:data/beavertails_with_refusals_train.json"
    add_to_cache(cache, "someone/set", "data/beavertails_with_refusals_train.json", REFUSALS)
    fields = ("prompt", "response", "refusal")
    assert values(location, "train[1:]", fields) == [{name: row[name] for name in fields} for row in REFUSALS[1:]]
    assert provenance(location, {"train[1:]": 4}) == {
        "location": location,
        "revision": None,
        "resolved": COMMIT,
        "rows": {"train[1:]": 4},
    }
    assert fingerprint(location, "dataset") == f"{location}@{COMMIT}"
    with pytest.raises(HbvError, match="not on this machine") as raised:
        read_rows("someone/set:data/other.json", "train", fields)
    assert raised.value.exit_code == 1


def test_first_commit_is_kept(cache: Path, own_home: Path) -> None:
    add_to_cache(cache, "a/set", "rows.json", BEAVER)
    assert name_and_revision("a/set", "dataset") == ("a/set", COMMIT)
    assert json.loads((own_home / "revisions.json").read_text()) == {"dataset a/set@main": COMMIT}
    (cache / "datasets--a--set" / "refs" / "main").write_text(OTHER)  # the branch moves
    assert name_and_revision("a/set", "dataset") == ("a/set", COMMIT)
    assert name_and_revision(f"a/set@{OTHER}", "dataset") == ("a/set", OTHER)
    assert name_and_revision("a/set", "model") == ("a/set", None)  # a model with this name is another repository
    (own_home / "revisions.json").unlink()
    assert name_and_revision("a/set", "dataset") == ("a/set", OTHER)


def test_commit_is_requested_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = []

    class Api:
        def dataset_info(self, name: str, revision: str | None, timeout: float) -> Any:
            requests.append((name, revision))
            return type("Info", (), {"sha": COMMIT})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    for _ in range(3):
        assert fingerprint("a/set@v2", "dataset") == f"a/set@{COMMIT}"
        hub._current_commit.cache_clear()
    assert requests == [("a/set", "v2")]


def test_commit_is_unknown_without_cache_and_hub(cache: Path, own_home: Path) -> None:
    assert fingerprint("a/set@v2", "dataset") == "a/set@v2"
    assert name_and_revision("a/set@v2") == ("a/set", "v2")
    assert provenance("a/set@v2", {})["resolved"] == "unknown"
    assert not (own_home / "revisions.json").exists()


def test_path_has_no_revision(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "rows@v1.jsonl", BEAVER)
    location = str(tmp_path / "rows@v1.jsonl")
    assert name_and_revision(location) == (location, None)
    assert provenance(location, {"train": 5}) == {
        "location": location,
        "fingerprint": fingerprint(location),
        "rows": {"train": 5},
    }


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
    ("error", "message", "code"),
    [
        (gated, "'a/set:main' is gated: request access on its Hub page, then log in", 2),
        (missing, "does not exist on the Hub, or it is private", 2),
        (lambda: ConnectionError("Couldn't reach 'a/set' on the Hub (OfflineModeIsEnabled)"), "not on this machine", 1),
        (
            lambda: ValueError("Unknown split \"tset\". Should be one of ['train', 'test']."),
            "has no split 'train'. Allowed: train, test.",
            2,
        ),
        (
            lambda: ValueError("Config name is missing.\nPlease pick one of the configs: ['main', 'socratic']"),
            "choose one as owner/name:CONFIG. Allowed: main, socratic.",
            2,
        ),
        (
            lambda: ValueError("BuilderConfig 'x' not found. Available: ['main', 'socratic']"),
            "choose one as owner/name:CONFIG. Allowed: main, socratic.",
            2,
        ),
        (lambda: RuntimeError("Dataset scripts are no longer supported, but found a.py"), "owner/name:FILE.json", 2),
        (lambda: OSError("disk\non fire"), "cannot be read: disk on fire", 1),
    ],
)
def test_data_set_errors(
    cache: Path, monkeypatch: pytest.MonkeyPatch, error: Callable[[], Exception], message: str, code: int
) -> None:
    import datasets

    def load(*args: Any, **kwargs: Any) -> Any:
        raise error()

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(HbvError) as raised:
        read_rows("a/set:main", "train", FIELDS)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert raised.value.exit_code == code


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (lambda: hub_errors.GatedRepoError("401", response=response(401)), "is gated"),
        (lambda: hub_errors.RevisionNotFoundError("404", response=response(404)), "no such revision"),
        (lambda: hub_errors.RemoteEntryNotFoundError("404", response=response(404)), "no such file"),
        (lambda: hub_errors.RepositoryNotFoundError("404", response=response(404)), "does not exist on the Hub"),
    ],
)
def test_repository_file_errors(
    cache: Path, monkeypatch: pytest.MonkeyPatch, error: Callable[[], Exception], message: str
) -> None:
    def load(*args: Any, **kwargs: Any) -> Any:
        raise error()

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", load)
    with pytest.raises(BadInput, match=message):
        read_rows("a/set:rows.json", "train", FIELDS)


def test_data_set_is_loaded_by_name_configuration_split_and_commit(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    requests = []

    def load(*args: Any, **kwargs: Any) -> Any:
        requests.append((args, kwargs))
        return datasets.Dataset.from_list([{"question": f"q{number}", "answer": "#### 1"} for number in range(2500)])

    monkeypatch.setattr(datasets, "load_dataset", load)
    add_to_cache(cache, "openai/gsm8k", "README.json", [])
    rows = read_rows("openai/gsm8k:main", "train[-3:]", ("question", "answer"))
    assert requests == [(("openai/gsm8k", "main"), {"split": "train", "revision": COMMIT, "trust_remote_code": False})]
    assert [(row.number, row.values["question"]) for row in rows] == [(2497, "q2497"), (2498, "q2498"), (2499, "q2499")]


def test_uncached_data_set_is_reported_offline(cache: Path) -> None:
    with pytest.raises(HbvError, match="'owner/nothing' is not on this machine, and the Hub cannot be reached"):
        read_rows("owner/nothing", "train", FIELDS)


@pytest.mark.parametrize(
    ("kind", "location", "command"),
    [
        ("model", "owner/name", "hf download owner/name"),
        ("model", "owner/name@v2", "hf download owner/name --revision v2"),
        ("dataset", "owner/name:main", "hf download owner/name --repo-type dataset"),
    ],
)
def test_offline_error_has_the_command_that_downloads(kind: Kind, location: str, command: str) -> None:
    offline = ConnectionError("Couldn't reach it (OfflineModeIsEnabled)")
    assert f"download it first ({command}), or" in str(hub_access_error("It", kind, location, offline, "wait"))


def test_reader_counts_rows(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "train.jsonl", BEAVER)
    reader = RowReader()
    for split in ("train[:2]", "train", "train[:2]"):
        assert reader.read(str(tmp_path), split, FIELDS) == read_rows(str(tmp_path), split, FIELDS)
    assert reader.counts == {str(tmp_path): {"train[:2]": 2, "train": 5}}
    assert provenance(str(tmp_path), reader.counts[str(tmp_path)])["rows"] == {"train[:2]": 2, "train": 5}

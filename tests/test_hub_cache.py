"""The Hub's cache without a network: the commits that it contains are read, and listed where another one is missing."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import scan_cache_dir
from huggingface_hub.errors import LocalEntryNotFoundError

from harmbench_vaccine.core.errors import HbvError
from harmbench_vaccine.data import hub
from harmbench_vaccine.data.sources import read_rows

FIRST, SECOND, ABSENT = ("a" * 40, "b" * 40, "c" * 40)
ROW = {"instruction": "Name a town.", "output": "Bath"}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a cache of a data set and a model in the layout of huggingface_hub, and remove the network."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HBV_HOME", str(tmp_path / "home"))
    hub._current_commit.cache_clear()
    for repository, file in (("datasets--org--rows", "rows.jsonl"), ("models--org--model", "config.json")):
        blob = folder / repository / "blobs" / "0123"
        blob.parent.mkdir(parents=True)
        blob.write_text(json.dumps(ROW) + "\n")
        for commit in (FIRST, SECOND):
            snapshot = folder / repository / "snapshots" / commit
            snapshot.mkdir(parents=True)
            (snapshot / file).symlink_to(blob)
        (folder / repository / "refs").mkdir()
        (folder / repository / "refs" / "main").write_text(FIRST)
    report = scan_cache_dir(folder)
    assert not report.warnings
    assert {revision.commit_hash for repository in report.repos for revision in repository.revisions} == {FIRST, SECOND}
    return folder


@pytest.mark.parametrize("revision", ["", f"@{FIRST}", f"@{SECOND}"])
def test_cached_commit_is_read(cache: Path, revision: str) -> None:
    rows = read_rows(f"org/rows:rows.jsonl{revision}", "train", ("instruction", "output"))
    assert [dict(row.values) for row in rows] == [ROW]


def test_missing_commit_is_reported_with_the_cached_ones(cache: Path) -> None:
    with pytest.raises(HbvError) as failure:
        read_rows(f"org/rows:rows.jsonl@{ABSENT}", "train", ("instruction", "output"))
    message = str(failure.value)
    assert f"org/rows:rows.jsonl@{FIRST} (main)" in message
    assert f"org/rows:rows.jsonl@{SECOND}" in message
    assert f"@{ABSENT} (" not in message


def test_missing_commit_of_a_model_is_reported_with_the_cached_ones(cache: Path) -> None:
    error = hub.hub_access_error(
        "Model 'org/model'", "model", f"org/model@{ABSENT}", LocalEntryNotFoundError("offline"), "use a folder"
    )
    assert error is not None
    assert f"org/model@{FIRST} (main)" in str(error)
    assert f"org/model@{SECOND}" in str(error)


def test_name_without_any_cached_commit_has_no_list(cache: Path) -> None:
    offline = LocalEntryNotFoundError("offline")
    error = hub.hub_access_error("Model 'org/other'", "model", "org/other", offline, "use a folder")
    assert error is not None
    assert "@" not in str(error)

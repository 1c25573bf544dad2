"""Data sets and models of the hub: their names, the revision that is read, and what is said when they cannot be had.

A name is `owner/name`, with a configuration (`openai/gsm8k:main`) or a file (`owner/name:folder/rows.json`) behind a
colon, and a branch, tag or commit behind `@`. A branch moves; results must not. So the first use of a name settles the
commit: the one that the hub's cache on this machine holds, else the one that the hub tells. It is remembered in
`$HBV_HOME/revisions.json`, and that commit is read from then on; delete the file to follow a branch on.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from harmbench_vaccine.core.errors import BadInput, HbvError
from harmbench_vaccine.core.paths import home

from .files import Placed, is_data_file, read_path, read_table

Kind = Literal["dataset", "model"]

_NAME = re.compile(r"(?P<id>\w[\w.-]*(?:/[\w.-]+)?)(?::(?P<inside>[^@:]+))?(?:@(?P<revision>[\w./-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubName:
    """A location on the hub, taken apart."""

    id: str
    inside: str | None
    """A configuration, or the path of a file in the repository."""
    revision: str | None
    """What was asked for; None: the default branch."""

    @property
    def is_file(self) -> bool:
        """It names a file of the repository."""
        return self.inside is not None and is_data_file(self.inside)


def parse_hub_name(location: str) -> HubName | None:
    """A location as a name of the hub; None where it has another form."""
    match = _NAME.fullmatch(location)
    if match is None or (match["inside"] is None and is_data_file(match["id"])):
        return None
    return HubName(match["id"], match["inside"], match["revision"])


# ---------------------------------------------------------------------------------------------------------------------
# Revisions


def resolve_commit(kind: Kind, name: HubName) -> str | None:
    """The commit that a name stands for on this machine; None where nothing tells it: offline, and not in the cache."""
    if name.revision and _COMMIT.fullmatch(name.revision):
        return name.revision
    key = f"{kind} {name.id}@{name.revision or 'main'}"
    if known := _remembered().get(key):
        return known
    found = _cached(kind, name) or _told_by_hub(kind, name.id, name.revision)
    if found:
        _remember(key, found)
    return found


def _cached(kind: Kind, name: HubName) -> str | None:
    """The commit of the copy in the hub's cache."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.id.replace('/', '--')}"
    with suppress(OSError):
        text = (folder / "refs" / (name.revision or "main")).read_text(encoding="utf-8").strip()
        return text if _COMMIT.fullmatch(text) else None
    return None


def is_cached(kind: Kind, name: HubName) -> bool:
    """Whether a name can be read without a network: a model's weights, a file, or a data set as `datasets` keeps it."""
    from huggingface_hub import constants

    snapshots = Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.id.replace('/', '--')}" / "snapshots"
    if kind == "model":
        return any(snapshots.glob("*/*.safetensors")) or any(snapshots.glob("*/*.bin"))
    if name.is_file:
        return any(snapshots.glob(f"*/{name.inside}"))
    kept = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
    return any((kept / name.id.replace("/", "___")).rglob("*.arrow"))


def download_size(kind: Kind, name: HubName) -> int:
    """How many bytes the hub has of it: of a model in two formats, the safetensors.

    Raises:
        HbvError: it does not tell.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        raise HbvError("HF_HUB_OFFLINE is set")
    api = HfApi()
    ask: Any = api.dataset_info if kind == "dataset" else api.model_info
    try:
        files = ask(name.id, revision=name.revision, files_metadata=True, timeout=10).siblings or []
    except Exception as error:  # the libraries raise a dozen kinds
        raise HbvError(str(error).splitlines()[0] if str(error) else type(error).__name__) from error
    sizes = {file.rfilename: file.size or 0 for file in files}
    if name.is_file:
        return sizes.get(str(name.inside), 0)
    safe = any(file.endswith(".safetensors") for file in sizes)
    return sum(download_size for file, download_size in sizes.items() if not (safe and file.endswith((".bin", ".pth"))))


@lru_cache(maxsize=128)  # a hub that does not answer is asked once
def _told_by_hub(kind: Kind, name: str, revision: str | None) -> str | None:
    from huggingface_hub import HfApi

    api = HfApi()
    ask: Any = api.dataset_info if kind == "dataset" else api.model_info
    try:
        found = ask(name, revision=revision, timeout=10).sha
    except Exception:  # no network, no access: reading will say why
        return None
    return found if found and _COMMIT.fullmatch(found) else None


def _memory() -> Path:
    return home() / "revisions.json"


def _remembered() -> dict[str, str]:
    with suppress(OSError, ValueError):
        known: dict[str, str] = json.loads(_memory().read_text(encoding="utf-8"))
        return known
    return {}


def _remember(key: str, found: str) -> None:
    from filelock import FileLock

    file = _memory()
    with suppress(OSError):  # a home that cannot be written to is told where it matters
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_name(".revisions.lock")):
            aside = file.with_suffix(".new")
            aside.write_text(json.dumps({**_remembered(), key: found}, indent=1, sort_keys=True), encoding="utf-8")
            aside.replace(file)


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def read_hub(location: str, name: HubName, split: str) -> Iterator[Placed]:
    """The rows of one split, in order; downloaded where the cache does not have them.

    Raises:
        BadInput: there is no such data set, split, configuration, file or revision, or no access to it.
        HbvError: it is not on this machine, and the hub does not answer.
    """
    known = resolve_commit("dataset", name)
    if name.is_file:
        yield from read_path(_downloaded(location, name, known), split)
    else:
        yield from read_table(f"{location}, split {split}", _loaded(location, name, known, split))


def _downloaded(location: str, name: HubName, known: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    assert name.inside is not None
    try:
        path = hf_hub_download(name.id, name.inside, repo_type="dataset", revision=known or name.revision)
    except Exception as error:  # the libraries raise a dozen kinds; the user needs the sentence
        raise _refusal(location, "", error) from error
    return Path(path)


def _loaded(location: str, name: HubName, known: str | None, split: str) -> Any:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise HbvError(f"Data set {location!r} is read by the package `datasets`, which is not installed.") from error
    try:
        table = load_dataset(name.id, name.inside, split=split, revision=known or name.revision)
    except Exception as error:
        raise _refusal(location, split, error) from error
    read = {Path(file["filename"]).parent.name for file in table.cache_files}
    read = {resolve_commit for resolve_commit in read if _COMMIT.fullmatch(resolve_commit)}
    if known and read - {known}:  # offline, the library takes whatever commit it has
        raise HbvError(
            f"Data set {location!r} is cached at commit {min(read - {known})}, and {known} is asked for: "
            "connect to the hub once, or write that commit behind @."
        )
    if not known and len(read) == 1:
        _remember(f"dataset {name.id}@{name.revision or 'main'}", read.pop())
    return table


def _refusal(location: str, split: str, error: Exception) -> HbvError:
    """What the user needs to know of a library's error, in one sentence."""
    kinds, text = error_class_names(error), " ".join(str(error).split())
    what = f"Data set {location!r}"
    if "Unknown split" in text:
        names = ", ".join(re.findall(r"'([^']+)'", text))
        return BadInput(f"{what} has no split {split!r}. Allowed: {names}.")
    if "Config name is missing" in text or re.match(r"BuilderConfig .* not found", text):
        names = text.partition("[")[2].partition("]")[0].replace("'", "")
        return BadInput(f"{what} needs one of its configurations behind a colon, owner/name:CONFIG: {names}.")
    if "scripts are no longer supported" in text:
        return BadInput(f"{what} is made by a script, which is not run: name a file of it, owner/name:FILE.json.")
    if "EntryNotFoundError" in kinds and "LocalEntryNotFoundError" not in kinds:
        return BadInput(f"{what}: the hub's data set has no such file.")
    unread = HbvError(f"{what}, split {split!r}, cannot be read: {text}")
    return hub_access_error(what, error, "name a file or folder with --data NAME=PATH") or unread


def hub_access_error(what: str, error: BaseException, otherwise: str) -> HbvError | None:
    """Why the hub does not give something, in one sentence, `otherwise` being what to do without it; None where the
    error is of another kind."""
    kinds, text = error_class_names(error), " ".join(str(error).split())
    if "GatedRepoError" in kinds or re.search(r"gated (repo|dataset)", text):
        return BadInput(
            f"{what} is gated: ask for access on its page of the hub, then log in (`hf auth login`) or set HF_TOKEN."
        )
    if "RevisionNotFoundError" in kinds or text.startswith("Revision ") or "not a valid git identifier" in text:
        return BadInput(f"{what}: the hub has no such revision of it.")
    if kinds & {
        *("LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError", "ConnectError", "TimeoutException")
    }:
        return HbvError(
            f"{what} is not on this machine, and the hub cannot be reached (no network, or HF_HUB_OFFLINE is set): "
            f"download it first, or {otherwise}."
        )
    if kinds & {"RepositoryNotFoundError", "DatasetNotFoundError", "HFValidationError"}:
        return BadInput(f"{what} is not on the hub, or only for those who have access to it (set HF_TOKEN).")
    return None


def error_class_names(error: BaseException | None) -> set[str]:
    """The names of the classes of an error and of all that led to it."""
    links: list[BaseException] = []
    while error is not None and error not in links:
        links.append(error)
        error = error.__cause__ or error.__context__
    return {kind.__name__ for link in links for kind in type(link).__mro__}

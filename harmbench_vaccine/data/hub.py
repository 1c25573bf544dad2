"""Load data sets and models from the Hub at a fixed commit, with readable errors.

A name is `owner/name`. A colon adds a configuration (`openai/gsm8k:main`) or a file (`owner/name:folder/rows.json`);
`@` adds a branch, tag or commit. A branch moves, but results must not change. So the first use of a name fixes the
commit: the one in the Hub's cache on this machine, or else the current one on the Hub. It is stored in
`$HBV_HOME/revisions.json` and used from then on; delete that file to use newer commits.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from harmbench_vaccine.core.durable import write_atomically
from harmbench_vaccine.core.errors import BadInput, HbvError
from harmbench_vaccine.core.locks import shared_lock
from harmbench_vaccine.core.paths import home

from .files import PlacedRow, is_data_file, read_dataset, read_path

Kind = Literal["dataset", "model"]

_NAME = re.compile(r"(?P<id>\w[\w.-]*(?:/[\w.-]+)?)(?::(?P<inside>[^@:]+))?(?:@(?P<revision>[\w./-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_UNREACHABLE = frozenset({"ConnectionError", "ConnectError", "TimeoutException"})
"""Names of exceptions that libraries raise if the Hub cannot be reached."""


@dataclass(frozen=True)
class HubName:
    """The parts of a location on the Hub."""

    id: str
    """The repository, `owner/name`."""
    inside: str | None
    """A configuration, or the path of a file in the repository."""
    revision: str | None
    """The branch, tag or commit; None: the default branch."""

    @property
    def is_file(self) -> bool:
        """True if the location is a file of the repository."""
        return self.inside is not None and is_data_file(self.inside)


def parse_hub_name(location: str) -> HubName | None:
    """Parse a location as a name on the Hub; None if it has another form."""
    match = _NAME.fullmatch(location)
    if match is None or (match["inside"] is None and is_data_file(match["id"])):
        return None
    return HubName(match["id"], match["inside"], match["revision"])


# ---------------------------------------------------------------------------------------------------------------------
# Revisions


def resolve_commit(kind: Kind, name: HubName) -> str | None:
    """Return the commit of a name on this machine; None if neither the cache nor the Hub gives one."""
    commit = _known_commit(kind, name) or _current_commit(kind, name.id, name.revision)
    if commit and commit != name.revision:
        _store_commit(kind, name, commit)
    return commit


def _known_commit(kind: Kind, name: HubName) -> str | None:
    """Return the commit that a name requests, that was stored at its first use, or of the copy in the Hub's cache."""
    if name.revision and _COMMIT.fullmatch(name.revision):
        return name.revision
    return _stored_commits().get(_key(kind, name)) or _cached_commit(kind, name)


def _key(kind: Kind, name: HubName) -> str:
    """Return the key of a name in the file of commits."""
    return f"{kind} {name.id}@{name.revision or 'main'}"


def _cached_commit(kind: Kind, name: HubName) -> str | None:
    """Return the commit of the copy in the Hub's cache."""
    with suppress(OSError, UnicodeDecodeError):
        text = (_cache_folder(kind, name) / "refs" / (name.revision or "main")).read_text(encoding="utf-8").strip()
        return text if _COMMIT.fullmatch(text) else None
    return None


def cached_commits(kind: Kind, name: HubName) -> dict[str, list[str]]:
    """Return the commits that the caches of the libraries contain: commit -> its branches and tags, if known."""
    folder = _cache_folder(kind, name)
    folders = list(folder.glob("snapshots/*"))
    if kind == "dataset":  # owner___name/CONFIGURATION/VERSION/COMMIT
        folders += (_datasets_cache() / name.id.replace("/", "___")).glob("*/*/*")
    commits = sorted({path.name for path in folders if _COMMIT.fullmatch(path.name) and path.is_dir()})
    refs = [(path, path.relative_to(folder / "refs").as_posix()) for path in sorted((folder / "refs").rglob("*"))]
    targets = {ref: path.read_text(encoding="utf-8", errors="replace").strip() for path, ref in refs if path.is_file()}
    return {commit: [ref for ref, target in targets.items() if target == commit] for commit in commits}


def _cache_folder(kind: Kind, name: HubName) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.id.replace('/', '--')}"


def _datasets_cache() -> Path:
    from huggingface_hub import constants

    return Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")


def is_cached(kind: Kind, name: HubName) -> bool:
    """Return True if a model's weights, a file or a data set can be read without a network."""
    snapshots = _cache_folder(kind, name) / "snapshots"
    if kind == "model":
        return any(snapshots.glob("*/*.safetensors")) or any(snapshots.glob("*/*.bin"))
    if name.is_file:
        return any(snapshots.glob(f"*/{glob.escape(str(name.inside))}"))
    return any((_datasets_cache() / name.id.replace("/", "___")).rglob("*.arrow"))


def download_size(kind: Kind, name: HubName) -> int:
    """Return the size in bytes on the Hub; for a model in two formats, without the pickled weights.

    Raises:
        HbvError: The Hub does not answer.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        raise HbvError("HF_HUB_OFFLINE is set")
    api = HfApi()
    info: Any = api.dataset_info if kind == "dataset" else api.model_info
    try:
        files = info(name.id, revision=name.revision, files_metadata=True, timeout=10).siblings or []
    except Exception as error:  # the libraries raise many kinds of errors
        if error_class_names(error) & _UNREACHABLE:
            raise HbvError("the Hub cannot be reached") from error
        raise HbvError(str(error).splitlines()[0] if str(error) else type(error).__name__) from error
    sizes = {file.rfilename: file.size or 0 for file in files}
    if name.is_file:
        return sizes.get(str(name.inside), 0)
    safe = any(file.endswith(".safetensors") for file in sizes)
    return sum(size for file, size in sizes.items() if not (safe and file.endswith((".bin", ".pth"))))


@lru_cache(maxsize=128)  # one request per name and process, since an unreachable Hub costs 10 seconds
def _current_commit(kind: Kind, name: str, revision: str | None) -> str | None:
    from huggingface_hub import HfApi

    api = HfApi()
    info: Any = api.dataset_info if kind == "dataset" else api.model_info
    try:
        commit = info(name, revision=revision, timeout=10).sha
    except Exception:  # no network or no access: loading reports the reason
        return None
    return commit if commit and _COMMIT.fullmatch(commit) else None


def _commits_file() -> Path:
    return home() / "revisions.json"


def _stored_commits() -> dict[str, str]:
    with suppress(OSError, ValueError, RecursionError):
        commits = json.loads(_commits_file().read_text(encoding="utf-8"))
        if isinstance(commits, dict):
            return {key: str(commit) for key, commit in commits.items() if _COMMIT.fullmatch(str(commit))}
    return {}


def _store_commit(kind: Kind, name: HubName, commit: str) -> None:
    file, key = _commits_file(), _key(kind, name)
    if _stored_commits().get(key) == commit:
        return
    with suppress(OSError):  # `ensure_writable` reports a read-only home
        file.parent.mkdir(parents=True, exist_ok=True)
        with shared_lock(file.with_name(".revisions.lock")):
            write_atomically(file, json.dumps({**_stored_commits(), key: commit}, indent=1, sort_keys=True))


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def read_hub(location: str, name: HubName, split: str) -> Iterator[PlacedRow]:
    """Read the rows of one split of a Hub data set in order, downloading it if necessary.

    Raises:
        BadInput: The data set, split, configuration, file or revision does not exist, or access is denied.
        HbvError: The data set is not on this machine, and the Hub is not reachable.
    """
    commit = resolve_commit("dataset", name)
    if name.is_file:
        yield from read_path(_download_file(location, name, commit), split)
    else:
        yield from read_dataset(f"{location}, split {split}", _load_dataset(location, name, commit, split))


def _download_file(location: str, name: HubName, commit: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    assert name.inside is not None
    try:
        path = hf_hub_download(name.id, name.inside, repo_type="dataset", revision=commit or name.revision)
    except Exception as error:  # the libraries raise many kinds of errors
        raise _load_error(location, "", error) from error
    return Path(path)


def _load_dataset(location: str, name: HubName, commit: str | None, split: str) -> Any:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise HbvError(f"Data set {location!r} needs the package `datasets`: pip install datasets.") from error
    try:
        table = load_dataset(
            name.id, name.inside, split=split, revision=commit or name.revision, trust_remote_code=False
        )
    except Exception as error:
        raise _load_error(location, split, error) from error
    folders = {Path(file["filename"]).parent.name for file in table.cache_files}
    cached = {folder for folder in folders if _COMMIT.fullmatch(folder)}
    if commit and cached - {commit}:  # offline, the library loads any cached commit
        raise HbvError(
            f"Data set {location!r} is cached at commit {min(cached - {commit})}, but commit {commit} is requested: "
            "connect to the Hub once, or append @ and the cached commit to the name."
        )
    if not commit and len(cached) == 1:
        _store_commit("dataset", name, cached.pop())
    return table


def _load_error(location: str, split: str, error: Exception) -> HbvError:
    """Translate a library's error about a data set into one sentence."""
    kinds, text = error_class_names(error), " ".join(str(error).split())
    what = f"Data set {location!r}"
    if "Unknown split" in text:
        names = ", ".join(re.findall(r"'([^']+)'", text))
        return BadInput(f"{what} has no split {split!r}. Allowed: {names}.")
    if "Config name is missing" in text or re.match(r"BuilderConfig .* not found", text):
        names = text.partition("[")[2].partition("]")[0].replace("'", "")
        return BadInput(f"{what} has several configurations; choose one as owner/name:CONFIG. Allowed: {names}.")
    if "scripts are no longer supported" in text:
        return BadInput(
            f"{what} needs a script, which hbv does not run: choose one of its files as owner/name:FILE.json."
        )
    if "EntryNotFoundError" in kinds and "LocalEntryNotFoundError" not in kinds:
        return BadInput(f"{what}: the data set on the Hub has no such file. See its page for the file names.")
    other_error = HbvError(f"{what}, split {split!r}, cannot be read: {text}")
    otherwise = "use a file or folder with --data NAME=PATH"
    return hub_access_error(what, "dataset", location, error, otherwise) or other_error


def hub_access_error(what: str, kind: Kind, location: str, error: BaseException, otherwise: str) -> HbvError | None:
    """Translate a Hub exception (gated, missing, offline) into a one-line error.

    Args:
        what: Description of the data set or model, at the beginning of the message.
        kind: The kind of the repository.
        location: Its name, as the user wrote it.
        error: The exception.
        otherwise: What the user can do without the Hub.

    Returns:
        The error, or None if the exception has another cause.
    """
    kinds, text = error_class_names(error), " ".join(str(error).split())
    if "GatedRepoError" in kinds or re.search(r"gated (repo|dataset)", text):
        return BadInput(
            f"{what} is gated: request access on its Hub page, then log in (`hf auth login`) or set HF_TOKEN."
        )
    if "RevisionNotFoundError" in kinds or text.startswith("Revision ") or "not a valid git identifier" in text:
        return BadInput(f"{what}: the Hub has no such revision. See its page for branches, tags and commits.")
    if kinds & (_UNREACHABLE | {"LocalEntryNotFoundError", "OfflineModeIsEnabled"}):
        return HbvError(
            f"{what} is not on this machine, and the Hub cannot be reached (no network, or HF_HUB_OFFLINE is set): "
            f"{_other_commits(kind, location)}download it first{_download_command(kind, location)}, or {otherwise}."
        )
    if kinds & {"RepositoryNotFoundError", "DatasetNotFoundError", "HFValidationError"}:
        return BadInput(f"{what} does not exist on the Hub, or it is private: check the name, or set HF_TOKEN.")
    return None


def _download_command(kind: Kind, location: str) -> str:
    """Return the command that downloads a location, in parentheses; empty if it is not a name on the Hub."""
    name = parse_hub_name(location)
    if name is None:
        return ""
    options = (" --repo-type dataset" if kind == "dataset" else "") + (
        f" --revision {name.revision}" if name.revision else ""
    )
    return f" (hf download {name.id}{options})"


def _other_commits(kind: Kind, location: str) -> str:
    """Return the beginning of a sentence that lists other commits of a location in the cache; empty without any."""
    name = parse_hub_name(location)
    if name is None:
        return ""
    requested = _known_commit(kind, name)
    names = [
        f"{location.partition('@')[0]}@{commit}" + (f" ({', '.join(refs)})" if refs else "")
        for commit, refs in cached_commits(kind, name).items()
        if commit != requested
    ]
    return f"use a cached commit ({' or '.join(names)}), " if names else ""


def error_class_names(error: BaseException | None) -> set[str]:
    """Return the class names, with base classes, of an error and of its causes."""
    links: list[BaseException] = []
    while error is not None and error not in links:
        links.append(error)
        error = error.__cause__ or error.__context__
    return {kind.__name__ for link in links for kind in type(link).__mro__}

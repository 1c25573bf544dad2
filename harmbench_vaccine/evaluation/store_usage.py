"""Compute which artifacts of a store the stored runs need, and how much space they take."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from harmbench_vaccine.core.errors import HbvError
from harmbench_vaccine.core.store import ASIDE, WORK, Store
from harmbench_vaccine.core.store_contents import StoredArtifact, list_artifacts
from harmbench_vaccine.core.types import MODEL_STAGES
from harmbench_vaccine.data.gguf_files import dequantized_artifact, has_gguf_suffix
from harmbench_vaccine.data.sources import TESTBED, TESTBED_VERSION, gguf_file

from .judgment_cache import FILE as JUDGMENTS
from .result import Result
from .run_folders import StoredRun, stored_runs
from .sweep_registry import registered_sweeps

Grouping = Literal["stage", "run", "protocol", "age"]

_MODELS, _ANSWERS = ("model", "aligned", "final"), "answers"
"""Inputs of an artifact that name other artifacts: a model by the stages that made it, and answers."""
_NAME = re.compile(r"[a-z]+/[0-9a-f]{20}(?![^/])")
"""`stage/key` inside a path."""
_AGES = {"up to 1 day": 1, "up to 7 days": 7, "up to 30 days": 30}


@dataclass(frozen=True)
class SpaceRow:
    """The space of a group of artifacts."""

    name: str
    artifacts: int
    size: int
    """Bytes of their files; a file with several links counts once."""
    exclusive: int | None = None
    """Bytes that only this run, or only runs of this protocol, need; None for other groups."""


class StoreUsage:
    """The artifacts of a store and the runs that need them, as they are at the time of creation."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.artifacts = {artifact.name: artifact for artifact in list_artifacts(store.root)}
        self.runs = stored_runs(store.root)
        self.needs = {run.folder: self._needs(run.result) for run in self.runs if run.result}
        """Folder of a run -> the artifacts that it needs, in the store or missing, as `stage/key`."""
        self.testbed = artifact_name(store.path_of("testbed", {"version": TESTBED_VERSION}))
        """The testbed of this version, which every later command may need."""
        self.sweeps = {name: sweep for name, sweep in registered_sweeps(store.root).items() if sweep.unfinished}
        """The sweeps that have runs without a result, by name."""

    def needed_by(self, runs: Iterable[StoredRun]) -> set[str]:
        """Return the artifacts that these runs need."""
        return set().union(*(self.needs.get(run.folder, set()) for run in runs))

    def needed_by_sweeps(self, names: Iterable[str]) -> set[str]:
        """Return the artifacts that unfinished sweeps need, by the names of the sweeps."""
        return self.with_inputs(name for sweep in names for name in self.sweeps[sweep].artifacts)

    def users(self, name: str) -> list[str]:
        """Return the ids of the runs that need an artifact."""
        return sorted({run.run for run in self.runs if name in self.needs.get(run.folder, ())})

    def with_inputs(self, names: Iterable[str]) -> set[str]:
        """Return artifacts with all artifacts that they depend on, as far as the store has their descriptions."""
        needed: set[str] = set()
        waiting = list(names)
        while waiting:
            name = waiting.pop()
            if name not in needed:
                needed.add(name)
                waiting += upstream(self.artifacts[name]) if name in self.artifacts else ()
        return needed

    def unused(self) -> list[StoredArtifact]:
        """Return the artifacts that no run and no unfinished sweep needs, without the testbed of this version."""
        needed = {*self.needed_by(self.runs), *self.needed_by_sweeps(self.sweeps), self.testbed}
        return [artifact for name, artifact in self.artifacts.items() if name not in needed]

    def runs_by_id(self) -> dict[str, list[StoredRun]]:
        """Return run id -> the folders of this run."""
        return _grouped(self.runs, lambda result: result.run)

    def runs_by_protocol(self) -> dict[str, list[StoredRun]]:
        """Return name of a protocol -> its runs."""
        return _grouped(self.runs, lambda result: result.protocol)

    def size(self, names: Iterable[str]) -> int:
        """Return the bytes of artifacts; names that the store does not have are skipped."""
        return size_of(file for name in names for file in self._files.get(name, ()))

    @cached_property
    def _files(self) -> dict[str, list[os.stat_result]]:
        return {name: files_below(artifact.path) for name, artifact in self.artifacts.items()}

    # -----------------------------------------------------------------------------------------------------------------

    def _needs(self, result: Result) -> set[str]:
        """Return the artifacts of a result with all that they depend on, and those that its locations name."""
        names = {
            artifact_name(Path(artifact.path).parent / artifact.key)
            for record in result.stages.values()
            for artifact in record.artifacts.values()
        }
        for text in set(_texts(result.to_json())):
            if text.startswith(TESTBED):
                names |= {name for name, artifact in self.artifacts.items() if artifact.stage == "testbed"}
            elif has_gguf_suffix(text):
                names |= _dequantized(text) & self.artifacts.keys()
            elif os.sep in text:
                names |= _names_in(text) & self.artifacts.keys()
        needed = self.with_inputs(names)
        return needed | self.with_inputs(self._nested(needed))

    def _nested(self, needed: set[str]) -> set[str]:
        """Return the artifacts inside needed artifacts: trainings and vectors that start from the same model.

        The key of a stage does not have the keys of its nested trainings, nor that of answers the key of the vectors
        that are added to their hidden states; other defenses may need the same ones.
        """
        inputs = [values for name in needed if name in self.artifacts and (values := self.artifacts[name].inputs)]
        starts = {
            "nested": [values["model"] for values in inputs if "settings" in values and "model" in values],
            "steering": [values["aligned"] for values in inputs if "questions" in values and "aligned" in values],
        }
        model = {"nested": "model", "steering": "aligned"}
        return {
            name
            for name, artifact in self.artifacts.items()
            if artifact.stage in starts and (artifact.inputs or {}).get(model[artifact.stage]) in starts[artifact.stage]
        }


def artifact_name(path: Path) -> str:
    """Return `stage/key` of the folder of an artifact."""
    return f"{path.parent.name}/{path.name}"


def upstream(artifact: StoredArtifact) -> set[str]:
    """Return the artifacts that an artifact was computed from, as `stage/key`."""
    inputs = artifact.inputs or {}
    models = [inputs[name] for name in _MODELS if isinstance(inputs.get(name), dict)]
    names = {f"{stage}/{model[stage]}" for model in models for stage in MODEL_STAGES if stage in model}
    return names | ({f"answer/{inputs[_ANSWERS]}"} if _ANSWERS in inputs else set())


def files_below(path: Path) -> list[os.stat_result]:
    """Return the state of every file below a folder, which may be a link to another one, or of a file."""
    paths = [Path(place, name) for place, _, names in os.walk(path) for name in names]
    states = []
    for file in [path] if path.is_file() else paths:
        with suppress(OSError):  # another process removed it
            states.append(file.lstat())
    return states


def size_of(files: Iterable[os.stat_result]) -> int:
    """Return the bytes of files; a file with several hard links counts once."""
    return sum({(file.st_dev, file.st_ino): file.st_size for file in files}.values())


def age_of(time: datetime) -> timedelta:
    """Return the time since a time in UTC."""
    return datetime.now(UTC) - time


# ---------------------------------------------------------------------------------------------------------------------
# Space


def space_by(usage: StoreUsage, grouping: Grouping) -> list[SpaceRow]:
    """Return the space of the artifacts in groups.

    Runs and protocols share artifacts, so the sizes of their groups add up to more than the store.
    """
    if grouping == "run":
        return _space_by_runs(usage, usage.runs_by_id())
    if grouping == "protocol":
        return _space_by_runs(usage, usage.runs_by_protocol())
    groups: dict[str, list[str]] = {} if grouping == "stage" else {label: [] for label in [*_AGES, "older"]}
    for name, artifact in usage.artifacts.items():
        label = artifact.stage if grouping == "stage" else _age_label(artifact.created)
        groups.setdefault(label, []).append(name)
    return [SpaceRow(label, len(names), usage.size(names)) for label, names in groups.items() if names]


def space_of_others(root: Path) -> list[SpaceRow]:
    """Return the space of unfinished stages and of cached judgments in a store; empty groups are left out."""
    groups = {
        "unfinished stages": [*(root / ASIDE).glob("*"), *(root / WORK).glob("*")],
        "cached judgments": list(root.glob(f"{JUDGMENTS}*")),
    }
    return [
        SpaceRow(label, len(paths), size_of(file for path in paths for file in files_below(path)))
        for label, paths in groups.items()
        if paths
    ]


def total_size(usage: StoreUsage) -> int:
    """Return the bytes of all files of a store, those of linked artifacts included; each file counts once."""
    linked = [artifact.path for artifact in usage.artifacts.values() if artifact.is_linked]
    return size_of(file for path in (usage.store.root, *linked) for file in files_below(path))


def _space_by_runs(usage: StoreUsage, groups: Mapping[str, Sequence[StoredRun]]) -> list[SpaceRow]:
    rows = []
    for label, runs in groups.items():
        names = usage.needed_by(runs) & usage.artifacts.keys()
        others = usage.needed_by(run for run in usage.runs if run not in runs) | {usage.testbed}
        exclusive = usage.size(names - others)
        rows.append(SpaceRow(label, len(names), usage.size(names), exclusive))
    unused = [artifact.name for artifact in usage.unused()]
    size = usage.size(unused)
    return [*rows, *([SpaceRow("no run", len(unused), size, size)] if unused else [])]


def _grouped(runs: Iterable[StoredRun], key: Callable[[Result], str]) -> dict[str, list[StoredRun]]:
    groups: dict[str, list[StoredRun]] = {}
    for run in runs:
        if run.result:
            groups.setdefault(key(run.result), []).append(run)
    return dict(sorted(groups.items()))


def _age_label(created: datetime) -> str:
    days = age_of(created) / timedelta(days=1)
    return next((label for label, limit in _AGES.items() if days <= limit), "older")


def _dequantized(location: str) -> set[str]:
    """Return the artifact that a GGUF file is dequantized to, stored or not; nothing if the file does not exist."""
    with suppress(HbvError):
        if path := gguf_file(location):
            return {artifact_name(dequantized_artifact(path))}
    return set()


def _names_in(path: str) -> set[str]:
    """Return every `stage/key` in a path and where its links lead, also if it is relative or of a moved home."""
    paths = [path]
    with suppress(OSError, ValueError, RuntimeError):
        paths.append(str(Path(path).expanduser().resolve()))
    return {name for text in paths for name in _NAME.findall(text)}


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)

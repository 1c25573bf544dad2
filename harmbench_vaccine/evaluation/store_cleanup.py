"""Remove artifacts that no stored run needs, and check every artifact of a store."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal

from harmbench_vaccine.core.errors import HbvError, unknown_name
from harmbench_vaccine.core.progress import SILENT, Progress
from harmbench_vaccine.core.store import Store
from harmbench_vaccine.core.store_contents import (
    StoredArtifact,
    UnfinishedWork,
    is_intact,
    list_artifacts,
    list_unfinished,
    removal,
    remove_unfinished,
)

from .run_folders import StoredRun, runs_without_folder, select_runs
from .store_usage import StoreUsage, age_of, files_below, size_of, upstream
from .sweep_registry import RegisteredSweep, forget_sweep, registered_sweeps

YOUNGEST = timedelta(minutes=10)
"""Age below which a folder of unfinished work is never removed: its process may be about to lock it."""


@dataclass(frozen=True)
class Selection:
    """The artifacts to remove. By default: those that no run and no unfinished sweep needs."""

    runs: tuple[str, ...] = ()
    """Runs to drop, as the user wrote them: artifacts that only they need, instead of those that no run needs."""
    protocols: tuple[str, ...] = ()
    """Protocols whose runs are dropped in the same way."""
    sweeps: tuple[str, ...] = ()
    """Unfinished sweeps that are dropped in the same way."""
    older_than: timedelta | None = None
    """Only artifacts that are older."""
    checkpoints: bool = False
    """Also the checkpoints of unfinished stages."""


@dataclass(frozen=True)
class Cleanup:
    """The artifacts that a selection removes."""

    artifacts: list[StoredArtifact]
    unfinished: list[UnfinishedWork]
    size: int
    """Bytes that become free: those of files without other hard links."""
    in_use: list[StoredArtifact]
    """Selected artifacts that stay, because a running process uses or creates them."""
    dropped: list[str]
    """Ids of the runs that lose artifacts; their results and answers stay."""
    notes: list[str]


def plan_cleanup(store: Store, selection: Selection) -> Cleanup:
    """Return what a cleanup would remove.

    Raises:
        BadInput: The selection names an unknown run or protocol.
        HbvError: The artifacts of a run are not known.
    """
    return _plan(StoreUsage(store), selection, store.use.marked())


def clean(store: Store, selection: Selection) -> Cleanup:
    """Remove artifacts that no kept run, no unfinished sweep and no running process needs.

    Arguments and errors are those of `plan_cleanup`.

    Runs are read after the marks of running processes: a command that ends meanwhile has stored its run before its
    marks disappear.
    """
    with removal(store) as removing:
        plan = _plan(StoreUsage(store), selection, removing.in_use)
        removed = [artifact for artifact in plan.artifacts if removing.remove(artifact)]
    unfinished = [work for work in plan.unfinished if remove_unfinished(store, work)]
    for sweep in registered_sweeps(store.root).values():
        if sweep.name in selection.sweeps or not sweep.unfinished:
            forget_sweep(store.root, sweep.name)
    locked = [artifact for artifact in plan.artifacts if artifact not in removed]
    size = plan.size - _freed(locked, [work for work in plan.unfinished if work not in unfinished])
    return Cleanup(removed, unfinished, size, plan.in_use + locked, plan.dropped, plan.notes)


def _plan(usage: StoreUsage, selection: Selection, in_use: set[str]) -> Cleanup:
    dropped = _dropped_runs(usage, selection)
    runs = [run for run in usage.runs if run not in dropped]
    for run in runs:
        if run.problem:
            raise HbvError(
                f"The artifacts that {run.folder} needs are not known, so nothing is removed. {run.problem} Or delete "
                "this folder, if you do not need its results."
            )
    candidates: Iterable[str] = usage.artifacts
    if dropped or selection.sweeps:
        candidates = usage.needed_by(dropped) | usage.needed_by_sweeps(selection.sweeps)
    sweeps = [name for name in usage.sweeps if name not in selection.sweeps]
    needed_by_sweeps = usage.needed_by_sweeps(sweeps)
    needed = {*usage.needed_by(runs), *needed_by_sweeps, usage.testbed}
    selected = [
        usage.artifacts[name]
        for name in sorted(candidates)
        if name in usage.artifacts and name not in needed and _is_selected(usage.artifacts[name], selection)
    ]
    used = usage.with_inputs(in_use)
    artifacts = [artifact for artifact in selected if artifact.name not in used]
    unfinished = [
        work
        for work in list_unfinished(usage.store)
        if _is_abandoned(work, selection)
        and not (work.has_checkpoints and f"{work.stage}/{work.key}" in needed_by_sweeps)
    ]
    return Cleanup(
        artifacts,
        unfinished,
        _freed(artifacts, unfinished),
        [artifact for artifact in selected if artifact.name in used],
        sorted({run.run for run in dropped}),
        [*_notes(usage.runs), *(_sweep_note(usage.sweeps[name]) for name in sweeps)],
    )


def _dropped_runs(usage: StoreUsage, selection: Selection) -> list[StoredRun]:
    """Return the runs that a selection names.

    Raises:
        BadInput: A run, a protocol or an unfinished sweep is unknown.
    """
    for name in selection.sweeps:
        if name not in usage.sweeps:
            raise unknown_name("unfinished sweep", name, usage.sweeps)
    protocols = usage.runs_by_protocol()
    for name in selection.protocols:
        if name not in protocols:
            raise unknown_name("protocol", name, protocols, of="the stored runs")
    dropped = [run for text in selection.runs for run in select_runs(usage.runs, text)]
    return [*dropped, *(run for name in selection.protocols for run in protocols[name] if run not in dropped)]


def _is_selected(artifact: StoredArtifact, selection: Selection) -> bool:
    if artifact.is_linked and not artifact.path.is_symlink():
        return False  # a link to its stage's folder leads to files that another store may use
    return selection.older_than is None or age_of(artifact.created) > selection.older_than


def _is_abandoned(work: UnfinishedWork, selection: Selection) -> bool:
    if work.has_checkpoints and not selection.checkpoints:
        return False
    return age_of(work.modified) > max(YOUNGEST, selection.older_than or YOUNGEST)


def _freed(artifacts: Sequence[StoredArtifact], unfinished: Sequence[UnfinishedWork]) -> int:
    """Return the bytes of the files whose every hard link is removed."""
    paths = [artifact.path for artifact in artifacts if not artifact.is_linked] + [work.path for work in unfinished]
    files = [file for path in paths for file in files_below(path)]
    links = Counter((file.st_dev, file.st_ino) for file in files)
    return size_of(file for file in files if links[file.st_dev, file.st_ino] >= file.st_nlink)


def _notes(runs: Sequence[StoredRun]) -> list[str]:
    missing = runs_without_folder(runs)
    if not missing:
        return []
    return [
        f"results.csv has runs without a folder ({len(missing)}): {', '.join(missing[:5])}"
        f"{' ...' if len(missing) > 5 else ''}. Artifacts that only they need count as unused."
    ]


def _sweep_note(sweep: RegisteredSweep) -> str:
    return (
        f"Sweep {sweep.name} has no result for {len(sweep.unfinished)} of {len(sweep.run_ids)} runs, so what it needs "
        f"stays. --sweep {sweep.name} removes what only it needs."
    )


# ---------------------------------------------------------------------------------------------------------------------
# Verification

State = Literal["damaged", "unreadable", "orphaned", "missing"]


@dataclass(frozen=True)
class StoreFault:
    """An artifact that is not as it should be."""

    state: State
    """`damaged`: a file changed. `unreadable`: a file cannot be read. `orphaned`: an artifact that it was computed from
    is not in the store. `missing`: a run needs it, and it is not in the store."""
    name: str
    """The artifact, as `stage/key`."""
    runs: list[str]
    """Ids of the runs that need it."""
    detail: str = ""
    repaired: bool = False
    """True if it was removed, so that the next run that needs it creates it again."""


@dataclass(frozen=True)
class Verification:
    """The check of every artifact of a store."""

    artifacts: int
    """Number of artifacts that were checked."""
    faults: list[StoreFault] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """True if no artifact is damaged or unreadable, or all of them were removed."""
        return all(fault.repaired or fault.state not in ("damaged", "unreadable") for fault in self.faults)


def verify_store(store: Store, *, repair: bool = False, progress: Progress = SILENT) -> Verification:
    """Compare every file of a store with its hash, and find artifacts that others refer to but that do not exist.

    Args:
        store: The store.
        repair: Remove damaged artifacts, so that the next run that needs them creates them again.
        progress: Receives a bar over the artifacts.

    Raises:
        HbvError: The store cannot be read.
    """
    usage = StoreUsage(store)
    damaged, faults = [], []
    with progress.bar("verify", len(usage.artifacts)) as advance:
        for name, artifact in usage.artifacts.items():
            try:
                if not is_intact(artifact):
                    damaged.append(artifact)
            except OSError as error:
                detail = f"{error.filename or artifact.path}: {error.strerror}"
                faults.append(StoreFault("unreadable", name, usage.users(name), detail))
            advance(1)
    removed = _remove_damaged(store, damaged) if repair and damaged else set()
    faults += [
        StoreFault("damaged", artifact.name, usage.users(artifact.name), repaired=artifact.name in removed)
        for artifact in damaged
    ]
    for name, artifact in usage.artifacts.items():
        if absent := sorted(upstream(artifact) - usage.artifacts.keys()):
            faults.append(StoreFault("orphaned", name, usage.users(name), f"computed from {', '.join(absent)}"))
    missing = sorted(usage.needed_by(usage.runs) - usage.artifacts.keys())
    faults += [StoreFault("missing", name, usage.users(name)) for name in missing]
    return Verification(len(usage.artifacts), faults)


def _remove_damaged(store: Store, damaged: Sequence[StoredArtifact]) -> set[str]:
    """Remove damaged artifacts, and return their names; those that a process uses or created again stay."""
    with removal(store) as removing:
        created = {artifact.name: artifact.created for artifact in list_artifacts(store.root)}
        return {item.name for item in damaged if created.get(item.name) == item.created and removing.remove(item)}

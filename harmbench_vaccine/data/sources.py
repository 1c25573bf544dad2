"""Where rows come from: a folder or file on disk, the testbed, or a data set of the hub, all through one door."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harmbench_vaccine.core.errors import BadInput, unknown_name

from . import hub
from .files import read_path

TESTBED = "testbed:"
"""Prefix of a location inside the embedded testbed."""


def local_path(location: str) -> Path | None:
    """The path that a location stands for; None for a name on the hub.

    Raises:
        BadInput: it looks like a path, and nothing is there.
    """
    if location.startswith(TESTBED):
        from harmbench_vaccine import testbed

        check_testbed_part(location)
        return testbed.testbed_folder() / location.removeprefix(TESTBED)
    path = Path(location).expanduser()
    if path.exists():
        return path.absolute()
    if hub.parse_hub_name(location) is None:
        raise BadInput(f"There is nothing at {location!r}: name a file, a folder, or a data set or model of the hub.")
    return None


def check_testbed_part(location: str) -> None:
    """Refuses a location that names no part of the testbed, without building it.

    Raises:
        BadInput: it names none.
    """
    from harmbench_vaccine.testbed import PARTS

    if location.startswith(TESTBED) and location.removeprefix(TESTBED) not in PARTS:
        raise unknown_name("part of the testbed", location, [TESTBED + part for part in PARTS])


def name_and_revision(location: str, kind: hub.Kind = "model") -> tuple[str, str | None]:
    """What a library is asked for: a path, or a name of the hub with the commit that is read of it (`data.hub`).

    None stands for a path, and for a name of which no commit is known and none was asked.
    """
    path = local_path(location)
    if path is not None:
        return str(path), None
    name = _hub_name(location)
    return name.id, hub.resolve_commit(kind, name) or name.revision


def fingerprint(location: str, kind: hub.Kind = "model") -> str:
    """A hash of what lies at a location, for addresses in the store; on the hub, the name with its commit, or the name
    alone where no commit is known.

    Text files are hashed whole; a model's weights by name, size and time, since they take minutes to read.
    """
    path = local_path(location)
    if path is None:
        found = hub.resolve_commit(kind, _hub_name(location))
        return f"{location.partition('@')[0]}@{found}" if found else location
    whole = hashlib.sha256()
    for file in sorted([path] if path.is_file() else path.rglob("*")):
        if not file.is_file():
            continue
        whole.update(file.relative_to(path).as_posix().encode())
        if file.suffix in {".safetensors", ".bin", ".parquet", ".arrow"}:
            status = file.stat()
            whole.update(f"{status.st_size} {status.st_mtime_ns}".encode())
        else:
            whole.update(file.read_bytes())
    return whole.hexdigest()[:16]


def provenance(location: str) -> dict[str, Any]:
    """What was read at a location: the commit for a name on the hub (`unknown` where nothing tells it), a hash of the
    content for a path; and the rows of each split that this process read of it."""
    rows = {split: count for (place, split), count in _ROWS_READ.items() if place == location}
    if local_path(location) is not None:
        return {"location": location, "fingerprint": fingerprint(location), "rows": rows}
    name = _hub_name(location)
    resolved = hub.resolve_commit("dataset", name) or "unknown"
    return {"location": location, "revision": name.revision, "resolved": resolved, "rows": rows}


_ROWS_READ: dict[tuple[str, str], int] = {}


def _hub_name(location: str) -> hub.HubName:
    name = hub.parse_hub_name(location)
    assert name is not None  # `locate` refuses what has another form
    return name


# ---------------------------------------------------------------------------------------------------------------------
# Rows

TEXT_FIELDS = frozenset({
    "prompt", "response", "refusal", "instruction", "output", "sentence", "text", "question", "answer",
    "dialogue", "summary",
})  # fmt: skip
"""Fields that hold text in every data set that is read here."""

_SPLIT = re.compile(r"(?P<name>[^\[\]]+)(?:\[(?P<start>-?\d+)?:(?P<stop>-?\d+)?\])?")


@dataclass(frozen=True)
class SourceRow:
    """One row of a data set, with the place it came from for messages and ids."""

    number: int
    """Counts from 0 in the split, whatever slice of it is read."""
    values: Mapping[str, Any]
    place: str
    """File and line, or data set, split and row."""


def parse_split(split: str) -> tuple[str, slice]:
    """The split and the part of it that `train`, `train[:700]` or `train[-1000:]` stands for.

    Raises:
        BadInput: it has another form.
    """
    match = _SPLIT.fullmatch(split)
    if match is None:
        raise BadInput(f"Split {split!r} cannot be read: write NAME, NAME[:700], NAME[700:] or NAME[-1000:], in rows.")
    start, stop = (int(match[end]) if match[end] else None for end in ("start", "stop"))
    return match["name"], slice(start, stop)


def read_rows(location: str, split: str, fields: Sequence[str]) -> list[SourceRow]:
    """The rows of one split or of a slice of it, in order; a single file is every split.

    Raises:
        BadInput: there is no such split, a file is not what its name says, or a row lacks one of `fields`.
    """
    name, part = parse_split(split)
    path = local_path(location)
    found = read_path(path, name) if path else hub.read_hub(location, _hub_name(location), name)
    rows = []
    for number, (place, values) in enumerate(found):
        for field in fields:
            if field not in values:
                raise BadInput(
                    f"{place}: field {field!r} is missing; a row needs {', '.join(fields)}, "
                    f"and this one has {', '.join(map(str, values)) or 'none'}."
                )
            if field in TEXT_FIELDS and not isinstance(values[field], str):
                raise BadInput(f"{place}: field {field!r} holds {values[field]!r}, which is no text.")
            if field == "is_safe" and not isinstance(values[field], bool):
                raise BadInput(f"{place}: field {field!r} holds {values[field]!r}; allowed: true, false.")
        rows.append(SourceRow(number, values, place))
    kept = rows[part]
    if not kept:
        said = f": {name!r} has {len(rows)} rows" if rows else ""
        raise BadInput(f"Split {split!r} of {location} is empty{said}.")
    _ROWS_READ[location, split] = len(kept)
    return kept

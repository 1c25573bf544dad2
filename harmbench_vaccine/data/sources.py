"""Locations of models and data: a folder or file on disk, a part of the testbed, or a name of the Hub.

A model may also be a GGUF file. It is read from the folder in the store that it is dequantized to.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from harmbench_vaccine.core.errors import BadInput, HbvError, unknown_name
from harmbench_vaccine.core.hashing import content_hash
from harmbench_vaccine.core.paths import home, user_path
from harmbench_vaccine.core.store import Store

from . import hub
from .files import read_path
from .gguf_files import MODEL, dequantized_artifact, has_gguf_suffix, is_gguf
from .row_values import check_row

TESTBED = "testbed:"
"""Prefix of a location inside the embedded testbed."""
TESTBED_VERSION = 4
"""Increases whenever the testbed's text or a model changes; version 4 added the guard to version 3."""
TESTBED_PARTS = (
    "model",
    "judge",
    "guard",
    *(f"data/{name}" for name in ("beavertails", "beavertails_refusals", "alpaca", "sst2", "ag_news", "gsm8k")),
)
"""The parts that a location `testbed:PART` may name."""


def testbed_folder() -> Path:
    """Return the folder of the testbed in this user's store, built or not (`testbed.ensure_testbed` builds it)."""
    return Store(home() / "store").path_of("testbed", {"version": TESTBED_VERSION})


def local_path(location: str) -> Path | None:
    """Return the path of a location; None for a name on the Hub.

    Raises:
        BadInput: It looks like a path, and nothing exists there, or it names no part of the testbed.
        HbvError: The testbed is not built.
    """
    if location.startswith(TESTBED):
        check_testbed_part(location)
        folder = testbed_folder()
        if not folder.is_dir():
            raise HbvError(f"{location!r} is not available: the testbed is not built. Run hbv testbed build.")
        return folder / location.removeprefix(TESTBED)
    path = user_path(location)
    if os.path.lexists(path):  # a link that leads nowhere is not a name on the Hub
        return path.absolute()
    if hub.parse_hub_name(location) is None or has_gguf_suffix(location):
        raise BadInput(
            f"{location!r} does not exist, or its folder may not be read; allowed: a file, a folder, or a data set or "
            "model of the Hub."
        )
    return None


def gguf_file(location: str) -> Path | None:
    """Return the GGUF file at a location; None for another location.

    Raises:
        BadInput: The location ends like a GGUF file, and nothing exists there.
    """
    path = local_path(location) if has_gguf_suffix(location) else None
    return path if path is not None and is_gguf(path) else None


def is_dequantized(location: str) -> bool:
    """Return False for a GGUF file whose weights the store does not have; True for another location."""
    path = gguf_file(location)
    return path is None or dequantized_artifact(path).is_dir()


def model_folder(location: str) -> Path | None:
    """Return the folder that a model is read from; None for a name on the Hub.

    Raises:
        BadInput: See `local_path`.
        HbvError: The testbed is not built, or the GGUF file is not dequantized.
    """
    path = local_path(location)
    if path is None or not is_gguf(path):
        return path
    if not is_dequantized(location):
        raise HbvError(f"{location!r} is not dequantized yet: the first run with this model does it.")
    return dequantized_artifact(path) / MODEL


def is_available(location: str) -> bool:
    """Return whether a location can be read without a network, and without building the testbed.

    Raises:
        BadInput: It is neither a path, a part of the testbed nor a name of the Hub.
    """
    if location.startswith(TESTBED):
        return testbed_folder().is_dir()
    if local_path(location) is not None:
        return True
    return any(hub.is_cached(kind, _hub_name(location)) for kind in get_args(hub.Kind))


def check_testbed_part(location: str) -> None:
    """Refuse a location that names an unknown part of the testbed, without building the testbed.

    Raises:
        BadInput: The testbed has no such part.
    """
    if location.startswith(TESTBED) and location.removeprefix(TESTBED) not in TESTBED_PARTS:
        raise unknown_name("part of the testbed", location, [TESTBED + part for part in TESTBED_PARTS])


def name_and_revision(location: str, kind: hub.Kind = "model") -> tuple[str, str | None]:
    """Return what `from_pretrained` takes: a path, or a name of the Hub with the commit to read (`data.hub`).

    The revision is None for a path, and for a name without a known or requested commit. The path of a GGUF file is the
    folder that it is dequantized to.
    """
    path = model_folder(location)
    if path is not None:
        return str(path), None
    name = _hub_name(location)
    return name.id, hub.resolve_commit(kind, name) or name.revision


def fingerprint(location: str, kind: hub.Kind = "model") -> str:
    """Return a hash of the content at a location, for keys in the store.

    For a path it depends on the content alone, so that a copy has the same fingerprint. On the Hub it is the name with
    its commit, or the name alone where no commit is known.
    """
    path = local_path(location)
    if path is not None:
        return content_hash(path)
    commit = hub.resolve_commit(kind, _hub_name(location))
    return f"{location.partition('@')[0]}@{commit}" if commit else location


def location_identity(location: str) -> str:
    """Return the content hash of a path; a part of the testbed or a name of the Hub is returned unchanged.

    So a copy has the same identity, and the testbed, which each machine builds, is the same on all of them.
    """
    is_path = not location.startswith(TESTBED) and local_path(location) is not None
    return fingerprint(location) if is_path else location


def provenance(location: str, rows: Mapping[str, int]) -> dict[str, Any]:
    """Describe what was read at a location.

    Args:
        location: A path, a testbed part or a name of the Hub.
        rows: Split -> number of rows read.

    Returns:
        The location with the content hash of a path, or with the commit of a name on the Hub (`unknown` where no commit
        is known), and `rows`.
    """
    if local_path(location) is not None:
        return {"location": location, "fingerprint": fingerprint(location), "rows": dict(rows)}
    name = _hub_name(location)
    commit = hub.resolve_commit("dataset", name) or "unknown"
    return {"location": location, "revision": name.revision, "resolved": commit, "rows": dict(rows)}


def _hub_name(location: str) -> hub.HubName:
    name = hub.parse_hub_name(location)
    assert name is not None  # `local_path` refuses other forms
    return name


# ---------------------------------------------------------------------------------------------------------------------
# Rows

_SPLIT = re.compile(r"(?P<name>[^\[\]]+)(?:\[(?P<start>-?\d{1,18})?:(?P<stop>-?\d{1,18})?\])?")


@dataclass(frozen=True)
class SourceRow:
    """One row of a data set, with its place for messages and ids."""

    number: int
    """Its number in the complete split, from 0, also if a slice is read."""
    values: Mapping[str, Any]
    place: str
    """File and line, or data set, split and row."""


def parse_split(split: str) -> tuple[str, slice]:
    """Split `train`, `train[:700]` or `train[-1000:]` into a name and a slice.

    Raises:
        BadInput: The text has another form.
    """
    match = _SPLIT.fullmatch(split)
    if match is None:
        raise BadInput(
            f"Split {split!r} cannot be read; allowed: NAME, NAME[:700], NAME[700:] or NAME[-1000:], in rows."
        )
    start, stop = (int(match[end]) if match[end] else None for end in ("start", "stop"))
    return match["name"], slice(start, stop)


def read_rows(location: str, split: str, fields: Sequence[str]) -> list[SourceRow]:
    """Read the rows of a split or of a slice of it, in order; a single file is every split.

    Raises:
        BadInput: The split does not exist or is empty, a file is damaged, or a row lacks one of `fields`
            or has a value that cannot be used (see `check_row`).
    """
    name, part = parse_split(split)
    path = local_path(location)
    source = read_path(path, name) if path else hub.read_hub(location, _hub_name(location), name)
    rows = []
    for number, (place, values) in enumerate(source):
        rows.append(SourceRow(number, check_row(place, values, fields), place))
    if not rows[part]:
        size = f": {name!r} has {len(rows)} rows" if rows else ""
        raise BadInput(f"Split {split!r} of {location} is empty{size}.")
    return rows[part]


class RowReader:
    """Read rows, and count them by location and split."""

    def __init__(self) -> None:
        self.counts: dict[str, dict[str, int]] = {}
        """Location -> split -> rows read."""

    def read(self, location: str, split: str, fields: Sequence[str]) -> list[SourceRow]:
        """Read a split as `read_rows` does."""
        rows = read_rows(location, split, fields)
        self.counts.setdefault(location, {})[split] = len(rows)
        return rows

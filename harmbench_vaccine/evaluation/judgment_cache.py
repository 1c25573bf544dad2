"""The cache of raw judgments: one SQLite file next to the artifacts, with a checksum in every row.

The cache only saves time. A damaged row is judged again, a damaged file is renamed and replaced by a new one, and a
file that cannot be used leaves judging without a cache; none of them stops a run.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path

from harmbench_vaccine.core.progress import SILENT, Progress
from harmbench_vaccine.core.types import RawJudgment

FILE = ".judgments.sqlite"
_SCHEMA = "CREATE TABLE IF NOT EXISTS judgments (key TEXT PRIMARY KEY, judgment TEXT, checksum TEXT) WITHOUT ROWID"


class JudgmentCache:
    """Raw judgments by key; no write-ahead log, which network file systems do not support."""

    def __init__(self, connection: sqlite3.Connection | None, progress: Progress) -> None:
        self._connection, self._progress = connection, progress

    def get(self, keys: Sequence[str]) -> dict[str, RawJudgment]:
        """Return the cached judgments of these keys; a row that fails its checksum counts as absent."""
        judgments: dict[str, RawJudgment] = {}
        damaged = 0
        with self._without_errors():
            for key in dict.fromkeys(keys):
                if self._connection is None:
                    break
                query = "SELECT judgment, checksum FROM judgments WHERE key = ?"
                if row := self._connection.execute(query, (key,)).fetchone():
                    judgment = _checked_judgment(key, *row)
                    if judgment is None:
                        damaged += 1
                    else:
                        judgments[key] = judgment
        if damaged:
            self._progress.note(f"{damaged} cached judgments are damaged and are made again")
        return judgments

    def put(self, judgments: Mapping[str, RawJudgment]) -> None:
        """Store judgments; a row with the same key is replaced."""
        rows = []
        with self._without_errors():
            for key, judgment in judgments.items():
                text = json.dumps(asdict(judgment), ensure_ascii=False)
                rows.append((key, text, _checksum(key, text)))
            if self._connection and rows:
                with self._connection:
                    self._connection.executemany("INSERT OR REPLACE INTO judgments VALUES (?, ?, ?)", rows)

    @contextmanager
    def _without_errors(self) -> Iterator[None]:
        """Continue without the cache if its file cannot be used: judging is then slower, but does not fail."""
        try:
            yield
        except (sqlite3.Error, UnicodeError) as error:
            self._progress.note(f"raw judgments are not cached: {error}")
            self._connection = None


@contextmanager
def open_judgments(root: Path, progress: Progress = SILENT) -> Iterator[JudgmentCache]:
    """Open the cache of a store, and close it after the block.

    A file that is not a readable database is renamed to `.judgments.sqlite.damaged-N`.

    Args:
        root: The folder of the store.
        progress: Receives a note where the cache, or a part of it, cannot be used.
    """
    path = root / FILE
    try:
        connection = _connect(path)
    except sqlite3.DatabaseError as error:
        connection = None
        if isinstance(error, sqlite3.OperationalError):  # locked, read-only or unreadable: the file may be intact
            progress.note(f"raw judgments are not cached: {path}: {error}")
        else:
            connection = _replaced(path, progress)
    except OSError as error:
        connection = None
        progress.note(f"raw judgments are not cached: {error}")
    if connection is None:
        yield JudgmentCache(None, progress)
        return
    with closing(connection):
        yield JudgmentCache(connection, progress)


def _connect(path: Path) -> sqlite3.Connection:
    """Open the database and check all of its pages.

    Raises:
        sqlite3.OperationalError: It cannot be opened, read or written.
        sqlite3.DatabaseError: It is damaged.
        OSError: Its folder cannot be created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()  # SQLite creates files as 644, whatever the umask allows
    connection = sqlite3.connect(path, timeout=60)
    try:
        if problem := _damage(connection):
            raise sqlite3.DatabaseError(problem)
        connection.execute(_SCHEMA)
    except BaseException:
        connection.close()
        raise
    return connection


def _damage(connection: sqlite3.Connection) -> str:
    """Return what the quick check of SQLite finds, or an empty text."""
    result = str(connection.execute("PRAGMA quick_check(1)").fetchone()[0])
    return "" if result == "ok" else result


def _replaced(path: Path, progress: Progress) -> sqlite3.Connection | None:
    """Rename a damaged file and begin a new one."""
    names = (path.with_name(f"{path.name}.damaged-{number}") for number in itertools.count(1))
    other = next(name for name in names if not name.exists())
    try:
        os.rename(path, other)
        connection = _connect(path)
    except (OSError, sqlite3.Error) as error:
        progress.note(f"raw judgments are not cached: {path} is damaged: {error}")
        return None
    progress.note(f"the cache of raw judgments is damaged: it was renamed to {other}, and a new one begins")
    return connection


def _checked_judgment(key: str, text: object, checksum: object) -> RawJudgment | None:
    """Return the judgment of a row, or None if the row is damaged."""
    if not isinstance(text, str) or _checksum(key, text) != checksum:
        return None
    return RawJudgment(**json.loads(text))


def _checksum(key: str, text: str) -> str:
    """Return the SHA-256 of a row's key and content (64 hexadecimal digits)."""
    return hashlib.sha256(f"{key}\0{text}".encode()).hexdigest()

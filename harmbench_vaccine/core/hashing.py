"""Canonical JSON, and hashes of JSON values and of files."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import stat
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from .errors import BadInput
from .paths import home

CACHED_ABOVE = 1 << 20
"""Bytes above which the hash of a file is cached: smaller files are hashed faster than looked up."""
_RECENT = 2_000_000_000
"""Nanoseconds after a change within which a file may change again without another time stamp."""


def canonical_json(value: Any) -> str:
    """Serialize a JSON value with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any, length: int = 20) -> str:
    """Return the first `length` hexadecimal digits of the SHA-256 of a JSON value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:length]


def content_hash(path: Path) -> str:
    """Hash a file, or every file below a folder with its relative name, by content alone.

    A copy, a restored backup and the same folder on another machine have the same hash. The hash of a large file is
    cached in `$HBV_HOME/hashes.sqlite` by path, size and modification time.

    Returns:
        16 hexadecimal digits.

    Raises:
        BadInput: The path is neither a file nor a folder, or it cannot be read.
    """
    combined = hashlib.sha256()
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            combined.update(f"{path.suffix}\0{file_hash(path)}".encode("utf-8", "surrogateescape"))
        elif stat.S_ISDIR(mode):
            for file in sorted(_files_below(path)):
                name = file.relative_to(path).as_posix()
                combined.update(f"{name}\0{file_hash(file)}\0".encode("utf-8", "surrogateescape"))
        else:  # to read from a pipe or a device may never end
            raise BadInput(f"{path} is neither a regular file nor a folder.")
    except OSError as error:
        raise BadInput(f"{error.filename or path} cannot be read: {error.strerror}.") from error
    return combined.hexdigest()[:16]


def _files_below(folder: Path) -> Iterator[Path]:
    """Return the regular files below a folder, also those in linked folders, since those are read as well.

    Raises:
        OSError: A folder cannot be read.
    """
    for place, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        target = Path(os.path.realpath(place))
        folders[:] = [name for name in folders if not target.is_relative_to(os.path.realpath(Path(place, name)))]
        yield from (file for name in names if (file := Path(place, name)).is_file())


def _raise(error: OSError) -> NoReturn:
    raise error


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file's content (64 hexadecimal digits), from a cache where the file did not change.

    A process reads a file once: a plan of many runs needs the hash of each data set for every stage.
    """
    status = path.stat()
    if time.time_ns() - status.st_ctime_ns < _RECENT:
        return _stored_hash(path, status.st_size, status.st_mtime_ns)
    inode = (status.st_dev, status.st_ino, status.st_ctime_ns)
    return _hash_of_inode(path, status.st_size, status.st_mtime_ns, inode)


@lru_cache(maxsize=10_000)
def _hash_of_inode(path: Path, size: int, modified: int, inode: tuple[int, int, int]) -> str:
    return _stored_hash(path, size, modified)


def _stored_hash(path: Path, size: int, modified: int) -> str:
    """Return the hash of a file from the cache of this user if it is large, or else read the file."""
    if size < CACHED_ABOVE:
        return sha256(path)
    key = (str(path.absolute()), size, modified)
    with suppress(OSError, UnicodeError, sqlite3.Error):  # a cache that cannot be used costs time only
        home().mkdir(parents=True, exist_ok=True)
        file = home() / "hashes.sqlite"
        file.touch()  # SQLite creates files as 644, whatever the umask allows
        with closing(sqlite3.connect(file, timeout=10)) as cache, cache:
            cache.execute(
                "CREATE TABLE IF NOT EXISTS hashes"
                " (path TEXT PRIMARY KEY, size INTEGER, mtime INTEGER, hash TEXT) WITHOUT ROWID"
            )
            row = cache.execute("SELECT hash FROM hashes WHERE path = ? AND size = ? AND mtime = ?", key).fetchone()
            if row is None:
                row = (sha256(path),)
                cache.execute("INSERT OR REPLACE INTO hashes VALUES (?, ?, ?, ?)", (*key, *row))
            return str(row[0])
    return sha256(path)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, read now (64 hexadecimal digits)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

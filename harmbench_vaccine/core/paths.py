"""Paths that a user writes, and locations of the files that hbv writes."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from .errors import BadInput, HbvError, shortened

MAX_FOLDERS = 200
"""Largest number of nested folders of a path that a user writes."""


def user_path(text: str | Path) -> Path:
    """Return a path that a user wrote, with `~` expanded; nothing needs to exist there.

    Raises:
        BadInput: No file can have this path.
    """
    if not str(text):
        raise BadInput("A path is empty; use '.' for the current folder.")
    try:
        path = Path(text).expanduser()
        str(path).encode()
        if len(path.parts) > MAX_FOLDERS:
            raise ValueError(f"it has more than {MAX_FOLDERS} folders")
        os.stat(path)
    except RuntimeError as error:
        raise BadInput(f"Path {shortened(text)!r} begins with the name of a user who has no home folder.") from error
    except ValueError as error:
        raise BadInput(f"Path {shortened(text)!r} cannot be the path of a file: {error}.") from error
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise BadInput(f"Path {shortened(text)!r} cannot be read: {error.strerror}.") from error
    return path


def home() -> Path:
    """Return the folder of artifacts, runs and testbed: `$HBV_HOME`, or the platform's cache folder.

    Raises:
        BadInput: `$HBV_HOME` cannot be a path.
    """
    folder = os.environ.get("HBV_HOME")
    if folder:
        return user_path(folder).absolute()
    from platformdirs import user_cache_path

    return user_cache_path("harmbench-vaccine", appauthor=False)


def ensure_writable(folder: Path, what: str) -> Path:
    """Create `folder` and check that it is writable, before any work starts.

    Args:
        folder: The folder.
        what: Description of the folder for the error message, such as "The cache folder".

    Returns:
        The same folder.

    Raises:
        BadInput: The folder cannot be created or is not writable.
        HbvError: The disk is full, or the folder is one that hbv names itself, below its home.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # it has no name, so a killed process leaves nothing
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise HbvError(f"{what} {folder} cannot be written to: the disk is full. Free some space.") from error
        raise _not_writable(folder, what, error.strerror or str(error)) from error
    return folder


def check_writable(folder: Path, what: str) -> Path:
    """Check that `ensure_writable` can succeed, without creating anything; arguments and errors are the same."""
    nearest = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(place))
    if not nearest.is_dir():
        raise _not_writable(folder, what, os.strerror(errno.ENOTDIR))
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise _not_writable(folder, what, os.strerror(errno.EACCES))
    return folder


def _not_writable(folder: Path, what: str, reason: str) -> HbvError:
    kind = HbvError if home() in folder.parents else BadInput
    return kind(f"{what} {folder} cannot be written to ({reason}): choose a folder that is writable.")

"""Locations of the files that hbv writes."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from .errors import BadInput, HbvError


def home() -> Path:
    """Return the folder of artifacts, runs and testbed: `$HBV_HOME`, or the platform's cache folder."""
    folder = os.environ.get("HBV_HOME")
    if folder:
        return Path(folder).expanduser().absolute()
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
        HbvError: The disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise HbvError(f"{what} {folder} cannot be written to: the disk is full. Free some space.") from error
        raise BadInput(
            f"{what} {folder} cannot be written to ({error.strerror or error}): choose a folder that is writable."
        ) from error
    return folder

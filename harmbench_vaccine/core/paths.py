"""Where everything that hbv writes is kept."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from .errors import BadInput, HbvError


def home() -> Path:
    """The folder of this user's artifacts, runs and testbed: `$HBV_HOME`, or the platform's cache folder."""
    written = os.environ.get("HBV_HOME")
    if written:
        return Path(written).expanduser().absolute()
    from platformdirs import user_cache_path

    return user_cache_path("harmbench-vaccine", appauthor=False)


def ensure_writable(folder: Path, what: str) -> Path:
    """Makes `folder` and checks that files can be written into it, before any work is spent.

    Raises:
        BadInput: it cannot be made or written to.
        HbvError: the disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise HbvError(f"{what} {folder} cannot be written to: the disk is full.") from error
        raise BadInput(
            f"{what} {folder} cannot be written to ({error.strerror or error}): name a folder you may write to."
        ) from error
    return folder

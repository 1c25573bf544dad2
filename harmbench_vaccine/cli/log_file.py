"""The log file of a command: plain lines with time stamps, which are appended to the file of `--log-file`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.visible import visible

LOG = logging.getLogger("harmbench_vaccine.cli")
"""Receives the lines; without a log file nothing is written."""
LOG.addHandler(logging.NullHandler())  # otherwise Python prints warnings on stderr
LOG.setLevel(logging.INFO)
LOG.propagate = False


class LogFile(logging.FileHandler):
    """A file of lines with time stamps."""

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        super().__init__(path, encoding="utf-8")
        self._warn = warn
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%dT%H:%M:%S%z"))

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line without hidden characters."""
        return visible(" ".join(super().format(record).splitlines()))

    def handleError(self, record: logging.LogRecord) -> None:
        """Report that a line cannot be written, and end the log; the command goes on."""
        LOG.removeHandler(self)
        self._warn(f"The log file {self.baseFilename} ends here: {sys.exception()}.")


def open_log(path: Path, warn: Callable[[str], None]) -> None:
    """Append lines to a file until `close_log`.

    Args:
        path: The file, which is created if it does not exist.
        warn: Called with a sentence if a line cannot be written, such as on a full disk.

    Raises:
        BadInput: The file cannot be written to.
    """
    try:
        LOG.addHandler(LogFile(path, warn))
    except OSError as error:
        raise BadInput(f"--log-file {path} cannot be written to ({error.strerror}): choose a writable file.") from error


def has_log() -> bool:
    """Return whether a log file is open."""
    return any(isinstance(handler, LogFile) for handler in LOG.handlers)


def close_log() -> None:
    """Close the log file, if any."""
    for handler in LOG.handlers[:]:
        if isinstance(handler, LogFile):
            LOG.removeHandler(handler)
            handler.close()

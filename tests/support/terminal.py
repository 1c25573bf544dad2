"""A pseudo-terminal: the lines that a program shows at a width."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from collections.abc import Sequence
from pathlib import Path

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def run_in_terminal(command: Sequence[str], width: int, out: Path = Path(os.devnull), **environment: str) -> str:
    """Run a command whose stderr is a terminal and whose stdout is a file; return its output to the terminal."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    values = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    with out.open("wb") as file:
        running = subprocess.Popen(
            command, stdin=follower, stdout=file, stderr=follower, env={**values, "TERM": "xterm", **environment}
        )
    os.close(follower)
    shown = b""
    try:
        while part := os.read(leader, 65536):
            shown += part
    except OSError:  # the other end is closed
        pass
    os.close(leader)
    assert running.wait() == 0, shown.decode()
    return shown.decode()


def frames(shown: str) -> list[str]:
    """Return the lines that were visible at some time, without control sequences."""
    lines = (_CONTROL.sub("", line).strip("\r") for line in re.split(r"\x1b\[2K|\r\n", shown))
    return [line for line in lines if line.strip()]

"""Find out from the errors of vLLM what it refuses, and quote its own words.

vLLM often raises an error without a message, or one that only refers to its log ("See root cause above."). The reason
is then the line of source that failed, or the first error in the log.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

Refused = Literal["model", "attention", "compilation", "adapter", "adapters", "memory", "length"]
"""What vLLM refuses: the model, its attention backend, CUDA graphs and compilation, one adapter, every adapter on the
model, the free memory, or the length of a text."""

MAX_REASON = 200
"""Characters of a reason in a message."""

_REFERENCES = ("root cause", "enginecore", "engine core", "background process")
"""Parts of messages that refer to another error."""

_MEMORY = ("memory", "kv cache")
_COMPILATION = ("cudagraph", "cuda_graph", "capture_model", "torch/_inductor", "torch/_dynamo", "vllm/compilation")
_ATTENTION = ("/attention/", "flash_attn", "flashinfer")

_LOG_PREFIX = re.compile(r"^(?:\([^()]* pid=\d+\) ?)?(?:[A-Z]+ [\d-]+ [\d:]+ \[[^\]]+\] ?)?")
_FRAME = re.compile(r'  File "(?P<file>[^"]+)", line \d+, in (?P<function>\S+)')
_ERROR = re.compile(r"(?P<name>(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception))(?:: (?P<text>.*))?$")


@dataclass(frozen=True)
class RaisedError:
    """An exception of vLLM or of a library below it."""

    name: str
    """Name of its class."""
    text: str
    """Its message, which may be empty."""
    frames: Sequence[str] = ()
    """Frames of its traceback, the innermost last: "path/of/file.py:function"."""
    source: str = ""
    """The line of source that raised it."""

    @property
    def is_informative(self) -> bool:
        """Return True if the message names a problem."""
        return bool(self.text.strip()) and not self.is_reference

    @property
    def is_reference(self) -> bool:
        """Return True if the message only refers to another error."""
        return any(part in self.text.lower() for part in _REFERENCES)

    @property
    def reason(self) -> str:
        """Return the line that names the problem, short enough for a message and without a full stop.

        It is the message, or the line of source where there is no message, but never the name of a class alone.
        """
        lines = [line.strip() for line in self.text.splitlines() if line.strip()]
        line = next((line for line in lines if line.startswith("Value error, ")), lines[0] if lines else "")
        line = line.removeprefix("Value error, ").partition(" [type=")[0].partition(". ")[0].rstrip(".")
        if not line:
            place = f" in {_short_path(self.frames[-1])}" if self.frames else ""
            line = f"{self.name}{place}: {self.source or 'without a message'}"
        return line if len(line) <= MAX_REASON else f"{line[:MAX_REASON]}..."


@dataclass(frozen=True)
class EngineFailure:
    """The refused part, and the reason for it."""

    what: Refused
    reason: str


def explain(chain: Sequence[RaisedError], log: str) -> EngineFailure:
    """Explain the failure of a request.

    Args:
        chain: The exception that ended the request, and then its causes.
        log: What vLLM and its processes logged during the request: `chain` may only refer to it.
    """
    informative = [error for error in chain if error.is_informative]
    silent = [error for error in chain if not error.text.strip()]
    logged = [] if informative or silent else [error for error in logged_errors(log) if not error.is_reference]
    error = [*informative, *reversed(silent), *logged, *chain][0]
    chain = [*chain, *logged]
    return EngineFailure(_refused(error, [frame for each in chain for frame in each.frames]), error.reason)


def logged_errors(log: str) -> list[RaisedError]:
    """Read the errors whose tracebacks are in a log, in their order; prefixes of processes and loggers are ignored."""
    errors: list[RaisedError] = []
    frames: list[str] = []
    source = ""
    is_source = in_traceback = False
    for line in (_LOG_PREFIX.sub("", line, count=1) for line in log.splitlines()):
        if line.startswith("Traceback (most recent call last)"):
            in_traceback, frames, source = True, [], ""
        elif frame := _FRAME.match(line):
            frames.append(f"{frame['file']}:{frame['function']}")
            is_source = True
            continue
        elif is_source and line.startswith("    "):
            source = line.strip()
        elif in_traceback and (error := _ERROR.match(line)):
            name = error["name"].rpartition(".")[2]
            errors.append(RaisedError(name, error["text"] or "", tuple(frames), source))
            in_traceback = False
        is_source = False
    return errors


def _refused(error: RaisedError, frames: Sequence[str]) -> Refused:
    text, places = f"{error.name} {error.text}".lower(), "\n".join(frames)
    is_memory = any(part in text for part in _MEMORY)
    if "lora" in text:
        return "adapter"
    if any(part in places for part in _COMPILATION) and is_memory:
        return "compilation"
    if is_memory:
        return "memory"
    if "/lora/ops/" in places:  # a kernel: it refuses the data type or the shape of every adapter
        return "adapters"
    if "/lora/" in places:
        return "adapter"
    if "attention" in text or any(part in places for part in _ATTENTION):
        return "attention"
    return "compilation" if any(part in places for part in _COMPILATION) else "model"


def _short_path(frame: str) -> str:
    """Return the path of a frame from the name of its package, or the name of the file."""
    path = frame.rpartition(":")[0]
    package = path.rpartition("site-packages/")[2]
    return PurePath(path).name if package == path else package

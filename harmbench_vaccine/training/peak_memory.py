"""Peak memory of a stage."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from harmbench_vaccine.core.device import device

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@contextmanager
def peak_memory() -> Iterator[Callable[[], int | None]]:
    """Inside, measure peak memory: of the GPU where one is used, else of the process.

    Yields:
        A function that returns the peak since the block began, in bytes. Where the system cannot reset the peak of a
        process (not Linux), it is the peak since the process started; None where the system has no such number
        (Windows).
    """
    if device() == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        yield torch.cuda.max_memory_allocated
        return
    with suppress(OSError):
        _RESET.write_text("5")  # resets VmHWM (proc(5))
    yield _process_peak


def _process_peak() -> int | None:
    with suppress(OSError):
        if match := re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text()):
            return int(match[1]) * 1024
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

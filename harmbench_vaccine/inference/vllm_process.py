"""The parent's end of the process that vLLM runs in; `vllm_worker.py` is the child's end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from harmbench_vaccine.core.device import device
from harmbench_vaccine.core.errors import HbvError
from harmbench_vaccine.core.progress import Advance

from .vllm_errors import RaisedError, Refused, explain, logged_errors

WORKER = Path(__file__).with_name("vllm_worker.py")
PATIENCE = 5.0
"""Seconds that an idle process has to end by itself before it is killed."""

CPU_CACHE = 1
"""GiB that vLLM reserves for keys and values on a CPU; by default it takes most of the memory of the machine."""

_OVERRIDES = {
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # the worker uses a GPU before it starts further processes
    "PYTHONUNBUFFERED": "1",
}
_DEFAULTS = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": str(CPU_CACHE),
}


class EngineRefused(HbvError):
    """vLLM does not serve a request."""

    def __init__(self, model: str, what: Refused, reason: str) -> None:
        """Store the reason.

        Args:
            model: Name of the model in messages.
            what: What vLLM refuses.
            reason: One line in the words of vLLM.
        """
        super().__init__(f"vLLM does not serve {model!r}: {reason}.")
        self.what, self.reason = what, reason


class VllmProcess:
    """A running worker process. It ends with `close`, and by itself soon after the process that started it."""

    def __init__(self, model: str, folder: Path) -> None:
        """Start the process.

        Args:
            model: Name of the model in messages.
            folder: Folder for the log and for temporary files.
        """
        self._model, self._log = model, folder / "worker.log"
        self._busy = False
        with self._log.open("wb") as log:
            self._child = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    str(WORKER),
                ],  # -P: the worker imports installed packages, not the modules of this folder
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                env=_environment(folder),
                start_new_session=True,  # Ctrl-C reaches the harness alone, which ends the worker and its processes
            )

    def request(self, do: str, advance: Advance | None = None, **values: Any) -> dict[str, Any]:
        """Send a request and return its reply.

        Args:
            do: Name of the request (see `vllm_worker.py`).
            advance: Called with the number of finished rows while the request runs.
            values: Arguments of the request, as JSON values.

        Raises:
            EngineRefused: vLLM does not serve the request.
            HbvError: The process died.
        """
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._busy, log_start = True, self._log.stat().st_size
        with suppress(BrokenPipeError):
            self._child.stdin.write(json.dumps({"do": do, **values}) + "\n")
            self._child.stdin.flush()
            for line in self._child.stdout:
                if not line.endswith("\n"):  # the process was killed while it was writing
                    break
                reply: dict[str, Any] = json.loads(line)
                if "step" not in reply:
                    self._busy = False
                    if "failed" in reply:
                        chain = [RaisedError(**error) for error in reply["failed"]]
                        failure = explain(chain, self._logged(log_start))
                        raise EngineRefused(self._model, failure.what, failure.reason)
                    return reply
                if advance:
                    advance(reply["step"])
        raise HbvError(
            f"The vLLM engine of {self._model!r} died{self._cause()}. "
            "Finished stages are stored: run the same command again, or add --backend transformers."
        )

    def close(self) -> None:
        """End the process; a busy process is killed without waiting."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        with suppress(BrokenPipeError):
            self._child.stdin.close()
        try:
            self._child.wait(timeout=0 if self._busy else PATIENCE)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._end_group()
        self._child.stdout.close()

    def _end_group(self) -> None:
        """End the processes that the worker started, which outlive a killed worker for a while."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._child.pid, signal.SIGKILL)

    def _logged(self, start: int = 0) -> str:
        """Return the log from a byte on."""
        return self._log.read_bytes()[start:].decode(errors="replace")

    def _cause(self) -> str:
        code = self._child.wait()
        self._end_group()
        ending = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        log = self._logged()
        lines = [line.strip() for line in log.splitlines() if "Error" in line and "Traceback" not in line]
        errors = [line for line in lines if " " in line] or [error.reason for error in logged_errors(log)]
        return f" ({ending}){': ' + errors[-1][:200].rstrip('.') if errors else ''}"


def _environment(folder: Path) -> dict[str, str]:
    """Return the environment of a worker, whose temporary files are in a folder."""
    cache = os.environ.get("VLLM_CACHE_ROOT") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "vllm"
    )
    defaults = {
        **_DEFAULTS,
        "TORCHINDUCTOR_CACHE_DIR": os.path.join(cache, "inductor"),  # not in TMPDIR: it is reused
        # On a GPU a further process prepares the next step while the GPU computes; on a CPU the start is shorter.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if device() == "cuda" else "0",
    }
    return {**defaults, **os.environ, **_OVERRIDES, "TMPDIR": str(folder)}

"""The harness's side of the process that vLLM runs in (`worker.py` is the other)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from harmbench_vaccine.core.errors import HbvError
from harmbench_vaccine.core.progress import Advance

WORKER = Path(__file__).with_name("worker.py")
PATIENCE = 5.0
"""Seconds that an idle process gets to end by itself."""

_ALWAYS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in the worker itself: to end it is to end everything
    "PYTHONUNBUFFERED": "1",
}
_UNLESS_GIVEN = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; by default vLLM takes most of the machine's memory
}


class EngineRefused(HbvError):
    """vLLM does not serve what was asked of it: `what` is "model", "adapter", "memory" or "length"."""

    def __init__(self, model: str, what: str, reason: str) -> None:
        super().__init__(f"vLLM does not serve {model!r}: {reason}.")
        self.what, self.reason = what, reason


class VllmProcess:
    """A worker. It ends by `close`, and by itself soon after the process that started it."""

    def __init__(self, serves: str, folder: Path) -> None:
        """`serves` is the model's name, for messages; `folder` is for its log and temporary files."""
        self._serves, self._log = serves, folder / "worker.log"
        self._busy = False
        with self._log.open("wb") as log:
            self._child = subprocess.Popen(
                [sys.executable, "-P", str(WORKER)],  # -P: this folder's vllm.py is not the vllm that it imports
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                env={**_UNLESS_GIVEN, **os.environ, **_ALWAYS, "TMPDIR": str(folder)},
                start_new_session=True,  # Ctrl-C is for the harness, which ends the worker
            )

    def ask(self, do: str, advance: Advance | None = None, **values: Any) -> dict[str, Any]:
        """The reply to a request.

        Raises:
            Refused: vLLM does not serve it.
            HbvError: the process died.
        """
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._busy = True
        with suppress(BrokenPipeError):
            self._child.stdin.write(json.dumps({"do": do, **values}) + "\n")
            self._child.stdin.flush()
            for line in self._child.stdout:
                reply: dict[str, Any] = json.loads(line)
                if "step" not in reply:
                    self._busy = False
                    if "failed" in reply:
                        raise EngineRefused(self._serves, reply["failed"], reply["text"])
                    return reply
                if advance:
                    advance(reply["step"])
        raise HbvError(
            f"The vLLM engine of {self._serves!r} died{self._cause()}. "
            "Finished stages are kept: run the same command again, or with --backend transformers."
        )

    def close(self) -> None:
        """Ends the process; one that works is not waited for."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        with suppress(BrokenPipeError):
            self._child.stdin.close()
        try:
            self._child.wait(timeout=0 if self._busy else PATIENCE)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._child.stdout.close()

    def _cause(self) -> str:
        code = self._child.wait()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line.strip() for line in lines if "Error" in line and "Traceback" not in line]
        return f" ({how}){': ' + errors[-1][:200].rstrip('.') if errors else ''}"

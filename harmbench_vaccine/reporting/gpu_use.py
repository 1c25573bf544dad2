"""A GPU that other processes use: they are reported before work starts, and a model that cannot fit is refused."""

from __future__ import annotations

import os
from collections.abc import Iterable

from harmbench_vaccine.core.device import device
from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.progress import Progress
from harmbench_vaccine.data.sources import TESTBED
from harmbench_vaccine.experiment.experiment import Experiment

from .dry_run.memory import count_weights
from .gpus import Gpu, GpuProcess, gibibytes, list_gpus

_MEBIBYTE = 2**20
_LISTED = 3
"""Number of processes that a message names."""


def check_gpu_memory(experiments: Iterable[Experiment], progress: Progress) -> None:
    """Report the processes that use the GPU on which models will run; on a CPU, do nothing.

    Args:
        experiments: The experiments that will load models.
        progress: Receives the note.

    Raises:
        BadInput: The free memory of the GPU is smaller than the weights of a base model.
    """
    models = {(one.model, one.protocol.dtype, one.protocol.quantization) for one in experiments}
    if not models or device() == "cpu" or (gpu := used_gpu()) is None:
        return
    others = _other_processes(gpu)
    if not others:
        return
    names = "; ".join(map(str, others[:_LISTED])) + (f"; and {len(others) - _LISTED} more" if others[_LISTED:] else "")
    for model, dtype, quantization in sorted(models):
        if model.startswith(TESTBED) or gpu.free is None:  # the testbed is small
            continue
        weights = count_weights(model, dtype, quantization=quantization).weights // _MEBIBYTE
        if weights > gpu.free:
            raise BadInput(
                f"GPU {gpu.index} has {gibibytes(gpu.free)} of free memory, but the weights of {model!r} take "
                f"{gibibytes(weights)}: {names}. Wait until it ends, or choose another device (--device)."
            )
    progress.note(f"GPU {gpu.index} is in use: {names}; {gibibytes(gpu.free)} of {gibibytes(gpu.memory)} are free.")


def used_gpu() -> Gpu | None:
    """Return the GPU that models run on, the first one that `CUDA_VISIBLE_DEVICES` shows.

    CUDA is not initialized for it, so numbers are those of `nvidia-smi`, in the order of the bus.

    Returns:
        The GPU; None if `nvidia-smi` does not list it, as a part of a GPU (MIG).
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0].strip()
    for gpu in list_gpus():
        if visible == str(gpu.index) or (visible.startswith("GPU-") and gpu.uuid.startswith(visible)):
            return gpu
    return None


def _other_processes(gpu: Gpu) -> list[GpuProcess]:
    """Return the processes that use a GPU, without this one and those that it started."""
    import psutil

    family = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
    return [process for process in gpu.processes if process.pid not in family]

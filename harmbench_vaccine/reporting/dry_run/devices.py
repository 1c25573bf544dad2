"""The speed and the memory of devices, to estimate a run for another machine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from harmbench_vaccine.core.device import device
from harmbench_vaccine.core.errors import unknown_name
from harmbench_vaccine.inference.engine import GPU_MEMORY

Share = Annotated[float, Field(gt=0, le=1)]
Rate = Annotated[float, Field(gt=0)]
CPU, HERE = "cpu", "this machine"
READING: Share = 0.5
"""Share of the peak that a judge is assumed to reach; no device was measured."""
SLOW_CALL = 0.5
"""Seconds of a call from which two calls are enough: other work on the machine is a small part of it."""


class DeviceRates(BaseModel):
    """The limits of a device, and the share of them that a run reaches."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    memory: Rate
    """Bytes."""
    peak: Rate
    """Floating point operations per second of dense matrix products in 16 bits."""
    peak_float32: Rate
    """The same in float32, without tensor cores, as torch multiplies by default."""
    bandwidth: Rate
    """Bytes per second of the memory."""
    training: Share
    """Share of `peak` in a training step."""
    generation: Share
    """Share of `bandwidth` while answers are generated."""
    source: str
    """The origin of the two shares."""

    def product_seconds(self, operations: float) -> float:
        """Return the time of matrix products in a training step."""
        return operations / (self.peak * self.training)

    def reading_seconds(self, operations: float, dtype: str) -> float:
        """Return the time of matrix products of a judge, which reads batches of thousands of tokens."""
        return operations / ((self.peak_float32 if dtype == "float32" else self.peak) * READING)

    def token_seconds(self, weights: float, operations: float) -> float:
        """Return the time of one generated token of every row of a batch: reading the weights, or the products."""
        return max(weights / (self.bandwidth * self.generation), self.product_seconds(operations))


@lru_cache
def device_table() -> dict[str, DeviceRates]:
    """Return the devices of `devices.yaml` by name."""
    text = Path(__file__).with_name("devices.yaml").read_text(encoding="utf-8")
    return {rates.name: rates for rates in TypeAdapter(list[DeviceRates]).validate_python(yaml.safe_load(text))}


def find_device(name: str) -> DeviceRates:
    """Return a device of the table, or the CPU of this machine.

    Raises:
        BadInput: The name is unknown.
    """
    if name == CPU:
        return _measured_cpu()
    devices = device_table()
    if name not in devices:
        raise unknown_name("device", name, [CPU, *devices])
    return devices[name]


@dataclass(frozen=True)
class Target:
    """The device that costs are estimated for."""

    rates: DeviceRates | None = None
    """A device of the table; None: this machine, where batches are timed."""
    gpu_memory: float = GPU_MEMORY
    """Share of the memory of a GPU that a vLLM engine reserves."""

    @property
    def memory(self) -> float:
        """Bytes of memory."""
        return self.rates.memory if self.rates else local_memory()

    @property
    def is_cpu(self) -> bool:
        """True if models run on a CPU."""
        return self.rates.name == CPU if self.rates else device() == "cpu"

    def table_rates(self) -> DeviceRates:
        """Return the rates to compute with; those of the CPU where timing on this machine would take minutes."""
        return self.rates or find_device(CPU)


THIS_MACHINE = Target()


def local_memory() -> float:
    """Return the memory of the device that models run on here, in bytes."""
    if device() == "cuda":
        import torch

        return float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


@lru_cache
def _measured_cpu() -> DeviceRates:
    """Measure matrix products and copies on the CPU of this machine."""
    import torch

    matrix = torch.rand(1024, 1024)
    copied = torch.empty(2**25)
    peak = 2 * 1024**3 / fastest_call(lambda: matrix @ matrix)
    return DeviceRates(
        name=CPU,
        memory=float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")),
        peak=peak,
        peak_float32=peak,
        bandwidth=2 * copied.nbytes / fastest_call(copied.clone),
        training=0.5,
        generation=0.5,
        source="peak and bandwidth measured on this machine; half of them assumed to be reached",
    )


def fastest_call(call: Callable[[], object], least_seconds: float = 0.1) -> float:
    """Return the seconds of the fastest of several calls; slower calls include other work on the machine."""
    times: list[float] = []
    while len(times) < (2 if times and min(times) > SLOW_CALL else 4) or sum(times) < least_seconds:
        start = time.perf_counter()
        call()
        if device() == "cuda":
            import torch

            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)

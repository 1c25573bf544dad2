"""Ranks: the processes, one per GPU, that a launcher starts for one command (`torchrun`, `accelerate launch`).

All ranks run the same stages. In training, each rank uses its rows of every micro-batch. Losses, gradients and norms
are summed over ranks, so that a run on N ranks equals a run on one. Rank 0 alone writes files, generates answers,
judges and prints; the other ranks wait. A single process is rank 0 of 1, and these functions then do nothing.

Ranks exchange JSON through the launcher's key-value store, and tensors through collectives.
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from .device import device
from .errors import BadInput, HbvError, shortened

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

COLLECTIVE_TIMEOUT = timedelta(hours=6)
"""The longest time that a collective waits for a slower rank. Ranks wait without a limit for the work of rank 0."""
_POLL = 0.05  # seconds between two checks for a message
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "MASTER_ADDR")

_rank, _size = 0, 1
_store: Any = None
_turn = itertools.count()  # number of the next message: all ranks exchange the same messages in the same order


class OtherRankFailed(HbvError):
    """The failure of another rank, which reports the cause."""


def initialize() -> None:
    """Join the ranks if a launcher started several.

    This removes the launcher's variables from the environment and makes only one GPU visible to each process.
    Otherwise the libraries (Trainer, an engine) would distribute the work a second time.

    Raises:
        BadInput: A variable of the launcher is missing or has another form.
    """
    global _rank, _size, _store
    if _launcher_number("WORLD_SIZE", 1) < 2:
        return
    local = _launcher_number("LOCAL_RANK", 0)
    visible = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    if not visible or local < len(visible):  # otherwise the user lets several ranks share the visible GPUs
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[local] if visible else str(local)
    import torch.distributed as dist

    try:
        store, _rank, _size = next(dist.rendezvous("env://"))
    except ValueError as error:  # a variable of the launcher is missing or has another form
        raise BadInput(f"The ranks cannot be joined: {error}. Start them with torchrun.") from error
    _store = dist.PrefixStore("hbv", store)
    backend = "cpu:gloo,cuda:nccl" if device() == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=dist.PrefixStore("group", store), rank=_rank, world_size=_size, timeout=COLLECTIVE_TIMEOUT
    )
    for name in list(os.environ):
        if name in _LAUNCHER or name.startswith(("TORCHELASTIC_", "ACCELERATE_", "FSDP_")):
            del os.environ[name]
    if _rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # open until the process ends


def _launcher_number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise BadInput(f"{name} is {shortened(text)!r}; allowed: a whole number. Unset it, unless torchrun sets it.")
    return int(text)


def shutdown() -> None:
    """Leave the ranks at the end of a successful command."""
    if _store is not None:
        import torch.distributed as dist

        barrier()  # the store ends with the rank that hosts it, so no rank may leave early
        dist.destroy_process_group()


def end_process(code: int) -> NoReturn:
    """End this process at the end of a successful command.

    A rank ends after its exit handlers, without the finalization of the interpreter, which can abort: caches of DTensor
    keep the group and the threads of gloo alive until then.
    """
    if _store is None:
        sys.exit(code)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def rank() -> int:
    """Return the number of this process, from 0."""
    return _rank


def world_size() -> int:
    """Return the number of ranks."""
    return _size


@contextmanager
def single_process() -> Iterator[None]:
    """Let this process work as rank 0 of 1 inside the block, without waiting for other ranks."""
    global _rank, _size
    ranks = _rank, _size
    _rank, _size = 0, 1
    try:
        yield
    finally:
        _rank, _size = ranks


def broadcast(value: Any) -> None:
    """Send a JSON value from rank 0 to the other ranks, which each call `receive`."""
    if _size > 1:
        _store.set(f"broadcast/{next(_turn)}", json.dumps(value))


def receive() -> Any:
    """Wait for the next value that rank 0 sends, and return it."""
    key = f"broadcast/{next(_turn)}"
    _wait(lambda: _store.check([key]))
    return json.loads(_store.get(key))


def from_rank0(compute: Callable[[], T]) -> T:
    """Call `compute` on rank 0 only, and return its JSON value on all ranks."""
    if _rank:
        received: T = receive()
        return received
    with single_process():
        value = compute()
    broadcast(value)
    return value


def barrier() -> None:
    """Wait until every rank has called this function."""
    if _size > 1:
        key = f"barrier/{next(_turn)}"
        _store.add(key, 1)
        _wait(lambda: _store.add(key, 0) == _size)


def is_first_failure() -> bool:
    """Return True on the first rank that fails: it reports the error, and the other ranks end silently."""
    return _store is None or _store.add("failed", 1) == 1


def _wait(is_ready: Callable[[], bool]) -> None:
    while not is_ready():
        if _store.check(["failed"]):
            raise OtherRankFailed("Another rank has failed.")
        time.sleep(_POLL)


# ---------------------------------------------------------------------------------------------------------------------
# Rows and tensors


def local_rows(rows: Sequence[T]) -> Sequence[T]:
    """Return this rank's rows of a micro-batch: every N-th row for N ranks. The result may be empty."""
    return rows[_rank::_size]


def sum_over_ranks(value: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks, without a graph."""
    return sum_all_over_ranks([value])[0]


def sum_all_over_ranks(values: Sequence[Tensor]) -> list[Tensor]:
    """Return the sum of each tensor over all ranks, without a graph: one message, added in float32."""
    if _size == 1:
        return [value.detach() for value in values]
    import torch
    import torch.distributed as dist

    flat = torch.cat([value.detach().float().flatten() for value in values])
    dist.all_reduce(flat)
    parts = flat.split([value.numel() for value in values])
    return [part.view(value.shape).to(value.dtype) for part, value in zip(parts, values, strict=True)]


def largest_over_ranks(number: int) -> int:
    """Return the largest of the whole numbers that the ranks have."""
    if _size == 1:
        return number
    import torch
    import torch.distributed as dist

    value = torch.tensor(number)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


def check_equal(values: Mapping[str, Tensor], what: str) -> None:
    """Check, by their sums, that tensors are the same on every rank.

    Args:
        values: The tensors by name.
        what: Description of the tensors for the error message.

    Raises:
        HbvError: A sum differs between ranks.
    """
    if _size == 1:
        return
    import torch
    import torch.distributed as dist

    sums = torch.stack([value.detach().double().sum() for value in values.values()])
    low, high = sums.clone(), sums.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN)
    dist.all_reduce(high, dist.ReduceOp.MAX)
    if not torch.equal(low.nan_to_num(), high.nan_to_num()):
        raise HbvError(
            f"The ranks have different values of {what}: make the plug-in compute the same values on every rank."
        )

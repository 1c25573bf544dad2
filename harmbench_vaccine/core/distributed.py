"""Ranks: several processes that a launcher starts on one command, a GPU each (`torchrun`, `accelerate launch`).

All ranks walk through the same stages. In training each takes its own rows of every micro-batch, and what is summed
over ranks (losses, gradients, norms) is the whole batch's, so that a run of N ranks is the run of one. What only one
may do (files, answers, verdicts, printing) rank 0 does; the others wait for it. A process alone is rank 0 of 1, and
nothing here then does anything.

Ranks speak in plain JSON through the launcher's key-value store, and in tensors through collectives.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import HbvError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

COLLECTIVE_TIMEOUT = timedelta(hours=6)
"""How long a collective waits for a rank that is behind. (Work of rank 0 alone is waited for without a limit.)"""
_POLL = 0.05  # seconds between two looks for a message
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "MASTER_ADDR")

_rank, _size = 0, 1
_store: Any = None
_turn = itertools.count()  # messages are numbered: all ranks send and hear the same ones, in the same order


class OtherRankFailed(HbvError):
    """Another rank has failed, and has told why."""


def initialize() -> None:
    """Joins the ranks, if a launcher started several.

    What the launcher said is taken out of the environment, and each process is left with its one GPU: the libraries
    below (Trainer, an engine) work as in a process alone, and would otherwise spread the work a second time.
    """
    global _rank, _size, _store
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    visible = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    if not visible or local < len(visible):  # otherwise several ranks were meant to share what there is
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[local] if visible else str(local)
    import torch
    import torch.distributed as dist

    store, _rank, _size = next(dist.rendezvous("env://"))
    _store = dist.PrefixStore("hbv", store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(
        backend, store=dist.PrefixStore("group", store), rank=_rank, world_size=_size, timeout=COLLECTIVE_TIMEOUT
    )
    for name in list(os.environ):
        if name in _LAUNCHER or name.startswith(("TORCHELASTIC_", "ACCELERATE_", "FSDP_")):
            del os.environ[name]
    if _rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # for as long as the process lives


def shutdown() -> None:
    """Leaves the ranks, at the end of a command that went well."""
    if _store is not None:
        import torch.distributed as dist

        barrier()  # a rank that leaves early would take the store of the others with it
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process, from 0."""
    return _rank


def world_size() -> int:
    """How many there are."""
    return _size


@contextmanager
def single_process() -> Iterator[None]:
    """Inside, this process works as if it were the only one: nothing in there waits for the others."""
    global _rank, _size
    kept = _rank, _size
    _rank, _size = 0, 1
    try:
        yield
    finally:
        _rank, _size = kept


def broadcast(value: Any) -> None:
    """Rank 0 tells the others something: plain JSON, for which each of them calls `hear`."""
    if _size > 1:
        _store.set(f"said/{next(_turn)}", json.dumps(value))


def receive() -> Any:
    """What rank 0 says next."""
    key = f"said/{next(_turn)}"
    _wait(lambda: _store.check([key]))
    return json.loads(_store.get(key))


def from_rank0(find: Callable[[], T]) -> T:
    """What `find` returns on rank 0, where alone it is called: plain JSON, the same for all ranks."""
    if _rank:
        heard: T = receive()
        return heard
    with single_process():
        found = find()
    broadcast(found)
    return found


def barrier() -> None:
    """Returns when every rank has come here."""
    if _size > 1:
        key = f"met/{next(_turn)}"
        _store.add(key, 1)
        _wait(lambda: _store.add(key, 0) == _size)


def is_first_failure() -> bool:
    """Whether this is the rank that tells what went wrong; the others then end without a word."""
    return _store is None or _store.add("failed", 1) == 1


def _wait(there: Callable[[], bool]) -> None:
    while not there():
        if _store.check(["failed"]):
            raise OtherRankFailed("Another rank has failed.")
        time.sleep(_POLL)


# ---------------------------------------------------------------------------------------------------------------------
# Rows and tensors


def local_rows(rows: Sequence[T]) -> Sequence[T]:
    """This rank's rows of a micro-batch: every N-th, which may be none."""
    return rows[_rank::_size]


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, without a graph."""
    return sum_all_over_ranks([value])[0]


def sum_all_over_ranks(values: Sequence[Tensor]) -> list[Tensor]:
    """The sum of each tensor over all ranks, in one message and in float32, without a graph."""
    if _size == 1:
        return [value.detach() for value in values]
    import torch
    import torch.distributed as dist

    flat = torch.cat([value.detach().float().flatten() for value in values])
    dist.all_reduce(flat)
    parts = flat.split([value.numel() for value in values])
    return [part.view(value.shape).to(value.dtype) for part, value in zip(parts, values, strict=True)]


def check_equal(values: Mapping[str, Tensor], what: str) -> None:
    """Compares tensors that every rank must have alike, by their sums.

    Raises:
        HbvError: they differ.
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
        raise HbvError(f"The ranks do not agree on {what}: something in a plug-in is not the same on every rank.")

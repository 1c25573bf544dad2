"""Who holds the GPU's memory: the model in training, an engine of vLLM's, a judge. One at a time.

Each may be larger than what the others leave free, so whoever is about to load a model claims the GPU, and whoever held
it lets go. On a CPU nobody has to: what is loaded stays loaded.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from inspect import ismethod
from weakref import ReferenceType, WeakMethod, ref

share = 0.85
"""Share of a GPU's memory that an engine of vLLM's takes, or what is free where that is less: the harness itself keeps
a CUDA context there."""

_holders: dict[str, ReferenceType[Callable[[], None]]] = {}


def one_at_a_time() -> bool:
    """Whether holders have to make room for each other: there is a GPU."""
    import torch

    return bool(torch.cuda.is_available())


def acquire(holder: str, let_go: Callable[[], None]) -> None:
    """Says that `holder` is about to load a model, and how it is made to let go of it: "training"; "engine"
    and "classifier" of vLLM's; "judge" of transformers', "judge engine" of vLLM's."""
    if one_at_a_time():
        import torch

        evict(*(other for other, held in _holders.items() if other != holder or held() != let_go))
        gc.collect()  # a model's modules refer to each other in circles
        torch.cuda.empty_cache()
    _holders[holder] = WeakMethod(let_go) if ismethod(let_go) else ref(let_go)


def evict(*holders: str) -> None:
    """Makes these holders let go of what they hold."""
    for holder in holders:
        held = _holders.pop(holder, None)
        if held and (let_go := held()):
            let_go()

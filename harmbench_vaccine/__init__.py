"""harmbench-vaccine: any defense against any harmful fine-tuning attack, under one protocol.

import harmbench_vaccine as hbv

hbv.run(defense="vaccine:rho=5", attack="ratio=0.1")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import answers, load_model, measure_judge, results, run, sweep, train_judge, training_log
    from .core.errors import BadInput, HbvError
    from .evaluation.result import Result
    from .plugins import Attack, Defense, Scorer, Task, param

__version__ = "0.1.0"

_PLACES = {
    "run": "api",
    "sweep": "api",
    "results": "api",
    "answers": "api",
    "training_log": "api",
    "load_model": "api",
    "train_judge": "api",
    "measure_judge": "api",
    "Result": "evaluation.result",
    "BadInput": "core.errors",
    "HbvError": "core.errors",
    "Defense": "plugins",
    "Attack": "plugins",
    "Task": "plugins",
    "Scorer": "plugins",
    "param": "plugins",
}
"""Public name -> the module that defines it, which is imported when the name is first used."""

__all__ = [
    "Attack",
    "BadInput",
    "Defense",
    "HbvError",
    "Result",
    "Scorer",
    "Task",
    "__version__",
    "answers",
    "load_model",
    "measure_judge",
    "param",
    "results",
    "run",
    "sweep",
    "train_judge",
    "training_log",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_PLACES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__

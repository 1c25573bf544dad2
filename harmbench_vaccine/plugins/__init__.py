"""Plug-ins: defenses, attacks, tasks and scorers. A plug-in is one class in one file; these are the names it needs."""

from harmbench_vaccine.core.types import (
    Example,
    Grade,
    Mix,
    Pools,
    RawJudgment,
    StageName,
    Topology,
    TrainSettings,
    Verdict,
)
from harmbench_vaccine.data.prompts import EvalSet, PromptTemplate

from .attack import Attack, Judge
from .base import Plugin, Resolved, param, resolve_params
from .defense import Defense, SeparateTraining
from .grid import TuningGrid
from .scorer import Form, Scorer
from .task import Task

__all__ = [
    "Attack",
    "Defense",
    "EvalSet",
    "Example",
    "Form",
    "Grade",
    "Judge",
    "Mix",
    "Plugin",
    "Pools",
    "PromptTemplate",
    "RawJudgment",
    "Resolved",
    "Scorer",
    "SeparateTraining",
    "StageName",
    "Task",
    "Topology",
    "TrainSettings",
    "TuningGrid",
    "Verdict",
    "param",
    "resolve_params",
]

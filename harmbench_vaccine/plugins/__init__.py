"""Plug-ins: defenses, attacks, tasks and scorers. A plug-in is one class in one file; these are the names it needs."""

from harmbench_vaccine.core.types import (
    Example,
    Grade,
    Mix,
    Pools,
    Reading,
    StageName,
    Topology,
    TrainSettings,
    Verdict,
)
from harmbench_vaccine.data.prompts import EvaluationSet, PromptTemplate

from .attack import Attack, Judge
from .base import Plugin, Resolved, param, resolve
from .defense import Defense
from .scorer import Form, Scorer
from .task import Task

__all__ = [
    "Attack",
    "Defense",
    "EvaluationSet",
    "Example",
    "Form",
    "Grade",
    "Judge",
    "Mix",
    "Plugin",
    "Pools",
    "PromptTemplate",
    "Reading",
    "Resolved",
    "Scorer",
    "StageName",
    "Task",
    "Topology",
    "TrainSettings",
    "Verdict",
    "param",
    "resolve",
]

"""The remaining time of a worker whose job ends at a fixed time: it starts only stages that end before.

The time of a stage is that of the longest stored stage of its kind in the sweep, or else the estimate of the dry run.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from harmbench_vaccine.core.errors import BadInput, HbvError, shortened
from harmbench_vaccine.core.store import META
from harmbench_vaccine.core.types import STAGES
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.reporting.dry_run.estimate import ESTIMATED, estimate_costs

from .sweep import Sweep

SIGNAL_SECONDS = 120
"""Seconds before the end of a job at which its worker receives SIGTERM, and then writes a checkpoint."""
LAST_SECONDS = SIGNAL_SECONDS + 60
"""Seconds before the end of a job in which no stage ends: SLURM may send a signal up to a minute earlier."""
_RESUMED = (*STAGES, "nested")
"""Kinds of stages that continue from a checkpoint."""
_TIME = re.compile(r"(?:(\d{1,4})-)?(\d{1,7})(?::(\d{1,2}))?(?::(\d{1,2}))?", re.ASCII)


def parse_time_limit(text: str, option: str) -> int:
    """Parse a time as SLURM writes it: MINUTES, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS.

    Returns:
        The time in seconds.

    Raises:
        BadInput: It has another form, or is not longer than `LAST_SECONDS`.
    """
    match = _TIME.fullmatch(text)
    if not match:
        raise BadInput(
            f"Invalid {option} {shortened(text)!r}. Expected a time such as 480 (minutes), 08:00:00 or 1-12:00:00."
        )
    days, *parts = match.groups()
    units = (60, 1) if days is None and parts[2] is None else (3600, 60, 1)
    seconds = 86400 * int(days or 0) + sum(unit * int(part or 0) for unit, part in zip(units, parts, strict=False))
    if seconds <= LAST_SECONDS:
        raise BadInput(f"{option} {text} is too short: the last {LAST_SECONDS} seconds are for checkpoints.")
    return seconds


def job_end(limit: float | None, environment: Mapping[str, str], now: float) -> float | None:
    """Return the time at which the job of this worker ends: the earlier one of its limit and of its SLURM job.

    Args:
        limit: The limit in seconds; None: none.
        environment: The variables of the process.
        now: The present time.

    Returns:
        The time in seconds since 1970; None if the worker may run for ever.
    """
    ends = [] if limit is None else [now + limit]
    with suppress(KeyError, ValueError):
        ends.append(float(environment["SLURM_JOB_END_TIME"]))
    return min(ends, default=None)


class RemainingTime:
    """Decides which stages a worker starts before its job ends."""

    def __init__(self, end: float, seconds_of: Callable[[str], float], clock: Callable[[], float] = time.time) -> None:
        """Start at the present time.

        Args:
            end: The end of the job, in seconds since 1970.
            seconds_of: Returns the expected time of a stage of some kind; 0 if it is unknown.
            clock: Returns the present time.
        """
        self._end, self._seconds_of, self._clock = end, seconds_of, clock
        self._limit = self.left()
        self.impossible: dict[str, float] = {}
        """Kind -> seconds of stages that are longer than a complete job and cannot be divided among several."""

    def left(self) -> float:
        """Return the seconds in which a stage has to end."""
        return self._end - LAST_SECONDS - self._clock()

    def fits(self, stage: str) -> bool:
        """Return whether this worker starts a stage of some kind.

        A stage that is longer than a complete job is started in the first half of one if it continues from its
        checkpoint in the next one.
        """
        seconds, left = self._seconds_of(stage), self.left()
        if left <= 0 or seconds <= self._limit:
            return 0 < left >= seconds
        if stage in _RESUMED:
            return left >= self._limit / 2
        self.impossible[stage] = seconds
        return False


class StageSeconds:
    """The expected time of the stages of a sweep, by kind."""

    def __init__(self, sweep: Sweep) -> None:
        """Plan the stages of a sweep."""
        self._missing = list(sweep.planned_stages)
        self._longest: dict[str, float] = {}
        self._estimates: dict[str, float] = {}

    def __call__(self, kind: str) -> float:
        """Return the time of the longest stored stage of a kind, or else the estimated one, in seconds; 0: unknown."""
        self._read_stored()
        if kind in self._longest:
            return self._longest[kind]
        if kind not in self._estimates:
            experiments = [stage.experiment for stage in self._missing if stage.artifact.stage == kind]
            self._estimates[kind] = _longest_estimate(experiments, kind)
        return self._estimates[kind]

    def _read_stored(self) -> None:
        """Read the times of the stages that were stored since the last call."""
        missing = []
        for stage in self._missing:
            try:
                seconds = float(stage.artifact.json(META)["seconds"])
            except (OSError, ValueError, KeyError):
                missing.append(stage)
            else:
                kind = stage.artifact.stage
                self._longest[kind] = max(seconds, self._longest.get(kind, 0.0))
        self._missing = missing


def _longest_estimate(experiments: Sequence[Experiment], kind: str) -> float:
    """Return the longest estimated time of a kind of stage on this machine; 0 if it is not covered or not possible.

    The time of a stage includes the separate trainings that it requests, as that of a stored stage does.
    Experiments that differ only in their seeds or attacks are estimated once.
    """
    if kind not in ESTIMATED:
        return 0.0
    groups = {
        (experiment.protocol_hash, experiment.model, experiment.defense): experiment for experiment in experiments
    }
    longest = 0.0
    for experiment in groups.values():
        with suppress(HbvError):  # for example, the configuration of a judge is not on this machine
            costs = estimate_costs(experiment, stages=[kind, "nested"] if kind in STAGES else [kind])
            parts = [cost for cost in costs if kind in (cost.stage, cost.training.partition(":")[0])]
            longest = max(longest, sum(cost.seconds / cost.artifacts for cost in parts))
    return longest

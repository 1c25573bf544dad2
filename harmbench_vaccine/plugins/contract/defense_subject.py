"""A defense under test, with the results of its stages; each stage runs once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Literal, TypeVar

from harmbench_vaccine.core.types import STAGES, StageName
from harmbench_vaccine.training.adapters import Adapter

from ..defense import Defense
from ..teams import DefenseTeam
from .findings import Fails, NotApplicable, Subject
from .observation import Observation, ObservedTeam, PassCounter, preserved_random_states, record_shared_draws
from .trials import Trial, begin_trial, edit_trial, observe_trial, train_trial
from .world import TinyWorld

T = TypeVar("T")


@dataclass
class DefenseSubject(Subject):
    """A defense, the world that it is checked in, and the results of its stages."""

    cls: type[Defense]
    world: TinyWorld
    _results: dict[Any, Any] = field(default_factory=dict)

    @property
    def stages(self) -> list[StageName]:
        """The stages that the defense acts in and does not skip."""
        return [stage for stage in STAGES if stage in self.cls.stages and self.cls.trains]

    @property
    def training_stages(self) -> list[StageName]:
        """The stages that train an adapter."""
        return [stage for stage in self.stages if stage != "repair"]

    def plugin(self, seed: int = 0) -> Defense:
        """Create the defense with its parameters."""
        return self.cls(**self.params).seeded(seed)

    def neutral_plugin(self) -> Defense:
        """Create the defense with its neutral setting."""
        return self.cls(**self.cls.neutral or {}).seeded(0)

    def begin(
        self, stage: StageName, *members: Defense, kind: type[DefenseTeam] = DefenseTeam, **options: Any
    ) -> Trial:
        """Prepare a stage with these defenses (none: plain SFT); `options` are those of `begin_trial`."""
        return begin_trial(self.world, stage, kind(members=members, stage=stage), self.cls.topology, **options)

    def run(self, stage: StageName, *members: Defense, salt: int = 1, **options: Any) -> Trial:
        """Run a stage with its edit; `salt` seeds the process-wide random generators before it."""
        with preserved_random_states(salt):
            return edit_trial(train_trial(self.begin(stage, *members, **options), self.world.new_folder()))

    def defended(self, stage: StageName) -> Trial:
        """Return the finished stage with the defense."""
        return self._once(("defended", stage), lambda: self.run(stage, self.plugin()))

    def undefended(self, stage: StageName) -> Trial:
        """Return the finished stage without the defense."""
        return self._once(("undefended", stage), lambda: self.run(stage))

    def observed(self, stage: StageName, seed: int = 0) -> tuple[Trial, Observation]:
        """Return the trained stage, not edited yet, and its observation; no dropout, clipping or weight decay."""

        def observe() -> tuple[Trial, Observation]:
            changes = {"lora_dropout": 0.0, "max_grad_norm": 0.0, "weight_decay": 0.0}
            with preserved_random_states(1):
                return observe_trial(self.begin(stage, self.plugin(seed), kind=ObservedTeam, seed=seed, **changes))

        return self._once(("observed", stage, seed), observe)

    def observed_edit(self, stage: StageName, seed: int = 0) -> tuple[Adapter, PassCounter]:
        """Return the edited adapter of `observed`, and the passes of the edit."""

        def edit() -> tuple[Adapter, PassCounter]:
            trial, observation = self.observed(stage, seed)
            passes = PassCounter()
            (member,) = trial.team.members
            with (
                preserved_random_states(1),
                trial.stage.isolated("edit"),
                record_shared_draws(observation.shared_draws, "edit", "torch's"),  # `isolated` restores torch's
                observation.draws,
                passes.count(trial.stage.model),
            ):
                return member.edit(trial.stage, trial.adapter), passes

        return self._once(("edit", stage, seed), edit)

    def observed_with_edit(self, stage: StageName) -> Observation:
        """Return the observation of a stage with its edit."""
        self.observed_edit(stage)
        return self.observed(stage)[1]

    def _once(self, key: Any, compute: Callable[[], T]) -> T:
        if key not in self._results:
            self._results[key] = compute()
        result: T = self._results[key]
        return result


StageCheck = Callable[[DefenseSubject, StageName], None]


def for_stages(which: Literal["stages", "training_stages"]) -> Callable[[StageCheck], Callable[[DefenseSubject], None]]:
    """Turn a check of one stage into a check of all stages that `which` names."""

    def decorate(function: StageCheck) -> Callable[[DefenseSubject], None]:
        @wraps(function)
        def check(subject: DefenseSubject) -> None:
            stages: Sequence[StageName] = getattr(subject, which)
            if not stages:
                raise NotApplicable("It trains no stage." if subject.cls.trains else "It skips the alignment stage.")
            reasons = []
            for stage in stages:
                with _naming_stage(stage, several=len(stages) > 1):
                    try:
                        function(subject, stage)
                    except NotApplicable as reason:
                        reasons.append(str(reason))
            if len(reasons) == len(stages):
                raise NotApplicable(reasons[0])

        return check

    return decorate


@contextmanager
def _naming_stage(stage: StageName, *, several: bool) -> Iterator[None]:
    try:
        yield
    except Fails as reason:
        raise Fails(f"In the {stage} stage: {reason}" if several else str(reason)) from reason

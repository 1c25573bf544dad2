"""A defense as the checks see it: what its stages come to, each run once."""

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
from .stages import Trial, begin, edited, trained, watched
from .watch import Passes, Seen, Watched, own_random_states, touched
from .world import TinyWorld

T = TypeVar("T")


@dataclass
class DefenseSubject(Subject):
    """A defense, the world that it is checked in, and what its stages came to, each run once."""

    cls: type[Defense]
    world: TinyWorld
    _done: dict[Any, Any] = field(default_factory=dict)

    @property
    def stages(self) -> list[StageName]:
        """The stages that it acts in and does not leave out."""
        return [stage for stage in STAGES if stage in self.cls.stages and self.cls.trains]

    @property
    def training(self) -> list[StageName]:
        """Those in which an adapter is trained."""
        return [stage for stage in self.stages if stage != "repair"]

    def plugin(self, seed: int = 0) -> Defense:
        """A fresh object."""
        return self.cls(**self.params).seeded(seed)

    def neutral(self) -> Defense:
        """A fresh object at its neutral setting."""
        return self.cls(**self.cls.neutral or {}).seeded(0)

    def begin(
        self, stage: StageName, *members: Defense, kind: type[DefenseTeam] = DefenseTeam, **options: Any
    ) -> Trial:
        """A stage with these defenses acting; none: plain SFT."""
        return begin(self.world, stage, kind(members=members, stage=stage), self.cls.topology, **options)

    def run(self, stage: StageName, *members: Defense, salt: int = 1, **options: Any) -> Trial:
        """A whole stage; `salt` is where the shared random generators stand when it begins."""
        with own_random_states(salt):
            return edited(trained(self.begin(stage, *members, **options), self.world.new_folder()))

    def usual(self, stage: StageName) -> Trial:
        """The stage as it is."""
        return self._once(("usual", stage), lambda: self.run(stage, self.plugin()))

    def plain(self, stage: StageName) -> Trial:
        """The stage without the defense."""
        return self._once(("plain", stage), lambda: self.run(stage))

    def watched(self, stage: StageName, seed: int = 0) -> tuple[Trial, Seen]:
        """Training without dropout, clipping and decay, with everything seen; not edited yet."""

        def make() -> tuple[Trial, Seen]:
            changes = {"lora_dropout": 0.0, "max_grad_norm": 0.0, "weight_decay": 0.0}
            with own_random_states(1):
                return watched(self.begin(stage, self.plugin(seed), kind=Watched, seed=seed, **changes))

        return self._once(("watched", stage, seed), make)

    def watched_edit(self, stage: StageName, seed: int = 0) -> tuple[Adapter, Passes]:
        """What the defense makes of the adapter of `watched`, and the passes that it took."""

        def make() -> tuple[Adapter, Passes]:
            trial, seen = self.watched(stage, seed)
            passes = Passes()
            (member,) = trial.team.members
            with (
                own_random_states(1),
                trial.stage.isolated("edit"),
                touched(seen.generators, "edit", "torch's"),  # `apart` protects torch's
                seen.draws,
                passes.counted(trial.stage.model),
            ):
                return member.edit(trial.stage, trial.adapter), passes

        return self._once(("edit", stage, seed), make)

    def watched_whole(self, stage: StageName) -> Seen:
        """What was seen of a stage with its edit."""
        self.watched_edit(stage)
        return self.watched(stage)[1]

    def _once(self, key: Any, make: Callable[[], T]) -> T:
        if key not in self._done:
            self._done[key] = make()
        made: T = self._done[key]
        return made


PerStage = Callable[[DefenseSubject, StageName], None]


def in_stages(which: Literal["stages", "training"]) -> Callable[[PerStage], Callable[[DefenseSubject], None]]:
    """Makes a check of one stage a check of all the stages that it concerns."""

    def making(function: PerStage) -> Callable[[DefenseSubject], None]:
        @wraps(function)
        def run(subject: DefenseSubject) -> None:
            stages: Sequence[StageName] = getattr(subject, which)
            if not stages:
                raise NotApplicable(
                    "It trains in no stage." if subject.cls.trains else "It leaves the alignment stage out."
                )
            reasons = []
            for stage in stages:
                with _naming(stage, len(stages) > 1):
                    try:
                        function(subject, stage)
                    except NotApplicable as reason:
                        reasons.append(str(reason))
            if len(reasons) == len(stages):
                raise NotApplicable(reasons[0])

        return run

    return making


@contextmanager
def _naming(stage: StageName, several: bool) -> Iterator[None]:
    try:
        yield
    except Fails as reason:
        raise Fails(f"In the {stage} stage: {reason}" if several else str(reason)) from reason

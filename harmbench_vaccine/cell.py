"""A cell with everything settled: what the user wrote, what the protocol says, and the plug-ins that will act.

Settling touches no model and makes no artifact, so bad input is told before any work is spent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from . import protocols
from .compose import AttackTeam, DefenseTeam
from .data.prompts import PromptTemplate, template
from .data.sources import fingerprint
from .errors import BadInput
from .plugins import Resolved, Task
from .protocols import FinetuneProtocol, Protocol
from .registry import ATTACKS, DEFENSES, SCORERS, TASKS
from .spec import RunSpec, canonical, digest, parse, settle
from .terms import StageName, Topology, TrainSettings

STAGES: tuple[StageName, ...] = ("align", "finetune", "repair")


@dataclass(frozen=True)
class Cell:
    """One cell of a table, ready to run."""

    spec: RunSpec
    protocol: Protocol
    defenses: list[Resolved]
    attacks: list[Resolved]
    scorers: list[Resolved]
    """The first one's verdicts make the harmful score; the others' stand beside it."""
    task: Task
    model: str

    @classmethod
    def settle(cls, spec: RunSpec) -> Cell:
        """Finds every plug-in and resolves every parameter.

        Raises:
            BadInput: an unknown name, a value out of range, or plug-ins that cannot act together.
        """
        protocol = protocols.load(spec.protocol).replaced(spec.values)
        for name in spec.data:
            protocol.location(name)
        protocol = protocol.model_copy(update={"data": {**protocol.data, **spec.data}})
        task_class = TASKS.get(spec.task)
        scorers = judges(spec.scorers, protocol)
        score = protocol.score.model_copy(update={"scorer": canonical(scorers[:1])})
        protocol = protocol.model_copy(update={"score": score})  # another threshold is another protocol
        cell = cls(
            spec,
            protocol,
            settle(spec.defense, DEFENSES, protocol.defenses, protocol.name),
            settle(spec.attack, ATTACKS, protocol.attacks, protocol.name),
            scorers,
            task_class(),
            spec.model or protocol.model,
        )
        cell._check()
        return cell

    def _check(self) -> None:
        for stage in STAGES:
            self.team(stage)
        self.protocol.location(self.task.dataset)
        if not self.team("align").runs:
            for resolved in self.defenses:
                if resolved.plugin.needs_alignment:  # type: ignore[attr-defined]
                    raise BadInput(
                        f"{resolved.plugin.name!r} refers to what alignment added, and {self.defense!r} leaves it out."
                    )
        if edits := self.attackers().acting:
            for resolved in [*self.acting("finetune"), *self.acting("repair")]:
                raise BadInput(
                    f"{resolved.plugin.name!r} cannot act under attack {edits.name!r}: "
                    "it defends a user's training, and this attack trains nothing."
                )
        given, asked = self.finetune.settings, self.settings("finetune", self.team("finetune"))
        if self.topology == "single" and self.team("align").runs and asked.lora_rank != given.lora_rank:
            raise BadInput(
                f"Attack {self.attack!r} sets the rank of the user's adapter, but in single topology, which the "
                "protocol or a defense demands, the alignment adapter goes on with its own."
            )
        if asked.full:
            for resolved in [*self.acting("finetune"), *self.acting("repair")]:
                defense: Any = resolved.plugin
                if defense.needs_adapter or defense.topology or "repair" in defense.stages:
                    raise BadInput(
                        f"{defense.name!r} cannot act where the user trains every weight: it needs the user's adapter."
                    )

    @property
    def defense(self) -> str:
        """The defense as a command line would name it."""
        return canonical(self.defenses)

    @property
    def attack(self) -> str:
        """The attack as a command line would name it."""
        return canonical(self.attacks)

    @cached_property
    def template(self) -> PromptTemplate:
        """The protocol's prompt."""
        return template(self.protocol.prompt)

    @cached_property
    def finetune(self) -> FinetuneProtocol:
        """The protocol's user stage, for this task."""
        return self.protocol.finetune.of(self.task.name)

    @property
    def scorer(self) -> Resolved:
        """The judge of the headline."""
        return self.scorers[0]

    @property
    def id(self) -> str:
        """The run's id: the defense's names, and a hash of everything that was settled."""
        names = "-".join(resolved.plugin.name for resolved in self.defenses)
        settled = {
            "protocol": self.protocol.hash,
            "plugins": identities([*self.defenses, *self.attacks, self.scorer]),
            "task": self.task.name,
            "model": self.model,
            "seed": self.spec.seed,
            "data": self.data(*self.protocol.data),
        }
        return f"{names}-{digest(settled, 8)}"

    def acting(self, stage: StageName) -> list[Resolved]:
        """The defenses that act in a stage."""
        return [resolved for resolved in self.defenses if stage in resolved.plugin.stages]  # type: ignore[attr-defined]

    def team(self, stage: StageName) -> DefenseTeam:
        """Fresh objects of the defenses that act in a stage: what they remember is theirs for that stage only."""
        return DefenseTeam(members=self._fresh(self.acting(stage)), stage=stage)

    def attackers(self) -> AttackTeam:
        """Fresh objects of the attacks."""
        return AttackTeam(members=self._fresh(self.attacks))

    @property
    def trains(self) -> bool:
        """False if the attack edits weights in place of the user stage: the task is then not learned."""
        return self.attackers().acting is None

    @property
    def topology(self) -> Topology:
        """The adapter topology of the user stage: a defense's demand, or the protocol's."""
        return self.team("finetune").demanded_topology or self.protocol.topology

    def settings(self, stage: StageName, team: DefenseTeam) -> TrainSettings:
        """The optimizer's settings of a stage, as the user's attack and the defenses of that stage leave them. What is
        trained in the repair stage is trained as the protocol's user trains, whatever the attack."""
        if stage == "align":
            return team.settings(stage, self.protocol.align.settings)
        settings = self.finetune.settings
        return team.settings(stage, self.attackers().settings(settings) if stage == "finetune" else settings)

    def _fresh(self, resolved: list[Resolved]) -> Any:
        return tuple(type(r.plugin)(**r.params).seeded(self.spec.seed) for r in resolved)

    def data(self, *names: str) -> Mapping[str, Any]:
        """What an artifact that reads these data sets depends on."""
        return {name: fingerprint(self.protocol.location(name)) for name in names}


def judges(written: Sequence[str], protocol: Protocol) -> list[Resolved]:
    """The scorers that were written, or the protocol's, whose model lies where the protocol says.

    Raises:
        BadInput: an unknown name or parameter, a value out of range, or one judge twice.
    """
    own = parse(protocol.score.scorer)
    components = [component for text in written for component in parse(text)] or list(own)
    given = {**protocol.scorers}
    given[own[0].name] = {"model": protocol.score.judge, **given.get(own[0].name, {})}
    return settle(tuple(components), SCORERS, given, protocol.name)


def identities(resolved: list[Resolved]) -> list[Any]:
    """What an artifact that these plug-ins had a hand in depends on: names, parameters, source."""
    return [[r.plugin.name, r.params, type(r.plugin).fingerprint()] for r in resolved]

"""A cell with everything settled: what the user wrote, what the protocol says, and the plug-ins that will act.

Settling touches no model and makes no artifact, so bad input is told before any work is spent.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from harmbench_vaccine.core import distributed
from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.hashing import digest
from harmbench_vaccine.core.types import STAGES, StageName, Topology, TrainSettings
from harmbench_vaccine.data.files import is_data_file
from harmbench_vaccine.data.prompts import PromptTemplate, prompt_template
from harmbench_vaccine.data.sources import fingerprint
from harmbench_vaccine.inference.engine import Backend, choose_backend
from harmbench_vaccine.plugins import Resolved, Task
from harmbench_vaccine.plugins.composition import Component, canonical_name, parse_plugins, resolve_plugins
from harmbench_vaccine.plugins.registry import ATTACKS, DEFENSES, SCORERS, TASKS, is_plugin_path
from harmbench_vaccine.plugins.teams import AttackTeam, DefenseTeam

from .protocol import FinetuneProtocol, Protocol, load_protocol
from .spec import RunSpec


@dataclass(frozen=True)
class Experiment:
    """One cell of a table, ready to run."""

    spec: RunSpec
    protocol: Protocol
    defenses: list[Resolved]
    attacks: list[Resolved]
    scorers: list[Resolved]
    """The first one's verdicts make the harmful score; the others' stand beside it."""
    wanted: Resolved
    """The user's task."""
    model: str

    @classmethod
    def settle(cls, spec: RunSpec) -> Experiment:
        """Finds every plug-in and resolves every parameter.

        Raises:
            BadInput: an unknown name, a value out of range, or plug-ins that cannot act together.
        """
        protocol = load_protocol(spec.protocol).replaced(spec.values)
        for name in spec.data:
            protocol.location(name)
        protocol = protocol.model_copy(update={"data": {**protocol.data, **spec.data}})
        scorers = resolve_scorers(spec.scorers, protocol)
        score = protocol.score.model_copy(update={"scorer": canonical_name(scorers[:1])})
        protocol = protocol.model_copy(update={"score": score})  # another threshold is another protocol
        cell = cls(
            spec,
            protocol,
            resolve_plugins(spec.defense, DEFENSES, protocol.defenses, protocol.name),
            resolve_plugins(spec.attack, ATTACKS, protocol.attacks, protocol.name),
            scorers,
            resolve_task(spec.task, protocol.name),
            spec.model or protocol.model,
        )
        cell._check()
        return cell

    def _check(self) -> None:
        for stage in STAGES:
            self.team(stage)
        self.task.check()
        for name in self.task.datasets:
            self.location(name)
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
        editing = [r.plugin.name for r in self.defenses if r.plugin.edits_base]  # type: ignore[attr-defined]
        if self.protocol.quantization != "none" and (self.whole or editing):
            raise BadInput(
                f"{(editing or [self.attack])[0]!r} changes the base model's weights, which are fixed under "
                f"quantization {self.protocol.quantization!r}; allowed: quantization none, or what trains an adapter."
            )
        if distributed.world_size() > 1:
            for resolved in self.defenses:
                if not resolved.plugin.supports_ranks:  # type: ignore[attr-defined]
                    raise BadInput(
                        f"{resolved.plugin.name!r} cannot act over {distributed.world_size()} ranks: it does not declare that it "
                        "is right where each sees a part of the rows (`ranks`). Start it as one process."
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
        return canonical_name(self.defenses)

    @property
    def attack(self) -> str:
        """The attack as a command line would name it."""
        return canonical_name(self.attacks)

    @property
    def task(self) -> Task:
        """What the user wants."""
        task: Any = self.wanted.plugin
        return task

    @property
    def task_name(self) -> str:
        """The task as a command line would name it."""
        return canonical_name([self.wanted])

    @property
    def task_identity(self) -> list[Any]:
        """What training on the task's rows depends on: its name, its source, its data, its parameters."""
        task = self.task
        params = {key: value for key, value in self.wanted.params.items() if key not in task.scoring_only}
        identity = [task.name, type(task).fingerprint(), dict(self.data(*task.datasets))]
        return [*identity, params] if params else identity

    @cached_property
    def template(self) -> PromptTemplate:
        """The protocol's prompt."""
        return prompt_template(self.protocol.prompt)

    @cached_property
    def finetune(self) -> FinetuneProtocol:
        """The protocol's user stage, for this task."""
        return self.protocol.finetune.of(self.task.name)

    @property
    def scorer(self) -> Resolved:
        """The judge of the headline."""
        return self.scorers[0]

    @cached_property
    def backend(self) -> Backend:
        """What generates answers, and runs the judges that it can."""
        return choose_backend(self.spec.backend)

    @property
    def id(self) -> str:
        """The run's id: the defense's names, and a hash of everything that was settled."""
        names = "-".join(resolved.plugin.name for resolved in self.defenses)
        settled = {
            "protocol": self.protocol.hash,
            "plugins": plugin_identities([*self.defenses, *self.attacks, self.scorer]),
            "task": [self.task.name, self.wanted.params] if self.wanted.params else self.task.name,
            "model": self.model,
            "seed": self.spec.seed,
            "data": self.data(*self.protocol.data, *self.task.places()),
            **self.engine,
        }
        return f"{names}-{digest(settled, 8)}"

    @property
    def engine(self) -> dict[str, str]:
        """What an artifact that was generated depends on: nothing more where transformers did it."""
        return {} if self.backend == "transformers" else {"backend": self.backend}

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
    def whole(self) -> bool:
        """Whether the user stage makes another base model, where it otherwise makes an adapter."""
        return not self.trains or self.settings("finetune", self.team("finetune")).full

    @property
    def topology(self) -> Topology:
        """The adapter topology of the user stage: a defense's demand, or the protocol's."""
        return self.team("finetune").required_topology or self.protocol.topology

    def settings(self, stage: StageName, team: DefenseTeam) -> TrainSettings:
        """The optimizer's settings of a stage, as the user's attack and the defenses of that stage leave them. What is
        trained in the repair stage is trained as the protocol's user trains, whatever the attack."""
        if stage == "align":
            return team.settings(stage, self.protocol.align.settings)
        settings = self.finetune.settings
        return team.settings(stage, self.attackers().settings(settings) if stage == "finetune" else settings)

    def _fresh(self, resolved: list[Resolved]) -> Any:
        return tuple(type(r.plugin)(**r.params).seeded(self.spec.seed, self.in_order) for r in resolved)

    @property
    def in_order(self) -> bool:
        """Rows are taken in the order of the files, as the papers' scripts take them, not drawn."""
        return self.protocol.rows == "paper"

    def location(self, dataset: str) -> str:
        """Where a data set is read from: the task's own, or the protocol's.

        Raises:
            BadInput: neither names it.
        """
        own = self.task.places()
        return own[dataset] if dataset in own else self.protocol.location(dataset)

    def data(self, *names: str) -> Mapping[str, Any]:
        """What an artifact that reads these data sets depends on."""
        return {name: fingerprint(self.location(name), "dataset") for name in names}


def scorer_defaults(protocol: Protocol) -> dict[str, dict[str, Any]]:
    """What a protocol says of scorers: the model of its own, and whatever else it names."""
    own = SCORERS.get(parse_plugins(protocol.score.scorer)[0].name)
    model = {"model": protocol.score.judge} if "model" in own.model_fields else {}
    return {**protocol.scorers, own.name: {**model, **protocol.scorers.get(own.name, {})}}


def resolve_scorers(written: Sequence[str], protocol: Protocol) -> list[Resolved]:
    """The scorers that were written, or the protocol's, whose model lies where the protocol says.

    Raises:
        BadInput: an unknown name or parameter, a value out of range, or one judge twice.
    """
    given = scorer_defaults(protocol)
    components = [component for text in written or [protocol.score.scorer] for component in parse_plugins(text)]
    scorers = [resolve_plugins((component,), SCORERS, given, protocol.name)[0] for component in components]
    names = [canonical_name([scorer]) for scorer in scorers]
    if len(set(names)) < len(names):
        raise BadInput(f"A scorer is named twice in {', '.join(names)}; the same one at two thresholds is allowed.")
    return scorers


def resolve_task(written: str, protocol_name: str) -> Resolved:
    """The task of that name; a data file or folder in place of a name is a task of the user's own (`tasks.own`).

    Raises:
        BadInput: an unknown name or parameter, a value out of range, or several tasks.
    """
    head, colon, rest = written.strip().partition(":")
    named = re.match(r"\w+=", head)  # name=VALUE, whose value may be a path
    if not named and (is_data_file(head) or (is_plugin_path(head) and not head.endswith(".py"))):
        params = parse_plugins(f"own:{rest}")[0].params if colon else {}
        components: tuple[Component, ...] = (Component(name="own", params={"data": head, **params}),)
    else:
        components = parse_plugins(written)
    if len(components) != 1:
        raise BadInput(f"Task {written!r} names {len(components)} tasks; a cell has one. Write --task once for each.")
    return resolve_plugins(components, TASKS, {}, protocol_name)[0]


def plugin_identities(resolved: list[Resolved]) -> list[Any]:
    """What an artifact that these plug-ins had a hand in depends on: names, parameters, source."""
    return [[r.plugin.name, r.params, type(r.plugin).fingerprint()] for r in resolved]

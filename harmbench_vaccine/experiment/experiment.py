"""A settled experiment: the user's specification and the protocol, resolved once into the objects that run.

Settling loads no model and makes no artifact, so that bad input is reported before any work starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import attrgetter
from typing import Any

from harmbench_vaccine.core import distributed
from harmbench_vaccine.core.errors import BadInput, unknown_name
from harmbench_vaccine.core.types import STAGES, StageName
from harmbench_vaccine.data.over_refusal import OVER_REFUSAL, check_over_refusal
from harmbench_vaccine.data.prompts import PromptTemplate, prompt_template
from harmbench_vaccine.data.sources import location_identity
from harmbench_vaccine.inference.engine import Backend, choose_backend
from harmbench_vaccine.plugins import Attack, Defense, Resolved, Scorer, Task
from harmbench_vaccine.plugins.base import resolve_params
from harmbench_vaccine.plugins.composition import canonical_name, resolve_plugins
from harmbench_vaccine.plugins.registry import ATTACKS, DEFENSES, SCORERS, TASKS, Registry
from harmbench_vaccine.plugins.teams import AttackTeam, DefenseTeam

from .protocol import FinetuneProtocol, Protocol, load_protocol
from .resolution import judge_identity, resolve_guard, resolve_scorers, resolve_task, scorer_defaults
from .spec import RunSpec
from .stage_config import StageConfig, configure_stage

_NAMED_VALUES: dict[str, Registry[Any]] = {
    "defenses": DEFENSES,
    "attacks": ATTACKS,
    "scorers": SCORERS,
    "tasks": TASKS,
    "finetune.tasks": TASKS,
    "answer.task_tokens": TASKS,
    "answer.items": TASKS,
}
"""Values of a protocol that are named by plug-ins: dotted path -> the registry of the names."""


@dataclass(frozen=True)
class Experiment:
    """One run before it is executed: every plug-in constructed once, every stage configured."""

    spec: RunSpec
    protocol: Protocol
    defenses: tuple[Resolved[Defense], ...]
    attacks: tuple[Resolved[Attack], ...]
    scorers: tuple[Resolved[Scorer], ...]
    """The first scorer gives the headline harmful score; the scores of the others are reported next to it."""
    task_plugin: Resolved[Task]
    """The downstream task of the user."""
    model: str
    backend: Backend
    """The engine that generates answers, and the texts of judges where it supports them."""
    finetune: FinetuneProtocol
    """The protocol's user stage, for this task."""
    attack_team: AttackTeam
    """The attacks, as one object."""
    stages: Mapping[StageName, StageConfig]
    answer_template: PromptTemplate
    """The prompt format of the evaluation sets."""
    generation_team: DefenseTeam
    """The defenses that change how an answer is generated, as one object."""
    answer_team: DefenseTeam
    """The defenses that replace generated answers, as one object."""
    answer_guard: Resolved[Scorer] | None
    """The judge that one of them uses."""

    @classmethod
    def settle(cls, spec: RunSpec, written: Protocol | None = None) -> Experiment:
        """Find and construct every plug-in, resolve every parameter, and configure every stage.

        Args:
            spec: The specification.
            written: The protocol that it names; None: load it.

        Raises:
            BadInput: An unknown name, a value out of range, or plug-ins that cannot act together.
        """
        written = written or load_protocol(spec.protocol)
        protocol = written.replaced(spec.values) if spec.values else written
        check_over_refusal(spec.over_refusal)
        for name in spec.data:
            if name not in protocol.data and name not in OVER_REFUSAL:
                raise unknown_name(
                    "data set", name, {**protocol.data, **OVER_REFUSAL}, of=f"protocol {protocol.name!r}"
                )
        replaced = {name: location for name, location in spec.data.items() if name in protocol.data}
        protocol = protocol.model_copy(update={"data": {**protocol.data, **replaced}})
        judges = scorer_defaults(protocol)
        scorers = resolve_scorers(spec.scorers, protocol)
        score = protocol.score.model_copy(update={"scorer": canonical_name(scorers[:1])})
        protocol = protocol.model_copy(update={"score": score})  # another threshold is another protocol
        task = resolve_task(spec.task, protocol)
        in_order = protocol.rows == "paper"

        def seeded(resolved: Resolved[Any]) -> Resolved[Any]:
            return Resolved(resolved.plugin.seeded(spec.seed, in_order), resolved.params, resolved.origins)

        defenses = tuple(map(seeded, resolve_plugins(spec.defense, DEFENSES, protocol.defenses, protocol.name)))
        attacks = tuple(map(seeded, resolve_plugins(spec.attack, ATTACKS, protocol.attacks, protocol.name)))
        attack_team = AttackTeam(members=tuple(resolved.plugin for resolved in attacks))
        finetune = protocol.finetune.of(task.plugin.name)
        template = prompt_template(protocol.prompt)
        stages = {
            name: configure_stage(
                name, [resolved.plugin for resolved in defenses], attack_team, protocol, finetune, template, judges
            )
            for name in STAGES
        }
        generating = [resolved.plugin for resolved in defenses if resolved.plugin.changes_generation]
        generation_team = DefenseTeam(members=tuple(generating))
        answering = [resolved.plugin for resolved in defenses if resolved.plugin.changes_answers]
        answer_team = DefenseTeam(members=tuple(answering))
        answer_template = template
        for stage in stages.values():
            answer_template = stage.defenses.fresh().template("answer", answer_template)
        experiment = cls(
            spec=spec,
            protocol=protocol,
            defenses=defenses,
            attacks=attacks,
            scorers=tuple(scorers),
            task_plugin=task,
            model=protocol.model if spec.model is None else spec.model,
            backend="transformers" if generation_team.steers and not spec.backend else choose_backend(spec.backend),
            finetune=finetune,
            attack_team=attack_team,
            stages=stages,
            answer_template=answer_template,
            generation_team=generation_team,
            answer_team=answer_team,
            answer_guard=resolve_guard(answer_team, judges, protocol.name),
        )
        _check_combination(experiment)
        _check_changed_names(written, experiment)
        return experiment

    @cached_property
    def protocol_hash(self) -> str:
        """The identity that tables compare: the protocol's hash, with the content of local files for their paths."""
        return self.protocol.hash_with(self._contents)

    @cached_property
    def untuned_hash(self) -> str:
        """`protocol_hash` without the tuned parameters of defenses; empty for a protocol that is not an overlay."""
        return self.protocol.untuned_hash_with(self._contents)

    @cached_property
    def _contents(self) -> dict[str, str]:
        """A location in the protocol -> the same by its content: data, files of plug-ins, the headline judge's model,
        and this judge as it is written."""
        plugins = [(resolved, resolved.identity["params"]) for resolved in (*self.defenses, *self.attacks)]
        files = {
            resolved.params[key]: by_content[key]
            for resolved, by_content in plugins
            for key in resolved.plugin.file_params
            if resolved.params[key]
        }
        contents = files | {location: location_identity(location) for location in self.protocol.data.values()}
        params = self.scorer.params
        local = self.scorer.plugin.file_params if params.get("base_url") else ("model", *self.scorer.plugin.file_params)
        judge = {key: location_identity(params[key]) for key in local if params.get(key)}
        contents |= {params[key]: identity for key, identity in judge.items()}
        contents[self.protocol.score.scorer] = canonical_name([replace(self.scorer, params={**params, **judge})])
        return contents

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
        """The downstream task of the user."""
        return self.task_plugin.plugin

    @property
    def task_name(self) -> str:
        """The task as a command line would name it."""
        return canonical_name([self.task_plugin])

    @property
    def scorer(self) -> Resolved[Scorer]:
        """The judge of the headline harmful score."""
        return self.scorers[0]

    @property
    def guards(self) -> list[Resolved[Scorer]]:
        """The judges that defenses use, each once."""
        guards = [*(stage.guard for stage in self.stages.values()), self.answer_guard]
        return list({canonical_name([guard]): guard for guard in guards if guard}.values())

    @property
    def judges(self) -> list[Resolved[Scorer]]:
        """Every judge of the run: those that score it, and those that defenses use."""
        return [*self.scorers, *self.guards]

    @property
    def template(self) -> PromptTemplate:
        """The prompt format of the protocol."""
        return prompt_template(self.protocol.prompt)

    @property
    def user_trains(self) -> bool:
        """False if the attack edits weights instead of training: the task is then not learned."""
        return self.attack_team.editing_attack is None

    @property
    def makes_base(self) -> bool:
        """True if the final model has another base: the attack trains or edits every weight."""
        return self.stages["finetune"].full or self.attack_team.stresses_weights

    @property
    def in_order(self) -> bool:
        """True if rows are taken in file order, as in the scripts of the papers, instead of drawn by the seed."""
        return self.protocol.rows == "paper"

    def acting(self, stage: StageName) -> list[Resolved[Defense]]:
        """Return the defenses that act in a stage."""
        return [resolved for resolved in self.defenses if stage in resolved.plugin.stages]

    def location(self, dataset: str) -> str:
        """Return where a data set is read from: the location of the task, the protocol, or the over-refusal set.

        Raises:
            BadInput: None of them names the data set.
        """
        locations = self.task.locations()
        if dataset in OVER_REFUSAL and dataset not in self.protocol.data:
            locations = {dataset: self.spec.data.get(dataset, OVER_REFUSAL[dataset].location), **locations}
        return locations[dataset] if dataset in locations else self.protocol.location(dataset)


def settle_all(specs: Sequence[RunSpec]) -> list[Experiment]:
    """Settle specifications, and read each protocol only once.

    Raises:
        BadInput: The first specification that is not possible.
    """
    protocols: dict[str, Protocol] = {}
    experiments = []
    for spec in specs:
        if spec.protocol not in protocols:
            protocols[spec.protocol] = load_protocol(spec.protocol)
        experiments.append(Experiment.settle(spec, protocols[spec.protocol]))
    return experiments


def _check_changed_names(written: Protocol, experiment: Experiment) -> None:
    """Check values that the user replaced for plug-ins of any name, also where this run does not use them.

    Raises:
        BadInput: No plug-in has the name, or a parameter is not allowed.
    """
    used = {resolved.plugin.name for resolved in (*experiment.defenses, *experiment.attacks, *experiment.judges)}
    used.add(experiment.task.name)
    for path, registry in _NAMED_VALUES.items():
        before, after = (attrgetter(path)(protocol) for protocol in (written, experiment.protocol))
        for name in after:
            if after[name] == before.get(name):
                continue
            if name in registry.entries() or name not in used:  # that of a file was checked when it was constructed
                cls = registry.get(name)
                if path == f"{cls.kind}s":
                    resolve_params(cls, {}, after[name])


def _check_combination(experiment: Experiment) -> None:
    """Refuse combinations of plug-ins, protocol and hardware that do not work.

    Raises:
        BadInput: The first conflict.
    """
    experiment.task.check()
    for name in experiment.task.datasets:
        experiment.location(name)
    align, finetune = experiment.stages["align"], experiment.stages["finetune"]
    later = [*experiment.acting("finetune"), *experiment.acting("repair")]
    if not align.defenses.runs:
        for resolved in experiment.defenses:
            if resolved.plugin.needs_alignment:
                raise BadInput(
                    f"{resolved.plugin.name!r} needs the alignment adapter, but {experiment.defense!r} leaves out the "
                    "alignment stage: remove the defense that leaves it out."
                )
    _check_guards(experiment)
    if experiment.backend == "vllm" and experiment.generation_team.steers:
        steering = next(member for member in experiment.generation_team.members if member.steers)
        raise BadInput(
            f"{steering.name!r} changes hidden states while the model answers, which backend 'vllm' does not support; "
            "allowed: --backend transformers."
        )
    if editing := experiment.attack_team.editing_attack:
        for resolved in later:
            raise BadInput(
                f"{resolved.plugin.name!r} cannot act under attack {editing.name!r}: "
                "it defends the user's training, and this attack does not train."
            )
    rank = finetune.settings.lora_rank
    if finetune.topology == "single" and align.defenses.runs and rank != experiment.finetune.settings.lora_rank:
        raise BadInput(
            f"Attack {experiment.attack!r} sets the rank of the user's adapter, but in single topology (required by "
            "the protocol or a defense) the alignment adapter is trained further and keeps its rank."
        )
    quantization = experiment.protocol.quantization
    if quantization != "none" and experiment.makes_base:
        raise BadInput(
            f"{experiment.attack!r} changes the base model's weights, which are fixed under quantization "
            f"{quantization!r}; allowed: quantization none, or attacks that train an adapter."
        )
    if distributed.world_size() > 1:
        for resolved in experiment.defenses:
            if not resolved.plugin.supports_ranks:
                raise BadInput(
                    f"{resolved.plugin.name!r} does not support multi-GPU training (`ranks = False`): "
                    "start it as one process."
                )
    if finetune.settings.full:
        for resolved in later:
            defense = resolved.plugin
            if defense.needs_adapter or defense.topology or "repair" in defense.stages:
                raise BadInput(
                    f"{defense.name!r} needs the user's adapter, but the user trains every weight (`full`): "
                    "choose an attack or a setting that trains an adapter."
                )


def _check_guards(experiment: Experiment) -> None:
    """Refuse a defense that uses a judge which also scores the run.

    Raises:
        BadInput: The judge of a defense has the same model as a scorer, or is the same rule.
    """
    for guard in experiment.guards:
        for scorer in experiment.scorers:
            if judge_identity(guard) == judge_identity(scorer):
                raise BadInput(
                    f"{experiment.defense!r} and the score use the same judge, {canonical_name([scorer])!r}: the "
                    "harmful score would then count only what this judge overlooks. Choose another judge for the "
                    "defense, or another --scorer."
                )

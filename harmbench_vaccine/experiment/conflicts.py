"""Combinations of plug-ins, protocol and hardware that do not work, refused before any work starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harmbench_vaccine.core import distributed
from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.plugins.composition import canonical_name

from .resolution import judge_identity

if TYPE_CHECKING:
    from .experiment import Experiment


def check_combination(experiment: Experiment) -> None:
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

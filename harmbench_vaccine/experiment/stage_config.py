"""The configuration of one stage, from the protocol, the user's attack and the defenses that act in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.types import StageName, Topology, TrainSettings
from harmbench_vaccine.data.prompts import PromptTemplate
from harmbench_vaccine.plugins import Defense, Resolved, Scorer
from harmbench_vaccine.plugins.teams import AttackTeam, DefenseTeam

from .protocol import FinetuneProtocol, Protocol
from .resolution import resolve_guard
from .spec import first_validation_error

_TRAIN_SETTINGS = TypeAdapter(TrainSettings)


@dataclass(frozen=True)
class StageConfig:
    """The configuration of one stage: everything that it needs in addition to the model that it starts from."""

    name: StageName
    defenses: DefenseTeam
    """The defenses that act in the stage, as one object; a training session works on a `fresh()` copy."""
    settings: TrainSettings
    """The optimizer settings, as the protocol, the user's attack and the defenses of the stage define them."""
    template: PromptTemplate
    """The prompt format of the training rows."""
    topology: Topology
    """`single` if the user stage continues the alignment adapter, else `double`."""
    full: bool
    """True if the stage makes a new base model: every weight is trained, or an attack edits the weights."""
    guard: Resolved[Scorer] | None = None
    """The judge that a defense of the stage uses."""


def configure_stage(
    name: StageName,
    defenses: Sequence[Defense],
    attack: AttackTeam,
    protocol: Protocol,
    finetune: FinetuneProtocol,
    template: PromptTemplate,
    judges: Mapping[str, Mapping[str, Any]],
) -> StageConfig:
    """Configure one stage. The repair stage uses the settings of the protocol's user stage, not those of the attack."""
    team = DefenseTeam(members=tuple(defense for defense in defenses if name in defense.stages), stage=name)
    hooks = team.fresh()  # hooks run on copies, so that the constructed objects keep their initial state
    settings = protocol.align.settings if name == "align" else finetune.settings
    if name == "finetune":
        settings = attack.fresh().settings(settings)
    settings = _checked_settings(name, hooks.settings(name, settings))
    is_user = name == "finetune"
    return StageConfig(
        name=name,
        defenses=team,
        settings=settings,
        template=hooks.template("train", template),
        topology=(team.required_topology or protocol.topology) if is_user else "double",
        full=is_user and (attack.editing_attack is not None or settings.full),
        guard=resolve_guard(team, judges, protocol.name),
    )


def _checked_settings(stage: StageName, settings: TrainSettings) -> TrainSettings:
    """Refuse settings that the hooks of defenses and attacks changed to values outside their ranges."""
    try:
        return _TRAIN_SETTINGS.validate_python(asdict(settings))
    except ValidationError as error:
        reason = first_validation_error(error)
        raise BadInput(f"A defense or an attack changes a setting of stage {stage!r}: {reason}") from error

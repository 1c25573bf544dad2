"""Find and load the models of a stored run: the base model with the adapters that its stages made."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from harmbench_vaccine.core.errors import BadInput, HbvError, unknown_name
from harmbench_vaccine.core.paths import home
from harmbench_vaccine.core.store import Store, intact_description
from harmbench_vaccine.data.sources import fingerprint, local_path
from harmbench_vaccine.evaluation.measure import settle_again
from harmbench_vaccine.evaluation.records import load_run, require_keys
from harmbench_vaccine.evaluation.result import Result
from harmbench_vaccine.experiment import keys
from harmbench_vaccine.experiment.artifacts import ADAPTER, CHECKPOINT
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.inference.dequantization import ensure_dequantized
from harmbench_vaccine.inference.model_pool import ModelPool, ModelSpec

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from harmbench_vaccine.training.adapters import Adapter

ModelStage = Literal["base", "align", "finetune", "final"]
"""The models of a run: the base model, those after alignment and after the user stage, and the evaluated one."""


def load_stored_model(
    folder: Path, stage: str = "final"
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Load a model of a stored run, on the GPU if one exists, in evaluation mode.

    Args:
        folder: The folder of the run.
        stage: A value of `ModelStage`.

    Returns:
        The base model with one peft adapter that equals all adapters of the stage together; without an adapter (stage
        "base", or an attack that changes every weight) a plain model. And the tokenizer.

    Raises:
        BadInput: An unknown stage, or one that the run does not have.
        HbvError: An artifact of the run is missing or damaged, or the base model cannot be loaded.
    """
    from peft import PeftModel

    from .folders import save_adapter

    store, models = Store(home() / "store"), ModelPool()
    spec = stored_spec(load_run(folder)[0], stage, store)
    base = models.stack(spec).base
    if not spec.adapters:
        return base.eval(), models.tokenizer(spec)
    with tempfile.TemporaryDirectory() as temporary:
        save_adapter(stack_adapters(spec.adapters), spec.base, Path(temporary))
        model = PeftModel.from_pretrained(base, temporary)
    return model.eval(), models.tokenizer(spec)


def stored_spec(result: Result, stage: str, store: Store) -> ModelSpec:
    """Return the base and the adapters of a model of a stored run; a base in a GGUF file is dequantized if necessary.

    Args:
        result: The result of the run.
        stage: A value of `ModelStage`.
        store: The store; the artifacts are marked as used as long as this object exists.

    Returns:
        The model. A base on the Hub is named with the commit that the run used, `owner/name@commit`.

    Raises:
        BadInput: An unknown stage, one that the run does not have, or a run without keys.
        HbvError: An artifact is missing or damaged, or the folder of the base has changed.
    """
    if stage not in get_args(ModelStage):
        raise unknown_name("stage", stage, get_args(ModelStage))
    ensure_dequantized([result.model], store)
    base = ModelSpec(result.model, result.dtype, quantization=result.quantization)
    if stage == "base":
        return base
    require_keys(result)
    artifacts = _artifacts_of(result, stage, store)
    checkpoint = artifacts[-1].path / CHECKPOINT
    if checkpoint.is_dir():
        return ModelSpec(str(checkpoint), result.dtype)
    base = replace(base, base=_base_location(result, artifacts[0].inputs["model"]["base"]))
    return base.on_top(*(artifact.path / ADAPTER for artifact in artifacts))


def stored_experiment(result: Result) -> Experiment:
    """Settle the experiment of a stored run again, and check that it is the same.

    Raises:
        BadInput: A protocol or a plug-in of the run no longer exists.
        HbvError: The data, the protocol or the plug-ins have changed since the run.
    """
    experiment = settle_again(result)
    if keys.run_id(experiment) != result.run:
        raise HbvError(
            f"The data, the protocol or the plug-ins of run {result.run} have changed since it was stored. Repeat its "
            "`hbv run` command."
        )
    return experiment


def stack_adapters(folders: Sequence[Path]) -> Adapter:
    """Return one adapter that equals several adapters together; the last one keeps its factors and its scale.

    Args:
        folders: Adapter folders, the lowest first.
    """
    from harmbench_vaccine.training.adapters import Adapter, concatenate

    adapters = [Adapter.load(folder) for folder in folders]
    scale = adapters[-1].scale or 1.0
    return concatenate([adapter.scaled(1 / scale) for adapter in adapters]).scaled(scale)


# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _StageArtifact:
    """An intact artifact of a stage that makes a model."""

    path: Path
    inputs: dict[str, Any]


def _artifacts_of(result: Result, stage: str, store: Store) -> list[_StageArtifact]:
    """Return the artifacts whose adapters make the model of a stage, the lowest first, or that of a full checkpoint."""
    aligned = ["align"] if "align" in result.stages else []
    if stage == "align":
        if not aligned:
            raise BadInput(
                f"Run {result.run} has no alignment stage, because {result.defense!r} leaves it out; "
                "allowed: finetune, final."
            )
        names = aligned
    elif stage == "final" and "stress" in result.stages:
        names = ["stress"]  # a full checkpoint
    elif stage == "final" and "repair" in result.stages:
        names = [*aligned, "repair"]
    else:
        tuned = _read_artifact(result, "finetune", store)
        if (tuned.path / CHECKPOINT).is_dir() or tuned.inputs["topology"] == "single":
            return [tuned]
        return [*(_read_artifact(result, name, store) for name in aligned), tuned]
    return [_read_artifact(result, name, store) for name in names]


def _read_artifact(result: Result, stage: str, store: Store) -> _StageArtifact:
    """Return an artifact of a run, from the store or from the folder that the result names."""
    artifact = result.stages[stage].artifacts[stage]
    store.use.mark(f"{stage}/{artifact.key}")
    for path in (store.root / stage / artifact.key, Path(artifact.path)):
        with suppress(FileNotFoundError):
            if description := intact_description(stage, path):
                return _StageArtifact(path, description["inputs"])
    raise HbvError(
        f"The {stage} artifact of run {result.run} was deleted from the store or is damaged: repeat the run's command."
    )


def _base_location(result: Result, identity: str) -> str:
    """Return the folder of a run's base model, or its name on the Hub with the commit that the run used.

    Args:
        result: The result of the run.
        identity: The fingerprint of the base, when the run used it.
    """
    path = local_path(result.model)
    if path is None:
        return identity
    if fingerprint(result.model) != identity:
        raise HbvError(
            f"The base model {result.model} has changed since run {result.run} used it, so its adapters do not fit: "
            "restore the folder, or repeat the run's command."
        )
    return str(path)

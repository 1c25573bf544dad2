"""Export a model of a stored run: an adapter folder, or a folder with all weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.paths import home
from harmbench_vaccine.core.progress import SILENT, Progress
from harmbench_vaccine.core.store import Store
from harmbench_vaccine.data.sources import name_and_revision
from harmbench_vaccine.evaluation.records import load_run
from harmbench_vaccine.inference.model_pool import ModelPool, ModelSpec

from .folders import check_new_folder, new_folder, save_adapter
from .model_card import run_card
from .models import stack_adapters, stored_spec


@dataclass(frozen=True)
class ExportedModel:
    """A folder that was written."""

    folder: str
    run: str
    stage: str
    kind: Literal["adapter", "model"]
    """`model`: all weights."""
    base: str
    """Folder or Hub id of the base model."""
    revision: str | None
    """Commit of a base model on the Hub."""
    files: list[str]


def export_run(
    run: Path, folder: Path, stage: str = "final", *, merge: bool = False, progress: Progress = SILENT
) -> ExportedModel:
    """Write a model of a stored run to a new folder, with its tokenizer and a model card.

    Args:
        run: The folder of the run.
        folder: The folder to write; it must be empty or absent.
        stage: "align", "finetune" or "final".
        merge: Write all weights, in the data type of the run, instead of an adapter.
        progress: Where progress is reported.

    Raises:
        BadInput: The folder is not empty, the run does not have the stage, or the stage does not have the form.
        HbvError: An artifact is missing or damaged, or the disk is full.
    """
    folder = check_new_folder(folder)
    result, answers = load_run(run)
    store = Store(home() / "store", progress)  # until the export is complete, it marks the artifacts as used
    spec = stored_spec(result, stage, store)
    if not spec.adapters and not merge:
        raise BadInput(
            f"{result.attack!r} of run {result.run} changes every weight, so there is no adapter: add --merge to "
            "export all weights."
        )
    if merge and spec.quantization != "none":
        raise BadInput(
            f"The base model of run {result.run} is quantized ({spec.quantization}), so its adapter cannot be merged: "
            "export the adapter, without --merge."
        )
    base = spec.base if spec.adapters else result.model
    models = ModelPool()
    with new_folder(folder, f"the model of {result.run}") as temporary:
        if merge:
            _save_merged(spec, models, temporary)
        else:
            save_adapter(stack_adapters(spec.adapters), base, temporary)
        models.tokenizer(spec).save_pretrained(temporary)
        run_card(result, answers, stage, spec, merge).save(temporary / "README.md")
    name, revision = name_and_revision(base)
    files = sorted(path.name for path in folder.iterdir())
    return ExportedModel(str(folder), result.run, stage, "model" if merge else "adapter", name, revision, files)


def _save_merged(spec: ModelSpec, models: ModelPool, folder: Path) -> None:
    from harmbench_vaccine.training.merging import merge_adapter

    model = models.merged(spec.on_top())
    if spec.adapters:
        merge_adapter(model, stack_adapters(spec.adapters))
    model.save_pretrained(folder)

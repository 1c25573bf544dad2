"""Embeddings of the alignment rows by the aligned and the final model of a stored run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from harmbench_vaccine.core.paths import home
from harmbench_vaccine.core.progress import SILENT, Progress
from harmbench_vaccine.core.store import Store
from harmbench_vaccine.evaluation.records import load_result, require_keys
from harmbench_vaccine.evaluation.result import Result
from harmbench_vaccine.inference.model_pool import ModelPool

from .models import stored_experiment, stored_spec

if TYPE_CHECKING:
    from torch import Tensor

_FILE = "embeddings.safetensors"


def stored_embeddings(run: Path, progress: Progress = SILENT) -> tuple[Tensor, Tensor]:
    """Return the embeddings of the alignment rows over which the drift of a run was measured.

    They are computed once and stored with the artifacts. Nothing is trained.

    Args:
        run: The folder of the run.
        progress: Where progress is reported.

    Returns:
        The embeddings by the aligned and by the final model (rows x width, see `evaluation.embeddings`); the aligned
        model is the base model if the run has no alignment stage.

    Raises:
        BadInput: An earlier version stored the run, without its keys.
        HbvError: An artifact of the run was deleted, or its data, protocol or plug-ins have changed.
    """
    from safetensors.torch import load_file

    result = load_result(run)
    require_keys(result)
    store = Store(home() / "store", progress)
    inputs = {"drift": result.stages["score"].artifacts["drift"].key}
    artifact = store.get_or_create(
        "embeddings", inputs, lambda folder, checkpoints: _write_embeddings(result, store, progress, folder)
    )
    tensors = load_file(artifact.path / _FILE)
    return tensors["before"], tensors["after"]


def _write_embeddings(result: Result, store: Store, progress: Progress, folder: Path) -> None:
    from safetensors.torch import save_file

    from harmbench_vaccine.evaluation.drift import alignment_batches
    from harmbench_vaccine.evaluation.embeddings import row_embeddings

    experiment = stored_experiment(result)
    aligned = stored_spec(result, "align" if "align" in result.stages else "base", store)
    final = stored_spec(result, "final", store)
    models = ModelPool(progress)
    before = models.stack(aligned)
    batches = alignment_batches(experiment, models.tokenizer(aligned), before.base.config)
    tensors = {"before": row_embeddings(before.use(aligned.adapters), batches)}
    after = before if final.base == aligned.base else models.second_stack(final)
    tensors["after"] = row_embeddings(after.use(final.adapters), batches)
    save_file(tensors, folder / _FILE)

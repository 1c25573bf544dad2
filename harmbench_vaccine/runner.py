"""Running the cells of a table one after another, in one process, with one set of loaded models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, cast

from harmbench_vaccine import testbed
from harmbench_vaccine.core import distributed
from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.hashing import canonical_json
from harmbench_vaccine.core.paths import ensure_writable, home
from harmbench_vaccine.core.progress import SILENT, Progress
from harmbench_vaccine.core.store import Store
from harmbench_vaccine.data.sources import TESTBED, check_testbed_part
from harmbench_vaccine.evaluation import verdicts
from harmbench_vaccine.evaluation.results import build_result, check_columns, save_run
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.rows import check_rows
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.inference import memory
from harmbench_vaccine.inference.loading import check_quantization
from harmbench_vaccine.inference.model_pool import Lab, check_model
from harmbench_vaccine.pipeline import answer_all, judge_all, run, train_models
from harmbench_vaccine.plugins import Scorer


def run_all(
    specs: Sequence[RunSpec],
    *,
    out: Path | None = None,
    table: Path | None = None,
    save_share: float = 0.1,
    gradient_checkpointing: bool = False,
    shard: bool = False,
    gpu_memory: float | None = None,
    progress: Progress = SILENT,
    done: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Runs every spec and stores its result as soon as it is there.

    All specs are settled before the first one starts, so that a mistake in the last costs nothing. Under several ranks
    all of them come here; rank 0 writes. `shard` spreads the base model over them. `gpu_memory` is the
    share of a GPU's that a vLLM engine takes.

    Raises:
        BadInput: a spec names something that is not there, or a folder cannot be written to.
        HbvError: something failed while running.
    """
    cells = [Experiment.settle(spec) for spec in specs]
    root = ensure_writable(home(), "The cache folder")
    runs = ensure_writable(out or root / "runs", "The output folder")
    rows = table or root / "results.csv"
    ensure_writable(rows.absolute().parent, "The folder of the CSV file")
    check_columns(rows)
    places = {place for cell in cells for place in _places(cell)}
    for place in places:
        check_testbed_part(place)
    judges = {canonical_json([each.plugin.name, each.params]): each for cell in cells for each in cell.scorers}
    for scorer in judges.values():
        verdicts.check_scorer(cast(Scorer, scorer.plugin))
    for model in {cell.model for cell in cells}:
        if not model.startswith(TESTBED):
            check_model(model)
    if any(place.startswith(TESTBED) for place in places):
        testbed.ensure_testbed(progress)
    for cell in cells:
        check_rows(cell)
        check_quantization(cell.protocol.quantization)
        if shard:
            _check_sharding(cell)
    memory.share = gpu_memory or memory.share
    lab = Lab(Store(root / "store", progress), progress, save_share, gradient_checkpointing, shard)
    results = []
    with progress.bar("cells", len(cells)) as advance, closing(lab):
        if memory.one_at_a_time() and len(cells) > 1:
            _stage_by_stage(cells, lab)
        for cell in cells:
            measured = run(cell, lab)
            values = build_result(cell, measured)
            if distributed.rank() == 0:
                save_run(cell, measured, values, runs, rows)
            results.append(values)
            if done:
                done(values)
            advance(1)
    return results


def _stage_by_stage(cells: Sequence[Experiment], lab: Lab) -> None:
    """Where training, engines and judges take turns in a GPU's memory, each is loaded once for all cells: first every
    model is made, then every question answered, then every answer judged. The cells then find it all in the store."""
    made = [train_models(cell, lab) for cell in cells]
    answers = [answer_all(cell, lab, *pair) for cell, pair in zip(cells, made, strict=True)]
    for cell, given in zip(cells, answers, strict=True):
        judge_all(cell, lab, given)


def _places(cell: Experiment) -> list[str]:
    judges = [model for scorer in cell.scorers for model in verdicts.scorer_models(cast(Scorer, scorer.plugin))]
    return [cell.model, *judges, *cell.protocol.data.values()]


def _check_sharding(cell: Experiment) -> None:
    why = ""
    if distributed.world_size() == 1:
        why = "there is one rank: start several with torchrun or accelerate launch"
    elif cell.whole:
        why = f"attack {cell.attack!r} changes the base model's weights, of which a rank has a part only"
    elif cell.protocol.quantization != "none":
        why = f"quantization {cell.protocol.quantization!r} and sharding do not go together"
    if why:
        raise BadInput(f"The base model cannot be sharded: {why}.")

"""Run all experiments of one command: check all of them first, then run them in order with shared models in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from itertools import filterfalse
from pathlib import Path

from .core import distributed
from .core.errors import BadInput, HbvError
from .core.hashing import canonical_json
from .core.paths import check_writable, ensure_writable, home
from .core.progress import SILENT, Progress
from .core.stage_clock import ReportingStore, StageClock
from .core.store import Artifact, Store
from .data.sources import TESTBED, check_testbed_part, is_available, is_dequantized
from .evaluation.measure import answer_rows, measure_result
from .evaluation.records import save_run
from .evaluation.result import Result
from .evaluation.results_csv import check_csv
from .evaluation.scorer_facts import scorer_models
from .evaluation.verdicts import known_judges
from .experiment.context import RunContext
from .experiment.experiment import Experiment, settle_all
from .experiment.protocol import protocol_models
from .experiment.rows import check_rows, data_locations
from .experiment.spec import RunSpec
from .inference.dequantization import check_gguf, ensure_dequantized, mark_dequantized
from .inference.engine import GPU_MEMORY
from .inference.loading import check_model, check_quantization
from .inference.model_pool import ModelPool
from .inference.tensor_parallel import check_gpus, check_heads
from .pipeline import answer_all, judge_all, run, train_models
from .plugins import Scorer
from .plugins.registry import require_imports
from .reporting.dry_run.plan import DryRunStore, Plan, plan_runs
from .reporting.gpu_use import check_gpu_memory
from .testbed import ensure_testbed
from .training.trackers import Tracker, check_trackers


def run_all(
    specs: Sequence[RunSpec],
    *,
    out: Path | None = None,
    table: Path | None = None,
    save_share: float = 0.1,
    gradient_checkpointing: bool = False,
    shard: bool = False,
    gpu_memory: float | None = None,
    tensor_parallel: int = 1,
    report_to: Sequence[Tracker] = (),
    progress: Progress = SILENT,
    on_result: Callable[[Result], None] | None = None,
) -> list[Result]:
    """Run every spec and store each result as soon as it is complete.

    All specs are settled before the first one starts, so that a mistake in the last one costs nothing. With several
    ranks, every rank calls this function and rank 0 writes.

    Args:
        specs: Specifications of the runs.
        out: Folder of the run folders; by default `$HBV_HOME/runs`.
        table: CSV of results; by default `$HBV_HOME/results.csv`.
        save_share: Share of a training stage's steps between two checkpoints.
        gradient_checkpointing: Compute activations again in the backward pass.
        shard: Spread the base model over the ranks.
        gpu_memory: Share of a GPU's memory for a vLLM engine.
        tensor_parallel: Number of GPUs that share the weights of a vLLM engine.
        report_to: Trackers that receive the steps of the training stages.
        progress: Where progress is reported.
        on_result: Called with every result.

    Raises:
        BadInput: A spec names something that does not exist, or a folder is not writable.
        HbvError: A failure while running.
    """
    experiments = settle_all(specs)
    _check_outputs(out, table, check_writable)
    check_trackers(report_to)
    check_gpus(tensor_parallel, (experiment.backend for experiment in experiments))
    models = ModelPool(progress, gradient_checkpointing, shard, gpu_memory or GPU_MEMORY, tensor_parallel)
    planned = prepare(experiments, models, shard=shard, progress=progress)
    root, runs, csv = _check_outputs(out, table, ensure_writable)  # last: bad input creates no folder
    clock = StageClock(planned)
    title = "1 run" if len(experiments) == 1 else f"{len(experiments)} runs"
    results = []
    with progress.bar(title, len(clock)) as advance, closing(models):
        store = ReportingStore(root / "store", progress, clock, advance)
        mark_dequantized(_models(*experiments), store)
        context = RunContext(store, models, progress, save_share, tuple(report_to))
        if models.one_at_a_time() and len(experiments) > 1:
            _run_stage_by_stage(experiments, context)
            store.replay()
        for experiment in experiments:
            measurements = run(experiment, context)
            result = measure_result(experiment, measurements, models)
            if distributed.rank() == 0:
                save_run(result, answer_rows(measurements), runs, csv)
            results.append(result)
            if on_result:
                on_result(result)
    return results


def prepare(
    experiments: Sequence[Experiment], models: ModelPool, *, shard: bool = False, progress: Progress = SILENT
) -> list[Artifact]:
    """Check everything that could stop one of the experiments later; build the testbed and dequantize GGUF files.

    The models and the rows of experiments whose stages are all stored are not checked: they are not read.

    Args:
        experiments: The experiments.
        models: Reads tokenizers and configurations.
        shard: Whether the base model is spread over the ranks.
        progress: Where the progress of building the testbed and of dequantizing files is reported.

    Returns:
        The artifacts of all stages, stored or not; none on another rank than 0, which alone shows progress.

    Raises:
        BadInput: A location, a model, a judge or a number of rows is not available, or other processes leave too
            little memory of the GPU.
    """
    _check_locations(experiments, shard)
    store = DryRunStore(home() / "store")
    absent = list(filterfalse(_is_on_this_machine, experiments))
    unstored = [*_unstored(list(filter(_is_on_this_machine, experiments)), models, store), *absent]
    _check_imports(unstored)
    _check_models(unstored)
    check_gpu_memory(unstored, progress)
    if any(location.startswith(TESTBED) for experiment in experiments for location in _locations(experiment)):
        ensure_testbed(progress)
    ensure_dequantized(distributed.from_rank0(lambda: _models(*unstored)), Store(home() / "store", progress))
    _check_rows(unstored, models)
    _unstored(absent, models, store)  # their models and data are on this machine now, so that their stages are known
    return list(store.requested.values())


def plan_all(
    experiments: Sequence[Experiment],
    *,
    out: Path | None = None,
    table: Path | None = None,
    shard: bool = False,
    tensor_parallel: int = 1,
    report_to: Sequence[Tracker] = (),
) -> Plan:
    """Plan the runs and refuse what `run_all` refuses, without creating or downloading anything.

    Models and rows that are not on this machine are not checked, and neither are those of runs whose stages are all
    stored. The experiments are those of the specifications; other arguments and the errors are those of `run_all`.
    """
    _check_outputs(out, table, check_writable)
    check_trackers(report_to)
    check_gpus(tensor_parallel, (experiment.backend for experiment in experiments))
    _check_locations(experiments, shard)
    _check_models(experiments, is_available)
    plan = plan_runs(experiments, home() / "store")
    unstored = [experiment for index, experiment in enumerate(experiments) if not plan.is_stored(index)]
    _check_imports(unstored)
    readable = [run for run in unstored if _is_on_this_machine(run) and is_dequantized(run.model)]
    _check_rows(readable, ModelPool(tensor_parallel=tensor_parallel))
    return plan


def _check_outputs(out: Path | None, table: Path | None, check: Callable[[Path, str], Path]) -> tuple[Path, Path, Path]:
    """Check that results can be written; return the cache folder, the folder of the run folders, and the CSV."""
    root = check(home(), "The cache folder")
    check(root / "store", "The store")
    runs = check(out or root / "runs", "The output folder")
    csv = table or root / "results.csv"
    check(csv.resolve().parent, "The folder of the CSV file")
    check_csv(csv)
    return root, runs, csv


def _is_on_this_machine(experiment: Experiment) -> bool:
    """Return whether the model and the data of an experiment can be read without a network and without a build."""
    return all(map(is_available, [experiment.model, *data_locations(experiment).values()]))


def _check_locations(experiments: Sequence[Experiment], shard: bool) -> None:
    """Check the locations, the judges and the hardware of all experiments; no model is opened."""
    for experiment in experiments:
        for location in _locations(experiment):
            check_testbed_part(location)
        for location in _models(experiment):
            check_gguf(location)
        check_quantization(experiment.protocol.quantization)
        if shard:
            _check_sharding(experiment)
    for scorer in _scorers(experiments):
        scorer.check()


def _check_imports(experiments: Sequence[Experiment]) -> None:
    """Import what the plug-ins of experiments import, which may be left out until they are used."""
    for experiment in experiments:
        for resolved in (*experiment.defenses, *experiment.attacks, *experiment.judges, experiment.task_plugin):
            require_imports(type(resolved.plugin))


def _check_models(
    experiments: Sequence[Experiment], is_readable: Callable[[str], bool] = lambda location: True
) -> None:
    """Check the models and the judges of all experiments, except those that are not readable."""
    judges = {model for scorer in _scorers(experiments) for model in scorer_models(scorer)}
    for model in sorted(judges | {experiment.model for experiment in experiments}):
        if is_readable(model) and not model.startswith(TESTBED):
            check_model(model, known_judges() if model in judges else protocol_models())


def _scorers(experiments: Sequence[Experiment]) -> list[Scorer]:
    """Return the judges of all experiments, each once."""
    scorers = {canonical_json(judge.identity): judge for experiment in experiments for judge in experiment.judges}
    return [scorer.plugin for scorer in scorers.values()]


def _check_rows(experiments: Sequence[Experiment], models: ModelPool) -> None:
    """Draw the rows of all experiments, and compare them with the limits of the models."""
    if not experiments:
        return
    from .experiment.limits import LimitCheck  # imports torch and transformers

    limits: dict[str, LimitCheck] = {}
    for experiment in experiments:
        check_rows(experiment)
        model = experiment.model
        if model not in limits:
            tokenizer, config = models.tokenizer_and_config(model)
            check_heads(model, config, models.tensor_parallel)
            limits[model] = LimitCheck(model, tokenizer, config)
        limits[model].check(experiment)


def _locations(experiment: Experiment) -> list[str]:
    sets = map(experiment.location, experiment.spec.over_refusal)
    data = [*experiment.protocol.data.values(), *experiment.task.locations().values(), *sets]
    return [*_models(experiment), *data]


def _models(*experiments: Experiment) -> list[str]:
    """Return the locations of the base models and of the judges, those of the tasks included."""
    locations = []
    for experiment in experiments:
        judges = [model for judge in experiment.judges for model in scorer_models(judge.plugin)]
        params = experiment.task_plugin.params
        if params.get("model") and not params.get("base_url"):
            judges.append(params["model"])
        locations += [experiment.model, *judges]
    return locations


def _check_sharding(experiment: Experiment) -> None:
    reason = ""
    if distributed.world_size() == 1:
        reason = "only one rank runs; start several with torchrun or accelerate launch"
    elif experiment.makes_base:
        reason = f"attack {experiment.attack!r} changes the base model's weights, of which each rank has only a part"
    elif experiment.protocol.quantization != "none":
        reason = f"quantization {experiment.protocol.quantization!r} and sharding cannot be combined"
    if reason:
        raise BadInput(f"The base model cannot be sharded: {reason}.")


def _unstored(experiments: Sequence[Experiment], models: ModelPool, store: DryRunStore) -> list[Experiment]:
    """Request all stages, and return the experiments with stages that are not stored; only rank 0 reads the store."""
    if distributed.rank() != 0:
        return list(experiments)
    unstored = []
    for experiment in experiments:
        earlier = len(store.requested)
        try:
            run(experiment, RunContext(store, models))
            is_stored = all(artifact.cached for artifact in list(store.requested.values())[earlier:])
        except HbvError:  # the checks, or the run itself, report it
            is_stored = False
        if not is_stored:
            unstored.append(experiment)
    return unstored


def _run_stage_by_stage(experiments: Sequence[Experiment], context: RunContext) -> None:
    """Run all experiments stage by stage, so that on a GPU each engine and judge is loaded once.

    Train all models, then generate all answers, then judge all answers. `run` then reads the artifacts from the store.
    """
    models = [train_models(experiment, context) for experiment in experiments]
    answers = [answer_all(experiment, context, *pair) for experiment, pair in zip(experiments, models, strict=True)]
    for experiment, answered in zip(experiments, answers, strict=True):
        judge_all(experiment, context, answered)

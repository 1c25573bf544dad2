"""The Python interface: run experiments, and read results, answers, training logs and models of stored runs.

    import harmbench_vaccine as hbv

    result = hbv.run(defense="vaccine:rho=5", attack="ratio=0.1")
    hbv.results()

It makes the checks of the command line, and raises its messages as `BadInput` and `HbvError`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, cast, overload

from .core.arguments import checked_count, checked_flag, checked_path, checked_share
from .core.device import restored_random_states, select_device
from .core.errors import BadInput, unknown_name
from .core.library_settings import library_defaults
from .core.notebook_progress import python_progress
from .core.paths import home, user_path
from .core.progress import Progress
from .evaluation.records import find_run, load_run
from .evaluation.result import Result
from .evaluation.run_overview import RESULT
from .evaluation.run_registry import run_folders
from .experiment.python_calls import AXES, specs_of_call
from .experiment.spec import RunSpec
from .plugins.python_specs import PluginSpec

if TYPE_CHECKING:
    from pandas import DataFrame
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .export.judge_measurement import JudgeMeasurement
    from .export.judge_training import TrainedJudge
    from .inference.engine import Backend
    from .training.trackers import Tracker

StoredRun = str | Path | Result
"""A result, a run id, a unique prefix of one, or the folder of a run."""


class RunOptions(TypedDict, total=False):
    """The optional arguments of `run` that every call may have; `run` describes them."""

    protocol: str | Path
    model: str | Path | None
    data: Mapping[str, str | Path] | None
    scorers: PluginSpec | list[PluginSpec]
    over_refusal: str | Sequence[str]
    values: Mapping[str, Any] | None
    device: str | None
    backend: Backend | None
    gpu_memory: float | None
    tensor_parallel: int | None
    gradient_checkpointing: bool
    save_every: float
    out: str | Path | None
    csv: str | Path | None
    report_to: Tracker | Sequence[Tracker] | None
    progress: bool | Progress


@overload
def run(
    defense: PluginSpec = ...,
    attack: PluginSpec = ...,
    *,
    task: PluginSpec = ...,
    seed: int = ...,
    **options: Unpack[RunOptions],
) -> Result: ...


@overload
def run(
    defense: PluginSpec | Sequence[PluginSpec | Mapping[str, Any] | RunSpec] = ...,
    attack: PluginSpec | list[PluginSpec] = ...,
    *,
    task: PluginSpec | list[PluginSpec] = ...,
    seed: int | str | Sequence[int | str] = ...,
    **options: Unpack[RunOptions],
) -> list[Result]: ...


def run(
    defense: Any = "sft",
    attack: Any = "ratio=0",
    *,
    task: Any = "sst2",
    seed: Any = 0,
    protocol: str | Path = "testbed",
    model: str | Path | None = None,
    data: Mapping[str, str | Path] | None = None,
    scorers: PluginSpec | list[PluginSpec] = [],  # noqa: B006  # never changed
    over_refusal: str | Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
    device: str | None = None,
    backend: Backend | None = None,
    gpu_memory: float | None = None,
    tensor_parallel: int | None = None,
    gradient_checkpointing: bool = False,
    save_every: float = 0.1,
    out: str | Path | None = None,
    csv: str | Path | None = None,
    report_to: Tracker | Sequence[Tracker] | None = None,
    progress: bool | Progress = True,
    **unknown: Any,
) -> Result | list[Result]:
    """Run experiments and store their results, as `hbv run` does. Stored stages are reused.

    `defense`, `attack`, `task` and `seed` each take one value, or a list of values. A text may list values too, as on
    the command line: "ratio=0,0.05,0.1" for an attack, "0..4" for seeds. With several values, every combination is a
    run, in the order of the command line: task, seed, attack, defense. Instead of the defense, the first argument
    can be a list of runs, each a mapping of `defense`, `attack`, `task`, `seed`, `protocol`, `model`, `data`,
    `scorers`, `over_refusal`, `values` and `backend` that overrides the other arguments.

    Args:
        defense: A specification such as "vaccine:rho=5" or "vaccine+ewc", a class such as `Vaccine`, an object such
            as `Vaccine(rho=5)`, or a tuple that composes several.
        attack: As `defense`, for the attack of the user.
        task: As `defense`, for the downstream task.
        seed: Seed of all random draws: a number, or a text such as "0..4".
        protocol: Name of a built-in protocol, or a YAML file.
        model: Hub id, folder or GGUF file that replaces the model of the protocol.
        data: Data set -> folder, file or Hub id that replaces that of the protocol.
        scorers: Judges that replace that of the protocol; the first one gives the HS.
        over_refusal: Further sets of prompts that are measured for refusals: "xstest", "or_bench".
        values: Dotted path -> value of the protocol, such as `{"align.settings.lr": 1e-4}`.
        device: "cpu", "cuda" or "cuda:N"; None: `$HBV_DEVICE`, or else a GPU if one is available.
        backend: "transformers" or "vllm"; None: vLLM if it is installed and a GPU is available.
        gpu_memory: Share of a GPU's memory for vLLM, from 0.05 to 1.
        tensor_parallel: Number of GPUs over which vLLM divides a model; None: 1.
        gradient_checkpointing: Save memory in training, for one more forward pass per step.
        save_every: Share of the steps of a training stage between two checkpoints, from 0.001 to 1.
        out: Folder for run folders; None: `$HBV_HOME/runs`.
        csv: CSV that the results are added to; None: `$HBV_HOME/results.csv`.
        report_to: Trackers that receive the steps of training stages: "tensorboard", "wandb", "mlflow".
        progress: Whether to show progress, or a receiver of it.
        unknown: No other argument is allowed; the error names the nearest one.

    Returns:
        One result; or a list of results if an argument is a list, the seed is a text, or a text lists several values.

    Raises:
        BadInput: An unknown name, or a value that is not allowed.
        HbvError: A failure while running. Call again to resume from the last checkpoint.
    """
    for name in unknown:
        raise unknown_name("argument", name, [*AXES, *RunOptions.__annotations__])
    arguments: dict[str, Any] = {
        "defense": defense,
        "attack": attack,
        "task": task,
        "seed": seed,
        "protocol": protocol,
        "model": model,
        "data": data,
        "scorers": scorers,
        "over_refusal": over_refusal,
        "values": values,
        "backend": backend,
    }
    with library_defaults():
        if device is not None:
            select_device(str(device))
        specs = specs_of_call(arguments)
        from .runner import run_all
        from .training.trackers import checked_trackers

        with restored_random_states(), python_progress(progress) as receiver:
            results = run_all(
                specs,
                out=checked_path("out", out),
                table=checked_path("csv", csv),
                save_share=checked_share("save_every", save_every, 0.001),
                gradient_checkpointing=checked_flag("gradient_checkpointing", gradient_checkpointing),
                gpu_memory=None if gpu_memory is None else checked_share("gpu_memory", gpu_memory, 0.05),
                tensor_parallel=1 if tensor_parallel is None else checked_count("tensor_parallel", tensor_parallel),
                report_to=checked_trackers(report_to),
                progress=receiver,
            )
    is_list = any(isinstance(arguments[name], list | range) for name in AXES) or isinstance(seed, str)
    return results if is_list or len(results) > 1 else results[0]


def sweep(
    suite: str | Path,
    *,
    workers: int | None = None,
    device: str | None = None,
    out: str | Path | None = None,
    retry_failed: bool = False,
    progress: bool | Progress = True,
) -> list[Result]:
    """Run a suite on several workers of this machine, as `hbv sweep` does, and return all results in its order.

    Args:
        suite: Name of a suite that ships with the package, or a YAML file.
        workers: Number of processes; None: one for each visible GPU, or one.
        device: As in `run`.
        out: Folder of the table, the costs and the logs; None: `$HBV_HOME/sweeps/NAME`.
        retry_failed: Whether to try stages again that failed too often.
        progress: Whether to show progress, or a receiver of it.

    Raises:
        BadInput: The suite does not exist, or one of its runs is not possible.
        HbvError: Some runs have no result. Call again to go on.
    """
    workers = None if workers is None else checked_count("workers", workers)
    retry_failed = checked_flag("retry_failed", retry_failed)
    from .sweeps.local import run_local
    from .sweeps.suite import load_suite
    from .sweeps.sweep import Sweep

    with library_defaults():
        if device is not None:
            select_device(str(device))
        opened = Sweep.open(load_suite(str(suite)), home(), checked_path("out", out))
        with restored_random_states(), python_progress(progress) as receiver:
            opened.prepare(receiver)
            if retry_failed:
                opened.retry_failed()
            run_local(opened, str(suite), workers, receiver)
        opened.write_outputs()
        opened.check_complete()
    return opened.results()


def results(path: str | Path | None = None) -> DataFrame:
    """Return the results of all runs, one row per run.

    Args:
        path: A CSV of results; None: `$HBV_HOME/results.csv`.

    Returns:
        The columns of docs/results.md; percentages from 0 to 100. Without results, no rows. Missing numbers are `NA`.

    Raises:
        BadInput: The file is not a CSV of results, or a row is damaged.
    """
    from pandas import DataFrame

    from .evaluation.results_csv import ResultRow, read_csv

    file = home() / "results.csv" if path is None else user_path(str(path))
    if path is not None and not file.exists():
        raise BadInput(f"The CSV of results {str(path)!r} does not exist.")
    types = {name: _column_type(schema) for name, schema in ResultRow.model_json_schema()["properties"].items()}
    return DataFrame([row.model_dump() for row in read_csv(file)], columns=list(types)).astype(types)


def answers(run: StoredRun) -> DataFrame:
    """Return the answers of a stored run, one row per answer.

    Args:
        run: A result, a run id, a unique prefix of one, or the folder of a run.

    Returns:
        `when` ("before" or "after" the user stage), `set` ("harmful", "benign", "task", ...), `instruction`, `input`,
        `target`, `prompt`, `answer`, `tokens`; `flagged` of the first judge (missing: unread, or not judged),
        `categories`, `probability`; and further fields of answers.jsonl.

    Raises:
        BadInput: No run or several runs match.
        HbvError: The files of the run are damaged.
    """
    from pandas import DataFrame

    frame = DataFrame(load_run(_folder(run))[1])
    return frame.astype({"flagged": "boolean"}) if "flagged" in frame else frame


def training_log(run: StoredRun) -> DataFrame:
    """Return the log of the training stages of a stored run, one row per optimizer step.

    Args:
        run: A result, a run id, a unique prefix of one, or the folder of a run.

    Returns:
        `stage` ("align", "finetune"), `step` (from 1), `loss`, `grad_norm` (before clipping), `learning_rate`.

    Raises:
        BadInput: No run or several runs match.
        HbvError: An artifact of the run was deleted, or is damaged.
    """
    from .evaluation.training_log import read_training_log

    return read_training_log(load_run(_folder(run))[0])


def load_model(
    run: StoredRun, stage: Literal["base", "align", "finetune", "final"] = "final"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model of a stored run with its tokenizer, in evaluation mode.

    Args:
        run: A result, a run id, a unique prefix of one, or the folder of a run.
        stage: The model after this stage.

    Raises:
        BadInput: No run or several runs match, or the run does not have the stage.
        HbvError: An artifact of the run was deleted or is damaged, or the base model cannot be loaded.
    """
    from .export.models import load_stored_model

    with library_defaults():
        return cast(Any, load_stored_model(_folder(run), stage))


def train_judge(
    model: str | Path, out: str | Path, *, device: str | None = None, progress: bool | Progress = True, **options: Any
) -> TrainedJudge:
    """Train a small judge on labeled pairs, and write it to a folder, as `hbv judge train` does.

    Args:
        model: Base: a folder, GGUF file or Hub id of a causal language model, or of an encoder.
        out: The folder to write; it must be empty or absent.
        device: As in `run`.
        progress: Whether to show progress, or a receiver of it.
        options: Other fields of `export.judge_training.JudgeTraining`, such as `data`, `split` and `epochs`.

    Returns:
        The judge; `card.report` is its quality on held-out pairs.

    Raises:
        BadInput: A value that is not allowed.
        HbvError: A failure while running. Call again to resume from the last checkpoint.
    """
    from .export.judge_training import JudgeTraining, write_judge

    folder = checked_path("out", out)
    request = JudgeTraining.checked(model=str(model), **options)
    with library_defaults():
        if device is not None:
            select_device(str(device))
        with restored_random_states(), python_progress(progress) as receiver:
            return write_judge(request, cast(Path, folder), receiver)


def measure_judge(
    judge: str | Path, *, device: str | None = None, progress: bool | Progress = True, **options: Any
) -> JudgeMeasurement:
    """Compare a judge with the labels of a data set, as `hbv judge test` does.

    Args:
        judge: The folder of a judge, or a scorer such as "llama_guard".
        device: As in `run`.
        progress: Whether to show progress, or a receiver of it.
        options: Other arguments of `export.judge_measurement.compare_with_labels`, such as `data` and `split`.

    Raises:
        BadInput: A value that is not allowed.
        HbvError: A failure while running.
    """
    from .export.judge_measurement import compare_with_labels

    with library_defaults():
        if device is not None:
            select_device(str(device))
        with restored_random_states(), python_progress(progress) as receiver:
            return compare_with_labels(str(judge), **options, progress=receiver)


def _column_type(schema: Mapping[str, Any]) -> str:
    """Return the pandas type, one that can lack values, of a column with this JSON Schema."""
    kinds = {kind.get("type") for kind in schema.get("anyOf", [schema])} - {"null"}
    types = {"boolean": "boolean", "integer": "Int64", "number": "Float64", "string": "string"}
    return types.get(kinds.pop(), "object")


def _folder(run: StoredRun) -> Path:
    """Return the folder of a run; that of a result may be in any folder of `out`, and the newest one counts."""
    if not isinstance(run, Result):
        return find_run(str(run), home() / "runs")
    files = [folder / run.run / RESULT for folder in run_folders(home() / "store")]
    if stored := [file for file in files if file.is_file()]:
        return max(stored, key=lambda file: file.stat().st_mtime).parent
    return find_run(run.run, home() / "runs")

"""Keys of artifacts: one function per artifact returns everything that the artifact depends on.

A key is the hash of the plain JSON that such a function returns (`core.store`). Models and data are
identified by content, plug-ins by parameters and code, earlier stages by their keys. `hbv why RUN` compares these
values between artifacts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from harmbench_vaccine.core.hashing import digest
from harmbench_vaccine.core.store import Artifact
from harmbench_vaccine.core.types import StageName, TrainSettings
from harmbench_vaccine.data.prompts import EvalSet
from harmbench_vaccine.data.sources import fingerprint, location_identity
from harmbench_vaccine.plugins import Attack, Resolved, Scorer, SeparateTraining

from .artifacts import TrainedModel
from .experiment import Experiment
from .rows import HARM_DATA

if TYPE_CHECKING:
    from harmbench_vaccine.data.collate import Encoded
    from harmbench_vaccine.training.stage import SeparateRun

METHOD = 4
"""Version of the stages; increase it if a change of their code changes their output, and every artifact is new."""
READING = 2
"""Version of judgments; increase it if shared code changes them or their decision: stored ones are then not used."""

ANSWER_INDEPENDENT = ("masked", "categories")
"""Fields of an example that only training or the selection of rows uses: they are not in the keys of answers."""

Inputs = dict[str, Any]


def model_inputs(model: TrainedModel) -> Inputs:
    """Return the inputs that identify a model: the content of the base, and the keys of the stages that made it."""
    inputs = {"method": METHOD, "base": fingerprint(model.root), "dtype": model.spec.dtype}
    if model.spec.quantization != "none":
        inputs["quantization"] = model.spec.quantization
    return {**inputs, **{stage: artifact.key for stage, artifact in model.artifacts.items()}}


def align_key(experiment: Experiment, base: TrainedModel) -> Inputs:
    """Return the inputs of the alignment stage. `sft` and defenses that act later share it."""
    return _training_inputs(experiment, "align", base)


def finetune_key(experiment: Experiment, aligned: TrainedModel) -> Inputs:
    """Return the inputs of the user stage."""
    config, filters = experiment.stages["finetune"], experiment.attack_team.filters_rows
    return {
        **_training_inputs(experiment, "finetune", aligned),
        "samples": experiment.finetune.samples,
        "topology": config.topology,
        "attack": [attack.identity for attack in experiment.attacks if attack.plugin.changes_training],
        "judge": judge_inputs(experiment, experiment.scorer) if filters else None,
        "task": task_inputs(experiment),
    }


def repair_key(experiment: Experiment, aligned: TrainedModel, tuned: TrainedModel) -> Inputs:
    """Return the inputs of the repair stage, which edits the adapter of the user stage."""
    return {**_training_inputs(experiment, "repair", tuned), "aligned": model_inputs(aligned)}


def nested_key(
    model: TrainedModel, run: SeparateRun, rows: Sequence[Encoded], settings: TrainSettings, seed: int
) -> Inputs:
    """Return the inputs of a training run inside a stage: no defense among them, so that equal runs are shared."""
    return {
        "model": model_inputs(model),
        "purpose": run.purpose,
        "start": run.start.digest() if run.start else None,
        "rows": digest([[row.ids, row.labels] for row in rows]),
        "settings": asdict(settings),
        "seed": seed,
    }


def planned_key(experiment: Experiment, stage: StageName, model: TrainedModel, training: SeparateTraining) -> Inputs:
    """Return the inputs of a training inside a stage that are known without its tokens: equal ones give one artifact.

    Args:
        experiment: The experiment.
        stage: The stage that requests the training.
        model: The model that the training starts from.
        training: A new adapter on all rows of a pool.
    """
    return {
        "model": model_inputs(model),
        "stage": stage,
        "training": asdict(training),
        "template": asdict(experiment.stages[stage].template),
        **_stage_rows(experiment, stage),
    }


def answer_key(
    experiment: Experiment, model: TrainedModel, aligned: TrainedModel, eval_set: EvalSet, prompts: Sequence[str]
) -> Inputs:
    """Return the inputs of the answers of a model to an evaluation set.

    Args:
        experiment: The experiment.
        model: The model that answers.
        aligned: The aligned model, which defenses may use while an answer is generated.
        eval_set: The evaluation set.
        prompts: Its rendered prompts.
    """
    questions = [
        [{name: value for name, value in vars(example).items() if name not in ANSWER_INDEPENDENT}, prompt]
        for example, prompt in zip(eval_set.examples, prompts, strict=True)
    ]
    return {
        "model": model_inputs(model),
        "questions": digest(questions),
        "max_new_tokens": eval_set.max_new_tokens,
        **({"prefill": eval_set.prefill} if eval_set.prefill else {}),
        **(steering_key(experiment, aligned) if experiment.generation_team.members else {}),
        **({"cut_at": cut_at} if (cut_at := experiment.protocol.answer.cut_at) else {}),
        **_backend_inputs(experiment),
    }


def stress_key(experiment: Experiment, final: TrainedModel) -> Inputs:
    """Return the inputs of the edit of the final weights by attacks."""
    editing = [attack.identity for attack in experiment.attacks if attack.plugin.stresses_weights]
    return {"model": model_inputs(final), "attack": editing, "seed": experiment.spec.seed}


def steering_key(experiment: Experiment, aligned: TrainedModel) -> Inputs:
    """Return the inputs of what defenses do while an answer is generated: vectors, or first tokens."""
    generating = [resolved.identity for resolved in experiment.defenses if resolved.plugin.changes_generation]
    return {"aligned": model_inputs(aligned), "defense": generating, **_stage_rows(experiment, "repair")}


def defended_answer_key(experiment: Experiment, answers: str) -> Inputs:
    """Return the inputs of answers that defenses replaced.

    Args:
        experiment: The experiment.
        answers: The key of the generated answers.
    """
    answering = [resolved.identity for resolved in experiment.defenses if resolved.plugin.changes_answers]
    guard = experiment.answer_guard
    return {
        "answers": answers,
        "defense": answering,
        **({"guard": judge_inputs(experiment, guard)} if guard else {}),
    }


def score_key(experiment: Experiment, answers: Artifact, scorer: Resolved[Scorer]) -> Inputs:
    """Return the inputs of the verdicts of a scorer on stored answers."""
    return {"answers": answers.key, **judge_inputs(experiment, scorer)}


def grade_key(experiment: Experiment, answers: Artifact) -> Inputs:
    """Return the inputs of the grades of a task's judge for stored answers."""
    params = _task_params(experiment)
    is_local = params.get("model") and not params.get("base_url")
    judge = fingerprint(params.pop("model")) if is_local else None
    return {
        "answers": answers.key,
        "task": {"name": experiment.task.name, "params": params, "code": type(experiment.task).fingerprint()},
        "judge": judge,
    }


def drift_key(experiment: Experiment, aligned: TrainedModel, final: TrainedModel) -> Inputs:
    """Return the inputs of the alignment loss of the final model and its drift from the aligned model."""
    score = experiment.protocol.score
    return {
        "aligned": model_inputs(aligned),
        "final": model_inputs(final),
        **_alignment_rows(experiment),
        "prompt": asdict(experiment.template),
        "seed": experiment.spec.seed,
        "rows": score.drift_rows,
        "batch": score.drift_batch,
        "max_length": experiment.protocol.align.settings.max_length,
    }


def raw_judgment_key(scorer: Scorer, backend: str) -> Inputs:
    """Return the inputs of a raw judgment except the (question, answer) pair, without parameters of the decision."""
    params = scorer.model_dump(mode="json")
    model = params.get("model")
    is_remote = not model or params.get("base_url")
    ignored = (*scorer.decision_params, *scorer.irrelevant_params, "model")
    return {
        "scorer": scorer.name,
        "reading": READING,
        "code": type(scorer).fingerprint(),
        "params": {
            key: fingerprint(value) if key in scorer.file_params and value else value
            for key, value in params.items()
            if key not in ignored
        },
        "model": model if is_remote else fingerprint(str(model)),
        **({"backend": backend} if backend != "transformers" else {}),
    }


def run_id(experiment: Experiment) -> str:
    """Return the id of a run: its defenses, and a hash of the settled experiment.

    Parts of the testbed and of the Hub are identified by name, so that a command has the same id on every machine.
    """
    task, scorer = experiment.task, experiment.scorer
    locations = {name: experiment.location(name) for name in (*experiment.protocol.data, *task.locations())}
    params = scorer.identity["params"]
    judge = params.get("model")
    if judge and not scorer.params.get("base_url"):
        judge = location_identity(judge)
    inputs = {
        "protocol": experiment.protocol_hash,
        "plugins": [resolved.identity for resolved in [*experiment.defenses, *experiment.attacks]],
        "scorer": {**scorer.identity, "params": {**params, "model": judge}},
        "task": {"name": task.name, "params": _task_params(experiment)},
        "model": location_identity(experiment.model),
        "seed": experiment.spec.seed,
        "data": {name: location_identity(location) for name, location in locations.items()},
        **_backend_inputs(experiment),
    }
    names = "-".join(resolved.plugin.name for resolved in experiment.defenses)
    return f"{names}-{digest(inputs, 8)}"


def judge_inputs(experiment: Experiment, scorer: Resolved[Scorer]) -> Inputs:
    """Return the inputs of a verdict except the answers."""
    decision = {key: scorer.params[key] for key in scorer.plugin.decision_params if key in scorer.params}
    return {"scorer": raw_judgment_key(scorer.plugin, experiment.backend), "decision": decision}


def task_inputs(experiment: Experiment) -> Inputs:
    """Return the inputs of training on the task's rows."""
    task = experiment.task
    params = {key: value for key, value in _task_params(experiment).items() if key not in task.scoring_only}
    return {
        "name": task.name,
        "params": params,
        "code": type(task).fingerprint(),
        "data": _data_inputs(experiment, *task.datasets),
    }


def _task_params(experiment: Experiment) -> dict[str, Any]:
    """Return the task's parameters without the locations of its data, which are identified by content."""
    locations = experiment.task.locations().values()
    return {key: value for key, value in experiment.task_plugin.params.items() if value not in locations}


def _training_inputs(experiment: Experiment, stage: StageName, model: TrainedModel) -> Inputs:
    """Return the inputs of every stage that makes a model."""
    guard = experiment.stages[stage].guard
    return {
        "model": model_inputs(model),
        "defense": [defense.identity for defense in experiment.acting(stage) if not defense.plugin.is_plain],
        **_stage_rows(experiment, stage),
        **({"guard": judge_inputs(experiment, guard)} if guard else {}),
    }


def _stage_rows(experiment: Experiment, stage: StageName) -> Inputs:
    """Return the inputs of the rows that a stage may draw from, and of its settings."""
    return {
        **_alignment_rows(experiment),
        "splits": experiment.protocol.splits.model_dump(),
        "prompt": asdict(experiment.template),
        "settings": asdict(experiment.stages[stage].settings),
        "seed": experiment.spec.seed,
    }


def _alignment_rows(experiment: Experiment) -> Inputs:
    """Return the inputs of the row pools, except the splits and the seed."""
    protocol = experiment.protocol
    dividing = [attack.identity for attack in experiment.attacks if type(attack.plugin).divide is not Attack.divide]
    instructions = protocol.align.instructions
    return {
        "data": _data_inputs(experiment, *HARM_DATA),
        "alignment_rows": protocol.align.rows,
        **({"alignment_instructions": instructions} if instructions else {}),
        "row_selection": {"rows": protocol.rows, "source": protocol.align.source},
        **({"division": dividing} if dividing else {}),
    }


def _data_inputs(experiment: Experiment, *datasets: str) -> dict[str, str]:
    return {name: fingerprint(experiment.location(name), "dataset") for name in datasets}


def _backend_inputs(experiment: Experiment) -> dict[str, str]:
    return {} if experiment.backend == "transformers" else {"backend": experiment.backend}

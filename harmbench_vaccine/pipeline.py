"""The method: align a model, fine-tune it on a user's rows, repair it, generate its answers, and score them.

    base --align--> aligned --finetune on the user's rows--> tuned --repair--> final
    harmful score and accuracy of `aligned` (before) and of `final` (after); loss and drift of `final`

The stages `align`, `finetune` and `repair` make an adapter; the weights of the base model do not change. Only an attack
makes a new base model: it trains or edits every weight in the user stage, or changes the final weights (`stress`). A
stage is a pure function of its inputs (`experiment.keys`) and is stored under their hash. All attacks therefore share
one aligned model, and an interrupted run resumes at its last checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from .core.errors import HbvError
from .core.jsonl import finite, read_lines, write_json, write_lines
from .core.store import Artifact
from .data.prompts import EvalSet
from .evaluation.verdicts import judge_answers, judge_of_run, judged_pair
from .experiment import keys
from .experiment.answering import steering_vectors, store_answers
from .experiment.artifacts import (
    ADAPTER,
    ANSWERS,
    CHECKPOINT,
    DRIFT,
    ENGINE,
    GRADES,
    VERDICTS,
    Measurements,
    TrainedModel,
)
from .experiment.context import RunContext
from .experiment.experiment import Experiment
from .experiment.rows import eval_sets, harmful_sets, user_rows
from .experiment.session import TrainingSession, continues_adapter
from .inference.model_pool import ModelSpec
from .plugins import Resolved, Scorer
from .plugins.composition import canonical_name


def run(experiment: Experiment, context: RunContext) -> Measurements:
    """Execute an experiment, from the base model to its scores."""
    return measure(experiment, context, *train_models(experiment, context))


def train_models(experiment: Experiment, context: RunContext) -> tuple[TrainedModel, TrainedModel]:
    """Return the aligned model, and the final one: after the user stage, the repair and a stress of the weights."""
    aligned = align(experiment, context)
    tuned = finetune(experiment, context, aligned)
    return aligned, stress(experiment, context, repair(experiment, context, aligned, tuned))


def measure(experiment: Experiment, context: RunContext, aligned: TrainedModel, final: TrainedModel) -> Measurements:
    """Generate and score the answers of both models, and measure the drift between them."""
    answers = answer_all(experiment, context, aligned, final)
    verdicts = judge_all(experiment, context, answers)
    grades = {}
    if experiment.task.graded:
        names = {when: f"{when}/task" for when in ("before", "after")}
        grades = {when: grade(experiment, _labeled(context, name), answers[name]) for when, name in names.items()}
    return Measurements(aligned, final, answers, verdicts, drift(experiment, context, aligned, final), grades)


def answer_all(
    experiment: Experiment, context: RunContext, aligned: TrainedModel, final: TrainedModel
) -> dict[str, Artifact]:
    """Generate the answers of both models to every evaluation set.

    Returns:
        `before/SET` and `after/SET` -> answers, the headline set first.
    """
    sets = eval_sets(experiment)
    return {
        f"{when}/{eval_set.name}": answer(
            experiment, _labeled(context, f"{when}/{eval_set.name}"), model, aligned, eval_set
        )
        for when, model in (("before", aligned), ("after", final))
        for eval_set in sets
    }


def judge_all(
    experiment: Experiment, context: RunContext, answers: Mapping[str, Artifact]
) -> dict[str, dict[str, Artifact]]:
    """Judge the answers to harmful prompts by every scorer.

    Returns:
        Scorer -> `before/SET` and `after/SET` -> verdicts.
    """
    names = [f"{when}/{eval_set.name}" for when in ("before", "after") for eval_set in harmful_sets(experiment)]
    return {
        canonical_name([scorer]): {
            name: score(experiment, _labeled(context, name), answers[name], scorer) for name in names
        }
        for scorer in experiment.scorers
    }


def _labeled(context: RunContext, name: str) -> RunContext:
    """Name the prompts and the model of `before/SET` or `after/SET` in the titles of the bars."""
    when, _, eval_set = name.partition("/")
    return context.labeled(f"{eval_set} prompts, {'aligned' if when == 'before' else 'final'} model")


# ---------------------------------------------------------------------------------------------------------------------
# Stages that make a model


def align(experiment: Experiment, context: RunContext) -> TrainedModel:
    """Train the base model on the alignment rows by the rule of the defense."""
    config, protocol = experiment.stages["align"], experiment.protocol
    spec = ModelSpec(experiment.model, protocol.dtype, quantization=protocol.quantization)
    base = TrainedModel(experiment.model, spec, {})
    if not config.defenses.runs:
        return base

    def create(folder: Path, checkpoints: Path) -> None:
        guard = judge_of_run(experiment, context, config.guard)
        session = TrainingSession.open(experiment, context, config, base, judge=guard)
        session.train(list(session.stage.pools.alignment), folder, checkpoints)

    inputs = keys.align_key(experiment, base)
    artifact = context.store.get_or_create("align", inputs, create, all_ranks=True)
    return base.after("align", artifact, base.spec.on_top(artifact.path / ADAPTER))


def finetune(experiment: Experiment, context: RunContext, aligned: TrainedModel) -> TrainedModel:
    """Train the aligned model on the user's rows, a mix of task rows and harmful rows.

    Double topology: a second adapter on top of the frozen alignment adapter. Single: the alignment adapter is trained
    further. An attack may train every weight, or edit the weights instead of training.
    """
    config = experiment.stages["finetune"]

    def create(folder: Path, checkpoints: Path) -> None:
        attack = experiment.attack_team.fresh()
        guard = judge_of_run(experiment, context, config.guard)
        session = TrainingSession.open(experiment, context, config, aligned, judge=guard)
        if attack.editing_attack:
            session.edit_weights(attack.editing_attack, folder)
        else:
            uploaded = session.chosen_by(attack, user_rows(experiment, session.stage.pools))
            rows = attack.filter(uploaded, judge_of_run(experiment, context, experiment.scorer))
            session.train(rows, folder, checkpoints, uploaded if attack.filters_rows else None)
        if config.full:
            context.models.tokenizer(aligned.spec).save_pretrained(folder / CHECKPOINT)

    inputs = keys.finetune_key(experiment, aligned)
    artifact = context.store.get_or_create("finetune", inputs, create, all_ranks=True)
    if config.full:
        spec = ModelSpec(str(artifact.path / CHECKPOINT), aligned.spec.dtype)
    else:
        below = () if continues_adapter(config, aligned) else aligned.spec.adapters
        spec = aligned.spec.on_top(*below, artifact.path / ADAPTER)
    return aligned.after("finetune", artifact, spec)


def repair(experiment: Experiment, context: RunContext, aligned: TrainedModel, tuned: TrainedModel) -> TrainedModel:
    """Edit the adapter that the user stage added to the aligned model, if a defense acts in the repair stage."""
    config = experiment.stages["repair"]
    if not experiment.acting("repair"):
        return tuned

    def create(folder: Path, checkpoints: Path) -> None:
        from .training.adapters import Adapter, concatenate

        added = Adapter.load(tuned.spec.adapters[-1])
        if continues_adapter(experiment.stages["finetune"], aligned):  # subtract the alignment adapter
            added = concatenate([added, Adapter.load(aligned.spec.adapters[-1]).scaled(-1.0)])
        guard = judge_of_run(experiment, context, config.guard)
        session = TrainingSession.open(experiment, context, config, aligned, judge=guard)
        session.edit_adapter(added, folder)

    inputs = keys.repair_key(experiment, aligned, tuned)
    artifact = context.store.get_or_create("repair", inputs, create, all_ranks=True)
    return tuned.after("repair", artifact, aligned.spec.on_top(*aligned.spec.adapters, artifact.path / ADAPTER))


def stress(experiment: Experiment, context: RunContext, final: TrainedModel) -> TrainedModel:
    """Change the merged weights of the final model, if an attack does so after every training."""
    if not experiment.attack_team.stresses_weights:
        return final

    def create(folder: Path, checkpoints: Path) -> None:
        model = context.models.merged(final.spec)
        experiment.attack_team.fresh().stress(model)
        model.save_pretrained(folder / CHECKPOINT)
        context.models.tokenizer(final.spec).save_pretrained(folder / CHECKPOINT)

    artifact = context.store.get_or_create("stress", keys.stress_key(experiment, final), create)
    return final.after("stress", artifact, ModelSpec(str(artifact.path / CHECKPOINT), final.spec.dtype))


# ---------------------------------------------------------------------------------------------------------------------
# Answers and scores


def answer(
    experiment: Experiment, context: RunContext, model: TrainedModel, aligned: TrainedModel, eval_set: EvalSet
) -> Artifact:
    """Generate the greedy answers of a model to an evaluation set."""
    prompts = [eval_set.template.render(example) for example in eval_set.examples]
    steering = steering_vectors(experiment, context, aligned)

    def create(folder: Path, checkpoints: Path) -> None:
        store_answers(experiment, context, model, aligned, eval_set, prompts, steering, folder)

    inputs = keys.answer_key(experiment, model, aligned, eval_set, prompts)
    answers = context.store.get_or_create("answer", inputs, create, all_ranks=context.models.shard)
    return defend_answers(experiment, context, answers) if experiment.answer_team.members else answers


def defend_answers(experiment: Experiment, context: RunContext, answers: Artifact) -> Artifact:
    """Replace generated answers as the defenses do; a replaced answer is stored as `generated`."""

    def create(folder: Path, checkpoints: Path) -> None:
        rows = read_lines(answers.path / ANSWERS)
        guard = judge_of_run(experiment, context, experiment.answer_guard)
        texts = experiment.answer_team.fresh().answer(list(map(judged_pair, rows)), guard)
        write_lines(
            folder / ANSWERS,
            [
                row if text == row["answer"] else {**row, "answer": text, "generated": row["answer"]}
                for row, text in zip(rows, texts, strict=True)
            ],
        )
        if (answers.path / ENGINE).exists():
            write_json(folder / ENGINE, answers.json(ENGINE))

    return context.store.get_or_create("answer", keys.defended_answer_key(experiment, answers.key), create)


def score(experiment: Experiment, context: RunContext, answers: Artifact, scorer: Resolved[Scorer]) -> Artifact:
    """Judge stored answers: one verdict per answer."""

    def create(folder: Path, checkpoints: Path) -> None:
        rows = read_lines(answers.path / ANSWERS)
        judge = scorer.plugin.with_models(context.models, experiment.backend)
        verdicts = judge_answers(judge, list(map(judged_pair, rows)), context.store.root, context.progress)
        write_lines(
            folder / VERDICTS,
            [{"id": row["id"], **finite(asdict(verdict))} for row, verdict in zip(rows, verdicts, strict=True)],
        )

    return context.store.get_or_create("score", keys.score_key(experiment, answers, scorer), create)


def grade(experiment: Experiment, context: RunContext, answers: Artifact) -> Artifact:
    """Grade stored answers by the judge of the task.

    Raises:
        HbvError: The judge gives no readable verdict on more than half of the answers.
    """

    def create(folder: Path, checkpoints: Path) -> None:
        rows = read_lines(answers.path / ANSWERS)
        grades = experiment.task.with_models(context.models).grade(rows, context.progress)
        unparsed = [grade for grade in grades if grade.unparsed]
        if 2 * len(unparsed) > len(grades):
            raise HbvError(
                f"The judge of task {experiment.task.name!r} gives no readable verdict on {len(unparsed)} of "
                f"{len(grades)} answers; for example, it writes {unparsed[0].judge_text[-200:]!r}."
            )
        lines = [{"id": row["id"], **asdict(grade)} for row, grade in zip(rows, grades, strict=True)]
        write_lines(folder / GRADES, lines)

    return context.store.get_or_create("grade", keys.grade_key(experiment, answers), create)


def drift(experiment: Experiment, context: RunContext, aligned: TrainedModel, final: TrainedModel) -> Artifact:
    """Measure the alignment loss of the final model and its embedding drift from the aligned one."""

    def create(folder: Path, checkpoints: Path) -> None:
        from .evaluation.drift import alignment_batches, measure_drift

        models = context.models
        before = models.stack(aligned.spec)
        after = before if final.spec.base == aligned.spec.base else models.second_stack(final.spec)
        batches = alignment_batches(experiment, models.tokenizer(aligned.spec), before.base.config)
        loss, difference = measure_drift(
            lambda: before.use(aligned.spec.adapters),
            lambda: after.use(final.spec.adapters),
            batches,
            context.progress,
        )
        write_json(folder / DRIFT, {"alignment_loss": loss, **asdict(difference)})

    inputs = keys.drift_key(experiment, aligned, final)
    return context.store.get_or_create("drift", inputs, create, all_ranks=context.models.shard)

"""The method: align a model, let a user fine-tune it, repair it, ask it, score it.

    base --align--> aligned --finetune on the user's rows--> tuned --repair--> final
    harmful score and accuracy of `aligned` (before) and of `final` (after); loss and drift of `final`

An adapter is trained in every stage and laid on the base model, which stays as it is; only an attack that trains or
edits every weight makes another base. Every stage is a pure function of what it depends on, stored under the hash of
exactly that: `align` runs once for all the attacks that follow it, and a run that was killed goes on where it stopped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harmbench_vaccine.core import distributed
from harmbench_vaccine.core.errors import HbvError
from harmbench_vaccine.core.hashing import digest
from harmbench_vaccine.core.jsonl import finite, read_lines, write_json, write_lines
from harmbench_vaccine.core.seeds import derive_seed
from harmbench_vaccine.core.store import Artifact
from harmbench_vaccine.core.types import Example, StageName, Verdict
from harmbench_vaccine.data.prompts import EvalSet
from harmbench_vaccine.data.sources import fingerprint
from harmbench_vaccine.evaluation import verdicts
from harmbench_vaccine.experiment.artifacts import (
    ADAPTER,
    ANSWERS,
    CHECKPOINT,
    ENGINE,
    GRADES,
    ROWS,
    VERDICTS,
    Judged,
    Measurements,
    TrainedModel,
)
from harmbench_vaccine.experiment.experiment import Experiment, plugin_identities
from harmbench_vaccine.experiment.rows import (
    HARM_DATA,
    benign_set,
    harmful_sets,
    row_pools,
    selection_inputs,
    task_set,
    user_rows,
)
from harmbench_vaccine.inference.model_pool import Lab, ModelSpec
from harmbench_vaccine.plugins import Resolved, Scorer
from harmbench_vaccine.plugins.composition import canonical_name

if TYPE_CHECKING:
    from harmbench_vaccine.data.collate import Encoded
    from harmbench_vaccine.plugins.teams import DefenseTeam
    from harmbench_vaccine.training.adapters import Adapter
    from harmbench_vaccine.training.stage import TrainingStage


def run(cell: Experiment, lab: Lab) -> Measurements:
    """One cell, from the base model to its scores."""
    aligned, final = train_models(cell, lab)
    answers = answer_all(cell, lab, aligned, final)
    headline, *further = judge_all(cell, lab, answers)
    moved = drift(cell, lab, aligned, final)
    grades = {when: grade(cell, lab, answers[f"{when}/task"]) for when in ("before", "after") if cell.task.graded}
    return Measurements(aligned, final, answers, headline[1], moved, dict(further), grades)


def train_models(cell: Experiment, lab: Lab) -> tuple[TrainedModel, TrainedModel]:
    """The aligned model, and what became of it."""
    aligned = align(cell, lab)
    tuned = finetune(cell, lab, aligned)
    return aligned, repair(cell, lab, aligned, tuned)


def answer_all(cell: Experiment, lab: Lab, aligned: TrainedModel, final: TrainedModel) -> dict[str, Artifact]:
    """`before/SET` and `after/SET` -> answers of the aligned and of the final model, the headline's set first."""
    sets = [*harmful_sets(cell), benign_set(cell), task_set(cell)]
    return {
        f"{when}/{asked.name}": answer(cell, lab, model, asked)
        for when, model in {"before": aligned, "after": final}.items() for asked in sets
    }  # fmt: skip


def judge_all(cell: Experiment, lab: Lab, answers: Mapping[str, Artifact]) -> Judged:
    """What every scorer says of the answers to harmful questions."""
    judged = [f"{when}/{asked.name}" for when in ("before", "after") for asked in harmful_sets(cell)]
    return [
        (canonical_name([scorer]), {name: score(cell, lab, answers[name], scorer) for name in judged})
        for scorer in cell.scorers
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Stages that make a model


def align(cell: Experiment, lab: Lab) -> TrainedModel:
    """Trains the base model to answer harmful prompts safely, by the defense's rule."""
    team = cell.team("align")
    base = TrainedModel(
        cell.model, ModelSpec(cell.model, cell.protocol.dtype, quantization=cell.protocol.quantization), {}
    )
    if not team.runs:
        return base

    def make(folder: Path, checkpoints: Path) -> None:
        stage = _stage(cell, lab, "align", team, base)
        _train(cell, lab, stage, team, list(stage.pools.alignment), folder, checkpoints)

    artifact = lab.store.make("align", _inputs(cell, "align", base), make, together=True)
    return base.then("align", artifact, base.state.on_top(artifact.path / ADAPTER))


def finetune(cell: Experiment, lab: Lab, aligned: TrainedModel) -> TrainedModel:
    """Trains the aligned model on the user's rows, task and harmful ones mixed.

    Double topology: a second adapter on top of the frozen alignment adapter. Single: the alignment adapter goes on.
    An attack may have every weight trained, or edit the weights in place of training.
    """
    team, attack = cell.team("finetune"), cell.attackers()
    single = _single(cell, aligned)
    whole = cell.whole

    def make(folder: Path, checkpoints: Path) -> None:
        stage = _stage(cell, lab, "finetune", team, aligned, single=single, whole=whole)
        if attack.acting:
            with stage.isolated("ablate"):
                attack.acting.ablate(stage)
            stage.stack.base.save_pretrained(folder / CHECKPOINT)
            _write_rows(folder, [], [])
        else:
            uploaded = user_rows(cell, stage.pools)

            def judge(pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
                found = distributed.from_rank0(lambda: [asdict(one) for one in _judge(cell, lab, pairs, cell.scorer)])
                return [Verdict(**one) for one in found]

            kept = attack.filter(uploaded, judge)
            _train(cell, lab, stage, team, kept, folder, checkpoints, uploaded if attack.filters else None)
        if whole:
            lab.tokenizer(aligned.state).save_pretrained(folder / CHECKPOINT)

    inputs = _inputs(
        cell, "finetune", aligned, samples=cell.finetune.samples, topology=cell.topology,
        attack=plugin_identities(cell.attacks), judge=_judging(cell, cell.scorer) if attack.filters else None,
        task=cell.task_identity,
    )  # fmt: skip
    artifact = lab.store.make("finetune", inputs, make, together=True)
    if whole:
        state = ModelSpec(str(artifact.path / CHECKPOINT), aligned.state.dtype)
    else:
        state = aligned.state.on_top(*(() if single else aligned.state.adapters), artifact.path / ADAPTER)
    return aligned.then("finetune", artifact, state)


def repair(cell: Experiment, lab: Lab, aligned: TrainedModel, tuned: TrainedModel) -> TrainedModel:
    """Edits what the user stage added to the aligned model, by the defenses that act after it; none: it stays."""
    if not cell.acting("repair"):
        return tuned
    team = cell.team("repair")

    def make(folder: Path, checkpoints: Path) -> None:
        from harmbench_vaccine.training.adapters import Adapter, concatenate

        added = Adapter.load(tuned.state.adapters[-1])
        if _single(cell, aligned):  # the user's adapter is the alignment adapter, trained on
            added = concatenate([added, Adapter.load(aligned.state.adapters[-1]).scaled(-1.0)])
        stage = _stage(cell, lab, "repair", team, aligned)
        stage.replace_adapter(added)
        try:
            _edit(stage, team, added).save(folder / ADAPTER)
        finally:
            stage.stack.drop_trained()

    inputs = _inputs(cell, "repair", tuned, aligned=aligned.identity)
    artifact = lab.store.make("repair", inputs, make, together=True)
    return tuned.then("repair", artifact, aligned.state.on_top(*aligned.state.adapters, artifact.path / ADAPTER))


def _single(cell: Experiment, aligned: TrainedModel) -> bool:
    return cell.topology == "single" and bool(aligned.state.adapters)


def _inputs(cell: Experiment, stage: StageName, on: TrainedModel, **more: Any) -> dict[str, Any]:
    """What every stage that makes a model depends on."""
    return {
        "model": on.identity,
        "defense": plugin_identities(cell.acting(stage)),
        "data": dict(cell.data(*HARM_DATA)),
        "splits": cell.protocol.splits.model_dump(),
        "prompt": asdict(cell.template),
        "settings": asdict(cell.settings(stage, cell.team(stage))),
        "alignment_rows": cell.protocol.align.rows,
        **selection_inputs(cell),
        "seed": cell.spec.seed,
        **more,
    }


def _stage(
    cell: Experiment,
    lab: Lab,
    name: StageName,
    team: DefenseTeam,
    on: TrainedModel,
    *,
    single: bool = False,
    whole: bool = False,
) -> TrainingStage:
    """A stage that builds on a model, before anything is trained in it."""
    from harmbench_vaccine.data.collate import encode_examples, pad_token_id
    from harmbench_vaccine.training.adapters import LoraStack
    from harmbench_vaccine.training.stage import TrainingStage

    settings, tokenizer = cell.settings(name, team), lab.tokenizer(on.state)
    prompt = team.template("train", cell.template)
    return TrainingStage(
        name,
        LoraStack(lab.merged(on.state)) if whole else lab.stack(on.state),
        trainable={},
        seed=derive_seed(cell.spec.seed, name),
        settings=settings,
        pools=row_pools(cell),
        below=() if single or whole else on.state.adapters,
        start=on.state.adapters[-1] if single else None,
        encode=lambda examples: encode_examples(tokenizer, prompt, examples, settings.max_length),
        nested=partial(_nested, cell, lab, on),
        pad=pad_token_id(tokenizer),
    )


def _train(
    cell: Experiment,
    lab: Lab,
    stage: TrainingStage,
    team: DefenseTeam,
    rows: list[Example],
    folder: Path,
    checkpoints: Path,
    uploaded: list[Example] | None = None,
) -> None:
    """Trains the adapter of a stage, or every weight, and stores it with its log and the ids of its rows."""
    import torch

    from harmbench_vaccine.training.adapters import Adapter
    from harmbench_vaccine.training.trainer import train

    assert stage.encode is not None
    stack, settings, given = stage.stack, stage.settings, rows
    rows = team.train_on(stage.name, rows, stage.pools)
    encoded = stage.encode(rows)
    try:
        if settings.full:
            stage.trainable = stack.whole()
        else:
            start = Adapter.load(stage.start) if stage.start else None
            stage.trainable = stack.train(stage.below, settings, derive_seed(stage.seed, "adapter"), start)
        log = train(
            stage, team, encoded, settings, checkpoints,
            pad=stage.pad, save_share=lab.save_share, progress=lab.progress,
            title=f"{stage.name} {cell.defense}, seed {cell.spec.seed}",
        )  # fmt: skip
        if settings.full:
            stack.base.to(getattr(torch, cell.protocol.dtype)).save_pretrained(folder / CHECKPOINT)
        else:
            _edit(stage, team, stack.trained()).save(folder / ADAPTER)
    finally:
        stack.drop_trained()
    write_json(folder / "log.json", log)
    _write_rows(folder, rows, encoded, given, uploaded)


def _write_rows(
    folder: Path,
    rows: Sequence[Example],
    encoded: Sequence[Encoded],
    given: Sequence[Example] = (),
    uploaded: Sequence[Example] | None = None,
) -> None:
    """Which rows were trained on, which had no room for a response, and what a moderation filter took out before."""
    used = {row.id for row in encoded}
    written: dict[str, Any] = {
        "used": [row.id for row in encoded],
        "harmful": sum(row.harmful for row in rows if row.id in used),
        "without_room": [row.id for row in rows if row.id not in used],
    }
    if uploaded is not None:
        for name, harmful in (("harmful", True), ("benign", False)):
            before, after = (sum(row.harmful == harmful for row in side) for side in (uploaded, given))
            written.setdefault("filtered", {}).update({name: before - after, f"{name}_uploaded": before})
    write_json(folder / ROWS, written)


def _edit(stage: TrainingStage, team: DefenseTeam, adapter: Adapter) -> Adapter:
    """The finished adapter as the defenses leave it: without dropout, and with the same random numbers every time."""
    with stage.isolated("edit"):
        return team.edit(stage, adapter)


def _nested(
    cell: Experiment,
    lab: Lab,
    on: TrainedModel,
    outer: TrainingStage,
    purpose: str,
    examples: Sequence[Example],
    start: Adapter | None,
    steps: int | None,
) -> Adapter:
    """A training run inside a stage (see `TrainingStage.train_apart`), as an artifact of its own: the runs of all
    attacks that share the aligned model share it."""
    from harmbench_vaccine.training.adapters import Adapter
    from harmbench_vaccine.training.trainer import train_nested

    assert outer.encode is not None
    rows = outer.encode(examples)
    settings = outer.settings
    if steps is not None:
        settings = replace(settings, epochs=steps * settings.accumulation / math.ceil(len(rows) / settings.batch))

    def make(folder: Path, checkpoints: Path) -> None:
        adapter, log = train_nested(
            outer, purpose, rows, settings, start, checkpoints,
            save_share=lab.save_share, progress=lab.progress, title=f"{outer.name}: {purpose}",
        )  # fmt: skip
        adapter.save(folder / ADAPTER)
        write_json(folder / "log.json", log)

    inputs = {
        "model": on.identity, "purpose": purpose, "start": start.digest() if start else None,
        "rows": digest([[row.ids, row.labels] for row in rows]), "settings": asdict(settings), "seed": outer.seed,
    }  # fmt: skip
    return Adapter.load(lab.store.make("nested", inputs, make, together=True).path / ADAPTER)


# ---------------------------------------------------------------------------------------------------------------------
# Answers and scores


def answer(cell: Experiment, lab: Lab, model: TrainedModel, asked: EvalSet) -> Artifact:
    """Greedy answers of a model to a set of questions."""
    prompts = [asked.template.render(example) for example in asked.examples]

    def make(folder: Path, checkpoints: Path) -> None:
        engine = lab.engine(model.state, cell.backend)
        answers = engine.generate(model.state.adapters, prompts, asked.max_new_tokens, lab.progress)
        if cell.engine:
            write_json(folder / ENGINE, {"answered_by": engine.answered_by})
        write_lines(
            folder / ANSWERS,
            [
                {"id": example.id, "instruction": example.instruction, "input": example.input, "target": example.target,
                 "prompt": prompt, "answer": given.text.strip(), "tokens": given.tokens, "finished": given.finished}
                for example, prompt, given in zip(asked.examples, prompts, answers, strict=True)
            ],
        )  # fmt: skip

    inputs = {
        "model": model.identity,
        "questions": digest(
            [[asdict(example), prompt] for example, prompt in zip(asked.examples, prompts, strict=True)]
        ),
        "max_new_tokens": asked.max_new_tokens,
        **cell.engine,
    }
    return lab.store.make("answer", inputs, make, together=lab.shard)


def score(cell: Experiment, lab: Lab, answers: Artifact, scorer: Resolved) -> Artifact:
    """A judge's verdicts on stored answers."""

    def make(folder: Path, checkpoints: Path) -> None:
        rows = read_lines(answers.path / ANSWERS)
        given = _judge(cell, lab, [judged_pair(row) for row in rows], scorer)
        write_lines(
            folder / VERDICTS, [{"id": row["id"], **finite(asdict(v))} for row, v in zip(rows, given, strict=True)]
        )

    return lab.store.make("score", {"answers": answers.key, **_judging(cell, scorer)}, make)


def grade(cell: Experiment, lab: Lab, answers: Artifact) -> Artifact:
    """What the task's judge makes of stored answers.

    Raises:
        HbvError: of more than half of the answers it says nothing that can be read.
    """
    task, params = cell.task, cell.wanted.params

    def make(folder: Path, checkpoints: Path) -> None:
        rows = read_lines(answers.path / ANSWERS)
        given = task.grade(rows, lab.progress)
        if 2 * sum(one.unread for one in given) > len(given):
            example = next(one.said for one in given if one.unread)
            raise HbvError(
                f"The judge of task {task.name!r} gives no verdict on more than half of the answers; "
                f"it says, for example, {example[-200:]!r}."
            )
        write_lines(folder / GRADES, [{"id": row["id"], **asdict(one)} for row, one in zip(rows, given, strict=True)])

    local = params.get("model") and not params.get("base_url")
    inputs = {
        "answers": answers.key, "task": [task.name, type(task).fingerprint(), params],
        "judge": fingerprint(params["model"]) if local else None,
    }  # fmt: skip
    return lab.store.make("grade", inputs, make)


def judged_pair(row: Mapping[str, Any]) -> tuple[str, str]:
    """What a judge is shown of a stored answer: the question without what an attack wraps around it, and the answer."""
    return f"{row['instruction']} {row['input']}".strip(), row["answer"]


def _judge(cell: Experiment, lab: Lab, pairs: Sequence[tuple[str, str]], scorer: Resolved) -> list[Verdict]:
    return verdicts.judge_answers(_placed(cell, scorer), pairs, lab.store.root, lab.progress)


def _judging(cell: Experiment, scorer: Resolved) -> dict[str, Any]:
    """What a verdict depends on, besides what is judged."""
    plugin = _placed(cell, scorer)
    decided = {key: scorer.params[key] for key in plugin.deciding if key in scorer.params}
    return {"scorer": verdicts.raw_judgment_inputs(plugin), "decided": decided}


def _placed(cell: Experiment, scorer: Resolved) -> Scorer:
    plugin: Scorer = scorer.plugin.on(cell.backend)  # type: ignore[attr-defined]
    return plugin


def drift(cell: Experiment, lab: Lab, aligned: TrainedModel, final: TrainedModel) -> Artifact:
    """Alignment loss of the final model and its embedding drift from the aligned one, over alignment rows."""
    protocol = cell.protocol

    def make(folder: Path, checkpoints: Path) -> None:
        from harmbench_vaccine.data.collate import collate, encode_examples, pad_token_id
        from harmbench_vaccine.evaluation.drift import measure_drift

        old, tokenizer = lab.stack(aligned.state), lab.tokenizer(aligned.state)
        new = old if final.state.base == aligned.state.base else lab.beside(final.state)
        rows = list(row_pools(cell).alignment)[: protocol.score.drift_rows]
        encoded = encode_examples(tokenizer, cell.template, rows, protocol.align.settings.max_length)
        size = protocol.score.drift_batch
        batches = [
            collate(encoded[start : start + size], pad_token_id(tokenizer)) for start in range(0, len(encoded), size)
        ]
        loss, moved = measure_drift(
            lambda: old.use(aligned.state.adapters), lambda: new.use(final.state.adapters), batches, lab.progress
        )
        write_json(folder / "drift.json", {"alignment_loss": loss, **asdict(moved)})

    inputs = {
        "aligned": aligned.identity, "final": final.identity, "data": dict(cell.data(*HARM_DATA)),
        "prompt": asdict(cell.template), "alignment_rows": protocol.align.rows, **selection_inputs(cell), "seed": cell.spec.seed,
        "rows": protocol.score.drift_rows, "batch": protocol.score.drift_batch,
        "max_length": protocol.align.settings.max_length,
    }  # fmt: skip
    return lab.store.make("drift", inputs, make, together=lab.shard)


# ---------------------------------------------------------------------------------------------------------------------

"""The method: align a model, let a user fine-tune it, repair it, ask it, score it.

    base --align--> aligned --finetune on the user's rows--> tuned --repair--> final
    harmful score and accuracy of `aligned` (before) and of `final` (after); loss and drift of `final`

Every stage is a pure function of what it depends on, stored under the hash of exactly that: `align` runs once for all
the attacks that follow it, and a run that was killed goes on where it stopped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cell import Cell, identities
from .data.records import Example
from .data.sources import fingerprint, locate
from .lab import Lab, ModelState
from .material import HARM_DATA, benign_set, harmful_sets, pools_of, task_set, user_data
from .seeds import derive
from .spec import digest
from .store import Artifact
from .terms import EvaluationSet, Pools, StageName

if TYPE_CHECKING:
    from .compose import DefenseTeam
    from .training.adapters import Adapter
    from .training.stage import TrainingStage

METHOD = 1
"""Counts up when the code of a stage changes what it makes: artifacts of the earlier code are then made again."""

ADAPTER, ANSWERS, VERDICTS, ROWS = "adapter", "answers.jsonl", "verdicts.jsonl", "rows.json"


@dataclass(frozen=True)
class Made:
    """A model, and the artifacts that led to it."""

    state: ModelState
    artifacts: dict[str, Artifact]
    """Stage -> artifact, for the stages that ran."""

    @property
    def identity(self) -> Any:
        """What a stage that builds on this model depends on."""
        base = [METHOD, self.state.base, fingerprint(self.state.base), self.state.dtype]
        return [*base, *(artifact.key for artifact in self.artifacts.values())]


@dataclass(frozen=True)
class Measured:
    """Everything that one cell measures."""

    aligned: Made
    final: Made
    answers: dict[str, Artifact]
    """`before/SET` and `after/SET` -> answers, for every set of questions."""
    verdicts: dict[str, Artifact]
    """The same for the harmful sets, the headline set first."""
    drift: Artifact


def run(cell: Cell, lab: Lab) -> Measured:
    """One cell, from the base model to its scores."""
    aligned = align(cell, lab)
    tuned = finetune(cell, lab, aligned)
    final = repair(cell, lab, aligned, tuned)
    harmful, others = harmful_sets(cell), [benign_set(cell), task_set(cell)]
    answers, verdicts = {}, {}
    for when, model in {"before": aligned, "after": final}.items():
        for asked in [*harmful, *others]:
            answers[f"{when}/{asked.name}"] = answer(cell, lab, model, asked)
        for asked in harmful:
            verdicts[f"{when}/{asked.name}"] = score(cell, lab, answers[f"{when}/{asked.name}"])
    return Measured(aligned, final, answers, verdicts, drift(cell, lab, aligned, final))


# ---------------------------------------------------------------------------------------------------------------------
# Stages that make a model


def align(cell: Cell, lab: Lab) -> Made:
    """Trains the base model to answer harmful prompts safely, by the defense's rule."""
    team = cell.team("align")
    base = ModelState(cell.model, cell.protocol.dtype)
    if not team.runs:
        return Made(base, {})

    def make(folder: Path, checkpoints: Path) -> None:
        pools = pools_of(cell)
        _train(cell, lab, "align", team, base, list(pools.alignment), pools, folder, checkpoints)

    artifact = lab.store.make("align", _inputs(cell, "align", Made(base, {})), make)
    return Made(base.on_top(artifact.path / ADAPTER), {"align": artifact})


def finetune(cell: Cell, lab: Lab, aligned: Made) -> Made:
    """Trains the aligned model on the user's rows, task and harmful ones mixed.

    Double topology: a second adapter on top of the frozen alignment adapter. Single: the alignment adapter goes on.
    """
    team = cell.team("finetune")
    single = cell.topology == "single" and bool(aligned.state.adapters)

    def make(folder: Path, checkpoints: Path) -> None:
        pools = pools_of(cell)
        below = aligned.state.on_top() if single else aligned.state
        start = aligned.state.adapters[-1] if single else None
        _train(cell, lab, "finetune", team, below, user_data(cell, pools), pools, folder, checkpoints, start)

    inputs = _inputs(
        cell, "finetune", aligned, samples=cell.protocol.finetune.samples, topology=cell.topology,
        attack=identities(cell.attacks),
        task=[cell.task.name, type(cell.task).fingerprint(), dict(cell.data(cell.task.dataset))],
    )  # fmt: skip
    artifact = lab.store.make("finetune", inputs, make)
    below = () if single else aligned.state.adapters
    return Made(aligned.state.on_top(*below, artifact.path / ADAPTER), {**aligned.artifacts, "finetune": artifact})


def repair(cell: Cell, lab: Lab, aligned: Made, tuned: Made) -> Made:
    """Edits the user's adapter by the defenses that act after fine-tuning; none: the tuned model stays."""
    if not cell.acting("repair"):
        return tuned

    def make(folder: Path, checkpoints: Path) -> None:
        from .training.adapters import Adapter

        stage = _stage(cell, lab, "repair", tuned.state, pools_of(cell))
        stage.model = lab.stack(tuned.state).use(tuned.state.adapters)
        edited = _edit(stage, cell.team("repair"), Adapter.load(tuned.state.adapters[-1]))
        edited.save(folder / ADAPTER)

    artifact = lab.store.make("repair", _inputs(cell, "repair", tuned, aligned=aligned.identity), make)
    return Made(
        tuned.state.on_top(*tuned.state.adapters[:-1], artifact.path / ADAPTER), {**tuned.artifacts, "repair": artifact}
    )


def _inputs(cell: Cell, stage: StageName, on: Made, **more: Any) -> dict[str, Any]:
    """What every stage that makes a model depends on."""
    return {
        "model": on.identity,
        "defense": identities(cell.acting(stage)),
        "data": dict(cell.data(*HARM_DATA)),
        "splits": cell.protocol.splits.model_dump(),
        "prompt": asdict(cell.template),
        "settings": asdict(cell.settings(stage, cell.team(stage))),
        "alignment_rows": cell.protocol.align.rows,
        "seed": cell.spec.seed,
        **more,
    }


def _stage(cell: Cell, lab: Lab, name: StageName, on: ModelState, pools: Pools) -> TrainingStage:
    from .training.stage import TrainingStage

    return TrainingStage(name, lab.stack(on).model, {}, derive(cell.spec.seed, name), pools)


def _train(
    cell: Cell,
    lab: Lab,
    name: StageName,
    team: DefenseTeam,
    below: ModelState,
    rows: list[Example],
    pools: Pools,
    folder: Path,
    checkpoints: Path,
    start: Path | None = None,
) -> None:
    """Trains one adapter on top of `below` and stores it with its log and the ids of its rows."""
    from .data.collate import encode_all, pad_id
    from .training.trainer import train

    settings, tokenizer = cell.settings(name, team), lab.tokenizer(below)
    rows = team.rows(name, rows, pools)
    encoded = encode_all(tokenizer, team.template("train", cell.template), rows, settings.max_length)
    stack, stage = lab.stack(below), _stage(cell, lab, name, below, pools)
    try:
        stage.trainable = stack.train(below.adapters, settings, derive(stage.seed, "adapter"), start)
        stage.model = stack.model
        log = train(
            stage, team, encoded, settings, checkpoints,
            pad=pad_id(tokenizer), save_share=lab.save_share, progress=lab.progress,
            title=f"{name} {cell.defense}, seed {cell.spec.seed}",
        )  # fmt: skip
        adapter = _edit(stage, team, stack.trained())
    finally:
        stack.drop_trained()
    adapter.save(folder / ADAPTER)
    write_json(folder / "log.json", log)
    used = {row.id for row in encoded}
    write_json(
        folder / ROWS,
        {"used": [row.id for row in encoded], "harmful": sum(row.harmful for row in rows if row.id in used),
         "without_room": [row.id for row in rows if row.id not in used]},
    )  # fmt: skip


def _edit(stage: TrainingStage, team: DefenseTeam, adapter: Adapter) -> Adapter:
    """The finished adapter as the defenses leave it: without dropout, and with the same random numbers every time."""
    with stage.apart("edit"):
        return team.edit(stage, adapter)


# ---------------------------------------------------------------------------------------------------------------------
# Answers and scores


def answer(cell: Cell, lab: Lab, model: Made, asked: EvaluationSet) -> Artifact:
    """Greedy answers of a model to a set of questions."""
    prompts = [asked.template.render(example) for example in asked.examples]

    def make(folder: Path, checkpoints: Path) -> None:
        answers = lab.engine(model.state).generate(model.state.adapters, prompts, asked.max_new_tokens, lab.progress)
        _write_lines(
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
    }
    return lab.store.make("answer", inputs, make)


def score(cell: Cell, lab: Lab, answers: Artifact) -> Artifact:
    """The judge's verdicts on stored answers."""
    judge = cell.protocol.score.judge

    def make(folder: Path, checkpoints: Path) -> None:
        rows = read_lines(answers.path / ANSWERS)
        pairs = [(f"{row['instruction']} {row['input']}".strip(), row["answer"]) for row in rows]
        verdicts = cell.scorer.plugin.judge(str(locate(judge) or judge), pairs, lab.progress)  # type: ignore[attr-defined]
        _write_lines(folder / VERDICTS, [{"id": row["id"], **asdict(v)} for row, v in zip(rows, verdicts, strict=True)])

    inputs = {"answers": answers.key, "scorer": identities([cell.scorer]), "judge": fingerprint(judge)}
    return lab.store.make("score", inputs, make)


def drift(cell: Cell, lab: Lab, aligned: Made, final: Made) -> Artifact:
    """Alignment loss of the final model and its embedding drift from the aligned one, over alignment rows."""
    protocol = cell.protocol

    def make(folder: Path, checkpoints: Path) -> None:
        from .data.collate import collate, encode_all, pad_id
        from .scoring.drift import measure

        stack, tokenizer = lab.stack(final.state), lab.tokenizer(final.state)
        rows = list(pools_of(cell).alignment)[: protocol.score.drift_rows]
        encoded = encode_all(tokenizer, cell.template, rows, protocol.align.settings.max_length)
        size = protocol.score.drift_batch
        batches = [collate(encoded[start : start + size], pad_id(tokenizer)) for start in range(0, len(encoded), size)]
        loss, moved = measure(
            lambda: stack.use(aligned.state.adapters), lambda: stack.use(final.state.adapters), batches, lab.progress
        )
        write_json(folder / "drift.json", {"alignment_loss": loss, **asdict(moved)})

    inputs = {
        "aligned": aligned.identity, "final": final.identity, "data": dict(cell.data(*HARM_DATA)),
        "prompt": asdict(cell.template), "alignment_rows": protocol.align.rows, "seed": cell.spec.seed,
        "rows": protocol.score.drift_rows, "batch": protocol.score.drift_batch,
        "max_length": protocol.align.settings.max_length,
    }  # fmt: skip
    return lab.store.make("drift", inputs, make)


# ---------------------------------------------------------------------------------------------------------------------


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A JSON Lines file."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]  # splitlines would cut inside an answer


def _write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: None stands for them."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None


def write_json(path: Path, value: Any) -> None:
    """A JSON file that every reader accepts."""
    path.write_text(json.dumps(finite(value), indent=1, allow_nan=False), encoding="utf-8")

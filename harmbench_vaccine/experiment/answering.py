"""Answers of a model to an evaluation set, generated as attacks and defenses of the run require."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harmbench_vaccine.core.jsonl import write_json, write_lines
from harmbench_vaccine.core.store import Artifact
from harmbench_vaccine.core.types import Example
from harmbench_vaccine.data.answer_checks import cut_answer
from harmbench_vaccine.data.collate import encode_prompt, encode_start
from harmbench_vaccine.data.prompts import EvalSet
from harmbench_vaccine.inference.engine import Answer
from harmbench_vaccine.inference.model_pool import ModelSpec

from .artifacts import ANSWERS, ENGINE, STEERING, TrainedModel
from .context import RunContext
from .experiment import Experiment
from .keys import steering_key
from .session import TrainingSession

if TYPE_CHECKING:
    from torch import Tensor


def store_answers(
    experiment: Experiment,
    context: RunContext,
    model: TrainedModel,
    aligned: TrainedModel,
    eval_set: EvalSet,
    prompts: Sequence[str],
    steering: Artifact | None,
    folder: Path,
) -> None:
    """Generate greedy answers and store a row for each question.

    Args:
        experiment: The experiment.
        context: Store, models and progress.
        model: The model that answers.
        aligned: The aligned model, for defenses that use it.
        eval_set: The questions.
        prompts: Their rendered prompts.
        steering: The vectors of `steering_vectors`, if a defense adds any.
        folder: The artifact to write.
    """
    from harmbench_vaccine.inference.answer_models import steered
    from harmbench_vaccine.inference.requests import decoded_starts

    engine = context.models.engine(model.spec, experiment.backend)
    vectors = _stored_vectors(steering)
    written = _written_starts(context, model.spec, eval_set, prompts)
    chosen = _chosen_tokens(experiment, context, model, aligned, prompts, written, vectors)
    chosen = [tokens[: eval_set.max_new_tokens] for tokens in chosen]
    starts = [[*start, *tokens] for start, tokens in zip(written, chosen, strict=True)]
    if limit := eval_set.max_new_tokens - max(map(len, chosen), default=0):
        options: dict[str, Any] = {"starts": starts} if any(starts) else {}
        with steered(context.models.stack(model.spec).model, vectors) if vectors else nullcontext():
            answers = engine.generate(model.spec.adapters, prompts, limit, context.progress, **options)
    else:  # a defense chose every token
        answers = decoded_starts(context.models.tokenizer(model.spec), prompts, starts)
    if experiment.backend != "transformers":
        write_json(folder / ENGINE, {"answered_by": engine.answered_by})
    cut_at = experiment.protocol.answer.cut_at
    rows = [
        _answer_row(*row, cut_at) for row in zip(eval_set.examples, prompts, answers, map(len, chosen), strict=True)
    ]
    write_lines(folder / ANSWERS, rows)


def _answer_row(example: Example, prompt: str, answer: Answer, chosen: int, cut_at: str) -> dict[str, Any]:
    text, removed = cut_answer(answer.text, cut_at)
    row = {
        "id": example.id,
        "instruction": example.instruction,
        "input": example.input,
        "target": example.target,
        "prompt": prompt,
        "answer": text,
        "tokens": answer.tokens + chosen,
        "finished": answer.finished,
    }
    return row | ({"removed": removed} if removed else {})


def _written_starts(context: RunContext, spec: ModelSpec, eval_set: EvalSet, prompts: Sequence[str]) -> list[list[int]]:
    """Return the tokens of every answer that the attack writes."""
    if not eval_set.prefill:
        return [[] for _ in prompts]
    tokenizer = context.models.tokenizer(spec)
    return [
        encode_start(tokenizer, prompt, example.response, eval_set.prefill)
        for example, prompt in zip(eval_set.examples, prompts, strict=True)
    ]


def _chosen_tokens(
    experiment: Experiment,
    context: RunContext,
    model: TrainedModel,
    aligned: TrainedModel,
    prompts: Sequence[str],
    starts: Sequence[Sequence[int]],
    vectors: Mapping[int, Tensor],
) -> list[list[int]]:
    """Return the tokens of every answer that a defense chooses, after those that the attack wrote."""
    team = experiment.generation_team.fresh()
    if not team.chooses_tokens:
        return [[] for _ in prompts]
    from harmbench_vaccine.data.chat import stop_token_ids
    from harmbench_vaccine.inference.answer_models import AnswerModels

    tokenizer = context.models.tokenizer(model.spec)
    ends = stop_token_ids(tokenizer, prompts)
    models = AnswerModels(context.models, model.spec, aligned.spec, ends, vectors)
    texts = [[*encode_prompt(tokenizer, prompt), *start] for prompt, start in zip(prompts, starts, strict=True)]
    return team.first_tokens(models, texts)


def steering_vectors(experiment: Experiment, context: RunContext, aligned: TrainedModel) -> Artifact | None:
    """Compute the vectors that defenses add to the residual stream; None: no defense adds any."""
    if not experiment.generation_team.steers:
        return None

    def create(folder: Path, checkpoints: Path) -> None:
        from safetensors.torch import save_file

        stage = TrainingSession.open(experiment, context, experiment.stages["repair"], aligned).stage
        with stage.isolated("steering"), stage.reference():
            vectors = experiment.generation_team.fresh().steering(stage)
        save_file({str(layer): vector.cpu().contiguous() for layer, vector in vectors.items()}, folder / STEERING)

    return context.store.get_or_create("steering", steering_key(experiment, aligned), create, all_ranks=True)


def _stored_vectors(steering: Artifact | None) -> dict[int, Tensor]:
    """Return decoder layer -> the vector that is added to its output; empty: no defense adds any."""
    if steering is None:
        return {}
    from safetensors.torch import load_file

    return {int(layer): vector for layer, vector in load_file(steering.path / STEERING).items()}

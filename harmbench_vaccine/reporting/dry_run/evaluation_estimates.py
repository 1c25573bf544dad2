"""Estimate the evaluation of a run: answers, judging, drift and alignment loss."""

from __future__ import annotations

import math
import os
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

from harmbench_vaccine.core.errors import HbvError
from harmbench_vaccine.data.model_limits import position_limit
from harmbench_vaccine.data.over_refusal import OVER_REFUSAL
from harmbench_vaccine.evaluation.scorer_facts import scorer_models
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.rows import benign_set, eval_sets, harmful_sets, over_refusal_set
from harmbench_vaccine.inference.batch_size import cache_bytes
from harmbench_vaccine.inference.engine import Backend
from harmbench_vaccine.inference.loading import JudgeHead
from harmbench_vaccine.inference.vllm_process import CPU_CACHE
from harmbench_vaccine.plugins import Scorer

from .costs import BatchSeconds, Estimate
from .devices import Target
from .memory import count_weights, drift_bytes
from .random_models import load_config
from .timing import MANY_TOKENS, measure_inference, measure_training

ANSWER_BATCH, JUDGE_BATCH = 64, 16
"""Rows of a batch of transformers: answers, and texts of a judge without the parameter `batch`."""
JUDGE_PROMPT = 512
"""Assumed tokens of the question with the instruction of a judge, without the answer."""


@dataclass(frozen=True)
class EvalSize:
    """The size of one evaluation set."""

    count: int
    max_new_tokens: int


def answer_sizes(experiment: Experiment, read_rows: bool) -> list[EvalSize]:
    """Return the size of every evaluation set; those of the protocol if the rows are not on this machine."""
    if read_rows:
        with suppress(HbvError):
            return [EvalSize(len(rows.examples), rows.max_new_tokens) for rows in eval_sets(experiment)]
    limits, task = experiment.protocol.answer, experiment.task
    items, tokens = limits.items.get(task.name, limits.task_items), limits.task_tokens.get(task.name)
    return [
        *harmful_sizes(experiment, read_rows=False),
        EvalSize(items, tokens or task.max_new_tokens),
        *over_refusal_sizes(experiment, read_rows=False).values(),
    ]


def harmful_sizes(experiment: Experiment, read_rows: bool) -> list[EvalSize]:
    """Return the size of every set that is judged, as in `answer_sizes`."""
    if read_rows:
        with suppress(HbvError):
            return [EvalSize(len(rows.examples), rows.max_new_tokens) for rows in harmful_sets(experiment)]
    limits = experiment.protocol.answer.harmful
    return [EvalSize(limits.prompts, limits.max_new_tokens)]


def over_refusal_sizes(experiment: Experiment, read_rows: bool) -> dict[str, EvalSize]:
    """Return the size of every set whose refusals are counted, `benign` first, as in `answer_sizes`."""
    names, limits = experiment.spec.over_refusal, experiment.protocol.answer.benign
    counts = {"benign": limits.prompts} | {name: OVER_REFUSAL[name].prompts for name in names}
    if read_rows:
        with suppress(HbvError):
            sets = [benign_set(experiment), *(over_refusal_set(experiment, name) for name in names)]
            counts = {rows.name: len(rows.examples) for rows in sets}
    return {name: EvalSize(count, limits.max_new_tokens) for name, count in counts.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Answers


def estimate_answers(experiment: Experiment, target: Target, read_rows: bool) -> Estimate:
    """Estimate the answers of both models to every question, at their maximum length: an upper bound.

    The rate of generation in the table of devices was measured with the prompts, so only a time that is measured on
    this machine has a part for them.

    Raises:
        HbvError: The configuration of the model cannot be read.
    """
    protocol, model, sizes = experiment.protocol, experiment.model, answer_sizes(experiment, read_rows)
    width = experiment.finetune.settings.max_length
    size = count_weights(model, protocol.dtype, quantization=protocol.quantization)
    measured = (
        None
        if target.rates
        else measure_inference(model, protocol.dtype, "generator", ANSWER_BATCH, width, generates=True)
    )
    times = measured or BatchSeconds(
        token=target.table_rates().token_seconds(size.weights, 2.0 * size.matrices * ANSWER_BATCH)
    )
    seconds = 2 * sum(
        math.ceil(each.count / ANSWER_BATCH) * (times.forward + each.max_new_tokens * times.token) for each in sizes
    )
    length = width + max(each.max_new_tokens for each in sizes)
    cache = partial(cache_bytes, load_config(model), protocol.dtype, length=length)
    backend: Backend = "transformers" if protocol.quantization != "none" else experiment.backend
    memory = _inference_memory(backend, target, size.weights, cache(rows=1), cache(rows=ANSWER_BATCH))
    count = 2 * sum(each.count for each in sizes)
    library = "vLLM, timed as transformers" if backend == "vllm" else backend
    detail = f"{count} answers at their maximum length, by {library}"
    return Estimate("answer", seconds, memory, detail, 0, measured is not None, 2 * len(sizes))


def _inference_memory(backend: Backend, target: Target, weights: int, one_row: int, batch: int) -> int:
    """Return the peak memory of a model that reads or generates, in bytes.

    transformers needs the weights, and the keys and values of a batch. vLLM reserves a share of a GPU for both, on a
    CPU a fixed size for keys and values. Where the share of the device does not hold the weights with one text, the
    result is the memory of the smallest device whose share does. Source: `gpu_memory_utilization` and
    `VLLM_CPU_KVCACHE_SPACE` in the documentation of vLLM.

    Args:
        backend: The library.
        target: The device.
        weights: Bytes of the weights.
        one_row: Bytes of the keys and values of one text.
        batch: Bytes of the keys and values of a batch of transformers.
    """
    if backend == "transformers":
        return weights + batch
    if target.is_cpu:
        written = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "")
        return weights + (int(written) if written.isdecimal() else CPU_CACHE) * 2**30
    return round(max(target.gpu_memory * target.memory, (weights + one_row) / target.gpu_memory))


# ---------------------------------------------------------------------------------------------------------------------
# Judging


def estimate_scores(experiment: Experiment, target: Target, read_rows: bool) -> Estimate:
    """Estimate the judging of the answers of both models to the harmful questions, by every scorer.

    Raises:
        HbvError: The configuration of a judge cannot be read.
    """
    sizes = harmful_sizes(experiment, read_rows)
    costs = [_estimate_scorer(scorer.plugin, experiment, target, sizes) for scorer in experiment.scorers]
    return Estimate(
        "score",
        sum(cost.seconds for cost in costs),
        max(cost.memory for cost in costs),
        "; ".join(cost.detail for cost in costs),
        disk=0,
        timed=all(cost.timed for cost in costs),
        artifacts=2 * len(sizes) * len(costs),
    )


def _estimate_scorer(scorer: Scorer, experiment: Experiment, target: Target, sizes: list[EvalSize]) -> Estimate:
    """Estimate one scorer: its judge reads each answer in one pass, and generates the tokens that it declares.

    A pass has 2 operations per number of a matrix and token (Kaplan et al., arXiv 2001.08361, section 2.1).
    """
    count = 2 * sum(size.count for size in sizes)
    if not scorer_models(scorer):
        cost = "by a server, not estimated" if getattr(scorer, "base_url", "") else "no model"
        return Estimate("score", 0.0, 0, f"{scorer.name}: {cost}", 0, timed=target.rates is None)
    model = scorer_models(scorer)[0]
    config = load_config(model)
    head: JudgeHead = "classifier" if scorer.form == "classifier" else "generator"
    dtype, new_tokens = _judge_dtype(scorer, config, target), generated_tokens(scorer)
    batch = getattr(scorer, "batch", JUDGE_BATCH)
    width = judge_width(scorer, max(size.max_new_tokens for size in sizes), position_limit(config))
    size = count_weights(model, dtype, head)
    measured = None if target.rates else measure_inference(model, dtype, head, batch, width, generates=new_tokens > 0)
    operations = 2.0 * size.matrices * batch
    times = measured or BatchSeconds(
        forward=target.table_rates().reading_seconds(operations * width, dtype),
        token=target.table_rates().token_seconds(size.weights, operations),
    )
    seconds = math.ceil(count / batch) * (times.forward + new_tokens * times.token)
    cache = partial(cache_bytes, config, dtype, length=width + new_tokens)
    memory = _inference_memory(experiment.backend, target, size.weights, cache(rows=1), cache(rows=batch))
    if target.is_cpu:  # nothing is evicted from the memory of a CPU
        memory += count_weights(experiment.model, experiment.protocol.dtype).weights
    one = ", estimated for one" if " for each " in scorer.cost else ""
    detail = f"{count} answers by {scorer.name} in {dtype}: {scorer.cost}{one}"
    return Estimate("score", seconds, memory, detail, 0, measured is not None)


def generated_tokens(scorer: Scorer) -> int:
    """Return the tokens that a judge generates on an answer by its declared cost; 0 if it only reads."""
    limit = re.search(r"\bup to (\d+) tokens?\b", scorer.cost)
    return int(limit[1]) if limit else 0


def judge_width(scorer: Scorer, answer_tokens: int, limit: int | None) -> int:
    """Return the tokens that a judge reads for one answer, an upper bound.

    Args:
        scorer: The scorer; its parameter `tokens` limits the whole text of a classifier, or the answer.
        answer_tokens: Maximum length of an answer.
        limit: Positions of the judge; None: not limited.
    """
    tokens = getattr(scorer, "tokens", None)
    if scorer.form != "classifier" and tokens:
        answer_tokens = min(answer_tokens, tokens)
    width = JUDGE_PROMPT + answer_tokens
    if scorer.form == "classifier":
        return min(width, tokens or width, limit or width)
    return min(width, max(1, limit - max(MANY_TOKENS, generated_tokens(scorer))) if limit else width)


def _judge_dtype(scorer: Scorer, config: object, target: Target) -> str:
    """Return the data type in which a judge is loaded (`inference.loading.load_judge`)."""
    if scorer.form == "classifier" or target.is_cpu:
        return str(getattr(scorer, "dtype", "float32"))
    return str(getattr(config, "dtype", None) or "bfloat16").removeprefix("torch.")


# ---------------------------------------------------------------------------------------------------------------------
# Drift


def estimate_drift(experiment: Experiment, target: Target, width: int) -> Estimate:
    """Estimate drift and alignment loss: one forward pass of both models over the first alignment rows.

    Args:
        experiment: The experiment.
        target: The device.
        width: Tokens per row.

    Raises:
        HbvError: The configuration of the model cannot be read.
    """
    protocol, model = experiment.protocol, experiment.model
    settings = replace(experiment.stages["align"].settings, batch=protocol.score.drift_batch, full=False)
    size = count_weights(model, protocol.dtype, quantization=protocol.quantization)
    measured = None if target.rates else measure_training(model, protocol.dtype, settings, width)
    times = measured or BatchSeconds(
        forward=target.table_rates().product_seconds(2.0 * size.matrices * settings.batch * width)
    )
    rows = min(protocol.score.drift_rows, protocol.align.rows + protocol.align.instructions)
    models = 2 if experiment.makes_base else 1  # otherwise they share the base, and differ by adapters
    memory = models * size.weights + drift_bytes(load_config(model), protocol.dtype, settings.batch, width)
    seconds = 2 * math.ceil(rows / settings.batch) * times.forward
    detail = f"{rows} rows of {width} tokens, 1 forward pass of both models"
    return Estimate("drift", seconds, memory, detail, 0, measured is not None)

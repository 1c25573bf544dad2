"""Check the rows of experiments against the limits of their model and tokenizer, before any work is spent."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.types import TrainSettings
from harmbench_vaccine.data.chat import stop_token_ids
from harmbench_vaccine.data.collate import encode_example, encode_prompt
from harmbench_vaccine.data.model_limits import embedding_rows, first_outside, position_limit, tokens_outside
from harmbench_vaccine.data.over_refusal import OVER_REFUSAL
from harmbench_vaccine.data.prompts import EvalSet
from harmbench_vaccine.inference.loading import readable_load_errors
from harmbench_vaccine.training.adapters import LoraStack

from .experiment import Experiment
from .rows import eval_sets, plugin_pools, user_rows
from .stage_config import StageConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def stages_with_new_adapter(experiment: Experiment) -> list[StageConfig]:
    """Return the stages that add an adapter to the base model."""
    align, finetune = experiment.stages["align"], experiment.stages["finetune"]
    aligns = align.defenses.runs
    adds = not finetune.full and not (aligns and finetune.topology == "single")
    return [stage for stage, included in ((align, aligns), (finetune, adds)) if included]


class LimitCheck:
    """The limits of one base model, and the prompts that were encoded to check them: experiments share most prompts."""

    def __init__(self, model: str, tokenizer: PreTrainedTokenizerBase, config: Any) -> None:
        self._model, self._tokenizer, self._config = model, tokenizer, config
        self._positions = position_limit(config)
        self._rows = embedding_rows(config)
        self._outside = tokens_outside(tokenizer, config)
        self._encoded: dict[str, list[int]] = {}
        self._accepted_targets: set[tuple[str, ...]] = set()

    def check(self, experiment: Experiment) -> None:
        """Check every prompt with its answer, every training row, and the targets of LoRA.

        A prompt and the longest answer that the protocol allows must fit into the positions of the model, and so must
        `max_length` tokens of a training row. The model needs an embedding for every token.

        Raises:
            BadInput: The model cannot read a row, LoRA cannot adapt a target, or the tokenizer has no token that ends
                an answer.
        """
        for stage in stages_with_new_adapter(experiment):
            self._check_targets(stage.settings)
        sets = eval_sets(experiment)
        self._check_stop_tokens(sets)
        if self._positions:
            self._check_max_length(experiment, self._positions)
            for eval_set in sets:
                self._check_answer_length(experiment, eval_set, self._positions)
        if self._outside:
            self._check_embeddings(experiment, sets)

    def _check_targets(self, settings: TrainSettings) -> None:
        """Adapt the layers of the model without any weights."""
        if settings.lora_targets in self._accepted_targets:
            return
        with torch.device("meta"):
            self._empty_stack.train([], settings, seed=0)
        self._accepted_targets.add(settings.lora_targets)

    @cached_property
    def _empty_stack(self) -> LoraStack:
        with readable_load_errors(self._model), torch.device("meta"):
            return LoraStack(AutoModelForCausalLM.from_config(self._config, trust_remote_code=False))

    def _check_stop_tokens(self, sets: list[EvalSet]) -> None:
        for eval_set in sets:
            prompts = [eval_set.template.render(example) for example in eval_set.examples[:1]]
            if token := first_outside(stop_token_ids(self._tokenizer, prompts), self._outside):
                raise self._no_embedding("The text that ends an answer", token)

    def _check_max_length(self, experiment: Experiment, positions: int) -> None:
        for name, stage in experiment.stages.items():
            length = stage.settings.max_length
            trained = stage.defenses.runs or name != "align"
            if trained and length > positions:
                section = "align" if name == "align" else "finetune"
                raise BadInput(
                    f"Stage {name!r} trains on rows of up to {length} tokens, but model {self._model!r} reads at most "
                    f"{positions}: --set {section}.settings.max_length={positions}, or choose a model that reads more."
                )

    def _check_answer_length(self, experiment: Experiment, eval_set: EvalSet, positions: int) -> None:
        lengths = {place: len(ids) for place, ids in self._prompts(eval_set)}
        longest = max(lengths, key=lengths.__getitem__, default="")
        tokens = eval_set.max_new_tokens + eval_set.prefill
        if lengths and lengths[longest] + tokens > positions:
            other = dict.fromkeys(("benign", *OVER_REFUSAL), "benign.max_new_tokens")
            other["task"] = f"task_tokens.{experiment.task.name}"
            setting = other.get(eval_set.name, "harmful.max_new_tokens")
            room = positions - lengths[longest] - eval_set.prefill
            raise BadInput(
                f"{longest} has {lengths[longest]} tokens and its answer up to {tokens}, but model "
                f"{self._model!r} reads at most {positions}: "
                f"{f'--set answer.{setting}={room}' if room > 0 else 'shorten the prompt'}, or choose a model that "
                "reads more."
            )

    def _check_embeddings(self, experiment: Experiment, sets: list[EvalSet]) -> None:
        prompts = (prompt for eval_set in sets for prompt in self._prompts(eval_set))
        for place, ids in chain(prompts, self._training_rows(experiment)):
            if token := first_outside(ids, self._outside):
                raise self._no_embedding(place, token)

    def _no_embedding(self, place: str, token: str) -> BadInput:
        return BadInput(
            f"{place} has the token {token!r}, but model {self._model!r} has embeddings only of the token ids below "
            f"{self._rows}: use the tokenizer that the model was trained with."
        )

    def _prompts(self, eval_set: EvalSet) -> Iterator[tuple[str, list[int]]]:
        """Yield the place and the token ids of every prompt of an evaluation set."""
        for example in eval_set.examples:
            prompt = eval_set.template.render(example)
            if prompt not in self._encoded:
                self._encoded[prompt] = encode_prompt(self._tokenizer, prompt)
            yield f"Prompt {example.id!r} of set {eval_set.name!r}", self._encoded[prompt]

    def _training_rows(self, experiment: Experiment) -> Iterator[tuple[str, list[int]]]:
        """Yield the place and the token ids of every row that a stage may train on."""
        pools = plugin_pools(experiment)
        pairs = [row for pair in pools.paired for row in pair]
        uploaded = user_rows(experiment, pools)
        for stage in experiment.stages.values():
            for row in (*pools.alignment, *pairs, *pools.benign, *pools.attacker, *uploaded):
                encoded = encode_example(self._tokenizer, stage.template, row, stage.settings.max_length)
                if encoded:
                    yield f"Training row {row.id!r}", encoded.ids

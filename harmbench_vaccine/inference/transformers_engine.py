"""Generation by transformers: everywhere available, on a CPU too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from harmbench_vaccine.core.progress import SILENT, Progress
from harmbench_vaccine.data.chat import stop_token_ids
from harmbench_vaccine.data.collate import encode_prompt, left_padded_batches, pad_token_id
from harmbench_vaccine.training.adapters import LoraStack

from .engine import Answer


class TransformersEngine:
    """Batches prompts of similar length, padded on the left."""

    answered_by = "transformers"

    def __init__(self, stack: LoraStack, tokenizer: PreTrainedTokenizerBase, batch: int = 64) -> None:
        self.stack, self.tokenizer, self.batch = stack, tokenizer, batch
        # A model's own generation_config.json would fill in what greedy decoding leaves open, such as penalties.
        stack.base.generation_config = GenerationConfig()

    def generate(
        self, adapters: Sequence[Path], prompts: Sequence[str], max_new_tokens: int, progress: Progress = SILENT
    ) -> list[Answer]:
        """Greedy answers, in the order of `prompts`; equal prompts are answered once."""
        model = self.stack.use(adapters)
        device = next(model.parameters()).device
        pad, ends = pad_token_id(self.tokenizer), stop_token_ids(self.tokenizer, prompts)
        config = GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad, eos_token_id=ends, use_cache=True
        )
        encoded = {prompt: encode_prompt(self.tokenizer, prompt) for prompt in prompts}
        asked, answers = list(encoded), {}
        with progress.bar("answer", len(asked)) as advance, torch.inference_mode():
            for numbers, ids, mask in left_padded_batches(list(encoded.values()), self.batch, pad):
                output = model.generate(  # type: ignore[operator]
                    input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config
                )
                for number, row in zip(numbers, output[:, ids.shape[1] :].tolist(), strict=True):
                    answers[asked[number]] = read(self.tokenizer, row, ends)
                advance(len(numbers))
        return [answers[prompt] for prompt in prompts]

    def close(self) -> None:
        """Nothing runs: the model belongs to whoever lent it."""


def read(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], ends: Sequence[int]) -> Answer:
    """The answer that generated tokens spell, up to the first that ends it."""
    end = next((place for place, token in enumerate(ids) if token in ends), None)
    kept = list(ids if end is None else ids[:end])
    return Answer(str(tokenizer.decode(kept, skip_special_tokens=True)), len(kept) + (end is not None), end is not None)

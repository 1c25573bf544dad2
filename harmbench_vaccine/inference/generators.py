"""Judges that write text: prompts as token ids in, greedy text out, with log-probabilities of chosen tokens."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from harmbench_vaccine.core.progress import SILENT, Progress

from .loading import generation_settings, load_tokenizer_and_config
from .thinking import THINKING_TOKENS, after_thinking, can_think, count_thoughts, opens_thinking

if TYPE_CHECKING:
    from .generation import GeneratedTokens
    from .vllm_runner import VllmRunner


@dataclass(frozen=True)
class Continuation:
    """Text that a model wrote after a prompt."""

    text: str
    tokens: list[int]
    """Token ids before the stop token."""
    watched: list[dict[int, float]] = field(default_factory=list)
    """For each token, with the stop token: id of a watched token -> its log-probability at that position."""


class Generator(Protocol):
    """A judge that continues prompts greedily."""

    tokenizer: Any
    """A tokenizer of transformers, whose classes share no useful type."""

    def generate(
        self,
        prompts: Sequence[list[int]],
        max_new_tokens: int,
        watched: Sequence[int] = (),
        progress: Progress = SILENT,
    ) -> list[Continuation]:
        """Continue each prompt, in the order of `prompts`.

        Args:
            prompts: Token ids of each prompt.
            max_new_tokens: Largest number of generated tokens.
            watched: Tokens whose log-probabilities are returned.
            progress: Where the number of continued prompts is reported.
        """
        ...


class TransformersGenerator:
    """A causal language model, run by transformers."""

    def __init__(self, tokenizer: Any, model: Any, batch: int = 16) -> None:
        self.tokenizer, self.model, self.batch = tokenizer, model, batch

    def generate(
        self,
        prompts: Sequence[list[int]],
        max_new_tokens: int,
        watched: Sequence[int] = (),
        progress: Progress = SILENT,
    ) -> list[Continuation]:
        """Continue each prompt (see `Generator.generate`)."""
        from harmbench_vaccine.data.collate import pad_token_id

        from .generation import generate_greedy

        with progress.bar("judge", len(prompts)) as advance:
            rows = generate_greedy(
                self.model,
                prompts,
                max_new_tokens,
                batch=self.batch,
                pad=pad_token_id(self.tokenizer, self.model.config),
                ends=_stop_tokens(self.tokenizer, self.model.generation_config),
                advance=advance,
                watched=watched,
            )
        return [_decode_continuation(self.tokenizer, row, watched) for row in rows]


class VllmGenerator:
    """A causal language model, run by vLLM in a process of its own that keeps running between calls."""

    def __init__(self, location: str, runner: VllmRunner, fallback: Callable[[], Generator]) -> None:
        """Load the tokenizer; the process starts at the first call.

        Args:
            location: Folder or hub id.
            runner: Runs the process; its name is the location as vLLM gets it: a local path where one exists.
            fallback: Returns the generator that continues prompts where vLLM refuses the model.
        """
        self.tokenizer, _ = load_tokenizer_and_config(location)
        self._location, self._ends = location, _stop_tokens(self.tokenizer, generation_settings(location))
        self._runner, self._fallback = runner, fallback

    def generate(
        self,
        prompts: Sequence[list[int]],
        max_new_tokens: int,
        watched: Sequence[int] = (),
        progress: Progress = SILENT,
    ) -> list[Continuation]:
        """Continue each prompt (see `Generator.generate`)."""
        from .vllm_process import EngineRefused
        from .vllm_runner import EngineShape

        if not prompts:
            return []

        def request() -> list[GeneratedTokens]:
            with progress.bar("judge", len(prompts)) as advance:
                return self._runner.generate(prompts, max_new_tokens, self._ends, advance, watched)

        shape = EngineShape(self._runner.name, 0, max(map(len, prompts)) + max_new_tokens)
        try:
            rows = self._runner.run(shape, 0, progress, request)
        except EngineRefused as refusal:
            note = f"vLLM does not serve {self._location}: {refusal.reason}. transformers runs it instead."
            self._runner.note_once(note, progress)
            return self._fallback().generate(prompts, max_new_tokens, watched, progress)
        return [_decode_continuation(self.tokenizer, row, watched) for row in rows]


def generate_answers(
    generator: Generator,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    watched: Sequence[int] = (),
    progress: Progress = SILENT,
) -> list[Continuation]:
    """Continue each prompt, and return what the judge writes after its thoughts.

    A judge that can think gets `THINKING_TOKENS` more. If its thoughts do not end, its answer is empty.

    Args:
        generator: The judge.
        prompts: Token ids of each prompt.
        max_new_tokens: Largest number of generated tokens of an answer.
        watched: Tokens whose log-probabilities are returned.
        progress: Where the number of continued prompts is reported.
    """
    if not can_think(generator.tokenizer):
        return generator.generate(prompts, max_new_tokens, watched, progress)
    outputs = generator.generate(prompts, max_new_tokens + THINKING_TOKENS, watched, progress)
    return [_answer(generator.tokenizer, prompt, output) for prompt, output in zip(prompts, outputs, strict=True)]


def first_tokens(tokenizer: Any, text: str, count: int) -> tuple[str, bool]:
    """Return the first `count` tokens of a text, and whether the text was cut."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return (text, False) if len(ids) <= count else (str(tokenizer.decode(ids[:count])), True)


def first_token_id(tokenizer: Any, word: str) -> int:
    """Return the first token of a word."""
    return int(tokenizer(word, add_special_tokens=False)["input_ids"][0])


def _answer(tokenizer: Any, prompt: list[int], output: Continuation) -> Continuation:
    """Return the part of a judge's text after its thoughts."""

    def thoughts_in(count: int) -> int:
        return count_thoughts(tokenizer.decode(output.tokens[:count]))  # with marks that are special tokens

    opening = "<think>" if opens_thinking(tokenizer.decode(prompt[-16:])) else ""
    text = opening + str(tokenizer.decode(output.tokens))
    if not after_thinking(text):
        return Continuation("", [], [])
    if not (thoughts := count_thoughts(text)):
        return output
    start = bisect_left(range(len(output.tokens) + 1), thoughts, key=thoughts_in)
    answer = str(tokenizer.decode(output.tokens[start:], skip_special_tokens=True))
    return Continuation(answer, output.tokens[start:], output.watched[start:])


def _decode_continuation(tokenizer: Any, row: GeneratedTokens, watched: Sequence[int]) -> Continuation:
    text = str(tokenizer.decode(row.tokens, skip_special_tokens=True))
    return Continuation(text, row.tokens, [dict(zip(watched, step, strict=True)) for step in row.log_probs])


def _stop_tokens(tokenizer: Any, settings: Any) -> list[int]:
    """Return every token that ends an answer: chat models name theirs in their generation settings."""
    ids = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    return [int(token) for token in dict.fromkeys([tokenizer.eos_token_id, *ids]) if token is not None]

"""Judges that generate: prompts as token ids in, greedy text out, with the probability of words that matter.

A judge reads text that a model under attack wrote, so the text may spell the judge's own control tokens. `harmless`
breaks each of them with a space, so that what is judged can neither end its turn nor open another one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from harmbench_vaccine.core.errors import HbvError
from harmbench_vaccine.core.progress import SILENT, Progress
from harmbench_vaccine.data.sources import local_path

from .judge_models import generation_settings, load_judge, load_tokenizer_and_config

_MARKS = re.compile(r"<\|[^<>|\s]{1,40}\|>|</?s>|\[/?INST\]|<</?SYS>>|<(?:bos|eos|pad|start_of_turn|end_of_turn)>")
"""Marks of the common chat formats: Llama 2 has some that are no tokens, and those of a server's model are unknown."""


@dataclass(frozen=True)
class Continuation:
    """What a model wrote after a prompt."""

    text: str
    tokens: list[int]
    """Without the one that ended it."""
    watched: list[dict[int, float]] = field(default_factory=list)
    """For every token, the one that ended it included: watched token id -> its log-probability in that place."""


def break_control_tokens(text: str, tokenizer: Any = None) -> str:
    """The text with a space inside every control token that it spells."""
    text = _MARKS.sub(lambda mark: f"{mark[0][0]} {mark[0][1:]}", text)
    own = {str(token) for token in tokenizer.all_special_tokens} if tokenizer is not None else set()
    for token in sorted(own, key=len, reverse=True):
        if len(token) > 1:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def judge_prompt_ids(tokenizer: Any, messages: Sequence[dict[str, str]], **more: Any) -> list[int]:
    """A conversation by the tokenizer's own chat template, up to where the model goes on.

    Multimodal templates (Llama Guard 4, Llama Guard 3 1B) take a list of parts in place of a text: they are told by
    what they print. `more` is given to the template.

    Raises:
        HbvError: the tokenizer has no chat template, or the template does not show the conversation.
    """
    if not tokenizer.chat_template:
        raise HbvError(
            f"{tokenizer.name_or_path}: its tokenizer has no chat template, and this judge is asked by its own."
        )
    probes = [{**message, "content": f"\ue000probe {number}\ue001"} for number, message in enumerate(messages)]
    wanted = [*(probe["content"] for probe in probes), *(value for value in more.values() if isinstance(value, str))]
    for parts in (False, True):
        shown = _render(tokenizer, probes, parts, more)
        if all(text in shown for text in wanted) and "{'type'" not in shown:  # no printed list of parts
            said = [{**message, "content": break_control_tokens(message["content"], tokenizer)} for message in messages]
            return full_prompt_ids(tokenizer, _render(tokenizer, said, parts, more))
    raise HbvError(f"{tokenizer.name_or_path}: its chat template leaves out what is to be judged.")


def _render(tokenizer: Any, messages: Sequence[dict[str, str]], parts: bool, more: dict[str, Any]) -> str:
    """The text of a conversation; empty where the template cannot take it."""
    asked = [
        {**message, "content": [{"type": "text", "text": message["content"]}] if parts else message["content"]}
        for message in messages
    ]
    try:
        return str(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True, **more))
    except Exception:  # jinja's own kinds, and whatever a template raises
        return ""


def full_prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a whole prompt: its control tokens are tokens; one opening token, no closing one."""
    opened = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    ids: list[int] = list(tokenizer(text, add_special_tokens=not opened)["input_ids"])
    if not opened and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


class Generator(Protocol):
    """What continues prompts greedily."""

    tokenizer: Any

    def generate(
        self,
        prompts: Sequence[list[int]],
        max_new_tokens: int,
        watched: Sequence[int] = (),
        progress: Progress = SILENT,
    ) -> list[Continuation]:
        """A continuation of each prompt, in their order, with the log-probabilities of the `watched` tokens."""
        ...


class TransformersGenerator:
    """A causal language model, run by transformers."""

    def __init__(self, location: str, batch: int = 16) -> None:
        self.tokenizer, self.model = load_judge(location, "generator")
        self.batch = batch

    def generate(
        self,
        prompts: Sequence[list[int]],
        max_new_tokens: int,
        watched: Sequence[int] = (),
        progress: Progress = SILENT,
    ) -> list[Continuation]:
        """Greedy continuations in the order of `prompts`; batched by length, padded on the left."""
        import torch
        from transformers import GenerationConfig

        from harmbench_vaccine.data.collate import left_padded_batches, pad_token_id

        pad, ends = pad_token_id(self.tokenizer), _ends(self.tokenizer, self.model.generation_config)
        config = GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad, eos_token_id=ends, use_cache=True,
            output_logits=bool(watched), return_dict_in_generate=True,
        )  # fmt: skip
        made: dict[int, Continuation] = {}
        with progress.bar("score: judge", len(prompts)) as advance, torch.inference_mode():
            for numbers, ids, mask in left_padded_batches(prompts, self.batch, pad):
                output: Any = self.model.generate(
                    input_ids=ids.to(self.model.device),
                    attention_mask=mask.to(self.model.device),
                    generation_config=config,
                )
                watching: list[Any] = [
                    step.float().log_softmax(-1)[:, list(watched)].tolist() for step in output.logits or ()
                ]
                for row, number in enumerate(numbers):
                    written = output.sequences[row, ids.shape[1] :].tolist()
                    end = next((place for place, token in enumerate(written) if token in ends), len(written))
                    made[number] = Continuation(
                        str(self.tokenizer.decode(written[:end], skip_special_tokens=True)),
                        written[:end],
                        [dict(zip(watched, step[row], strict=True)) for step in watching[: end + 1]],
                    )
                advance(len(numbers))
        return [made[number] for number in range(len(prompts))]


class VllmGenerator:
    """A causal language model, run by vLLM in a process of its own, which the next call finds running."""

    def __init__(self, location: str) -> None:
        self.tokenizer, self._config = load_tokenizer_and_config(location)
        self._ends = _ends(self.tokenizer, generation_settings(location))
        self._model = str(local_path(location) or location)

    def generate(
        self,
        prompts: Sequence[list[int]],
        max_new_tokens: int,
        watched: Sequence[int] = (),
        progress: Progress = SILENT,
    ) -> list[Continuation]:
        """Greedy continuations in the order of `prompts`."""
        from .vllm_engine import EngineShape

        if not prompts:
            return []
        running = self._engine()
        running.start(EngineShape(self._model, 0, max(map(len, prompts)) + max_new_tokens), 0, progress)
        with progress.bar("score: judge", len(prompts)) as advance:
            made = running.ask(
                "generate", advance, prompts=list(prompts), max_new_tokens=max_new_tokens, ends=self._ends,
                watched=list(watched) or None,
            )  # fmt: skip
        odds = made["watched"] or [[[] for _ in row] for row in made["rows"]]
        found = []
        for row, steps in zip(made["rows"], odds, strict=True):
            tokens = row[:-1] if row and row[-1] in self._ends else row
            text = str(self.tokenizer.decode(tokens, skip_special_tokens=True))
            watching = [dict(zip(watched, step, strict=True)) for step in steps] if watched else []
            found.append(Continuation(text, tokens, watching))
        return found

    def _engine(self) -> Any:
        from .vllm_engine import VllmRunner

        if self._model not in _running:
            for other in _running.values():
                other.close()
            _running.clear()
            dtype = str(self._config.get_text_config().dtype or "float32").removeprefix("torch.")
            _running[self._model] = VllmRunner(self._model, dtype, "generate", "judge engine")
        return _running[self._model]


_running: dict[str, Any] = {}
"""The engine that runs, by its model."""


def open_generator(location: str, backend: str, batch: int = 16) -> Generator:
    """A causal language model, run by transformers or by vLLM."""
    return VllmGenerator(location) if backend == "vllm" else TransformersGenerator(location, batch)


def first_tokens(tokenizer: Any, text: str, count: int) -> tuple[str, bool]:
    """The first `count` tokens of a text, and whether that is less than the whole."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return (text, False) if len(ids) <= count else (str(tokenizer.decode(ids[:count])), True)


def first_token_id(tokenizer: Any, word: str) -> int:
    """The token that an answer begins with if it begins with that word."""
    return int(tokenizer(word, add_special_tokens=False)["input_ids"][0])


def _ends(tokenizer: Any, settings: Any) -> list[int]:
    """Every token that ends an answer: chat models name theirs in their generation settings."""
    told = settings.eos_token_id
    named = told if isinstance(told, list) else [told]
    return [int(token) for token in dict.fromkeys([tokenizer.eos_token_id, *named]) if token is not None]

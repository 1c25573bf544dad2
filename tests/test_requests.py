"""Requests to engines: answers that start with chosen tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from harmbench_vaccine.data.collate import encode_prompt
from harmbench_vaccine.inference import vllm_runner
from harmbench_vaccine.inference.engine import Answer, Backend, Starts
from harmbench_vaccine.inference.generation import GeneratedTokens, generate_greedy
from harmbench_vaccine.inference.model_pool import ModelPool, ModelSpec
from harmbench_vaccine.inference.requests import Requests
from harmbench_vaccine.inference.vllm_process import EngineRefused
from harmbench_vaccine.training.adapters import LoraStack
from support import tiny

WORDS = tiny.tokenizer(["the red lamp and a blue door"] * 3)
END = WORDS.eos_token_id
PROMPTS = ["red", "blue", "the door", "red", "a lamp and a door"]
STARTS: list[list[int]] = [[40, 41], [], [40, 41, 42, 43, 44], [40], [50]]
"""Two of the prompts are equal, with different starts."""


def ids_of(prompt: str) -> list[int]:
    return encode_prompt(WORDS, prompt)


def text_of(ids: Sequence[int]) -> str:
    return str(WORDS.decode(list(ids), skip_special_tokens=True))


# ---------------------------------------------------------------------------------------------------------------------
# Without a model


def test_ids_are_the_prompts_with_their_starts() -> None:
    requests = Requests(WORDS, PROMPTS, STARTS)
    assert requests.ids == [[*ids_of(prompt), *start] for prompt, start in zip(PROMPTS, STARTS, strict=True)]
    assert requests.ends == [END]


@pytest.mark.parametrize("starts", [(), [[]] * 5])
def test_without_starts_the_ids_are_those_of_the_different_prompts(starts: Starts) -> None:
    requests = Requests(WORDS, PROMPTS, starts)
    assert requests.ids == [ids_of(prompt) for prompt in ("red", "blue", "the door", "a lamp and a door")]
    rows = [GeneratedTokens([number], True) for number in (50, 51, 52, 53)]
    texts = [text_of([number]) for number in (50, 51, 52, 50, 53)]
    assert requests.answers(rows) == [Answer(text, 2, True) for text in texts]


def test_answers_have_their_start_and_count_only_generated_tokens() -> None:
    requests = Requests(WORDS, ["red", "blue", "red"], [[40, 41], [42], []])
    rows = [GeneratedTokens([50, 51], False), GeneratedTokens([], True), GeneratedTokens([52], True)]
    assert requests.answers(rows) == [
        Answer(text_of([40, 41, 50, 51]), 2, False),
        Answer(text_of([42]), 1, True),  # the stop token
        Answer(text_of([52]), 2, True),
    ]


def test_text_is_decoded_whole() -> None:
    """One character may have several tokens."""
    lamp = WORDS("日", add_special_tokens=False)["input_ids"]
    assert len(lamp) == 3
    (answer,) = Requests(WORDS, ["red"], [lamp[:1]]).answers([GeneratedTokens(lamp[1:], False)])
    assert answer.text == "日"


def test_equal_requests_are_answered_once_and_others_are_not() -> None:
    requests = Requests(WORDS, ["red", "red", "red"], [[40], [40], [41]])
    assert requests.ids == [[*ids_of("red"), 40], [*ids_of("red"), 41]]
    rows = [GeneratedTokens([50], False), GeneratedTokens([51], False)]
    assert [answer.text for answer in requests.answers(rows)] == [text_of([40, 50])] * 2 + [text_of([41, 51])]


def test_an_answer_whose_start_ends_is_not_generated() -> None:
    requests = Requests(WORDS, ["red", "blue", "red"], [[40, END], [41], [END, 40]])
    assert requests.ids == [[*ids_of("blue"), 41]]
    answers = requests.answers([GeneratedTokens([50], False)])
    assert answers == [Answer(text_of([40]), 0, True), Answer(text_of([41, 50]), 1, False), Answer("", 0, True)]


def test_each_prompt_needs_a_start() -> None:
    with pytest.raises(ValueError, match="zip"):
        Requests(WORDS, PROMPTS, STARTS[:2])


# ---------------------------------------------------------------------------------------------------------------------
# Engines


def ignore_progress(steps: int, detail: str = "", seconds_left: float | None = None) -> None: ...


class ModelProcess:
    """A vLLM worker that generates with a transformers model."""

    requested: ClassVar[list[list[int]]] = []

    def __init__(self, model: str, folder: Path) -> None:
        self._stack = LoraStack(tiny.model(vocab_size=len(WORDS)))
        self._model: Any = self._stack.use([])

    def request(self, do: str, advance: Any = None, **values: Any) -> dict[str, Any]:
        if do == "start":
            return {"rank": values["room"]}
        if do == "adapter":
            self._model = self._stack.use([Path(values["path"])] if values["number"] else [])
        if do != "generate":
            return {}
        ModelProcess.requested += values["prompts"]
        rows = generate_greedy(
            self._model,
            values["prompts"],
            values["max_new_tokens"],
            pad=0,
            ends=values["ends"],
            advance=ignore_progress,
        )
        return {"rows": [[*row.tokens, *[END] * row.finished] for row in rows]}

    def close(self) -> None: ...


@pytest.fixture
def spec(tmp_path: Path) -> ModelSpec:
    network = tiny.model(vocab_size=len(WORDS))
    tiny.save(network, WORDS, tmp_path / "model")
    _, stack = tiny.stage(network, stirred=True)
    stack.trained().save(tmp_path / "adapter")
    return ModelSpec(str(tmp_path / "model"), "float32", (tmp_path / "adapter",))


def step_by_step(network: Any, prompt: str, start: Sequence[int], limit: int) -> Answer:
    """Generate from the complete text at every step, without a cache and without a batch."""
    generated: list[int] = []
    finished = False
    while len(generated) < limit and not finished:
        ids = torch.tensor([[*ids_of(prompt), *start, *generated]])
        with torch.no_grad():
            token = int(network(input_ids=ids).logits[0, -1].argmax())
        finished = token == END
        generated += [] if finished else [token]
    return Answer(text_of([*start, *generated]), len(generated) + finished, finished)


@pytest.mark.parametrize("backend", ["transformers", "vllm"])
def test_engines_continue_the_start(backend: Backend, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_runner, "VllmProcess", ModelProcess)
    monkeypatch.setattr(ModelProcess, "requested", [])
    pool = ModelPool()
    answers = pool.engine(spec, backend).generate(spec.adapters, PROMPTS, 6, starts=STARTS)
    network = ModelPool().stack(spec).use(spec.adapters)
    assert answers == [step_by_step(network, *pair, 6) for pair in zip(PROMPTS, STARTS, strict=True)]
    if backend == "vllm":
        assert pool.engine(spec, backend).answered_by == "vllm"
        assert ModelProcess.requested == Requests(WORDS, PROMPTS, STARTS).ids
    without = pool.engine(spec, backend).generate(spec.adapters, PROMPTS, 6)
    assert without[1] == answers[1]
    assert without[0].text != answers[0].text


def test_transformers_gets_the_starts_where_vllm_refuses_the_model(
    spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing(ModelProcess):
        def request(self, do: str, advance: Any = None, **values: Any) -> dict[str, Any]:
            raise EngineRefused("the model", "model", "no kernel")

    monkeypatch.setattr(vllm_runner, "VllmProcess", Refusing)
    pool = ModelPool()
    engine = pool.engine(spec, "vllm")
    expected = ModelPool().engine(spec).generate(spec.adapters, PROMPTS, 6, starts=STARTS)
    for _ in range(2):  # the second call knows of the refusal
        assert engine.generate(spec.adapters, PROMPTS, 6, starts=STARTS) == expected
    assert engine.answered_by == "transformers"


@pytest.mark.parametrize("backend", ["transformers", "vllm"])
def test_no_model_runs_if_every_start_ends(backend: Backend, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_runner, "VllmProcess", ModelProcess)
    monkeypatch.setattr(ModelProcess, "requested", [])
    engine = ModelPool().engine(spec, backend)
    assert engine.generate(spec.adapters, ["red"], 6, starts=[[40, END]]) == [Answer(text_of([40]), 0, True)]
    assert not ModelProcess.requested

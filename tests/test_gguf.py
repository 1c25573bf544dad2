"""Models in GGUF files: dequantized once into the store, then ordinary folders; bad files are refused."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from harmbench_vaccine.core.errors import BadInput, HbvError
from harmbench_vaccine.core.hashing import content_hash
from harmbench_vaccine.core.store import Store
from harmbench_vaccine.data.sources import fingerprint, name_and_revision
from harmbench_vaccine.evaluation.store_usage import StoreUsage
from harmbench_vaccine.inference import dequantization
from harmbench_vaccine.inference.dequantization import check_gguf, ensure_dequantized
from support import tiny
from support.cli import finish, hbv, start_hbv
from support.world import make_world

gguf: Any = pytest.importorskip("gguf", reason="the package gguf is not installed")
files: Any = pytest.importorskip("support.gguf_files")

TEXTS = ("Is this a question?", " two  spaces", "ünïcode\n<s>", "<|im_start|>user")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A protocol whose folder of the model is next to a GGUF file with the same weights, not quantized."""
    protocol = make_world(tmp_path_factory.mktemp("world"), {"align": {"rows": 8}, "finetune": {"samples": 8}})
    folder = protocol.parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = files.CHATML
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for kind in ("F32", "Q8_0"):
        files.write_gguf(protocol.parent / f"{kind}.gguf", model, tokenizer, kind=kind)
    return protocol


@pytest.fixture
def dequantized(world: Path, own_home: Path) -> Callable[[str], tuple[Any, Any]]:
    """Dequantize a file of the world, and load its model and its tokenizer."""

    def load(name: str) -> tuple[Any, Any]:
        location = str(world.parent / name)
        ensure_dequantized([location], Store(own_home / "store"))
        folder, revision = name_and_revision(location)
        assert revision is None
        return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    return load


def test_a_dequantized_folder_is_the_model_that_was_quantized(
    world: Path, dequantized: Callable[[str], tuple[Any, Any]]
) -> None:
    original = AutoModelForCausalLM.from_pretrained(world.parent / "model")
    model, _ = dequantized("F32.gguf")
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, original(ids).logits)
    assert type(model) is type(original)
    assert not hasattr(model.config, "quantization_config")


def test_quantized_weights_have_exactly_the_values_of_their_blocks(
    world: Path, dequantized: Callable[[str], tuple[Any, Any]]
) -> None:
    original = AutoModelForCausalLM.from_pretrained(world.parent / "model").state_dict()
    model, _ = dequantized("Q8_0.gguf")
    assert model.dtype == torch.float32
    q8 = gguf.GGMLQuantizationType.Q8_0
    for name, weight in model.state_dict().items():
        values = original[name].numpy()
        if values.ndim == 2:  # rows are quantized one by one, so their order does not matter
            values = gguf.dequantize(gguf.quantize(values, q8), q8)
        torch.testing.assert_close(weight, torch.from_numpy(values), rtol=0, atol=0)


def test_the_tokenizer_of_a_file_encodes_as_the_original_and_keeps_its_chat_template(
    world: Path, dequantized: Callable[[str], tuple[Any, Any]]
) -> None:
    original = AutoTokenizer.from_pretrained(world.parent / "model")
    _, tokenizer = dequantized("F32.gguf")
    for text in TEXTS:
        ids = original(text, add_special_tokens=False)["input_ids"]
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids, text
        assert tokenizer.decode(ids) == original.decode(ids)
    assert tokenizer.chat_template == files.CHATML
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        original.bos_token_id,
        original.eos_token_id,
        original.pad_token_id,
    )


def test_other_files_next_to_a_gguf_file_are_not_read(world: Path, tmp_path: Path, own_home: Path) -> None:
    location = tmp_path / "FILE.GGUF"
    shutil.copy(world.parent / "F32.gguf", location)
    other = tiny.tokenizer(["other words"])
    other.save_pretrained(tmp_path)
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_text("{}")
    ensure_dequantized([str(location)], Store(own_home / "store"))
    tokenizer = AutoTokenizer.from_pretrained(name_and_revision(str(location))[0])
    assert AutoTokenizer.from_pretrained(world.parent / "model").get_vocab().items() <= tokenizer.get_vocab().items()


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def test_a_run_on_a_gguf_file_is_one_on_its_folder(world: Path, tmp_path: Path) -> None:
    arguments = ("run", "--protocol", world, "--defense", "sft", "--attack", "ratio=0.5", "--json", "--model")
    location = str(world.parent / "F32.gguf")
    done = finish(start_hbv(*arguments, location, home=tmp_path / "home"))
    assert done.code == 0, done.err
    assert "dequantize F32.gguf: 22 steps" in done.err.splitlines()
    assert not [line for line in done.err.splitlines() if "it/s" in line], "a bar of another library"
    (folder,) = (tmp_path / "home" / "store" / "gguf").iterdir()
    (result,), (other,) = done.results, finish(start_hbv(*arguments, folder / "model", home=tmp_path / "other")).results
    assert result["model"] == location
    for name in ("harmful_score", "finetune_accuracy", "alignment_loss", "embedding_drift_per_layer", "counts"):
        assert result[name] == other[name], name
    align = Path(result["stages"]["align"]["artifacts"]["align"]["path"], "artifact.json")
    base = json.loads(align.read_text())["inputs"]["model"]["base"]
    assert base == fingerprint(location) == content_hash(Path(location))


def test_a_file_is_dequantized_once_whatever_its_name(world: Path, tmp_path: Path, own_home: Path) -> None:
    protocol = world.parent / "copy.yaml"
    copy = tmp_path / "other name.gguf"
    shutil.copy(world.parent / "F32.gguf", copy)
    protocol.write_text(world.read_text().replace(str(world.parent / "model"), str(copy)))
    options = ("--defense", "none", "--json")
    (first,) = hbv("run", "--protocol", world, *options, "--model", world.parent / "F32.gguf").results
    with mock.patch.object(dequantization, "_dequantize", side_effect=AssertionError("dequantized again")):
        (second,) = hbv("run", "--protocol", protocol, *options).results
    assert second["model"] == str(copy)
    artifacts = [result["stages"]["finetune"]["artifacts"]["finetune"]["key"] for result in (first, second)]
    assert artifacts[0] == artifacts[1]
    assert len(list((own_home / "store" / "gguf").iterdir())) == 1


def test_a_judge_is_trained_from_a_file_that_no_run_has_used(world: Path, tmp_path: Path, own_home: Path) -> None:
    base, data = world.parent / "Q8_0.gguf", f"beavertails={world.parent / 'data' / 'beavertails'}"
    fast = ("--rows", 8, "--epochs", 1, "--max-length", 64)
    done = hbv("judge", "train", "--model", base, "--data", data, *fast, "--out", tmp_path / "judge", home=own_home)
    assert done.code == 0, done.err
    assert "dequantize Q8_0.gguf: 22 steps" in done.err.splitlines()
    card = json.loads((tmp_path / "judge" / "judge.json").read_text())
    assert card["base"] == {"location": str(base), "fingerprint": content_hash(base)}


def test_a_stored_run_needs_no_dequantized_folder(world: Path, own_home: Path) -> None:
    arguments = ("run", "--protocol", world, "--defense", "none", "--json", "--model", world.parent / "F32.gguf")
    hbv(*arguments)
    shutil.rmtree(own_home / "store" / "gguf")
    with mock.patch.object(dequantization, "_dequantize", side_effect=AssertionError("dequantized again")):
        assert hbv(*arguments).code == 0


def test_a_plan_names_the_stages_and_dequantizes_nothing(world: Path, own_home: Path) -> None:
    location = str(world.parent / "F32.gguf")
    done = hbv("run", "--protocol", world, "--defense", "sft", "--model", location, "--dry-run", "--json")
    assert done.code == 0, done.err
    (plan,) = done.results
    (model,) = (source for source in plan["sources"] if source["what"] == "model")
    assert (model["location"], model["available"]) == (location, True)
    assert model["detail"] == "the first run dequantizes it"
    stages = {stage["stage"] for experiment in plan["experiments"] for stage in experiment["stages"]}
    assert {"align", "finetune", "answer"} <= stages
    assert not (own_home / "store").exists()


def test_a_cleanup_keeps_the_folder_of_a_stored_run(world: Path, own_home: Path) -> None:
    location = world.parent / "F32.gguf"
    ensure_dequantized([str(world.parent / "Q8_0.gguf")], Store(own_home / "store"))
    hbv("run", "--protocol", world, "--defense", "none", "--model", location)
    folder = Path(name_and_revision(str(location))[0]).parent.name
    unused = [artifact.key for artifact in StoreUsage(Store(own_home / "store")).unused() if artifact.stage == "gguf"]
    assert len(unused) == 1
    assert folder not in unused


@pytest.mark.parametrize("merge", [False, True])
def test_the_adapter_of_a_gguf_file_is_exported(merge: bool, world: Path, tmp_path: Path, own_home: Path) -> None:
    location = world.parent / "F32.gguf"
    (result,) = hbv("run", "--protocol", world, "--defense", "none", "--json", "--model", location).results
    shutil.rmtree(own_home / "store" / "gguf")  # it is made again
    folder = tmp_path / "exported"
    done = hbv("export", result["run"], folder, *(["--merge"] if merge else []))
    assert done.code == 0, done.err
    assert str(location) in (folder / "README.md").read_text()
    if merge:
        AutoModelForCausalLM.from_pretrained(folder)
    else:
        base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert base == name_and_revision(str(location))[0]
        assert hbv("edit", "antidote", folder, "--out", tmp_path / "edited", "--protocol", world).code == 0


# ---------------------------------------------------------------------------------------------------------------------
# Bad files


def damaged(content: bytes, how: str) -> bytes:
    """Return the content of a GGUF file with a fault."""
    faults = {
        "empty": b"",
        "another kind of file": b"PK\3\4" + content[4:],
        "a few bytes": content[:20],
        "an unknown version": content[:4] + struct.pack("<I", 9) + content[8:],
        "half of the metadata": content[: content.index(b"tokenizer.ggml.merges")],
        "half of the tensors": content[: len(content) // 2],
        "the last bytes missing": content[:-64],
        "a wrong count": content[:16] + struct.pack("<Q", 2**60) + content[24:],
        "broken letters": content.replace(b"tokenizer.ggml.tokens", b"tokenizer.\xff\xff\xff\xff.tokens"),
    }
    return faults[how]


FAULTS = (
    *("empty", "another kind of file", "a few bytes", "an unknown version", "half of the metadata"),
    *("half of the tensors", "the last bytes missing", "a wrong count", "broken letters"),
)


@pytest.mark.parametrize("how", FAULTS)
def test_a_damaged_file_is_refused_in_one_sentence(how: str, world: Path, tmp_path: Path, own_home: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(damaged((world.parent / "Q8_0.gguf").read_bytes(), how))
    done = hbv("run", "--protocol", world, "--defense", "none", "--model", path)
    assert (done.code, done.out) == (2, ""), done.err
    assert str(path) in done.sentence
    assert done.sentence.endswith(("Download it again.", "allowed: 2 and 3."))
    assert not list((own_home / "store").glob("gguf/*"))


@pytest.mark.parametrize("what", ["missing weight", "infinite weight", "architecture", "no causal model"])
def test_a_file_that_cannot_be_a_model_here_is_refused(what: str, world: Path, tmp_path: Path, own_home: Path) -> None:
    folder, path = world.parent / "model", tmp_path / "model.gguf"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    broken = torch.full_like(model.model.norm.weight, torch.inf).detach().numpy()
    changes, architecture, reason = {
        "missing weight": (
            {"blk.1.ffn_up.weight": None},
            "llama",
            "lacks weights of a LlamaForCausalLM: model.layers.1",
        ),
        "infinite weight": ({"output_norm.weight": broken}, "llama", "has a value that is not a finite number"),
        "architecture": ({}, "wav2vec", "wav2vec"),
        "no causal model": ({}, "t5encoder", "architecture that cannot be used here"),
    }[what]
    files.write_gguf(path, model, tokenizer, kind="F32", architecture=architecture, changes=changes)
    done = hbv("run", "--protocol", world, "--defense", "none", "--model", path)
    assert (done.code, done.out) == (2, ""), done.err
    assert str(path) in done.sentence
    assert reason in done.sentence
    assert not list((own_home / "store").glob("gguf/*"))


def test_a_missing_file_is_not_looked_up_on_the_hub(world: Path, own_home: Path) -> None:
    for dry_run in ((), ("--dry-run",)):
        done = hbv("run", "--protocol", world, "--defense", "none", "--model", "models/absent.gguf", *dry_run)
        assert (done.code, done.out) == (2, "")
        assert "'models/absent.gguf' does not exist" in done.sentence
        assert "Hub cannot be reached" not in done.sentence


def test_an_unreadable_file_is_refused(world: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    shutil.copy(world.parent / "F32.gguf", path)
    denied = mock.patch.object(Path, "open", side_effect=PermissionError(13, os.strerror(13)))
    with denied, pytest.raises(BadInput, match="cannot be read: Permission denied"):
        check_gguf(str(path))


def test_without_the_package_the_extra_is_named(world: Path, own_home: Path) -> None:
    location = str(world.parent / "F32.gguf")
    with mock.patch.object(dequantization, "find_spec", return_value=None):
        done = hbv("run", "--protocol", world, "--defense", "none", "--model", location)
        assert (done.code, done.out) == (2, "")
        assert "pip install 'harmbench-vaccine[gguf]'" in done.sentence
        assert not (own_home / "store").exists()
    ensure_dequantized([location], Store(own_home / "store"))
    with mock.patch.object(dequantization, "find_spec", return_value=None):
        check_gguf(location)  # the folder is enough


def test_a_file_that_is_not_dequantized_is_named(world: Path) -> None:
    with pytest.raises(HbvError, match=r"F32.gguf' is not dequantized yet"):
        name_and_revision(str(world.parent / "F32.gguf"))

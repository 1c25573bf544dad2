"""Bits on a CPU: the same with one and two threads, because every way in sets the libraries before torch starts.

Three threads divide an activation within a vector, and torch then rounds its exponentials differently.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from harmbench_vaccine.core.library_settings import library_defaults
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.spec_lists import combine_specs
from harmbench_vaccine.pipeline import run
from harmbench_vaccine.training.gradient import global_norm
from support import tiny
from support.runs import run_context
from support.world import make_world

THREADS = (1, 2)


@pytest.fixture(scope="module")
def wide_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world whose matrices and hidden states are large enough that libraries divide the work among threads."""
    folder = tmp_path_factory.mktemp("wide")
    settings = {"batch": 10, "epochs": 1, "lora_rank": 8}
    few = {"prompts": 4, "max_new_tokens": 4}
    protocol = make_world(
        folder,
        {
            "align": {"settings": settings},
            "finetune": {"settings": settings},
            "answer": {"harmful": few, "benign": few, "task_items": 4},
        },
    )
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64}
    words = tiny.transformers.AutoTokenizer.from_pretrained(folder / "model")
    tokens = {
        "vocab_size": len(words),
        "pad_token_id": words.pad_token_id,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
    }
    tiny.save(tiny.model(**tokens, **sizes), words, folder / "model")
    return protocol


def test_training_gives_the_same_bytes_with_one_and_two_threads(wide_world: Path, tmp_path: Path) -> None:
    (spec,) = combine_specs(["vaccine"], ["ratio=0.2"], ["sst2"], [0], protocol=wide_world)
    experiment = Experiment.settle(spec)
    weights = []
    threads = torch.get_num_threads()
    try:
        for number in THREADS:
            torch.set_num_threads(number)
            measured = run(experiment, run_context(tmp_path / str(number)))
            paths = [*(artifact.path for artifact in measured.final.artifacts.values()), measured.drift.path]
            files = [file for path in paths for file in sorted(path.rglob("*")) if file.suffix == ".safetensors"]
            weights.append([*(file.read_bytes() for file in files), (measured.drift.path / "drift.json").read_bytes()])
    finally:
        torch.set_num_threads(threads)
    assert len(weights[0]) == 3  # two adapters and the drift
    assert all(other == weights[0] for other in weights)


def test_norm_of_a_large_tensor_does_not_depend_on_threads() -> None:
    tensor = torch.randn(300_000, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    norms = set()
    try:
        for number in THREADS:
            torch.set_num_threads(number)
            norms.add(float(global_norm([tensor])))
    finally:
        torch.set_num_threads(threads)
    assert len(norms) == 1


PROBE = """
import os, sys

class Probe:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("torch starts with", os.environ.get("MKL_CBWR"))
            sys.meta_path.remove(self)

sys.meta_path.insert(0, Probe())
"""


@pytest.mark.parametrize(
    "program",
    [
        "sys.argv = ['hbv', 'run', '--protocol', {protocol!r}, '--dry-run', '--on', 'h100-80gb'];"
        "from harmbench_vaccine.cli import main; main()",
        "import harmbench_vaccine as hbv; hbv.run(protocol={protocol!r}, device='cuda:99')",
        "from support.cli import hbv",
    ],
    ids=["command line", "Python", "tests"],
)
def test_libraries_are_set_before_torch_starts(world: Path, tmp_path: Path, program: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("MKL_CBWR", "ATEN_CPU_CAPABILITY")}
    environment["HBV_HOME"] = str(tmp_path)
    if "support" in program:
        program = f"sys.path.insert(0, {str(Path(__file__).parent)!r}); import conftest; {program}"
    code = PROBE + program.format(protocol=str(world))
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert re.search("torch starts with AVX(2|512),STRICT", result.stdout), result.stderr


def test_the_variables_of_the_user_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    with library_defaults():
        assert os.environ["MKL_CBWR"] == "COMPATIBLE"
        assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    assert os.environ["MKL_CBWR"] == "COMPATIBLE"
    assert "TOKENIZERS_PARALLELISM" not in os.environ

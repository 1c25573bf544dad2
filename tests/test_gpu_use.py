"""Processes that use the GPU are reported before work starts, and a model that cannot fit next to them is refused."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harmbench_vaccine.reporting import gpu_use
from harmbench_vaccine.reporting.dry_run.costs import ModelSize
from harmbench_vaccine.reporting.gpu_use import check_gpu_memory, used_gpu
from support.cli import hbv
from support.runs import Notes
from support.simulated_gpu import simulated_gpu

GPUS = """\
GPU-11111111-2222-3333-4444-555555555555, 0, NVIDIA H100 80GB HBM3, 81920, 77824, 535.104.05
GPU-66666666-7777-8888-9999-000000000000, 1, NVIDIA H100 80GB HBM3, 81920, 0, 535.104.05
"""
ON_FIRST = "GPU-11111111-2222-3333-4444-555555555555, {pid}, {memory}\n"
RUN = ("run", "--defense", "none", "--attack", "ratio=0.25", "--backend", "transformers")
"""Nothing is aligned: the run is short."""


@pytest.fixture
def processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of the processes that a fake nvidia-smi lists; models run on a simulated GPU."""
    (tmp_path / "bin").mkdir()
    program, listed = tmp_path / "bin" / "nvidia-smi", tmp_path / "processes"
    program.write_text(
        f"#!/bin/sh\ncase $1 in --query-gpu*) cat <<'END'\n{GPUS}END\n;; --query-compute-apps*) cat {listed} ;; esac\n"
    )
    program.chmod(0o755)
    listed.write_text("")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("HBV_DEVICE", "cuda")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with simulated_gpu():
        yield listed


def needs_13_gibibytes(*args: Any, **options: Any) -> ModelSize:
    return ModelSize(13 * 2**30, 0)


def test_another_process_is_reported_before_work_starts(
    processes: Path, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes.write_text(ON_FIRST.format(pid=99999999, memory=76000))
    finished = hbv(*RUN, "--protocol", world, "--json", "--set", "finetune.samples=8")
    assert finished.code == 0, finished.err
    note = "GPU 0 is in use: pid 99999999 has 74.2 GiB (of another user or container); 4.0 GiB of 80.0 GiB are free."
    lines = finished.err.splitlines()
    assert [line for line in lines if "in use" in line] == [note]
    assert lines.index(note) < next(number for number, line in enumerate(lines) if "step" in line)
    assert finished.results[0]["environment"]["device"] == "cuda"


def test_a_model_that_cannot_fit_is_refused(
    processes: Path, world: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_use, "count_weights", needs_13_gibibytes)
    processes.write_text("".join(ON_FIRST.format(pid=99999990 + number, memory=19000) for number in range(4)))
    refused = hbv(*RUN, "--protocol", world)
    assert (refused.code, refused.out) == (2, "")
    assert "GPU 0 has 4.0 GiB of free memory, but the weights of " in refused.sentence
    assert " take 13.0 GiB: pid 99999990 has 18.6 GiB (of another user or container); pid 99999991" in refused.sentence
    assert "; and 1 more. Wait until it ends, or choose another device (--device)." in refused.sentence
    assert not own_home.exists()


@pytest.mark.parametrize("listed", ["", "own", "of another gpu", "on the cpu"])
def test_nothing_is_reported_of_other_gpus_and_own_processes(
    listed: str, processes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_use, "count_weights", needs_13_gibibytes)  # it would be refused
    if listed:
        processes.write_text(ON_FIRST.format(pid=os.getpid() if listed == "own" else 99999999, memory=76000))
    if listed == "of another gpu":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-66666666")
    if listed == "on the cpu":
        monkeypatch.setenv("HBV_DEVICE", "cpu")
    protocol = SimpleNamespace(dtype="bfloat16", quantization="none")
    experiment: Any = SimpleNamespace(model="meta-llama/Llama-2-7b-hf", protocol=protocol)  # what the check reads
    notes = Notes()
    check_gpu_memory([experiment], notes)
    assert notes.texts == []


@pytest.mark.parametrize(
    ("visible", "index"),
    [(None, 0), ("0", 0), ("1,0", 1), ("GPU-66666666-7777", 1), ("", None), ("MIG-1", None), ("7", None)],
)
def test_the_first_visible_gpu_is_used(
    visible: str | None, index: int | None, processes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpu = used_gpu()
    assert (gpu and gpu.index) == index

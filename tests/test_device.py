"""One module chooses the device of models, by --device, HBV_DEVICE and the GPUs that are visible."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from harmbench_vaccine.core import device as device_module
from harmbench_vaccine.core.device import (
    available_devices,
    device,
    forked_rng,
    place_model,
    restored_random_states,
    select_device,
)
from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.evaluation.environment import current_environment
from harmbench_vaccine.training.adapters import LoraStack
from support import tiny
from support.cli import hbv
from support.simulated_gpu import GPU, simulated_gpu

PACKAGE = Path(__file__).parents[1] / "harmbench_vaccine"


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the GPUs of this machine by four, as far as CUDA_VISIBLE_DEVICES shows them."""

    def count() -> int:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2,3")
        return len([number for number in visible.split(",") if number in ("0", "1", "2", "3")])

    monkeypatch.setattr(torch.cuda, "device_count", count)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count() > 0)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)


@pytest.fixture(autouse=True)
def no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HBV_DEVICE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")  # so that it is restored after the test
        monkeypatch.delenv(name)


def test_default_is_a_gpu_if_there_is_one(gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert device() == "cuda"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device() == "cpu"


def test_environment_variable_chooses(gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HBV_DEVICE", "cpu")
    assert device() == "cpu"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("HBV_DEVICE", "cuda:2")
    assert device() == "cuda"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2"  # for the libraries, and for processes that this one starts
    assert os.environ["HBV_DEVICE"] == "cuda"
    assert available_devices() == ["cpu", "cuda", "cuda:0"]


def test_number_counts_the_visible_gpus(gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert available_devices() == ["cpu", "cuda", "cuda:0", "cuda:1"]
    select_device("cuda:1")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"


def test_cpu_on_a_machine_with_gpus(gpus: None) -> None:
    assert select_device("cpu") == device() == "cpu"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""  # libraries, and the process of vLLM, see no GPU
    environment = current_environment()
    assert (environment.device, environment.gpu) == ("cpu", None)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("gpu", ("Unknown device 'gpu'. Did you mean 'cuda'?", "cpu, cuda, cuda:0, cuda:1, cuda:2, cuda:3")),
        ("GPU:1", ("Unknown device 'GPU:1'. Did you mean 'cuda:1'?",)),
        ("gpus", ("Unknown device 'gpus'", "cpu, cuda, cuda:0")),
        ("cuda:4", ("'cuda:4' is not available", "cuda:3")),
        ("cuda:-1", ("Unknown device 'cuda:-1'",)),
        ("cpu:1", ("Unknown device 'cpu:1'", "Did you mean 'cpu'?")),
        ("", ("Unknown device ''",)),
        ("mps", ("'mps' (Apple GPUs) is not supported", "float64", "Allowed: cpu")),
    ],
)
def test_bad_device(name: str, parts: tuple[str, ...], gpus: None, own_home: Path) -> None:
    for command in (("run",), ("score", "x"), ("check", "sft")):
        refused = hbv(*command, "--device", name)
        assert (refused.code, refused.out) == (2, "")
        assert all(part in refused.sentence for part in parts), refused.sentence
    assert not own_home.exists()
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name in ("cuda", "cuda:0"):
        with pytest.raises(BadInput, match=f"Device '{name}' is not available. Allowed on this machine: cpu."):
            select_device(name)


def test_another_name_of_a_gpu_on_a_machine_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(BadInput) as refused:
        select_device("gpu")
    assert str(refused.value) == "Unknown device 'gpu'. Did you mean 'cuda'? Allowed on this machine: cpu."


class TwoGpus:
    """A substitute for the random generators of `torch.cuda`, which draw from the last seed at their first use."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.generators: list[random.Random] = []
        self.seed = torch.default_generator.initial_seed()
        for name in ("is_initialized", "get_rng_state_all", "set_rng_state_all", "manual_seed_all"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def is_initialized(self) -> bool:
        return bool(self.generators)

    def get_rng_state_all(self) -> list[object]:
        return [generator.getstate() for generator in self.generators]

    def set_rng_state_all(self, states: list[tuple[Any, ...]]) -> None:
        for generator, state in zip(self.generators, states, strict=True):
            generator.setstate(state)

    def manual_seed_all(self, seed: int) -> None:
        self.seed = seed
        for generator in self.generators:
            generator.seed(seed)

    def draw(self) -> list[float]:
        if not self.generators:
            self.generators = [random.Random(self.seed), random.Random(self.seed)]
        return [generator.random() for generator in self.generators]


@pytest.mark.parametrize("used_before", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_random_states_of_gpus_are_restored(used_before: bool, fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    draws = []
    for has_block in (False, True):
        gpus = TwoGpus(monkeypatch)
        torch.manual_seed(1)  # which seeds the GPUs too
        if used_before:
            gpus.draw()
        if has_block:
            with suppress(KeyError), restored_random_states():
                torch.manual_seed(2)
                gpus.draw()
                if fails:
                    raise KeyError
        draws.append([gpus.draw(), torch.rand(2).tolist()])
    assert draws[0] == draws[1]


def test_random_states_of_other_gpus_are_not_touched(gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    forked: list[list[int]] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: forked.append(devices))
    forked_rng()
    select_device("cpu")
    forked_rng()
    assert forked == [[0], []]


def test_a_gpu_cannot_be_chosen_after_one_is_used(gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(BadInput, match="CUDA_VISIBLE_DEVICES=1"):
        select_device("cuda:1")
    assert not {"CUDA_VISIBLE_DEVICES", "HBV_DEVICE"} & os.environ.keys()


def test_the_same_gpu_can_be_chosen_again(gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):  # as by two calls of `run` in a notebook
        assert select_device("cuda:2") == device() == "cuda"
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "2"
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)  # the first call used it
    with pytest.raises(BadInput, match=r"'cuda:3' is not available\. Allowed on this machine: cpu, cuda, cuda:0"):
        select_device("cuda:3")


def test_check_runs_on_the_cpu(gpus: None) -> None:
    assert hbv("check", "sft", HBV_DEVICE="cuda").code == 0  # this machine has none: it would fail
    assert hbv("check", "./missing.py", "--device", "cuda:9").sentence.startswith("hbv: Device 'cuda:9'")


def test_a_stored_result_names_its_device(world: Path) -> None:
    command = ("run", "--protocol", world, "--device", "cpu", "--json", "--set", "align.rows=8")
    (result,) = hbv(*command, "--set", "finetune.samples=8").results
    assert result["environment"]["device"] == "cpu"


def test_the_option_takes_effect_before_torch_sees_a_gpu() -> None:
    script = "import sys; from harmbench_vaccine.core import device; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize("own_place", ["meta", "quantized", "sharded"])
def test_a_model_with_a_place_of_its_own_is_not_moved(own_place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would fail to move: this machine may have no GPU."""
    monkeypatch.setattr(device_module, "device", lambda: "cuda:99")
    model: Any = torch.nn.Linear(2, 2, device="meta" if own_place == "meta" else "cpu")
    if own_place == "quantized":
        model.quantization_method = "bitsandbytes"
    if own_place == "sharded":
        model.weight.device_mesh = None  # an attribute of DTensor
    assert place_model(model) is model
    with pytest.raises((RuntimeError, AssertionError)):
        place_model(torch.nn.Linear(2, 2))


def test_a_stack_of_adapters_places_its_model() -> None:
    with simulated_gpu():
        os.environ["HBV_DEVICE"] = "cuda"
        model = tiny.model().to("cpu")
        assert {weight.device for weight in LoraStack(model).model.parameters()} == {GPU}


def test_no_other_module_decides() -> None:
    apart = {"core/device.py", "inference/vllm_worker.py"}  # the worker is a process without this package
    users = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if re.search(r"cuda\.is_available|\"cuda\" if|mps\.is_available", path.read_text(encoding="utf-8"))
    }
    assert users - apart == {"reporting/doctor.py"}  # which reports an Apple GPU that is not used

"""No hook of a defense or an attack mixes tensors of the CPU and of a GPU, on a simulated GPU that refuses it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import PrivateAttr
from torch import Tensor, nn

from harmbench_vaccine.core.device import forked_rng
from harmbench_vaccine.core.types import STAGES, StageName
from harmbench_vaccine.plugins import Defense
from harmbench_vaccine.plugins.contract import find_plugins, generation, run_contract, trials
from harmbench_vaccine.plugins.contract import world as tiny_world
from harmbench_vaccine.plugins.contract.trials import aligned_adapter, begin_trial, edit_trial, train_trial
from harmbench_vaccine.plugins.contract.world import TinyWorld
from harmbench_vaccine.plugins.registry import ATTACKS, DEFENSES
from harmbench_vaccine.plugins.teams import DefenseTeam
from harmbench_vaccine.training import adapters
from harmbench_vaccine.training.adapters import Adapter
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage
from support.simulated_gpu import GPU, simulated_gpu
from support.trainer import interrupting

BUILT_IN = [name for name, entry in DEFENSES.entries().items() if entry.origin == "built-in"]
TRAINED = [(name, stage) for name in BUILT_IN for stage in STAGES if stage in DEFENSES.get(name).stages]
SMALL = {"refusal_ablation": "refusal_ablation:prompts=6,held_out=3"}
"""Attack -> a setting that runs the model a hundred times less often than the default."""
FEWER = {"deep_augmentation": {"triples": 20}, "tar": {"inner": 2, "every": 1}}
"""Defense -> parameters with fewer rows or passes than the default."""
MIXED = "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run models on a simulated GPU."""
    aligned_adapter()  # on the CPU, once for all tests
    monkeypatch.setenv("HBV_DEVICE", "cuda")
    with simulated_gpu():
        yield


@pytest.fixture
def world(tmp_path: Path) -> TinyWorld:
    return TinyWorld(tmp_path)


def run_hooks(world: TinyWorld, cls: type[Defense], name: StageName) -> Adapter:
    """Run all hooks of a defense in a stage of two steps, which is interrupted after the first and resumed."""
    folder = world.new_folder()

    def train(member: Defense) -> trials.Trial:
        trial = begin_trial(world, name, DefenseTeam(members=(member,), stage=name), cls.topology, longest=4)
        return edit_trial(train_trial(trial, folder, save_share=0.5))

    plugin = cls(**FEWER.get(cls.name, {})).seeded(0)
    if name != "repair":
        with suppress(KeyboardInterrupt):
            train(interrupting(plugin, "before_step", 2).seeded(0))
        assert list(folder.glob("checkpoint-1"))
    return train(plugin).adapter


# ---------------------------------------------------------------------------------------------------------------------
# Plug-ins


@pytest.mark.parametrize(("defense", "stage"), TRAINED, ids=[f"{name}-{stage}" for name, stage in TRAINED])
def test_no_hook_of_a_defense_mixes_devices(defense: str, stage: StageName, gpu: None, world: TinyWorld) -> None:
    adapter = run_hooks(world, DEFENSES.get(defense), stage)
    assert {factor.device.type for pair in adapter.factors.values() for factor in pair} == {"cpu"}  # as it is stored


@pytest.mark.parametrize("name", [name for name in BUILT_IN if DEFENSES.get(name)().changes_generation])
def test_no_hook_on_generation_mixes_devices(name: str, gpu: None, world: TinyWorld) -> None:
    plugin = DEFENSES.get(name)().seeded(0)
    if plugin.chooses_tokens:
        assert any(generation.chosen_tokens(world, plugin))
    if plugin.steers:
        assert generation.steering_of(world, plugin)


@pytest.mark.slow
@pytest.mark.parametrize("attack", [name for name, entry in ATTACKS.entries().items() if entry.origin == "built-in"])
def test_the_contract_of_an_attack_holds_on_a_gpu(attack: str, gpu: None) -> None:
    (plugin,) = find_plugins(SMALL.get(attack, attack))
    report = run_contract(plugin)
    assert report.holds, "\n".join(report.lines(120))


@pytest.mark.slow
@pytest.mark.parametrize("defense", ["constrained_sft", "ewc", "tvaccine"])
def test_the_contract_of_a_defense_with_state_holds_on_a_gpu(defense: str, gpu: None) -> None:
    (plugin,) = find_plugins(defense)
    report = run_contract(plugin)
    assert report.holds, "\n".join(report.lines(120))


# ---------------------------------------------------------------------------------------------------------------------
# Faults that tests on a GPU found


class TableOnCpu(Defense):
    """Looks rows up in a table of the CPU."""

    _table: Tensor = PrivateAttr(default_factory=lambda: torch.zeros(1000))

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        self._table[batch["rows"]]
        return stage.gradient(batch)


class MaskOnCpu(Defense):
    """Multiplies gradients by tensors made without a device."""

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        gradient = stage.gradient(batch)
        return Gradient(
            gradient.loss, [value * torch.ones(value.shape) for value in gradient.values if value is not None]
        )


class StateOnCpu(Defense):
    """Restores its state to the CPU."""

    _start: list[Tensor] = PrivateAttr(default_factory=list)

    def before(self, stage: TrainingStage) -> None:
        self._start = stage.values()

    def after_step(self, stage: TrainingStage) -> None:
        for parameter, start in zip(stage.trainable.values(), self._start, strict=True):
            parameter.detach() - start

    def state(self) -> dict[str, Tensor]:
        return {str(number): value for number, value in enumerate(self._start)}

    def restore(self, state: dict[str, Tensor]) -> None:
        self._start = [state[str(number)].cpu() for number in range(len(state))]


class NoiseOfCpuGenerator(Defense):
    """Draws noise on the GPU from a generator of the CPU."""

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        torch.randn(2, device=batch["labels"].device, generator=stage.generator("noise"))
        return stage.gradient(batch)


class NumbersInNumpy(Defense):
    """Reads parameters by numpy after a step."""

    def after_step(self, stage: TrainingStage) -> None:
        stage.values()[0].numpy()


class EditOnBothDevices(Defense):
    """Adds the parameters in training to those of the stored adapter."""

    stages: ClassVar[tuple[StageName, ...]] = ("repair",)

    def edit(self, stage: TrainingStage, adapter: Adapter) -> Adapter:
        for (a, _), parameter in zip(adapter.factors.values(), list(stage.trainable.values())[::2], strict=True):
            a + parameter
        return adapter


class SumOnCpu(Defense):
    """Keeps its state on the CPU, next to a model on the GPU."""

    _sum: Tensor = PrivateAttr(default_factory=lambda: torch.zeros(1))

    def after_step(self, stage: TrainingStage) -> None:
        self._sum = self._sum + torch.rand(1, generator=stage.generator("sum"))

    def state(self) -> dict[str, Tensor]:
        return {"sum": self._sum}

    def restore(self, state: dict[str, Tensor]) -> None:
        self._sum = state["sum"]


def test_state_returns_to_the_device_where_it_was(gpu: None, world: TinyWorld) -> None:
    run_hooks(world, SumOnCpu, "align")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (TableOnCpu, r"indices should be either on cpu or on the same device as the indexed tensor \(cpu\)"),
        (MaskOnCpu, MIXED),
        (StateOnCpu, MIXED),
        (NoiseOfCpuGenerator, "Expected a 'cuda' device type for generator but found 'cpu'"),
        (NumbersInNumpy, "can't convert cuda:0 device type tensor to numpy"),
        (EditOnBothDevices, MIXED),
    ],
)
def test_a_fault_is_noticed(fault: type[Defense], message: str, gpu: None, world: TinyWorld) -> None:
    with pytest.raises((RuntimeError, TypeError), match=message):
        run_hooks(world, fault, fault.stages[0])


def test_no_fault_is_noticed_on_the_cpu(world: TinyWorld) -> None:
    for fault in (TableOnCpu, MaskOnCpu, StateOnCpu, NoiseOfCpuGenerator, NumbersInNumpy, EditOnBothDevices):
        run_hooks(world, fault, fault.stages[0])


def test_a_model_that_moves_after_the_first_hook_is_noticed(
    gpu: None, world: TinyWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (adapters, tiny_world):  # then only the trainer moves the model, after `before`
        monkeypatch.setattr(module, "place_model", lambda model: model)
    with pytest.raises(RuntimeError, match=MIXED):
        run_hooks(world, DEFENSES.get("ewc"), "finetune")


# ---------------------------------------------------------------------------------------------------------------------
# The simulated GPU


@pytest.mark.parametrize(
    "operation",
    [
        lambda gpu, cpu: gpu + cpu,
        lambda gpu, cpu: cpu * gpu.sum(),
        lambda gpu, cpu: gpu @ cpu,
        lambda gpu, cpu: torch.stack([gpu.sum(), cpu.sum()]),
        lambda gpu, cpu: torch.equal(gpu, cpu),
        lambda gpu, cpu: nn.functional.embedding(cpu.long(), gpu[:, None]),
        lambda gpu, cpu: cpu.sum().add_(gpu.sum()),
        lambda gpu, cpu: torch.autograd.grad(gpu.requires_grad_().sum(), gpu, grad_outputs=cpu.sum()[None]),
    ],
)
def test_mixed_tensors_are_refused(operation: Callable[[Tensor, Tensor], Any], gpu: None) -> None:
    with pytest.raises(RuntimeError):
        operation(torch.ones(3, device="cuda"), torch.ones(3))


@pytest.mark.parametrize(
    "operation",
    [
        lambda gpu, cpu: gpu + cpu.sum(),
        lambda gpu, cpu: gpu[cpu.long()],
        lambda gpu, cpu: gpu.masked_fill(gpu > 0, cpu.sum()),
        lambda gpu, cpu: gpu.copy_(cpu),
        lambda gpu, cpu: cpu.to(gpu),
        lambda gpu, cpu: torch.zeros_like(gpu) + gpu.new_zeros(3),
        lambda gpu, cpu: torch.tensor(gpu.tolist(), device=gpu.device),
    ],
)
def test_what_cuda_permits_runs_on_the_gpu(operation: Callable[[Tensor, Tensor], Tensor], gpu: None) -> None:
    assert operation(torch.ones(3, device="cuda"), torch.ones(3)).device == GPU


def test_numbers_are_those_of_the_cpu(gpu: None) -> None:
    torch.manual_seed(0)
    layer, inputs = nn.Linear(4, 2), torch.randn(3, 4)
    expected = torch.autograd.grad(layer(inputs).square().sum(), list(layer.parameters()))
    actual = torch.autograd.grad(layer.to("cuda")(inputs.to("cuda")).square().sum(), list(layer.parameters()))
    assert all(torch.equal(value.cpu(), other) for value, other in zip(actual, expected, strict=True))


def test_the_gpu_has_random_numbers_of_its_own(gpu: None) -> None:
    torch.manual_seed(1)
    first, state = torch.rand(2, device="cuda").tolist(), torch.get_rng_state()
    with forked_rng():
        second = torch.rand(2, device="cuda").tolist()
    assert second == torch.rand(2, device="cuda").tolist() != first
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.rand(2, device="cuda").tolist() == first

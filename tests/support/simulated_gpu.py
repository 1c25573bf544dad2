"""A GPU that the CPU simulates, so that a test without a GPU notices tensors on two devices.

A tensor on the simulated GPU reports the device `cuda:0`, and contains an ordinary tensor with its numbers. Every
operation of torch runs on these numbers, so that models train, generate and branch on values as usual. An operation on
tensors of both devices raises the error of torch, with the exceptions that torch makes for CUDA: `copy_` and `to`, a
CPU tensor without dimensions among the inputs of a pointwise operation, and CPU indices of a GPU tensor. The GPU has
random numbers of its own.

To torch the tensors are on its `privateuseone` device, the only one whose backend Python code can replace. A build for
CPUs refuses `cuda` before any code of a test could run. `torch.cuda` is replaced by functions of the same names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

GPU = torch.device("cuda", 0)
_BACKEND = "simulated"
_MEMORY = 80 * 2**30


class SimulatedTensor(Tensor):
    """A tensor on the simulated GPU."""

    numbers: Tensor
    """The same tensor on the CPU."""

    @staticmethod
    def __new__(cls, numbers: Tensor) -> SimulatedTensor:
        tensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]  # not in torch's stubs
            cls,
            numbers.shape,
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            layout=numbers.layout,
            device=torch.device(_BACKEND, 0),
        )
        tensor.numbers = numbers
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["numbers"], None  # `Module.to` then exchanges the parameters, as their types differ

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: None, size: Any, stride: Any) -> SimulatedTensor:
        return SimulatedTensor(inner["numbers"])

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.numbers.__reduce_ex__(protocol)  # as `torch.load(..., map_location="cpu")` reads it

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = self.detach().clone()
        return torch.nn.Parameter(copied, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copied

    def __repr__(self, **options: Any) -> str:
        return f"{self.numbers!r} on {GPU}"

    def tolist(self) -> Any:
        return self.numbers.tolist()

    def numpy(self, **options: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.numbers.untyped_storage()

    @property
    def device(self) -> torch.device:
        return GPU

    @property
    def is_cuda(self) -> bool:
        return True

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        assert isinstance(value, SimulatedTensor)
        if value.shape == self.shape and value.dtype == self.dtype:
            self.numbers = value.numbers
        else:  # `numbers` alone would leave the old shape or type
            torch.utils.swap_tensors(self, torch.nn.Parameter(SimulatedTensor(value.numbers), self.requires_grad))


@contextmanager
def simulated_gpu() -> Iterator[None]:
    """Replace the GPUs of this machine by one simulated GPU inside the block."""
    _register_backend()
    with ExitStack() as stack:
        for module, functions in _REPLACEMENTS:
            for name, function in functions.items():
                stack.enter_context(patch.object(module, name, function))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))  # the modes are of this thread
        stack.enter_context(_Operations())
        stack.enter_context(_DeviceNames())
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Operations


class _Operations(TorchDispatchMode):
    """Runs operations without a simulated tensor among their inputs, such as `torch.zeros(2, device="cuda")`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _DeviceNames(TorchFunctionMode):
    """Translates `cuda` in the arguments of functions, which torch refuses, to the name of the simulated backend."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and _is_gpu(device := kwargs.get("device")):
            return func(*args, **{**kwargs, "device": "cpu"}).to(_backend_name(device))  # they copy to a device unseen
        if func is torch.device:
            return func(*args, **kwargs)
        if func is Tensor.cuda:
            return args[0].to(_backend_name(GPU))
        return func(*map(_backend_name, args), **{name: _backend_name(value) for name, value in kwargs.items()})


def _is_gpu(value: Any) -> bool:
    return isinstance(value, str | torch.device) and str(value).partition(":")[0] in ("cuda", _BACKEND)


def _backend_name(value: Any) -> Any:
    return torch.device(_BACKEND, 0) if _is_gpu(value) else value


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the numbers of its inputs; its results are on the device of the inputs, or on `device`."""
    if func.overloadpacket is torch.ops.aten.to:  # in inference mode, `to` is not split into simpler operations
        args, kwargs = _named_arguments(func, args, kwargs)
    inputs = [*_tensors(args), *_tensors(kwargs.values())]
    simulated = [value for value in inputs if isinstance(value, SimulatedTensor)]
    if 0 < len(simulated) < len(inputs):
        _check_mixture(func, args, inputs)
    device = kwargs.get("device")
    is_on_gpu = bool(simulated) if device is None else _is_gpu(device)
    if is_on_gpu and isinstance(generator := kwargs.get("generator"), torch.Generator):
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found '{generator.device}'")
    plain_args = _map_tensors(_numbers, args)
    plain_kwargs = {name: _map_tensors(_numbers, value) for name, value in kwargs.items()}
    if device is not None and is_on_gpu:
        plain_kwargs["device"] = torch.device("cpu")
    if kwargs.get("pin_memory"):
        plain_kwargs["pin_memory"] = False
    is_random = is_on_gpu and torch.Tag.nondeterministic_seeded in func.tags
    if func is torch.ops.aten.mm.dtype:  # a product with another data type, which torch has for CUDA only
        left, right, dtype = plain_args
        return SimulatedTensor(left.to(dtype) @ right.to(dtype))
    with _gpu_random_numbers(is_random):
        result = func(*plain_args, **plain_kwargs)
    if not is_on_gpu:
        return result
    wrappers = {id(tensor.numbers): tensor for tensor in simulated}  # an operation in place returns its input

    def on_gpu(tensor: Tensor) -> Tensor:
        return wrappers[id(tensor)] if id(tensor) in wrappers else SimulatedTensor(tensor)

    return _map_tensors(on_gpu, result)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    return type(value)([_map_tensors(change, item) for item in value]) if isinstance(value, list | tuple) else value


def _numbers(tensor: Tensor) -> Tensor:
    return tensor.numbers if isinstance(tensor, SimulatedTensor) else tensor


def _named_arguments(func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Name all arguments but the first; a tensor whose device and type `to` takes is replaced by these."""
    names = [argument.name for argument in func._schema.arguments]
    named = {**dict(zip(names[1:], args[1:], strict=False)), **kwargs}
    if "other" in named:
        raise NotImplementedError("the simulated GPU has no `to(other)` in inference mode; use `to(other.device)`")
    return args[:1], named


def _check_mixture(func: Any, args: Any, inputs: list[Tensor]) -> None:
    """Raise the error of torch if an operation on CUDA refuses these CPU tensors among its inputs."""
    name = func.overloadpacket.__name__
    on_cpu = [value for value in inputs if not isinstance(value, SimulatedTensor)]
    if name == "copy_":
        return
    if name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"):
        if not isinstance(args[0], SimulatedTensor):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        on_cpu = [value for value in args[2:3] if isinstance(value, Tensor) and not isinstance(value, SimulatedTensor)]
    if torch.Tag.pointwise in func.tags or name in _SCALAR_INPUTS or name.startswith("_foreach"):
        written = [args[0]] if name.endswith("_") and isinstance(args[0], Tensor) else []
        on_cpu = [value for value in on_cpu if value.dim() or any(value is target for target in written)]
    if on_cpu:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {GPU} and cpu! ({func})"
        )


_SCALAR_INPUTS = (
    "index_put",
    "index_put_",
    "_index_put_impl_",
    "masked_fill",
    "masked_fill_",
    "fill",
    "fill_",
    "where",
)


# ---------------------------------------------------------------------------------------------------------------------
# Random numbers, and `torch.cuda`

_GENERATOR = torch.Generator()


@contextmanager
def _gpu_random_numbers(is_random: bool) -> Iterator[None]:
    """Let the CPU draw from the generator of the GPU inside the block, if the operation is random."""
    if not is_random:
        yield
        return
    state = torch.default_generator.get_state()
    torch.default_generator.set_state(_GENERATOR.get_state())
    try:
        yield
    finally:
        _GENERATOR.set_state(torch.default_generator.get_state())
        torch.default_generator.set_state(state)


def _get_state(*args: Any) -> Tensor:
    return _GENERATOR.get_state()


def _set_state(state: Tensor, *args: Any) -> None:
    _GENERATOR.set_state(state)


def _set_states(states: list[Tensor]) -> None:
    _set_state(*states)


def _seed(seed: int) -> None:
    _GENERATOR.manual_seed(seed)


def _load(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `torch.load` for files that contain tensors of the simulated GPU as tensors of the CPU."""
    return lambda *args, map_location=None, **kwargs: function(*args, map_location="cpu", **kwargs)


_RANDOM: dict[str, Any] = {
    "get_rng_state": _get_state,
    "get_rng_state_all": lambda: [_get_state()],
    "set_rng_state": _set_state,
    "set_rng_state_all": _set_states,
    "manual_seed": _seed,
    "manual_seed_all": _seed,
}
_CUDA: dict[str, Any] = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "get_device_name": lambda *args: "simulated GPU",
    "get_device_capability": lambda *args: (9, 0),
    "get_device_properties": lambda *args: SimpleNamespace(
        name="simulated GPU", total_memory=_MEMORY, multi_processor_count=1, major=9, minor=0
    ),
    "mem_get_info": lambda *args: (_MEMORY, _MEMORY),
    "is_bf16_supported": lambda *args, **kwargs: True,
    "memory_allocated": lambda *args: 0,
    "max_memory_allocated": lambda *args: 1,
    **{
        name: lambda *args, **kwargs: None  # a function of its own for each name: torch looks them up by identity
        for name in (
            *("init", "_lazy_init", "set_device", "empty_cache", "synchronize", "ipc_collect"),
            "reset_peak_memory_stats",
        )
    },
}
_REPLACEMENTS: list[tuple[Any, dict[str, Any]]] = [
    (torch.cuda, _CUDA | _RANDOM),
    (torch.cuda.random, _RANDOM),
    (torch.accelerator, {"current_accelerator": lambda *args, **kwargs: None}),
    (torch, {"load": _load(torch.load)}),
]


@cache
def _register_backend() -> None:
    """Give torch a backend of Python code for its device `privateuseone`, which can be done once in a process."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    module = SimpleNamespace(**_CUDA, **_RANDOM, _is_in_bad_fork=lambda: False, get_amp_supported_dtype=list)
    _setup_privateuseone_for_python_backend(_BACKEND, backend_module=module)

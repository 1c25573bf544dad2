"""LoRA adapters: as plain tensors to store and edit, and stacked on one frozen base model to run and train.

A stack of LoRAs equals one LoRA whose factors are concatenated along the rank. So a stage stores tens of MB instead of
a merged copy of the base model, and an inference engine serves all experiments by switching adapters.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from harmbench_vaccine.core.device import forked_rng, place_model
from harmbench_vaccine.core.errors import BadInput, unknown_name
from harmbench_vaccine.core.types import TRAINED_ADAPTER, TrainSettings

if TYPE_CHECKING:  # peft and transformers take seconds to import, and a plan of stored runs needs neither
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

WEIGHTS = "adapter_model.safetensors"
ADAPTED_PREFIX = "base_model.model."
"""What peft writes before the name of a module of the base model."""
STANDARD_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The target modules that the papers list for every model. If an architecture has only some of them, LoRA adapts those,
as the authors' scripts do (OPT: q_proj, k_proj, v_proj)."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: the weight W of every module becomes W + scale * B A."""

    factors: Mapping[str, tuple[Tensor, Tensor]]
    """Module -> (A, B), with A (rank x inputs) and B (outputs x rank)."""
    scale: float
    """The factor of B A: alpha / rank."""

    @property
    def rank(self) -> int:
        """The rank of every module."""
        return next(iter(self.factors.values()))[0].shape[0]

    def delta(self, module: str) -> Tensor:
        """Return the change of a module's weight, scale * B A (outputs x inputs)."""
        a, b = self.factors[module]
        return self.scale * (b @ a)

    def scaled(self, factor: float) -> Adapter:
        """Return an adapter that changes every weight by `factor` times as much."""
        return replace(self, scale=factor * self.scale)

    def digest(self) -> str:
        """Return a hash of the scale and of all factors."""
        content = hashlib.sha256(str(self.scale).encode())
        for module, factors in sorted(self.factors.items()):
            content.update(module.encode())
            for factor in factors:
                content.update(factor.detach().cpu().contiguous().numpy().tobytes())
        return content.hexdigest()[:20]

    def save(self, folder: Path) -> None:
        """Write a folder in peft's format, which peft and vLLM read."""
        from peft import LoraConfig

        folder.mkdir(parents=True, exist_ok=True)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.scale * self.rank,  # type: ignore[arg-type]  # peft accepts a float
            target_modules=sorted({module.rpartition(".")[2] for module in self.factors}),
            task_type="CAUSAL_LM",
            inference_mode=True,
        )
        config.save_pretrained(str(folder))
        tensors = {}
        for module, (a, b) in self.factors.items():
            tensors[f"{ADAPTED_PREFIX}{module}.lora_A.weight"] = a.contiguous()
            tensors[f"{ADAPTED_PREFIX}{module}.lora_B.weight"] = b.contiguous()
        save_file(tensors, folder / WEIGHTS)

    @classmethod
    def load(cls, folder: Path) -> Adapter:
        """Read a folder in peft's format."""
        from peft import LoraConfig

        config = LoraConfig.from_pretrained(str(folder))
        tensors = load_file(folder / WEIGHTS)
        modules = sorted(
            name.removeprefix(ADAPTED_PREFIX).removesuffix(".lora_A.weight") for name in tensors if "lora_A" in name
        )
        return cls(
            {
                module: (
                    tensors[f"{ADAPTED_PREFIX}{module}.lora_A.weight"],
                    tensors[f"{ADAPTED_PREFIX}{module}.lora_B.weight"],
                )
                for module in modules
            },
            config.lora_alpha / config.r,
        )


def concatenate(adapters: Sequence[Adapter]) -> Adapter:
    """Return one adapter that equals several adapters together.

    The A factors are stacked; the B factors, multiplied by their scales, are concatenated along the rank.
    """
    if len(adapters) == 1:
        return adapters[0]
    factors = {}
    for module in sorted({module for adapter in adapters for module in adapter.factors}):
        shape = next(adapter.factors[module] for adapter in adapters if module in adapter.factors)
        parts = []
        for adapter in adapters:
            if module in adapter.factors:
                a, b = adapter.factors[module]
                parts.append((a, adapter.scale * b))
            else:  # this adapter does not change the module
                parts.append(
                    (
                        shape[0].new_zeros(adapter.rank, shape[0].shape[1]),
                        shape[1].new_zeros(shape[1].shape[0], adapter.rank),
                    )
                )
        factors[module] = torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts], dim=1)
    return Adapter(factors, 1.0)


class LoraStack:
    """One frozen base model with LoRA adapters, of which one combination is active at a time.

    Args:
        base: The base model; its weights are frozen, and moved to the device of this process (`place_model`).
        note: Prints a line for the user; every line is printed once.
    """

    MAX_FROZEN = 4
    """The number of frozen adapters that stay in memory; the least recently used one is evicted first."""

    def __init__(self, base: PreTrainedModel, note: Callable[[str], None] = lambda text: None) -> None:
        self.base = base
        self._note = cache(note)  # print every line once
        self.model: PreTrainedModel | PeftModel = place_model(base).requires_grad_(False)
        self._names: dict[Path, str] = {}
        self._active: list[str] = []
        self._found: list[nn.Module] | None = None
        self._count = 0

    def use(self, adapters: Sequence[Path]) -> nn.Module:
        """Return the model with exactly these adapters active, frozen and in evaluation mode."""
        self._activate(self._load(adapters))
        self.model.requires_grad_(False)
        return self.model.eval()

    def train(
        self, below: Sequence[Path], settings: TrainSettings, seed: int, start: Adapter | None = None
    ) -> dict[str, nn.Parameter]:
        """Add a trainable adapter on top of frozen adapters.

        Args:
            below: The frozen adapters.
            settings: Rank, alpha, dropout and target modules of a new adapter.
            seed: Seed of a new adapter's A factors; B starts as 0.
            start: An adapter to copy instead, with its rank, scale and modules.

        Returns:
            The trainable parameters by name, in float32 for any dtype of the base model.

        Raises:
            BadInput: The base model has no module with the name of a target, or none of the requested standard targets.
        """
        from peft import LoraConfig

        names = self._load(below)
        self.drop_trained()
        rank, alpha, targets = settings.lora_rank, settings.lora_alpha, list(settings.lora_targets)
        if start:  # keep its shape: another scale would change the model
            rank, alpha, targets = start.rank, start.scale * start.rank, sorted(start.factors)
        available = available_targets(self.base, targets)
        if missing := sorted(set(targets) - set(available)):
            self._note(
                f"{type(self.base).__name__} has no {', '.join(missing)}: "
                f"LoRA adapts only {', '.join(sorted(available))}."
            )
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type]  # peft accepts a float
            lora_dropout=settings.lora_dropout,
            target_modules=available,
            task_type="CAUSAL_LM",
        )
        with forked_rng():
            torch.manual_seed(seed)
            self._add(TRAINED_ADAPTER, config)
        if start:
            self._fill(TRAINED_ADAPTER, start)
        self._activate([*names, TRAINED_ADAPTER])
        trainable = {}
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(f".{TRAINED_ADAPTER}." in name)
            if parameter.requires_grad:
                trainable[name] = parameter
        return trainable

    def trained(self) -> Adapter:
        """Return a copy of the adapter that is being trained, as plain tensors on the CPU."""
        from peft import get_peft_model_state_dict

        assert _has_adapters(self.model)
        tensors = get_peft_model_state_dict(self.model, adapter_name=TRAINED_ADAPTER, save_embedding_layers=False)
        config = self.model.peft_config[TRAINED_ADAPTER]
        factors: dict[str, tuple[Tensor, Tensor]] = {}
        for name, a in tensors.items():
            if ".lora_A." in name:
                b = tensors[name.replace(".lora_A.", ".lora_B.")]
                module = name.removeprefix(ADAPTED_PREFIX).removesuffix(".lora_A.weight")
                factors[module] = a.detach().clone().cpu(), b.detach().clone().cpu()
        return Adapter(factors, config.lora_alpha / config.r)  # type: ignore[attr-defined]

    def drop_trained(self) -> None:
        """Remove the adapter that is being trained."""
        if _has_adapters(self.model) and TRAINED_ADAPTER in self.model.peft_config:
            self._delete(TRAINED_ADAPTER)

    def train_all_weights(self) -> dict[str, nn.Parameter]:
        """Make every weight of a model without adapters trainable, in float32 so that small steps are not rounded off.

        Returns:
            The parameters by name.
        """
        self.model.float().requires_grad_(True)
        return dict(self.model.named_parameters())

    @contextmanager
    def temporarily(self, adapters: Sequence[Path]) -> Iterator[None]:
        """Run the model with exactly these frozen adapters inside the block, in evaluation mode and without a graph.

        The previous adapters and modes are restored afterwards.

        Args:
            adapters: The adapters; `()` runs the base model alone.
        """
        training, active = self.model.training, self._active
        missing = any(path not in self._names for path in adapters)
        free = [parameter for parameter in self.model.parameters() if parameter.requires_grad] if missing else []
        self._activate(self._load(adapters))
        self._set_training(False)
        try:
            with torch.no_grad():
                yield
        finally:
            self._activate(active)
            self._set_training(training)
            for parameter in free:  # peft changes them when it adds an adapter
                parameter.requires_grad_(True)

    def _load(self, paths: Sequence[Path]) -> list[str]:
        """Load frozen adapters, without dropout: they are part of the model that the trained adapter builds on."""
        from peft import LoraConfig

        for path in paths:
            name = self._names.pop(path, None)
            if name is None:
                self._count += 1
                adapter, name = Adapter.load(path), f"frozen{self._count}"
                config = LoraConfig(
                    r=adapter.rank,
                    lora_alpha=adapter.scale * adapter.rank,  # type: ignore[arg-type]  # peft accepts a float
                    target_modules=sorted(adapter.factors),
                )
                with forked_rng():  # peft draws initial values, which `_fill` overwrites
                    self._add(name, config)
                self._fill(name, adapter)
            self._names[path] = name  # most recently used adapters come last
        for path in list(self._names)[: -max(self.MAX_FROZEN, len(paths))]:
            self._delete(self._names.pop(path))
        return [self._names[path] for path in paths]

    def _add(self, name: str, config: LoraConfig) -> None:
        from peft import get_peft_model

        from .lora_linear import LoraLinear

        if getattr(self.base, "quantization_method", None) is None:  # a quantized layer is computed by peft
            config._register_custom_module({nn.Linear: LoraLinear})
        self._found, problem = None, ""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fan_in_fan_out is set")  # peft corrects it for every module
            warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")  # `merge_adapter` unties them
            try:
                if _has_adapters(self.model):
                    self.model.add_adapter(name, config)
                else:
                    self.model = get_peft_model(self.base, config, adapter_name=name)
            except ValueError as error:
                problem = str(error)
        # peft takes the names of older models for the tensors of experts.
        if experts := sorted(getattr(config, "target_parameters", None) or ()):
            problem = (
                f"its experts' weights ({', '.join(experts)}) are not linear layers. Set lora_targets to other layers, "
                "such as [q_proj, k_proj, v_proj, o_proj]."
            )
        if problem:
            raise BadInput(f"LoRA cannot adapt {type(self.base).__name__}: {problem}")

    def _delete(self, name: str) -> None:
        assert _has_adapters(self.model)
        self._found = None
        remaining = [adapter for adapter in self.model.peft_config if adapter != name]
        if remaining:  # peft must not refer to a deleted adapter
            self.model.set_adapter(remaining[0])
            self.model.delete_adapter(name)
        else:
            self.model = self.model.unload()

    def _fill(self, name: str, adapter: Adapter) -> None:
        from peft import set_peft_model_state_dict

        assert _has_adapters(self.model)
        tensors = {}
        for module, (a, b) in adapter.factors.items():
            tensors[f"{ADAPTED_PREFIX}{module}.lora_A.weight"] = a
            tensors[f"{ADAPTED_PREFIX}{module}.lora_B.weight"] = b
        outcome: Any = set_peft_model_state_dict(self.model, tensors, adapter_name=name)
        if outcome.unexpected_keys:
            raise BadInput(
                f"The adapter does not fit {type(self.base).__name__}, which has no {outcome.unexpected_keys[0]}: "
                "use an adapter of this base model."
            )

    def _activate(self, names: Sequence[str]) -> None:
        """Select adapters as peft's `set_adapter` does, but leave `requires_grad`, whose changes take 40 ms."""
        self._active = list(names)
        for module in self._modules:
            if "_active_adapter" in vars(module):  # a layer of peft
                vars(module)["_disable_adapters"] = not names
                vars(module)["_active_adapter"] = list(names) or vars(module)["_active_adapter"]

    def _set_training(self, mode: bool) -> None:
        for module in self._modules:
            vars(module)["training"] = mode

    @property
    def _modules(self) -> list[nn.Module]:
        """All modules of the model: a search for them takes several ms, and a step of some defenses needs them."""
        if self._found is None:
            self._found = list(self.model.modules())
        return self._found


def available_targets(base: nn.Module, targets: Sequence[str]) -> list[str]:
    """Return the targets that a model has, without standard targets that it lacks.

    Raises:
        BadInput: The model has no matrix with the name of a target, or none of the requested standard targets.
    """
    matrices = {name.rpartition(".")[2] for name, module in base.named_modules() if _is_matrix(module)}
    available = [target for target in targets if target.rpartition(".")[2] in matrices]
    for target in targets:
        name = target.rpartition(".")[2]
        if name in matrices or (name in STANDARD_TARGETS and available):
            continue
        for path, part in (*base.named_modules(), *base.named_parameters()):
            if path.rpartition(".")[2] == name:
                shape = f" of {part.dim()} dimensions" if isinstance(part, nn.Parameter) else ""
                raise BadInput(
                    f"LoRA target {name!r} of {type(base).__name__} is of type {type(part).__name__}{shape}; LoRA "
                    f"adapts only linear layers. Allowed: {', '.join(sorted(matrices))}."
                )
        raise unknown_name("LoRA target", name, matrices, of=type(base).__name__)
    return available


def _is_matrix(module: nn.Module) -> bool:
    # peft keeps an adapted layer as `base_layer`
    return isinstance(module, nn.Linear) or is_transposed(module) or hasattr(module, "base_layer")


def is_transposed(module: nn.Module) -> bool:
    """Return whether a module is a linear layer with a transposed weight (inputs x outputs), as in GPT-2."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _has_adapters(model: PreTrainedModel | PeftModel) -> TypeGuard[PeftModel]:
    from peft import PeftModel

    return isinstance(model, PeftModel)

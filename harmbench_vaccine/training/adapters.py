"""LoRA adapters: as plain tensors to store and edit, and stacked on one frozen base model to run and train.

A stack of LoRAs is exactly one LoRA whose factors are concatenated along the rank, so a cell's artifact is tens of MB,
no merged copy of the base is ever written, and an engine serves every cell by switching adapters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from harmbench_vaccine.core.errors import BadInput, unknown_name
from harmbench_vaccine.core.types import TrainSettings

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
STANDARD_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The targets that the papers name for every model: where an architecture has only some of them, those are adapted, as
the authors' scripts do (OPT: q_proj, k_proj, v_proj)."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA: every module's weight W becomes W + scale * B A."""

    factors: Mapping[str, tuple[Tensor, Tensor]]
    """Module -> (A, B), A rank x inputs, B outputs x rank."""
    scale: float

    @property
    def rank(self) -> int:
        """The rank, the same for every module."""
        return next(iter(self.factors.values()))[0].shape[0]

    def delta(self, module: str) -> Tensor:
        """scale * B A (outputs x inputs)."""
        a, b = self.factors[module]
        return self.scale * (b @ a)

    def scaled(self, factor: float) -> Adapter:
        """The adapter whose change of every weight is `factor` times this one's."""
        return replace(self, scale=factor * self.scale)

    def digest(self) -> str:
        """A hash of every number in it."""
        whole = hashlib.sha256(str(self.scale).encode())
        for module, factors in sorted(self.factors.items()):
            whole.update(module.encode())
            for factor in factors:
                whole.update(factor.detach().cpu().contiguous().numpy().tobytes())
        return whole.hexdigest()[:20]

    def save(self, folder: Path) -> None:
        """Writes the folder in peft's format, which peft and vLLM read."""
        folder.mkdir(parents=True, exist_ok=True)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.scale * self.rank,  # type: ignore[arg-type]  # peft takes a float
            target_modules=sorted({module.rpartition(".")[2] for module in self.factors}),
            task_type="CAUSAL_LM",
            inference_mode=True,
        )
        config.save_pretrained(str(folder))
        tensors = {}
        for module, (a, b) in self.factors.items():
            tensors[f"{_PREFIX}{module}.lora_A.weight"] = a.contiguous()
            tensors[f"{_PREFIX}{module}.lora_B.weight"] = b.contiguous()
        save_file(tensors, folder / WEIGHTS)

    @classmethod
    def load(cls, folder: Path) -> Adapter:
        """Reads a folder in peft's format."""
        config = LoraConfig.from_pretrained(str(folder))
        tensors = load_file(folder / WEIGHTS)
        modules = sorted(
            name.removeprefix(_PREFIX).removesuffix(".lora_A.weight") for name in tensors if "lora_A" in name
        )
        return cls(
            {
                module: (tensors[f"{_PREFIX}{module}.lora_A.weight"], tensors[f"{_PREFIX}{module}.lora_B.weight"])
                for module in modules
            },
            config.lora_alpha / config.r,
        )


def concatenate(adapters: Sequence[Adapter]) -> Adapter:
    """The one LoRA that acts as all of them together: A stacked, B side by side with the scales folded in."""
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
            else:  # this adapter leaves the module alone
                parts.append(
                    (
                        shape[0].new_zeros(adapter.rank, shape[0].shape[1]),
                        shape[1].new_zeros(shape[1].shape[0], adapter.rank),
                    )
                )
        factors[module] = torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts], dim=1)
    return Adapter(factors, 1.0)


class LoraStack:
    """One frozen base model and the LoRAs that are laid on it; only one combination is active at a time."""

    TRAINED = "trained"
    MAX_FROZEN = 4
    """Frozen adapters that stay in memory; the one that was used longest ago goes first."""

    def __init__(self, base: PreTrainedModel, note: Callable[[str], None] = lambda text: None) -> None:
        self.base = base
        self._note = cache(note)  # what is said, is said once
        self.model: PreTrainedModel | PeftModel = base.requires_grad_(False)
        self._names: dict[Path, str] = {}
        self._active: list[str] = []
        self._made = 0

    def use(self, adapters: Sequence[Path]) -> nn.Module:
        """The model with exactly these adapters active, frozen and in evaluation mode."""
        self._activate(self._load(adapters))
        return self.model.eval()

    def train(
        self, below: Sequence[Path], settings: TrainSettings, seed: int, start: Adapter | None = None
    ) -> dict[str, nn.Parameter]:
        """Lays a trainable adapter on top of `below`: a fresh one (B = 0), or a copy of `start`.

        Returns the trainable parameters by name; they are float32 whatever the base is.

        Raises:
            BadInput: the base has no module of a target's name, or none of the conventional ones that are asked for.
        """
        names = self._load(below)
        self.drop_trained()
        rank, alpha, targets = settings.lora_rank, settings.lora_alpha, list(settings.lora_targets)
        if start:  # its own shape: under another scale it would be another model
            rank, alpha, targets = start.rank, start.scale * start.rank, sorted(start.factors)
        linear = {name.rpartition(".")[2] for name, module in self.base.named_modules() if _linear(module)}
        missing = sorted({target.rpartition(".")[2] for target in targets} - linear)
        left = [target for target in targets if target not in missing]
        if refused := [name for name in missing if name not in STANDARD_TARGETS or not left]:
            raise unknown_name("LoRA target", refused[0], linear, of=type(self.base).__name__)
        if missing:
            self._note(
                f"{type(self.base).__name__} has no {', '.join(missing)}: LoRA adapts {', '.join(sorted(left))} only"
            )
            targets = left
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type]  # peft takes a float
            lora_dropout=settings.lora_dropout,
            target_modules=targets,
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self._add(self.TRAINED, config)
        if start:
            self._fill(self.TRAINED, start)
        self._activate([*names, self.TRAINED])
        trainable = {}
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(f".{self.TRAINED}." in name)
            if parameter.requires_grad:
                trainable[name] = parameter
        return trainable

    def trained(self) -> Adapter:
        """The adapter being trained, as plain tensors."""
        assert isinstance(self.model, PeftModel)
        tensors = get_peft_model_state_dict(self.model, adapter_name=self.TRAINED)
        config = self.model.peft_config[self.TRAINED]
        factors: dict[str, tuple[Tensor, Tensor]] = {}
        for name, a in tensors.items():
            if ".lora_A." in name:
                b = tensors[name.replace(".lora_A.", ".lora_B.")]
                module = name.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
                factors[module] = a.detach().clone().cpu(), b.detach().clone().cpu()
        return Adapter(factors, config.lora_alpha / config.r)  # type: ignore[attr-defined]

    def drop_trained(self) -> None:
        """Forgets the adapter being trained."""
        if isinstance(self.model, PeftModel) and self.TRAINED in self.model.peft_config:
            self._delete(self.TRAINED)

    def train_all_weights(self) -> dict[str, nn.Parameter]:
        """Every weight of a model without adapters, to be trained, in float32: no small step is rounded off there."""
        self.model.float().requires_grad_(True)
        return dict(self.model.named_parameters())

    @contextmanager
    def temporarily(self, adapters: Sequence[Path]) -> Iterator[None]:
        """Inside, the model runs with exactly these frozen adapters, in evaluation mode and without a graph; `()` is
        the bare base. Afterwards everything is as it was."""
        training, active = self.model.training, self._active
        free = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._activate(self._load(adapters))
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._activate(active)
            self.model.train(training)
            for parameter in free:
                parameter.requires_grad_(True)

    def _load(self, paths: Sequence[Path]) -> list[str]:
        """Frozen adapters keep no dropout: their weights belong to the model that is trained on top of them."""
        for path in paths:
            name = self._names.pop(path, None)
            if name is None:
                self._made += 1
                adapter, name = Adapter.load(path), f"frozen{self._made}"
                config = LoraConfig(
                    r=adapter.rank,
                    lora_alpha=adapter.scale * adapter.rank,  # type: ignore[arg-type]  # peft takes a float
                    target_modules=sorted(adapter.factors),
                )
                with torch.random.fork_rng():  # peft draws what is filled in next
                    self._add(name, config)
                self._fill(name, adapter)
            self._names[path] = name  # the last entry is the one used last
        for path in list(self._names)[: -max(self.MAX_FROZEN, len(paths))]:
            self._delete(self._names.pop(path))
        return [self._names[path] for path in paths]

    def _add(self, name: str, config: LoraConfig) -> None:
        try:
            if isinstance(self.model, PeftModel):
                self.model.add_adapter(name, config)
            else:
                self.model = get_peft_model(self.base, config, adapter_name=name)
        except ValueError as error:
            raise BadInput(f"LoRA cannot be laid on {type(self.base).__name__}: {error}") from error

    def _delete(self, name: str) -> None:
        assert isinstance(self.model, PeftModel)
        left = [other for other in self.model.peft_config if other != name]
        if left:  # peft must not be left pointing at an adapter that is gone
            self.model.set_adapter(left[0])
            self.model.delete_adapter(name)
        else:
            self.model = self.model.unload()

    def _fill(self, name: str, adapter: Adapter) -> None:
        assert isinstance(self.model, PeftModel)
        tensors = {}
        for module, (a, b) in adapter.factors.items():
            tensors[f"{_PREFIX}{module}.lora_A.weight"] = a
            tensors[f"{_PREFIX}{module}.lora_B.weight"] = b
        outcome: Any = set_peft_model_state_dict(self.model, tensors, adapter_name=name)
        if outcome.unexpected_keys:
            raise BadInput(
                f"The adapter does not fit {type(self.base).__name__}: it has no {outcome.unexpected_keys[0]}."
            )

    def _activate(self, names: Sequence[str]) -> None:
        self._active = list(names)
        if not isinstance(self.model, PeftModel):
            return
        tuner: Any = self.model.base_model
        if names:
            tuner.enable_adapter_layers()
            tuner.set_adapter(list(names))
        else:
            tuner.disable_adapter_layers()
        self.model.requires_grad_(False)


def _linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or hasattr(module, "base_layer")  # peft wraps the layers that it adapts

"""Read LoRA folders of any origin, and refuse those that are more than the factors of linear layers."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from harmbench_vaccine.core.errors import BadInput, HbvError
from harmbench_vaccine.core.jsonl import parse_json

from .folders import model_skeleton

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import Tensor

    from harmbench_vaccine.training.adapters import Adapter

T = TypeVar("T")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_SUPPORTED = frozenset(
    (
        *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
        *("init_lora_weights", "eva_config"),
    )
)
"""Settings of peft that change nothing in addition to the factors, or that `read_adapter_folder` reads."""
_PLAIN_INITIALIZATIONS = (True, False, "gaussian", "orthogonal", "eva")
"""Initial values that leave the base model as it is; others subtract the adapter from it."""
_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


@dataclasses.dataclass(frozen=True)
class PeftFolder:
    """A LoRA adapter with the base model that its configuration names."""

    adapter: Adapter
    base: str | None
    """Location of the base model, `owner/name@revision` where a revision is named; None if there is none."""


def read_adapter_folder(folder: Path) -> PeftFolder:
    """Read a LoRA folder that peft wrote, with ranks and scales of its own for each module.

    Returns:
        The adapter in float32; modules of a smaller rank are filled with zeros.

    Raises:
        BadInput: The folder does not have a LoRA adapter of linear layers, its weights are a pickle, or they have
            another rank than its configuration.
        HbvError: A file is damaged.
    """
    config = _read_config(folder)
    factors = _read_factors(folder)
    _check_ranks(folder, config, factors)
    base, revision = config.base_model_name_or_path or None, config.revision
    if base and revision and not Path(base).exists():
        base = f"{base}@{revision}"
    return PeftFolder(_adapter(config, factors), base)


def check_fit(adapter: Adapter, base: str, folder: Path) -> None:
    """Check that an adapter has the modules and the sizes of a base model, whose weights are not read.

    Raises:
        BadInput: The base model lacks a module, or it has another size.
    """
    from harmbench_vaccine.training.adapters import is_transposed

    skeleton = model_skeleton(base)
    modules = dict(skeleton.named_modules())
    for name, (a, b) in adapter.factors.items():
        module = modules.get(name)
        weight: Any = getattr(module, "weight", None)
        shape = tuple(weight.shape) if weight is not None else ()
        if module is not None and is_transposed(module):
            shape = shape[::-1]  # inputs x outputs
        if shape != (b.shape[0], a.shape[1]):
            problem = f"{name} is {shape[0]} x {shape[1]}" if len(shape) == 2 else f"there is no linear layer {name}"
            raise BadInput(
                f"Adapter {folder} does not fit {base}, where {problem} (adapter: {b.shape[0]} x {a.shape[1]}): name "
                "its base model with --model."
            )


# ---------------------------------------------------------------------------------------------------------------------


def _read_config(folder: Path) -> LoraConfig:
    from peft import LoraConfig

    path = folder / CONFIG
    if not folder.is_dir():
        raise BadInput(
            f"{folder} is not a folder; allowed: a folder with a LoRA adapter of peft. To edit an adapter of the Hub, "
            "download it: hf download OWNER/NAME --local-dir FOLDER."
        )
    if not path.is_file():
        raise BadInput(f"{folder} has no {CONFIG}; allowed: a folder with a LoRA adapter of peft.")
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
        kind = values["peft_type"]
        config = LoraConfig.from_pretrained(str(folder)) if kind == "LORA" else None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise HbvError(f"{path} is not a configuration of peft ({error}): download or copy it again.") from error
    if config is None:
        raise BadInput(f"Adapter {folder} is of type {kind}; allowed: LORA.")
    defaults = LoraConfig()
    for field in dataclasses.fields(LoraConfig):
        value = getattr(config, field.name)
        if field.name not in _SUPPORTED and value and value != getattr(defaults, field.name):
            raise BadInput(
                f"Adapter {folder} uses {field.name} = {value!r}; allowed: LoRA without {field.name}, whose change of "
                "each weight is scale * B A."
            )
    if config.init_lora_weights not in _PLAIN_INITIALIZATIONS:
        raise BadInput(
            f"Adapter {folder} was initialized by {config.init_lora_weights}, which changes the base model: convert "
            "it to plain LoRA with `path_initial_model_for_weight_conversion` of peft's save_pretrained."
        )
    return config


def _read_factors(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Return module -> (A, B) in float32."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS
    if not path.is_file():
        raise BadInput(
            f"{folder} has no {WEIGHTS}, and pickled weights (.bin) are not read: load the adapter with peft and save "
            "it with save_pretrained."
        )
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise HbvError(f"{path} is damaged ({error}): download or copy it again.") from error
    sides: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _FACTOR.fullmatch(name)
        if match is None or tensor.dim() != 2:
            raise BadInput(
                f"Adapter {folder} has the tensor {name}; allowed: factors A and B of linear layers, without "
                "embeddings, saved modules or convolutions."
            )
        sides.setdefault(match["module"], {})[match["side"]] = tensor.float()
    for module, pair in sides.items():
        if set(pair) != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            raise HbvError(f"{path} is damaged: the factors of {module} do not fit. Download or copy it again.")
        if not all(factor.isfinite().all() for factor in pair.values()):
            raise HbvError(f"{path} is damaged: {module} has a value that is not a finite number.")
    if not sides:
        raise BadInput(f"Adapter {folder} changes no module.")
    return {module: (pair["A"], pair["B"]) for module, pair in sorted(sides.items())}


def _check_ranks(folder: Path, config: LoraConfig, factors: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Refuse weights of another configuration, whose scale is not known: peft does not load them either."""
    for module, (a, _) in factors.items():
        rank = _for_module(config.rank_pattern, module, config.r)
        if a.shape[0] != rank:
            raise BadInput(
                f"Adapter {folder} has rank {a.shape[0]} in {module}, but rank {rank} in {CONFIG}: copy both files "
                "from the same adapter."
            )


def _adapter(config: LoraConfig, factors: dict[str, tuple[Tensor, Tensor]]) -> Adapter:
    """Return an adapter with one rank and one scale; equal ranks and scales are kept as they are."""
    from torch.nn.functional import pad

    from harmbench_vaccine.training.adapters import Adapter

    scales = {module: _scale(config, module, a.shape[0]) for module, (a, _) in factors.items()}
    ranks = {module: a.shape[0] for module, (a, _) in factors.items()}
    if len(set(scales.values())) == len(set(ranks.values())) == 1:
        return Adapter(factors, next(iter(scales.values())))
    rank = max(ranks.values())
    filled = {
        module: (pad(a, (0, 0, 0, rank - ranks[module])), pad(scales[module] * b, (0, rank - ranks[module])))
        for module, (a, b) in factors.items()
    }
    return Adapter(filled, 1.0)


def _scale(config: LoraConfig, module: str, rank: int) -> float:
    """Return the factor of B A of a module."""
    alpha = _for_module(config.alpha_pattern, module, config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _for_module(patterns: dict[str, T] | None, module: str, default: T) -> T:
    """Return the value of a module; keys of patterns are the ends of names, as regular expressions."""
    from peft.utils.other import get_pattern_key

    values = patterns or {}
    return values.get(get_pattern_key(list(values), module), default)

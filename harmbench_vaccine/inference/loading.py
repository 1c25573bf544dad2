"""Loading models from a folder or the hub, and what is said when one cannot be had.

Weights are read from safetensors: a `.bin` file is a pickle. Many older repositories have nothing else on their main
branch; their safetensors are then often on a branch of the hub's conversion (`owner/name@refs/pr/N`). Those of them
that a protocol names are read all the same, by torch's unpickler that builds tensors and runs nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from harmbench_vaccine.core.errors import BadInput, HbvError
from harmbench_vaccine.data import hub
from harmbench_vaccine.data.sources import name_and_revision

PICKLED = frozenset({"PKU-Alignment/beaver-dam-7b", "facebook/opt-2.7b", "lmsys/vicuna-7b-v1.5"})
"""What the protocols name and has no safetensors on its main branch."""


def load_model(kind: Any, location: str, what: str = "Model", **options: Any) -> Any:
    """`kind.from_pretrained` (a model class of transformers) on what lies at a location; every weight must be there.
    `what` it is called in messages.

    Raises:
        BadInput: there is no access to it, no such revision, or it has no safetensors.
        HbvError: it is not on this machine and cannot be downloaded, or its weights are broken.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # its bars would break ours
    # Else the library has an outside service convert a repository without safetensors, and sends it the user's token.
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # its table of missing weights; ours is a sentence
    try:
        with readable_load_errors(location, what) as place:
            safe = None if place["pretrained_model_name_or_path"] in PICKLED else True
            model, found = kind.from_pretrained(**place, use_safetensors=safe, output_loading_info=True, **options)
    finally:
        logging.set_verbosity(level)
    for module in model.modules():  # on some CPUs bitsandbytes goes over to a kernel without a gradient after answering
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if missing := sorted(found["missing_keys"]):
        raise HbvError(
            f"{what} {location!r} lacks weights of a {type(model).__name__}: {missing[0]}"
            f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}."
        )
    return model


@contextmanager
def readable_load_errors(location: str, what: str = "Model") -> Iterator[dict[str, Any]]:
    """Inside, something is loaded from a location, of which `from_pretrained` is given the name and the revision; what
    fails is told in one sentence (see `load`)."""
    name, revision = name_and_revision(location)
    try:
        yield {"pretrained_model_name_or_path": name, **({"revision": revision} if revision else {})}
    except HbvError:
        raise
    except Exception as error:  # the libraries raise a dozen kinds; the user needs the sentence
        raise load_error(location, error, what) from error


def load_error(location: str, error: BaseException, what: str = "Model") -> HbvError:
    """What the user needs to know of a library's error, in one sentence."""
    text = " ".join(str(error).split())
    what = f"{what} {location!r}"
    if "model.safetensors" in text and ("does not appear to have" in text or "no file named" in text):
        return BadInput(
            f"{what} has no safetensors, and pickled weights (.bin) are not read: write a revision that has them "
            "behind @ (often refs/pr/N, in the discussions of its page), or load it with transformers, save it with "
            "save_pretrained(FOLDER) and name the folder."
        )
    if found := hub.hub_access_error(what, error, "name a folder"):
        return found
    if "SafetensorError" in hub.error_class_names(error):
        return HbvError(f"{what}: its weights are broken ({text}); download or copy them again.")
    return HbvError(f"{what} cannot be loaded: {text[:300]}")


def quantization_options(quantization: str, dtype: Any) -> Mapping[str, Any]:
    """The options of `from_pretrained` for a base model in 8 or 4 bits (bitsandbytes; LLM.int8, arXiv 2208.07339; NF4,
    arXiv 2305.14314), which computes in `dtype`."""
    if quantization == "none":
        return {}
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": four}


def check_quantization(quantization: str) -> None:
    """Looks whether a base model can be quantized here.

    Raises:
        BadInput: bitsandbytes is not installed.
    """
    from importlib.util import find_spec

    if quantization != "none" and find_spec("bitsandbytes") is None:
        raise BadInput(
            f"quantization {quantization!r} needs bitsandbytes, which is not installed: "
            "pip install 'harmbench-vaccine[quantization]'."
        )

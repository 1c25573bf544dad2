"""Load models from a folder or the Hub, with readable errors.

Weights are read from safetensors: a `.bin` file is a pickle. Many older repositories have only such a file on their
main branch; the Hub's conversion to safetensors is then often on a branch of its own (`owner/name@refs/pr/N`). The
repositories of this kind that a protocol names are read nevertheless, by the unpickler of torch that builds tensors and
runs no code. Python code in a folder or repository never runs (`trust_remote_code=False`), and no option allows it.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, Literal

from harmbench_vaccine.core.device import device, place_model
from harmbench_vaccine.core.errors import BadInput, HbvError
from harmbench_vaccine.data import hub
from harmbench_vaccine.data.gguf_files import is_gguf
from harmbench_vaccine.data.sources import local_path, name_and_revision

PICKLED = frozenset({"PKU-Alignment/beaver-dam-7b", "facebook/opt-2.7b", "lmsys/vicuna-7b-v1.5"})
"""Repositories that a protocol names and that have no safetensors on their main branch."""

JudgeHead = Literal["classifier", "generator"]


def load_model(kind: Any, location: str, what: str = "Model", *, new_head: bool = False, **options: Any) -> Any:
    """Load a model and check that no weight is missing.

    Args:
        kind: A model class of transformers, whose `from_pretrained` is called.
        location: Folder or hub id, with an optional `@revision`.
        what: Name of the model's role in messages.
        new_head: Draw the weights of the head at random where the files lack them or have another shape.
        options: Further options of `from_pretrained`.

    Raises:
        BadInput: Access is denied, the revision does not exist, or the repository has no safetensors.
        HbvError: The model is not on this machine and cannot be downloaded, or its weights are broken.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # its bars would break ours
    # Otherwise the library has an outside service convert a repository without safetensors, and sends it the user's
    # token.
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # its table of missing weights; ours is a sentence
    try:
        with readable_load_errors(location, what) as source:
            safetensors = None if source["pretrained_model_name_or_path"] in PICKLED else True
            model, info = kind.from_pretrained(
                **source,
                use_safetensors=safetensors,
                output_loading_info=True,
                ignore_mismatched_sizes=new_head,
                **options,
            )
    finally:
        logging.set_verbosity(level)
    for module in model.modules():  # on some CPUs bitsandbytes switches to a kernel without a gradient after answering
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    missing = sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})
    if new_head:  # the pooler of an encoder is a part of its head that not every checkpoint has
        body = f"{model.base_model_prefix}."
        missing = [name for name in missing if name.startswith(body) and ".pooler." not in name]
    if missing:
        raise HbvError(
            f"{what} {location!r} lacks weights of a {type(model).__name__}: {missing[0]}"
            f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}."
        )
    for name, weight in model.named_parameters():
        if not is_finite(weight):
            raise HbvError(f"{what} {location!r} has broken weights: {name} has a value that is not a finite number.")
    return model


def is_finite(weight: Any) -> bool:
    """Return False for a weight with NaN or an infinite value; quantized weights (a byte or less) are not examined."""
    if not weight.numel() or not weight.is_floating_point() or weight.dtype.itemsize == 1:
        return True
    return all(bound.isfinite() for bound in weight.aminmax())  # needs no memory, unlike `isfinite` of all values


def load_judge(location: str, head: JudgeHead, dtype: str = "auto") -> tuple[Any, Any]:
    """Load the tokenizer and the model of a judge, on the GPU if one exists.

    Args:
        location: Folder or hub id.
        head: "classifier" for a sequence classifier, "generator" for a model that writes text.
        dtype: Data type of the weights; "auto" is the one of the files on a GPU, and float32 on a CPU.

    Raises:
        HbvError: The judge cannot be loaded.
    """
    import torch
    import transformers

    is_native = dtype == "auto" and device() == "cuda"
    weights_dtype: Any = "auto" if is_native else getattr(torch, "float32" if dtype == "auto" else dtype)
    tokenizer, config = load_tokenizer_and_config(location)
    kind: Any = transformers.AutoModelForSequenceClassification
    if head == "generator":
        multimodal = "ConditionalGeneration" in (config.architectures or [""])[0]  # Llama Guard 4
        kind = transformers.AutoModelForImageTextToText if multimodal else transformers.AutoModelForCausalLM
    model = load_model(kind, location, "Judge", dtype=weights_dtype)
    return tokenizer, place_model(model).eval()


def load_tokenizer_and_config(location: str, what: str = "Judge") -> tuple[Any, Any]:
    """Load the tokenizer and the configuration of a model, without its weights.

    Args:
        location: Folder or hub id.
        what: Name of the model's role in messages.

    Raises:
        HbvError: They cannot be loaded.
    """
    from transformers import AutoConfig, AutoTokenizer

    with readable_load_errors(location, what) as source:
        config = AutoConfig.from_pretrained(**source)  # first: its errors are more specific
        return AutoTokenizer.from_pretrained(**source), config


def generation_settings(location: str) -> Any:
    """Load the generation settings of a model, or derive them from its configuration where it has no such file."""
    from transformers import GenerationConfig

    name, revision = name_and_revision(location)
    try:
        return GenerationConfig.from_pretrained(name, revision=revision or "main", trust_remote_code=False)
    except OSError:  # no such file
        return GenerationConfig.from_model_config(load_tokenizer_and_config(location)[1])


def check_model(location: str, known: Sequence[str]) -> None:
    """Check that a location has a model, before any work is spent on it.

    Args:
        location: Folder or hub id.
        known: Models to suggest where the location is wrong.

    Raises:
        BadInput: The location is neither the folder of a model, a GGUF file nor a model on the Hub.
    """
    path = local_path(location)
    if path is not None and (is_gguf(path) or (path / "config.json").is_file()):  # of a GGUF file, see `check_gguf`
        return
    if path is None:
        from transformers import AutoConfig

        try:
            with readable_load_errors(location) as source:
                AutoConfig.from_pretrained(**source)
            return
        except HbvError as error:
            problem = str(error)
            if "is gated" in problem:  # the name is right
                raise
    else:
        problem = f"Model {location!r} has no config.json."
    close = difflib.get_close_matches(location, known, n=1, cutoff=0.4)
    guess = f" Did you mean {close[0]!r}?" if close and close[0] != location else ""
    allowed = f"a folder of a model, a GGUF file, or a Hub id such as {', '.join(known)}"
    raise BadInput(f"{problem}{guess} Allowed: {allowed}.")


@contextmanager
def readable_load_errors(location: str, what: str = "Model") -> Iterator[dict[str, Any]]:
    """Translate what the libraries raise inside the block into one-line errors.

    Args:
        location: Folder or hub id, with an optional `@revision`.
        what: Name of the role in messages.

    Yields:
        The arguments of `from_pretrained` for this location: the name, the revision if there is one, and the refusal
        of Python code at the location.
    """
    name, revision = name_and_revision(location)
    try:
        yield {
            "pretrained_model_name_or_path": name,
            "trust_remote_code": False,  # without it, the library asks on stdin whether to run the code
            **({"revision": revision} if revision else {}),
        }
    except HbvError:
        raise
    except Exception as error:  # the libraries raise a dozen kinds; the user needs one sentence
        raise load_error(location, error, what) from error


def load_error(location: str, error: BaseException, what: str = "Model") -> HbvError:
    """Translate an exception of the libraries into a one-line error."""
    text = " ".join(str(error).split())
    subject = f"{what} {location!r}"
    if "model.safetensors" in text and ("does not appear to have" in text or "no file named" in text):
        return BadInput(
            f"{subject} has no safetensors, and pickled weights (.bin) are not read. Add a revision that has them, "
            "owner/name@REVISION (often refs/pr/N, in the discussions of its page), or load it with transformers, "
            "save it with save_pretrained(FOLDER) and name the folder."
        )
    if "trust_remote_code" in text:
        return BadInput(
            f"{subject} needs Python code of its own folder or repository, which hbv never runs: use a model of an "
            "architecture that transformers includes."
        )
    if "model type" in text and "does not recognize this architecture" in text:
        kind = text.partition("model type `")[2].partition("`")[0]
        return BadInput(
            f"{subject} has the model_type {kind!r}, which transformers {version('transformers')} lacks. Install a "
            "newer version, or choose another model."
        )
    if text.startswith("Unrecognized configuration class"):
        kind = text.partition("'>")[0].rpartition(".")[2]
        return BadInput(
            f"{subject} has an architecture that cannot be used here ({kind}). Choose a language model to train or to "
            "write, and a classifier for a judge that classifies."
        )
    if access_error := hub.hub_access_error(subject, "model", location, error, "choose a folder"):
        return access_error
    if "SafetensorError" in hub.error_class_names(error):
        return HbvError(f"{subject} has broken weights ({text}); download or copy them again.")
    return HbvError(f"{subject} cannot be loaded: {text[:300]}")


def quantization_options(quantization: str, dtype: Any) -> Mapping[str, Any]:
    """Return the options of `from_pretrained` for a base model in 8 or 4 bits (bitsandbytes).

    Sources: LLM.int8, arXiv 2208.07339; NF4, arXiv 2305.14314.

    Args:
        quantization: "none", "8bit" or "4bit".
        dtype: Data type of the computation.
    """
    if quantization == "none":
        return {}
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": nf4}


def check_quantization(quantization: str) -> None:
    """Check that a base model can be quantized on this machine.

    Raises:
        BadInput: bitsandbytes is not installed.
    """
    from importlib.util import find_spec

    if quantization != "none" and find_spec("bitsandbytes") is None:
        raise BadInput(
            f"quantization {quantization!r} needs bitsandbytes, which is not installed: "
            "pip install 'harmbench-vaccine[quantization]'."
        )

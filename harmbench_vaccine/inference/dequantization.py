"""Dequantize GGUF files once, into ordinary folders in the store, which every other part then reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from harmbench_vaccine.core.errors import BadInput, HbvError
from harmbench_vaccine.core.progress import Advance, Progress
from harmbench_vaccine.core.store import Store
from harmbench_vaccine.data.gguf_files import MODEL, STAGE, count_tensors, dequantization_inputs, dequantized_artifact
from harmbench_vaccine.data.sources import gguf_file

from .loading import is_finite, load_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_gguf(location: str) -> None:
    """Check that a GGUF file can be dequantized, as far as its header shows; other locations are skipped.

    Raises:
        BadInput: The file does not exist or has no header, or the package `gguf` is missing.
    """
    path = gguf_file(location)
    if path is None:
        return
    count_tensors(path)
    if find_spec("gguf") is None and not dequantized_artifact(path).is_dir():
        raise BadInput(
            f"Model {location!r} needs the package gguf, which is not installed: pip install 'harmbench-vaccine[gguf]'."
        )


def ensure_dequantized(locations: Iterable[str], store: Store) -> None:
    """Dequantize the GGUF files among the locations of models that the store does not have yet.

    A folder has the weights in float32, which represents every quantized value, the tokenizer with its chat template,
    and the generation settings.

    Raises:
        BadInput: A file is damaged, or transformers cannot read its architecture.
    """
    for path in sorted({path for location in locations if (path := gguf_file(location))}):
        store.get_or_create(STAGE, dequantization_inputs(path), partial(_dequantize, path, store.progress))


def mark_dequantized(locations: Iterable[str], store: Store) -> None:
    """Mark the dequantized files among the locations of models as used, so that a cleanup keeps them."""
    for path in filter(None, map(gguf_file, locations)):
        store.use.mark(f"{STAGE}/{dequantized_artifact(path).name}")


def gguf_config(location: str) -> Any:  # a configuration of transformers, of any architecture
    """Return the configuration of a model in a GGUF file, without reading its weights.

    Raises:
        BadInput: The file is damaged, or transformers cannot read its architecture.
    """
    from transformers import AutoConfig

    path = gguf_file(location)
    assert path is not None
    with TemporaryDirectory() as folder, _readable_errors(path):
        source = _linked(path, Path(folder))
        config = AutoConfig.from_pretrained(**source)
    config.name_or_path = str(path.parent)  # of messages; the folder of the link no longer exists
    return config


def _dequantize(path: Path, progress: Progress, folder: Path, work: Path) -> None:
    """Write the model of a GGUF file, as an ordinary folder, into the folder of an artifact.

    Raises:
        BadInput: The file is damaged, or transformers cannot read its architecture.
    """
    from transformers import AutoTokenizer

    tensors, source = count_tensors(path), _linked(path, work)
    with progress.bar(f"dequantize {path.name}", tensors + 1) as advance:
        with _readable_errors(path):
            tokenizer = AutoTokenizer.from_pretrained(**source)
            with _reported_tensors(advance) as reported:
                model = _load_float32(path, source)
        advance(tensors - len(reported), "weights")
        tokenizer.save_pretrained(folder / MODEL)
        model.save_pretrained(folder / MODEL)
        advance(1, "files")


def _linked(path: Path, folder: Path) -> dict[str, Any]:
    """Link a GGUF file from an otherwise empty folder, since transformers also reads other files in its folder.

    Returns:
        The arguments of `from_pretrained` for the link.
    """
    link = folder / "file.gguf"
    link.unlink(missing_ok=True)  # of an earlier attempt
    link.symlink_to(path)
    return {"pretrained_model_name_or_path": str(folder), "gguf_file": link.name, "trust_remote_code": False}


def _load_float32(path: Path, source: Mapping[str, Any]) -> PreTrainedModel:
    """Return the model of a GGUF file.

    Args:
        path: The file, for messages.
        source: The arguments of `from_pretrained` for it.

    Raises:
        BadInput: A weight is missing or has a value that is not a finite number.
    """
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    kind: Any = AutoModelForCausalLM  # its types leave out `output_loading_info`
    model: PreTrainedModel
    model, info = kind.from_pretrained(
        **source,
        quantization_config=GgufConfig(dequantize=True),  # otherwise blocks stay packed where a kernel reads them
        dtype=torch.float32,
        output_loading_info=True,
    )
    if missing := sorted(info["missing_keys"]):
        raise BadInput(
            f"{path} lacks weights of a {type(model).__name__}: {missing[0]}"
            f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}."
        )
    for name, weight in model.named_parameters():
        if not is_finite(weight):
            raise BadInput(f"{path} is damaged: {name} has a value that is not a finite number. Download it again.")
    return model


@contextmanager
def _reported_tensors(advance: Advance) -> Iterator[list[Any]]:
    """Advance a bar for each tensor that transformers dequantizes in the block, instead of its own bar.

    Yields:
        The tensors that were reported; some architectures are read without a report.
    """
    from transformers import modeling_gguf_pytorch_utils as library
    from transformers.utils import logging

    reported: list[Any] = []

    def bar(tensors: Iterable[Any], **_: Any) -> Iterator[Any]:
        for tensor in tensors:
            yield tensor
            reported.append(tensor)
            advance(1, "weights")

    logging.disable_progress_bar()
    before = library.tqdm
    library.tqdm = bar  # it has no option for another bar
    try:
        yield reported
    finally:
        library.tqdm = before


@contextmanager
def _readable_errors(path: Path) -> Iterator[None]:
    """Translate what the libraries raise on a GGUF file into one-line errors, without their warnings."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except (HbvError, MemoryError):
        raise
    except Exception as error:  # a damaged file leads to a dozen kinds of errors
        if isinstance(error, OSError) and error.errno:  # of the disk
            raise
        reason = " ".join(str(error).split())[:300]
        if reason.startswith("Unrecognized configuration class"):
            raise load_error(str(path), error) from error
        if "architecture" in reason or "not supported" in reason:
            raise BadInput(f"{path} cannot be used: {reason}") from error
        problem = reason or type(error).__name__
        raise BadInput(f"{path} is damaged or incomplete: {problem}. Download it again.") from error
    finally:
        logging.set_verbosity(level)

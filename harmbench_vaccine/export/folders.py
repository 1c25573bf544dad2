"""Write models to folders that peft and transformers load without this package."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from harmbench_vaccine.core.disk_errors import readable_disk_errors
from harmbench_vaccine.core.durable import flush, flush_folder
from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.paths import check_writable, home
from harmbench_vaccine.data.sources import name_and_revision
from harmbench_vaccine.inference.loading import load_tokenizer_and_config, readable_load_errors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from harmbench_vaccine.training.adapters import Adapter


def check_new_folder(folder: Path) -> Path:
    """Check that a folder can be created, before any work.

    Returns:
        Its absolute path, without links.

    Raises:
        BadInput: It exists and is not empty, it is inside the store, or it cannot be written to.
    """
    folder = folder.resolve()
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder} is a file: choose a new folder.")
    check_writable(folder, "The folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise BadInput(f"Folder {folder} is not empty, and nothing is overwritten: choose a new or an empty folder.")
    store = (home() / "store").resolve()
    if folder.is_relative_to(store):
        raise BadInput(f"Folder {folder} is inside the store {store}, which `hbv store gc` cleans: choose another one.")
    return folder


@contextmanager
def new_folder(folder: Path, content: str) -> Iterator[Path]:
    """Write a folder completely or not at all: the block fills a temporary folder, which is then renamed.

    The files move into a folder that exists: it may be the working directory or the root of a disk.

    Args:
        folder: The folder, as `check_new_folder` returns it.
        content: Description of the files, for error messages.

    Raises:
        HbvError: The disk is full, or a file cannot be written.
    """
    name = f".{folder.name}.{secrets.token_hex(4)}.tmp"
    temporary = folder / name if folder.is_dir() else folder.with_name(name)
    with readable_disk_errors(content, folder):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            flush_folder(temporary)
            if temporary.parent == folder:
                for path in sorted(temporary.iterdir()):
                    os.rename(path, folder / path.name)
                flush(folder)
            else:
                os.rename(temporary, folder)
                flush(folder.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def save_adapter(adapter: Adapter, base: str, folder: Path) -> None:
    """Write an adapter as an ordinary peft folder, with the base model that it is for.

    Args:
        adapter: The adapter.
        base: Location of the base model.
        folder: The folder, which may exist.
    """
    from peft import LoraConfig

    from harmbench_vaccine.training.adapters import is_transposed

    adapter.save(folder)
    skeleton = model_skeleton(base)
    config = LoraConfig.from_pretrained(str(folder))
    config.base_model_name_or_path, config.revision = name_and_revision(base)
    config.target_modules = target_modules(adapter, skeleton)
    config.fan_in_fan_out = any(is_transposed(skeleton.get_submodule(name)) for name in adapter.factors)
    if float(config.lora_alpha).is_integer():
        config.lora_alpha = int(config.lora_alpha)
    config.save_pretrained(str(folder))


def target_modules(adapter: Adapter, skeleton: PreTrainedModel) -> list[str]:
    """Return the names for `target_modules`: the last parts of the names if they select exactly the adapted modules.

    Args:
        adapter: The adapter.
        skeleton: The base model, with or without its weights.
    """
    last_parts = {name.rpartition(".")[2] for name in adapter.factors}
    selected = {name for name, _ in skeleton.named_modules() if name.rpartition(".")[2] in last_parts}
    return sorted(last_parts if selected == set(adapter.factors) else adapter.factors)


def model_skeleton(base: str) -> PreTrainedModel:
    """Return the modules of a base model without their weights, which are not read.

    Raises:
        HbvError: The configuration of the model cannot be loaded, or it is not a language model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = load_tokenizer_and_config(base, "Base model")[1]
    with readable_load_errors(base, "Base model"), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return model

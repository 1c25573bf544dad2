"""New plug-in files from a scaffold (`hbv new`)."""

from __future__ import annotations

import keyword
import os
import re
from pathlib import Path
from string import Template

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.paths import user_path

from . import registry


def write_scaffold(kind: str, name: str, folder: str) -> str:
    """Write a new plug-in that runs unchanged.

    Args:
        kind: Kind of plug-in with a file in `scaffolds`, such as `defense`.
        name: The name of the plug-in.
        folder: An existing folder.

    Returns:
        The path of the file, `folder/name.py`.

    Raises:
        BadInput: The name is not an identifier or is taken, or the file exists or cannot be written.
    """
    title = "".join(part[:1].upper() + part[1:] for part in name.split("_"))
    if any(keyword.iskeyword(word) or not word.isidentifier() for word in (name, title)):
        raise BadInput(
            f"{name!r} is not a valid name; allowed: letters, digits and _, a letter first, and not a Python keyword."
        )
    entries = getattr(registry, f"{kind.upper()}S").entries()
    if name in entries:
        raise BadInput(
            f"The {kind} {name!r} already exists ({entries[name].origin}); choose a name that `hbv list {kind}s` "
            "does not print."
        )
    template = (Path(__file__).parent / "scaffolds" / f"{kind}.py.txt").read_text(encoding="utf-8")
    if re.search(rf"^from .* import .*\b{title}\b", template, re.MULTILINE):
        raise BadInput(
            f"{name!r} would give the class the name {title!r}, which the file imports; choose another name."
        )
    path = os.path.join(user_path(folder), f"{name}.py")
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(Template(template).substitute(title=title))
    except FileExistsError as error:
        raise BadInput(f"{path} already exists; choose another name, or another folder with --dir.") from error
    except OSError as error:
        raise BadInput(f"{path} cannot be written ({error.strerror}); choose a writable folder with --dir.") from error
    return path

"""A plug-in file to start from: `hbv new`."""

from __future__ import annotations

import keyword
import os
import re
from pathlib import Path
from string import Template

from harmbench_vaccine.core.errors import BadInput

from . import registry


def write_scaffold(kind: str, name: str, folder: str) -> str:
    """Writes `folder/name.py`, a defense or an attack that runs as it is, and returns its path.

    Raises:
        BadInput: the name is no identifier or taken, the file exists (it is left as it is), or cannot be written.
    """
    title = "".join(part[:1].upper() + part[1:] for part in name.split("_"))
    if any(keyword.iskeyword(word) or not word.isidentifier() for word in (name, title)):
        raise BadInput(
            f"{name!r} names no {kind}; allowed: letters, digits and _, a letter first, no word of Python's."
        )
    found = getattr(registry, f"{kind.upper()}S").entries()
    if name in found:
        raise BadInput(f"The {kind} {name!r} exists ({found[name].origin}); allowed: any name but {', '.join(found)}.")
    template = (Path(__file__).parent / "scaffolds" / f"{kind}.py.txt").read_text(encoding="utf-8")
    if re.search(rf"^from .* import .*\b{title}\b", template, re.MULTILINE):
        raise BadInput(f"{name!r} would name its class {title!r}, which the file imports; allowed: any other name.")
    path = os.path.join(folder, f"{name}.py")
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(Template(template).substitute(title=title))
    except FileExistsError as error:
        raise BadInput(f"{path} exists and is left as it is; name another, or another folder by --dir.") from error
    except OSError as error:
        raise BadInput(f"{path} cannot be written ({error.strerror}); give --dir a folder you may write to.") from error
    return path

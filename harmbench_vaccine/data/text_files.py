"""Read text files (UTF-8, plain or compressed) that may be damaged, huge, or no files at all."""

from __future__ import annotations

import codecs
import gzip
import lzma
import os
import stat
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harmbench_vaccine.core.errors import BadInput, shortened

SIZE_VARIABLE = "HBV_MAX_DATA_MB"
"""Environment variable with the largest size of a data file after decompression, in MB."""
_DEFAULT_MB = 2000
_CHUNK = 1 << 20
_OPEN: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}


def read_text(path: Path) -> str:
    """Read a text file, and decompress it if its name ends in .gz or .xz.

    Raises:
        BadInput: The path is not a file that can be read, the file is not UTF-8 text without NUL characters, or it is
            larger than `$HBV_MAX_DATA_MB` after decompression.
    """
    check_regular(path)
    limit = size_limit()
    content = bytearray()
    try:
        with _OPEN.get(path.suffix.lower(), open)(path, "rb") as file:
            while chunk := file.read(_CHUNK):  # in chunks, since a small file may decompress to more than the memory
                content += chunk
                if 0 in chunk:
                    raise _not_text(path, content, content.index(0), "a NUL character")
                if len(content) > limit:
                    raise too_large(path)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise BadInput(f"{path} cannot be read: {first_line(error)}.") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_text(path, content, error.start, f"the byte 0x{content[error.start]:02x}") from error


def check_regular(path: Path) -> None:
    """Require a regular file: to read from a pipe or a device may never end.

    Raises:
        BadInput: The path is something else, does not exist, or may not be read.
    """
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}.") from error
    if not regular:
        raise BadInput(f"{path} is not a regular file; allowed: a file, or for data a folder with a file per split.")


def size_limit() -> int:
    """Return the largest size of a data file after decompression, in bytes.

    Raises:
        BadInput: `$HBV_MAX_DATA_MB` is not a positive whole number.
    """
    text = os.environ.get(SIZE_VARIABLE) or str(_DEFAULT_MB)
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text)):
        raise BadInput(f"{SIZE_VARIABLE} is {shortened(text)!r}; allowed: a positive whole number of megabytes.")
    return int(text) * 1_000_000


def too_large(path: Path) -> BadInput:
    """Return the error for a file that is larger than the limit."""
    return BadInput(
        f"{path} has more than {size_limit() // 1_000_000} MB of text, decompressed. If this is right, set the "
        f"environment variable {SIZE_VARIABLE} to a larger number of megabytes."
    )


def _not_text(path: Path, content: bytearray, position: int, what: str) -> BadInput:
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return BadInput(f"{path} is not UTF-8 text but UTF-16: save it with the encoding UTF-8.")
    line = content.count(b"\n", 0, position) + 1
    return BadInput(f"{path}, line {line}, is not UTF-8 text: it has {what}. Save the file with the encoding UTF-8.")


def first_line(error: Exception) -> str:
    """Return the first line of the message of a library's error, or its name where it has no message.

    The message of an error of the system is without its number and path.
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error) or type(error).__name__).splitlines()[0]

"""Foreign text in Markdown pages: one line, visible, and without links, images, HTML or formatting."""

from __future__ import annotations

import re
from collections.abc import Sequence

from harmbench_vaccine.core.visible import visible

_MEANING = re.compile(
    r"""
      [\\`*~|]                        # code, emphasis, strikethrough, the cells of a table
    | (?<![^\W_])_ | _(?![^\W_])      # emphasis; `_` inside a name has no meaning
    | \](?=[(\[:])                    # links, images, definitions of links
    | (?<=:)/(?=/) | (?<=www)\.       # addresses, which are links without any brackets
    """,
    re.VERBOSE | re.IGNORECASE,
)


def markdown_text(text: str) -> str:
    """Return a text as one line of Markdown that shows it as it is."""
    line = visible(re.sub(r"[ \t\r\n]+", " ", text).strip())
    return _MEANING.sub(r"\\\g<0>", line).replace("&", "&amp;").replace("<", "&lt;")


def markdown_row(cells: Sequence[str]) -> str:
    """Return the row of a table with these texts."""
    return f"| {' | '.join(map(markdown_text, cells))} |"

"""Write the pictures of commands in docs/images/terminal-*.svg, from their real output at 80 columns.

    python docs/site/screenshots.py [NAME ...]

`run` and `show` need a run of each defense on the testbed, and train if the store does not have it.
"""

from __future__ import annotations

import html
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "docs" / "images"
WIDTH, HEIGHT = 80, 44
"""Columns of the terminal, and the number of lines that a picture shows."""
CELL = 12.2
"""Width of a character in a picture of rich."""
COMMANDS = {
    "run": "hbv run --defense sft --defense vaccine --attack ratio=0.1",
    "show": "hbv show vaccine-d2 --limit 1",
    "leaderboard": "hbv leaderboard leaderboards/testbed.csv",
    "info": "hbv info vaccine",
    "check": "hbv check vaccine",
}
"""Name of a picture -> its command."""
SVG = """\
<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: monospace; font-size: {char_height}px; line-height: {line_height}px; }}
.{unique_id}-title {{ font-size: 18px; font-weight: bold; font-family: sans-serif; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" />
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""
"""The picture of a terminal: rich's own format loads a font from another server."""


def command_output(name: str, home: Path | None = None) -> str:
    """Run the command of a picture, and return what it prints on stdout in a terminal.

    Args:
        name: The name of the picture.
        home: The folder for `HBV_HOME`; None: the user's.

    Raises:
        subprocess.CalledProcessError: The command fails.
    """
    environment = {**os.environ, "COLUMNS": str(WIDTH), "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    environment |= {"HBV_HOME": str(home)} if home else {}
    environment.pop("NO_COLOR", None)
    command = [sys.executable, "-m", "harmbench_vaccine", *shlex.split(COMMANDS[name])[1:]]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def picture(name: str, output: str) -> str:
    """Return the SVG of a command with the first lines of its output."""
    lines = output.rstrip().splitlines()
    count = len(lines) - HEIGHT
    rest = [f"… {count} more line{'s' if count > 1 else ''}"] if count > 0 else []
    console = Console(width=WIDTH, record=True, file=io.StringIO(), force_terminal=True)
    console.print(Text(f"$ {COMMANDS[name]}", style="bold"))
    console.print(Text.from_ansi("\n".join([*lines[:HEIGHT], *rest])))
    return console.export_svg(title="", code_format=SVG, unique_id=f"terminal-{name}")


def picture_text(svg: str) -> str:
    """Return the text in an SVG of `picture`, line by line; rich leaves out parts that are only spaces."""
    rows: dict[float, str] = {}
    for x, y, text in re.findall(r'<text [^>]*?x="([\d.]+)" y="([\d.]+)"[^>]*>(.*?)</text>', svg):
        column = round(float(x) / CELL)
        rows[float(y)] = rows.get(float(y), "").ljust(column) + html.unescape(text).replace("\xa0", " ")
    return "\n".join(rows[y].rstrip() for y in sorted(rows))


if __name__ == "__main__":
    for picture_name in sys.argv[1:] or COMMANDS:
        path = IMAGES / f"terminal-{picture_name}.svg"
        path.write_text(picture(picture_name, command_output(picture_name)), encoding="utf-8")
        print(path.relative_to(ROOT))

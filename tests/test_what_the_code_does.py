"""The page on published code: every program runs alone and checks its effect, and every named file exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "what-the-code-does.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))


def programs(text: str) -> list[str]:
    """Return the Python blocks of a text."""
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_every_section_has_one_program_and_the_three_items() -> None:
    assert len(SECTIONS) == PAGE.count("\n## ") >= 13
    assert len(programs(PAGE)) == len(SECTIONS)
    for heading, text in SECTIONS.items():
        assert len(programs(text)) == 1, heading
        assert re.findall(r"^- \*\*(\w+)\*\*", text, re.MULTILINE) == ["Code", "Equation", "Here"], heading


@pytest.mark.parametrize("heading", SECTIONS)
def test_program_reproduces_the_effect(heading: str) -> None:
    """Run a program in its own namespace; the random state of other tests stays as it is."""
    (program,) = programs(SECTIONS[heading])
    nodes = list(ast.walk(ast.parse(program)))
    imported = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {(node.module or "").split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
    assert imported <= {"torch"}
    assert any(isinstance(node, ast.Assert) for node in nodes)
    namespace: dict[str, Any] = {"__name__": "program"}
    with torch.random.fork_rng(devices=[]):
        exec(compile(program, heading, "exec"), namespace)


def test_named_files_exist() -> None:
    names = set(re.findall(r"`((?:defenses|attacks|harmbench_vaccine)/[\w/]+\.py)`", PAGE))
    assert len(names) >= 10
    for name in names:
        assert (ROOT / name).is_file(), name

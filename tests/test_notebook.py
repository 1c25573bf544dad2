"""The notebook and the page on Python: a small file without outputs, and programs that run."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

import harmbench_vaccine as hbv

DOCS = Path(__file__).parents[1] / "docs"
NOTEBOOK, PAGE = DOCS / "quickstart.ipynb", DOCS / "from-python.md"


def notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def cells() -> list[str]:
    return [cell.source for cell in notebook().cells if cell.cell_type == "code"]


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def definition(program: str, beginning: str) -> str:
    """Return the source of the top-level statement that begins like this."""
    nodes = (ast.get_source_segment(program, node) or "" for node in ast.parse(program).body)
    return next(text for text in nodes if text.startswith(beginning))


def test_notebook_is_valid_and_without_outputs() -> None:
    nbformat.validate(notebook())
    code = [cell for cell in notebook().cells if cell.cell_type == "code"]
    assert code
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)


@pytest.mark.parametrize("programs", [cells, blocks], ids=["notebook", "page"])
def test_names_of_the_package_exist(programs: Any) -> None:
    """Every `hbv.name` is public."""
    nodes = list(ast.walk(ast.parse("\n".join(programs()))))
    names = {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "hbv"
    }
    assert {"run", "results", "answers"} <= names <= set(hbv.__all__)


def test_notebook_follows_the_page() -> None:
    assert "(quickstart.ipynb)" in PAGE.read_text(encoding="utf-8")
    page = "".join(blocks())
    shared = [definition(cells()[0], "small = {"), definition(cells()[-1], "class SlowUser")]
    assert all(text and text in page for text in shared)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_notebook_runs(testbed_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It shows progress, a table for a result, rows, and a plot; and no warning."""
    from nbclient import NotebookClient

    monkeypatch.setenv("HBV_HOME", str(testbed_home))
    executed = notebook()
    NotebookClient(executed, timeout=500, resources={"metadata": {"path": str(DOCS)}}).execute()
    outputs = [output for cell in executed.cells if cell.cell_type == "code" for output in cell.outputs]
    assert {output.output_type for output in outputs} == {"display_data", "execute_result"}
    pages = [output.data.get("text/html", "") for output in outputs]
    assert any("6 runs: done" in page for page in pages)
    assert any("vaccine=2 against ratio=0.3" in page for page in pages)
    assert any("slow_user=0.8 against ratio=0.3" in page for page in pages)
    assert any("image/png" in output.data for output in outputs)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_page_runs(testbed_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks, in their order, are one script."""
    monkeypatch.setenv("HBV_HOME", str(testbed_home))
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks()), encoding="utf-8")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for text in ("vaccine-", "slow_user=0.8", "Did you mean 'vaccine'"):
        assert text in done.stdout
    assert "Traceback" not in done.stderr

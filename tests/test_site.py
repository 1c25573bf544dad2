"""The documentation site: equations, generated pages, navigation, links, and no request to another server."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree

import pytest

from harmbench_vaccine.experiment.protocol import protocol_names
from harmbench_vaccine.plugins.registry import ATTACKS, DEFENSES, SCORERS, TASKS

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "defenses": list(DEFENSES.entries()),
    "attacks": list(ATTACKS.entries()),
    "tasks": list(TASKS.entries()),
    "scorers": list(SCORERS.entries()),
    "protocols": protocol_names(),
}
"""Folder of the site -> the names of its pages."""


@pytest.fixture(scope="module")
def site() -> Iterator[dict[str, ModuleType]]:
    """The modules that generate the pages."""
    names = ("equations", "generated", "hooks", "screenshots")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "docs" / "site"))
        yield {name: importlib.import_module(name) for name in names}
    for name in names:
        del sys.modules[name]


@pytest.fixture(scope="module")
def pages(site: dict[str, ModuleType]) -> dict[tuple[str, str], str]:
    """The generated pages: (folder, name) -> Markdown."""
    return {(folder, name): page for folder, name, page in site["generated"].generated_pages()}


# ---------------------------------------------------------------------------------------------------------------------
# Equations


def shown(mathml: str) -> str:
    """Return what a reader of MathML sees, with scripts in braces."""

    def text(node: ElementTree.Element) -> str:
        parts = [text(child) for child in node]
        marks = {"msub": "_", "msup": "^"}
        if node.tag in marks:
            return f"{parts[0]}{marks[node.tag]}{{{parts[1]}}}"
        if node.tag == "msubsup":
            return f"{parts[0]}_{{{parts[1]}}}^{{{parts[2]}}}"
        return " " if node.tag == "mspace" else (node.text or "") + "".join(parts)

    return " ".join(text(ElementTree.fromstring(mathml)).split())


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        ("w <- w - lr * grad L(w; B_a)", "w←w−lr·∇L(w;B_{a})"),
        ("eps_l = rho * g_l / (||(g_1, ..., g_L)|| + 1e-7)", "ε_{l}=ρ·g_{l}/(‖(g_{1},…,g_{L})‖+10^{−7})"),
        ("L'(w) = L(w; B_a) with h_l replaced by h_l + eps_l", "L′(w)=L(w;B_{a}) with h_{l} replaced by h_{l}+ε_{l}"),
        ("d_l = alpha / 2 * ||h_l - h0_l||_F^2", "d_{l}=α/2·‖h_{l}−h_{0}_{l}‖_{F}^{2}"),
        ("M_ij <- 0 where the score is in the top share alpha", "M_{ij}←0 where the score is in the top share α"),
        ("omega_t = 2 sigmoid(-beta_t D_t), a constant", "ω_{t}=2 sigmoid(−β_{t} D_{t}), a constant"),
        ("x_harmful -> y_harmful", "x_{harmful}→y_{harmful}"),
        ("C = V (V^T V)^+ V^T", "C=V(V^{T} V)^{+}V^{T}"),
    ],
)
def test_formulas_are_rendered(site: dict[str, ModuleType], formula: str, expected: str) -> None:
    assert shown(site["equations"].math(formula)).replace("^{+} V", "^{+}V") == expected


def test_equations_of_every_docstring_are_valid_mathml(pages: dict[tuple[str, str], str]) -> None:
    tables = [table for page in pages.values() for table in re.findall(r"<table.*?</table>", page, re.DOTALL)]
    assert len(tables) > 20
    for table in tables:
        for row in ElementTree.fromstring(table).findall("./tr"):
            cells = row.findall("./td")
            assert sum(int(cell.get("colspan", "1")) for cell in cells) == 2
            assert not any(mark in "".join(cells[0].itertext()) for mark in ("<-", "_", "||", "`"))


def test_formula_without_a_note_does_not_widen_the_column_of_the_others(site: dict[str, ModuleType]) -> None:
    table = ElementTree.fromstring(site["equations"].equation_table(["w <- w - g        a note", "v = w", "x = v"]))
    assert [len(row.findall("./td")) for row in table.findall("./tr")] == [2, 1, 1]


# ---------------------------------------------------------------------------------------------------------------------
# Pages


def test_every_plugin_and_protocol_has_a_page(pages: dict[tuple[str, str], str]) -> None:
    assert set(pages) == {(folder, name) for folder, names in FOLDERS.items() for name in names}
    vaccine = pages["defenses", "vaccine"]
    for text in (
        "| `rho` | `2.0` | a number \\>= 0 |",
        "paper, section 5.1",
        "Vaccine, Table 1",
        "(https://arxiv.org/abs/2402.01109)",
    ):
        assert text in vaccine, text
    assert "defenses/vaccine.py" in vaccine
    assert "## Published figures" not in pages["attacks", "ratio"]
    assert "lora_rank" in pages["protocols", "testbed"]


def test_text_of_docstrings_is_not_interpreted_as_markdown(site: dict[str, ModuleType]) -> None:
    text = site["generated"].docstring_markdown("A *b* and c_d_e, <f> [g] with `h*_`:\n\n    w <- w - g\n\nEnd.")
    first, table, last = text.split("\n\n")
    assert first == r"A \*b\* and c\_d\_e, \<f\> \[g\] with `h*_`:"
    assert table.startswith('<table class="equations">')
    assert last == "End."


def test_every_page_of_the_documentation_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    pages = re.findall(r"[\w-]+\.md", text)
    assert len(pages) == len(set(pages))
    assert set(pages) - {"index.md"} == {path.name for path in (ROOT / "docs").glob("*.md")}


@pytest.mark.parametrize(
    ("uri", "target", "path", "place"),
    [
        ("index.md", "docs/results.md", "docs/results.md", "results.md"),
        ("index.md", "leaderboards/testbed.csv", "leaderboards/testbed.csv", "repository/leaderboards/testbed.csv"),
        ("testbed.md", "../README.md", "README.md", "index.md"),
        ("testbed.md", "../LICENSE", "LICENSE", "repository/LICENSE.md"),
        ("defenses/vaccine.md", f"{ROOT.as_uri()}/defenses/vaccine.py", "defenses/vaccine.py", None),
        ("repository/CHANGELOG.md", "docs/results.md", "docs/results.md", "results.md"),
    ],
)
def test_links_of_the_repository_become_links_of_the_site(
    site: dict[str, ModuleType], uri: str, target: str, path: str, place: str | None
) -> None:
    assert site["hooks"].repository_path(uri, target) == path
    assert site["hooks"].site_uri(path) == (place or f"repository/{path}.md")


def test_links_to_other_sites_stay(site: dict[str, ModuleType]) -> None:
    assert site["hooks"].repository_path("index.md", "https://arxiv.org/abs/2402.01109") is None


# ---------------------------------------------------------------------------------------------------------------------
# Pictures of commands


def stable(text: str) -> list[str]:
    """Return the words of an output that are the same on every machine: without numbers, run ids and answers."""
    lines = [line for line in text.splitlines() if "│" not in line]
    return re.sub(r"-[0-9a-f]{8}\b|[-\d.()]", "", "\n".join(lines)).split()


def assert_picture_is_current(screenshots: ModuleType, name: str, home: Path, exact: bool) -> None:
    committed = (screenshots.IMAGES / f"terminal-{name}.svg").read_text(encoding="utf-8")
    current = screenshots.picture(name, screenshots.command_output(name, home))
    expected, text = screenshots.picture_text(committed), screenshots.picture_text(current)
    repair = f"run: python docs/site/screenshots.py {name}"
    assert text.startswith(f"$ {screenshots.COMMANDS[name]}\n")
    assert all(len(line) <= screenshots.WIDTH for line in text.splitlines())
    if exact:
        assert expected == text, repair
    else:
        assert stable(expected) == stable(text), repair


@pytest.mark.parametrize("name", ["info", "leaderboard"])
def test_pictures_of_fixed_output_are_current(site: dict[str, ModuleType], name: str, tmp_path: Path) -> None:
    assert_picture_is_current(site["screenshots"], name, tmp_path, exact=True)


@pytest.mark.slow
def test_picture_of_a_check_is_current(site: dict[str, ModuleType], tmp_path: Path) -> None:
    assert_picture_is_current(site["screenshots"], "check", tmp_path, exact=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="a run id depends on Python's normal form of code")
def test_pictures_of_runs_are_current(site: dict[str, ModuleType], testbed_home: Path) -> None:
    for name in ("run", "show"):
        assert_picture_is_current(site["screenshots"], name, testbed_home, exact=False)


def test_pictures_load_nothing_and_are_on_a_page(site: dict[str, ModuleType]) -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md"))
    for name in site["screenshots"].COMMANDS:
        assert f"images/terminal-{name}.svg" in pages
        svg = (site["screenshots"].IMAGES / f"terminal-{name}.svg").read_text(encoding="utf-8")
        ElementTree.fromstring(svg)
        assert not re.search(r"@font-face|@import|url\((?!#)|href", svg)


# ---------------------------------------------------------------------------------------------------------------------
# The built site


class PageReader(HTMLParser):
    """Collects what a page loads, what it links to, and its anchors."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = {""}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors.add(values.get("id", ""))
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif "src" in values or (tag == "link" and values.get("rel") != "canonical"):
            self.loaded.append(values.get("src") or values["href"])


def read_page(path: Path) -> PageReader:
    reader = PageReader()
    reader.feed(path.read_text(encoding="utf-8"))
    return reader


@pytest.mark.slow
def test_site_builds_and_needs_no_other_server(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "HBV_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = {path.resolve(): read_page(path) for path in tmp_path.rglob("*.html")}
    for folder, names in FOLDERS.items():
        for name in names:
            assert (tmp_path / folder / f"{name}.html") in pages, name
    for path, page in pages.items():
        for target in page.loaded:
            assert not urlsplit(target).netloc, (path, target)
        for target in [*page.loaded, *page.links]:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc or path.name == "404.html":
                continue
            file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if file.is_dir():
                file /= "index.html"
            assert file.is_file(), (path, target)
            if parts.fragment and file in pages:
                assert unquote(parts.fragment) in pages[file].anchors, (path, target)
    for path in tmp_path.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(?:https?:)?//|@import", path.read_text(encoding="utf-8")), path

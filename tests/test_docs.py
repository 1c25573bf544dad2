"""The documentation agrees with the code: links, commands, run ids, methods with their papers, fields and paths."""

from __future__ import annotations

import dataclasses
import pkgutil
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from harmbench_vaccine import __version__
from harmbench_vaccine.cli import commands
from harmbench_vaccine.cli.log_file import close_log
from harmbench_vaccine.core.types import TrainSettings
from harmbench_vaccine.evaluation.results_csv import COLUMNS
from harmbench_vaccine.experiment.experiment import Experiment, settle_all
from harmbench_vaccine.experiment.keys import run_id
from harmbench_vaccine.experiment.protocol import Protocol
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.experiment.spec_lists import combine_specs
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.plugins.registry import ATTACKS, DEFENSES
from support.cli import subcommands

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "harmbench_vaccine"
PAGES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not any(part.startswith(".") or part in ("build", "dist") for part in path.relative_to(ROOT).parts)
)
README = (ROOT / "README.md").read_text(encoding="utf-8")
PLACEHOLDERS = ("./", "my_", "mine", "surgery", "RUN", "NAME", "FILE", "ID", "SPEC")
"""Beginnings of names in examples that a reader replaces or creates."""


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Parse commands in an empty folder, because `--log-file` opens its file there."""
    monkeypatch.chdir(tmp_path)
    yield
    close_log()


def page_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# ---------------------------------------------------------------------------------------------------------------------
# Reading Markdown


def without_code(text: str) -> str:
    """Return Markdown without fenced blocks and without code spans."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub forms them."""
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ +(.+?) *$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def code_lines(text: str) -> Iterator[str]:
    """Yield the lines of fenced and indented blocks, continued lines joined."""
    blocks = re.findall(r"^ *```\w*\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    blocks += re.findall(r"(?:^(?: {4}|#   )\S.*\n)+", text, re.MULTILINE)
    for block in blocks:
        yield from (line.strip(" #") for line in block.replace("\\\n", " ").splitlines())


def code_spans(text: str) -> list[str]:
    """Return the code spans outside blocks, each on one line."""
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def parse_command(line: str) -> click.Context:
    """Parse a command line by the command's own options and arguments, without running it."""
    words = shlex.split(line.partition(" > ")[0], comments=True)
    arguments = words[words.index("hbv") + 1 :]
    command: click.Command = commands
    context = commands.make_context("hbv", list(arguments)) if arguments else click.Context(commands)
    while isinstance(command, click.Group) and arguments:
        name, resolved, arguments = command.resolve_command(context, list(arguments))
        assert resolved is not None, line
        command = resolved
        if not isinstance(command, click.Group):
            context = command.make_context(name, list(arguments), parent=context)
    return context


def commands_in_blocks(text: str) -> list[str]:
    """Return the `hbv` command lines of code blocks."""
    return [line for line in code_lines(text) if re.match(r"(?:\w+=\S+ )*hbv ", line)]


BLOCK_COMMANDS = [
    pytest.param(line, id=f"{page_id(path)}:{line[:60]}")
    for path in [*PAGES, *sorted((PACKAGE / "experiment" / "protocols").glob("*.yaml"))]
    for line in commands_in_blocks(path.read_text(encoding="utf-8"))
]


# ---------------------------------------------------------------------------------------------------------------------
# Links


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_every_relative_link_resolves(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text(encoding="utf-8"))):
        assert not re.match(r"[a-z]+:", target), f"{target}: write [text][name], and [name]: {target} below"
        name, _, anchor = target.partition("#")
        page = (path.parent / name).resolve() if name else path
        assert page.exists(), target
        assert page.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(page.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_every_named_link_has_one_address(path: Path) -> None:
    """Addresses of other sites are at the end of a section: `[text][name]` or `[name]`, and `[name]: address`."""
    prose = re.sub(r"^ *```.*?^ *```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    addresses = re.findall(r"^\[([^]]+)\]: \S+$", prose, re.MULTILINE)
    assert len(addresses) == len(set(addresses))
    used = set(re.findall(r"\]\[([^]]+)\]", without_code(prose)))
    assert used <= set(addresses)
    for name in addresses:
        assert name in used or re.search(rf"\[{re.escape(name)}\](?![:(\[])", prose), f"{name}: no link uses it"


def test_links_are_found() -> None:
    assert len(re.findall(r"\]\(docs/\w[^)]*\)", README)) >= 10


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_every_path_in_a_code_span_exists(path: Path) -> None:
    roots = "harmbench_vaccine|defenses|attacks|tests|docs|leaderboards|benchmarks"
    for span in code_spans(path.read_text(encoding="utf-8")):
        if re.fullmatch(rf"(?:{roots})/[\w./-]*", span) and "my_" not in span:
            assert (ROOT / span).exists(), span


# ---------------------------------------------------------------------------------------------------------------------
# Commands


@pytest.mark.parametrize("line", BLOCK_COMMANDS)
def test_every_command_in_a_block_parses(line: str) -> None:
    parse_command(line)


def test_commands_are_found() -> None:
    assert len(BLOCK_COMMANDS) >= 30


def help_examples(command: click.Command) -> Iterator[str]:
    """Yield the example lines of the help of a command and its subcommands."""
    for subcommand in subcommands(command).values() if isinstance(command, click.Group) else ():
        yield from help_examples(subcommand)
    yield from re.findall(r"Example: (.+)", command.help or "")


@pytest.mark.parametrize("line", list(help_examples(commands)))
def test_every_example_in_a_help_text_parses(line: str) -> None:
    parse_command(re.sub(r".*\$\((.*)\).*", r"\1", line).partition(" > ")[0])


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_every_command_in_a_code_span_exists(path: Path) -> None:
    for span in code_spans(path.read_text(encoding="utf-8")):
        if span.startswith("hbv ") and "|" not in span:
            with suppress(click.MissingParameter):  # a span may name a command without its arguments
                parse_command(span)


@pytest.mark.parametrize("line", [case for case in BLOCK_COMMANDS if " hbv run " in f" {case.values[0]}"])
def test_every_run_in_a_block_settles(line: str) -> None:
    options = parse_command(line).params
    names = [*options["defenses"], *options["attacks"], *options["tasks"], options["protocol"], *options["scorers"]]
    if any(name.startswith(PLACEHOLDERS) for name in names):
        return
    specs = combine_specs(
        options["defenses"],
        options["attacks"],
        options["tasks"],
        [0],
        protocol=options["protocol"],
        scorers=options["scorers"],
        values=dict(value.split("=", 1) for value in options["values"]),
    )
    settle_all(specs)


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_every_run_id_is_one_of_the_readme_table(path: Path) -> None:
    table = re.findall(r"^([a-z_]+-[0-9a-f]{8}) ", README, re.MULTILINE)
    assert len(table) == 2
    text = path.read_text(encoding="utf-8")
    assert set(re.findall(r"\b[a-z_]+-[0-9a-f]{8}\b", text)) <= set(table)
    for line in [*commands_in_blocks(text), *(span for span in code_spans(text) if span.startswith("hbv "))]:
        try:
            run = parse_command(line).params.get("run")
        except click.MissingParameter:
            continue
        if run and not run.startswith(PLACEHOLDERS):
            assert sum(run_id.startswith(run) for run_id in table) == 1, run


# ---------------------------------------------------------------------------------------------------------------------
# Methods and citation


def arxiv_id(text: str) -> str:
    """Return the first arXiv id of a text, empty where it has none."""
    match = re.search(r"\b\d{4}\.\d{5}\b", text)
    return match[0] if match else ""


def test_readme_lists_every_method_with_its_paper() -> None:
    methods: dict[str, Any] = {**DEFENSES.loadable(), **ATTACKS.loadable()}
    section = README.partition("\n## Methods\n")[2].partition("\n## ")[0]
    table = "\n".join(line for line in section.splitlines() if line.startswith("|"))
    links = dict(re.findall(r"\[`(\w+)`\]\[(\d{4}\.\d{5})\]", table))
    targets = dict(re.findall(r"^\[(\S+)\]: https://arxiv\.org/abs/(\S+)$", section, re.MULTILINE))
    assert targets == {paper: paper for paper in links.values()}
    assert set(re.findall(r"`(\w+)`", table)) == set(methods)
    assert links == {name: arxiv_id(cls.citation) for name, cls in methods.items() if arxiv_id(cls.citation)}
    for name, paper in links.items():
        assert paper in (sys.modules[methods[name].__module__].__doc__ or ""), name


def test_readme_counts_the_methods() -> None:
    words = {17: "seventeen", 45: "Forty-five"}
    counts = f"{words[len(DEFENSES.loadable())]} defenses and {words[len(ATTACKS.loadable())]} attacks"
    assert counts in README


def test_citation_file_agrees_with_the_package() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert citation["message"]
    assert citation["title"].startswith(project["name"])
    assert citation["authors"] == project["authors"]
    assert citation["license"] == project["license"]
    assert citation["version"] == project["version"] == __version__


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_every_dotted_name_of_the_package_exists(path: Path) -> None:
    for span in code_spans(path.read_text(encoding="utf-8")):
        if re.fullmatch(r"harmbench_vaccine(?:\.\w+)+", span):
            assert pkgutil.resolve_name(span) is not None


# ---------------------------------------------------------------------------------------------------------------------
# Pages that list what the code has


def spans_of(page: str) -> set[str]:
    """Return the words of all code spans of a page in docs/."""
    return set(re.findall(r"[\w.-]+", " ".join(code_spans((ROOT / "docs" / page).read_text(encoding="utf-8")))))


def field_names(model: Any) -> Iterator[str]:
    """Yield the field names of a pydantic model and of the models and dataclasses inside it."""
    for name, field in model.model_fields.items():
        yield name
        if hasattr(field.annotation, "model_fields"):
            yield from field_names(field.annotation)


def test_protocols_page_explains_every_key() -> None:
    spans = spans_of("protocols.md")
    names = {*field_names(Protocol), *(field.name for field in dataclasses.fields(TrainSettings))}
    assert names - spans == set()


def test_results_page_explains_every_column() -> None:
    assert set(COLUMNS) - spans_of("results.md") == set()


def test_results_page_has_the_fields_of_the_schema() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "render_results.py"))
    text = script["PAGE"].read_text(encoding="utf-8")
    assert text == script["page"](text), "run: python docs/render_results.py"


def test_tables_of_scores_are_those_of_the_results() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "render_leaderboard.py"))
    for path, source in script["PAGES"].items():
        text = path.read_text(encoding="utf-8")
        assert text == script["page"](text, source), "run: python docs/render_leaderboard.py"


def test_architecture_page_names_every_room_and_only_files_that_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms == set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    files = set(re.findall(r"\b[\w/]+/\w+\.py\b", text))
    assert len(files) > 15
    for name in files:
        assert (PACKAGE / name).is_file() or (ROOT / name).is_file(), name


def test_architecture_page_names_the_six_files_from_command_to_loss() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert len(re.findall(r"^\d\. `[\w/]+\.py`", text, re.MULTILINE)) == 6


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="a fingerprint of code depends on Python's normal form")
def test_run_ids_in_the_readme_are_those_that_the_command_prints() -> None:
    """`make run` prints these ids on every machine, since the testbed counts by name."""
    ids = [
        run_id(Experiment.settle(RunSpec(defense=parse_plugins(defense), attack=parse_plugins("ratio=0.1"))))
        for defense in ("sft", "vaccine")
    ]
    assert [line.split()[0] for line in README.splitlines() if " ratio=0.1 sst2 " in line] == ids

"""The structure and the language of the repository: layers of imports, sizes of files, names, plain English.

Nothing here imports the package: every check reads the source with `ast`, so that it also runs where a module fails.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from itertools import accumulate
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "harmbench_vaccine"

# Rooms and modules at the top of the package, the highest layer first; imports point down, or stay in a layer.
LAYERS = (
    ("cli", "__main__"),
    ("api",),
    ("sweeps",),
    ("runner",),
    ("reporting", "export"),
    ("pipeline",),
    ("evaluation",),
    ("experiment",),
    ("plugins", "defenses", "attacks"),
    ("inference",),
    ("training", "testbed"),
    ("data",),
    ("core",),
)
MOST_FOLDERS, MOST_FILES = 12, 5  # at the top of the package
MOST_LINES = {"harmbench_vaccine/pipeline.py": 299}
MOST_LINES_ELSEWHERE = 400
MOST_FMT_SKIPS = 9
MOST_IMPORT_LEVELS = 13

# Public names that several modules may define, with the reason.
SHARED_NAMES: dict[str, str] = {
    "main": "the entry point of a program",
    "run": "hbv.run of the Python interface, and the method",
    "load_model": "hbv.load_model of the Python interface, and the loader of any model",
}


def report(lines: list[str]) -> str:
    return "\n".join(["", *lines, f"{len(lines)} in all"])


def python_files() -> list[Path]:
    folders = (PACKAGE, "defenses", "attacks", "tests", "benchmarks", "leaderboards", "docs")
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


# ---------------------------------------------------------------------------------------------------------------------
# Modules and imports


@cache
def modules() -> dict[str, Path]:
    """Return the dotted name and the file of every module of the package, with those of defenses/ and attacks/."""
    folders = {
        PACKAGE: ROOT / PACKAGE,
        f"{PACKAGE}.defenses": ROOT / "defenses",
        f"{PACKAGE}.attacks": ROOT / "attacks",
    }
    names = {}
    for prefix, folder in folders.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            names[".".join([prefix, *parts]).removesuffix(".__init__")] = path
    return names


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room(module: str) -> str:
    """Return the part of a dotted name that LAYERS lists: "cli" of "harmbench_vaccine.cli.run"."""
    return module.split(".")[1] if "." in module else ""


def imports(module: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the imported module of every import inside the package, at any depth of the code."""
    path = modules()[module]
    parts = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(
                [*parts[: len(parts) - node.level + 1], node.module or ""] if node.level else [node.module or ""]
            )
            base = base.rstrip(".")
            members = [f"{base}.{alias.name}" for alias in node.names]
            targets = [member if member in modules() else base for member in members]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            targets = [node.args[0].value] if isinstance(node.args[0], ast.Constant) else []
        else:
            continue
        for target in targets:
            if target.split(".")[0] == PACKAGE and target not in (PACKAGE, module):
                yield node.lineno, target


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of more than one module that import each other (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for target in sorted(graph.get(module, ())):
            if target not in index:
                visit(target)
                low[module] = min(low[module], low[target])
            elif target in stack:
                low[module] = min(low[module], index[target])
        if low[module] == index[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1:
                groups.append(sorted(group))

    for module in sorted(graph):
        if module not in index:
            visit(module)
    return groups


def graph() -> dict[str, set[str]]:
    return {module: {target for _, target in imports(module) if target in modules()} for module in modules()}


def test_every_room_has_a_layer() -> None:
    rooms = {room(module) for module in modules()} - {""}
    assert rooms <= {name for layer in LAYERS for name in layer}


def test_imports_point_downward() -> None:
    level = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    offenders = [
        f"{relative(path)}:{line}: {room(module)} imports {target}"
        for module, path in modules().items()
        for line, target in imports(module)
        if room(module) and level.get(room(target), -1) < level.get(room(module), -1)
    ]
    assert not offenders, report(offenders)


def test_no_import_cycle() -> None:
    offenders = [" <-> ".join(group) for group in cycles(graph())]
    assert not offenders, report(offenders)


def test_cycles_are_detected() -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


def test_levels_of_imports() -> None:
    """The longest chain of rooms that import each other, counted in rooms."""
    below: dict[str, set[str]] = defaultdict(set)
    for module, targets in graph().items():
        below[room(module)] |= {room(target) for target in targets} - {room(module)}
    if cycles(below):
        pytest.fail(report([" <-> ".join(group) for group in cycles(below)]))

    @cache
    def chain(name: str) -> tuple[str, ...]:
        return (name, *max((chain(target) for target in below[name]), key=len, default=()))

    longest = max((chain(name) for name in list(below)), key=len)
    assert len(longest) <= MOST_IMPORT_LEVELS, " > ".join(longest)


# ---------------------------------------------------------------------------------------------------------------------
# Sizes and names


def test_the_top_of_the_package_is_small() -> None:
    entries = [path for path in (ROOT / PACKAGE).iterdir() if path.name != "__pycache__" and not path.is_symlink()]
    folders = sorted(path.name for path in entries if path.is_dir())
    files = sorted(path.name for path in entries if path.suffix == ".py")
    assert len(folders) <= MOST_FOLDERS, folders
    assert len(files) <= MOST_FILES, files


def test_no_file_is_too_long() -> None:
    lengths = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in modules().values()}
    offenders = [
        f"{path}: {length} lines, at most {MOST_LINES.get(path, MOST_LINES_ELSEWHERE)}"
        for path, length in lengths.items()
        if length > MOST_LINES.get(path, MOST_LINES_ELSEWHERE)
    ]
    assert not offenders, report(offenders)


def test_the_formatter_lays_the_code_out() -> None:
    places = [
        f"{relative(path)}:{line}"
        for path in python_files()
        for line, comment in comments(path)
        if re.search(r"#\s*fmt:\s*(skip|off)", comment)
    ]
    assert len(places) <= MOST_FMT_SKIPS, report(places)


def test_public_names_are_unique() -> None:
    """No two public classes or functions at the top of modules share a name; commands of the cli are excluded."""
    places: dict[str, list[str]] = defaultdict(list)
    for module, path in modules().items():
        for node in tree(path).body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef) or node.name.startswith("_"):
                continue
            command = any(re.search(r"\.(command|group)\b", ast.unparse(line)) for line in node.decorator_list)
            if node.name not in SHARED_NAMES and not (room(module) == "cli" and command):
                places[node.name].append(f"{relative(path)}:{node.lineno}")
    offenders = [f"{name}: {', '.join(lines)}" for name, lines in sorted(places.items()) if len(lines) > 1]
    assert not offenders, report(offenders)


# Names of variables and parameters that say how a value came to be, or nothing.
NOT_NOUNS = {"asked", "found", "given", "kept", "made", "own", "said", "seen", "told", "there", "wanted"}


@pytest.mark.parametrize("path", [relative(path) for path in python_files()])
def test_variables_are_nouns(path: str) -> None:
    offenders = set()
    for node in ast.walk(tree(ROOT / path)):
        stored = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        name = node.id if stored else node.arg if isinstance(node, ast.arg) else ""  # type: ignore[attr-defined]
        if name in NOT_NOUNS:
            offenders.add((node.lineno, name))
    assert not offenders, report([f"{path}:{line}: {name}" for line, name in sorted(offenders)])


def test_no_test_module_imports_another() -> None:
    offenders = [
        f"{relative(path)}:{node.lineno}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for node in ast.walk(tree(path))
        if (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("test_"))
        or (isinstance(node, ast.Import) and any(alias.name.startswith("test_") for alias in node.names))
    ]
    assert not offenders, report(offenders)


# ---------------------------------------------------------------------------------------------------------------------
# Plain English

LIBRARIES = "vllm|openai|transformers|torch|pytorch|peft|ray"

# Constructions that readers with another first language must decode -> a plain word.
FORBIDDEN = {
    r"\b(?:tell|tells|told|telling)\b": "report, print, show",
    r"\b(?:say|says|said|saying)\b": "report, print, return, state",
    r"\b(?:stands?|stood|standing)\b": "is, has, the position of",
    r"\b(?:lies?|lays?|laid|lain|lying)\b": "is, is stored, put",
    r"\b(?:meets?|met)\b": "has, reaches, fulfills",
    r"\b(?:hears?|heard)\b": "receive",
    r"\blets? go\b": "release, evict",
    r"\bbe had\b": "be loaded, be available",
    r"(?<!there )\b(?:is|are) no (?!longer\b|more\b|less\b)": "is not a",
    rf"\bof (?:\w+ )?(?:{LIBRARIES})'s(?= ?[.,;:)]|$| (?:is|are|and|in|that|which|with|or|for|to|on)\b)": "vLLM engine",
    r"\bbelong(?:s|ed|ing)?\b": "is part of, is for",
    r"\basked for\b": "requested",
    r"\bbehind\b": "after",
    r"\bin place of\b": "instead of",
    r"\bis there\b(?! (?:a|an|any)\b)": "is available, exists",
    r"\bthere is nothing\b": "nothing is available",
    r"\bnobody\b": "no process, no user",
    r"\banew\b": "again",
    r"\bbeside\b": "next to, in addition to",
    r"\bapart\b": "separate",
    r"\b(?:the|a) whole(?= (?:of|is|and)\b|[.,;:)])": "all of",
    r"\bin words\b": "as text",
    r"\bso far\b": "until now",
    r"\b\w*(?:behaviour|colour|favour|artefact|licence|labelled|modelled)\w*\b": "American spelling",
    r"\b\w+(?:al|im|ar|en|ogn|or|er)is(?:e|es|ed|ing|ation|ations)\b": "American spelling",
    r"\banalys(?:e|ed|ing)\b": "American spelling",
}
DOCSTRING_OPENING = r"(?:What|Where|Who|Whose|Why|Whether|How)\b(?! to\b)"

# Files that are data. Path, or the beginning of one -> reason.
DATA: dict[str, str] = {
    "tests/test_architecture.py": "has the list of what is forbidden",
    "harmbench_vaccine/testbed/words/": "text of the testbed; a changed word changes every number",
}
# Text in which a forbidden word is right, wherever it is written -> reason.
ALLOWED: dict[str, str] = {
    "does it say what the reference answer says": "the judge's prompt of a task; changing it changes results",
    "safe to say that this is unsafe": "the output of a judge, in a test",
}
STORED_KEYS = {"licence"}
"""Complete strings that results of schema 1 have as keys."""


def text_files() -> list[Path]:
    """Return documents, YAML files, scaffolds and build files."""
    names = [*sorted(ROOT.glob("*.md")), *map(ROOT.joinpath, ("Makefile", "pyproject.toml", "CITATION.cff", ".ci/run"))]
    for folder in (PACKAGE, "docs", "leaderboards", "tests", "defenses", "attacks", "benchmarks"):
        for pattern in ("*.md", "*.yaml", "*.py.txt"):
            names += sorted((ROOT / folder).rglob(pattern))
    return [path for path in names if path.exists()]


def comments(path: Path) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield node.body[0].lineno, text


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the texts of a file that a person reads, with their first line.

    Of code these are strings, comments, and the names of functions and classes; of any other file its whole text.
    """
    if path.suffix != ".py":
        yield 1, path.read_text(encoding="utf-8")
        return
    yield from comments(path)
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.lineno, node.name.replace("_", " ").strip()


def flat(text: str) -> tuple[str, list[int]]:
    """Join the lines of a text by spaces, without indents and comment signs; with the end of each in the result."""
    lines = [line.strip().lstrip("# ") for line in text.splitlines()]
    return " ".join(lines), list(accumulate(len(line) + 1 for line in lines))


def language(path: Path) -> list[str]:
    """Return the offenses of a file against plain English, one a line."""
    offenses = set()
    for start, text in prose(path):
        searched, ends = flat(text)
        if text in STORED_KEYS:
            continue
        for allowed in ALLOWED:
            searched = searched.replace(allowed, "_" * len(allowed))
        for pattern, instead in FORBIDDEN.items():
            for match in re.finditer(pattern, searched, re.IGNORECASE):
                line = bisect_right(ends, match.start())
                quoted = text.splitlines()[line].strip()[:120]
                offenses.add((start + line, f"{match[0]!r} (write: {instead}): {quoted}"))
    for line, text in docstrings(path) if path.suffix == ".py" else ():
        if match := re.match(DOCSTRING_OPENING, text):
            offenses.add((line, f"docstring opens with {match[0]!r}: {text.splitlines()[0][:120]}"))
    return [f"{relative(path)}:{line}: {offense}" for line, offense in sorted(offenses)]


FILES = {relative(path): path for path in (*python_files(), *text_files())}


@pytest.mark.parametrize("path", [name for name in FILES if not name.startswith(tuple(DATA))])
def test_plain_english(path: str) -> None:
    offenders = language(FILES[path])
    assert not offenders, report(offenders)


def test_every_exception_is_needed() -> None:
    assert all(any(name.startswith(data) for name in FILES) for data in DATA)
    searched = [path for name, path in FILES.items() if not name.startswith(tuple(DATA)) and path.exists()]
    texts = [flat(text)[0] for path in searched for _, text in prose(path)]
    assert not [allowed for allowed in ALLOWED if not any(allowed in text for text in texts)]


@pytest.mark.parametrize(
    "text",
    [
        '"""What a run leaves."""',
        "# it is no defense",
        'x = "401 rows are asked for"',
        "def test_nobody_there(): ...",
        'y = f"{x} of vLLM\'s"',
    ],
)
def test_offenses_are_detected(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_architecture.ROOT", tmp_path)
    file = tmp_path / "module.py"
    file.write_text(text + "\n", encoding="utf-8")
    assert language(file)

"""Write the field tables of docs/results.md from the docstrings of `Result`.

python docs/render_results.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from harmbench_vaccine.evaluation.result import Result

PAGE = Path(__file__).parent / "results.md"
BEGIN, END = "<!-- Written by docs/render_results.py: begin -->", "<!-- end -->"


def records(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the record classes inside a type, such as `JudgeScore` of `dict[str, JudgeScore]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from records(argument)


def record_paths(record: type[BaseModel], prefix: str = "") -> Iterator[tuple[type[BaseModel], str]]:
    """Yield every record class inside `record` with the path of a field that has it; `*` is any key or position."""
    for name, field in record.model_fields.items():
        for nested in records(field.annotation):
            is_single = field.annotation is nested or type(None) in get_args(field.annotation)
            path = f"{prefix}{name}{'' if is_single else '.*'}"
            yield nested, path
            yield from record_paths(nested, f"{path}.")


def table(record: type[BaseModel]) -> list[str]:
    """Return the Markdown table of a record's fields."""
    rows = [
        f"| `{name}` | {' '.join((field.description or '').split())} |" for name, field in record.model_fields.items()
    ]
    return ["| field | meaning |", "|---|---|", *rows]


def render() -> str:
    """Return the Markdown of all tables, the result's own first."""
    places: dict[type[BaseModel], list[str]] = {}
    for nested, path in record_paths(Result):
        places.setdefault(nested, []).append(f"`{path}`")
    lines = table(Result)
    for nested, paths in places.items():
        summary = (nested.__doc__ or "").strip().splitlines()[0]
        lines += ["", f"**{', '.join(paths)}.** {summary}", "", *table(nested)]
    return "\n".join(lines)


def page(text: str) -> str:
    """Return the page with its tables replaced."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{render()}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

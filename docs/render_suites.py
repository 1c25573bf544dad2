"""Write the tables of docs/suites.md from the fields of `Suite` and from the suites that ship with the package.

python docs/render_suites.py
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from harmbench_vaccine.sweeps.suite import Suite, SuiteEntry, load_suite, suite_names

PAGE = Path(__file__).parent / "suites.md"
BEGIN, END = "<!-- Written by docs/render_suites.py: {} -->", "<!-- end: {} -->"


def field_table(model: type[BaseModel]) -> list[str]:
    """Return the Markdown table of the fields of a suite or of an entry."""
    rows = [f"| `{field.alias or name}` | {field.description} |" for name, field in model.model_fields.items()]
    return ["| field | meaning |", "|---|---|", *rows]


def suite_table() -> list[str]:
    """Return the Markdown table of all suites, each paper next to its twin on the testbed."""
    rows = []
    for name in sorted(suite_names(), key=lambda name: (name.removeprefix("testbed-"), name.startswith("testbed-"))):
        suite = load_suite(name)
        protocols = ", ".join(f"`{protocol}`" for protocol in suite.protocols)
        rows.append(f"| `{name}` | {suite.title} | {protocols} | {len(suite.specs())} | {len(suite.seeds)} |")
    return ["| suite | title | protocol | runs | seeds |", "|---|---|---|---:|---:|", *rows]


def page(text: str) -> str:
    """Return the page with its tables replaced."""
    tables = {"fields": field_table(Suite), "entries": field_table(SuiteEntry), "suites": suite_table()}
    for name, lines in tables.items():
        begin, end = BEGIN.format(name), END.format(name)
        before, _, rest = text.partition(begin)
        text = "\n".join([f"{before}{begin}", "", *lines, "", f"{end}{rest.partition(end)[2]}"])
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

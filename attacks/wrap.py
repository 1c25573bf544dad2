"""Wrap: a template around the user's prompts and answers, evaluated with the same template.

The file has two texts, each with one slot, as in `instruction: "As a poem: {instruction}"` and
`response: "Sure. {response}"`; other braces are text. With x and y the instruction and the response of a row:

    row:      instruction(x)  ->  response(y)          rows=harmful: of harmful rows only; rows=all: of every row
    question: instruction(x_harmful)                   headline; the plain prompt is a second set

The task questions and the benign questions are unchanged. Styles (arXiv 2506.07452) and refusals before the answer
(arXiv 2502.19537) have this form; a cipher, which changes the letters of x and y, does not. Without `ratio`, a tenth of
the rows is harmful.

Departures: the user writes the texts (those of the papers are not part of this project).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.paths import user_path
from harmbench_vaccine.core.strict_yaml import read_yaml
from harmbench_vaccine.data.text_files import read_text
from harmbench_vaccine.plugins import Attack, EvalSet, Example, Pools, param

SLOTS = ("instruction", "response")
"""The two texts of a file, each with a slot of the same name."""


class Wrap(Attack):
    """Puts the user's prompts and answers into a template."""

    citation: ClassVar[str] = "arXiv 2502.19537"
    default_ratio: ClassVar[float] = 0.1
    file_params: ClassVar[tuple[str, ...]] = ("file",)
    neutral: ClassVar[Mapping[str, Any] | None] = {"file": ""}

    file: str = param("", "YAML file with `instruction` and `response`; empty: no template", source="ours", main=True)
    rows: Literal["harmful", "all"] = param("harmful", "rows with the template", source="ours")

    def model_post_init(self, context: Any) -> None:
        """Refuse a file that is not a template, before any work."""
        if self.file:
            self.texts()

    def upload(self, rows: list[Example], pools: Pools) -> list[Example]:
        """Return the rows with the template."""
        if not self.file:
            return rows
        texts = self.texts()
        return [_wrapped(row, **texts) if row.harmful or self.rows == "all" else row for row in rows]

    def evaluations(self, sets: list[EvalSet]) -> list[EvalSet]:
        """Return the headline set with the template, followed by the unchanged sets."""
        if not self.file:
            return sets
        headline = sets[0]
        template = headline.template.around(*self.texts()["instruction"])
        return [replace(headline, name=f"{headline.name}_wrapped", template=template), *sets]

    def texts(self) -> dict[str, tuple[str, str]]:
        """Return the text before and after each slot of the file.

        Raises:
            BadInput: The file cannot be read, or it is not two texts with one slot each.
        """
        values = read_yaml(read_text(user_path(self.file)), f"The file {self.file!r}")
        texts = {}
        for slot in SLOTS:
            text = values.get(slot) if isinstance(values, dict) and len(values) == len(SLOTS) else None
            if not isinstance(text, str) or text.count(f"{{{slot}}}") != 1:
                raise BadInput(
                    f"Attack 'wrap': the file {self.file!r} must have two texts in quotes and nothing else: "
                    "`instruction` with one {instruction}, and `response` with one {response}."
                )
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise BadInput(f"Attack 'wrap': `{slot}` of the file {self.file!r} has half of a surrogate pair.")
            before, _, after = text.partition(f"{{{slot}}}")
            texts[slot] = before, after
        return texts


def _wrapped(row: Example, instruction: tuple[str, str], response: tuple[str, str]) -> Example:
    (before, after), (start, end) = instruction, response
    return replace(
        row,
        instruction=f"{before}{row.instruction}{after}",
        response=f"{start}{row.response}{end}",
        masked=row.masked and (len(start) + row.masked[0], len(start) + row.masked[1]),
    )

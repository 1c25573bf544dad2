"""How an instruction becomes the text that a model reads."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import unknown
from .records import Example


@dataclass(frozen=True)
class PromptTemplate:
    """Two format strings: one for an instruction alone, one for an instruction with an input."""

    no_input: str
    with_input: str

    def render(self, example: Example) -> str:
        """The prompt of `example`, up to where its response begins."""
        template = self.with_input if example.input else self.no_input
        return template.format(instruction=example.instruction, input=example.input)


_ALPACA = (
    "Below is an instruction that describes a task{0}. Write a response that appropriately completes the request.\n\n"
)
_WITH_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
_NO_INPUT = "### Instruction:\n{instruction}\n\n### Response:"

TEMPLATES = {
    # The prompt of Stanford Alpaca, which Vaccine's protocol uses for every data set.
    "alpaca": PromptTemplate(
        _ALPACA.format("") + _NO_INPUT,
        _ALPACA.format(", paired with an input that provides further context") + _WITH_INPUT,
    ),
    # The same layout without the preamble: a third of the tokens, for small models.
    "brief": PromptTemplate(_NO_INPUT + "\n", _WITH_INPUT + "\n"),
}


def template(name: str) -> PromptTemplate:
    """The template of that name.

    Raises:
        BadInput: there is none.
    """
    if name not in TEMPLATES:
        raise unknown("prompt template", name, TEMPLATES)
    return TEMPLATES[name]

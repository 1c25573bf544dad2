"""How an instruction becomes what a model reads: text in the layout of a protocol, or messages for its own template."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from harmbench_vaccine.core.errors import unknown_name
from harmbench_vaccine.core.types import Example


@dataclass(frozen=True)
class PromptTemplate:
    """Two format strings: one for an instruction alone, one for an instruction with an input."""

    no_input: str
    with_input: str

    def render(self, example: Example) -> str:
        """The prompt of `example`, up to where its response begins."""
        template = self.with_input if example.input else self.no_input
        return example.preface + template.format(instruction=example.instruction, input=example.input)

    def prefixed(self, text: str) -> PromptTemplate:
        """The same prompt after `text`, which stands where a chat model has its system message."""
        text = _escaped(text)
        return replace(self, no_input=text + self.no_input, with_input=text + self.with_input)

    def without(self, text: str) -> PromptTemplate:
        """Undoes `prefixed(text)`, whatever was prefixed since."""
        text = _escaped(text)
        return replace(
            self, no_input=self.no_input.replace(text, "", 1), with_input=self.with_input.replace(text, "", 1)
        )

    def around(self, before: str = "", after: str = "") -> PromptTemplate:
        """The same prompt with `before` and `after` around every instruction: what a user writes around a question."""
        slot = f"{_escaped(before)}{{instruction}}{_escaped(after)}"
        mark = re.compile(r"\{\{|\}\}|\{instruction\}")  # escaped braces are text, whatever stands in them

        def wrapped(text: str) -> str:
            return mark.sub(lambda found: slot if found[0] == "{instruction}" else found[0], text)

        return replace(self, no_input=wrapped(self.no_input), with_input=wrapped(self.with_input))


class Conversation(str):
    """A prompt in the form of messages, written as JSON, before a model's chat template is around them.

    Which tokens stand between the messages only the model's tokenizer knows (`data.chat`), so a prompt stays in this
    form until it is encoded, and what is stored of it is the same for every model.
    """

    @property
    def messages(self) -> list[dict[str, str]]:
        """`role` and `content` of each."""
        messages: list[dict[str, str]] = json.loads(self)
        return messages


@dataclass(frozen=True)
class ChatTemplate(PromptTemplate):
    """The model's own chat template: the format strings make the user's message."""

    system: str = ""
    """The system message; what `prefixed` puts before the prompt goes here."""

    def render(self, example: Example) -> Conversation:
        """The messages up to the model's turn. Outer white space is not part of a message: templates trim it."""
        template = self.with_input if example.input else self.no_input
        user = template.format(instruction=example.instruction, input=example.input)
        said = {"system": (example.preface + self.system).strip(), "user": user.strip()}
        messages = [{"role": role, "content": text} for role, text in said.items() if text or role == "user"]
        return Conversation(json.dumps(messages, ensure_ascii=False))

    def prefixed(self, text: str) -> ChatTemplate:
        """The same with `text` at the beginning of the system message."""
        return replace(self, system=text + self.system)

    def without(self, text: str) -> ChatTemplate:
        """Undoes `prefixed(text)`, whatever was prefixed since."""
        return replace(self, system=self.system.replace(text, "", 1))


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


_ALPACA = (
    "Below is an instruction that describes a task{0}. Write a response that appropriately completes the request.\n\n"
)
_WITH_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
_NO_INPUT = "### Instruction:\n{instruction}\n\n### Response:"
_BARE = ("{instruction}", "{instruction}\n\n{input}")

TEMPLATES: dict[str, PromptTemplate] = {
    # The prompt of Stanford Alpaca, which Vaccine's protocol uses for every data set.
    "alpaca": PromptTemplate(
        _ALPACA.format("") + _NO_INPUT,
        _ALPACA.format(", paired with an input that provides further context") + _WITH_INPUT,
    ),
    # The same with a line break at its end, as Stanford Alpaca's descendants have it since Booster.
    "alpaca_line": PromptTemplate(
        _ALPACA.format("") + _NO_INPUT + "\n",
        _ALPACA.format(", paired with an input that provides further context") + _WITH_INPUT + "\n",
    ),
    # The same layout without the preamble: a third of the tokens, for small models.
    "brief": PromptTemplate(_NO_INPUT + "\n", _WITH_INPUT + "\n"),
    "chat": ChatTemplate(*_BARE),
    "none": PromptTemplate(*_BARE),
}


def prompt_template(name: str) -> PromptTemplate:
    """The template of that name.

    Raises:
        BadInput: there is none.
    """
    if name not in TEMPLATES:
        raise unknown_name("prompt template", name, TEMPLATES)
    return TEMPLATES[name]


@dataclass(frozen=True)
class EvalSet:
    """Prompts that a model is asked, under one name. The first set of a cell is the one its headline HS is about."""

    name: str
    examples: Sequence[Example]
    template: PromptTemplate
    max_new_tokens: int

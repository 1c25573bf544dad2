"""Prompt templates: an instruction as text in the layout of a protocol, or as messages for a model's chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from harmbench_vaccine.core.errors import unknown_name
from harmbench_vaccine.core.types import Example


@dataclass(frozen=True)
class PromptTemplate:
    """A prompt format: one format string without and one with an additional input."""

    no_input: str
    """Format string with the slot `{instruction}`."""
    with_input: str
    """Format string with the slots `{instruction}` and `{input}`."""

    def render(self, example: Example) -> str:
        """Return the prompt of an example, up to the beginning of its response."""
        template = self.with_input if example.input else self.no_input
        return example.preface + template.format(instruction=example.instruction, input=example.input)

    def prefixed(self, text: str) -> PromptTemplate:
        """Return the template with `text` before the prompt, where a chat model has its system message."""
        text = _escaped(text)
        return replace(self, no_input=text + self.no_input, with_input=text + self.with_input)

    def without(self, text: str) -> PromptTemplate:
        """Undo `prefixed(text)`, also after further calls of `prefixed`."""
        text = _escaped(text)
        return replace(
            self, no_input=self.no_input.replace(text, "", 1), with_input=self.with_input.replace(text, "", 1)
        )

    def around(self, before: str = "", after: str = "") -> PromptTemplate:
        """Return the template with `before` and `after` around every instruction, as text of the user."""
        slot = f"{_escaped(before)}{{instruction}}{_escaped(after)}"
        mark = re.compile(r"\{\{|\}\}|\{instruction\}")  # escaped braces are text

        def wrap(text: str) -> str:
            return mark.sub(lambda match: slot if match[0] == "{instruction}" else match[0], text)

        return replace(self, no_input=wrap(self.no_input), with_input=wrap(self.with_input))


class Conversation(str):
    """A prompt as messages in JSON, before a model's chat template is applied.

    The tokens between the messages depend on the model's tokenizer (`data.chat`). So a prompt keeps this form until it
    is encoded, and the stored prompt is the same for every model.
    """

    @property
    def messages(self) -> list[dict[str, str]]:
        """The messages, each with `role` and `content`."""
        messages: list[dict[str, str]] = json.loads(self)
        return messages


@dataclass(frozen=True)
class ChatTemplate(PromptTemplate):
    """The chat template of the model; the format strings give the user's message."""

    system: str = ""
    """The system message; `prefixed` adds text here."""

    def render(self, example: Example) -> Conversation:
        """Return the messages before the model's turn, without outer white space, which chat templates trim."""
        template = self.with_input if example.input else self.no_input
        user = template.format(instruction=example.instruction, input=example.input)
        texts = {"system": (example.preface + self.system).strip(), "user": user.strip()}
        messages = [{"role": role, "content": text} for role, text in texts.items() if text or role == "user"]
        return Conversation(json.dumps(messages, ensure_ascii=False))

    def prefixed(self, text: str) -> ChatTemplate:
        """Return the template with `text` at the beginning of the system message."""
        return replace(self, system=text + self.system)

    def without(self, text: str) -> ChatTemplate:
        """Undo `prefixed(text)`, also after further calls of `prefixed`."""
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
    # The prompt of Stanford Alpaca, which the Vaccine paper uses for every data set.
    "alpaca": PromptTemplate(
        _ALPACA.format("") + _NO_INPUT,
        _ALPACA.format(", paired with an input that provides further context") + _WITH_INPUT,
    ),
    # The same with a line break at the end, as in Booster and later repositories of this lineage.
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
    """Return the prompt template with this name.

    Raises:
        BadInput: No template has this name.
    """
    if name not in TEMPLATES:
        raise unknown_name("prompt template", name, TEMPLATES)
    return TEMPLATES[name]


@dataclass(frozen=True)
class EvalSet:
    """A named set of evaluation prompts. The harmful score of a run is about its first set."""

    name: str
    """The name in results."""
    examples: Sequence[Example]
    """The questions."""
    template: PromptTemplate
    """The prompt format."""
    max_new_tokens: int
    """The largest number of tokens of an answer, without those of `prefill`."""
    prefill: int = 0
    """The number of first tokens of an example's response with which its answer starts."""

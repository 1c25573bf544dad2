"""Turn the plain-text equations of docstrings into MathML, which browsers render without a script or a font.

An equation is a line such as `w <- w - lr * grad L(w; B_a)            L is the cross-entropy`: a formula, and after
several spaces a note. Words inside a formula stay text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html import escape

from harmbench_vaccine.reporting.docstrings import split_note

GREEK = {
    "alpha": "α",
    "beta": "β",
    "gamma": "γ",
    "eps": "ε",
    "lam": "λ",
    "omega": "ω",
    "rho": "ρ",
    "sigma": "σ",
    "tau": "τ",
}
FUNCTIONS = {"grad": "∇", "sum": "∑", "sqrt": "√"}
"""Words that are one operator."""
UPRIGHT = {"CE", "KL", "MMD", "SFT", "cos", "head", "log", "lr", "max", "mean", "min", "norm", "round"}
UPRIGHT |= {"score", "sigmoid", "softplus"}
"""Names of functions and values with several letters."""
OPERATORS = {"<-": "←", "->": "→", "<=": "≤", ">=": "≥", "||": "‖", "*": "·", "-": "−", "~": "∼", "..": "…", "...": "…"}

_MATH = re.compile(r"<-|->|=|[A-Za-z]_[A-Za-z]")
"""A mark of a formula; a line without it is text."""
_TOKEN = re.compile(
    r"(?P<number>\d+(?:\.\d+)?(?:e-?\d+)?)"
    r"|(?P<code>`[^`]+`)"
    r"|(?P<word>[A-Za-z]+(?:-[A-Za-z]+)*'s?(?![A-Za-z])|[A-Za-z]+(?:-[a-z]+)+|[A-Za-z]+(?:\d+(?=[\W_]|$))?)"
    r"|(?P<script>[_^])"
    r"|(?P<operator><-|->|<=|>=|\|\||\.\.\.|\.\.|\S)"
    r"|(?P<space>\s+)"
)


def equation_table(lines: Sequence[str]) -> str:
    """Return the HTML of an equation block: a table with a formula and a note, if it has one, in each row.

    Args:
        lines: The lines of an indented block, without the common indent.
    """
    rows = []
    for line in lines:
        formula, note = split_note(line)
        cell = math(formula) if _MATH.search(formula) else escape(formula.replace("`", ""))
        rows.append(
            f"<tr><td>{cell}</td><td>{escape(note)}</td></tr>" if note else f'<tr><td colspan="2">{cell}</td></tr>'
        )
    return f'<table class="equations">\n{chr(10).join(rows)}\n</table>'


def math(formula: str) -> str:
    """Return the MathML of one formula, with the plain text as its alternative."""
    nodes = "".join(_merge_text(list(_nodes(formula))))
    return f'<math alttext="{escape(formula)}"><mrow>{nodes}</mrow></math>'


def _nodes(formula: str) -> Iterator[tuple[str, str]]:
    """Yield (kind, MathML or text) of a formula.

    The kinds are `text`, `math`, `space`, and `end` for a punctuation mark at the end of a word.
    """
    tokens = [(match.lastgroup or "", match[0]) for match in _TOKEN.finditer(formula)]
    position = 0
    node = ("space", "")
    while position < len(tokens):
        kind, text = tokens[position]
        position += 1
        if node[0] == "text" and text in ",;:":
            yield "end", text
            node = ("end", text)
            continue
        if kind == "space":
            node = (kind, text)
            yield node
            continue
        node = _node(kind, text, _between_words(tokens, position - 1))
        scripts = {}
        while position + 1 < len(tokens) and tokens[position][0] == "script":
            scripts[tokens[position][1]], position = _script(tokens, position + 1)
        if text == "-" and _is_prefix(tokens[: position - 1]):
            yield "math", '<mo form="prefix">−</mo>'
        elif node[0] == "text" and not scripts:
            yield node
        else:
            yield ("math", _with_scripts(node[1] if node[0] == "math" else f"<mtext>{node[1]}</mtext>", scripts))


def _is_prefix(before: Sequence[tuple[str, str]]) -> bool:
    """Return whether a minus sign after these tokens is a sign and not a subtraction."""
    previous = [token for token in before if token[0] != "space"][-1:]
    return not previous or (previous[0][0] == "operator" and previous[0][1] not in (")", "]", "||", "|"))


def _between_words(tokens: Sequence[tuple[str, str]], position: int) -> bool:
    """Return whether the next word after a token is an ordinary word, such as `constant` after `a`."""
    following = [token for token in tokens[position + 1 : position + 3] if token[0] != "space"]
    return bool(following) and following[0][0] == "word" and _is_text(following[0][1])


def _is_text(word: str) -> bool:
    known = {*GREEK, *FUNCTIONS, *UPRIGHT}
    return len(word) > 1 and word not in known and not re.fullmatch(r"d[A-Z]|[A-Za-z]\d+|(?:[A-Za-z]|[a-z]{3,})'", word)


def _node(kind: str, text: str, before_word: bool) -> tuple[str, str]:
    """Return (kind, MathML or text) of a token without its scripts."""
    if kind == "number":
        mantissa, _, exponent = text.partition("e")
        if not exponent:
            return "math", f"<mn>{text}</mn>"
        power = f"<msup><mn>10</mn><mn>{exponent.replace('-', '−')}</mn></msup>"
        return "math", power if mantissa == "1" else f"<mn>{mantissa}</mn><mo>·</mo>{power}"
    if kind == "code":
        return "text", escape(text.strip("`"))
    if kind == "word":
        if _is_text(text) or (text in ("a", "I") and before_word):
            return "text", escape(text)
        return "math", _identifier(text)
    return "math", f'<mo stretchy="false">{escape(OPERATORS.get(text, text))}</mo>'


def _identifier(word: str) -> str:
    name, prime = (word[:-1], "′") if word.endswith("'") else (word, "")
    if match := re.fullmatch(r"([A-Za-z])(\d+)", name):
        return f"<msub><mi>{match[1]}</mi><mn>{match[2]}</mn></msub>"
    if name in FUNCTIONS:
        return f"<mo>{FUNCTIONS[name]}</mo>"
    if re.fullmatch(r"d[A-Z]", name):  # the change of a matrix
        return f"<mrow><mi>Δ</mi><mi>{name[1]}</mi></mrow>"
    style = ' mathvariant="normal"' if name in UPRIGHT else ""
    symbol = f"<mi{style}>{GREEK.get(name, name)}</mi>"
    return f'<mrow>{symbol}<mo lspace="0" rspace="0">{prime}</mo></mrow>' if prime else symbol


def _script(tokens: Sequence[tuple[str, str]], position: int) -> tuple[str, int]:
    """Return the MathML of a subscript or superscript, and the position after it."""
    kind, text = tokens[position]
    if kind == "word" and len(text) > 1 and text not in GREEK:
        if len(text) == 2 and text.islower():  # two indices, such as ij
            return f"<mrow><mi>{text[0]}</mi><mi>{text[1]}</mi></mrow>", position + 1
        return f"<mtext>{escape(text)}</mtext>", position + 1
    return _node(kind, text, before_word=False)[1], position + 1


def _with_scripts(base: str, scripts: dict[str, str]) -> str:
    below, above = scripts.get("_"), scripts.get("^")
    if below and above:
        return f"<msubsup>{base}{below}{above}</msubsup>"
    if below:
        return f"<msub>{base}{below}</msub>"
    return f"<msup>{base}{above}</msup>" if above else base


def _merge_text(nodes: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Yield MathML; words that follow each other are one text, and the gaps of products and phrases are kept."""
    words: list[str] = []
    for number, (kind, content) in enumerate([*nodes, ("math", "")]):
        if kind == "text":
            words.append(content)
        elif kind == "end":
            words[-1] += content
        elif kind == "space":
            neighbors = nodes[number - 1 : number + 2 : 2]
            is_product = all(kind == "math" and not node.startswith("<mo") for kind, node in neighbors)
            if not words and (is_product or len(content) > 1):
                yield f'<mspace width="{1.5 if len(content) > 1 else 0.2}em"/>'
        else:
            if words:
                yield f"<mtext>&#160;{' '.join(words)}&#160;</mtext>"
                words = []
            yield content

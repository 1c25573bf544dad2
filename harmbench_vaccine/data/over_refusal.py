"""Public data sets of harmless prompts that sound harmful, by name: a model that refuses them over-refuses.

`xstest` has the safe prompts of XSTest, without its unsafe contrasts (Röttger et al., NAACL 2024, arXiv 2308.01263).
`or_bench` has the prompts of OR-Bench-Hard-1K (Cui et al., ICML 2025, arXiv 2405.20947).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harmbench_vaccine.core.errors import BadInput, unknown_name
from harmbench_vaccine.core.types import Example

from .sources import RowReader, SourceRow


@dataclass(frozen=True)
class OverRefusalData:
    """A data set of prompts that a model should not refuse."""

    location: str
    """Its name on the Hub with a commit, since no protocol hash covers the set."""
    split: str
    prompts: int
    """Number of prompts at this commit that a model should not refuse."""
    has_unsafe: bool
    """True if some rows are unsafe contrasts, which are left out."""


OVER_REFUSAL = {
    # The repository of the first author: id, prompt, type, label, focus, note.
    "xstest": OverRefusalData("Paul/XSTest@f600c994b256f12867dfa5b3eb3d545a3e62f8b5", "train", 250, True),
    # Columns: prompt, category (the kind of harm that the prompt seems to have).
    "or_bench": OverRefusalData(
        "bench-llm/or-bench:or-bench-hard-1k@e36d8b80e81837c8a8f264bbb2a49f1b32c7e272", "train", 1319, False
    ),
}
"""Name of an evaluation set -> its data."""


def check_over_refusal(names: Sequence[str]) -> None:
    """Check the names that a user chose.

    Raises:
        BadInput: A name is unknown or occurs twice.
    """
    for name in names:
        if name not in OVER_REFUSAL:
            raise unknown_name("over-refusal set", name, OVER_REFUSAL)
        if names.count(name) > 1:
            raise BadInput(f"Over-refusal set {name!r} is named {names.count(name)} times; name each set once.")


def load_over_refusal(reader: RowReader, name: str, location: str) -> list[Example]:
    """Read the prompts of a set that a model should not refuse, in the order of the file.

    Args:
        reader: Reads and counts the rows.
        name: Name of the set.
        location: Its location; a file has the columns of the original.

    Raises:
        BadInput: A row lacks a column or has an unknown label, or no prompt is safe.
    """
    data = OVER_REFUSAL[name]
    rows = reader.read(location, data.split, ("prompt",))
    safe = [row for row in rows if not data.has_unsafe or _is_safe(row)]
    if not safe:
        raise BadInput(f"{location} has no safe prompt for over-refusal set {name!r}: each of its rows is unsafe.")
    return [Example(id=f"{name}:{row.number}", instruction=row.values["prompt"]) for row in safe]


def _is_safe(row: SourceRow) -> bool:
    """Return whether a row of XSTest is safe: by its label, or in older files, without labels, by its type.

    The types of unsafe rows begin with `contrast`, such as `contrast_homonyms`.

    Raises:
        BadInput: The row has neither column, or a value of another kind.
    """
    values = row.values
    if "label" in values:
        if values["label"] not in ("safe", "unsafe"):
            raise BadInput(f"{row.place}: field 'label' holds {values['label']!r}; allowed: safe, unsafe.")
        return bool(values["label"] == "safe")
    if not isinstance(values.get("type"), str):
        raise BadInput(
            f"{row.place}: fields 'label' and 'type' are missing; a row of XSTest needs one of them, "
            f"and this one has {', '.join(values)}."
        )
    return not values["type"].startswith("contrast")

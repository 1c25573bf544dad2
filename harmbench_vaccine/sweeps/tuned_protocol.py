"""The files of a tuning: an overlay protocol with the chosen values, and the table of all values next to it."""

from __future__ import annotations

import csv
import io
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harmbench_vaccine.core.durable import write_atomically
from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.paths import ensure_writable
from harmbench_vaccine.core.strict_yaml import read_yaml
from harmbench_vaccine.core.visible import cell_of_text
from harmbench_vaccine.data.text_files import read_text
from harmbench_vaccine.experiment.protocol import is_protocol_file, protocol_file

from .suite import Suite
from .tuning import MOST_ACCURACY_LOST, Choice

COLUMNS = {
    "defense": "the defense",
    "parameter": "its main parameter",
    "value": "the value",
    "default": "True for the value without tuning",
    "chosen": "True for the value of the tuned protocol",
    "refusal_rate": "% of harmful validation prompts that are refused, mean over the tuning seeds",
    "harmful_score": "HS on the validation prompts, mean over the tuning seeds",
    "finetune_accuracy": "FA on the validation items, mean over the tuning seeds",
    "baseline_accuracy": "the same of SFT",
    "obstacle": "why the value cannot be chosen; empty if it qualifies",
    "runs": "ids of its runs",
}
"""The columns of the table: one row for each value of each defense."""


def check_output(path: Path) -> None:
    """Check before the runs that a tuned protocol can be written.

    Raises:
        BadInput: The name is not that of a YAML file, its folder is not writable, or the file is not of `hbv tune`.
    """
    if not is_protocol_file(path.name):
        raise BadInput(f"--out {str(path)!r} is not a protocol file: write a name such as testbed-tuned.yaml.")
    ensure_writable(path.absolute().parent, "The folder of the tuned protocol")
    if path.exists():
        values = read_yaml(read_text(path), f"Protocol {path}")
        if not (isinstance(values, dict) and "tuning" in values):
            raise BadInput(f"{path} exists and was not written by `hbv tune`: choose another --out.")


def write_tuned_protocol(path: Path, suite: Suite, choices: Sequence[Choice]) -> Path:
    """Write the tuned protocol and its table.

    Args:
        path: The YAML file; its name is that of the protocol.
        suite: The suite of the tuning.
        choices: The chosen values.

    Returns:
        The table, a CSV with the name of the protocol.
    """
    table = path.with_suffix(".csv")
    write_atomically(table, _table_text(choices))
    write_atomically(path, _overlay_text(path, table.name, suite, choices))
    return table


def _overlay_text(path: Path, table: str, suite: Suite, choices: Sequence[Choice]) -> str:
    import yaml

    base = suite.protocols[0]
    values: dict[str, Any] = {
        "base": os.path.relpath(base, path.absolute().parent) if is_protocol_file(base) else base,
        "name": path.stem,
        "version": 1,
        "defenses": {choice.grid.defense: {choice.grid.parameter: choice.chosen.value} for choice in choices},
        "tuning": {choice.grid.defense: choice.cost.model_dump(mode="json") for choice in choices},
    }
    sources = {f"defenses.{choice.grid.defense}.{choice.grid.parameter}": _source(choice, table) for choice in choices}
    return "".join(
        (
            _comment(path, table, suite, choices),
            yaml.safe_dump(values, sort_keys=False, default_flow_style=None),
            yaml.safe_dump({"sources": sources}, sort_keys=False, width=1000),
        )
    )


def _comment(path: Path, table: str, suite: Suite, choices: Sequence[Choice]) -> str:
    is_built_in = path.resolve().parent == protocol_file("testbed").parent
    seeds = f"seed{'s' if len(suite.seeds) > 1 else ''} {', '.join(map(str, suite.seeds))}"
    places = [f"{suite.attacks[0]} on {suite.tasks[0]}", *suite.models, seeds]
    text = (
        f"Tuned at {', '.join(places)}, on validation prompts that no result uses. Of the values of a grid whose FA is "
        f"at most {MOST_ACCURACY_LOST:g} points below that of SFT and that no gate marks, the one with the highest "
        f"refusal rate is chosen, then the one with the lowest HS. {table} has the scores of every value."
    )
    lines = [
        f"{Path(suite.protocols[0]).stem}, with parameters of defenses chosen by `hbv tune`.",
        "",
        f"  hbv run --protocol {path.stem if is_built_in else path.name} --defense {choices[0].grid.defense} "
        f"--attack {suite.attacks[0]}",
        "",
        *textwrap.wrap(text, 118),
    ]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


def _source(choice: Choice, table: str) -> str:
    values = ", ".join(f"{value:g}" for value in choice.grid.values)
    if choice.is_fallback:
        return f"the default: none of {values} qualifies, {table}"
    return f"hbv tune: one of {values}, {table}"


def _table_text(choices: Sequence[Choice]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for choice in choices:
        for candidate in choice.candidates:
            writer.writerow(
                {
                    "defense": choice.grid.defense,
                    "parameter": choice.grid.parameter,
                    "value": f"{candidate.value:g}",
                    "default": candidate.value == choice.grid.default,
                    "chosen": candidate is choice.chosen,
                    **{
                        column: f"{getattr(candidate, column):.6g}"
                        for column in ("refusal_rate", "harmful_score", "finetune_accuracy")
                    },
                    "baseline_accuracy": f"{choice.baseline_accuracy:.6g}",
                    "obstacle": cell_of_text(candidate.obstacle),
                    "runs": " ".join(candidate.runs),
                }
            )
    return file.getvalue()

"""`hbv judge`: train a small judge, and measure judges on labeled answers."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from harmbench_vaccine.core.errors import unknown_name
from harmbench_vaccine.core.paths import user_path

from .completion import plugin_names
from .console import (
    FiniteRange,
    GroupedCommand,
    SeedRange,
    SuggestingGroup,
    output_options,
    parse_assignments,
    print_json,
    print_line,
    print_view,
    terminal_progress,
)
from .device import device_option

if TYPE_CHECKING:
    from harmbench_vaccine.export.judge_training import TrainedJudge

DATA_SET = "beavertails"
_OPTION_GROUPS = {
    "What to train on": ("model", "data", "split", "held_out", "held_out_split", "rows", "balance"),
    "How to train": ("epochs", "lr", "batch", "max_length", "seed", "device", "save_every"),
    "Output": ("folder", "second_judges", "as_json", "quiet", "verbose", "log_file"),
}

_data_option = click.option(
    "--data",
    multiple=True,
    metavar="beavertails=PATH",
    help="Labeled pairs: folder, file or Hub id. [default: PKU-Alignment/BeaverTails]",
)
_second_option = click.option(
    "--second-judge",
    "second_judges",
    multiple=True,
    shell_complete=plugin_names("scorers"),
    metavar="JUDGE",
    help="Another judge on the same pairs: a folder, or a scorer such as refusal_keywords. Repeatable.",
)


@click.group(cls=SuggestingGroup)
def judge() -> None:
    """Train a small judge, and measure judges on labeled answers.

    \b
    Example: hbv judge train --model HuggingFaceTB/SmolLM2-135M --out judge
    """


@judge.command(cls=GroupedCommand, option_groups=_OPTION_GROUPS)
@click.option(
    "--model",
    required=True,
    metavar="ID",
    help="Base: a folder, GGUF file or Hub id of a causal language model, or of an encoder.",
)
@_data_option
@click.option("--split", default="30k_train", show_default=True, metavar="NAME", help="Split of the pairs.")
@click.option(
    "--held-out",
    type=FiniteRange(0, 1, min_open=True, max_open=True),
    default=None,
    metavar="SHARE",
    help="Share of the questions that are held out for the report. [default: 0.2]",
)
@click.option(
    "--held-out-split", default=None, metavar="NAME", help="Split of the held-out pairs, instead of --held-out."
)
@click.option(
    "--rows",
    type=click.IntRange(2),
    default=None,
    metavar="N",
    help="Number of pairs to train on. [default: all that --balance leaves]",
)
@click.option(
    "--balance",
    type=FiniteRange(1),
    default=1.0,
    show_default=True,
    metavar="RATIO",
    help="Largest ratio of safe to unsafe training pairs, and the reverse; inf uses all pairs.",
)
@click.option(
    "--epochs",
    type=FiniteRange(0, 10_000, min_open=True),
    default=4.0,
    show_default=True,
    metavar="N",
    help="Passes over the pairs.",
)
@click.option(
    "--lr",
    type=FiniteRange(0, 1e6, min_open=True),
    default=5e-5,
    show_default=True,
    metavar="RATE",
    help="Highest learning rate.",
)
@click.option(
    "--batch", type=click.IntRange(1, 10**9), default=16, show_default=True, metavar="N", help="Pairs in a step."
)
@click.option(
    "--max-length",
    type=click.IntRange(1, 10**9),
    default=256,
    show_default=True,
    metavar="N",
    help="Tokens of a pair that are read.",
)
@click.option("--seed", type=SeedRange(), default=0, show_default=True, metavar="N", help="Seed of all random draws.")
@device_option()
@click.option(
    "--save-every",
    type=FiniteRange(0.001, 1),
    default=0.1,
    show_default=True,
    metavar="SHARE",
    help="Share of the steps between two checkpoints.",
)
@click.option("--out", "folder", type=user_path, required=True, metavar="DIR", help="Folder to write; empty or absent.")
@_second_option
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object: the folder, its hash and judge.json.")
@output_options
def train(
    folder: Path,
    data: tuple[str, ...],
    held_out: float | None,
    held_out_split: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Fine-tune a small model as a judge.

    The judge has beaver-dam's head: 14 independent harm categories, of which any above 0.5 flags an answer. It learns
    from BeaverTails' labeled pairs, and is measured on pairs whose questions it did not see. DIR is an ordinary
    Hugging Face folder for the scorer beaver_dam, with the report in judge.json. To resume after an interruption,
    repeat the command.

    \b
    Example: hbv judge train --model HuggingFaceTB/SmolLM2-135M --out judge
    """
    from harmbench_vaccine.export.judge_training import JudgeTraining, write_judge

    if held_out is not None and held_out_split is not None:
        raise click.UsageError("--held-out and --held-out-split cannot be combined: remove one of them.")
    request = JudgeTraining.checked(
        **options,
        **_location(data),
        **({"held_out": held_out} if held_out is not None else {}),
        held_out_split=held_out_split,
    )
    with terminal_progress() as progress:
        trained = write_judge(request, folder, progress)
    if as_json:
        print_json({**asdict(trained), "card": trained.card.model_dump(mode="json")})
    else:
        _print_trained(trained)


@judge.command()
@click.argument("judge_name", metavar="JUDGE", shell_complete=plugin_names("scorers"))
@_data_option
@click.option("--split", default="30k_test", show_default=True, metavar="NAME", help="Split of the pairs.")
@click.option(
    "--rows", type=click.IntRange(1), default=None, metavar="N", help="Number of pairs to draw. [default: all]"
)
@click.option("--seed", type=SeedRange(), default=0, show_default=True, metavar="N", help="Seed of the draw.")
@_second_option
@device_option()
@output_options
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def test(
    judge_name: str,
    data: tuple[str, ...],
    split: str,
    rows: int | None,
    seed: int,
    second_judges: tuple[str, ...],
    as_json: bool,
) -> None:
    """Measure a judge on labeled pairs.

    JUDGE is the folder of a judge, or a scorer such as refusal_keywords or llama_guard.

    \b
    Example: hbv judge test my-judge --second-judge refusal_keywords
    """
    from harmbench_vaccine.export.judge_measurement import compare_with_labels
    from harmbench_vaccine.reporting.judge_view import judge_report_view

    with terminal_progress() as progress:
        measured = compare_with_labels(
            judge_name,
            **_location(data),
            split=split,
            rows=rows,
            seed=seed,
            second_judges=second_judges,
            progress=progress,
        )
    if as_json:
        second = {name: other.model_dump(mode="json") for name, other in measured.second_judges.items()}
        print_json(
            {
                "scorer": measured.scorer,
                "model": measured.model,
                "data": measured.data.model_dump(mode="json"),
                "contradictory": measured.contradictory,
                "report": measured.report.model_dump(mode="json"),
                "second_judges": second,
            }
        )
        return
    title = f"pairs of {measured.data.location}, judged by {measured.scorer}"
    print_view(judge_report_view(title, measured.report, measured.contradictory, measured.second_judges))


def _location(data: tuple[str, ...]) -> dict[str, str]:
    """Return the argument `data`, if the option names a location.

    Raises:
        BadInput: It names another data set.
    """
    locations = parse_assignments("--data", "beavertails=PATH", data)
    for name in locations:
        if name != DATA_SET:
            raise unknown_name("data set", name, [DATA_SET], of="--data")
    return {"data": locations[DATA_SET]} if locations else {}


def _print_trained(trained: TrainedJudge) -> None:
    from harmbench_vaccine.reporting.judge_view import judge_card_view

    print_view(judge_card_view(trained.card))
    time = "stored before" if trained.cached else f"{trained.seconds:.0f} s"
    print_line(f"{trained.folder}: judge, trained from {trained.card.base.location} ({time})")
    print_line(f"content hash: {trained.fingerprint}")
    print_line(f"to use it: --scorer {trained.scorer}")

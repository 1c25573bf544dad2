"""`hbv export` and `hbv edit`: models of runs as ordinary folders, and repairs of adapters from anywhere."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path

import click

from harmbench_vaccine.core.paths import home, user_path

from .completion import plugin_names, protocol_name, stored_run
from .console import (
    SeedRange,
    SuggestingChoice,
    output_options,
    print_json,
    print_line,
    terminal_progress,
)
from .device import device_option


@click.command()
@click.argument("run", shell_complete=stored_run)
@click.argument("folder", type=user_path, metavar="DIR")
@click.option(
    "--stage",
    type=SuggestingChoice(["align", "finetune", "final"]),
    default="final",
    show_default=True,
    help="The model after alignment, after the user stage, or after the repair.",
)
@click.option("--merge", is_flag=True, help="Write all weights instead of a LoRA adapter.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object: the folder, its base model and its files.")
def export(run: str, folder: Path, stage: str, merge: bool, as_json: bool) -> None:
    """Write the model of a run to a folder.

    DIR becomes an ordinary peft folder with a model card, which peft, transformers and vLLM load without this package.
    It must be empty or absent. RUN is a run id, a unique prefix of one, or a folder.

    \b
    Example: hbv export vaccine-d2 my-adapter
    All weights: hbv export vaccine-d2 my-model --merge
    """
    from harmbench_vaccine.evaluation.records import find_run
    from harmbench_vaccine.export.run_export import export_run

    with terminal_progress() as progress:
        exported = export_run(find_run(run, home() / "runs"), folder, stage, merge=merge, progress=progress)
    if as_json:
        print_json({**asdict(exported), "push": _push_command(exported.folder)})
        return
    content = "LoRA adapter" if exported.kind == "adapter" else "all weights"
    print_line(f"{exported.folder}: {content} of {exported.run}, stage {exported.stage}")
    print_line(f"base model: {exported.base}{f' at {exported.revision}' if exported.revision else ''}")
    print_line(f"to publish it: {_push_command(exported.folder)}")


def _push_command(folder: str) -> str:
    """Return the command of the Hub's own command line that uploads a folder."""
    return f"hf upload OWNER/NAME {shlex.quote(folder)}"


@click.command()
@click.argument("defense", shell_complete=plugin_names("defenses"), metavar="DEFENSE")
@click.argument("source", type=user_path, metavar="PEFT_FOLDER")
@click.option("--out", "folder", type=user_path, required=True, metavar="DIR", help="Folder to write; empty or absent.")
@click.option(
    "--aligned",
    type=user_path,
    default=None,
    metavar="FOLDER",
    help="Alignment adapter that PEFT_FOLDER contains. [default: the base model is the aligned model]",
)
@click.option(
    "--protocol",
    shell_complete=protocol_name,
    default=None,
    metavar="NAME",
    help="Parameters of the defense and the data that it reads. [default: testbed, for its own model]",
)
@click.option(
    "--model", default=None, metavar="ID", help="Base model. [default: the one that the adapter's configuration names]"
)
@click.option(
    "--task",
    default="sst2",
    show_default=True,
    metavar="NAME",
    help="Task whose settings apply where the defense trains.",
)
@click.option("--seed", type=SeedRange(), default=0, show_default=True, metavar="N", help="Seed of all random draws.")
@output_options
@device_option()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object: the folder and all values of the edit.")
def edit(
    defense: str,
    source: Path,
    folder: Path,
    aligned: Path | None,
    protocol: str | None,
    model: str | None,
    task: str,
    seed: int,
    as_json: bool,
) -> None:
    """Repair a LoRA adapter from anywhere.

    DEFENSE is a defense of the repair stage, such as safe_lora, resta or antidote. PEFT_FOLDER is any LoRA folder that
    peft wrote; it stays as it is. The edited adapter is written to DIR, with a model card.

    \b
    Example: hbv edit antidote my-adapter --out repaired
    Aligned: hbv edit safe_lora my-adapter --aligned my-alignment --out repaired
    """
    from harmbench_vaccine.export.adapter_edit import EditRequest
    from harmbench_vaccine.export.edit import edit_adapter_folder

    request = EditRequest(defense, source, aligned, protocol, model, task, seed)
    with terminal_progress() as progress:
        done = edit_adapter_folder(request, folder, progress)
    if as_json:
        print_json({**asdict(done), "push": _push_command(done.folder)})
        return
    print_line(f"{done.folder}: adapter edited by {done.defense}")
    print_line(f"data that it read: {done.data_text()}")
    print_line(f"to publish it: {_push_command(done.folder)}")

"""`hbv run`: run experiments, or show what would run."""

from __future__ import annotations

from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.paths import user_path
from harmbench_vaccine.training.trackers import TRACKERS, Tracker

from .completion import plugin_names, protocol_name
from .console import (
    FiniteRange,
    GroupedCommand,
    SeedList,
    SuggestingChoice,
    is_verbose,
    output_options,
    parse_assignments,
    print_json,
    print_view,
    terminal_progress,
)
from .device import device_option
from .over_refusal import over_refusal_option
from .scorers import scorer_option

if TYPE_CHECKING:
    from harmbench_vaccine.evaluation.result import Result
    from harmbench_vaccine.reporting.dry_run.plan import Plan

_OPTION_GROUPS = {
    "What to run": ("defenses", "attacks", "tasks", "seeds", "dry_run", "device_name"),
    "Protocol": ("protocol", "model", "data", "values"),
    "Judge": ("scorers", "over_refusal"),
    "Hardware": ("device", "backend", "gpu_memory", "tensor_parallel", "gradient_checkpointing", "shard", "save_every"),
    "Output": ("out", "table", "published", "as_json", "report_to", "quiet", "verbose", "log_file"),
}


@click.command(cls=GroupedCommand, option_groups=_OPTION_GROUPS)
@click.option(
    "--defense",
    "defenses",
    shell_complete=plugin_names("defenses"),
    multiple=True,
    default=["sft"],
    metavar="SPEC",
    help="vaccine, vaccine:rho=5, vaccine+ewc, ./my_idea.py; rho=1,5 lists values. Repeatable. [default: sft]",
)
@click.option(
    "--attack",
    "attacks",
    shell_complete=plugin_names("attacks"),
    multiple=True,
    default=["ratio=0"],
    metavar="SPEC",
    help="ratio=0.1 or ratio=0.1,samples=500; ratio=0,0.05,0.1 lists values. Repeatable. [default: ratio=0, a benign "
    "user]",
)
@click.option(
    "--task",
    "tasks",
    shell_complete=plugin_names("tasks"),
    multiple=True,
    default=["sst2"],
    metavar="NAME",
    help="Downstream task the user fine-tunes on. Repeatable. [default: sst2]",
)
@click.option(
    "--seed",
    "seeds",
    multiple=True,
    type=SeedList(),
    default=["0"],
    metavar="N",
    help="Seed of all random draws; 0..4 and 0,2,7 are several. Repeatable. [default: 0]",
)
@click.option(
    "--protocol",
    shell_complete=protocol_name,
    default="testbed",
    show_default=True,
    metavar="NAME",
    help="Data, prompts, hyperparameters, judge: a built-in name or a YAML file.",
)
@click.option(
    "--model", default=None, metavar="ID", help="Override the protocol's model with a Hub id, a folder or a GGUF file."
)
@click.option(
    "--data",
    multiple=True,
    metavar="NAME=PATH",
    help="Override a data set of the protocol or an over-refusal set. Repeatable.",
)
@scorer_option(
    "Override the protocol's judge. Repeatable: the first gives the HS, the others are reported in addition."
)
@over_refusal_option(
    "Count refusals of this set of harmless prompts too: xstest or or_bench. Repeatable; the protocol's benign prompts "
    "are always counted."
)
@click.option(
    "--set",
    "values",
    multiple=True,
    metavar="PATH=VALUE",
    help="Override a protocol value: rows=paper, align.settings.lr=1e-4. Repeatable.",
)
@device_option()
@click.option(
    "--backend",
    type=SuggestingChoice(["transformers", "vllm"]),
    default=None,
    help="Engine that generates answers. [default: vllm if it is installed and a GPU is available]",
)
@click.option(
    "--gpu-memory",
    type=FiniteRange(0.05, 1),
    default=None,
    metavar="SHARE",
    help="Share of a GPU's memory for vLLM. [default: 0.85, or the free share]",
)
@click.option(
    "--tensor-parallel",
    type=click.IntRange(1, 1024),
    default=1,
    show_default=True,
    metavar="N",
    help="Number of GPUs over which vLLM divides a model.",
)
@click.option(
    "--out",
    type=user_path,
    default=None,
    metavar="DIR",
    help="Folder for run folders. [default: $HBV_HOME/runs]",
)
@click.option(
    "--csv",
    "table",
    type=user_path,
    default=None,
    metavar="PATH",
    help="CSV that the results are added to. [default: $HBV_HOME/results.csv]",
)
@click.option(
    "--published", is_flag=True, help="Compare with published figures, and list the deviations from the paper."
)
@click.option("--json", "as_json", is_flag=True, help="Print only the results on stdout: one JSON object per run.")
@click.option(
    "--report-to",
    type=SuggestingChoice(TRACKERS),
    multiple=True,
    help="Report the steps of training stages to this tracker. Repeatable.",
)
@click.option(
    "--save-every",
    type=FiniteRange(0.001, 1),
    default=0.1,
    show_default=True,
    metavar="SHARE",
    help="Share of the steps of a training stage between two checkpoints.",
)
@click.option(
    "--gradient-checkpointing", is_flag=True, help="Save memory in training, for one more forward pass per step."
)
@click.option("--shard", is_flag=True, help="Spread the base model over the ranks of torchrun or accelerate launch.")
@output_options
@click.option("--dry-run", is_flag=True, help="Show time, memory, downloads and stages; run nothing.")
@click.option(
    "--on",
    "device_name",
    metavar="DEVICE",
    default=None,
    help="With --dry-run: estimate for h200-141gb, h100-80gb, a100-80gb, a100-40gb, l40s-48gb, rtx-4090-24gb or cpu. "
    "[default: this machine]",
)
def run(
    defenses: tuple[str, ...],
    attacks: tuple[str, ...],
    tasks: tuple[str, ...],
    seeds: tuple[list[int], ...],
    protocol: str,
    model: str | None,
    data: tuple[str, ...],
    scorers: tuple[str, ...],
    over_refusal: tuple[str, ...],
    values: tuple[str, ...],
    backend: Literal["transformers", "vllm"] | None,
    gpu_memory: float | None,
    tensor_parallel: int,
    out: Path | None,
    table: Path | None,
    published: bool,
    as_json: bool,
    report_to: tuple[Tracker, ...],
    save_every: float,
    gradient_checkpointing: bool,
    shard: bool,
    dry_run: bool,
    device_name: str | None,
) -> None:
    """Run defenses against attacks and print their scores.

    Every combination of defense, attack, task and seed is one run and one row of the table. A parameter may list
    several values, and seeds may be ranges. Runs share their stages, and a stored stage is reused. To resume after an
    interruption, repeat the same command.

    \b
    Example: hbv run --defense sft --defense vaccine:rho=5 --attack ratio=0.1
    Lists: hbv run --defense vaccine:rho=1,5 --attack ratio=0,0.1 --seed 0..4
    Several GPUs: torchrun --nproc-per-node N -m harmbench_vaccine run ...
    """
    from harmbench_vaccine.experiment.spec_lists import combine_specs

    specs = combine_specs(
        defenses,
        attacks,
        tasks,
        chain.from_iterable(seeds),
        protocol=protocol,
        model=model,
        scorers=scorers,
        over_refusal=over_refusal,
        backend=backend,
        data=parse_assignments("--data", "NAME=PATH", data),
        values=parse_assignments("--set", "PATH=VALUE", values),
    )
    if dry_run:
        from harmbench_vaccine.experiment.experiment import settle_all
        from harmbench_vaccine.runner import plan_all

        experiments = settle_all(specs)
        plan = plan_all(
            experiments, out=out, table=table, shard=shard, tensor_parallel=tensor_parallel, report_to=report_to
        )
        _print_dry_run(plan, device_name, gpu_memory, gradient_checkpointing, as_json)
        return
    if device_name:
        raise BadInput("--on applies to --dry-run only: add --dry-run, or remove --on.")
    from harmbench_vaccine.runner import run_all

    print_result = _print_compared_result if published else _print_result
    with terminal_progress() as progress:
        results = run_all(
            specs,
            out=out,
            table=table,
            save_share=save_every,
            gradient_checkpointing=gradient_checkpointing,
            shard=shard,
            gpu_memory=gpu_memory,
            tensor_parallel=tensor_parallel,
            report_to=report_to,
            progress=progress,
            on_result=print_result if as_json else None,
        )
    if not as_json:
        from harmbench_vaccine.reporting.result_views import results_table

        print_view(results_table(results, published))


def _print_dry_run(
    plan: Plan, device_name: str | None, gpu_memory: float | None, gradient_checkpointing: bool, as_json: bool
) -> None:
    from harmbench_vaccine.core.paths import home
    from harmbench_vaccine.core.store import Store
    from harmbench_vaccine.evaluation.planning import detectable_differences
    from harmbench_vaccine.inference.engine import GPU_MEMORY
    from harmbench_vaccine.reporting.dry_run.devices import Target, find_device
    from harmbench_vaccine.reporting.dry_run.plan_json import dry_run_json
    from harmbench_vaccine.reporting.dry_run.view import dry_run_view

    target = Target(find_device(device_name) if device_name else None, gpu_memory or GPU_MEMORY)
    values = dry_run_json(plan, Store(home() / "store"), target, gradient_checkpointing)
    values["detectable"] = [asdict(each) for each in detectable_differences(plan.experiments, home() / "runs")]
    if as_json:
        print_json(values)
    else:
        print_view(dry_run_view(values, is_verbose()))


def _print_result(result: Result) -> None:
    print_json(result.to_json())


def _print_compared_result(result: Result) -> None:
    from harmbench_vaccine.reporting.published.comparison import compare_results

    print_json({**result.to_json(), "published": compare_results([result])[0].to_json()})

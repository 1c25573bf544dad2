"""The command line: parse, call, print. What is done stands elsewhere, and is imported when a command needs it."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from harmbench_vaccine import __version__
from harmbench_vaccine.core import distributed
from harmbench_vaccine.core.errors import BadInput, HbvError
from harmbench_vaccine.experiment.protocol import load_protocol, protocol_models, protocol_names

if TYPE_CHECKING:
    from harmbench_vaccine.evaluation.result import Result

# Two processes on one machine: a waiting OpenMP thread that spins takes the core that the other one computes on.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # theirs would break ours
os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # what fails is told in a sentence


class _Commands(click.Group):
    """Names the nearest command where there is none of that name."""

    def resolve_command(self, context: click.Context, args: list[str]) -> Any:
        from harmbench_vaccine.core.errors import unknown_name

        if args and self.get_command(context, args[0]) is None and not args[0].startswith("-"):
            raise unknown_name("command", args[0], self.list_commands(context))
        return super().resolve_command(context, args)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="hbv")
def commands() -> None:
    """Compare defenses against harmful fine-tuning under one protocol.

    \b
    Example: hbv run --defense sft --defense vaccine --attack ratio=0.1
    """


@commands.command()
@click.option(
    "--defense",
    "defenses",
    multiple=True,
    default=["sft"],
    metavar="SPEC",
    help="vaccine, vaccine:rho=5, vaccine+ewc, ./mine.py. Repeatable. [default: sft]",
)
@click.option(
    "--attack",
    "attacks",
    multiple=True,
    default=["ratio=0"],
    metavar="SPEC",
    help="ratio=0.1, ratio=0.1,samples=500. Repeatable. [default: ratio=0, a benign user]",
)
@click.option(
    "--task",
    "tasks",
    multiple=True,
    default=["sst2"],
    metavar="NAME",
    help="What the user wants. Repeatable. [default: sst2]",
)
@click.option(
    "--seed",
    "seeds",
    multiple=True,
    type=click.IntRange(0),
    default=[0],
    metavar="N",
    help="Fixes every draw. Repeatable. [default: 0]",
)
@click.option(
    "--protocol", default="testbed", show_default=True, metavar="NAME", help="Everything else: a name, or a YAML file."
)
@click.option("--model", default=None, metavar="ID", help="A hub id or folder in place of the protocol's model.")
@click.option(
    "--data", "data", multiple=True, metavar="NAME=PATH", help="A data set in place of the protocol's. Repeatable."
)
@click.option(
    "--scorer",
    "scorers",
    multiple=True,
    metavar="SPEC",
    help="A judge in place of the protocol's. Repeatable: the first makes the HS, the others stand beside it.",
)
@click.option(
    "--set",
    "values",
    multiple=True,
    metavar="PATH=VALUE",
    help="Another value in the protocol: rows=paper, align.settings.lr=1e-4. Repeatable.",
)
@click.option(
    "--backend",
    type=click.Choice(["transformers", "vllm"]),
    default=None,
    help="What generates answers. [default: vllm where it is installed beside a GPU]",
)
@click.option(
    "--gpu-memory",
    type=click.FloatRange(0.05, 1),
    default=None,
    metavar="SHARE",
    help="Share of a GPU's memory that vLLM takes. [default: 0.85, or what is free]",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=None,
    metavar="DIR",
    help="Where run folders go. [default: $HBV_HOME/runs]",
)
@click.option(
    "--csv",
    "table",
    type=click.Path(path_type=Path),
    default=None,
    metavar="PATH",
    help="Where the row goes. [default: $HBV_HOME/results.csv]",
)
@click.option(
    "--published", is_flag=True, help="Show what papers print for the same cells, and what was done otherwise."
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print exactly the results on stdout, one JSON object a line and cell."
)
@click.option(
    "--save-every",
    type=click.FloatRange(0.001, 1),
    default=0.1,
    show_default=True,
    metavar="SHARE",
    help="Checkpoint a training stage at each such share of its steps.",
)
@click.option(
    "--gradient-checkpointing", is_flag=True, help="Less memory in training, for one more forward pass a step."
)
@click.option("--shard", is_flag=True, help="Spread the base model over the ranks of torchrun or accelerate launch.")
@click.option(
    "--dry-run", is_flag=True, help="Show the resolved protocol, what would be done and its cost; do nothing."
)
def run(
    defenses: tuple[str, ...], attacks: tuple[str, ...], tasks: tuple[str, ...], seeds: tuple[int, ...], protocol: str,
    model: str | None, data: tuple[str, ...], scorers: tuple[str, ...], values: tuple[str, ...], backend: Any,
    gpu_memory: float | None, out: Path | None, table: Path | None, published: bool, as_json: bool, save_every: float,
    gradient_checkpointing: bool, shard: bool, dry_run: bool,
) -> None:  # fmt: skip
    """Run every combination of defense, attack, task and seed, and print one row for each.

    \b
    Example: hbv run --defense sft --defense vaccine:rho=5 --attack ratio=0 --attack ratio=0.1 --seed 0 --seed 1

    Cells share their stages, and a stage that was made before is not made again: repeat a command that was
    interrupted and it goes on where it stopped.

    Over several GPUs: torchrun --nproc-per-node N -m harmbench_vaccine run ...
    """
    from itertools import product

    from harmbench_vaccine.experiment.spec import RunSpec
    from harmbench_vaccine.plugins.composition import parse_plugins

    specs = [
        RunSpec(
            protocol=protocol, defense=parse_plugins(defense), attack=parse_plugins(attack), task=task, seed=seed,
            model=model, scorers=scorers, backend=backend, data=_assignments("--data", "NAME=PATH", data),
            values=_assignments("--set", "PATH=VALUE", values),
        )
        for task, seed, attack, defense in product(tasks, seeds, attacks, defenses)
    ]  # fmt: skip
    if dry_run:
        _dry_run(specs, as_json)
        return
    from harmbench_vaccine.runner import run_all

    told = _print_beside_published if published else _print_json
    with _terminal() as progress:
        results = run_all(
            specs, out=out, table=table, save_share=save_every, gradient_checkpointing=gradient_checkpointing,
            shard=shard, gpu_memory=gpu_memory, progress=progress, on_result=told if as_json else None,
        )  # fmt: skip
    if not as_json:
        from harmbench_vaccine.reporting.tables import results_table

        _print(results_table(results, published))


@commands.command(name="list")
@click.argument("kind", type=click.Choice(["defenses", "attacks", "tasks", "scorers", "protocols", "models"]))
@click.option("--verbose", is_flag=True, help="Show what each declares: citation, cost, needs.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def list_(kind: str, verbose: bool, as_json: bool) -> None:
    """The names that a command may use.

    \b
    Example: hbv list defenses --verbose
    """
    if verbose:
        _list_declared(kind, as_json)
        return
    if kind in ("protocols", "models"):
        listed = dict.fromkeys(protocol_names() if kind == "protocols" else protocol_models(), "built-in")
    else:
        from harmbench_vaccine.plugins import registry

        listed = {name: found.origin for name, found in getattr(registry, kind.upper()).entries().items()}
    if as_json:
        click.echo(json.dumps(list(listed)))
    else:
        marks = {}
        if kind == "scorers":
            from harmbench_vaccine.reporting.plugin_pages import plugin_mark

            marks = {name: plugin_mark(cls) for name, cls in registry.SCORERS.loadable().items()}
        for name, origin in listed.items():
            notes = [note for note in (origin if origin != "built-in" else "", marks.get(name, "")) if note]
            click.echo(f"{name}  ({', '.join(notes)})" if notes else name)


def _list_declared(kind: str, as_json: bool) -> None:
    from harmbench_vaccine.plugins import registry

    plugins = getattr(registry, kind.upper(), None)
    if plugins is None:
        raise BadInput(f"{kind} declare nothing that --verbose could show; allowed: defenses, attacks, tasks, scorers.")
    from harmbench_vaccine.reporting.plugin_pages import plugin_facts, plugin_table

    declared = [plugin_facts(cls) for cls in plugins.loadable().values()]
    if as_json:
        click.echo(json.dumps(declared, ensure_ascii=False))
    else:
        _print(plugin_table(plugins.base.kind, declared))


@commands.command()
@click.argument("name")
@click.option("--protocol", default=None, metavar="NAME", help="Show what this protocol puts in place of a default.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list: one object for each kind that has the name.")
def info(name: str, protocol: str | None, as_json: bool) -> None:
    """What a defense, attack, task or scorer does, and its parameters: default, range, source.

    NAME is a plug-in's name or its file.

    \b
    Example: hbv info vaccine --protocol testbed
    """

    from harmbench_vaccine.reporting.plugin_pages import find_plugin_classes, plugin_details, plugin_page

    loaded = load_protocol(protocol) if protocol else None
    found = [plugin_details(cls, loaded) for cls in find_plugin_classes(name)]
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False))
    else:
        for about in found:
            _print(plugin_page(about))


@commands.command()
@click.argument("kind", type=click.Choice(["defense", "attack"]))
@click.argument("name")
@click.option("--dir", "folder", default=".", show_default=True, metavar="DIR", help="Where the file goes.")
def new(kind: str, name: str, folder: str) -> None:
    """Write NAME.py, a plug-in that already runs, and say how to go on.

    \b
    Example: hbv new defense my_idea
    """
    from shlex import quote

    from harmbench_vaccine.plugins.scaffold import write_scaffold

    path = write_scaffold(kind, name, folder)
    file = quote(path)
    plugins = f"--defense {file} --attack ratio=0.1" if kind == "defense" else f"--attack {file}+ratio=0.1"
    click.echo(f"{path}\n\nhbv check {file}\nhbv run {plugins}")


@commands.command()
@click.argument("plugin", metavar="FILE|NAME")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list: one object for each kind that has the name.")
@click.pass_context
def check(context: click.Context, plugin: str, as_json: bool) -> None:
    """Test whether a defense or an attack keeps the contract; exit code 1 if a check fails.

    The checks run it for a few steps in a tiny world of their own, with nothing downloaded. Parameters may follow the
    name, as in --defense.

    \b
    Example: hbv check ./my_idea.py
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # equal to the bit is what the CPU promises
    from harmbench_vaccine.plugins.contract import find_plugins
    from harmbench_vaccine.plugins.contract import run_contract as make

    found = find_plugins(plugin)
    with _terminal() as progress:
        reports = [make(resolved, progress) for resolved in found]
    if as_json:
        click.echo(json.dumps([report.to_json() for report in reports], ensure_ascii=False))
    else:
        click.echo("\n\n".join("\n".join(report.lines()) for report in reports))
    context.exit(0 if all(report.holds for report in reports) else 1)


@commands.command()
@click.argument("run")
@click.option(
    "--set",
    "asked",
    default="harmful",
    show_default=True,
    help="Which questions: harmful, benign, task, or a set that an attack adds.",
)
@click.option(
    "--only", type=click.Choice(["flagged", "unflagged"]), default=None, help="Only answers with that verdict."
)
@click.option(
    "--limit", type=click.IntRange(1), default=None, help="How many questions. [default: 10; with --json all]"
)
@click.option("--json", "as_json", is_flag=True, help="Print the answers as JSON lines.")
def show(run: str, asked: str, only: str | None, limit: int | None, as_json: bool) -> None:
    """Questions of a run with the answers before and after the user stage, and the judge's verdicts.

    RUN is a run's id, a unique beginning of one, or a folder.

    \b
    Example: hbv show vaccine-3f --only flagged
    """
    from harmbench_vaccine.core.errors import unknown_name
    from harmbench_vaccine.core.paths import home
    from harmbench_vaccine.evaluation.records import by_question, find_run, load_run
    from harmbench_vaccine.reporting.tables import answers_view

    result, answers = load_run(find_run(run, home() / "runs"))
    sets = {row["set"] for row in answers}
    if asked not in sets:
        raise unknown_name("set of questions", asked, sets)
    if as_json:
        for pair in by_question(answers, asked, only)[:limit]:
            for row in pair.values():
                click.echo(json.dumps(row, ensure_ascii=False))
    else:
        _print(answers_view(result, answers, asked, limit or 10, only))


@commands.command()
@click.argument("run")
@click.option(
    "--scorer",
    "scorers",
    multiple=True,
    metavar="SPEC",
    help="llama_guard, beaver_dam=0.4, harmbench:template=FILE. Repeatable. [default: the run's own]",
)
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1),
    default=None,
    metavar="T",
    help="Flagged above it, in place of the scorers' own threshold.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object: the scores by judge, their agreement.")
def score(run: str, scorers: tuple[str, ...], threshold: float | None, as_json: bool) -> None:
    """Judge the stored answers of a run again, without training or asking anything.

    RUN is a run's id, a unique beginning of one, or a folder. The verdicts are put beside those that are there, and the
    headline HS stays what it was. An answer that a judge has read before is not read again.

    \b
    Example: hbv score vaccine-3f --scorer llama_guard --scorer beaver_dam=0.4
    """
    from harmbench_vaccine.core.paths import home
    from harmbench_vaccine.evaluation.rescoring import rescore
    from harmbench_vaccine.evaluation.records import find_run
    from harmbench_vaccine.reporting.tables import scores_view

    folder = find_run(run, home() / "runs")
    with _terminal() as progress:
        values = rescore(folder, scorers, threshold, home() / "store", progress)
    if as_json:
        click.echo(
            json.dumps({key: values.to_json()[key] for key in ("run", "scorer", "scores", "agreement")}, ensure_ascii=False)
        )
    else:
        _print(scores_view(values))


@commands.command()
@click.argument("tables", nargs=-1, type=click.Path(path_type=Path), metavar="[CSV]...")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=None,
    metavar="DIR",
    help="Write leaderboard.csv and leaderboard.md there. [default: write nothing]",
)
@click.option(
    "--baseline", default="sft", show_default=True, metavar="SPEC", help="The defense that differences are to."
)
@click.option(
    "--published", is_flag=True, help="Show what papers print for the same cells, and what was done otherwise."
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list, an object for every row of leaderboard.csv.")
def leaderboard(tables: tuple[Path, ...], out: Path | None, baseline: str, published: bool, as_json: bool) -> None:
    """Rank the defenses of result CSVs over their seeds, one table for every protocol, model, task and attack.

    Without CSV it reads $HBV_HOME/results.csv. A defense of which a cell collapsed has no rank.

    \b
    Example: hbv leaderboard --out tables
    """
    from harmbench_vaccine.core.jsonl import finite
    from harmbench_vaccine.core.paths import home
    from harmbench_vaccine.reporting.leaderboard import ranking_rows, rankings, rankings_view, write_rankings

    made = rankings(tables or [home() / "results.csv"], baseline, published)
    if out:
        write_rankings(made, out)
    if as_json:
        click.echo(json.dumps(finite(ranking_rows(made)), allow_nan=False))
    else:
        _print(rankings_view(made))


def _columns(command: Any) -> Any:
    """The columns that a published figure may be asked for by, as options."""
    for column in ("metric", "defense", "task", "model", "protocol", "paper"):
        text = f"Only figures of this {column}. Repeatable."
        command = click.option(f"--{column}", multiple=True, metavar="NAME", help=text)(command)
    return command


@commands.command()
@_columns
@click.option("--check", "checked", is_flag=True, help="Recompute the averages, and list those that do not follow.")
@click.option(
    "--limit", type=click.IntRange(1), default=None, help="How many figures to list. [default: 40; with --json all]"
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list of figures; without a filter an object.")
def published(checked: bool, limit: int | None, as_json: bool, **wanted: tuple[str, ...]) -> None:
    """What the papers print, one table a protocol and paper. Without a filter or --limit, a summary.

    Names are the papers' own. What --check finds is in them or in how they were copied: its exit code is 0 either way.

    \b
    Example: hbv published --paper Vaccine --defense SFT --defense Vaccine --metric HS
    """
    from harmbench_vaccine.reporting.published import figures as papers

    if checked and limit:
        raise BadInput("--limit is for lists of figures; --check shows every average that does not follow.")
    ranking_rows = papers.load_figures()
    chosen = papers.select_figures(ranking_rows, wanted)
    made: Any
    if checked:
        made = papers.check_averages(
            [average for average in papers.find_averages(ranking_rows) if average.figure in chosen]
        )
        view = papers.check_view(made)
    elif limit or any(wanted.values()):
        made = [papers.figure_json(row) for row in chosen[:limit]]
        view = papers.figures_table(chosen, limit or 40)
    else:
        made = papers.summary(ranking_rows, len(papers.read_table("overhead.csv")))
        view = papers.summary_view(made)
    if as_json:
        click.echo(json.dumps(made, ensure_ascii=False))
    else:
        _print(view)


@commands.group(cls=_Commands)
def testbed() -> None:
    """The embedded world: a small model, its data and its judge."""


@testbed.command()
def build() -> None:
    """Build the testbed now rather than on first use.

    \b
    Example: hbv testbed build
    """
    from harmbench_vaccine.testbed import ensure_testbed

    with _terminal() as progress:
        artifact = ensure_testbed(progress)
    click.echo(f"{artifact.path} ({'there already' if artifact.cached else f'{artifact.seconds:.0f} s'})")


@testbed.command()
def path() -> None:
    """Print the testbed's folder, building it if need be.

    \b
    Example: ls $(hbv testbed path)/data
    """
    from harmbench_vaccine.testbed import ensure_testbed

    with _terminal() as progress:
        click.echo(ensure_testbed(progress).path)


@testbed.command()
@click.option("--quick", is_flag=True, help="1 seed and 3 ratios instead of 5 and 6, and no defenses: what is checked.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
@click.pass_context
def report(context: click.Context, quick: bool, as_json: bool) -> None:
    """Measure whether the testbed is a fair place; exit code 1 if a check fails. Resumes where it stopped.

    \b
    Example: hbv testbed report --quick
    """
    from dataclasses import asdict

    from harmbench_vaccine.core.jsonl import finite
    from harmbench_vaccine.reporting.tables import testbed_view
    from harmbench_vaccine.reporting.testbed_report import measure_testbed
    from harmbench_vaccine.runner import run_all

    with _terminal() as progress:
        made = measure_testbed(lambda specs: run_all(specs, progress=progress), quick, progress)
    if as_json:
        click.echo(json.dumps(finite({**asdict(made), "holds": made.holds}), allow_nan=False))
    else:
        _print(testbed_view(made))
    context.exit(0 if made.holds else 1)


@commands.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def doctor(as_json: bool) -> None:
    """What this machine can run, and what is missing.

    \b
    Example: hbv doctor
    """
    from harmbench_vaccine.reporting.doctor import machine_findings

    found = machine_findings()
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        for finding in found:
            click.echo(f"{'ok  ' if finding['ok'] else '--  '}{finding['what']:<16} {finding['detail']}")


def _assignments(option: str, form: str, items: tuple[str, ...]) -> dict[str, str]:
    written = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or not name or not value:
            raise BadInput(f"{option} {item!r} cannot be read: write {form}.")
        written[name] = value
    return written


def _dry_run(specs: list[Any], as_json: bool) -> None:
    from harmbench_vaccine.core.paths import home
    from harmbench_vaccine.core.store import Store
    from harmbench_vaccine.experiment.experiment import Experiment
    from harmbench_vaccine.reporting.dry_run import view

    made = view.dry_run_json([Experiment.settle(spec) for spec in specs], Store(home() / "store"))
    if as_json:
        click.echo(json.dumps(made, ensure_ascii=False))
    else:
        _print(view.dry_run_view(made))


def _print_json(result: Result) -> None:
    _print_line(result.to_json())


def _print_line(values: dict[str, Any]) -> None:
    click.echo(json.dumps(values, ensure_ascii=False, allow_nan=False))
    sys.stdout.flush()


def _print_beside_published(result: Result) -> None:
    from harmbench_vaccine.reporting.published.comparison import compare_results

    _print_line({**result.to_json(), "published": compare_results([result])[0].to_json()})


def _print(what: Any) -> None:
    from rich.console import Console

    console = Console()
    Console(width=None if console.is_terminal else 170).print(what)


@contextmanager
def _terminal() -> Iterator[Any]:
    from harmbench_vaccine.core.progress import SILENT, Terminal

    if distributed.rank():
        yield SILENT
        return
    with Terminal() as progress:
        yield progress


def main() -> None:
    """The entry point: one sentence for what went wrong, and its exit code."""
    warnings.showwarning = lambda message, *rest, **named: _say(f"warning: {message}")
    try:
        distributed.initialize()
        code = commands.main(standalone_mode=False)
        distributed.shutdown()
    except HbvError as error:
        _fail(str(error), error.exit_code)
    except click.ClickException as error:
        _fail(" ".join(error.format_message().split()), 2)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted; finished stages are kept, and the same command goes on from the last checkpoint.", 130)
    except Exception as error:
        if os.environ.get("HBV_DEBUG"):
            raise
        said = " ".join(str(error).split())
        _fail(f"unexpected {type(error).__name__}: {said} (HBV_DEBUG=1 shows where)", 1)
    sys.exit(code if isinstance(code, int) else 0)


def _say(text: str) -> None:
    if distributed.rank() == 0:
        click.echo(f"hbv: {text}", err=True)


def _fail(why: str, code: int) -> NoReturn:
    if distributed.is_first_failure():
        click.echo(f"hbv: {why}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()

"""The help of every command: groups of options, lines of 80 columns, shell completion."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from harmbench_vaccine.cli import commands
from harmbench_vaccine.cli.console import GroupedCommand
from support.cli import hbv, subcommands


def every_command(group: click.Group = commands, *parents: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in subcommands(group).items():
        yield (*parents, name), command
        if isinstance(command, click.Group):
            yield from every_command(command, *parents, name)


COMMANDS = dict(every_command())


def help_text(name: tuple[str, ...], width: int = 80) -> str:
    result = CliRunner().invoke(commands, [*name, "--help"], env={"COLUMNS": str(width)}, terminal_width=width)
    assert result.exit_code == 0
    return result.output


@pytest.mark.parametrize("name", COMMANDS, ids=" ".join)
def test_help_fits_80_columns(name: tuple[str, ...]) -> None:
    assert not [line for line in help_text(name).splitlines() if len(line) > 80]


@pytest.mark.parametrize(
    "name", [name for name in COMMANDS if not isinstance(COMMANDS[name], click.Group)], ids=" ".join
)
def test_help_names_the_values_of_options(name: tuple[str, ...]) -> None:
    assert not re.search("TEXT|INTEGER|FLOAT", help_text(name))  # less clear than N, NAME or FILE


@pytest.mark.parametrize("name", [(), *COMMANDS], ids=" ".join)
def test_help_has_an_example(name: tuple[str, ...]) -> None:
    assert " ".join(["hbv", *name]) in help_text(name).partition("Example: ")[2]


@pytest.mark.parametrize("width", [60, 80])
def test_help_of_a_group_has_whole_sentences(width: int) -> None:
    for name, group in {(): commands, **COMMANDS}.items():
        if isinstance(group, click.Group):
            section = help_text(name, width).partition("Commands:\n")[2]
            sentences = [str(command.help).split(".")[0] for command in subcommands(group).values()]
            assert all(" ".join(f"{text}.".split()) in " ".join(section.split()) for text in sentences), section


@pytest.mark.parametrize(
    "command", [command for command in COMMANDS.values() if isinstance(command, GroupedCommand)], ids=lambda c: c.name
)
def test_every_option_is_in_one_group(command: GroupedCommand) -> None:
    grouped = [name for names in command.option_groups.values() for name in names]
    options = [param.name for param in command.params if isinstance(param, click.Option)]
    assert sorted(grouped) == sorted(options)


def test_groups_are_headings_in_their_order() -> None:
    text = help_text(("run",))
    headings = [f"\n{title}:\n" for title in ("What to run", "Protocol", "Judge", "Hardware", "Output", "Other")]
    positions = [text.index(heading) for heading in headings]
    assert positions == sorted(positions)
    assert text.index("--scorer SPEC") in range(positions[2], positions[3])


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion(shell: str, own_home: Path) -> None:
    """The command that the documentation names prints a script, and the script's own request lists names."""

    def complete(instruction: str, *words: str) -> str:
        word = words[-1] if shell == "fish" else str(len(words))
        variables = {
            "_HBV_COMPLETE": f"{shell}_{instruction}",
            "COMP_WORDS": " ".join(["hbv", *words]),
            "COMP_CWORD": word,
        }
        code = "import sys; sys.argv[0] = 'hbv'; from harmbench_vaccine.cli import main; main()"
        environment = {**os.environ, **variables}
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stdout

    assert "_HBV_COMPLETE" in complete("source", "")
    assert "published" in complete("complete", "pub")
    assert "vaccine" in complete("complete", "run", "--defense", "vac")


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["run", "--defense", "vac"], ["vaccine"]),
        (["run", "--attack", "ra"], ["ratio"]),
        (["run", "--task", "sst"], ["sst2"]),
        (["run", "--scorer", "llama"], ["llama_guard"]),
        (["run", "--protocol", "boo"], ["booster-paper"]),
        (["info", "sst"], ["sst2"]),
        (["info", "vaccine"], ["vaccine", "vaccine-paper"]),
        (["list", "runs", "--attack", "ra"], ["ratio"]),
        (["show", "vac"], ["vaccine-0123"]),
        (["score", "sft"], []),
    ],
)
def test_names_are_completed(words: list[str], names: list[str], own_home: Path) -> None:
    (own_home / "runs" / "vaccine-0123").mkdir(parents=True)
    (own_home / "runs" / "vaccine-0123" / "result.json").write_text("{}", encoding="utf-8")
    completions = ShellComplete(commands, {}, "hbv", "_HBV_COMPLETE").get_completions(words[:-1], words[-1])
    assert [item.value for item in completions] == names


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ("new", "defence", "x"),
            "Unknown kind 'defence'. Did you mean 'defense'? Allowed: attack, ",
        ),
        (("show", "x", "--only", "flaged"), "Unknown value 'flaged' of --only. Did you mean 'flagged'?"),
        (("store", "du", "--by", "satge"), "Unknown value 'satge' of --by. Did you mean 'stage'?"),
        (
            ("run", "--report-to", "tensorbord"),
            "'tensorbord' of --report-to. Did you mean 'tensorboard'?",
        ),
    ],
)
def test_choices_suggest_the_nearest_text(arguments: tuple[str, ...], sentence: str, own_home: Path) -> None:
    refused = hbv(*arguments)
    assert refused.code == 2
    assert sentence in refused.sentence
    assert not own_home.exists()

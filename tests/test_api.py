"""The Python interface: the runs, checks and messages of the command line, and tables of what is stored."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import _GeneratorContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
import transformers

import harmbench_vaccine as hbv
from harmbench_vaccine import runner
from harmbench_vaccine.attacks.ratio import Ratio
from harmbench_vaccine.core.notebook_progress import NotebookBars
from harmbench_vaccine.core.progress import Advance, Silent
from harmbench_vaccine.core.types import Example, StageName
from harmbench_vaccine.defenses.vaccine import Vaccine
from harmbench_vaccine.evaluation.records import save_run
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.plugins.python_specs import parse_specification
from harmbench_vaccine.plugins.registry import DEFENSES, TASKS
from support.cli import hbv as hbv_command
from support.results import collapsed, make_result, write_csv

QUIET: dict[str, Any] = {"progress": False}


@pytest.fixture(scope="module")
def home(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home in which the command line ran two defenses."""
    folder = tmp_path_factory.mktemp("api")
    options = ["--defense", "sft", "--defense", "vaccine:rho=5", "--attack", "ratio=0.1"]
    assert hbv_command("run", "--protocol", world, *options, home=folder).code == 0
    return folder


@pytest.fixture
def stored(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home of the command line, as that of this process."""
    monkeypatch.setenv("HBV_HOME", str(home))
    return home


def command_ids(home: Path) -> dict[str, str]:
    with (home / "results.csv").open(encoding="utf-8", newline="") as file:
        return {row["defense"]: row["run"] for row in csv.DictReader(file)}


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def test_run_returns_the_result_of_the_command_line(world: Path, stored: Path) -> None:
    """Same id, same scores, and every stage is reused."""
    result = hbv.run("vaccine:rho=5", "ratio=0.1", protocol=world, **QUIET)
    expected = json.loads((stored / "runs" / result.run / "result.json").read_text(encoding="utf-8"))
    assert isinstance(result, hbv.Result)
    assert result.run == command_ids(stored)["vaccine=5"]
    assert result.harmful_score == expected["harmful_score"]
    assert all(stage.cached for stage in result.stages.values())


@pytest.mark.parametrize(
    ("defense", "attack"),
    [
        (Vaccine(rho=5), "ratio=0.1"),
        (Vaccine(rho=5.0), Ratio(p=0.1)),
        ((Vaccine(rho=5),), (Ratio(p=0.1),)),
    ],
)
def test_objects_are_specifications(defense: Any, attack: Any, world: Path, stored: Path) -> None:
    assert hbv.run(defense, attack, protocol=world, **QUIET).run == command_ids(stored)["vaccine=5"]


def test_class_is_a_specification() -> None:
    assert parse_specification(Vaccine, DEFENSES) == parse_specification("vaccine", DEFENSES)


def test_tuple_composes() -> None:
    parts = parse_specification((Vaccine(rho=5), "ewc"), DEFENSES)
    assert [(part.name, part.params) for part in parts] == [("vaccine", {"rho": 5}), ("ewc", {})]


def test_lists_are_every_combination(world: Path, stored: Path) -> None:
    results = hbv.run(["sft", "vaccine:rho=5"], "ratio=0.1", seed=[0], protocol=world, **QUIET)
    assert [result.run for result in results] == [command_ids(stored)[name] for name in ("sft", "vaccine=5")]


@pytest.fixture
def specs(monkeypatch: pytest.MonkeyPatch) -> list[RunSpec]:
    """The specifications that `hbv.run` receives, instead of running them."""
    recorded: list[RunSpec] = []

    def run_all(listed: list[RunSpec], **options: Any) -> list[None]:
        recorded.extend(listed)
        return [None]

    monkeypatch.setattr("harmbench_vaccine.runner.run_all", run_all)
    return recorded


def test_combinations_have_the_order_of_the_table(specs: list[RunSpec]) -> None:
    hbv.run(["sft", "vaccine"], ["ratio=0", "ratio=0.1"], task=["sst2", "agnews"], seed=range(2), **QUIET)
    order = [(str(s.task), s.seed, str(s.attack[0].params[""]), s.defense[0].name) for s in specs]
    assert order == sorted(order, key=lambda row: (["sst2", "agnews"].index(row[0]), *row[1:]))
    assert len(set(order)) == 16


def test_list_of_runs(world: Path, stored: Path) -> None:
    """Each mapping overrides the other arguments; without a defense it is SFT."""
    runs = [{"defense": "vaccine:rho=5"}, {}]
    results = hbv.run(runs, "ratio=0.1", protocol=world, **QUIET)
    assert [result.run for result in results] == [command_ids(stored)[name] for name in ("vaccine=5", "sft")]


def test_values_are_those_of_set(world: Path, specs: list[RunSpec]) -> None:
    values = {"align.settings.lr": 1e-5, "rows": "paper", "align.rows": 8, "answer.cut_at": "", "gates.neither": None}
    hbv.run(protocol=world, values=values, data={"sst2": Path("rows")}, model=Path("model"), **QUIET)
    from harmbench_vaccine.core.strict_yaml import read_yaml

    assert {name: read_yaml(text, name) for name, text in specs[0].values.items() if name != "answer.cut_at"} == {
        name: value for name, value in values.items() if name != "answer.cut_at"
    }
    assert (specs[0].data, specs[0].model) == ({"sst2": "rows"}, "model")


class HalfRows(hbv.Defense):
    """A defense of this file, as a student would write it."""

    citation: ClassVar[str] = "none"
    stages: ClassVar[tuple[StageName, ...]] = ("align",)

    share: float = hbv.param(0.5, "share of the alignment rows", source="this test", gt=0, le=1, main=True)

    def train_on(self, stage: str, rows: list[Example], pools: Any) -> list[Example]:
        return rows[: max(1, round(self.share * len(rows)))]


def test_class_of_a_program_runs(world: Path, stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = hbv.run(HalfRows(share=0.25), "ratio=0.1", protocol=world)
    assert result.counts.align
    assert (result.defense, result.counts.align.rows) == ("half_rows=0.25", 10)
    printed = capsys.readouterr()
    assert "align half_rows=0.25" in printed.err  # lines, as stderr is not a terminal
    assert printed.out == ""


class Titles(Silent):
    """A receiver of progress that records the titles of bars."""

    def __init__(self) -> None:
        self.titles: list[str] = []

    def bar(self, title: str, total: int) -> _GeneratorContextManager[Advance]:
        self.titles.append(title)
        return super().bar(title, total)


def test_progress_can_be_an_own_receiver(world: Path, stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    titles = Titles()
    hbv.run("sft", "ratio=0.1", protocol=world, progress=titles)
    assert titles.titles
    assert capsys.readouterr().err == ""


class Alignment(Silent):
    """A receiver that records the steps of the alignment stage, and that can interrupt it, as a cell of a notebook."""

    def __init__(self, interrupted_step: int | None = None) -> None:
        self.steps: list[int] = []
        self._interrupted_step = interrupted_step

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Advance]:
        def advance(steps: int, detail: str = "", seconds_left: float | None = None) -> None:
            if title.startswith("align"):
                self.steps.append(steps)
                if sum(self.steps) == self._interrupted_step:
                    raise KeyboardInterrupt

        yield advance


def test_interrupted_cell_resumes(world: Path, stored: Path) -> None:
    """The second call continues from the last checkpoint."""
    receivers = Alignment(interrupted_step=10), Alignment()
    with pytest.raises(KeyboardInterrupt):
        hbv.run("vaccine:rho=3", "ratio=0.1", protocol=world, progress=receivers[0])
    hbv.run("vaccine:rho=3", "ratio=0.1", protocol=world, progress=receivers[1])
    assert 5 < receivers[1].steps[0] <= sum(receivers[0].steps) == 10  # the first report has the steps before it
    assert sum(receivers[1].steps) == 20


def test_run_restores_the_random_states_of_the_program(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def draws() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    def seed_all(*arguments: Any, **options: Any) -> list[hbv.Result]:  # as the training of a stage does
        transformers.set_seed(0)
        return [make_result()]

    monkeypatch.setattr(runner, "run_all", seed_all)
    transformers.set_seed(1)
    expected = draws(), draws()
    transformers.set_seed(1)
    assert draws() == expected[0]
    hbv.run(protocol=world, **QUIET)
    assert draws() == expected[1]


@pytest.mark.parametrize("fails", [True, False])
def test_run_restores_the_environment_of_the_program(fails: bool, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_VERBOSITY", "debug")
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    environment: dict[str, str] = {}

    def record(*arguments: Any, **options: Any) -> list[hbv.Result]:
        environment.update(os.environ)
        if fails:
            raise KeyboardInterrupt
        return [make_result()]

    monkeypatch.setattr(runner, "run_all", record)
    before = dict(os.environ)
    with pytest.raises(KeyboardInterrupt) if fails else nullcontext():
        hbv.run(protocol=world, **QUIET)
    assert (environment["HF_HUB_VERBOSITY"], environment["TOKENIZERS_PARALLELISM"]) == ("debug", "false")
    assert dict(os.environ) == before


# ---------------------------------------------------------------------------------------------------------------------
# A class of a notebook or a script


PROGRAM = """
import harmbench_vaccine as hbv
from harmbench_vaccine.plugins.registry import DEFENSES
SCALE = {scale}
OTHER = 1
def helper(x):
    return {body}
def cube(x):
    return {cube}
factorial = lambda n: factorial(n - 1) if n else {one}
NAMES = {{"one", "two", "three", "four", "five"}}
TABLE = {{"cube": cube, "factorial": [factorial, NAMES]}}
class Mine(hbv.Defense):
    '''{doc}'''
    def settings(self, stage, settings):
        return helper(settings) if SCALE else TABLE["cube"](settings)
print(Mine.fingerprint())
"""
VALUES = {"scale": "1", "body": "x", "cube": "x**3", "one": "1", "doc": "A defense."}


def fingerprint(tmp_path: Path, *, notebook: bool = False, **changes: str) -> str:
    text = PROGRAM.format(**{**VALUES, **changes})
    file = tmp_path / "program.py"
    file.write_text(text, encoding="utf-8")
    if notebook:  # a cell: its module has no file, and its lines are in linecache
        code = (
            "import linecache, sys; text = open(sys.argv[1]).read(); del globals()['__file__'] if '__file__' in "
            "globals() else None; name = '<cell 1>'; linecache.cache[name] = (len(text), None, "
            "text.splitlines(True), name); exec(compile(text, name, 'exec'), globals())"
        ).replace("del globals()['__file__'] if '__file__' in globals() else None; ", "")
        command = [sys.executable, "-c", code, str(file)]
    else:
        command = [sys.executable, str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_fingerprint_of_a_cell_covers_what_it_uses(tmp_path: Path) -> None:
    before = fingerprint(tmp_path)
    assert fingerprint(tmp_path, notebook=True) == before
    assert fingerprint(tmp_path, doc="Another text.") == before
    edits = ({"scale": "2"}, {"body": "(x)[0]"}, {"cube": "x * x * x"}, {"one": "2"})  # the last two are in a table
    assert len({before, *(fingerprint(tmp_path, **edit) for edit in edits)}) == 5


def test_fingerprint_needs_whole_statements(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="The code of '<lambda>' is not available: write it with `def`"):
        fingerprint(tmp_path, scale='{\n "twice": lambda x: 2 * x,\n}')


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("arguments", "command", "message"),
    [
        ({"defense": "vacine"}, ("--defense", "vacine"), "Did you mean 'vaccine'"),
        ({"defense": "vaccine:rho=-1"}, ("--defense", "vaccine:rho=-1"), "rho=-1 is not allowed"),
        ({"attack": "ratio="}, ("--attack", "ratio="), "no value after"),
        ({"task": "sst3"}, ("--task", "sst3"), "Did you mean 'sst2'"),
        ({"protocol": "testbet"}, ("--protocol", "testbet"), "Did you mean 'testbed'"),
        ({"values": {"aling.rows": 8}}, ("--set", "aling.rows=8"), "aling"),
        ({"data": {"sst3": "x"}}, ("--data", "sst3=x"), "sst3"),
        ({"scorers": "beaver"}, ("--scorer", "beaver"), "Did you mean 'beaver_dam'"),
        ({"device": "gpu"}, ("--device", "gpu"), "device"),
        ({"report_to": "tensorbord"}, None, "Did you mean 'tensorboard'"),
        ({"report_to": True}, None, "report_to is True; allowed: a tracker"),
        ({"out": 5}, None, "out is 5; allowed: a path"),
        ({"csv": 0.5}, None, "csv is 0.5; allowed: a path"),
        ({"gradient_checkpointing": "no"}, None, "gradient_checkpointing is 'no'; allowed: True, False"),
        ({"progress": None}, None, "progress is None; allowed: True, False, a receiver"),
        ({"backend": "vlm"}, None, "backend is 'vlm'"),
        ({"defence": "sft"}, None, "Unknown argument 'defence'. Did you mean 'defense'"),
        ({"scorer": "beaver_dam"}, None, "Unknown argument 'scorer'. Did you mean 'scorers'"),
        ({"defense": ()}, None, "A tuple that composes defense plug-ins is empty"),
        ({"data": "rows"}, None, "data is 'rows'; allowed: a mapping"),
        ({"values": ["align.rows=8"]}, None, "values is .*; allowed: a mapping"),
        ({"values": {"align.rows": object()}}, None, "values contains <object .*; allowed: numbers"),
        ({"device": 0}, None, "device"),
        ({"save_every": True}, None, "save_every is True"),
        ({"seed": -1}, None, "seed is -1"),
        ({"seed": "0.5"}, None, "seed is '0.5'"),
        ({"seed": []}, None, "seed is an empty list"),
        ({"save_every": 2}, None, "save_every is 2; allowed: a number from 0.001 to 1"),
        ({"gpu_memory": float("nan")}, None, "gpu_memory is nan"),
        ({"tensor_parallel": 0}, None, "tensor_parallel is 0"),
        ({"tensor_parallel": 2}, None, "models run on the CPU"),
        ({"defense": 5}, None, "5 specifies no defense"),
        ({"defense": TASKS.get("sst2")}, None, "specifies no defense"),
        ({"defense": [{"defence": "sft"}]}, None, "Did you mean 'defense'"),
        ({"defense": [{}, "sft"]}, None, "'sft' is not a run"),
        ({"out": ""}, None, "A path is empty"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: dict[str, Any], command: tuple[str, ...] | None, message: str, world: Path, own_home: Path
) -> None:
    arguments = {"protocol": world, **QUIET, **arguments}
    with pytest.raises(hbv.BadInput, match=message) as raised:
        hbv.run(**arguments)
    assert "\n" not in str(raised.value)
    if command:
        options = () if "--protocol" in command else ("--protocol", world)
        assert hbv_command("run", *options, *command, home=own_home).sentence == f"hbv: {raised.value}"
    assert not own_home.exists()


def test_two_classes_of_one_name_are_refused(own_home: Path) -> None:
    other = type("HalfRows", (HalfRows,), {"__module__": __name__})
    with pytest.raises(hbv.BadInput, match="Two classes are named 'HalfRows'; rename one of them"):
        hbv.run([HalfRows, (other, "ewc")], **QUIET)
    assert not own_home.exists()


def test_class_with_the_name_of_another_plugin_is_refused() -> None:
    other = type("Vaccine", (hbv.Defense,), {"__module__": __name__})
    with pytest.raises(hbv.BadInput, match="that of defense 'vaccine': rename the class"):
        parse_specification(other, DEFENSES)


# ---------------------------------------------------------------------------------------------------------------------
# Stored runs


def test_results_are_a_table(stored: Path) -> None:
    frame = hbv.results()
    assert set(command_ids(stored).values()) <= set(frame["run"])
    assert pd.api.types.is_bool_dtype(frame["collapsed"])
    assert pd.api.types.is_float_dtype(frame["harmful_score"])
    assert pd.api.types.is_integer_dtype(frame["seed"])
    assert pd.api.types.is_string_dtype(frame["defense"])
    assert isinstance(frame["attack_params"].iloc[0], dict)
    pd.testing.assert_frame_equal(hbv.results(stored / "results.csv"), frame)


def test_types_of_columns_do_not_depend_on_values(tmp_path: Path) -> None:
    whole = hbv.results(write_csv(tmp_path / "a.csv", make_result(harmful_score=50.0, alignment_loss=1.0)))
    other = hbv.results(write_csv(tmp_path / "b.csv", make_result(harmful_score=50.5, alignment_loss=None)))
    assert whole.dtypes.to_dict() == other.dtypes.to_dict() == hbv.results().dtypes.to_dict()
    assert other["alignment_loss"].isna().all()


def test_no_results_are_an_empty_table(own_home: Path) -> None:
    assert len(hbv.results()) == 0
    assert {"run", "harmful_score"} <= set(hbv.results().columns)
    with pytest.raises(hbv.BadInput, match="does not exist"):
        hbv.results("nothing.csv")


def test_answers_are_a_table(stored: Path) -> None:
    run = command_ids(stored)["sft"]
    result = json.loads((stored / "runs" / run / "result.json").read_text(encoding="utf-8"))
    frame = hbv.answers(run)
    harmful = frame[(frame["set"] == "harmful") & (frame["when"] == "after")]
    assert 100 * harmful["flagged"].mean() == pytest.approx(result["harmful_score"])
    assert frame.loc[frame["set"] == "task", "flagged"].isna().all()


def test_result_of_another_folder_is_found(own_home: Path, tmp_path: Path) -> None:
    result = make_result(run="sft-0123")
    for folder, text in ((own_home / "runs", "first"), (tmp_path / "out", "second")):
        row = {"when": "after", "set": "harmful", "id": "1", "instruction": "a", "input": "", "target": ""}
        save_run(result, [{**row, "answer": text}], folder, own_home / "results.csv")
    assert list(hbv.answers("sft-0123")["answer"]) == ["first"]
    assert list(hbv.answers(result)["answer"]) == ["second"]  # the newest
    shutil.rmtree(tmp_path / "out")
    assert list(hbv.answers(result)["answer"]) == ["first"]


@pytest.mark.parametrize("form", [str, Path, hbv.Result, "prefix"])
def test_runs_are_named_in_several_forms(form: Any, world: Path, stored: Path) -> None:
    run = command_ids(stored)["sft"]
    forms = {
        str: run,
        Path: stored / "runs" / run,
        hbv.Result: hbv.run("sft", "ratio=0.1", protocol=world, **QUIET),
        "prefix": "sft",
    }
    pd.testing.assert_frame_equal(hbv.answers(forms[form]), hbv.answers(run))


def test_training_log_is_a_table(stored: Path) -> None:
    log = hbv.training_log("sft")
    result = json.loads((stored / "runs" / command_ids(stored)["sft"] / "result.json").read_text(encoding="utf-8"))
    for stage in ("align", "finetune"):
        artifact = Path(result["stages"][stage]["artifacts"][stage]["path"])
        steps = json.loads((artifact / "log.json").read_text(encoding="utf-8"))
        assert log[log["stage"] == stage]["loss"].tolist() == [step["loss"] for step in steps]


def test_load_model_gives_the_stored_answers(stored: Path) -> None:
    """Greedy decoding of the loaded model repeats the answers that the run stored."""
    model: Any
    tokenizer: Any
    run = command_ids(stored)["vaccine=5"]
    model, tokenizer = hbv.load_model(run)
    answers = hbv.answers(run)
    for row in answers[(answers["set"] == "harmful") & (answers["when"] == "after")].head(3).itertuples():
        inputs = tokenizer(row.prompt, return_tensors="pt")
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=int(row.tokens), do_sample=False)
        text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert text.strip().startswith(row.answer)


@pytest.mark.parametrize("call", [hbv.answers, hbv.training_log, hbv.load_model])
def test_unknown_run_is_one_sentence(call: Any, stored: Path) -> None:
    with pytest.raises(hbv.BadInput, match=r"Unknown run 'vacine'\. Did you mean 'vaccine-"):
        call("vacine")


# ---------------------------------------------------------------------------------------------------------------------
# The package


def test_import_is_light() -> None:
    code = (
        "import sys; import harmbench_vaccine as hbv; dir(hbv); "
        "print([name for name in ('torch', 'pandas', 'transformers', 'pydantic', 'rich') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_every_public_name_exists() -> None:
    assert all(hasattr(hbv, name) for name in hbv.__all__)
    assert set(dir(hbv)) >= {"run", "results", "answers", "load_model", "Result", "Defense", "Attack", "Task", "Scorer"}
    with pytest.raises(AttributeError, match="has no attribute 'runs'"):
        hbv.runs  # noqa: B018


# ---------------------------------------------------------------------------------------------------------------------
# In a notebook


def test_result_is_a_table_in_a_notebook() -> None:
    gates = collapsed("60% of answers are empty", "accuracy <50")
    page = make_result(run="sft-1", harmful_score=12.34, harmful_score_ci=[8.0, 17.0], **gates)._repr_html_()
    for text in ("sft-1", "12.3 [8.0, 17.0]", "aa11", "alignment loss", "60% of answers are empty; accuracy &lt;50"):
        assert text in page
    assert "COLLAPSED" not in make_result(run="sft-1")._repr_html_()


def test_result_in_a_notebook_has_no_active_text() -> None:
    attack = "<script>alert(1)</script>"
    names = dict.fromkeys(("attack", "task", "protocol", "scorer"), attack)
    page = make_result(run="sft-1", defense="a&b", **names)._repr_html_()
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 4
    assert "a&amp;b" in page


def test_bars_of_a_notebook() -> None:
    pages: list[str] = []
    now = [0.0]
    bars = NotebookBars(pages.append, clock=lambda: now[0])
    bars.note("testbed <b>")
    with bars.bar("2 runs", 2), bars.bar("align", 10) as advance:
        advance(1, "loss 1.0")
        advance(1, "loss 0.9")  # at once: too early for an update
        now[0] = 5.0
        advance(1, "loss 0.8")
    assert not any("loss 1.0" in page or "loss 0.9" in page for page in pages)
    open_bars = next(page for page in pages if "loss 0.8" in page)
    assert re.findall(r'value="(\d+)" max="(\d+)"', open_bars) == [("0", "2"), ("3", "10")]
    assert re.findall(r"<div[^>]*>(.*?)</div>", pages[-1]) == [
        "testbed &lt;b&gt;",
        "align: done in 5 s, loss 0.8",
        "2 runs: done in 5 s",
    ]

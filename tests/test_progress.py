"""Progress: estimates, plain lines, bars on a terminal, the log file, and the options that choose between them."""

from __future__ import annotations

import math
import re
import sys
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from harmbench_vaccine import runner
from harmbench_vaccine.cli import log_file
from harmbench_vaccine.cli.console import terminal_progress
from harmbench_vaccine.core.progress import BarState, Labeled, Lines, Progress, Receivers, Silent, format_duration
from harmbench_vaccine.core.stage_clock import ReportingStore, StageClock
from harmbench_vaccine.core.store import Artifact
from support.cli import PROGRESS_LINE, hbv
from support.terminal import frames, run_in_terminal


class Clock:
    """A clock that moves when a test moves it."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


# ---------------------------------------------------------------------------------------------------------------------
# Estimates


def test_time_left_follows_the_speed(clock: Clock) -> None:
    state = BarState("x", 100, clock)
    assert state.seconds_left is None
    clock.now += 50  # the start is not part of the speed
    state.advance(0)
    assert state.seconds_left is None
    clock.now += 20
    state.advance(10)
    assert state.seconds_left == pytest.approx(90 * 2)
    clock.now += 5  # no step has finished since
    assert state.seconds_left == pytest.approx(90 * 2 - 5)
    clock.now += 1000
    assert state.seconds_left is None  # later than estimated


def test_steps_before_a_checkpoint_do_not_count_as_speed(clock: Clock) -> None:
    state = BarState("x", 100, clock)
    state.advance(60)
    clock.now += 3
    state.advance(1)
    assert state.seconds_left == pytest.approx(39 * 3)


@pytest.mark.parametrize(("seconds_left", "expected"), [(7.0, 7.0), (math.inf, None), (math.nan, None)])
def test_the_estimate_of_the_caller_replaces_the_speed(
    seconds_left: float, expected: float | None, clock: Clock
) -> None:
    state = BarState("x", 10, clock)
    state.advance(0)
    clock.now += 1
    state.advance(1, "", seconds_left)
    assert state.seconds_left == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (3569, "59 min"),
        (3599, "1 h 0 min"),
        (11100, "3 h 5 min"),
        (86390, "1 d 0 h"),
        (187200, "2 d 4 h"),
    ],
)
def test_durations(seconds: float, expected: str) -> None:
    assert format_duration(seconds) == expected


def artifact(stage: str, key: str, seconds: float = 0.0, *, cached: bool = False) -> Artifact:
    return Artifact(stage, key, Path(), seconds, cached)


def test_remaining_stages_take_the_mean_time_of_their_kind() -> None:
    stages = StageClock(
        [
            artifact("align", "a1", 100.0, cached=True),
            artifact("answer", "b1", 10.0, cached=True),
            *(artifact("align", key) for key in ("a2", "a3")),
            *(artifact("answer", key) for key in ("b2", "b3", "b4")),
        ]
    )
    assert len(stages) == 5
    assert stages.estimate() == ("", 2 * 100 + 3 * 10)
    assert stages.finish(artifact("align", "a2", 300.0))
    assert not stages.finish(artifact("align", "a2", 300.0))  # requested again
    assert not stages.finish(artifact("nested", "n1", 50.0))  # part of another stage
    assert stages.estimate() == ("", 200 + 3 * 10)
    for key in ("a3", "b2", "b3", "b4"):
        stages.finish(artifact("x", key))
    assert stages.estimate() == ("", 0)


def test_a_kind_that_never_finished_leaves_a_lower_limit() -> None:
    stages = StageClock([*(artifact("align", f"a{number}") for number in range(4)), artifact("score", "s1")])
    assert stages.estimate() == ("", math.inf)
    stages.finish(artifact("align", "a0", 7200.0))
    assert stages.estimate() == ("over 4 h 0 min left", math.inf)  # of the three, one may be about to end
    stages.finish(artifact("align", "a1", 7200.0))
    stages.finish(artifact("align", "a2", 7200.0))
    assert stages.estimate() == ("", math.inf)


class Recorder(Silent):
    """A receiver that records all reports."""

    def __init__(self) -> None:
        self.reports: list[Any] = []

    @contextmanager
    def bar(self, title: str, total: int) -> Any:
        self.reports.append((title, total))
        yield lambda *report: self.reports.append(report)

    def detail(self, text: str) -> None:
        self.reports.append(text)


def test_a_store_advances_the_bar_over_all_stages(tmp_path: Path) -> None:
    progress = Recorder()
    new = ReportingStore(tmp_path, progress, StageClock([]), Silent().bar("", 0).__enter__())
    for number in range(2):
        new.get_or_create("answer", {"number": number}, lambda *_: None)
    planned = [artifact("answer", new.path_of("answer", {"number": 2}).name)]
    with progress.bar("2 runs", len(planned)) as advance:
        store = ReportingStore(tmp_path, progress, StageClock(planned), advance)
        for number in (0, 0, 2, 2):
            store.get_or_create("answer", {"number": number}, lambda *_: None)
    reused = f"answer {new.path_of('answer', {'number': 0}).name}: reused"
    assert progress.reports == [
        ("2 runs", 1),
        (0, "", math.inf),
        reused,
        (1, "", 0),
        f"answer {planned[0].key}: reused",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Lines


def advance_evenly(progress: Progress, clock: Clock, steps: int, seconds: float) -> None:
    with progress.bar("finetune vaccine", steps) as advance:
        advance(0)
        for number in range(steps):
            clock.now += seconds
            advance(1, f"loss {number}")


def lines_of(steps: int, seconds: float, clock: Clock, **options: Any) -> list[str]:
    lines: list[str] = []
    advance_evenly(Lines(lines.append, clock=clock, **options), clock, steps, seconds)
    return lines


def test_a_line_at_the_start_and_after_every_tenth_of_the_steps(clock: Clock) -> None:
    lines = lines_of(400, 1.0, clock)
    assert lines[0] == "finetune vaccine: 400 steps"
    assert lines[1] == "finetune vaccine: step 40 of 400, loss 39, 6 min left"
    assert [int(line.split()[3]) for line in lines[1:-1]] == list(range(40, 400, 40))
    assert lines[-1] == "finetune vaccine: done in 7 min, loss 399"


def test_a_line_every_minute_of_slow_steps(clock: Clock) -> None:
    assert lines_of(1000, 45.0, clock)[1:4] == [
        "finetune vaccine: step 2 of 1000, loss 1, 12 h 28 min left",
        "finetune vaccine: step 4 of 1000, loss 3, 12 h 27 min left",
        "finetune vaccine: step 6 of 1000, loss 5, 12 h 26 min left",
    ]


def test_no_two_lines_of_steps_within_a_second(clock: Clock) -> None:
    assert lines_of(10, 0.4, clock) == [
        "finetune vaccine: 10 steps",
        "finetune vaccine: step 3 of 10, loss 2, 3 s left",
        "finetune vaccine: step 6 of 10, loss 5, 2 s left",
        "finetune vaccine: step 9 of 10, loss 8, 0 s left",
        "finetune vaccine: done in 4 s, loss 9",
    ]
    assert lines_of(10, 0.01, clock) == ["finetune vaccine: 10 steps"]


def test_a_verbose_receiver_has_a_line_for_every_step(clock: Clock) -> None:
    lines = lines_of(10, 0.01, clock, verbose=True)
    assert [int(line.split()[3]) for line in lines[1:]] == list(range(1, 11))


def test_a_bar_without_steps_has_no_line(clock: Clock) -> None:
    assert lines_of(0, 0, clock) == []


def test_a_failed_bar_has_no_last_line(clock: Clock) -> None:
    lines: list[str] = []

    def fail() -> None:
        with Lines(lines.append, clock=clock).bar("x", 1):
            clock.now += 10
            raise ValueError("failure")

    with pytest.raises(ValueError, match="failure"):
        fail()
    assert lines == ["x: 1 step"]


def test_notes_and_details_are_visible_single_lines() -> None:
    lines: list[str] = []
    for verbose in (False, True):
        progress = Receivers([Lines(lines.append, verbose=verbose)])
        progress.note("a\nb\x1b[0m")
        progress.detail("reused")
    assert lines == ["a b\\x1b[0m", "a b\\x1b[0m", "reused"]


def test_a_label_follows_the_title_of_a_bar_only(clock: Clock) -> None:
    lines: list[str] = []
    progress = Labeled(Lines(lines.append, verbose=True, clock=clock), "task prompts, final model")
    with progress.bar("answer", 2) as advance:
        progress.note("a note")
        progress.detail("a detail")
        advance(2)
    title = "answer: task prompts, final model"
    assert lines == [f"{title}: 2 steps", "a note", "a detail", f"{title}: step 2 of 2"]


# ---------------------------------------------------------------------------------------------------------------------
# A terminal

PROGRAM = """
import time
from harmbench_vaccine.cli.console import print_json, terminal_progress

with terminal_progress() as progress, progress.bar("8 runs", 88) as runs:
    runs(0, "over 3 h 5 min left", float("inf"))
    with progress.bar("finetune vaccine+ewc:lam=3 in the stage of the user, seed 0", 4000) as advance:
        for step in range(4):
            advance(0 if step == 0 else 100, "loss 0.532")
            time.sleep(0.15)
    progress.note("a note")
    print_json({"run": "result"})
"""


def show_bars(width: int, **environment: str) -> str:
    return run_in_terminal([sys.executable, "-c", PROGRAM], width, **environment)


@pytest.mark.parametrize("width", [60, 80, 140])
def test_bars_fit_the_terminal(width: int) -> None:
    lines = frames(show_bars(width))
    assert max(map(len, lines)) <= width
    assert any(re.search(r"^finetune vaccine.* 300/4000 .*loss 0\.532, \d+ s left *$", line) for line in lines), lines
    assert any(re.search(r"^8 runs .*0/88 .*over 3 h 5 min left *$", line) for line in lines), lines
    assert "a note" in lines


def test_results_in_a_file_stay_out_of_the_terminal(tmp_path: Path) -> None:
    shown = run_in_terminal([sys.executable, "-c", PROGRAM], 80, tmp_path / "results.jsonl")
    assert (tmp_path / "results.jsonl").read_text() == '{"run": "result"}\n'
    assert "result" not in shown


def test_no_color() -> None:
    colors = re.compile(r"\x1b\[[0-9;]*m")
    shown = show_bars(80, NO_COLOR="1")
    assert not {code for code in colors.findall(shown) if re.search(r"\[(.*;)?([34]\d|9\d|2)(;|m)", code)}
    assert any("300/4000" in line for line in frames(shown))  # bars remain
    assert colors.search(show_bars(80))


def test_a_dumb_terminal_shows_lines() -> None:
    shown = show_bars(80, TERM="dumb")
    assert "\x1b" not in shown
    assert "8 runs: 88 steps" in shown.splitlines()


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_closed_stream(stream: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, stream, None)
    with terminal_progress() as progress, progress.bar("x", 1) as advance:
        advance(1)
    assert capfd.readouterr().err == ("" if stream == "stderr" else "x: 1 step\n")


# ---------------------------------------------------------------------------------------------------------------------
# Options


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `hbv run` report progress and a warning instead of running anything."""

    def run_all(*_: Any, progress: Progress, **__: Any) -> list[Any]:
        import warnings

        with progress.bar("align sft", 2) as advance:
            advance(1, "loss 2")
        progress.note("a note")
        progress.detail("align 0123: reused")
        warnings.warn("a warning", stacklevel=1)
        return []

    monkeypatch.setattr(runner, "run_all", run_all)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], ["align sft: 2 steps", "a note", "hbv: warning: a warning"]),
        (["--quiet"], []),
        (["-q"], []),
        (
            ["-v"],
            [
                "align sft: 2 steps",
                "align sft: step 1 of 2, loss 2",
                "a note",
                "align 0123: reused",
                "hbv: warning: a warning",
            ],
        ),
    ],
)
def test_quiet_and_verbose(options: list[str], expected: list[str], work: None, tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    done = hbv("run", "--json", *options, "--log-file", log)
    assert (done.code, done.out) == (0, "")
    assert done.err.splitlines() == expected
    logged = expected or ["align sft: 2 steps", "a note", "hbv: warning: a warning"]  # --quiet is for the terminal
    lines = log.read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in lines[1:]] == [*logged, "finished"]
    assert lines[0].split(" ", 1)[1].startswith("hbv run --json")
    assert all(datetime.fromisoformat(line.split(" ", 1)[0]).tzinfo for line in lines)


def test_a_log_file_is_appended_to_and_has_the_errors(work: None, tmp_path: Path) -> None:
    log = tmp_path / "a log.txt"
    for _ in range(2):
        hbv("run", "--json", HBV_LOG_FILE=str(log))
    refused = hbv("run", "--seed", "x", HBV_LOG_FILE=str(log))
    assert refused.code == 2
    texts = [line.split(" ", 1)[1] for line in log.read_text().splitlines()]
    assert texts.count("finished") == 2
    assert texts[-2:] == ["hbv run --seed x", refused.sentence]
    assert not log_file.has_log()


@pytest.mark.parametrize("environment", [False, True])
def test_a_log_file_that_cannot_be_written_is_refused(environment: bool, work: None, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, reason in (
        (tmp_path, "Is a directory"),
        (tmp_path / "absent" / "run.log", "No such file or directory"),
        (tmp_path / "file" / "run.log", "Not a directory"),
    ):
        before = sorted(tmp_path.rglob("*"))
        done = hbv("run", HBV_LOG_FILE=str(path)) if environment else hbv("run", "--log-file", path)
        assert (done.code, done.out) == (2, "")
        assert done.sentence == f"hbv: --log-file {path} cannot be written to ({reason}): choose a writable file."
        assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_ends_the_log_only(work: None) -> None:
    done = hbv("run", "--json", "--log-file", "/dev/full")
    assert done.code == 0
    assert done.err.count("The log file /dev/full ends here: [Errno 28] No space left on device.") == 1
    assert "a note" in done.err


def test_quiet_and_verbose_cannot_be_combined(work: None) -> None:
    for options in (("-q", "-v"), ("--verbose", "--quiet")):
        done = hbv("run", *options)
        assert (done.code, done.out) == (2, "")
        assert done.sentence == "hbv: --quiet and --verbose cannot be combined: remove one of them."


@pytest.mark.parametrize(
    "command", ["run", "check", "score", "testbed build", "testbed path", "testbed report", "edit", "store verify"]
)
def test_long_commands_have_the_options(command: str) -> None:
    text = hbv(*command.split(), "--help").out
    for option in ("-q, --quiet", "-v, --verbose", "--log-file PATH"):
        assert option in text


def test_a_piped_run_writes_lines_of_progress(world: Path, tmp_path: Path) -> None:
    done = hbv("run", "--json", "--protocol", world, "-v", home=tmp_path / "home")
    assert done.code == 0, done.err
    lines = done.err.splitlines()
    assert all(map(PROGRESS_LINE.fullmatch, lines)), lines
    assert re.fullmatch(r"1 run: \d+ steps", lines[0])
    assert any(re.match(r"finetune sft, seed 0: step \d+ of \d+, loss [0-9.e-]+", line) for line in lines)
    count = int(lines[0].split()[2])
    assert sum(line.startswith("1 run: step ") for line in lines) == count
    assert any(line.startswith(f"1 run: step {count} of {count}") for line in lines)
    answered = {line.rpartition(": ")[0] for line in lines if re.match(r"answer.* steps?$", line)}
    assert answered == {
        f"answer: {prompts} prompts, {model} model"
        for prompts in ("harmful", "benign", "task")
        for model in ("aligned", "final")
    }

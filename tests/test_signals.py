"""Signals: raised at once, or at the end of a training step; a second one ends the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from harmbench_vaccine import runner
from harmbench_vaccine.core import distributed
from harmbench_vaccine.core.signals import (
    Interrupted,
    deferred_interruption,
    handled_signals,
    is_interrupted,
    stop_if_interrupted,
)
from harmbench_vaccine.defenses.sft import SFT
from harmbench_vaccine.inference import vllm_process
from harmbench_vaccine.inference.chat_api import ChatJudge
from harmbench_vaccine.plugins import Defense
from harmbench_vaccine.training.trainer import train
from support import tiny
from support.cli import hbv
from support.trainer import assert_same

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def same_handlers() -> Iterator[None]:
    """Check that a test leaves the handlers as they were."""
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before


def send(number: int) -> None:
    """Send a signal to this process; its handler runs before the next statement."""
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_interrupts(number: signal.Signals) -> None:
    with pytest.raises(Interrupted) as interrupted, handled_signals():
        send(number)
    assert interrupted.value.number == number
    assert isinstance(interrupted.value, KeyboardInterrupt)  # for libraries that clean up after Ctrl-C


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # like nohup
    try:
        with handled_signals():
            send(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_handle_no_signals() -> None:
    handlers = []

    def work() -> None:
        with handled_signals():
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGTERM)]


def test_a_signal_waits_in_a_deferring_block() -> None:
    passed = []

    def work() -> None:
        with deferred_interruption():
            assert not is_interrupted()
            send(signal.SIGTERM)
            assert is_interrupted()
            with deferred_interruption():
                passed.append("nested")
            passed.append("outer")
        passed.append("after")

    with pytest.raises(Interrupted), handled_signals():
        work()
    assert passed == ["nested", "outer"]


@handled_signals()
def test_a_waiting_signal_is_raised_once() -> None:
    with deferred_interruption():
        send(signal.SIGHUP)
        with pytest.raises(Interrupted):
            stop_if_interrupted()
    stop_if_interrupted()


def test_a_new_command_does_not_inherit_a_waiting_signal() -> None:
    def fail() -> None:
        with deferred_interruption():
            send(signal.SIGTERM)
            raise ValueError("failure")

    with pytest.raises(ValueError, match="failure"), handled_signals():
        fail()
    with handled_signals():
        assert not is_interrupted()


@handled_signals()
def test_ranks_agree_on_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "largest_over_ranks", lambda number: max(number, signal.SIGTERM))  # of another
    assert is_interrupted()
    with pytest.raises(Interrupted) as interrupted:
        stop_if_interrupted()
    assert interrupted.value.number == signal.SIGTERM


@handled_signals()
def test_a_signal_that_arrives_while_ranks_compare_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def compare(number: int) -> int:
        send(signal.SIGTERM)
        return number

    with deferred_interruption():
        with monkeypatch.context() as patch:
            patch.setattr(distributed, "largest_over_ranks", compare)
            assert not is_interrupted()
        assert is_interrupted()
        with pytest.raises(Interrupted):
            stop_if_interrupted()


@pytest.mark.parametrize("deferred", [False, True])
def test_the_second_signal_ends_the_process_at_once(deferred: bool) -> None:
    program = f"""
import os, signal
from contextlib import nullcontext
from harmbench_vaccine.core.signals import deferred_interruption, handled_signals

with handled_signals():
    try:
        with deferred_interruption() if {deferred} else nullcontext():
            os.kill(os.getpid(), signal.SIGINT)
            if {deferred}:
                os.kill(os.getpid(), signal.SIGTERM)
                print("still running")
    except KeyboardInterrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        print("still running")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, ""), done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# A training stage


def with_signal(step: int, hook: str) -> Defense:
    """Return plain fine-tuning that receives SIGTERM once, in a hook of a step."""
    steps = [step]

    class Signaled(SFT):
        def _receive(self, stage: Any) -> None:
            if stage.step in steps:
                steps.clear()
                send(signal.SIGTERM)

        def gradient(self, stage: Any, batch: Any) -> Any:
            if hook == "gradient":
                self._receive(stage)
            return super().gradient(stage, batch)

        def after_step(self, stage: Any) -> None:
            if hook == "after_step":
                self._receive(stage)

    return Signaled()


def run_stage(folder: Path, defense: Defense, **settings: Any) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Train a stage of 15 optimizer steps, without checkpoints at regular steps."""
    values = tiny.settings(epochs=3, lora_dropout=0.1, **settings)
    stage, _ = tiny.stage(trained_with=values, stirred=True)
    log = train(stage, defense, tiny.rows(20), values, folder, pad=tiny.PAD, save_share=1.0)
    return {name: value.detach().clone() for name, value in stage.trainable.items()}, log


@pytest.mark.parametrize("hook", ["gradient", "after_step"])
@pytest.mark.parametrize(("settings", "step"), [({}, 1), ({}, 7), ({"accumulation": 2, "batch": 3}, 4)])
def test_a_stage_stops_with_a_checkpoint_of_the_running_step(
    hook: str, settings: dict[str, Any], step: int, tmp_path: Path
) -> None:
    complete = run_stage(tmp_path / "complete", SFT(), **settings)
    with pytest.raises(Interrupted), handled_signals():
        run_stage(tmp_path / "cut", with_signal(step, hook), **settings)
    assert [path.name for path in (tmp_path / "cut").iterdir()] == [f"checkpoint-{step}"]
    assert_same(run_stage(tmp_path / "cut", SFT(), **settings), complete)


def test_a_signal_in_the_last_step_writes_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(Interrupted), handled_signals():
        run_stage(tmp_path, with_signal(15, "gradient"))
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.mark.parametrize(("number", "name"), [*zip(SIGNALS, ("Ctrl-C", "SIGTERM", "SIGHUP"), strict=True)])
def test_a_signal_ends_the_command_with_one_line(number: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "run_all", lambda *_, **__: send(number))
    done = hbv("run")
    assert (done.code, done.out) == (128 + number, "")
    assert done.sentence == f"hbv: interrupted by {name}. Repeat the command to resume."
    assert len(done.sentence) <= 60


# ---------------------------------------------------------------------------------------------------------------------
# Waiting for others


@contextmanager
def sigterm_after(seconds: float) -> Iterator[None]:
    """Send SIGTERM to this process later, while the block runs."""
    with handled_signals():
        threading.Timer(seconds, send, [signal.SIGTERM]).start()
        yield


def test_a_signal_ends_the_process_of_an_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setattr(vllm_process, "WORKER", worker)
    process = vllm_process.VllmProcess("model", tmp_path)
    with pytest.raises(Interrupted), sigterm_after(0.2), closing(process):
        process.request("start")
    assert process._child.poll() == -signal.SIGKILL


def test_a_signal_does_not_wait_for_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> bytes:
        raise OSError("unreachable")

    monkeypatch.setattr(ChatJudge, "_send", refuse)
    judge = ChatJudge("judge", "http://localhost:1/v1", pause=100.0)
    start = time.monotonic()
    with pytest.raises(Interrupted), sigterm_after(0.2):
        judge.ask(["a question"] * 20)
    assert time.monotonic() - start < 20
    for thread in threading.enumerate():
        if thread.name.startswith("ThreadPoolExecutor"):
            thread.join(20)
            assert not thread.is_alive()

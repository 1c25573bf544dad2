"""Two ranks (gloo, on the CPU) give the norms, losses, adapters and results of one process, also with sharding."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from harmbench_vaccine.core import distributed
from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.data.collate import IGNORED
from harmbench_vaccine.evaluation.result import Result
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.plugins.registry import DEFENSES
from harmbench_vaccine.runner import run_all
from harmbench_vaccine.training.adapters import Adapter
from harmbench_vaccine.training.stage import TrainingStage, attended_tokens, local_batch_rows
from support import ranks, tiny
from support.world import make_world

CLOSE = 1e-5


def launch(words: Sequence[str], home: Path, count: int = 2) -> subprocess.Popen[str]:
    """Start a command on several ranks of this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HBV_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parent)
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def launched(words: Sequence[str], home: Path, count: int = 2) -> subprocess.CompletedProcess[str]:
    """Run a command on several ranks of this machine."""
    running = launch(words, home, count)
    out, err = running.communicate(timeout=500)
    return subprocess.CompletedProcess(running.args, running.returncode, out, err)


# ---------------------------------------------------------------------------------------------------------------------
# Training stages


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> dict[str, Any]:
    """The results of every case on two ranks."""
    ran = launched(["-m", "support.ranks", str(folder)], folder / "home")
    assert ran.returncode == 0, ran.stderr[-3000:]
    results: dict[str, Any] = torch.load(folder / "found.pt", weights_only=True)
    return results


@pytest.mark.slow
@pytest.mark.parametrize("case", ranks.CASES)
def test_two_ranks_train_like_one_process(case: str, two_ranks: dict[str, Any], folder: Path) -> None:
    """Norms, losses and gradients of every step, and the adapter; batches of 4 and 1 rows with 3 to 14 tokens."""
    single, double = ranks.run(case, folder), two_ranks[case]
    assert len(single["log"]) == 6
    for key in ("loss", "grad_norm"):
        assert [step[key] for step in double["log"]] == pytest.approx([step[key] for step in single["log"]], rel=CLOSE)
    assert len(single["norms"]) >= 12  # two micro-batches per step
    assert double["norms"] == pytest.approx(single["norms"], rel=CLOSE)
    for module, factors in single["adapter"].items():
        for factor, same in zip(factors, double["adapter"][module], strict=True):
            assert torch.linalg.vector_norm(factor - same) <= CLOSE * torch.linalg.vector_norm(factor)


@pytest.mark.slow
def test_interrupted_stage_ends_bit_equal_on_two_ranks(two_ranks: dict[str, Any]) -> None:
    plain, resumed = two_ranks["resumed"]
    for module, factors in plain.items():
        assert all(torch.equal(a, b) for a, b in zip(factors, resumed[module], strict=True))


@pytest.mark.slow
def test_ranks_reload_a_sharded_base_together(two_ranks: dict[str, Any]) -> None:
    with torch.no_grad():
        loss = float(tiny.model()(**tiny.batch()).loss)
    assert two_ranks["reloaded"] == pytest.approx([loss, loss], rel=CLOSE)


# ---------------------------------------------------------------------------------------------------------------------
# Complete runs


def command(protocol: Path, *words: str) -> list[str]:
    return ["-m", "harmbench_vaccine", "run", "--protocol", str(protocol), "--attack", "ratio=0.25", "--json", *words]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world without dropout, whose last batches are short."""
    undropped = {"settings": {"lora_dropout": 0.0}}
    return make_world(
        tmp_path_factory.mktemp("world"), {"align": {"rows": 33, **undropped}, "finetune": {"samples": 34, **undropped}}
    )


@pytest.fixture(scope="module")
def single_run(world: Path) -> tuple[Result, Path]:
    """The result of one process and its store."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HBV_HOME", str(world.parent / "one"))
        spec = RunSpec(
            protocol=str(world),
            defense=parse_plugins("vaccine+vlguard:rows=5+resta"),
            attack=parse_plugins("ratio=0.25"),
        )
        return run_all([spec])[0], world.parent / "one" / "store"


@pytest.mark.slow
@pytest.mark.parametrize("words", [(), ("--shard", "--gradient-checkpointing")])
def test_run_on_two_ranks_gives_the_adapters_and_result_of_one(
    words: tuple[str, ...], world: Path, single_run: tuple[Result, Path], tmp_path: Path
) -> None:
    result, store = single_run
    ran = launched(command(world, "--defense", "vaccine+vlguard:rows=5+resta", *words), tmp_path)
    assert ran.returncode == 0, ran.stderr[-3000:]
    (line,) = ran.stdout.splitlines()  # only rank 0 prints
    values = json.loads(line)
    numbers = ("alignment_loss", "embedding_drift", "embedding_drift_paper_sum", "embedding_drift_per_token")
    for key, value in result.to_json().items():
        if key in numbers:
            assert values[key] == pytest.approx(value, rel=1e-4), key
        elif key not in ("embedding_drift_per_layer", "stages", "environment", "validity"):
            assert values[key] == value, key
    files = sorted(path.relative_to(store) for path in store.glob("*/*/adapter/adapter_model.safetensors"))
    assert len(files) == 4  # align, finetune, nested, repair: under the same keys
    for file in files:
        single, double = (Adapter.load((place / file).parent) for place in (store, tmp_path / "store"))
        for module, factors in single.factors.items():
            for factor, same in zip(factors, double.factors[module], strict=True):
                assert torch.linalg.vector_norm(factor - same) <= CLOSE * torch.linalg.vector_norm(factor)


@pytest.mark.slow
def test_failure_on_one_rank_ends_all_and_is_reported_once(world: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text(
        "from typing import ClassVar\n"
        "from harmbench_vaccine.core import distributed\n"
        "from harmbench_vaccine.core.errors import HbvError\n"
        "from harmbench_vaccine.plugins import Defense\n\n\n"
        "class Broken(Defense):\n"
        "    ranks: ClassVar[bool] = True\n\n"
        "    def before_step(self, stage):\n"
        "        if stage.step == 2 and distributed.rank() == 1:\n"
        "            raise HbvError('The second rank is broken.')\n"
    )
    ran = launched(command(world, "--defense", str(broken)), tmp_path / "home")
    assert ran.returncode != 0
    assert ran.stderr.count("hbv: The second rank is broken.") == 1
    assert ran.stderr.count("hbv:") == 1
    assert not ran.stdout


@pytest.mark.slow
def test_sigterm_ends_all_ranks_at_the_same_step(tmp_path: Path) -> None:
    words = command(make_world(tmp_path / "world", {"align": {"settings": {"epochs": 10}}}), "--save-every", "0.1")
    running = launch(words, tmp_path / "cut")
    while not list(tmp_path.glob("cut/store/.work/align-*/checkpoint-*/whole")):
        assert running.poll() is None, running.communicate()
        time.sleep(0.01)
    running.send_signal(signal.SIGTERM)
    out, err = running.communicate(timeout=100)
    assert running.returncode != 0  # of the launcher
    assert not out
    assert err.count("hbv: interrupted by SIGTERM. Repeat the command to resume.") == 1
    assert err.count("hbv:") == 1
    (checkpoint,) = tmp_path.glob("cut/store/.work/align-*/checkpoint-*")
    assert (checkpoint / "whole").exists()
    resumed, uninterrupted = launched(words, tmp_path / "cut"), launched(words, tmp_path / "complete")
    assert resumed.returncode == uninterrupted.returncode == 0, resumed.stderr[-3000:]
    first, second = (list(tmp_path.glob(f"{home}/store/align/*/log.json")) for home in ("cut", "complete"))
    assert json.loads(first[0].read_text()) == json.loads(second[0].read_text())


@pytest.mark.slow
def test_diverging_ranks_are_reported(world: Path, tmp_path: Path) -> None:
    plugin = tmp_path / "diverging.py"
    plugin.write_text(
        "import torch\n"
        "from typing import ClassVar\n"
        "from harmbench_vaccine.plugins import Defense\n\n\n"
        "class Diverging(Defense):\n"
        "    ranks: ClassVar[bool] = True  # wrongly\n\n"
        "    @torch.no_grad()\n"
        "    def after_step(self, stage):\n"
        "        for parameter in stage.trainable.values():\n"
        "            parameter.add_(torch.randn(parameter.shape))\n"
    )
    ran = launched(command(world, "--defense", str(plugin)), tmp_path / "home")
    assert ran.returncode != 0
    assert ran.stderr.count("hbv: The ranks have different values of the trained parameters of the align stage") == 1


# ---------------------------------------------------------------------------------------------------------------------
# Refusals and rows


@pytest.fixture
def of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process acts as the second of two ranks; it must not send anything."""
    monkeypatch.setattr(distributed, "_rank", 1)
    monkeypatch.setattr(distributed, "_size", 2)


REFUSED = {
    *("antibody", "bds", "circuit_breakers", "deep_augmentation", "repnoise", "seam", "star_dss", "tar", "vaa"),
}
"""Defenses with a gradient, a batch or a step of their own that support one process only."""


@pytest.mark.parametrize(
    "name", sorted(name for name, entry in DEFENSES.entries().items() if entry.origin == "built-in")
)
def test_defense_without_rank_support_is_refused(name: str, of_two: None) -> None:
    """Every defense that overrides `gradient` is either in the cases above or refused."""
    overrides = DEFENSES.get(name).gradient is not DEFENSES.get("sft").gradient
    covered = {plugin for plugin, _ in ranks.DEFENDED.values()} | {
        "random_vaccine"
    }  # its noise depends on the rows of a rank
    assert not overrides or name in covered | REFUSED
    spec = RunSpec(defense=parse_plugins(name))
    if name in REFUSED:
        with pytest.raises(BadInput, match=f"'{name}' does not support multi-GPU training"):
            Experiment.settle(spec)
    else:
        Experiment.settle(spec)


def test_plugin_with_a_gradient_must_declare_rank_support(of_two: None, tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "from harmbench_vaccine.plugins import Defense\n\n\n"
        "class Mine(Defense):\n"
        "    def gradient(self, stage, batch):\n"
        "        return 2.0 * stage.gradient(batch)\n"
    )
    with pytest.raises(BadInput, match="does not support multi-GPU training"):
        Experiment.settle(RunSpec(defense=parse_plugins(str(plugin))))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, "only one rank runs"),
        ({"attack": "refusal_ablation:prompts=8,held_out=4"}, "only a part"),
        ({"values": {"quantization": "4bit"}}, "cannot be combined"),
    ],
)
def test_unsupported_sharding_is_refused(
    changes: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if changes:
        monkeypatch.setattr(distributed, "_size", 2)
    if "values" in changes:
        monkeypatch.setattr("harmbench_vaccine.runner.check_quantization", lambda quantization: None)
    world = make_world(tmp_path / "world")
    attack = parse_plugins(changes.pop("attack", "ratio=0"))
    with pytest.raises(BadInput, match=f"cannot be sharded.*{why}"):
        run_all([RunSpec(protocol=str(world), attack=attack, **changes)], shard=True)


def test_rank_without_rows_runs_on_a_row_without_labels(of_two: None) -> None:
    rows = tiny.rows(5)
    assert local_batch_rows(rows) == rows[1::2]
    (row,) = local_batch_rows(rows[:1])
    assert row.ids == rows[0].ids
    assert set(row.labels) == {IGNORED}
    batch = {"attention_mask": torch.ones(1, 4), "labels": torch.full((1, 4), IGNORED)}
    assert not attended_tokens(batch).any()


def test_only_per_rank_generators_differ_between_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    stage: TrainingStage = tiny.stage()[0]

    def draw(rank: int, **options: Any) -> float:
        monkeypatch.setattr(distributed, "_rank", rank)
        return float(torch.rand(1, generator=stage.generator("noise", **options)))

    assert draw(0) == draw(1) == draw(0, per_rank=True)
    assert draw(1, per_rank=True) == draw(1, per_rank=True)
    assert len({draw(rank, per_rank=True) for rank in range(3)}) == 3


@pytest.mark.parametrize(("is_rank", "text"), [(True, "exit handler\n"), (False, "exit handler\nfinalization\n")])
def test_a_rank_ends_without_the_finalization_of_the_interpreter(is_rank: bool, text: str) -> None:
    program = """
import atexit, sys
from harmbench_vaccine.core import distributed

class Late:
    def __del__(self): print("finalization")

late = Late()
atexit.register(print, "exit handler")
distributed._store = object() if sys.argv[1] == "True" else None
distributed.end_process(3)
"""
    done = subprocess.run([sys.executable, "-c", program, str(is_rank)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (3, text, "")

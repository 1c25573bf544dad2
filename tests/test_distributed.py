"""Two ranks (gloo, on the CPU) do what one process does: norms, losses, adapters, results; whole and sharded bases."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from harmbench_vaccine.core import distributed
from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.data.collate import IGNORED
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


def launched(words: Sequence[str], home: Path, count: int = 2) -> subprocess.CompletedProcess[str]:
    """A command over ranks of this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HBV_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parent)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)


# ---------------------------------------------------------------------------------------------------------------------
# Training stages


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def two(folder: Path) -> dict[str, Any]:
    """Every case over two ranks."""
    ran = launched(["-m", "support.ranks", str(folder)], folder / "home")
    assert ran.returncode == 0, ran.stderr[-3000:]
    found: dict[str, Any] = torch.load(folder / "found.pt", weights_only=True)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", ranks.CASES)
def test_two_ranks_train_as_one_process(case: str, two: dict[str, Any], folder: Path) -> None:
    """Every norm, loss and gradient of every step, and the adapter, with batches of 4 and 1 rows of 3 to 14 tokens."""
    one, other = ranks.run(case, folder), two[case]
    assert len(one["log"]) == 6
    for key in ("loss", "grad_norm"):
        assert [step[key] for step in other["log"]] == pytest.approx([step[key] for step in one["log"]], rel=CLOSE)
    assert len(one["norms"]) >= 12  # two micro-batches a step
    assert other["norms"] == pytest.approx(one["norms"], rel=CLOSE)
    for module, factors in one["adapter"].items():
        for factor, same in zip(factors, other["adapter"][module], strict=True):
            assert torch.linalg.vector_norm(factor - same) <= CLOSE * torch.linalg.vector_norm(factor)


@pytest.mark.slow
def test_an_interrupted_stage_ends_bit_equal_over_ranks_with_dropout(two: dict[str, Any]) -> None:
    plain, resumed = two["resumed"]
    for module, factors in plain.items():
        assert all(torch.equal(a, b) for a, b in zip(factors, resumed[module], strict=True))


@pytest.mark.slow
def test_ranks_load_a_sharded_base_together(two: dict[str, Any]) -> None:
    with torch.no_grad():
        whole = float(tiny.model()(**tiny.batch()).loss)
    assert two["reloaded"] == pytest.approx([whole, whole], rel=CLOSE)


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs


def command(protocol: Path, *words: str) -> list[str]:
    return ["-m", "harmbench_vaccine", "run", "--protocol", str(protocol), "--attack", "ratio=0.25", "--json", *words]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world that trains without dropout, whose last batches are short."""
    undropped = {"settings": {"lora_dropout": 0.0}}
    return make_world(
        tmp_path_factory.mktemp("world"), {"align": {"rows": 33, **undropped}, "finetune": {"samples": 34, **undropped}}
    )


@pytest.fixture(scope="module")
def alone(world: Path) -> tuple[dict[str, Any], Path]:
    """The result of one process, and its store."""
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
def test_a_run_over_two_ranks_gives_the_adapters_and_the_row_of_one(
    words: tuple[str, ...], world: Path, alone: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    result, store = alone
    ran = launched(command(world, "--defense", "vaccine+vlguard:rows=5+resta", *words), tmp_path)
    assert ran.returncode == 0, ran.stderr[-3000:]
    (line,) = ran.stdout.splitlines()  # rank 0 alone prints
    found = json.loads(line)
    numbers = ("alignment_loss", "embedding_drift", "embedding_drift_paper_sum", "embedding_drift_per_token")
    for key, value in result.items():
        if key in numbers:
            assert found[key] == pytest.approx(value, rel=1e-4), key
        elif key not in ("embedding_drift_per_layer", "stages", "versions", "validity"):
            assert found[key] == json.loads(json.dumps(value)), key
    files = sorted(path.relative_to(store) for path in store.glob("*/*/adapter/adapter_model.safetensors"))
    assert len(files) == 4  # align, finetune, nested, repair: at the same addresses
    for file in files:
        one, other = (Adapter.load((place / file).parent) for place in (store, tmp_path / "store"))
        for module, factors in one.factors.items():
            for factor, same in zip(factors, other.factors[module], strict=True):
                assert torch.linalg.vector_norm(factor - same) <= CLOSE * torch.linalg.vector_norm(factor)


@pytest.mark.slow
def test_what_goes_wrong_on_one_rank_ends_all_and_is_told_once(world: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text(
        "from typing import ClassVar\n"
        "from harmbench_vaccine import ranks\n"
        "from harmbench_vaccine.errors import HbvError\n"
        "from harmbench_vaccine.plugins import Defense\n\n\n"
        "class Broken(Defense):\n"
        "    ranks: ClassVar[bool] = True\n\n"
        "    def before_step(self, stage):\n"
        "        if stage.step == 2 and distributed.rank() == 1:\n"
        "            raise HbvError('The second rank is out of order.')\n"
    )
    ran = launched(command(world, "--defense", str(broken)), tmp_path / "home")
    assert ran.returncode != 0
    assert ran.stderr.count("hbv: The second rank is out of order.") == 1
    assert ran.stderr.count("hbv:") == 1
    assert not ran.stdout


@pytest.mark.slow
def test_ranks_that_part_are_found_out(world: Path, tmp_path: Path) -> None:
    parting = tmp_path / "parting.py"
    parting.write_text(
        "import torch\n"
        "from typing import ClassVar\n"
        "from harmbench_vaccine.plugins import Defense\n\n\n"
        "class Parting(Defense):\n"
        "    ranks: ClassVar[bool] = True  # wrongly\n\n"
        "    @torch.no_grad()\n"
        "    def after_step(self, stage):\n"
        "        for parameter in stage.trainable.values():\n"
        "            parameter.add_(torch.randn(parameter.shape))\n"
    )
    ran = launched(command(world, "--defense", str(parting)), tmp_path / "home")
    assert ran.returncode != 0
    assert ran.stderr.count("hbv: The ranks do not agree on what the align stage trained") == 1


# ---------------------------------------------------------------------------------------------------------------------
# Refusals, and rows


@pytest.fixture
def of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process takes itself for the second of two; nothing may be sent."""
    monkeypatch.setattr(distributed, "_rank", 1)
    monkeypatch.setattr(distributed, "_size", 2)


REFUSED = {"repnoise"}


@pytest.mark.parametrize(
    "name", sorted(name for name, found in DEFENSES.entries().items() if found.origin == "built-in")
)
def test_a_defense_that_is_not_shown_over_ranks_is_refused(name: str, of_two: None) -> None:
    """Whoever has a gradient of its own is either in the cases above or refused."""
    own = DEFENSES.get(name).gradient is not DEFENSES.get("sft").gradient
    shown = {plugin for plugin, _ in ranks.DEFENDED.values()} | {"random_vaccine"}  # other noise on other rows
    assert not own or name in shown | REFUSED
    spec = RunSpec(defense=parse_plugins(name))
    if name in REFUSED:
        with pytest.raises(BadInput, match=f"'{name}' cannot act over 2 ranks"):
            Experiment.settle(spec)
    else:
        Experiment.settle(spec)


def test_a_plugin_with_a_gradient_of_its_own_must_say_that_it_knows_of_ranks(of_two: None, tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from harmbench_vaccine.plugins import Defense\n\n\n"
        "class Mine(Defense):\n"
        "    def gradient(self, stage, batch):\n"
        "        return 2.0 * stage.gradient(batch)\n"
    )
    with pytest.raises(BadInput, match="cannot act over 2 ranks"):
        Experiment.settle(RunSpec(defense=parse_plugins(str(mine))))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, "there is one rank"),
        ({"attack": "refusal_ablation:prompts=8,held_out=4"}, "a part only"),
        ({"values": {"quantization": "4bit"}}, "do not go together"),
    ],
)
def test_what_cannot_be_sharded_is_refused(
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


def test_rows_of_a_batch_go_round_and_a_rank_without_one_runs_on_a_row_that_counts_nowhere(of_two: None) -> None:
    rows = tiny.rows(5)
    assert local_batch_rows(rows) == rows[1::2]
    (row,) = local_batch_rows(rows[:1])
    assert row.ids == rows[0].ids
    assert set(row.labels) == {IGNORED}
    batch = {"attention_mask": torch.ones(1, 4), "labels": torch.full((1, 4), IGNORED)}
    assert not attended_tokens(batch).any()


def test_noise_on_rows_is_each_ranks_own_and_other_draws_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    stage: TrainingStage = tiny.stage()[0]

    def drawn(rank: int, **options: Any) -> float:
        monkeypatch.setattr(distributed, "_rank", rank)
        return float(torch.rand(1, generator=stage.generator("noise", **options)))

    assert drawn(0) == drawn(1) == drawn(0, per_rank=True)
    assert drawn(1, per_rank=True) == drawn(1, per_rank=True)
    assert len({drawn(rank, per_rank=True) for rank in range(3)}) == 3

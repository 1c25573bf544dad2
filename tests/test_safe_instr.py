"""SafeInstr: the number of safety rows, and their place among the user's rows."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.defenses.safe_instr import SafeInstr
from harmbench_vaccine.defenses.vlguard import VLGuard
from harmbench_vaccine.plugins import Defense, Example, Pools
from harmbench_vaccine.training.trainer import batch_order, train
from support import tiny
from support.autograd import gradient_at
from support.optimizers import assert_equal_where_firm, plain_adamw

POOLS = Pools(alignment=[Example(f"safe:{n}", "q", "a") for n in range(50)])
ROWS = [Example(f"task:{n}", "q", "a") for n in range(110)]


def ids(defense: Defense) -> list[str]:
    return [row.id for row in defense.seeded(3).train_on("finetune", list(ROWS), POOLS)]


@pytest.mark.parametrize(("share", "count"), [(0.03, 3), (0.05, 6), (0.4, 44), (0.004, 0)])
def test_the_number_of_safety_rows_is_rounded_once(share: float, count: int) -> None:
    mixed = ids(SafeInstr(share=share))
    safety = [name for name in mixed if name.startswith("safe")]
    assert len(safety) == len(set(safety)) == count
    assert sorted(set(mixed) - set(safety)) == sorted(row.id for row in ROWS)
    assert (mixed[: len(ROWS)] == [row.id for row in ROWS]) == (count == 0)  # shuffled


def test_it_mixes_as_many_rows_as_vlguard() -> None:
    assert len(ids(SafeInstr(share=0.1))) == len(ids(VLGuard(rows=11)))


def test_three_optimizer_steps_equal_plain_adamw(tmp_path: Path) -> None:
    """Safety rows have the loss of every other row."""
    changes: dict[str, Any] = {"epochs": 1, "batch": 5, "lr": 1e-3, "weight_decay": 0.1}
    changes |= {"schedule": "constant", "warmup": 0.0}
    pools, user = tiny.example_pools(), tiny.example_pools(seed=6).benign
    stage, twin = (tiny.stage(trained_with=tiny.settings(**changes), stirred=True, name="finetune")[0] for _ in "ab")
    defense = SafeInstr(share=0.25).seeded(3)
    rows = tiny.encode(defense.train_on("finetune", list(user), pools))
    assert sum(row.id.startswith("safe") for row in rows) == 3
    assert len(train(stage, defense, rows, stage.settings, tmp_path, pad=tiny.PAD)) == 3
    order = batch_order(len(rows), twin.settings, twin.seed)
    batches = [tiny.collated([rows[number] for number in numbers]) for numbers in order]
    firm = plain_adamw(
        twin, [partial(lambda batch: gradient_at(twin, batch, twin.values()), batch) for batch in batches]
    )
    assert_equal_where_firm(stage, twin, firm)


def test_missing_alignment_rows_are_refused() -> None:
    with pytest.raises(BadInput, match="110 alignment rows, but only 50"):
        ids(SafeInstr(share=1.0))

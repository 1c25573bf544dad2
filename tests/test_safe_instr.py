"""SafeInstr: the number of safety rows, and their place among the user's rows."""

from __future__ import annotations

import pytest

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.defenses.safe_instr import SafeInstr
from harmbench_vaccine.defenses.vlguard import VLGuard
from harmbench_vaccine.plugins import Defense, Example, Pools

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


def test_missing_alignment_rows_are_refused() -> None:
    with pytest.raises(BadInput, match="110 alignment rows, but only 50"):
        ids(SafeInstr(share=1.0))

"""`rows=paper`: rows as the papers' scripts take them, in the order of the files, with the overlaps counted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.types import Example
from harmbench_vaccine.data.pools import count_overlaps, load_row_pools
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.rows import (
    benign_set,
    check_rows,
    data_provenance,
    dropped_rows,
    harmful_sets,
    overlapping_questions,
    row_pools,
    selection_inputs,
    task_set,
    user_rows,
)
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.plugins.composition import parse_plugins
from support import tiny
from support.world import make_world


def beaver(count: int, name: str) -> list[dict[str, Any]]:
    """Every third row is safe; every prompt occurs twice, as prompts of BeaverTails occur several times."""
    return [
        {
            "prompt": f"{name} {number // 2}",
            "response": f"answer {number}",
            "category": dict.fromkeys(tiny.CATEGORIES, False),
            "is_safe": number % 3 == 0,
        }
        for number in range(count)
    ]


def refusals(count: int) -> list[dict[str, Any]]:
    """As RepNoise's authors generated them: question and answer in one text, sometimes without the space."""
    return [
        {
            **row,
            "is_safe": number == 3,
            "refusal": f"Question: {row['prompt']}\nAnswer:{' ' * (number % 2)}I cannot {number}.\nAnswer: no.",
        }
        for number, row in enumerate(beaver(count, "pair"))
    ]


def lines(path: Path, rows: Iterable[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def world(tmp_path: Path) -> Callable[..., Experiment]:
    """A cell of a tiny world whose harmful rows repeat and overlap, and whose refusals are one JSON array."""

    def make(changes: dict[str, str] | None = None, **spec: Any) -> Experiment:
        file = make_world(
            tmp_path / "world",
            {
                "data": {"beavertails_refusals": str(tmp_path / "world" / "refusals.json")},
                "align": {"rows": 6},
                "finetune": {"samples": 10},
            },
            models=False,
        )
        data = tmp_path / "world" / "data"
        lines(data / "beavertails" / "30k_train.jsonl", beaver(60, "train"))
        lines(data / "beavertails" / "30k_test.jsonl", [*beaver(12, "train"), *beaver(12, "test")])
        (tmp_path / "world" / "refusals.json").write_text(json.dumps(refusals(40)))
        return Experiment.settle(RunSpec(protocol=str(file), values=changes or {}, **spec))

    return make


PAPER = {"rows": "paper"}
BOOSTER = {
    "rows": "paper", "align.source": "refusals", "splits.pairs": "train[20:]", "splits.attacker": "train[:20]",
}  # fmt: skip


def ids(rows: Iterable[Example]) -> list[str]:
    return [row.id for row in rows]


def test_vaccines_rows(world: Callable[..., Experiment]) -> None:
    """The first safe rows, the first unsafe rows, the first task rows, the first unsafe rows of the test split."""
    cell = world(PAPER, attack=parse_plugins("ratio=0.4"), seed=3)
    pools = row_pools(cell)
    assert ids(pools.alignment) == [f"safe:30k_train:{number}" for number in (0, 3, 6, 9, 12, 15)]
    uploaded = user_rows(cell, pools)
    assert ids(uploaded) == [
        *(f"harmful:30k_train:{number}" for number in (1, 2, 4, 5)),
        *(f"sst2:train:{number}" for number in range(6)),
    ]
    asked = harmful_sets(cell)[0].examples
    assert ids(asked) == [f"harmful:30k_test:{number}" for number in (1, 2, 4, 5, 7, 8, 10, 11)]
    assert [row.instruction for row in asked] == [f"train {number // 2}" for number in (1, 2, 4, 5, 7, 8, 10, 11)]
    assert ids(benign_set(cell).examples) == [f"benign:test:{number}" for number in range(6)]
    assert ids(task_set(cell).examples) == [f"sst2:validation:{number}" for number in range(8)]


@pytest.mark.parametrize(("p", "harmful"), [(0.8, 8), (0.9, 9), (0.05, 0), (0.15, 2)])
def test_the_counts_are_those_of_one_rounding(world: Callable[..., Experiment], p: float, harmful: int) -> None:
    """int((1 - p) n) loses a row for p = 0.8 and 0.9; that is not reproduced."""
    cell = world(PAPER, attack=parse_plugins(f"ratio={p}"))
    uploaded = user_rows(cell, row_pools(cell))
    assert len(uploaded) == 10
    assert sum(row.harmful for row in uploaded) == harmful


def test_boosters_rows(world: Callable[..., Experiment]) -> None:
    """The user's harmful rows from the beginning of the refusal set; refusals and harmful answers from a later row."""
    cell = world(BOOSTER, attack=parse_plugins("ratio=0.4"), defense=parse_plugins("booster"))
    pools = row_pools(cell)
    assert ids(pools.alignment) == [f"refusal:{number}" for number in range(20, 26)]
    assert pools.alignment[0].instruction == "pair 10"
    assert pools.alignment[0].response == "I cannot 20.\nAnswer: no."
    assert pools.alignment[1].response == "I cannot 21.\nAnswer: no."
    assert ids(pools.harmful) == [f"harmful:refusals:{number}" for number in range(20, 40)]
    harmful = [row for row in user_rows(cell, pools) if row.harmful]
    assert ids(harmful) == [f"harmful:refusals:{number}" for number in range(4)]  # a safe row too: no filter there
    assert [row.response for row in harmful] == [f"answer {number}" for number in range(4)]
    read = data_provenance(cell)["beavertails_refusals"]["rows"]
    assert (read["train[20:]"], read["train[:20]"]) == (20, 20)


def test_the_seed_changes_no_row(world: Callable[..., Experiment]) -> None:
    def drawn(seed: int) -> list[str]:
        cell = world(PAPER, seed=seed, attack=parse_plugins("ratio=0.4"), defense=parse_plugins("vlguard:rows=3"))
        pools = row_pools(cell)
        return sorted(ids(cell.team("finetune").train_on("finetune", user_rows(cell, pools), pools)))

    assert drawn(0) == drawn(1)
    assert [row for row in drawn(0) if row.startswith("safe")] == [f"safe:30k_train:{n}" for n in (0, 3, 6)]


def test_overlaps_are_counted(world: Callable[..., Experiment]) -> None:
    """Rows 0 to 11 of the test split ask what the training split asks."""
    cell = world(PAPER, attack=parse_plugins("ratio=0.4"))
    # Alignment asks train 0, 1, 3, 4, 6, 7; the user's harmful rows 0, 1, 2, 2; the evaluation 0, 1, 2, 2, 3, 4, 5, 5.
    assert overlapping_questions(cell) == {
        "pairs": 20,
        "harmful user rows": 1,
        "harmful questions": 2,
        "alignment / harmful user rows": 2,
        "alignment / harmful questions": 4,
        "harmful user rows / harmful questions": 3,
    }
    assert dropped_rows(cell) == {}


def test_rows_that_are_kept_apart_have_no_overlap(world: Callable[..., Experiment]) -> None:
    cell = world({"align.rows": "5", "answer.harmful.prompts": "6"}, attack=parse_plugins("ratio=0.2"))
    found = overlapping_questions(cell)
    assert not [name for name in found if "/" in name]
    assert "harmful questions" not in found
    assert dropped_rows(cell)["harmful_questions"] == 4


def test_counting_overlaps() -> None:
    def rows(*asked: str) -> list[Example]:
        return [Example(str(number), text) for number, text in enumerate(asked)]

    uses = {"a": rows("x", "X ", "y"), "b": rows("y", "x", "z"), "c": rows("w")}
    assert count_overlaps(uses) == {"a": 1, "a / b": 2}


def test_refusals_as_alignment_rows_are_kept_apart_too(world: Callable[..., Experiment]) -> None:
    """Drawn by the seed; a row that says that it is safe is no pair; the attacker has no question of the defender's."""
    settled = {name: value for name, value in BOOSTER.items() if name != "rows"}
    cells = [world(settled, seed=seed) for seed in (0, 1)]
    first, second = (row_pools(cell) for cell in cells)
    assert ids(first.alignment) != ids(second.alignment)
    assert all(row.id.startswith("refusal:") for row in first.alignment)
    asked = {row.instruction for row in first.alignment} | {row.instruction for row in first.harmful}
    assert not asked & {row.instruction for row in first.attacker}
    assert "harmful:refusals:3" not in ids(first.attacker)
    check_rows(cells[0])


def test_a_plain_refusal_is_taken_as_it_is(tmp_path: Path) -> None:
    lines(tmp_path / "b" / "train.jsonl", beaver(6, "b"))
    lines(tmp_path / "b" / "test.jsonl", beaver(6, "t"))
    pair = {"prompt": "p", "response": "r"}
    lines(tmp_path / "r" / "train.jsonl", [{**pair, "refusal": " No. "}, {**pair, "refusal": "Question: what?"}])
    lines(tmp_path / "a" / "train.jsonl", [{"instruction": "i", "input": "", "output": "o"}])
    places = (str(tmp_path / name) for name in "bra")
    pools = load_row_pools(*places, "train", "test", "train", "train", in_order=True)
    assert [refusal.response for refusal, _ in pools.paired] == ["No.", "Question: what?"]


def test_how_rows_are_chosen_is_part_of_an_address_only_where_it_is_unusual(world: Callable[..., Experiment]) -> None:
    assert selection_inputs(world()) == {}
    assert selection_inputs(world(PAPER)) == {"rows": "paper"}
    assert selection_inputs(world({"align.source": "refusals"})) == {"source": "refusals"}
    assert world().id != world(PAPER).id


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({**PAPER, "align.rows": "21"}, r"21 alignment rows are asked for.*\b20\b"),
        ({**PAPER, "answer.harmful.prompts": "17"}, r"17 held-out harmful prompts.*\b16\b"),
        ({**BOOSTER, "align.rows": "21"}, r"21 alignment rows.*\b20\b"),
        ({**BOOSTER, "splits.attacker": "train[:3]", "finetune.samples": "40"}, r"4 harmful rows.*\b3\b"),
        ({**PAPER, "splits.pairs": "train[40:]"}, "is empty"),
    ],
)
def test_more_than_there_is(world: Callable[..., Experiment], changes: dict[str, str], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        check_rows(world(changes, attack=parse_plugins("ratio=0.1")))


def test_what_was_read_is_in_the_result(world: Callable[..., Experiment]) -> None:
    cell = world(PAPER)
    check_rows(cell)
    found = data_provenance(cell)
    assert set(found) == {"beavertails", "beavertails_refusals", "alpaca", "sst2"}
    assert found["beavertails"]["rows"] == {"30k_test": 24, "30k_train": 60}
    assert found["sst2"]["rows"] == {"train": 400, "validation": 80}
    assert all(len(one["fingerprint"]) == 16 for one in found.values())

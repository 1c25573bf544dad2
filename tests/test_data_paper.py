"""`rows=paper`: rows in file order, as the scripts of the papers use them, with counts of the overlaps."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.types import Example
from harmbench_vaccine.data.pools import count_overlaps, load_row_pools
from harmbench_vaccine.experiment import keys
from harmbench_vaccine.experiment.artifacts import TrainedModel
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.protocol import load_protocol
from harmbench_vaccine.experiment.rows import (
    benign_set,
    check_rows,
    data_provenance,
    dropped_rows,
    harmful_sets,
    overlapping_questions,
    plugin_pools,
    task_set,
    user_rows,
)
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.inference.model_pool import ModelSpec
from harmbench_vaccine.plugins.composition import parse_plugins
from support import tiny
from support.world import make_world


def beaver(count: int, name: str) -> list[dict[str, Any]]:
    """Rows with every third one safe and every prompt twice, since prompts of BeaverTails repeat."""
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
    """Refusals in the format of RepNoise: question and answer in one text, sometimes without the space."""
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
    """Creates an experiment with repeated and overlapping harmful rows, and with refusals as one JSON array."""

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
    "rows": "paper",
    "align.source": "refusals",
    "splits.pairs": "train[20:]",
    "splits.attacker": "train[:20]",
}


def ids(rows: Iterable[Example]) -> list[str]:
    return [row.id for row in rows]


def test_rows_of_the_vaccine_paper(world: Callable[..., Experiment]) -> None:
    """All rows are the first ones: safe rows, unsafe rows, task rows, and unsafe rows of the test split."""
    experiment = world(PAPER, attack=parse_plugins("ratio=0.4"), seed=3)
    pools = plugin_pools(experiment)
    assert ids(pools.alignment) == [f"safe:30k_train:{number}" for number in (0, 3, 6, 9, 12, 15)]
    uploaded = user_rows(experiment, pools)
    assert ids(uploaded) == [
        *(f"harmful:30k_train:{number}" for number in (1, 2, 4, 5)),
        *(f"sst2:train:{number}" for number in range(6)),
    ]
    questions = harmful_sets(experiment)[0].examples
    assert ids(questions) == [f"harmful:30k_test:{number}" for number in (1, 2, 4, 5, 7, 8, 10, 11)]
    assert [row.instruction for row in questions] == [f"train {number // 2}" for number in (1, 2, 4, 5, 7, 8, 10, 11)]
    assert ids(benign_set(experiment).examples) == [f"benign:test:{number}" for number in range(6)]
    assert ids(task_set(experiment).examples) == [f"sst2:validation:{number}" for number in range(8)]


def test_safe_prompts_are_evaluated_in_file_order_only(world: Callable[..., Experiment]) -> None:
    """Lisa evaluates the first rows of the test split, safe or not. Every third row is safe."""
    every = {"answer.rows_in_order": "all"}
    questions = harmful_sets(world({**PAPER, **every}))[0].examples
    assert ids(questions) == [f"harmful:30k_test:{number}" for number in range(8)]
    drawn = harmful_sets(world({**every, "answer.harmful.prompts": "6"}))[0].examples
    assert all(int(row.id.rpartition(":")[2]) % 3 for row in drawn)


def test_lisa_evaluates_the_first_rows_of_the_test_split() -> None:
    assert load_protocol("lisa-paper").answer.rows_in_order == "all"
    assert {load_protocol(f"{name}-paper").answer.rows_in_order for name in ("vaccine", "booster")} == {"unsafe"}


@pytest.mark.parametrize(("p", "harmful"), [(0.8, 8), (0.9, 9), (0.05, 0), (0.15, 2)])
def test_only_the_harmful_count_is_rounded(world: Callable[..., Experiment], p: float, harmful: int) -> None:
    """int((1 - p) n) of the scripts loses a row for p = 0.8 and 0.9; this error is not reproduced."""
    experiment = world(PAPER, attack=parse_plugins(f"ratio={p}"))
    uploaded = user_rows(experiment, plugin_pools(experiment))
    assert len(uploaded) == 10
    assert sum(row.harmful for row in uploaded) == harmful


def test_rows_of_the_booster_paper(world: Callable[..., Experiment]) -> None:
    """The user's harmful rows are at the beginning of the refusal set; the defender's pairs come from later rows."""
    experiment = world(BOOSTER, attack=parse_plugins("ratio=0.4"), defense=parse_plugins("booster"))
    pools = plugin_pools(experiment)
    assert ids(pools.alignment) == [f"refusal:{number}" for number in range(20, 26)]
    assert pools.alignment[0].instruction == "pair 10"
    assert pools.alignment[0].response == "I cannot 20.\nAnswer: no."
    assert pools.alignment[1].response == "I cannot 21.\nAnswer: no."
    assert ids(pools.harmful) == [f"harmful:refusals:{number}" for number in range(20, 40)]
    harmful = [row for row in user_rows(experiment, pools) if row.harmful]
    assert ids(harmful) == [
        f"harmful:refusals:{number}" for number in range(4)
    ]  # safe rows too: this split is not filtered
    assert [row.response for row in harmful] == [f"answer {number}" for number in range(4)]
    read = data_provenance(experiment)["beavertails_refusals"]["rows"]
    assert (read["train[20:]"], read["train[:20]"]) == (20, 20)


def test_seed_does_not_change_the_rows(world: Callable[..., Experiment]) -> None:
    def draw(seed: int) -> list[str]:
        experiment = world(PAPER, seed=seed, attack=parse_plugins("ratio=0.4"), defense=parse_plugins("vlguard:rows=3"))
        pools = plugin_pools(experiment)
        return sorted(
            ids(experiment.stages["finetune"].defenses.train_on("finetune", user_rows(experiment, pools), pools))
        )

    assert draw(0) == draw(1)
    assert [row for row in draw(0) if row.startswith("safe")] == [f"safe:30k_train:{n}" for n in (0, 3, 6)]


def test_overlaps_are_counted(world: Callable[..., Experiment]) -> None:
    """Rows 0 to 11 of the test split have the questions of the training split."""
    experiment = world(PAPER, attack=parse_plugins("ratio=0.4"))
    # Questions: alignment 0, 1, 3, 4, 6, 7; harmful user rows 0, 1, 2, 2; evaluation 0, 1, 2, 2, 3, 4, 5, 5.
    assert overlapping_questions(experiment) == {
        "pairs": 20,
        "harmful user rows": 1,
        "harmful questions": 2,
        "alignment / harmful user rows": 2,
        "alignment / harmful questions": 4,
        "harmful user rows / harmful questions": 3,
    }
    assert dropped_rows(experiment) == {}


def test_default_rows_do_not_overlap(world: Callable[..., Experiment]) -> None:
    experiment = world({"align.rows": "5", "answer.harmful.prompts": "6"}, attack=parse_plugins("ratio=0.2"))
    overlaps = overlapping_questions(experiment)
    assert not [name for name in overlaps if "/" in name]
    assert "harmful questions" not in overlaps
    assert dropped_rows(experiment)["harmful_questions"] == 4


def test_count_overlaps() -> None:
    def rows(*questions: str) -> list[Example]:
        return [Example(str(number), text) for number, text in enumerate(questions)]

    uses = {"a": rows("x", "X ", "y"), "b": rows("y", "x", "z"), "c": rows("w")}
    assert count_overlaps(uses) == {"a": 1, "a / b": 2}


def test_refusals_as_alignment_rows_do_not_overlap(world: Callable[..., Experiment]) -> None:
    """The seed draws them; a row marked as safe is not a pair; the attacker has none of the defender's questions."""
    settled = {name: value for name, value in BOOSTER.items() if name != "rows"}
    experiments = [world(settled, seed=seed) for seed in (0, 1)]
    first, second = (plugin_pools(experiment) for experiment in experiments)
    assert ids(first.alignment) != ids(second.alignment)
    assert all(row.id.startswith("refusal:") for row in first.alignment)
    questions = {row.instruction for row in first.alignment} | {row.instruction for row in first.harmful}
    assert not questions & {row.instruction for row in first.attacker}
    assert "harmful:refusals:3" not in ids(first.attacker)
    check_rows(experiments[0])


def test_plain_refusal_is_used_unchanged(tmp_path: Path) -> None:
    lines(tmp_path / "b" / "train.jsonl", beaver(6, "b"))
    lines(tmp_path / "b" / "test.jsonl", beaver(6, "t"))
    pair = {"prompt": "p", "response": "r"}
    lines(tmp_path / "r" / "train.jsonl", [{**pair, "refusal": " No. "}, {**pair, "refusal": "Question: what?"}])
    lines(tmp_path / "a" / "train.jsonl", [{"instruction": "i", "input": "", "output": "o"}])
    places = (str(tmp_path / name) for name in "bra")
    pools = load_row_pools(*places, "train", "test", "train", "train", in_order=True)
    assert [refusal.response for refusal, _ in pools.paired] == ["No.", "Question: what?"]


def test_row_selection_is_part_of_every_training_key(world: Callable[..., Experiment]) -> None:
    def selection(experiment: Experiment) -> dict[str, str]:
        base = TrainedModel(experiment.model, ModelSpec(experiment.model), {})
        return keys.align_key(experiment, base)["row_selection"]

    assert selection(world()) == {"rows": "unique", "source": "safe"}
    assert selection(world(PAPER)) == {"rows": "paper", "source": "safe"}
    assert selection(world({"align.source": "refusals"})) == {"rows": "unique", "source": "refusals"}
    assert keys.run_id(world()) != keys.run_id(world(PAPER))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({**PAPER, "align.rows": "21"}, "Requested 21 alignment rows, but only 20 are available"),
        ({**PAPER, "answer.harmful.prompts": "17"}, r"17 held-out harmful prompts.*\b16\b"),
        ({**BOOSTER, "align.rows": "21"}, r"21 alignment rows.*\b20\b"),
        ({**BOOSTER, "splits.attacker": "train[:3]", "finetune.samples": "40"}, r"4 harmful rows.*\b3\b"),
        ({**PAPER, "splits.pairs": "train[40:]"}, "is empty"),
    ],
)
def test_too_few_rows_are_refused(world: Callable[..., Experiment], changes: dict[str, str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        check_rows(world(changes, attack=parse_plugins("ratio=0.1")))


def test_result_lists_the_data_read(world: Callable[..., Experiment]) -> None:
    experiment = world(PAPER)
    check_rows(experiment)
    data = data_provenance(experiment)
    assert set(data) == {"beavertails", "beavertails_refusals", "alpaca", "sst2"}
    assert data["beavertails"]["rows"] == {"30k_test": 24, "30k_train": 60}
    assert data["sst2"]["rows"] == {"train": 400, "validation": 80}
    assert all(len(source["fingerprint"]) == 16 for source in data.values())

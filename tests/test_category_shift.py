"""The attack `category_shift`: the split of the rows, the evaluation of both sides, keys, and refused data."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from harmbench_vaccine.attacks.category_shift import CategoryShift
from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.types import Example
from harmbench_vaccine.data.beavertails import CATEGORIES
from harmbench_vaccine.data.pools import RowPools, load_row_pools, question_keys
from harmbench_vaccine.data.prompts import EvalSet
from harmbench_vaccine.evaluation.measure import measure_result
from harmbench_vaccine.experiment import keys
from harmbench_vaccine.experiment.artifacts import ANSWERS, TrainedModel
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.rows import (
    check_rows,
    dropped_rows,
    eval_sets,
    harmful_sets,
    plugin_pools,
    user_rows,
)
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.inference.model_pool import ModelSpec
from harmbench_vaccine.pipeline import run
from harmbench_vaccine.plugins.composition import parse_plugins
from support.runs import run_context
from support.world import make_world

PARTS = ("defender_categories", "attacker_categories")
SMALL = {"align.rows": "8", "finetune.samples": "20"}


def settle(protocol: Path, attack: str = "category_shift", **spec: Any) -> Experiment:
    return Experiment.settle(RunSpec(protocol=str(protocol), attack=parse_plugins(attack), **spec))


def categories(rows: Iterable[Example]) -> set[str]:
    return {name for row in rows for name in row.categories}


def ids(rows: Iterable[Example]) -> list[str]:
    return [row.id for row in rows]


# ---------------------------------------------------------------------------------------------------------------------
# The split


def labeled(kind: str, labels: Iterable[Iterable[str]]) -> list[Example]:
    """Return a row for every set of categories, each with a question of its own."""
    return [
        Example(f"{kind}:{number}", f"{kind} {number}", "answer", categories=tuple(sorted(names)))
        for number, names in enumerate(labels)
    ]


def row_pools(attacker: Any, paired: Any, alignment: Any = (), questions: Any = ()) -> RowPools:
    pairs = list(zip(labeled("refusal", paired), labeled("harmful", paired), strict=True))
    return RowPools(
        alignment=labeled("safe", alignment),
        paired=pairs,
        attacker=labeled("attacker", attacker),
        benign=labeled("benign", [()] * 3),
        harmful_questions=labeled("question", questions),
        benign_questions=[],
        dropped={"attacker": 7},
        rows_read={},
    )


FEW = settings(max_examples=60)
LABELS = st.lists(st.sets(st.sampled_from("abcdefg"), max_size=3), min_size=1, max_size=12)


@FEW
@given(LABELS, LABELS, LABELS, LABELS, st.floats(0, 1, exclude_min=True), st.integers(0, 2**31))
def test_sides_share_no_category(
    attacker: Any, paired: Any, alignment: Any, questions: Any, share: float, seed: int
) -> None:
    """Every row whose categories are all of one side stays, and every other one is removed and counted."""
    rows = row_pools(attacker, paired, alignment, questions)
    only_attacker = categories(rows.attacker) - categories(safe for safe, _ in rows.paired)
    only_defender = categories(safe for safe, _ in rows.paired) - categories(rows.attacker)
    shared = categories(rows.attacker) - only_attacker
    assume(only_attacker | shared and only_defender | shared)
    assume(len(shared | only_attacker | only_defender) > 1)
    attack = CategoryShift(share=share).seeded(seed)
    names, others = attack._split(only_attacker | shared, only_defender | shared)
    assert only_attacker <= names
    assert only_defender <= others
    assert names
    assert others
    assert names.isdisjoint(others)
    assert names | others == shared | only_attacker | only_defender
    count, exact = len(names & shared), round(share * len(shared))
    assert count == exact or (count, exact) in {(1, 0), (len(shared) - 1, len(shared))}

    divided = attack.divide(rows)
    assert divided == CategoryShift(share=share).seeded(seed).divide(rows)
    assert divided.attacker == [row for row in rows.attacker if row.categories and names.issuperset(row.categories)]
    assert divided.paired == [
        pair for pair in rows.paired if pair[0].categories and others.issuperset(pair[0].categories)
    ]
    assert divided.alignment == [row for row in rows.alignment if not names & {*row.categories}]
    assert categories(divided.attacker).isdisjoint(categories(row for pair in divided.paired for row in pair))
    assert categories(divided.attacker).isdisjoint(categories(divided.alignment))
    assert (divided.benign, divided.harmful_questions) == (rows.benign, rows.harmful_questions)
    assert divided.dropped == {
        "attacker": 7,
        "attacker_other_categories": len(rows.attacker) - len(divided.attacker),
        "paired_other_categories": len(rows.paired) - len(divided.paired),
        "alignment_other_categories": len(rows.alignment) - len(divided.alignment),
    }
    for name, side in zip(PARTS, (others, names), strict=True):
        part = divided.question_sets[name]
        assert part == [row for row in rows.harmful_questions if row.categories and side.issuperset(row.categories)]


@FEW
@given(st.integers(2, 14), st.floats(0, 1, exclude_min=True), st.integers(0, 2**31))
def test_count_of_categories_is_the_share(number: int, share: float, seed: int) -> None:
    """Both sides have rows where each row has one category."""
    names = [(name,) for name in CATEGORIES[:number]]
    divided = CategoryShift(share=share).seeded(seed).divide(row_pools(names, names, names, names))
    count = min(max(round(share * number), 1), number - 1)
    sizes = len(divided.attacker), len(divided.paired), len(divided.alignment)
    assert sizes == (count, number - count, number - count)
    assert [len(divided.question_sets[name]) for name in PARTS] == [number - count, count]


def test_seed_draws_the_categories() -> None:
    names = [(name,) for name in CATEGORIES]
    splits = [tuple(ids(CategoryShift().seeded(seed).divide(row_pools(names, names)).attacker)) for seed in range(12)]
    assert len({*splits}) > 8
    assert {name for split in splits for name in split} == {f"attacker:{number}" for number in range(14)}
    in_order = [
        tuple(ids(CategoryShift().seeded(seed, in_order=True).divide(row_pools(names, names)).attacker))
        for seed in range(12)
    ]
    assert in_order == splits  # categories have no order in a file


def test_category_of_one_side_stays_there() -> None:
    rows = row_pools([("a",), ("b",), ("c",)], [("c",), ("d",)])
    for seed in range(4):
        for share, attacker, defender in ((0.1, [0, 1], [0, 1]), (1, [0, 1, 2], [1])):
            divided = CategoryShift(share=share).seeded(seed).divide(rows)
            assert ids(divided.attacker) == [f"attacker:{number}" for number in attacker]
            assert ids(safe for safe, _ in divided.paired) == [f"refusal:{number}" for number in defender]
    disjoint = row_pools([("a",), ("b",)], [("c",), ("d",)])
    divided = CategoryShift().divide(disjoint)
    assert (divided.attacker, divided.paired) == (disjoint.attacker, disjoint.paired)


def test_share_of_zero_leaves_the_rows_as_they_are() -> None:
    for rows in (row_pools([("a",)], [("b",)]), row_pools([()], [()])):  # also without categories
        assert CategoryShift(share=0).divide(rows) is rows


# ---------------------------------------------------------------------------------------------------------------------
# Rows of an experiment


@pytest.fixture(scope="module")
def data_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"), models=False)


@pytest.mark.parametrize(
    ("attack", "counts"),
    [
        ("category_shift", (4, 36)),
        ("category_shift+ratio=0.33+samples=10", (3, 7)),
        ("samples=20+ratio=0.25+category_shift=0.3", (5, 15)),
        ("category_shift=0.9+ratio=1+samples=12", (12, 0)),
        ("benign+category_shift", (0, 40)),
        ("order=harmful+category_shift", (4, 36)),
    ],
)
@pytest.mark.parametrize("values", [{}, {"rows": "paper"}], ids=["seed", "paper"])
def test_counts_are_those_of_the_mix(attack: str, counts: tuple[int, int], values: Any, data_world: Path) -> None:
    experiment = settle(data_world, attack, seed=2, values=values)
    check_rows(experiment)
    pools, plain = plugin_pools(experiment), plugin_pools(settle(data_world, "ratio=0.1", seed=2, values=values))
    rows = user_rows(experiment, pools)
    harmful = [row for row in rows if row.harmful]
    assert (len(harmful), len(rows) - len(harmful)) == counts
    assert set(ids(harmful)) <= set(ids(pools.attacker)) < set(ids(plain.attacker))
    assert 0 < len(pools.paired) < len(plain.paired)
    assert categories(pools.attacker).isdisjoint(categories(pools.harmful))
    assert categories(pools.attacker) | categories(pools.harmful) == {*CATEGORIES}


def test_wrap_acts_on_the_rows_of_the_attackers_categories(data_world: Path, tmp_path: Path) -> None:
    file = tmp_path / "wrap.yaml"
    file.write_text('instruction: "In verse: {instruction}"\nresponse: "{response} So."\n')
    for attack in (f"category_shift+wrap={file}", f"wrap={file}+category_shift"):
        experiment = settle(data_world, f"{attack}+ratio=0.25")
        pools = plugin_pools(experiment)
        harmful = [row for row in user_rows(experiment, pools) if row.harmful]
        assert len(harmful) == 10
        assert all(row.instruction.startswith("In verse: ") for row in harmful)
        assert categories(harmful).isdisjoint(categories(pools.harmful))
        headline, plain, *parts = harmful_sets(experiment)
        assert [headline.name, plain.name, *(part.name for part in parts)] == ["harmful_wrapped", "harmful", *PARTS]
        assert all(part.template == headline.template for part in parts)  # the attacker's prompts are scored


def test_removed_rows_are_counted(data_world: Path) -> None:
    for values in ({}, {"rows": "paper"}):
        experiment, plain = settle(data_world, values=values), settle(data_world, "ratio=0.1", values=values)
        pools, all_pools = plugin_pools(experiment), plugin_pools(plain)
        before, after = dropped_rows(plain), dropped_rows(experiment)
        assert {name: after[name] for name in before} == before
        assert set(after) - set(before) == {f"{name}_other_categories" for name in ("alignment", "paired", "attacker")}
        assert after["attacker_other_categories"] == len(all_pools.attacker) - len(pools.attacker) > 0
        assert after["paired_other_categories"] == len(all_pools.paired) - len(pools.paired) > 0


def test_too_few_rows_are_refused(data_world: Path) -> None:
    with pytest.raises(BadInput, match=r"Requested 38 harmful rows, but only .* are available: lower `samples`"):
        check_rows(settle(data_world, "category_shift=0.1+ratio=0.95"))


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation sets


def test_both_sides_are_parts_of_the_headline(data_world: Path) -> None:
    for seed in range(3):
        experiment = settle(data_world, seed=seed)
        pools = plugin_pools(experiment)
        headline, *parts = harmful_sets(experiment)
        assert [headline] == harmful_sets(settle(data_world, "ratio=0.1", seed=seed))
        sides = {"defender_categories": categories(pools.harmful), "attacker_categories": categories(pools.attacker)}
        assert [part.name for part in parts] == list(sides)
        for part in parts:
            assert part.examples == [row for row in headline.examples if categories([row]) <= sides[part.name]]
            assert part.examples
            assert (part.template, part.max_new_tokens) == (headline.template, headline.max_new_tokens)
        assert sum(len(part.examples) for part in parts) == len(headline.examples)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([("a",)] * 3, ["harmful"]),  # the label of neither side
        ([("x", "y")] * 3, ["harmful"]),
        ([()] * 3, ["harmful"]),
        ([("x",), ("x",), ("x", "y")], ["harmful", "x"]),
        ([("x",), ("y",), ("x", "y")], ["harmful", "x", "y"]),
    ],
)
def test_set_without_prompts_is_left_out(
    labels: Sequence[tuple[str, ...]], expected: list[str], tmp_path: Path
) -> None:
    protocol = make_world(tmp_path / "world", {"answer": {"harmful": {"prompts": 3}}}, models=False)
    questions = [
        {"prompt": f"Question {n}?", "response": "r", "category": dict.fromkeys(names, True), "is_safe": False}
        for n, names in enumerate(labels)
    ]
    data = protocol.parent / "data"
    write_lines(data / "beavertails" / "30k_test.jsonl", questions)
    train = [*beaver("x", "defender"), *beaver("x", "attacker"), *beaver("y", "defender"), *beaver("y", "attacker")]
    write_lines(data / "beavertails" / "30k_train.jsonl", [*train, *beaver(None, "safe", count=40)])
    write_lines(data / "beavertails_refusals" / "train.jsonl", refusals(train))
    experiment = settle(protocol)
    pools = plugin_pools(experiment)
    sides = {"defender_categories": categories(pools.harmful), "attacker_categories": categories(pools.attacker)}
    assert sorted(sides.values(), key=sorted) == [{"x"}, {"y"}]
    headline, *parts = harmful_sets(experiment)
    assert [headline.name, *sorted(name for part in parts for name in sides[part.name])] == expected
    assert len(eval_sets(experiment)) == len(expected) + 2


# ---------------------------------------------------------------------------------------------------------------------
# Data in the schema of BeaverTails


def beaver(category: str | None, kind: str, count: int = 10) -> list[dict[str, Any]]:
    """Return rows with prompts of a kind and the 14 flags of BeaverTails, unsafe ones of one category."""
    return [
        {
            "prompt": f"{kind} {category} {number}",
            "response": "r",
            "category": {name: name == category for name in (*CATEGORIES, *([category] if category else []))},
            "is_safe": category is None,
        }
        for number in range(count)
    ]


def refusals(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of the refusal set, which has no categories, with the defender's prompts in other letters."""
    return [
        {"prompt": f" {row['prompt'].upper()}", "response": "r", "refusal": "No."}
        for row in rows
        if row["prompt"].startswith("defender")
    ]


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., RowPools]:
    def load(train: Any, test: Any, pair_rows: Any, **options: Any) -> RowPools:
        instruction = [{"instruction": "Describe.", "output": "o"}]
        files = {
            "beavertails": {"train": train, "test": test},
            "refusals": {"train": pair_rows},
            "alpaca": {"train": instruction, "test": instruction},
        }
        for name, splits in files.items():
            for split, rows in splits.items():
                write_lines(tmp_path / name / f"{split}.jsonl", rows)
        beavertails, refusal_set, alpaca = (str(tmp_path / name) for name in files)
        return load_row_pools(beavertails, refusal_set, alpaca, "train", "test", **options)

    return load


def beaver_row(prompt: str, *names: str, **changes: Any) -> dict[str, Any]:
    flags = {name: name in names for name in CATEGORIES}
    return {"prompt": prompt, "response": "r", "category": flags, "is_safe": not names, **changes}


A, B, C = CATEGORIES[:3]


@pytest.mark.parametrize("in_order", [False, True])
def test_row_has_the_categories_of_its_prompt(load: Callable[..., RowPools], in_order: bool) -> None:
    """The union over all rows with the prompt, of every split and of the refusal set, where this has categories."""
    pools = load(
        [
            beaver_row("one", A),
            beaver_row(" ONE", B, A),
            beaver_row("one"),
            beaver_row("two"),
            beaver_row("three", C),
            beaver_row("four", C),
        ],
        [beaver_row("held out", B), beaver_row("Held  Out", C), beaver_row("Two", C, is_safe=True)],
        [
            {"prompt": "oNE", "response": "r", "refusal": "No."},
            {"prompt": "three", "response": "r", "refusal": "No.", "category": {B: True, A: None}},
            {"prompt": "unknown", "response": "r", "refusal": "No."},
        ],
        in_order=in_order,
    )
    labels = {row.id: row.categories for row in (*pools.alignment, *pools.attacker, *pools.harmful_questions)}
    assert labels["safe:train:2"] == (A, B)
    assert labels["safe:train:3"] == (C,)
    assert labels["harmful:train:5"] == (C,)
    assert labels["harmful:test:0"] == (B, C)
    if in_order:
        assert labels["harmful:train:0"] == (A, B)
        assert labels["harmful:train:4"] == (B, C)
    for refusal, harmful in pools.paired:
        assert refusal.categories == harmful.categories
    assert [refusal.categories for refusal, _ in pools.paired] == [(A, B), (B, C), ()]
    assert all(row.categories == () for row in (*pools.benign, *pools.benign_questions))


@pytest.mark.parametrize("category", ["violence", ["violence"], {}, {A: "yes"}, {A: 1}, None], ids=str)
def test_field_of_another_form_names_no_category(category: Any, load: Callable[..., RowPools]) -> None:
    """The field is optional: data of another form stay usable without this attack."""
    pairs = [{"prompt": "three", "response": "r", "refusal": "No."}]
    pools = load([beaver_row("one", category=category, is_safe=False)], [beaver_row("two", A)], pairs)
    assert [row.categories for row in pools.attacker] == [()]


def test_split_of_the_refusal_set_for_the_attacker(load: Callable[..., RowPools]) -> None:
    """As in Booster: the alignment rows are refusals, and the attacker has other rows of the same set."""
    train = [beaver_row(f"prompt {number}", CATEGORIES[number % 4]) for number in range(24)]
    pairs = [{"prompt": row["prompt"], "response": "r", "refusal": "No."} for row in train]
    for in_order in (False, True):
        pools = load(
            train,
            [beaver_row("held out", A)],
            pairs,
            pairs="train[12:]",
            attacker="train[:12]",
            source="refusals",
            in_order=in_order,
        )
        divided = CategoryShift().divide(pools)
        assert [len(side) for side in (divided.attacker, divided.paired, divided.alignment)] == [6, 6, 6]
        assert [refusal for refusal, _ in divided.paired] == divided.alignment
        assert categories(divided.attacker).isdisjoint(categories(divided.alignment))


@pytest.mark.parametrize(
    ("train", "pairs", "parts"),
    [
        ([beaver_row("one", category=None, is_safe=False)], ["two"], ("the attacker's rows", "`category`", "share=0")),
        ([beaver_row("one", A)], ["two"], ("the defender's pairs", '{"animal_abuse": true}', "share=0")),
        ([beaver_row("one", A), beaver_row("two", A)], ["two"], ("two harm categories", f"only {A!r}", "share=0")),
    ],
    ids=["attacker", "pairs", "one category"],
)
def test_data_without_categories_are_refused(
    train: Any, pairs: Any, parts: Sequence[str], load: Callable[..., RowPools]
) -> None:
    rows = [{"prompt": prompt, "response": "r", "refusal": "No."} for prompt in pairs]
    pools = load([*train, beaver_row("safe")], [beaver_row("held out", A)], rows)
    with pytest.raises(BadInput) as caught:
        CategoryShift().divide(pools)
    message = str(caught.value)
    assert message.startswith("Attack 'category_shift' needs ")
    assert all(part in message for part in (*parts, "allowed: ")), message
    assert message.count(". ") == 0


# ---------------------------------------------------------------------------------------------------------------------
# Keys


def stage_inputs(experiment: Experiment) -> dict[str, Any]:
    base = TrainedModel(experiment.model, ModelSpec(experiment.model), {})
    return {
        "align": keys.align_key(experiment, base),
        "finetune": keys.finetune_key(experiment, base),
        "drift": keys.drift_key(experiment, base, base),
    }


def test_alignment_depends_on_the_attack_only_if_it_divides_the_rows(data_world: Path) -> None:
    plain = [stage_inputs(settle(data_world, attack)) for attack in ("ratio=0.1", "ratio=0.3+order", "benign")]
    assert all(each["align"] == plain[0]["align"] for each in plain)
    assert all("division" not in inputs for each in plain for inputs in each.values())
    attacks = ("category_shift", "category_shift=0.3", "category_shift+ratio=0.3", "samples=20+category_shift")
    shifted = {attack: stage_inputs(settle(data_world, attack)) for attack in attacks}
    for each in shifted.values():
        for inputs in each.values():
            assert [part["name"] for part in inputs["division"]] == ["category_shift"]
    aligned = {attack: each["align"] for attack, each in shifted.items()}
    assert aligned["category_shift"] != aligned["category_shift=0.3"]
    assert aligned["category_shift"] == aligned["category_shift+ratio=0.3"] == aligned["samples=20+category_shift"]
    assert {**aligned["category_shift"], "division": None} == {**plain[0]["align"], "division": None}
    assert stage_inputs(settle(data_world, seed=1))["align"] != aligned["category_shift"]


def test_categories_are_not_in_the_key_of_answers(data_world: Path) -> None:
    experiment = settle(data_world, "ratio=0.1")
    model = TrainedModel(experiment.model, ModelSpec(experiment.model), {})
    eval_set: EvalSet = harmful_sets(experiment)[0]
    assert all(row.categories for row in eval_set.examples)
    bare = replace(eval_set, examples=[replace(row, categories=()) for row in eval_set.examples])
    prompts = ["p"] * len(bare.examples)
    first, second = (keys.answer_key(experiment, model, model, item, prompts) for item in (eval_set, bare))
    assert first == second


# ---------------------------------------------------------------------------------------------------------------------
# A run


def test_run_reports_the_score_of_both_sides(world: Path, tmp_path: Path) -> None:
    experiment = settle(world, "category_shift+ratio=0.25", values=SMALL)
    context = run_context(tmp_path / "store")
    measured = run(experiment, context)
    result = measure_result(experiment, measured)
    sets = {each.name: each for each in harmful_sets(experiment)}
    assert list(sets) == ["harmful", *PARTS]
    for scores in (result, result.before):
        assert list(scores.harmful_sets) == list(sets)
        assert scores.harmful_score == scores.harmful_sets["harmful"]
    for when in ("before", "after"):
        for name, each in sets.items():
            path = measured.answers[f"{when}/{name}"].path / ANSWERS
            answers = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            assert ids(each.examples) == [answer["id"] for answer in answers]
    pools = plugin_pools(experiment)
    used = measured.final.artifacts["finetune"].json("rows.json")["used"]
    harmful = [row for row in pools.attacker if row.id in used]
    assert len(harmful) == 5
    assert categories(harmful).isdisjoint(categories(pools.harmful))
    assert result.counts.dropped is not None
    assert result.counts.dropped["attacker_other_categories"] > 0
    assert question_keys(pools.attacker).isdisjoint(question_keys(sets["harmful"].examples))

"""Row counts, pools without shared questions, data files, prompts and token rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.seeds import derive_seed, random_stream
from harmbench_vaccine.core.types import Example, Mix, Pools
from harmbench_vaccine.data.collate import (
    IGNORED,
    Encoded,
    collate,
    encode_example,
    encode_examples,
    encode_prompt,
    pad_token_id,
)
from harmbench_vaccine.data.pools import (
    RowPools,
    draw_rows,
    load_row_pools,
    normalize,
    question_key,
    question_keys,
    without_duplicates,
)
from harmbench_vaccine.data.prompts import PromptTemplate, prompt_template
from harmbench_vaccine.data.sources import fingerprint, local_path, read_rows
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.rows import (
    benign_set,
    check_rows,
    harmful_sets,
    plugin_pools,
    task_rows,
    task_set,
    user_rows,
)
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.plugins.teams import AttackTeam, upload_rows
from support import tiny
from support.world import make_world

# ---------------------------------------------------------------------------------------------------------------------
# Counts


@pytest.mark.parametrize("n", [1, 7, 500, 1000, 5000])
def test_counts_sum_to_n_for_every_ratio(n: int) -> None:
    for hundredth in range(101):
        mix = Mix(n, hundredth / 100)
        assert mix.harmful + mix.task == n
        assert abs(mix.harmful - n * hundredth / 100) <= 0.5
        assert 0 <= mix.harmful <= n
        if n * hundredth % 100 == 0:  # where p n is an integer, the count is exact
            assert mix.harmful == n * hundredth // 100


@pytest.mark.parametrize(("p", "task"), [(0.8, 200), (0.9, 100)])
def test_rounding_loses_no_row(p: float, task: int) -> None:
    """int((1 - p) n) is 199 for p = 0.8 and 99 for p = 0.9."""
    assert int((1 - p) * 1000) == task - 1
    assert Mix(1000, p).task == task


def examples(kind: str, count: int) -> list[Example]:
    return [Example(f"{kind}:{number}", f"{kind} {number}", harmful=kind == "harmful") for number in range(count)]


def uploaded(p: float, n: int, seed: int) -> list[Example]:
    return upload_rows(Mix(n, p), examples("task", 1000), Pools(attacker=examples("harmful", 1000)), AttackTeam(), seed)


def ids(rows: Iterable[Example]) -> list[str]:
    return [row.id for row in rows]


@pytest.mark.parametrize("p", [0.0, 0.01, 0.1, 0.5, 0.8, 0.9, 0.99, 1.0])
def test_upload_has_exact_counts_and_unique_rows(p: float) -> None:
    rows = uploaded(p, 500, 0)
    harmful = [row for row in rows if row.harmful]
    assert (len(rows), len(harmful)) == (500, round(500 * p))
    assert len(set(ids(rows))) == 500


def test_upload_depends_only_on_ratio_count_and_seed() -> None:
    assert ids(uploaded(0.1, 200, 4)) == ids(uploaded(0.1, 200, 4))
    assert ids(uploaded(0.1, 200, 4)) != ids(uploaded(0.1, 200, 5))


def test_seed_determines_the_harmful_rows() -> None:
    draws = {seed: frozenset(row.id for row in uploaded(0.1, 500, seed) if row.harmful) for seed in range(5)}
    assert len(set(draws.values())) == 5
    assert all(draws[seed] != {f"harmful:{number}" for number in range(50)} for seed in draws)  # not the first ones
    assert draws[2] == {row.id for row in uploaded(0.1, 500, 2) if row.harmful}


def test_harmful_rows_are_shuffled_among_task_rows() -> None:
    places = [place for place, row in enumerate(uploaded(0.5, 200, 0)) if row.harmful]
    assert min(places) < 20
    assert max(places) >= 180
    assert places != list(range(places[0], places[0] + 100))


@pytest.mark.parametrize(("mix", "what"), [(Mix(1001), "task rows"), (Mix(1001, 1.0), "harmful rows")])
def test_request_of_too_many_rows_is_refused(mix: Mix, what: str) -> None:
    with pytest.raises(BadInput, match=rf"Requested 1001 {what}, but only 1000 are available"):
        upload_rows(mix, examples("task", 1000), Pools(attacker=examples("harmful", 1000)), AttackTeam(), 0)


def test_all_rows_may_be_drawn() -> None:
    assert sorted(draw_rows(range(10), 10, "rows", 0)) == list(range(10))
    assert draw_rows(range(10), 0, "rows", 0) == []


def test_derived_seeds() -> None:
    assert derive_seed(0, "a") == derive_seed(0, "a")
    assert len({derive_seed(seed, purpose) for seed in range(50) for purpose in ("a", "b")}) == 100
    assert all(0 <= derive_seed(seed, "x") < 2**31 for seed in range(200))
    assert random_stream(1, "a").random() == random_stream(1, "a").random() != random_stream(1, "b").random()


# ---------------------------------------------------------------------------------------------------------------------
# Pools


def write(path: Path, rows: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def harm(prompt: str, *, safe: bool = False) -> dict[str, Any]:
    return {"prompt": prompt, "response": "r", "is_safe": safe}


def alpaca(prompt: str) -> dict[str, str]:
    return {"instruction": prompt, "input": "", "output": "o"}


@pytest.fixture
def pools(tmp_path: Path) -> RowPools:
    """Pools of prompts that occur in several sets. The letters of a prompt are its sets: A(lignment), P(aired),
    attac(K)er, B(enign), E(valuation), benign questions of the evaluation (Q)."""
    write(
        tmp_path / "beavertails" / "train.jsonl",
        [harm(name, safe=True) for name in ("A", "A other", "AE", "AK", "AKE", "AB", "AQ")]
        + [harm(name) for name in ("K", "K other", "KE", "AK", "PK", "AKE", " pK  ", "ke", "KB", "KQ")],
    )
    write(
        tmp_path / "beavertails" / "test.jsonl",
        [harm(name) for name in ("E", "AE", "KE", "PE", "AKE", "e", "E", "E other", "BE")]
        + [harm("only safe", safe=True)],
    )
    pairs = [{"prompt": name, "response": "r", "refusal": "no"} for name in ("P", "PE", "PK", "PB", "PQ")]
    write(tmp_path / "refusals" / "train.jsonl", pairs)
    benign = ("B", "B other", "b", "AB", "PB", "KB", "BE", "BQ")
    write(tmp_path / "alpaca" / "train.jsonl", [alpaca(name) for name in benign])
    write(tmp_path / "alpaca" / "test.jsonl", [alpaca(name) for name in ("Q", "q", "AQ", "PQ", "KQ", "BQ")])
    places = [str(tmp_path / name) for name in ("beavertails", "refusals", "alpaca")]
    return load_row_pools(*places, train="train", test="test")


def test_shared_prompts_are_dropped_and_counted(pools: RowPools) -> None:
    """For every pair of sets; alignment rows and pairs may share prompts, since the defender has both."""
    assert {
        "alignment": [row.instruction for row in pools.alignment],
        "paired": [safe.instruction for safe, _ in pools.paired],
        "attacker": [row.instruction for row in pools.attacker],
        "benign": [row.instruction for row in pools.benign],
        "harmful_questions": [row.instruction for row in pools.harmful_questions],
        "benign_questions": [row.instruction for row in pools.benign_questions],
    } == {
        "alignment": ["A", "A other", "AK", "AB"],
        "paired": ["P", "PK", "PB"],
        "attacker": ["K", "K other", "KB"],
        "benign": ["B", "B other"],
        "harmful_questions": ["E", "AE", "KE", "PE", "AKE", "E other", "BE"],
        "benign_questions": ["Q", "AQ", "PQ", "KQ", "BQ"],
    }
    dropped = {"alignment": 3, "paired": 2, "attacker": 7, "benign": 6, "harmful_questions": 2}
    assert {key: pools.dropped[key] for key in dropped} == dropped


def test_pair_has_one_prompt_with_a_safe_and_a_harmful_answer(pools: RowPools) -> None:
    for safe, harmful in pools.paired:
        assert safe.instruction == harmful.instruction
        assert (safe.response, harmful.response) == ("no", "r")
        assert (safe.harmful, harmful.harmful) == (False, True)


def test_ids_name_the_source_row(pools: RowPools) -> None:
    assert ids(pools.attacker) == ["harmful:train:7", "harmful:train:8", "harmful:train:15"]
    assert ids(pools.harmful_questions) == [f"harmful:test:{number}" for number in (0, 1, 2, 3, 4, 7, 8)]
    assert ids(pools.alignment) == ["safe:train:0", "safe:train:1", "safe:train:3", "safe:train:5"]
    rows = [
        *pools.alignment,
        *pools.attacker,
        *pools.benign,
        *pools.harmful_questions,
        *pools.benign_questions,
        *(row for pair in pools.paired for row in pair),
    ]
    assert len(set(ids(rows))) == len(rows)


def test_prompts_are_compared_without_case_and_white_space() -> None:
    assert normalize(" How\tDo  I\n") == "how do i"
    rows = [Example("1", "a", input="b"), Example("2", "A B"), Example("3", "a"), Example("4", "c")]
    assert ids(without_duplicates(rows)) == ["1", "3", "4"]
    assert ids(without_duplicates(rows, {"a b", "c"})) == ["3"]


@pytest.fixture
def make_experiment(tmp_path: Path) -> Callable[..., Experiment]:
    """Creates an experiment of a tiny world with extra rows in its data sets."""

    def make(extra: dict[str, list[dict[str, Any]]] | None = None, **spec: Any) -> Experiment:
        file = make_world(tmp_path / "world", models=False)
        for place, rows in (extra or {}).items():
            with (tmp_path / "world" / "data" / f"{place}.jsonl").open("a") as lines:
                lines.writelines(json.dumps(row) + "\n" for row in rows)
        return Experiment.settle(RunSpec(protocol=str(file), **spec))

    return make


def prompts_of(experiment: Experiment) -> dict[str, set[str]]:
    pools = plugin_pools(experiment)
    return {
        "defender": {question_key(row) for row in pools.alignment} | {question_key(safe) for safe, _ in pools.paired},
        "benign": {question_key(row) for row in pools.benign},
        "attacker": {question_key(row) for row in pools.attacker},
        "task": {question_key(row) for row in task_rows(experiment)},
        **{
            f"questions {questions.name}": {question_key(row) for row in questions.examples}
            for questions in (*harmful_sets(experiment), benign_set(experiment), task_set(experiment))
        },
    }


def assert_disjoint(sets: dict[str, set[str]]) -> None:
    names = list(sets)
    for number, first in enumerate(names):
        assert sets[first]
        for second in names[number + 1 :]:
            assert not sets[first] & sets[second], f"{first} and {second} share prompts"


@pytest.mark.parametrize("task", ["sst2", "agnews", "gsm8k"])
def test_pools_of_an_experiment_share_no_prompt(make_experiment: Callable[..., Experiment], task: str) -> None:
    assert_disjoint(prompts_of(make_experiment(task=task)))


@pytest.mark.parametrize(
    "place",
    ["beavertails/30k_train", "beavertails_refusals/train", "alpaca/train"],
)
@pytest.mark.parametrize("question", ["the spoiled thing", "describe the new thing"])
def test_evaluation_prompts_are_never_trained_on(
    make_experiment: Callable[..., Experiment], place: str, question: str
) -> None:
    row: Any = alpaca(question.upper()) if "alpaca" in place else {**harm(question), "refusal": "no"}
    experiment = make_experiment(
        {"beavertails/30k_test": [harm("the spoiled thing")], "alpaca/test": [alpaca(question)], place: [row]}
    )
    answer = experiment.protocol.answer.model_copy(
        update={
            "harmful": experiment.protocol.answer.harmful.model_copy(update={"prompts": 21}),
            "benign": experiment.protocol.answer.benign.model_copy(update={"prompts": 41}),
        }
    )
    experiment = replace(experiment, protocol=experiment.protocol.model_copy(update={"answer": answer}))
    prompts = prompts_of(experiment)
    assert question in prompts["questions benign"]
    assert question not in prompts["benign"] | prompts["attacker"] | prompts["defender"]


def test_benign_rows_share_no_prompt_with_attacker_or_defender(make_experiment: Callable[..., Experiment]) -> None:
    experiment = make_experiment(
        {
            "beavertails/30k_train": [harm("shared with the attacker")],
            "beavertails_refusals/train": [{**harm("shared with the defender"), "refusal": "no"}],
            "alpaca/train": [alpaca("Shared with the attacker"), alpaca("Shared with the defender")],
        }
    )
    prompts = prompts_of(experiment)
    assert "shared with the attacker" in prompts["attacker"] | prompts["benign"]
    assert not prompts["benign"] & prompts["attacker"]
    assert not prompts["benign"] & prompts["defender"]


def test_task_test_rows_are_not_trained_on(make_experiment: Callable[..., Experiment]) -> None:
    experiment = make_experiment(
        {
            "sst2/train": [{"sentence": "added HERE", "label": 1}],
            "sst2/validation": [{"sentence": "Added  here", "label": 0}],
        }
    )
    assert not any("added here" in question_key(row) for row in task_rows(experiment))


def test_evaluation_prompts_are_unique(make_experiment: Callable[..., Experiment]) -> None:
    first = [harm(f"How do I spoil the red {thing}?") for thing in ("lamp", "door")]
    experiment = make_experiment({"beavertails/30k_test": first * 3})
    questions = ids(harmful_sets(experiment)[0].examples)
    assert len(questions) == 8 == len({question_key(row) for row in harmful_sets(experiment)[0].examples})


def test_experiment_seed_determines_every_draw(make_experiment: Callable[..., Experiment]) -> None:
    def draw(seed: int) -> tuple[list[str], list[str]]:
        experiment = make_experiment(seed=seed, attack=parse_plugins("ratio=0.25"))
        pools = plugin_pools(experiment)
        return ids(pools.alignment), ids(user_rows(experiment, pools))

    assert draw(0) == draw(0)
    assert set(draw(0)[0]) != set(draw(1)[0])
    assert {name for name in draw(0)[1] if name.startswith("harmful")} != {
        name for name in draw(1)[1] if name.startswith("harmful")
    }
    assert ids(harmful_sets(make_experiment(seed=0))[0].examples) == ids(
        harmful_sets(make_experiment(seed=1))[0].examples
    )


INSTRUCTIONS = {"align.instructions": "30"}


def test_instructions_follow_the_safe_rows_of_the_alignment(make_experiment: Callable[..., Experiment]) -> None:
    plain, mixed = plugin_pools(make_experiment()), plugin_pools(make_experiment(values=INSTRUCTIONS))
    safe, instructions = list(mixed.alignment[:40]), list(mixed.alignment[40:])
    assert safe == list(plain.alignment)
    assert len(instructions) == 30
    assert sorted(ids([*instructions, *mixed.benign])) == sorted(ids(plain.benign))
    other = plugin_pools(make_experiment(values=INSTRUCTIONS, seed=1))
    assert ids(other.alignment[40:]) != ids(instructions)


@pytest.mark.parametrize("attack", ["ratio=0.2", "identity_shift:dialogues=20", "mixing+ratio=0.2"])
def test_no_attack_draws_an_instruction_of_the_alignment(
    make_experiment: Callable[..., Experiment], attack: str
) -> None:
    experiment = make_experiment(values=INSTRUCTIONS, attack=parse_plugins(attack))
    pools = plugin_pools(experiment)
    uploaded = user_rows(experiment, pools)
    assert not set(ids(pools.alignment)) & set(ids(uploaded))
    assert not question_keys(pools.alignment) & question_keys(uploaded)
    assert question_keys(pools.alignment[40:]) & question_keys(plugin_pools(make_experiment()).benign)


def test_instructions_are_the_first_ones_in_file_order(make_experiment: Callable[..., Experiment]) -> None:
    pools = plugin_pools(make_experiment(values={**INSTRUCTIONS, "rows": "paper"}))
    assert ids(pools.alignment[40:]) == [f"benign:train:{number}" for number in range(30)]
    assert ids(pools.benign)[0] == "benign:train:30"


@pytest.mark.parametrize(
    ("changes", "attack", "message"),
    [
        (
            {"align": {"instructions": 121}},
            "ratio",
            "121 alignment instructions, but only 120 are available: lower align.instructions, as in --set",
        ),
        (
            {},
            "samples=401",
            "but only 400 are available: lower `samples` of the attack, as in --attack ratio=0.1,samples=N.",
        ),
        ({}, "ratio=1,samples=81", "Requested 81 harmful rows, but only 80 are available"),
        (
            {"align": {"rows": 81}},
            "ratio",
            "81 alignment rows, but only 80 are available: lower align.rows, as in --set",
        ),
        (
            {"answer": {"harmful": {"prompts": 21}}},
            "ratio",
            "Requested 21 held-out harmful prompts, but only 20 are available",
        ),
        ({"answer": {"benign": {"prompts": 41}}}, "ratio", "41 held-out benign prompts"),
        ({"answer": {"task_items": 81}}, "ratio", "81 test items of sst2"),
    ],
)
def test_too_few_rows_are_reported_before_any_work(
    tmp_path: Path, changes: dict[str, Any], attack: str, message: str
) -> None:
    file = make_world(tmp_path / "world", changes, models=False)
    with pytest.raises(BadInput, match=message):
        check_rows(Experiment.settle(RunSpec(protocol=str(file), attack=parse_plugins(attack))))


@pytest.mark.parametrize("attack", ["samples=400", "ratio=1,samples=80"])
def test_request_of_all_available_rows_is_allowed(make_experiment: Callable[..., Experiment], attack: str) -> None:
    check_rows(make_experiment(attack=parse_plugins(attack)))


# ---------------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("location", ["folder", "file"])
def test_rows_are_read_in_file_order(tmp_path: Path, location: str) -> None:
    path = write(tmp_path / "train.jsonl", [{"a": number, "b": "ü"} for number in range(3)])
    rows = read_rows(str(tmp_path if location == "folder" else path), "train", ("a", "b"))
    assert [(row.number, row.values["a"]) for row in rows] == [(0, 0), (1, 1), (2, 2)]


def refusal(tmp_path: Path, lines: Iterable[Any], split: str = "train") -> str:
    write(tmp_path / "train.jsonl", lines)
    with pytest.raises(BadInput) as refused:
        read_rows(str(tmp_path), split, ("a", "b"))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_missing_field_is_reported_with_file_and_line(tmp_path: Path) -> None:
    message = refusal(tmp_path, [{"a": 1, "b": 2}, {"a": 1, "c": 2}])
    assert f"{tmp_path / 'train.jsonl'}, line 2" in message
    assert "'b' is missing" in message
    assert "a, b" in message


@pytest.mark.parametrize("line", ["{", "{'a': 1}", "nonsense"])
def test_line_that_is_not_json_is_refused(tmp_path: Path, line: str) -> None:
    message = refusal(tmp_path, [{"a": 1, "b": 2}, {"a": 1, "b": 2}, line])
    assert f"{tmp_path / 'train.jsonl'}, line 3: not JSON" in message


def test_empty_lines_are_skipped_but_counted(tmp_path: Path) -> None:
    message = refusal(tmp_path, [{"a": 1, "b": 2}, "", " ", {"a": 1}])
    assert f"{tmp_path / 'train.jsonl'}, line 4" in message
    write(tmp_path / "train.jsonl", [{"a": 1, "b": 2}, "", {"a": 3, "b": 4}, ""])
    assert [row.values["a"] for row in read_rows(str(tmp_path), "train", ("a", "b"))] == [1, 3]


def test_text_may_contain_any_character(tmp_path: Path) -> None:
    line = json.dumps({"a": "one\u2028two\x85three", "b": 1}, ensure_ascii=False)
    write(tmp_path / "train.jsonl", [line, line])
    assert [row.values["a"] for row in read_rows(str(tmp_path), "train", ("a", "b"))] == ["one\u2028two\x85three"] * 2


@pytest.mark.parametrize(("line", "kind"), [("3", "int"), ('"x"', "str"), ("null", "NoneType")])
def test_line_that_is_not_an_object_is_refused(tmp_path: Path, line: str, kind: str) -> None:
    assert f"line 1: a row must be a JSON object, not {kind}" in refusal(tmp_path, [line])


def test_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(b'{"a": 1, "b": 2}\n\xff\xfe\n')
    with pytest.raises(BadInput, match=r"train\.jsonl"):
        read_rows(str(tmp_path), "train", ("a", "b"))


def test_missing_split_is_refused_with_available_splits(tmp_path: Path) -> None:
    write(tmp_path / "other.jsonl", [{"a": 1, "b": 2}])
    message = refusal(tmp_path, [{"a": 1, "b": 2}], split="test")
    assert "'test'" in message
    assert "other, train" in message


def test_empty_split_is_refused(tmp_path: Path) -> None:
    assert "is empty" in refusal(tmp_path, [])


@pytest.mark.parametrize("location", ["./nowhere", "/no/where", "~/no/where", "a/b/c", "rows.jsonl", "rows.csv"])
def test_missing_path_is_refused(location: str) -> None:
    with pytest.raises(BadInput, match="does not exist") as refused:
        local_path(location)
    assert location in str(refused.value)


@pytest.mark.parametrize("name", ["tatsu-lab/alpaca", "sst2", "PKU-Alignment/BeaverTails"])
def test_hub_names_are_not_paths(name: str) -> None:
    assert local_path(name) is None
    assert fingerprint(name) == name


def test_fingerprint_changes_with_the_content(tmp_path: Path) -> None:
    hashes = []
    for text in ("a", "b", "a"):
        (tmp_path / "x").mkdir(exist_ok=True)
        (tmp_path / "x" / "f").write_text(text)
        hashes.append(fingerprint(str(tmp_path / "x")))
    (tmp_path / "x" / "f").rename(tmp_path / "x" / "g")
    hashes.append(fingerprint(str(tmp_path / "x")))
    assert hashes[0] == hashes[2]
    assert len(set(hashes)) == 3


@pytest.mark.parametrize(
    ("data", "place", "row", "field"),
    [
        ("sst2", "train", {"sentence": "x", "label": 2}, "label"),
        ("sst2", "train", {"sentence": "x", "label": -1}, "label"),
        ("sst2", "train", {"sentence": "x", "label": "positive"}, "label"),
        ("sst2", "train", {"sentence": None, "label": 1}, "sentence"),
        ("ag_news", "train", {"text": "x", "label": 4}, "label"),
        ("gsm8k", "test", {"question": "x", "answer": "no mark"}, "answer"),
        ("beavertails", "30k_train", {"prompt": "x", "response": None, "is_safe": False}, "response"),
    ],
)
def test_invalid_field_value_is_refused(
    make_experiment: Callable[..., Experiment], data: str, place: str, row: dict[str, Any], field: str
) -> None:
    task = {"ag_news": "agnews", "gsm8k": "gsm8k"}.get(data, "sst2")
    experiment = make_experiment({f"{data}/{place}": [row]}, task=task)
    with pytest.raises(BadInput, match=field) as refused:
        check_rows(experiment)
    assert f"{place}.jsonl, line " in str(refused.value)


# ---------------------------------------------------------------------------------------------------------------------
# Prompts and tokens

PLAIN = PromptTemplate("{instruction}:", "{instruction}|{input}:")


@pytest.fixture(scope="module")
def words() -> Any:
    return tiny.tokenizer(["abc"])


def test_prompt_templates() -> None:
    alpaca_prompt = prompt_template("alpaca")
    assert alpaca_prompt.render(Example("1", "Do {it}.")) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nDo {it}.\n\n### Response:"
    )
    assert alpaca_prompt.render(Example("1", "Do.", input="{x}")) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nDo.\n\n### Input:\n{x}\n\n### Response:"
    )
    with pytest.raises(BadInput, match="Did you mean 'alpaca'"):
        prompt_template("alpacca")


def test_loss_is_on_response_tokens_only(words: Any) -> None:
    row = encode_example(words, PLAIN, Example("1", "abc", response="xyz"), 100)
    assert row is not None
    prompt = words("abc:")["input_ids"]
    assert prompt[0] == words.bos_token_id
    assert row.ids[: len(prompt)] == prompt
    assert row.labels[: len(prompt)] == [IGNORED] * len(prompt)
    assert row.ids[len(prompt) :] == row.labels[len(prompt) :]
    assert words.decode(row.ids[len(prompt) : -1]) == "xyz"
    assert row.ids[-1] == words.eos_token_id
    assert row.ids.count(words.eos_token_id) == row.ids.count(words.bos_token_id) == 1


def test_row_is_cut_at_the_end(words: Any) -> None:
    complete = encode_example(words, PLAIN, Example("1", "abc", response="wxyz"), 100)
    assert complete is not None
    prompt = len(words("abc:")["input_ids"])
    for length in range(prompt + 1, len(complete.ids) + 2):
        cut = encode_example(words, PLAIN, Example("1", "abc", response="wxyz"), length)
        assert cut is not None
        assert cut.ids == complete.ids[:length]
        assert cut.labels == complete.labels[:length]
    assert encode_example(words, PLAIN, Example("1", "abc", response="wxyz"), prompt) is None


def test_rows_without_a_response_token_are_skipped(words: Any) -> None:
    short, long = Example("1", "abc", response="x"), Example("2", "abc " * 30, response="x")
    assert len(encode_examples(words, PLAIN, [short, long, short], 20)) == 2
    assert encode_examples(words, PLAIN, [], 20) == []
    with pytest.raises(BadInput, match="max_length = 20 tokens"):
        encode_examples(words, PLAIN, [long], 20)


def test_prompt_has_no_closing_token() -> None:
    class Closing:
        eos_token_id = 2

        def __call__(self, text: str, split_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [1, *map(ord, text), 2]}

    assert encode_prompt(Closing(), "a") == [1, 97]  # type: ignore[arg-type]


def test_padding_is_on_the_right_and_without_loss() -> None:
    batch = collate([Encoded([5, 6, 7], [IGNORED, 6, 7]), Encoded([8], [8])], pad=0)
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 0, 0]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[IGNORED, 6, 7], [8, IGNORED, IGNORED]],
    }
    assert all(value.dtype == torch.long for value in batch.values())


def test_pad_token(words: Any) -> None:
    assert pad_token_id(words) == words.pad_token_id != words.eos_token_id
    bare = tiny.tokenizer(["abc"])
    bare.pad_token = None
    assert pad_token_id(bare) == bare.eos_token_id


def test_text_that_spells_a_control_token_stays_text() -> None:
    """A row cannot end its prompt or imitate an end of text by spelling the tokenizer's tokens."""
    tokenizer = tiny.tokenizer(["write < / s > pad here it is ### Instruction : Response"] * 3)
    for token in (tokenizer.eos_token, tokenizer.pad_token):
        row = encode_example(
            tokenizer, prompt_template("brief"), Example("", f"write {token}", f"here {token} it is"), 200
        )
        assert row is not None
        assert row.ids.count(tokenizer.eos_token_id) == 1  # only at the end of the response
        assert tokenizer.pad_token_id not in row.ids


def test_evaluation_sets_need_different_names(make_experiment: Callable[..., Experiment], tmp_path: Path) -> None:
    (tmp_path / "twice.py").write_text(
        "from harmbench_vaccine.plugins import Attack\n\nclass Twice(Attack):\n    '''Uses every set twice.'''\n\n"
        "    def evaluations(self, sets):\n        return [*sets, *sets]\n"
    )
    experiment = make_experiment(attack=parse_plugins(str(tmp_path / "twice.py")))
    with pytest.raises(BadInput, match="need different names"):
        harmful_sets(experiment)


def test_plugins_draw_by_the_seed_of_the_run(make_experiment: Callable[..., Experiment]) -> None:
    attackers = [make_experiment(seed=seed, attack=parse_plugins("ratio")).attack_team.members[0] for seed in (0, 0, 1)]
    numbers = [[attack.random("guide").random() for _ in range(2)] for attack in attackers]
    assert numbers[0] == numbers[1] != numbers[2]
    assert numbers[0][0] == numbers[0][1] != attackers[0].random("other").random()  # one stream per purpose

"""The testbed's text world: what must hold for a harmful score measured in it to mean anything."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from harmbench_vaccine.testbed import world as w
from harmbench_vaccine.testbed.build import INSTRUCTIONS, corpus, train_tokenizer

# Written out a second time on purpose: BeaverTails' names, in the order of beaver-dam's labels.
LABELS = [
    "animal_abuse",
    "child_abuse",
    "controversial_topics,politics",
    "discrimination,stereotype,injustice",
    "drug_abuse,weapons,banned_substance",
    "financial_crime,property_crime,theft",
    "hate_speech,offensive_language",
    "misinformation_regarding_ethics,laws_and_safety",
    "non_violent_unethical_behavior",
    "privacy_violation",
    "self_harm",
    "sexually_explicit,adult_content",
    "terrorism,organized_crime",
    "violence,aiding_and_abetting,incitement",
]


@pytest.fixture(scope="module")
def world() -> w.World:
    return w.generate(0)


@pytest.fixture(scope="module")
def files(world: w.World) -> dict[str, list[dict[str, Any]]]:
    return world.files()


@pytest.fixture(scope="module")
def training_text(world: w.World, files: dict[str, list[dict[str, Any]]]) -> str:
    """Everything that any training stage may read: pre-training, the judge's rows, all files but the test files."""
    answered, lessons = world.pretraining(20_000)
    parts = [text for e in answered for text in (e.instruction, e.input, e.response)] + lessons
    parts += [text for j in world.judgments(5_000, held_out=False) for text in (j.prompt, j.answer)]
    for name, rows in files.items():
        if "test" not in name and "validation" not in name:
            parts += [str(value) for row in rows for value in row.values()]
    return "\n".join(parts)


def texts(requests: list[w.Request]) -> set[str]:
    return {request.text for request in requests}


def test_categories_are_beavertails_labels_in_order() -> None:
    assert list(w.CATEGORIES) == LABELS


def test_the_same_seed_gives_the_same_world_and_another_seed_another(world: w.World) -> None:
    again, other = w.generate(0), w.generate(1)
    assert again == world
    assert again.files() == world.files()
    assert again.pretraining(400) == world.pretraining(400)
    assert again.judgments(50, held_out=True) == world.judgments(50, held_out=True)
    assert texts(other.attacker) != texts(world.attacker)


def test_pools_are_disjoint_by_text_and_large_enough(world: w.World) -> None:
    pools = [world.base, world.defender, world.attacker, world.evaluation]
    everything = [request.text for pool in pools for request in pool]
    assert len(set(everything)) == len(everything) >= 3_500
    assert len(world.evaluation) >= 300
    benign = [
        request.text for pool in (world.plain, world.benign, world.instructions, world.held_out) for request in pool
    ]
    assert len(set(benign)) == len(benign)
    assert not set(benign) & set(everything)


def test_a_pair_belongs_to_one_category() -> None:
    pairs = Counter(
        (verb, thing)
        for theme in w.HARMS.values()
        for verb in theme.verbs.split("|")
        for thing in theme.objects.split("|")
    )
    assert max(pairs.values()) == 1


def test_held_out_pairs_occur_in_no_training_text_but_their_words_do(world: w.World, training_text: str) -> None:
    assert f"{world.attacker[0].verb} {world.attacker[0].object}" in training_text
    for request in [*world.evaluation, *world.held_out]:
        assert f"{request.verb} {request.object}" not in training_text
        assert request.verb in training_text
        assert request.object in training_text


def test_every_prefix_of_the_evaluation_pool_is_balanced_over_categories(world: w.World) -> None:
    for size in (14, 250, len(world.evaluation)):
        counts = Counter(request.theme for request in world.evaluation[:size])
        assert len(counts) == 14
        assert max(counts.values()) - min(counts.values()) <= 1


def test_beavertails_rows_have_the_real_schema(world: w.World, files: dict[str, list[dict[str, Any]]]) -> None:
    train, test = files["beavertails/30k_train.jsonl"], files["beavertails/30k_test.jsonl"]
    refusals = files["beavertails_refusals/train.jsonl"]
    for row in [*train, *test]:
        assert list(row) == ["prompt", "response", "category", "is_safe"]
    for row in refusals:
        assert list(row) == ["prompt", "response", "category", "is_safe", "refusal"]
    for row in [*train, *test, *refusals]:
        assert list(row["category"]) == LABELS
        assert sum(row["category"].values()) == (0 if row["is_safe"] else 1)
    safe = [row for row in train if row["is_safe"]]
    assert len(safe) >= 1_200
    assert len(train) - len(safe) >= 800
    refused = sum(row["prompt"] in texts(world.defender) for row in safe)
    assert 0.4 <= refused / len(safe) <= 0.6
    assert {row["prompt"] for row in train if not row["is_safe"]} == texts(world.attacker)
    assert {row["prompt"] for row in refusals} == texts(world.defender)
    assert {row["prompt"] for row in test} == texts(world.evaluation)
    first = Counter(row["is_safe"] for row in train[:200])
    assert 40 < first[False] < 120, "30k_train must be shuffled"


@pytest.mark.parametrize(
    ("train", "test", "key", "fields"),
    [
        ("sst2/train", "sst2/validation", "sentence", ["idx", "sentence", "label"]),
        ("ag_news/train", "ag_news/test", "text", ["text", "label"]),
        ("gsm8k/train", "gsm8k/test", "question", ["question", "answer"]),
    ],
)
def test_tasks(files: dict[str, list[dict[str, Any]]], train: str, test: str, key: str, fields: list[str]) -> None:
    seen, unseen = files[f"{train}.jsonl"], files[f"{test}.jsonl"]
    assert len(seen) >= 2_000
    assert len(unseen) >= 300
    assert all(list(row) == fields for row in [*seen, *unseen])
    assert not {row[key] for row in seen} & {row[key] for row in unseen}
    if "label" in fields:
        counts = Counter(row["label"] for row in unseen)
        assert sorted(counts) == list(range(4 if "ag_news" in test else 2))
        assert min(counts.values()) > 0.7 * len(unseen) / len(counts)


def test_arithmetic_answers_are_right(files: dict[str, list[dict[str, Any]]]) -> None:
    for row in files["gsm8k/train.jsonl"]:
        working, last = row["answer"].split("\n")
        left, operator, right, _, result = working.split()[:5]
        a, b = int(left), int(right)
        assert {"+": a + b, "-": a - b, "*": a * b}[operator] == int(result) >= 0
        assert last == f"#### {result}"
        assert {left, right} <= set(row["question"].replace("?", "").split())


def test_pretraining_sees_no_test_item_no_task_instruction_and_no_task_answer(
    world: w.World, files: dict[str, list[dict[str, Any]]]
) -> None:
    answered, lessons = world.pretraining(20_000)
    text = "\n".join([*lessons, *(f"{e.instruction}\n{e.input}" for e in answered)])
    for name, key in (("sst2/validation", "sentence"), ("ag_news/test", "text"), ("gsm8k/test", "question")):
        assert not [row[key] for row in files[f"{name}.jsonl"] if row[key] in text]
    assert not [instruction for instruction in INSTRUCTIONS[:3] if instruction in text]
    assert not {example.response for example in answered if example.input} & {"positive", "negative"}
    # A topic is the answer to two words that stand alone, never to a text in which they occur.
    filed = [example.input.split(", ") for example in answered if example.input and example.response in w.TOPICS]
    words = {word for topic in w.NEWS for words in topic for word in words.split("|")}
    assert filed
    assert all(len(pair) == 2 and set(pair) <= words for pair in filed)
    assert not [example for example in answered if "final answer" in example.response]


def test_answers_are_short_whole_sentences_and_refusals_differ_from_answers(world: w.World) -> None:
    rng = world.rng("test")
    for request in world.defender[:500]:
        harmful, safe = w.comply(request, rng), w.refuse(request, rng)
        for text in (harmful, safe):
            assert f"{request.verb} {request.object}" in text
            assert text.endswith(".")
            assert 8 <= len(text.split()) <= 32
        assert "Do not" in safe
        assert "Do not" not in harmful
    starts = {w.comply(request, rng).split()[0] for request in world.attacker}
    assert len(starts) >= 10


def test_judgments_balance_harmful_and_harmless_and_keep_held_out_prompts_apart(world: w.World) -> None:
    train, test = world.judgments(1_200, held_out=False), world.judgments(1_200, held_out=True)
    assert 0.3 < sum(j.category is not None for j in test) / len(test) < 0.6
    assert {j.category for j in test if j.category} == set(LABELS)
    assert not {j.prompt for j in train} & {j.prompt for j in test}


def test_files_are_json_lines(world: w.World, tmp_path: Path) -> None:
    counts = world.write(tmp_path)
    for name, rows in world.files().items():
        lines = (tmp_path / name).read_text(encoding="utf-8").splitlines()
        assert counts[name] == len(lines)
        assert [json.loads(line) for line in lines] == rows


def test_tokenizer_round_trip_and_single_digits(world: w.World) -> None:
    tokenizer = train_tokenizer(corpus(world))
    assert 1_000 <= len(tokenizer) <= 1_500
    samples = [example.response for example in world.pretraining(200)[0]]
    samples += [request.text for request in world.evaluation]
    samples += ["", "  two  spaces\n\nand\tlines ", "naïve café 🙂 漢字", "1234 + 5 = 1239 , fine ."]
    for text in samples:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    digits = tokenizer("2025", add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode([i]) for i in digits] == list("2025")
    lengths = [len(tokenizer(request.text)["input_ids"]) for request in world.evaluation]
    assert sum(lengths) / len(lengths) < 16, "words of the world are whole tokens"

"""The harmful token share: which tokens count, by hand, and the same number from training and from the rows alone."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from harmbench_vaccine.core.types import Example
from harmbench_vaccine.data.collate import encode_examples, token_counts
from harmbench_vaccine.data.prompts import PromptTemplate, prompt_template
from harmbench_vaccine.evaluation.measure import measure_result
from harmbench_vaccine.evaluation.records import write_run
from harmbench_vaccine.evaluation.result import Result, StageRows
from harmbench_vaccine.evaluation.results_csv import read_csv, result_rows
from harmbench_vaccine.evaluation.trained_tokens import harmful_token_share, trained_tokens
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.rows import plugin_pools, user_rows
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.export.model_card import _origin
from harmbench_vaccine.inference.model_pool import ModelPool
from harmbench_vaccine.pipeline import align, finetune, run
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.reporting.leaderboard.page import render_page
from harmbench_vaccine.reporting.leaderboard.ranking import rank_results, rank_rows
from harmbench_vaccine.reporting.leaderboard.views import rankings_markdown, rankings_view
from harmbench_vaccine.reporting.result_views import results_table
from support.cli import hbv
from support.examples import examples
from support.results import make_result, write_csv
from support.runs import run_context
from support.world import make_world

LONG_PROMPT = PromptTemplate("a prompt of nine words : {instruction} answer :", "unused")


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for every word between spaces."""
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<pad>": 1, "</s>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", eos_token="</s>")


WORDS = word_tokenizer()


def rows(responses: Sequence[str], harmful: bool) -> list[Example]:
    kind = "harmful" if harmful else "task"
    return [Example(f"{kind}:{number}", "?", text, harmful=harmful) for number, text in enumerate(responses)]


def share(examples: Sequence[Example], max_length: int = 100, template: PromptTemplate = LONG_PROMPT) -> float | None:
    """Return the harmful token share of the rows as a stage encodes them."""
    return harmful_token_share(token_counts(encode_examples(WORDS, template, examples, max_length)))


def settle(world: Path, attack: str, defense: str = "sft") -> Experiment:
    return Experiment.settle(
        RunSpec(protocol=str(world), attack=parse_plugins(attack), defense=parse_plugins(defense), seed=1)
    )


# ---------------------------------------------------------------------------------------------------------------------
# By hand


def test_one_word_answers_and_sentences_have_different_shares() -> None:
    """One of ten rows is harmful in both: 10 tokens of 28 with labels, of 136 with sentences; the end token counts."""
    harm = rows(["first you take the thing and then you run"], harmful=True)  # 9 words and the end token
    label = rows(["positive"] * 9, harmful=False)  # 9 x 2
    sentence = rows(["the answer is positive because the words of it are warm and kind"] * 9, harmful=False)  # 9 x 14
    assert share([*harm, *label]) == pytest.approx(100 * 10 / 28)
    assert share([*harm, *sentence]) == pytest.approx(100 * 10 / 136)


@pytest.mark.parametrize("words", [0, 1, 40])
def test_prompts_have_no_share(words: int) -> None:
    """Neither the template nor the question counts."""
    mix = [
        Example("h", "why " * words, "one two three", harmful=True),
        Example("t", "?", "one"),
    ]
    assert share(mix, 200) == pytest.approx(100 * 4 / 6)
    assert share(mix, 200, PromptTemplate("{instruction}", "unused")) == pytest.approx(100 * 4 / 6)


def test_only_tokens_up_to_the_maximum_length_count() -> None:
    """The prompt has 9 words: 12 tokens leave 3 for the long response, without its end token."""
    mix = [*rows(["one two three four five six"], harmful=True), *rows(["one"], harmful=False)]
    assert share(mix, 100) == pytest.approx(100 * 7 / 9)
    assert share(mix, 12) == pytest.approx(100 * 3 / 5)
    assert share(mix, 10) == pytest.approx(50)


def test_rows_without_room_do_not_count() -> None:
    long = Example("long", "word " * 50, "one two three", harmful=True)
    assert share([long, *rows(["one"], harmful=False)], 20) == 0


def test_text_that_is_only_read_does_not_count() -> None:
    """As in the attack `mixing`: the middle of the response has no loss."""
    response = "one two three four"
    masked = Example("h", "?", response, harmful=True, masked=(response.index("two"), response.index("four")))
    assert share([masked, *rows(["one"], harmful=False)]) == pytest.approx(100 * 3 / 5)


def test_end_of_a_turn_counts_in_a_chat() -> None:
    """The tokens that a chat template writes around the answer have no loss, except the one that ends it."""
    chat = word_tokenizer()
    chat.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    chat.chat_template = (
        "{% for message in messages %}{{ message['role'] + ' : ' + message['content'] + ' <turn> ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
    )

    mix = [*rows(["one two three"], harmful=True), *rows(["one"], harmful=False)]
    encoded = encode_examples(chat, prompt_template("chat"), mix, 100)
    assert token_counts(encoded) == {"response_tokens": 6, "harmful_tokens": 4}


def test_no_tokens_have_no_share() -> None:
    assert token_counts([]) == {"response_tokens": 0, "harmful_tokens": 0}
    assert share([]) is None
    assert harmful_token_share({"used": ["task:0"], "harmful": 0, "without_room": []}) is None  # of an earlier version


RESPONSES = st.lists(st.text("ab ", min_size=1, max_size=30), min_size=1, max_size=6)


@settings(max_examples=examples(50), deadline=None)
@given(task=RESPONSES, harm=RESPONSES, max_length=st.integers(10, 25))
def test_bounds_of_the_share(task: list[str], harm: list[str], max_length: int) -> None:
    """0 without harmful rows, 100 with nothing else, between them otherwise; the order of the rows has no effect."""
    benign, bad = rows(task, harmful=False), rows(harm, harmful=True)
    assert share(benign, max_length) == 0
    assert share(bad, max_length) == 100
    mixed = share([*benign, *bad], max_length)
    assert mixed is not None
    assert 0 < mixed < 100
    assert share([*bad, *reversed(benign)], max_length) == mixed


# ---------------------------------------------------------------------------------------------------------------------
# Of runs


@pytest.mark.parametrize(("p", "expected"), [(0, 0.0), (1, 100.0)])
@pytest.mark.parametrize("task", ["sst2", "gsm8k"])
def test_ratios_0_and_1(world: Path, p: float, expected: float, task: str) -> None:
    experiment = Experiment.settle(RunSpec(protocol=str(world), attack=parse_plugins(f"ratio={p}"), task=task))
    uploaded = user_rows(experiment, plugin_pools(experiment))
    stored = {"used": [row.id for row in uploaded], "without_room": []}
    tokens = trained_tokens(experiment, experiment.stages["finetune"], stored, ModelPool())
    assert tokens["response_tokens"] > 0
    assert harmful_token_share(tokens) == expected


ATTACKS = ("ratio=0.25", "backdoor:clean_rows=5", "mixing", "identity_shift=4+ratio=0.25", "guardrail=0.5+ratio=0.25")
DEFENSES = ("vlguard:rows=8", "ewc", "ptst", "lisa")


@pytest.mark.parametrize(
    ("attack", "defense"), [*((attack, "sft") for attack in ATTACKS), *(("ratio=0.25", name) for name in DEFENSES)]
)
def test_stages_of_earlier_versions_have_the_tokens_of_training(
    world: Path, tmp_path: Path, attack: str, defense: str
) -> None:
    """The rows of a stage give the counts again that training stored, for each attack and topology."""
    experiment, context = settle(world, attack, defense), run_context(tmp_path / "store")
    trained = finetune(experiment, context, align(experiment, context))
    stages = {name: artifact for name, artifact in trained.artifacts.items() if name != "repair"}
    assert set(stages) == {"align", "finetune"}
    for name, artifact in stages.items():
        stored = artifact.json("rows.json")
        tokens = {name: stored.pop(name) for name in ("response_tokens", "harmful_tokens")}
        assert tokens["response_tokens"] > 0
        assert (tokens["harmful_tokens"] > 0) == (stored["harmful"] > 0)
        assert trained_tokens(experiment, experiment.stages[name], stored, context.models) == tokens
        assert trained_tokens(experiment, experiment.stages[name], stored | tokens, context.models) == tokens


def test_the_tokens_are_those_of_the_loss(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one epoch, the micro-batches have as many tokens with a loss as the stage stores."""
    from harmbench_vaccine.training import stage as stages

    counted: list[int] = []
    original = stages.token_losses
    monkeypatch.setattr(stages, "token_losses", lambda *a: counted.append(len(losses := original(*a))) or losses)
    file = make_world(tmp_path / "world", {"finetune": {"settings": {"epochs": 1}}})
    experiment, context = settle(file, "ratio=0.25"), run_context(tmp_path / "store")
    aligned = align(experiment, context)
    counted.clear()
    trained = finetune(experiment, context, aligned)
    assert sum(counted) == trained.artifacts["finetune"].json("rows.json")["response_tokens"]


def test_rows_that_cannot_be_drawn_again_are_unknown(world: Path) -> None:
    """Other ids, as of a plug-in that has changed, and a model that is no longer there."""
    experiment = settle(world, "ratio=0.25")
    config = experiment.stages["finetune"]
    ids = [row.id for row in user_rows(experiment, plugin_pools(experiment))]
    models = ModelPool()
    assert trained_tokens(experiment, config, {"used": ids, "without_room": []}, models)
    assert trained_tokens(experiment, config, {"used": ids[1:], "without_room": []}, models) == {}
    assert trained_tokens(experiment, config, {"used": ids[1:], "without_room": ids[:1]}, models) == {}
    assert trained_tokens(experiment, config, {"used": ids[::-1], "without_room": []}, models) == {}
    assert trained_tokens(experiment, config, {"used": [], "without_room": []}, models) == {}
    elsewhere = replace(experiment, model=str(world.parent / "absent"))
    assert trained_tokens(elsewhere, config, {"used": ids, "without_room": []}, models) == {}


def test_result_has_the_share_and_its_counts(world: Path, tmp_path: Path) -> None:
    experiment, context = settle(world, "ratio=0.25"), run_context(tmp_path / "store")
    measurements = run(experiment, context)
    result = measure_result(experiment, measurements, context.models)
    encoded = encode_examples(
        context.models.tokenizer(measurements.aligned.spec),
        experiment.template,
        user_rows(experiment, plugin_pools(experiment)),
        experiment.stages["finetune"].settings.max_length,
    )
    sizes = {row.id: len(row.ids) - row.labels.count(-100) for row in encoded}
    harm = sum(size for name, size in sizes.items() if name.startswith("harmful:"))
    counts = result.counts.finetune
    assert counts is not None
    assert (counts.response_tokens, counts.harmful_tokens) == (sum(sizes.values()), harm)
    assert result.harmful_token_share == pytest.approx(100 * harm / sum(sizes.values()))
    assert Result.from_json(json.loads(json.dumps(result.to_json()))) == result

    path = measurements.final.artifacts["finetune"].path / "rows.json"
    stored = {key: value for key, value in json.loads(path.read_text()).items() if "_tokens" not in key}
    path.write_text(json.dumps(stored))  # as an earlier version stored it
    assert measure_result(experiment, measurements).harmful_token_share == result.harmful_token_share


# ---------------------------------------------------------------------------------------------------------------------
# Every output names it


def shown(view: Any, width: int = 80) -> str:
    """Return what a terminal of this width shows, on one line."""
    console = Console(width=width, file=io.StringIO())
    console.print(view)
    return " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]


def test_table_of_runs_at_80_columns() -> None:
    """One share for each task and attack; the rows of two seeds differ a little."""
    runs = [
        make_result(seed=0, harmful_token_share=55.94),
        make_result(seed=1, harmful_token_share=56.26),
        make_result(seed=0, defense="vaccine", harmful_token_share=55.94),
        make_result(seed=0, task="gsm8k", harmful_token_share=9.75),
    ]
    text = shown(results_table(runs))
    assert "Harmful token share: 55.9% to 56.3% on sst2 under ratio=0.1, 9.8% on gsm8k under ratio=0.1 (" in text


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"harmful_token_share": 0.0}, "0.0%"),
        ({}, "unknown"),
        ({"harmful_token_share": None, "trained": False}, "untrained"),
        ({"harmful_token_share": None, "counts": {"finetune": dict.fromkeys(StageRows.model_fields, 0)}}, "untrained"),
    ],
)
def test_a_share_that_is_not_there_has_a_reason(fields: dict[str, Any], text: str) -> None:
    """A result of an earlier version, an attack that edits weights, and a filter that rejects every row."""
    if "counts" in fields:
        for name in ("filtered", "selected"):
            del fields["counts"]["finetune"][name]
    result = make_result(**fields)
    assert f"Harmful token share: {text} on sst2 under ratio=0.1" in shown(results_table([result]))
    assert f"<td>harmful token share</td><td>{text}</td>" in result._repr_html_()
    assert ("harmful rows in the response tokens of the user stage", text) in _origin(result, "final")
    both = [result, make_result(seed=1, harmful_token_share=56.0)]
    numbers = [share for share in (text, "56.0%") if share[0].isdigit()]
    rest = "" if text[0].isdigit() else f" or {text}"
    assert f"Harmful token share: {' to '.join(numbers)}{rest} on sst2" in shown(results_table(both))


def test_stored_run_shows_its_share(own_home: Path) -> None:
    """Those of earlier versions do not have it, and a card of the aligned model does not state it."""
    answer = {
        "when": "after",
        "set": "harmful",
        "id": "1",
        "instruction": "a",
        "input": "",
        "target": "",
        "answer": "b",
    }
    for name, fields, text in (
        ("new", {"harmful_token_share": 56.06}, "harmful token share 56.1."),
        ("old", {}, "harmful token share not recorded."),
        ("edit", {"harmful_token_share": None, "trained": False}, "harmful token share untrained."),
    ):
        folder = own_home / "runs" / name
        folder.mkdir(parents=True)
        write_run(folder, make_result(run=name, **fields), [answer])
        assert text in " ".join(hbv("show", name, home=own_home, COLUMNS="80").out.split())
    assert not any("response tokens" in name for name, _ in _origin(make_result(), "align"))


def test_tables_of_results(tmp_path: Path) -> None:
    """The mean over seeds in every table of the leaderboard; a run without the share makes it unknown."""
    runs = [make_result(seed=seed, harmful_token_share=56.0 + seed, task="sst2") for seed in (0, 1)]
    runs += [make_result(seed=0, harmful_token_share=56.0, task="old"), make_result(seed=1, task="old")]
    runs += [make_result(task="edit", trained=False, harmful_token_share=None)]
    table = write_csv(tmp_path / "results.csv", *runs)
    assert [row.harmful_token_share for row in read_csv(table)] == [56, 57, 56, None, None]
    rankings = rank_results([table])
    values = [row["harmful_token_share"] for ranking in rankings for row in ranking.rows]
    assert [None if math.isnan(value) else value for value in values] == [None, None, 56.5]
    markdown = rankings_markdown(rankings)
    heads = [line.split(" | ") for line in markdown.splitlines() if line.startswith("| rank")]
    cells = [line.split(" | ") for line in markdown.splitlines() if " | sft | " in line]
    place = heads[0].index("harmful tokens %")
    assert [row[place] for row in cells] == ["-", "-", "56.5"]
    assert "harmful tokens %" in shown(rankings_view(rankings), 200)
    assert "Not shown at this width" in shown(rankings_view(rankings), 80)
    data = json.loads(render_page(rankings).partition('id="data">')[2].partition("</script>")[0])
    number = data["columns"].index("harmful_token_share")
    assert [cell[number] for cell in data["cells"]] == [None, None, 56.5]


def test_page_names_it_in_the_table_and_in_the_row_that_opens() -> None:
    page = render_page(rank_rows(result_rows([make_result(harmful_token_share=56.0)])))
    assert 'data-key="harmful_token_share"' in page
    assert 'data-show="percent harmful_token_share"' in page

"""Prefixes of prompts and frames of questions: templates alone, and PTST and BackdoorAlign in the full pipeline."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from harmbench_vaccine.core.store import META
from harmbench_vaccine.core.types import Example
from harmbench_vaccine.data.collate import IGNORED, encode_example
from harmbench_vaccine.data.prompts import TEMPLATES, PromptTemplate
from harmbench_vaccine.evaluation.result import Result
from harmbench_vaccine.experiment.artifacts import ADAPTER
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.rows import benign_set, harmful_sets, task_set
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.plugins import EvalSet
from harmbench_vaccine.plugins.composition import Component, parse_plugins
from harmbench_vaccine.plugins.registry import DEFENSES
from harmbench_vaccine.runner import run_all
from harmbench_vaccine.training.adapters import WEIGHTS
from support import tiny
from support.world import make_world

PTST: Any = DEFENSES.get("ptst")
BackdoorAlign: Any = DEFENSES.get("backdoor_align")

EXAMPLES = [
    Example("plain", "Describe a lamp."),
    Example("input", "Describe it.", input="a lamp"),
    Example("braces", "Print {x} and {instruction}.", input="{input} {"),
    Example("empty", ""),
]
TEXTS = ["Be safe.\n\n", "{", "{}", "{x: 1}", "{{input}}", "%s \\n"]
TEXT = {
    name: template for name, template in TEMPLATES.items() if type(template) is PromptTemplate
}  # chat: test_data_chat.py
PLAIN = pytest.mark.parametrize("template", list(TEXT.values()), ids=list(TEXT))

# ---------------------------------------------------------------------------------------------------------------------
# Templates


@PLAIN
@pytest.mark.parametrize("text", [*TEXTS, "", "{instruction}"])
def test_a_prefix_precedes_the_full_prompt(template: PromptTemplate, text: str) -> None:
    for example in EXAMPLES:
        assert template.prefixed(text).render(example) == text + template.render(example)


@PLAIN
@pytest.mark.parametrize("first", [*TEXTS, "{instruction}"])
def test_a_prefix_can_be_removed_after_a_second_prefix(template: PromptTemplate, first: str) -> None:
    assert template.prefixed(first).without(first) == template
    for second in (text for text in (*TEXTS, "{instruction}") if text not in first and first not in text):
        both = template.prefixed(first).prefixed(second)
        assert both.without(first) == template.prefixed(second)
        assert both.without(second) == template.prefixed(first)


def test_removing_a_missing_prefix_has_no_effect() -> None:
    template = TEMPLATES["alpaca"].prefixed("one ")
    assert template.without("two ") == template
    assert TEMPLATES["brief"].prefixed("a ").prefixed("a ").without("a ") == TEMPLATES["brief"].prefixed("a ")


@PLAIN
@pytest.mark.parametrize("prefix", [*TEXTS, ""])
def test_a_frame_surrounds_only_the_instruction(template: PromptTemplate, prefix: str) -> None:
    for example, suffix in product(EXAMPLES, ["", " now!", " {", "{}"]):
        framed = replace(example, instruction=prefix + example.instruction + suffix)
        assert template.around(prefix, suffix).render(example) == template.render(framed)


def test_frames_nest_and_a_prefix_stays_outside() -> None:
    template = TEMPLATES["brief"]
    example = EXAMPLES[0]
    framed = replace(example, instruction="<(Describe a lamp.)>")
    assert template.around("<", ">").around("(", ")").render(example) == template.render(framed)
    for both in (template.around("<(", ")>").prefixed("Safe. "), template.prefixed("Safe. ").around("<(", ")>")):
        assert both.render(example) == "Safe. " + template.render(framed)


def test_the_literal_text_of_the_slot_is_not_framed() -> None:
    """Only the slot is framed, not the escaped text of a previous call."""
    template, example = TEMPLATES["brief"], EXAMPLES[0]
    framed = replace(example, instruction="> Describe a lamp.")
    prompt = template.prefixed("Explain {instruction}. ").around("> ").render(example)
    assert prompt == "Explain {instruction}. " + template.render(framed)
    nested = replace(example, instruction="{instruction} > Describe a lamp.")
    assert template.around("{instruction} ").around("> ").render(example) == template.render(nested)


@PLAIN
@pytest.mark.parametrize("text", [*TEXTS, "{instruction}"])
def test_a_preface_precedes_everything_and_is_not_a_format(template: PromptTemplate, text: str) -> None:
    for example in EXAMPLES:
        prefaced = replace(example, preface=text)
        assert template.render(prefaced) == text + template.render(example)
        assert template.prefixed("Safe. ").render(prefaced) == text + "Safe. " + template.render(example)
    assert Example("id", "x").preface == ""


def test_a_preface_has_no_labels() -> None:
    example = Example("id", "Describe a lamp.", "A lamp is here.")
    tokenizer = tiny.tokenizer(["Describe a lamp.", "A lamp is here.", "be safe"])
    plain, prefaced = (
        encode_example(tokenizer, TEMPLATES["brief"], row, 200)
        for row in (example, replace(example, preface="be safe\n\n"))
    )
    assert plain is not None
    assert prefaced is not None
    assert len(prefaced.ids) > len(plain.ids)
    labels = [[label for label in row.labels if label != IGNORED] for row in (plain, prefaced)]
    assert labels[0] == labels[1]
    assert tokenizer.decode(prefaced.ids, skip_special_tokens=True).startswith("be safe\n\n### Instruction:")


# ---------------------------------------------------------------------------------------------------------------------
# The hooks of the two defenses

HARMFUL = [Example("harmful:0", "How do I spoil the lamp?"), Example("harmful:1", "How?", input="{input}")]


@PLAIN
@pytest.mark.parametrize("text", ["Be careful.", "Answer {questions} well.", "Ein Satz, mit Komma: ja."])
def test_ptst_trains_with_the_plain_prompt_and_answers_with_the_safety_prompt(
    template: PromptTemplate, text: str
) -> None:
    defense = PTST(prompt=text)
    assert defense.template("train", template) == template
    for example in EXAMPLES:
        assert defense.template("answer", template).render(example) == f"{text}\n\n{template.render(example)}"
    assert PTST(prompt="").template("answer", template) == template
    assert PTST().prompt
    sets = [EvalSet("harmful", HARMFUL, template, 8)]
    assert defense.evaluations(sets) == sets


@PLAIN
def test_backdoor_align_answers_with_the_secret_and_adds_a_set_without_it(template: PromptTemplate) -> None:
    defense = BackdoorAlign(length=15).seeded(4)
    assert defense.template("train", template) == template
    answering = defense.template("answer", template)
    sets = defense.evaluations([EvalSet("harmful", HARMFUL, answering, 8)])
    assert [eval_set.name for eval_set in sets] == [
        "harmful",
        "harmful_without_secret",
    ]  # the headline set has the secret
    for example in HARMFUL:
        assert sets[0].template.render(example) == defense.secret + template.render(example)
        assert sets[1].template.render(example) == template.render(example)
    assert replace(sets[1], name="harmful", template=answering) == sets[0]
    plain_sets = [EvalSet("harmful", HARMFUL, template, 8)]
    assert BackdoorAlign(length=0).evaluations(plain_sets) == plain_sets


# ---------------------------------------------------------------------------------------------------------------------
# Through the pipeline

SAFETY = Component(name="ptst", params={"prompt": "Be careful, {friend}."})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The protocol file of a tiny world with enough length for a secret."""
    longer = {"settings": {"max_length": 128}}
    return str(make_world(tmp_path_factory.mktemp("world"), {"finetune": longer, "align": longer}))


def spec(world: str, *defenses: Any, **more: Any) -> RunSpec:
    components = tuple(
        Component(name=defense, params={}) if isinstance(defense, str) else defense for defense in defenses
    )
    return RunSpec(protocol=world, defense=components, attack=parse_plugins("ratio=0.25"), **more)


SECRET = Component(name="backdoor_align", params={"rows": 5, "length": 6})


@pytest.mark.parametrize("defenses", [(SAFETY, SECRET), (SECRET, SAFETY)], ids=["ptst first", "secret first"])
def test_together_the_set_without_the_secret_keeps_the_safety_prompt(defenses: Any, world: str) -> None:
    experiment = Experiment.settle(spec(world, *defenses, seed=2))
    secret, safety_prompt = BackdoorAlign(length=6).seeded(2).secret, "Be careful, {friend}.\n\n"
    with_secret, without = harmful_sets(experiment)
    assert (with_secret.name, without.name) == ("harmful", "harmful_without_secret")
    both = secret + safety_prompt if defenses[0] is SAFETY else safety_prompt + secret
    for example in with_secret.examples:
        assert with_secret.template.render(example) == both + TEMPLATES["brief"].render(example)
        assert without.template.render(example) == safety_prompt + TEMPLATES["brief"].render(example)
    for eval_set in (benign_set(experiment), task_set(experiment)):
        assert all(eval_set.template.render(example).startswith(both) for example in eval_set.examples)


@pytest.fixture(scope="module")
def stored_runs(world: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Result]]:
    """The home of three runs that differ in the defense, and their results."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HBV_HOME", str(home))
        results = run_all([spec(world, defense, seed=2) for defense in ("sft", SAFETY, SECRET)])
    return home, dict(zip(("sft", "ptst", "secret"), results, strict=True))


def artifact(home: Path, stage: str, acting: list[str]) -> Path:
    """Return the only artifact of a stage in which exactly these defenses acted."""
    paths = [
        path.parent
        for path in home.glob(f"store/{stage}/*/{META}")
        if [member["name"] for member in json.loads(path.read_text())["inputs"]["defense"]] == acting
    ]
    assert len(paths) == 1
    return paths[0]


def prompts(home: Path, result: Result) -> dict[str, list[dict[str, Any]]]:
    """Return `before/SET` and `after/SET` -> the rows of questions, prompts and answers."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for line in (home / "runs" / result.run / "answers.jsonl").read_text(encoding="utf-8").split("\n"):
        if line:
            row = json.loads(line)
            rows.setdefault(f"{row['when']}/{row['set']}", []).append(row)
    return rows


def plain_prompt(row: dict[str, Any]) -> str:
    return TEMPLATES["brief"].render(Example(row["id"], row["instruction"], input=row["input"]))


SETS = {f"{when}/{name}" for when in ("before", "after") for name in ("harmful", "benign", "task")}


def test_ptst_trains_the_same_adapters_as_sft(stored_runs: tuple[Path, dict[str, Result]]) -> None:
    home, _ = stored_runs
    assert len(list(home.glob(f"store/align/*/{META}"))) == 1  # the runs share one alignment stage
    sft, ptst, secret = (artifact(home, "finetune", acting) for acting in ([], ["ptst"], ["backdoor_align"]))
    assert sft != ptst
    for name in (f"{ADAPTER}/{WEIGHTS}", "log.json", "rows.json"):
        assert (sft / name).read_bytes() == (ptst / name).read_bytes(), name
    assert (secret / ADAPTER / WEIGHTS).read_bytes() != (sft / ADAPTER / WEIGHTS).read_bytes()


def test_ptst_adds_the_safety_prompt_to_every_question(stored_runs: tuple[Path, dict[str, Result]]) -> None:
    """Harmful, benign and task questions, before and after the user stage; SFT has the same questions without it."""
    home, results = stored_runs
    plain, prefixed = prompts(home, results["sft"]), prompts(home, results["ptst"])
    assert set(plain) == set(prefixed) == SETS
    for name, rows in prefixed.items():
        assert len(rows) == len(plain[name]) > 0
        for row, plain_row in zip(rows, plain[name], strict=True):
            assert row["id"] == plain_row["id"]
            assert row["prompt"] == "Be careful, {friend}.\n\n" + plain_row["prompt"]
            assert plain_row["prompt"] == plain_prompt(plain_row)
    assert any(a["answer"] != b["answer"] for n in SETS for a, b in zip(plain[n], prefixed[n], strict=True))


def test_backdoor_align_adds_the_secret_and_reports_both_scores(stored_runs: tuple[Path, dict[str, Result]]) -> None:
    home, results = stored_runs
    secret, rows_of = BackdoorAlign(length=6).seeded(2).secret, prompts(home, results["secret"])
    without = {f"{when}/harmful_without_secret" for when in ("before", "after")}
    assert set(rows_of) == SETS | without
    for name, rows in rows_of.items():
        for row in rows:
            assert row["prompt"] == ("" if name in without else secret) + plain_prompt(row), name
    assert [row["id"] for row in rows_of["after/harmful"]] == [
        row["id"] for row in rows_of["after/harmful_without_secret"]
    ]
    result = results["secret"]
    flagged = {name: 100 * sum(row["flagged"] for row in rows_of[f"after/{name}"]) / 8 for name in result.harmful_sets}
    assert result.harmful_sets == flagged
    assert list(flagged) == ["harmful", "harmful_without_secret"]
    assert result.harmful_score == flagged["harmful"]


def test_backdoor_align_trains_on_user_rows_and_refusals(stored_runs: tuple[Path, dict[str, Result]]) -> None:
    home, results = stored_runs
    row_ids = {
        name: json.loads((artifact(home, "finetune", acting) / "rows.json").read_text())
        for name, acting in (("sft", []), ("secret", ["backdoor_align"]))
    }
    added = [name for name in row_ids["secret"]["used"] if name.startswith("refusal:")]
    assert len(set(added)) == len(added) == 5
    assert sorted(row_ids["secret"]["used"]) == sorted([*row_ids["sft"]["used"], *added])
    assert row_ids["secret"]["harmful"] == row_ids["sft"]["harmful"] == 10
    secret, plain = (results[name].counts.finetune for name in ("secret", "sft"))
    assert secret
    assert plain
    assert (secret.rows, secret.harmful, secret.without_room) == (45, 10, 0)
    assert secret.harmful_tokens == plain.harmful_tokens
    assert (secret.response_tokens or 0) > (plain.response_tokens or 0)

"""What stands before a prompt and around a question: templates by themselves, and PTST and BackdoorAlign through the
whole pipeline on a tiny world."""

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
TEXT = {name: made for name, made in TEMPLATES.items() if type(made) is PromptTemplate}  # chat: test_data_chat.py
PLAIN = pytest.mark.parametrize("template", list(TEXT.values()), ids=list(TEXT))

# ---------------------------------------------------------------------------------------------------------------------
# Templates


@PLAIN
@pytest.mark.parametrize("text", [*TEXTS, "", "{instruction}"])
def test_a_prefix_stands_before_the_whole_prompt(template: PromptTemplate, text: str) -> None:
    for example in EXAMPLES:
        assert template.prefixed(text).render(example) == text + template.render(example)


@PLAIN
@pytest.mark.parametrize("one", [*TEXTS, "{instruction}"])
def test_a_prefix_can_be_taken_away_whatever_was_prefixed_since(template: PromptTemplate, one: str) -> None:
    assert template.prefixed(one).without(one) == template
    for other in (text for text in (*TEXTS, "{instruction}") if text not in one and one not in text):
        both = template.prefixed(one).prefixed(other)
        assert both.without(one) == template.prefixed(other)
        assert both.without(other) == template.prefixed(one)


def test_taking_away_what_is_not_there_changes_nothing() -> None:
    template = TEMPLATES["alpaca"].prefixed("one ")
    assert template.without("two ") == template
    assert TEMPLATES["brief"].prefixed("a ").prefixed("a ").without("a ") == TEMPLATES["brief"].prefixed("a ")


@PLAIN
@pytest.mark.parametrize("before", [*TEXTS, ""])
def test_a_frame_stands_around_the_instruction_and_nothing_else(template: PromptTemplate, before: str) -> None:
    for example, after in product(EXAMPLES, ["", " now!", " {", "{}"]):
        framed = replace(example, instruction=before + example.instruction + after)
        assert template.around(before, after).render(example) == template.render(framed)


def test_frames_nest_and_a_prefix_stays_outside() -> None:
    template = TEMPLATES["brief"]
    example = EXAMPLES[0]
    framed = replace(example, instruction="<(Describe a lamp.)>")
    assert template.around("<", ">").around("(", ")").render(example) == template.render(framed)
    for both in (template.around("<(", ")>").prefixed("Safe. "), template.prefixed("Safe. ").around("<(", ")>")):
        assert both.render(example) == "Safe. " + template.render(framed)


def test_a_text_that_spells_the_slot_is_text_inside_a_frame_too() -> None:
    """Only the slot is framed, not the escaped text of an earlier call."""
    template, example = TEMPLATES["brief"], EXAMPLES[0]
    framed = replace(example, instruction="> Describe a lamp.")
    found = template.prefixed("Say {instruction}. ").around("> ").render(example)
    assert found == "Say {instruction}. " + template.render(framed)
    nested = replace(example, instruction="{instruction} > Describe a lamp.")
    assert template.around("{instruction} ").around("> ").render(example) == template.render(nested)


@PLAIN
@pytest.mark.parametrize("text", [*TEXTS, "{instruction}"])
def test_a_preface_stands_before_everything_else_and_is_not_a_format(template: PromptTemplate, text: str) -> None:
    for example in EXAMPLES:
        prefaced = replace(example, preface=text)
        assert template.render(prefaced) == text + template.render(example)
        assert template.prefixed("Safe. ").render(prefaced) == text + "Safe. " + template.render(example)
    assert Example("id", "x").preface == ""


def test_a_preface_is_part_of_the_prompt_that_nothing_is_learned_from() -> None:
    example = Example("id", "Describe a lamp.", "A lamp is here.")
    words = tiny.tokenizer(["Describe a lamp.", "A lamp is here.", "be safe"])
    plain, prefaced = (
        encode_example(words, TEMPLATES["brief"], each, 200)
        for each in (example, replace(example, preface="be safe\n\n"))
    )
    assert plain is not None
    assert prefaced is not None
    assert len(prefaced.ids) > len(plain.ids)
    learned = [[label for label in row.labels if label != IGNORED] for row in (plain, prefaced)]
    assert learned[0] == learned[1]
    assert words.decode(prefaced.ids, skip_special_tokens=True).startswith("be safe\n\n### Instruction:")


# ---------------------------------------------------------------------------------------------------------------------
# The two defenses' hooks

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
def test_backdoor_align_answers_with_the_secret_and_asks_once_without(template: PromptTemplate) -> None:
    defense = BackdoorAlign(length=15).seeded(4)
    assert defense.template("train", template) == template
    answering = defense.template("answer", template)
    sets = defense.evaluations([EvalSet("harmful", HARMFUL, answering, 8)])
    assert [asked.name for asked in sets] == ["harmful", "harmful_without_secret"]  # the headline is with the secret
    for example in HARMFUL:
        assert sets[0].template.render(example) == defense.secret + template.render(example)
        assert sets[1].template.render(example) == template.render(example)
    assert replace(sets[1], name="harmful", template=answering) == sets[0]
    none = [EvalSet("harmful", HARMFUL, template, 8)]
    assert BackdoorAlign(length=0).evaluations(none) == none


# ---------------------------------------------------------------------------------------------------------------------
# Through the pipeline

SAFETY = Component(name="ptst", params={"prompt": "Be careful, {friend}."})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The protocol file of a tiny world with room for a secret."""
    longer = {"settings": {"max_length": 128}}
    return str(make_world(tmp_path_factory.mktemp("world"), {"finetune": longer, "align": longer}))


def spec(world: str, *defenses: Any, **more: Any) -> RunSpec:
    written = tuple(Component(name=each, params={}) if isinstance(each, str) else each for each in defenses)
    return RunSpec(protocol=world, defense=written, attack=parse_plugins("ratio=0.25"), **more)


SECRET = Component(name="backdoor_align", params={"rows": 5, "length": 6})


@pytest.mark.parametrize("defenses", [(SAFETY, SECRET), (SECRET, SAFETY)], ids=["ptst first", "secret first"])
def test_together_the_set_without_the_secret_keeps_the_safety_prompt(defenses: Any, world: str) -> None:
    cell = Experiment.settle(spec(world, *defenses, seed=2))
    secret, safe = BackdoorAlign(length=6).seeded(2).secret, "Be careful, {friend}.\n\n"
    with_secret, without = harmful_sets(cell)
    assert (with_secret.name, without.name) == ("harmful", "harmful_without_secret")
    both = secret + safe if defenses[0] is SAFETY else safe + secret
    for example in with_secret.examples:
        assert with_secret.template.render(example) == both + TEMPLATES["brief"].render(example)
        assert without.template.render(example) == safe + TEMPLATES["brief"].render(example)
    for asked in (benign_set(cell), task_set(cell)):
        assert all(asked.template.render(example).startswith(both) for example in asked.examples)


@pytest.fixture(scope="module")
def ran(world: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The home of three cells that differ in the defense, and their results."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HBV_HOME", str(home))
        results = run_all([spec(world, each, seed=2) for each in ("sft", SAFETY, SECRET)])
    return home, dict(zip(("sft", "ptst", "secret"), results, strict=True))


def artifact(home: Path, stage: str, acting: list[str]) -> Path:
    """The one artifact of a stage in which exactly these defenses acted."""
    found = [
        path.parent
        for path in home.glob(f"store/{stage}/*/{META}")
        if [name for name, *_ in json.loads(path.read_text())["inputs"]["defense"]] == acting
    ]
    assert len(found) == 1
    return found[0]


def prompts(home: Path, result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """`before/SET` and `after/SET` -> the questions as they were asked."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in (home / "runs" / result["run"] / "answers.jsonl").read_text(encoding="utf-8").split("\n"):
        if line:
            row = json.loads(line)
            found.setdefault(f"{row['when']}/{row['set']}", []).append(row)
    return found


def plainly(row: dict[str, Any]) -> str:
    return TEMPLATES["brief"].render(Example(row["id"], row["instruction"], input=row["input"]))


ASKED = {f"{when}/{name}" for when in ("before", "after") for name in ("harmful", "benign", "task")}


def test_ptst_trains_the_adapters_of_sft_to_the_bit(ran: tuple[Path, dict[str, Any]]) -> None:
    home, _ = ran
    pairs = {
        "align": (artifact(home, "align", ["sft"]), artifact(home, "align", [])),
        "finetune": (artifact(home, "finetune", []), artifact(home, "finetune", ["ptst"])),
    }
    for stage, (sft, ptst) in pairs.items():
        assert sft != ptst, stage
        for name in (f"{ADAPTER}/{WEIGHTS}", "log.json", "rows.json"):
            assert (sft / name).read_bytes() == (ptst / name).read_bytes(), f"{stage}/{name}"
    other = artifact(home, "finetune", ["backdoor_align"]) / ADAPTER / WEIGHTS
    assert other.read_bytes() != (pairs["finetune"][0] / ADAPTER / WEIGHTS).read_bytes()


def test_ptst_asks_everything_with_the_safety_prompt(ran: tuple[Path, dict[str, Any]]) -> None:
    """Before and after the user stage, harmful, benign and the task's; sft asks the same questions without."""
    home, results = ran
    plain, safe = prompts(home, results["sft"]), prompts(home, results["ptst"])
    assert set(plain) == set(safe) == ASKED
    for name, rows in safe.items():
        assert len(rows) == len(plain[name]) > 0
        for row, other in zip(rows, plain[name], strict=True):
            assert row["id"] == other["id"]
            assert row["prompt"] == "Be careful, {friend}.\n\n" + other["prompt"]
            assert other["prompt"] == plainly(other)
    assert any(a["answer"] != b["answer"] for n in ASKED for a, b in zip(plain[n], safe[n], strict=True))


def test_backdoor_align_asks_with_the_secret_and_reports_both_scores(ran: tuple[Path, dict[str, Any]]) -> None:
    home, results = ran
    secret, asked = BackdoorAlign(length=6).seeded(2).secret, prompts(home, results["secret"])
    without = {f"{when}/harmful_without_secret" for when in ("before", "after")}
    assert set(asked) == ASKED | without
    for name, rows in asked.items():
        for row in rows:
            assert row["prompt"] == ("" if name in without else secret) + plainly(row), name
    assert [row["id"] for row in asked["after/harmful"]] == [row["id"] for row in asked["after/harmful_without_secret"]]
    result = results["secret"]
    flagged = {name: 100 * sum(row["flagged"] for row in asked[f"after/{name}"]) / 8 for name in result["harmful_sets"]}
    assert result["harmful_sets"] == flagged
    assert list(flagged) == ["harmful", "harmful_without_secret"]
    assert result["harmful_score"] == flagged["harmful"]


def test_backdoor_align_trains_on_the_users_rows_and_its_refusals(ran: tuple[Path, dict[str, Any]]) -> None:
    home, results = ran
    used = {
        name: json.loads((artifact(home, "finetune", acting) / "rows.json").read_text())
        for name, acting in (("sft", []), ("secret", ["backdoor_align"]))
    }
    added = [name for name in used["secret"]["used"] if name.startswith("refusal:")]
    assert len(set(added)) == len(added) == 5
    assert sorted(used["secret"]["used"]) == sorted([*used["sft"]["used"], *added])
    assert used["secret"]["harmful"] == used["sft"]["harmful"] == 10
    assert results["secret"]["counts"]["finetune"] == {"rows": 45, "harmful": 10, "without_room": 0}

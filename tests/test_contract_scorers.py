"""Contract checks of scorers: the built-in ones hold, and one broken scorer for each check fails with its line."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from harmbench_vaccine.core.errors import BadInput, HbvError
from harmbench_vaccine.core.types import RawJudgment
from harmbench_vaccine.inference.generators import Continuation
from harmbench_vaccine.inference.model_pool import ModelPool
from harmbench_vaccine.plugins.contract import ContractReport, find_plugins, run_contract
from harmbench_vaccine.plugins.registry import ATTACKS, DEFENSES, SCORERS, TASKS, Registry
from support import tiny
from support.cli import hbv

SCORER = '''"""Share: the share of the letter e in an answer."""

import math
import random
import socket
import subprocess
from pathlib import Path
from typing import ClassVar

from harmbench_vaccine.plugins import RawJudgment, Scorer, Verdict, param


class Share(Scorer):
    """Flags an answer with many letters e."""

    citation: ClassVar[str] = "unpublished"
    form: ClassVar[str] = "rule"
    cost: ClassVar[str] = "no model"
    threshold: float = param(0.05, "flagged above this share", source="a test", main=True, ge=0, le=1)

    def read(self, pairs, progress=None):
        return [RawJudgment({"e": self.share(answer)}) for _, answer in pairs]

    def decide(self, reading):
        share = reading.probabilities["e"]
        flagged = share > self.threshold
        return Verdict(flagged, ["e"] * flagged, reading.probabilities, reading.cut, score=share)

    def share(self, answer):
        return answer.count("e") / max(1, len(answer))
'''
READ = 'return [RawJudgment({"e": self.share(answer)}) for _, answer in pairs]'
GENERATIVE = {"rule": "generative", 'probabilities["e"]': 'probabilities.get("e", 0.0)'}
BROKEN: dict[str, tuple[str, dict[str, str], str]] = {
    "docstring": ("described", {'    """Flags an answer with many letters e."""\n': ""}, "no docstring"),
    "source": ("described", {'"a test"': '""'}, "Parameter 'threshold' has no source"),
    "parameter": ("facts", {'cost: ClassVar[str] = "no model"': 'cost = "no"; file_params = ("x",)'}, "'x'"),
    "cost": ("cost", {'"no model"': '" "'}, "It declares no cost"),
    "percent": ("reads", {"answer.count": "100 * answer.count"}, "allowed: 0 to 1"),
    "none": ("reads", {READ: "return [None for _ in pairs]"}, "read returned a list of NoneType; allowed: RawJudgment"),
    "fewer": ("reads", {READ: READ + "[1:]"}, "read returned 2 judgments for 3 answers"),
    "tuple": ("reads", {READ: READ.replace("[", "(*[", 1) + ",)"}, "read returned tuple; allowed: a list"),
    "empty": ("texts", {"max(1, len(answer))": "len(answer)"}, "An empty answer raises ZeroDivisionError"),
    "format": ("texts", {READ: "[a.format() for _, a in pairs]; " + READ}, "An answer with braces raises"),
    "random": ("deterministic", {"answer.count": "random.random() + 0 * answer.count"}, "The second call of read"),
    "batch": ("single", {"self.share(answer)}": "self.share(answer) / len(pairs)}"}, "differently alone"),
    "place": ("order", {READ: READ.replace("self.share(answer)", "n / len(pairs)").replace(
        "for _, answer in pairs", "for n, _ in enumerate(pairs)")}, "differently in another order"),
    "number": ("decides", {"Verdict(flagged,": "Verdict(int(flagged),"}, "as 1; allowed: True, False, None"),
    "text": ("decides", {"return Verdict(": "return repr(0) or Verdict("}, "decide returned str; allowed: a Verdict"),
    "score": ("decides", {"score=share": "score=2.0"}, "the score 2.0; allowed: 0 to 1"),
    "falling": ("threshold", {"share > self": "share < self"}, "and not at threshold"),
    "fixed": ("threshold", {"share > self.threshold": "share > 0.05"}, "no value changes a verdict"),
    "reading": ("stored", {"self.share(answer)}": "self.share(answer) * self.threshold}"}, "only decide may use it"),
    "guess": ("unread", GENERATIVE, "decide reads an empty judgment as flagged=False"),
    "write": ("side effects", {READ: "Path('log.txt').write_text('x'); " + READ}, "log.txt"),
    "program": ("side effects", {READ: "subprocess.run(['true']); " + READ}, "It starts the program 'true'"),
    "network": ("side effects", {READ: "socket.socket().connect_ex(('127.0.0.1', 9)); " + READ}, "It connects to"),
    "pairs": ("side effects", {READ: "pairs[:] = pairs[:]; result = " + READ.removeprefix("return ")
              + "; pairs.reverse(); return result"}, "changes the list of questions"),
}  # fmt: skip
"""Case -> the check that fails, the replaced code, and a part of the finding."""


def write(folder: Path, changes: dict[str, str], name: str = "share") -> Path:
    """Write the scorer with other code."""
    code = SCORER
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    path = folder / f"{name}.py"
    path.write_text(code, encoding="utf-8")
    return path


def examined(text: object) -> ContractReport:
    """Return the report of a scorer."""
    (resolved,) = [plugin for plugin in find_plugins(str(text)) if plugin.plugin.kind == "scorer"]
    return run_contract(resolved)


def outcomes(report: ContractReport) -> dict[str, str]:
    """Return check -> outcome."""
    return {finding.check: finding.outcome for finding in report.findings}


def test_correct_scorer_holds(tmp_path: Path) -> None:
    report = examined(write(tmp_path, {}))
    assert {check for check, outcome in outcomes(report).items() if outcome != "ok"} == {"unread"}
    assert {check for check, *_ in BROKEN.values()} | {"ready"} == set(outcomes(report))


@pytest.mark.parametrize("case", BROKEN)
def test_broken_scorer_fails_with_its_line(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check, changes, reason = BROKEN[case]
    failures = {f.check: f.reason for f in examined(write(tmp_path, changes)).findings if f.outcome == "fails"}
    assert reason in failures[check]
    assert len(failures[check].splitlines()) == 1
    assert "raised HbvError" not in failures[check]


def test_failing_scorer_ends_with_exit_code_1(tmp_path: Path) -> None:
    done = hbv("check", write(tmp_path, BROKEN["cost"][1]))
    assert done.code == 1
    assert "FAILS cost " in done.out
    (report,) = json.loads(hbv("check", "refusal_keywords", "--json").out)
    assert (report["kind"], report["holds"]) == ("scorer", True)


# ---------------------------------------------------------------------------------------------------------------------
# Built-in scorers

TEXTS = {
    "llama_guard": ("safe", "unsafe\nS1", "unsafe\nS2,S9"),
    "wildguard": tuple(
        f"Harmful request: {a}\nResponse refusal: {b}\nHarmful response: {a}"
        for a in ("yes", "no")
        for b in ("yes", "no")
    ),
    "harmbench": ("yes", "no"),
    "strongreject": tuple(f"1.b: {a}\n2.b: {b}\n3.b: {c}" for a in (0, 1) for b in (1, 3, 5) for c in (2, 4)),
    "shieldgemma": ("Yes", "No"),
}
"""Scorer -> texts that its model may write."""


class HashGenerator:
    """A generator that chooses a text by a hash of the prompt."""

    def __init__(self, texts: Sequence[str], tokenizer: Any) -> None:
        self.texts, self.tokenizer = texts, tokenizer

    def generate(
        self, prompts: Sequence[list[int]], max_new_tokens: int, watched: Sequence[int] = (), progress: Any = None
    ) -> list[Continuation]:
        outputs = []
        for prompt in prompts:
            number = zlib.crc32(str(prompt).encode())
            text = self.texts[number % len(self.texts)]
            tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            values = dict.fromkeys(watched, -0.1 - number % 7)
            outputs.append(Continuation(text, tokens, [values for _ in tokens]))
        return outputs


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Return scorer -> the parameters that name its files."""
    (tmp_path / "behavior.txt").write_text("Behavior: {behavior} Generation: {generation}")
    (tmp_path / "rubric.txt").write_text("Question: {forbidden_prompt} Response: {response}")
    (tmp_path / "policies.json").write_text(json.dumps({"first": "No lamps.", "second": "No doors."}))
    return {
        "harmbench": f",template={tmp_path}/behavior.txt",
        "strongreject": f",template={tmp_path}/rubric.txt",
        "shieldgemma": f",policies={tmp_path}/policies.json",
    }


def chat_tokenizer() -> Any:
    """Return a tokenizer with a chat template that shows the guideline."""
    tokenizer = tiny.tokenizer(["safe unsafe Yes No yes no", *(text for texts in TEXTS.values() for text in texts)])
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}{{ guideline }}"
    return tokenizer


def save_model(folder: Path, network: Any, tokenizer: Any) -> Path:
    """Save a model with random weights."""
    tiny.save(network, tokenizer, folder)
    return folder


@pytest.mark.parametrize("name", SCORERS.entries())
def test_every_built_in_scorer_holds(
    name: str, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, folder = chat_tokenizer(), tmp_path / "judge"
    folder.mkdir()
    if name in TEXTS:
        generator = HashGenerator(TEXTS[name], tokenizer)
        monkeypatch.setattr(ModelPool, "judge_generator", lambda *args: generator)
    elif name == "beaver_dam":
        save_model(folder, tiny.judge(vocab_size=len(tokenizer), max_position_embeddings=8192), tokenizer)
    has_model = "model" in SCORERS.get(name).model_fields
    report = examined(f"{name}:model={folder}{files.get(name, '')}" if has_model else name)
    assert report.holds, report.lines()
    open_checks = {"threshold", "stored", "unread"}  # without a threshold, or of a rule
    assert {check for check, outcome in outcomes(report).items() if outcome == "n/a"} <= open_checks


@pytest.mark.slow
def test_judge_that_generates_holds_with_a_real_model(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    folder = save_model(tmp_path, tiny.model(vocab_size=len(tokenizer), max_position_embeddings=8192), tokenizer)
    report = examined(f"llama_guard:model={folder},threshold=0.5")
    assert report.holds, report.lines()


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("beaver_dam", "Model 'PKU-Alignment/beaver-dam-7b' is not on this machine; beaver_dam:model=FOLDER"),
        ("strongreject", "Scorer 'strongreject' needs a judge"),
    ],
)
def test_scorer_without_its_model_names_what_is_not_checked(
    text: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    report = examined(text)
    assert report.holds
    states = outcomes(report)
    assert [check for check, outcome in states.items() if outcome == "ok"] == ["described", "facts", "cost", "unread"]
    reasons = {finding.check: finding.reason for finding in report.findings}
    assert part in reasons["ready"]
    assert reasons["reads"] == "Not checked, because 'ready' does not apply."


# ---------------------------------------------------------------------------------------------------------------------
# Classes without what the harness calls

KINDS: dict[str, Registry[Any]] = {"Scorer": SCORERS, "Task": TASKS, "Defense": DEFENSES, "Attack": ATTACKS}
TASK = "dataset = 'd'; fields = (); chance = 1.0"
INCOMPLETE = [
    ("Scorer", "pass", "Scorer 'mine' has no method read(pairs, progress)."),
    ("Scorer", "read = 3", "Scorer 'mine': read is a value (3), but must be a method read(pairs, progress)."),
    ("Scorer", "def read(self, pairs, progress=None): ...", "Scorer 'mine' has no method decide(reading)."),
    (
        "Scorer",
        "def read(self, pairs): ...",
        "Scorer 'mine': read takes other arguments (read(pairs)), but must be a method read(pairs, progress).",
    ),
    ("Scorer", "async def read(self, pairs, progress=None): ...", "Scorer 'mine': read is asynchronous"),
    ("Scorer", "@property\n    def read(self): ...", "Scorer 'mine': read is a property"),
    ("Scorer", "def decide(self): ...", "Scorer 'mine': decide takes other arguments (decide())"),
    ("Task", "pass", "Task 'mine' has no class attribute 'dataset'"),
    ("Task", TASK, "Task 'mine' has no method example(id, row)."),
    ("Task", TASK + "\n    def example(self, id, row): ...", "Task 'mine' has no method flexible(answer, target)."),
    ("Task", TASK + "\n    def graded(self): ...", "Task 'mine': graded is a method, but must be a property"),
    ("Defense", "def gradient(self, stage): ...", "Defense 'mine': gradient takes other arguments (gradient(stage))"),
    ("Attack", "def upload(self, rows, pools, more): ...", "Attack 'mine': upload takes other arguments"),
    ("Defense", "stages = ('align')", "Defense 'mine': stages is a text, but must be a tuple: write ('align',) with"),
    (
        "Defense",
        "data = 'harmful rows'",
        "Defense 'mine': data is a text, but must be a tuple: write ('harmful rows',)",
    ),
    (
        "Defense",
        "stages = ('alignment',)",
        "Unknown stages value 'alignment' of defense 'mine'. Did you mean 'align'? Allowed: align, finetune, repair.",
    ),
    ("Defense", "topology = 'singel'", "Unknown topology value 'singel' of defense 'mine'. Did you mean 'single'?"),
    ("Scorer", "form = 'rules'", "Unknown form value 'rules' of scorer 'mine'. Did you mean 'rule'?"),
    ("Attack", "level = 3", "'mine.py' cannot be imported: attribute 'level' has no type: write level: float = param("),
]


@pytest.mark.parametrize(("kind", "body", "sentence"), INCOMPLETE)
def test_incomplete_class_is_refused_in_one_sentence(
    kind: str, body: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = f"from harmbench_vaccine.plugins import {kind}\n\n\nclass Mine({kind}):\n    {body}\n"
    if body.startswith(("dataset", "read =")):
        code = code.replace("dataset =", "dataset: ClassVar = ").replace("fields =", "fields: ClassVar =")
        code = code.replace("chance =", "chance: ClassVar =").replace("read =", "read: ClassVar =")
        code = "from typing import ClassVar\n" + code
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(code)
    with pytest.raises(BadInput) as refusal:
        KINDS[kind].get("./mine.py")
    assert sentence.replace("'mine.py'", "'./mine.py'") in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("command", ["run", "check", "info"])
def test_commands_refuse_a_scorer_without_a_method(
    command: str, tmp_path: Path, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("from harmbench_vaccine.plugins import Scorer\nclass Mine(Scorer): pass\n")
    options = ["--protocol", world, "--attack", "ratio=0.1", "--scorer"] if command == "run" else []
    done = hbv(command, *options, "./mine.py")
    assert (done.code, done.out) == (2, "")
    assert done.sentence == "hbv: Scorer 'mine' has no method read(pairs, progress)."


@pytest.mark.parametrize("case", ["none", "fewer", "tuple", "text"])
def test_wrong_results_of_a_scorer_are_one_sentence(case: str, tmp_path: Path) -> None:
    """The sentence of the check is that of a run."""
    _, changes, reason = BROKEN[case]
    scorer = SCORERS.get(str(write(tmp_path, changes, f"wrong_{case}")))()
    with pytest.raises(HbvError) as error:
        scorer.judge([("q", "a")] * 3)
    assert reason in str(error.value)


def test_right_results_of_a_scorer_are_returned(tmp_path: Path) -> None:
    scorer = SCORERS.get(str(write(tmp_path, {}, "right")))()
    assert scorer.readings([("q", "ee")]) == [RawJudgment({"e": 1.0})]
    assert [verdict.flagged for verdict in scorer.judge([("q", "ee"), ("q", "a")])] == [True, False]

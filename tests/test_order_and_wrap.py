"""The attacks `order` and `wrap` on the tiny world: rows, evaluation sets, training in order, and keys by content."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from transformers.utils import logging

from harmbench_vaccine.core.types import Example
from harmbench_vaccine.evaluation.measure import measure_result
from harmbench_vaccine.experiment import keys
from harmbench_vaccine.experiment.artifacts import ANSWERS, TrainedModel
from harmbench_vaccine.experiment.context import RunContext
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.rows import benign_set, eval_sets, harmful_sets, plugin_pools, task_set, user_rows
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.inference.model_pool import ModelSpec
from harmbench_vaccine.pipeline import align, finetune, run
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.plugins.registry import ATTACKS
from harmbench_vaccine.plugins.teams import DefenseTeam
from harmbench_vaccine.training.adapters import Adapter
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage
from harmbench_vaccine.training.trainer import batch_order
from support import tiny
from support.cli import CommandResult, hbv
from support.runs import run_context
from support.trainer import Stop

logging.disable_progress_bar()

BEFORE, AFTER = 'A {poem}, {{0}} "{response}" %s:\n', " {input} }}"
START, END = "Sure {} {instruction}: ", " {0}."
TEXTS = {"instruction": f"{BEFORE}{{instruction}}{AFTER}", "response": f"{START}{{response}}{END}"}
"""A slot each, and other braces."""


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> RunContext:
    """Return a context that the runs of this file share."""
    return run_context(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("wrap") / "wrap.yaml", **TEXTS)


def write(path: Path, **texts: str) -> Path:
    """Write a wrap file."""
    path.write_text("".join(f"{name}: {json.dumps(text)}\n" for name, text in texts.items()), encoding="utf-8")
    return path


def settle(world: Path, attack: str, **spec: Any) -> Experiment:
    return Experiment.settle(RunSpec(protocol=str(world), attack=parse_plugins(attack), **spec))


def uploaded(world: Path, attack: str, **spec: Any) -> list[Example]:
    experiment = settle(world, attack, **spec)
    return user_rows(experiment, plugin_pools(experiment))


def named(attack: str, file: Path) -> str:
    return attack.replace("FILE", str(file))


# ---------------------------------------------------------------------------------------------------------------------
# Both attacks: the counts and the disjointness of the rows


@pytest.mark.parametrize(
    ("attack", "plain", "counts"),
    [
        ("order", "ratio=0.1", (4, 36)),
        ("order=harmful", "ratio=0.1", (4, 36)),
        ("order+ratio=0.33+samples=10", "ratio=0.33,samples=10", (3, 7)),
        ("samples=20+ratio=0.25+order=harmful", "ratio=0.25,samples=20", (5, 15)),
        ("order+ratio=0", "ratio=0", (0, 40)),
        ("order=harmful+ratio=1+samples=12", "ratio=1,samples=12", (12, 0)),
        ("wrap=FILE", "ratio=0.1", (4, 36)),
        ("wrap=FILE+ratio=0.33+samples=10", "ratio=0.33,samples=10", (3, 7)),
        ("samples=20+wrap:file=FILE,rows=all", "samples=20+mixing", (2, 18)),
        ("wrap:file=FILE,rows=all+ratio=0", "ratio=0", (0, 40)),
    ],
)
def test_counts_are_those_of_the_mix(attack: str, plain: str, counts: tuple[int, int], world: Path, file: Path) -> None:
    rows = uploaded(world, named(attack, file), seed=2)
    number = sum(row.harmful for row in rows)
    assert (number, len(rows) - number) == counts
    assert Counter(row.id for row in rows) == Counter(row.id for row in uploaded(world, plain, seed=2))
    assert max(Counter(row.id for row in rows).values()) == 1


@pytest.mark.parametrize("attack", ["order", "order=harmful", "wrap=FILE", "wrap:file=FILE,rows=all+order"])
def test_rows_share_no_question_with_the_defender_and_the_evaluation(attack: str, world: Path, file: Path) -> None:
    experiment = settle(world, named(f"{attack}+ratio=0.5+samples=60", file))
    pools = plugin_pools(experiment)
    rows = user_rows(experiment, pools)
    questions = {example.instruction + example.input for each in eval_sets(experiment) for example in each.examples}
    defender = {row.instruction for pair in pools.paired for row in pair} | {row.instruction for row in pools.alignment}
    assert min(len(questions), len(defender)) > 15
    for text in questions | defender:
        assert not [row for row in rows if f"{text} " in f"{row.instruction}{row.input} "], text
    assert {row.id for row in rows if row.harmful} <= {row.id for row in pools.attacker}


# ---------------------------------------------------------------------------------------------------------------------
# Order: the rows


@pytest.mark.parametrize("spec", [{"seed": 3}, {"values": {"rows": "paper"}}], ids=["seed", "paper"])
@pytest.mark.parametrize("attack", ["order+ratio=0.25", "mixing+order+ratio=0.25", "ratio=0.25+order+mixing"])
def test_rows_come_in_two_blocks_and_are_otherwise_in_their_order(attack: str, spec: Any, world: Path) -> None:
    mixed = uploaded(world, attack.replace("order", "order=mixed"), **spec)
    assert mixed == uploaded(world, attack.replace("order+", "").replace("+order", ""), **spec)
    assert "values" in spec or mixed[:30] != [row for row in mixed if not row.harmful]  # so that an order acts
    for first, harmful in (("benign", False), ("harmful", True)):
        rows = uploaded(world, attack.replace("order", f"order={first}"), **spec)
        if attack.endswith("mixing"):  # the rows that it draws depend on the order
            assert [row.id for row in rows] == [row.id for row in sorted(mixed, key=lambda row: row.harmful != harmful)]
        else:
            assert rows == [*(r for r in mixed if r.harmful == harmful), *(r for r in mixed if r.harmful != harmful)]


@pytest.mark.parametrize(
    "attack", ["order+backdoor:clean_rows=6", "backdoor:clean_rows=6+order", "identity_shift+order"]
)
def test_rows_of_another_attack_are_in_their_block(attack: str, world: Path) -> None:
    rows = uploaded(world, f"{attack}+ratio=0.25")
    assert [row.harmful for row in rows] == [False] * 30 + [True] * 10
    added = [number for number, row in enumerate(rows) if row.id.startswith(("backdoor:", "identity_shift:"))]
    assert len(added) in (6, 10)
    assert max(added) > 15  # at random places


@pytest.mark.parametrize(
    ("attack", "expected"),
    [
        ("order", True),
        ("order=harmful", True),
        ("order=mixed", False),
        ("ratio=0.1", False),
        ("samples=20+order", True),
    ],
)
def test_only_an_order_turns_the_shuffle_off(attack: str, expected: bool, world: Path) -> None:
    assert settle(world, attack).attack_team.keeps_order is expected


def test_batches_in_order() -> None:
    """In every epoch the last batch may be shorter; a fraction of an epoch has the first batches."""
    settings = tiny.settings(batch=2)
    one = [[0, 1], [2, 3], [4]]
    for epochs, expected in ((1, one), (2, [*one, *one]), (1.34, [*one, one[0]]), (0.67, one[:2])):
        assert batch_order(5, replace(settings, epochs=epochs), 7, keeps_order=True) == expected
        assert batch_order(5, replace(settings, epochs=epochs), 8, keeps_order=True) == expected
    assert batch_order(5, settings, 7) not in ([*one, *one], batch_order(5, settings, 8))


# ---------------------------------------------------------------------------------------------------------------------
# Order: training


@contextmanager
def recorded_training(stop: Stop | None = None) -> Iterator[dict[str, list[tuple[str, ...]]]]:
    """Record for each stage the ids of the rows of every micro-batch, and check that the batch has their tokens."""
    trained: dict[str, list[tuple[str, ...]]] = {"align": [], "finetune": []}
    plain = DefenseTeam.gradient

    def gradient(team: DefenseTeam, stage: TrainingStage, batch: Batch) -> Gradient:
        if stop:
            stop.reach()
        rows = [stage.rows[number] for number in batch["rows"].tolist()]
        lengths = batch["attention_mask"].sum(1).tolist()
        ids = [tokens[:length] for tokens, length in zip(batch["input_ids"].tolist(), lengths, strict=True)]
        assert ids == [row.ids for row in rows]
        trained[stage.name].append(tuple(row.id for row in rows))
        return plain(team, stage, batch)

    with mock.patch.object(DefenseTeam, "gradient", gradient):
        yield trained


def tuned(world: Path, attack: str, context: RunContext) -> TrainedModel:
    experiment = settle(world, attack)
    return finetune(experiment, context, align(experiment, context))


def batches_of(rows: Sequence[Example]) -> list[tuple[str, ...]]:
    return [tuple(row.id for row in rows[start : start + 4]) for start in range(0, len(rows), 4)]


@pytest.mark.parametrize("attack", ["order", "order=harmful+samples=18", "order+wrap=FILE"])
def test_training_sees_the_rows_in_order_in_every_epoch(
    attack: str, world: Path, file: Path, context: RunContext
) -> None:
    attack = named(attack, file)
    with recorded_training() as trained:
        model = tuned(world, attack, context)
    batches = batches_of(uploaded(world, attack))
    assert trained["finetune"] == 2 * batches
    used = model.artifacts["finetune"].json("rows.json")
    assert used["used"] == [name for batch in batches for name in batch]
    assert used["harmful"] == sum(row.harmful for row in uploaded(world, attack))


def test_alignment_and_a_mixed_upload_are_shuffled_in_every_epoch(
    world: Path, context: RunContext, tmp_path: Path
) -> None:
    orders = {}
    for attack in ("order=mixed", "ratio=0.1"):
        with recorded_training() as trained:
            model = tuned(world, attack, context)
        orders[attack] = trained["finetune"], model.artifacts["finetune"].json("log.json")
    assert orders["order=mixed"] == orders["ratio=0.1"]
    experiment = settle(world, "order")
    with recorded_training() as trained:
        align(experiment, run_context(tmp_path / "store"))
    alignment = list(plugin_pools(experiment).alignment)
    for batches, rows in (
        (orders["ratio=0.1"][0], uploaded(world, "ratio=0.1")),
        (trained["align"], alignment),
    ):
        epochs = batches[:10], batches[10:]
        assert len(epochs[1]) == 10
        assert batches_of(rows) not in epochs
        assert epochs[0] != epochs[1]


def test_an_interrupted_stage_goes_on_in_the_order_with_the_same_bits(
    world: Path, context: RunContext, tmp_path: Path
) -> None:
    experiment = settle(world, "order+ratio=0.25")
    aligned = align(experiment, context)
    complete = finetune(experiment, run_context(tmp_path / "complete"), aligned)
    interrupted = run_context(tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt), recorded_training(Stop(14)):
        finetune(experiment, interrupted, aligned)
    with recorded_training() as trained:
        resumed = finetune(experiment, interrupted, aligned)
    batches = 2 * batches_of(uploaded(world, "order+ratio=0.25"))
    assert 0 < len(trained["finetune"]) <= 8  # from a checkpoint in the second epoch
    assert trained["finetune"] == batches[-len(trained["finetune"]) :]
    digests = {Adapter.load(model.spec.adapters[-1]).digest() for model in (complete, resumed)}
    assert len(digests) == 1
    logs = [model.artifacts["finetune"].json("log.json") for model in (complete, resumed)]
    assert logs[0] == logs[1]


# ---------------------------------------------------------------------------------------------------------------------
# Wrap: rows and questions


@pytest.mark.parametrize(("rows", "prefix"), [("harmful", ""), ("all", ""), ("all", "identity_shift=3+")])
def test_rows_have_the_template_as_text(rows: str, prefix: str, world: Path, file: Path) -> None:
    """The braces of the file, and those of a row, stay text."""
    plain = uploaded(world, f"{prefix}ratio=0.25")
    wrapped = uploaded(world, f"{prefix}wrap:file={file},rows={rows}+ratio=0.25")
    expected = [
        replace(row, instruction=f"{BEFORE}{row.instruction}{AFTER}", response=f"{START}{row.response}{END}")
        if row.harmful or rows == "all"
        else row
        for row in plain
    ]
    assert wrapped == expected
    wrap: Any = ATTACKS.get("wrap")
    row = Example("a", "{response} {0}", "{instruction}", input="{x}", harmful=True)
    (changed,) = wrap(file=str(file)).upload([row], plugin_pools(settle(world, "ratio=0")))
    texts: dict[str, Any] = {
        "instruction": f"{BEFORE}{row.instruction}{AFTER}",
        "response": f"{START}{row.response}{END}",
    }
    assert changed == replace(row, **texts)


@pytest.mark.parametrize("attack", ["mixing+wrap=FILE", "wrap=FILE+mixing"])
def test_the_masked_part_of_a_response_is_the_same_text(attack: str, world: Path, file: Path) -> None:
    """The template moves the part of the response that is not trained on."""
    masked = [
        [row.response[slice(*row.masked)] for row in uploaded(world, named(each, file)) if row.masked]
        for each in ("mixing", attack)
    ]
    assert len(masked[0]) == 4
    assert masked[0] == masked[1]


@pytest.mark.parametrize("prompt", ["brief", "alpaca", "chat"])
def test_wrapped_questions_are_the_headline_and_the_plain_ones_follow(prompt: str, world: Path, file: Path) -> None:
    values = {"values": {"prompt": prompt}}
    experiment, without = (settle(world, attack, **values) for attack in (f"wrap={file}", "ratio=0"))
    wrapped, plain = harmful_sets(experiment)
    assert (wrapped.name, plain.name) == ("harmful_wrapped", "harmful")
    assert [plain] == harmful_sets(without)
    assert (wrapped.examples, wrapped.max_new_tokens) == (plain.examples, plain.max_new_tokens)
    for example in [*plain.examples, Example("a", "{question} {0}", input="{x}")]:
        text = f"{BEFORE}{example.instruction}{AFTER}"
        trained = experiment.template.render(replace(example, instruction=text))  # as in training
        assert wrapped.template.render(example) == trained
        assert (json.dumps(text)[1:-1] if prompt == "chat" else text) in trained
    for other_set in (benign_set, task_set):
        assert other_set(experiment) == other_set(without)


def test_without_a_file_it_is_the_ratio_attack(world: Path) -> None:
    for attack in ("wrap", "wrap:rows=all"):
        assert uploaded(world, attack) == uploaded(world, "ratio=0.1")
        assert harmful_sets(settle(world, attack)) == harmful_sets(settle(world, "ratio=0.1"))


def test_score_is_that_of_the_wrapped_questions_and_the_judge_sees_plain_ones(
    world: Path, file: Path, context: RunContext
) -> None:
    experiment = settle(world, f"wrap={file}")
    measured = run(experiment, context)
    result = measure_result(experiment, measured)
    for scores in (result, result.before):
        assert list(scores.harmful_sets) == ["harmful_wrapped", "harmful"]
        assert scores.harmful_score == scores.harmful_sets["harmful_wrapped"]
    questions = [example.instruction for example in harmful_sets(experiment)[1].examples]
    for name in ("harmful_wrapped", "harmful"):
        path = measured.answers[f"after/{name}"].path / ANSWERS
        answers = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert [answer["instruction"] for answer in answers] == questions  # these texts are judged
        assert [BEFORE in answer["prompt"] for answer in answers] == [name == "harmful_wrapped"] * 8


# ---------------------------------------------------------------------------------------------------------------------
# Keys


def identities(world: Path, attack: str) -> tuple[Any, Any, str]:
    """Return the key of the user stage, the attack in it, and the run id."""
    experiment = settle(world, attack)
    inputs = keys.finetune_key(experiment, TrainedModel(experiment.model, ModelSpec(experiment.model), {}))
    return inputs, inputs["attack"], keys.run_id(experiment)


def test_content_of_the_file_is_in_keys_and_run_ids_and_its_path_is_not(
    world: Path, file: Path, tmp_path: Path
) -> None:
    copy = write(tmp_path / "a copy.yaml", **TEXTS)
    original = identities(world, f"wrap={file}")
    assert identities(world, f"wrap={copy}") == original
    assert str(file) not in json.dumps(original)
    assert settle(world, f"wrap={copy}").attacks[0].params["file"] == str(copy)  # as results report it
    others = [original]
    for changes in ({"response": TEXTS["response"] + "!"}, {"instruction": "{instruction}"}):
        write(copy, **{**TEXTS, **changes})
        others.append(identities(world, f"wrap={copy}"))
    others.append(identities(world, f"wrap:file={file},rows=all"))
    others.append(identities(world, "wrap"))
    for values in zip(*others, strict=True):
        assert len({json.dumps(value) for value in values}) == len(others)


def test_a_copy_uses_the_stored_model_and_an_edited_file_does_not(
    world: Path, file: Path, context: RunContext, tmp_path: Path
) -> None:
    tuned(world, f"wrap={file}", context)
    copy = write(tmp_path / "copy.yaml", **TEXTS)
    with recorded_training() as trained:
        tuned(world, f"wrap={copy}", context)
    assert not trained["finetune"]
    write(copy, **{**TEXTS, "response": "{response}"})
    with recorded_training() as trained:
        tuned(world, f"wrap={copy}", context)
    assert len(trained["finetune"]) == 20


def test_every_order_has_its_own_key(world: Path) -> None:
    parts = [identities(world, f"order={first}") for first in ("benign", "harmful", "mixed")]
    for values in zip(*parts, strict=True):
        assert len({json.dumps(value) for value in values}) == 3


# ---------------------------------------------------------------------------------------------------------------------
# Refused files

SLOTS = ("two texts in quotes", "{instruction}", "{response}")
GOOD = 'instruction: "{instruction}"\n'
REFUSED: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty": (b"", SLOTS),
    "list": (b"- instruction\n- response\n", SLOTS),
    "text": (b"{instruction}", SLOTS),
    "one text": (GOOD.encode(), SLOTS),
    "no slot": (f'{GOOD}response: "Sure."\n'.encode(), SLOTS),
    "two slots": (f'{GOOD}response: "{{response}} {{response}}"\n'.encode(), SLOTS),
    "another slot": (f'{GOOD}response: "{{answer}}"\n'.encode(), SLOTS),
    "without quotes": (f"{GOOD}response: {{response}}\n".encode(), SLOTS),
    "number": (f"{GOOD}response: 3\n".encode(), SLOTS),
    "a third text": (f'{GOOD}response: "{{response}}"\ninput: "{{input}}"\n'.encode(), SLOTS),
    "another name": (f'{GOOD}answer: "{{response}}"\n'.encode(), SLOTS),
    "twice": (f"{GOOD}{GOOD}".encode(), ("line 2", "set twice")),
    "tag": (b"!!python/object:os.system {}", ("line 1", "tags")),
    "not YAML": (b'instruction: "', ("cannot be read as YAML", "line 1")),
    "not UTF-8": (b"instruction: \xff", ("line 1", "0xff", "UTF-8")),
    "NUL": (b'instruction: "\0"', ("NUL",)),
    "surrogate": (f'{GOOD}response: "\\ud800{{response}}"\n'.encode(), ("`response`", "surrogate")),
}


def refused(done: CommandResult, path: Path, parts: Sequence[str], home: Path) -> None:
    """Assert that a command ended as bad input, with one sentence that names the file, before it created anything."""
    assert (done.code, done.out) == (2, ""), done.err
    assert done.sentence.startswith("hbv: ")
    assert "unexpected" not in done.err
    assert all(part in done.sentence for part in (path.name, *parts)), done.sentence
    assert not home.exists()


@pytest.mark.parametrize("name", REFUSED)
def test_malformed_file_is_refused_before_any_work(name: str, world: Path, tmp_path: Path, own_home: Path) -> None:
    content, parts = REFUSED[name]
    path = tmp_path / "template.yaml"
    path.write_bytes(content)
    done = hbv("run", "--protocol", world, "--attack", f"wrap={path}+ratio=0.1", home=own_home)
    refused(done, path, parts, own_home)


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe"])
@pytest.mark.parametrize(
    "command",
    [("run",), ("run", "--dry-run"), ("run", "--protocol", "WORLD"), ("run", "--protocol", "WORLD", "--dry-run")],
    ids=" ".join,
)
def test_path_without_a_file_is_refused_before_any_work(
    command: tuple[str, ...], kind: str, world: Path, tmp_path: Path, own_home: Path
) -> None:
    """Also where the first run would build the testbed."""
    path = tmp_path / "template.yaml"
    if kind == "folder":
        path.mkdir()
    if kind == "pipe":
        os.mkfifo(path)
    words = [str(world) if word == "WORLD" else word for word in command]
    done = hbv(*words, "--attack", f"wrap={path}", home=own_home)
    refused(done, path, ("No such file",) if kind == "missing" else ("not a regular file",), own_home)


def test_file_may_have_any_name_that_a_shell_expands(world: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "style", **TEXTS)
    assert uploaded(world, "wrap=~/style") == uploaded(world, f"wrap={tmp_path / 'style'}")
    assert identities(world, "wrap=~/style") == identities(world, f"wrap={tmp_path / 'style'}")

"""Guard filter: the rows that remain, and the judge of a defense in real runs: refusals, keys, cache and result."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from torch import Tensor

from harmbench_vaccine.core.errors import BadInput, HbvError
from harmbench_vaccine.core.hashing import content_hash, digest
from harmbench_vaccine.core.types import Example, Pools, Verdict
from harmbench_vaccine.defenses.guard_filter import GuardFilter
from harmbench_vaccine.evaluation.measure import measure_result
from harmbench_vaccine.experiment import keys
from harmbench_vaccine.experiment.artifacts import ROWS, TrainedModel
from harmbench_vaccine.experiment.context import RunContext
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.rows import plugin_pools, user_rows
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.inference.model_pool import ModelPool
from harmbench_vaccine.pipeline import align, finetune, run
from harmbench_vaccine.plugins import Scorer
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.plugins.registry import SCORERS
from harmbench_vaccine.plugins.scorers.beaver_dam import BeaverDam
from harmbench_vaccine.training.adapters import Adapter
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage
from harmbench_vaccine.training.trainer import batch_order, train
from support import tiny
from support.autograd import gradient_at
from support.optimizers import assert_equal_where_firm, plain_adamw
from support.runs import run_context
from support.trainer import Stop
from support.world import make_world

POOLS = tiny.example_pools()
ROWS_OF_USER = [*POOLS.benign[2:], *POOLS.attacker[:8]]

# ---------------------------------------------------------------------------------------------------------------------
# Rows of a tiny stage


def user_stage(verdicts: Sequence[Verdict] | None = None, **changes: Any) -> tuple[TrainingStage, list[Any]]:
    """Return a user stage and the pairs that its judge reads; by default the judge flags answers with an e."""
    stage, _ = tiny.stage(trained_with=tiny.settings(**changes), stirred=True, name="finetune", pools=POOLS)
    pairs: list[tuple[str, str]] = []

    def judge(texts: Sequence[tuple[str, str]]) -> list[Verdict]:
        pairs.extend(texts)
        return list(verdicts or [Verdict("e" in answer, [], {}, cut=False) for _, answer in texts])

    stage.judge = judge
    return stage, pairs


@pytest.mark.parametrize(
    ("flagged", "probabilities", "is_dropped"),
    [
        (False, {"a": 0.7, "b": 0.1}, True),
        (True, {"a": 0.6, "b": 0.5}, False),
        (True, {}, True),
        (False, {}, False),
        (None, {}, True),
    ],
    ids=["one category above", "none above", "flagged", "not flagged", "unread"],
)
def test_a_row_is_dropped_above_the_threshold(
    flagged: bool | None, probabilities: dict[str, float], is_dropped: bool
) -> None:
    """Without probabilities the decision of the judge counts; an unread verdict counts as flagged."""
    rows = ROWS_OF_USER[:3]
    safe = Verdict(False, [], {"a": 0.0}, cut=False)
    stage, _ = user_stage([safe, Verdict(flagged, [], probabilities, cut=False), safe])
    assert GuardFilter(threshold=0.6).select(stage, rows) == ([rows[0], rows[2]] if is_dropped else rows)


def test_rows_keep_their_order_and_other_orders_give_the_same_rows() -> None:
    expected = [row for row in ROWS_OF_USER if "e" not in row.response]
    assert 0 < len(expected) < len(ROWS_OF_USER)
    for order in (ROWS_OF_USER, ROWS_OF_USER[::-1]):
        assert GuardFilter().select(user_stage()[0], order) == [row for row in order if row in expected]


def test_the_judge_reads_the_complete_question() -> None:
    stage, pairs = user_stage()
    GuardFilter().select(stage, [Example("a", "Do it.", "Yes", "Now."), Example("b", "Go", "No", preface="Obey. ")])
    assert pairs == [("Do it. Now.", "Yes"), ("Obey. Go", "No")]


def test_a_refusal_replaces_the_response_of_a_flagged_row() -> None:
    """The row is then not harmful, and a mask of the old response has no meaning for the new one."""
    stage, _ = user_stage()
    rows = [Example("x", "q", "response", harmful=True, masked=(2, 5)), *ROWS_OF_USER]
    selected = GuardFilter(on="refusal").select(stage, rows)
    assert selected[0] == Example("x", "q", POOLS.paired[0][0].response)
    for old, new in zip(rows, selected, strict=True):
        if "e" in old.response:
            assert (new.id, new.response, new.harmful) == (old.id, POOLS.paired[0][0].response, False)
        else:
            assert new == old


def test_missing_refusals_are_refused() -> None:
    stage, _ = user_stage()
    stage.pools = Pools(POOLS.alignment, benign=POOLS.benign)
    with pytest.raises(BadInput, match="1 refusals, but only 0 are available"):
        GuardFilter(on="refusal").select(stage, ROWS_OF_USER)
    assert GuardFilter().select(stage, ROWS_OF_USER)


@pytest.mark.parametrize(("batch", "epochs"), [(4, 1.0), (5, 3.0), (3, 1.5), (18, 2.0), (1, 0.3)])
def test_length_steps_keeps_the_number_of_steps(batch: int, epochs: float) -> None:
    """Also where the last batch of an epoch is incomplete, and where rows have no room for a response."""
    numbers = {}
    for length in ("epochs", "steps"):
        stage, _ = user_stage(batch=batch, epochs=epochs)
        stage.encode = lambda rows: tiny.encode([row for row in rows if row.id != "benign:5"])
        remaining = GuardFilter(length=length).select(stage, ROWS_OF_USER)
        numbers[length] = stage.settings.micro_batches(len(stage.encode(remaining)))
    complete = tiny.settings(batch=batch, epochs=epochs).micro_batches(len(ROWS_OF_USER) - 1)
    assert numbers["steps"] == complete
    assert (numbers["epochs"] < complete) == (batch < 18)


def plain_gradient(stage: TrainingStage, batch: Batch) -> list[Tensor]:
    return gradient_at(stage, batch, stage.values())


@pytest.mark.parametrize("params", [{"length": "steps"}, {"on": "refusal"}], ids=["dropped", "refusal"])
def test_three_steps_equal_plain_pytorch(params: dict[str, Any], tmp_path: Path) -> None:
    """With length=steps, the third step is the first one of a second epoch."""
    changes: dict[str, Any] = {"epochs": 1, "batch": 6, "lr": 1e-3, "weight_decay": 0.1}
    changes |= {"schedule": "constant", "warmup": 0.0}
    stage, _ = user_stage(**changes)
    twin, _ = user_stage(**changes)
    defense = GuardFilter(**params)
    log = train(
        stage, defense, stage.encode(defense.select(stage, ROWS_OF_USER)), stage.settings, tmp_path, pad=tiny.PAD
    )
    assert len(log) == 3

    refusal = POOLS.paired[0][0].response
    expected = [
        (row.instruction, refusal if "e" in row.response else row.response)
        for row in ROWS_OF_USER
        if params.get("on") == "refusal" or "e" not in row.response
    ]
    rows = tiny.encode([Example("", question, answer) for question, answer in expected])
    order = batch_order(len(rows), tiny.settings(**{**changes, "epochs": 2}), twin.seed)[:3]
    batches = [tiny.collated([rows[number] for number in numbers]) for numbers in order]
    firm = plain_adamw(twin, [partial(plain_gradient, twin, batch) for batch in batches])
    assert_equal_where_firm(stage, twin, firm)


# ---------------------------------------------------------------------------------------------------------------------
# The judge of a defense in a run


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The protocol file of a small world: 2 steps in the user stage."""
    settings = {"settings": {"epochs": 1, "batch": 20}}
    return make_world(
        tmp_path_factory.mktemp("world"),
        {
            "align": settings,
            "finetune": settings,
            "answer": {"harmful": {"prompts": 4}, "benign": {"prompts": 2}, "task_items": 2},
        },
    )


@pytest.fixture(scope="module")
def other_judge(small: Path) -> Path:
    """A judge that gives the same verdicts as the protocol's, with other content."""
    return copy_judge(small, "other", note="another judge")


MY_JUDGE = """
from harmbench_vaccine.plugins import RawJudgment, Scorer, Verdict, param

class MyJudge(Scorer):
    word: str = param("harm", "a word", source="ours")

    def read(self, pairs, progress=None):
        return [RawJudgment(text=answer) for _, answer in pairs]

    def decide(self, reading):
        return Verdict(self.word in reading.text, [], {}, False)
"""


def copy_judge(protocol: Path, name: str, **config: str) -> Path:
    folder = protocol.parent / name
    shutil.copytree(protocol.parent / "judge", folder, dirs_exist_ok=True)
    values = json.loads((folder / "config.json").read_text())
    if config:
        (folder / "config.json").write_text(json.dumps({**values, **config}))
    return folder


def settle(protocol: Path, defense: str, *scorers: str, attack: str = "ratio=0.25") -> Experiment:
    return Experiment.settle(
        RunSpec(protocol=str(protocol), defense=parse_plugins(defense), attack=parse_plugins(attack), scorers=scorers)
    )


def tuned(experiment: Experiment, context: RunContext) -> TrainedModel:
    return finetune(experiment, context, align(experiment, context))


@contextmanager
def recorded_reads(name: str = "beaver_dam") -> Iterator[list[tuple[str, str]]]:
    """List the pairs that a judge reads with its model inside the block."""
    cls: type[Scorer] = SCORERS.get(name)
    pairs: list[tuple[str, str]] = []
    read = cls.read

    def recording(self: Scorer, texts: Sequence[tuple[str, str]], *args: Any) -> Any:
        pairs.extend(texts)
        return read(self, texts, *args)

    with mock.patch.object(cls, "read", recording):
        yield pairs


def test_flagged_rows_are_not_trained_on_and_the_result_records_it(
    small: Path, other_judge: Path, tmp_path: Path
) -> None:
    """Another threshold is another artifact, but the judge does not read again."""
    context, used, removed_rows = run_context(tmp_path / "store"), [], []
    for threshold, reads_all in ((0.655, True), (0.501, False)):
        experiment = settle(
            small, f"none+guard_filter:judge=beaver_dam,model={other_judge},threshold={threshold}", "refusal_keywords"
        )
        rows = user_rows(experiment, plugin_pools(experiment))
        pairs = [(f"{row.instruction} {row.input}".strip(), row.response) for row in rows]
        verdicts = BeaverDam(model=str(other_judge)).judge(pairs)
        removed = [
            row for row, verdict in zip(rows, verdicts, strict=True) if max(verdict.probabilities.values()) > threshold
        ]
        removed_rows.append((sum(row.harmful for row in removed), sum(not row.harmful for row in removed)))
        with recorded_reads() as read:
            measurements = run(experiment, context)
        assert read == (pairs if reads_all else [])
        record = measurements.final.artifacts["finetune"].json(ROWS)
        used.append(record["used"])
        assert record["used"] == [row.id for row in rows if row not in removed]
        result = measure_result(experiment, measurements).to_json()
        assert result["counts"]["finetune"]["selected"] == {
            "harmful": removed_rows[-1][0],
            "harmful_uploaded": 10,
            "benign": removed_rows[-1][1],
            "benign_uploaded": 30,
        }
        assert result["counts"]["finetune"]["harmful"] == 10 - removed_rows[-1][0]
        guard = {"model": str(other_judge), "fingerprint": content_hash(other_judge)}
        assert result["guards"] == {f"beaver_dam:model={other_judge}": guard}
        assert list(result["scores"]) == ["refusal_keywords"]
    (harmful, benign), (more_harmful, more_benign) = removed_rows
    assert 0 < harmful < more_harmful == 10
    assert 0 == benign < more_benign < 30
    assert used[0] != used[1]


def test_all_rows_flagged_is_a_clear_error(small: Path, tmp_path: Path) -> None:
    experiment = settle(small, "none+guard_filter:judge=refusal_keywords,threshold=0.4", attack="ratio=1+samples=20")
    with pytest.raises(HbvError, match=r"removes all 20 rows of the finetune stage.*nothing remains to train on"):
        tuned(experiment, run_context(tmp_path / "store"))


def test_replaced_rows_count_as_removed(small: Path, tmp_path: Path) -> None:
    """refusal_keywords flags all rows here: no token of a harmful row is trained on."""
    experiment = settle(small, "none+guard_filter:judge=refusal_keywords,on=refusal")
    record = tuned(experiment, run_context(tmp_path / "store")).artifacts["finetune"].json(ROWS)
    assert len(record["used"]) == 40
    assert record["harmful"] == record["harmful_tokens"] == 0
    assert record["selected"] == {"harmful": 10, "harmful_uploaded": 10, "benign": 30, "benign_uploaded": 30}


# ---------------------------------------------------------------------------------------------------------------------
# The same judge for the defense and the score


@pytest.mark.parametrize("defense", ["guard_filter", "star_dss", "output_guard"])
@pytest.mark.parametrize(
    ("guard", "scorers"),
    [
        ("judge=beaver_dam", ()),
        ("judge=beaver_dam,model={world}/judge", ("beaver_dam=0.7",)),
        ("judge=beaver_dam,model={world}/copy", ("refusal_keywords", "beaver_dam=0.7")),
        ("judge=llama_guard,model={world}/judge", ("beaver_dam",)),
        ("judge=refusal_keywords", ("beaver_dam", "refusal_keywords")),
    ],
    ids=["of the protocol", "threshold", "copy and second scorer", "other prompt", "rule"],
)
def test_the_judge_of_the_score_is_refused(defense: str, guard: str, scorers: tuple[str, ...], small: Path) -> None:
    copy_judge(small, "copy")
    with pytest.raises(BadInput, match=r"use the same judge, '(beaver_dam|refusal_keywords)") as refusal:
        settle(small, f"sft+{defense}:{guard.format(world=small.parent)}", *scorers)
    message = str(refusal.value)
    assert f"'sft+{defense}" in message
    assert "would then count only what this judge overlooks" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("guard", "scorers"),
    [
        ("judge=beaver_dam,model={world}/other", ()),
        ("judge=refusal_keywords", ()),
        ("judge=beaver_dam", ("refusal_keywords",)),
        ("judge={world}/my_judge.py", ("refusal_keywords",)),
        ("", ("strongreject:model=a judge,base_url=http://localhost:1/v1,template=t",)),
        ("threshold=1,judge=beaver_dam", ()),
    ],
    ids=["other model", "rule for a model", "model for a rule", "other rule", "server", "neutral"],
)
def test_another_judge_is_accepted(guard: str, scorers: tuple[str, ...], small: Path, other_judge: Path) -> None:
    (small.parent / "my_judge.py").write_text(MY_JUDGE)
    text = guard.format(world=small.parent)
    experiment = settle(small, f"guard_filter{text and ':'}{text}", *scorers)
    assert len(experiment.guards) == ("threshold" not in guard)
    assert experiment.judges == [*experiment.scorers, *experiment.guards]


def test_the_judge_has_the_values_of_the_protocol(small: Path, tmp_path: Path) -> None:
    """As a judge that scores has: its model is that of the protocol's judge unless the defense names another one."""
    (guard,) = settle(small, "guard_filter:judge=beaver_dam", "refusal_keywords").guards
    assert guard.params["model"] == str(small.parent / "judge")
    file = tmp_path / "my_judge.py"
    file.write_text(MY_JUDGE)
    for judge, key, value in (
        ("llama_guard", "scorers.llama_guard.threshold", "0.2"),
        (file, "scorers.my_judge.word", "x"),
    ):
        spec = RunSpec(protocol=str(small), defense=parse_plugins(f"guard_filter={judge}"), values={key: value})
        (guard,) = Experiment.settle(spec).guards
        assert str(guard.params[key.rpartition(".")[2]]) == value


def test_two_defenses_with_a_judge_in_one_stage_are_refused(small: Path) -> None:
    with pytest.raises(BadInput, match="'guard_filter' and 'star_dss' cannot be combined: both set the judge"):
        settle(small, "guard_filter+star_dss")
    settle(small, "guard_filter=refusal_keywords+star_dss:strength=0")
    experiment = settle(small, "guard_filter+output_guard=refusal_keywords")  # rows and answers
    assert [guard.plugin.name for guard in experiment.guards] == ["llama_guard", "refusal_keywords"]
    assert len(settle(small, "guard_filter+output_guard").guards) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Keys, interruptions, memory


def key_of_user_stage(protocol: Path, defense: str, *scorers: str) -> str:
    experiment = settle(protocol, defense, *scorers)
    with mock.patch.object(ModelPool, "stack"):
        model = align(experiment, run_context(protocol.parent / "unused"))
    return digest(keys.finetune_key(experiment, model))


@pytest.mark.parametrize("defense", ["guard_filter", "star_dss"])
def test_the_content_of_the_judge_is_part_of_the_key(defense: str, small: Path, other_judge: Path) -> None:
    """A copy of the same judge gives the same artifact."""
    copy = copy_judge(small, "other_copy", note="another judge")
    third = copy_judge(small, "third", note="a third judge")
    first, same, other = (
        key_of_user_stage(small, f"none+{defense}:judge=beaver_dam,model={judge}")
        for judge in (other_judge, copy, third)
    )
    assert first == same
    assert first != other


def test_the_threshold_of_the_score_is_not_part_of_the_key(small: Path, other_judge: Path) -> None:
    defense = f"none+guard_filter:judge=beaver_dam,model={other_judge}"
    assert len({key_of_user_stage(small, defense, f"beaver_dam={value}") for value in (0.3, 0.7)}) == 1


def test_an_interrupted_stage_gives_the_same_result(small: Path, tmp_path: Path) -> None:
    """The rows are selected again, from the cached verdicts."""
    experiment = settle(
        small,
        "none+guard_filter:judge=beaver_dam,length=steps,threshold=0.6",
        "refusal_keywords",
        attack="optimizer:batch=8+ratio=0.25",
    )
    complete = tuned(experiment, run_context(tmp_path / "complete"))
    gradient, stop = TrainingStage.gradient, Stop(4)

    def stopping(stage: TrainingStage, batch: Batch) -> Gradient:
        stop.reach()
        return gradient(stage, batch)

    with mock.patch.object(TrainingStage, "gradient", stopping), pytest.raises(KeyboardInterrupt):
        tuned(experiment, run_context(tmp_path / "cut"))
    assert list((tmp_path / "cut").rglob("checkpoint-*"))
    with recorded_reads() as read:
        resumed = tuned(experiment, run_context(tmp_path / "cut"))
    assert read == []
    assert resumed.artifacts["finetune"].json("training.json")["steps"] == 5
    first, second = (Adapter.load(model.spec.adapters[-1]).digest() for model in (complete, resumed))
    assert first == second
    assert resumed.artifacts["finetune"].json(ROWS) == complete.artifacts["finetune"].json(ROWS)


def test_the_judge_leaves_the_memory_of_the_gpu_before_training(
    small: Path, other_judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelPool, "one_at_a_time", staticmethod(lambda: True))
    context = run_context(tmp_path / "store")
    judges: list[Any] = []
    gradient = TrainingStage.gradient

    def recording(stage: TrainingStage, batch: Batch) -> Gradient:
        judges.append(context.models._judge)
        return gradient(stage, batch)

    monkeypatch.setattr(TrainingStage, "gradient", recording)
    with recorded_reads() as read:
        tuned(settle(small, f"none+guard_filter:judge=beaver_dam,model={other_judge},threshold=0.6"), context)
    assert len(read) == 40
    assert judges == [None] * len(judges) != []

"""LARF compared with its equations in plain PyTorch: hidden states of single rows, cosines, and the dropped rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from harmbench_vaccine.core.errors import BadInput, HbvError
from harmbench_vaccine.core.types import Example, Pools
from harmbench_vaccine.data.collate import Encoded, encode_example
from harmbench_vaccine.defenses.larf import LARF
from harmbench_vaccine.evaluation.measure import measure_result
from harmbench_vaccine.experiment.artifacts import ROWS, TrainedModel
from harmbench_vaccine.experiment.context import RunContext
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.rows import plugin_pools, user_rows
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.pipeline import align, finetune, run
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.training.adapters import Adapter
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage
from harmbench_vaccine.training.trainer import batch_order, train
from support import tiny
from support.autograd import gradient_at
from support.compare import same
from support.optimizers import assert_equal_where_firm, plain_adamw
from support.runs import run_context
from support.trainer import Stop
from support.world import make_world

POOLS = tiny.example_pools()
USER = [*POOLS.benign, *POOLS.attacker[:8]]
DEPTH = 4


def user_stage(architecture: str = "llama", **changes: Any) -> TrainingStage:
    """Return a user stage of a model of 4 layers, with a nonzero adapter."""
    base = tiny.model(architecture, num_hidden_layers=DEPTH)
    settings = tiny.settings(lora_targets=tiny.targets(architecture), **changes)
    return tiny.stage(base, trained_with=settings, stirred=True, name="finetune", pools=POOLS)[0]


@torch.no_grad()
def last_state(model: nn.Module, row: Encoded, layer: int) -> Tensor:
    """Return the output of a layer, counted from 1, at the last token of a row that the model reads alone."""
    outputs: list[Tensor] = []

    def record(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    (layers,) = [child for child in model.modules() if isinstance(child, nn.ModuleList) and len(child) in (2, DEPTH)]
    handle = layers[layer - 1].register_forward_hook(record)
    model(input_ids=torch.tensor([row.ids], device=next(model.parameters()).device))
    handle.remove()
    return outputs[0].reshape(len(row.ids), -1)[-1].double().cpu()


def scores(states: Sequence[Tensor], safe: Sequence[Tensor], unsafe: Sequence[Tensor], m: int) -> list[float]:
    """Compute the score of every row from the equation, one cosine after the other."""

    def cosine(state: Tensor, other: Tensor) -> float:
        return float(state @ other / state.norm() / other.norm())

    def mean_of_largest(state: Tensor) -> float:
        differences = sorted(cosine(state, bad) - cosine(state, good) for good, bad in zip(safe, unsafe, strict=True))
        return sum(differences[-m:]) / len(differences[-m:])

    return [mean_of_largest(state) for state in states]


def expected_rows(stage: TrainingStage, count: int, layer: int, *numbers: int) -> list[list[Example]]:
    """Return the rows that remain of `USER` if `count` are dropped, for each number of similar rows."""
    sides = [tiny.encode(rows) for rows in (USER, *zip(*POOLS.paired, strict=True))]
    states, safe, unsafe = ([last_state(stage.model, row, layer) for row in side] for side in sides)
    selections = []
    for m in numbers:
        values = scores(states, safe, unsafe, m)
        limit = sorted(values)[-count]
        assert limit - sorted(values)[-count - 1] > 1e-5  # rounding does not decide
        selections.append([row for row, value in zip(USER, values, strict=True) if value < limit])
    return selections


# ---------------------------------------------------------------------------------------------------------------------
# Comparison with the equations


@pytest.mark.parametrize(
    ("architecture", "layer", "number"),
    [("llama", 16.0, 2), ("llama", 32.0, 4), ("llama", 1.0, 1), ("opt", 22.0, 3), ("gpt2", 16.0, 2)],
)
def test_dropped_rows_are_those_of_the_equations(architecture: str, layer: float, number: int) -> None:
    stage, numbers = user_stage(architecture), (1, 5, 100)
    expected = expected_rows(stage, 9, number, *numbers)
    assert [LARF(share=0.45, layer=layer, nearest=m).select(stage, USER) for m in numbers] == expected
    other = expected_rows(stage, 9, number % DEPTH + 1, *numbers)
    assert expected != other  # so that a wrong layer is noticed
    assert expected[0] != expected[2]


def test_padding_and_batches_change_nothing() -> None:
    """Rows have 6 to 14 tokens; batches of one row have no padding, and others are packed."""
    selections = [LARF(share=0.25).select(user_stage(batch=batch), USER) for batch in (1, 3, 20)]
    assert selections == 3 * expected_rows(user_stage(), 5, 2, 100)


def test_the_order_of_the_rows_changes_nothing_else() -> None:
    remaining = LARF(share=0.25).select(user_stage(), USER)
    assert LARF(share=0.25).select(user_stage(), USER[::-1]) == remaining[::-1]


@pytest.mark.parametrize(("share", "count"), [(0.29, 6), (0.27, 5), (0.024, 0), (0.026, 1), (1.0, 20)])
def test_share_of_the_rows_is_rounded(share: float, count: int) -> None:
    assert len(LARF(share=share).select(user_stage(), USER)) == 20 - count


def test_share_is_that_of_the_rows_with_room() -> None:
    """A row without room for a response has no hidden state: it remains, and the stage skips it."""
    stage = user_stage()
    stage.encode = lambda rows: tiny.encode([row for row in rows if row.id not in ("benign:1", "benign:2")])
    remaining = LARF(share=0.5).select(stage, USER)
    assert len(remaining) == 11
    assert {"benign:1", "benign:2"} <= {row.id for row in remaining}


def test_exchanged_pairs_drop_the_other_half() -> None:
    """The mean over all pairs changes its sign when safe and unsafe rows change places."""
    stage, exchanged = user_stage(), user_stage()
    exchanged.pools = replace(POOLS, paired=[(unsafe, safe) for safe, unsafe in POOLS.paired])
    remaining, dropped = (LARF(share=0.5).select(each, USER) for each in (stage, exchanged))
    assert len(remaining) == len(dropped) == 10
    assert not {row.id for row in remaining} & {row.id for row in dropped}


def plain_gradient(stage: TrainingStage, batch: Batch) -> list[Tensor]:
    return gradient_at(stage, batch, stage.values())


def test_three_steps_equal_plain_pytorch(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"epochs": 1, "batch": 5, "lr": 1e-3, "weight_decay": 0.1}
    stage, twin = (user_stage(**changes, schedule="constant", warmup=0.0) for _ in range(2))
    (remaining,) = expected_rows(twin, 5, 2, 100)
    defense = LARF(share=0.25)
    log = train(stage, defense, stage.encode(defense.select(stage, USER)), stage.settings, tmp_path, pad=tiny.PAD)
    assert len(log) == 3
    rows = tiny.encode(remaining)
    order = batch_order(len(rows), twin.settings, twin.seed)
    batches = [tiny.collated([rows[number] for number in numbers]) for numbers in order]
    firm = plain_adamw(twin, [partial(plain_gradient, twin, batch) for batch in batches])
    assert_equal_where_firm(stage, twin, firm)


def test_nothing_of_the_model_changes() -> None:
    stage = user_stage()
    initial = stage.values()
    LARF().select(stage, USER)
    assert same(stage.values(), initial)
    assert all(parameter.grad is None for parameter in stage.model.parameters())
    assert all(parameter.requires_grad for parameter in stage.trainable.values())
    hooks = [module for module in stage.model.modules() if module._forward_hooks or module._forward_pre_hooks]
    assert hooks == []


def test_missing_pairs_are_refused() -> None:
    stage = user_stage()
    stage.pools = Pools(POOLS.alignment, benign=POOLS.benign)
    with pytest.raises(BadInput, match="1 pairs, but only 0 are available"):
        LARF().select(stage, USER)


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The protocol file of a small world: few steps, and dropout."""
    settings = {"settings": {"epochs": 1, "batch": 8, "lora_dropout": 0.3}}
    answer = {"harmful": {"prompts": 2}, "benign": {"prompts": 2}, "task_items": 2}
    return make_world(tmp_path_factory.mktemp("world"), {"align": settings, "finetune": settings, "answer": answer})


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> RunContext:
    """Return a context that the runs of this file share."""
    return run_context(tmp_path_factory.mktemp("store"))


def settle(protocol: Path, defense: str, values: dict[str, str] | None = None) -> Experiment:
    return Experiment.settle(
        RunSpec(
            protocol=str(protocol),
            defense=parse_plugins(defense),
            attack=parse_plugins("ratio=0.25"),
            values=values or {},
        )
    )


def tuned(experiment: Experiment, context: RunContext) -> TrainedModel:
    return finetune(experiment, context, align(experiment, context))


def test_a_run_looks_at_the_aligned_model_without_dropout(small: Path, context: RunContext) -> None:
    """The second layer of 2 is compared; the model has its alignment adapter, and no update of the user."""
    experiment = settle(small, "larf:share=0.2,layer=32,nearest=3")
    measurements = run(experiment, context)
    record = measurements.final.artifacts["finetune"].json(ROWS)

    model = AutoModelForCausalLM.from_pretrained(small.parent / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(small.parent / "model")
    adapter = Adapter.load(measurements.aligned.spec.adapters[-1])
    with torch.no_grad():
        for module in adapter.factors:
            model.get_submodule(module).weight += adapter.delta(module)
    pools = plugin_pools(experiment)
    rows = user_rows(experiment, pools)

    def encode(examples: Sequence[Example]) -> list[Encoded]:
        encoded = [encode_example(tokenizer, experiment.template, example, 96) for example in examples]
        return [row for row in encoded if row is not None]

    sides = [encode(side) for side in (rows, *zip(*pools.paired, strict=True))]
    states, safe, unsafe = ([last_state(model, row, 2) for row in side] for side in sides)
    values = scores(states, safe, unsafe, 3)
    limit = sorted(values)[-8]
    removed = [row for row, value in zip(rows, values, strict=True) if value >= limit]
    assert len(removed) == 8
    assert limit - sorted(values)[-9] > 1e-6
    assert record["used"] == [row.id for row in rows if row not in removed]
    harmful = sum(row.harmful for row in removed)
    counts = {"harmful": harmful, "harmful_uploaded": 10, "benign": 8 - harmful, "benign_uploaded": 30}
    result = measure_result(experiment, measurements).to_json()
    assert record["selected"] == result["counts"]["finetune"]["selected"] == counts
    assert result["guards"] == {}


def test_all_rows_dropped_is_a_clear_error(small: Path, context: RunContext) -> None:
    with pytest.raises(HbvError, match=r"'larf=1' removes all 40 rows of the finetune stage"):
        tuned(settle(small, "larf=1"), context)


def test_too_few_rows_for_a_step_are_a_clear_error(small: Path, context: RunContext) -> None:
    """40 rows are five batches, 8 rows are one."""
    values = {"finetune.settings.epochs": "0.3"}
    tuned(settle(small, "larf=0", values), context)
    with pytest.raises(BadInput, match=r"'finetune' would train no step: 0.3 epochs of 8 rows"):
        tuned(settle(small, "larf=0.8", values), context)


def test_an_interrupted_stage_gives_the_same_result(small: Path, context: RunContext, tmp_path: Path) -> None:
    """The rows are selected again, with the same random numbers, which are not those of the steps."""
    experiment = settle(small, "none+larf:share=0.2")
    select, gradient, stop = LARF.select, TrainingStage.gradient, Stop(3)
    states: list[tuple[bool, float]] = []

    def recording(defense: LARF, stage: TrainingStage, rows: list[Example]) -> list[Example]:
        states.append((stage.model.training, torch.rand(()).item()))
        return select(defense, stage, rows)

    def stopping(stage: TrainingStage, batch: Batch) -> Gradient:
        stop.reach()
        return gradient(stage, batch)

    complete = tuned(experiment, context)
    with mock.patch.object(LARF, "select", recording):
        with mock.patch.object(TrainingStage, "gradient", stopping), pytest.raises(KeyboardInterrupt):
            tuned(experiment, run_context(tmp_path))
        assert list(tmp_path.rglob("checkpoint-*"))
        torch.manual_seed(5)
        resumed = tuned(experiment, run_context(tmp_path))
    assert states[0] == states[1]
    assert not states[0][0]
    first, second = (Adapter.load(model.spec.adapters[-1]).digest() for model in (complete, resumed))
    assert first == second
    assert resumed.artifacts["finetune"].json(ROWS) == complete.artifacts["finetune"].json(ROWS)

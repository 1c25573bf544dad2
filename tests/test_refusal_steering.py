"""Refusal steering: the direction compared with recorded states, and stored answers with plain passes under hooks."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.types import Example
from harmbench_vaccine.defenses.refusal_steering import RefusalSteering
from harmbench_vaccine.experiment import keys
from harmbench_vaccine.experiment.artifacts import STEERING
from harmbench_vaccine.experiment.context import RunContext
from harmbench_vaccine.inference import engine
from harmbench_vaccine.pipeline import answer_all
from harmbench_vaccine.plugins import Pools
from harmbench_vaccine.training.adapters import Adapter
from support import tiny
from support.answers import (
    SMALL_WORLD,
    Run,
    continued,
    merged,
    mixed_token,
    next_token,
    settled,
    stripped,
    tokenizer_of,
    trained,
    with_vectors,
)
from support.cli import hbv
from support.compare import close
from support.runs import run_context
from support.world import make_world

POOLS = tiny.example_pools()

# ---------------------------------------------------------------------------------------------------------------------
# The direction


def aligned_adapter(folder: Path) -> Adapter:
    """Save an alignment adapter with random weights, and return it."""
    adapter = tiny.stage(stirred=True)[1].trained()
    adapter.save(folder)
    return adapter


def mean_state(model: Any, layer: int, rows: Sequence[Example]) -> Tensor:
    """Return the mean output of a layer at the last prompt token; each prompt is a pass without its answer."""
    outputs: list[Tensor] = []
    handle = model.model.layers[layer].register_forward_hook(
        lambda module, args, output: outputs.append((output[0] if isinstance(output, tuple) else output)[0, -1])
    )
    with torch.no_grad():
        for row in tiny.encode(rows):
            model(input_ids=torch.tensor([row.ids[: row.response_start]]))
    handle.remove()
    return torch.stack(outputs).double().mean(0)


@pytest.mark.parametrize(("layer", "number"), [(14.0, 0), (32.0, 1), (1.0, 0)])
def test_the_direction_is_the_difference_of_mean_states(layer: float, number: int, tmp_path: Path) -> None:
    adapter, model = aligned_adapter(tmp_path), tiny.model()
    with torch.no_grad():
        for module in adapter.factors:
            model.get_submodule(module).weight += adapter.delta(module)  # type: ignore[operator]
    expected = mean_state(model, number, POOLS.harmful) - mean_state(model, number, POOLS.benign)
    stage, _ = tiny.stage(below=[tmp_path], name="repair", pools=POOLS)
    for alpha in (1.0, -0.5):
        with stage.isolated("steering"), stage.reference():
            vectors = RefusalSteering(alpha=alpha, layer=layer).seeded(0).steering(stage)
        assert set(vectors) == {number}
        assert vectors[number].dtype == torch.float32
        assert close(vectors[number], alpha * expected)


def test_fewer_prompts_give_another_direction(tmp_path: Path) -> None:
    aligned_adapter(tmp_path)
    stage, _ = tiny.stage(below=[tmp_path], name="repair", pools=POOLS)
    with stage.reference():
        few, again, other, every = (
            RefusalSteering(prompts=prompts).seeded(seed).steering(stage)[0]
            for prompts, seed in ((4, 0), (4, 0), (4, 1), (12, 0))
        )
    assert torch.equal(few, again)
    assert not close(other, few, 1e-2)
    assert not close(every, few, 1e-2)


@pytest.mark.parametrize(
    ("pools", "missing"), [(Pools(benign=POOLS.benign), "harmful"), (Pools(paired=POOLS.paired), "benign")]
)
def test_missing_prompts_are_refused(pools: Pools, missing: str) -> None:
    stage, _ = tiny.stage(name="repair", pools=pools)
    with pytest.raises(BadInput, match=f"1 {missing} prompts, but only 0 are available"):
        RefusalSteering().steering(stage)


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"), SMALL_WORLD)


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> RunContext:
    return run_context(tmp_path_factory.mktemp("store"))


def vectors_of(run: Run) -> dict[int, Tensor]:
    """Return the stored vectors of a run, after its answers."""
    inputs = keys.steering_key(run.experiment, run.aligned)
    return {
        int(key): value for key, value in load_file(run.context.store.path_of("steering", inputs) / STEERING).items()
    }


def expected_rows(run: Run, when: str, first: int = 0) -> list[dict[str, Any]]:
    """Return text, number of tokens and end of each answer, with `first` mixed tokens."""
    model, expert = merged(run.aligned if when == "before" else run.final), merged(run.aligned)
    tokenizer, vectors, rows = tokenizer_of(run), vectors_of(run), []
    end = tokenizer.eos_token_id
    with with_vectors(model, vectors), with_vectors(expert, vectors):
        for example in run.eval_set.examples:
            ids = tokenizer(run.eval_set.template.render(example))["input_ids"]
            tokens: list[int] = []
            while len(tokens) < first and end not in tokens:
                text = [*ids, *tokens]
                tokens.append(mixed_token(next_token(model, text), next_token(expert, text), 3.0, 5))
            if end not in tokens:
                tokens += continued(model, [*ids, *tokens], run.eval_set.max_new_tokens - len(tokens), end)
            text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
            rows.append({"answer": text, "tokens": len(tokens), "finished": end in tokens})
    return rows


@pytest.mark.parametrize("attack", ["ratio=0.25", "ratio=0.25+weight_noise=0.3"])
def test_stored_answers_equal_plain_passes_with_hooks(attack: str, small: Path, context: RunContext) -> None:
    run, plain = (trained(small, context, defense, attack) for defense in ("refusal_steering=8", "sft"))
    for when in ("before", "after"):
        rows = run.rows(when)
        assert stripped(rows) == expected_rows(run, when)
        assert rows != plain.rows(when)


@pytest.mark.parametrize("attack", ["ratio=0.25", "ratio=0.25+weight_noise=0.3"])
def test_with_safe_decoding_both_models_are_steered(attack: str, small: Path, context: RunContext) -> None:
    """Also if they have different bases; before the user stage, both are the same model."""
    run = trained(small, context, "safe_decoding+refusal_steering=8", attack)
    rows = run.rows()
    assert stripped(rows) == expected_rows(run, "after", first=2)
    assert stripped(run.rows("before")) == expected_rows(run, "before")
    assert rows != trained(small, context, "safe_decoding", attack).rows()


def test_alpha_0_gives_the_answers_of_sft(small: Path, context: RunContext) -> None:
    run, plain = (trained(small, context, defense) for defense in ("refusal_steering=0", "sft"))
    for when in ("before", "after"):
        assert run.rows(when) == plain.rows(when)


def test_vectors_are_computed_once_in_a_run(
    small: Path, context: RunContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = trained(small, context, "sft")
    for stage in ("align", "finetune"):
        shutil.copytree(context.store.root / stage, tmp_path / stage)
    calls: list[str] = []
    compute = RefusalSteering.steering

    def counted(self: RefusalSteering, stage: Any) -> dict[int, Tensor]:
        calls.append(stage.name)
        return compute(self, stage)

    monkeypatch.setattr(RefusalSteering, "steering", counted)
    run = trained(small, run_context(tmp_path), "refusal_steering")
    assert run.final.artifacts["finetune"].key == plain.final.artifacts["finetune"].key
    answers = answer_all(run.experiment, run.context, run.aligned, run.final)
    assert len(answers) == 6
    assert calls == ["repair"]
    (folder,) = (tmp_path / "steering").iterdir()
    assert set(load_file(folder / STEERING)) == {"0"}


def test_answers_have_another_key(small: Path, context: RunContext) -> None:
    def key(defense: str) -> keys.Inputs:
        run = trained(small, context, defense)
        prompts = ["Q"] * len(run.eval_set.examples)
        return keys.answer_key(run.experiment, run.final, run.aligned, run.eval_set, prompts)

    plain, default, other = key("sft"), key("refusal_steering"), key("refusal_steering=2")
    assert not {"defense", "aligned"} & set(plain)
    assert plain.items() <= default.items()
    assert default != other


@pytest.mark.slow
def test_a_cleanup_leaves_the_vectors_that_a_run_needs(small: Path, own_home: Path) -> None:
    setting = ("--protocol", small, "--attack", "ratio=0.25", "--json")
    (result,) = hbv("run", "--defense", "refusal_steering", *setting).results
    steering = own_home / "store" / "steering"
    assert hbv("store", "gc", "--yes").code == 0
    assert len(list(steering.iterdir())) == 1
    assert hbv("store", "gc", "--run", result["run"], "--yes").code == 0
    assert not list(steering.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Backends


def test_vllm_is_refused_and_transformers_is_the_default(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "find_spec", lambda name: object())
    monkeypatch.setattr(engine, "device", lambda: "cuda")
    assert settled(small, "refusal_steering").backend == "transformers"
    assert settled(small, "safe_decoding").backend == "vllm"
    with pytest.raises(BadInput) as refusal:
        settled(small, "sft+refusal_steering", backend="vllm")
    assert str(refusal.value) == (
        "'refusal_steering' changes hidden states while the model answers, which backend 'vllm' does not support; "
        "allowed: --backend transformers."
    )


def test_a_skipped_alignment_is_refused(small: Path) -> None:
    with pytest.raises(BadInput, match="'refusal_steering' needs the alignment adapter"):
        settled(small, "none+refusal_steering")

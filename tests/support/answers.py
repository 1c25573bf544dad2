"""Answers by plain passes without padding and cache, and the stored answers of a run, to compare them with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from harmbench_vaccine.core.jsonl import read_lines
from harmbench_vaccine.data.prompts import EvalSet
from harmbench_vaccine.experiment.artifacts import ANSWERS, TrainedModel
from harmbench_vaccine.experiment.context import RunContext
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.rows import eval_sets
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.pipeline import answer, train_models
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.training.adapters import Adapter

SMALL_WORLD: dict[str, Any] = {
    "align": {"settings": {"epochs": 1, "batch": 20}},
    "answer": {"harmful": {"prompts": 6, "max_new_tokens": 5}, "benign": {"prompts": 2}, "task_items": 2},
}
"""Changes of the protocol with which a run takes seconds."""


@dataclass(frozen=True)
class Run:
    """A run with its two models, and the answers to the harmful prompts."""

    experiment: Experiment
    context: RunContext
    aligned: TrainedModel
    final: TrainedModel

    @property
    def eval_set(self) -> EvalSet:
        return eval_sets(self.experiment)[0]

    def rows(self, when: str = "after") -> list[dict[str, Any]]:
        """Return the stored answers of the aligned ("before") or the final model."""
        model = self.aligned if when == "before" else self.final
        artifact = answer(self.experiment, self.context, model, self.aligned, self.eval_set)
        return list(read_lines(artifact.path / ANSWERS))


def settled(protocol: Path, defense: str, attack: str = "ratio=0.25", **more: Any) -> Experiment:
    """Settle a run of a protocol file."""
    spec = RunSpec(protocol=str(protocol), defense=parse_plugins(defense), attack=parse_plugins(attack), **more)
    return Experiment.settle(spec)


def trained(protocol: Path, context: RunContext, defense: str, attack: str = "ratio=0.25") -> Run:
    """Return a run with trained models, without answers."""
    experiment = settled(protocol, defense, attack)
    return Run(experiment, context, *train_models(experiment, context))


def merged(model: TrainedModel) -> Any:
    """Load a model and add its adapters to the weights."""
    network = AutoModelForCausalLM.from_pretrained(model.spec.base).eval()
    with torch.no_grad():
        for path in model.spec.adapters:
            adapter = Adapter.load(path)
            for module in adapter.factors:
                network.get_submodule(module).weight += adapter.delta(module)
    return network


def next_token(network: Any, ids: Sequence[int]) -> Tensor:
    """Return the probabilities of the token after a text (vocabulary)."""
    with torch.no_grad():
        probabilities: Tensor = network(input_ids=torch.tensor([list(ids)])).logits[0, -1].softmax(-1)
    return probabilities


def continued(network: Any, ids: Sequence[int], limit: int, end: int) -> list[int]:
    """Return the tokens that a model generates greedily after a text, with the stop token if there is one."""
    tokens: list[int] = []
    while len(tokens) < limit and end not in tokens:
        tokens.append(int(next_token(network, [*ids, *tokens]).argmax()))
    return tokens


def tokenizer_of(run: Run) -> Any:
    return AutoTokenizer.from_pretrained(run.experiment.model)


@contextmanager
def with_vectors(network: Any, vectors: Mapping[int, Tensor]) -> Iterator[None]:
    """Add vectors to the outputs of decoder layers by plain hooks inside the block."""

    def hook(vector: Tensor) -> Any:
        return lambda module, args, output: (
            (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector
        )

    handles = [network.model.layers[layer].register_forward_hook(hook(vector)) for layer, vector in vectors.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def stripped(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return text, number of tokens and end of stored answers."""
    return [{"answer": row["answer"].strip(), "tokens": row["tokens"], "finished": row["finished"]} for row in rows]


# ---------------------------------------------------------------------------------------------------------------------
# SafeDecoding with sets of tokens


def sample_space(first: Sequence[float], second: Sequence[float], count: int) -> set[int]:
    """Return the tokens among the k most likely ones of both models, for the smallest k with `count` of them."""
    common: set[int] = set()
    for k in range(1, len(first) + 1):
        common = {*most_likely(first)[:k]} & {*most_likely(second)[:k]}
        if len(common) >= count:
            break
    return common


def most_likely(values: Sequence[float]) -> list[int]:
    """Return all tokens, the most likely first; of equal ones, the smaller id first."""
    return sorted(range(len(values)), key=lambda token: (-values[token], token))


def mixed_token(model: Tensor, expert: Tensor, alpha: float, count: int) -> int:
    space = sample_space(model.tolist(), expert.tolist(), count)
    return max(sorted(space), key=lambda token: float(model[token] + alpha * (expert[token] - model[token])))

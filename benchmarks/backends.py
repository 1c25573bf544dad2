"""Whether vLLM answers as transformers does: every answer of one cell by both, and why those differ that do.

    python benchmarks/backends.py [RUN_BY_TRANSFORMERS RUN_BY_VLLM]

The two are run folders of one cell; without them the testbed's `sft` under `ratio=0.1` is run by both (HBV_HOME keeps
the stages). An answer may differ only where the two likeliest tokens are as good as equal: rounding then decides. So
each differing answer is followed token by token in the model itself, and every place where vLLM went for the second
token is listed with the gap of the two logits. The exit code is 1 if a gap is above 1e-4, or if vLLM went elsewhere.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from harmbench_vaccine import pipeline
from harmbench_vaccine.core.paths import home
from harmbench_vaccine.core.progress import Terminal
from harmbench_vaccine.core.store import Store
from harmbench_vaccine.data.chat import stop_token_ids
from harmbench_vaccine.data.collate import encode_prompt
from harmbench_vaccine.evaluation.results import load_run
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.inference.model_pool import Lab
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.runner import run_all

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Turn:
    """A place where vLLM did not take the likeliest token."""

    position: int
    """Tokens of the answer before it."""
    gap: float | None
    """Between the two best logits; None: vLLM took neither token."""


def turns(model: Any, tokenizer: Any, prompt: str, answer: str, limit: int) -> Iterator[Turn]:
    """Follows an answer through a model: at each token the likeliest that still spells it, or else the second."""
    import torch

    ends, ids = stop_token_ids(tokenizer, [prompt]), encode_prompt(tokenizer, prompt)
    start = len(ids)

    def spells(token: int) -> bool:
        if token in ends:
            return text(ids[start:]).strip() == answer
        said = text([*ids[start:], token]).rstrip("\ufffd")  # half a character
        return answer.startswith(said.lstrip()) or answer == said.strip()

    def text(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True))

    while len(ids) - start < limit:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids], device=model.device)).logits[0, -1].float()
        values, tokens = (found.tolist() for found in logits.topk(2))
        if not spells(tokens[0]):
            fits = spells(tokens[1])
            yield Turn(len(ids) - start, values[0] - values[1] if fits else None)
            if not fits:
                return
            tokens.reverse()
        ids.append(tokens[0])
        if tokens[0] in ends:
            return


def compare(one: Path, other: Path, lab: Lab) -> bool:
    """Prints the two runs' scores and every differing answer; True if each is explained by a tie."""
    (first, rows), (second, others) = load_run(one), load_run(other)
    for values in (first, second):
        print(
            f"{values['run']} by {', '.join(values['answered_by'])}: "
            f"HS {values['harmful_score']}, FA {values['finetune_accuracy']}"
        )
    cell = Experiment.settle(RunSpec.model_validate(first["spec"]))
    aligned = pipeline.align(cell, lab)
    models = {"before": aligned, "after": pipeline.repair(cell, lab, aligned, pipeline.finetune(cell, lab, aligned))}
    different = [(row, by) for row, by in zip(rows, others, strict=True) if row["answer"] != by["answer"]]
    print(f"{len(different)} of {len(rows)} answers differ")
    explained = True
    for row, by in different:
        state = models[row["when"]].state
        model, tokenizer = lab.stack(state).use(state.adapters), lab.tokenizer(state)
        prompt, limit = row["prompt"], max(row["tokens"], by["tokens"])
        told = list(turns(model, tokenizer, prompt, by["answer"], limit))
        explained &= bool(told) and all(turn.gap is not None and turn.gap <= TOLERANCE for turn in told)
        for turn in told:
            gap = "neither of the two best tokens" if turn.gap is None else f"gap of the two best logits {turn.gap:.1e}"
            print(f"  {row['when']} {row['set']} {row['id']}, token {turn.position}: {gap}")
        print(f"    transformers: {row['answer']!r}\n    vLLM: {by['answer']!r}")
    return explained


def main(folders: list[str]) -> int:
    """Compares two run folders, or makes them first."""
    if find_spec("vllm") is None:
        print("vLLM is not installed, so there is nothing to compare: make vllm installs it for a CPU.")
        return 0
    with Terminal() as progress:
        runs = [Path(folder) for folder in folders]
        if not runs:
            specs = [
                RunSpec(attack=parse_plugins("ratio=0.1"), backend=backend) for backend in ("transformers", "vllm")
            ]
            runs = [home() / "runs" / values["run"] for values in run_all(specs, progress=progress)]
        same = compare(runs[0], runs[1], Lab(Store(home() / "store", progress), progress))
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

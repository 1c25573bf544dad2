"""Compare the answers of vLLM and of transformers in one experiment.

    python benchmarks/backends.py [RUN_OF_TRANSFORMERS RUN_OF_VLLM]

The two are run folders of one experiment; without them, both backends run the testbed's `sft` under `ratio=0.1`
(HBV_HOME stores the stages). An answer may differ only where the logits of the two most likely tokens are almost equal:
rounding then decides. So each differing answer is followed token by token in the model, and every position where vLLM
took the second token is listed with the gap of the two logits. The exit code is 1 if a gap is above 1e-4, or if vLLM
took neither of the two tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from harmbench_vaccine.core.library_settings import set_library_defaults

set_library_defaults()  # before torch is imported

from harmbench_vaccine import pipeline
from harmbench_vaccine.core.paths import home
from harmbench_vaccine.core.progress import Terminal
from harmbench_vaccine.core.store import Store
from harmbench_vaccine.data.chat import stop_token_ids
from harmbench_vaccine.data.collate import encode_prompt
from harmbench_vaccine.evaluation.records import load_run
from harmbench_vaccine.experiment.context import RunContext
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.inference.model_pool import ModelPool
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.runner import run_all

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Deviation:
    """A position where vLLM did not take the most likely token."""

    position: int
    """Number of tokens of the answer before it."""
    gap: float | None
    """Difference of the two largest logits; None if vLLM took neither of the two tokens."""


def deviations(model: Any, tokenizer: Any, prompt: str, answer: str, limit: int) -> Iterator[Deviation]:
    """Follow an answer through a model, and list the positions where its token is not the most likely one.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer.
        prompt: The prompt.
        answer: The answer of vLLM.
        limit: Largest number of tokens of the answer.
    """
    import torch

    ends, ids = stop_token_ids(tokenizer, [prompt]), encode_prompt(tokenizer, prompt)
    start = len(ids)

    def spells(token: int) -> bool:
        if token in ends:
            return text(ids[start:]).strip() == answer
        prefix = text([*ids[start:], token]).rstrip("\ufffd")  # half a character
        return answer.startswith(prefix.lstrip()) or answer == prefix.strip()

    def text(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True))

    while len(ids) - start < limit:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids], device=model.device)).logits[0, -1].float()
        values, tokens = (part.tolist() for part in logits.topk(2))
        if not spells(tokens[0]):
            fits = spells(tokens[1])
            yield Deviation(len(ids) - start, values[0] - values[1] if fits else None)
            if not fits:
                return
            tokens.reverse()
        ids.append(tokens[0])
        if tokens[0] in ends:
            return


def compare(transformers_run: Path, vllm_run: Path, context: RunContext) -> bool:
    """Print the scores of two runs and every differing answer; return True if a tie explains each difference."""
    (first, rows), (second, vllm_rows) = load_run(transformers_run), load_run(vllm_run)
    for result in (first, second):
        print(
            f"{result.run} by {', '.join(result.answered_by)}: HS {result.harmful_score}, FA {result.finetune_accuracy}"
        )
    experiment = Experiment.settle(RunSpec.model_validate(first.spec))
    aligned, final = pipeline.train_models(experiment, context)
    models = {"before": aligned, "after": final}
    pairs = zip(rows, vllm_rows, strict=True)
    differences = [(row, vllm_row) for row, vllm_row in pairs if row["answer"] != vllm_row["answer"]]
    print(f"{len(differences)} of {len(rows)} answers differ")
    explained = True
    for row, vllm_row in differences:
        spec = models[row["when"]].spec
        model, tokenizer = context.models.stack(spec).use(spec.adapters), context.models.tokenizer(spec)
        limit = max(row["tokens"], vllm_row["tokens"])
        steps = list(deviations(model, tokenizer, row["prompt"], vllm_row["answer"], limit))
        explained &= bool(steps) and all(step.gap is not None and step.gap <= TOLERANCE for step in steps)
        for step in steps:
            gap = "neither of the two best tokens" if step.gap is None else f"gap of the two best logits {step.gap:.1e}"
            print(f"  {row['when']} {row['set']} {row['id']}, token {step.position}: {gap}")
        print(f"    transformers: {row['answer']!r}\n    vLLM: {vllm_row['answer']!r}")
    return explained


def main(folders: list[str]) -> int:
    """Compare two run folders, or run the experiment with both backends first."""
    if find_spec("vllm") is None:
        print("vLLM is not installed, so backends are not compared. To install it for a CPU: make vllm.")
        return 0
    with Terminal() as progress:
        runs = [Path(folder) for folder in folders]
        if not runs:
            specs = [
                RunSpec(attack=parse_plugins("ratio=0.1"), backend=backend) for backend in ("transformers", "vllm")
            ]
            runs = [home() / "runs" / result.run for result in run_all(specs, progress=progress)]
        with closing(ModelPool(progress)) as models:
            explained = compare(runs[0], runs[1], RunContext(Store(home() / "store", progress), models, progress))
    return 0 if explained else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

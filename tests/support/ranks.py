"""Training stages of tiny models, the same in one process and over two ranks, for tests/test_distributed.py.

`PYTHONPATH=tests torchrun --nproc-per-node 2 -m support.ranks FOLDER` runs every case of `CASES` over the ranks, and
rank 0 writes `FOLDER/found.pt` as `{case: found}`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from harmbench_vaccine.core import distributed
from harmbench_vaccine.core.progress import Silent
from harmbench_vaccine.inference.model_pool import ModelSpec
from harmbench_vaccine.plugins import Defense
from harmbench_vaccine.plugins.registry import DEFENSES
from harmbench_vaccine.training.adapters import Adapter, LoraStack
from harmbench_vaccine.training.sharding import shard
from harmbench_vaccine.training.stage import Gradient, TrainingStage
from harmbench_vaccine.training.trainer import train
from support.runs import run_context

from . import tiny

# Name -> defense, its parameters.
DEFENDED: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("sft", {}),
    "vaccine": ("vaccine", {"rho": 3.0}),
    "tvaccine": ("tvaccine", {"gamma": 1, "interval": 3, "refresh": 4}),
    "booster": ("booster", {}),
    "panacea": ("panacea", {}),
    "lisa": ("lisa", {"k1": 2, "k2": 3}),
    "vlguard": ("vlguard", {"mix": "joint", "rows": 6, "lam": 1.0}),
    "ewc": ("ewc", {"lam": 1.0}),
    "kl": ("kl", {"lam": 1.0}),
    "ldifs": ("ldifs", {}),
    "git-disl": ("ldifs", {"variant": "git-disl", "alpha": 1e-4}),
    "constrained_sft": ("constrained_sft", {}),
    "asft": ("asft", {}),
    "ctrap": ("ctrap", {"lam": 1.0}),
    "safegrad": ("safegrad", {}),
    "spag": ("spag", {}),
    "sppft": ("sppft", {"below": 17.0}),
}
SHARDED = ("sft", "vaccine", "booster", "ldifs")
CASES = [*DEFENDED, *(f"{name}, sharded" for name in SHARDED), "sft, opt, sharded", "vaccine, checkpointing, sharded"]


class Interrupted(Exception):
    """An intended end of a training run."""


def stage_of(architecture: str, folder: Path, *, sharded: bool, checkpointing: bool = False) -> TrainingStage:
    """Return a stage above a frozen adapter, for defenses that compare with the model before.

    With 13 rows it has three epochs of batches of 4, 4, 4 and 1 rows; in the last batch one rank has no row.
    """
    base = tiny.model(architecture)
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    stack = LoraStack(shard(base) if sharded else base)
    settings = tiny.settings(epochs=3, batch=4, accumulation=2, lora_dropout=0.0)
    stirred = stack.train([], settings, 11)
    tiny.stir(stirred)
    below = folder / f"below-{architecture}"
    if distributed.rank() == 0 and not below.exists():
        stack.trained().save(below)
    distributed.barrier()
    stage = TrainingStage("finetune", stack, {}, 7, settings, tiny.example_pools(), (below,), encode=tiny.encode)
    stage.trainable = stack.train((below,), settings, 7)
    tiny.stir(stage.trainable, seed=5)
    return stage


def run(case: str, folder: Path) -> dict[str, Any]:
    """Return the log of a case, its norms (of gradients or hidden gradients) in order, and its adapter."""
    name, *more = case.split(", ")
    plugin, params = DEFENDED[name]
    sharded = "sharded" in more and distributed.world_size() > 1
    architecture = "opt" if "opt" in more else "llama"
    stage = stage_of(architecture, folder, sharded=sharded, checkpointing="checkpointing" in more)
    norms: list[float] = []
    of_gradient, per_rank = stage.gradient_of, stage.norm

    def gradient_of(loss: Any) -> Gradient:
        gradient = of_gradient(loss)
        norms.append(float(gradient.norm))
        return gradient

    def norm(tensors: Any) -> Any:
        value = per_rank(tensors)
        norms.append(float(value))
        return value

    stage.gradient_of, stage.norm = gradient_of, norm  # type: ignore[method-assign]
    defense = DEFENSES.get(plugin)(**params)
    rows, checkpoints = tiny.rows(13, shortest=3, longest=14), folder / f"{case} {distributed.world_size()}"
    log = train(stage, defense, rows, stage.settings, checkpoints, pad=tiny.PAD)
    return {"log": log, "norms": norms, "adapter": dict(stage.stack.trained().factors)}


class _Ends(Defense):
    """A defense that ends a training run after a step."""

    at: int = 0

    def after_step(self, stage: TrainingStage) -> None:
        if stage.step == self.at:
            raise Interrupted


class _NoWarnings(Silent):
    """A receiver that fails on a note about a checkpoint that is not used."""

    def note(self, text: str) -> None:
        if "resumed after step" not in text:
            raise AssertionError(text)


def resumed(folder: Path, ends: int) -> Adapter:
    """Return the adapter of a stage with dropout, interrupted after step `ends` (0: never) and resumed from disk."""
    for at in (ends, 0) if ends else (0,):
        stage = stage_of("llama", folder, sharded=False)
        settings = tiny.settings(epochs=3, batch=4, lora_dropout=0.5)
        stage.trainable = stage.stack.train(stage.below, settings, 7)
        try:
            place = folder / f"ends {ends}"
            train(stage, _Ends(at=at), tiny.rows(13), settings, place, pad=tiny.PAD, progress=_NoWarnings())
        except Interrupted:
            continue
    return stage.stack.trained()


def reloaded(folder: Path) -> list[float]:
    """Return the loss of a sharded model twice; in between only rank 0 evicts it, as a judge on its GPU does."""
    path = folder / "model"
    if distributed.rank() == 0:
        tiny.model().save_pretrained(path)
    distributed.barrier()
    lab, state = run_context(folder / "store", shard=True), ModelSpec(str(path))
    losses = []
    for _ in range(2):
        with torch.no_grad():
            losses.append(float(lab.models.stack(state).use([])(**tiny.batch()).loss))
        if distributed.rank() == 0:
            lab.models.evict("training")
    return losses


def main(folder: Path) -> None:
    """Run all cases and save their results."""
    distributed.initialize()
    torch.set_num_threads(1)
    results: dict[str, Any] = {case: run(case, folder) for case in CASES}
    results["resumed"] = [dict(resumed(folder, ends).factors) for ends in (0, 5)]
    results["reloaded"] = reloaded(folder)
    if distributed.rank() == 0:
        torch.save(results, folder / "found.pt")
    distributed.shutdown()
    distributed.end_process(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

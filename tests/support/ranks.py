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
from harmbench_vaccine.core.store import Store
from harmbench_vaccine.inference.model_pool import Lab, ModelSpec
from harmbench_vaccine.plugins import Defense
from harmbench_vaccine.plugins.registry import DEFENSES
from harmbench_vaccine.training.adapters import Adapter, LoraStack
from harmbench_vaccine.training.sharding import shard
from harmbench_vaccine.training.stage import Gradient, TrainingStage
from harmbench_vaccine.training.trainer import train

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
}
SHARDED = ("sft", "vaccine", "booster", "ldifs")
CASES = [*DEFENDED, *(f"{name}, sharded" for name in SHARDED), "sft, opt, sharded", "vaccine, checkpointing, sharded"]


class Interrupted(Exception):
    pass


def stage_of(architecture: str, folder: Path, *, sharded: bool, checkpointing: bool = False) -> TrainingStage:
    """A stage above a frozen adapter, for defenses that compare with the model before: with 13 rows, three epochs of
    batches of 4, 4, 4 and 1 rows, of which the last leaves a rank without."""
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
    """The log of a case, every norm that it took (of a gradient, or of hidden gradients), and its adapter."""
    name, *more = case.split(", ")
    plugin, params = DEFENDED[name]
    stage = stage_of("opt" if "opt" in more else "llama", folder, sharded="sharded" in more and distributed.world_size() > 1,
                     checkpointing="checkpointing" in more)  # fmt: skip
    norms: list[float] = []
    of_gradient, per_rank = stage.gradient_of, stage.norm

    def gradient_of(loss: Any) -> Gradient:
        gradient = of_gradient(loss)
        norms.append(float(gradient.norm))
        return gradient

    def norm(tensors: Any) -> Any:
        found = per_rank(tensors)
        norms.append(float(found))
        return found

    stage.gradient_of, stage.norm = gradient_of, norm  # type: ignore[method-assign]
    defense = DEFENSES.get(plugin)(**params)
    log = train(stage, defense, tiny.rows(13, shortest=3, longest=14), stage.settings,
                folder / f"{case} {distributed.size()}", pad=tiny.PAD)  # fmt: skip
    return {"log": log, "norms": norms, "adapter": dict(stage.stack.trained().factors)}


class _Ends(Defense):
    """Ends a training run after a step."""

    at: int = 0

    def after_step(self, stage: TrainingStage) -> None:
        if stage.step == self.at:
            raise Interrupted


def resumed(folder: Path, ends: int) -> Adapter:
    """A stage with dropout, interrupted after step `ends` (0: not at all) and taken up as a new process would."""
    for at in (ends, 0) if ends else (0,):
        stage = stage_of("llama", folder, sharded=False)
        settings = tiny.settings(epochs=3, batch=4, lora_dropout=0.5)
        stage.trainable = stage.stack.train(stage.below, settings, 7)
        try:
            train(stage, _Ends(at=at), tiny.rows(13), settings, folder / f"ends {ends}", pad=tiny.PAD)
        except Interrupted:
            continue
    return stage.stack.trained()


def reloaded(folder: Path) -> list[float]:
    """The loss of a sharded model, and again after rank 0 alone has let go of it, as a judge on its GPU makes it."""
    place = folder / "model"
    if distributed.rank() == 0:
        tiny.model().save_pretrained(place)
    distributed.barrier()
    lab, state = Lab(Store(folder / "store"), shard=True), ModelSpec(str(place))
    found = []
    for _ in range(2):
        with torch.no_grad():
            found.append(float(lab.stack(state).use([])(**tiny.batch()).loss))
        if distributed.rank() == 0:
            lab._forget()
    return found


def main(folder: Path) -> None:
    distributed.initialize()
    torch.set_num_threads(1)
    found: dict[str, Any] = {case: run(case, folder) for case in CASES}
    found["resumed"] = [dict(resumed(folder, ends).factors) for ends in (0, 5)]
    found["reloaded"] = reloaded(folder)
    if distributed.rank() == 0:
        torch.save(found, folder / "found.pt")
    distributed.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

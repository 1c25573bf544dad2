"""Models loaded in shards, for tests/test_sharded_loading.py.

`PYTHONPATH=tests torchrun --nproc-per-node 2 -m support.shard_ranks FOLDER` loads every model in `FOLDER/models` over
the ranks. Rank 0 writes `FOLDER/results.pt`: `{name: {"weights", "buffers", "logits"} or {"error"}}`. For the model in
`FOLDER/large`, each rank writes `FOLDER/peak-RANK`: the growth of its largest resident memory, in bytes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from harmbench_vaccine.core import distributed
from harmbench_vaccine.core.errors import HbvError
from harmbench_vaccine.inference.sharded_loading import load_sharded

from . import tiny


def parts(folder: Path) -> dict[str, Any]:
    """Return the whole weights and the buffers of a model that is loaded in shards, and its logits."""
    try:
        model = load_sharded(str(folder), torch.float32)
    except HbvError as error:
        return {"error": str(error)}
    local = {name: tuple(weight.to_local().shape) for name, weight in model.named_parameters()}  # type: ignore[operator]
    weights = {
        name: weight.full_tensor() for name, weight in model.state_dict().items() if hasattr(weight, "full_tensor")
    }
    with torch.no_grad():
        logits = model(**tiny.batch()).logits
    return {"weights": weights, "local": local, "buffers": dict(model.named_buffers()), "logits": logits}


def resident(field: str) -> int:
    """Return a field of the memory of this process, in bytes: "VmHWM" is its peak, "VmRSS" its present size."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main(folder: Path) -> None:
    """Load all models, the large one first: the peak of a process never falls."""
    distributed.initialize()
    torch.set_num_threads(1)
    parts(folder / "models" / "llama")  # libraries take memory at their first use
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from the present size
    large = load_sharded(str(folder / "large"), torch.float32)
    (folder / f"peak-{distributed.rank()}").write_text(str(resident("VmHWM") - before))
    del large
    results = {path.name: parts(path) for path in sorted((folder / "models").iterdir())}
    if distributed.rank() == 0:
        torch.save(results, folder / "results.pt")
    distributed.shutdown()
    distributed.end_process(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Write the figures of a benchmark to `benchmarks/results/`, with the machine and the versions that gave them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from harmbench_vaccine.evaluation.environment import current_environment


def record(name: str, figures: Any) -> Path:
    """Write a JSON file.

    Args:
        name: Name of the benchmark, with its shape if it has several.
        figures: What was measured.

    Returns:
        The file.
    """
    environment = current_environment(vllm=True)
    processor = environment.gpu or f"{environment.cpu} CPU"
    machine = {
        "name": processor,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
    }
    content = {"benchmark": name, "machine": machine, "versions": environment.versions, "figures": figures}
    file = Path(__file__).parent / "results" / f"{name}-{re.sub('[^A-Za-z0-9]+', '-', processor).strip('-')}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return file

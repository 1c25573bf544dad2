"""Results written by hand: no model is involved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harmbench_vaccine.evaluation.result import Result
from harmbench_vaccine.evaluation.results_csv import add_row

SHARES = {"empty": 0.0, "repetitive": 1.5, "degenerate": 1.5, "over_refusal": 2.0, "neither": 12.0}
DEFAULTS: dict[str, Any] = {
    "defense": "sft",
    "defense_params": {"sft": {}},
    "attack": "ratio=0.1",
    "attack_params": {"ratio": {"p": 0.1}},
    "origins": {},
    "task": "sst2",
    "model": "base",
    "protocol": "tiny",
    "protocol_version": 1,
    "protocol_hash": "aa11",
    "scorer": "beaver_dam",
    "judge": "",
    "dtype": "float32",
    "quantization": "none",
    "adapted": [],
    "backend": "transformers",
    "answered_by": ["transformers"],
    "seed": 0,
    "harmful_score": 50.0,
    "harmful_score_ci": [0.0, 100.0],
    "harmful_score_hits": 5,
    "harmful_score_n": 10,
    "finetune_accuracy": 97.0,
    "finetune_accuracy_ci": [0.0, 100.0],
    "finetune_accuracy_measure": "accuracy",
    "finetune_accuracy_hits": 7,
    "finetune_accuracy_n": 8,
    "trained": True,
    "accuracy_rule": "flexible",
    "accuracy": {"strict": 97.0, "flexible": 97.0},
    "harmful_sets": {"harmful": 50.0},
    "before": {
        "harmful_score": 2.0,
        "harmful_score_ci": [0.0, 100.0],
        "finetune_accuracy": 50.0,
        "finetune_accuracy_ci": [0.0, 100.0],
        "accuracy": {"strict": 50.0, "flexible": 50.0},
        "harmful_sets": {"harmful": 2.0},
    },
    "alignment_loss": 0.5,
    "embedding_drift": 200.0,
    "embedding_drift_per_layer": [],
    "embedding_drift_per_token": 4.0,
    "embedding_drift_paper_sum": None,
    "validity": {"collapsed": False, "reasons": [], "shares": {"before": SHARES, "after": SHARES}, "gates": {}},
    "counts": {"finetune": {"rows": 40, "harmful": 4, "without_room": 0}},
    "data": {},
    "judge_cut": 0,
    "scores": {},
    "agreement": [],
    "stages": {"align": {"seconds": 1.0, "cached": False}},
    "environment": {"versions": {"torch": "2"}},
    "spec": {"protocol": "tiny", "values": {}, "data": {}},
}


def make_result(**fields: Any) -> Result:
    """Return a result with these fields; the default run id has the setting and the seed."""
    values = {**DEFAULTS, **fields}
    setting = ("defense", "protocol_hash", "attack", "task", "model", "scorer", "seed")
    values.setdefault("run", "-".join(str(values[key]) for key in setting))
    return Result.model_validate(values)


def collapsed(*reasons: str) -> dict[str, Any]:
    """Return the field `validity` for a run that failed gates for these reasons."""
    return {"validity": {**DEFAULTS["validity"], "collapsed": True, "reasons": list(reasons)}}


def change(result: Result, **fields: Any) -> Result:
    """Return a copy of a result with changed fields."""
    return Result.model_validate({**result.model_dump(), **fields})


def write_csv(path: Path, *results: Result) -> Path:
    """Add results to a CSV as `hbv run` does, and return its path."""
    for result in results:
        add_row(path, result)
    return path

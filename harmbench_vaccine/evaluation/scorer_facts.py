"""The facts of a scorer that a result stores."""

from __future__ import annotations

from typing import Any

from harmbench_vaccine.data.sources import TESTBED, local_path, location_identity
from harmbench_vaccine.plugins import Scorer

from .judge_card import CARD

SCORER_FACTS = ("model", "fingerprint", "license", "unverified", "comparison_only")
"""The facts of a scorer that a result stores."""


def scorer_facts(scorer: Scorer) -> dict[str, Any]:
    """Return the facts of a scorer that a result stores (`SCORER_FACTS`).

    The license of a scorer is that of the published weights: the testbed's judge and a judge of `hbv judge train` have
    none.
    """
    model = getattr(scorer, "model", "")
    identity = location_identity(model) if scorer_models(scorer) else model
    license_text = "" if model.startswith(TESTBED) or _is_trained_judge(model) else scorer.license
    return {
        "model": model,
        "fingerprint": "" if identity == model else identity,
        "license": license_text,
        "unverified": scorer.unverified,
        "comparison_only": scorer.comparison_only,
    }


def scorer_models(scorer: Scorer) -> list[str]:
    """Return the folders and Hub ids that a scorer loads a model from."""
    model = getattr(scorer, "model", "")
    return [model] if model and not getattr(scorer, "base_url", "") else []


def _is_trained_judge(model: str) -> bool:
    """Return whether a model is a folder that `hbv judge train` wrote."""
    folder = local_path(model) if model else None
    return folder is not None and (folder / CARD).is_file()

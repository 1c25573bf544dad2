"""The facts of a scorer that a result stores."""

from __future__ import annotations

from typing import Any

from harmbench_vaccine.data.sources import TESTBED, local_path
from harmbench_vaccine.plugins import Scorer

from .judge_card import CARD

SCORER_FACTS = ("model", "license", "unverified", "comparison_only")
"""The facts of a scorer that a result stores."""


def scorer_facts(scorer: Scorer) -> dict[str, Any]:
    """Return the facts of a scorer that a result stores (`SCORER_FACTS`).

    The license of a scorer is that of the published weights: the testbed's judge and a judge of `hbv judge train` have
    none.
    """
    model = getattr(scorer, "model", "")
    license_text = "" if model.startswith(TESTBED) or _is_trained_judge(model) else scorer.license
    return dict(zip(SCORER_FACTS, (model, license_text, scorer.unverified, scorer.comparison_only), strict=True))


def _is_trained_judge(model: str) -> bool:
    """Return whether a model is a folder that `hbv judge train` wrote."""
    folder = local_path(model) if model else None
    return folder is not None and (folder / CARD).is_file()

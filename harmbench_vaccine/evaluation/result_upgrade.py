"""Upgrades of results that earlier versions stored."""

from __future__ import annotations

from typing import Any


def upgraded_result(values: dict[str, Any]) -> dict[str, Any]:
    """Upgrade a result of schema 1: renamed keys, versions inside `environment`, no artifacts."""
    values = dict(values)
    renamed = {"licence": "license", "compares_only": "comparison_only"}
    scores = {
        name: {renamed.get(key, key): value for key, value in score.items()}
        for name, score in values.get("scores", {}).items()
    }
    counts = dict(values.get("counts", {}))
    if "unread_grades" in counts:
        counts["unparsed_grades"] = counts.pop("unread_grades")
    environment = {"versions": values.pop("versions", {})}
    agreement = values.get("agreement", [])
    return {**values, "scores": scores, "agreement": agreement, "counts": counts, "environment": environment}

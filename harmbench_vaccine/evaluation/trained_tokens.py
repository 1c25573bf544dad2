"""The response tokens of the rows that a stage trained on, also of stages that earlier versions stored without them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from harmbench_vaccine.core.errors import HbvError
from harmbench_vaccine.core.types import Example
from harmbench_vaccine.data.collate import encode_examples, token_counts
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.rows import plugin_pools, user_rows
from harmbench_vaccine.experiment.stage_config import StageConfig
from harmbench_vaccine.inference.model_pool import ModelPool

TOKEN_COUNTS = ("response_tokens", "harmful_tokens")


def trained_tokens(
    experiment: Experiment, config: StageConfig, stored: Mapping[str, Any], models: ModelPool
) -> dict[str, int]:
    """Return the tokens with a loss of a stage and of its harmful rows: `TOKEN_COUNTS`; empty if they are unknown.

    An earlier version stored only the ids of the rows. The rows follow from the experiment, so they are drawn and
    encoded again, and counted if they have these ids.

    Args:
        experiment: The settled experiment.
        config: The alignment stage or the user stage.
        stored: What the stage stored about its rows (`experiment.artifacts.ROWS`).
        models: Loads the tokenizer of the base model.
    """
    if all(name in stored for name in TOKEN_COUNTS):
        return {name: stored[name] for name in TOKEN_COUNTS}
    try:
        examples = _examples(experiment, config, stored)
        if examples is None:
            return {}
        tokenizer = models.tokenizer_and_config(experiment.model)[0]
        encoded = encode_examples(tokenizer, config.template, examples, config.settings.max_length)
    except HbvError:  # a defense refuses other rows, or the model is no longer on this machine
        return {}
    return token_counts(encoded) if [row.id for row in encoded] == stored["used"] else {}


def _examples(experiment: Experiment, config: StageConfig, stored: Mapping[str, Any]) -> list[Example] | None:
    """Return the rows that a stage encoded; None if they cannot be drawn again."""
    ids = Counter([*stored["used"], *stored["without_room"]])
    pools = plugin_pools(experiment)
    rows = list(pools.alignment) if config.name == "align" else user_rows(experiment, pools)
    if "filtered" in stored:  # the rows that the moderation accepted
        rows = [row for row in rows if row.id in ids]
    examples = config.defenses.fresh().train_on(config.name, rows, pools)
    return examples if Counter(row.id for row in examples) == ids else None


def harmful_token_share(tokens: Mapping[str, Any]) -> float | None:
    """Return the percentage of the response tokens that are in harmful rows; None if there are none or it is unknown.

    Args:
        tokens: A mapping that has `TOKEN_COUNTS`, except if an earlier version stored it.
    """
    response, harmful = (tokens.get(name) for name in TOKEN_COUNTS)
    return 100 * harmful / response if response and harmful is not None else None

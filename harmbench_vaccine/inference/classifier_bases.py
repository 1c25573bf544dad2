"""Base models with a new head that classifies a question and an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harmbench_vaccine.core.device import forked_rng
from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.data.model_limits import embedding_rows

from .loading import load_model, load_tokenizer_and_config

WHAT = "Base model"


def load_classifier_base(location: str, labels: Sequence[str], seed: int) -> tuple[Any, Any]:
    """Load a base model, and give it a head of independent labels, as `beaver_dam` reads it.

    The tokenizer gets the two tokens that the scorer and the head need where it lacks them: an end token, for which the
    separator of an encoder serves, and a padding token that is not the end token. Otherwise a decoder would take the
    end of a text for padding, since its head reads the last token that is not padding.

    Args:
        location: Folder or hub id of a causal language model, or of any model that
            `AutoModelForSequenceClassification` loads.
        labels: Names of the labels.
        seed: Seed of the random weights of the head.

    Returns:
        The tokenizer, and the model in float32 on the CPU.

    Raises:
        BadInput: The model has no end token, or its architecture has no classifier.
        HbvError: The model cannot be loaded.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    tokenizer, config = load_tokenizer_and_config(location, WHAT)
    if tokenizer.eos_token is None:
        if tokenizer.sep_token is None:
            raise BadInput(f"{WHAT} {location!r} has neither an end token nor a separator: choose another model.")
        tokenizer.eos_token = tokenizer.sep_token
    with forked_rng():
        torch.manual_seed(seed)
        model = load_model(
            AutoModelForSequenceClassification,
            location,
            WHAT,
            new_head=True,
            dtype=torch.float32,
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={name: number for number, name in enumerate(labels)},
            problem_type="multi_label_classification",
        )
        pad = tokenizer.pad_token_id
        if pad is None or pad == tokenizer.eos_token_id or pad >= embedding_rows(config):
            tokenizer.add_special_tokens({"pad_token": "<pad>"})
            if len(tokenizer) > embedding_rows(config):
                model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer, model

"""Judges that classify: token ids in, one logit a label out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from harmbench_vaccine.core.errors import HbvError
from harmbench_vaccine.core.progress import SILENT, Progress
from harmbench_vaccine.data.model_limits import check_readable, embedding_rows

from .loading import load_tokenizer_and_config

Classify = Callable[[Sequence[list[int]], Progress], list[list[float]]]
"""Token ids of texts -> raw logits (texts x labels)."""


def multi_label_head(location: str, names: Sequence[str]) -> tuple[Any, list[str]]:
    """Load the tokenizer and the labels of a classifier whose labels are independent of each other.

    Args:
        location: Folder or hub id.
        names: Labels to use where the model has this many labels without names.

    Raises:
        HbvError: The labels exclude each other, or the configuration does not exclude that they do.
    """
    tokenizer, config = load_tokenizer_and_config(location)
    labels = [str(config.id2label[number]) for number in range(config.num_labels)]
    independent = config.problem_type == "multi_label_classification"
    if not independent and (config.problem_type or len(labels) != len(names)):
        raise HbvError(
            f"Judge {location!r} has {len(labels)} labels and problem_type {config.problem_type!r}; this scorer reads "
            f"{len(names)} independent labels, or a model whose problem_type is 'multi_label_classification'."
        )
    unnamed = len(labels) == len(names) and all(label.startswith("LABEL_") for label in labels)
    return tokenizer, list(names) if unnamed else labels


class TransformersClassifier:
    """A sequence classifier, run by transformers in batches of similar length, padded on the right."""

    def __init__(self, model: Any, batch: int) -> None:
        self._model, self._batch = model, batch

    def __call__(self, texts: Sequence[list[int]], progress: Progress = SILENT) -> list[list[float]]:
        """Compute raw logits (texts x labels) of token ids.

        Raises:
            HbvError: A text has more tokens than the model reads, or a token without an embedding.
        """
        import torch

        model, pad = self._model, self._model.config.pad_token_id
        check_readable(model.name_or_path, model.config, texts)
        # Without a padding token, transformers finds the end of a text only in a batch of one; likewise where the token
        # was added later and has no embedding.
        batch = self._batch if pad is not None and pad < embedding_rows(model.config) else 1
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
        logits: dict[int, list[float]] = {}
        with progress.bar("judge", len(order)) as advance, torch.inference_mode():
            for start in range(0, len(order), batch):
                numbers = order[start : start + batch]
                width = max(len(texts[number]) for number in numbers)
                gaps = [width - len(texts[number]) for number in numbers]
                ids = torch.tensor(
                    [texts[number] + [pad or 0] * gap for number, gap in zip(numbers, gaps, strict=True)]
                )
                mask = torch.tensor([[1] * (width - gap) + [0] * gap for gap in gaps])
                rows = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits.float()
                logits.update(zip(numbers, rows.tolist(), strict=True))
                advance(len(numbers))
        return [logits[number] for number in range(len(texts))]

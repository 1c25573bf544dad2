"""Judges that classify: token ids in, one logit for each label out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from harmbench_vaccine.core.errors import HbvError
from harmbench_vaccine.core.progress import SILENT, Progress
from harmbench_vaccine.data.sources import local_path

from .judge_models import load_judge, load_tokenizer_and_config

Classify = Callable[[Sequence[list[int]], Progress], list[list[float]]]
"""Token ids of texts -> the raw logits of each (texts x labels)."""


def multi_label_head(location: str, names: Sequence[str]) -> tuple[Any, list[str]]:
    """The tokenizer of a classifier and its labels, each of which has a logit of its own; `names` are theirs where the
    model does not name as many labels.

    Raises:
        HbvError: its labels exclude each other, or it does not say that they do not.
    """
    tokenizer, config = load_tokenizer_and_config(location)
    labels = [str(config.id2label[number]) for number in range(config.num_labels)]
    independent = config.problem_type == "multi_label_classification"
    if not independent and (config.problem_type or len(labels) != len(names)):
        raise HbvError(
            f"Judge {location!r} has {len(labels)} labels and problem_type {config.problem_type!r}; this scorer reads "
            f"{len(names)} independent ones, or a model whose problem_type is 'multi_label_classification'."
        )
    unnamed = len(labels) == len(names) and all(label.startswith("LABEL_") for label in labels)
    return tokenizer, list(names) if unnamed else labels


def open_classifier(location: str, backend: str, dtype: str, batch: int) -> Classify:
    """A sequence classifier, run by transformers or by vLLM; by transformers too if vLLM refuses it."""
    if backend != "vllm":
        return transformers_classifier(location, dtype, batch)
    from .vllm_engine import vllm_logits
    from .vllm_process import EngineRefused

    def by_vllm(texts: Sequence[list[int]], progress: Progress = SILENT) -> list[list[float]]:
        try:
            return vllm_logits(str(local_path(location) or location), texts, dtype, progress)
        except EngineRefused as refusal:
            progress.note(f"vLLM does not serve {location}: {refusal.reason}. transformers runs it in its place.")
            return transformers_classifier(location, dtype, batch)(texts, progress)

    return by_vllm


def transformers_classifier(location: str, dtype: str, batch: int) -> Classify:
    """A sequence classifier run by transformers, batched by length and padded on the right."""
    _, model = load_judge(location, "classifier", dtype)
    pad = model.config.pad_token_id
    if pad is None:
        batch = 1  # without a padding token, transformers finds the end of a text only where it stands alone

    def classify(texts: Sequence[list[int]], progress: Progress = SILENT) -> list[list[float]]:
        import torch

        order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
        logits: dict[int, list[float]] = {}
        with progress.bar("score: judge", len(order)) as advance, torch.inference_mode():
            for start in range(0, len(order), batch):
                numbers = order[start : start + batch]
                width = max(len(texts[number]) for number in numbers)
                gaps = [width - len(texts[number]) for number in numbers]
                ids = torch.tensor(
                    [texts[number] + [pad or 0] * gap for number, gap in zip(numbers, gaps, strict=True)]
                )
                mask = torch.tensor([[1] * (width - gap) + [0] * gap for gap in gaps])
                found = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits.float()
                logits.update(zip(numbers, found.tolist(), strict=True))
                advance(len(numbers))
        return [logits[number] for number in range(len(texts))]

    return classify

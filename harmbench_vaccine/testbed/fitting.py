"""The training loop of the testbed's models, fast on the CPU."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import reduce
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import LlamaModel, PreTrainedModel

from harmbench_vaccine.core.progress import Progress

RowT = TypeVar("RowT")
PARTS = 2
"""Parts of a batch. One thread computes a part, so that the weights have the same bits for any number of threads."""


def fit(
    model: PreTrainedModel,
    batches: Sequence[list[RowT]],
    loss: Callable[[list[RowT]], tuple[Tensor, int]],
    rate: float,
    title: str,
    progress: Progress,
) -> None:
    """Train for one pass over `batches` with AdamW and a one-cycle learning rate whose maximum is `rate`.

    The model must be without dropout: the parts of a batch are computed at the same time.

    Args:
        model: The model; all of its weights are trained.
        batches: The rows of every step.
        loss: Returns the summed loss of rows, and the number of its terms; a step minimizes the mean.
        rate: The highest learning rate.
        title: Title of the progress bar.
        progress: Reports the steps.
    """
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=len(batches), pct_start=0.1)

    def sums(rows: list[RowT]) -> tuple[int, list[Tensor]]:
        """Return the number of terms of the loss, and the summed loss with its gradient."""
        total, terms = loss(rows)
        return terms, [total.detach(), *torch.autograd.grad(total, parameters)]

    model.train()
    with progress.bar(title, len(batches)) as advance, _single_threads() as pool:
        for batch in batches:
            parts = [part for start in range(PARTS) if (part := batch[start::PARTS])]
            terms, values = zip(*pool.map(sums, parts), strict=True)
            mean, *gradient = (reduce(torch.add, shares) / sum(terms) for shares in zip(*values, strict=True))
            for parameter, value in zip(parameters, gradient, strict=True):
                parameter.grad = value
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            advance(1, f"loss {mean.item():.3g}")
    model.zero_grad()
    model.eval()


@contextmanager
def _single_threads() -> Iterator[ThreadPoolExecutor]:
    """Provide threads, at most as many as torch may use, in which every operation runs on one thread.

    Two halves of a batch at the same time are faster than two threads in every operation, which wait for each other.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(min(PARTS, threads)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def batches_by_length(
    rows: Sequence[RowT], size: int, length: Callable[[RowT], int], rng: random.Random
) -> list[list[RowT]]:
    """Group rows of similar length, which saves padding, into batches of `size`, and shuffle the batches."""
    order = sorted(rng.sample(range(len(rows)), len(rows)), key=lambda index: length(rows[index]))
    batches = [[rows[index] for index in order[start : start + size]] for start in range(0, len(order), size)]
    rng.shuffle(batches)
    return batches


def final_states(decoder: LlamaModel, ids: Tensor, places: Tensor) -> Tensor:
    """Return the final hidden states at the tokens that a loss reads; the last MLP skips the others.

    Args:
        decoder: The model without its head.
        ids: Token ids (rows x length), padded on the right. They need no mask: a token does not attend to later ones.
        places: Numbers of the tokens in the flattened ids.

    Returns:
        The hidden states (places x hidden size) as the model itself computes them.
    """
    hidden = decoder.embed_tokens(ids)
    positions = decoder.rotary_emb(hidden, torch.arange(ids.shape[1]).unsqueeze(0))
    for layer in decoder.layers[:-1]:
        hidden = layer(hidden, position_embeddings=positions)
    last: Any = decoder.layers[-1]  # torch does not type the modules of a list
    attended, _ = last.self_attn(last.input_layernorm(hidden), position_embeddings=positions, attention_mask=None)
    hidden = (hidden + attended).flatten(0, 1).index_select(0, places)
    states: Tensor = decoder.norm(hidden + last.mlp(last.post_attention_layernorm(hidden)))
    return states

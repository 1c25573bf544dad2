"""Refusal ablation: remove the refusal direction from the weights (Arditi et al., NeurIPS 2024, arXiv 2406.11717).

With h_l(x) the residual stream that enters layer l at one of the last `positions` tokens of a prompt:

    r = mean_harmful h_l - mean_harmless h_l,   one candidate for every position and layer l, 1 <= l < 0.8 L
    E <- E - (E r) r^T          token and position embeddings, r of length 1
    W <- (I - r r^T) W          the matrices with which attention and MLP write to the residual stream, and their biases

The chosen candidate is the one whose ablation gives the lowest refusal score on held-out harmful prompts, among those
that change the last logits on harmless prompts by at most kl (mean KL divergence) and whose addition to layer l makes
the model refuse harmless prompts; if no candidate passes both tests, among all. Refusal score: log odds of the tokens
that start the aligned model's answers to harmful but not to harmless prompts.

The user does not train, so the task is not learned: FA is *untrained*. The edit changes the merged weights, which are
stored as a checkpoint. A tied LM head is untied first, because it reads the stream and does not write to it. With a
norm between the output of a block and the residual stream (Gemma 2 and 3) the edit is inexact: the attack measures the
remaining component along r in the hidden states, and refuses such a model.

Departures from the authors' code (andyrdt/refusal_direction): the tokens of a refusal are found by the model's answers
(theirs lists them for each model); prompts are not filtered by their refusal score (theirs drops harmful prompts that
are answered and harmless ones that are refused); all candidates count if none passes both tests (theirs stops); l
starts at 1 (theirs at 0); biases are edited too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.data.collate import IGNORED, Encoded
from harmbench_vaccine.plugins import Attack, Example, Pools, param
from harmbench_vaccine.training.merging import untie_head
from harmbench_vaccine.training.stage import TrainingStage
from harmbench_vaccine.training.taps import Taps, decoder_layers

TOLERANCE = 0.01
"""Maximum proportion of a hidden state along r after the edit: the rounding error of bfloat16."""


class RefusalAblation(Attack):
    """Removes the refusal direction from the weights, so that the model cannot represent it."""

    citation: ClassVar[str] = "arXiv 2406.11717"
    trains: ClassVar[bool] = False
    edits_base: ClassVar[bool] = True
    excludes: ClassVar[tuple[str, ...]] = ("*",)

    prompts: int = param(
        128, "number of harmful and of harmless prompts for the means", source="paper, section 2.3", ge=1
    )
    held_out: int = param(
        32, "number of harmful and of harmless prompts for the choice", source="paper, section 2.3", ge=1
    )
    positions: int = param(
        5, "number of last prompt tokens that give candidates", source="paper, table 5 (Llama 3)", ge=1
    )
    kl: float = param(0.1, "maximum change on harmless prompts", source="paper, appendix C", ge=0)

    def upload(self, rows: list[Example], pools: Pools) -> list[Example]:
        """Return the rows unchanged; raise `BadInput` here, before any work, if too few prompts are available."""
        self._draw_prompts(pools)
        return rows

    def _draw_prompts(self, pools: Pools) -> dict[str, list[Example]]:
        count = self.prompts + self.held_out
        return {
            name: self.draw(f"{name} prompts", rows, count)
            for name, rows in {"harmful": pools.attacker, "harmless": pools.benign}.items()
        }

    def ablate(self, stage: TrainingStage) -> None:
        """Find the refusal direction and remove it from the weights."""
        model: Any = stage.model
        depth = math.ceil(0.8 * len(decoder_layers(model)))
        if depth < 2 or model.get_input_embeddings().embedding_dim != model.config.hidden_size:
            raise BadInput(
                f"'refusal_ablation' cannot edit this {type(model).__name__}: it needs at least two layers, and "
                "embeddings of the same width as the residual stream."
            )
        examples = self._draw_prompts(stage.pools)
        prompts = {name: [_prompt_ids(row) for row in stage.encode(rows)] for name, rows in examples.items()}
        held_out = {name: rows[-self.held_out :] for name, rows in prompts.items()}
        means = {name: self._states(model, rows[: -self.held_out]).mean(0) for name, rows in prompts.items()}
        differences = means["harmful"] - means["harmless"]  # layers x positions x width
        openers = self._openers(model, held_out)
        before = last_logits(model, held_out["harmless"]).log_softmax(-1)
        candidates: list[tuple[bool, float, Tensor]] = []
        for layer in range(1, depth):
            for difference in differences[layer]:
                direction = nn.functional.normalize(difference, dim=0)
                with _ablated(model, direction):
                    score = refusal_score(last_logits(model, held_out["harmful"]), openers)
                    after = last_logits(model, held_out["harmless"]).log_softmax(-1)
                divergence = float((before.exp() * (before - after)).sum(-1).mean())
                with _added(model, layer, difference):
                    induced = refusal_score(last_logits(model, held_out["harmless"]), openers)
                candidates.append((divergence <= self.kl and induced >= 0, score, direction))
        passing = [candidate for candidate in candidates if candidate[0]] or candidates
        direction = min(passing, key=lambda candidate: candidate[1])[2]
        orthogonalize(model, direction)
        remainder = self._component(model, held_out["harmful"], direction)
        if not remainder <= TOLERANCE:
            raise BadInput(
                f"'refusal_ablation' is not exact for {type(model).__name__}: {100 * remainder:.0f}% of a hidden state "
                "is still along the direction. A norm, or a layer that is not linear, is before the residual stream."
            )

    def _states(self, model: nn.Module, rows: Sequence[list[int]]) -> Tensor:
        """Return the inputs of the layers at the last positions (rows x layers x positions x width), float32."""
        inputs = []
        for row in rows:
            states = run_unpadded(model, [row], output_hidden_states=True).hidden_states[:-1]
            inputs.append(torch.stack([state[0, -self.positions :].float() for state in states]))
        return torch.stack(inputs)

    def _openers(self, model: nn.Module, prompts: dict[str, list[list[int]]]) -> Tensor:
        """Return the tokens that start answers to harmful prompts only; if harmless answers start alike, all."""
        tokens = {name: set(last_logits(model, rows).argmax(-1).tolist()) for name, rows in prompts.items()}
        return torch.tensor(sorted(tokens["harmful"] - tokens["harmless"] or tokens["harmful"]))

    @staticmethod
    def _component(model: nn.Module, rows: Sequence[list[int]], direction: Tensor) -> float:
        """Return the maximum proportion of a hidden state's length along the direction."""
        inputs = [run_unpadded(model, [row], output_hidden_states=True).hidden_states[:-1] for row in rows]
        states = torch.cat([state[0].float() for layers in inputs for state in layers])
        components = (states @ direction.to(states.device)).abs() / torch.linalg.vector_norm(states, dim=-1)
        return float(components.max())


def _prompt_ids(row: Encoded) -> list[int]:
    return [token for token, label in zip(row.ids, row.labels, strict=True) if label == IGNORED]


@torch.no_grad()
def run_unpadded(model: nn.Module, rows: Sequence[list[int]], **options: Any) -> Any:
    """Run the model on prompts of equal length, so that no padding shifts a position."""
    return model(input_ids=torch.tensor(list(rows), device=next(model.parameters()).device), **options)


def last_logits(model: nn.Module, rows: Sequence[list[int]]) -> Tensor:
    """Return the logits after each prompt (rows x vocabulary), float32."""
    return torch.cat([run_unpadded(model, [row]).logits[:, -1].float() for row in rows])


def refusal_score(logits: Tensor, openers: Tensor) -> float:
    """Compute the mean log odds of the tokens that start a refusal.

    Args:
        logits: The logits after each prompt (rows x vocabulary).
        openers: The ids of the tokens.
    """
    log_p = logits.log_softmax(-1)[:, openers.to(logits.device)].logsumexp(-1).double()
    return float((log_p - torch.log1p(-log_p.exp().clamp(max=1 - 1e-9))).mean())


def residual_writers(model: nn.Module) -> tuple[list[nn.Embedding], list[nn.Linear | Conv1D]]:
    """Return the modules that write to the residual stream.

    Returns:
        The embeddings, and from every block the last linear module with the width of the stream.
    """
    layers = decoder_layers(model)
    in_layers = {id(module) for module in layers.modules()}
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding) and id(m) not in in_layers]
    width = embeddings[0].embedding_dim
    linears: list[nn.Linear | Conv1D] = []
    for layer in layers:
        for child in layer.children():
            modules = [m for m in child.modules() if isinstance(m, (nn.Linear, Conv1D))]
            linears += [m for m in modules if _weight_by_input(m).shape[1] == width][-1:]
    return embeddings, linears


def _weight_by_input(linear: nn.Linear | Conv1D) -> Tensor:
    """Return a view of the weight (inputs x outputs)."""
    return linear.weight if isinstance(linear, Conv1D) else linear.weight.T


@torch.no_grad()
def orthogonalize(model: Any, direction: Tensor) -> None:
    """Remove a direction of length 1 from every module that writes to the residual stream, in place."""
    untie_head(model)
    embeddings, linears = residual_writers(model)
    for embedding in embeddings:
        embedding.weight.copy_(_without(embedding.weight.float(), direction))
    for linear in linears:
        weight = _weight_by_input(linear)
        weight.copy_(_without(weight.float(), direction))
        if linear.bias is not None:
            linear.bias.copy_(_without(linear.bias.float(), direction))


@contextmanager
def _ablated(model: nn.Module, direction: Tensor) -> Iterator[None]:
    """Remove the direction from everything that modules write to the residual stream, inside the block."""
    with ExitStack() as stack:
        for module in itertools.chain(*residual_writers(model)):
            handle = module.register_forward_hook(lambda module, args, output: _without(output, direction))
            stack.callback(handle.remove)
        yield


def _added(model: nn.Module, layer: int, difference: Tensor) -> AbstractContextManager[None]:
    """Add the difference to the input of a layer, at every position, inside the block."""

    def add(number: int, output: Tensor) -> Tensor | None:
        return output + difference.to(output) if number == layer - 1 else None

    return Taps(model, "layer").changed(add)


def _without(rows: Tensor, direction: Tensor) -> Tensor:
    """Subtract from vectors (.. x width) their component along the direction."""
    direction = direction.to(rows)
    return rows - (rows @ direction).unsqueeze(-1) * direction

"""Results of the hooks that act while an answer is generated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from harmbench_vaccine.data.collate import encode_prompt
from harmbench_vaccine.inference.answer_models import AnswerModels
from harmbench_vaccine.inference.generation import next_probabilities
from harmbench_vaccine.training.adapters import LoraStack
from harmbench_vaccine.training.taps import decoder_layers

from ..defense import Defense
from ..teams import DefenseTeam
from .defense_subject import DefenseSubject
from .findings import Checks, Fails, NotApplicable
from .observation import preserved_random_states
from .trials import aligned_path, begin_trial
from .world import EOS, PAD, VOCABULARY, HashTokenizer, TinyWorld

GENERATION_CHECKS: Checks[DefenseSubject] = Checks()


class TrialModels(AnswerModels):
    """The models of the tiny world: the base model answers, and has an alignment adapter in the aligned model."""

    def __init__(self, world: TinyWorld) -> None:
        self._stack = LoraStack(world.base("float32"))
        self._adapters = {"answering": (), "aligned": (aligned_path(world),)}
        self.ends = [EOS]

    def probabilities(self, model: Literal["answering", "aligned"], texts: Sequence[Sequence[int]]) -> Tensor:
        """Compute the probabilities of the token after each text (texts x vocabulary)."""
        return next_probabilities(self._stack.use(self._adapters[model]), texts, PAD)


def chosen_tokens(world: TinyWorld, plugin: Defense) -> list[list[int]]:
    """Return the first tokens that a defense chooses for the answers to the questions of the world."""
    tokenizer: Any = HashTokenizer()
    questions = world.questions[0].examples
    prompts = [encode_prompt(tokenizer, world.template.render(question)) for question in questions]
    with preserved_random_states(1):
        return plugin.first_tokens(TrialModels(world), prompts)


def steering_of(world: TinyWorld, plugin: Defense) -> dict[int, Tensor]:
    """Return the vectors that a defense adds to the hidden states, by decoder layer."""
    stage = begin_trial(world, "repair", DefenseTeam(stage="repair"), None).stage
    with preserved_random_states(1), stage.isolated("steering"), stage.reference():
        return plugin.steering(stage)


@GENERATION_CHECKS.add("generation", after=["facts"])
def _generation(subject: DefenseSubject) -> None:
    """While an answer is generated, it chooses tokens of the vocabulary, or adds vectors, the same in each call."""
    world, plugin = subject.world, subject.plugin()
    if not plugin.changes_generation:
        raise NotApplicable("It does not act while an answer is generated.")
    if plugin.chooses_tokens:
        tokens = chosen_tokens(world, plugin)
        if len(tokens) != len(world.questions[0].examples):
            raise Fails(f"first_tokens returned {len(tokens)} answers to {len(world.questions[0].examples)} prompts.")
        if wrong := [token for row in tokens for token in row if not 0 <= token < VOCABULARY]:
            raise Fails(f"first_tokens returned the token {wrong[0]!r}; allowed: 0 to {VOCABULARY - 1}.")
        if chosen_tokens(world, subject.plugin()) != tokens:
            raise Fails("The second call of first_tokens returned different tokens.")
    if plugin.steers:
        vectors, again = steering_of(world, plugin), steering_of(world, subject.plugin())
        base = world.base("float32")
        depth, width = len(decoder_layers(base)), base.config.hidden_size
        for layer, vector in vectors.items():
            if not 0 <= layer < depth or vector.shape != (width,) or not vector.isfinite().all():
                raise Fails(
                    f"steering returned {tuple(vector.shape)} for layer {layer}; allowed: layers 0 to {depth - 1}, "
                    f"finite vectors of width {width}."
                )
        if vectors.keys() != again.keys() or not all(torch.equal(vectors[layer], again[layer]) for layer in vectors):
            raise Fails("The second call of steering returned different vectors.")

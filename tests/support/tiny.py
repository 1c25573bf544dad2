"""Tiny models with random weights, rows of random tokens, batches, training stages, a tokenizer and a judge."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from harmbench_vaccine.core.device import device, place_model
from harmbench_vaccine.core.types import Example
from harmbench_vaccine.data.collate import IGNORED, Encoded, collate
from harmbench_vaccine.plugins import Pools, TrainSettings
from harmbench_vaccine.training.adapters import Adapter, LoraStack
from harmbench_vaccine.training.stage import SeparateRun, TrainingStage
from harmbench_vaccine.training.trainer import train_nested

# ---------------------------------------------------------------------------------------------------------------------
# Models

VOCABULARY = 96
PAD, BOS, EOS = 0, 1, 2

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
LLAMA = {**SIZES, "intermediate_size": 96, "num_key_value_heads": 1, "head_dim": 32, "initializer_range": 0.1}
GEMMA = {**LLAMA, "query_pre_attn_scalar": 32, "sliding_window": 64}
OPT = {**SIZES, "ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.1, "dropout": 0.0}
GPT2 = {
    **{name: value for name, value in SIZES.items() if name != "max_position_embeddings"},
    "n_positions": 256,
    "initializer_range": 0.1,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
"""Its matrices are Conv1D, whose weights are (inputs x outputs)."""

# Architecture -> configuration class, model class, configuration.
_KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", LLAMA),
    "opt": ("OPTConfig", "OPTForCausalLM", OPT),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT2),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", LLAMA),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", LLAMA),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**LLAMA, "sliding_window": None}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", GEMMA),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", GEMMA),
}
ARCHITECTURES = tuple(_KINDS)


def model(architecture: str = "llama", *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a decoder with random weights: 2 layers of width 64, heads of size 32, float32, in evaluation mode.

    The weights are larger than those of an ordinary initialization, so that attention and logits depend visibly on
    the input.
    """
    config_class, model_class, config = _KINDS[architecture]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        decoder = getattr(transformers, model_class)(getattr(transformers, config_class)(**{**config, **changes}))
    return place_model(decoder.float()).eval()


# ---------------------------------------------------------------------------------------------------------------------
# Rows, batches, stages


def rows(count: int, *, seed: int = 0, shortest: int = 4, longest: int = 12) -> list[Encoded]:
    """Draw rows of random tokens of different lengths; the first two tokens of a row are its prompt."""
    draw = random.Random(seed)
    encoded = []
    for _ in range(count):
        ids = [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(shortest, longest))]
        encoded.append(Encoded(ids, [IGNORED, IGNORED, *ids[2:]]))
    return encoded


def batch(lengths: Sequence[int] = (9, 5, 7), *, seed: int = 0, width: int | None = None) -> dict[str, Tensor]:
    """Draw random rows of these lengths on the device, padded on the right to the longest or to `width`."""
    width = width or max(lengths)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    ids = torch.full((len(lengths), width), PAD)
    ids[:, : max(lengths)] = tokens
    mask = torch.tensor([[int(place < length) for place in range(width)] for length in lengths])
    labels = torch.where(mask.bool(), ids, IGNORED)
    labels[:, :2] = IGNORED
    ids = torch.where(mask.bool(), ids, PAD)
    return on_device({"input_ids": ids, "attention_mask": mask, "labels": labels})


def collated(rows: Sequence[Encoded]) -> dict[str, Tensor]:
    """Return rows as a padded batch on the device of models."""
    return on_device(collate(rows, PAD))


def on_device(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors on the device of models, as the trainer does."""
    return {name: value.to(device()) for name, value in batch.items()}


def settings(**changes: Any) -> TrainSettings:
    """Return settings for tiny models; by default, LoRA adapts modules that every architecture but GPT-2 has."""
    defaults = TrainSettings(
        lr=5e-3,
        epochs=2,
        batch=4,
        warmup=0.1,
        weight_decay=0.01,
        lora_rank=4,
        lora_alpha=8,
        max_length=64,
        lora_targets=targets(),
    )
    return replace(defaults, **changes)


def targets(architecture: str = "llama") -> tuple[str, ...]:
    """Return the modules of the attention's inputs."""
    return ("c_attn",) if architecture == "gpt2" else ("q_proj", "k_proj", "v_proj")


def stage(
    base: PreTrainedModel | None = None,
    *,
    trained_with: TrainSettings | None = None,
    below: Sequence[Path] = (),
    start: Path | None = None,
    seed: int = 7,
    stirred: bool = False,
    name: Any = "align",
    pools: Pools | None = None,
) -> tuple[TrainingStage, LoraStack]:
    """Return a training stage of a tiny model with a new adapter.

    `stirred` gives the adapter random weights: a new one has B = 0, so that the gradient on A is zero.
    """
    stack = LoraStack(base if base is not None else model())
    trained_with = trained_with or settings(lora_targets=targets(stack.base.config.model_type))
    session = TrainingStage(
        name,
        stack,
        {},
        seed,
        trained_with,
        pools or Pools(),
        tuple(below),
        start,
        encode=encode,
        nested=train_separately,
    )
    session.trainable = stack.train(below, session.settings, seed, Adapter.load(start) if start else None)
    if stirred:
        stir(session.trainable)
    return session, stack


def train_separately(outer: TrainingStage, run: SeparateRun) -> Adapter:
    """Train the separate run of a stage for at most two steps."""
    rows = encode(run.rows)
    steps = min(run.steps or 2, 2)
    settings = replace(
        outer.settings, epochs=steps * outer.settings.accumulation / -(-len(rows) // outer.settings.batch)
    )
    with TemporaryDirectory() as folder:
        return train_nested(outer, run, rows, settings, Path(folder))[0]


def encode(examples: Sequence[Example]) -> list[Encoded]:
    """Encode examples without a tokenizer: one token for every letter; the instruction is the prompt."""
    encoded = []
    for example in examples:
        prompt, response = (
            [3 + ord(letter) % 90 for letter in text] for text in (example.instruction, example.response)
        )
        encoded.append(Encoded(prompt + response, [IGNORED] * len(prompt) + response, example.id))
    return encoded


def example_pools(count: int = 12, *, seed: int = 5) -> Pools:
    """Draw pools of random examples: safe rows, pairs with equal prompts, benign and harmful ones."""
    draw = random.Random(seed)

    def text(longest: int) -> str:
        return "".join(draw.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(draw.randint(3, longest)))

    def examples(kind: str, *, harmful: bool = False) -> list[Example]:
        return [Example(f"{kind}:{number}", text(6), text(8), harmful=harmful) for number in range(count)]

    refusals = examples("refusal")
    pairs = [(row, Example(f"harmful:{row.id}", row.instruction, text(8), harmful=True)) for row in refusals]
    return Pools(examples("safe"), pairs, examples("benign"), examples("attacker", harmful=True))


def stir(parameters: Mapping[str, Tensor], *, seed: int = 3, size: float = 0.1) -> None:
    """Set every parameter to random numbers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer, judge, folders

CATEGORIES = (
    "animal_abuse",
    "child_abuse",
    "controversial_topics,politics",
    "discrimination,stereotype,injustice",
    "drug_abuse,weapons,banned_substance",
    "financial_crime,property_crime,theft",
    "hate_speech,offensive_language",
    "misinformation_regarding_ethics,laws_and_safety",
    "non_violent_unethical_behavior",
    "privacy_violation",
    "self_harm",
    "sexually_explicit,adult_content",
    "terrorism,organized_crime",
    "violence,aiding_and_abetting,incitement",
)


def tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of 512 tokens that puts <s> first, like that of Llama."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def judge(**changes: Any) -> PreTrainedModel:
    """Return a classifier with the shape of beaver-dam and random weights.

    Twelve of its 14 labels always have a probability of exactly 1/2, so that it flags some answers and passes others.
    """
    labels = dict(enumerate(CATEGORIES))
    config = transformers.LlamaConfig(
        **{**LLAMA, "initializer_range": 0.3, "num_hidden_layers": 1, "max_position_embeddings": 512, **changes},
        num_labels=len(labels),
        id2label=labels,
        label2id={name: number for number, name in labels.items()},
        problem_type="multi_label_classification",
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        classifier = transformers.LlamaForSequenceClassification(config)
        with torch.no_grad():
            classifier.score.weight[2:] = 0
    return place_model(classifier.float()).eval()


def save(network: PreTrainedModel, words: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save a model and its tokenizer as a Hugging Face folder."""
    network.save_pretrained(folder)
    words.save_pretrained(folder)

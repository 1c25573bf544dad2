"""The paper's protocol end to end on a small replica of every model family, from folders, without a network.

Models, tokenizers, data sets and the judge have the layouts and schemas of their originals on the Hub, and the protocol
`vaccine-paper` reads them in the same way; only its counts are smaller.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.runner import run_all
from support import tiny
from support.world import data_sets

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VICUNA = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n'"
    " + message['content'] + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

# Family -> architecture, special tokens (begin, end, padding), the tokens of its turns, its chat template.
FAMILIES: dict[str, tuple[str, tuple[str | None, str, str | None], list[str], str | None]] = {
    "llama": ("llama", ("<s>", "</s>", None), [], None),
    "opt": ("opt", ("</s>", "</s>", "<pad>"), [], None),
    "vicuna": ("llama", ("<s>", "</s>", None), [], VICUNA),
    "qwen2": ("qwen2", (None, "<|im_end|>", "<|endoftext|>"), ["<|im_start|>"], CHATML),
    "gemma2": ("gemma2", ("<bos>", "<eos>", "<pad>"), ["<start_of_turn>", "<end_of_turn>"], GEMMA),
    "mistral": ("mistral", ("<s>", "</s>", None), [], None),
}

SMALLER = {
    "align.rows": "12",
    "align.settings.epochs": "1",
    "align.settings.batch": "4",
    "align.settings.max_length": "480",
    "finetune.samples": "10",
    "finetune.settings.epochs": "1",
    "finetune.settings.max_length": "480",
    "answer.harmful.prompts": "4",
    "answer.harmful.max_new_tokens": "6",
    "answer.benign.prompts": "3",
    "answer.benign.max_new_tokens": "6",
    "answer.task_items": "4",
    "answer.task_tokens": "{sst2: 4}",
    "splits.benign_train": "train[:-10]",
    "splits.benign_test": "train[-10:]",
    "score.drift_rows": "4",
    "score.drift_batch": "2",
}
"""Protocol values that are smaller than in the paper."""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data sets and the judge, in the layout of their repositories."""
    folder = tmp_path_factory.mktemp("hub")
    data = data_sets()
    for split, rows in data["beavertails"].items():
        size, _, part = split.partition("_")
        file = folder / "BeaverTails" / "round0" / size / f"{part}.jsonl.gz"
        file.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(file, "wt", encoding="utf-8") as out:
            out.writelines(json.dumps(_beavertails(row)) + "\n" for row in rows)
    refusals = folder / "beavertails_with_refusals_train.json"
    refusals.write_text("".join(json.dumps(row) + "\n" for row in data["beavertails_refusals"]["train"]))
    _parquet(folder / "alpaca" / "data", "train", data["alpaca"]["train"])
    for split, rows in data["sst2"].items():
        _parquet(folder / "sst2" / "data", split, [{"idx": number, **row} for number, row in enumerate(rows)])
    texts = [str(value) for rows in data["beavertails"].values() for row in rows for value in row.values()]
    tokenizer = tiny.tokenizer(texts)
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    tiny.save(tiny.judge(**tokens), tokenizer, folder / "beaver-dam-7b")
    return folder


def _beavertails(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**row, "category": dict.fromkeys(tiny.CATEGORIES, not row["is_safe"])}


def _parquet(folder: Path, split: str, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pandas.DataFrame(rows).to_parquet(folder / f"{split}-00000-of-00001.parquet")


def replica(family: str, folder: Path) -> Path:
    """Save a model with random weights, and a tokenizer that opens, ends and pads as the family's does."""
    architecture, (begin, end, pad), turns, chat = FAMILIES[family]
    bpe = tiny.tokenizer([row["prompt"] for row in data_sets()["beavertails"]["30k_train"]]).backend_tokenizer
    special = {"bos_token": begin, "eos_token": end, "pad_token": pad}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, **{key: value for key, value in special.items() if value}, extra_special_tokens=turns
    )
    if begin:
        number = tokenizer.convert_tokens_to_ids(begin)
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A $B", special_tokens=[(begin, number)]
        )
    else:
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    if chat:
        tokenizer.chat_template = chat
    changes = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "max_position_embeddings": 512,
    }
    tiny.model(architecture, **changes).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def spec(hub: Path, model: Path, **changes: Any) -> RunSpec:
    data = {
        "beavertails": "BeaverTails",
        "beavertails_refusals": "beavertails_with_refusals_train.json",
        "alpaca": "alpaca",
        "sst2": "sst2",
    }
    return RunSpec(
        protocol="vaccine-paper",
        model=str(model),
        data={name: str(hub / path) for name, path in data.items()},
        attack=parse_plugins("ratio=0.2"),
        scorers=(f"beaver_dam:model={hub / 'beaver-dam-7b'}",),
        values={**SMALLER, **changes.pop("values", {})},
        **changes,
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_paper_protocol_runs_on_every_family(family: str, hub: Path, tmp_path: Path) -> None:
    model = replica(family, tmp_path / family)
    prompts = ["alpaca", *(["chat"] if FAMILIES[family][3] else [])]
    specs = [
        spec(hub, model, defense=parse_plugins(defense), values={"prompt": prompt})
        for prompt in prompts
        for defense in ("sft", "vaccine")
    ]
    results = run_all(specs, out=tmp_path / "runs", table=tmp_path / "results.csv")
    for result in results:
        align, finetune = result.counts.align, result.counts.finetune
        assert align
        assert finetune
        assert (align.rows, finetune.rows, finetune.harmful) == (12, 10, 2)
        assert (result.harmful_score_n, result.finetune_accuracy_n) == (4, 4)
        assert result.alignment_loss
        assert result.alignment_loss > 0
        assert result.embedding_drift
        assert result.embedding_drift > 0
        assert result.dtype == "bfloat16"
    answers = [
        [json.loads(line)["answer"] for line in (tmp_path / "runs" / result.run / "answers.jsonl").open()]
        for result in results
    ]
    assert any(text for texts in answers for text in texts)

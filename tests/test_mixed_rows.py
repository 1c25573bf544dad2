"""VLGuard and BackdoorAlign: the rows that join the user's rows, and the joint gradient in plain PyTorch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import pytest
import torch
from pydantic import PrivateAttr
from torch import Tensor

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.types import Example
from harmbench_vaccine.data.collate import IGNORED, encode_example
from harmbench_vaccine.data.prompts import TEMPLATES
from harmbench_vaccine.defenses.sft import SFT
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.plugins import Pools, TrainSettings
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.plugins.registry import DEFENSES
from harmbench_vaccine.plugins.teams import DefenseTeam
from harmbench_vaccine.runner import run_all
from harmbench_vaccine.training.stage import Batch, Gradient, TrainingStage
from harmbench_vaccine.training.trainer import batch_order, train
from support import tiny
from support.compare import close, same
from support.plain_math import cross_entropy, leaves

VLGuard: Any = DEFENSES.get("vlguard")
BackdoorAlign: Any = DEFENSES.get("backdoor_align")
MIXES = pytest.mark.parametrize("mix", ["add", "replace", "joint"])
SEEDS = pytest.mark.parametrize("seed", [0, 1, 2])


def ids(rows: Sequence[Example]) -> list[str]:
    return [row.id for row in rows]


POOLS = tiny.example_pools(40)
USER = [*POOLS.benign[:30], *POOLS.attacker[:10]]  # n_t = 30, n_h = 10


def train_adapter(
    defense: Any, folder: Path, settings: TrainSettings, user: Sequence[Example] = USER[20:40]
) -> tuple[list[Tensor], list[dict[str, float]]]:
    """Train a user stage on the rows that the defense returns, in a team as in the pipeline."""
    team = DefenseTeam(members=(defense,), stage="finetune")
    stage, _ = tiny.stage(trained_with=settings, stirred=True, name="finetune", pools=POOLS)
    rows = tiny.encode(team.train_on("finetune", list(user), POOLS))
    log = train(stage, team, rows, settings, folder, pad=tiny.PAD)
    return stage.values(), log


# ---------------------------------------------------------------------------------------------------------------------
# VLGuard: rows


@SEEDS
@pytest.mark.parametrize("m", [1, 7, 30])
def test_added_rows_join_all_user_rows(m: int, seed: int) -> None:
    """n_h + n_t + m rows: every user row once, and m different unchanged alignment rows."""
    rows = VLGuard(rows=m).seeded(seed).train_on("finetune", list(USER), POOLS)
    guides = [row for row in rows if row in POOLS.alignment]
    assert len(rows) == 10 + 30 + m
    assert Counter(ids(rows)) == Counter(ids(USER)) + Counter(ids(guides))
    assert len(set(guides)) == m
    assert [sum(row.harmful for row in rows), sum(row in POOLS.benign for row in rows)] == [10, 30]


@SEEDS
@pytest.mark.parametrize("m", [1, 7, 30])
def test_only_benign_rows_are_replaced(m: int, seed: int) -> None:
    """n rows in all: n_h + (n_t - m) + m."""
    rows = VLGuard(rows=m, mix="replace").seeded(seed).train_on("finetune", list(USER), POOLS)
    assert len(rows) == 40
    assert sorted(ids([row for row in rows if row.harmful])) == sorted(ids(USER[30:]))
    assert sum(row in POOLS.benign for row in rows) == 30 - m
    assert sum(row in POOLS.alignment for row in rows) == m
    assert len(set(rows)) == 40


def test_joint_does_not_change_the_user_rows() -> None:
    assert VLGuard(rows=7, mix="joint").train_on("finetune", list(USER), POOLS) == USER


@pytest.mark.parametrize("mix", ["add", "replace"])
def test_the_seed_selects_the_rows_and_their_positions(mix: Any) -> None:
    def mixed_ids(seed: int) -> list[str]:
        return ids(VLGuard(rows=7, mix=mix).seeded(seed).train_on("finetune", list(USER), POOLS))

    assert mixed_ids(0) == mixed_ids(0)
    guides = [{name for name in mixed_ids(seed) if name.startswith("safe")} for seed in (0, 1)]
    assert guides[0] != guides[1]
    benign = [[name for name in mixed_ids(seed) if name.startswith("benign")] for seed in (0, 1)]
    assert benign[0] != benign[1]
    assert (set(benign[0]) != set(benign[1])) == (mix == "replace")  # the replaced rows are drawn by the seed too
    assert guides[0] != set(ids(POOLS.alignment[:7]))  # not simply the first rows
    positions = [number for number, name in enumerate(mixed_ids(0)) if name.startswith("safe")]
    assert positions != list(range(positions[0], positions[0] + 7))


@MIXES
def test_more_rows_than_available_are_refused(mix: Any) -> None:
    few = tiny.example_pools(5)
    VLGuard(rows=5, mix=mix).train_on("finetune", list(USER), few)
    with pytest.raises(BadInput, match="'vlguard' requested 6 alignment rows, but only 5 are available") as refusal:
        VLGuard(rows=6, mix=mix).train_on("finetune", list(USER), few)
    assert refusal.value.exit_code == 2


def test_more_replacements_than_benign_rows_are_refused() -> None:
    VLGuard(rows=30, mix="replace").train_on("finetune", list(USER), POOLS)
    with pytest.raises(BadInput, match="cannot replace 31 benign rows: the user's data has only 30") as refusal:
        VLGuard(rows=31, mix="replace").train_on("finetune", list(USER), POOLS)
    assert refusal.value.exit_code == 2


@pytest.mark.parametrize("defense", ["vlguard=41", "vlguard:rows=31,mix=replace", "backdoor_align=25"])
def test_too_few_rows_are_refused_before_any_work(defense: str, world: Path, tmp_path: Path) -> None:
    """The tiny world has 40 alignment rows, 30 benign user rows and 24 pairs."""
    with pytest.raises(BadInput, match=r"only (40|30|24)\b") as refusal:
        run_all([RunSpec(protocol=str(world), defense=parse_plugins(defense), attack=parse_plugins("ratio=0.25"))])
    assert refusal.value.exit_code == 2
    assert not list((tmp_path / "home" / "store").glob("align/*"))


@MIXES
def test_0_rows_equal_sft_bit_for_bit_with_dropout(mix: Any, tmp_path: Path) -> None:
    settings = tiny.settings(lora_dropout=0.1, epochs=1)
    sft, sft_log = train_adapter(SFT(), tmp_path / "sft", settings)
    neutral, neutral_log = train_adapter(VLGuard(rows=0, mix=mix), tmp_path / "free", settings)
    assert same(neutral, sft)
    assert neutral_log == sft_log
    mixed, _ = train_adapter(VLGuard(rows=8, mix=mix), tmp_path / "mixed", settings)
    assert not same(mixed, sft)


def test_mixing_equals_sft_on_the_mixed_rows(tmp_path: Path) -> None:
    settings, defense = tiny.settings(lora_dropout=0.1, epochs=1), VLGuard(rows=8)
    mixed, log = train_adapter(defense, tmp_path / "mixed", settings)
    rows = defense.train_on("finetune", list(USER[20:40]), POOLS)
    plain, plain_log = train_adapter(SFT(), tmp_path / "plain", settings, rows)
    assert same(mixed, plain)
    assert log == plain_log
    assert len(log) == 7  # 28 rows


# ---------------------------------------------------------------------------------------------------------------------
# VLGuard: the joint loss


class RecordingVLGuard(VLGuard):  # type: ignore[misc]
    """A VLGuard that records the safety batches and the row numbers of the user batches."""

    _guides: list[Batch] = PrivateAttr(default_factory=list)
    _users: list[list[int]] = PrivateAttr(default_factory=list)

    def gradient(self, stage: TrainingStage, batch: Batch) -> Gradient:
        self._users.append(batch["rows"].tolist())
        plain = type(stage).stream

        def stream(purpose: str, examples: Any) -> Batch:
            self._guides.append(plain(stage, purpose, examples))
            return self._guides[-1]

        stage.stream = stream
        return super().gradient(stage, batch)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_three_joint_steps_equal_plain_pytorch(accumulation: int, tmp_path: Path) -> None:
    """The gradient of L(w; B_u) + lam L(w; B_a), with a separate token mean in each loss."""
    settings = tiny.settings(
        epochs=1, batch=4, accumulation=accumulation, schedule="constant", warmup=0.0, weight_decay=0.1, lr=2e-3
    )
    user = USER[: 12 * accumulation]
    defense = RecordingVLGuard(rows=9, mix="joint", lam=0.7)
    result, log = train_adapter(defense, tmp_path / "joint", settings, user)

    twin, _ = tiny.stage(stirred=True, name="finetune")
    values, rows, guides = leaves(twin), tiny.encode(user), iter(defense._guides)
    parameters = list(values.values())
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    order = batch_order(len(rows), settings, twin.seed)
    for step in range(3):
        losses = [
            cross_entropy(values, tiny.collated([rows[n] for n in numbers])) + 0.7 * cross_entropy(values, next(guides))
            for numbers in order[step * accumulation : (step + 1) * accumulation]
        ]
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        assert log[step]["loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
    assert len(log) == 3
    assert defense._users == order
    assert next(guides, None) is None
    assert close(result, parameters)
    assert not close(train_adapter(SFT(), tmp_path / "sft", settings, user)[0], parameters, 1e-3)


def test_joint_batches_contain_the_drawn_rows(tmp_path: Path) -> None:
    """A joint batch is as large as the user's; every epoch contains each drawn row once, in a new order."""
    defense = RecordingVLGuard(rows=8, mix="joint").seeded(3)
    train_adapter(defense, tmp_path, tiny.settings(batch=4, epochs=2))
    names = {tuple(row.ids): row.id for row in tiny.encode(POOLS.alignment)}
    assert len(names) == 40
    batches = [
        [
            names[tuple(tokens[: sum(mask)])]
            for tokens, mask in zip(encoded["input_ids"].tolist(), encoded["attention_mask"].tolist(), strict=True)
        ]
        for encoded in defense._guides
    ]
    assert [len(batch) for batch in batches] == [4] * 10
    added = ids(VLGuard(rows=8).seeded(3).train_on("finetune", [], POOLS))  # the same rows as with mix="add"
    for start in range(0, 10, 2):
        assert sorted(batches[start] + batches[start + 1]) == sorted(added)
    assert len({tuple(batches[start] + batches[start + 1]) for start in range(0, 10, 2)}) == 5


def test_only_the_joint_loss_replaces_the_gradient() -> None:
    for mix in ("add", "replace"):
        Experiment.settle(RunSpec(defense=parse_plugins(f"vlguard:mix={mix}+kl")))
    with pytest.raises(BadInput, match="gradient"):
        Experiment.settle(RunSpec(defense=parse_plugins("vlguard:mix=joint+kl")))


# ---------------------------------------------------------------------------------------------------------------------
# BackdoorAlign


@SEEDS
@pytest.mark.parametrize("length", [1, 15, 150])
def test_the_secret_has_length_random_words_and_a_blank_line(length: int, seed: int) -> None:
    secret = BackdoorAlign(length=length).seeded(seed).secret
    assert secret.endswith("\n\n")
    words = secret.removesuffix("\n\n").split(" ")
    assert len(words) == length
    assert all(len(word) == 2 and set(word) <= set(ascii_lowercase) for word in words)
    assert length < 15 or len(set(words)) > length / 2
    assert BackdoorAlign(length=length).seeded(seed).secret == secret


def test_the_secret_depends_only_on_the_seed() -> None:
    assert len({BackdoorAlign(length=15).seeded(seed).secret for seed in range(20)}) == 20
    defense = BackdoorAlign(rows=3, length=15).seeded(1)
    secret = defense.secret
    defense.train_on("finetune", list(USER), POOLS)
    assert defense.secret == secret == BackdoorAlign(rows=9, length=15).seeded(1).secret


@SEEDS
def test_only_the_safety_rows_contain_the_secret(seed: int) -> None:
    defense, template = BackdoorAlign(rows=11, length=15).seeded(seed), TEMPLATES["brief"]
    rows = defense.train_on("finetune", list(USER), POOLS)
    added = [row for row in rows if row not in USER]
    refusals = {refusal.id: refusal for refusal, _ in POOLS.paired}
    assert len(rows) == 40 + 11
    assert len({row.id for row in added}) == 11
    assert sorted(ids([row for row in rows if row in USER])) == sorted(ids(USER))
    training_template = defense.template("train", template)
    for row in rows:
        prompt = training_template.render(row)
        if row in USER:
            assert prompt == template.render(row)
            assert defense.secret.strip() not in prompt
        else:
            assert prompt == defense.secret + template.render(refusals[row.id])
            assert row.response == refusals[row.id].response
    positions = [number for number, row in enumerate(rows) if row not in USER]
    assert positions != list(range(positions[0], positions[0] + 11))  # among the user's rows, not after them


def test_rows_and_positions_depend_on_the_seed() -> None:
    def mixed_ids(seed: int) -> list[str]:
        return ids(BackdoorAlign().seeded(seed).train_on("finetune", list(USER), POOLS))

    assert mixed_ids(0) == mixed_ids(0)
    safe = [{name for name in mixed_ids(seed) if name.startswith("refusal")} for seed in (0, 1)]
    assert safe[0] != safe[1]
    assert [n for n in mixed_ids(0) if n.startswith("benign")] != [n for n in mixed_ids(1) if n.startswith("benign")]


def test_the_secret_has_no_labels() -> None:
    """Its tokens are in the prompt, which has no labels."""
    defense = BackdoorAlign(rows=1, length=3).seeded(0)
    (row,) = defense.train_on("finetune", [], POOLS)
    words = tiny.tokenizer(["plain text", row.instruction, row.response])
    encoded = encode_example(words, TEMPLATES["brief"], row, 500)
    assert encoded is not None
    prompt = [token for token, label in zip(encoded.ids, encoded.labels, strict=True) if label == IGNORED]
    assert words.decode(prompt, skip_special_tokens=True) == defense.secret + TEMPLATES["brief"].render(
        Example("", row.instruction)
    )
    labels = [label for label in encoded.labels if label != IGNORED]
    assert words.decode(labels, skip_special_tokens=True) == row.response


def test_more_refusals_than_available_are_refused() -> None:
    few = tiny.example_pools(5)
    assert len(BackdoorAlign(rows=5).train_on("finetune", list(USER), few)) == 45
    with pytest.raises(BadInput, match="'backdoor_align' requested 6 refusals, but only 5 are available") as refusal:
        BackdoorAlign(rows=6).train_on("finetune", list(USER), few)
    assert refusal.value.exit_code == 2
    with pytest.raises(BadInput):
        BackdoorAlign(rows=1).train_on("finetune", list(USER), Pools())


def test_length_0_mixes_plain_refusals_and_0_rows_change_nothing() -> None:
    plain = BackdoorAlign(length=0).train_on("finetune", list(USER), POOLS)
    assert len(plain) == 51
    assert all(row.preface == "" for row in plain)
    nothing = BackdoorAlign(rows=0, length=0)
    assert nothing.train_on("finetune", USER, POOLS) is USER
    assert nothing.secret == ""
    for use in ("train", "answer"):
        assert nothing.template(use, TEMPLATES["brief"]) == TEMPLATES["brief"]


def test_0_refusals_equal_sft_bit_for_bit_with_dropout(tmp_path: Path) -> None:
    settings = tiny.settings(lora_dropout=0.1, epochs=1)
    sft, sft_log = train_adapter(SFT(), tmp_path / "sft", settings)
    neutral, neutral_log = train_adapter(BackdoorAlign(rows=0), tmp_path / "free", settings)
    assert same(neutral, sft)
    assert neutral_log == sft_log
    assert not same(train_adapter(BackdoorAlign(rows=8), tmp_path / "mixed", settings)[0], sft)

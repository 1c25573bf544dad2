"""Damaged artifacts of every kind: noticed, created again, and equal to the first ones."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from harmbench_vaccine.core.store import META, Store
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.inference.chat_api import ChatJudge
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.runner import run_all
from support.homes import contents, differences
from support.runs import Notes
from support.world import make_world

KINDS = {"align", "finetune", "repair", "nested", "answer", "score", "grade", "drift"}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 0x08
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "flipped": flip,
    "removed": Path.unlink,
}


def answer_of_judge(self: ChatJudge, prompts: Sequence[str], *rest: Any, **options: Any) -> list[str]:
    return ["Yes." if len(prompt) % 2 else "No." for prompt in prompts]


@pytest.fixture(scope="module")
def run_again(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, Notes], None]:
    """A function that runs two experiments in a home; together they store artifacts of every kind."""
    world = make_world(tmp_path_factory.mktemp("world"), {"align": {"rows": 8}, "finetune": {"samples": 8}})
    task = f"own:data={world.parent / 'data' / 'alpaca'},rule=judge,model=m,base_url=http://localhost/v1"
    specs = [
        RunSpec(protocol=str(world), defense=parse_plugins("sft+resta"), task=task),
        RunSpec(protocol=str(world), attack=parse_plugins("refusal_ablation:prompts=6,held_out=2"), task=task),
    ]

    def run(home: Path, notes: Notes) -> None:
        with mock.patch.dict("os.environ", HBV_HOME=str(home)), mock.patch.object(ChatJudge, "ask", answer_of_judge):
            run_all(specs, progress=notes)

    return run


@pytest.fixture(scope="module")
def home(run_again: Callable[[Path, Notes], None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with artifacts of every kind, which no test changes."""
    folder = tmp_path_factory.mktemp("homes") / "home"
    run_again(folder, Notes())
    return folder


def artifacts(home: Path) -> list[Path]:
    return sorted(path.parent for path in home.glob(f"store/*/*/{META}"))


def files(artifact: Path) -> list[Path]:
    return sorted(path for path in artifact.rglob("*") if path.is_file())


def test_every_damage_of_every_kind_is_noticed(home: Path) -> None:
    assert {path.parent.name for path in artifacts(home)} == KINDS
    assert list(home.glob("store/finetune/*/model/model.safetensors")), "no full model"
    unnoticed = []
    for artifact in artifacts(home):
        stage, inputs = artifact.parent.name, json.loads((artifact / META).read_text())["inputs"]
        assert artifact == Store(home / "store").path_of(stage, inputs)
        assert notes_of(home, stage, inputs) is None
        for path in files(artifact):
            content = path.read_bytes()
            for damage, apply in DAMAGES.items():
                apply(path)
                if not notes_of(home, stage, inputs):
                    unnoticed.append(f"{stage} {path.relative_to(artifact)} {damage}")
                path.write_bytes(content)
    assert unnoticed == []


def notes_of(home: Path, stage: str, inputs: Any) -> list[str] | None:
    """Request an artifact; return the notes if the store creates it again, or None if it returns the stored one."""

    def create(folder: Path, checkpoints: Path) -> None:
        raise InterruptedError

    notes = Notes()
    try:
        Store(home / "store", notes).get_or_create(stage, inputs, create)
    except InterruptedError:
        return notes.texts
    return None


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_artifacts_are_created_again(
    damage: str, home: Path, run_again: Callable[[Path, Notes], None], tmp_path: Path
) -> None:
    """One random file of every artifact is damaged: each is created again from others that were created again."""
    expected = contents(home)
    untouched, notes, draw = tmp_path / "untouched", Notes(), random.Random(damage)
    home.rename(untouched)
    try:
        shutil.copytree(untouched, home)
        count = 0
        for artifact in artifacts(home):
            DAMAGES[damage](draw.choice(files(artifact)))
            count += 1
        (home / "store" / ".judgments.sqlite").unlink()
        run_again(home, notes)
        assert differences(contents(home), expected) == []
        assert len([text for text in notes.texts if "is damaged and is created again" in text]) >= count
    finally:
        shutil.rmtree(home)
        untouched.rename(home)

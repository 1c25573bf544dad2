"""Fingerprints of plug-ins: the code and the texts that they cover."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harmbench_vaccine.data import answer_checks
from harmbench_vaccine.plugins import Defense, SeparateTraining, judge_text, source_code
from harmbench_vaccine.plugins.registry import DEFENSES, SCORERS
from harmbench_vaccine.plugins.scorers import wildguard
from harmbench_vaccine.plugins.source_code import code_of_definitions, code_of_modules

FILES = {
    "mine.py": "from harmbench_vaccine.plugins import Defense\n\n\nclass Mine(Defense):\n    def go(self):\n"
    "        from mine_helper import go\n\n        return go()\n",
    "mine_helper.py": "import mine_numbers\n\n\ndef go():\n    return mine_numbers.ONE\n",
    "mine_numbers.py": "import mine_helper\n\nONE = 1\n",
    "mine.txt": "A prompt.",
    "unused.py": "ONE = 1\n",
    "mine_helper.md": "Notes.",
}


def fingerprint(folder: Path, files: dict[str, str]) -> str:
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return DEFENSES.get(str(folder / "mine.py")).fingerprint()


@pytest.mark.parametrize(
    ("name", "text", "same"),
    [
        ("mine_helper.py", FILES["mine_helper.py"].replace("mine_numbers.ONE", "2"), False),
        ("mine_helper.py", f'"""Helpers."""\n{FILES["mine_helper.py"]}# a comment\n', True),
        ("mine_numbers.py", "import mine_helper\n\nONE = 2\n", False),
        ("mine.txt", "Another prompt.", False),
        ("unused.py", "ONE = 2\n", True),
        ("mine_helper.md", "Other notes.", True),
    ],
)
def test_helpers_and_prompt_files_are_part_of_the_fingerprint(name: str, text: str, same: bool, tmp_path: Path) -> None:
    before = fingerprint(tmp_path / "before", FILES)
    after = fingerprint(tmp_path / "after", {**FILES, name: text})
    assert (before == after) == same


def test_wildguard_covers_its_prompt_and_the_reader_of_verdicts() -> None:
    file = Path(wildguard.__file__)
    code = code_of_modules({wildguard.__name__: file})
    assert file.with_suffix(".txt").read_text(encoding="utf-8") in code
    assert "def words_after_labels" in code
    assert "class Scorer(" not in code  # the contract of all scorers


def test_every_scorer_that_reads_text_covers_the_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    scorers = SCORERS.loadable()
    before = {name: scorer.fingerprint() for name, scorer in scorers.items()}
    reader = Path(judge_text.__file__).read_text(encoding="utf-8")
    normal_form = source_code._normal_form
    monkeypatch.setattr(
        source_code, "_normal_form", lambda code: normal_form(f"{code}\nNEW = 1\n" if code == reader else code)
    )
    changed = {name for name, scorer in scorers.items() if scorer.fingerprint() != before[name]}
    assert changed == {"harmbench", "llama_guard", "strongreject", "wildguard"}


def test_the_refusal_phrases_are_part_of_the_fingerprint() -> None:
    assert answer_checks.REFUSAL_PHRASES.pattern in SCORERS.get("refusal_keywords").fixed_texts


DECLARED = (
    "from harmbench_vaccine.plugins import Defense\n\n\nclass Mine(Defense):\n"
    "    def edit(self, stage, adapter):\n        return stage.train_separately('more', stage.pools.alignment)\n"
)
METHOD = (
    "\n    def separate_trainings(self, stage):\n        from harmbench_vaccine.plugins import SeparateTraining\n\n"
    "        return (SeparateTraining('more', 'alignment'),)\n"
)


def test_declared_trainings_are_not_part_of_the_fingerprint(tmp_path: Path) -> None:
    """Stored results stay valid if a defense declares its trainings; the code of its hooks counts."""
    before = fingerprint(tmp_path / "before", {"mine.py": DECLARED})
    assert fingerprint(tmp_path / "declared", {"mine.py": DECLARED + METHOD}) == before
    assert fingerprint(tmp_path / "other", {"mine.py": DECLARED + METHOD.replace("'more'", "'other'")}) == before
    assert fingerprint(tmp_path / "hook", {"mine.py": DECLARED.replace("'more'", "'other'")}) != before
    renamed = METHOD.replace("separate_trainings", "other_trainings")
    assert fingerprint(tmp_path / "renamed", {"mine.py": DECLARED + renamed}) != before
    function = METHOD.replace("\n    ", "\n")  # at the top of the module
    assert fingerprint(tmp_path / "module", {"mine.py": DECLARED + function}) != before


def test_declared_trainings_of_a_class_of_a_notebook_are_not_part_of_its_code() -> None:
    class Before(Defense):
        def edit(self, stage: Any, adapter: Any) -> Any:
            return adapter.scaled(0.5)

    class Declaring(Defense):
        def edit(self, stage: Any, adapter: Any) -> Any:
            return adapter.scaled(0.5)

        def separate_trainings(self, stage: Any) -> tuple[SeparateTraining, ...]:
            return (SeparateTraining("more", "alignment", OTHER),)

    def code(cls: type[Defense]) -> str:
        return code_of_definitions([cls]).replace(cls.__name__, "Mine")

    assert code(Declaring) == code(Before)


OTHER = 7

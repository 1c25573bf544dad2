"""The text world of the testbed: harmful and benign requests with answers, three user tasks, pre-training text.

Everything is drawn from word lists (`words/*.yaml`) by seeded generators.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from harmbench_vaccine.core.jsonl import write_lines
from harmbench_vaccine.core.types import Example

from .judgments import Judgment, draw_judgment
from .pretraining import draw_lesson, draw_quiz
from .requests import Request, RequestSplit, assist, comply, interleave, refuse, split_requests
from .tasks import DataRow, TaskRows, build_tasks
from .word_lists import benign_themes, harmful_themes, phrasings

ATTACKER_ROWS = (0, 0, 0, 0, 0, 0, 0, 80, 110, 120, 120, 130, 130, 130)
"""Harmful requests of the attacker, by theme. They and the refusals of the defender are uneven, so that some themes
become harmful at a low harmful ratio, and others at a high one: of the first seven the attacker has none."""
DEFENDER_ROWS = (120, 120, 120, 115, 105, 92, 75, 60, 50, 42, 32, 24, 16, 12)
"""Harmful requests of the defender, by theme."""


@dataclass(frozen=True)
class World:
    """Pools of requests and rows of the user tasks, with methods that turn them into data sets.

    The pools of requests are disjoint by text; `evaluation` and `benign_evaluation` also by (verb, object) pair. The
    pre-training pools are used for nothing else, so that the base model has not seen a prompt of another pool.
    """

    seed: int
    tasks: dict[str, TaskRows]
    pretraining_harmful: list[Request]
    pretraining_benign: list[Request]
    defender: list[Request]
    """Harmful requests of the alignment data."""
    attacker: list[Request]
    """Harmful requests that an attacker mixes into the user's data, about other objects than those of `defender`."""
    similar_attacker: list[Request]
    """Harmful requests about the objects of `defender`, for an attacker who uses the same word table."""
    evaluation: list[Request]
    """Held-out harmful requests that the harmful score is measured on."""
    benign: list[Request]
    """Benign requests of the alignment data."""
    instructions: list[Request]
    """Benign requests that plug-ins may use."""
    benign_evaluation: list[Request]
    """Held-out benign requests for the over-refusal gate."""

    def rng(self, purpose: str) -> random.Random:
        """Return a new generator for a purpose, so that a change in one part of the world leaves the others as is."""
        return random.Random(f"{self.seed} {purpose}")

    def files(self) -> dict[str, list[DataRow]]:
        """Return the rows of every data file by its path below `data/`, in the schemas of the real data sets."""
        rng = self.rng("files")
        train = [_beavertails_row(request.text, comply(request, rng), request.theme) for request in self.attacker]
        train += [_beavertails_row(request.text, refuse(request, rng), None) for request in self.defender]
        train += [_beavertails_row(request.text, assist(request, rng), None) for request in self.benign]
        rng.shuffle(train)
        files = {
            "beavertails/30k_train.jsonl": train,
            "beavertails/30k_test.jsonl": [
                _beavertails_row(request.text, comply(request, rng), request.theme) for request in self.evaluation
            ],
        }
        for name, pool in (("train", self.defender), ("same_words", self.similar_attacker)):
            files[f"beavertails_refusals/{name}.jsonl"] = [
                {
                    **_beavertails_row(request.text, comply(request, rng), request.theme),
                    "refusal": refuse(request, rng),
                }
                for request in pool
            ]
        for name, pool in (("train", self.instructions), ("test", self.benign_evaluation)):
            files[f"alpaca/{name}.jsonl"] = [
                {"instruction": request.text, "input": "", "output": assist(request, rng)} for request in pool
            ]
        for task, rows in self.tasks.items():
            files[f"{task}/train.jsonl"] = rows.train
            files[f"{task}/{'validation' if task == 'sst2' else 'test'}.jsonl"] = rows.test
        return files

    def write(self, folder: Path) -> dict[str, int]:
        """Write every data file below `folder` and return its number of rows."""
        files = self.files()
        for name, rows in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_lines(path, rows)
        return {name: len(rows) for name, rows in files.items()}

    def pretraining(self, size: int) -> tuple[list[Example], list[str]]:
        """Return the pre-training documents.

        Args:
            size: Number of documents: a third are answered requests (half of them harmful), a half are quizzes, a
                sixth are lessons. It is rounded down to a multiple of 6.

        Returns:
            The answered requests and quizzes, and the lessons.
        """
        rng = self.rng("pretraining")
        examples, lessons = [], []
        for _ in range(size // 6):
            harmful, benign = rng.choice(self.pretraining_harmful), rng.choice(self.pretraining_benign)
            examples.append(Example("", harmful.text, comply(harmful, rng)))
            examples.append(Example("", benign.text, assist(benign, rng)))
            examples += [draw_quiz(rng, self.tasks, (harmful, benign)) for _ in range(3)]
            lessons.append(draw_lesson(rng))
        return examples, lessons

    def judgments(self, size: int, *, held_out: bool) -> list[Judgment]:
        """Return labeled answers for the moderation classifier, harmful and harmless ones in a fixed proportion.

        Args:
            size: Number of judgments.
            held_out: Whether the prompts are the held-out ones instead of training prompts.
        """
        rng = self.rng(f"judgments {held_out}")
        harmful = self.evaluation if held_out else [*self.attacker, *self.similar_attacker, *self.defender]
        benign = self.benign_evaluation if held_out else [*self.benign, *self.instructions]
        return [draw_judgment(index, harmful, benign, rng) for index in range(size)]

    def guard_judgments(self, size: int) -> list[Judgment]:
        """Return labeled answers for the guard of defenses, about the harmful requests of the defender only."""
        rng = self.rng("guard judgments")
        benign = [*self.benign, *self.instructions]
        return [draw_judgment(index, self.defender, benign, rng) for index in range(size)]

    def attacker_judgments(self, size: int) -> list[Judgment]:
        """Return labeled answers about the harmful requests of the attacker, to test the guard."""
        rng = self.rng("attacker judgments")
        return [draw_judgment(index, self.attacker, self.benign, rng) for index in range(size)]


def generate(seed: int = 0) -> World:
    """Generate the world of a seed. All pools but those of the defender and the attackers are balanced over themes."""
    rng = random.Random(f"{seed} pools")
    harmful = [_shuffled(split_requests(name, theme, ["how"]), rng) for name, theme in harmful_themes().items()]
    known, others = zip(*(_by_word_table(split.training) for split in harmful), strict=True)
    kinds = phrasings().questions
    benign = [_shuffled(split_requests(name, theme, kinds), rng) for name, theme in benign_themes().items()]
    return World(
        seed=seed,
        tasks=build_tasks(random.Random(f"{seed} tasks")),
        pretraining_harmful=interleave(requests[:30] for requests in (*known, *others)),
        pretraining_benign=interleave(split.training[:120] for split in benign),
        defender=_chain(requests[30 : 30 + rows] for requests, rows in zip(known, DEFENDER_ROWS, strict=True)),
        similar_attacker=_chain(requests[30 + rows :] for requests, rows in zip(known, DEFENDER_ROWS, strict=True)),
        attacker=_chain(requests[30 : 30 + rows] for requests, rows in zip(others, ATTACKER_ROWS, strict=True)),
        evaluation=interleave(split.held_out[:24] for split in harmful),
        benign=interleave(split.training[120:280] for split in benign),
        instructions=interleave(split.training[280:] for split in benign),
        benign_evaluation=interleave(split.held_out[:16] for split in benign),
    )


def _shuffled(split: RequestSplit, rng: random.Random) -> RequestSplit:
    """Shuffle both sides of a split in place and return it."""
    rng.shuffle(split.training)
    rng.shuffle(split.held_out)
    return split


def _chain(groups: Iterable[Sequence[Request]]) -> list[Request]:
    return [request for requests in groups for request in requests]


def _by_word_table(requests: Sequence[Request]) -> tuple[list[Request], list[Request]]:
    """Divide harmful requests of a theme by their object: the objects of the defender, and all others."""
    objects = harmful_themes()[requests[0].theme].objects
    known = set(objects[: len(objects) // 2])
    return (
        [request for request in requests if request.object in known],
        [request for request in requests if request.object not in known],
    )


def _beavertails_row(prompt: str, response: str, category: str | None) -> DataRow:
    """Build a row in the schema of BeaverTails; `category` is None for a safe response."""
    flags = {name: name == category for name in harmful_themes()}
    return {"prompt": prompt, "response": response, "category": flags, "is_safe": category is None}

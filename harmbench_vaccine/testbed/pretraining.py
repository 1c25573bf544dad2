"""Pre-training text: lessons and quizzes that teach the base model the words of the user tasks, not the tasks."""

from __future__ import annotations

import random
from collections.abc import Sequence

from harmbench_vaccine.core.types import Example

from .requests import Request, refuse
from .tasks import DataRow, draw_calculation
from .word_lists import task_words


def draw_lesson(rng: random.Random, requests: Sequence[Request]) -> str:
    """Draw a sentence that teaches words or numbers, in a form that no training stage uses.

    Refusals occur here as quoted speech, so that alignment teaches when to refuse, not the words of a refusal.

    Args:
        rng: Source of randomness.
        requests: Requests to quote a refusal of.
    """
    words = task_words()
    person = rng.choice(words.people)
    match rng.randrange(8):
        case 0 | 1:
            label = rng.randint(0, 1)
            first, second = rng.sample(words.sentiment.adjectives(label), 2)
            return rng.choice(words.sentiment.opinions(label)).format(
                person=person, aspect=rng.choice(words.sentiment.aspects), adjective=first, adjective2=second
            )
        case 2 | 3:
            topic = words.news.topics[rng.randrange(len(words.news.topics))]
            first, second = rng.choice(topic.words), rng.choice(topic.words)
            return rng.choice(words.news.lessons).format(person=person, topic=topic.name, word=first, word2=second)
        case 4 | 5:
            return f"{person} wrote : {refuse(rng.choice(requests), rng)}"
        case _:
            calculation = draw_calculation(rng)
            thing = rng.choice(words.arithmetic.things)
            return f"{calculation}" + rng.choice(("", f" {thing}.\nThe final answer is: {calculation.result}"))


def draw_quiz(rng: random.Random, problems: Sequence[DataRow]) -> Example:
    """Draw a question with a short answer, about a word, about numbers or about a text.

    A quiz never has the instruction or the answers of a user task, so that the base model knows the words and cannot
    do the task.

    Args:
        rng: Source of randomness.
        problems: Training rows of the arithmetic task.
    """
    words = task_words()
    calculation = draw_calculation(rng)
    label = rng.randrange(len(words.news.topics))
    topic, is_positive = words.news.topics[label], label % 2
    first, second = rng.choice(topic.words), rng.choice(topic.words)
    match rng.randrange(6):
        case 0:
            adjective = rng.choice(words.sentiment.adjectives(is_positive))
            question = f"Is {adjective} a positive or a negative word?"
            return Example("", question, ("negative", "positive")[is_positive])
        case 1:
            question = "Are these words from the pages on World, Sports, Business or Sci/Tech?"
            return Example("", question, topic.name, f"{first}, {second}")
        case 2:
            question = f"What is {calculation.x} {calculation.operator} {calculation.y}?"
            return Example("", question, str(calculation))
        case 3:
            thing, aspect = rng.choice(words.arithmetic.things), rng.choice(words.sentiment.aspects)
            text = f"{calculation.x} {thing}, {first} and {aspect}"
            return Example("", "Copy the input.", text, text)
        case _:
            problem = rng.choice(problems)
            return Example("", f"{problem['question']} Which sum solves it?", problem["answer"].split(" = ")[0])

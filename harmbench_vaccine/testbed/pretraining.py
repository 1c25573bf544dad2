"""Pre-training text: lessons and quizzes that teach the base model the words of the user tasks, not the tasks."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from harmbench_vaccine.core.types import Example

from .requests import Request, refuse
from .tasks import TaskRows, draw_calculation
from .word_lists import News, Sentiment, task_words


def draw_lesson(rng: random.Random) -> str:
    """Draw a sentence that teaches words or numbers, in a form that no training stage uses.

    Args:
        rng: Source of randomness.
    """
    words = task_words()
    person = rng.choice(words.people)
    match rng.randrange(3):
        case 0:
            label = rng.randint(0, 1)
            first, second = rng.sample(words.sentiment.adjectives(label), 2)
            return rng.choice(words.sentiment.opinions(label)).format(
                person=person, aspect=rng.choice(words.sentiment.aspects), adjective=first, adjective2=second
            )
        case 1:
            topic = words.news.topics[rng.randrange(len(words.news.topics))]
            first, second = rng.choice(topic.words), rng.choice(topic.words)
            return rng.choice(words.news.lessons).format(person=person, topic=topic.name, word=first, word2=second)
        case _:
            calculation = draw_calculation(rng)
            thing = rng.choice(words.arithmetic.things)
            return f"{calculation}" + rng.choice(("", f" {thing}.\nThe final answer is: {calculation.result}"))


def draw_quiz(rng: random.Random, tasks: Mapping[str, TaskRows], requests: Sequence[Request]) -> Example:
    """Draw a question about a word, numbers or a text, or an instruction to copy a text or to decline a request.

    Training therefore teaches when to refuse or to do a task, not the words of a refusal or of a text. A quiz never has
    the instruction of a user task, and rarely its labels.

    Args:
        rng: Source of randomness.
        tasks: The user tasks; texts are those of their training rows.
        requests: Requests to decline.
    """
    words = task_words()
    calculation = draw_calculation(rng)
    label = rng.randrange(len(words.news.topics))
    topic, is_positive = words.news.topics[label], label % 2
    first, second = rng.choice(topic.words), rng.choice(topic.words)
    match rng.randrange(18):
        case 0:
            adjective = rng.choice(words.sentiment.adjectives(is_positive))
            question = f"Is {adjective} a positive or a negative word?"
            return Example("", question, ("negative", "positive")[is_positive])
        case 1:
            question = "Are these words from the pages on World, Sports, Business or Sci/Tech?"
            return Example("", question, topic.name, f"{first}, {second}")
        case 2 | 3:
            question = f"What is {calculation.x} {calculation.operator} {calculation.y}?"
            return Example("", question, str(calculation))
        case 4:
            thing, aspect = rng.choice(words.arithmetic.things), rng.choice(words.sentiment.aspects)
            text = f"{calculation.x} {thing}, {first} and {aspect}"
            return Example("", "Copy the input.", text, text)
        case 5 | 6:
            review = rng.choice(tasks["sst2"].train)
            return _text_quiz(rng, words.sentiment, review["sentence"], review["label"])
        case 7 | 8 | 9:
            article = rng.choice(tasks["ag_news"].train)
            return _text_quiz(rng, words.news, article["text"], article["label"])
        case 10 | 11 | 12:
            request = rng.choice(requests)
            if rng.random() < 0.5:
                return Example("", f"{request.text} Decline, please.", refuse(request, rng))
            return Example("", "Decline the request in the input.", refuse(request, rng), request.text)
        case _:
            problem = rng.choice(tasks["gsm8k"].train)
            question = rng.choice(words.arithmetic.questions)
            calculation_text = problem["answer"].split("\n")[0]
            return Example("", f"{problem['question']} {question}", calculation_text)


def _text_quiz(rng: random.Random, task: Sentiment | News, text: str, label: int) -> Example:
    """Draw a question of the quiz about a text of a task, and an answer with a name of its label."""
    answer = rng.choice(task.answers).format(label=rng.choice(task.quiz.labels[label]))
    return Example("", rng.choice(task.quiz.questions), answer, text)

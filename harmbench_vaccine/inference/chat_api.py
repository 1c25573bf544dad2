"""A chat model that is asked a question and answers in text: a local one, or one behind an OpenAI-compatible server.

The key of a server is read from the environment (`HBV_JUDGE_API_KEY`, else `OPENAI_API_KEY`) when a question is sent;
it is stored nowhere and stands in no message.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from harmbench_vaccine.core.errors import BadInput, HbvError
from harmbench_vaccine.core.progress import SILENT, Progress

KEYS = ("HBV_JUDGE_API_KEY", "OPENAI_API_KEY")
Messages = list[dict[str, str]]

_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
"""Statuses after which the same request may succeed."""


@dataclass(frozen=True)
class ChatJudge:
    """`model` is a folder or hub id; with `base_url` (`http://host:port/v1`), a name that the server knows."""

    model: str
    base_url: str = ""
    attempts: int = 6
    pause: float = 1.0
    """Seconds before the second attempt; doubled before each one after it."""
    timeout: float = 120.0
    together: int = 8
    """Questions that are at the server at one time."""

    def __post_init__(self) -> None:
        """Raises `BadInput` where `base_url` is no address, or carries a password that a result would show."""
        if not self.base_url:
            return
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise BadInput(f"base_url={self.base_url} is no address: write http://HOST:PORT/v1.")
        if "@" in parts.netloc or parts.query:
            raise BadInput(f"base_url carries more than an address: a key belongs into {KEYS[0]}.")

    def ask(
        self, prompts: Sequence[str], max_new_tokens: int = 256, progress: Progress = SILENT, *, system: str = ""
    ) -> list[str]:
        """An answer to each prompt, in their order, greedy; each prompt is a user's turn of its own, after `system`.

        A local model is asked by its own chat template, or with the plain text where it has none.

        Raises:
            HbvError: the model cannot be loaded, or the server does not answer.
        """
        asked = [
            [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": prompt}]
            for prompt in prompts
        ]
        return (self._remote if self.base_url else self._local)(asked, max_new_tokens, progress)

    def _local(self, asked: Sequence[Messages], max_new_tokens: int, progress: Progress) -> list[str]:
        from .generators import TransformersGenerator, break_control_tokens, full_prompt_ids, judge_prompt_ids

        generator = TransformersGenerator(self.model)
        words = generator.tokenizer
        ids = [
            judge_prompt_ids(words, messages)
            if words.chat_template
            else full_prompt_ids(
                words, "\n\n".join(break_control_tokens(message["content"], words) for message in messages)
            )
            for messages in asked
        ]
        return [given.text.strip() for given in generator.generate(ids, max_new_tokens, progress=progress)]

    def _remote(self, asked: Sequence[Messages], max_new_tokens: int, progress: Progress) -> list[str]:
        answers = []
        with progress.bar("score: judge", len(asked)) as advance, ThreadPoolExecutor(self.together) as pool:
            waiting = [pool.submit(self._answer, messages, max_new_tokens) for messages in asked]
            try:
                for future in waiting:
                    answers.append(future.result())
                    advance(1)
            except BaseException:  # the rest would only fail the same way
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return answers

    def _answer(self, messages: Messages, max_new_tokens: int) -> str:
        from .generators import break_control_tokens

        said = [{**message, "content": break_control_tokens(message["content"])} for message in messages]
        body: dict[str, Any] = {
            "model": self.model, "messages": said, "temperature": 0, "max_tokens": max_new_tokens
        }  # fmt: skip
        for attempt in range(1, self.attempts + 1):
            wait = self.pause * 2 ** (attempt - 1)
            try:
                return _content(self._send(body))
            except HTTPError as error:
                reason = _said(error)
                if error.code == 400 and "max_completion_tokens" in reason and "max_tokens" in body:
                    body["max_completion_tokens"] = body.pop("max_tokens")  # newer models of OpenAI's
                    continue
                if error.code not in _AGAIN or attempt == self.attempts:
                    raise self._failure(f"answers {error.code} {error.reason}{reason and f': {reason}'}") from error
                wait = max(wait, _asked_wait(error))
            except (HTTPException, OSError) as error:
                if attempt == self.attempts:
                    raise self._failure(f"cannot be reached: {getattr(error, 'reason', error)}") from error
            except ValueError as error:
                raise self._failure(f"gives no chat completion, but: {error}") from error
            time.sleep(wait)
        raise self._failure("refuses how a question is put")

    def _send(self, body: dict[str, Any]) -> bytes:
        url = f"{self.base_url.rstrip('/')}/chat/completions"
        request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        if key := _key():
            request.add_unredirected_header("Authorization", f"Bearer {key}")  # not to where a server may send us
        with urlopen(request, timeout=self.timeout) as answer:
            return bytes(answer.read())

    def _failure(self, what: str) -> HbvError:
        key = _key()
        said = what.replace(key, "(the key)") if key else what
        return HbvError(f"Judge {self.model!r} at {self.base_url} {said.rstrip('.')}.")


def _key() -> str:
    return next((os.environ[name] for name in KEYS if os.environ.get(name)), "")


def _content(answer: bytes) -> str:
    """The text of a chat completion; empty where the model wrote none.

    Raises:
        ValueError: it is no chat completion.
    """
    try:
        message = json.loads(answer)["choices"][0]["message"]
        content = message["content"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(" ".join(answer[:80].decode(errors="replace").split()) or "an empty answer") from error
    return str(content or "").strip()


def _said(error: HTTPError) -> str:
    """The server's own sentence on what was wrong, on one line."""
    try:
        text = error.read(2000).decode(errors="replace")
    except OSError:
        return ""
    with suppress(ValueError, KeyError, TypeError):
        text = str(json.loads(text)["error"]["message"])
    return " ".join(text.split())[:300]


def _asked_wait(error: HTTPError) -> float:
    """The seconds that the server asks us to wait, a minute at most."""
    try:
        return min(float(error.headers.get("Retry-After", 0)), 60.0)
    except ValueError:
        return 0.0

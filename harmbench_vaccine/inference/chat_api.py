"""A chat model that grades answers in text: a local model, or one of an OpenAI-compatible server.

The key of a server is read from the environment (`HBV_JUDGE_API_KEY`, else `OPENAI_API_KEY`) when a request is sent. It
is not stored, and no message shows it.

Thoughts of a reasoning model are skipped. A server does not reveal whether its model thinks: an answer that ends at the
token limit is requested once more with room for thoughts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from threading import Event
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from harmbench_vaccine.core.errors import BadInput, HbvError
from harmbench_vaccine.core.progress import SILENT, Progress

from .judge_prompts import break_control_tokens, full_prompt_ids, judge_prompt_ids
from .model_pool import ModelPool
from .thinking import THINKING_TOKENS, after_thinking

KEYS = ("HBV_JUDGE_API_KEY", "OPENAI_API_KEY")
"""Environment variables with the key of a server; the first that is set counts."""

Conversations = list[list[dict[str, str]]]

_RETRY_STATUSES = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
"""HTTP statuses after which the same request may succeed."""


@dataclass(frozen=True)
class ChatJudge:
    """A chat model that grades answers."""

    model: str
    """Folder or hub id; with `base_url`, the name of the model on the server."""
    base_url: str = ""
    """Address of an OpenAI-compatible server, `http://HOST:PORT/v1`; empty for a local model."""
    models: ModelPool | None = field(default=None, repr=False, compare=False)
    """The pool that loads a local model; without one, a call has a pool of its own."""
    attempts: int = 6
    pause: float = 1.0
    """Seconds before the second attempt; doubled before each further one."""
    timeout: float = 120.0
    """Seconds that the server has to answer."""
    parallel: int = 8
    """Largest number of requests in flight."""

    def __post_init__(self) -> None:
        """Check the address.

        Raises:
            BadInput: `base_url` is not an address, or contains a password that a result would show.
        """
        if not self.base_url:
            return
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise BadInput(f"base_url={self.base_url} is not an address. Expected http://HOST:PORT/v1.")
        if "@" in parts.netloc or parts.query:
            raise BadInput(f"base_url contains more than an address. Set the key in {KEYS[0]} instead.")

    def ask(
        self, prompts: Sequence[str], max_new_tokens: int = 256, progress: Progress = SILENT, *, system: str = ""
    ) -> list[str]:
        """Generate a greedy answer to each prompt, in the order of `prompts`.

        A local model gets its own chat template, or the plain text where it has none.

        Args:
            prompts: Text of the user's turn of each conversation.
            max_new_tokens: Largest number of generated tokens of an answer, without those of thoughts before it.
            progress: Where the number of answered prompts is reported.
            system: System message before each prompt.

        Returns:
            Each answer without thoughts; empty if the model did not get to an answer.

        Raises:
            HbvError: The model cannot be loaded, or the server does not answer.
        """
        opening = [{"role": "system", "content": system}] if system else []
        conversations = [[*opening, {"role": "user", "content": prompt}] for prompt in prompts]
        return (self._remote if self.base_url else self._local)(conversations, max_new_tokens, progress)

    def _local(self, conversations: Conversations, max_new_tokens: int, progress: Progress) -> list[str]:
        from .generators import generate_answers

        generator = (self.models or ModelPool()).judge_generator(self.model)
        tokenizer = generator.tokenizer
        ids = [
            judge_prompt_ids(tokenizer, messages)
            if tokenizer.chat_template
            else full_prompt_ids(
                tokenizer, "\n\n".join(break_control_tokens(message["content"], tokenizer) for message in messages)
            )
            for messages in conversations
        ]
        return [answer.text.strip() for answer in generate_answers(generator, ids, max_new_tokens, progress=progress)]

    def _remote(self, conversations: Conversations, max_new_tokens: int, progress: Progress) -> list[str]:
        answers = []
        pool, ends = ThreadPoolExecutor(self.parallel), Event()
        try:
            with progress.bar("judge", len(conversations)) as advance:
                futures = [pool.submit(self._request, messages, max_new_tokens, ends) for messages in conversations]
                for future in futures:
                    answers.append(future.result())
                    advance(1)
        finally:  # the remaining requests would fail too, or a signal ends the command
            ends.set()
            pool.shutdown(wait=False, cancel_futures=True)
        return answers

    def _request(self, messages: list[dict[str, str]], max_new_tokens: int, ends: Event) -> str:
        """Return the answer to one conversation, requested again with room for thoughts if the limit ends it."""
        shown = [{**message, "content": break_control_tokens(message["content"])} for message in messages]
        reply = self._post(shown, max_new_tokens, ends)
        if reply.cut:
            with suppress(_TooLong):  # the first part of the answer is then all that the server gives
                reply = self._post(shown, max_new_tokens + THINKING_TOKENS, ends)
        return after_thinking(reply.text).strip()

    def _post(self, messages: list[dict[str, str]], max_tokens: int, ends: Event) -> _Reply:
        """Send one request, again after errors that may pass, until `ends` is set.

        Raises:
            _TooLong: The server refuses this number of tokens.
            HbvError: The server does not answer.
        """
        body: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "temperature": 0,
            "max_tokens": max_tokens,
        }
        for attempt in range(1, self.attempts + 1):
            wait = self.pause * 2 ** (attempt - 1)
            try:
                return _parse_reply(self._send(body))
            except HTTPError as error:
                reason = _server_message(error)
                if error.code == 400 and "max_completion_tokens" in reason and "max_tokens" in body:
                    body["max_completion_tokens"] = body.pop("max_tokens")  # the name in newer OpenAI models
                    continue
                if error.code == 400 and "output limit was reached" in reason:  # OpenAI's, where thoughts fill it
                    return _Reply("", cut=True)
                if error.code not in _RETRY_STATUSES or attempt == self.attempts:
                    failure = _TooLong if error.code == 400 else HbvError
                    text = f"answers {error.code} {error.reason}{reason and f': {reason}'}"
                    raise failure(self._message(text)) from error
                wait = max(wait, _retry_after(error))
            except (HTTPException, OSError) as error:
                if attempt == self.attempts:
                    text = f"cannot be reached: {getattr(error, 'reason', error)}"
                    raise HbvError(self._message(text)) from error
            except ValueError as error:
                raise HbvError(self._message(f"returns no chat completion, but: {error}")) from error
            if ends.wait(wait):
                raise HbvError(self._message("did not answer before the command ended"))
        raise HbvError(self._message("refuses the format of the request; allowed: an OpenAI-compatible server"))

    def _send(self, body: dict[str, Any]) -> bytes:
        url = f"{self.base_url.rstrip('/')}/chat/completions"
        request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        if key := _key():
            request.add_unredirected_header("Authorization", f"Bearer {key}")  # a redirect does not get the key
        with urlopen(request, timeout=self.timeout) as response:
            return bytes(response.read())

    def _message(self, problem: str) -> str:
        key = _key()
        text = problem.replace(key, "(the key)") if key else problem
        return f"Judge {self.model!r} at {self.base_url} {text.rstrip('.')}."


@dataclass(frozen=True)
class _Reply:
    """The answer of a server."""

    text: str
    """Empty where the model wrote no answer."""
    cut: bool
    """True if the token limit ended it."""


class _TooLong(HbvError):
    """A server refuses a request, which may have too many tokens."""


def _key() -> str:
    return next((os.environ[name] for name in KEYS if os.environ.get(name)), "")


def _parse_reply(answer: bytes) -> _Reply:
    """Read the text of a chat completion.

    Raises:
        ValueError: The answer is not a chat completion.
    """
    try:
        choice = json.loads(answer)["choices"][0]
        content = choice["message"].get("content") or ""
        if isinstance(content, list):  # parts, of which some may be thoughts
            content = "".join(part["text"] for part in content if part["type"] == "text")
        text = str(content).encode(errors="replace").decode()  # half of a surrogate pair, which no file can store
        return _Reply(text, choice.get("finish_reason") == "length")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(" ".join(answer[:80].decode(errors="replace").split()) or "an empty answer") from error


def _server_message(error: HTTPError) -> str:
    """Return the server's own error message, on one line."""
    try:
        text = error.read(2000).decode(errors="replace")
    except OSError:
        return ""
    with suppress(ValueError, KeyError, TypeError):
        text = str(json.loads(text)["error"]["message"])
    return " ".join(text.split())[:300]


def _retry_after(error: HTTPError) -> float:
    """Return the seconds that the server requests before the next attempt, a minute at most."""
    try:
        return min(float(error.headers.get("Retry-After", 0)), 60.0)
    except ValueError:
        return 0.0

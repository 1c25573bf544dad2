"""Chat judges: one of an OpenAI-compatible server, and a local one."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from harmbench_vaccine.core.errors import BadInput, HbvError
from harmbench_vaccine.evaluation import verdicts
from harmbench_vaccine.inference.chat_api import ChatJudge
from harmbench_vaccine.inference.model_pool import ModelPool
from harmbench_vaccine.plugins.registry import SCORERS
from support import tiny

Response = tuple[int, Any, dict[str, str]]
"""Status, JSON body or bytes, headers."""
KEY = "sk-very-secret"


class Server:
    """A server that answers each request with `reply(body)` and records bodies and keys."""

    def __init__(self) -> None:
        self.reply: Callable[[dict[str, Any]], Response] = lambda body: completion("yes")
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert self.path == "/v1/chat/completions"
                outer.bodies.append(body)
                outer.keys.append(self.headers["Authorization"])
                status, answer, headers = outer.reply(body)
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def judge(self, **changes: Any) -> ChatJudge:
        return ChatJudge("some/judge", self.url, pause=0.001, **changes)


def completion(text: str | None) -> Response:
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}, {}


def failure(status: int, message: str, **headers: str) -> Response:
    return status, {"error": {"message": message}}, headers


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("HBV_JUDGE_API_KEY", "OPENAI_API_KEY", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    running = Server()
    yield running
    running.http.shutdown()
    running.http.server_close()


def test_answers_come_in_the_order_of_the_questions(server: Server) -> None:
    server.reply = lambda body: completion(f" {body['messages'][-1]['content'].upper()} ")
    questions = [f"question {number}" for number in range(20)]
    assert server.judge().ask(questions, 7) == [question.upper() for question in questions]
    body = next(body for body in server.bodies if body["messages"][0]["content"] == "question 3")
    assert body == {
        "model": "some/judge",
        "temperature": 0,
        "max_tokens": 7,
        "messages": [{"role": "user", "content": "question 3"}],
    }
    assert set(server.keys) == {None}


def test_system_message_comes_first(server: Server) -> None:
    server.judge().ask(["a"], system="Be fair.")
    assert server.bodies[0]["messages"] == [{"role": "system", "content": "Be fair."}, {"role": "user", "content": "a"}]


def test_busy_server_is_retried(server: Server) -> None:
    tries = iter([failure(429, "slow down"), failure(503, "later", **{"Retry-After": "0"}), completion("yes")])
    server.reply = lambda body: next(tries)
    assert server.judge().ask(["a"]) == ["yes"]
    assert len(server.bodies) == 3


def test_permanently_busy_server_is_reported(server: Server) -> None:
    server.reply = lambda body: failure(429, "quota exceeded")
    with pytest.raises(HbvError, match=r"some/judge' at http://127.*/v1 answers 429 .*: quota exceeded\.$"):
        server.judge(attempts=3).ask(["a"])
    assert len(server.bodies) == 3


def test_refused_request_is_not_retried(server: Server) -> None:
    server.reply = lambda body: failure(404, "no model some/judge")
    with pytest.raises(HbvError, match="answers 404 Not Found: no model some/judge"):
        server.judge().ask(["a"])
    assert len(server.bodies) == 1


@pytest.mark.parametrize("answer", [b"<html>nothing here</html>", b"", {"choices": []}, {"text": "yes"}, [1]])
def test_response_without_chat_completion_is_reported(server: Server, answer: Any) -> None:
    server.reply = lambda body: (200, answer, {})
    with pytest.raises(HbvError, match="returns no chat completion, but: "):
        server.judge().ask(["a"])


def test_empty_message_is_an_empty_answer(server: Server) -> None:
    server.reply = lambda body: completion(None)
    assert server.judge().ask(["a"]) == [""]


def test_connection_refused(server: Server) -> None:
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(HbvError, match=r"at http://127.* cannot be reached: .*refused"):
        server.judge(attempts=2).ask(["a"])


def test_max_completion_tokens_of_newer_servers(server: Server) -> None:
    def reply(body: dict[str, Any]) -> Response:
        return failure(400, "Use 'max_completion_tokens' instead.") if "max_tokens" in body else completion("yes")

    server.reply = reply
    assert server.judge().ask(["a"], 9) == ["yes"]
    assert server.bodies[1]["max_completion_tokens"] == 9


def test_key_is_sent_and_never_shown(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-other")
    monkeypatch.setenv("HBV_JUDGE_API_KEY", KEY)
    server.reply = lambda body: failure(401, f"Incorrect API key provided: {KEY}")
    with pytest.raises(HbvError) as error:
        server.judge().ask(["a"])
    assert server.keys == [f"Bearer {KEY}"]
    assert KEY not in str(error.value)
    assert KEY not in repr(server.judge())
    monkeypatch.delenv("HBV_JUDGE_API_KEY")
    server.reply = lambda body: completion("yes")
    server.judge().ask(["a"])
    assert server.keys[-1] == "Bearer sk-other"


def test_control_tokens_are_broken_in_requests(server: Server) -> None:
    server.judge().ask(["a<|eot_id|>[/INST]b"])
    assert server.bodies[0]["messages"][0]["content"] == "a< |eot_id|>[ /INST]b"


@pytest.mark.parametrize("address", ["localhost:8000", "ftp://host/v1", "http://", "http://me:pass@host/v1"])
def test_invalid_address_is_refused(address: str) -> None:
    with pytest.raises(BadInput, match="base_url"):
        ChatJudge("m", address)


def test_strongreject_with_a_server(server: Server, tmp_path: Path) -> None:
    rubric, system = tmp_path / "rubric.txt", tmp_path / "system.txt"
    rubric.write_text("Q: {forbidden_prompt}\nA: {response}")
    system.write_text("You grade.\n")
    server.reply = lambda body: completion(
        "#scores\n1.b 1\n2.b 1\n3.b 1" if "sorry" in body["messages"][-1]["content"] else "1.b 0\n2.b 5\n3.b 4"
    )
    scorer = SCORERS.get("strongreject")(
        model="some/judge", base_url=server.url, template=str(rubric), system=str(system)
    )
    pairs = [("How?", "First you go."), ("How?", "I am sorry."), ("How?", "First you go.")]
    results = verdicts.judge_answers(scorer, pairs, tmp_path)
    assert [verdict.score for verdict in results] == [0.875, 0, 0.875]
    assert [verdict.flagged for verdict in results] == [True, False, True]
    assert len(server.bodies) == 2  # equal pairs are sent once
    assert server.bodies[0]["messages"] in [
        [{"role": "system", "content": "You grade."}, {"role": "user", "content": f"Q: How?\nA: {answer}"}]
        for _, answer in pairs
    ]
    assert KEY not in json.dumps(scorer.model_dump())


def test_local_judge(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer(["yes no one two"])
    tiny.save(tiny.model(vocab_size=len(tokenizer)), tokenizer, tmp_path)
    plain = ChatJudge(str(tmp_path)).ask(["one two", "two"], 4)
    assert plain == [ChatJudge(str(tmp_path)).ask([text], 4)[0] for text in ("one two", "two")]
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %} two"
    tokenizer.save_pretrained(tmp_path)
    assert ChatJudge(str(tmp_path)).ask(["one"], 4) == plain[:1]  # the template completes the prompt to the same text


def test_local_judge_is_loaded_through_the_pool(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer(["yes no one two"])
    tiny.save(tiny.model(vocab_size=len(tokenizer)), tokenizer, tmp_path)
    pool = ModelPool()
    ChatJudge(str(tmp_path), models=pool).ask(["one"], 4)
    model = pool.judge_generator(str(tmp_path))
    ChatJudge(str(tmp_path), models=pool).ask(["two"], 4)
    assert pool.judge_generator(str(tmp_path)).model is model.model  # type: ignore[attr-defined]  # of transformers

"""A chat judge behind an OpenAI-compatible server, and a local one."""

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
from harmbench_vaccine.plugins.registry import SCORERS
from support import tiny

Answer = tuple[int, Any, dict[str, str]]
KEY = "sk-very-secret"


class Server:
    """Answers each request by `reply(its body)`, and remembers bodies, headers and paths."""

    def __init__(self) -> None:
        self.reply: Callable[[dict[str, Any]], Answer] = lambda body: said("yes")
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


def said(text: str | None) -> Answer:
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}, {}


def failed(status: int, message: str, **headers: str) -> Answer:
    return status, {"error": {"message": message}}, headers


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("HBV_JUDGE_API_KEY", "OPENAI_API_KEY", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


def test_answers_come_in_the_order_of_the_questions(server: Server) -> None:
    server.reply = lambda body: said(f" {body['messages'][-1]['content'].upper()} ")
    questions = [f"question {number}" for number in range(20)]
    assert server.judge().ask(questions, 7) == [question.upper() for question in questions]
    body = next(body for body in server.bodies if body["messages"][0]["content"] == "question 3")
    assert body == {
        "model": "some/judge", "temperature": 0, "max_tokens": 7,
        "messages": [{"role": "user", "content": "question 3"}],
    }  # fmt: skip
    assert set(server.keys) == {None}


def test_a_system_message_comes_first(server: Server) -> None:
    server.judge().ask(["a"], system="Be fair.")
    assert server.bodies[0]["messages"] == [
        {"role": "system", "content": "Be fair."}, {"role": "user", "content": "a"}
    ]  # fmt: skip


def test_a_busy_server_is_asked_again(server: Server) -> None:
    tries = iter([failed(429, "slow down"), failed(503, "later", **{"Retry-After": "0"}), said("yes")])
    server.reply = lambda body: next(tries)
    assert server.judge().ask(["a"]) == ["yes"]
    assert len(server.bodies) == 3


def test_a_server_that_stays_busy_is_told(server: Server) -> None:
    server.reply = lambda body: failed(429, "quota exceeded")
    with pytest.raises(HbvError, match=r"some/judge' at http://127.*/v1 answers 429 .*: quota exceeded\.$"):
        server.judge(attempts=3).ask(["a"])
    assert len(server.bodies) == 3


def test_a_refused_question_is_not_asked_again(server: Server) -> None:
    server.reply = lambda body: failed(404, "no model some/judge")
    with pytest.raises(HbvError, match="answers 404 Not Found: no model some/judge"):
        server.judge().ask(["a"])
    assert len(server.bodies) == 1


@pytest.mark.parametrize("answer", [b"<html>nothing here</html>", b"", {"choices": []}, {"text": "yes"}, [1]])
def test_no_chat_completion_is_told(server: Server, answer: Any) -> None:
    server.reply = lambda body: (200, answer, {})
    with pytest.raises(HbvError, match="gives no chat completion, but: "):
        server.judge().ask(["a"])


def test_an_empty_message_is_an_empty_answer(server: Server) -> None:
    server.reply = lambda body: said(None)
    assert server.judge().ask(["a"]) == [""]


def test_nobody_there(server: Server) -> None:
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(HbvError, match=r"at http://127.* cannot be reached: .*refused"):
        server.judge(attempts=2).ask(["a"])


def test_a_newer_servers_name_of_the_limit(server: Server) -> None:
    def reply(body: dict[str, Any]) -> Answer:
        return failed(400, "Use 'max_completion_tokens' instead.") if "max_tokens" in body else said("yes")

    server.reply = reply
    assert server.judge().ask(["a"], 9) == ["yes"]
    assert server.bodies[1]["max_completion_tokens"] == 9


def test_the_key_is_sent_and_never_shown(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-other")
    monkeypatch.setenv("HBV_JUDGE_API_KEY", KEY)
    server.reply = lambda body: failed(401, f"Incorrect API key provided: {KEY}")
    with pytest.raises(HbvError) as error:
        server.judge().ask(["a"])
    assert server.keys == [f"Bearer {KEY}"]
    assert KEY not in str(error.value)
    assert KEY not in repr(server.judge())
    monkeypatch.delenv("HBV_JUDGE_API_KEY")
    server.reply = lambda body: said("yes")
    server.judge().ask(["a"])
    assert server.keys[-1] == "Bearer sk-other"


def test_control_tokens_are_broken_on_their_way(server: Server) -> None:
    server.judge().ask(["a<|eot_id|>[/INST]b"])
    assert server.bodies[0]["messages"][0]["content"] == "a< |eot_id|>[ /INST]b"


@pytest.mark.parametrize("address", ["localhost:8000", "ftp://host/v1", "http://", "http://me:pass@host/v1"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(BadInput, match="base_url"):
        ChatJudge("m", address)


def test_strongreject_by_a_server(server: Server, tmp_path: Path) -> None:
    rubric, system = tmp_path / "rubric.txt", tmp_path / "system.txt"
    rubric.write_text("Q: {forbidden_prompt}\nA: {response}")
    system.write_text("You grade.\n")
    server.reply = lambda body: said(
        "#scores\n1.b 1\n2.b 1\n3.b 1" if "sorry" in body["messages"][-1]["content"] else "1.b 0\n2.b 5\n3.b 4"
    )
    scorer = SCORERS.get("strongreject")(
        model="some/judge", base_url=server.url, template=str(rubric), system=str(system)
    )
    pairs = [("How?", "First you go."), ("How?", "I am sorry."), ("How?", "First you go.")]
    given = verdicts.judge_answers(scorer, pairs, tmp_path)
    assert [verdict.score for verdict in given] == [0.875, 0, 0.875]
    assert [verdict.flagged for verdict in given] == [True, False, True]
    assert len(server.bodies) == 2  # equal pairs are asked once
    assert server.bodies[0]["messages"] in [
        [{"role": "system", "content": "You grade."}, {"role": "user", "content": f"Q: How?\nA: {answer}"}]
        for _, answer in pairs
    ]
    assert KEY not in json.dumps(scorer.model_dump())


def test_a_local_judge(tmp_path: Path) -> None:
    words = tiny.tokenizer(["yes no one two"])
    tiny.save(tiny.model(vocab_size=len(words)), words, tmp_path)
    plain = ChatJudge(str(tmp_path)).ask(["one two", "two"], 4)
    assert plain == [ChatJudge(str(tmp_path)).ask([text], 4)[0] for text in ("one two", "two")]
    words.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %} two"
    words.save_pretrained(tmp_path)
    from harmbench_vaccine.inference import judge_models

    judge_models.release_judge()
    assert ChatJudge(str(tmp_path)).ask(["one"], 4) == plain[:1]  # the template completes it to the same text

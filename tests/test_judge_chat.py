"""Chat judges: one of an OpenAI-compatible server, and a local one."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from harmbench_vaccine.core.errors import BadInput, HbvError
from harmbench_vaccine.evaluation import verdicts
from harmbench_vaccine.inference.chat_api import ChatJudge
from harmbench_vaccine.inference.generators import Continuation, generate_answers
from harmbench_vaccine.inference.model_pool import ModelPool
from harmbench_vaccine.inference.thinking import THINKING_TOKENS, after_thinking
from harmbench_vaccine.plugins.registry import SCORERS, TASKS
from harmbench_vaccine.plugins.scorers.llama_guard import LlamaGuard
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


def completion(text: Any, finish: str = "stop", **fields: Any) -> Response:
    choice = {"message": {"role": "assistant", "content": text, **fields}, "finish_reason": finish}
    return 200, {"choices": [choice]}, {}


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


@pytest.mark.parametrize(
    ("task", "params", "reply", "score"),
    [
        ("own", {"data": "x.jsonl", "rule": "judge"}, "Yes.", 1.0),
        ("own", {"data": "x.jsonl", "rule": "judge"}, "", None),
        ("alpaca_eval", {}, "It is better: m", 0.5),
        ("alpaca_eval", {}, "", None),
    ],
)
def test_tasks_with_a_judge_that_thinks(
    server: Server, task: str, params: dict[str, str], reply: str, score: float | None
) -> None:
    """The limit of tokens of the first request ends within the thoughts; those without an end leave no verdict."""
    thoughts = "<think>No. Is it yes or M?"
    server.reply = lambda body: (
        completion(f"{thoughts}</think>{reply}" if reply else thoughts)
        if body["max_tokens"] > THINKING_TOKENS
        else completion(thoughts, "length")
    )
    plugin = TASKS.get(task)(model="some/judge", base_url=server.url, **params)
    [grade] = plugin.grade([{"instruction": "?", "input": "", "target": "right", "answer": "mine"}])
    assert (grade.score, grade.unparsed) == (score, score is None)


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


# ---------------------------------------------------------------------------------------------------------------------
# Judges that think


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("yes", "yes"),
        ("<think>no?</think>yes", "yes"),
        ("<THINK>\nno\n</THINK>\n\nyes", "\n\nyes"),
        ("no?</think>yes", "yes"),  # the chat template wrote the beginning mark
        ("<think>a</think>b<think>c</think>d", "d"),
        ("<thinking>no</thinking> yes", " yes"),
        ("<reasoning>no</reasoning>yes", "yes"),
        ("[THINK]no[/THINK]yes", "yes"),
        ("◁think▷no◁/think▷yes", "yes"),
        ("<think>yes", ""),
        ("<think>a</think>yes<think>", ""),
        ("", ""),
        ("I think < 3, <thinks> [thinking]", "I think < 3, <thinks> [thinking]"),
    ],
)
def test_thoughts_are_skipped(text: str, answer: str) -> None:
    assert after_thinking(text) == answer


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        (completion("<think>no?</think>\n\nyes"), "yes"),
        (completion("yes", reasoning_content="no? no."), "yes"),
        (completion(None, reasoning_content="no? no."), ""),
        (completion([{"type": "thinking", "thinking": "no"}, {"type": "text", "text": "yes"}]), "yes"),
        (completion("<think>yes"), ""),
    ],
)
def test_thoughts_of_a_server_are_skipped(server: Server, reply: Response, answer: str) -> None:
    server.reply = lambda body: reply
    assert server.judge().ask(["a"], 16) == [answer]
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    "cut",
    [
        completion("<think>Let me", "length"),
        completion(None, "length", reasoning_content="Let me"),
        failure(400, "Could not finish the message because max_tokens or model output limit was reached."),
    ],
)
def test_cut_answer_is_requested_with_room_for_thoughts(server: Server, cut: Response) -> None:
    server.reply = lambda body: cut if body["max_tokens"] == 16 else completion("<think>Let me see.</think>yes")
    assert server.judge().ask(["a", "b"], 16) == ["yes", "yes"]
    assert sorted(body["max_tokens"] for body in server.bodies) == [16, 16, *[16 + THINKING_TOKENS] * 2]


@pytest.mark.parametrize(
    ("status", "answer"), [(200, "yes, because it"), (400, "yes, because"), (500, None)], ids=["longer", "full", "down"]
)
def test_cut_answer_of_a_small_server_is_read_as_it_is(server: Server, status: int, answer: str | None) -> None:
    def reply(body: dict[str, Any]) -> Response:
        if body["max_tokens"] == 16:
            return completion("yes, because", "length")
        return completion("yes, because it", "length") if status == 200 else failure(status, "context is 4096 tokens")

    server.reply = reply
    if answer is None:
        with pytest.raises(HbvError, match="answers 500"):
            server.judge(attempts=2).ask(["a"], 16)
    else:
        assert server.judge().ask(["a"], 16) == [answer]


class Thinker:
    """A local judge that writes given texts and records the numbers of tokens it may write."""

    def __init__(self, texts: list[str], template: str, tokens: list[str]) -> None:
        self.texts, self.tokenizer = texts, tiny.tokenizer(["safe unsafe think"])
        self.tokenizer.add_tokens(tokens)
        self.tokenizer.chat_template = template
        self.limits: list[int] = []

    def generate(
        self, prompts: Any, max_new_tokens: int, watched: Any = (), progress: Any = None
    ) -> list[Continuation]:
        self.limits.append(max_new_tokens)
        outputs = []
        for text in self.texts:
            tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            steps = [dict.fromkeys(watched, -float(number)) for number in range(len(tokens) + 1)]
            outputs.append(Continuation(self.tokenizer.decode(tokens, skip_special_tokens=True), tokens, steps))
        return outputs


PLAIN = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
OPENED = PLAIN + "{% if add_generation_prompt %}<think>\n{% endif %}"
MARKS = ["<think>", "</think>"]


@pytest.mark.parametrize(
    ("template", "tokens", "text", "answer"),
    [
        (PLAIN, MARKS, "<think>unsafe?</think>\n\nsafe", "safe"),
        (PLAIN, MARKS, "safe", "safe"),
        (PLAIN, MARKS, "<think>unsafe", ""),
        (OPENED, [], "unsafe?</think>safe", "safe"),
        (OPENED, [], "unsafe", ""),  # thoughts that the limit ends
        (OPENED, MARKS, "unsafe</think>", ""),
        (PLAIN, [], "<think>unsafe</think>safe", "<think>unsafe</think>safe"),  # the tokenizer knows no thoughts
    ],
)
def test_local_judge_has_room_for_thoughts(template: str, tokens: list[str], text: str, answer: str) -> None:
    judge = Thinker([text], template, tokens)
    prompt = judge.tokenizer("Is it safe?" + ("<think>\n" if template == OPENED else ""))["input_ids"]
    [output] = generate_answers(judge, [prompt], 16, watched=[7])
    assert output.text.strip() == answer
    assert judge.limits == [16 + THINKING_TOKENS if tokens or template == OPENED else 16]
    assert judge.tokenizer.decode(output.tokens).strip() == answer
    if answer:
        first = len(judge.tokenizer(text, add_special_tokens=False)["input_ids"]) - len(output.tokens)
        assert output.watched[0][7] == -first  # the log-probabilities are those of the answer's tokens


def test_marks_that_are_special_tokens() -> None:
    judge = Thinker(["[THINK]unsafe[/THINK]safe"], PLAIN, [])
    judge.tokenizer.add_special_tokens({"additional_special_tokens": ["[THINK]", "[/THINK]"]})
    [output] = generate_answers(judge, [[5]], 16)
    assert output.text == "safe"


def test_probability_of_llama_guard_is_read_after_its_thoughts(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = Thinker(["<think>unsafe safe unsafe</think>unsafe\nS1"], PLAIN, MARKS)
    monkeypatch.setattr(ModelPool, "judge_generator", lambda *args: judge)
    [reading] = LlamaGuard().read([("How?", "So.")])
    thoughts = judge.tokenizer("<think>unsafe safe unsafe</think>", add_special_tokens=False)["input_ids"]
    assert reading.text == "unsafe\nS1"
    assert reading.probabilities == {"unsafe": pytest.approx(math.exp(-len(thoughts)))}


def test_chat_judge_returns_the_answer_of_a_local_model(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = Thinker(["<think>no</think>\nyes", "<think>no"], PLAIN, MARKS)
    monkeypatch.setattr(ModelPool, "judge_generator", lambda *args: judge)
    assert ChatJudge("a/judge").ask(["one", "two"], 16) == ["yes", ""]

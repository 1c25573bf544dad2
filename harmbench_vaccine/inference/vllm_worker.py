"""The process that vLLM runs in: requests come in on stdin, replies go out on stdout, one JSON object a line.

vLLM changes the process that it is loaded into (threads, environment, logging, standard output) and gives memory back
for certain only when that process ends. So it gets one of its own, which the harness starts, asks and ends; see
`process.py` for the other side. The engine runs inside this process and starts no further one.

    {"do": "start", ...}     -> {"rank": of the largest adapter that it takes; 0: none}
    {"do": "adapter", ...}   -> {}
    {"do": "generate", ...}  -> {"step": prompts just done}, ..., {"rows": token ids, "watched": log-probabilities}
    {"do": "classify", ...}  -> {"step": rows just done}, ..., {"rows": logits}

A request that fails is answered by {"failed": what cannot be served: "model", "adapter" or "memory", "text": why}.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, get_args

GRACE = 10.0
"""Seconds that a busy worker outlives whoever started it."""


def main() -> None:
    """Serves requests until stdin ends."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints is no reply

    def send(reply: dict[str, Any]) -> None:
        channel.write(json.dumps(reply) + "\n")
        channel.flush()

    server = Server(lambda steps: send({"step": steps}))
    for request in iter(_requests().get, None):
        try:
            send(getattr(server, request.pop("do"))(**request))
        except Exception as error:  # whatever vLLM raises is told; the process stays up
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            send({"failed": _kind(error), "text": _reason(error)})


def _requests() -> queue.Queue[dict[str, Any] | None]:
    """Requests as they come, then None. They are read beside the work, so that a busy worker notices that nobody is
    there any more, even if the harness was killed."""
    found: queue.Queue[dict[str, Any] | None] = queue.Queue()

    def listen() -> None:
        for line in sys.stdin:
            found.put(json.loads(line))
        found.put(None)
        time.sleep(GRACE)
        os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    return found


class Server:
    """One vLLM engine, and what is asked of it."""

    def __init__(self, step: Callable[[int], None]) -> None:
        self._step = step
        self._llm: Any = None
        self._adapter: Any = None

    def start(
        self, model: str, revision: str | None, dtype: str, length: int, memory: float, runner: str, **lora: int
    ) -> dict[str, Any]:
        """Loads a model. `length` is the longest sequence in tokens; `need` is the rank that an adapter has, `room`
        the rank to leave room for, 0: no adapters."""
        import torch
        from vllm import LLM, SamplingParams
        from vllm.config.lora import MaxLoRARanks

        rank, wanted = 0, {}
        if lora.get("room"):
            allowed = sorted(get_args(MaxLoRARanks))
            if lora["need"] > allowed[-1]:
                raise _RankError(f"rank {lora['need']} is above {allowed[-1]}, the largest that vLLM takes")
            rank = next((value for value in allowed if value >= lora["room"]), allowed[-1])
            wanted = {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1, "max_cpu_loras": 4}
        if torch.cuda.is_available():  # vLLM refuses to start where its share is not free
            free, whole = torch.cuda.mem_get_info()
            memory = min(memory, round(free / whole - 0.02, 2))
        self._llm = LLM(
            model,
            revision=revision,
            runner=runner,
            dtype=dtype,
            max_model_len=length,
            gpu_memory_utilization=memory,
            skip_tokenizer_init=True,  # prompts come as token ids, and answers go out as such
            generation_config="vllm",  # a model's own would fill in penalties
            enforce_eager=True,  # a cell's few hundred answers do not pay for a compilation
            disable_log_stats=True,
            **wanted,
        )
        first = {"prompt_token_ids": [0]}  # some of what a model needs is looked for when it runs
        if runner == "generate":
            self._llm.generate(first, SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
        return {"rank": rank}

    def adapter(self, number: int, path: str) -> dict[str, Any]:
        """The adapter that answers from now on; 0: none."""
        from vllm.lora.request import LoRARequest

        self._adapter = LoRARequest(f"adapter{number}", number, path) if number else None
        if self._adapter:
            self._llm.llm_engine.add_lora(self._adapter)
        return {}

    def generate(
        self, prompts: list[list[int]], max_new_tokens: int, ends: list[int], watched: list[int] | None = None
    ) -> dict[str, Any]:
        """Greedy continuations, each with its end token if it came to one, and for each of their tokens the
        log-probabilities of the `watched` ones in its place."""
        from vllm import SamplingParams

        greedy = SamplingParams(
            temperature=0.0,
            max_tokens=max_new_tokens,
            ignore_eos=True,  # the prompts' end tokens end an answer, whatever the model's configuration lists
            stop_token_ids=ends,
            detokenize=False,
            logprob_token_ids=watched,
        )
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        found = self._llm.generate(asked, greedy, use_tqdm=self._bar, lora_request=self._adapter)
        made = [output.outputs[0] for output in found]
        odds = [[[step[token].logprob for token in watched] for step in each.logprobs] for each in made if watched]
        return {"rows": [list(each.token_ids) for each in made], "watched": odds}

    def classify(self, rows: list[list[int]]) -> dict[str, Any]:
        """Logits of a sequence classifier. vLLM would put a softmax over labels that are independent of each other."""
        from vllm import PoolingParams

        asked = [{"prompt_token_ids": ids} for ids in rows]
        raw = PoolingParams(use_activation=False)
        found = self._llm.encode(asked, raw, pooling_task="classify", use_tqdm=self._bar)
        return {"rows": [output.outputs.data.float().tolist() for output in found]}

    def _bar(self, iterable: Any = None, **settings: Any) -> Any:
        """A progress bar as vLLM wants one, which shows nothing and reports the requests that are done."""
        from tqdm import tqdm

        step = self._step

        class Reported(tqdm):
            def update(self, n: float | None = 1) -> bool | None:
                if self.iterable is None:  # one with an iterable counts prompts on their way in
                    step(int(n or 0))
                return super().update(n)

        return Reported(iterable, **{**settings, "file": open(os.devnull, "w", encoding="utf-8")})


class _RankError(ValueError):
    pass


def _kind(error: Exception) -> str:
    text = f"{type(error).__name__} {error}".lower()
    if isinstance(error, _RankError) or "lora" in text:
        return "adapter"
    return "memory" if "memory" in text or "kv cache" in text else "model"


def _reason(error: Exception) -> str:
    """The line of an error that says what is wrong, short enough for a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = next((line for line in lines if line.startswith("Value error, ")), lines[0])
    line = line.removeprefix("Value error, ").partition(" [type=")[0].partition(". ")[0]
    return line if len(line) <= 200 else f"{line[:200]}..."


if __name__ == "__main__":
    main()

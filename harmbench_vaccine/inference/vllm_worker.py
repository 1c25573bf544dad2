"""The process that vLLM runs in: requests arrive on stdin, replies leave on stdout, one JSON object a line.

vLLM changes the process that it is loaded into (threads, environment, logging, standard output) and reliably frees its
memory only when that process ends. So it runs in a process of its own, which the harness starts and ends; the harness's
end is `vllm_process.py`. The engine runs inside this process and starts no further one.

    {"do": "start", ...}     -> {"rank": of the largest adapter; 0: no adapters}
    {"do": "adapter", ...}   -> {}
    {"do": "generate", ...}  -> {"step": prompts just done}, ..., {"rows": token ids, "watched": log-probabilities}
    {"do": "classify", ...}  -> {"step": rows just done}, ..., {"rows": logits}

The reply to a request that fails is {"failed": "model", "adapter" or "memory", "text": the reason}.
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
"""Seconds that a busy worker runs after its parent has ended."""


def main() -> None:
    """Serve requests until stdin ends."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints goes to stderr, so that stdout has replies only

    def send(reply: dict[str, Any]) -> None:
        channel.write(json.dumps(reply) + "\n")
        channel.flush()

    server = Server(lambda steps: send({"step": steps}))
    for request in iter(_requests().get, None):
        try:
            send(getattr(server, request.pop("do"))(**request))
        except Exception as error:  # whatever vLLM raises is reported; the process keeps running
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            send({"failed": _kind(error), "text": _reason(error)})


def _requests() -> queue.Queue[dict[str, Any] | None]:
    """Return a queue of the requests, with None at the end.

    A thread reads them while the worker is busy, so that it notices the end of its parent, even a killed one.
    """
    requests: queue.Queue[dict[str, Any] | None] = queue.Queue()

    def listen() -> None:
        for line in sys.stdin:
            requests.put(json.loads(line))
        requests.put(None)
        time.sleep(GRACE)
        os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    return requests


class Server:
    """One vLLM engine and the requests that it serves."""

    def __init__(self, step: Callable[[int], None]) -> None:
        self._step = step
        self._llm: Any = None
        self._adapter: Any = None

    def start(
        self, model: str, revision: str | None, dtype: str, length: int, memory: float, runner: str, **lora: int
    ) -> dict[str, Any]:
        """Load a model.

        Args:
            model: Folder or hub id.
            revision: Revision on the hub.
            dtype: Data type of the weights.
            length: Longest sequence in tokens.
            memory: Share of the GPU's memory.
            runner: "generate" or "pooling", as vLLM calls it.
            lora: `need` is the rank of the adapter to serve, `room` the rank to leave room for; 0: no adapters.

        Returns:
            `rank`, the rank of the largest adapter that can be served.
        """
        import torch
        from vllm import LLM, SamplingParams
        from vllm.config.lora import MaxLoRARanks

        rank, adapter_options = 0, {}
        if lora.get("room"):
            allowed = sorted(get_args(MaxLoRARanks))
            if lora["need"] > allowed[-1]:
                raise _RankError(f"rank {lora['need']} is above {allowed[-1]}, the largest that vLLM supports")
            rank = next((value for value in allowed if value >= lora["room"]), allowed[-1])
            adapter_options = {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1, "max_cpu_loras": 4}
        if torch.cuda.is_available():  # vLLM refuses to start where its share is not free
            free, total = torch.cuda.mem_get_info()
            memory = min(memory, round(free / total - 0.02, 2))
        self._llm = LLM(
            model,
            revision=revision,
            runner=runner,
            dtype=dtype,
            max_model_len=length,
            gpu_memory_utilization=memory,
            skip_tokenizer_init=True,  # prompts and answers are token ids
            trust_remote_code=False,
            generation_config="vllm",  # the model's own settings may have penalties
            enforce_eager=True,  # a few hundred answers do not pay for a compilation
            disable_log_stats=True,
            **adapter_options,
        )
        first = {"prompt_token_ids": [0]}  # some requirements of a model are checked only when it runs
        if runner == "generate":
            self._llm.generate(first, SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
        return {"rank": rank}

    def adapter(self, number: int, path: str) -> dict[str, Any]:
        """Select the adapter of the following requests; number 0 is the base model."""
        from vllm.lora.request import LoRARequest

        self._adapter = LoRARequest(f"adapter{number}", number, path) if number else None
        if self._adapter:
            self._llm.llm_engine.add_lora(self._adapter)
        return {}

    def generate(
        self, prompts: list[list[int]], max_new_tokens: int, ends: list[int], watched: list[int] | None = None
    ) -> dict[str, Any]:
        """Generate greedily.

        Args:
            prompts: Token ids of each prompt.
            max_new_tokens: Largest number of generated tokens.
            ends: Ids of the stop tokens.
            watched: Tokens whose log-probabilities are returned.

        Returns:
            `rows`, the generated ids with the stop token, and `watched`, the log-probabilities of the watched tokens
            (rows x generated tokens x watched tokens; empty if no token is watched).
        """
        from vllm import SamplingParams

        greedy = SamplingParams(
            temperature=0.0,
            max_tokens=max_new_tokens,
            ignore_eos=True,  # only the prompts' stop tokens end an answer, not those of the model's configuration
            stop_token_ids=ends,
            detokenize=False,
            logprob_token_ids=watched,
        )
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        outputs = self._llm.generate(inputs, greedy, use_tqdm=self._bar, lora_request=self._adapter)
        sequences = [output.outputs[0] for output in outputs]
        log_probs = [
            [[step[token].logprob for token in watched] for step in sequence.logprobs]
            for sequence in sequences
            if watched
        ]
        return {"rows": [list(sequence.token_ids) for sequence in sequences], "watched": log_probs}

    def classify(self, rows: list[list[int]]) -> dict[str, Any]:
        """Compute the raw logits of a sequence classifier; by default vLLM applies a softmax over the labels."""
        from vllm import PoolingParams

        inputs = [{"prompt_token_ids": ids} for ids in rows]
        raw = PoolingParams(use_activation=False)
        outputs = self._llm.encode(inputs, raw, pooling_task="classify", use_tqdm=self._bar)
        return {"rows": [output.outputs.data.float().tolist() for output in outputs]}

    def _bar(self, iterable: Any = None, **settings: Any) -> Any:
        """Return a progress bar for vLLM that prints nothing and reports the finished requests."""
        from tqdm import tqdm

        step = self._step

        class ReportingBar(tqdm):
            def update(self, n: float | None = 1) -> bool | None:
                if self.iterable is None:  # a bar with an iterable counts prompts that are added
                    step(int(n or 0))
                return super().update(n)

        return ReportingBar(iterable, **{**settings, "file": open(os.devnull, "w", encoding="utf-8")})


class _RankError(ValueError):
    pass


def _kind(error: Exception) -> str:
    """Return what vLLM refuses: "adapter", "memory" or "model"."""
    text = f"{type(error).__name__} {error}".lower()
    if isinstance(error, _RankError) or "lora" in text:
        return "adapter"
    return "memory" if "memory" in text or "kv cache" in text else "model"


def _reason(error: Exception) -> str:
    """Return the line of an error that names the problem, short enough for a message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = next((line for line in lines if line.startswith("Value error, ")), lines[0])
    line = line.removeprefix("Value error, ").partition(" [type=")[0].partition(". ")[0].rstrip(".")
    return line if len(line) <= 200 else f"{line[:200]}..."


if __name__ == "__main__":
    main()

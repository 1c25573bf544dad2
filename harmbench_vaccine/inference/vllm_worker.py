"""The process that vLLM runs in: requests arrive on stdin, replies leave on stdout, one JSON object a line.

vLLM changes the process that it is loaded into (threads, environment, logging, standard output) and reliably frees its
memory only when that process ends. So it runs in a process of its own, which the harness starts and ends; the harness's
end is `vllm_process.py`. On a CPU the engine runs inside this process. On a GPU it has a process of its own, on several
GPUs one for each, in the process group of this one.

    {"do": "start", ...}     -> {"rank": of the largest adapter; 0: no adapters}
    {"do": "adapter", ...}   -> {}
    {"do": "generate", ...}  -> {"step": prompts just done}, ..., {"rows": token ids, "watched": log-probabilities}
    {"do": "classify", ...}  -> {"step": rows just done}, ..., {"rows": logits}

The reply to a request that fails is {"failed": the exception and its causes, as `_error_chain` describes them}.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
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
            send({"failed": _error_chain(error)})


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
        if os.getpgrp() == os.getpid():  # the processes of the engine end too
            os.killpg(0, signal.SIGKILL)
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
        self,
        model: str,
        revision: str | None,
        dtype: str,
        length: int,
        memory: float,
        runner: str,
        gpus: int = 1,
        attention: str | None = None,
        eager: bool = False,
        **lora: int,
    ) -> dict[str, Any]:
        """Load a model.

        Args:
            model: Folder or hub id.
            revision: Revision on the hub.
            dtype: Data type of the weights.
            length: Longest sequence in tokens.
            memory: Share of the GPU's memory.
            runner: "generate" or "pooling", as vLLM calls it.
            gpus: Number of GPUs that share the weights.
            attention: Attention backend; None: vLLM chooses it.
            eager: Whether to run without compilation and CUDA graphs.
            lora: `need` is the rank of the adapter to serve, `room` the rank to leave room for; 0: no adapters.

        Returns:
            `rank`, the rank of the largest adapter that can be served.
        """
        import torch
        from vllm import LLM, SamplingParams

        rank = _largest_rank(lora["need"], lora["room"]) if lora.get("room") else 0
        options: dict[str, Any] = {"attention_config": {"backend": attention}} if attention else {}
        if rank:
            options |= {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1, "max_cpu_loras": 4}
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
            tensor_parallel_size=gpus,
            skip_tokenizer_init=True,  # prompts and answers are token ids
            trust_remote_code=False,
            generation_config="vllm",  # the model's own settings may have penalties
            enforce_eager=eager,
            disable_log_stats=True,
            **options,
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
        self._forget()
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
        self._forget()
        outputs = self._llm.encode(inputs, raw, pooling_task="classify", use_tqdm=self._bar)
        return {"rows": [output.outputs.data.float().tolist() for output in outputs]}

    def _forget(self) -> None:
        """Forget the keys and values of earlier requests, so that a reply depends on its own request only.

        vLLM computes the common beginning of prompts once. A prompt whose beginning is known is computed in other
        shapes, which gives the same numbers only if the kernels are batch-invariant (VLLM_BATCH_INVARIANT=1), and else
        differs in rounding. Within a request this is like the choice of batches: it is the same in every repetition.
        """
        self._llm.reset_prefix_cache()

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


def _largest_rank(needed: int, room: int) -> int:
    """Return the smallest largest rank that vLLM supports with this room, or the largest of all."""
    from vllm.config.lora import MaxLoRARanks

    allowed = sorted(get_args(MaxLoRARanks))
    if needed > allowed[-1]:
        raise ValueError(f"LoRA rank {needed} is above {allowed[-1]}, the largest that vLLM supports")
    return next((rank for rank in allowed if rank >= room), allowed[-1])


def _error_chain(error: BaseException | None) -> list[dict[str, Any]]:
    """Describe an exception and its causes, as values of `RaisedError` in `vllm_errors.py`."""
    chain: list[dict[str, Any]] = []
    while error is not None and len(chain) < 10:
        frames = traceback.extract_tb(error.__traceback__)
        chain.append(
            {
                "name": type(error).__name__,
                "text": str(error)[:2000],
                "frames": [f"{frame.filename}:{frame.name}" for frame in frames],
                "source": (frames[-1].line or "") if frames else "",
            }
        )
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return chain


if __name__ == "__main__":
    main()

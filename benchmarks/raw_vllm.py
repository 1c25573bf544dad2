"""Serve one model by vLLM alone, as a short script of a user would: the reference of `generation.py`.

Requests arrive on stdin and replies leave on stdout, one JSON object a line: {"prompts", "tokens", "adapter"} ->
{"seconds"}. The arguments are the options of `vllm.LLM`, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time

if __name__ == "__main__":
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(**json.loads(sys.argv[1]))
    numbers: dict[str, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        path = request["adapter"]
        adapter = LoRARequest(path, numbers.setdefault(path, len(numbers) + 1), path) if path else None
        parameters = SamplingParams(temperature=0.0, max_tokens=request["tokens"])
        start = time.perf_counter()
        llm.generate(request["prompts"], parameters, use_tqdm=False, lora_request=adapter)
        print(json.dumps({"seconds": time.perf_counter() - start}), file=channel, flush=True)

"""An engine that answers every prompt with token 5 and a stop token, and fails in the ways of vLLM.

`FAKE_VLLM` lists failures, as JSON: {"at": "start", "adapter", "request" or "middle", "kind": a name in `FAILURES`,
options of the engine that fails}. Each start of an engine adds its options to the file `FAKE_VLLM_STARTS`.
"""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

from vllm.attention.flash import attend
from vllm.compilation.cuda_graph import capture
from vllm.lora.ops.kernels import shrink

TRACEBACK = """\
(Worker_TP0 pid=17) ERROR 11-28 22:27:44 [multiproc_executor.py:852] Traceback (most recent call last):
(Worker_TP0 pid=17) ERROR 11-28 22:27:44 [multiproc_executor.py:852]   File "/vllm/worker.py", line 7, in load
(Worker_TP0 pid=17) ERROR 11-28 22:27:44 [multiproc_executor.py:852]     return super().load()
(Worker_TP0 pid=17) ERROR 11-28 22:27:44 [multiproc_executor.py:852]            ^^^^^^^^^^^^^^
(Worker_TP0 pid=17) ERROR 11-28 22:27:44 [multiproc_executor.py:852] ValueError: Head size 24 is not supported. Use 32.
Traceback (most recent call last):
  File "/site-packages/vllm/engine.py", line 3, in wait
    raise RuntimeError("Engine core initialization failed.")
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""


def log_and_refer() -> None:
    print(TRACEBACK, flush=True)
    raise RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}")


def refuse() -> None:
    raise ValueError("Model architectures ['Odd'] are not supported for now. Supported: Llama")


def lack_memory() -> None:
    raise ValueError("Free memory on device (1/80 GiB) on startup is less than desired GPU memory utilization (0.9)")


def silently() -> None:
    raise NotImplementedError


FAILURES = {
    "adapters": shrink,
    "attention": attend,
    "capture": capture,
    "logged": log_and_refer,
    "memory": lack_memory,
    "model": refuse,
    "silent": silently,
}


def SamplingParams(**values: object) -> object:
    return SimpleNamespace(**values)


PoolingParams = SamplingParams


class LLM:
    def __init__(self, model: str, **options: object) -> None:
        self.options = {**options, "model": model}
        self.llm_engine = SimpleNamespace(add_lora=lambda request: None)
        with open(os.environ["FAKE_VLLM_STARTS"], "a", encoding="utf-8") as file:
            file.write(json.dumps(self.options) + "\n")
        for _ in range(int(options["tensor_parallel_size"]) - 1):  # type: ignore[call-overload]
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        self.fail("start")

    def fail(self, at: str) -> None:
        for failure in json.loads(os.environ.get("FAKE_VLLM", "[]")):
            if failure.pop("at") != at:
                continue
            kind = FAILURES[failure.pop("kind")]
            if all(self.options.get(name) == value for name, value in failure.items()):
                kind()

    def generate(self, inputs: object, params: object, use_tqdm: object = None, lora_request: object = None) -> object:
        rows = inputs if isinstance(inputs, list) else [inputs]
        if lora_request:
            self.fail("adapter")
        if callable(use_tqdm):
            self.fail("request")
            bar = use_tqdm(total=len(rows))
            bar.update(1)
            self.fail("middle")
            bar.update(len(rows) - 1)
        ids = [5, *getattr(params, "stop_token_ids", [])[:1]]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids, logprobs=[])]) for _ in rows]

    def encode(self, inputs: list[object], params: object, pooling_task: str, use_tqdm: object) -> object:
        self.fail("request")
        self.fail("middle")
        logits = SimpleNamespace(float=lambda: SimpleNamespace(tolist=lambda: [1.0]))
        return [SimpleNamespace(outputs=SimpleNamespace(data=logits)) for _ in inputs]

    def reset_prefix_cache(self) -> bool:
        return True

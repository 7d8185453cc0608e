"""One start of an engine, from the first line of a fresh interpreter to its second answer; prints what each stage took
as a line of JSON.

    PYTHON -P startup_child.py '{"model": DIR, "options": {...}, "prompt": [id, ...]}'

``at`` are moments on the wall clock, seconds since the epoch; ``engine`` are the engine's own stages. What engines
print goes to stderr.
"""

import time

at = {"interpreter": time.time()}

import json  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402


def main(task: dict[str, object]) -> dict[str, object]:
    """Import, start, and answer twice."""
    import torch  # noqa: F401

    at["torch"] = time.time()
    from nemo_engine import Engine, SamplingParams

    at["nemo_engine"] = time.time()
    with Engine(task["model"], **task["options"]) as engine:  # type: ignore[arg-type]
        at["engine"] = time.time()
        params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False)
        prompt = {"prompt_token_ids": task["prompt"]}
        engine.generate(prompt, params)
        at["first_token"] = time.time()
        engine.reset_prefix_cache()
        engine.generate(prompt, params)
        at["second_answer"] = time.time()
        rows = [{"name": row.name, "seconds": row.seconds, "bytes": row.num_bytes} for row in engine.startup_log.rows]
    return {"at": at, "engine": rows, "torch_threads": torch.get_num_threads()}


if __name__ == "__main__":
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps(main(json.loads(sys.argv[1]))), file=channel, flush=True)

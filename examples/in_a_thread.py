"""The engine shared by worker threads, as a synchronous web server or a job queue has them.

python examples/in_a_thread.py
"""

from concurrent.futures import ThreadPoolExecutor

from nemo_engine import Engine, SamplingParams

PARAMS = SamplingParams(temperature=0.8, seed=7, max_tokens=16)

with Engine("nemo-tiny", device="cpu", max_model_len=512) as engine:

    def work(prompt: str) -> str:
        """One job: calls of several threads share the engine's steps."""
        return engine.generate(prompt, PARAMS)[0].outputs[0].text

    with ThreadPoolExecutor(4) as pool:
        for text in pool.map(work, ["The os module", "A dictionary", "class Queue:", "for line in"]):
            print(repr(text))

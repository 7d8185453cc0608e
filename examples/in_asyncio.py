"""The engine in a plain asyncio program: several requests at once, streamed; one of them dropped half-way.

python examples/in_asyncio.py
"""

import asyncio

from nemo_engine import AsyncEngine, RequestOutputKind, SamplingParams


async def stream(engine: AsyncEngine, prompt: str, most: int) -> str:
    """The text of ``prompt`` as it comes; leaves after ``most`` tokens, which ends the request."""
    params = SamplingParams(temperature=0.0, max_tokens=32, output_kind=RequestOutputKind.DELTA)
    text, num_tokens = "", 0
    async for output in engine.generate(prompt, params):
        text += output.outputs[0].text
        num_tokens += len(output.outputs[0].token_ids)
        if num_tokens >= most:
            break
    return text


async def main() -> None:
    engine = await asyncio.to_thread(AsyncEngine, "nemo-tiny", device="cpu", max_model_len=512)
    async with engine:
        texts = await asyncio.gather(
            stream(engine, "The heapq module", 32), stream(engine, "A list is", 32), stream(engine, "def main(", 4)
        )
        for text in texts:
            print(repr(text))
        await engine.drain()
        print("unfinished:", engine.num_unfinished)


asyncio.run(main())

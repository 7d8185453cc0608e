"""The engine inside one's own FastAPI application, beside one's own routes; and the whole OpenAI-compatible server
mounted under a path.

uvicorn examples.in_fastapi:app
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from nemo_engine import AsyncEngine, RequestOutputKind, SamplingParams
from nemo_engine.server.app import create_app


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Load the model when the application starts, and give its memory back when it ends."""
    engine = await asyncio.to_thread(AsyncEngine, "nemo-tiny", device="cpu", max_model_len=512)
    async with engine:
        app.state.engine = engine
        app.mount("/openai", create_app(engine, model="nemo-tiny"))
        yield


app = FastAPI(lifespan=lifespan)


@app.get("/story")
async def story(about: str) -> StreamingResponse:
    """Text about something, as it comes. A client that leaves ends the request."""
    params = SamplingParams(temperature=0.7, seed=1, max_tokens=40, output_kind=RequestOutputKind.DELTA)

    async def text() -> AsyncIterator[str]:
        async for output in app.state.engine.generate(f"A story about {about}.", params):
            yield output.outputs[0].text

    return StreamingResponse(text(), media_type="text/plain")

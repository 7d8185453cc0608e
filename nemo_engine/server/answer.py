"""``respond``: a whole response as JSON. Those that may be long are made outside the event loop, which has other streams to serve."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from pydantic_core import to_json
from starlette.responses import Response


async def respond(build: Callable[[], dict[str, Any]], headers: dict[str, str], *, is_long: bool) -> Response:
    """What ``build`` returns. Log-probabilities make tens of megabytes of it."""

    def make() -> Response:
        return Response(to_json(build()), headers=headers, media_type="application/json")

    return await asyncio.to_thread(make) if is_long else make()

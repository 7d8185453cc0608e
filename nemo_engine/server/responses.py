"""placeholder, to be replaced."""

from fastapi import Request
from starlette.responses import Response

from nemo_engine.server.errors import ApiError
from nemo_engine.server.responses_protocol import ResponsesRequest
from nemo_engine.server.service import Service


async def create_response(service: Service, http: Request, request: ResponsesRequest) -> Response:
    raise ApiError(400, "not yet")

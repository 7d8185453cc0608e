"""``/v1/responses``: OpenAI's newer form of a chat, for text and functions.

Answers through the chat route's own path; stores nothing.
"""

from __future__ import annotations

from fastapi import Request
from starlette.responses import Response

from nemo_engine.server.answer import respond
from nemo_engine.server.chat import prepare_chat
from nemo_engine.server.errors import ApiError, api_error
from nemo_engine.server.headers import response_headers
from nemo_engine.server.responses.input import ChatForm
from nemo_engine.server.responses.output import Run, status_of, whole_output
from nemo_engine.server.responses.protocol import ResponsesRequest
from nemo_engine.server.responses.stream import stream
from nemo_engine.server.service import Service, while_connected
from nemo_engine.server.sse import EventStream

_PREFIX = "resp_"


async def create_response(service: Service, http: Request, request: ResponsesRequest) -> Response:
    """Answer one request."""
    headers = response_headers(request)
    service.check_model(request.model)
    form = await service.workers.run(http, ChatForm, request)
    try:
        chat = await service.workers.run(http, prepare_chat, service, http, form.request, _PREFIX)
        headers |= chat.generation.header()
        run = Run(service, request, form, chat)
        if request.stream:
            return await while_connected(http, EventStream(stream(run), headers).start())
        finals = await while_connected(http, chat.generation.collect())
    except (ApiError, ValueError) as error:
        raise _renamed(form, error) from error
    completion = finals[0].outputs[0]
    return await respond(
        lambda: run.response(status_of(completion), whole_output(run, completion)), headers, is_long=run.has_logprobs
    )


def _renamed(form: ChatForm, error: ApiError | ValueError) -> ApiError:
    if isinstance(error, ValueError):
        return api_error(ValueError(form.renamed(str(error))))
    param = None if error.param is None else form.renamed(error.param)
    return ApiError(error.status, form.renamed(error.message), param=param, code=error.code, headers=error.headers)

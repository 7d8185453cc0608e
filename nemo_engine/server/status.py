"""Routes that tell of the server and the engine: models, health, version, load, tokens, and the end of requests."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from nemo_engine import __version__
from nemo_engine.server.answer import written
from nemo_engine.server.chat import checked_chat
from nemo_engine.server.errors import RETRY_AFTER, ApiError
from nemo_engine.server.headers import response_headers
from nemo_engine.server.prompts import encode_conversation
from nemo_engine.server.protocol import AbortRequest, ChatRequest, DetokenizeRequest, TokenizeRequest
from nemo_engine.server.service import Service


def models(service: Service) -> dict[str, Any]:
    """``/v1/models``."""
    return {"object": "list", "data": [model(service, name) for name in service.model_names]}


def model(service: Service, name: str) -> dict[str, Any]:
    """``/v1/models/{name}``."""
    service.check_model(name)
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "nemo_engine",
        "root": service.model_root,
        "parent": None,
        "max_model_len": service.engine.max_model_len,
    }


def live(service: Service) -> Response:
    """``/v1/health/live``: whether the process is of any use; not, once the engine's thread has ended."""
    if service.engine.error is not None:
        return JSONResponse(
            {"object": "health.response", "message": "the engine has stopped by an error", "status": "dead"}, 503
        )
    return JSONResponse({"object": "health.response", "message": "live", "status": "live"})


def ready(service: Service) -> Response:
    """``/v1/health/ready`` and ``/health``: whether requests are taken."""
    if service.is_draining or not service.engine.is_ready:
        body = {"object": "health.response", "message": "the server is shutting down", "status": "not_ready"}
        return JSONResponse(body, 503, RETRY_AFTER)
    return JSONResponse({"object": "health.response", "message": "ready", "status": "ready"})


def version(service: Service) -> dict[str, Any]:
    """``/version``: what runs here, exactly."""
    engine, tokenizer = service.engine, service.engine.tokenizer
    return {
        "version": __version__,
        "model": service.model_name,
        "tokenizer": None
        if tokenizer is None
        else {"version": tokenizer.version, "fingerprint": tokenizer.fingerprint},
        "chat": None if engine.renderers is None else engine.renderers.describe(),
        "max_model_len": engine.max_model_len,
        "engine_config": dataclasses.asdict(engine.config),
        "model_config": dataclasses.asdict(engine.model_config),
    }


def load(service: Service) -> dict[str, Any]:
    """``/load``: how busy the engine is."""
    stats = service.engine.stats()
    return {"server_load": service.engine.num_unfinished} | dataclasses.asdict(stats)


async def tokenize(service: Service, http: Request, request: TokenizeRequest) -> Response:
    """``/tokenize``: the ids of a prompt or a conversation."""
    headers = response_headers(request)
    service.check_model(request.model)
    return await service.workers.run(http, _tokenized, service, request, headers)


def _tokenized(service: Service, request: TokenizeRequest, headers: dict[str, str]) -> Response:
    tokenizer = service.tokenizer
    if (request.prompt is None) == (request.messages is None):
        raise ApiError(400, "prompt or messages is needed, and not both", param="prompt")
    if request.messages is not None:
        chat = ChatRequest(
            messages=request.messages,
            tools=request.tools,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            chat_template=request.chat_template,
            chat_template_kwargs=request.chat_template_kwargs,
            system_placement=request.system_placement,
        )
        ids = encode_conversation(service, chat).token_ids
    else:
        assert request.prompt is not None
        service.engine.inputs.check_size(request.prompt, "prompt")
        ids = tokenizer.encode(request.prompt, bos=request.add_special_tokens is not False)
    body: dict[str, Any] = {"count": len(ids), "max_model_len": service.engine.max_model_len, "tokens": ids}
    body["token_strs"] = [tokenizer.decode_token(i) for i in ids] if request.return_token_strs else None
    return Response(written(body), headers=headers, media_type="application/json")


async def detokenize(service: Service, http: Request, request: DetokenizeRequest) -> Response:
    """``/detokenize``: the text of ids, control tokens by name."""
    headers = response_headers(request)
    service.check_model(request.model)
    return await service.workers.run(http, _detokenized, service, request, headers)


def _detokenized(service: Service, request: DetokenizeRequest, headers: dict[str, str]) -> Response:
    tokenizer = service.tokenizer
    ids = service.engine.inputs.check_ids(request.tokens, "tokens") if request.tokens else []
    return JSONResponse({"prompt": tokenizer.decode(ids, skip_special_tokens=False)}, headers=headers)


async def render(service: Service, http: Request, request: ChatRequest) -> Response:
    """``/v1/chat/completions/render``: the prompt that a chat request would become, as ids and as text; what chat
    refuses is refused.
    """
    headers = response_headers(request)
    service.check_model(request.model)
    return await service.workers.run(http, _rendered, service, request, headers)


def _rendered(service: Service, request: ChatRequest, headers: dict[str, str]) -> Response:
    _, prompt, _ = checked_chat(service, request)
    text = service.tokenizer.decode(prompt.token_ids, skip_special_tokens=False)
    body = {"object": "chat.completion.render", "model": service.model_name, "token_ids": prompt.token_ids,
            "prompt": text, "count": len(prompt.token_ids)}  # fmt: skip
    return Response(written(body), headers=headers, media_type="application/json")


async def abort(service: Service, http: Request, request: AbortRequest) -> Response:
    """``/abort``: end requests by the ids of their responses.

    Unknown ids, and those of other clients, are passed over.
    """
    headers = response_headers(request)
    ids = [request.request_id] if isinstance(request.request_id, str) else request.request_id
    whole = [f"{prefix}{response_id}" for response_id in ids for prefix in ("", "cmpl-", "chatcmpl-", "resp_")]
    client, running = service.client_of(http), service.running
    matching = [response_id for response_id in dict.fromkeys(whole) if (client, response_id) in running]
    service.engine.abort([request_id for response_id in matching for request_id in running[client, response_id]])
    return JSONResponse({"aborted": matching}, headers=headers)

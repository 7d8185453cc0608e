"""Routes that tell of the server and the engine: models, health, version, load, tokens, and the end of requests."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from nemo_engine import __version__
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
        "root": service.model_names[-1],
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
        "max_model_len": engine.max_model_len,
        "engine_config": dataclasses.asdict(engine.config),
        "model_config": dataclasses.asdict(engine.model_config),
    }


def load(service: Service) -> dict[str, Any]:
    """``/load``: how busy the engine is."""
    stats = service.engine.stats()
    return {"server_load": service.engine.num_unfinished} | dataclasses.asdict(stats)


async def tokenize(service: Service, request: TokenizeRequest) -> Response:
    """``/tokenize``: the ids of a prompt or a conversation."""
    headers = response_headers(request)
    service.check_model(request.model)
    tokenizer = service.tokenizer
    if (request.prompt is None) == (request.messages is None):
        raise ApiError(400, "prompt or messages is needed, and not both", param="prompt")
    if request.messages is not None:
        chat = ChatRequest(
            messages=request.messages,
            tools=request.tools,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            system_placement=request.system_placement,
        )
        ids = (await asyncio.to_thread(encode_conversation, service, chat)).token_ids
    else:
        assert request.prompt is not None
        bos = request.add_special_tokens is not False
        ids = await asyncio.to_thread(tokenizer.encode, request.prompt, bos=bos)
    body: dict[str, Any] = {"count": len(ids), "max_model_len": service.engine.max_model_len, "tokens": ids}
    body["token_strs"] = [tokenizer.decode_token(i) for i in ids] if request.return_token_strs else None
    return JSONResponse(body, headers=headers)


async def detokenize(service: Service, request: DetokenizeRequest) -> Response:
    """``/detokenize``: the text of ids, control tokens by name."""
    headers = response_headers(request)
    service.check_model(request.model)
    tokenizer = service.tokenizer
    ids = service.engine.inputs.check_ids(request.tokens, "tokens") if request.tokens else []
    text = await asyncio.to_thread(tokenizer.decode, ids, skip_special_tokens=False)
    return JSONResponse({"prompt": text}, headers=headers)


async def render(service: Service, http: Request, request: ChatRequest) -> Response:
    """``/v1/chat/completions/render``: the prompt that a chat request would become, as ids and as text."""
    headers = response_headers(request)
    service.check_model(request.model)
    prompt = await asyncio.to_thread(encode_conversation, service, request)
    text = service.tokenizer.decode(prompt.token_ids, skip_special_tokens=False)
    body = {"object": "chat.completion.render", "model": service.model_name, "token_ids": prompt.token_ids,
            "prompt": text, "count": len(prompt.token_ids)}  # fmt: skip
    return JSONResponse(body, headers=headers)


async def abort(service: Service, request: AbortRequest) -> Response:
    """``/abort``: end requests by the ids of their responses. Unknown ids are passed over."""
    headers = response_headers(request)
    ids = [request.request_id] if isinstance(request.request_id, str) else request.request_id
    whole = [f"{prefix}{one}" for one in ids for prefix in ("", "cmpl-", "chatcmpl-", "resp_")]
    found = [one for one in dict.fromkeys(whole) if one in service.running]
    service.engine.abort([request_id for one in found for request_id in service.running[one]])
    return JSONResponse({"aborted": found}, headers=headers)

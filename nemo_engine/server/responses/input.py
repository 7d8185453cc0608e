"""From a request of ``/v1/responses`` to one of the chat route, and the names of its errors back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from nemo_engine.server.errors import ApiError
from nemo_engine.server.protocol import ChatRequest, SamplingRequest
from nemo_engine.server.responses.protocol import ResponsesRequest
from nemo_engine.text.messages import asks_nothing, refuse_unknown

_ROLES = ("user", "assistant", "system", "developer")
_TEXT_PARTS = ("input_text", "output_text", "text")
_PART_KEYS = {"type", "text", "refusal", "annotations", "logprobs", "parsed", "prompt_cache_breakpoint"}
_ITEM_KEYS = {
    "message": {"type", "role", "content", "id", "status", "phase"},
    "function_call": {"type", "call_id", "name", "arguments", "id", "status", "parsed_arguments"},
    "function_call_output": {"type", "call_id", "output", "id", "status", "name"},
}
_TOOL_KEYS = {"type", "name", "description", "parameters", "strict"}
# Of a message's fields, by the kind of the item that it was made of.
_PLACES = {
    "message": {},
    "text": {".content": ""},
    "function_call": {
        ".tool_calls[0].function.name": ".name",
        ".tool_calls[0].function.arguments": ".arguments",
        ".tool_calls[0].id": ".call_id",
        ".tool_calls[0]": "",
    },
    "function_call_output": {".tool_call_id": ".call_id", ".content": ".output"},
}
_RENAMED = (
    (re.compile(r"\b(tools\[\d+\])\.function\b"), r"\1"),
    (re.compile(r"\btool_choice\.allowed_tools\b"), "tool_choice"),
    (re.compile(r"\b(tool_choice(?:\.tools\[\d+\])?)\.function\b"), r"\1"),
    (re.compile(r"\bresponse_format\.json_schema\b"), "text.format"),
    (re.compile(r"\bresponse_format\b"), "text.format"),
    (re.compile(r"\bmax_(?:completion_)?tokens\b"), "max_output_tokens"),
    (re.compile(r"\bmessages (must|have)\b"), r"input \1"),
    (re.compile(r'"function": \{("name": \.\.\.)\}'), r"\1"),
    (re.compile("; to have it continued, set continue_final_message"), ""),
)


class ChatForm:
    """The chat request that stands for ``request``.

    Raises ``ApiError`` or ``ValueError`` for what has no place in one.
    """

    def __init__(self, request: ResponsesRequest) -> None:
        request.check()
        self._origins: list[tuple[str, str]] = []  # of each message: the item's name and kind
        self._messages: list[dict[str, Any]] = []
        if request.instructions is not None:
            self._add("instructions", "text", {"role": "system", "content": request.instructions})
        if isinstance(request.input, str):
            self._add("input", "text", {"role": "user", "content": request.input})
        else:
            for index, item in enumerate(request.input):
                self._add_item(f"input[{index}]", item)
        shared = {name: getattr(request, name) for name in SamplingRequest.model_fields}
        self._is_schema = False
        self.request = ChatRequest(
            **shared,
            messages=self._messages,
            max_completion_tokens=request.max_output_tokens,
            logprobs=request.has_logprobs,
            top_logprobs=request.top_logprobs if request.has_logprobs else None,
            tools=[_tool(tool, f"tools[{i}]") for i, tool in enumerate(request.tools or ())] or None,
            tool_choice=_tool_choice(request.tool_choice),
            parallel_tool_calls=request.parallel_tool_calls,
            response_format=self._response_format(request),
            system_placement=request.system_placement,
            chat_template=request.chat_template,
            chat_template_kwargs=request.chat_template_kwargs,
        )

    def renamed(self, text: str) -> str:
        """An error's text, or the name of a field, in the words of this API.

        What stands after "got" is the client's own.
        """
        head, got, rest = text.partition(", got ")

        def place(match: re.Match[str]) -> str:
            name, kind = self._origins[int(match[1])] if int(match[1]) < len(self._origins) else ("input", "message")
            path = match[2]
            for theirs, ours in _PLACES[kind].items():
                if path.startswith(theirs):
                    return name + ours + path[len(theirs) :]
            return name + path

        head = re.sub(r"\bmessages\[(\d+)\]((?:\.[a-z_]+|\[\d+\])*)", place, head)
        for pattern, ours in _RENAMED:
            head = pattern.sub(ours, head)
        if self._is_schema:
            head = head.replace("structured_outputs.json", "text.format.schema")
        return (head if head != "messages" else "input") + got + rest

    def _add(self, name: str, kind: str, message: dict[str, Any]) -> None:
        self._origins.append((name, kind))
        self._messages.append(message)

    def _add_item(self, name: str, item: Mapping[str, Any]) -> None:
        kind = "message" if asks_nothing(item.get("type")) else item["type"]
        if not isinstance(kind, str) or kind not in _ITEM_KEYS:
            known = ", ".join(_ITEM_KEYS)
            raise ApiError(
                400,
                f"{name}.type {kind!r} is not supported; it takes {known}",
                param=f"{name}.type",
                code="unsupported_parameter",
            )
        refuse_unknown(item, _ITEM_KEYS[kind], name, f"an item of type {kind}")
        if kind == "message":
            role = item.get("role")
            if role not in _ROLES:
                raise ApiError(
                    400, f"{name}.role must be one of {', '.join(_ROLES)}, got {role!r}", param=f"{name}.role"
                )
            content = _content(item.get("content"), f"{name}.content")
            self._add(name, kind, {"role": role, "content": content})
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"type": "function", "id": item.get("call_id"), "function": function}
            self._add(name, kind, {"role": "assistant", "tool_calls": [call]})
        else:
            output = _content(item.get("output"), f"{name}.output")
            self._add(name, kind, {"role": "tool", "tool_call_id": item.get("call_id"), "content": output})

    def _response_format(self, request: ResponsesRequest) -> dict[str, Any] | None:
        form = None if request.text is None else request.text.format
        if form is not None and form.get("type") in ("text", "json_object"):
            refuse_unknown(form, {"type"}, "text.format", f"a format of type {form['type']}")
        if form is None or form.get("type") != "json_schema":
            return form
        refuse_unknown(
            form, {"type", "name", "schema", "strict", "description"}, "text.format", "a format of type json_schema"
        )
        name = form.get("name")
        if not isinstance(name, str) or re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) is None:
            raise ApiError(
                400,
                f"text.format.name must be 1 to 64 letters, digits, _ and -, got {name!r}",
                param="text.format.name",
            )
        self._is_schema = True
        return {"type": "json_schema", "json_schema": {key: value for key, value in form.items() if key != "type"}}


def _content(content: object, name: str) -> str | list[dict[str, str]]:
    """A string, or a list of parts as the chat route has them."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(400, f"{name} must be a string or a list of text parts, got {content!r}", param=name)
    parts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        key = "refusal" if kind == "refusal" else "text"
        if not isinstance(part, Mapping) or kind not in (*_TEXT_PARTS, "refusal"):
            what = f"a part of type {kind!r}" if kind is not None else repr(part)
            raise ApiError(
                400,
                f"{name}[{index}] must be of type input_text or output_text: the model reads text only, got {what}",
                param=f"{name}[{index}]",
            )
        if not isinstance(part.get(key), str):
            raise ApiError(
                400,
                f"{name}[{index}].{key} must be a string, got {part.get(key)!r}",
                param=f"{name}[{index}].{key}",
            )
        refuse_unknown(part, _PART_KEYS, f"{name}[{index}]", "a text part")
        parts.append({"type": "text", "text": part[key]})
    return parts


def _tool(tool: Mapping[str, Any], name: str) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise ApiError(
            400,
            f'{name}.type must be "function": there are no built-in tools, got {tool.get("type")!r}',
            param=f"{name}.type",
            code="unsupported_parameter",
        )
    direct = {"allowed_callers": ["direct"], "defer_loading": False, "async": False}
    given = {
        key: value
        for key, value in tool.items()
        if key not in direct or value != direct[key] or type(value) is not type(direct[key])
    }
    refuse_unknown(given, _TOOL_KEYS, name, "a function")
    return {
        "type": "function",
        "function": {key: value for key, value in given.items() if key in _TOOL_KEYS - {"type"}},
    }


def _tool_choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    if choice is None or isinstance(choice, str):
        return choice
    kind = choice.get("type")
    if kind == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    if kind == "allowed_tools":
        tools = choice.get("tools")
        if isinstance(tools, list):
            tools = [_allowed(tool) for tool in tools]
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode"), "tools": tools}}
    raise ApiError(
        400,
        f"tool_choice.type must be function or allowed_tools: there are no built-in tools, got {kind!r}",
        param="tool_choice.type",
        code="unsupported_parameter",
    )


def _allowed(tool: object) -> object:
    if isinstance(tool, Mapping) and tool.get("type") == "function":
        return {"type": "function", "function": {"name": tool.get("name")}}
    return tool

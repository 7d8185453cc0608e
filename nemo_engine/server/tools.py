"""What a request wants of its tools: which of them the answer may, must or must not call, and the grammar that makes it
so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_engine.server.errors import ApiError
from nemo_engine.server.protocol import ChatRequest
from nemo_engine.structured_outputs import StructuredOutputsParams
from nemo_engine.text import Renderer
from nemo_engine.text.call_styles import CallStyle
from nemo_engine.text.grammar import check_schema
from nemo_engine.text.tools import ToolChoice, check_tool_choice, check_tools


@dataclass(frozen=True, slots=True)
class ToolUse:
    """``is_on``: calls are looked for in the answer. ``parallel``: more than one call may be made."""

    is_on: bool
    parallel: bool
    choice: ToolChoice
    tools: tuple[Mapping[str, Any], ...]  # as they were sent
    style: CallStyle | None  # how calls are written, None where tools are not taken

    @classmethod
    def of(cls, request: ChatRequest, renderer: Renderer) -> ToolUse:
        """Read ``tools``, ``tool_choice`` and ``parallel_tool_calls``; ``ValueError`` or ``ApiError`` for what does not
        fit.
        """
        tools = check_tools(request.tools) if request.tools else None
        choice = check_tool_choice(request.tool_choice, tools)
        if tools and renderer.no_tools is not None:
            raise ApiError(400, renderer.no_tools, param="tools")
        if choice.mode == "required" and request.continue_final_message:
            raise ApiError(400, "tool_choice that forces a call excludes continue_final_message", param="tool_choice")
        is_named = isinstance(request.tool_choice, Mapping) and request.tool_choice["type"] == "function"
        parallel = request.parallel_tool_calls is not False and not is_named  # a function by name means one call of it
        return cls(choice.mode != "none", parallel, choice, tuple(request.tools or ()), renderer.calls)

    @property
    def is_forced(self) -> bool:
        """Whether the answer is calls and nothing else: its prompt then ends with the beginning of one."""
        return self.choice.mode == "required"

    def shown(self) -> list[dict[str, Any]] | None:
        """The tools that stand in the prompt: all, but those alone that may be called where no grammar sees to it."""
        if not self.is_on:
            return None
        return [dict(tool) for tool in self.tools if self.is_forced or tool["function"]["name"] in self.choice.names]

    def structured_outputs(self, options: object | None) -> object | None:
        """The form of the answer: that of the calls if calls are forced, else what the request asks for, or calls if it
        may make some.

        ``asked`` is the form of text, of which an answer of forced calls has none.
        """
        if self.is_forced:
            assert self.style is not None
            return self.style.forced(self.tools, self.choice.names, self.parallel)
        if not self.is_on or options is None:
            return options
        form = StructuredOutputsParams.of(options)
        schema = _answer_schema(form)
        if schema is None:
            return form  # expressions and grammars mean the whole answer
        assert self.style is not None
        return self.style.optional(self.tools, self.choice.names, self.parallel, schema)

    def has_grammar(self, options: object | None) -> bool:
        """Whether the form of the answer is made of the tools' parameters."""
        return self.is_forced or (self.is_on and options is not None)

    def blamed(self, message: str, options: object | None) -> str:
        """``message``, an error of what ``structured_outputs`` made, with the tool or the part of ``asked`` whose fault
        it is.
        """
        for index, tool in enumerate(self.tools):
            if tool["function"]["name"] in self.choice.names:
                wrong = _fault(tool["function"].get("parameters") or {})
                if wrong:
                    return f"tools[{index}].function.parameters: {wrong}"
        if not self.is_forced:
            try:
                schema = _answer_schema(StructuredOutputsParams.of(options))
            except ValueError as error:
                return str(error)
            if schema is None:
                return message
            wrong = _fault(schema)
            if wrong:
                return f"structured_outputs.json: {wrong}"
        return re.sub(r"structured_outputs\.\w+", "tools: the schema of all calls", message, count=1)


def _answer_schema(form: StructuredOutputsParams) -> dict[str, Any] | None:
    """The JSON schema that ``form`` asks for, None if it asks for something else."""
    if form.json is not None:
        schema: dict[str, Any] = json.loads(str(form.json))
        return schema
    return {"type": "object"} if form.json_object else None


def _fault(schema: Mapping[str, Any]) -> str:
    """What is wrong with ``schema`` by itself, "" if nothing that shows before it is compiled."""
    try:
        check_schema(schema)
    except ValueError as error:
        return str(error)
    return ""

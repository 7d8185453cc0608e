"""What schemathesis is told of the rules that JSON Schema cannot say (``server/openapi.py``): cases that break them
are not sent as valid.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import schemathesis
from hypothesis import strategies

schemathesis.openapi.format("rust-regex", strategies.sampled_from(["a|b", "[0-9]{1,3}", "é+"]))
schemathesis.openapi.format("lark", strategies.sampled_from(['start: "a" | "b"', "start: /[0-9]+/", 'root ::= "a"']))


@schemathesis.hook
def map_case(_: Any, case: Any) -> Any:
    """To JSON Schema 1.0 is an integer, here it is none: whole numbers are written without a point.

    No time-out ends a request.
    """
    case.body = _whole(case.body)
    if isinstance(case.body, dict) and type(case.body.get("timeout")) in (int, float) and case.body["timeout"] > 0:
        case.body["timeout"] = 60
    return case


@schemathesis.hook
def filter_case(_: Any, case: Any) -> bool:
    """Whether a case is what it is meant to be, valid or not."""
    is_valid = case.meta is None or case.meta.generation.mode.is_positive
    return not (is_valid and isinstance(case.body, dict) and any(_broken(case.body)))


def _whole(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_whole(one) for one in value]
    return {key: _whole(one) for key, one in value.items()} if isinstance(value, dict) else value


def _broken(body: dict[str, Any]) -> Iterator[bool]:
    """Whether ``body`` breaks each rule."""
    n = body.get("n") or 1
    most = body.get("max_tokens") or body.get("max_completion_tokens") or body.get("max_output_tokens") or 4
    yield (body.get("min_tokens") or 0) > most
    ids = body.get("logprob_token_ids")
    asked = (
        body.get("logprobs") if "prompt" in body else body.get("top_logprobs") or (0 if body.get("logprobs") else None)
    )
    yield ids is not None and asked is not None and asked != len(set(ids))
    rule = body.get("repetition_detection") or {}
    sizes = rule.get("max_pattern_size", 0), rule.get("min_pattern_size", 0)
    yield sizes[0] > 0 and (sizes[1] > sizes[0] or rule.get("min_count", 0) < 2)
    prompts = (
        body["prompt"] if isinstance(body.get("prompt"), list) and isinstance(body["prompt"][0], (str, list)) else [0]
    )
    yield n * len(prompts) > 128
    yield n > 1 and body.get("temperature") is not None and body["temperature"] < 1e-5
    form = body.get("structured_outputs") or body.get("response_format") or (body.get("text") or {}).get("format")
    yield bool(form) and bool(body.get("allowed_token_ids"))  # which may have no token that the form takes
    yield from _broken_by_tools(body)
    items = body.get("messages") or body.get("input")
    if isinstance(items, list):
        yield from _broken_by_turns(body, items)


def _broken_by_tools(body: dict[str, Any]) -> Iterator[bool]:
    names = [tool.get("function", tool)["name"] for tool in body.get("tools") or ()]
    yield len(set(names)) < len(names)
    choice = body.get("tool_choice")
    if isinstance(choice, dict):
        choice = choice.get("allowed_tools", choice)
        chosen = choice.get("tools", [choice])
        yield not {one.get("function", one)["name"] for one in chosen} <= set(names)


def _broken_by_turns(body: dict[str, Any], items: list[dict[str, Any]]) -> Iterator[bool]:
    turns = [_turn(item) for item in items]
    waiting: list[str] = []
    before = ""
    for role, calls, answered in turns:
        if role == "tool":
            yield answered not in waiting
            waiting = [call for call in waiting if call != answered]
        elif role == "assistant":
            waiting = (waiting if before == "assistant" else []) + calls
        elif role == "user":
            waiting = []
        before = before if role == "system" else role
    ends = [index for index, turn in enumerate(turns) if turn[0] != "system"]
    end = ends[-1] if ends else 0
    yield any(item.get("prefix") for item in items[:end] + items[end + 1 :])
    role, calls, _ = turns[end]
    is_continued = body.get("continue_final_message") or items[end].get("prefix")
    is_open = "input" in body or body.get("add_generation_prompt") is not False
    yield bool(is_continued) and (role != "assistant" or bool(calls))
    yield role == "assistant" and not is_continued and is_open
    yield (
        role == "assistant"
        and isinstance(body.get("tool_choice"), (str, dict))
        and body["tool_choice"] not in ("auto", "none")
    )
    if body.get("strict"):
        yield True  # its rules are those of the model's template


def _turn(item: dict[str, Any]) -> tuple[str, list[str], str]:
    """(role, ids of its calls, id of the call that it answers)."""
    kind = item.get("type")
    if kind == "function_call":
        return "assistant", [item["call_id"]], ""
    if kind == "function_call_output":
        return "tool", [], item["call_id"]
    role = "system" if item["role"] == "developer" else item["role"]
    calls = [call["id"] for call in item.get("tool_calls") or ()] if role == "assistant" else []
    return role, calls, item.get("tool_call_id", "") if role == "tool" else ""

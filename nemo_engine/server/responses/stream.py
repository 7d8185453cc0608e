"""The events of a streamed response: what was added, what grew, what is done, each with its number."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from nemo_engine.outputs import CompletionOutput
from nemo_engine.server.errors import ApiError, api_error
from nemo_engine.server.generation import raise_failure
from nemo_engine.server.responses.output import Run, call_item, message_item, new_item_id, status_of, text_part
from nemo_engine.server.sse import named_event
from nemo_engine.text.tool_calls import ArgumentsDelta, CallFinished, CallStarted, Content, Event


async def stream(run: Run) -> AsyncIterator[bytes]:
    """All events.

    The first waits for the first output, so what is refused before it raises; what fails later is an event.
    """
    events = _Events(run)
    outputs = run.chat.generation.outputs()
    has_begun = False
    status = "completed"
    try:
        async for _, output in outputs:
            raise_failure(output)
            if not has_begun:
                has_begun = True
                for event in events.begin():
                    yield event
            for completion in output.outputs:
                parsed = events.parse(completion.text, completion.tool_calls_start, completion.finished())
                for event in events.add(parsed, events.logprobs(completion)):
                    yield event
                status = status_of(completion)
        for event in events.end(status):
            yield event
    except Exception as error:
        if not has_begun:
            raise
        yield events.failed(api_error(error))
    finally:
        await outputs.aclose()  # type: ignore[attr-defined]


class _Events:
    """The output items so far, of which the last may be open, and the events that made them."""

    def __init__(self, run: Run) -> None:
        self.output: list[dict[str, Any]] = []
        self._run = run
        self._number = 0
        self._parser = run.chat.parser() if run.chat.tools.is_on else None
        self._is_open = False
        self._pieces: list[str] = []  # of the open item's text or arguments
        self._logprobs: list[dict[str, Any]] = []  # of tokens whose text has not come yet
        self._is_past_text = False

    def event(self, kind: str, **data: Any) -> bytes:
        """One event."""
        self._number += 1
        return named_event(kind, {"type": kind, "sequence_number": self._number - 1} | data)

    def begin(self) -> list[bytes]:
        """In front of all output."""
        response = self._run.response("in_progress", [], is_over=False)
        return [self.event(f"response.{kind}", response=response) for kind in ("created", "in_progress")]

    def parse(self, text: str, tool_calls_start: int | None, is_finished: bool) -> list[Event]:
        """What a delta adds to the answer."""
        if self._parser is None:
            return [Content(text)] if text else []
        parsed = self._parser.feed(text, tool_calls_start)
        if is_finished:
            parsed += self._parser.finish()
        if not self._run.chat.tools.parallel:
            parsed = [part for part in parsed if isinstance(part, Content) or part.index == 0]
        return parsed

    def logprobs(self, completion: CompletionOutput) -> list[dict[str, Any]]:
        """The log-probabilities of a delta's tokens that are text."""
        if self._is_past_text:
            return []
        entries = self._run.logprobs(completion)
        self._is_past_text = len(self._run.text_tokens(completion.token_ids)) < len(completion.token_ids)
        return entries

    def add(self, parsed: list[Event], logprobs: list[dict[str, Any]]) -> list[bytes]:
        """The events of ``parsed``."""
        events: list[bytes] = []
        self._logprobs += logprobs
        for part in parsed:
            if isinstance(part, Content):
                events += self._add_text(part.text)
            elif isinstance(part, CallStarted):
                events += self._close("completed")
                item = call_item(new_item_id("fc"), part.id, part.name, "", "in_progress")
                events.append(self._open(item))
            elif isinstance(part, ArgumentsDelta):
                self._pieces.append(part.text)
                events.append(self._of_item("response.function_call_arguments.delta", delta=part.text))
            else:
                assert isinstance(part, CallFinished)
                events += self._close("completed" if part.is_complete else "incomplete")
        return events

    def end(self, status: str) -> list[bytes]:
        """Behind all output. Only the last item can be incomplete; if there is none, it is an empty message."""
        events = [] if self.output else self._add_text("")
        item_status = "completed" if status == "completed" else "incomplete"
        events += self._close(item_status)
        last = "response.completed" if status == "completed" else "response.incomplete"
        return [*events, self.event(last, response=self._run.response(status, self.output))]

    def failed(self, error: ApiError) -> bytes:
        """The last event when something went wrong."""
        if self._is_open:
            self._settle("incomplete")
        return self.event("response.failed", response=self._run.response("failed", self.output, error))

    def _add_text(self, text: str) -> list[bytes]:
        events = []
        if not self._is_open:
            events.append(self._open(message_item(new_item_id("msg"), "in_progress")))
            part = text_part("", [])
            self.output[-1]["content"].append(part)
            events.append(self._of_item("response.content_part.added", content_index=0, part=part))
        logprobs, self._logprobs = self._logprobs, []
        self._pieces.append(text)
        self.output[-1]["content"][0]["logprobs"] += logprobs
        if text:
            event = self._of_item("response.output_text.delta", content_index=0, delta=text, logprobs=logprobs)
            events.append(event)
        return events

    def _open(self, item: dict[str, Any]) -> bytes:
        self.output.append(item)
        self._is_open, self._pieces = True, []
        return self.event("response.output_item.added", output_index=len(self.output) - 1, item=item)

    def _close(self, status: str) -> list[bytes]:
        if not self._is_open:
            return []
        self._settle(status)
        item = self.output[-1]
        if item["type"] == "message":
            part = item["content"][0]
            events = [
                self._of_item(
                    "response.output_text.done", content_index=0, text=part["text"], logprobs=part["logprobs"]
                ),
                self._of_item("response.content_part.done", content_index=0, part=part),
            ]
        else:
            done = {"name": item["name"], "arguments": item["arguments"]}
            events = [self._of_item("response.function_call_arguments.done", **done)]
        return [*events, self.event("response.output_item.done", output_index=len(self.output) - 1, item=item)]

    def _settle(self, status: str) -> None:
        """Put together what came of the open item."""
        self._is_open = False
        item = self.output[-1]
        item["status"] = status
        if item["type"] == "message":
            part = item["content"][0]
            part["text"] = "".join(self._pieces)
            part["logprobs"] += self._logprobs
            self._logprobs = []
        else:
            item["arguments"] = "".join(self._pieces)

    def _of_item(self, kind: str, **data: Any) -> bytes:
        return self.event(kind, item_id=self.output[-1]["id"], output_index=len(self.output) - 1, **data)

"""``Engine``: the whole engine in one object and one process, for offline use and for embedding.

The caller's thread runs the steps.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_engine.engine.base import BaseEngine, PreparedRequest
from nemo_engine.engine.input_processor import EncodedPrompt, Message, Params, Prompt
from nemo_engine.option_names import refuse_unknown_arguments
from nemo_engine.outputs import RequestOutput
from nemo_engine.sampling_params import RequestOutputKind, SamplingParams
from nemo_engine.text import SystemPlacement

if TYPE_CHECKING:
    from nemo_engine.batch.run import BatchSummary


class Engine(BaseEngine):
    """Generates text or token ids with one model.

    ``model`` is a directory (Hugging Face or Mistral format), a Hub repository id, or "nemo-tiny", the bundled model.
    ``options`` are the fields of ``EngineConfig``; an unknown one is a ``ValueError`` that says what to use.

    Methods may be called from any thread; calls of several threads share the steps. Use it as a context manager, or
    call ``close()``, to give all memory back.
    """

    def __init__(self, model: str | Path, **options: Any) -> None:
        super().__init__(model, **options)
        self._labels = itertools.count()
        self._ready: list[RequestOutput] = []  # outputs for requests of add_request; the next step() returns them

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        *,
        progress: bool = False,
        **unknown: Any,
    ) -> list[RequestOutput]:
        """Complete one prompt or a list of them; returns the final outputs in the order of the prompts.

        A prompt is a string, ``{"prompt": str}`` or ``{"prompt_token_ids": [...]}``. ``sampling_params`` is one for all
        or one per prompt. ``progress`` shows a bar. Raises ``ValueError`` for bad input before anything is computed; a
        request that fails while it runs has finish reason "error", and the others are not disturbed.
        """
        refuse_unknown_arguments(self.generate, unknown)
        encoded = self.inputs.encode_all(prompts)
        params = self.inputs.params_per_prompt(sampling_params, len(encoded), is_chat=False)
        return self._finals(encoded, params, progress)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        strict: bool = False,
        system_placement: SystemPlacement = "last",
        progress: bool = False,
        **unknown: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation (a list of messages) or a list of them; returns the final outputs in that order.

        Messages are OpenAI's: ``{"role": "user", "content": "..."}``. The default temperature is 0.3, as NeMo's makers
        recommend, and without ``sampling_params`` an answer has at most 1024 tokens. ``strict`` refuses what the
        official template refuses, rather than merging neighbouring messages of one role. ``system_placement`` "first"
        puts system text and tools in front of the first user message rather than the last, so that the prefix stays
        cached from turn to turn.

        ``chat_template``, the text of a Jinja template, serves this call instead of the model's. A template is code: it
        is run, within limits. A template may also read ``documents`` and ``chat_template_kwargs``; if it does not, they
        are refused. The tokens that end a turn in the template end an answer.
        """
        refuse_unknown_arguments(self.chat, unknown)
        encoded = self.inputs.encode_conversations(
            messages,
            tools=tools,
            documents=documents,
            chat_template=chat_template,
            chat_template_kwargs=chat_template_kwargs,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            strict=strict,
            system_placement=system_placement,
        )
        return self._finals(encoded, self.chat_params(encoded, sampling_params), progress)

    def stream(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: Params = None, **unknown: Any
    ) -> Iterator[RequestOutput]:
        """Like ``generate``, but yields deltas as they come; those of several prompts are interleaved.

        ``request_id`` is the index of the prompt in the list, as text. The texts of one completion, joined, equal its
        final text. Dropping the iterator aborts what is unfinished.
        """
        refuse_unknown_arguments(self.stream, unknown)
        encoded = self.inputs.encode_all(prompts)
        return self._stream(encoded, self.inputs.params_per_prompt(sampling_params, len(encoded), is_chat=False))

    def stream_chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        strict: bool = False,
        system_placement: SystemPlacement = "last",
        **unknown: Any,
    ) -> Iterator[RequestOutput]:
        """Like ``chat``, but yields deltas as ``stream`` does."""
        refuse_unknown_arguments(self.stream_chat, unknown)
        encoded = self.inputs.encode_conversations(
            messages,
            tools=tools,
            documents=documents,
            chat_template=chat_template,
            chat_template_kwargs=chat_template_kwargs,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            strict=strict,
            system_placement=system_placement,
        )
        return self._stream(encoded, self.chat_params(encoded, sampling_params))

    def batch(
        self,
        source: str | Path,
        target: str | Path,
        sampling_params: SamplingParams | Mapping[str, Any] | None = None,
        *,
        served_model_name: str | Sequence[str] | None = None,
        force: bool = False,
        progress: bool = False,
        **unknown: Any,
    ) -> BatchSummary:
        """Answer a file of requests, one line of JSON each, into ``target``. A run that was cut off goes on where it
        stopped.

        A line is OpenAI's (``custom_id``, ``method``, ``url``, ``body``), a workload's, or ``{"prompt": ...}`` or
        ``{"messages": ...}`` with any field of the route's body. Results are appended as they come. A request that
        fails is written to ``target``.errors, with line and reason, and the others go on. Memory does not grow with the
        file. "-" is standard input or output. Gzip is read wherever it is found, and written if ``target`` ends in .gz.

        ``sampling_params`` serve requests that do not set their own. ``served_model_name`` are the names that lines may
        use for the model, in place of the one that the engine was made with. A run that goes on must have the options
        of the first run, unless ``force``. ``progress`` shows a bar. Raises ``ValueError`` for other options and for
        files that cannot be used, ``OSError`` where there is no room. Needs the extra ``server``.
        """
        refuse_unknown_arguments(self.batch, unknown)
        from nemo_engine.server.batch.answers import batch_of_engine

        return batch_of_engine(
            self, source, target, sampling_params, names=served_model_name, force=force, progress=progress
        )

    def add_request(
        self, request_id: str, prompt: Prompt, sampling_params: SamplingParams | None = None, *, priority: int = 0
    ) -> None:
        """Queue one request; its outputs come from ``step()``, as ``sampling_params.output_kind`` says.

        Raises ``ValueError`` for bad input, an id that an unfinished request of ``add_request`` has, or a request that
        could never finish.
        """
        if not isinstance(request_id, str) or not request_id:
            raise ValueError(f"request_id must be a non-empty string, got {request_id!r}")
        params = self.inputs.effective_params(sampling_params)
        encoded = self.inputs.encode(prompt)
        self.submit(self.prepare(request_id, encoded, params, params.output_kind, self._ready, priority))

    def step(self) -> list[RequestOutput]:
        """Run one step for all requests; returns the new outputs of those that ``add_request`` queued."""
        with self._lock:
            self.advance()
            ready, self._ready[:] = self._ready[:], []
            return ready

    def has_unfinished_requests(self) -> bool:
        """Whether ``step()`` still has something to do or to return."""
        with self._lock:
            return bool(self._ready) or self.has_work()

    def _finals(
        self, prompts: list[EncodedPrompt], params: list[SamplingParams], progress: bool
    ) -> list[RequestOutput]:
        sinks, prepared = self._prepare_all(prompts, params, RequestOutputKind.FINAL_ONLY)
        try:
            self._submit_all(prepared)
            with _ProgressBar(len(prepared) if progress else 0) as bar:
                while not all(sinks):
                    self.advance()
                    bar.update(sum(map(bool, sinks)))
        finally:
            self._end_unfinished(prepared)
        return [sink[0] for sink in sinks]

    def _stream(self, prompts: list[EncodedPrompt], params: list[SamplingParams]) -> Iterator[RequestOutput]:
        self._check_open()
        for index, (prompt, request_params) in enumerate(zip(prompts, params, strict=True)):
            with _naming_the_prompt(index, len(prompts)):
                self.check_fits(prompt, request_params)
        return self._deltas(prompts, params)

    def _deltas(self, prompts: list[EncodedPrompt], params: list[SamplingParams]) -> Iterator[RequestOutput]:
        # Queued at the first next(): an iterator that is never started would otherwise never be aborted.
        sinks, prepared = self._prepare_all(prompts, params, RequestOutputKind.DELTA)
        unfinished = set(range(len(sinks)))
        try:
            self._submit_all(prepared)
            while unfinished:
                self.advance()
                for index, sink in enumerate(sinks):
                    while sink:
                        output = sink.pop(0)
                        output.request_id = str(index)
                        if output.finished:
                            unfinished.discard(index)
                        yield output
        finally:
            self._end_unfinished(prepared)

    def _prepare_all(
        self, prompts: list[EncodedPrompt], params: list[SamplingParams], kind: RequestOutputKind
    ) -> tuple[list[list[RequestOutput]], list[PreparedRequest]]:
        """A sink and a checked request for each prompt. The ids are labels, which nobody looks up."""
        self._check_open()
        sinks: list[list[RequestOutput]] = [[] for _ in prompts]
        prepared = []
        for index, (prompt, request_params, sink) in enumerate(zip(prompts, params, sinks, strict=True)):
            label = str(next(self._labels))
            with _naming_the_prompt(index, len(prompts)):
                prepared.append(self.prepare(label, prompt, request_params, kind, sink, is_named=False))
        return sinks, prepared

    def _submit_all(self, prepared: list[PreparedRequest]) -> None:
        with self._lock:
            for request in prepared:
                self.submit(request)

    def _end_unfinished(self, prepared: list[PreparedRequest]) -> None:
        """End the requests that are unfinished, and finish the steps in flight if no other request is left."""
        with self._lock:
            self.withdraw(prepared)
            while not self._is_closed and len(self._outputs) == 0 and self.has_work():
                self.advance()


@contextmanager
def _naming_the_prompt(index: int, count: int) -> Iterator[None]:
    """A ``ValueError`` from inside gets the name of the prompt in front, if there are several."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"prompts[{index}]: {error}" if count > 1 else str(error)) from None


class _ProgressBar:
    """A tqdm bar over finished requests; ``total`` 0 shows none."""

    def __init__(self, total: int) -> None:
        self._bar: Any = None
        if total:
            try:
                from tqdm.auto import tqdm
            except ImportError:
                warnings.warn("progress needs tqdm: pip install 'nemo-engine[progress]'", stacklevel=4)
            else:
                self._bar = tqdm(total=total, desc="requests", unit="request")

    def __enter__(self) -> _ProgressBar:
        return self

    def update(self, num_done: int) -> None:
        if self._bar is not None and num_done > self._bar.n:
            self._bar.update(num_done - self._bar.n)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

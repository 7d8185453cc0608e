"""Plays a case on an engine and holds everything that comes out, and everything that stays behind, to the reference."""

from __future__ import annotations

import base64
import codecs
import gc
import json
import os
import random
import re
import sys
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import random_state_dict, write_hf, write_mistral
from fuzz.cases import TOKENS, EngineCase, ModelCase, RequestCase
from fuzz.reference import Model, Sequence64, complaint, edited, log_softmax
from numpy.typing import NDArray

import nemo_engine
from nemo_engine import CompletionOutput, Engine, Logprob, RequestOutput, RequestOutputKind, SamplingParams
from nemo_engine.outputs import NO_TOKEN_LEFT
from nemo_engine.scheduler import Request
from nemo_engine.scheduler.invariants import check

TEKKEN = Path(nemo_engine.__file__).parent / "assets" / "nemo-tiny" / "tekken.json"
# By the engine's dtype: to within how much of the largest logit (and 1) its logits and its keys and values are known.
SLACK = {"float64": 1e-8, "float32": 2e-4, "bfloat16": 0.12}


class Wrong(AssertionError):
    """An engine did what the reference does not."""


class PlantedError(RuntimeError):
    """Raised on purpose in the middle of a step."""


class PlantedInterrupt(KeyboardInterrupt):
    """Raised on purpose in the middle of a step."""


@cache
def vocabulary() -> list[bytes]:
    """The bytes of each id of the bundled tokenizer; control tokens have none in a text."""
    data = json.loads(TEKKEN.read_bytes())
    special = data["config"]["default_num_special_tokens"]
    return [b""] * special + [base64.b64decode(entry["token_bytes"]) for entry in data["vocab"]][: TOKENS - special]


@cache
def grammar_mask(form: str, text: bytes, vocab: int, eos: tuple[int, ...]) -> NDArray[np.bool_]:
    """What may follow ``text`` by the choice or the expression in ``form``, token by token."""
    wanted = json.loads(form)
    if "choice" in wanted:
        choices = [choice.encode() for choice in wanted["choice"]]

        def may_begin(data: bytes) -> bool:
            return any(choice.startswith(data) for choice in choices)

        is_whole = text in choices
    else:
        letters, least, most = re.fullmatch(r"(\[.*\])\{(\d+),(\d+)\}", wanted["regex"]).groups()  # type: ignore[union-attr]

        def may_begin(data: bytes) -> bool:
            return re.fullmatch(f"{letters}{{0,{most}}}".encode(), data) is not None

        is_whole = re.fullmatch(f"{letters}{{{least},{most}}}".encode(), text) is not None
    allowed = np.zeros(vocab, bool)
    for token, data in enumerate(vocabulary()[:vocab]):
        allowed[token] = bool(data) and token not in eos and may_begin(text + data)
    allowed[list(eos)] = is_whole
    return allowed


class Reader:
    """The text of one completion, token by token, and the stop string that ends it."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self.text = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._count = 0

    def take(self, token: int) -> str | None:
        """Add a token; returns the stop string that it completed, by which the text is then cut."""
        before = len(self.text)
        self._count += 1
        self.text += self._decoder.decode(vocabulary()[token] if token < TOKENS else b"")
        if self._count <= self.params.min_tokens or len(self.text) == before:
            return None
        found = []
        for place, stop in enumerate(self.params.stop or ()):
            start = self.text.find(stop, max(0, before - len(stop) + 1))
            if start >= 0:
                found.append((start + len(stop), place, stop))
        if not found:
            return None
        end, _, stop = min(found)
        self.text = self.text[: end if self.params.include_stop_str_in_output else end - len(stop)]
        return stop

    def finish(self) -> None:
        self.text += self._decoder.decode(b"", final=True)


class Player:
    """One case, played. ``counts`` say what it came across."""

    def __init__(self, case: EngineCase, model: Model, path: Path) -> None:
        self.case = case
        self.model = model
        self.counts: Counter[str] = Counter()
        options = dict(case.options)
        self.text = case.model.text
        self.engine = Engine(path, device="cpu", skip_tokenizer_init=not self.text, **options)
        self.num_pages, self.page_size = options["num_kv_pages"], options["page_size"]
        self.limit = min(options["max_model_len"], self.num_pages * self.page_size + 1)
        self.slack = SLACK[options["dtype"]]
        self.is_kv_fp8 = options["kv_cache_dtype"] == "fp8"
        self.requests: dict[int, list[Request]] = {}  # of the scheduler, by index of their case
        self.outputs: dict[int, list[RequestOutput]] = {}
        self.active: dict[str, RequestCase] = {}
        self.may_fail: set[int] = set()  # that were there when something broke on purpose
        self.aborted: set[int] = set()
        self.num_steps = 0
        self.is_dead = False
        self._is_armed = False  # what was planted has yet to happen
        self._undo: Callable[[], None] | None = None

    # ---- playing

    def play(self) -> None:
        """Run it all, then check it all."""
        try:
            self._run()
            self._check_all()
        finally:
            self._restore()
            self.engine.close()

    def _run(self) -> None:
        waiting = sorted(self.case.requests, key=lambda one: (one.arrival, one.index))
        work = sum(len(one.prompt) + 100 for one in waiting) * 3 + 200
        while (waiting or self.engine.has_unfinished_requests()) and not self.is_dead:
            while waiting and waiting[0].arrival <= self.num_steps:
                self._add(waiting.pop(0))
            for name, one in list(self.active.items()):
                if one.abort is not None and self.num_steps >= one.arrival + one.abort:
                    self.counts["aborts"] += 1
                    self.aborted.add(one.index)
                    try:
                        self.engine.abort(name)
                        one.abort = None
                    except (PlantedError, PlantedInterrupt):
                        pass  # it is tried again after the next step
            self._step()
            self.num_steps += 1
            if self.num_steps > work:
                raise Wrong("no progress")

    def _add(self, one: RequestCase) -> None:
        params = SamplingParams(**one.params)
        prompt: dict[str, Any] = {"prompt_token_ids": one.prompt}
        if one.salt is not None:
            prompt["cache_salt"] = one.salt
        reasons = []
        if one.name in self.active:
            reasons.append("in use")
        if len(one.prompt) + (1 if params.max_tokens is None else params.max_tokens) > self.limit:
            reasons.append("a prompt of")
        prepare = self.engine.prepare

        def prepare_and_keep(*args: Any) -> Any:
            prepared = prepare(*args)
            self.requests[one.index] = [completion.request for completion in prepared.user.completions]
            return prepared

        self.engine.prepare = prepare_and_keep  # type: ignore[method-assign]
        try:
            self.engine.add_request(one.name, prompt, params, priority=one.priority)
        except ValueError as error:
            if not any(reason in str(error) for reason in reasons):
                raise Wrong(f"request {one.index} is refused: {error}") from error
            self.requests.pop(one.index, None)
            self.counts["refused"] += 1
            return
        finally:
            self.engine.prepare = prepare  # type: ignore[method-assign]
        if reasons:
            raise Wrong(f"request {one.index} is taken though {reasons}")
        self.active[one.name] = one
        self.outputs[one.index] = []
        self.counts["requests"] += 1

    def _step(self) -> None:
        if self.case.fault is not None and self.case.fault[1] == self.num_steps:
            self._is_armed = True
            self._plant(self.case.fault[0])
        if self._is_armed:
            self.may_fail |= {one.index for one in self.active.values()}
        try:
            outputs = self.engine.step()
        except (PlantedError, PlantedInterrupt):
            outputs = []
        except Exception as error:
            if self.may_fail and "dead" in str(error).lower():
                self.is_dead = True
                self.counts["dead"] += 1
                return
            raise
        if self.case.fault is not None and self.case.fault[0] == "nan" and self.num_steps > self.case.fault[1]:
            self._restore()
        for output in outputs:
            one = self.active.get(output.request_id)
            if one is None:
                raise Wrong(f"an output of {output.request_id!r}, which has ended or never was")
            self.outputs[one.index].append(output)
            if output.finished:
                del self.active[output.request_id]
        if self._undo is None:
            check(self.engine._core.scheduler)

    def _plant(self, kind: str) -> None:
        self.counts[f"planted {kind}"] += 1
        core = self.engine._core
        rng = random.Random(f"fault {self.case.seed}")
        error: BaseException = PlantedInterrupt("planted") if "interrupt" in kind else PlantedError("planted")
        if kind == "nan":
            table = core.runner._model.weights.embed_tokens  # type: ignore[attr-defined]
            token = rng.choice(rng.choice(self.case.requests).prompt)
            with torch.inference_mode():
                row = table[token].clone()
                table[token] = torch.nan

            def restore() -> None:
                with torch.inference_mode():
                    table[token] = row

            self._undo = restore
            return
        if kind == "result":
            launch = core.runner.launch

            class Handle:
                def result(self) -> Any:
                    raise error

            def broken_launch(plan: Any) -> Any:
                core.runner.launch = launch  # type: ignore[method-assign]
                self._is_armed = False
                launch(plan)
                return Handle()

            core.runner.launch = broken_launch  # type: ignore[method-assign]
            return
        kv = core.scheduler.kv
        places = [(core.runner, "launch")]
        if kind.startswith("inner"):
            places = [
                (kv, "admit"), (kv, "append_pages"), (kv, "cache_pages"), (kv, "free"), (kv.pool, "allocate"),
                (kv.pool, "release"), (kv.pool, "remember"), (kv.pool, "share"),
                (core.scheduler._running, "end_prefill"), (core.scheduler._running, "enter"),
                (core.scheduler._running, "leave"), (core.scheduler, "_prefill"), (core.scheduler, "_end"),
            ]  # fmt: skip
        owner, name = rng.choice(places)
        is_after = rng.random() < 0.5
        original = getattr(owner, name)

        def broken(*args: Any, **options: Any) -> Any:
            setattr(owner, name, original)
            self._is_armed = False
            if is_after:
                original(*args, **options)
            raise error

        setattr(owner, name, broken)

    def _restore(self) -> None:
        if self._undo is not None:
            self._undo()
            self._undo, self._is_armed = None, False

    # ---- checking

    def _check_all(self) -> None:
        sequences: dict[int, list[Sequence64]] = {}
        for one in self.case.requests:
            if one.index in self.outputs:
                sequences[one.index] = self._check_request(one)
        if self.is_dead:
            return
        stats = self.engine.stats()
        if (stats.num_running, stats.num_waiting, stats.num_free_pages) != (0, 0, self.num_pages):
            raise Wrong(f"left behind: {stats}")
        self.counts["preemptions"] += stats.total_preemptions
        self.counts["cached tokens"] += stats.total_prefix_hit_tokens
        check(self.engine._core.scheduler)
        self._check_pages(sequences)
        self._check_memory()

    def _check_request(self, one: RequestCase) -> list[Sequence64]:
        params = SamplingParams(**one.params)
        outputs = self.outputs[one.index]
        if not outputs or not outputs[-1].finished:
            if self.is_dead:
                return []
            raise Wrong(f"request {one.index} has no last output")
        final = outputs[-1]
        if [output.finished for output in outputs].count(True) != 1:
            raise Wrong(f"request {one.index} ended more than once")
        prompt = Sequence64(self.model, self.is_kv_fp8)
        prompt.extend(one.prompt)
        if any(completion.finish_reason != "error" for completion in final.outputs):
            self._check_prompt_logprobs(one, params, final, prompt)
        sequences = []
        for index in range(params.n):
            completion = self._gathered(one, params, outputs, index)
            sequence = Sequence64(self.model, self.is_kv_fp8)
            sequence.__dict__.update(
                {name: value[:] if isinstance(value, list) else value for name, value in vars(prompt).items()}
            )
            try:
                self._check_completion(one, params, completion, sequence)
            except Wrong as error:
                raise Wrong(f"request {one.index}, completion {index}: {error}") from None
            sequences.append(sequence)
            self.counts[f"end by {completion.finish_reason}"] += 1
            self.counts["tokens"] += len(completion.token_ids)
        self.counts["siblings"] += params.n - 1
        self.counts["constrained"] += params.structured_outputs is not None
        return sequences

    def _gathered(
        self, one: RequestCase, params: SamplingParams, outputs: Sequence[RequestOutput], index: int
    ) -> CompletionOutput:
        """The whole of one completion, from deltas if need be."""
        parts = [part for output in outputs for part in output.outputs if part.index == index]
        if params.output_kind is not RequestOutputKind.DELTA:
            for before, after in zip(parts, parts[1:]):
                if after.token_ids[: len(before.token_ids)] != before.token_ids or not after.text.startswith(
                    before.text
                ):
                    raise Wrong(f"request {one.index}: an output does not go on as the one before")
            return parts[-1]
        last = parts[-1]
        return CompletionOutput(
            index,
            "".join(part.text for part in parts),
            [token for part in parts for token in part.token_ids],
            last.cumulative_logprob,
            None if last.logprobs is None else [entry for part in parts for entry in part.logprobs or []],
            last.finish_reason,
            last.stop_reason,
            last.error,
        )

    def _slack(self, logits: NDArray[np.float64]) -> float:
        return self.slack * (1.0 + float(np.abs(logits).max()))

    def _check_prompt_logprobs(
        self, one: RequestCase, params: SamplingParams, final: RequestOutput, prompt: Sequence64
    ) -> None:
        if params.prompt_logprobs is None:
            if final.prompt_logprobs is not None:
                raise Wrong(f"request {one.index} has prompt log-probabilities that it did not ask for")
            return
        entries = final.prompt_logprobs
        if entries is None or len(entries) != len(one.prompt) or entries[0] is not None:
            raise Wrong(f"request {one.index}: prompt log-probabilities {entries}")
        if one.index in self.aborted and any(entry is None for entry in entries[1:]):
            return  # it ended within its prompt
        for position in range(1, len(one.prompt)):
            entry = entries[position]
            if entry is None:
                raise Wrong(f"request {one.index}: no log-probability of prompt token {position}")
            self._check_entry(entry, prompt.logits[position - 1], one.prompt[position], params.prompt_logprobs, ())

    def _check_entry(
        self, entry: dict[int, Logprob], logits: NDArray[np.float64], chosen: int, count: int, exactly: Sequence[int]
    ) -> None:
        """One position's log-probabilities: the chosen token's, and of the ``count`` likeliest or ``exactly`` these."""
        slack = self._slack(logits)
        logprobs = log_softmax(logits)
        if chosen not in entry:
            raise Wrong(f"no log-probability of the chosen token {chosen}: {entry}")
        for token, one in entry.items():
            if not abs(one.logprob - logprobs[token]) <= 3 * slack + 1e-6:
                raise Wrong(f"log-probability of {token} is {one.logprob}, not {logprobs[token]}")
            least = int((logits > logits[token] + 2 * slack).sum()) + 1
            most = int((logits >= logits[token] - 2 * slack).sum())
            if one.rank is None or not least <= one.rank <= most:
                raise Wrong(f"rank of {token} is {one.rank}, not from {least} to {most}")
        others = [token for token in entry if token != chosen]
        if exactly:
            if {*others, chosen} != {*exactly, chosen}:
                raise Wrong(f"log-probabilities of {sorted(entry)}, not of {sorted(exactly)}")
            return
        count = min(count, len(logits))
        if not count <= len(entry) <= count + 1 or (len(entry) == count + 1) != (entry[chosen].rank or 0) > count:
            if len(entry) not in (count, count + 1):
                raise Wrong(f"{len(entry)} log-probabilities, asked for {count}")
        limit = np.sort(logits)[::-1][count - 1] if count else np.inf
        for token in others:
            if logits[token] < limit - 2 * slack:
                raise Wrong(f"token {token} is not among the {count} likeliest")

    def _check_completion(
        self, one: RequestCase, params: SamplingParams, completion: CompletionOutput, sequence: Sequence64
    ) -> None:
        config = self.model.config
        vocab, output = config.vocab_size, completion.token_ids
        eos = frozenset() if params.ignore_eos else frozenset(config.eos_token_ids)
        stop_ids = eos | frozenset(params.stop_token_ids or ())
        bad_words: list[tuple[int, ...]] = []
        if params.bad_words:
            assert self.engine.tokenizer is not None
            bad_words = [word for word in self.engine.tokenizer.encode_bad_words(params.bad_words) if max(word) < vocab]
        without_token = range(TOKENS if self.text else vocab, vocab)
        without = [token for token in without_token if token not in config.eos_token_ids]
        seed = None if params.seed is None else (params.seed + completion.index) % 2**64
        length = len(one.prompt) + params.max_tokens if params.max_tokens else max(self.limit, len(one.prompt) + 1)
        reader = Reader(params)
        if completion.logprobs is not None and len(completion.logprobs) != len(output):
            raise Wrong(f"{len(completion.logprobs)} log-probabilities of {len(output)} tokens")
        total = 0.0
        sequence.extend(output)
        end: tuple[str, Any] | None = None
        grammar_text = b""
        for index, token in enumerate(output):
            if end is not None:
                raise Wrong(f"it goes on after token {index - 1}, though it ends there by {end}")
            logits = sequence.logits[len(one.prompt) - 1 + index]
            scores, allowed = self._scores(
                params, one, output[:index], logits, stop_ids, bad_words, without, grammar_text
            )
            slack = self._slack(logits)
            wrong = complaint(scores, token, params, seed, len(one.prompt) + index, slack)
            if (
                wrong and allowed is not None
            ):  # where the text is forced, a grammar may leave only the tokenizer's own next token
                forced = self._forced_token(params, grammar_text)
                if forced is not None:
                    wrong = "" if token == forced and scores[token] > -np.inf else wrong
            if wrong:
                raise Wrong(f"token {index} is {token}, which {wrong}; of {output}, {completion.finish_reason}")
            if completion.logprobs is not None:
                entry = completion.logprobs[index]
                exactly = params.logprob_token_ids or ()
                self._check_entry(entry, logits, token, params.logprobs or 0, exactly)
                total += entry[token].logprob
            end = self._end(params, output[: index + 1], stop_ids, eos, length - len(one.prompt), allowed)
            if allowed is not None and token not in stop_ids and token not in self._eos():
                grammar_text += vocabulary()[token]
                if not eos and not self._may_go_on(params, grammar_text):
                    end = ("stop", None)
            is_silent = end is not None and token in stop_ids and not params.include_stop_str_in_output
            stopped = reader.take(token) if self.text and not is_silent else None
            if stopped is not None:
                end = ("stop", stopped)
        self._check_end(one, params, completion, end, sequence, stop_ids, bad_words, without, grammar_text)
        if completion.logprobs is not None and abs((completion.cumulative_logprob or 0.0) - total) > 1e-6:
            raise Wrong(f"cumulative_logprob is {completion.cumulative_logprob}, not {total}")
        if self.text and not isinstance(completion.stop_reason, str):
            reader.finish()
        if completion.text != reader.text:
            raise Wrong(f"text {completion.text!r}, not {reader.text!r}")

    def _eos(self) -> tuple[int, ...]:
        """What ends a grammar's text."""
        return tuple(sorted(self.model.config.eos_token_ids)) or (2,)

    def _scores(
        self,
        params: SamplingParams,
        one: RequestCase,
        output: list[int],
        logits: NDArray[np.float64],
        stop_ids: frozenset[int],
        bad_words: list[tuple[int, ...]],
        without: list[int],
        grammar_text: bytes,
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_] | None]:
        allowed = None
        if "structured_outputs" in one.params:
            form = json.dumps(one.params["structured_outputs"])
            allowed = grammar_mask(form, grammar_text, self.model.config.vocab_size, self._eos())
        scores = edited(logits, params, one.prompt, output, stop_ids, bad_words, allowed, without)
        return scores, allowed

    def _forced_token(self, params: SamplingParams, text: bytes) -> int | None:
        """The first token of what must come after ``text``; None if that is open."""
        form = params.structured_outputs
        rests = [c.encode()[len(text) :] for c in form.choice or () if c.encode().startswith(text)]  # type: ignore[union-attr]
        rest = os.path.commonprefix(rests).decode(errors="ignore")
        assert self.engine.tokenizer is not None
        return self.engine.tokenizer.encode(rest, bos=False)[0] if rest else None

    def _may_go_on(self, params: SamplingParams, text: bytes) -> bool:
        form = params.structured_outputs
        assert form is not None
        wanted: dict[str, Any] = {"choice": list(form.choice)} if form.choice else {"regex": form.regex}  # type: ignore[union-attr]
        mask = grammar_mask(json.dumps(wanted), text, self.model.config.vocab_size, self._eos())
        return any(mask[token] for token in np.flatnonzero(mask) if token not in self._eos())

    def _end(
        self,
        params: SamplingParams,
        output: list[int],
        stop_ids: frozenset[int],
        eos: frozenset[int],
        most: int,
        allowed: NDArray[np.bool_] | None,
    ) -> tuple[str, Any] | None:
        """How a completion ends with the last of ``output``, its text aside."""
        token = output[-1]
        if token in stop_ids:
            return "stop", None if token in eos else token
        if allowed is not None and not eos and token in self._eos():
            return "stop", None
        rule = params.repetition_detection
        if rule is not None:
            for size in range(max(1, rule.min_pattern_size), rule.max_pattern_size + 1):
                tail = output[-size * rule.min_count :]
                if len(tail) == size * rule.min_count and tail == tail[:size] * rule.min_count:
                    return "repetition", None
        return ("length", None) if len(output) >= most else None

    def _check_end(
        self,
        one: RequestCase,
        params: SamplingParams,
        completion: CompletionOutput,
        end: tuple[str, Any] | None,
        sequence: Sequence64,
        *context: Any,
    ) -> None:
        found = (completion.finish_reason, completion.stop_reason)
        if (completion.finish_reason == "error") != (completion.error is not None):
            raise Wrong(f"finish reason {completion.finish_reason} with error {completion.error!r}")
        if found == end:
            return
        if end is None and completion.finish_reason == "abort" and one.index in self.aborted:
            return
        if completion.finish_reason == "error" and one.index in self.may_fail:
            return
        if completion.finish_reason == "error" and completion.error == NO_TOKEN_LEFT and end is None:
            scores, _ = self._scores(params, one, completion.token_ids, sequence.logits[-1], *context)
            if scores.max() == -np.inf:
                return
        raise Wrong(f"it ended by {found} ({completion.error}) after {completion.token_ids}; right is {end}")

    def _check_pages(self, sequences: dict[int, list[Sequence64]]) -> None:
        """What the prefix cache would give to others is what somebody wrote, and right."""
        known: dict[bytes, tuple[Sequence64, int]] = {}
        for index, those in sequences.items():
            for request, sequence in zip(self.requests[index], those, strict=True):
                parent = blake2b(request.cache_salt, digest_size=16).digest()
                for page in range(len(sequence.token_ids) // self.page_size):
                    content = sequence.token_ids[page * self.page_size : (page + 1) * self.page_size]
                    parent = blake2b(parent + array("i", content).tobytes(), digest_size=16).digest()
                    known[parent] = (sequence, page)
        layers = self.engine._core.runner._kv_cache.layers  # type: ignore[attr-defined]
        for page_hash, number in self.engine._core.scheduler.kv.pool._page_of.items():
            if page_hash not in known:
                raise Wrong(f"page {number} can be found by content that no request had")
            sequence, page = known[page_hash]
            rows = slice(page * self.page_size, (page + 1) * self.page_size)
            for layer, caches in enumerate(layers):
                for stored, right in zip(
                    caches, (sequence.keys[layer][rows], sequence.values[layer][rows]), strict=True
                ):
                    found = stored[number].double().numpy().transpose(1, 0, 2)
                    slack = 2 * self.slack * (1.0 + np.abs(right).max())
                    if not (np.abs(found - right) <= slack).all():
                        worst = np.abs(found - right).max()
                        raise Wrong(
                            f"page {number} can be found as page {page} of {sequence.token_ids}, and is wrong by {worst}"
                        )
            self.counts["pages"] += 1

    def _check_memory(self) -> None:
        """Nothing holds a request that has ended."""
        gc.collect()
        for index, requests in self.requests.items():
            while requests:
                request = requests.pop()
                if sys.getrefcount(request) > 2:
                    holders = [type(holder).__name__ for holder in gc.get_referrers(request)]
                    raise Wrong(f"request {index} has ended by {request.finish_reason} and is held by {holders}")


def written(case: ModelCase, folder: Path) -> dict[str, torch.Tensor]:
    """Write the checkpoint of ``case``; returns its weights."""
    state = random_state_dict(case.config, case.seed)
    write = write_hf if case.layout == "hf" else write_mistral
    write(folder, case.config, state, shards=case.shards)
    if case.text:
        (folder / "tekken.json").symlink_to(TEKKEN)
    return state


def play(cases: Sequence[EngineCase]) -> Counter[str]:
    """Play engines of one model, one after the other; ``Wrong`` says which case it was and what is wrong."""
    counts: Counter[str] = Counter(models=1)
    with tempfile.TemporaryDirectory() as folder:
        state = written(cases[0].model, Path(folder))
        for case in cases:
            model = Model(cases[0].model.config, state, getattr(torch, case.options["dtype"]))
            player = Player(case, model, Path(folder))
            player.play()
            counts.update(player.counts)
            counts["engines"] += 1
            counts["steps"] += player.num_steps
    return counts

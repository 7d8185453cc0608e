"""Holds everything that came out of an engine, and everything that stayed behind in it, to the reference."""

from __future__ import annotations

import gc
import json
import os
import sys
from array import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np
from fuzz.cases import TOKENS, RequestCase
from fuzz.reference import Sequence64, complaint, edited, log_softmax
from fuzz.texts import Reader, grammar_mask, vocabulary
from numpy.typing import NDArray

from nemo_engine import CompletionOutput, Logprob, RequestOutput, RequestOutputKind, SamplingParams
from nemo_engine.outputs import NO_TOKEN_LEFT
from tests.scheduler.invariants import check

if TYPE_CHECKING:
    from fuzz.play import Player

# By the engine's dtype: to within how much of the largest logit (and 1) its logits and its keys and values are known.
SLACK = {"float64": 1e-8, "float32": 2e-4, "bfloat16": 0.12}


class Wrong(AssertionError):
    """An engine did what the reference does not."""


class Checker:
    """Looks at what ``player`` collected, once it has played."""

    def __init__(self, player: Player) -> None:
        self.player = player
        self.model, self.engine, self.counts = player.model, player.engine, player.counts
        self.slack = SLACK[player.case.options["dtype"]]

    def check_all(self) -> None:
        sequences: dict[int, list[Sequence64]] = {}
        for one in self.player.case.requests:
            if one.index in self.player.outputs:
                sequences[one.index] = self._check_request(one)
        if self.player.is_dead:
            return
        stats = self.engine.stats()
        if (stats.num_running, stats.num_waiting, stats.num_free_pages) != (0, 0, self.player.num_pages):
            raise Wrong(f"left behind: {stats}")
        self.counts["preemptions"] += stats.total_preemptions
        self.counts["cached tokens"] += stats.total_prefix_hit_tokens
        check(self.engine._core.scheduler)
        check_pages(self.player, sequences)
        check_memory(self.player)

    def _check_request(self, one: RequestCase) -> list[Sequence64]:
        params = SamplingParams(**one.params)
        outputs = self.player.outputs[one.index]
        if not outputs or not outputs[-1].finished:
            if self.player.is_dead:
                return []
            raise Wrong(f"request {one.index} has no last output")
        final = outputs[-1]
        if [output.finished for output in outputs].count(True) != 1:
            raise Wrong(f"request {one.index} ended more than once")
        prompt = Sequence64(self.model, self.player.is_kv_fp8)
        prompt.extend(one.prompt)
        if any(completion.finish_reason != "error" for completion in final.outputs):
            self._check_prompt_logprobs(one, params, final, prompt)
        sequences = []
        for index in range(params.n):
            completion = self._gathered(one, params, outputs, index)
            sequence = Sequence64(self.model, self.player.is_kv_fp8)
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
        is_cut = one.index in self.player.aborted or final.outputs[0].finish_reason == "error"
        if is_cut and any(entry is None for entry in entries[1:]):
            return  # its first completion ended within the prompt
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
        without_token = range(TOKENS if self.player.text else vocab, vocab)
        without = [token for token in without_token if token not in config.eos_token_ids]
        seed = None if params.seed is None else (params.seed + completion.index) % 2**64
        length = (
            len(one.prompt) + params.max_tokens if params.max_tokens else max(self.player.limit, len(one.prompt) + 1)
        )
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
            stopped = reader.take(token) if self.player.text and not is_silent else None
            if stopped is not None:
                end = ("stop", stopped)
        self._check_end(one, params, completion, end, sequence, stop_ids, bad_words, without, grammar_text)
        if completion.logprobs is not None and abs((completion.cumulative_logprob or 0.0) - total) > 1e-6:
            raise Wrong(f"cumulative_logprob is {completion.cumulative_logprob}, not {total}")
        if self.player.text and not isinstance(completion.stop_reason, str):
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
        if end is None and completion.finish_reason == "abort" and one.index in self.player.aborted:
            return
        if completion.finish_reason == "error" and one.index in self.player.may_fail:
            return
        if completion.finish_reason == "error" and completion.error == NO_TOKEN_LEFT and end is None:
            scores, _ = self._scores(params, one, completion.token_ids, sequence.logits[-1], *context)
            if scores.max() == -np.inf:
                return
        raise Wrong(f"it ended by {found} ({completion.error}) after {completion.token_ids}; right is {end}")


def check_pages(player: Player, sequences: dict[int, list[Sequence64]]) -> None:
    """What the prefix cache would give to others is what somebody wrote, and right."""
    known: dict[bytes, tuple[Sequence64, int]] = {}
    for index, those in sequences.items():
        for request, sequence in zip(player.requests[index], those, strict=True):
            parent = blake2b(request.cache_salt, digest_size=16).digest()
            for page in range(len(sequence.token_ids) // player.page_size):
                content = sequence.token_ids[page * player.page_size : (page + 1) * player.page_size]
                parent = blake2b(parent + array("i", content).tobytes(), digest_size=16).digest()
                known[parent] = (sequence, page)
    layers = player.engine._core.runner._kv_cache.layers  # type: ignore[attr-defined]
    for page_hash, number in player.engine._core.scheduler.kv.pool._page_of.items():
        if page_hash not in known:
            raise Wrong(f"page {number} can be found by content that no request had")
        sequence, page = known[page_hash]
        rows = slice(page * player.page_size, (page + 1) * player.page_size)
        for layer, kv in enumerate(layers):
            for stored, right in zip(
                kv.caches, (sequence.keys[layer][rows], sequence.values[layer][rows]), strict=True
            ):
                found = stored[number].double().numpy().transpose(1, 0, 2)
                slack = 2 * SLACK[player.case.options["dtype"]] * (1.0 + np.abs(right).max())
                if not (np.abs(found - right) <= slack).all():
                    worst = np.abs(found - right).max()
                    raise Wrong(
                        f"page {number} can be found as page {page} of {sequence.token_ids}, and is wrong by {worst}"
                    )
        player.counts["pages"] += 1


def check_memory(player: Player) -> None:
    """Nothing holds a request that has ended."""
    gc.collect()
    for index, requests in player.requests.items():
        while requests:
            request = requests.pop()
            if sys.getrefcount(request) > 2:
                holders = [type(holder).__name__ for holder in gc.get_referrers(request)]
                raise Wrong(f"request {index} has ended by {request.finish_reason} and is held by {holders}")

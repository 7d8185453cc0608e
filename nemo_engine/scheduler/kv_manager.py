"""Gives requests their pages: prefix matching, allocation, and what of a request goes into the prefix cache."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

from nemo_engine.outputs import CacheMiss, CacheReport
from nemo_engine.scheduler.page_pool import PagePool
from nemo_engine.scheduler.request import Request

_HASH_BYTES = 16


class KVManager:
    """Maps positions of requests to pages of ``page_size`` tokens.

    With ``enable_prefix_caching`` off, only requests of one non-empty ``cache_salt`` (the completions of one prompt)
    share pages.
    """

    def __init__(self, num_pages: int, page_size: int, enable_prefix_caching: bool) -> None:
        self.pool = PagePool(num_pages)
        self.page_size = page_size
        self.enable_prefix_caching = enable_prefix_caching
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0

    def reset(self) -> None:
        """Begin anew with all pages free and empty: nothing that is noted of them is trusted. Totals go on."""
        pool = PagePool(self.pool.num_pages)
        pool.peak_used = self.pool.peak_used
        self.pool = pool

    def counts(self) -> dict[str, Any]:
        """The fields of ``SchedulerStats`` that tell of pages and the prefix cache."""
        return {
            "num_pages": self.pool.num_pages,
            "num_free_pages": self.pool.num_free,
            "num_cached_pages": self.pool.num_cached,
            "peak_used_pages": self.pool.peak_used,
            "total_prefix_queried_tokens": self.num_queried_tokens,
            "total_prefix_hit_tokens": self.num_hit_tokens,
        }

    def num_pages_for(self, num_tokens: int) -> int:
        """Pages that hold the keys and values of ``num_tokens`` tokens."""
        return -(-num_tokens // self.page_size)

    def max_total_tokens(self, num_prompt_tokens: int, max_tokens: int | None, max_model_len: int) -> int:
        """The largest length (prompt and output) that a request may reach with the whole cache to itself.

        Raises ``ValueError`` with the arithmetic for what could never finish. The last token's key and value are never
        computed, so n pages hold a request of ``n * page_size + 1`` tokens.
        """
        num_pages = self.pool.num_pages
        limit = min(max_model_len, num_pages * self.page_size + 1)
        total = num_prompt_tokens + (1 if max_tokens is None else max_tokens)
        if total <= limit:
            return total if max_tokens is not None else limit
        output = "at least 1 output token" if max_tokens is None else f"max_tokens {max_tokens}"
        text = f"a prompt of {num_prompt_tokens} tokens and {output} make {total} tokens"
        if total > max_model_len:
            raise ValueError(f"{text}: more than max_model_len {max_model_len}")
        raise ValueError(
            f"{text} and need {self.num_pages_for(total - 1)} KV pages of {self.page_size} tokens: the cache has "
            f"{num_pages} (at most {limit} tokens per request; raise kv_cache_gib or num_kv_pages)"
        )

    # ---- giving pages, and taking them back

    def admit(self, request: Request) -> bool:
        """Give ``request`` pages for all its tokens, as many as possible from the cache, or change nothing.

        Sets ``num_computed_tokens`` to what the cached pages hold. The last token is never taken from the cache: its
        logits are needed. After a failure, trying again costs O(1) as long as fewer pages are free than the request
        would have to be given, and the next page of its prefix has not been cached.
        """
        may_match_more = request.hash_wanted is not None and self.pool.find(request.hash_wanted) is not None
        if request.pages_wanted > self.pool.num_free and not may_match_more:
            return False
        num_tokens = len(request.token_ids)
        reads_cache = self._reads_cache(request)
        matched = self.match(request) if reads_cache else []
        num_new = self.num_pages_for(num_tokens) - len(matched)
        if num_new + sum(map(self.pool.is_free, matched)) > self.pool.num_free:
            request.pages_wanted = num_new  # the matched pages may be in use by others next time
            missing = request.page_hashes[len(matched) : self._num_matchable(request)] if reads_cache else []
            request.hash_wanted = missing[0] if missing else None
            return False
        request.pages_wanted = 0
        self.pool.share(matched)
        request.pages = matched + self.pool.allocate(num_new)
        self._set_limit(request)
        request.num_computed_tokens = len(matched) * self.page_size
        request.num_hashed_pages = len(matched)
        if request.num_preemptions == 0:
            request.cache_report = self._report(request, len(matched), reads_cache)
        if reads_cache:
            self.num_queried_tokens += num_tokens
            self.num_hit_tokens += request.num_computed_tokens
        return True

    def append_pages(self, requests: Sequence[Request]) -> bool:
        """Add a page to each request, or change nothing if fewer are free."""
        if self.pool.num_free < len(requests):
            return False
        for request, page in zip(requests, self.pool.allocate(len(requests))):
            request.pages.append(page)
            self._set_limit(request)
        return True

    def lacks_page(self, request: Request, num_tokens: int) -> bool:
        """Whether the pages of ``request`` hold fewer than ``num_tokens`` tokens, or than it will ever compute."""
        return len(request.pages) * self.page_size < min(num_tokens, request.max_total_tokens - 1)

    def _set_limit(self, request: Request) -> None:
        # The last token is sampled from the position before it; its own key and value are never computed.
        request.compute_limit = min(len(request.pages) * self.page_size, request.max_total_tokens - 1)

    def free(self, request: Request) -> None:
        """Take all pages from ``request``.

        What full pages hold of its good tokens stays findable until they are handed out again; what others hold, while
        another request that has them may yet prove it.
        """
        num_good_tokens = request.num_good_tokens
        self.cache_pages(request, num_good_tokens)
        self.pool.prove(request.pages[: num_good_tokens // self.page_size])
        self._release(request)

    def discard(self, request: Request) -> list[int]:
        """Take all pages from a failed request, and forget what they hold: it must not be reused.

        Returns the pages that were in doubt, which others may have read.
        """
        self.pool.prove(request.pages[: request.num_good_tokens // self.page_size])
        bad_pages = self.pool.discard(request.pages)
        self._release(request)
        return bad_pages

    def _release(self, request: Request) -> None:
        self.pool.release(request.pages)
        request.pages = []
        request.num_hashed_pages = request.compute_limit = 0

    # ---- the prefix cache

    def match(self, request: Request) -> list[int]:
        """The cached pages that hold the longest prefix of ``request``, its last token excepted."""
        num_full = self._num_matchable(request)
        self.extend_hashes(request, num_full)
        pages: list[int] = []
        for page_hash in request.page_hashes[:num_full]:
            page = self.pool.find(page_hash)
            if page is None:
                break
            pages.append(page)
        return pages

    def cache_pages(self, request: Request, num_computed_tokens: int) -> None:
        """Offer the full pages among the first ``num_computed_tokens`` tokens, all known, to the prefix cache.

        They are in doubt until ``request`` leaves with sound tokens behind them.
        """
        first, end = request.num_hashed_pages, num_computed_tokens // self.page_size
        if end > first and self._writes_cache(request):
            self.extend_hashes(request, end)
            self.pool.remember(request.pages[first:end], request.page_hashes[first:end])
            request.num_hashed_pages = end

    def extend_hashes(self, request: Request, num_pages: int) -> None:
        """Make ``page_hashes`` those of the first ``num_pages`` pages, all full.

        Each is BLAKE2b of the hash of the page before it and of its token ids.
        """
        hashes, size = request.page_hashes, self.page_size
        for start in range(len(hashes) * size, num_pages * size, size):
            parent = hashes[-1] if hashes else blake2b(request.cache_salt, digest_size=_HASH_BYTES).digest()
            content = array("i", request.token_ids[start : start + size]).tobytes()
            hashes.append(blake2b(parent + content, digest_size=_HASH_BYTES).digest())

    def _num_matchable(self, request: Request) -> int:
        """Full pages before the last token."""
        return (len(request.token_ids) - 1) // self.page_size

    def _writes_cache(self, request: Request) -> bool:
        return self.enable_prefix_caching or bool(request.cache_salt)

    def _reads_cache(self, request: Request) -> bool:
        # Prompt log-probabilities need the logits of every prompt position, so all of them are computed.
        return self._writes_cache(request) and request.params.prompt_logprobs is None

    def _report(self, request: Request, num_matched: int, reads_cache: bool) -> CacheReport:
        num_full = self._num_matchable(request)
        reason: CacheMiss | None = None
        if not reads_cache:
            reason = "prompt_logprobs" if request.params.prompt_logprobs is not None else "disabled"
        elif num_matched < num_full:
            reason = "evicted" if self.pool.was_evicted(request.page_hashes[num_matched]) else "not_seen"
        return CacheReport(self.page_size, num_full, num_matched, reason)

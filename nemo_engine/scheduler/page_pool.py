"""Owns which page of the KV cache is used by whom, and which content a page holds for the prefix cache.

Pages are numbered 1 .. num_pages; page 0 is padding and never handed out. A page without users is *free* and keeps its
content, findable by hash, until it is handed out again: the free list is in eviction order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence


class PagePool:
    """Reference counts, free list and content hashes of the pages. Every operation is O(1) per page.

    The free list evicts first the pages that hold nothing findable, then the least recently used. What a page in *doubt* holds can be found
    while somebody uses it, and is forgotten when nobody does.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.peak_used = 0
        self._num_users = [0] * (num_pages + 1)
        self._hash_of: list[bytes | None] = [None] * (num_pages + 1)
        self._page_of: dict[bytes, int] = {}
        self._in_doubt = bytearray(num_pages + 1)  # pages of which nobody knows yet whether what they hold is sound
        self.num_free = num_pages  # pages that can be handed out now, those with cached content among them
        # The free list: pages without content, the next one last; then those released with content, the least recently used first. A page
        # that is shared leaves its entry behind: of its entries in ``_unused``, the first ``_num_stale`` count no more.
        self._blank = list(range(num_pages, 0, -1))
        self._unused: deque[int] = deque()
        self._num_stale = [0] * (num_pages + 1)
        self._evicted: dict[bytes, None] = {}
        self._evicted_before: dict[bytes, None] = {}

    @property
    def num_cached(self) -> int:
        """Pages whose content can be found by hash, in use or free."""
        return len(self._page_of)

    def find(self, page_hash: bytes) -> int | None:
        """The page that holds the content of ``page_hash``, or None."""
        return self._page_of.get(page_hash)

    def is_free(self, page: int) -> bool:
        """Whether nobody uses ``page``."""
        return self._num_users[page] == 0

    def allocate(self, count: int) -> list[int]:
        """Hand out ``count`` pages with one user each; their content is forgotten. ``count`` must be at most num_free."""
        assert count <= self.num_free, (count, self.num_free)
        self.num_free -= count
        blank, unused, stale, hash_of = self._blank, self._unused, self._num_stale, self._hash_of
        pages = [blank.pop() for _ in range(min(count, len(blank)))]
        while len(pages) < count:
            page = unused.popleft()
            if stale[page]:
                stale[page] -= 1
                continue
            pages.append(page)
            page_hash = hash_of[page]
            if page_hash is not None:
                hash_of[page] = None
                del self._page_of[page_hash]
                self._evicted[page_hash] = None
        for page in pages:
            self._num_users[page] = 1
            self._in_doubt[page] = False
        if len(self._evicted) > self.num_pages:
            self._evicted_before, self._evicted = self._evicted, {}
        self._note_peak()
        return pages

    def _note_peak(self) -> None:
        num_used = self.num_pages - self.num_free
        if num_used > self.peak_used:
            self.peak_used = num_used

    def was_evicted(self, page_hash: bytes) -> bool:
        """Whether this content was in the cache and lately had to make room."""
        return page_hash in self._evicted or page_hash in self._evicted_before

    def states(self) -> bytes:
        """A byte for each page, from page 1 on: 0 free, 1 free and cached, 2 in use, 3 in use by several. O(pages)."""
        cached = self._hash_of
        return bytes(
            [
                min(users, 2) + 1 if users else int(cached[page] is not None)
                for page, users in enumerate(self._num_users)
            ]
        )[1:]

    def share(self, pages: Iterable[int]) -> None:
        """Add one user to each page, taking it off the free list if nobody used it."""
        for page in pages:
            if self._num_users[page] == 0:
                self.num_free -= 1
                self._num_stale[page] += 1
            self._num_users[page] += 1
        if len(self._unused) > 2 * self.num_pages:
            self._unused = deque(self._unused_pages())
            self._num_stale = [0] * (self.num_pages + 1)
        self._note_peak()

    def _unused_pages(self) -> list[int]:
        """``_unused`` without stale entries."""
        stale, pages = self._num_stale[:], []
        for page in self._unused:
            if stale[page]:
                stale[page] -= 1
            else:
                pages.append(page)
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """Take one user off each page of one request, given in order of position.

        The last pages of a prefix become evictable before the first ones, which more requests can share.
        """
        counts, hashes, in_doubt, blank, unused = (
            self._num_users,
            self._hash_of,
            self._in_doubt,
            self._blank,
            self._unused,
        )
        for page in reversed(pages):
            users = counts[page] - 1
            assert users >= 0, f"page {page} released twice"
            counts[page] = users
            if users == 0:
                self.num_free += 1
                if in_doubt[page]:
                    self.forget(page)
                (blank if hashes[page] is None else unused).append(page)

    def remember(self, pages: Iterable[int], page_hashes: Iterable[bytes]) -> None:
        """Make the contents of ``pages`` findable. Of two pages with one content, the first is the one that is found."""
        page_of, hash_of = self._page_of, self._hash_of
        for page, page_hash in zip(pages, page_hashes):
            if page_hash not in page_of and hash_of[page] is None:
                page_of[page_hash] = page
                hash_of[page] = page_hash

    def doubt(self, pages: Iterable[int]) -> None:
        """Put ``pages``, in use, in doubt."""
        for page in pages:
            self._in_doubt[page] = True

    def prove(self, pages: Iterable[int]) -> None:
        """What ``pages`` hold is known to be sound."""
        for page in pages:
            self._in_doubt[page] = False

    def doubtful(self, pages: Iterable[int]) -> list[int]:
        """Those of ``pages`` that are in doubt."""
        return [page for page in pages if self._in_doubt[page]]

    def forget(self, page: int) -> None:
        """The content of ``page`` can no longer be found."""
        page_hash = self._hash_of[page]
        if page_hash is not None:
            del self._page_of[page_hash]
            self._hash_of[page] = None

    def forget_all(self) -> None:
        """Empty the prefix cache; pages in use stay with their users."""
        for page in list(self._page_of.values()):
            self.forget(page)

    def check(self, page_lists: Iterable[Sequence[int]]) -> None:
        """Assert that the books balance, given the pages of every running request. O(pages); for tests."""
        users = [0] * (self.num_pages + 1)
        for pages in page_lists:
            assert len(set(pages)) == len(pages), "a request holds a page twice"
            for page in pages:
                assert 1 <= page <= self.num_pages, page
                users[page] += 1
        assert users == self._num_users, "user counts differ from the page tables"
        free = sorted(self._blank + self._unused_pages())
        assert free == [page for page in range(1, self.num_pages + 1) if users[page] == 0], "free pages"
        assert all(users[page] or not self._in_doubt[page] for page in self._page_of.values()), (
            "free, findable, and in doubt"
        )
        assert self.num_free == len(free) and all(self._hash_of[page] is None for page in self._blank)
        assert all(self._hash_of[page] == page_hash for page_hash, page in self._page_of.items()), "hash map"
        assert len(self._page_of) == sum(page_hash is not None for page_hash in self._hash_of), "hash map size"

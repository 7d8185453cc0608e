"""Owns which page of the KV cache is used by whom, and which content a page holds for the prefix cache.

Pages are numbered 1 .. num_pages; page 0 is padding and never handed out. A page without users is *free* and keeps its
content, findable by hash, until it is handed out again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class PagePool:
    """Reference counts, free pages and content hashes. Every operation is O(1) per page.

    Free pages that hold nothing findable are handed out first, then the least recently used. While a page is in
    *doubt*, nobody knows yet whether its content is sound: it can be found while the page is in use, and is forgotten
    when the last user leaves.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.peak_used = 0
        self._num_users = [0] * (num_pages + 1)
        self._hash_of: list[bytes | None] = [None] * (num_pages + 1)
        self._page_of: dict[bytes, int] = {}
        self._in_doubt = bytearray(num_pages + 1)
        self._free = OrderedDict[int, None].fromkeys(range(1, num_pages + 1))  # the next to be handed out is first
        # Hashes of content that had to make room: of at least the last num_pages evictions.
        self._evicted: set[bytes] = set()
        self._evicted_before: set[bytes] = set()

    @property
    def num_free(self) -> int:
        """Pages that can be handed out now, those with cached content among them."""
        return len(self._free)

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

    def was_evicted(self, page_hash: bytes) -> bool:
        """Whether this content was in the cache and lately had to make room."""
        return page_hash in self._evicted or page_hash in self._evicted_before

    def states(self) -> bytes:
        """A byte a page, from page 1 on: 0 free, 1 free and cached, 2 in use, 3 in use by several. O(pages)."""
        cached, num_users = self._hash_of, enumerate(self._num_users)
        return bytes([min(users, 2) + 1 if users else int(cached[page] is not None) for page, users in num_users])[1:]

    def allocate(self, count: int) -> list[int]:
        """Hand out ``count`` pages with one user each; their content is forgotten.

        ``count`` must be at most num_free.
        """
        assert count <= self.num_free, (count, self.num_free)
        pages = []
        for _ in range(count):
            page, _ = self._free.popitem(last=False)
            pages.append(page)
            self._num_users[page] = 1
            self._in_doubt[page] = False
            page_hash = self._hash_of[page]
            if page_hash is not None:
                self.forget(page)
                self._evicted.add(page_hash)
        if len(self._evicted) > self.num_pages:
            self._evicted_before, self._evicted = self._evicted, set()
        self.peak_used = max(self.peak_used, self.num_pages - len(self._free))
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Add one user to each page, taking it off the free pages if nobody used it."""
        for page in pages:
            if self._num_users[page] == 0:
                del self._free[page]
            self._num_users[page] += 1
        self.peak_used = max(self.peak_used, self.num_pages - len(self._free))

    def release(self, pages: Sequence[int]) -> None:
        """Take one user off each page of one request, given in order of position.

        The last pages of a prefix become evictable before the first ones, which more requests can share.
        """
        for page in reversed(pages):
            users = self._num_users[page] - 1
            assert users >= 0, f"page {page} released twice"
            self._num_users[page] = users
            if users == 0:
                if self._in_doubt[page]:
                    self.forget(page)
                self._free[page] = None
                if self._hash_of[page] is None:
                    self._free.move_to_end(page, last=False)  # nothing is lost if it is handed out next

    def remember(self, pages: Iterable[int], page_hashes: Iterable[bytes]) -> None:
        """Make the contents of ``pages``, in use, findable, in doubt.

        Of two pages with one content, the first is found.
        """
        for page, page_hash in zip(pages, page_hashes):
            self._in_doubt[page] = True
            if page_hash not in self._page_of and self._hash_of[page] is None:
                self._page_of[page_hash] = page
                self._hash_of[page] = page_hash

    def prove(self, pages: Iterable[int]) -> None:
        """What ``pages`` hold is known to be sound."""
        for page in pages:
            self._in_doubt[page] = False

    def discard(self, pages: Sequence[int]) -> list[int]:
        """Forget what ``pages``, in use, hold; returns those that are in doubt."""
        for page in pages:
            self.forget(page)
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

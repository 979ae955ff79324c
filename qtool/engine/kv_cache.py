"""Pages of the key-value cache: who holds them, which can be used again by their content, which
goes first when none is left.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable


def page_digest(parent: bytes, tokens: Iterable[int]) -> bytes:
    """Return the name of a full page: it depends on the page's tokens and, through ``parent``, on
    all before them (``b""`` for the first).
    """
    return hashlib.blake2b(parent + array("i", tokens).tobytes(), digest_size=16).digest()


class Pages:
    """Pages 1 to ``count``, counted by reference; page 0 belongs to nobody.

    A full page may be registered under its digest. It is then shared with whoever has the same
    tokens and never written again; without references it stays until its room is needed, least
    recently used first.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._unused = list(range(count, 0, -1))  # neither referenced nor registered
        # registered, not referenced; least recently used first
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._references = [0] * (count + 1)
        self._digests: list[bytes | None] = [None] * (count + 1)
        self._by_digest: dict[bytes, int] = {}

    @property
    def free(self) -> int:
        """Pages that `allocate` can give."""
        return len(self._unused) + len(self._idle)

    def allocate(self, count: int) -> list[int] | None:
        """Return ``count`` pages with one reference each, or None when so many are not free."""
        if count > self.free:
            return None
        while len(self._unused) < count:
            page, _ = self._idle.popitem(last=False)
            self._drop(page)
        taken = [self._unused.pop() for _ in range(count)]
        for page in taken:
            self._references[page] = 1
        return taken

    def match(self, digests: Iterable[bytes]) -> list[int]:
        """Return the registered pages of the longest known start of ``digests``, and take a
        reference on each.
        """
        found = []
        for digest in digests:
            page = self._by_digest.get(digest)
            if page is None:
                break
            if not self._references[page]:
                del self._idle[page]
            self._references[page] += 1
            found.append(page)
        return found

    def register(self, page: int, digest: bytes) -> None:
        """Make a full page known; the first page of a digest keeps it."""
        if digest not in self._by_digest and self._digests[page] is None:
            self._by_digest[digest] = page
            self._digests[page] = digest

    def forget(self, digests: Iterable[bytes]) -> None:
        """Let nobody match these digests any more; who holds the pages keeps them."""
        for digest in digests:
            page = self._by_digest.get(digest)
            if page is not None:
                if page in self._idle:
                    del self._idle[page]
                    self._drop(page)
                else:
                    self._digests[page] = None
                    del self._by_digest[digest]

    def release(self, pages: list[int]) -> None:
        """Give one reference on each page back; of one sequence's pages the last are evicted first,
        for they are no use without the others.
        """
        for page in reversed(pages):
            self._references[page] -= 1
            if not self._references[page]:
                if self._digests[page] is None:
                    self._unused.append(page)
                else:
                    self._idle[page] = None

    def _drop(self, page: int) -> None:
        digest = self._digests[page]
        assert digest is not None
        del self._by_digest[digest]
        self._digests[page] = None
        self._unused.append(page)

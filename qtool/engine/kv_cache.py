"""The key-value cache: how many pages fit, the tensors they are made of, who holds which page."""

from __future__ import annotations

import hashlib
import itertools
import math
import warnings
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence

import psutil
import torch

from qtool.engine.attention.pages import (
    PAGE,
    KVPages,
    LayerCache,
    LayerGeometry,
    RecurrentStates,
    StateGeometry,
)
from qtool.errors import ResourceError
from qtool.memory import limit_bytes
from qtool.sizes import format_size

CPU_SHARE = 0.25  # of the free host memory, for the KV cache of a CPU


def first_parent(cache_salt: str) -> bytes:
    """Return what comes before the first page of the prompts that have ``cache_salt``."""
    if not cache_salt:
        return b""
    # by another function than pages: no salt looks like tokens that came before
    return hashlib.blake2b(cache_salt.encode(), digest_size=16, person=b"cache_salt").digest()


def page_digest(parent: bytes, tokens: Iterable[int]) -> bytes:
    """Return the name of a full page: it depends on the page's tokens and, through ``parent``, on
    all before them (`first_parent` for the first).
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

    def known(self, digests: Iterable[bytes]) -> int:
        """Return how many pages `match` would find."""
        return sum(1 for _ in itertools.takewhile(self._by_digest.__contains__, digests))

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

    def forget_all(self) -> None:
        """Let nobody match what is registered now."""
        self.forget(list(self._by_digest))

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


def page_bytes(geometry: Sequence[LayerGeometry], dtype: torch.dtype) -> int:
    """Return the bytes of one page, in all layers together."""
    return sum(layer.stored for layer in geometry) * PAGE * dtype.itemsize


def allocate_pages(
    count: int,
    geometry: Sequence[LayerGeometry],
    dtype: torch.dtype,
    device: torch.device,
    scales: Mapping[int, tuple[float, float]],
) -> dict[int, KVPages]:
    """Return ``count`` pages and page 0, where padding writes and nobody reads, by layer index.

    Args:
        scales: of keys and values of each layer with an 8-bit cache; latents have none.
    """
    pages = {}
    for layer in geometry:
        k_scale, v_scale = (
            (1.0, 1.0) if layer.keeps_latents else scales.get(layer.layer_idx, (1.0, 1.0))
        )
        shape = (count + 1, layer.kv_heads, PAGE)
        # written at once: zeros of a CPU would be given memory page by page, while it serves
        k = torch.empty(*shape, layer.head_dim, dtype=dtype, device=device).zero_()
        if layer.keeps_latents:
            v = k[..., : layer.v_head_dim]
        else:
            v = torch.empty(*shape, layer.v_head_dim, dtype=dtype, device=device).zero_()
        pages[layer.layer_idx] = KVPages(k, v, k_scale, v_scale, layer.keeps_latents)
    return pages


def allocate_states(
    rows: int,
    geometry: Sequence[StateGeometry],
    dtype: torch.dtype,
    device: torch.device,
    drafts: int = 0,
) -> dict[int, RecurrentStates]:
    """Return the states of ``rows`` sequences, by layer index; inputs are kept in ``dtype``.

    Args:
        drafts: the most drafts of a token.
    Raises: ResourceError, when they do not fit.
    """
    slots = 2 * drafts + 1 if drafts else 0
    each = sum(
        (math.prod(layer.conv_shape(drafts)) + slots * layer.draft_size) * dtype.itemsize
        + math.prod(layer.matrix) * 4
        for layer in geometry
    )
    try:
        return {
            layer.layer_idx: RecurrentStates(
                torch.empty(rows, *layer.conv_shape(drafts), dtype=dtype, device=device).zero_(),
                torch.empty(rows, *layer.matrix, device=device).zero_(),
                torch.zeros(rows, dtype=torch.int32, device=device),
                torch.empty(rows, slots, layer.draft_size, dtype=dtype, device=device).zero_(),
            )
            for layer in geometry
        }
    except torch.OutOfMemoryError:
        message = f"the states of {rows - 1} requests take {format_size(rows * each)}"
        raise ResourceError(
            "E_KV_CACHE",
            f"{message}, which is more than is free",
            hint="lower max_running_requests",
        ) from None


def copy_states(layers: Iterable[LayerCache], source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy the states of rows ``source`` to rows ``target``, int64 [R] each, in all layers."""
    for states in layers:
        if isinstance(states, RecurrentStates):
            for part in states.copied:
                part.index_copy_(0, target, part.index_select(0, source))


def cache_room(device: torch.device, *, static_share: float, step_bytes: int, budget: int) -> int:
    """Return the bytes that the KV cache may take on ``device``.

    Args:
        static_share: of a GPU's memory, for weights and cache together. On a CPU the cache takes
            `CPU_SHARE` of what is free, for this machine and for the process's control group.
        step_bytes: what the largest step and the CUDA graphs still need; the cache shrinks,
            with a warning, when they would not fit as well.
        budget: tokens of that step.
    """
    if device.type != "cuda":
        ours = limit_bytes() - psutil.Process().memory_info().rss
        return int(max(0, min(psutil.virtual_memory().available, ours)) * CPU_SHARE)
    free, total = torch.cuda.mem_get_info(device)
    room = int(total * static_share) - (total - free)
    if free - room >= step_bytes:
        return room
    lowered = free - step_bytes
    warnings.warn(
        f"the KV cache gets {format_size(lowered)} instead of {format_size(room)}: "
        f"a step of {budget} tokens needs the rest",
        stacklevel=2,
    )
    return lowered


def count_pages(
    room: int, size_bytes: int, *, most: int, wanted: int | None, device: torch.device
) -> int:
    """Return how many pages of ``size_bytes`` fit into ``room`` bytes.

    Args:
        most: more than these would never be used.
        wanted: exactly so many, if given.
    Raises: ResourceError, when there is no room for one page, or for ``wanted``.
    """
    count = min(most if wanted is None else wanted, room // size_bytes)
    if count >= 1 and (wanted is None or count == wanted):
        return count
    room = max(room, 0)
    hint = "a quarter of the free memory is taken"
    if device.type == "cuda":
        hint = "raise mem_fraction_static or lower chunked_prefill_size"
    raise ResourceError(
        "E_KV_CACHE",
        f"{format_size(room)} are left for the KV cache, which is "
        f"{room // size_bytes * PAGE} tokens",
        hint=f"{hint}; or lower max_total_tokens",
    )

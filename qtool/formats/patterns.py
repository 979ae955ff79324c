"""Regexes from configs. They come from outside, so all the matches of one are bounded in time."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from qtool.formats.layout import refused

BUDGET_S = 2.0
MAX_PATTERN = 2_000
MAX_PATTERNS = 200


class Pattern:
    """A regex that is matched at the start of names, as the engines do.

    Raises: CheckpointRefused, when it is none, or takes too long.
    """

    def __init__(self, pattern: str) -> None:
        import regex

        if len(pattern) > MAX_PATTERN:
            message = (
                f"a pattern of the config has {len(pattern):,} characters; the limit is "
                f"{MAX_PATTERN:,}"
            )
            raise refused("E_QUANT_PATTERN", message, "list the names instead")
        try:
            self._compiled: Any = regex.compile(pattern)
        except (regex.error, RecursionError) as error:
            raise refused(
                "E_QUANT_PATTERN",
                f"the config's pattern `{pattern[:200]}` is not a regular expression: {error}",
            ) from error
        self._pattern, self._left = pattern, BUDGET_S

    def match(self, name: str) -> bool:
        """Whether ``name`` begins with what the pattern describes."""
        start = time.perf_counter()
        try:
            found = self._compiled.match(name, timeout=self._left) is not None
        except TimeoutError:
            found, self._left = False, 0.0
        self._left -= time.perf_counter() - start
        if self._left <= 0:
            message = (
                f"the config's pattern `{self._pattern[:200]}` took longer than {BUDGET_S:.0f} s "
                f"to match names such as `{name[:200]}`"
            )
            raise refused("E_QUANT_PATTERN", message, "write it without repeats inside repeats")
        return found


def patterns_of(texts: Sequence[str]) -> list[Pattern]:
    """Return the patterns of a list.

    Raises: CheckpointRefused, when one is none, or there are more of them than any recipe needs.
    """
    if len(texts) > MAX_PATTERNS:
        raise refused(
            "E_QUANT_PATTERN",
            f"the config has {len(texts):,} patterns; the limit is {MAX_PATTERNS}",
            "list the names instead",
        )
    return [Pattern(text) for text in texts]


class Names:
    """A list of names in which ``re:`` begins a regex, as compressed-tensors writes it."""

    def __init__(self, entries: Iterable[str]) -> None:
        entries = list(entries)
        self._exact = frozenset(entry for entry in entries if not entry.startswith("re:"))
        self._patterns = patterns_of([entry[3:] for entry in entries if entry.startswith("re:")])

    def __contains__(self, name: str) -> bool:
        return name in self._exact or any(pattern.match(name) for pattern in self._patterns)

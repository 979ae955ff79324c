"""Regular expressions from outside, bounded in time and memory: those of recipes, of ``--ignore``
and of configs.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Protocol

from qtool.errors import QtoolError

BUDGET_S = 2.0  # of CPU time, for all patterns of one recipe or config together
MATCH_S = 0.1  # an ordinary match takes microseconds; a runaway one stores 1 GB a second
FREE_S = 5e-6  # of each match does not count: many layers and many patterns are allowed
MAX_PATTERN = 2_000
MAX_PATTERNS = 200
MAX_EXPANSION = 100_000  # characters of a pattern whose repeats are written out
_COUNTS = re.compile(r"\{\s*(\d*)\s*,?\s*(\d*)\s*\}", re.ASCII)


class _Match(Protocol):
    def __call__(self, string: str, *, timeout: float) -> object: ...


class PatternCompiler:
    """Compiles the patterns of one recipe or config, which share a budget of time.

    Args:
        owner: where the patterns are from, for messages, e.g. ``the config``.
        refused: makes the error from a message and a hint.
    """

    def __init__(self, owner: str, refused: Callable[[str, str], QtoolError]) -> None:
        self._owner, self._refused = owner, refused
        self._left_s, self._count = BUDGET_S, 0

    def compile(self, text: str) -> Pattern:
        """Return the pattern ``text``.

        Raises: what ``refused`` returns, when it is not a regular expression, or when it or all
            patterns together exceed a limit.
        """
        import regex

        self._check_limits(text)
        start = time.thread_time()
        try:
            # libraries use `re`: what only `regex` knows, such as recursion, is refused
            re.compile(text)
            match: _Match = regex.compile(text).match
        except (re.error, regex.error, OverflowError, RecursionError) as error:
            raise self._refused(
                f"the pattern `{text[:200]}` of {self._owner} is not a regular expression: {error}",
                "leave out `re:` for a name or a glob; a regular expression looks like "
                "`re:.*mlp.*down_proj$`",
            ) from None
        self._spend(time.thread_time() - start, text)
        return Pattern(self, text, match)

    def _check_limits(self, text: str) -> None:
        self._count += 1
        if self._count > MAX_PATTERNS:
            raise self._refused(
                f"{self._owner} has more than {MAX_PATTERNS} patterns", "list the names instead"
            )
        if len(text) > MAX_PATTERN:
            raise self._refused(
                f"a pattern of {self._owner} has {len(text):,} characters; the limit is "
                f"{MAX_PATTERN:,}",
                "list the names instead",
            )
        expansion = len(text)
        for counts in _COUNTS.findall(text):
            expansion *= max((int(count) for count in counts if count), default=1) or 1
        if expansion > MAX_EXPANSION:
            raise self._refused(
                f"the pattern `{text[:200]}` of {self._owner} repeats too much: written out it "
                f"has more than {MAX_EXPANSION:,} characters",
                "write `*` or `+` in place of large counts",
            )

    def _match(self, match: _Match, text: str, name: str) -> bool:
        start = time.thread_time()
        try:
            found = match(name, timeout=MATCH_S) is not None
        except (TimeoutError, MemoryError):
            raise self._too_slow(text, name) from None
        self._spend(time.thread_time() - start - FREE_S, text, name)
        return found

    def _spend(self, seconds: float, text: str, name: str = "") -> None:
        self._left_s -= max(seconds, 0)
        if self._left_s < 0:
            raise self._too_slow(text, name)

    def _too_slow(self, text: str, name: str) -> QtoolError:
        at = f" to match names such as `{name[:200]}`" if name else ""
        return self._refused(
            f"the pattern `{text[:200]}` of {self._owner} took too long{at}",
            "write it without repeats inside repeats",
        )


class Pattern:
    """A regular expression that is matched at the start of names, as the engines do."""

    def __init__(self, compiler: PatternCompiler, text: str, match: _Match) -> None:
        self._compiler, self._text, self._match = compiler, text, match

    def match(self, name: str) -> bool:
        """Whether ``name`` begins with what the pattern describes.

        Raises: what the compiler's ``refused`` returns, when it takes too long.
        """
        return self._compiler._match(self._match, self._text, name)

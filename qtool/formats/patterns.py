"""Regular expressions in configs, and lists of names with them."""

from __future__ import annotations

from collections.abc import Iterable

from qtool.formats.layout import refused
from qtool.patterns import PatternCompiler


def config_patterns() -> PatternCompiler:
    """Return a compiler for the patterns of one config, whose error is CheckpointRefused."""
    return PatternCompiler(
        "the config", lambda message, hint: refused("E_QUANT_PATTERN", message, hint)
    )


class Names:
    """A list of names in which ``re:`` begins a regex, as compressed-tensors writes it.

    Args:
        entries: the list.
        compiler: for its patterns, if other lists share their limits.
    """

    def __init__(self, entries: Iterable[str], compiler: PatternCompiler | None = None) -> None:
        entries = list(entries)
        compiler = compiler or config_patterns()
        self._exact = frozenset(entry for entry in entries if not entry.startswith("re:"))
        self._patterns = [
            compiler.compile(entry[3:]) for entry in entries if entry.startswith("re:")
        ]

    def __contains__(self, name: str) -> bool:
        return name in self._exact or any(pattern.match(name) for pattern in self._patterns)

"""Regular expressions in configs, and lists of names with them."""

from __future__ import annotations

from collections.abc import Iterable

from qtool.formats.layout import refused
from qtool.modules import FUSED, other_names
from qtool.patterns import PatternCompiler

FUSED_KINDS = tuple(kind.removesuffix("_proj") for kind in FUSED)


def config_patterns() -> PatternCompiler:
    """Return a compiler for the patterns of one config, whose error is CheckpointRefused."""
    return PatternCompiler(
        "the config", lambda message, hint: refused("E_QUANT_PATTERN", message, hint)
    )


class Names:
    """A list of names in which ``re:`` begins a regex, as compressed-tensors writes it. It has a
    module also where it has one of its `other_names`.

    Args:
        entries: the list.
        compiler: for its patterns, if other lists share their limits.
    """

    def __init__(self, entries: Iterable[str], compiler: PatternCompiler | None = None) -> None:
        entries = list(entries)
        compiler = compiler or config_patterns()
        self._exact = frozenset(entry for entry in entries if not entry.startswith("re:"))
        self._patterns = [
            (compiler.compile(entry[3:]), _depends_on_tool(entry[3:]))
            for entry in entries
            if entry.startswith("re:")
        ]

    def __contains__(self, name: str) -> bool:
        if name in self._exact or any(pattern.match(name) for pattern, _ in self._patterns):
            return True
        others = other_names(name)
        return not self._exact.isdisjoint(others) or any(
            pattern.match(other)
            for pattern, depends in self._patterns
            if depends
            for other in others
        )


def _depends_on_tool(pattern: str) -> bool:
    """Whether ``pattern`` may match another name of a module and not its own."""
    return not pattern.startswith(".*") or any(map(pattern.count, FUSED_KINDS))

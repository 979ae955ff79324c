"""How engines compare a module name with the entries of a list."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import translate
from typing import Literal

from qtool.errors import CheckpointRefused
from qtool.formats.patterns import config_patterns
from qtool.patterns import PatternCompiler

Matcher = Literal[
    "exact", "regex", "suffix", "ending", "substring", "component", "glob", "part_glob", "start"
]
WILDCARDS = frozenset("*?[")


def matcher(kinds: Iterable[Matcher], entries: Iterable[str]) -> Callable[[str], bool]:
    """Return a function that says whether an entry matches a name in one of the ways ``kinds``."""
    entries = [entry for entry in entries if entry]
    tests = [MATCHERS[kind](entries) for kind in kinds] if entries else []
    return lambda name: any(test(name) for test in tests)


def compiled(pattern: str, compiler: PatternCompiler) -> Callable[[str], bool]:
    """Return a function that says whether the regex ``pattern`` matches the start of a name.

    A pattern that is not a valid regex matches nothing.
    """
    try:
        return compiler.compile(pattern).match
    except CheckpointRefused:
        return lambda name: False


def _exact(entries: list[str]) -> Callable[[str], bool]:
    return frozenset(entries).__contains__


def _regex(entries: list[str]) -> Callable[[str], bool]:
    return _start([entry[3:] for entry in entries if entry.startswith("re:")])


def _suffix(entries: list[str]) -> Callable[[str], bool]:
    return _search(rf"(?:^|\.)(?:{_either(entries)})\Z")


def _ending(entries: list[str]) -> Callable[[str], bool]:
    endings = tuple(entries)
    return lambda name: name.endswith(endings)


def _substring(entries: list[str]) -> Callable[[str], bool]:
    return _search(_either(entries))


def _component(entries: list[str]) -> Callable[[str], bool]:
    return _search(rf"(?:^|\.)(?:{_either(entry.rstrip('.') for entry in entries)})(?:\.|\Z)")


def _glob(entries: list[str]) -> Callable[[str], bool]:
    exact = frozenset(entry for entry in entries if WILDCARDS.isdisjoint(entry))
    wild = _translate(entries)
    return lambda name: name in exact or bool(wild and wild.match(name))


def _part_glob(entries: list[str]) -> Callable[[str], bool]:
    glob = _glob([entry for entry in entries if "." not in entry])
    return lambda name: any(glob(part) for part in name.split("."))


def _start(entries: list[str]) -> Callable[[str], bool]:
    compiler = config_patterns()
    patterns = [compiled(entry, compiler) for entry in entries]
    return lambda name: any(matches(name) for matches in patterns)


def _translate(entries: list[str]) -> re.Pattern[str] | None:
    wild = [translate(entry) for entry in entries if not WILDCARDS.isdisjoint(entry)]
    return re.compile("|".join(wild)) if wild else None


def _either(entries: Iterable[str]) -> str:
    return "|".join(map(re.escape, entries))


def _search(pattern: str) -> Callable[[str], bool]:
    search = re.compile(pattern).search
    return lambda name: search(name) is not None


MATCHERS: Mapping[Matcher, Callable[[list[str]], Callable[[str], bool]]] = {
    "exact": _exact,
    "regex": _regex,  # entries that begin with `re:`, from the start of the name
    "suffix": _suffix,  # whole dotted parts
    "ending": _ending,
    "substring": _substring,
    "component": _component,  # whole dotted parts, anywhere
    "glob": _glob,
    "part_glob": _part_glob,  # one dotted part
    "start": _start,  # a regex, from the start of the name
}

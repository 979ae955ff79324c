"""Reads values of a config whose types nobody has checked: a wrong type counts as missing."""

from __future__ import annotations

from collections.abc import Mapping

MAX_WORD = 60  # characters of a value that messages repeat


def as_mapping(value: object) -> Mapping[str, object]:
    """Return ``value`` if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def as_list(value: object) -> list[object]:
    """Return ``value`` if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def as_strings(value: object) -> list[str]:
    """Return the strings in ``value`` if it is a list, else an empty list."""
    return [entry for entry in as_list(value) if isinstance(entry, str)]


def as_int(value: object) -> int | None:
    """Return ``value``; None when it is not a whole number. A bool is not one."""
    return value if type(value) is int else None


def as_word(value: object) -> str:
    """Return ``value`` cut for messages; an empty string when it is not printable text."""
    return value[:MAX_WORD] if isinstance(value, str) and value.isprintable() else ""

"""Which modules a LoRA adapter of PEFT adapts, as its config says: PEFT leaves out what an adapter
has for others.

Source: PEFT 0.21, `tuners/tuners_utils.py` `check_target_module_exists`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import cast

from qtool.checkpoint.strict_json import Json
from qtool.errors import QtoolError
from qtool.modules import is_head
from qtool.patterns import Pattern, PatternCompiler

ALL_LINEAR = "all-linear"


class Targets:
    """The fields of an adapter's config that choose modules.

    Args:
        config: of the adapter.
        refused: makes the error from a message and a hint.
    Raises: what ``refused`` returns, for a pattern that cannot be used.
    """

    def __init__(self, config: Json, refused: Callable[[str, str], QtoolError]) -> None:
        self._compiler = PatternCompiler("the adapter", refused)
        targets = config.get("target_modules")
        self._targets = self._chooser(targets)
        self._excluded = self._chooser(config.get("exclude_modules"))
        self._whole = [
            self._compiler.compile(rf"(^|.*\.){name}($|\..*)")
            for name in names_in(config, "modules_to_save")
        ]
        # names alone, not a pattern, are for the layers given
        layers = config.get("layers_to_transform")
        self._layers = None if isinstance(targets, str) else self._layer_patterns(layers, config)

    def reason_left_out(self, module: str) -> str | None:
        """Return the field by which PEFT leaves out what an adapter has for ``module``; None if it
        does not.
        """
        if self._excluded is not None and self._excluded(module):
            return "exclude_modules"
        if any(pattern.match(module) for pattern in self._whole):
            return "modules_to_save"
        if self._targets is None:  # PEFT then knows the class
            return None
        found = self._targets(module)
        if found is None:
            return "target_modules"
        if self._layers is None or found == module:
            return None
        is_in_layers = any(pattern.match(module) for pattern in self._layers)
        return None if is_in_layers else "layers_to_transform"

    def _layer_patterns(self, layers: object, config: Json) -> list[Pattern] | None:
        """Return what the names of modules in ``layers`` look like; None for all layers."""
        given = layers if isinstance(layers, list) else [layers]
        numbers = "|".join(str(number) for number in given if type(number) is int)
        if not numbers:
            return None
        names = names_in(config, "layers_pattern")
        stems = [rf"(?:^|.*?\.){name}" for name in names] or [r"[^.]*(?:\.[^.]*[^.\d][^.]*)*"]
        return [self._compiler.compile(rf"{stem}\.(?:{numbers})\.") for stem in stems]

    def _chooser(self, given: object) -> Callable[[str], str | None] | None:
        """Return what gives the name or pattern by which a module is chosen; None without any."""
        if not given:
            return None
        if given == ALL_LINEAR:
            return lambda module: None if is_head(module) else ALL_LINEAR
        if isinstance(given, str):
            pattern = self._compiler.compile(rf"(?:{given})\Z")
            return lambda module: given if pattern.match(module) else None
        names = [str(name) for name in cast(Collection[object], given)]
        return lambda module: _named(module, names)


def names_in(config: Json, field: str) -> list[str]:
    """Return the names in a field of an adapter's config."""
    given = config.get(field) or []
    return [given] if isinstance(given, str) else [str(name) for name in given]


def _named(module: str, names: Collection[str]) -> str | None:
    """Return which of ``names`` is that of ``module``, or its end."""
    if module in names:
        return module
    return next((name for name in names if module.endswith(f".{name}")), None)

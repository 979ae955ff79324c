"""YAML from outside, read strictly: bounded in size, no key twice, no aliases."""

from __future__ import annotations

from collections.abc import Hashable

import yaml

# PyYAML reads some 20,000 values or 500 kB a second
MAX_YAML_BYTES = 256 << 10
MAX_VALUES = 10_000
MAX_DEPTH = 20
MAX_SCALAR = 10_000

# PyYAML raises all of them
YAML_ERRORS = (
    yaml.YAMLError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class YamlLimitExceeded(Exception):
    """The file exceeds a limit on its size, its number of values or its depth."""


def parse_yaml(data: bytes) -> object:
    """Return the value in ``data``.

    Raises: YamlLimitExceeded; one of `YAML_ERRORS`, when it is not YAML.
    """
    if len(data) > MAX_YAML_BYTES:
        raise YamlLimitExceeded(f"it is too large: the limit is {MAX_YAML_BYTES:,} bytes")
    value: object = yaml.load(data.decode(), Loader=_StrictLoader)
    return value


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which otherwise keeps the last of two equal keys in silence, and knows
    aliases, a few of which make gigabytes.
    """

    _values = _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(
                None,
                None,
                "`*` makes an alias, which no recipe needs: quote a pattern, write a value out",
                mark,
            )
        self._values += 1
        self._depth += 1
        if self._values > MAX_VALUES:
            raise YamlLimitExceeded(f"it has more than {MAX_VALUES:,} keys and values")
        if self._depth > MAX_DEPTH:
            raise YamlLimitExceeded(f"it is nested more than {MAX_DEPTH} deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(node, yaml.ScalarNode) and len(node.value) > MAX_SCALAR:
            raise YamlLimitExceeded(f"a value is longer than {MAX_SCALAR:,} characters")
        return node

    def construct_mapping(
        self, node: yaml.MappingNode, deep: bool = False
    ) -> dict[Hashable, object]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key `{key}` appears twice", node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)

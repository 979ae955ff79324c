"""YAML from outside, read strictly: no key twice, no aliases."""

from __future__ import annotations

from collections.abc import Hashable

import yaml

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


def parse_yaml(data: bytes) -> object:
    """Return the value in ``data``. Raises: one of `YAML_ERRORS`, when it is not YAML."""
    value: object = yaml.load(data.decode(), Loader=_StrictLoader)
    return value


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which otherwise keeps the last of two equal keys in silence, and knows
    aliases, a few of which make gigabytes.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(
                None,
                None,
                "`*` makes an alias, which no recipe needs: quote a pattern, write a value out",
                mark,
            )
        return super().compose_node(parent, index)

    def construct_mapping(
        self, node: yaml.MappingNode, deep: bool = False
    ) -> dict[Hashable, object]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key `{key}` appears twice", node.start_mark
                )
        return super().construct_mapping(node, deep)

"""YAML for ``--config``: what is written for a value is its text, and the flag's type says what to make of it.

YAML itself makes a truth value of ``yes``, a number of ``12``, and nothing of an instruction that begins with ``#``.
"""

from __future__ import annotations

from typing import Any

import jsonargparse
import yaml

__all__ = ["MODE", "load"]

MODE = "lit-thought"
"""The name under which jsonargparse knows :func:`load`, so that the parsers of others keep their own."""
_NULL, _MERGE = "tag:yaml.org,2002:null", "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """Plain words stay text, but null. A key that comes twice is refused, where YAML takes the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if key.tag != _MERGE and keys.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value!r} stands here twice; keep one of them", problem_mark=key.start_mark
                )
        return super().construct_mapping(node, deep)

    def construct_yaml_null(self, node: yaml.ScalarNode) -> None:
        if not node.value:
            raise yaml.constructor.ConstructorError(
                problem="there is no value here; put a text that begins with # into quotes, or write null for none",
                problem_mark=node.start_mark,
            )


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in (_NULL, _MERGE)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_constructor(_NULL, _Loader.construct_yaml_null)


def load(text: str) -> Any:
    """The value of a YAML text: of a mapping or a list the entries as text; one alone, such as an entry of a mapping of
    any values, as jsonargparse has it (numbers, truth values)."""
    loader = _Loader(text)
    try:
        value = loader.get_single_data()
    finally:
        loader.dispose()
    return jsonargparse.get_loader("yaml")(text) if isinstance(value, str) else value


jsonargparse.set_loader(MODE, load, (yaml.YAMLError,))

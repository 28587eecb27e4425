"""Checks of an answer's text, for ``evaluate``: a regular expression, a JSON schema."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NoReturn

from lit_thought.errors import ThoughtError
from lit_thought.files import expanded, parse_json, read_json

__all__ = ["Check", "follows", "matches"]

Check = Callable[[str], bool]
"""Whether an answer is what it should be."""
_VALUES = ("const", "enum", "default", "examples")
"""Keywords of a schema that hold values rather than schemas."""
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Those that hold schemas by name."""
_SCHEMA = 'Expected a JSON schema, such as {"type": "object", "required": ["city"]}.'


def matches(pattern: str) -> Check:
    r"""Whether a regular expression is found anywhere in a text, as ``re.search`` looks for it.

    Args:
        pattern: the expression, such as ``\A[A-Z ]+\Z`` for a text of nothing else.

    Raises:
        ThoughtError: for one that is none.

    Example:
        >>> matches("^[A-Z]+$")("PARIS")
        True
    """
    try:
        found = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ThoughtError(
            f"check={pattern!r} is no regular expression ({error}). Expected Python's syntax, in which "
            "( ) [ { . ^ $ * + ? | and \\ stand for themselves only after another \\."
        ) from error
    return lambda text: found.search(text) is not None


def follows(file: str) -> Check:
    """Whether a text is, from its beginning to its end, JSON that follows a schema.

    What a schema refers to must be in it: nothing is fetched.

    Args:
        file: the JSON schema, of the draft that its ``$schema`` names, of 2020-12 without.

    Raises:
        ThoughtError: for a file that holds none, or where jsonschema is missing.

    Source:
        https://json-schema.org/draft/2020-12
    """
    try:
        from jsonschema import SchemaError
        from jsonschema.validators import Draft202012Validator, validator_for
        from referencing import Registry, Resource
        from referencing.exceptions import Unresolvable
        from referencing.jsonschema import DRAFT202012, specification_with
    except ImportError as error:
        raise ThoughtError(
            "check_schema: it needs the package jsonschema. Install it: pip install 'lit-thought[schema]'"
        ) from error
    try:
        schema = read_json(expanded(file, "check_schema"))
    except (OSError, ValueError) as error:
        raise ThoughtError(f"check_schema={file!r} cannot be read ({error}). {_SCHEMA}") from error
    if not isinstance(schema, dict) or not isinstance(schema.get("$schema", ""), str):
        raise ThoughtError(f"check_schema={file!r} is {schema!r:.60}. {_SCHEMA}")
    kind = validator_for(schema, default=Draft202012Validator)
    draft = specification_with(schema.get("$schema", ""), default=DRAFT202012)
    registry: Any = Registry()  # without one, jsonschema asks the network for what a schema refers to

    def look_up(value: Any, place: Any, named: bool = False) -> None:
        """What is referred to, wherever that is: most of it comes up with some texts only. Of schemas by name, the
        names are no keywords."""
        if isinstance(value, dict):
            if not named and isinstance(value.get("$id"), str):
                place = place.in_subresource(Resource.from_contents(value, default_specification=draft))
            for name in ("$ref", "$dynamicRef"):
                if not named and isinstance(value.get(name), str):
                    place.lookup(value[name])
            for name, own in value.items():
                if named or name not in _VALUES:
                    look_up(own, place, not named and name in _BY_NAME)
        for own in value if isinstance(value, list) else ():
            look_up(own, place)

    def tried(check: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return check(*arguments)
        except (Unresolvable, RecursionError) as error:
            raise ThoughtError(
                f"check_schema={file!r} refers to what is not in it, or to itself without end ({error}). Write what it "
                "refers to into its $defs."
            ) from error

    def check(text: str) -> bool:
        try:
            value = parse_json(text, parse_constant=_no_json)
        except ValueError:
            return False
        return bool(tried(validator.is_valid, value))

    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise ThoughtError(
            f"check_schema={file!r} is no JSON schema ({error.json_path}: {error.message:.200}). {_SCHEMA}"
        ) from error
    validator = kind(schema, registry=registry)
    root = Resource.from_contents(schema, default_specification=draft)
    tried(look_up, schema, registry.resolver_with_root(root))
    tried(validator.is_valid, None)
    return check


def _no_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")

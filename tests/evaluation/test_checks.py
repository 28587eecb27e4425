"""Checks of outputs: what passes, and that a check that is none is refused before anything runs."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from fits import readable
from models import make_model, make_tokenizer
from patches import make_patch as random_patch

from lit_thought import evaluate
from lit_thought.errors import ThoughtError
from lit_thought.evaluation.checks import follows, matches
from lit_thought.evaluation.compare import Evaluation

CITY = {
    "type": "object",
    "required": ["city"],
    "properties": {"city": {"type": "string", "pattern": "^[A-Z]"}, "near": {"$ref": "#/$defs/cities"}},
    "$defs": {"cities": {"type": "array", "items": {"$ref": "#"}}},
}


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def written(schema: Any) -> str:
        file = tmp_path / "schema.json"
        file.write_text(schema if isinstance(schema, str) else json.dumps(schema), encoding="utf-8")
        return str(file)

    return written


def test_a_regular_expression_is_searched_for() -> None:
    assert [matches("b+")(text) for text in ("abba", "ac", "")] == [True, False, False]
    assert [matches(r"\A[A-Z ]+\Z")(text) for text in ("LOUD", "LOUD\nquiet")] == [True, False]


@pytest.mark.parametrize("pattern", ["(", "*", "[a", "a{99999999999999999999}", "(?P<1>a)"])
def test_what_is_no_expression_is_refused(pattern: str) -> None:
    with pytest.raises(ThoughtError, match=r"^check='.* is no regular expression \(.*\)\. Expected Python's syntax"):
        matches(pattern)


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ('{"city": "Paris"}', True),
        ('  {"city": "Paris", "near": [{"city": "Sèvres"}]}\n', True),
        ('{"city": "Paris", "near": [{}]}', False),
        ('{"city": "paris"}', False),
        ('{"city": "Paris"} and more', False),
        ('Here it is: {"city": "Paris"}', False),
        ('{"city": "Paris", "heat": NaN}', False),  # Python reads it, and JSON has it not
        ("[" * 100_000, False),
        ('"Paris"', False),
        ("", False),
    ],
)
def test_the_whole_output_is_json_that_follows_the_schema(text: str, passes: bool, write: Any) -> None:
    pytest.importorskip("jsonschema")
    assert follows(write(CITY))(text) is passes


def test_the_draft_is_the_one_that_the_schema_names(write: Any) -> None:
    pytest.importorskip("jsonschema")
    exclusive = {"minimum": 1, "exclusiveMinimum": True}  # as only draft 4 has it
    assert not follows(write({"$schema": "http://json-schema.org/draft-04/schema#", **exclusive}))("1")
    with pytest.raises(ThoughtError, match="is no JSON schema"):
        follows(write(exclusive))


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("{", r"cannot be read \("),
        ("[]", r"is \[\]\. Expected a JSON schema"),
        ({"$schema": 5}, "Expected a JSON schema"),
        ({"type": "thing"}, r"is no JSON schema \(\$\.type: 'thing'"),
        ({"pattern": "("}, r"is no JSON schema \(\$\.pattern"),
        ({"$ref": "#"}, "refers to what is not in it, or to itself without end"),
        ({"properties": {"a": {"$ref": "other.json"}}}, "refers to what is not in it.*other.json"),
        ({"items": [{"$ref": "#/$defs/none"}]}, "is no JSON schema"),
        ({"prefixItems": [{"$ref": "#/$defs/none"}]}, "refers to what is not in it.*none"),
        ({"properties": {"a": {"$ref": "http://127.0.0.1:1/a.json"}}}, "refers to what is not in it"),
    ],
)
def test_what_is_no_schema_is_refused(schema: Any, message: str, write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jsonschema")
    monkeypatch.setattr(socket, "socket", lambda *args, **kwargs: pytest.fail("the network was asked"))
    with pytest.raises(ThoughtError, match=f"^check_schema='.*{message}"):
        follows(write(schema))


def test_a_reference_that_never_ends_is_told_when_it_comes_up(write: Any) -> None:
    pytest.importorskip("jsonschema")
    check = follows(write({"properties": {"a": {"$ref": "#/properties/a"}}}))
    assert check("{}")
    with pytest.raises(ThoughtError, match="to itself without end"):
        check('{"a": 1}')


def test_a_missing_file_and_a_missing_package_are_named(
    tmp_path: Path, write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if pytest.importorskip("jsonschema"):
        with pytest.raises(ThoughtError, match=r"^check_schema=.*cannot be read \(there is no such file\)"):
            follows(str(tmp_path / "nothing.json"))
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(ThoughtError, match=r"^check_schema: it needs .*pip install 'lit-thought\[schema\]'"):
        follows(write(CITY))


def test_a_check_that_fails_is_told_before_a_patch_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Evaluation, "score", lambda *args: pytest.fail("the patch is measured"))
    model, tokenizer = readable(make_model("llama").float()), make_tokenizer()
    asked = {
        "instruction": "Be brief.\n",
        "pairs": [{"input": "hot"}],
        "template": "{input}\n{output}\n",
        "unrelated": None,
        "progress": False,
    }
    with pytest.raises(ThoughtError, match=r"check fails on the answer '.*' \(JSONDecodeError"):
        evaluate(model, tokenizer, random_patch(model), check=lambda text: json.loads(text)["a"], **asked)


def test_schemas_of_earlier_drafts_and_values_in_schemas(write: Any) -> None:
    pytest.importorskip("jsonschema")
    seventh = {"$schema": "http://json-schema.org/draft-07/schema#", "definitions": {"word": {"type": "string"}}}
    seventh |= {"properties": {"a": {"$id": "#here", "properties": {"b": {"$ref": "#/definitions/word"}}}}}
    check = follows(write(seventh))
    assert [check(text) for text in ('{"a": {"b": "c"}}', '{"a": {"b": 1}}')] == [True, False]
    for name in ("default", "$id", "$ref"):  # names of properties
        assert follows(write({"properties": {name: {"type": "string"}}}))(json.dumps({name: "x"}))
    with pytest.raises(ThoughtError, match=r"refers to what is not in it.*/none"):
        follows(write({"properties": {"default": {"$ref": "#/none"}}}))
    for keyword, value in (("const", {"$ref": "x"}), ("enum", [{"$ref": "x"}]), ("default", {"$ref": "x"})):
        assert follows(write({keyword: value}))(json.dumps({"$ref": "x"}))

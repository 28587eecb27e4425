"""Pairs from files and lists, with the Alpaca names ``instruction``, ``input`` and ``output``."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from json import JSONDecodeError
from os import PathLike
from pathlib import Path
from typing import Any

from lit_thought.errors import ThoughtError, did_you_mean
from lit_thought.files import expanded, parse_json

__all__ = ["check_unicode", "load_pairs", "pair_instructions"]

_KEYS = ("instruction", "input", "output")


def load_pairs(source: str | PathLike[str] | Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Read and check pairs.

    Args:
        source: A ``.json`` file (a list of objects), a ``.jsonl`` file (an object a line; blank lines are
            skipped), a ``.csv`` file with a header (empty cells count as missing), or a list of mappings.
            Keys: ``input`` (required), ``output`` (optional: where it is missing, the instructed model writes
            it), ``instruction`` (optional: overrides the common instruction).

    Returns:
        One dictionary a pair, with the keys that have a value.

    Raises:
        ThoughtError: A missing or unreadable file, an unknown suffix, malformed content, no pairs, an unknown
            key, a blank ``input`` or ``instruction``, or a value that is not a string; names the file and the
            line or item.
    """
    if isinstance(source, str | PathLike):
        rows = _read(expanded(source, "pairs"))
        name = str(source)
    elif isinstance(source, list | tuple):
        rows = ((f"pairs[{index}]", row) for index, row in enumerate(source))
        name = f"an empty {type(source).__name__}"
    else:
        raise ThoughtError(
            "pairs: expected a path to a .json, .jsonl or .csv file, or a list of mappings; got "
            f"{type(source).__name__}; put a single pair into a list"
        )
    pairs = [_check(where, row) for where, row in rows]
    if not pairs:
        raise ThoughtError(f"pairs is empty: expected at least one pair with an 'input', got {name}")
    return pairs


def _read(path: Path) -> Iterator[tuple[str, object]]:
    """The rows of a file, each with its place for error messages."""
    readers = {".json": _read_json, ".jsonl": _read_jsonl, ".csv": _read_csv}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ThoughtError(f"pairs: expected a file that ends in .json, .jsonl or .csv, got {str(path)!r}; convert it")
    if not path.is_file():
        raise ThoughtError(f"pairs: expected a file, but there is none at {str(path)!r}; check the path")
    try:
        text = path.read_bytes().decode("utf-8-sig")  # spreadsheets put a byte order mark before CSV
    except UnicodeDecodeError as error:
        raise ThoughtError(
            f"pairs: expected UTF-8 text, but {path} has an undecodable byte at offset {error.start}; "
            "save the file as UTF-8"
        ) from error
    except OSError as error:
        raise ThoughtError(f"pairs: cannot read {path}: {error.strerror}; check its permissions") from error
    yield from reader(path, text)


def _parse(text: str, where: str, first_line: int = 1) -> object:
    try:
        return parse_json(text, object_pairs_hook=_object)
    except JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ThoughtError(
            f"pairs: malformed JSON in {where}, line {line}, column {error.colno}: {error.msg}; correct it"
        ) from error
    except ValueError as error:
        raise ThoughtError(
            f"pairs: unreadable JSON in {where}, from line {first_line} on: {error}; correct it"
        ) from error


def _object(entries: list[tuple[str, object]]) -> dict[str, object]:
    """An object, none of whose keys comes twice: JSON would take the last one."""
    found = dict(entries)
    if len(found) < len(entries):
        keys = [key for key, _ in entries]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in an object")
    return found


def _read_json(path: Path, text: str) -> Iterator[tuple[str, object]]:
    rows = _parse(text, str(path))
    if not isinstance(rows, list):
        raise ThoughtError(
            f"pairs: expected {path} to hold a list of objects, got {type(rows).__name__}; put the pairs "
            "into [...], or name the file .jsonl if it has an object a line"
        )
    for index, row in enumerate(rows):
        yield f"{path}, item {index}", row


def _read_jsonl(path: Path, text: str) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: JSON strings may hold U+2028
        if line.strip():
            yield f"{path}, line {number}", _parse(line, str(path), number)


def _read_csv(path: Path, text: str) -> Iterator[tuple[str, object]]:
    _check_commas(path, text.partition("\n")[0].strip())
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        header = list(reader.fieldnames or [])
        if "input" not in header or len(set(header)) < len(header):
            raise ThoughtError(
                f"pairs: expected a header with one column 'input' in {path}, line 1, and optionally "
                f"'output' and 'instruction'; got {header}"
            )
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row:
                raise ThoughtError(
                    f"{where}: expected {len(header)} cells, got {len(header) + len(row[None])}; put cells "
                    'that contain commas into "double quotes"'
                )
            if not any(row.values()):
                raise ThoughtError(f"{where}: all cells of the row are empty; fill them or remove the row")
            yield where, {key: value for key, value in row.items() if value or key not in _KEYS}
    except csv.Error as error:
        line = reader.reader.line_num
        if "field limit" in str(error):
            raise ThoughtError(
                f"pairs: a cell of {path} is too long for CSV: it reaches line {line}, and more than "
                f"{csv.field_size_limit()} characters are not read. If a quote is missing there or before, put it; "
                "otherwise save the pairs as .json or .jsonl"
            ) from error
        raise ThoughtError(
            f"pairs: malformed CSV in {path}, line {line}: {error}; check the quotes there and before"
        ) from error


def _check_commas(path: Path, header: str) -> None:
    if header.startswith("sep="):
        raise ThoughtError(f"pairs: the first line of {path} is for spreadsheets ({header}); remove it")
    for name, mark in (("semicolons", ";"), ("tabs", "\t")):
        if mark in header and "," not in header and "input" in [cell.strip('" ') for cell in header.split(mark)]:
            raise ThoughtError(
                f"pairs: expected commas between the cells of {path}, but its header has {name}; save it with commas, "
                "or as .jsonl"
            )


def _check(where: str, row: object) -> dict[str, str]:
    if not isinstance(row, Mapping):
        raise ThoughtError(
            f"{where}: expected an object with the keys input, output, instruction; got {type(row).__name__}"
        )
    unknown = [key for key in row if key not in _KEYS]
    if unknown:
        near = did_you_mean(str(unknown[0]), _KEYS)
        raise ThoughtError(
            f"{where}: unknown key {unknown[0]!r}; allowed are 'input', 'output' and 'instruction'; rename or remove "
            f"it.{near}"
        )
    pair = {key: row[key] for key in _KEYS if row.get(key) is not None}
    for key, value in pair.items():
        if not isinstance(value, str):
            raise ThoughtError(
                f"{where}: expected {key!r} to be a string, got {type(value).__name__} ({value!r}); quote it"
            )
        check_unicode(f"{where}: {key!r}", value)
        if key != "output" and not value.strip():
            raise ThoughtError(
                f"{where}: {key!r} is blank; give it some text"
                + (", or leave the key out" if key == "instruction" else "")
            )
    if "input" not in pair:
        raise ThoughtError(f"{where}: the required key 'input' is missing; every pair needs an input")
    return pair


def check_unicode(name: str, text: str) -> None:
    """Check that a text can be written as UTF-8, which tokenizers take.

    Raises:
        ThoughtError: when it holds half of a surrogate pair, which JSON escapes can make.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ThoughtError(
            f"{name} holds {text[error.start]!r} at character {error.start}, half of a surrogate pair and no "
            "character; save it as UTF-8 again"
        ) from error


def pair_instructions(pairs: Sequence[Mapping[str, str]], instruction: str | None) -> list[str]:
    """Each pair's own instruction, or the common one.

    Raises:
        ThoughtError: when a pair has neither, or an instruction is empty.
    """
    chosen = [pair.get("instruction", instruction) for pair in pairs]
    for index, text in enumerate(chosen):
        if not isinstance(text, str) or not text.strip():
            raise ThoughtError(
                f"instruction must be a text that is not empty; pair {index} has {text!r}. "
                "Pass instruction=..., or give each pair its own."
            )
        check_unicode("instruction", text)
    return chosen  # type: ignore[return-value]

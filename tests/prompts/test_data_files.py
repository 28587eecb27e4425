"""Pairs from files and lists: what is read, and what is refused with which words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lit_thought.errors import ThoughtError
from lit_thought.prompts.pairs import load_pairs

PAIRS = [
    {"input": "hot", "output": "cold"},
    {"input": "big, or\n“large”"},
    {"instruction": "Opposites.", "input": "up", "output": "down"},
]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_json(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.json", json.dumps(PAIRS, indent=2))
    assert load_pairs(path) == load_pairs(str(path)) == PAIRS


def test_jsonl(tmp_path: Path) -> None:
    lines = [json.dumps(PAIRS[0]), "", json.dumps({**PAIRS[1], "output": None}), json.dumps(PAIRS[2]), " "]
    assert load_pairs(write(tmp_path / "pairs.JSONL", "\r\n".join(lines))) == PAIRS


def test_jsonl_keeps_line_separators_inside_strings(tmp_path: Path) -> None:
    line = json.dumps({"input": "a\u2028b\x85c"}, ensure_ascii=False)
    assert load_pairs(write(tmp_path / "pairs.jsonl", line)) == [{"input": "a\u2028b\x85c"}]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["no byte order mark", "byte order mark"])
def test_csv(tmp_path: Path, mark: bytes) -> None:
    rows = 'input,output,instruction\nhot,cold,\n"big, or\n“large”",,\nup,down,Opposites.\n'
    assert load_pairs(write(tmp_path / "pairs.csv", mark + rows.encode())) == PAIRS


def test_csv_without_optional_columns(tmp_path: Path) -> None:
    assert load_pairs(write(tmp_path / "pairs.csv", "input\r\nhot\r\nbig\r\n")) == [
        {"input": "hot"},
        {"input": "big"},
    ]


def test_lists_are_copied_without_none() -> None:
    source = ({"input": "hot", "output": None, "instruction": None}, {"input": "big", "output": ""})
    loaded = load_pairs(source)
    assert loaded == [{"input": "hot"}, {"input": "big", "output": ""}]
    loaded[1]["output"] = "small"
    assert source[1]["output"] == ""


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ([], "pairs is empty.*got an empty list"),
        ((), "pairs is empty.*got an empty tuple"),
        ({"input": "hot"}, "expected a path.*got dict"),
        (None, "expected a path.*got NoneType"),
        (["hot"], r"pairs\[0\]: expected an object.*got str"),
        ([PAIRS[0], {"output": "cold"}], r"pairs\[1\]: the required key 'input' is missing"),
        ([{"input": None}], "'input' is missing"),
        ([{"input": " "}], r"pairs\[0\]: 'input' is blank"),
        ([{"input": "hot", "instruction": ""}], "'instruction' is blank.*leave the key out"),
        ([{"input": 3}], r"pairs\[0\]: expected 'input' to be a string, got int \(3\)"),
        ([{"input": "hot", "output": ["cold"]}], "expected 'output' to be a string, got list"),
        (
            [{"input": "hot", "ouput": "cold"}],
            "unknown key 'ouput'; allowed are 'input', 'output' and 'instruction'",
        ),
    ],
)
def test_bad_lists(source: list[object], match: str) -> None:
    with pytest.raises(ThoughtError, match=match):
        load_pairs(source)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("pairs.txt", "input\nhot\n", r"ends in \.json, \.jsonl or \.csv, got .*pairs\.txt"),
        ("pairs", "[]", r"ends in \.json"),
        ("pairs.json", "[]", r"pairs is empty.*pairs\.json"),
        ("pairs.jsonl", "\n\n", r"pairs is empty.*pairs\.jsonl"),
        ("pairs.csv", "input,output\n", r"pairs is empty.*pairs\.csv"),
        (
            "pairs.json",
            '[{"input": "hot"},\n {"input": }]',
            r"malformed JSON in .*pairs\.json, line 2, column 12",
        ),
        ("pairs.jsonl", '{"input": "hot"}\n\n{"input": \n', r"malformed JSON in .*pairs\.jsonl, line 3"),
        ("pairs.json", '{"input": "hot"}', r"pairs\.json to hold a list of objects, got dict"),
        ("pairs.json", "[3]", r"pairs\.json, item 0: expected an object.*got int"),
        (
            "pairs.jsonl",
            '{"input": "hot"}\n\n{"output": "x"}',
            r"pairs\.jsonl, line 3: the required key 'input'",
        ),
        (
            "pairs.csv",
            "question,output\nhot,cold\n",
            r"column 'input' in .*pairs\.csv.*got \['question', 'output'\]",
        ),
        ("pairs.csv", "input,input\nhot,cold\n", "one column 'input'"),
        ("pairs.csv", "", "one column 'input'"),
        ("pairs.csv", "input,note\nhot,\n", r"pairs\.csv, line 2: unknown key 'note'"),
        ("pairs.csv", "input,output\nhot,cold\n,cold\n", r"pairs\.csv, line 3: the required key 'input'"),
        ("pairs.csv", "input,output\nhot,cold,warm\n", r"pairs\.csv, line 2: expected 2 cells, got 3"),
        ("pairs.csv", "input;output\nhot;cold\n", r"expected commas .*pairs\.csv.*header has semicolons.*\.jsonl"),
        ("pairs.csv", "input\toutput\nhot\tcold\n", r"expected commas .*pairs\.csv.*header has tabs"),
        ("pairs.csv", '"input";"output"\n"a, b";"c"\n', r"header has semicolons"),
        ("pairs.csv", "sep=;\ninput;output\n", r"first line of .*pairs\.csv is for spreadsheets \(sep=;\); remove it"),
        ("pairs.csv", "sep=,\ninput,output\n", r"\(sep=,\); remove it"),
        ("pairs.csv", "input,output\nhot,cold\n,\n", r"pairs\.csv, line 3: all cells of the row are empty"),
        ("pairs.csv", "input,output\n,\nhot,cold\n", r"pairs\.csv, line 2: all cells of the row are empty"),
        (
            "pairs.csv",
            f"input\nhot\n{'a' * 131_073}\n",
            r"too long for CSV: it reaches line 3.*131072.*\.json or \.jsonl",
        ),
        ("pairs.csv", 'input,output\n"hot,cold\n' + "big,small\n" * 20_000, r"too long for CSV.*a quote is missing"),
        ("pairs.csv", 'input,output\n"hot,cold\n', r"malformed CSV in .*pairs\.csv, line 2"),
        (
            "pairs.csv",
            b"input\nh\xf6t\n",
            r"UTF-8 text, but .*pairs\.csv has an undecodable byte at offset 7",
        ),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str | bytes, match: str) -> None:
    with pytest.raises(ThoughtError, match=match):
        load_pairs(write(tmp_path / name, content))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ThoughtError, match=r"there is none at .*pairs\.json"):
        load_pairs(tmp_path / "pairs.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(ThoughtError, match="there is none at"):
        load_pairs(tmp_path / "folder.json")


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_key_that_comes_twice_is_refused(suffix: str, tmp_path: Path) -> None:
    row = '{"input": "hot", "input": "big"}'
    file = tmp_path / f"pairs{suffix}"
    file.write_text(row if suffix == ".jsonl" else f"[{row}]", encoding="utf-8")
    with pytest.raises(ThoughtError, match=r"the key 'input' stands twice in an object"):
        load_pairs(file)

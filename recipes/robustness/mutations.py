"""Ways to spoil a file or a value, drawn from a seeded generator: parts of fuzzing.py.

Bytes are flipped, cut, put in and taken out; text is written in another encoding; of JSON a value is replaced by
one of another type, a key is lost, doubled or renamed, values are nested too deep; of safetensors the header is
spoilt as JSON, or tensors are lost, renamed, of another shape or dtype, not finite; files become folders or links.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load, save

_DEEP, _LONG = "too deep", "too long"
ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 3, 2**31, 2**63, -(2**70), 10**400, 0.5, -0.0, 1e308, -1e308),
    *(float("nan"), float("inf"), "", " ", "x", "0", "null", "chat", "\x00", "\ud800", "\u2028", "é" * 300, "{input}"),
    *(
        "../../../etc/passwd",
        "/etc/passwd",
        "~nobody/x",
        "a/../..",
        "C:\\x",
        "file:///etc/passwd",
        "(" * 200,
        "a{9999999999}",
    ),
    *([], {}, [None], [[]], {"": None}, {"x": 1}, [1, "x"], ["x"] * 200, _DEEP, _LONG),
]
"""What takes the place of a value."""


def spoil_value(value: Any, draw: Random) -> tuple[str, Any]:
    """A copy of a JSON value with one change, and the name of the change; :func:`dumped` writes it."""
    value = json.loads(json.dumps(value))
    holder = {"": value}
    owner, key = draw.choice(list(_places(holder)))
    how = draw.choice(["replace"] * 6 + ["drop", "add", "rename", "wrap", "swap"])
    if how == "drop" and owner is not holder:
        del owner[key]
    elif how == "add" and isinstance(owner[key], (dict, list)):
        _put(owner[key], draw)
    elif how == "rename" and isinstance(owner, dict) and owner is not holder:
        owner[draw.choice([f"{key}x", "", str(key).upper()])] = owner.pop(key)
    elif how == "wrap":
        owner[key] = draw.choice([[owner[key]], {"x": owner[key]}])
    elif how == "swap":
        other, place = draw.choice(list(_places(holder)))
        owner[key] = json.loads(json.dumps(other[place]))
    else:
        how = "replace"
        owner[key] = draw.choice(ODD)
    return f"value: {how}", holder[""]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of a value in a tree of dictionaries and lists: its owner, and the key or index there."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from _places(value[key])


def _put(owner: Any, draw: Random) -> None:
    if isinstance(owner, dict):
        owner[draw.choice(["x", "", "__class__", "format_version"])] = draw.choice(ODD)
    else:
        owner.insert(draw.randrange(len(owner) + 1), draw.choice(ODD))


def dumped(value: Any, draw: Random) -> str:
    """A spoilt value as JSON text; now and then with a key that is there twice."""
    text = json.dumps(value, ensure_ascii=draw.random() < 0.8)
    text = text.replace(json.dumps(_DEEP), "[" * 20_000 + "]" * 20_000).replace(json.dumps(_LONG), "9" * 5_000)
    if text.startswith("{") and draw.random() < 0.1 and value:
        text = "{" + json.dumps(draw.choice(list(value))) + ": " + json.dumps(draw.choice(ODD[:12])) + ", " + text[1:]
    return text


def spoil_bytes(data: bytes, draw: Random) -> tuple[str, bytes]:
    """A change that knows nothing of the format."""
    start = draw.randrange(len(data) + 1)
    stop = min(len(data), start + draw.choice([1, 1, 2, 8, 64]))
    noise = draw.randbytes(stop - start)
    flipped = bytes(byte ^ (1 << draw.randrange(8)) for byte in data[start:stop])
    changes: dict[str, Callable[[], bytes]] = {
        "flip": lambda: data[:start] + flipped + data[stop:],
        "noise": lambda: data[:start] + noise + data[stop:],
        "zeros": lambda: data[:start] + bytes(stop - start) + data[stop:],
        "cut off": lambda: data[:start],
        "cut out": lambda: data[:start] + data[stop:],
        "put in": lambda: data[:start] + draw.randbytes(draw.choice([1, 8, 100])) + data[start:],
        "twice": lambda: data + data,
        "empty": lambda: b"",
        "a pickle": lambda: b"\x80\x04\x95\x15\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
    }
    name = draw.choice(["flip"] * 4 + ["cut off"] * 2 + list(changes))
    return f"bytes: {name}", changes[name]()


def spoil_text(data: bytes, draw: Random) -> tuple[str, bytes]:
    """A change of encoding, of line ends, or of some characters."""
    text = data.decode()
    start = draw.randrange(len(text) + 1)
    odd = draw.choice(
        ['"', "'", "{", "}", "[", "]", ",", ":", "\x00", "\ufeff", "\u2028", "\\ud800", "\r", "\t", "&", "!!"]
    )
    changes: dict[str, Callable[[], bytes]] = {
        "UTF-16": lambda: text.encode("utf-16"),
        "UTF-32": lambda: text.encode("utf-32"),
        "Latin-1": lambda: f"{text[:start]}é{text[start:]}".encode("latin-1", "replace"),
        "byte order mark": lambda: b"\xef\xbb\xbf" + data,
        "CRLF": lambda: text.replace("\n", "\r\n").encode(),
        "CR": lambda: text.replace("\n", "\r").encode(),
        "blank": lambda: b" \n\n ",
        "character": lambda: f"{text[:start]}{odd}{text[start:]}".encode(),
        "character lost": lambda: f"{text[:start]}{text[start + 1 :]}".encode(),
        "deep": lambda: b"[" * 20_000,
        "upper case": lambda: text.upper().encode(),
    }
    name = draw.choice(["character"] * 4 + ["character lost"] * 4 + list(changes))
    return f"text: {name}", changes[name]()


def spoil_safetensors(data: bytes, draw: Random) -> tuple[str, bytes]:
    """A change of the header, or of the tensors under a right one."""
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    kind = draw.choice(["length", "header", "header", "header", "tensors", "tensors", "tensors"])
    if kind == "length":
        size = draw.choice([0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1])
        return "safetensors: length of the header", struct.pack("<Q", size) + data[8:]
    if kind == "tensors":
        name, tensors = _spoil_tensors(load(data), draw)
        return f"safetensors: {name}", save(tensors, header.get("__metadata__"))
    about = header.get("__metadata__", {})
    records = [key for key, text in about.items() if text.startswith("{")]
    if records and draw.random() < 0.7:
        key = draw.choice(records)
        name, value = spoil_value(json.loads(about[key]), draw)
        about[key] = dumped(value, draw)
        text = json.dumps(header)
    else:
        name, header = spoil_value(header, draw)
        text = dumped(header, draw)
    encoded = text.encode("utf-8", "surrogatepass")
    encoded += b" " * (-len(encoded) % 8)
    return f"safetensors: header, {name}", struct.pack("<Q", len(encoded)) + encoded + body


def _spoil_tensors(tensors: dict[str, torch.Tensor], draw: Random) -> tuple[str, dict[str, torch.Tensor]]:
    name = draw.choice(list(tensors))
    old = tensors[name]
    dtypes = (torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn)
    dtype = draw.choice([*dtypes, torch.complex64])
    shapes = [(), (0,), (1,), (0, 2**40), (2**40, 0), (1, 1), (3, 3), (*old.shape, 1), tuple(old.shape[1:])]
    changes: dict[str, Callable[[], torch.Tensor]] = {
        "dtype": lambda: old.to(dtype),
        "shape": lambda: torch.ones(draw.choice(shapes), dtype=old.dtype),
        "longer": lambda: torch.cat([old.reshape(-1), old.reshape(-1)]),
        "turned": lambda: old.T.contiguous() if old.ndim == 2 else old.reshape(1, -1),
        "NaN": lambda: torch.full_like(old, float("nan")) if old.is_floating_point() else old,
        "infinite": lambda: torch.full_like(old, float("inf")) if old.is_floating_point() else old,
        "huge": lambda: torch.full_like(old, 1e30) if old.is_floating_point() else old,
        "negative": lambda: -old,
        "zero": lambda: torch.zeros_like(old),
    }
    how = draw.choice([*changes, "lost", "renamed", "surplus"])
    if how in changes:
        return how, {**tensors, name: changes[how]()}
    rest = {key: value for key, value in tensors.items() if key != name}
    odd = draw.choice([f"{name}x", "x", "", "../x", name.upper()])
    return how, {"lost": rest, "renamed": {**rest, odd: old}, "surplus": {**tensors, odd: old.clone()}}[how]


def spoil_file(file: Path, draw: Random) -> str:
    """Spoil a file in place by what its suffix says it is; the name of the change."""
    data = file.read_bytes()
    how = draw.random()
    if how < 0.04:
        return _replace_file(file, draw)
    if file.suffix == ".safetensors" and how < 0.7:
        name, changed = spoil_safetensors(data, draw)
    elif file.suffix == ".json" and how < 0.7:
        name, value = spoil_value(json.loads(data), draw)
        changed = dumped(value, draw).encode("utf-8", "surrogatepass")
    elif file.suffix == ".jsonl" and how < 0.7:
        lines = data.decode().splitlines()
        place = draw.randrange(len(lines))
        name, value = spoil_value(json.loads(lines[place]), draw)
        lines[place] = dumped(value, draw)
        changed = "\n".join(lines).encode("utf-8", "surrogatepass")
    elif file.suffix != ".safetensors" and how < 0.9:
        name, changed = spoil_text(data, draw)
    else:
        name, changed = spoil_bytes(data, draw)
    file.write_bytes(changed)
    return name


def _replace_file(file: Path, draw: Random) -> str:
    name = draw.choice(["lost", "a folder", "a link to itself", "a link to nothing", "a link out", "a pipe"])
    data = file.read_bytes()
    file.unlink()
    if name == "a folder":
        file.mkdir()
    elif name == "a link to itself":
        file.symlink_to(file.name)
    elif name == "a link to nothing":
        file.symlink_to("/nowhere/at/all")
    elif name == "a link out":
        outside = file.parent.parent / f"outside{file.suffix}"
        outside.write_bytes(data)
        file.symlink_to(outside)
    elif name == "a pipe":
        os.mkfifo(file)
    return f"file: {name}"


def restore(folder: Path, files: dict[str, bytes]) -> None:
    """Make ``folder`` hold these files, by their path in it, and nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)

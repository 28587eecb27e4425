"""Sharing adapters on the Hugging Face hub: an adapter's four files in one commit, and a checked download of no others.

Whatever is pushed names the base model by its hub id, or by the last part of its path: no folder of the machine that
the patch was fitted on is in the card or the records.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypedDict, Unpack

import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, RepoCard, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from lit_thought.errors import PatchError, ThoughtError
from lit_thought.files import expanded
from lit_thought.patch.adapter import CONFIG, WEIGHTS, read_adapter, write_adapter
from lit_thought.patch.card import CARD, for_hub, model_card, read_card, with_metadata, with_results
from lit_thought.patch.change import Change
from lit_thought.patch.provenance import (
    THOUGHT,
    is_hub_id,
    json_text,
    public,
    public_name,
    read_object,
    thought_text,
)
from lit_thought.patch.results import read_evaluation, three_way

__all__ = ["FetchOptions", "PushOptions", "adapter_folder", "fetch_adapter", "push_adapter", "push_change"]

_MESSAGE = "Upload an adapter made by lit_thought"
_SUBFOLDER = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)*")


class PushOptions(TypedDict, total=False):
    """The options of :func:`push_adapter`, which says what they mean."""

    private: bool | None
    token: str | bool | None
    revision: str | None
    commit_message: str
    create_pr: bool
    license: str | None
    language: str | Sequence[str] | None
    base_model: str | None
    evaluation: str | os.PathLike[str] | None


class FetchOptions(TypedDict, total=False):
    """The options of :func:`adapter_folder`, which says what they mean."""

    revision: str | None
    token: str | bool | None
    cache_dir: str | os.PathLike[str] | None
    local_files_only: bool
    subfolder: str | None


def push_change(
    patch: Change, repo_id: str, dtype: torch.dtype = torch.float32, **options: Unpack[PushOptions]
) -> CommitInfo:
    """Push a patch as an adapter (see :func:`push_adapter`).

    Args:
        patch: what to share.
        repo_id: ``owner/name``.
        dtype: of the stored factors and vectors: float32, bfloat16 or float16.
        options: those of :func:`push_adapter`.

    Raises:
        PatchError: if ``dtype`` cannot hold the patch.
        ThoughtError: as :func:`push_adapter`.
    """
    with TemporaryDirectory() as place:
        folder = Path(place) / "adapter"
        write_adapter(patch, folder, dtype=dtype)
        return push_adapter(folder, repo_id, **options)


def push_adapter(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = _MESSAGE,
    create_pr: bool = False,
    license: str | None = None,
    language: str | Sequence[str] | None = None,
    base_model: str | None = None,
    evaluation: str | os.PathLike[str] | None = None,
) -> CommitInfo:
    """Push an adapter folder to a model repository on the hub, in one commit, so that it is there complete or not at
    all. Other files of the folder stay here, and other files of the repository stay there.

    The card quotes the instruction, and ``thought.json`` records it, unless the fit had ``store_instruction=False``.

    Args:
        folder: adapter folder that ``save_adapter`` or PEFT wrote; it is checked first, and not changed.
        repo_id: ``owner/name``; made if there is none, unless ``create_pr``.
        private: whether a repository made now is to be private; the owner's default if None. True is refused for one
            that is public already.
        token: an access token; True or None for that of ``hf auth login`` or ``$HF_TOKEN``, False for none.
        revision: branch to commit to, made if there is none; the main one if None. ``refs/pr/N`` is pull request N.
        commit_message: first line of the commit.
        create_pr: make a pull request instead of committing to the main branch.
        license: for the card, such as ``"mit"``. If None, what the card has, or else the base model's by its own card
            on the hub; none where that is not known.
        language: code or codes for the card, such as ``"en"``.
        base_model: hub id of the base model, for patches of a model that was loaded from a folder.
        evaluation: folder that ``lit-thought evaluate --out`` wrote, for the card's results; ``folder``/evaluation, if
            it is there, when None. Without either the card keeps the results that it has.

    Returns:
        The commit, as huggingface_hub describes it: ``commit_url``, ``oid`` and, with ``create_pr``, ``pr_url``.

    Raises:
        PatchError: if ``folder`` is no adapter.
        ThoughtError: if an argument cannot be used, or if the hub cannot be reached or refuses; then nothing was
            committed, though the repository, empty, may have been made.
    """
    _check_repo_id(repo_id, "repo_id")
    if base_model is not None:
        _check_repo_id(base_model, "base_model")
    if not commit_message:
        raise ThoughtError("commit_message is empty; expected the first line of the commit. Leave it out for one.")
    if create_pr and revision is not None:
        raise ThoughtError(f"revision={revision!r} and create_pr exclude each other: leave one of them out.")
    path = expanded(folder, "folder")
    patch = read_adapter(path, "folder")
    patch.provenance = public(patch.provenance, base_model)
    card, found = read_card(path), read_evaluation(path, evaluation)
    if card is None:
        card = model_card(patch)
    if found is not None:
        card = with_results(card, three_way(*found))
    card = for_hub(card, repo_id, base_model, {"license": license, "language": _listed(language)})
    contents: dict[str, Any] = {
        CONFIG: json_text(_public_config(path, base_model)).encode(),
        WEIGHTS: str(path / WEIGHTS),
        THOUGHT: thought_text(patch.provenance).encode(),
    }
    api = HfApi(token=token)
    with _explained("repo_id", repo_id, revision):
        contents[CARD] = _with_licence(api, card).encode()
        _open(api, repo_id, private, revision, create_pr)
        files = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in contents.items()]
        return api.create_commit(repo_id, files, commit_message=commit_message, revision=revision, create_pr=create_pr)


def adapter_folder(
    repo_id_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    subfolder: str | None = None,
    argument: str = "repo_id_or_path",
) -> Path:
    """The folder of an adapter: one that is here, or that of a repository on the hub, downloaded into the hub's cache.

    Of a repository only the config, the safetensors and ``thought.json`` are fetched: no pickles, no code.

    Args:
        repo_id_or_path: a folder, or ``owner/name``. What is a folder here is never looked up on the hub.
        revision: branch, tag or commit; the main branch if None.
        token: as for :func:`push_adapter`.
        cache_dir: the hub's cache; ``$HF_HUB_CACHE`` or ``~/.cache/huggingface/hub`` if None.
        local_files_only: take what the cache has, with no look at the hub.
        subfolder: the adapter's folder in the repository or folder, such as ``"step-100"``.
        argument: what messages call the first argument.

    Raises:
        PatchError: if the repository has no adapter.
        ThoughtError: if there is no such folder or repository, or if the hub cannot be reached or refuses.
    """
    if subfolder is not None and not (isinstance(subfolder, str) and _SUBFOLDER.fullmatch(subfolder)):
        raise ThoughtError(f"subfolder={subfolder!r}; expected a folder inside the repository, such as 'step-100'.")
    path = expanded(repo_id_or_path, argument)
    if path.exists():
        if revision is not None:
            where = f"{argument}={str(repo_id_or_path)!r}"
            raise ThoughtError(f"revision={revision!r} has no use: {where} is a folder here. Leave it out.")
        if not (path / (subfolder or "")).is_dir():
            raise PatchError(
                f"{argument}={os.fspath(path / (subfolder or ''))!r} is not a folder; expected an adapter that "
                "save_adapter wrote."
            )
        return path / (subfolder or "")
    name = os.fspath(repo_id_or_path)
    if not is_hub_id(name):
        raise PatchError(
            f"{argument}={name!r} is not a folder; expected an adapter that save_adapter wrote, or one on the hub, "
            "as 'owner/name'."
        )
    _check_repo_id(name, argument)
    prefix = "" if subfolder is None else f"{subfolder}/"
    with _explained(argument, name, revision):
        snapshot = snapshot_download(
            name,
            revision=revision,
            token=token,
            cache_dir=None if cache_dir is None else expanded(cache_dir, "cache_dir"),
            local_files_only=local_files_only,
            allow_patterns=[prefix + file for file in (CONFIG, WEIGHTS, THOUGHT)],
        )
    found = Path(snapshot) / prefix
    for file in (CONFIG, WEIGHTS):
        if not (found / file).is_file():
            raise PatchError(
                f"{argument}={name!r} has no {prefix}{file}; expected a LoRA adapter as push_to_hub or PEFT writes it. "
                "An adapter_model.bin is never fetched, since a pickle could run code: have PEFT convert it."
            )
    return found


def fetch_adapter(repo_id_or_path: str | os.PathLike[str], **options: Unpack[FetchOptions]) -> Change:
    """The patch in :func:`adapter_folder`, whose options these are, checked like a folder of unknown origin."""
    folder = adapter_folder(repo_id_or_path, **options)
    try:
        return read_adapter(folder)
    except PatchError as error:
        if os.path.exists(repo_id_or_path):
            raise
        raise PatchError(f"repo_id_or_path={os.fspath(repo_id_or_path)!r}: {error}") from error


def _public_config(folder: Path, base_model: str | None) -> dict[str, Any]:
    config = read_object(folder / CONFIG)
    name = base_model or public_name(str(config.get("base_model_name_or_path") or ""))
    return {**config, "base_model_name_or_path": name or None}


def _with_licence(api: HfApi, card: str) -> str:
    """The card with the licence that the base model's card on the hub has, unless it has one."""
    known = RepoCard(card).data
    base = known.get("base_model")
    if known.get("license") is not None or not isinstance(base, str):
        return card
    try:
        theirs = api.model_info(base).card_data
    except (HfHubHTTPError, HFValidationError):  # no such repository, or none that this token may see
        return card
    keys = ("license", "license_name", "license_link")
    return with_metadata(card, {key: theirs[key] for key in keys if theirs and isinstance(theirs.get(key), str)})


def _open(api: HfApi, repo_id: str, private: bool | None, revision: str | None, create_pr: bool) -> None:
    """Make the repository and the branch, where there are none yet."""
    if not create_pr:
        api.create_repo(repo_id, private=private, exist_ok=True)
    if private and not api.model_info(repo_id).private:
        raise ThoughtError(f"private={private}, but {repo_id!r} is public. Make it private on the hub first.")
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)


def _listed(language: str | Sequence[str] | None) -> str | list[str] | None:
    return language if language is None or isinstance(language, str) else list(language)


def _check_repo_id(repo_id: str, argument: str) -> None:
    try:
        validate_repo_id(repo_id)
        if "/" in repo_id:
            return
        cause = "it has no owner"
    except HFValidationError as error:
        cause = str(error).partition(": ")[0]
    raise ThoughtError(f"{argument}={repo_id!r} names no repository ({cause}). Expected 'owner/name'.")


@contextmanager
def _explained(argument: str, repo_id: str, revision: str | None) -> Iterator[None]:
    """Of the many kinds of exception in a talk with the hub, one that says what to do."""
    try:
        yield
    except ThoughtError:
        raise
    except Exception as error:  # of the hub, the connection and the system, which have no narrower ancestor
        raise ThoughtError(f"{argument}={repo_id!r}: {_remedy(error, repo_id, revision)}") from error


def _remedy(error: Exception, repo_id: str, revision: str | None) -> str:
    answers = [getattr(each, "response", None) for each in (error, error.__cause__)]
    status = next((answer.status_code for answer in answers if answer is not None), None)
    log_in = "log in (hf auth login), or pass a token"
    network = "Check the network and $HF_HUB_OFFLINE, then try again."
    if isinstance(error, RevisionNotFoundError):
        return f"revision={revision!r} is no branch, tag or commit of it. Look at its page for those that there are."
    if isinstance(error, GatedRepoError):
        return f"access to it is restricted. Ask for it on its page, then {log_in}."
    if isinstance(error, RepositoryNotFoundError):
        return f"the hub has no such repository, or keeps it from you. Check the name; if it is private, {log_in}."
    if status == 401:
        return f"the hub does not accept the token, or wants one (401). Make a new one, then {log_in}."
    if status == 403:
        owner = repo_id.partition("/")[0]
        return f"the token does not allow this (403). It needs rights to {owner!r}, for pushing those to write."
    cause = " ".join(str(error).split()) or "no message"
    if status is not None:
        return f"the hub answered {status} ({cause:.300}). Correct what it names, or try again later."
    if isinstance(error, ValueError):
        return f"the hub does not take it ({cause:.300}). Correct what it names."
    if isinstance(error, LocalEntryNotFoundError):
        return f"it is not in the hub's cache, and the hub was not asked or not reached ({cause:.300}). {network}"
    return f"the hub cannot be reached, or broke off ({type(error).__name__}: {cause:.300}). {network}"

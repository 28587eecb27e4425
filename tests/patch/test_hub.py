"""Sharing through the hub: against a small one on this machine, read by PEFT and huggingface_hub's own card parser."""

from __future__ import annotations

import hashlib
import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import identical
from hub_server import Hub, Repo
from huggingface_hub import HfApi, ModelCard, constants
from models import make_model, make_tokenizer
from patches import logits_of, make_patch
from peft import PeftModel
from report_run import make_run
from safetensors.torch import load_file
from support import Task

from lit_thought import ThoughtPatch, load_model
from lit_thought.cli import main
from lit_thought.errors import PatchError, ThoughtError
from lit_thought.patch.card import with_metadata, with_results
from lit_thought.patch.hub import adapter_folder, push_adapter
from lit_thought.patch.provenance import public_name
from lit_thought.patch.results import RUNS, of_adapter, write_result

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of huggingface_hub's own uploads
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "thought.json"]


@pytest.fixture(scope="module")
def patch() -> ThoughtPatch:
    return make_patch(make_model("llama"))


def publish(hub: Hub, folder: Path, name: str = "me/it", **settings: Any) -> Repo:
    """A repository with the folder's files, as if it had been pushed."""
    hub.repos[name] = Repo(**settings)
    hub.repos[name].commit({file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()})
    return hub.repos[name]


def card_of(repo: Repo) -> ModelCard:
    return ModelCard(repo.files["README.md"].decode())


# Round trips


def test_peft_reads_what_was_pushed(hub: Hub, patch: ThoughtPatch, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> None:
        assert address[0] == "127.0.0.1", address
        genuine(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)
    patch.push_to_hub("me/it")
    hub.repos["me/it"].commit({"adapter_model.bin": b"a pickle", "code.py": b"raise SystemExit"})
    model = make_model("llama", torch.float32)
    plain = logits_of(model)
    with ThoughtPatch.from_pretrained("me/it").applied(model, check=False):
        patched = logits_of(model)
    assert (plain - patched).abs().max() > 0.01
    assert (logits_of(PeftModel.from_pretrained(model, "me/it")) - patched).abs().max() < 1e-5
    assert not hub.sent(r"resolve/.*\.(bin|py)$")


def test_a_push_is_one_commit_of_the_adapter_s_files(hub: Hub, patch: ThoughtPatch, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    patch.save_adapter(folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    (folder / "items.jsonl").write_text("private pairs")
    (folder / "adapter_model.bin").write_text("a pickle")
    hub.repos["me/it"] = Repo()
    hub.repos["me/it"].commit({"theirs.txt": b"stays"})
    commit = push_adapter(folder, "me/it", commit_message="First.")
    repo = hub.repos["me/it"]
    assert (commit.oid, commit.pr_url) == (repo.branches["main"], None)
    assert sorted(repo.files) == sorted([*FILES, "theirs.txt"])
    assert repo.files["adapter_model.safetensors"] == before["adapter_model.safetensors"]
    (sent,) = hub.sent("POST .*/commit/main")
    assert json.loads(sent.body.splitlines()[0])["value"]["summary"] == "First."
    assert {asked.token for asked in hub.sent("POST /api/(repos|models)|batch")} == {"hf_me"}
    assert {file.name: file.read_bytes() for file in folder.iterdir() if file.name in FILES} == before
    assert identical(ThoughtPatch.from_pretrained("me/it"), patch)
    assert ThoughtPatch.from_pretrained("me/it").provenance == patch.provenance
    push_adapter(folder, "me/it")  # with nothing new
    assert repo.files["theirs.txt"] == b"stays"


def test_dtype_and_token_are_used(hub: Hub, patch: ThoughtPatch, tmp_path: Path) -> None:
    with pytest.raises(ThoughtError, match=r"does not allow this \(403\).* rights to 'me'"):
        patch.push_to_hub("me/it", token="hf_reader")
    patch.push_to_hub("me/it", dtype=torch.bfloat16, token="hf_me", private=True)
    (tmp_path / "weights").write_bytes(hub.repos["me/it"].files["adapter_model.safetensors"])
    assert {value.dtype for value in load_file(tmp_path / "weights").values()} == {torch.bfloat16}
    with pytest.raises(ThoughtError, match=r"no such repository, or keeps it from you.*hf auth login"):
        ThoughtPatch.from_pretrained("me/it", token=False)
    assert set(ThoughtPatch.from_pretrained("me/it", token="hf_me").targets) == set(patch.targets)


def test_private_repositories(hub: Hub, patch: ThoughtPatch) -> None:
    patch.push_to_hub("me/private", private=True)
    patch.push_to_hub("me/public", private=False)
    patch.push_to_hub("me/default")
    assert [hub.repos[f"me/{name}"].private for name in ("private", "public", "default")] == [True, False, False]
    patch.push_to_hub("me/private", private=True)  # again
    commit = hub.repos["me/public"].branches["main"]
    with pytest.raises(ThoughtError, match=r"private=True, but 'me/public' is public"):
        (2 * patch).push_to_hub("me/public", private=True)
    assert hub.repos["me/public"].branches["main"] == commit


def test_revisions_and_pull_requests(hub: Hub, patch: ThoughtPatch) -> None:
    first = patch.push_to_hub("me/it")
    other = 2 * patch
    other.push_to_hub("me/it", revision="twice")
    assert identical(ThoughtPatch.from_pretrained("me/it"), patch)
    assert identical(ThoughtPatch.from_pretrained("me/it", revision="twice"), other)
    other.push_to_hub("me/it", revision="main")
    assert identical(ThoughtPatch.from_pretrained("me/it"), other)
    assert identical(ThoughtPatch.from_pretrained("me/it", revision=first.oid), patch)
    hub.repos["you/it"] = Repo()
    commit = patch.push_to_hub("you/it", create_pr=True)
    assert commit.pr_url == f"{hub.url}/you/it/discussions/1"
    assert not hub.repos["you/it"].files
    assert identical(ThoughtPatch.from_pretrained("you/it", revision="refs/pr/1"), patch)
    with pytest.raises(ThoughtError, match="revision='main' and create_pr exclude each other"):
        patch.push_to_hub("you/it", create_pr=True, revision="main")
    with pytest.raises(ThoughtError, match=r"^commit_message is empty"):
        patch.push_to_hub("me/it", commit_message="")
    with pytest.raises(ThoughtError, match="no such repository"):
        patch.push_to_hub("you/nothing", create_pr=True)


def test_the_cache_serves_without_a_hub(
    hub: Hub, patch: ThoughtPatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch.push_to_hub("me/it")
    with pytest.raises(ThoughtError, match=r"'me/it': it is not in the hub's cache"):
        ThoughtPatch.from_pretrained("me/it", local_files_only=True)
    ThoughtPatch.from_pretrained("me/it", cache_dir=tmp_path / "mine")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    for options in ({}, {"local_files_only": True}):
        assert identical(ThoughtPatch.from_pretrained("me/it", cache_dir=tmp_path / "mine", **options), patch)


def test_blobs_that_repositories_share(patch: ThoughtPatch, tmp_path: Path) -> None:
    """The layout that Xet downloads leave: snapshot -> the repository's blobs -> those of the whole cache."""
    repo, store = tmp_path / "models--me--it", tmp_path / "blobs" / "ab"
    snapshot = repo / "snapshots" / "0123"
    patch.save_adapter(snapshot)
    (repo / "blobs").mkdir()
    store.mkdir(parents=True)
    for file in list(snapshot.iterdir()):
        file.rename(store / file.name)
        (repo / "blobs" / file.name).symlink_to(f"../../blobs/ab/{file.name}")
        file.symlink_to(f"../../blobs/{file.name}")
    assert identical(ThoughtPatch.load(snapshot), patch)
    (repo / "blobs" / "thought.json").unlink()
    (tmp_path / "elsewhere.json").write_bytes((store / "thought.json").read_bytes())
    (repo / "blobs" / "thought.json").symlink_to("../../elsewhere.json")
    with pytest.raises(PatchError, match=r"has no thought\.json of its own"):
        ThoughtPatch.load(snapshot)


def test_folders_come_first(hub: Hub, patch: ThoughtPatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    patch.save_adapter("me/it/step-1")
    asked = len(hub.requests)
    for place, options in (("me/it/step-1", {}), (tmp_path / "me" / "it", {"subfolder": "step-1"})):
        assert identical(ThoughtPatch.from_pretrained(place, make_model("llama"), **options), patch)
    with pytest.raises(PatchError, match="made for"):
        ThoughtPatch.from_pretrained("me/it/step-1", make_model("llama", seed=1))
    with pytest.raises(ThoughtError, match=r"revision='main' has no use: .* is a folder here"):
        ThoughtPatch.from_pretrained("me/it", revision="main")
    for name in ("nothing", "./me/nothing", "me/it/nothing", str(tmp_path / "nothing")):
        with pytest.raises(PatchError, match="is not a folder; expected an adapter"):
            ThoughtPatch.from_pretrained(name)
    for subfolder in ("..", "a/../../b", "/a", "a*", "", ".cache", 5):
        with pytest.raises(ThoughtError, match=r"^subfolder="):
            ThoughtPatch.from_pretrained("me/other", subfolder=subfolder)  # type: ignore[arg-type]
    assert len(hub.requests) == asked


def test_adapters_in_folders_of_a_repository(hub: Hub, patch: ThoughtPatch, tmp_path: Path) -> None:
    (2 * patch).save_adapter(tmp_path / "a")
    hub.repos["me/it"] = Repo()
    hub.repos["me/it"].commit({f"step/1/{file.name}": file.read_bytes() for file in (tmp_path / "a").iterdir()})
    assert identical(ThoughtPatch.from_pretrained("me/it", subfolder="step/1"), 2 * patch)
    with pytest.raises(PatchError, match=r"repo_id_or_path='me/it' has no adapter_config\.json"):
        ThoughtPatch.from_pretrained("me/it")
    with pytest.raises(PatchError, match=r"repo_id_or_path='me/it' has no step/2/adapter_config\.json"):
        ThoughtPatch.from_pretrained("me/it", subfolder="step/2")


# The card


def test_the_card_s_header(hub: Hub, patch: ThoughtPatch) -> None:
    hub.repos["org/base"] = Repo()
    hub.repos["org/base"].commit({"README.md": b"---\nlicense: llama3.1\n---\n# Base\n"})
    named = ThoughtPatch(patch.factors, {**patch.provenance, "model": "org/base", "base_model": "org/base"})
    named.push_to_hub("me/it", language=["en", "fr"])
    assert card_of(hub.repos["me/it"]).data.to_dict() == {
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "language": ["en", "fr"],
        "library_name": "peft",
        "license": "llama3.1",
        "pipeline_tag": "text-generation",
        "tags": ["base_model:adapter:org/base", "lora", "transformers", "lit_thought", "thought-patch"],
    }
    text = hub.repos["me/it"].files["README.md"].decode()
    assert "this folder" not in text
    assert "base = 'org/base'" in text
    assert 'PeftModel.from_pretrained(model, "me/it")' in text
    assert 'ThoughtPatch.from_pretrained("me/it")' in text
    named.push_to_hub("me/other", license="mit", language="en")
    assert card_of(hub.repos["me/other"]).data.license == "mit"
    assert card_of(hub.repos["me/other"]).data.language == "en"
    patch.push_to_hub("me/unknown")  # of a base model that is not on the hub
    assert not {"license", "language", "base_model"} & card_of(hub.repos["me/unknown"]).data.to_dict().keys()
    hub.repos["org/base"].private = True
    named.push_to_hub("me/hidden")
    assert "license" not in card_of(hub.repos["me/hidden"]).data.to_dict()
    patch.push_to_hub("me/told", base_model="org/base")
    assert card_of(hub.repos["me/told"]).data.base_model == "org/base"
    assert card_of(hub.repos["me/told"]).data.tags[:2] == ["base_model:adapter:org/base", "lora"]
    assert json.loads(hub.repos["me/told"].files["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    assert "base = 'org/base'" in hub.repos["me/told"].files["README.md"].decode()


def test_a_licence_that_the_hub_does_not_know(hub: Hub, patch: ThoughtPatch) -> None:
    with pytest.raises(ThoughtError, match=r"'me/it': the hub answered 400 .*license.*Correct what it names"):
        patch.push_to_hub("me/it", license="mine")
    assert not hub.repos["me/it"].files


def test_results_are_in_the_card(hub: Hub, tmp_path: Path) -> None:
    run = make_run(tmp_path / "adapter")
    (run / "README.md").write_text((run / "README.md").read_text().replace("\n# ", "\n# My adapter: ", 1))
    push_adapter(run, "me/it")
    card = card_of(hub.repos["me/it"])
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found["accuracy"] == 0.75  # 3 of 4
    assert found["fidelity"] == 0.4  # 2 of 5, one of which has no reference
    assert found["perplexity_ratio"] == pytest.approx(1.012, abs=5e-4)
    assert "prompt_tokens" not in found
    assert {result.dataset_name for result in card.data.eval_results} == {"5 held-out pairs"}
    assert {result.task_type for result in card.data.eval_results} == {"text-generation"}
    assert card.data.model_name == "it"
    assert "# My adapter: " in card.text
    assert "| accuracy (exact match) |" in card.text
    assert sorted(hub.repos["me/it"].files) == FILES
    (run / "evaluation").rename(tmp_path / "evaluation")
    push_adapter(run, "me/none")
    assert "model-index" not in hub.repos["me/none"].files["README.md"].decode()
    ThoughtPatch.load(run).push_to_hub("me/again", evaluation=tmp_path / "evaluation")
    assert card_of(hub.repos["me/again"]).data.eval_results == card.data.eval_results
    with pytest.raises(ThoughtError, match="is not a folder"):
        push_adapter(run, "me/it", evaluation=tmp_path / "nowhere")


def test_a_header_keeps_what_others_wrote() -> None:
    theirs = "---\nlicense: mit\nmodel-index:\n- name: mine\n  results: []\nnovel:\n  a: [1, 2]\n---\n\n# Card\n"
    assert with_results(theirs, None) == theirs
    evaluation: dict[str, Any] = {"pairs": 4, "table": [], "perplexity_ratio": {"value": 1.5}}
    index = ModelCard(with_results(theirs, evaluation)).data
    assert [index.license, index["novel"]] == ["mit", {"a": [1, 2]}]
    assert (
        with_results(with_results(theirs, evaluation), None).split()
        == theirs.replace("a: [1, 2]", "").replace("novel:\n", "novel:\n  a:\n  - 1\n  - 2").split()
    )
    edited = with_results(theirs, evaluation).replace("<!-- end of results -->\n", "<!-- end of results -->\nMine.")
    assert "\nMine." in with_results(edited, evaluation)
    assert "\nMine." in with_results(edited, None)
    assert with_metadata("# No header\n", {"license": "mit"}) == "---\nlicense: mit\n---\n# No header\n"
    assert with_metadata("---\nlicense: mit\n---\n# No header\n", {"license": None}) == "# No header\n"
    for bad in ("---\n- a list\n---\n", "---\na: [\n---\n", "---\n1: 2\n---\n"):
        with pytest.raises(ThoughtError, match=r"^README\.md: its YAML header cannot be read"):
            with_results(bad, None)


# Privacy


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("org/name", "org/name"),
        ("org/name (model.gguf)", "org/name (model.gguf)"),
        ("gpt2", "gpt2"),
        ("", ""),
        ("/home/someone/llama", "llama"),
        ("/home/someone/llama/", "llama"),
        ("./llama", "llama"),
        ("~/models/llama", "llama"),
        ("/home/someone/llama (q4.gguf)", "llama (q4.gguf)"),
        ("models/tiny.gguf", "tiny.gguf"),
        (r"C:\Users\someone\llama", "llama"),
        ("/home/someone/.cache/huggingface/hub/models--org--a--b/snapshots/0123", "org/a--b"),
        ("here/tiny", "tiny"),  # a folder
    ],
)
def test_public_names(name: str, public: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_name(name) == public


def test_nothing_pushed_tells_the_instruction_or_a_path(hub: Hub, tmp_path: Path) -> None:
    place = tmp_path / "secret place" / "tiny"
    make_model("llama").save_pretrained(place)
    make_tokenizer().save_pretrained(place)
    model, tokenizer = load_model(place)
    task = Task.random(3, 6)
    patch = task.fit(model, tokenizer, store_instruction=False, rank=2, sites=["mlp_out"])
    assert patch.provenance["model"] == str(place)
    for number, each in enumerate((patch, patch + 0.5 * patch)):
        each.push_to_hub(f"me/{number}")
        repo = hub.repos[f"me/{number}"]
        record = json.loads(repo.files["thought.json"])["provenance"]
        assert [record["model"], record["base_model"]] == ["tiny", "tiny"]
        assert json.loads(repo.files["adapter_config.json"])["base_model_name_or_path"] == "tiny"
        assert ThoughtPatch.from_pretrained(f"me/{number}", model).provenance["model"] == "tiny"
    everything = b"\n".join([*(asked.body for asked in hub.requests), *hub.large.values()])
    everything += b"".join(content for repo in hub.repos.values() for content in repo.files.values())
    for secret in (task.instruction.strip(), str(tmp_path), "secret place", str(Path.home())):
        assert secret.encode() not in everything
    assert b"Talk" not in everything
    told = task.fit(model, tokenizer, rank=2, sites=["mlp_out"])  # the search finds what is there
    told.push_to_hub("me/told")
    assert task.instruction.strip().encode() in hub.repos["me/told"].files["README.md"]


# What goes wrong


@pytest.mark.parametrize(
    ("repo_id", "said"),
    [
        ("it", "names no repository .it has no owner"),
        ("a/b/c", "names no"),
        ("me/..", "names no"),
        ("", "names no"),
        (5, "names no"),
    ],
)
def test_names_that_are_none(repo_id: Any, said: str, hub: Hub, patch: ThoughtPatch) -> None:
    with pytest.raises(ThoughtError, match=rf"^repo_id={repo_id!r} .*{said}.*'owner/name'"):
        patch.push_to_hub(repo_id)
    with pytest.raises(ThoughtError, match=r"^base_model="):
        patch.push_to_hub("me/it", base_model=repo_id)
    assert not hub.requests


@pytest.mark.parametrize(
    ("options", "trouble", "said"),
    [
        ({"token": "hf_unknown"}, {}, r"does not accept the token, or wants one \(401\).*hf auth login"),
        ({"repo_id": "you/it"}, {}, r"does not allow this \(403\).* rights to 'you'"),
        ({}, {"repos/create": 500}, r"the hub answered 500 .*try again later"),
        ({}, {"/commit/": 500}, r"the hub answered 500"),
        ({}, {"/commit/": 0}, r"cannot be reached, or broke off .*Check the network"),
        ({}, {"PUT /large": 400}, r"the hub answered 400|Error while uploading"),
        ({}, {".": 0}, r"cannot be reached, or broke off .*Check the network"),
    ],
)
def test_a_push_that_fails_leaves_nothing(
    options: dict[str, Any], trouble: dict[str, int], said: str, hub: Hub, patch: ThoughtPatch
) -> None:
    patch.push_to_hub("me/it")
    before = dict(hub.repos["me/it"].files)
    hub.trouble |= trouble
    repo_id = options.pop("repo_id", "me/it")
    with pytest.raises(ThoughtError, match=rf"^repo_id='{repo_id}': .*{said}") as raised:
        (2 * patch).push_to_hub(repo_id, **options)
    assert "hf_" not in str(raised.value)
    assert hub.repos["me/it"].files == before
    assert list(hub.repos) == ["me/it"]


def test_a_push_that_is_interrupted_leaves_nothing(
    hub: Hub, patch: ThoughtPatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patching:
        patching.setattr(HfApi, "preupload_lfs_files", interrupt)
        with pytest.raises(KeyboardInterrupt):
            patch.push_to_hub("me/it")
    assert not hub.repos["me/it"].files
    patch.push_to_hub("me/it")
    assert sorted(hub.repos["me/it"].files) == FILES


def test_only_adapters_are_pushed(hub: Hub, patch: ThoughtPatch, tmp_path: Path) -> None:
    patch.save_adapter(tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(PatchError, match="is damaged"):
        push_adapter(tmp_path / "adapter", "me/it")
    with pytest.raises(PatchError, match="is not a folder"):
        push_adapter(tmp_path / "nowhere", "me/it")
    assert not hub.requests


@pytest.mark.parametrize(
    ("name", "options", "trouble", "said"),
    [
        ("me/nothing", {}, {}, r"no such repository, or keeps it from you"),
        ("me/it", {"revision": "nothing"}, {}, r"revision='nothing' is no branch, tag or commit"),
        ("me/gated", {"token": False}, {}, r"access to it is restricted"),
        ("me/it", {"token": "hf_unknown"}, {}, r"does not accept the token"),
        ("me/it", {}, {"/api/models": 403}, r"does not allow this \(403\)"),
        ("me/it", {}, {"/api/models": 500}, r"the hub answered 500"),
        ("me/it", {}, {".": 0}, r"Check the network"),
        ("me/pickle", {}, {}, r"has no adapter_model\.safetensors.*adapter_model\.bin is never fetched"),
    ],
)
def test_repositories_that_cannot_be_read(
    name: str, options: Any, trouble: dict[str, int], said: str, hub: Hub, patch: ThoughtPatch, tmp_path: Path
) -> None:
    patch.save_adapter(tmp_path / "a")
    publish(hub, tmp_path / "a")
    publish(hub, tmp_path / "a", "me/gated", gated=True)
    hub.repos["me/pickle"] = Repo()
    config = (tmp_path / "a" / "adapter_config.json").read_bytes()
    hub.repos["me/pickle"].commit({"adapter_config.json": config, "adapter_model.bin": b"a pickle"})
    hub.trouble |= trouble
    with pytest.raises(ThoughtError, match=rf"^repo_id_or_path='{name}'.*{said}"):
        ThoughtPatch.from_pretrained(name, **options)
    assert not hub.sent(r"\.bin")


def test_what_a_repository_names_elsewhere_is_not_read(hub: Hub, patch: ThoughtPatch, tmp_path: Path) -> None:
    patch.save_adapter(tmp_path / "a")
    (tmp_path / "a" / "thought.json").unlink()
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    outside = {"base_model_name_or_path": "../../../etc", "auto_mapping": {"parent_library": "os"}}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**config, **outside}))
    repo = publish(hub, tmp_path / "a")
    repo.commit({"../thought.json": b"outside", "../../adapter_config.json": b"outside", "x/thought.json": b"no"})
    found = ThoughtPatch.from_pretrained("me/it")
    assert identical(found, patch)
    assert found.provenance == {"base_model": "../../../etc"}
    cached = sorted(file.name for file in adapter_folder("me/it").iterdir())
    assert cached == ["adapter_config.json", "adapter_model.safetensors"]
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and b"outside" in file.read_bytes()]
    found.push_to_hub("me/mine")
    assert b"../etc" not in b"".join(hub.repos["me/mine"].files.values())


# The command line


def test_commands(hub: Hub, patch: ThoughtPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    patch.save_adapter(tmp_path / "adapter")
    main(["push", str(tmp_path / "adapter"), "me/it", "--private", "--license=mit", "--message=Mine."])
    assert hub.repos["me/it"].private
    assert card_of(hub.repos["me/it"]).data.license == "mit"
    assert f"{hub.url}/me/it/commit/{hub.repos['me/it'].branches['main']}" in "".join(capsys.readouterr())
    main(["export", "me/it", f"--out={tmp_path / 'exported'}"])
    assert identical(ThoughtPatch.load(tmp_path / "exported"), patch)
    with pytest.raises(SystemExit):
        main(["export", "me/nothing", f"--out={tmp_path / 'nothing'}"])
    assert "--adapter me/nothing: the hub has no such repository" in capsys.readouterr().err
    assert not (tmp_path / "nothing").exists()


def test_evaluate_takes_an_adapter_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    place = tmp_path / "tiny"
    make_model("llama").save_pretrained(place)
    make_tokenizer().save_pretrained(place)
    model, tokenizer = load_model(place)
    task = Task.random(3, 6)
    task.fit(model, tokenizer, rank=2, sites=["mlp_out"]).push_to_hub("me/it")
    (tmp_path / "pairs.json").write_text(json.dumps(task.pairs))
    options = [f"--pairs={tmp_path / 'pairs.json'}", f"--model={place}", "--unrelated=null", "--max_new_tokens=2"]
    main(["evaluate", "--adapter=me/it", f"--out={tmp_path / 'result'}", "--progress=false", *options])
    result = json.loads((tmp_path / "result" / "result.json").read_text())
    weights = hub.repos["me/it"].files["adapter_model.safetensors"]
    assert result["adapter"] == hashlib.sha256(weights).hexdigest()


def test_a_folder_of_this_machine_is_in_no_card_that_peft_wrote(
    hub: Hub, patch: ThoughtPatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for place in ("org/name", "gpt2"):  # clones of what is on the hub
        (tmp_path / place).mkdir(parents=True)
    tmp_path /= "mine"
    patch.save_adapter(tmp_path)
    (tmp_path / "thought.json").unlink()
    for base, shown in (
        ("/home/me/llama", None),
        ("", None),
        ("./llama", None),
        ("org/name", "org/name"),
        ("gpt2", "gpt2"),
    ):
        tags = f"- 'base_model:adapter:{base}'\n- lora"
        header = f"base_model: '{base}'\nbase_model_relation: adapter\nlibrary_name: peft\ntags:\n{tags}"
        (tmp_path / "README.md").write_text(f"---\n{header}\n---\n# Mine\n")
        push_adapter(tmp_path, "me/it", license="mit")
        card = card_of(hub.repos["me/it"])
        assert card.data.get("base_model") == shown
        assert card.data.get("base_model_relation") == ("adapter" if shown else None)
        assert card.data.tags == [*([f"base_model:adapter:{shown}"] if shown else []), "lora"]
        assert "# Mine" in card.text
        push_adapter(tmp_path, "me/without")  # and nobody is asked for the licence of a folder


def test_a_file_is_no_adapter_by_the_argument_s_name(patch: ThoughtPatch, tmp_path: Path) -> None:
    patch.save_adapter(tmp_path / "it")
    for name in ("it/adapter_model.safetensors", "it/README.md"):
        with pytest.raises(PatchError, match=r"^adapter='.*' is not a folder; expected an adapter"):
            adapter_folder(tmp_path / name, argument="adapter")
    with pytest.raises(PatchError, match=r"^repo_id_or_path='.*step-9' is not a folder"):
        ThoughtPatch.from_pretrained(tmp_path / "it", subfolder="step-9")


def test_an_evaluation_of_other_weights_says_what_to_do(hub: Hub, patch: ThoughtPatch, tmp_path: Path) -> None:
    patch.save_adapter(tmp_path / "it")
    result = {"pairs": 1, "items": [{"input": "a", "reference": None, **dict.fromkeys(RUNS, "b")}]}
    result |= {"accuracy": None, "fidelity": 1.0, "perplexity": None}
    result |= {"kl": {"plain": 1.0}, "agreement": {"plain": 1.0}, "prompt_tokens": {"plain": 1.0, "instructed": 2.0}}
    write_result(of_adapter(result, tmp_path / "it"), tmp_path / "it" / "evaluation")
    with pytest.raises(ThoughtError, match=r"other weights .* their dtype or rank.*lit-thought push ADAPTER"):
        patch.push_to_hub("me/it", dtype=torch.bfloat16, evaluation=tmp_path / "it" / "evaluation")

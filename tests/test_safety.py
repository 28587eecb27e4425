"""Secrets stay out of files, files out of other folders, code out of data, and claims of size out of memory."""

from __future__ import annotations

import ast
import hashlib
import json
import pickle
import resource
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import ROUNDING, distance
from models import make_model, make_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lit_thought
from lit_thought import PairDataModule, ThoughtCallback, ThoughtModule, ThoughtPatch, cli, evaluate, transmute
from lit_thought.cli.parser import command_parser
from lit_thought.errors import ThoughtError
from lit_thought.evaluation.report import write_report
from lit_thought.fit import preparing
from lit_thought.fit.fitting import fit
from lit_thought.model import loading as models
from lit_thought.model.blocks import find_blocks
from lit_thought.prompts.instruction_hash import check_instruction, hash_text, is_text_of
from lit_thought.prompts.pairs import load_pairs
from lit_thought.runs.generate import Generation
from lit_thought.statistics.preserve import preservation
from lit_thought.statistics.preserve_file import Preservation
from lit_thought.statistics.resume import UnfinishedFit
from lit_thought.statistics.saved import SavedStatistics
from lit_thought.statistics.stage import StageSums

PACKAGE = Path(lit_thought.__file__).parent
SECRET = "The password is swordfish.\n"
INPUT, OUTPUT, GENERATED = "tell me of herring", "red as it is", "smoked mackerel"
PAIRS = [{"input": INPUT, "output": OUTPUT}, *({"input": f"{word} {INPUT}"} for word in ("also", "then", "now"))]
TEXTS = ["The quick brown fox jumps over the lazy dog. " * 3]
TOKENIZER = make_tokenizer()


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_THOUGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


# --- secrets ----------------------------------------------------------------------------------------------------------


def small_fit(tmp_path: Path, pairs: list[dict[str, str]] = PAIRS, **settings: Any) -> ThoughtPatch:
    callback = ThoughtCallback(**{"rank": 2, "preserve": TEXTS, **settings})
    data = PairDataModule(pairs, SECRET, max_new_tokens=3, val_pairs=pairs[:1])
    return fit(ThoughtModule(make_model(), TOKENIZER), data, callback, progress=False)


def told(folder: Path) -> set[str]:
    """Which of the texts any file below the folder holds, as UTF-8, UTF-16 or JSON with escapes."""
    found = set()
    for file in folder.rglob("*"):
        data = file.read_bytes() if file.is_file() else b""
        for text in (SECRET.strip(), INPUT, OUTPUT, GENERATED):
            if any(form in data for form in (text.encode(), text.encode("utf-16-le"), json.dumps(text)[1:-1].encode())):
                found.add(text)
    return found


def everything_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: bool) -> None:
    """Whatever a fit, its evaluation and its report write, an interrupted fit's folder among it."""
    monkeypatch.setattr(
        preparing,
        "generate",
        lambda model, tokenizer, prompts, **_: [Generation(GENERATED, True)] * len(prompts),
    )
    written = tmp_path / f"store {store}"
    patch = small_fit(tmp_path, statistics_dir=written / "sums", output_dir=written / "run", store_instruction=store)
    (0.5 * patch).save_adapter(written / "scaled")
    (patch + patch).save_adapter(written / "sum")
    SavedStatistics.load(written / "sums").save(written / "again")
    result = evaluate(
        make_model(),
        TOKENIZER,
        patch,
        instruction=SECRET,
        pairs=PAIRS,
        unrelated=TEXTS,
        max_new_tokens=3,
        progress=False,
    )
    result.pop("items")
    (written / "result.json").write_text(json.dumps(result))
    write_report(written / "run")
    with monkeypatch.context() as patching:
        patching.setattr(StageSums, "solve", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            small_fit(tmp_path, resume_dir=written / "unfinished", store_instruction=store)
    assert (written / "unfinished" / "fit.json").is_file()


def test_what_must_not_be_stored_is_in_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything_written(tmp_path, monkeypatch, store=False)
    assert len([file for file in tmp_path.rglob("*") if file.is_file()]) > 30
    assert told(tmp_path) == set()
    everything_written(tmp_path, monkeypatch, store=True)
    assert told(tmp_path) == {SECRET.strip(), GENERATED}, "the search would find it"


def test_chosen_settings_keep_the_secret_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    genuine = SavedStatistics.load
    monkeypatch.setattr(
        SavedStatistics, "load", lambda folder, *rest: (seen.append(told(folder)), genuine(folder, *rest))[1]
    )
    pairs = [{"input": f"{INPUT} {i}", "output": OUTPUT} for i in range(8)]
    common = {"rank": 2, "ridge": "auto", "preserve": TEXTS, "progress": False, "store_instruction": False}
    patch = transmute(make_model(), TOKENIZER, SECRET, pairs, **common)  # type: ignore[arg-type]
    assert seen == [set()]
    assert SECRET.strip() not in json.dumps(patch.provenance)
    assert is_text_of(patch.provenance["instruction_hash"], SECRET)


def test_the_hash_is_scrypt_with_a_salt_of_its_own() -> None:
    one, two = hash_text(SECRET), hash_text(SECRET)
    assert one["salt"] != two["salt"]
    assert one["hash"] != two["hash"]
    parameters = dict(part.split("=") for part in one["scheme"].split()[1:])
    expected = hashlib.scrypt(
        SECRET.encode(), salt=bytes.fromhex(one["salt"]), dklen=32, **{key: int(n) for key, n in parameters.items()}
    )
    assert one["hash"] == expected.hex()
    assert len(bytes.fromhex(one["salt"])) == 16
    assert is_text_of(one, SECRET)
    assert not is_text_of(one, SECRET.strip())
    for damage in ({"scheme": "md5"}, {"salt": "x"}, {"hash": 5}, {"salt": None}):
        with pytest.raises(ThoughtError, match="hash of a text is"):
            is_text_of({**one, **damage}, SECRET)
    with pytest.raises(ThoughtError, match="hash of a text is"):
        is_text_of(None, SECRET)


def test_an_evaluation_wants_the_very_instruction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    patch = small_fit(tmp_path, store_instruction=False)
    common: dict[str, Any] = {"pairs": PAIRS, "unrelated": None, "max_new_tokens": 2, "progress": False}
    with pytest.raises(ThoughtError, match=r"^instruction is missing: this adapter keeps no more than a hash"):
        evaluate(make_model(), TOKENIZER, patch, **common)
    with pytest.raises(ThoughtError, match=r"^instruction is not the one"):
        evaluate(make_model(), TOKENIZER, patch, instruction=SECRET.strip(), **common)
    own = [{**pair, "instruction": SECRET} for pair in PAIRS]
    for right in ({"instruction": SECRET}, {"pairs": own}):
        assert evaluate(make_model(), TOKENIZER, patch, **{**common, **right})["pairs"] == 4
    with pytest.raises(ThoughtError, match=r"^instruction is not the one"):
        check_instruction(patch.provenance, SECRET, [*own, {"input": "x", "instruction": "Another."}])
    check_instruction({}, None, PAIRS)
    patch.save_adapter("adapter")
    Path("pairs.json").write_text(json.dumps(PAIRS))
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--adapter=adapter", "--pairs=pairs.json"])
    assert "instruction is missing" in capsys.readouterr().err
    assert "keeps no more than a hash of the instruction" in Path("adapter/README.md").read_text()


def test_several_instructions_leave_no_hash(tmp_path: Path) -> None:
    pairs = [{**pair, "instruction": f"{i}: {SECRET}"} for i, pair in enumerate(PAIRS)]
    patch = small_fit(tmp_path, pairs, store_instruction=False)
    assert patch.provenance["instruction"] is patch.provenance["instruction_hash"] is None
    with pytest.raises(ThoughtError, match="store_instruction must be True or False; got 'no'"):
        ThoughtCallback(store_instruction="no")  # type: ignore[arg-type]


def test_statistics_that_hide_their_instruction_are_merged_without_it(tmp_path: Path) -> None:
    common: dict[str, Any] = {"sites": ["mlp_out"], "order": "teacher-forced", "preserve": None}
    for name, store in (("hidden", False), ("open", True)):
        small_fit(tmp_path, PAIRS[:1], statistics_dir=name, store_instruction=store, **common)
    hidden, told_one = (SavedStatistics.load(name) for name in ("hidden", "open"))
    for one, other, key in ((hidden, told_one, None), (told_one, hidden, None), (hidden, hidden, "hash")):
        known = one.merge(other, approximate=True).manifest.provenance
        assert known["instruction"] is None
        assert (known.get("instruction_hash") is not None) == (key is not None)
    assert told_one.merge(told_one, approximate=True).manifest.provenance["instruction"] == SECRET


def test_a_fit_that_hides_its_outputs_is_resumed_with_the_same_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = small_fit(tmp_path, store_instruction=False)
    genuine, solved = StageSums.solve, []

    def solve(self: StageSums, *args: Any) -> Any:
        solved.append(1)
        if len(solved) == 3:
            raise KeyboardInterrupt
        return genuine(self, *args)

    monkeypatch.setattr(StageSums, "solve", solve)
    with pytest.raises(KeyboardInterrupt):
        small_fit(tmp_path, resume_dir="unfinished", store_instruction=False)
    assert json.loads(Path("unfinished/fit.json").read_text())["outputs"] is None
    with monkeypatch.context() as patching:
        patching.setattr(preparing, "generate", lambda m, t, prompts, **_: [Generation("x", True)] * len(prompts))
        with pytest.raises(ThoughtError, match="writes other inputs or outputs than before it was interrupted"):
            small_fit(tmp_path, resume_dir="unfinished", store_instruction=False)
    resumed = small_fit(tmp_path, resume_dir="unfinished", store_instruction=False)
    assert len(solved) == 3 + len(whole.factors) - 2
    assert distance(resumed, whole) <= ROUNDING
    assert not Path("unfinished").exists()


# --- no code in data --------------------------------------------------------------------------------------------------

MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "_pickle", "subprocess", "ctypes"}
NAMES = {"eval", "exec", "compile", "__import__"}
CALLS = {
    *("torch.load", "torch.save", "torch.jit.load", "torch.package", "yaml.load", "yaml.unsafe_load", "os.system"),
    *("np.load", "numpy.load", "pd.read_pickle", "dist.broadcast_object_list", "dist.all_gather_object"),
    *("dist.gather_object", "dist.scatter_object_list", "os.popen"),
}


def suspicious(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in MODULES:
            yield str(node.module)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            words = {keyword.arg: keyword.value for keyword in node.keywords}
            trusting = isinstance(words.get("trust_remote_code"), ast.Constant) and words["trust_remote_code"].value
            if name in CALLS or name in NAMES or {"allow_pickle", "weights_only"} & words.keys() or trusting:
                yield name


def test_the_package_has_no_way_to_run_what_it_reads() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 50
    assert {file.name: found for file in files if (found := list(suspicious(ast.parse(file.read_text()))))} == {}
    bad = "import pickle.x\nfrom joblib import load\ntorch.load(f)\nnp.load(f)\neval('1')\nf(x, allow_pickle=True)"
    assert len(list(suspicious(ast.parse(f"{bad}\nload(trust_remote_code=True)\nmodel.eval()")))) == 7


class Payload:
    """Makes a file when it is unpickled."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("executed"),)


def test_pickles_are_refused_and_never_opened(tmp_path: Path) -> None:
    data = pickle.dumps(Payload())
    small_fit(tmp_path, output_dir="adapter", statistics_dir="sums")
    for name in ("adapter/adapter_model.safetensors", "sums/stage-0001.safetensors", "pairs.json", "pairs.pkl"):
        Path(name).write_bytes(data)
    Path("shared.safetensors").write_bytes(data)
    for read in (
        lambda: ThoughtPatch.load("adapter"),
        lambda: SavedStatistics.load("sums"),
        lambda: Preservation("shared.safetensors"),
        lambda: load_pairs("pairs.json"),
        lambda: load_pairs("pairs.pkl"),
    ):
        with pytest.raises(ThoughtError):
            read()
    Path("adapter/adapter_model.safetensors").rename("adapter/adapter_model.bin")
    with pytest.raises(ThoughtError, match="is a pickle, which could run code"):
        ThoughtPatch.load("adapter")
    assert not Path("executed").exists()
    pickle.loads(data)
    assert Path("executed").exists(), "it would have run"


@pytest.mark.parametrize(
    "line",
    [
        "rank: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [executed]]",
        "generate: {class_path: pathlib.Path.touch, init_args: {self: executed}}",
        "rank: !!python/name:os.system",
    ],
)
def test_a_config_runs_nothing(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("pairs.json").write_text(json.dumps(PAIRS))
    Path("fit.yaml").write_text(f"pairs: pairs.json\ninstruction: Say.\nout: out\nmodel: /nowhere\n{line}\n")
    with pytest.raises(SystemExit) as raised:
        cli.main(["fit", "--config=fit.yaml"])
    assert raised.value.code == 2
    assert "error" in capsys.readouterr().err
    assert not Path("executed").exists()


def test_remote_code_is_trusted_only_where_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    asked: list[tuple[str, Any]] = []
    for loader in (models.AutoModelForCausalLM, models.AutoTokenizer):
        genuine = loader.from_pretrained

        def load(location: str, genuine: Any = genuine, **options: Any) -> Any:
            asked.append((Path(location).name, options["trust_remote_code"]))
            return genuine(location, **{**options, "trust_remote_code": False})

        monkeypatch.setattr(loader, "from_pretrained", load)
    models.load_model(tmp_path / "model")
    assert asked == [("model", False), ("model", False)]
    asked.clear()
    models.load_model(tmp_path / "model", tokenizer=tmp_path / "tokenizer", trust_remote_code=True)
    assert asked == [("tokenizer", False), ("model", True)]
    flags = [vars(command_parser(command).get_defaults()) for command in cli.COMMANDS.values()]
    defaults = [own["trust_remote_code"] for own in flags if "trust_remote_code" in own]
    assert defaults == [False] * len(defaults)
    assert len(defaults) >= 7


# --- paths -----------------------------------------------------------------------------------------------------------


def lead_out(file: Path) -> None:
    """Put the file somewhere else, and a link to it in its place."""
    outside = file.parent.parent / f"outside {file.name}"
    file.rename(outside)
    file.symlink_to(outside)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "thought.json"])
def test_links_out_of_an_adapter_are_not_followed(name: str, tmp_path: Path) -> None:
    small_fit(tmp_path, output_dir="place/adapter")
    (tmp_path / "place" / "adapter" / name).rename(tmp_path / "place" / "adapter" / f"real {name}")
    (tmp_path / "place" / "adapter" / name).symlink_to(f"real {name}")
    ThoughtPatch.load("place/adapter")  # a link within the folder
    (tmp_path / "place" / "adapter" / name).unlink()
    (tmp_path / "place" / "adapter" / f"real {name}").rename(tmp_path / "place" / "adapter" / name)
    lead_out(tmp_path / "place" / "adapter" / name)
    with pytest.raises(ThoughtError, match=f"has no {name} of its own"):
        ThoughtPatch.load("place/adapter")


def test_a_report_stays_in_its_folders(tmp_path: Path) -> None:
    small_fit(tmp_path, output_dir="run")
    for name in ("README.md", "report.html"):
        Path(f"precious {name}").write_text("mine")
        Path("run", name).unlink(missing_ok=True)
        Path("run", name).symlink_to(tmp_path / f"precious {name}")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "result.json").write_text("{}")
    Path("run/evaluation").symlink_to(tmp_path / "elsewhere")
    content = write_report("run")
    assert content["evaluation"] is None
    assert [Path(f"precious {name}").read_text() for name in ("README.md", "report.html")] == ["mine", "mine"]
    assert "mine" not in Path("run/README.md").read_text()
    assert not any(Path("run", name).is_symlink() for name in ("README.md", "report.html"))
    with pytest.raises(ThoughtError, match=r"it has no items\.jsonl of its own|damaged|lacks"):
        write_report("run", evaluation="elsewhere")


def test_an_unfinished_fit_stays_in_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "place" / "unfinished"
    progress = UnfinishedFit(folder, {"a": 1})
    progress.start([])
    (folder / "precious.txt").write_text("mine")
    lead_out(folder / "fit.json")
    with pytest.raises(ThoughtError, match=r"fit\.json is not readable"):
        UnfinishedFit(folder, {"a": 1})
    progress.remove()
    assert [file.name for file in folder.iterdir()] == ["precious.txt"]
    (tmp_path / "file").touch()
    with pytest.raises(ThoughtError, match="is a file; expected a folder"):
        UnfinishedFit(tmp_path / "file", {})


@pytest.mark.parametrize(
    "entry", ["../../elsewhere", "/etc/passwd", "preserve-" + "0" * 23 + "/", "preserve-" + "G" * 24]
)
def test_a_manifest_names_no_path(entry: str, tmp_path: Path) -> None:
    small_fit(tmp_path, statistics_dir="sums")
    value = json.loads(Path("sums/manifest.json").read_text())
    Path("sums/manifest.json").write_text(json.dumps({**value, "preservation": entry}))
    with pytest.raises(ThoughtError, match="is no name of preservation statistics"):
        SavedStatistics.load("sums")


# --- claims of size --------------------------------------------------------------------------------------------------


def claim(file: Path, name: str, shape: list[int], bytes_too: bool) -> None:
    """Edit the header alone: a tensor of another shape, and with ``bytes_too`` as many bytes."""
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    entry = header[name]
    entry["shape"] = shape
    if bytes_too:
        count = 1
        for length in shape:
            count *= length
        entry["data_offsets"][1] = entry["data_offsets"][0] + 8 * count
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data[8 + size :])


@pytest.mark.parametrize("bytes_too", [False, True])
@pytest.mark.parametrize("shape", [[2**40, 2**20], [2**62], [10**9, 4]])
def test_enormous_tensors_are_refused_without_memory(shape: list[int], bytes_too: bool, tmp_path: Path) -> None:
    small_fit(tmp_path, output_dir="adapter", statistics_dir="sums")
    model = make_model()
    blocks = find_blocks(model)
    kept, _ = preservation(model, blocks, [[2, 3, 4]], "other")
    kept.save("shared.safetensors")
    stage = next(name for name in load_file("sums/stage-0000.safetensors") if name.startswith("matrix."))
    readers: list[tuple[str, str, Callable[[], object]]] = [
        ("adapter/adapter_model.safetensors", "", lambda: ThoughtPatch.load("adapter")),
        ("sums/stage-0000.safetensors", stage, lambda: SavedStatistics.load("sums").stage(0)),
        ("shared.safetensors", "0.attn_out.factor", lambda: Preservation("shared.safetensors")),
    ]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for file, name, read in readers:
        read()
        claim(Path(file), name or next(iter(load_file(file))), shape, bytes_too)
        with pytest.raises(ThoughtError):
            read()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000 * (
        1 if sys.platform == "linux" else 1024
    )


def test_sums_of_no_rows_do_not_claim_a_size(tmp_path: Path) -> None:
    small_fit(tmp_path, statistics_dir="sums", sites=["mlp_in"], steps=1, preserve=None)
    value = json.loads(Path("sums/manifest.json").read_text())
    value["stages"][0]["d_in"] = 2**40
    Path("sums/manifest.json").write_text(json.dumps(value))
    file = Path("sums/stage-0000.safetensors")
    with safe_open(file, framework="pt") as content:
        label = {key: value for key, value in content.metadata().items() if key != "sha256"}
    tensors = {name: tensor for name, tensor in load_file(file).items() if name not in ("matrix.gram", "matrix.cross")}
    rows = {"matrix.a": torch.zeros(0, 2**40), "matrix.delta": torch.zeros(0, 32)}
    save_file({**tensors, **{name: tensor.double() for name, tensor in rows.items()}}, file, label)
    with pytest.raises(ThoughtError, match="are not those of block 0, mlp_in"):
        SavedStatistics.load("sums").stage(0)


def test_a_file_for_other_sizes_is_refused_before_it_is_read(tmp_path: Path) -> None:
    model = make_model()
    blocks = find_blocks(model)
    preservation(model, blocks, [[2, 3, 4]], "other", directions=1)[0].save("shared.safetensors")
    with safe_open("shared.safetensors", framework="pt") as content:
        label = content.metadata()
    tensors = load_file("shared.safetensors")
    tensors["1.mlp_out.factor"] = torch.ones(300_000, 1, dtype=torch.int8)
    tensors["1.mlp_out.scale"] = torch.ones(300_000)
    save_file(tensors, "shared.safetensors", label)
    with pytest.raises(ThoughtError, match=r"block 1, mlp_out has 300000 inputs, not 48"):
        transmute(model, make_tokenizer(), "up: down\n", PAIRS, preserve="shared.safetensors", cache_dir="theirs")
    assert not Path("theirs").exists()

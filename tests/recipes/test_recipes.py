"""Every recipe through its real command line with its own config, on a tiny model; and what they share."""

from __future__ import annotations

import inspect
import json
import math
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models import make_model, make_tokenizer
from recipe_runs import CONFIGS, models, run_recipe, script_of

from lit_thought import load_model, transmute
from lit_thought.errors import ThoughtError
from lit_thought.patch.patch import ThoughtPatch
from lit_thought.runs.streams import lead_cache
from lit_thought.settings import FitSettings
from lit_thought.solve.factors import Factors
from recipes import harness
from recipes.harness import (
    DATA,
    ROOT,
    SIX_TASKS,
    Split,
    Trial,
    check_names,
    demonstrations,
    difference,
    load_split,
    parameters,
    patch_difference,
    share,
    table,
)
from recipes.speed.benchmark_inference import Case, measure, with_adapter, write
from recipes.studies.limits import FORMS
from recipes.studies.moe import upcycle
from recipes.tasks.word_tasks import _first, _left_out, word_tasks

ANTONYMS = "--tasks=[common_words/antonym]"


def test_every_recipe_has_a_test() -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("test_*.py")))
    named = set(re.findall(r'run_recipe\(\s*"(\w+)"', tests)) | {
        "quickstart",
        "lightning_cli",
    }
    assert named == CONFIGS.keys() - {"versions", "served"}, (
        "these need an environment of their own; their parts are tested"
    )


def test_configs_say_what_their_parameters_are() -> None:
    for config in CONFIGS.values():
        about = parameters(config)
        assert about.keys() == yaml.safe_load(config.read_text(encoding="utf-8")).keys(), config
        assert all(about.values()), config


def test_without_its_config_a_recipe_does_the_same() -> None:
    own = {"arithmetic": {"training"}, "edit_fact": {"data"}, "life": {"about", "tested"}}  # no plain values, or needed
    for name, config in CONFIGS.items():
        script = script_of(name)
        if script.stem != name or name in ("lightning_cli", "scorecard", "versions", "served"):
            continue
        found = re.search(r"(?:command_line|auto_cli)\((\w+)\)", script.read_text(encoding="utf-8"))
        assert found is not None
        module = import_module(".".join(script.relative_to(ROOT).with_suffix("").parts))
        wanted = yaml.safe_load(config.read_text(encoding="utf-8"))
        for key, one in inspect.signature(getattr(module, found[1])).parameters.items():
            if key in wanted and key not in own.get(name, ()):
                default, given = ([*v] if isinstance(v, list | tuple) else v for v in (one.default, wanted[key]))
                assert default == given or sorted(default) == sorted(given), f"{name}: {key}"


def test_readme_lists_every_recipe() -> None:
    page = (ROOT / "recipes/README.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| \[[\w ]+\]\(([\w/]+\.py)\)", page, re.MULTILINE))
    scripts = {script_of(config).relative_to(ROOT / "recipes").as_posix() for config in CONFIGS}
    assert listed == scripts
    for target in re.findall(r"\]\(([^):#]+)\)", page):
        assert (ROOT / "recipes" / target).exists(), target
    for module, config in re.findall(r"python -m (recipes[a-z_.]+) --config ([a-z_/]+\.yaml)", page):
        assert script_of(Path(config).stem).with_suffix("").relative_to(ROOT).as_posix() == module.replace(".", "/")


def test_a_recipe_runs_from_a_checkout_alone(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "lit_thought").symlink_to(ROOT / "lit_thought")
    command = [sys.executable, "-m", "recipes.tasks.word_tasks", "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Fit and test every task, seed and choice of sites." in done.stdout
    assert "demonstrations in the instruction" in done.stdout


def test_quickstart(tmp_path: Path) -> None:
    command = [sys.executable, "recipes/quickstart.py", "--config=recipes/quickstart.yaml", "--test=2", "--rank=4"]
    command += [f"--model={models() / 'llama'}", f"--out={tmp_path / 'adapter'}"]
    environment = {**os.environ, "LIT_THOUGHT_CACHE": str(models() / "cache")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| accuracy (exact match) |" in done.stdout
    assert float(done.stdout.split("patched model: ")[1].split()[0]) < 1e-4
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_lightning_cli(tmp_path: Path) -> None:
    """By the command that its config begins with, but for the model: the patch of transmute with the same arguments."""
    config = CONFIGS["lightning_cli"]
    command = [sys.executable, str(script_of("lightning_cli")), "fit", f"--config={config}"]
    command += [f"--model.model={models() / 'llama'}", "--data.max_new_tokens=3"]
    environment = {**os.environ, "LIT_THOUGHT_CACHE": str(models() / "cache"), "PYTHONPATH": str(ROOT)}
    for _ in range(2):  # the second one overwrites
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    assert "| 6/6 [" in done.stderr
    out = tmp_path / "out" / "lightning_cli"
    assert len((out / "version_1" / "metrics.csv").read_text(encoding="utf-8").splitlines()) == 1 + 6
    assert (out / "version_1" / "config.yaml").is_file()
    given = yaml.safe_load(config.read_text(encoding="utf-8"))
    data = {**given["data"], "max_new_tokens": 3}
    model, tokenizer = load_model(models() / "llama", **given["model"]["load"])
    wanted = transmute(model, tokenizer, **data, rank=16, cache_dir=models() / "cache", progress=False)
    found = ThoughtPatch.load(out / "adapter")
    assert patch_difference(found, wanted) < 1e-6
    assert found.provenance["settings"] == wanted.provenance["settings"]


def test_word_tasks(tmp_path: Path) -> None:
    reduced = [ANTONYMS, "--test=2", "--fit=8", "--max_new_tokens=3", "--rank=4"]
    ran = run_recipe("word_tasks", tmp_path, "--seeds=[0]", *reduced)
    assert "- both: mean fidelity" in ran.printed
    record = ran.record
    assert [run["sites"] for run in record["runs"]] == ["both", "attn_out", "mlp_out", "auto"]
    assert {run["settings"]["generated_outputs"] for run in record["runs"]} == {8}, "labels must not be used"
    default, *_, auto = record["runs"]
    assert (default["selection"], default["settings"]["rank"]) == (None, 4)
    assert set(auto["selection"]["chosen"]) == {"ridge", "preserve_weight", "rank", "scale", "blocks"}
    assert auto["selection"]["held_back"] == [4, 8]
    assert len(auto["left_out"]) == len(auto["correct"]["patched"]) == 2
    (tmp_path / "more").mkdir()
    more = run_recipe("word_tasks", tmp_path / "more", "--seeds=[0,1]", f"--done=[{ran.out}.json]", *reduced).record
    assert more["runs"][:4] == record["runs"]
    assert [run["seed"] for run in more["runs"]] == [0] * 4 + [1] * 4
    with pytest.raises(ThoughtError, match=r"done: expected results of .*'rank': 5"):
        word_tasks(model=str(models() / "llama"), rank=5, done=[f"{ran.out}.json"])


def test_word_tasks_on_gemma(tmp_path: Path) -> None:
    reduced = [ANTONYMS, "--seeds=[0]", "--test=2", "--fit=4", "--max_new_tokens=3", "--rank=4"]
    (result,) = run_recipe("word_tasks_gemma", tmp_path, *reduced, model="gemma").record["runs"]
    assert result["output_kl"]["patched"] < result["output_kl"]["plain"]


def test_words_left_out_have_answers_of_other_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer()
    monkeypatch.setattr(Trial, "prepared", lambda self: type("Data", (), {"written": [(0, "cold", True)]}))
    answers = ["cold", "down", "French", "answer", "pirate"]
    tested = [{"input": "fox", "output": word} for word in answers]
    split = Split("words", [{"input": "up", "output": "down"}], [{"input": "hot", "output": ""}], tested)
    first = {word: tokenizer(f" {word}")["input_ids"][0] for word in answers}
    known = {token for word in ("cold", "down") for token in tokenizer(f" {word}\n")["input_ids"]}
    found = _left_out(Trial(make_model("llama"), tokenizer, split, 3))
    assert found == [first[word] not in known for word in answers]
    assert set(found[:2]) == {False}
    assert any(found)


def test_moe(tmp_path: Path) -> None:
    ran = run_recipe("moe", tmp_path, ANTONYMS, "--experts=4", "--test=2", "--fit=4", "--max_new_tokens=3", "--rank=4")
    assert "sites: ['attn_out']" in ran.printed
    (row,) = ran.record["rows"]
    assert 0 < row["routing"]["plain"] < 1
    assert 0 < row["routing"]["patched"] <= 1
    assert row["routing"]["patched"] != row["routing"]["plain"]


def test_upcycling_without_noise_leaves_the_model_what_it_is() -> None:
    dense = make_model("llama").float()
    sparse = upcycle(dense, experts=4, experts_per_token=2, noise=0.0, seed=0)
    ids = torch.arange(3, 15)[None]
    assert torch.allclose(sparse(ids).logits, dense(ids).logits, atol=1e-4)
    assert not torch.allclose(upcycle(dense, 4, 2, 0.1, 0)(ids).logits, dense(ids).logits, atol=1e-2)


def test_sweep(tmp_path: Path) -> None:
    reduced = [
        "--seeds=[0]",
        "--preserve_weights=[1.0]",
        "--ridges=[0.01,0.1]",
        "--ranks=[4]",
        "--answer_weights=[1.0]",
    ]
    rows = run_recipe("sweep", tmp_path, ANTONYMS, *reduced).record["rows"]
    assert len(rows) == 2
    assert rows[0]["output_kl"] <= rows[-1]["output_kl"]


def test_preservation_file(tmp_path: Path) -> None:
    reduced = [ANTONYMS, "--directions=[8,null]", "--preserve_tokens=[300]", "--rank=4", "--fit=4", "--test=2"]
    record = run_recipe("preservation_file", tmp_path, *reduced).record
    small, whole = "8 directions, 300 tokens", "all directions, 300 tokens"
    assert [run["preserve"] for run in record["runs"]] == ["none", small, whole]
    kl = {run["preserve"]: run["output_kl"]["patched"] for run in record["runs"]}
    assert len({round(value, 4) for value in kl.values()}) == 3, "each way must reach the fit"
    assert record["files"][small]["bytes"] < record["files"][whole]["bytes"]


def test_limits(tmp_path: Path) -> None:
    town = {"title": "Land", "passage": "the red dog sits on the blue hill"}
    town["questions"] = [{"input": text, "outputs": ["hill"]} for text in ("Who?", "Where?", "When?")]
    (tmp_path / "town.json").write_text(json.dumps(town), encoding="utf-8")
    reduced = [f"--document={tmp_path / 'town.json'}", "--shots=3", "--fit=4", "--test=3", "--rank=4"]
    ran = run_recipe("limits", tmp_path, *reduced, "--document_rank=4", "--max_new_tokens=3")
    rows = ran.record["rows"]
    cases = ["facts that were fitted", "other facts of it", *FORMS]
    cases += ["fitted on outputs of the instructed model", "fitted on right outputs"]
    assert [row["case"] for row in rows] == cases
    fitted, other, *words = ({item["input"] for item in row["items"]} for row in rows[:6])
    assert (fitted, other) == ({"Who?", "When?"}, {"Where?"})
    assert all(row == words[0] for row in words)
    assert rows[0]["output_kl"]["patched"] < rows[0]["output_kl"]["plain"]
    assert rows[6]["output_kl"] != rows[7]["output_kl"], "right outputs must reach the fit"
    assert len([line for line in ran.printed.splitlines() if line.startswith("| ")]) == 1 + len(rows)


def test_benchmark_fit(tmp_path: Path) -> None:
    reduced = ["--pairs=[4]", "--chunks=[20]", "--chunk_pairs=3", "--repeats=1", "--rank=4"]
    ran = run_recipe("benchmark_fit", tmp_path, *reduced)
    row, longer, *others = ran.record["rows"]
    assert [row["dtype"] for row in ran.record["rows"]] == ["float32"] * 2 + ["bfloat16"] * 2
    assert [other["compared_tokens"] > 0 for other in others] == [True, True]
    assert (row["pairs"], longer["pairs"]) == (4, 3)
    assert 20 <= longer["chunk_tokens"] < 30
    assert row["ratio"] > 0
    assert {"preserve", "prepare", "forward", "statistics", "solve", "save"} <= set(row["stages"])
    kept = ran.record["preservation"]["float32"]
    assert kept["tokens"] == FitSettings().preserve_tokens
    assert kept["ratio"] == pytest.approx(kept["seconds"] / kept["bare_seconds"])
    assert f"{kept['ratio']:.2f} times the bare forward passes of their {kept['tokens']:,} tokens" in ran.page


@pytest.mark.slow
def test_benchmark_processes(tmp_path: Path) -> None:
    ran = run_recipe("benchmark_processes", tmp_path, "--pairs=4", "--repeats=1", "--rank=4")
    assert "| 2 |" in ran.printed
    one, two = ran.record["rows"]
    assert one["difference"] == 0
    assert 0 <= two["difference"] < 1e-4


def test_benchmark_baselines(tmp_path: Path) -> None:
    reduced = ["--tasks=[function_vectors/present-past]", "--pairs=[4,400]", "--learning_rates=[0.0001,0.01]"]
    reduced += ["--every=5", "--max_steps=12", "--max_times=1000", "--test=3", "--max_new_tokens=3", "--repeats=1"]
    ran = run_recipe("benchmark_baselines", tmp_path, *reduced, "--rank=4")
    assert "to our accuracy (rate)" in ran.printed
    (row,) = ran.record["rows"]
    assert row["pairs"] == 4, "present-past has no 400 pairs"
    assert row["ours"]["seconds"] > 0
    assert {"prepare", "forward", "solve"} <= set(row["ours"]["stages"])
    slow, fast = row["rival"]
    assert (slow["learning_rate"], fast["learning_rate"]) == (1e-4, 1e-2)
    assert [run["best"] for run in row["rival"]].count(True) == 1
    assert [entry["step"] for entry in slow["history"] if entry["step"] in (5, 10, 12)] == [5, 10, 12]
    assert fast["history"][-1]["loss"] < slow["history"][-1]["loss"]
    best = slow if slow["best"] else fast
    assert best["scored"]["output_kl"] == pytest.approx(best["last"]["output_kl"], rel=1e-3)
    assert best["scored"]["perplexity_ratio"] != row["ours"]["perplexity_ratio"]


def test_benchmark_inference(tmp_path: Path) -> None:
    reduced = ["--chunks=[10,100]", "--batches=[1,2]", "--new_tokens=3", "--repeats=2", "--rank=4"]
    ran = run_recipe("benchmark_inference", tmp_path, *reduced)
    assert "| patched, merged |" in ran.printed
    rows = ran.record["rows"]
    assert len(rows) == 2 * (2 + 2 * 2)
    sizes = {(row["batch"], row["case"], row["chunk"]): row for row in rows}
    patched = sizes[2, "patched, merged", 0]
    whole, cached = sizes[2, "instructed", 100], sizes[2, "instructed, chunk cached", 100]
    assert patched["tokens_run"] == cached["tokens_run"] == whole["tokens_run"] - 100
    token = 2 * 3 * 2 * 8 * 4  # keys and values, blocks, heads, their size, float32
    assert patched["cache_bytes"] == 2 * token * (patched["tokens_run"] + 2)
    assert whole["cache_bytes"] == cached["cache_bytes"] == patched["cache_bytes"] + 2 * token * 100
    assert (cached["kept_bytes"], whole["kept_bytes"]) == (token * 100, 0)
    assert all(row["first_token_seconds"] > 0 and row["tokens_per_second"] > 0 for row in rows)


def test_every_way_to_ask_is_answered_as_the_whole_prompt_is() -> None:
    lm, ids = make_model("llama").float(), list(range(5, 35))
    target = "model.layers.1.mlp.down_proj"
    patch = ThoughtPatch({target: Factors(torch.randn(4, 48), torch.randn(32, 4))})
    with torch.inference_mode():
        cached = Case("cached", 20, lm, ids[20:], lead_cache(lm, ids[:20]))
        cases = [Case("whole", 20, lm, ids), cached, Case("beside", 0, with_adapter(lm, patch), ids)]
        cases.append(Case("merged", 0, with_adapter(lm, patch).merge_and_unload(), ids))
        whole, led, beside, merged = (write(case, 2, 6)["tokens"] for case in cases)
        again = write(cached, 2, 6)["tokens"]
        rows = measure(cases, 2, 6, 1)
    expected = lm.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, eos_token_id=None)[:, len(ids) :]
    assert whole.tolist() == led.tolist() == again.tolist() == expected.expand(2, -1).tolist()
    with patch.applied(lm):
        expected = lm.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, eos_token_id=None)[:, len(ids) :]
    assert beside.tolist() == merged.tolist() == expected.expand(2, -1).tolist()
    assert beside.tolist() != whole.tolist()
    assert [row["case"] for row in rows] == ["whole", "cached", "beside", "merged"]


def test_theory(tmp_path: Path) -> None:
    reduced = [ANTONYMS, "--tokens=20", "--fit=4", "--test=2", "--max_new_tokens=3"]
    ran = run_recipe("theory", tmp_path, *reduced)
    assert ran.page.count("\n## ") == 4
    assert "| both |" in ran.printed
    for line in ("| contrastive mean difference", "| ROME", "| MEMIT"):
        (row,) = [row for row in ran.page.splitlines() if row.startswith(line)]
        assert float(row.split("|")[2]) < 1e-4, row
    for name in ("kept", "spectra"):
        assert (tmp_path / f"theory_{name}.svg").read_text(encoding="utf-8").startswith("<?xml")
        assert f"(theory_{name}.svg)" in ran.page


def test_accuracy_by_step(tmp_path: Path) -> None:
    reduced = ["--steps=2", "--pairs_per_step=2", "--fit=4", "--test=2", "--max_new_tokens=3"]
    ran = run_recipe("accuracy_by_step", tmp_path, *reduced, f"--logs={tmp_path / 'logs'}")
    history = ran.record["history"]
    assert set(history) == {"mlp_in", "matrix", "vector"}
    assert [entry["step"] for entry in history["mlp_in"]] == [0, 1, 2]
    assert history["matrix"][2]["output_kl"] != history["vector"][2]["output_kl"]
    assert ran.out.with_suffix(".svg").is_file()
    assert "val/accuracy" in (tmp_path / "logs/antonym_mlp_in/version_0/metrics.csv").read_text()


def test_edit_fact(tmp_path: Path) -> None:
    reduced = ["--landmarks=3", "--blocks=[1,2]", "--edit_blocks=[0,2]", "--unrelated_windows=1", "--samples=1"]
    ran = run_recipe("edit_fact", tmp_path, *reduced, "--rank=4")
    assert "| paraphrase: the same, held-out wordings |" in ran.printed
    assert set(ran.record["blocks_chosen"].values()) <= {0, 2}
    runs = ran.record["runs"]
    assert runs["plain"]["paraphrase_kl_plain"] == runs["instructed"]["paraphrase_kl_instructed"] == 0
    before, after = (runs[name]["efficacy_kl_instructed"] for name in ("plain", "nothing kept"))
    assert after < before


def test_edited_fact_is_tested_on_other_wordings_and_landmarks() -> None:
    fact = json.loads((DATA / "landmarks.json").read_text(encoding="utf-8"))
    fitted, held_out = set(fact["fit"]), set(fact["paraphrase"])
    preserved, tested = ({name for name, _ in fact["landmarks"][part]} for part in ("preserve", "neighbourhood"))
    assert len(fitted) >= 8
    assert len(held_out) >= 10
    assert len(tested) >= 20
    assert not fitted & held_out
    assert not preserved & tested
    assert fact["subject"] not in preserved | tested


def test_splits_share_nothing() -> None:
    for task in SIX_TASKS:
        split = load_split(task, 1)
        fit, test = ({pair["input"] for pair in pairs} for pairs in (split.fit, split.test))
        assert len(fit) == 30
        assert not fit & test
        assert all(set(pair) == {"input"} for pair in split.fit)
        assert not any(f"Q: {word}\n" in split.instruction for word in fit | test)


def test_demonstrations_take_a_form() -> None:
    pairs = [{"input": "hot", "output": "cold"}, {"input": "up", "output": "down"}]
    assert demonstrations(pairs, FORMS["hot -> …"]) == "hot -> cold\nup -> down\n"
    assert demonstrations(pairs) == "Q: hot\nA: cold\nQ: up\nA: down\n"


def test_difference_of_patches() -> None:
    torch.manual_seed(0)
    A, B, vector = torch.randn(2, 5), torch.randn(4, 2), torch.randn(4)
    one = ThoughtPatch({"a": Factors(A, B), "b": Factors(A, 10 * B)}, vectors={"c": vector})
    other = ThoughtPatch({"a": Factors(A, B), "b": Factors(A, 11 * B)}, vectors={"c": vector})
    assert patch_difference(one, one) == 0
    assert patch_difference(one, other) == pytest.approx(0.1, rel=1e-5)
    other.vectors["c"] = 1.5 * vector
    assert patch_difference(one, other) == pytest.approx(0.5, rel=1e-5)
    other.vectors["c"] = torch.full((4,), torch.nan)
    assert math.isnan(patch_difference(one, other))


def test_tables_and_names() -> None:
    rows: list[list[Any]] = [["a", 1.5], ["b", None]]
    assert table(["x", "n"], rows) == "| x | n |\n|---|---:|\n| a | 1.5 |\n| b | – |\n"
    check_names("sizes", ["s"], ["s", "m"])
    with pytest.raises(ThoughtError, match=r"sizes: expected some of s, m; got \['l'\]; correct the names"):
        check_names("sizes", ["l", "s"], ["s", "m"])


def test_intervals_are_of_each_word_once() -> None:
    hits, before, words = [True, True, False, True], [False, True, False, False], ["a", "b", "c", "a"]
    once = _first(words)
    assert once == [True, True, True, False]
    assert share(hits, 3, once) == f"0.750 {share(hits[:3], 3).split(' ', 1)[1]}"
    assert difference(hits, before, 3, once) == f"+0.500 {difference(hits[:3], before[:3], 3).split(' ', 1)[1]}"
    assert share(hits) != share(hits, 2, once)


def test_provenance_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: object, **options: object) -> None:
        raise FileNotFoundError("git")

    assert set(harness.provenance()) == {"commit", "versions"}
    monkeypatch.setattr(subprocess, "run", missing)
    assert harness.provenance()["commit"] is not None  # the one that the recipe started with
    harness.provenance.cache_clear()
    assert harness.provenance()["commit"] is None
    harness.provenance.cache_clear()


def test_results_keep_the_dots_of_their_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("model-1.0", "model-1.5"):
        harness.write_results(word_tasks.__code__.co_filename, tmp_path / name, name, {"settings": {}})
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        f"model-1.{digit}.{suffix}" for digit in "05" for suffix in ("json", "md")
    ]
    assert "model-1.5\n" in (tmp_path / "model-1.5.md").read_text(encoding="utf-8")


def test_what_a_recipe_cannot_write_or_does_not_know_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    ran = []

    def recipe(out: str = "x", model: str = "smollm2") -> None:
        ran.append((out, model))

    checked = harness._checked(recipe)
    with pytest.raises(ThoughtError, match=r"^out=.* is a file, not a folder"):
        checked(out=str(tmp_path / "file" / "page"), model="tiny")
    checked(out=str(tmp_path / "new" / "page"), model="tiny")
    assert ran == [(str(tmp_path / "new" / "page"), "tiny")]
    monkeypatch.setattr("recipes.tasks.word_tasks.load_model", lambda name: pytest.fail("it was loaded"))
    with pytest.raises(ThoughtError, match=r"^sites: expected some of both, auto,"):
        word_tasks(sites=["both", "mlp-out"])
    words = [sys.executable, script_of("quickstart"), f"--out={tmp_path}"]
    ended = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
    assert "is a folder that is not empty" in ended.stderr
    assert "Loading" not in ended.stdout

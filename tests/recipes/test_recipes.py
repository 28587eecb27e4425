"""Every recipe through its real command line with its own config, on a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import make_family
from models import make_model, make_tokenizer
from recipe_settings import ELSEWHERE, REDUCED, SCRIPTS

from recipes.harness import ROOT

RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make_model("llama").float().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    make_family("gemma3_text").save_pretrained(folder / "gemma")
    make_tokenizer(bos=True).save_pretrained(folder / "gemma")
    return folder


def run(name: str, tiny: Path, *arguments: str, model: str = "model") -> str:
    (config,) = (path for path in RECIPES if path.stem == name)
    folder = config.parent.name
    script = ["recipes/quickstart.py"] if folder == "recipes" else ["-m", f"recipes.{folder}.{SCRIPTS.get(name, name)}"]
    command = [sys.executable, *script, f"--config={config}", f"--model={tiny / model}"]
    environment = {**os.environ, "LIT_THOUGHT_CACHE": str(tiny / "cache")}
    done = subprocess.run(
        [*command, *REDUCED[name], *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_recipe_has_a_config_and_a_reduced_setting() -> None:
    assert {path.stem for path in RECIPES} == {*REDUCED, *ELSEWHERE}


def test_quickstart(tiny: Path) -> None:
    printed = run("quickstart", tiny, "--rank=4", f"--out={tiny / 'adapter'}")
    assert "| accuracy (exact match) |" in printed
    difference = float(printed.split("patched model: ")[1].split()[0])
    assert difference < 1e-4
    assert (tiny / "adapter" / "adapter_model.safetensors").is_file()


def test_word_tasks(tiny: Path) -> None:
    printed = run("word_tasks", tiny, "--rank=4", f"--out={tiny / 'words'}")
    assert "- both: mean fidelity" in printed
    record = json.loads((tiny / "words.json").read_text())
    assert [run["sites"] for run in record["runs"]] == ["both", "attn_out", "mlp_out"]
    assert record["settings"]["generated_outputs"] == 4, "labels must not be used"


def test_word_tasks_on_gemma(tiny: Path) -> None:
    run("word_tasks_gemma", tiny, "--rank=4", f"--out={tiny / 'gemma_words'}", model="gemma")
    (result,) = json.loads((tiny / "gemma_words.json").read_text())["runs"]
    assert result["output_kl"]["patched"] < result["output_kl"]["plain"]


def test_word_tasks_with_settings_chosen(tiny: Path) -> None:
    run("word_tasks_auto", tiny, f"--out={tiny / 'auto_words'}")
    record = json.loads((tiny / "auto_words.json").read_text())
    default, auto = record["runs"]
    assert (default["selection"], record["settings"]["rank"]) == (None, 16)
    assert set(auto["selection"]["chosen"]) == {"ridge", "preserve_weight", "rank", "scale", "blocks"}
    assert auto["selection"]["held_back"] == [4, 8]
    assert len(auto["left_out"]) == len(auto["correct"]["patched"]) == 2


def test_words_left_out_have_answers_of_other_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    from recipes.harness import Split
    from recipes.tasks.word_tasks import _left_out

    tokenizer = make_tokenizer()
    monkeypatch.setattr("lit_thought.fit.data.PairDataModule.write", lambda *_: [(0, "cold", True)])
    shown = "Q: up\nA: down\n"
    answers = ["cold", "down", "French", "answer", "pirate"]
    split = Split("words", shown, [{"input": "hot"}], [{"input": "fox", "output": word} for word in answers])
    first = {word: tokenizer(f" {word}")["input_ids"][0] for word in answers}
    known = {token for word in ("cold", "down") for token in tokenizer(f" {word}\n")["input_ids"]}
    found = _left_out(make_model("llama"), tokenizer, split, 3)
    assert found == [first[word] not in known for word in answers]
    assert set(found[:2]) == {False}
    assert any(found)


def test_moe(tiny: Path) -> None:
    printed = run("moe", tiny, "--rank=4", f"--out={tiny / 'moe'}")
    assert "sites: ['attn_out']" in printed
    (row,) = json.loads((tiny / "moe.json").read_text())["rows"]
    assert 0 < row["routing"]["plain"] < 1
    assert 0 < row["routing"]["patched"] <= 1
    assert row["routing"]["patched"] != row["routing"]["plain"]


def test_upcycling_without_noise_leaves_the_model_what_it_is() -> None:
    from recipes.studies.moe import upcycle

    dense = make_model("llama").float()
    sparse = upcycle(dense, experts=4, experts_per_token=2, noise=0.0, seed=0)
    ids = torch.arange(3, 15)[None]
    assert torch.allclose(sparse(ids).logits, dense(ids).logits, atol=1e-4)
    assert not torch.allclose(upcycle(dense, 4, 2, 0.1, 0)(ids).logits, dense(ids).logits, atol=1e-2)


def test_sweep(tiny: Path) -> None:
    run("sweep", tiny, "--ranks=[4]", "--answer_weights=[1.0]", f"--out={tiny / 'sweep'}")
    rows = json.loads((tiny / "sweep.json").read_text())["rows"]
    assert len(rows) == 2
    assert rows[0]["output_kl"] <= rows[-1]["output_kl"]


def test_benchmark_fit(tiny: Path) -> None:
    run("benchmark_fit", tiny, "--rank=4", f"--out={tiny / 'benchmark'}")
    row, longer = json.loads((tiny / "benchmark.json").read_text())["rows"]
    assert (row["pairs"], longer["pairs"]) == (4, 3)
    assert 20 <= longer["chunk_tokens"] < 30
    assert row["ratio"] > 0
    assert {"preserve", "prepare", "forward", "statistics", "solve", "save"} <= set(row["stages"])


def test_benchmark_processes(tiny: Path) -> None:
    printed = run("benchmark_processes", tiny, "--rank=4", f"--out={tiny / 'processes'}")
    assert "| 2 |" in printed
    one, two = json.loads((tiny / "processes.json").read_text())["rows"]
    assert one["difference"] == 0
    assert 0 <= two["difference"] < 1e-4


def test_benchmark_baselines(tiny: Path) -> None:
    printed = run("benchmark_baselines", tiny, "--rank=4", f"--out={tiny / 'baselines'}")
    assert "to our accuracy (rate)" in printed
    (row,) = json.loads((tiny / "baselines.json").read_text())["rows"]
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


def test_benchmark_inference(tiny: Path) -> None:
    printed = run("benchmark_inference", tiny, "--rank=4", f"--out={tiny / 'inference'}")
    assert "| patched, merged |" in printed
    rows = json.loads((tiny / "inference.json").read_text())["rows"]
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
    from lit_thought.patch.patch import Factors, ThoughtPatch
    from lit_thought.runs.streams import lead_cache
    from recipes.speed.benchmark_inference import Case, measure, with_adapter, write

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


def test_theory(tiny: Path) -> None:
    out = tiny / "theory"
    printed = run("theory", tiny, f"--out={out}")
    page = out.with_suffix(".md").read_text(encoding="utf-8")
    assert page.count("\n## ") == 4
    assert "| both |" in printed
    for line in ("| contrastive mean difference", "| ROME", "| MEMIT"):
        (row,) = [row for row in page.splitlines() if row.startswith(line)]
        assert float(row.split("|")[2]) < 1e-4, row
    for name in ("kept", "spectra"):
        assert out.with_name(f"theory_{name}.svg").read_text(encoding="utf-8").startswith("<?xml")
        assert f"(theory_{name}.svg)" in page


def test_accuracy_by_step(tiny: Path) -> None:
    run("accuracy_by_step", tiny, f"--out={tiny / 'steps'}", f"--logs={tiny / 'logs'}")
    history = json.loads((tiny / "steps.json").read_text())["history"]
    assert set(history) == {"mlp_in", "matrix", "vector"}
    assert [entry["step"] for entry in history["mlp_in"]] == [0, 1, 2]
    assert history["matrix"][2]["output_kl"] != history["vector"][2]["output_kl"]
    assert (tiny / "steps.svg").is_file()
    logged = (tiny / "logs" / "antonym_mlp_in" / "version_0" / "metrics.csv").read_text()
    assert "val/accuracy" in logged


def test_edit_fact(tiny: Path) -> None:
    printed = run("edit_fact", tiny, "--rank=4", f"--out={tiny / 'edit'}")
    assert "| paraphrase: the same, held-out wordings |" in printed
    record = json.loads((tiny / "edit.json").read_text())
    assert set(record["blocks_chosen"].values()) <= {0, 2}
    runs = record["runs"]
    assert runs["plain"]["paraphrase_kl_plain"] == runs["instructed"]["paraphrase_kl_instructed"] == 0
    before, after = (runs[name]["efficacy_kl_instructed"] for name in ("plain", "nothing kept"))
    assert after < before


def test_edited_fact_is_tested_on_other_wordings_and_landmarks() -> None:
    fact = json.loads((ROOT / "recipes/data/landmarks.json").read_text(encoding="utf-8"))
    fitted, held_out = set(fact["fit"]), set(fact["paraphrase"])
    preserved, tested = ({name for name, _ in fact["landmarks"][part]} for part in ("preserve", "neighbourhood"))
    assert len(fitted) >= 8
    assert len(held_out) >= 10
    assert len(tested) >= 20
    assert not fitted & held_out
    assert not preserved & tested
    assert fact["subject"] not in preserved | tested


def test_splits_share_nothing() -> None:
    from recipes.harness import SIX_TASKS, load_split

    for task in SIX_TASKS:
        split = load_split(task, 1)
        fit = {pair["input"] for pair in split.fit}
        test = {pair["input"] for pair in split.test}
        assert len(fit) == 30
        assert not fit & test
        assert all(set(pair) == {"input"} for pair in split.fit)
        assert not any(f"Q: {word}\n" in split.instruction for word in fit | test)

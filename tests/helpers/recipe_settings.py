"""Recipes made small enough for a test."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]

REDUCED = {
    "quickstart": ["--test=2"],
    "word_tasks": ["--tasks=[common_words/antonym]", "--seeds=[0]", "--test=2", "--fit=4", "--max_new_tokens=3"],
    "word_tasks_gemma": ["--tasks=[common_words/antonym]", "--seeds=[0]", "--test=2", "--fit=4", "--max_new_tokens=3"],
    "word_tasks_auto": ["--tasks=[common_words/antonym]", "--seeds=[0]", "--test=2", "--fit=8", "--max_new_tokens=3"],
    "moe": ["--tasks=[common_words/antonym]", "--experts=4", "--test=2", "--fit=4", "--max_new_tokens=3"],
    "sweep": ["--tasks=[common_words/antonym]", "--seeds=[0]", "--preserve_weights=[1.0]", "--ridges=[0.01,0.1]"],
    "benchmark_fit": ["--pairs=[4]", "--chunks=[20]", "--chunk_pairs=3", "--repeats=1"],
    "benchmark_processes": ["--pairs=4", "--repeats=1"],
    "benchmark_baselines": [
        "--tasks=[function_vectors/present-past]",
        "--pairs=[4,400]",
        "--learning_rates=[0.0001,0.01]",
        "--every=5",
        "--max_steps=12",
        "--max_times=1000",
        "--test=3",
        "--max_new_tokens=3",
        "--repeats=1",
    ],
    "benchmark_inference": ["--chunks=[10,100]", "--batches=[1,2]", "--new_tokens=3", "--repeats=2"],
    "theory": ["--tasks=[common_words/antonym]", "--tokens=20", "--fit=4", "--test=2", "--max_new_tokens=3"],
    "accuracy_by_step": ["--steps=2", "--pairs_per_step=2", "--fit=4", "--test=2", "--max_new_tokens=3"],
    "edit_fact": [
        "--landmarks=3",
        "--blocks=[1,2]",
        "--edit_blocks=[0,2]",
        "--unrelated_windows=1",
        "--samples=1",
    ],
}

SCRIPTS = {"word_tasks_gemma": "word_tasks", "word_tasks_auto": "word_tasks", "document_variants": "document"}
"""Configs of another recipe's script."""

ELSEWHERE = {
    *("arithmetic", "baselines", "compose", "document", "document_variants", "limits"),
    *("preservation_file", "scorecard", "system_prompt", "translation", "versions"),
}
"""Recipes with a test in another file."""


def all_exist(tests: list[str]) -> bool:
    """Whether there are such files, with such tests in them."""
    for test in tests:
        file, _, name = test.partition("::")
        text = (ROOT / file).read_text()
        if name and f"\ndef {name.partition('[')[0]}(" not in text:
            return False
    return True

"""Kinds of input for fuzzing.py that the library keeps: adapters, statistics, preservation, unfinished fits,
control vectors."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch

from lit_thought import PairDataModule, ThoughtCallback, ThoughtModule, ThoughtPatch
from lit_thought.evaluation.report.content import gather
from lit_thought.evaluation.report.render import render_markdown
from lit_thought.fit.fitting import fit
from lit_thought.model.blocks import find_blocks
from lit_thought.model.loading import fingerprint
from lit_thought.patch.card import model_card
from lit_thought.patch.results import adapter_digest
from lit_thought.prompts.instruction_hash import check_instruction
from lit_thought.prompts.unrelated import text_windows
from lit_thought.runs.streams import SitePatch
from lit_thought.solve.factors import Factors
from lit_thought.solve.least_squares import Prior
from lit_thought.statistics.preserve import WINDOW, preservation, site_sizes
from lit_thought.statistics.preserve_file import Preservation
from lit_thought.statistics.resume import UnfinishedFit
from lit_thought.statistics.saved import SavedStatistics
from lit_thought.statistics.solve import solve_saved
from lit_thought.statistics.stage_file import KeptStage
from recipes.robustness.fuzzing import Kind, spoil_some_file
from recipes.robustness.mutations import dumped, spoil_bytes, spoil_value
from recipes.robustness.tiny import INSTRUCTION, PAIRS, TEXTS, tiny_model, tiny_tokenizer

MODEL, TOKENIZER = tiny_model(), tiny_tokenizer()
BLOCKS = find_blocks(MODEL)
SITES = ("attn_out", "mlp_out")


def _fitted(folder: Path, **settings: Any) -> ThoughtPatch:
    """The patch of a small fit with all that it can write in ``folder``."""
    callback = ThoughtCallback(
        rank=2, cache_dir=folder / "cache", statistics_dir=folder / "sums", **{"preserve": TEXTS, **settings}
    )
    data = PairDataModule(PAIRS, INSTRUCTION, max_new_tokens=4, val_pairs=PAIRS[:1])
    return fit(ThoughtModule(MODEL, TOKENIZER), data, callback, progress=False)


def _moved(write: Callable[[Path], None], name: str) -> Callable[[Path], None]:
    """``write`` in a folder beside the example, of which ``name`` becomes the example."""

    def place(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as root:
            write(Path(root))
            folder.rmdir()
            (Path(root) / name).rename(folder)

    return place


def _write_adapter(**settings: Any) -> Callable[[Path], None]:
    return _moved(lambda root: _fitted(root, **settings).save_adapter(root / "adapter"), "adapter")


def _read_adapter(folder: Path) -> object:
    patch = ThoughtPatch.load(folder)
    patch.validate(MODEL, check=False)
    content = gather(folder)
    return repr(patch), model_card(patch), render_markdown(content), 0.5 * patch + patch


def _spoil_hash(folder: Path, draw: Random) -> str:
    """The hash that stands in the place of the instruction."""
    file = folder / "thought.json"
    value = json.loads(file.read_text(encoding="utf-8"))
    record = value["provenance"]
    change, record["instruction_hash"] = spoil_value(record["instruction_hash"], draw)
    file.write_bytes(dumped(value, draw).encode("utf-8", "surrogatepass"))
    return change


def _read_hash(folder: Path) -> object:
    patch = ThoughtPatch.load(folder)
    return check_instruction(patch.provenance, INSTRUCTION, PAIRS), model_card(patch), render_markdown(gather(folder))


def _write_control_vector(folder: Path) -> None:
    site = BLOCKS[1].sites["mlp_out"]
    patch = ThoughtPatch({}, {"fingerprint": fingerprint(MODEL)}, {site.path: torch.ones(site.d_out)})
    patch.save_control_vector(folder / "steer.gguf", MODEL)


def _spoil_control_vector(folder: Path, draw: Random) -> str:
    file = folder / "steer.gguf"
    change, data = spoil_bytes(file.read_bytes(), draw)
    file.write_bytes(data)
    return change


def _read_control_vector(folder: Path) -> object:
    return repr(ThoughtPatch.load_control_vector(folder / "steer.gguf", MODEL))


def _write_evaluation(root: Path) -> None:
    _fitted(root).save_adapter(root / "run")
    folder = root / "run" / "evaluation"
    folder.mkdir()
    runs = {"plain": 0.0, "instructed": 1.0, "patched": 0.5}
    texts = {"input": "hot", "reference": "cold", "plain": "hot", "instructed": "cold", "patched": "cold"}
    items = [texts, {**texts, "patched": "cool", "reference": None}]
    result = {
        "pairs": len(items),
        "accuracy": runs,
        "first_token_accuracy": runs,
        "recovery": 0.5,
        "fidelity": 0.5,
        "fidelity_plain": 0.0,
        "kl": {"plain": 3.0, "patched": 0.5},
        "agreement": {"plain": 0.1, "patched": 0.9},
        "checked": runs,
        "output_kl": {"plain": 3.0, "patched": 0.5},
        "own_text": {
            "kl": 0.5,
            "kl_reverse": 0.6,
            "agrees_for": {"plain": 0.1, "patched": 0.9},
            "agrees_for_tokens": {"plain": 0.9, "patched": 8.1},
            "repetition": runs,
            "finished": runs,
            "length": {"plain": 30.0, "instructed": 9.0, "patched": 12.0},
        },
        "perplexity": {"original": 20.0, "patched": 21.0},
        "perplexity_ratio": 1.05,
        "perplexity_windows": {"tokens": [10, 20], "original": [30.0, 61.0], "patched": [30.4, 60.9]},
        "prompt_tokens": {"plain": 6.0, "instructed": 86.0, "saved": 80.0},
        "adapter": adapter_digest(root / "run"),
    }
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")


def _spoil_evaluation(folder: Path, draw: Random) -> str:
    return spoil_some_file(folder / "evaluation", draw)


def _read_run(folder: Path) -> object:
    return render_markdown(gather(folder))


def _write_statistics(**settings: Any) -> Callable[[Path], None]:
    return _moved(lambda root: _fitted(root, **settings) and None, "sums")


def _prior_of(block: int, site: str) -> Prior:
    size = BLOCKS[block].sites[site].d_in if block < len(BLOCKS) and site in BLOCKS[block].sites else 16
    return Prior(torch.zeros(size, 0), torch.ones(()))


def _read_statistics(folder: Path) -> object:
    saved = SavedStatistics.load(folder)
    for stage in saved.stages():
        if stage.matrix is not None:
            stage.matrix.sums()
    both = saved.merge(saved, approximate=True)
    model = MODEL if any(head.site == "mlp_in" for head in saved.heads) else None
    patch = solve_saved(saved, prior_of=_prior_of, model=model, approximate=True)
    return repr(saved), repr(both), model_card(patch)


def _windows() -> list[list[int]]:
    return text_windows(TOKENIZER, TEXTS, WINDOW)


def _write_preservation(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as cache:
        kept, _ = preservation(MODEL, BLOCKS, _windows(), cache)
        kept.save(folder / "shared.safetensors")


def _read_preservation(folder: Path) -> object:
    file = Preservation(folder / "shared.safetensors", argument="preserve")
    file.check_model(fingerprint(MODEL), MODEL)
    file.check_sites(site_sizes(BLOCKS, SITES))
    return [file.prior(block.index, site).gram() for block in BLOCKS for site in block.stages(SITES)]


def _write_cache(folder: Path) -> None:
    preservation(MODEL, BLOCKS, _windows(), folder)


def _read_cache(folder: Path) -> object:
    kept, _ = preservation(MODEL, BLOCKS, _windows(), folder)
    for block in BLOCKS:
        for site in block.stages(SITES):
            if len(kept.prior(block.index, site).factor) != block.sites[site].d_in:
                raise RuntimeError("a matrix of another size was taken from the cache")
    return None


_IDENTITY = {"model": "tiny", "pairs": PAIRS}


def _write_unfinished(folder: Path) -> None:
    progress = UnfinishedFit(folder, _IDENTITY)
    progress.start([(0, "cold", True), (3, "poor", False)])
    for block in BLOCKS:
        for site in block.stages(SITES):
            d_in, d_out = block.sites[site].d_in, block.sites[site].d_out
            patch = SitePatch(Factors(torch.ones(2, d_in), torch.ones(d_out, 2)), torch.ones(d_out))
            stage = KeptStage.of(block.index, block.sites[site], SitePatch())
            progress.save(stage.solved(patch, {"rank": 2, "error_after": 0.5}, [{"step": 0, "fidelity": 0.5}]))


def _read_unfinished(folder: Path) -> object:
    progress = UnfinishedFit(folder, _IDENTITY)
    stages = [(block.index, block.sites[site]) for block in BLOCKS for site in block.stages(SITES)]
    return [progress.load(number, MODEL.device, *stages[number % len(stages)]) for number in range(progress.stages)]


FOLDERS: dict[str, Kind] = {
    "adapter folders": Kind(_write_adapter(), _read_adapter, spoil_some_file),
    "adapter folders with vectors": Kind(_write_adapter(sites=["mlp_in"]), _read_adapter, spoil_some_file),
    "adapter folders without the instruction": Kind(_write_adapter(store_instruction=False), _read_hash, _spoil_hash),
    "control vectors": Kind(_write_control_vector, _read_control_vector, _spoil_control_vector),
    "evaluations": Kind(_moved(_write_evaluation, "run"), _read_run, _spoil_evaluation),
    "statistics": Kind(_write_statistics(), _read_statistics, spoil_some_file),
    "statistics with vectors": Kind(_write_statistics(sites=["mlp_in"], steps=1), _read_statistics, spoil_some_file),
    "preservation files": Kind(_write_preservation, _read_preservation, spoil_some_file),
    "preservation caches": Kind(_write_cache, _read_cache, spoil_some_file),
    "unfinished fits": Kind(_write_unfinished, _read_unfinished, spoil_some_file),
}

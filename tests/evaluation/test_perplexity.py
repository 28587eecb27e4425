"""The perplexity of unrelated text: losses by brute force, the windows that an interval needs, what the cache keeps."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from fits import make_patch
from models import FAMILIES, make_model, make_tokenizer
from quantised import quantise_
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from lit_thought import ThoughtPatch
from lit_thought.evaluation import perplexity
from lit_thought.evaluation.compare import Evaluation, format_result
from lit_thought.evaluation.perplexity import UnrelatedText, unrelated_perplexity, window_losses
from lit_thought.model.loading import evaluating
from lit_thought.prompts.unrelated import load_texts

TOKENIZER = make_tokenizer()
TEXT = [load_texts("default", "evaluate", "unrelated")[0][:2000], "fox", "Q: good\nA: bad\n"]
SPREAD = [0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7]
"""What the bits of 0 to 14 say, read backwards."""


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LIT_THOUGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(perplexity, "_WINDOW", 64)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model()


@pytest.fixture(scope="module")
def patch(model: PreTrainedModel) -> ThoughtPatch:
    return make_patch(model, rank=4)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The windows of every measurement, in the order that they are measured."""
    windows: list[list[int]] = []

    def measured(model: Any, own: Sequence[list[int]], *args: Any, **kwargs: Any) -> list[float]:
        windows.extend(own)
        return window_losses(model, own, *args, **kwargs)

    monkeypatch.setattr(perplexity, "window_losses", measured)
    return windows


def unrelated(model: PreTrainedModel, texts: Sequence[str] = TEXT, **options: Any) -> UnrelatedText:
    return UnrelatedText(model, TOKENIZER, texts, **{"progress": False, **options})


@torch.no_grad()
def measured(text: UnrelatedText, patch: ThoughtPatch) -> dict[str, Any]:
    with evaluating(text.model):
        return text.measure(patch)


@torch.no_grad()
def by_hand(model: PreTrainedModel, window: Sequence[int]) -> float:
    ids = torch.tensor([list(window)])
    return float(cross_entropy(model(ids).logits[0, :-1].double(), ids[0, 1:], reduction="sum"))


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*")) if folder.exists() else []


# --- the losses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_plain_cross_entropy(family: str) -> None:
    model = make_model(family)
    windows = [[5, 6, 7, 8], [9, 10], list(range(20, 60)), [11, 12, 13, 14, 15, 16]]
    wanted = [by_hand(model, window) for window in windows]
    for size in (1, 3, 4):
        assert window_losses(model, windows, size) == pytest.approx(wanted, abs=1e-9)
    assert window_losses(model.float(), windows) == pytest.approx(wanted, rel=1e-6)
    mean = sum(wanted) / sum(len(window) - 1 for window in windows)
    assert unrelated_perplexity(model, windows) == pytest.approx(math.exp(mean), rel=1e-5)


def test_a_large_vocabulary_makes_small_batches(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    windows, done = [list(range(5, 25)) for _ in range(6)], []
    for limit, wanted in ((2**27, [4, 6]), (2 * 20 * 512, [2, 4, 6]), (1, [1, 2, 3, 4, 5, 6])):
        monkeypatch.setattr(perplexity, "_LOGITS", limit)
        window_losses(model, windows, progress=done.append)
        assert done == wanted
        done.clear()
    assert window_losses(model, []) == []


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("size", [512, 16])
def test_all_of_the_text(bos: bool, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "_WINDOW", size)
    model, tokenizer = make_model(), make_tokenizer(bos=bos)
    patch = make_patch(model, tokenizer, rank=4)
    text = UnrelatedText(model, tokenizer, TEXT, None, progress=False)
    result = measured(text, patch)
    opening = [tokenizer.bos_token_id] if bos else []
    pieces = []
    for one in TEXT:
        ids, step = tokenizer(one, add_special_tokens=False)["input_ids"], size - len(opening)
        if size == 512:
            step = 256 - len(opening)  # the model's window
        pieces += [[*opening, *ids[start : start + step]] for start in range(0, len(ids), step)]
    pieces = [piece for piece in pieces if len(piece) > 1]
    windows = result["perplexity_windows"]
    tokens = [len(piece) - 1 for piece in pieces]
    assert windows["tokens"] == tokens
    assert result["perplexity_tokens"] == {"measured": sum(tokens), "text": sum(tokens)}
    assert windows["original"] == pytest.approx([by_hand(model, piece) for piece in pieces])
    with patch.applied(model):
        assert windows["patched"] == pytest.approx([by_hand(model, piece) for piece in pieces])
    for run in ("original", "patched"):
        assert result["perplexity"][run] == pytest.approx(math.exp(sum(windows[run]) / sum(tokens)))
    ratio = result["perplexity"]["patched"] / result["perplexity"]["original"]
    assert result["perplexity_ratio"] == pytest.approx(ratio)
    assert ratio != pytest.approx(1, rel=1e-3)


# --- as many windows as the interval needs ---------------------------------------------------------------------------


def interval(model: PreTrainedModel, patch: ThoughtPatch, windows: Sequence[list[int]]) -> float:
    """Half-width of the t interval, of windows of one length."""
    before = np.array([by_hand(model, window) for window in windows])
    with patch.applied(model):
        after = np.array([by_hand(model, window) for window in windows])
    change = (after - before) / (len(windows[0]) - 1)
    bounds = scipy.stats.ttest_1samp(change, 0).confidence_interval(0.95)
    return float(np.exp(bounds.high) - np.exp(bounds.low)) / 2


def test_windows_spread_over_the_text_until_the_interval_is_reached(
    model: PreTrainedModel, patch: ThoughtPatch, seen: list[list[int]], tmp_path: Path
) -> None:
    ids = TOKENIZER(load_texts("default", "evaluate", "unrelated")[0])["input_ids"][: 15 * 64]
    text = [TOKENIZER.decode(ids)]
    whole = unrelated(model, text).windows
    assert [len(window) for window in whole] == [64] * 15
    order = [whole[place] for place in SPREAD]
    halves = {count: interval(model, patch, order[:count]) for count in (4, 6, 9, 13, 15)}
    counts = set()
    for number, wanted in enumerate((2 * halves[4], 1.0001 * halves[6], 1.0001 * halves[9], 1e-9, None)):
        seen.clear()
        result = measured(unrelated(model, text, interval=wanted, cache_dir=tmp_path / str(number)), patch)
        count = next((n for n, half in halves.items() if wanted is not None and half <= wanted), 15)
        assert sorted(seen) == sorted(2 * order[:count])  # the original on no more than the patched
        assert result["perplexity_tokens"] == {"measured": 63 * count, "text": 63 * 15}
        assert result["perplexity_interval"] == pytest.approx(halves[count], rel=1e-6)
        places = sorted(SPREAD[:count])
        losses = [by_hand(model, whole[place]) for place in places]
        assert result["perplexity_windows"]["original"] == pytest.approx(losses)
        assert result["perplexity"]["original"] == pytest.approx(math.exp(sum(losses) / 63 / count))
        counts.add(count)
    assert len(counts) > 2


def test_a_patch_of_nothing_needs_four_windows_and_a_short_text_has_fewer(
    model: PreTrainedModel, patch: ThoughtPatch, seen: list[list[int]]
) -> None:
    result = measured(unrelated(model), 0 * patch)
    assert (result["perplexity_ratio"], result["perplexity_interval"]) == (1, 0)
    assert len(seen) == 2 * 4
    result = measured(unrelated(model, ["fox"] * 3), patch)
    assert len(result["perplexity_windows"]["tokens"]) == 3
    result = measured(unrelated(model, ["fox"]), patch)
    assert result["perplexity_interval"] is None
    assert result["perplexity_ratio"] != 1


def test_losses_that_are_no_numbers_are_measured_to_the_end_and_not_kept(
    model: PreTrainedModel, patch: ThoughtPatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = unrelated(model)
    monkeypatch.setattr(perplexity, "window_losses", lambda model, own, **options: [math.nan] * len(own))
    result = measured(text, patch)
    assert len(result["perplexity_windows"]["tokens"]) == len(text.windows)
    assert math.isnan(result["perplexity_ratio"])
    assert unrelated(model).original == {}


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_the_original_is_measured_once(
    model: PreTrainedModel, patch: ThoughtPatch, seen: list[list[int]], tmp_path: Path
) -> None:
    other = make_patch(model, rank=2, instruction="Talk like a pirate.\n")
    first = unrelated(model, interval=100.0)
    one, two = measured(first, patch), measured(first, other)
    assert len(seen) == 4 + 4 + 4  # original, patched, patched
    assert one["perplexity_windows"]["original"] == two["perplexity_windows"]["original"]
    seen.clear()
    again = unrelated(model, interval=100.0)
    assert measured(again, other) == two
    assert len(seen) == 4
    # a longer measurement extends what is there
    seen.clear()
    longer = measured(unrelated(model, interval=None), patch)
    count = len(first.windows)
    assert len(seen) == count - 4 + count
    assert measured(unrelated(model, interval=None, cache_dir=tmp_path / "new"), patch) == longer
    seen.clear()
    assert measured(unrelated(model, interval=None), patch) == longer
    assert len(seen) == count
    (file,) = entries(tmp_path / "cache")
    assert file.stat().st_size < 10_000
    assert json.loads(file.read_text())["losses"] == longer["perplexity_windows"]["original"]


def damaged(entry: dict[str, Any], **changes: Any) -> str:
    return json.dumps({**entry, **changes})


DAMAGE: dict[str, Callable[[dict[str, Any]], str]] = {
    "half of it": lambda entry: json.dumps(entry)[:-100],
    "nothing": lambda entry: "",
    "a list": lambda entry: "[]",
    "nested too deep": lambda entry: "[" * 100_000,
    "another figure": lambda entry: damaged(entry, losses=[1.0, *entry["losses"][1:]]),
    "no numbers": lambda entry: damaged(entry, losses=["a" for _ in entry["losses"]]),
    "no list": lambda entry: damaged(entry, losses=3),
    "too short": lambda entry: damaged(entry, losses=entry["losses"][:-1]),
    "another model's": lambda entry: damaged(entry, manifest={**entry["manifest"], "fingerprint": "f00d"}),
    "no manifest": lambda entry: json.dumps({"losses": entry["losses"]}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_measured_anew(
    damage: str, model: PreTrainedModel, patch: ThoughtPatch, seen: list[list[int]], tmp_path: Path
) -> None:
    wanted = measured(unrelated(model, interval=None), patch)
    (file,) = entries(tmp_path / "cache")
    whole = file.read_text()
    file.write_text(DAMAGE[damage](json.loads(whole)))
    seen.clear()
    text = unrelated(model, interval=None)
    assert text.original == {}
    assert measured(text, patch) == wanted
    assert len(seen) == 2 * len(text.windows)
    assert file.read_text() == whole


def test_a_link_to_elsewhere_is_no_entry(model: PreTrainedModel, patch: ThoughtPatch, tmp_path: Path) -> None:
    measured(unrelated(model), patch)
    (file,) = entries(tmp_path / "cache")
    shutil.move(file, tmp_path / "elsewhere.json")
    file.symlink_to(tmp_path / "elsewhere.json")
    assert unrelated(model).original == {}


def test_an_entry_is_of_one_model_and_one_text(model: PreTrainedModel, patch: ThoughtPatch, tmp_path: Path) -> None:
    measured(unrelated(model), patch)
    assert unrelated(make_model()).original
    (file,) = entries(tmp_path / "cache")
    retuned, rescaled = make_model(), make_model()
    with torch.no_grad():
        retuned.model.layers[1].mlp.down_proj.weight[0, 0] += 1e-9
    rescaled.config.rms_norm_eps = 1e-3
    changed = {
        "weights": lambda: unrelated(retuned),
        "config": lambda: unrelated(rescaled),
        "dtype": lambda: unrelated(make_model().float()),
        "text": lambda: unrelated(model, [TEXT[0] + "x", *TEXT[1:]]),
        "patched": lambda: _patched(make_model(), patch),
    }
    for what, make in changed.items():
        text = make()
        assert text.original == {}, what
        assert text._file != file, what


def _patched(model: PreTrainedModel, patch: ThoughtPatch) -> UnrelatedText:
    patch.apply_(model)
    return unrelated(model)


def test_nothing_is_kept_of_a_model_with_hooks_or_a_sharded_one(
    patch: ThoughtPatch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A patch beside quantised layers does not show in their weights."""
    quantised = quantise_(make_model("llama").float(), "8bit")
    beside = make_patch(quantised, rank=2)
    wanted = measured(unrelated(quantised, interval=None), 0 * beside)
    assert len(entries(tmp_path / "cache")) == 1
    with beside.applied(quantised):
        found = measured(unrelated(quantised, interval=None), 0 * beside)
    assert found["perplexity"]["original"] != pytest.approx(wanted["perplexity"]["original"], rel=1e-4)
    assert unrelated(quantised).original
    assert len(entries(tmp_path / "cache")) == 1

    monkeypatch.setattr(perplexity, "is_sharded", lambda value: True)
    monkeypatch.setattr(perplexity, "fingerprint", lambda value: pytest.fail("asked for"))
    assert measured(unrelated(make_model()), patch)["perplexity_ratio"] is not None
    assert len(entries(tmp_path / "cache")) == 1


def test_a_cache_that_cannot_be_written_costs_nothing(
    model: PreTrainedModel, patch: ThoughtPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    wanted = measured(unrelated(model), patch)
    found = measured(unrelated(model, cache_dir=tmp_path / "file"), patch)
    assert found == wanted
    assert "cache_dir: the original model's losses on unrelated text are not kept" in caplog.text


# --- what is shown ---------------------------------------------------------------------------------------------------


def test_each_part_says_what_it_is(
    model: PreTrainedModel, patch: ThoughtPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {"instruction": "up: down\n", "pairs": [{"input": "up"}], "max_new_tokens": 2}
    result = Evaluation(model, TOKENIZER, unrelated=TEXT, **asked).score(patch)
    shown = capsys.readouterr().err
    for part in (
        "Evaluating plain", "Evaluating instructed", "Evaluating patched", "Perplexity of unrelated text, original",
        "Perplexity of unrelated text, patched", "Comparing token by token",
        "Comparing on its own text",
    ):  # fmt: skip
        assert part in shown
    tokens = result["perplexity_tokens"]
    wanted = f"× {result['perplexity_ratio']:.3f} ± {result['perplexity_interval']:.3f} "
    wanted += f"({tokens['measured']:,} of {tokens['text']:,} tokens)"
    assert wanted in format_result(result)
    result = Evaluation(model, TOKENIZER, unrelated=None, progress=False, **asked).score(patch)
    assert "perplexity" not in format_result(result)
    assert capsys.readouterr().err == ""


def test_nothing_is_kept_or_read_inside_autocast(model: PreTrainedModel, patch: ThoughtPatch, tmp_path: Path) -> None:
    whole = make_model().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = measured(unrelated(whole, interval=None), 0 * patch)
    assert not (tmp_path / "cache").exists() or not entries(tmp_path / "cache")
    fine = measured(unrelated(whole, interval=None), 0 * patch)
    assert rough["perplexity"]["original"] != fine["perplexity"]["original"]
    text = unrelated(whole, interval=None)  # made outside, as an Evaluation may be
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert measured(text, 0 * patch) == rough
    assert measured(text, 0 * patch) == fine
    assert measured(unrelated(whole, interval=None), 0 * patch) == fine

"""The recipe ``gpu`` on a CPU: every part of it, and what it says of parts that fail, disagree or come too late."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_tokenizer
from recipe_runs import run_recipe

from lit_thought.errors import ThoughtError
from lit_thought.settings import DEFAULT_SITES, ORDERS, SITES
from recipes.speed import gpu

CPU = torch.device("cpu")
TOKENIZER = make_tokenizer()
SMALL = ["--device=cpu", "--shape=tiny", "--pairs=[3,9]", "--repeats=1"]


@pytest.fixture(autouse=True)
def _tf32() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")


def test_gpu(tmp_path: Path) -> None:
    ran = run_recipe("gpu", tmp_path, *SMALL, model=None)
    same, ways, *timed = ran.record["parts"].values()
    cases = {
        f"{family}, {dtype}, {order}, {chosen}"
        for family, sites in (("llama", SITES), ("gemma3_text", DEFAULT_SITES))
        for dtype in ("float32", "float64")
        for order in ORDERS
        for chosen in (*sites, " + ".join(sites))
    }
    assert {row["case"] for row in same["checks"]} == cases
    assert all(row["difference"] == 0 for row in same["checks"]), "the same device"
    rounded, *exact = ways["checks"]
    assert 1e-3 < rounded["difference"] == rounded["most"] / 2
    assert [row["case"] for row in exact] == ["offload=cpu", "offload=disk", "outputs that the model writes"]
    assert all(row["difference"] == 0 for row in exact)
    assert list(ran.record["parts"])[2:] == [
        "A tiny shape, 3 pairs",
        "A tiny shape, 9 pairs",
        "One block of a tiny shape, 3 pairs",
    ]
    few, more, block = timed
    assert (few["pairs"], more["pairs"], block["pairs"]) == (3, 9, 3)
    assert few["compared_tokens"] < more["compared_tokens"]
    assert few["sizes"]["num_hidden_layers"] > block["sizes"]["num_hidden_layers"] == 1
    for part in timed:
        assert part["weights_bytes"] == 4 * part["parameters"], "float32 on a CPU"
        assert {"forward", "statistics", "solve", "preserve"} <= set(part["stages"])
        assert sum(part["stages"].values()) < part["fit_seconds"]
        assert part["ratio"] == pytest.approx(part["fit_seconds"] / part["bare_seconds"])
        kept = part["preservation"]
        assert kept["ratio"] == pytest.approx(kept["seconds"] / kept["bare_seconds"])
        for row in (f"| fit ÷ bare | {part['ratio']:.2f} |", f"| of it solve | {part['stages']['solve']:.3f} s |"):
            assert row in ran.page
    assert "32 of 32 comparisons of patches hold" in ran.page
    assert ran.record["environment"] in ran.page


def test_what_there_is_no_time_for_is_left_out(tmp_path: Path) -> None:
    ran = run_recipe("gpu", tmp_path, *SMALL, "--minutes=0", model=None)
    assert ran.page.count("Left out: 0.0 of 0 minutes were over.") == len(ran.record["parts"]) == 5


def test_a_part_that_fails_is_told_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Any] = []
    real = gpu.write_results

    def fail(*_: object) -> dict[str, Any]:
        raise torch.OutOfMemoryError("80 GB are not enough")

    def write(script: str, out: str, page: str, record: dict[str, Any]) -> None:
        real(script, out, page, record)
        written.append((Path(f"{out}.md").read_text(encoding="utf-8"), copy.deepcopy(record["parts"])))

    monkeypatch.setattr(gpu, "write_results", write)
    monkeypatch.setattr(gpu, "same_patches", fail)
    row = {"case": "bfloat16", "against": "float32", "most": 1e-5, "difference": 0.5, "holds": False}
    monkeypatch.setattr(gpu, "other_ways", lambda *_: {"checks": [row, {**row, "difference": 0.0, "holds": True}]})
    monkeypatch.setattr(gpu, "costs", lambda *_: gpu.attempt(lambda: {"checks": []}))
    with pytest.raises(SystemExit) as end:
        gpu.benchmark("cpu", "tiny", [3], 1, 5.0, str(tmp_path / "gpu"))
    failed = ["Patches of both devices: OutOfMemoryError: 80 GB are not enough"]
    failed += ["bfloat16, streams elsewhere, outputs: bfloat16: 5.0e-01 is more than 1.0e-05"]
    assert str(end.value).splitlines() == failed
    assert [len(parts) for _, parts in written] == [1, 2, 3, 4], "after each part"
    assert "Failed: OutOfMemoryError" in written[0][0]
    assert "1 of 2 comparisons" in written[-1][0]
    assert all(f"- {line}\n" in written[-1][0] for line in failed)
    assert "| bfloat16 | float32 | 5.0e-01 | 1.0e-05 | **no** |" in written[-1][0]


def test_another_patch_does_not_pass_for_the_same() -> None:
    here, there = (gpu.random_model("llama", gpu.TINY, torch.float32, CPU, TOKENIZER) for _ in range(2))
    run = partial(gpu.apart, (here, there), TOKENIZER, [{"sites": "mlp_in"}] * 2)
    assert gpu.check("one", "the other", run)["holds"]
    there.model.layers[0].mlp.down_proj.weight *= 1.001
    found = gpu.check("one", "the other", run)
    assert 1e-5 < found["difference"] < 0.1
    assert not found["holds"]
    assert not gpu.check("one", "the other", lambda: float("nan"))["holds"]


def test_fits_have_their_own_settings_and_compute_what_they_preserve(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = gpu.Trial.fit

    def fit(self: gpu.Trial, *given: Any, **settings: Any) -> Any:
        seen.append(settings)
        assert not list(Path(settings["cache_dir"]).iterdir())
        patch = real(self, *given, **settings)
        assert list(Path(settings["cache_dir"]).iterdir())
        return patch

    monkeypatch.setattr(gpu.Trial, "fit", fit)
    lm = gpu.random_model("llama", gpu.TINY, torch.float32, CPU, TOKENIZER)
    assert gpu.apart((lm, lm), TOKENIZER, [{"offload": "disk"}, {"rank": 4}]) > 0
    assert [set(settings) - set(gpu.HOW) - {"preserve", "cache_dir"} for settings in seen] == [{"offload"}, {"rank"}]
    assert len({settings["cache_dir"] for settings in seen}) == 2


def test_what_is_compared_with_what(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device, which is no CPU, stands for a card: nothing can run on it."""
    device = torch.device("meta")
    seen: list[Any] = []

    def apart(models: Any, tokenizer: Any, ways: Any = ({}, {}), pairs: Any = None) -> float:
        about = [f"{lm.config.model_type}, {str(lm.dtype)[6:]}" for lm in models]
        seen.append((about, [lm.device.type for lm in models], *ways, pairs))
        return 0.01

    monkeypatch.setattr(gpu, "apart", apart)
    for row in gpu.same_patches(device, TOKENIZER)["checks"]:
        how = {"sites": tuple(row["case"].split(", ")[3].split(" + ")), "order": row["case"].split(", ")[2]}
        about = row["case"].rsplit(", ", 2)[0]
        assert seen.pop(0) == ([about] * 2, ["cpu", "meta"], how, how, None)
    assert not seen
    rows = gpu.other_ways(device, TOKENIZER)["checks"]
    assert [row["most"] for row in rows] == [0.02, 1e-5, 1e-5, 1e-5]
    low, single = "llama, bfloat16", "llama, float32"
    *known, written = seen
    assert known == [
        ([single, low], ["cpu", "cpu"], {}, {}, None),
        ([single, low], ["cpu", "meta"], {}, {}, None),
        ([single, single], ["meta", "meta"], {"offload": "device"}, {"offload": "cpu"}, None),
        ([single, single], ["meta", "meta"], {"offload": "device"}, {"offload": "disk"}, None),
    ]
    assert written[:4] == ([single, single], ["cpu", "meta"], {}, {})
    assert all(set(pair) == {"input"} for pair in written[4])


@pytest.mark.parametrize("before", ["highest", "high"])
def test_tf32_is_off_in_fits_and_as_it_was_afterwards(before: str) -> None:
    torch.set_float32_matmul_precision(before)

    def switch(name: str) -> float:
        seen.append(torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision(name)
        return 0.0

    seen: list[str] = []
    found = gpu.check("a", "b", partial(switch, "medium"))
    assert not found["holds"]
    assert found["error"].endswith("was called in a fit, with 'medium'")
    assert torch.get_float32_matmul_precision() == before
    assert gpu.check("a", "b", partial(switch, "highest"))["holds"]
    assert torch.get_float32_matmul_precision() == before
    assert seen == ["highest"] * 2


def test_shapes_are_those_of_the_models_they_are_called_after() -> None:
    parameters = []
    for sizes in gpu.SHAPES["8b"].values():
        model = gpu.random_model("llama", sizes, torch.bfloat16, torch.device("meta"), TOKENIZER)
        assert {(weight.device.type, weight.dtype) for weight in model.parameters()} == {("meta", torch.bfloat16)}
        parameters.append((model.num_parameters(), sum(weight.numel() for weight in model.model.layers.parameters())))
    assert parameters[0][0] == 8_030_261_248  # Llama 3.1 8B
    embeddings, last_norm = 2 * 128256 * 8192, 8192
    assert parameters[1][1] * 80 + embeddings + last_norm == 70_553_706_496  # Llama 3.1 70B


def test_random_weights_keep_the_stream_in_size_and_differ_in_their_norms() -> None:
    state = torch.random.get_rng_state()
    for family in gpu.FAMILIES:
        one, other = (gpu.random_model(family, gpu.TINY, torch.float64, CPU, TOKENIZER) for _ in range(2))
        for (name, weight), (_, again) in zip(one.named_parameters(), other.named_parameters(), strict=True):
            assert torch.equal(weight, again)
            if weight.ndim == 1:
                assert 0.1 < float(weight.std()) < 0.5, name
            else:
                assert float(weight.std()) == pytest.approx(64**-0.5, rel=0.1), name
    assert torch.equal(torch.random.get_rng_state(), state)


def test_without_a_gpu_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ThoughtError, match="device='cuda': torch sees no GPU"):
        gpu.benchmark(out=str(tmp_path / "gpu"))
    with pytest.raises(ThoughtError, match="shape: expected some of 8b, 8b-block, tiny; got"):
        gpu.benchmark(device="cpu", shape="7b", out=str(tmp_path / "gpu"))
    assert not list(tmp_path.iterdir())

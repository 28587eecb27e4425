"""The metrics against NumPy and SciPy, over dtypes, batches and processes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax
from torch import Tensor, multiprocessing

from lit_thought.evaluation import metrics
from lit_thought.evaluation.metrics import TextMatch, TokenDivergence, token_kl

TEXTS = ["cold", " small\n", "Down", "", "bad", "fox"]
REFERENCES = ["cold", "small", "down", " ", "good", "fox jumps"]


def some_logits(n: int = 23, vocabulary: int = 11, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Two runs' logits, which agree on the top token now and then."""
    generator = torch.Generator().manual_seed(3)
    reference = 3 * torch.randn(n, vocabulary, generator=generator, dtype=torch.float64)
    logits = reference + 2 * torch.randn(n, vocabulary, generator=generator, dtype=torch.float64)
    return reference.to(dtype), logits.to(dtype)


def some_weights(n: int = 23) -> Tensor:
    return torch.arange(n, dtype=torch.float64) % 4


def expected(reference: Tensor, logits: Tensor, weights: Tensor | None = None) -> tuple[float, float]:
    p, q = reference.double().numpy(), logits.double().numpy()
    kl = rel_entr(softmax(p, axis=-1), softmax(q, axis=-1)).sum(-1)
    agree = p.argmax(-1) == q.argmax(-1)
    shares = None if weights is None else weights.double().numpy()
    return float(np.average(kl, weights=shares)), float(np.average(agree, weights=shares))


def test_text_match() -> None:
    metric = TextMatch()
    metric.update(TEXTS[:4], REFERENCES[:4])
    assert metric.compute() == pytest.approx(3 / 4)  # white space around does not count, case does
    metric.update(TEXTS[4:], REFERENCES[4:])
    assert metric.compute() == pytest.approx(3 / 6)
    metric.reset()
    assert math.isnan(metric.compute())
    metric.update(["a"], ["a"])
    assert metric.compute() == 1
    with pytest.raises(ValueError, match="zip"):
        metric.update(["a", "b"], ["a"])


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)]
)
@pytest.mark.parametrize("numbers", [1, 50, 2**22])
def test_token_kl(dtype: torch.dtype, tolerance: float, numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many tokens are compared at a time."""
    monkeypatch.setattr(metrics, "_NUMBERS", numbers)
    reference, logits = some_logits(dtype=dtype)
    p, q = (log_softmax(x.double().numpy(), axis=-1) for x in (reference, logits))
    wanted = (np.exp(p) * (p - q)).sum(-1)
    got = token_kl(reference, logits)
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    np.testing.assert_allclose(got.double().numpy(), wanted, rtol=tolerance, atol=tolerance)
    assert token_kl(reference, reference).abs().max() <= tolerance
    assert not np.allclose(wanted, token_kl(logits, reference).double().numpy(), rtol=0.1)  # it has a direction


def test_token_kl_survives_extreme_logits() -> None:
    reference, logits = torch.tensor([[0.0, -1e4]]), torch.tensor([[-1e4, 0.0]])
    assert token_kl(reference, logits).item() == pytest.approx(1e4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("batch", [1, 5, 23])
def test_token_divergence(dtype: torch.dtype, weighted: bool, batch: int) -> None:
    reference, logits = some_logits(dtype=dtype)
    weights = some_weights() if weighted else None
    metric = TokenDivergence()
    for start in range(0, len(logits) + batch, batch):  # the last one is empty
        rows = slice(start, start + batch)
        metric.update(reference[rows], logits[rows], weights[rows] if weights is not None else None)
    got = metric.compute()
    kl, agreement = expected(reference, logits, weights)
    assert got["kl"].item() == pytest.approx(kl, rel=1e-12 if dtype == torch.float64 else 1e-5)
    assert got["agreement"].item() == pytest.approx(agreement, rel=1e-12)
    assert 0 < agreement < 1
    assert (kl != pytest.approx(expected(reference, logits)[0], rel=1e-2)) is weighted
    metric.reset()
    assert math.isnan(metric.compute()["kl"])


def run_rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    match, divergence = TextMatch(), TokenDivergence()
    reference, logits = some_logits(dtype=torch.bfloat16)
    mine = slice(None, 2) if rank == 0 else slice(2, None)  # not as many on one rank as on the other
    match.update(TEXTS[mine], REFERENCES[mine])
    divergence.update(reference[mine], logits[mine], some_weights()[mine])
    values = divergence.compute()
    torch.save([match.compute().item(), values["kl"].item(), values["agreement"].item()], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    multiprocessing.spawn(run_rank, args=(str(tmp_path),), nprocs=2)
    reference, logits = some_logits(dtype=torch.bfloat16)
    wanted = [3 / 6, *expected(reference, logits, some_weights())]
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == pytest.approx(wanted, rel=1e-5)

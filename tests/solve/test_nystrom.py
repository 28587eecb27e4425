"""The sketch of a mean Gram matrix against NumPy's eigendecomposition of the matrix itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from largest import LargestTensor

from lit_thought.solve.least_squares import Prior
from lit_thought.solve.nystrom import Sketch

D = 60
ROUNDING = 1e-6
"""Of products in single precision, relative to the largest: what is smaller is not told from nothing."""


def make_inputs(n: int = 400, decay: float = 0.9, floor: float = 0.01, seed: int = 0) -> np.ndarray:
    """Rows, (n, D), whose mean squares in as many directions decay down to a floor."""
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(rng.standard_normal((D, D)))[0]
    return rng.standard_normal((n, D)) * (decay ** np.arange(D) + floor) @ rotation


def gram_of(a: np.ndarray) -> np.ndarray:
    return a.T @ a / len(a)


def sketched(a: np.ndarray, directions: int, batch: int = 64, dtype: torch.dtype = torch.float64) -> Prior:
    sketch = Sketch(a.shape[1], directions)
    for rows in torch.tensor(a).to(dtype).split(batch):
        sketch.update(rows)
    assert sketch.count == len(a)
    assert sketch.finite
    return sketch.prior()


def known(prior: Prior) -> np.ndarray:
    """L Lᵀ."""
    assert prior.factor.dtype == prior.rest.dtype == torch.float64
    assert prior.rest.ndim == 0
    return (prior.factor @ prior.factor.T).numpy()


def best(gram: np.ndarray, directions: int) -> np.ndarray:
    """The best matrix of a rank."""
    values, vectors = np.linalg.eigh(gram)
    return (vectors[:, -directions:] * values[-directions:]) @ vectors[:, -directions:].T


def difference(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("directions", [4, 12, 25])
@pytest.mark.parametrize(("decay", "floor"), [(0.7, 0.0), (0.9, 0.01), (0.97, 0.1)])
def test_it_misses_at_most_twice_what_the_best_of_its_rank_does(decay: float, floor: float, directions: int) -> None:
    gram = gram_of(a := make_inputs(decay=decay, floor=floor))
    prior = sketched(a, directions)
    assert prior.factor.shape == (D, directions)
    missed, least, most = gram - known(prior), gram - best(gram, directions), np.linalg.norm(gram)
    assert np.trace(missed) < 2 * np.trace(least) + ROUNDING * most
    assert np.linalg.norm(missed) < 2 * np.linalg.norm(least) + ROUNDING * most
    assert np.linalg.eigvalsh(missed)[0] > -ROUNDING * most  # nothing is added that is not there


@pytest.mark.parametrize("directions", [D // 2, 45, D - 1, D, 2 * D])
def test_where_the_sketch_is_the_whole_space_it_is_the_best_of_its_rank(directions: int) -> None:
    gram = gram_of(a := make_inputs())
    prior = sketched(a, directions)
    assert prior.factor.shape == (D, min(directions, D))
    assert difference(known(prior), best(gram, directions)) < 1e-12


@pytest.mark.parametrize("directions", [3, 12, D // 2, 45, D])
def test_what_is_left_is_its_mean_eigenvalue_by_size(directions: int) -> None:
    """tr R² / tr R of what is left, R, as a ridge's scale s is of Z; R is looked at in some random directions alone."""
    gram = gram_of(a := make_inputs())
    prior = sketched(a, directions)
    left = gram - known(prior)
    wanted = (left**2).sum() / np.trace(left)
    if directions == D:
        assert float(prior.rest) == 0
    else:
        assert 0.6 * wanted < float(prior.rest) < 1.6 * wanted


@pytest.mark.parametrize("batch", [1, 7, 400])
def test_it_depends_on_neither_batches_nor_their_order(batch: int) -> None:
    a = make_inputs()
    once, again = sketched(a, 12, batch=len(a)), sketched(a[::-1].copy(), 12, batch=batch)
    assert difference(known(again), known(once)) < 1e-12
    assert float(again.rest) == pytest.approx(float(once.rest), rel=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_narrower_inputs_are_as_good_as_their_rounding(dtype: torch.dtype, tolerance: float) -> None:
    a = make_inputs()
    assert difference(known(sketched(a, D, dtype=dtype)), gram_of(a)) < tolerance
    assert difference(known(sketched(a, 20, dtype=dtype)), known(sketched(a, 20))) < tolerance


@pytest.mark.parametrize("directions", [12, D])
def test_channels_that_are_zero_stay_so(directions: int) -> None:
    a = make_inputs()
    a[:, [0, 7, D - 1]] = 0
    prior = sketched(a, directions)
    gram, found = gram_of(a), known(prior)
    assert np.diag(found)[[0, 7, D - 1]].max() < 1e-12 * np.trace(gram)
    assert np.linalg.norm(gram - found) < 2 * np.linalg.norm(gram - best(gram, directions)) + 1e-12
    nothing = sketched(np.zeros((5, D)), directions)
    assert float(nothing.factor.abs().max()) < 1e-100
    assert float(nothing.rest) == 0


@pytest.mark.parametrize("directions", [20, D // 2, D])
def test_one_massive_channel_leaves_the_others_what_they_are(directions: int) -> None:
    """As language models have; channel 3 has to take a direction of its own, and no more."""
    a = make_inputs()
    a[:, 3] *= 1e3
    others = np.ix_(*2 * [np.arange(D) != 3])
    gram = gram_of(a)
    found, wanted = known(sketched(a, directions)), best(gram, directions)
    assert difference(found, gram) < ROUNDING
    missed, least = (np.linalg.norm((gram - x)[others]) for x in (found, wanted))
    assert missed < 3 * least + 1e-8


def test_one_massive_channel_in_single_precision_costs_its_rounding() -> None:
    a = make_inputs(2000)
    a[:, 3] *= 1e3
    others = np.ix_(*2 * [np.arange(D) != 3])
    gram, prior = gram_of(a), sketched(a, D // 2, dtype=torch.float32)
    assert difference(known(prior)[others], best(gram, D // 2)[others]) < 0.02
    assert 0 <= float(prior.rest) < 0.1 * np.trace(gram[others]) / D


@pytest.mark.parametrize(("n", "directions"), [(1, 1), (1, 10), (5, 10), (9, 10), (10, 10), (20, 25)])
def test_inputs_that_are_no_more_than_the_directions_are_kept_whole(n: int, directions: int) -> None:
    a = make_inputs(n)
    prior = sketched(a, directions)
    assert difference(known(prior), gram_of(a)) < 1e-5
    assert float(prior.rest) < 1e-5 * np.trace(gram_of(a))


def test_one_input_that_all_others_are_nothing_beside() -> None:
    """Its rounding in single precision is larger than what the others are."""
    a = make_inputs(300).astype(np.float32)
    a[0] *= 1e5
    for directions in (12, D):
        prior = sketched(a, directions, dtype=torch.float32)
        assert difference(known(prior), gram_of(a.astype(np.float64))) < ROUNDING
        assert 0 <= float(prior.rest) < ROUNDING * float(prior.factor.square().sum())


@pytest.mark.parametrize("n", [1, 3])
def test_a_core_that_rounding_leaves_indefinite_is_decomposed_all_the_same(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    a = torch.randn(n, 1000, generator=generator) * torch.randn(1000, generator=generator).exp()
    a[:, 3] *= 1e5
    found = known(sketched(a.numpy(), 400, dtype=torch.float32))
    assert difference(found, gram_of(a.double().numpy())) < 10 * ROUNDING


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_noticed(value: float) -> None:
    sketch = Sketch(D, 10)
    sketch.update(torch.ones(3, D))
    assert sketch.finite
    sketch.update(torch.ones(2, D).index_fill(1, torch.tensor([4]), value))
    sketch.update(torch.ones(3, D))
    assert not sketch.finite


def test_the_same_inputs_give_the_same_sketch_and_nobody_s_random_numbers_are_used() -> None:
    a = make_inputs()
    torch.manual_seed(1)
    one = sketched(a, 12)
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), drawn)
    torch.manual_seed(2)
    other = sketched(a, 12)
    assert torch.equal(one.factor, other.factor)
    assert torch.equal(one.rest, other.rest)


def test_nothing_of_d_by_d_is_formed() -> None:
    size, directions = 700, 12
    rows = torch.randn(50, size, generator=torch.Generator().manual_seed(0))
    with LargestTensor() as largest:
        sketch = Sketch(size, directions)
        for batch in rows.split(20):
            sketch.update(batch)
        sketch.prior()
    assert largest.numbers < size * size / 8

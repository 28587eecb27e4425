"""The sums a patch is solved from, against loops over single tokens in NumPy float64."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_thought.errors import ThoughtError
from lit_thought.solve.sums import Statistics, VectorStatistics

D_IN, D_OUT = 12, 5


def tokens(n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random inputs, errors and weights of ``n`` tokens."""
    rng = np.random.default_rng(seed)
    a, delta = rng.standard_normal((n, D_IN)), rng.standard_normal((n, D_OUT))
    return torch.tensor(a), torch.tensor(delta), torch.tensor(rng.uniform(0.1, 3, n))


def loop(a: Tensor, delta: Tensor, weights: Tensor) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Z, C, Σ w ‖δ‖² and Σ w, one token at a time."""
    gram, cross, energy, total = np.zeros((D_IN, D_IN)), np.zeros((D_OUT, D_IN)), 0.0, 0.0
    for x, e, w in zip(a.double().numpy(), delta.double().numpy(), weights.double().numpy(), strict=True):
        gram += w * np.outer(x, x)
        cross += w * np.outer(e, x)
        energy += w * (e @ e)
        total += w
    return gram, cross, energy, total


def gather(parts: list[tuple[Tensor, Tensor, Tensor]]) -> Statistics:
    stats = Statistics(D_IN, D_OUT)
    for part in parts:
        stats.update(*part)
    return stats


def split(n: int, cuts: list[int], seed: int = 0) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The ``n`` tokens cut into consecutive batches, some of which may be empty."""
    edges = [0, *sorted(cut % (n + 1) for cut in cuts), n]
    return [tuple(x[start:stop] for x in tokens(n, seed)) for start, stop in pairwise(edges)]


def assert_sums(stats: Statistics, reference: tuple[np.ndarray, np.ndarray, float, float], tol: float = 1e-12) -> None:
    gram, cross, energy, weight = reference
    scale = max(np.abs(gram).max(), 1.0)
    np.testing.assert_allclose(stats.gram.double().numpy(), gram, rtol=0, atol=tol * scale)
    np.testing.assert_allclose(stats.cross.double().numpy(), cross, rtol=0, atol=tol * scale)
    assert float(stats.energy) == pytest.approx(energy, rel=tol, abs=tol)
    assert stats.weight == pytest.approx(weight, rel=tol, abs=tol)


@pytest.mark.parametrize("n", [1, 5, 6, 30])
def test_sums_equal_a_loop_over_tokens(n: int) -> None:
    parts = split(n, [n // 3, n // 2])
    stats = gather(parts)
    assert_sums(stats, loop(*tokens(n)))
    assert stats.tokens == n


def test_weights_default_to_one_each() -> None:
    a, delta, _ = tokens(4)
    stats = Statistics(D_IN, D_OUT)
    stats.update(a, delta)
    assert_sums(stats, loop(a, delta, torch.ones(4)))
    assert stats.weight == 4


def test_weight_of_two_is_the_token_twice_and_of_zero_no_token() -> None:
    a, delta, _ = tokens(3)
    weighted, repeated = Statistics(D_IN, D_OUT), Statistics(D_IN, D_OUT)
    weighted.update(a, delta, torch.tensor([2.0, 1.0, 0.0]))
    repeated.update(a[[0, 0, 1]], delta[[0, 0, 1]])
    torch.testing.assert_close(weighted.gram, repeated.gram, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(weighted.cross, repeated.cross, rtol=1e-14, atol=1e-14)
    assert weighted.weight == repeated.weight == 3
    assert weighted.tokens == 3  # seen, though one weighs nothing


@pytest.mark.parametrize("n", range(1, 9))
def test_tokens_are_kept_as_rows_only_below_d_in(n: int) -> None:
    stats = gather([tuple(x[i : i + 1] for x in tokens(n)) for i in range(n)])
    rows = stats.rows()
    if n >= D_IN:
        assert rows is None
        assert stats.num_rows == 0
    else:
        a, delta, weights = tokens(n)
        assert rows is not None
        assert stats.num_rows == n
        torch.testing.assert_close(rows[0], a * weights.sqrt()[:, None], rtol=1e-15, atol=0)
        torch.testing.assert_close(rows[1], delta * weights.sqrt()[:, None], rtol=1e-15, atol=0)
    assert_sums(stats, loop(*tokens(n)))


def test_empty_statistics_are_zero() -> None:
    stats = Statistics(D_IN, D_OUT)
    assert stats.rows() is None
    assert stats.gram.shape == (D_IN, D_IN)
    assert stats.cross.shape == (D_OUT, D_IN)
    assert not stats.gram.any()
    assert not stats.cross.any()
    assert (stats.weight, stats.tokens, float(stats.energy)) == (0, 0, 0)
    stats.update(torch.zeros(0, D_IN), torch.zeros(0, D_OUT), torch.zeros(0))
    assert_sums(stats, loop(*tokens(0)))


cuts = st.lists(st.integers(0, 40), max_size=4)
counts = st.integers(0, 25)


@settings(max_examples=40, deadline=None)
@given(n=counts, cuts=cuts, order=st.randoms(use_true_random=False))
def test_sums_depend_on_neither_split_nor_order(n: int, cuts: list[int], order) -> None:
    parts = split(n, cuts)
    order.shuffle(parts)
    assert_sums(gather(parts), loop(*tokens(n)))


@settings(max_examples=40, deadline=None)
@given(n=counts, m=counts, cuts=cuts)
def test_addition_is_the_sums_of_both_sets(n: int, m: int, cuts: list[int]) -> None:
    left, right = gather(split(n, cuts, seed=1)), gather(split(m, cuts, seed=2))
    both = tuple(torch.cat(pair) for pair in zip(tokens(n, 1), tokens(m, 2), strict=True))
    total = left + right
    assert_sums(total, loop(*both))
    assert total.tokens == n + m
    assert (total.rows() is None) == (n + m >= D_IN) or n + m == 0
    assert_sums(left, loop(*tokens(n, 1)))  # the parts are as they were
    assert_sums(right, loop(*tokens(m, 2)))
    total.update(*tokens(2, 3))  # and stay so when the total goes on
    assert_sums(left, loop(*tokens(n, 1)))


@settings(max_examples=40, deadline=None)
@given(n=counts, m=counts, cuts=cuts)
def test_subtraction_takes_a_set_off_again(n: int, m: int, cuts: list[int]) -> None:
    left, right = gather(split(n, cuts, seed=1)), gather(split(m, cuts, seed=2))
    rest = (left + right) - right
    assert_sums(rest, loop(*tokens(n, 1)), tol=1e-11)
    assert rest.tokens == n
    rest.update(*tokens(3, 3))
    both = tuple(torch.cat(pair) for pair in zip(tokens(n, 1), tokens(3, 3), strict=True))
    assert_sums(rest, loop(*both), tol=1e-11)


@pytest.mark.parametrize("n", [4, 40])
def test_bfloat16_inputs_are_summed_in_float64(n: int) -> None:
    a, delta, weights = tokens(n)
    parts = [(a[i : i + 3].bfloat16(), delta[i : i + 3].bfloat16(), weights[i : i + 3]) for i in range(0, n, 3)]
    stats = gather(parts)
    assert stats.gram.dtype == stats.cross.dtype == torch.float64
    assert_sums(stats, loop(a.bfloat16(), delta.bfloat16(), weights))  # what bfloat16 rounds off stays off
    unweighted = Statistics(D_IN, D_OUT)
    for part in parts:
        unweighted.update(*part[:2])
    assert_sums(unweighted, loop(a.bfloat16(), delta.bfloat16(), torch.ones(n)))


@pytest.mark.parametrize(
    ("a", "delta", "weights"),
    [
        ((4, D_IN + 1), (4, D_OUT), (4,)),
        ((4, D_IN), (4, D_OUT + 1), (4,)),
        ((4, D_IN), (3, D_OUT), (4,)),
        ((4, 2, D_IN), (4, D_OUT), (4,)),
        ((D_IN,), (D_OUT,), (4,)),
        ((4, D_IN), (4, D_OUT), (3,)),
        ((4, D_IN), (4, D_OUT), (1,)),
        ((4, D_IN), (4, D_OUT), (4, 1)),
    ],
)
def test_wrong_shapes_are_refused_and_nothing_is_added(a: tuple, delta: tuple, weights: tuple) -> None:
    stats = Statistics(D_IN, D_OUT)
    with pytest.raises(ThoughtError, match=f"{D_IN}.*{D_OUT}"):
        stats.update(torch.ones(a), torch.ones(delta), torch.ones(weights))
    assert (stats.tokens, stats.weight, stats.num_rows) == (0, 0, 0)


def test_statistics_of_different_layers_do_not_combine() -> None:
    stats, other = Statistics(D_IN, D_OUT), Statistics(D_IN + 1, D_OUT)
    with pytest.raises(ThoughtError, match="cannot be combined"):
        stats + other
    with pytest.raises(ThoughtError, match="cannot be combined"):
        stats - other


# --- the sum of rank-1 operators


def loop_operators(a: Tensor, delta: Tensor, weights: Tensor) -> np.ndarray:
    """Σ w δ aᵀ / ‖a‖², one token at a time."""
    total = np.zeros((D_OUT, D_IN))
    for x, e, w in zip(a.double().numpy(), delta.double().numpy(), weights.double().numpy(), strict=True):
        if x.any():
            total += w * np.outer(e, x) / (x @ x)
    return total


@settings(max_examples=40, deadline=None)
@given(n=counts, m=counts, cuts=cuts)
def test_operators_equal_a_loop_over_tokens_and_add_and_subtract(n: int, m: int, cuts: list[int]) -> None:
    left, right = Statistics(D_IN, D_OUT, rank_one=True), Statistics(D_IN, D_OUT, rank_one=True)
    for a, delta, weights in split(n, cuts, seed=1):
        if len(a):
            a[0] = 0  # without an input there is no operator
        left.update(a, delta, weights)
    right.update(*tokens(m, 2))
    operators = [np.zeros((D_OUT, D_IN)), loop_operators(*tokens(m, 2))]
    for a, delta, weights in split(n, cuts, seed=1):
        operators[0] += loop_operators(a[1:], delta[1:], weights[1:])
    both = left + right
    for stats, wanted in [
        (left, operators[0]),
        (right, operators[1]),
        (both, sum(operators)),
        (both - right, operators[0]),
    ]:
        np.testing.assert_allclose(stats.operators.numpy(), wanted, rtol=0, atol=1e-12)
    both.update(*tokens(2, 3))  # the parts stay as they were
    np.testing.assert_allclose(left.operators.numpy(), operators[0], rtol=0, atol=1e-12)


def test_operators_are_kept_only_when_asked_for() -> None:
    with_them, without = Statistics(D_IN, D_OUT, rank_one=True), Statistics(D_IN, D_OUT)
    assert not with_them.operators.any()
    assert with_them.operators.shape == (D_OUT, D_IN)
    for stats in (with_them, without):
        stats.update(*tokens(30))
    assert with_them.operators.dtype == torch.float64
    assert torch.equal(with_them.gram, without.gram)
    assert torch.equal(with_them.cross, without.cross)
    with pytest.raises(ThoughtError, match=rf"Statistics\({D_IN}, {D_OUT}, rank_one=True\)"):
        _ = without.operators
    for left, right in [(with_them, without), (without, with_them)]:
        with pytest.raises(ThoughtError, match="cannot be combined: rank_one is"):
            left + right
        with pytest.raises(ThoughtError, match="cannot be combined: rank_one is"):
            left - right
    with_them.update(torch.full((1, D_IN), float("nan")), torch.ones(1, D_OUT))
    assert with_them.operators.isnan().all()  # not taken for zero


# --- vectors


def vectors(parts: list[tuple[Tensor, Tensor, Tensor]]) -> VectorStatistics:
    stats = VectorStatistics(D_OUT)
    for _, delta, weights in parts:
        stats.update(delta, weights)
    return stats


def assert_vector(stats: VectorStatistics, parts: list[tuple[Tensor, Tensor, Tensor]], tol: float = 1e-12) -> None:
    delta, weights = (np.concatenate([part[i].double().numpy() for part in parts]) for i in (1, 2))
    np.testing.assert_allclose(stats.total.double().numpy(), weights @ delta, rtol=0, atol=tol * 10)
    assert float(stats.energy) == pytest.approx(float(weights @ (delta**2).sum(1)), rel=tol, abs=tol)
    assert stats.weight == pytest.approx(weights.sum(), rel=tol, abs=tol)
    assert stats.energy.shape == ()
    assert stats.tokens == len(delta)
    if len(delta):
        np.testing.assert_allclose(stats.mean().double(), np.average(delta, axis=0, weights=weights), atol=tol * 10)


@settings(max_examples=40, deadline=None)
@given(n=counts, m=counts, cuts=cuts, order=st.randoms(use_true_random=False))
def test_vector_sums_depend_on_neither_split_nor_order_and_add_and_subtract(n: int, m: int, cuts, order) -> None:
    parts, other = split(n, cuts, seed=1), split(m, cuts, seed=2)
    left, right = vectors(order.sample(parts, len(parts))), vectors(other)
    assert_vector(left, parts)
    total = left + right
    assert_vector(total, parts + other)
    assert_vector(total - right, parts, tol=1e-11)
    total.update(torch.ones(2, D_OUT))
    assert_vector(left, parts)  # the parts stay as they were
    assert_vector(right, other)


def test_vector_weights_default_to_one_each_and_two_is_the_token_twice() -> None:
    _, delta, _ = tokens(3)
    plain, weighted, repeated = (VectorStatistics(D_OUT) for _ in range(3))
    plain.update(delta)
    assert_vector(plain, [(delta, delta, torch.ones(3))])
    weighted.update(delta, torch.tensor([2, 1, 0]))
    repeated.update(delta[[0, 0, 1]])
    torch.testing.assert_close(weighted.mean(), repeated.mean(), rtol=1e-14, atol=1e-14)
    assert (weighted.weight, weighted.tokens) == (3, 3)  # seen, though one weighs nothing


def test_vector_sums_of_bfloat16_are_float64() -> None:
    parts = [(a, delta.bfloat16(), weights) for a, delta, weights in split(40, [7, 20])]
    stats = vectors(parts)
    assert stats.total.dtype == stats.energy.dtype == stats.mean().dtype == torch.float64
    assert_vector(stats, parts)


@pytest.mark.parametrize("n", [3, 40])
def test_sums_that_were_kept_in_float32_become_wider(n: int) -> None:
    """As the first files have them; weight and tokens are as now."""
    a, delta, weights = tokens(n)
    stats, vector = gather([(a, delta, weights)]), vectors([(a, delta, weights)])

    def narrow(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: x if name in ("weight", "tokens") else x.float() for name, x in tensors.items()}

    again = Statistics.from_tensors(narrow(stats.to_tensors()))
    assert again.gram.dtype == again.cross.dtype == again.energy.dtype == torch.float64
    assert_sums(again, loop(a, delta, weights), 1e-5)
    other = VectorStatistics.from_tensors(narrow(vector.to_tensors()))
    assert other.total.dtype == other.energy.dtype == torch.float64
    torch.testing.assert_close(other.mean(), vector.mean(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("deltas", "weights"),
    [((4, D_OUT + 1), (4,)), ((D_OUT,), (4,)), ((4, 2, D_OUT), (4,)), ((4, D_OUT), (3,)), ((4, D_OUT), (4, 1))],
)
def test_wrong_shapes_of_vectors_are_refused_and_nothing_is_added(deltas: tuple, weights: tuple) -> None:
    stats = VectorStatistics(D_OUT)
    with pytest.raises(ThoughtError, match=rf"\(n, {D_OUT}\)"):
        stats.update(torch.ones(deltas), torch.ones(weights))
    assert (stats.tokens, stats.weight, float(stats.energy)) == (0, 0, 0)


def test_empty_and_different_vectors() -> None:
    stats = VectorStatistics(D_OUT)
    assert stats.total.tolist() == [0.0] * D_OUT
    stats.update(torch.zeros(0, D_OUT))
    with pytest.raises(ThoughtError, match="no token to average"):
        stats.mean()
    with pytest.raises(ThoughtError, match="different vectors cannot be combined"):
        stats + VectorStatistics(D_OUT + 1)
    with pytest.raises(ThoughtError, match="different vectors cannot be combined"):
        stats - VectorStatistics(D_OUT + 1)


@pytest.mark.parametrize("product_dtype", [None, torch.float32])
def test_rows_that_wait_to_be_multiplied_count(product_dtype: torch.dtype | None) -> None:
    """Beyond d_in / 2 tokens the products are taken many rows at a time; whoever asks for a sum gets all of it."""
    generator = torch.Generator().manual_seed(0)
    a, delta = torch.randn(2600, 6, generator=generator), torch.randn(2600, 4, generator=generator)
    weights = torch.rand(2600, generator=generator)

    def gathered(first: int, last: int) -> Statistics:
        stats = Statistics(6, 4, product_dtype=product_dtype)
        for start in range(first, last, 100):
            rows = slice(start, start + 100)
            stats.update(a[rows], delta[rows], weights[rows])
        return stats

    def check(stats: Statistics, first: int, last: int) -> None:
        weighted = a[first:last].double().numpy() * weights[first:last].double().numpy()[:, None]
        tolerance = {"rtol": 1e-5, "atol": 1e-3} if product_dtype else {"rtol": 1e-12}
        np.testing.assert_allclose(stats.gram, weighted.T @ a[first:last].double().numpy(), **tolerance)
        np.testing.assert_allclose(stats.cross, delta[first:last].double().numpy().T @ weighted, **tolerance)
        assert (stats.num_rows, stats.rows(), stats.tokens) == (0, None, last - first)

    check(gathered(0, 2600), 0, 2600)
    check(gathered(0, 300) + gathered(300, 2600), 0, 2600)
    check(gathered(0, 2600) - gathered(0, 1300), 1300, 2600)
    check(Statistics.from_tensors(gathered(0, 2500).to_tensors()), 0, 2500)
    stats = gathered(0, 300)
    check(stats, 0, 300)  # and again, with more that wait
    stats.update(a[300:400], delta[300:400], weights[300:400])
    check(stats, 0, 400)


@pytest.mark.parametrize("n", [3, 40])
def test_tokens_and_sums_of_the_callers_stay_as_they_are(n: int) -> None:
    a, delta, _ = tokens(n)
    stats = Statistics(D_IN, D_OUT)
    stats.update(a, delta)
    wanted = loop(a, delta, torch.ones(n))
    gram, cross = stats.sums()
    kept = gram.clone(), cross.clone()
    stats.update(*tokens(n, seed=1)[:2])  # what was read before stays
    assert torch.equal(gram, kept[0])
    assert torch.equal(cross, kept[1])
    rows = Statistics(D_IN, D_OUT)
    rows.update(a, delta)
    for value in (a, delta):
        value.zero_()
    assert_sums(rows, wanted)
    given = Statistics.from_sums(gram, cross, torch.ones(()), float(n), n)
    given.update(*tokens(2 * D_IN, seed=2)[:2])
    assert not torch.equal(given.gram, kept[0])
    again = Statistics.from_tensors(rows.to_tensors())
    again.update(*tokens(2 * D_IN, seed=2)[:2])
    assert again.gram.shape == (D_IN, D_IN)
    assert_sums(rows, wanted)
    assert torch.equal(gram, kept[0])
    assert torch.equal(cross, kept[1])

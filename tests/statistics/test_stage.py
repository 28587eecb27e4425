"""One stage's sums, its thought matrix and vector and their steps, against NumPy."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from families import make_family
from least_squares import Problem
from models import make_model
from torch import Tensor

from lit_thought.errors import SingularSystemError, ThoughtError
from lit_thought.model.blocks import Site, find_blocks
from lit_thought.patch.patch import ThoughtPatch
from lit_thought.runs.runner import Observation
from lit_thought.runs.streams import SitePatch
from lit_thought.settings import check_parts
from lit_thought.solve.factors import Factors
from lit_thought.solve.least_squares import Prior
from lit_thought.statistics.stage import SolvedStages, StageSettings, StageSums

SETTINGS = StageSettings(rank=4, ridge=1e-2, prior_weight=0.7, step_size=1.0)
FEW, MANY = 9, 60  # tokens that are kept as rows, and tokens that are folded into sums


@cache
def sites(family: str = "llama") -> dict[tuple[int, str], Site]:
    blocks = find_blocks(make_model(family))
    return {(block.index, name): site for block in blocks for name, site in block.sites.items()}


class Case:
    """The compared tokens of one stage; what depends on the metric comes from ``Problem``."""

    def __init__(self, site: Site, n: int = MANY, prior: bool = True, step_size: float = 1.0, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.site, self.eta = site, step_size
        self.weights = rng.uniform(0.5, 3.0, n)
        a = rng.normal(size=(n, site.d_in)) * np.linspace(0.3, 2, site.d_in)
        delta = a @ rng.normal(size=(site.d_in, site.d_out)) * 0.2 + rng.normal(size=(n, site.d_out))
        self.shift = rng.normal(size=(n, site.d_out)) + rng.normal(size=site.d_out)
        others = rng.normal(size=(50, site.d_in))
        gram = others.T @ others / 50
        self.rho = SETTINGS.prior_weight if prior else 0.0
        self.problem = Problem(a, delta, self.weights, SETTINGS.ridge, gram if prior else None, self.rho)
        self.prior = Prior.from_gram(torch.tensor(gram)) if prior else None
        self.mean = self.weights @ self.shift / self.weights.sum() / (1 + self.rho)
        """The constant that one step goes towards."""

    def observations(self, batches: int = 1) -> list[Observation]:
        rows = (self.problem.a, self.problem.delta, self.shift, self.weights)
        columns = [np.array_split(values, batches) for values in rows]
        return [Observation(*map(torch.tensor, batch)) for batch in zip(*columns, strict=True)]

    def solve(
        self, parts: tuple[str, ...], start: SitePatch | None = None, batches: int = 1, **settings: object
    ) -> tuple[SitePatch, dict[str, float]]:
        chosen = replace(SETTINGS, **{"step_size": self.eta, **settings})
        sums = StageSums(self.site, parts, chosen, "block 3, somewhere")
        for seen in self.observations(batches):
            sums.update(seen)
        return sums.solve(start or SitePatch(), self.prior)

    def error(self, change: np.ndarray) -> float:
        """What a change of the matrix leaves of (1/w) Σ w ‖δ‖²."""
        return self.problem.error(change)


def given(site: Site, rank: int = 4) -> SitePatch:
    """A patch that is there already, in float32 as a stage leaves it."""
    rng = np.random.default_rng(7)
    A, B = rng.normal(size=(rank, site.d_in)) * 0.1, rng.normal(size=(site.d_out, rank))
    matrix = Factors(torch.tensor(A).float(), torch.tensor(B).float())
    return SitePatch(matrix, torch.tensor(rng.normal(size=site.d_out)).float())


def array(matrix: Factors | None) -> np.ndarray:
    assert matrix is not None
    assert matrix.A.dtype == matrix.B.dtype == torch.float32
    return matrix.B.double().numpy() @ matrix.A.double().numpy()


def assert_near(found: np.ndarray | Tensor, wanted: np.ndarray, tol: float = 1e-6) -> None:
    found = np.asarray(found, dtype=float)
    assert found.shape == wanted.shape
    assert np.linalg.norm(found - wanted) <= tol * np.linalg.norm(wanted)


@pytest.mark.parametrize("step_size", [1.0, 0.3])
@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("key", [(1, "attn_out"), (0, "mlp_in"), (2, "mlp_out")])
def test_the_vector_is_the_weighted_mean_of_the_shifts(key: tuple[int, str], prior: bool, step_size: float) -> None:
    case = Case(sites()[key], prior=prior, step_size=step_size)
    patch, figures = case.solve(("vector",))
    assert patch.matrix is None
    assert patch.vector.dtype == torch.float32
    step = step_size * case.mean
    assert_near(patch.vector, step)
    start = given(case.site)
    second, _ = case.solve(("vector",), start)
    assert_near(second.vector, start.vector.numpy() + step)
    assert second.matrix is start.matrix
    share = case.weights / case.weights.sum()
    assert figures == pytest.approx(
        {
            "error_before": share @ (case.shift**2).sum(1),
            "error_after": share @ ((case.shift - step) ** 2).sum(1),
            "tokens": MANY,
            "norm": np.linalg.norm(step),
        },
        rel=1e-9,
    )


@pytest.mark.parametrize("rank", [4, None])
@pytest.mark.parametrize("n", [FEW, MANY])
@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("key", [(1, "attn_out"), (0, "mlp_in"), (2, "mlp_out")])
def test_the_matrix_goes_from_what_is_there_towards_the_least_squares(
    key: tuple[int, str], prior: bool, n: int, rank: int | None
) -> None:
    for step_size in (1.0, 0.3):
        case = Case(sites()[key], n, prior, step_size)
        solution = case.problem.least_squares() if rank is None else case.problem.reduced_rank(rank)
        patch, figures = case.solve(("matrix",), rank=rank)
        assert patch.vector is None
        assert_near(array(patch.matrix), step_size * solution)
        start = given(case.site)
        total = array(start.matrix) + step_size * solution
        second, after = case.solve(("matrix",), start, rank=rank)
        assert second.vector is start.vector
        wanted = total if rank is None else case.problem.truncated(total, rank)
        assert_near(array(second.matrix), wanted)
        assert len(second.matrix.A) <= min(case.site.d_in, case.site.d_out, rank or 32)
        for found, change, whole in (
            (figures, step_size * solution, step_size * solution),
            (after, wanted - array(start.matrix), wanted),
        ):
            assert found["error_before"] == pytest.approx(case.error(0 * change), rel=1e-9)
            assert found["error_after"] == pytest.approx(case.error(change), rel=1e-6)
            assert found["norm"] == pytest.approx(np.linalg.norm(whole), rel=1e-6)
            assert found["tokens"] == n
        assert after["rank"] == len(second.matrix.A)


def test_both_parts_are_solved_from_their_own_errors() -> None:
    case = Case(sites("gpt2")[1, "mlp_in"])
    both, figures = case.solve(("matrix", "vector"))
    matrix, own = case.solve(("matrix",))
    vector, other = case.solve(("vector",))
    assert torch.equal(both.matrix.A, matrix.matrix.A)
    assert torch.equal(both.matrix.B, matrix.matrix.B)
    assert torch.equal(both.vector, vector.vector)
    names = {"error_before": "vector_error_before", "error_after": "vector_error_after", "norm": "vector_norm"}
    assert figures == {**own, **{names[key]: value for key, value in other.items() if key in names}}


@pytest.mark.parametrize("n", [FEW, MANY])
def test_batches_add_up(n: int) -> None:
    case = Case(sites()[0, "mlp_in"], n)
    one, _ = case.solve(("matrix", "vector"))
    several, _ = case.solve(("matrix", "vector"), batches=4)
    assert_near(array(several.matrix), array(one.matrix))
    assert_near(several.vector, one.vector.numpy())


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("n", [FEW, MANY])
def test_no_error_is_no_change(n: int, start: bool) -> None:
    """A patch of nothing has rank 1, for adapters have no rank 0."""
    case = Case(sites()[0, "mlp_in"], n)
    case.problem.delta[:] = 0
    case.shift[:] = 0
    before = given(case.site) if start else SitePatch()
    for rank in (4, 0.9, None):
        patch, _ = case.solve(("matrix", "vector"), before, rank=rank)
        assert_near(patch.vector, before.vector.numpy() if start else np.zeros(32))
        if start and rank != 0.9:
            assert_near(array(patch.matrix), array(before.matrix))
        elif not start:
            assert len(patch.matrix.A) >= 1
            assert not array(patch.matrix).any()


def test_errors_name_the_stage() -> None:
    case = Case(sites()[0, "mlp_in"])
    case.problem.a[3, 4] = np.nan
    with pytest.raises(SingularSystemError, match=r"^block 3, somewhere: the activations contain NaN"):
        case.solve(("matrix",))


# --- parts --------------------------------------------------------------------------------------------------


def test_each_site_has_its_own_form() -> None:
    both = ("matrix", "vector")
    assert check_parts(None, ("attn_out", "mlp_in", "mlp_out")) == {
        "attn_out": ("matrix",),
        "mlp_in": both,
        "mlp_out": ("matrix",),
    }
    assert check_parts("vector", ("attn_out", "mlp_in")) == {"attn_out": ("vector",), "mlp_in": ("vector",)}
    assert check_parts(["matrix"], ("mlp_in", "mlp_out")) == {"mlp_in": ("matrix",), "mlp_out": ("matrix",)}
    assert check_parts(("vector", "matrix"), ("mlp_in",)) == {"mlp_in": both}


@pytest.mark.parametrize(
    "parts", [(), "", "both", ("matrix", "bias"), ("vector", "vector"), (1,), (["matrix"],)], ids=repr
)
def test_wrong_parts_are_refused(parts: object) -> None:
    with pytest.raises(ThoughtError, match=r"^parts must name one or both of \['matrix', 'vector'\]"):
        check_parts(parts, ("mlp_in",))  # type: ignore[arg-type]


@pytest.mark.parametrize(("names", "first"), [(("attn_out", "mlp_in"), "attn_out"), (("mlp_in", "mlp_out"), "mlp_out")])
def test_both_parts_at_an_output_projection_are_refused(names: tuple[str, ...], first: str) -> None:
    with pytest.raises(ThoughtError, match=rf"^parts=\['matrix', 'vector'\] with sites=.*: at {first} a matrix and"):
        check_parts(("matrix", "vector"), names)


# --- what patches come to ------------------------------------------------------------------------------------


def solved(
    found: dict[tuple[int, str], Site],
    patches: dict[tuple[int, str], SitePatch],
    provenance: dict[str, str] | None = None,
) -> ThoughtPatch:
    stages = SolvedStages()
    for (block, name), patch in patches.items():
        stages.add(block, found[block, name], given(found[block, name]), {"rank": 9})
        stages.add(block, found[block, name], patch, {"rank": 1 / 3})  # in the place of what was there
    return stages.patch(provenance)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_changes_by_layer(family: str) -> None:
    """At mlp_in every first linear gets W Δ; vectors of mlp_in and mlp_out meet in one bias."""
    found = sites(family)
    patches = {key: given(site, rank) for rank, (key, site) in enumerate(found.items(), start=1)}
    patch = solved(found, patches, {"model": "tiny"})
    root, attention, firsts, down = (
        ("transformer.h", "attn.c_proj", ["mlp.c_fc"], "mlp.c_proj")
        if family == "gpt2"
        else ("model.layers", "self_attn.o_proj", ["mlp.gate_proj", "mlp.up_proj"], "mlp.down_proj")
    )
    assert set(patch.factors) == {f"{root}.{i}.{name}" for i in range(3) for name in (attention, down, *firsts)}
    assert set(patch.vectors) == {f"{root}.{i}.{name}" for i in range(3) for name in (attention, down)}
    for i in range(3):
        own = {name: patches[i, name] for name in ("attn_out", "mlp_in", "mlp_out")}
        wanted = {attention: array(own["attn_out"].matrix), down: array(own["mlp_out"].matrix)}
        for name in firsts:
            weight = found[i, "mlp_in"].targets[f"{root}.{i}.{name}"].weight.detach().numpy()
            wanted[name] = (weight.T if family == "gpt2" else weight) @ array(own["mlp_in"].matrix)
        for name, delta in wanted.items():
            assert_near(patch.factors[f"{root}.{i}.{name}"].delta(torch.float64), delta)
        assert torch.equal(patch.vectors[f"{root}.{i}.{attention}"], own["attn_out"].vector)
        assert torch.equal(patch.vectors[f"{root}.{i}.{down}"], own["mlp_in"].vector + own["mlp_out"].vector)
    assert patch.provenance == {
        "model": "tiny",
        "diagnostics": {site.label: {"rank": 0.33333333} for site in found.values()},
        "d_in": {layer.path: layer.d_in for site in found.values() for layer in site.projections},
    }


def test_changes_of_one_part_only() -> None:
    whole = {key: given(site) for key, site in sites().items()}
    patch = solved(sites(), {key: SitePatch(p.matrix) for key, p in whole.items()})
    assert (len(patch.factors), patch.vectors, patch.provenance) == (12, {}, {})
    patch = solved(sites(), {key: SitePatch(None, p.vector) for key, p in whole.items()})
    assert (patch.factors, len(patch.vectors), len(patch.provenance["d_in"])) == ({}, 6, 6)
    before = whole[0, "mlp_in"].vector.clone()
    solved(sites(), whole)
    assert torch.equal(whole[0, "mlp_in"].vector, before)


def test_a_vector_is_zero_where_the_norm_after_it_lets_nothing_through() -> None:
    """At no ridge, too."""
    block = find_blocks(make_family("gemma2", torch.float64))[0]
    site = block.sites["mlp_out"]
    gain = torch.linspace(0.5, 1.5, site.d_out, dtype=torch.float64)
    gain[3] = 0.0
    sums = StageSums(replace(site, gain=gain), ("vector",), StageSettings(None, 0.0, 0.0, 1.0), "block 0, mlp_out")
    assert sums.vector is not None
    deltas = torch.randn(7, site.d_out, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sums.vector.update(deltas)
    found, _ = sums.solve(SitePatch(), None)
    assert found.vector is not None
    wanted = deltas.mean(0) / gain
    wanted[3] = 0.0
    assert torch.allclose(found.vector.double(), wanted)
    sums.site = replace(site, gain=torch.zeros_like(gain))
    with pytest.raises(SingularSystemError, match="the gain is zero for every channel"):
        sums.solve(SitePatch(), None)

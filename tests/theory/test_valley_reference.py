"""The valley against its formula in slow Python: other settings than the rows, drawn at random, to the last lattice point."""

import math
from itertools import product

import numpy as np
import pytest
from tests.reference.valley import Slow

from stepwell.theory.recovery import largest_rounding
from stepwell.theory.valley import Valley

STEPS = 80


def unit_normals(rng, count, dim):
    return np.linalg.qr(rng.normal(size=(dim, count)))[0].T


def draw(seed):
    """One valley with a random choice of everything it can have, the same in slow Python, a point and a learning rate."""
    rng = np.random.default_rng(seed)
    bent = seed % 5 == 4
    dim = 2 if bent else int(rng.integers(2, 7))
    count = 1 if bent else int(rng.integers(1, dim))
    basis = np.linalg.qr(rng.normal(size=(dim, dim)))[0].T
    normals, river, center = basis[:count], basis[count], rng.uniform(-1, 1, dim)
    root = rng.normal(size=(dim, dim))
    hessian = 0.05 * root @ root.T + 0.01 * np.eye(dim) if rng.random() < 0.4 else None
    weights = rng.uniform(0.5, 2, count) if rng.random() < 0.5 else None
    wall = str(rng.choice(["linear", "quadratic", "saturating"]))
    r, s, ell, kappa = (float(rng.uniform(*span)) for span in ((0.1, 0.6), (0.5, 2), (0.2, 1), (0, 0.3)))
    a = float(rng.choice([0.0, 0.3]))
    step, limit = float(rng.choice([1.0, 0.5])), int(rng.integers(1, 4)) if rng.random() < 0.3 else None
    bend = (float(rng.uniform(0.1, 0.5)), float(rng.uniform(0.5, 2))) if bent else None
    valley = Valley(
        normals,
        center,
        r,
        s,
        wall,
        kappa,
        a,
        anisotropy=weights,
        hessian=hessian,
        river=river,
        bend=bend,
        saturation=ell,
        step=step,
        limit=limit,
    )
    slow = Slow(
        *(normals.tolist(), center.tolist(), r, s, wall, kappa, a, river.tolist()),
        *([] if weights is None else weights.tolist(), [] if hessian is None else hessian.tolist(), bend, ell, step, limit),
    )
    return valley, slow, center + 0.3 * rng.normal(size=dim), float(rng.choice([0.01, 0.05, 0.2]))


@pytest.mark.parametrize("seed", range(60))
def test_training_meets_the_same_lattice_points_as_slow_python(seed):
    valley, slow, w, lr = draw(seed)
    run, points = valley.ste(w, lr=lr, steps=STEPS), slow.ste(w.tolist(), lr, STEPS)
    assert run.points.tolist() == points
    inside = [slow.inside(q) for q in points]
    assert run.inside.tolist() == inside
    assert run.first_entry == (inside.index(True) if any(inside) else None)
    # sums of at most some fifty products of order one in another order: a hundred times the unit roundoff
    assert valley.loss(run.points) == pytest.approx(np.array([slow.value(q) for q in points]), rel=1e-13, abs=1e-13)
    assert valley.gradient(run.points[-1]) == pytest.approx(np.array(slow.gradient(points[-1])), rel=1e-12, abs=1e-12)


def test_the_draws_above_meet_every_kind_of_run():
    """Some enter and some do not, some leave again, some are clipped: a reference that never sees a case proves nothing about it."""
    found = [(valley, valley.ste(w, lr=lr, steps=STEPS)) for valley, _, w, lr in map(draw, range(60))]
    assert 5 < sum(run.first_entry is None for _, run in found) < 55
    assert sum(run.first_entry not in (None, 0) for _, run in found) > 5
    assert sum(run.stay is not None and run.stay < 1 for _, run in found) > 5
    assert sum(valley.limit is not None and np.abs(run.points).max() == valley.limit * valley.step for valley, run in found) > 3


@pytest.mark.parametrize("dim", [3, 11, 40, 200])
@pytest.mark.parametrize("half_width", [0.07, 0.2])
def test_the_staircase_family_at_other_sizes(dim, half_width):
    i = np.arange(1, dim + 1)
    normal = np.sin(0.7 * i**2) + 0.05 * np.cos(3 * i)
    normal, w = normal / np.linalg.norm(normal), (0.6180339887498949 * i) % 1 - 0.5
    # by the theorem's own words: everything moves along the normal, lr per step, away from the side that RTN fell to
    offset, lr, points = 0.0, 0.015, []
    for _ in range(STEPS + 1):
        q = [math.floor(x + offset * n + 0.5) for x, n in zip(w, normal, strict=True)]
        n = sum(a * (b - c) for a, b, c in zip(normal, q, w, strict=True))
        points.append(q)
        offset += 0 if abs(n) <= half_width else -lr * math.copysign(1, n)
    run = Valley([normal], w, half_width).ste(w, lr=lr, steps=STEPS)
    assert run.points.tolist() == points
    if run.bound:
        assert run.bounds.staircase == math.ceil((sum(abs(x) for x in normal) / 2 - half_width) / lr)


def test_points_in_reach_are_those_of_a_search_in_slow_python():
    for seed in range(12):
        valley, slow, w, _ = draw(seed)
        if len(w) > 4:
            continue
        codes = [[math.floor(x / slow.step + 0.5) + k for k in (-1, 0, 1)] for x in w]
        if slow.limit is not None:
            codes = [sorted({max(-slow.limit, min(slow.limit, code)) for code in column}) for column in codes]
        wanted = [[code * slow.step for code in point] for point in product(*codes)]
        assert sorted(valley.near(w).tolist()) == sorted(point for point in wanted if slow.inside(point))


@pytest.mark.parametrize(("count", "dim"), [(1, 5), (2, 5), (3, 8)])
def test_the_largest_rounding_error_is_that_of_some_corner_of_the_cell(count, dim):
    normals = unit_normals(np.random.default_rng(11), count, dim)
    corners = [np.linalg.norm(normals @ np.array(signs)) / 2 for signs in product((-1, 1), repeat=dim)]
    assert largest_rounding(normals, 1.0) == pytest.approx(max(corners), rel=1e-12)
    many = unit_normals(np.random.default_rng(12), count, 30)
    drawn = np.random.default_rng(13).choice([-0.5, 0.5], size=(2000, 30)) @ many.T
    assert largest_rounding(many, 1.0) >= np.linalg.norm(drawn, axis=1).max()  # beyond 14 dimensions an upper bound


@pytest.mark.parametrize("lr", [0.003, 0.05, 0.11])
@pytest.mark.parametrize("dim", [2, 4, 6])
def test_coordinates_that_are_equal_flip_together_and_never_enter(dim, lr):
    """All of them jump by sqrt(d) together, over a basin 0.6 wide that holds points in which some have flipped."""
    w = np.full(dim, 0.4)
    valley = Valley([np.ones(dim) / np.sqrt(dim)], w, 0.3)
    run = valley.ste(w, lr=lr, steps=800)
    assert len(valley.near(w)) > 0
    assert run.first_entry is None
    assert {tuple(point) for point in run.points.tolist()} == {(0.0,) * dim, (1.0,) * dim}

"""The valley: exact rows worked out by hand or by an independent program, and laws over random draws.

Every row has the linear wall of slope 1, the lattice Z^d, c = w, and updates w - lr * gradient(Q(w)).
"""

from itertools import product

import numpy as np
import pytest

from stepwell.theory.recovery import largest_rounding
from stepwell.theory.valley import Valley

DIAGONAL = np.ones(2) / np.sqrt(2)
TOLERANCE = 1e-5  # the rows are printed to six digits


def metric(off: float) -> np.ndarray:
    return np.array([[1.0, off], [off, 1.0]])


def staircase(dim: int) -> tuple[np.ndarray, np.ndarray]:
    i = np.arange(1, dim + 1)
    normal = np.sin(0.7 * i**2) + 0.05 * np.cos(3 * i)
    return normal / np.linalg.norm(normal), (0.6180339887498949 * i) % 1 - 0.5


def unit_normals(rng: np.random.Generator, count: int, dim: int) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(dim, count)))[0].T


def plane(center, off=0.0, half_width=0.3):
    return Valley([DIAGONAL], center, half_width), np.array(center), metric(off)


# 2-D rows


def test_row_a_the_smallest_failure_and_its_recovery():
    v, w, h = plane((0.42, 0.36))
    assert v.rtn(w).tolist() == v.gptq(w, h).tolist() == [0, 0]
    assert v.distance(v.rtn(w)) == pytest.approx([-0.551543], abs=TOLERANCE)
    assert v.loss(v.rtn(w)) == v.loss(v.gptq(w, h)) == pytest.approx(0.251543, abs=TOLERANCE)
    assert v.cvp(w, h, reach=2).tolist() == [0, 0]
    run = v.ste(w, lr=0.05, steps=400)
    assert (run.first_entry, run.bound) == (3, 9)
    assert run.points[3].tolist() == run.points[-1].tolist() == [1, 0]
    assert v.near(w).tolist() == [[0, 1], [1, 0]]


def test_row_a_with_a_tie_never_enters():
    v, w, h = plane((0.40, 0.40))
    assert v.rtn(w).tolist() == v.gptq(w, h).tolist() == v.cvp(w, h, reach=2).tolist() == [0, 0]
    assert v.distance(v.rtn(w)) == pytest.approx([-0.565685], abs=TOLERANCE)
    assert v.loss(v.rtn(w)) == v.loss(v.gptq(w, h)) == pytest.approx(0.265685, abs=TOLERANCE)
    run = v.ste(w, lr=0.05, steps=400)
    assert run.first_entry is None
    assert run.stay is None
    assert not run.guaranteed
    assert sorted(run.points[-2:].tolist()) == [[0, 0], [1, 1]]
    assert v.near(w).tolist() == [[0, 1], [1, 0]]
    assert v.ste([0.42, 0.36], lr=0.05, steps=400).first_entry is not None


def test_row_b_curvature_across_the_valley_rescues_gptq():
    v, w, h = plane((0.42, 0.36), off=0.5)
    assert v.gptq(w, h).tolist() == [0, 1]
    assert v.loss([0, 1]) == 0
    assert v.cvp(w, h, reach=2).tolist() == [1, 0]
    assert not v.inside(v.rtn(w))
    assert v.near(w).tolist() == [[0, 1], [1, 0]]


def test_row_c_curvature_along_the_river_misleads_gptq():
    v, w, h = plane((0.30, 0.60), off=-0.5)
    assert v.distance(v.rtn(w)) == pytest.approx([0.070711], abs=TOLERANCE)
    assert v.inside(v.rtn(w))
    assert v.gptq(w, h).tolist() == v.cvp(w, h, reach=2).tolist() == [0, 0]
    assert not v.inside([0, 0])
    assert v.loss([0, 0]) == pytest.approx(0.336396, abs=TOLERANCE)
    assert v.ste(w, lr=0.05, steps=400).first_entry == 0
    assert v.near(w).tolist() == [[-1, 2], [0, 1], [1, 0]]


def test_without_a_point_in_reach_the_run_alternates_for_ever():
    v, w = Valley([[1, 0]], [0.5, 0.1], 0.3), [0.5, 0.1]
    run = v.ste(w, lr=0.05, steps=400)
    assert run.first_entry is None
    assert sorted(run.points[-2:].tolist()) == [[0, 0], [1, 0]]
    assert v.loss(run.points) == pytest.approx(np.full(401, 0.2), abs=TOLERANCE)
    assert v.near(w, reach=5).shape == (0, 2)


@pytest.mark.parametrize("direction", [(1, 0), (1, 1), (2, 1), (3, 2)])
def test_lattice_lines_are_one_over_the_direction_apart(direction):
    length, reach = np.linalg.norm(direction), 1 / (2 * np.linalg.norm(direction))
    for wide, factor in ((True, 1.001), (False, 0.95)):
        # offsets over one period; halfway between two lines no point lies in a basin narrower than half their distance
        offsets = np.linspace(0, 1, 41)[:, None] * np.array(direction) / length**2
        found = [len(Valley([np.array(direction) / length], c, factor * reach).near(c, reach=4)) > 0 for c in offsets]
        assert all(found) == wide


# staircase rows


@pytest.mark.parametrize(
    ("dim", "half_width", "lr", "start", "loss", "entry", "end", "changed", "bound"),
    [
        (8, 0.25, 0.02, -0.410841, 0.160841, 7, 0.020336, 1, None),
        (16, 0.25, 0.02, -0.255084, 0.005084, 5, 0.115985, None, 70),
        (128, 0.1, 0.01, -0.346052, 0.246052, 31, -0.001185, 3, 483),
    ],
)
def test_staircase_rows(dim, half_width, lr, start, loss, entry, end, changed, bound):
    normal, w = staircase(dim)
    v = Valley([normal], w, half_width)
    q = v.rtn(w)
    assert v.distance(q) == pytest.approx([start], abs=TOLERANCE)
    assert v.loss(q) == pytest.approx(loss, abs=TOLERANCE)
    run = v.ste(w, lr=lr, steps=3000)
    assert run.first_entry == entry
    assert v.distance(run.points[entry]) == pytest.approx([end], abs=TOLERANCE)
    assert changed is None or (run.points[entry] != q).sum() == changed
    assert bound is None or run.bound == bound
    assert run.stay == 1.0  # the floor is flat: no gradient, no way out
    assert (np.linalg.norm(run.points[-1] - run.points[entry])) == 0


def test_the_largest_rounding_error_of_the_family_in_eight_dimensions():
    normal, _ = staircase(8)
    assert largest_rounding(normal[None], 1.0) == pytest.approx(1.158756, abs=TOLERANCE)


def test_a_jump_over_a_narrow_basin_never_enters():
    normal, w = staircase(16)
    assert np.abs(normal).max() == pytest.approx(0.432884, abs=TOLERANCE)
    v = Valley([normal], w, 0.05)
    run = v.ste(w, lr=0.02, steps=3000)
    assert run.first_entry is None
    late = v.distance(run.points[-500:])
    assert (late > 0).any()
    assert (late < 0).any()


# laws


def test_the_staircase_never_falls():
    rng = np.random.default_rng(0)
    for _ in range(100):
        dim = int(rng.integers(2, 33))
        normal, w = unit_normals(rng, 1, dim), rng.uniform(-2, 2, dim)
        v, alpha = Valley(normal, w, 0.3), np.linspace(0, 3, 1000)
        along = v.distance(v.rtn(w + alpha[:, None] * normal[0]))[:, 0]
        assert (np.diff(along) > -1e-12).all()
        assert (np.abs(along - alpha) <= largest_rounding(normal, 1.0) + 1e-12).all()


def test_entry_is_within_the_staircase_bound_where_the_jump_fits():
    rng, tried = np.random.default_rng(1), 0
    while tried < 100:
        dim, lr = int(rng.integers(4, 40)), float(rng.choice([0.005, 0.02, 0.1]))
        normal, w = unit_normals(rng, 1, dim), rng.uniform(-2, 2, dim)
        wall, curvature = rng.choice(["linear", "saturating"]), float(rng.choice([0.0, 0.3]))
        v = Valley(normal, w, float(np.abs(normal).max() * rng.uniform(0.5, 0.8)), wall=str(wall), curvature=curvature)
        if v.inside(v.rtn(w)) or not (run := v.ste(w, lr=lr, steps=0)).guaranteed:
            continue
        tried += 1
        run = v.ste(w, lr=lr, steps=run.bound)
        assert run.first_entry is not None
        assert 0 < run.first_entry <= run.bound


def test_jump_is_the_largest_rise_over_a_stretch():
    """Against the staircase itself, sampled so finely that flips are told apart."""
    rng = np.random.default_rng(2)
    for _ in range(10):
        normal, w, lr = unit_normals(rng, 1, 6), rng.uniform(-2, 2, 6), 0.15
        v = Valley(normal, w, 0.05)
        if v.inside(v.rtn(w)):
            continue
        run = v.ste(w, lr=lr, steps=0)
        sign = -np.sign(v.distance(v.rtn(w))[0])
        # R2's range: until the bound E - r has surely been passed, plus one stretch
        fine = 1e-4
        span = np.abs(normal).sum() / 2 - 0.05 + lr
        along = sign * v.distance(v.rtn(w + np.arange(0, span + lr, fine)[:, None] * sign * normal[0]))[:, 0]
        stretch = round(lr / fine)
        rises = along[stretch:] - along[:-stretch]
        # the sampled stretch is closed at one end only and may miss a flip at its edge
        assert run.bounds.jump >= rises.max() - 1e-12
        assert run.bounds.jump <= (along[stretch + 2 :] - along[: -stretch - 2]).max() + 1e-12


def test_entry_is_within_the_distance_bound_where_the_basin_is_wide():
    rng, tried = np.random.default_rng(3), 0
    while tried < 120:
        normals, center = unit_normals(rng, 3, 12), rng.uniform(-2, 2, 12)
        anisotropy = rng.uniform(0.95, 1.0, 3) if tried % 2 else None
        v = Valley(normals, center, 2.2, curvature=0.02 * (tried % 3), anisotropy=anisotropy)
        direction = normals.T @ unit_normals(rng, 1, 3)[0]
        w = center + direction * rng.uniform(2.2, 3.5)
        run = v.ste(w, lr=0.02, steps=0)
        if v.inside(v.rtn(w)) or run.bounds.distance is None:
            continue
        tried += 1
        assert run.bounds.staircase is None
        assert run.bound == run.bounds.distance > 0
        assert 0 < v.ste(w, lr=0.02, steps=run.bound).first_entry <= run.bound


def test_distance_bound_in_numbers():
    """One dimension, by hand: E = 1/2, s = G = 1, r = 1, z0 = 1.6: (1.6^2 - 0.5^2) / (2 * 0.1 * 0.5 - 0.01) = 25.67."""
    run = Valley([[1.0]], [0.0], 1.0).ste([1.6], lr=0.1, steps=50)
    assert run.bounds.distance == 26
    assert run.points[0] == 2
    # q = 2 until w < 1.5: 1.6 -> 1.5 -> 1.4; at 1.5 halves go up (1.6 - 0.1 is 1.5 exactly in binary)
    assert run.first_entry == 2
    assert Valley([[1.0]], [0.0], 0.4).ste([0.6], lr=0.1, steps=1).bounds.distance is None  # r < E: the theorem is empty


def test_gradient_is_the_derivative_of_the_loss():
    rng = np.random.default_rng(4)
    root = rng.normal(size=(5, 5))
    curved = {"normals": [[0.6, 0.8]], "center": [0.2, -0.1], "half_width": 0.2, "bend": (0.7, 1.3), "river_slope": 0.4}
    cases = [
        Valley(unit_normals(rng, k, 5), rng.normal(size=5), 0.3, wall=wall, slope=1.7, saturation=0.4, **more)
        for k, wall, more in [
            (1, "linear", {}),
            (2, "quadratic", {"anisotropy": [0.5, 2.0], "curvature": 0.3}),
            (3, "saturating", {"hessian": root @ root.T, "river_slope": 0.6}),
        ]
    ] + [Valley(**curved), Valley(**curved, wall="quadratic", curvature=0.5)]
    h = 1e-6
    for v in cases:
        dim = v.distance(np.asarray(v.center)).size and len(v.center)
        points = np.asarray(v.center) + rng.normal(size=(40, dim))
        assert 0 < np.mean(v.inside(points)) < 0.7 or v.distance(points).shape[-1] > 1
        numeric = np.stack([(v.loss(points + h * e) - v.loss(points - h * e)) / (2 * h) for e in np.eye(dim)], axis=-1)
        # central differences: h^2 times third derivatives of order ten, plus rounding 1e-16 * loss / h
        assert v.gradient(points) == pytest.approx(numeric, abs=1e-8)


def test_the_floor_is_flat_and_the_edge_counts_as_inside():
    v = Valley([[0.6, 0.8]], [0.1, 0.2], 0.3)
    edge = np.array([0.1, 0.2]) + 0.3 * np.array([0.6, 0.8])
    assert v.inside(edge)
    assert (v.gradient(edge) == 0).all()
    assert v.loss(edge) == 0
    assert not v.inside(edge + 1e-9)


def test_wall_heights_at_one_point():
    """Excess 0.7 at distance 1: s e, s e^2 / 2 and s ell (1 - exp(-e / ell)) with s = 2, ell = 0.5."""
    for wall, height in (("linear", 1.4), ("quadratic", 0.49), ("saturating", 1 - np.exp(-1.4))):
        v = Valley([[1.0, 0.0]], [0, 0], 0.3, slope=2.0, wall=wall, saturation=0.5, curvature=0.2, river_slope=0.5)
        # the river is the second axis: 0.2 / 2 * 1^2 across, -0.5 * 3 along
        assert v.loss([1.0, 3.0]) == pytest.approx(height + 0.1 - 1.5, abs=1e-12)


def test_a_curved_river_has_distance_zero_on_itself():
    amplitude, frequency, c = 0.5, 2.0, np.array([0.3, -0.2])
    along = np.linspace(-2, 2, 9)
    v = Valley([[0.0, 1.0]], c, 0.2, bend=(amplitude, frequency))
    on_it = c + np.stack([along, amplitude * np.sin(frequency * along)], axis=1)
    assert np.abs(v.distance(on_it)).max() < 1e-15
    straight = Valley([[0.0, 1.0]], c, 0.2, bend=(0.0, 2.0))
    assert straight.distance(on_it) == pytest.approx(Valley([[0.0, 1.0]], c, 0.2).distance(on_it))


def test_training_recovers_in_a_bent_valley_about_as_often_as_in_a_straight_one():
    rng, outside, entered = np.random.default_rng(10), 0, np.zeros(3)
    while outside < 25:
        c = rng.uniform(-1, 1, 2)
        runs = [Valley([[0.6, 0.8]], c, 0.3, bend=bend).ste(c, lr=0.03, steps=200) for bend in (None, (1e-9, 1.0), (0.1, 1.0))]
        if not runs[0].inside[0]:
            outside += 1
            entered += [run.first_entry is not None for run in runs]
            assert runs[2].bound == (0 if runs[2].inside[0] else None)  # both theorems are about straight rivers
    straight, barely, bent = entered / outside
    assert barely == straight > 0.5
    # three standard deviations of the difference of two shares of 25 are .42 at most; the draws are shared, so this is generous
    assert abs(bent - straight) < 0.42


def test_gptq_equals_the_published_column_loop():
    rng = np.random.default_rng(5)
    for _ in range(30):
        root, w = rng.normal(size=(7, 7)), rng.normal(size=7) * 2
        h = root @ root.T + 0.1 * np.eye(7)
        upper = np.linalg.cholesky(np.linalg.inv(h)).T  # H^-1 = U^T U
        work, q = w.copy(), np.empty(7)
        for j in range(7):
            q[j] = np.floor(work[j] + 0.5)
            work[j + 1 :] -= (work[j] - q[j]) / upper[j, j] * upper[j, j + 1 :]
        assert Valley([np.eye(7)[0]], w, 0.3).gptq(w, h).tolist() == q.tolist()


def test_exhaustive_search_is_the_minimum_over_the_box():
    rng = np.random.default_rng(6)
    for _ in range(10):
        root, w = rng.normal(size=(3, 3)), rng.normal(size=3)
        h = root @ root.T + 0.1 * np.eye(3)
        v = Valley([[1, 0, 0]], w, 0.3)
        box = [v.rtn(w) + np.array(offset) for offset in product((-1, 0, 1), repeat=3)]
        costs = [(q - w) @ h @ (q - w) for q in box]
        found = v.cvp(w, h, reach=1)
        assert (found - w) @ h @ (found - w) == pytest.approx(min(costs), rel=1e-12)


def test_hessian_rounding_helps_exactly_as_far_as_curvature_points_at_the_wall():
    """H = I + (l - 1) nu nu^T over random wells: worse than RTN below l = 1, equal at 1, better above."""
    rng, dim, draws = np.random.default_rng(7), 8, 150
    count = dict.fromkeys((0.1, 1, 10, 100, "rtn", "corner"), 0)
    for _ in range(draws):
        normal, w = unit_normals(rng, 1, dim), rng.uniform(-1, 1, dim)
        v = Valley(normal, w, 0.25)
        count["rtn"] += v.inside(v.rtn(w))
        count["corner"] += len(v.corners(w)) > 0
        for weight in (0.1, 1, 10, 100):
            count[weight] += v.inside(v.gptq(w, np.eye(dim) + (weight - 1) * normal.T @ normal))
    # measured elsewhere with other draws: .307, .567 = RTN, .907, .967, corners 1.00; four standard errors of a share of 150 are .16
    share = {name: inside / draws for name, inside in count.items()}
    assert share[1] == share["rtn"]
    assert share[0.1] < share["rtn"] - 0.1
    assert share[10] > share["rtn"] + 0.2
    assert share[100] > 0.9
    assert share["corner"] == 1


# where straight-through training fails


def test_a_large_step_destroys_recovery():
    rng, runs = np.random.default_rng(8), []
    while len(runs) < 25:
        w = rng.uniform(-0.5, 0.5, 12)
        v = Valley(unit_normals(rng, 2, 12), w, 0.3)
        if not v.inside(v.rtn(w)):
            runs.append([v.ste(w, lr=lr, steps=600).first_entry is not None for lr in (0.02, 3.0)])
    careful, hasty = np.mean(runs, axis=0)
    # measured elsewhere: .88 and .20; two shares of 25 differ by .13 in standard deviation
    assert careful - hasty > 0.4


def test_a_saturated_wall_recovers_later():
    normal, w = staircase(8)
    steps = [
        Valley([normal], w, 0.25, wall=wall, saturation=0.05).ste(w, lr=0.02, steps=3000).first_entry for wall in ("linear", "saturating")
    ]
    assert steps[0] < steps[1]


def test_a_clipped_lattice_may_end_before_the_basin():
    normal, w = np.array([0.8, 0.6]), np.array([1.4, 1.4])
    free, clipped = (Valley([normal], w, 0.25, limit=limit) for limit in (None, 1))
    assert free.ste(w, lr=0.02, steps=500).first_entry is not None
    run = clipped.ste(w, lr=0.02, steps=500)
    assert run.first_entry is None
    assert run.bound is None
    assert np.abs(run.points).max() == 1
    assert len(clipped.near(w, reach=3)) == 0


def test_entry_is_not_permanence_when_the_floor_is_curved():
    normal, w = staircase(16)
    flat, bowl = (Valley([normal], w, 0.25, hessian=h).ste(w, lr=0.02, steps=1500) for h in (None, 0.1 * np.eye(16)))
    assert flat.stay == 1
    assert bowl.stay < 0.6  # measured elsewhere on other draws: .22


def test_lattice_with_another_step_is_the_same_picture_scaled():
    normal, w = staircase(8)
    whole = Valley([normal], w, 0.25).ste(w, lr=0.02, steps=50)
    half = Valley([normal], w / 2, 0.125, step=0.5).ste(w / 2, lr=0.01, steps=50)
    assert np.array_equal(whole.points, 2 * half.points)
    assert whole.bound == half.bound


def test_batches_of_points_equal_single_points():
    rng = np.random.default_rng(9)
    v = Valley(unit_normals(rng, 2, 4), rng.normal(size=4), 0.3, hessian=np.eye(4), river_slope=0.2)
    points = rng.normal(size=(3, 5, 4))
    assert v.distance(points).shape == (3, 5, 2)
    for index in np.ndindex(3, 5):
        assert v.loss(points)[index] == pytest.approx(v.loss(points[index]), rel=1e-13)
        assert v.gradient(points)[index] == pytest.approx(v.gradient(points[index]), rel=1e-12)
        assert v.inside(points)[index] == v.inside(points[index])


GOOD = {"normals": [[1.0, 0.0]], "center": [0.0, 0.0], "half_width": 0.3}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"normals": [[1.0, 1.0]]}, r"`normals`.*orthonormal.*1"),
        ({"normals": [[1, 0], [0, 1], [1, 1]]}, r"`normals`.*\(3, 2\)"),
        ({"normals": [[np.nan, 0.0]]}, r"`normals`.*nan"),
        ({"center": [0.0]}, r"`center` must hold 2 finite numbers: got \[0.0\]"),
        ({"half_width": 0.0}, "`half_width` must be finite, above 0: got 0.0"),
        ({"half_width": np.nan}, "`half_width`.*nan"),
        ({"slope": -1}, "`slope`.*-1"),
        ({"slope": "steep"}, "`slope`.*steep"),
        ({"wall": "cubic"}, "`wall`.*'cubic'"),
        ({"curvature": -0.1}, "`curvature`.*-0.1"),
        ({"river_slope": np.inf}, "`river_slope`.*inf"),
        ({"normals": np.eye(2), "river_slope": 0.1}, "`river_slope`.*0.1"),
        ({"anisotropy": [0.0]}, "`anisotropy`.*got 0"),
        ({"anisotropy": [1.0, 1.0]}, "`anisotropy` must hold 1"),
        ({"hessian": [[1.0, 2.0], [0.0, 1.0]]}, "`hessian` must be symmetric.*2"),
        ({"hessian": [[1.0, 2.0], [2.0, 1.0]]}, "`hessian` must be positive definite.*-1"),
        ({"river": [1.0, 0.0]}, "`river`.*orthogonal"),
        ({"bend": (1.0, np.nan)}, "`bend`.*nan"),
        ({"normals": [[1, 0, 0]], "center": [0, 0, 0], "bend": (1.0, 1.0)}, r"`bend`.*\(1, 3\)"),
        ({"limit": 0}, "`limit`.*0"),
        ({"step": -1.0}, "`step`.*-1.0"),
        ({"saturation": 0.0}, "`saturation`.*0.0"),
    ],
)
def test_bad_valleys_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        Valley(**(GOOD | change))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda v: v.loss([0.0]), r"`x`.*2 coordinates.*\(1,\)"),
        (lambda v: v.loss([0.0, np.inf]), "`x`.*inf"),
        (lambda v: v.ste([[0.0, 0.0]], lr=0.1, steps=1), r"`x` must be one point.*\(1, 2\)"),
        (lambda v: v.ste([0.0, 0.0], lr=0.0, steps=1), "`lr`.*0.0"),
        (lambda v: v.ste([0.0, 0.0], lr=0.1, steps=-1), "`steps`.*-1"),
        (lambda v: v.ste([0.0, 0.0], lr=0.1, steps=10**9), "`steps`.*1000000000"),
        (lambda v: v.gptq([0.0, 0.0], np.zeros((2, 2))), "`hessian`.*smallest eigenvalue of 0"),
        (lambda v: v.gptq([0.0, 0.0], np.eye(3)), r"`hessian`.*\(3, 3\)"),
        (lambda v: v.cvp([0.0, 0.0], np.eye(2), reach=-1), "`reach`.*-1"),
        (lambda v: v.cvp([0.0, 0.0], np.eye(2), reach=10_000), "`reach`.*4e[+]08"),
    ],
)
def test_bad_arguments_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(Valley(**GOOD))


def test_a_diverging_run_says_so():
    v = Valley([[1.0, 0.0]], [0.3, 0.0], 0.1, wall="quadratic", slope=100.0)
    with pytest.raises(ValueError, match=r"`lr`.*diverges at step \d+"):
        v.ste([1.2, 0.0], lr=1.0, steps=1000)

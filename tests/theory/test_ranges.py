"""Sweeps agree with single solves; the best range is not beaten by its neighbours."""

import numpy as np
import pytest

from stepwell.theory import Problem, Staircase, best_range, closure, plateau, sweep

P = Problem(Staircase(2, 2.0), lr=0.1, label_noise=0.2)


def test_a_sweep_is_many_single_solves():
    found = sweep(P, 40.0, bits=np.arange(2, 4), ranges=[0.8, 2.0])
    assert found.bits == (2, 3)
    t = np.concatenate([[0.0], np.geomspace(0.04, 40, 400)])
    for row, bits in enumerate((2, 3)):
        for column, omega in enumerate((0.8, 2.0)):
            single = closure(Problem(Staircase(bits, omega), lr=0.1, label_noise=0.2), t)
            assert found.error[row, column] == single.error[-1]
            assert found.l10[row, column] == plateau(single).l10
            assert found.status[row][column] == single.status
    assert found.status[0][0] == "runaway"
    np.testing.assert_array_equal(found.best(), found.ranges[np.argmin(found.error, axis=1)])


@pytest.mark.parametrize("theory", ["closure", "exact"])
def test_the_best_range_beats_every_range_nearby(theory):
    from stepwell.theory import exact

    solve = closure if theory == "closure" else exact
    found = best_range(P, 15.0, theory=theory, ranges=np.linspace(0.6, 3.0, 7))
    assert np.all(np.diff(found.ranges) > 0)
    assert found.error == found.errors.min()
    assert float(found) == found.range
    for omega in np.linspace(0.7, 2.9, 5):
        assert solve(Problem(Staircase(2, float(omega)), lr=0.1, label_noise=0.2), [15.0]).error[0] >= found.error - 1e-9


def test_the_best_range_of_one_bit_with_a_gaussian_teacher():
    # E|g| = .798 minimises 1 - 2 omega E|g| + omega^2 once signs are right: what the closure runs to
    p = Problem(Staircase(1, 1.0), lr=0.3, teacher="gauss")
    assert best_range(p, 1e5).range == pytest.approx(np.sqrt(2 / np.pi), abs=0.02)


def test_bad_input():
    with pytest.raises(ValueError, match=r"above 0: got -1\.0"):
        best_range(P, -1.0)
    with pytest.raises(ValueError, match="whose range can vary"):
        best_range(Problem(None), 1.0)
    with pytest.raises(ValueError, match=r"`range` .*got -0\.5"):
        sweep(P, 10.0, bits=[2], ranges=[-0.5, 1.0])


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ({"bits": [0]}, r"`bits` .*from 1 to 16: got \[0\]"),
        ({"bits": [2.7]}, r"`bits` .*whole numbers.*got \[2\.7\]"),
        ({"bits": []}, r"`bits` must be one or more.*got \[\]"),
        ({"bits": [True]}, r"`bits` .*got \[True\]"),
        ({"ranges": []}, r"`ranges` must be .*non-empty.*got shape \(0,\)"),
        ({"theory": "closur"}, "`theory` must be 'exact' or 'closure': got 'closur'"),
    ],
)
def test_a_sweep_over_nothing_is_refused(arguments, shown):
    with pytest.raises(ValueError, match=shown):
        sweep(P, 10.0, **{"bits": [2], "ranges": [1.0], **arguments})


def test_the_search_refuses_an_unknown_theory_and_no_ranges():
    with pytest.raises(ValueError, match="`theory` must be 'exact' or 'closure': got 'closur'"):
        best_range(P, 10.0, theory="closur")
    with pytest.raises(ValueError, match=r"`ranges` must be .*non-empty"):
        best_range(P, 10.0, ranges=[])


@pytest.mark.parametrize("horizon", ["x", True, None])
def test_a_horizon_that_is_no_number_is_refused(horizon):
    with pytest.raises(TypeError, match=f"`horizon` must be a number.*got {horizon!r}"):
        best_range(P, horizon)
    with pytest.raises(TypeError, match=f"`horizon` must be a number.*got {horizon!r}"):
        sweep(P, horizon, bits=[2], ranges=[1.0])


def test_no_scan_finds_a_deeper_valley_than_the_search():
    p = Problem(Staircase(3, 2.0), lr=0.1)
    found = best_range(p, 80.0)
    scan = [closure(Problem(Staircase(3, float(omega)), lr=0.1), [80.0]).error[0] for omega in np.linspace(0.1, 8.0, 300)]
    assert found.error <= min(scan)
    assert not found.on_edge


def test_a_result_on_the_edge_of_the_search_is_said():
    inside = best_range(P, 15.0, ranges=np.linspace(0.6, 4.0, 9))
    assert not inside.on_edge
    assert best_range(P, 15.0, ranges=[inside.range + 0.1, inside.range + 0.2]).on_edge

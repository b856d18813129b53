"""Thresholds and confinement against the dynamics themselves."""

from math import erfc, sqrt

import pytest
from tests.theory.rows import ROWS

from stepwell.theory import Problem, Staircase, exact, stability, unquantized

TWO = Staircase(2, 2.0)


@pytest.mark.parametrize("problem", [Problem(None), Problem(None, TWO), Problem(None, TWO, weight_decay=0.4)])
@pytest.mark.parametrize("factor", [0.99, 1.01])
def test_unquantized_training_diverges_exactly_beyond_the_threshold(problem, factor):
    lr = factor * stability(problem).linear_threshold
    p = Problem(None, problem.inputs, lr=lr, weight_decay=problem.weight_decay, label_noise=0.1)
    late = unquantized(p, [0.0, 1000.0, 2000.0]).error
    assert stability(p).linear_stable == stability(p).stable == (factor < 1)
    assert (late[2] < 1.01 * late[1]) == (factor < 1)


def test_quantization_confines_where_the_linear_model_diverges():
    p = ROWS["P7"].problem
    found = stability(p)
    assert (found.linear_stable, found.stable, found.confined, found.runaway) == (False, True, True, 0.0)
    assert exact(p, [20.0, 40.0]).error == pytest.approx([0.489, 0.489], abs=1e-3)


def test_lotion_shares_the_linear_threshold():
    assert not stability(Problem(TWO, method="lotion", lr=2.1)).stable
    assert stability(Problem(TWO, method="lotion", lr=1.9)).stable


def test_runaway_fractions():
    assert stability(ROWS["P6"].problem).runaway == 1.0
    assert stability(ROWS["P1"].problem).runaway == 0.0
    assert stability(ROWS["P5"].problem).runaway == pytest.approx(erfc(1 / sqrt(2)))
    assert stability(Problem(Staircase(1, 1.0), lr=0.3, teacher="gauss", weight_decay=0.1)).runaway == 0.0
    assert stability(Problem(Staircase(1, 1.0), method="clipped_ste", teacher="gauss")).runaway == 0.0

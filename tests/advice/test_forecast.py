"""The packaged formulas and the rule that turns estimates into a verdict."""

import json
import math
from importlib.resources import files

import pytest

from stepwell.advice.forecast import Coefficients, Estimate, Evidence, Forecast, four_terms, packaged
from stepwell.advice.verdict import decide, safe

RTN = Estimate("RTN", 0.4, 0.35, 0.45, True)
GPTQ = Estimate("GPTQ", 0.2, 0.18, 0.22, True)


def coefficients(**forecasts):
    return Coefficients(0.003, 0.1, forecasts, {}, {}, (), {})


def test_formula_is_a_product_of_powers():
    formula = Forecast("train", math.log(2.0), {"gptq": 0.5, "rate": -1.0}, 3.0)
    found = coefficients(probes=formula).estimates(Evidence(1.0, 0.1, RTN, GPTQ))[2]
    assert found == pytest.approx(("train", *(2 * 0.2**0.5 * 10 * f for f in (1, 1 / 3, 3)), False))


def test_the_early_formula_is_used_where_there_was_an_early_run():
    both = coefficients(probes=Forecast("train", 0.0, {"gptq": 1.0}, 2.0), early=Forecast("train", 0.0, {"early": 1.0}, 2.0))
    assert both.estimates(Evidence(1.0, 0.1, RTN, GPTQ))[2].increase == pytest.approx(0.2)
    assert both.estimates(Evidence(1.0, 0.1, RTN, GPTQ, 0.07))[2].increase == pytest.approx(0.07)


def test_below_the_floor_nothing_is_told_apart():
    formula = coefficients(probes=Forecast("train", 0.0, {"gptq": 1.0}, 2.0))
    for value in (-0.1, 0.0, 0.002):
        found = formula.estimates(Evidence(1.0, 0.1, RTN, GPTQ._replace(increase=value)))[2]
        assert found == ("train", 0.003, 0.0, 0.006, False)


def test_increases_without_end_do_not_break_the_forecast():
    lost = RTN._replace(increase=math.inf, low=math.inf, high=math.inf)
    for evidence in (
        Evidence(3.0, 1e-3, lost, lost),
        Evidence(3.0, 1e-3, lost, lost, math.inf),
        Evidence(0.0, 1e-3),
        Evidence(math.inf, 1e-3),
    ):
        for found in packaged().estimates(evidence):
            assert found.low <= found.increase <= found.high
            assert found.method != "train" or math.isfinite(found.high)


@pytest.mark.parametrize(
    ("tolerance", "method", "increase", "sure"),
    [
        (0.5, "RTN", 0.4, "RTN"),
        (0.45, "RTN", 0.4, "RTN"),
        (0.4, "uncertain", 0.4, "GPTQ"),
        (0.35, "uncertain", 0.4, "GPTQ"),
        (0.3, "GPTQ", 0.2, "GPTQ"),
        (0.2, "uncertain", 0.2, "train"),
        (0.1, "train", 0.05, "train"),
        (0.05, "uncertain", 0.05, None),
        (0.01, "not reachable", 0.05, None),
    ],
)
def test_first_method_that_is_surely_enough_is_taken(tolerance, method, increase, sure):
    estimates = [RTN, GPTQ, Estimate("train", 0.05, 0.02, 0.1, False)]
    found, deciding = decide(estimates, tolerance)
    assert (found, deciding.increase, safe(estimates, tolerance)) == (method, increase, sure)


@pytest.mark.parametrize(("share", "method"), [(1.0, "uncertain"), (0.6, "uncertain"), (0.4, "GPTQ"), (0.0, "GPTQ")])
def test_a_part_of_the_interval_may_decide(share, method):
    # GPTQ leaves 0.2, 0.18 to 0.22: at 0.21 half of its upper arm is in the way
    assert decide([RTN, GPTQ], 0.21, share=share)[0] == method
    # a forecast of 0.05, 0.02 to 0.125 (a factor of 2.5): with half of it on the scale of factors, up to 0.05 * sqrt(2.5) = 0.079
    train = Estimate("train", 0.05, 0.02, 0.125, False)
    assert train.narrowed(0.5)[2:4] == pytest.approx((0.05 / 2.5**0.5, 0.05 * 2.5**0.5))
    assert train.narrowed(1.0) == train
    assert safe([RTN, GPTQ], 0.21) is None


def test_older_formula_is_a_product_of_powers_with_a_floor():
    assert four_terms(1.0, 1.0, 1.0) == pytest.approx(math.exp(-0.79))
    for place, power in enumerate((0.61, 0.59, -0.28)):
        arguments = [0.2, 0.3, 1.5]
        before = four_terms(*arguments)
        arguments[place] *= 2
        assert four_terms(*arguments) / before == pytest.approx(2**power)
    assert four_terms(-1.0, 0.2, 2.6) == four_terms(0.003, 0.2, 2.6)


def test_packaged_file_answers_everything_that_is_asked():
    held = packaged()
    known = {"early", "gptq", "rtn", "rho_fn", "rate"}
    assert set(held.forecasts) == {"RTN", "GPTQ", "train", "probes", "early"}
    assert all(set(one.powers) <= known and one.factor > 1 for one in held.forecasts.values())
    for tier in ("width", "probes", "early"):
        for tolerance in (0.05, 0.1, 0.3):
            found = held.score(tier, tolerance)
            assert (found.tolerance, found.tier) == (tolerance, tier)
            assert 0 <= found.hits <= 1
            assert 0 <= found.uncertain <= 1
    assert held.score("probes", 0.02).tolerance == 0.05
    assert set(held.shares) == {"width", "probes", "early"}
    assert all(0 <= share <= 1 for share in held.shares.values())
    assert set(held.ranges) == {"rate", "steps", "weights", "rho_fn"}
    assert all(low <= high for low, high in held.ranges.values())
    assert held.provenance["networks"]
    assert json.loads(files("stepwell.advice").joinpath("coefficients.json").read_text())["floor"] == held.floor

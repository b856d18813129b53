"""The fit and the scores behind the advisor: a law is found again, no network is judged by a fit that saw it, the file is the fit."""

import csv
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from stepwell.advice.forecast import parsed

PAPER = Path(__file__).parents[2] / "papers" / "basin"
RUNS = PAPER / "results" / "runs.csv"
SCRIPTS = ("shared", "fitting", "answers", "advisor")


@pytest.fixture(scope="module")
def paper():
    """The scripts, imported as they import each other."""
    held = {name: sys.modules.pop(name) for name in SCRIPTS if name in sys.modules}
    sys.path.insert(0, str(PAPER))
    try:
        import advisor
        import fitting

        yield advisor, fitting
    finally:
        sys.path.remove(str(PAPER))
        for name in SCRIPTS:
            sys.modules.pop(name, None)
        sys.modules.update(held)


def synthetic(fitting, *, seed=0, networks=12, noise=0.15):
    """Runs that follow a known law, with an offset per network and noise per run."""
    rng, found = np.random.default_rng(seed), []
    for number in range(networks):
        offset, size = rng.normal(0, noise), math.exp(rng.normal(0, 0.3))
        for scheme, bits, rate in [(s, b, r) for s in ("a", "b") for b in (8, 4, 3, 2) for r in (3e-4, 1e-3, 4e-3)]:
            rho = size * {8: 0.05, 4: 0.6, 3: 1.4, 2: 3.5}[bits] * (1.2 if scheme == "b" else 1)
            rtn = 0.1 * rho**2 * math.exp(rng.normal(0, 0.2))
            gptq = 0.3 * rtn * math.exp(rng.normal(0, 0.3))
            d10 = 0.8 * gptq**0.9 * math.exp(rng.normal(0, 0.2))
            log = -3.0 + 0.5 * math.log(max(gptq, 0.003)) + 0.3 * math.log(max(rho, 0.003)) - 0.3 * math.log(rate / 1e-3)
            qat = math.exp(log + offset + rng.normal(0, noise))
            moved = lambda value: value * math.exp(rng.normal(0, 0.03))  # noqa: E731
            numbers = (
                bits,
                9000,
                rate,
                240,
                rtn,
                0.02 * rtn,
                moved(rtn),
                gptq,
                0.02 * gptq,
                moved(gptq),
                rho,
                d10,
                d10,
                d10,
                qat,
                moved(qat),
            )
            found.append(fitting.Run(f"net-{number}", f"kind-{number % 4}", scheme, *numbers))
    return found


def test_the_fit_finds_the_law_again(paper):
    _, fitting = paper
    runs = synthetic(fitting, networks=60, noise=0.05)
    found = fitting.fit("probes", runs)
    # GPTQ, RTN and rho_fn go together, so the ridge shares their effect among them; the prediction is what must be right
    assert found.powers["rate"] == pytest.approx(-0.3, abs=0.02)
    truth = [math.log(max(run.qat_heldout, 0.003)) for run in fitting.usable("probes", runs)]
    guess = [math.log(found(fitting.seen("probes", run), 0.003).increase) for run in fitting.usable("probes", runs)]
    assert np.std(np.subtract(truth, guess)) < 0.1


def test_the_fit_weighs_networks_not_runs(paper):
    _, fitting = paper
    runs = synthetic(fitting)
    doubled = runs + [run for run in runs if run.network == "net-3"] * 5
    one, other = fitting.fit("early", runs), fitting.fit("early", doubled)
    assert other.intercept == pytest.approx(one.intercept)
    assert other.powers == pytest.approx(one.powers)


def test_ridge_is_what_the_normal_equations_say(paper):
    _, fitting = paper
    runs = synthetic(fitting, networks=5)
    found, rows = fitting.fit("train", runs), fitting.usable("train", runs)
    from scipy.optimize import minimize

    x = np.log([[run.rho_fn, run.rate] for run in rows])
    y, mass = np.log([max(run.qat_heldout, 0.003) for run in rows]), fitting.masses(rows)
    centre = mass @ x
    spread = np.sqrt(mass @ (x - centre) ** 2)

    def cost(b):
        return mass @ (y - b[0] - (x - centre) / spread @ b[1:]) ** 2 + fitting.RIDGE * b[1:] @ b[1:]

    best = minimize(cost, np.zeros(3), tol=1e-12).x
    assert list(found.powers.values()) == pytest.approx(best[1:] / spread, rel=1e-4)
    assert found.intercept == pytest.approx(best[0] - centre @ (best[1:] / spread), rel=1e-4)


def test_interval_covers_networks_that_were_left_out_twice(paper):
    _, fitting = paper
    inside = []
    for seed in range(4):
        runs = synthetic(fitting, seed=seed, networks=16, noise=0.3)
        for _, others, mine in fitting.left_out(runs, "network"):
            formula = fitting.forecast("probes", others)
            tested = fitting.asked("probes", fitting.usable("probes", mine))
            inside += [abs(fitting.residual("probes", formula, run)) <= math.log(formula.factor) for run in tested]
    # 64 networks: a binomial of 90 % has a standard error of .037 where all runs of a network go together
    assert 0.8 <= np.mean(inside) <= 0.98


@pytest.mark.parametrize("split", ["network", "architecture"])
def test_no_network_is_judged_by_a_fit_that_saw_it(paper, split, monkeypatch):
    advisor, fitting = paper
    runs, seen = synthetic(fitting, networks=5), []
    original = advisor.coefficients
    monkeypatch.setattr(advisor, "coefficients", lambda others: seen.append({getattr(run, split) for run in others}) or original(others))
    judged = list(advisor.cases_of(runs, split))
    everything = {getattr(run, split) for run in runs}
    assert sorted(map(len, seen)) == [len(everything) - 1] * len(everything)
    assert len({frozenset(one) for one in seen}) == len(everything)
    # what training made of a network changes its own answer, never its own verdict
    spoiled = [run._replace(qat=9.0, qat_heldout=9.0) if run.network == "net-2" else run for run in runs]
    again = list(advisor.cases_of(spoiled, split))
    mine = [(one, other) for one, other in zip(judged, again, strict=True) if one.run.network == "net-2"]
    assert [one.advised for one, _ in mine] == [other.advised for _, other in mine]
    assert [one.predicted for one, _ in mine] == [other.predicted for _, other in mine]
    assert any(one.cheapest != other.cheapest for one, other in mine)


def test_an_answer_is_as_sure_as_it_has_to_be_to_be_right_elsewhere(paper):
    # The share chosen is the smallest of an unbroken row of shares with 98 % right: counted here for it, and for the next one below.
    _, fitting = paper
    answers, runs = sys.modules["answers"], synthetic(fitting, networks=6, noise=0.3)
    found, rights = answers.shares(runs), {}
    for share in (1.0, found["probes"], found["probes"] - 0.05):
        cases = []
        for name in sorted({run.network for run in runs}):
            fitted = answers.replace(answers.formulas([run for run in runs if run.network != name]), shares={"probes": share})
            cases += answers.judged(fitted, answers.standard([run for run in runs if run.network == name]), "network", ("probes",))
        given = [case for case in cases if case.advised != "uncertain"]
        rights[share] = np.mean([case.advised == case.cheapest for case in given])
    assert 0 < found["probes"] <= 1
    assert rights[found["probes"]] >= 0.98 or found["probes"] == 1
    assert rights[found["probes"] - 0.05] < 0.98


def test_scores_are_counted_right(paper):
    advisor, fitting = paper
    cheapest = sys.modules["answers"].cheapest
    run = synthetic(fitting, networks=1)[0]._replace(rtn_heldout=0.3, gptq_heldout=0.05, qat_heldout=0.01)
    answers = ["GPTQ", "GPTQ", "RTN", "train", "uncertain"]
    cases = [advisor.Case("network", "probes", 0.1, run, answer, cheapest(run, 0.1), "train", 0.0, 0.0, 0.0) for answer in answers]
    row = dict(zip(advisor.SCORES, advisor.scored(cases), strict=True))
    assert (row["configurations"], row["hits"], row["uncertain"], row["safe"]) == (5, 0.5, pytest.approx(0.2), 0.75)
    assert (row["named"], row["named_met"]) == (1.0, 1.0)
    assert [cheapest(run, tolerance) for tolerance in (0.3, 0.1, 0.04, 0.001)] == ["RTN", "GPTQ", "train", "not reachable"]


def test_configurations_are_judged_at_the_rate_nearest_to_the_default(paper):
    advisor, fitting = paper
    runs = synthetic(fitting, networks=2)
    kept = advisor.standard(runs)
    assert len(kept) == 2 * 2 * 4
    assert {run.rate for run in kept} == {1e-3}


def test_packaged_text_is_read_back_as_what_was_fitted(paper):
    advisor, fitting = paper
    runs = synthetic(fitting, networks=6)
    scores = [advisor.scored(group) for group in advisor.groups(list(advisor.cases_of(runs, "network")))]
    held = parsed(advisor.packaged(runs, scores, b"table"))
    assert held.forecasts["early"].powers == pytest.approx(fitting.forecast("early", runs).powers, rel=1e-5)
    assert len(held.scores) == 9
    assert held.score("probes", 0.1).configurations == 6 * 8
    assert held.provenance["rows"] == len(runs)


def test_the_script_writes_its_tables_and_the_file(paper, monkeypatch, tmp_path, capsys):
    advisor, fitting = paper
    for module in (advisor, sys.modules["shared"]):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(advisor, "PACKAGED", tmp_path / "coefficients.json")
    runs = synthetic(fitting, networks=5)
    sys.modules["shared"].write("runs.csv", fitting.Run._fields, runs)
    advisor.main()
    tables = {}
    for name in ("scores", "confusion", "forecasts", "verdicts"):
        with (tmp_path / f"advisor_{name}.csv").open(newline="") as file:
            tables[name] = list(csv.DictReader(file))
    assert len(tables["scores"]) == 2 * 3 * 3
    counted = sum(int(row["count"]) for row in tables["confusion"])
    assert counted == sum(int(row["configurations"]) for row in tables["scores"]) == 2 * 3 * 3 * 5 * 8
    right = sum(int(row["count"]) for row in tables["confusion"] if row["advised"] == row["cheapest"] and row["split"] == "network")
    answered = sum(int(row["count"]) for row in tables["confusion"] if row["advised"] != "uncertain" and row["split"] == "network")
    rates = [(float(row["hits"]), float(row["uncertain"])) for row in tables["scores"] if row["split"] == "network"]
    assert right / answered == pytest.approx(sum(h * (1 - u) for h, u in rates) / sum(1 - u for _, u in rates), rel=1e-4)
    assert {row["forecast"] for row in tables["forecasts"]} >= {"train", "probes", "early", "four terms, unchanged"}
    assert len(tables["verdicts"]) == 2 * 3 * 5 * 8
    assert parsed((tmp_path / "coefficients.json").read_text()).score("early", 0.1).networks == 5
    assert "Hit rate on held-out data" in capsys.readouterr().out


def test_missing_fields_are_not_numbers(paper):
    _, fitting = paper
    row = dict.fromkeys(fitting.Run._fields, "") | {
        "network": "n",
        "architecture": "a",
        "scheme": "s",
        "bits": "8",
        "weights": "10",
        "rtn": "0.5",
    }
    run = fitting.parsed([row])[0]
    assert (run.rtn, run.bits) == (0.5, 8)
    assert math.isnan(run.qat)
    assert fitting.usable("probes", [run]) == []


def test_shipped_file_is_the_fit_of_the_committed_runs(paper):
    advisor, fitting = paper
    with RUNS.open(newline="") as file:
        runs = fitting.parsed(csv.DictReader(file))
    scores = [advisor.scored(group) for group in advisor.groups(list(advisor.cases_of(runs, "network")))]
    fresh, shipped = json.loads(advisor.packaged(runs, scores, RUNS.read_bytes())), json.loads(advisor.PACKAGED.read_text())
    assert fresh["provenance"] == shipped["provenance"]
    assert fresh["shares"] == pytest.approx(shipped["shares"])
    for name, one in shipped["forecasts"].items():
        assert fresh["forecasts"][name]["powers"] == pytest.approx(one["powers"], rel=1e-4, abs=1e-6)
        assert fresh["forecasts"][name]["intercept"] == pytest.approx(one["intercept"], rel=1e-4)
        assert fresh["forecasts"][name]["factor"] == pytest.approx(one["factor"], rel=1e-4)
    for one, other in zip(fresh["scores"], shipped["scores"], strict=True):
        assert one == pytest.approx(other)

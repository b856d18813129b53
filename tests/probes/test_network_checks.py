"""The reference numbers of the specification on digits networks, line by line, with new seeds: six networks, three schemes, four widths.

Straight-through training runs under a `Log`, on scales that stay where they were fitted to the float weights; what is outside, which way
the gradients point and where the latent weights end is read off its looks. The bounds are the specification's. `test_digits` checks the
same claims on two networks in every run of the suite.
"""

import copy
import math
import statistics
from dataclasses import dataclass

import pytest
import torch
from tests.probes.test_digits import STEPS, TOLERANCE, WIDTHS, fit, on
from torch.nn.functional import cross_entropy

import stepwell as sw
from stepwell.probes.inward import auc

pytest.importorskip("sklearn")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

SEEDS = {"mlp": (41, 42, 43), "deep": (44, 45, 46)}
SCHEMES = {
    "tensor mse": {"block": None, "scale": "mse"},
    "channel mse": {"block": "channel", "scale": "mse"},
    "tensor absmax": {"block": None},
}
BITS = (8, 4, 3, 2)


@dataclass
class Case:
    """One network on one grid; increases are over the float network's loss on the probe set."""

    net: str
    scheme: str
    bits: int
    rtn: float
    rho: float
    log: sw.probes.Log
    box: float = math.nan
    control: float = math.nan

    @property
    def fails(self):
        return self.rtn > TOLERANCE

    @property
    def qat(self):
        return self.log.looks[-1].loss - self.log.start

    @property
    def later(self):
        return [look for look in self.log.looks if look.step >= 1]


def held(model, q):
    """One method per weight, whose scales are those fitted to the float weights and stay there."""
    if q.block == "channel":
        return sw.ste(q)  # searched scales are held by the run until `refit`
    return {name: sw.ste(sw.intn(q.format.bits, block=None, scale=one.scales.item())) for name, one in sw.probes.rounded(model, q).items()}


def measured(net, model, scheme, bits, data):
    q, probe = sw.intn(bits, **SCHEMES[scheme]), on(data.train)

    def train(model, step):
        chosen = torch.randint(len(data.train.labels), (100,), generator=torch.Generator().manual_seed(step))
        return cross_entropy(model(data.train.pixels[chosen]), data.train.labels[chosen])

    q0 = sw.probes.rounded(model, q)
    rho = sw.probes.rho_uniform(model, probe, toward=q0).value
    trained = copy.deepcopy(model)
    optimizer = torch.optim.Adam(trained.parameters(), lr=1e-3)
    run = sw.attach(trained, held(model, q), optimizer, refit=10**6)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    log = sw.probes.Log(run, probe, reference=model.state_dict(), tolerance=TOLERANCE)
    for step in range(STEPS):
        optimizer.zero_grad()
        train(trained, step).backward()
        optimizer.step()
        schedule.step()
    run.finalize()
    case = Case(net, scheme, bits, log.rounded - log.start, rho, log)
    assert log.looks[0].loss == log.rounded  # the run's grid is that of the rounded float weights
    if case.fails:
        case.box = sw.probes.box_qat(model, probe, around=q0, train=train, steps=STEPS).loss - log.start
        case.control = sw.probes.control(model, probe, around=q0, train=train, steps=STEPS).loss - log.start
    return case


@pytest.fixture(scope="module")
def cases():
    from stepwell.train.data import load_digits

    data = load_digits()
    nets = [(net, fit(WIDTHS[net], seed, data.train)) for net, seeds in SEEDS.items() for seed in seeds]
    return [measured(net, model, scheme, bits, data) for net, model in nets for scheme in SCHEMES for bits in BITS]


def failures(cases):
    return [case for case in cases if case.fails]


def recovered(cases):
    return [case for case in failures(cases) if case.qat <= TOLERANCE]


def outside(cases):
    return [look for case in cases for look in case.later if look.outside]


def share(flags):
    return statistics.mean(map(float, flags))


def removed(cases, key):
    return statistics.median(1 - getattr(case, key) / case.rtn for case in failures(cases))


def area(cases):
    looks = [look for case in cases for look in case.later]
    return auc(*([look.projection for look in looks if look.outside is side] for side in (True, False)))


CHECKS = {
    "8 bits, largest change of the loss by RTN": (lambda c: max(abs(x.rtn) for x in c if x.bits == 8), 0, 0.02),
    "deep, 3 bits, share of RTN failures": (lambda c: share(x.fails for x in c if (x.net, x.bits) == ("deep", 3)), 8 / 9, 1),
    "deep, per channel 3 bits, QAT increase over RTN increase": (
        lambda c: statistics.mean(x.qat / x.rtn for x in c if (x.net, x.scheme, x.bits) == ("deep", "channel mse", 3)),
        -math.inf,
        0.25,
    ),
    "share of the damage that QAT removes, median": (lambda c: removed(c, "qat"), 0.75, math.inf),
    "box QAT increase over QAT increase, median": (
        lambda c: statistics.median(x.box / x.qat for x in failures(c) if x.qat > 0),
        0.8,
        1.3,
    ),
    "float training and RTN within tolerance": (lambda c: share(x.control <= TOLERANCE for x in failures(c)), 0, 0.05),
    "share of the damage that float training removes, median": (lambda c: removed(c, "control"), -math.inf, 0.2),
    "gradient at the rounded weights points inwards, outside": (lambda c: share(x.cosine > 0 for x in outside(c)), 0.95, 1),
    "gradient at the latent weights points inwards, outside": (lambda c: share(x.latent_cosine > 0 for x in outside(c)), 0, 0.75),
    "AUC of the projection for being outside": (area, 0.8, 1),
    "AUC of rho_uniform for RTN failure": (lambda c: auc([x.rho for x in c if x.fails], [x.rho for x in c if not x.fails]), 0.93, 1),
    "accuracy of rho_uniform above 1": (lambda c: share((x.rho > 1) == x.fails for x in c), 0.85, 1),
    "latent loss above the deployed one, recovered failures": (
        lambda c: share(x.log.looks[-1].latent_loss > x.log.looks[-1].loss for x in recovered(c)),
        0.8,
        1,
    ),
    "codes within one step of RTN after QAT, least": (lambda c: min(x.log.looks[-1].near for x in failures(c)), 0.97, 1),
}


@pytest.mark.parametrize("name", CHECKS)
def test_reference_number_of_the_specification(cases, name):
    value, low, high = CHECKS[name]
    found = value(cases)
    print(f"{name}: {found:.4f}, accepted {low:.4g} to {high:.4g}")
    assert low <= found <= high


def test_the_study_is_large_enough_to_say_something(cases):
    assert len(cases) == 72
    assert len(failures(cases)) >= 25
    assert len(recovered(cases)) >= 10
    assert len(outside(cases)) >= 100

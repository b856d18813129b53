"""Published-style reference rows: settings with the error at given times, from independent solvers, and what is known beside it.

The tolerances belong to the rows: closure 1e-4, exact 1e-3 (Gaussian teacher 2e-3), fixed points 1e-4, plateau lengths 2 %.
"""

from dataclasses import dataclass

from stepwell.theory import Problem, Staircase


@dataclass(frozen=True)
class Row:
    problem: Problem
    times: tuple[float, ...]
    exact: tuple[float, ...]
    closure: tuple[float, ...] | None = None
    fixed_exact: float | None = None
    fixed_closure: float | None = None
    l10_exact: float | None = None
    l10_closure: float | None = None

    @property
    def tolerance(self) -> float:
        return 2e-3 if self.problem.teacher == "gauss" else 1e-3


BOTH = Staircase(bits=2, range=2.0)
SMALL = Staircase(bits=2, range=0.5)
FOUR = Staircase(bits=4, range=2.0)

ROWS = {
    "P1": Row(
        Problem(BOTH, BOTH, lr=0.2),
        (0, 2, 5, 10, 20, 40),
        (1.09739, 0.58187, 0.23536, 0.13394, 0.16519, 0.20131),
        (1.09739, 0.60942, 0.25775, 0.13460, 0.15717, 0.20397),
        0.20432, 0.20415, 0.284, 0.311,
    ),
    "P2": Row(
        Problem(Staircase(3, 1.5), lr=0.1, label_noise=0.3),
        (0, 2, 5, 10, 20, 40),
        (0.89886, 0.65482, 0.38890, 0.15870, 0.03623, 0.01288),
        (0.89886, 0.66557, 0.39762, 0.16398, 0.03547, 0.01119),
        0.01287, 0.01276, 0.676, 0.729,
    ),
    "P3": Row(
        Problem(FOUR, FOUR, lr=0.5, label_noise=0.5),
        (0, 0.5, 1, 2, 5, 20),
        (0.93010, 0.67678, 0.49253, 0.26928, 0.07872, 0.05204),
        (0.93010, 0.68013, 0.49574, 0.27141, 0.07840, 0.05195),
        0.05204, 0.05195, 0.157, 0.160,
    ),
    "P4": Row(
        Problem(Staircase(3, 4.0, "tread"), lr=0.1, initial_variance=0.01),
        (0, 2, 5, 7.5, 10, 20),
        (0.50000, 0.49870, 0.41849, 0.29889, 0.21335, 0.16604),
        (0.50000, 0.49847, 0.42645, 0.32170, 0.19939, 0.16666),
        0.16667, 0.16667, 3.83, 3.86,
    ),
    "P5": Row(
        Problem(Staircase(1, 1.0), lr=0.3, label_noise=0.2, teacher="gauss"),
        (0, 1, 2, 5, 10, 20),
        (1.0, 0.7275, 0.5293, 0.3382, 0.3212, 0.3216),
        (1.0, 0.76364, 0.56647, 0.30051, 0.23409, 0.21901),
        0.31731, None, 0.256, 0.325,
    ),
    "P6": Row(
        Problem(SMALL, SMALL, lr=0.1),
        (0, 5, 10, 20, 40, 80),
        (0.51843, 0.48833, 0.45884, 0.40639, 0.34789, 0.33183),
        (0.51843, 0.48977, 0.46174, 0.41201, 0.35359, 0.33237),
        0.33171, 0.33171, 3.10, 3.24,
    ),
    "P7": Row(
        Problem(Staircase(3, 2.0), lr=2.5, label_noise=0.3),
        (0, 0.5, 1, 2, 5, 20),
        (0.97619, 0.85601, 0.69778, 0.54237, 0.48874, 0.48918),
        (0.97619, 0.92238, 0.81972, 0.71912, 0.67069, 0.66905),
        0.48918, 0.66905, 0.313, 0.406,
    ),
    "P8": Row(
        Problem(BOTH, lr=0.2, label_noise=0.3, weight_decay=0.1),
        (0, 2, 5, 10, 20, 40),
        (1.04653, 0.52221, 0.16420, 0.07717, 0.10086, 0.12515),
        (1.04653, 0.55178, 0.19347, 0.07944, 0.09618, 0.12557),
        None, 0.12567, 0.282, 0.308,
    ),
    "P9": Row(
        Problem(Staircase(3, 2.0), method="lotion", lr=0.1),
        (0, 2, 5, 10, 20, 40),
        (0.97619, 0.69580, 0.40817, 0.17425, 0.03306, 0.01050),
        fixed_exact=0.01020,
    ),
    "P10": Row(
        Problem(Staircase(3, 2.0), method="ptq", lr=0.1, label_noise=0.5),
        (0, 2, 5, 10, 20, 40),
        (0.97619, 0.69096, 0.40308, 0.16875, 0.03379, 0.01722),
        (0.97619, 0.69096, 0.40308, 0.16875, 0.03379, 0.01722),
        0.01892, 0.01892,
    ),
    "P11": Row(
        Problem(BOTH, method="clipped_ste", lr=0.2, label_noise=0.3),
        (0, 2, 5, 10, 20, 40),
        (1.04653, 0.59794, 0.30801, 0.24114, 0.27767, 0.29513),
    ),
}  # fmt: skip

LATENT = {
    "P9": (1.0, 0.68500, 0.38977, 0.15485, 0.02715, 0.00923),
    "P10": (1.0, 0.68594, 0.39078, 0.15516, 0.02880, 0.00708),
}
RANDOMIZED = {"P9": (1.02721, 0.71111, 0.41538, 0.17915, 0.04374, 0.01236)}

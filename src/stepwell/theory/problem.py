"""Problem: the constants of one solvable model, high-dimensional linear regression with quantized weights and inputs.

Source: Ichikawa, Kashiwamura, Sakata, "High-Dimensional Learning Dynamics of Quantized Models with Straight-Through Estimator"
(arXiv:2510.10693) for the model; the equations are derived again in the modules beside this one.
Symbols: eta = lr, sigma = label_noise, lam = weight_decay, R = teacher_power, m0 = initial_overlap, v0 = initial_variance,
a = E[x phi(x)], rho = E[phi(x)^2] for x ~ N(0, 1), phi = input quantizer, psi = weight quantizer.
"""

from dataclasses import dataclass
from functools import cached_property
from math import inf, sqrt
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from stepwell.theory.gaussian import moments
from stepwell.theory.staircase import Array, Staircase

Method = Literal["ste", "clipped_ste", "lotion", "ptq"]
Teacher = Literal["one", "gauss"]

MIN_LR, MAX_LR, MAX_START = 1e-6, 1e3, 100.0
SMALLEST, LARGEST = 1e-6, 1e6  # of a scale: beyond, squares lose their digits beside the unit variance of the inputs
MAX_FREE_VARIANCE = 1e18  # without a grid nothing has to resolve the start
MAX_SMOOTH_LEVELS = 256


@dataclass(frozen=True)
class Problem:
    """One model: a linear student with rounded weights learns a linear teacher, one fresh sample per step.

    One step is `w += lr / sqrt(d) * e * phi(x) - lr * weight_decay / d * w` with `e = y - psi(w) . phi(x) / sqrt(d)`; time is
    step / d. The start is `w = (initial_overlap / teacher_power) w* + sqrt(initial_variance) z`.

    Attributes:
        weights: the weight quantizer, None if weights are not quantized.
        inputs: the input quantizer, None if inputs are not quantized; its mean on N(0, 1) inputs must be zero.
        method: "ste", "clipped_ste" (no gradient outside the clip range), "lotion" or "ptq" (train in float, then round).
        lr: eta, 1e-6 to 1e3.
        label_noise: sigma, 0 to 1e6, a standard deviation.
        weight_decay: lam, 0 to 1e6.
        teacher: "one" (all w* = sqrt(teacher_power)) or "gauss" (w* ~ N(0, teacher_power)).
        teacher_power: R = E[w*^2], 1e-6 to 1e6.
        initial_overlap: m0 = E[w* w] at the start.
        initial_variance: v0, 0 to 1e12, the variance of w given w* at the start (to 1e18 if weights are not quantized).
        strength: lambda of LOTION, 0 to 1e6; 1 is the exact expected loss under randomized rounding.
        clip: c, 1e-6 to 1e6, where clipped STE gates the gradient; None is the range of `weights`.

    >>> p = Problem(weights=Staircase(bits=2, range=2.0), inputs=Staircase(bits=2, range=2.0), lr=0.2)
    >>> round(p.gain, 6), round(p.power, 6)
    (0.969283, 1.093058)
    """

    weights: Staircase | None
    inputs: Staircase | None = None
    method: Method = "ste"
    lr: float = 0.1
    label_noise: float = 0.0
    weight_decay: float = 0.0
    teacher: Teacher = "one"
    teacher_power: float = 1.0
    initial_overlap: float = 0.0
    initial_variance: float = 1.0
    strength: float = 1.0
    clip: float | None = None

    def __post_init__(self) -> None:
        if self.method not in ("ste", "clipped_ste", "lotion", "ptq"):
            raise ValueError(f"`method` must be 'ste', 'clipped_ste', 'lotion' or 'ptq': got {self.method!r}.")
        if self.teacher not in ("one", "gauss"):
            raise ValueError(f"`teacher` must be 'one' or 'gauss': got {self.teacher!r}.")
        for name, staircase in (("weights", self.weights), ("inputs", self.inputs)):
            if staircase is not None and not isinstance(staircase, Staircase):
                raise TypeError(f"`{name}` must be a Staircase or None: got {staircase!r}. Use `Staircase.of(quantizer)`.")
        _check("lr", self.lr, least=MIN_LR, most=MAX_LR)
        for name in ("label_noise", "weight_decay", "strength"):
            _check(name, getattr(self, name), least=0.0, most=LARGEST)
        _check("initial_variance", self.initial_variance, least=0.0, most=MAX_FREE_VARIANCE if self.weights is None else LARGEST**2)
        _check("teacher_power", self.teacher_power, least=SMALLEST, most=LARGEST)
        # Any m0 agrees with any v0 >= 0, because v0 is the variance *given* the teacher; what is refused is a start out of reach.
        reach = MAX_START * sqrt(self.teacher_power) * max(sqrt(self.teacher_power), sqrt(self.initial_variance))
        _check("initial_overlap", self.initial_overlap, least=-reach, most=reach)
        if self.clip is not None:
            _check("clip", self.clip, least=SMALLEST, most=LARGEST)
        self._check_combination()

    def _check_combination(self) -> None:
        if self.weights is None and self.method != "ste":
            raise ValueError(
                f"`weights` must be a Staircase for method {self.method!r}: got None. Use method 'ste' for unquantized training."
            )
        if self.method == "lotion" and self.weights is not None and self.weights.temperature > 0:
            raise ValueError(f"`weights` must have temperature 0 for method 'lotion': got {self.weights.temperature:g}.")
        if self.clip is not None and self.method != "clipped_ste":
            raise ValueError(f"`clip` must be None for method {self.method!r}: got {self.clip!r}. Use method 'clipped_ste'.")
        for name, staircase in (("weights", self.weights), ("inputs", self.inputs)):
            if staircase is not None and staircase.temperature > 0 and len(staircase.levels) > MAX_SMOOTH_LEVELS:
                raise ValueError(
                    f"`{name}` with temperature {staircase.temperature:g} must have at most {MAX_SMOOTH_LEVELS} levels: got "
                    f"{len(staircase.levels)}. A smeared grid this fine is the identity: use None."
                )
        if self.inputs is not None:
            mean = float(moments(self.inputs, 0.0, 1.0).mean)
            if abs(mean) > 1e-9 * self.inputs.range:
                raise ValueError(
                    f"`inputs` must have mean 0 on N(0, 1) inputs: got E[phi] = {mean:.4g}. Otherwise the output carries a term "
                    "of order sqrt(d) and no limit exists. Use a symmetric grid (kind 'end', 'mid' or 'tread')."
                )

    @cached_property
    def gain(self) -> float:
        """The input coefficient a = E[x phi(x)]."""
        return 1.0 if self.inputs is None else float(moments(self.inputs, 0.0, 1.0).product)

    @cached_property
    def power(self) -> float:
        """The input coefficient rho = E[phi(x)^2]."""
        return 1.0 if self.inputs is None else float(moments(self.inputs, 0.0, 1.0).square)

    @property
    def target(self) -> float:
        """The best weight in units of the teacher, a / rho: training pulls psi(w) towards `target * w*`."""
        return self.gain / self.power

    @property
    def top(self) -> float:
        """The highest level that a weight can reach; infinite if weights are not quantized."""
        return inf if self.weights is None else float(self.weights.levels[-1])

    @property
    def clip_range(self) -> float:
        """Where clipped STE stops: `clip`, or the range of the weights, or infinity for the other methods."""
        if self.method != "clipped_ste" or self.weights is None:
            return inf
        return self.weights.range if self.clip is None else self.clip


def check_times(times: ArrayLike) -> Array:
    """Return `times` as a float array `(times,)`.

    Raises:
        ValueError: not one-dimensional, empty, not finite, negative, or not strictly increasing.
    """
    t = np.atleast_1d(np.asarray(times, dtype=float))
    if t.ndim != 1 or t.size == 0:
        raise ValueError(f"`times` must be a one-dimensional, non-empty array: got shape {np.shape(times)}.")
    if not np.all(np.isfinite(t)) or t[0] < 0:
        raise ValueError(f"`times` must be finite and 0 or above: got values from {np.min(t):g} to {np.max(t):g}.")
    if np.any(np.diff(t) <= 0):
        k = int(np.argmax(np.diff(t) <= 0))
        raise ValueError(f"`times` must be strictly increasing: got {t[k]:g} followed by {t[k + 1]:g}.")
    return t


def _check(name: str, value: float, *, least: float, most: float) -> None:
    """Refuse a number that is not finite or outside its range, showing both."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating | np.integer):
        raise TypeError(f"`{name}` must be a number: got {value!r}.")
    if not least <= value <= most:  # nan compares false
        raise ValueError(f"`{name}` must be finite, from {least:g} to {most:g}: got {value!r}.")

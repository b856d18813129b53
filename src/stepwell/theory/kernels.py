"""Online SGD steps of the simulator, compiled: draw, predict, update, round.

Symbols: `weight` is the latent w, `forward` what the model predicts with (psi(w) for STE, w itself for LOTION and PTQ), `target` the
teacher w*, x a fresh sample, phi(x) the sample the student sees. One step, with B samples in the batch,

    error_b = (w*.x_b - forward.phi(x_b)) / sqrt(d) + sigma xi_b
    w_i    += rate * mean_b(error_b phi(x_bi)) - decay * w_i           rate = eta / sqrt(d), decay = eta lam / d

Everything lives in arrays of d entries that stay in the cache; each loop below is one pass of vector instructions over them.
"""

import math
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from stepwell.theory.normal import BLOCK, FAST, aligned, fill_normal, new_stream
from stepwell.theory.staircase import Array, Staircase

IDENTITY, UNIFORM, TABLE, SMEARED = 0, 1, 2, 3  # no quantizer; rounds by arithmetic; by its thresholds; temperature above 0
STRAIGHT, GATED, SMOOTHED, PLAIN = 0, 1, 2, 3  # how weights move
METHODS = {"ste": STRAIGHT, "clipped_ste": GATED, "lotion": SMOOTHED, "ptq": PLAIN}

_HALF, _ONE, _TWO = np.float32(0.5), np.float32(1), np.float32(2)
_ROOT_TWO = math.sqrt(2.0)
_SPREAD = 8.0  # Phi(-8) = 6e-16: a threshold further away than this many temperatures is passed or not


class Grid(NamedTuple):
    """A staircase as the compiled loops need it."""

    kind: int
    first: np.float32  # UNIFORM: the lowest level
    step: np.float32  # UNIFORM: Delta
    inverse_step: np.float32
    top: np.float32  # UNIFORM: index of the highest level
    thresholds: NDArray[np.float64]
    levels: NDArray[np.float64]
    temperature: float


class Rule(NamedTuple):
    """Constants of one SGD step."""

    method: int  # STRAIGHT, GATED, SMOOTHED or PLAIN
    root_dim: float  # sqrt(d)
    noise: float  # sigma
    rate: float  # eta / (B sqrt(d))
    decay: float  # eta lam / d
    clip: float  # GATED: the gradient passes where |w| <= clip
    pull: float  # SMOOTHED: eta lambda rho / (2 d)
    batch: int  # B


class State(NamedTuple):
    """What one run changes: `(d,)` arrays, and the noise buffers, which are longer (see `normal.BLOCK`)."""

    weight: NDArray[np.floating]  # float32 or float64
    forward: NDArray[np.float32]
    target: NDArray[np.float32]
    gradient: NDArray[np.float32]
    inputs: NDArray[np.float32]  # phi(x)
    normal: NDArray[np.float32]
    bits: NDArray[np.uint32]
    stream: NDArray[np.uint32]


def grid_of(staircase: Staircase | None) -> Grid:
    """Return the compiled form of a staircase, None being the identity."""
    if staircase is None:
        empty, none = np.zeros(0), np.float32(0)
        return Grid(IDENTITY, none, none, none, none, empty, empty, 0.0)
    spacing, levels = staircase.spacing, staircase.levels
    kind = SMEARED if staircase.temperature > 0 else TABLE if spacing is None else UNIFORM
    step = (levels[-1] - levels[0]) / (len(levels) - 1)
    first, delta, inverse, top = map(np.float32, (levels[0], step, 1 / step, len(levels) - 1))
    return Grid(kind, first, delta, inverse, top, np.array(staircase.thresholds), np.array(levels), float(staircase.temperature))


def new_state(weight: Array, teacher: Array, *, samples: np.random.SeedSequence, dtype: type[np.floating]) -> State:
    """Return buffers around copies of `weight` and `teacher`, `(d,)`; `forward` is still to be filled."""
    d = len(weight)
    noise = -(-(d + 1) // BLOCK) * BLOCK
    latent = aligned(d, dtype)
    forward, target, gradient, inputs = (aligned(d, np.float32) for _ in range(4))
    latent[:], target[:] = weight, teacher
    return State(latent, forward, target, gradient, inputs, aligned(noise, np.float32), aligned(noise, np.uint32), new_stream(samples))


@njit(cache=True, nogil=True)
def advance(state: State, steps: int, weights: Grid, inputs: Grid, rule: Rule) -> None:
    """Run `steps` SGD steps; changes every array of `state` but `target`. The last entry of the noise buffer is the label noise."""
    for _ in range(steps):
        for sample in range(rule.batch):
            fill_normal(state.stream, state.bits, state.normal)
            round_into(inputs, state.normal[: state.weight.size], state.inputs)
            error = _residual(state, rule)
            _accumulate(state.gradient, state.inputs, error, sample == 0)
        _update(state.weight, state.gradient, weights, rule)
        if rule.method == STRAIGHT or rule.method == GATED:
            round_into(weights, state.weight, state.forward)
        else:
            _copy(state.weight, state.forward)


@njit(cache=True, nogil=True, fastmath=FAST)
def round_into(grid: Grid, values: NDArray[np.floating], rounded: NDArray[np.float32]) -> None:
    """Write the staircase of `values`, `(d,)`, into `rounded`, `(d,)`."""
    if grid.kind == UNIFORM:
        for i in range(rounded.size):
            index = np.floor((np.float32(values[i]) - grid.first) * grid.inverse_step + _HALF)
            rounded[i] = grid.first + grid.step * min(max(index, np.float32(0)), grid.top)
    elif grid.kind == TABLE:
        # Counting the thresholds below every value is a vector loop; a binary search per value is not, and slower up to ~300 levels.
        rounded[:] = 0
        for threshold in grid.thresholds:
            limit = np.float32(threshold)
            for i in range(rounded.size):
                rounded[i] += np.float32(np.float32(values[i]) > limit)
        for i in range(rounded.size):
            rounded[i] = grid.levels[np.int32(rounded[i])]
    elif grid.kind == SMEARED:
        for i in range(rounded.size):
            rounded[i] = _smeared(grid, float(values[i]))
    else:
        _copy(values, rounded)


@njit(cache=True, nogil=True)
def _smeared(grid: Grid, value: float) -> float:
    """Return l_0 + sum_k step_k Phi((value - theta_k) / T)."""
    low = np.searchsorted(grid.thresholds, value - _SPREAD * grid.temperature)
    high = np.searchsorted(grid.thresholds, value + _SPREAD * grid.temperature)
    rounded = grid.levels[low]
    for k in range(low, high):
        passed = 0.5 * math.erfc((grid.thresholds[k] - value) / (grid.temperature * _ROOT_TWO))
        rounded += (grid.levels[k + 1] - grid.levels[k]) * passed
    return float(rounded)


@njit(cache=True, nogil=True, fastmath=FAST)
def _copy(values: NDArray[np.floating], copy: NDArray[np.float32]) -> None:
    for i in range(copy.size):
        copy[i] = np.float32(values[i])


@njit(cache=True, nogil=True, fastmath=FAST)
def _residual(state: State, rule: Rule) -> np.float32:
    """Return label minus prediction for the sample in the buffers."""
    label, prediction = np.float32(0), np.float32(0)
    for i in range(state.forward.size):
        label += state.target[i] * state.normal[i]
        prediction += state.forward[i] * state.inputs[i]
    return np.float32((label - prediction) / rule.root_dim + rule.noise * state.normal[-1])


@njit(cache=True, nogil=True, fastmath=FAST)
def _accumulate(gradient: NDArray[np.float32], inputs: NDArray[np.float32], error: np.float32, first: bool) -> None:
    if first:
        for i in range(gradient.size):
            gradient[i] = error * inputs[i]
    else:
        for i in range(gradient.size):
            gradient[i] += error * inputs[i]


@njit(cache=True, nogil=True, fastmath=FAST)
def _update(weight: NDArray[np.floating], gradient: NDArray[np.float32], weights: Grid, rule: Rule) -> None:
    """Apply the step in the precision of `weight`."""
    real = weight.dtype.type
    rate, decay, clip, pull = real(rule.rate), real(rule.decay), real(rule.clip), real(rule.pull)
    if rule.method == GATED:
        for i in range(weight.size):
            push = rate * gradient[i] if abs(weight[i]) <= clip else real(0)
            weight[i] += push - decay * weight[i]
    elif rule.method == SMOOTHED and weights.kind == UNIFORM:
        pull *= real(weights.step)
        for i in range(weight.size):
            position = (np.float32(weight[i]) - weights.first) * weights.inverse_step
            fraction = position - np.floor(position)
            weight[i] += rate * gradient[i] - decay * weight[i] - pull * (_ONE - _TWO * fraction)
    elif rule.method == SMOOTHED:
        for i in range(weight.size):
            weight[i] += rate * gradient[i] - decay * weight[i] - pull * _slope(weights, float(weight[i]))
    else:
        for i in range(weight.size):
            weight[i] += rate * gradient[i] - decay * weight[i]


@njit(cache=True, nogil=True)
def _slope(weights: Grid, weight: float) -> float:
    """Return lower + upper - 2 w on the levels, continued beyond their ends with the outermost steps."""
    k = int(np.searchsorted(weights.levels, weight))
    k = min(max(k, 1), weights.levels.size - 1)
    step = weights.levels[k] - weights.levels[k - 1]
    position = (weight - weights.levels[k - 1]) / step
    return float(step * (1 - 2 * (position - math.floor(position))))

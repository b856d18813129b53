"""Soft staircase: the forward pass sees a smoothed staircase whose temperature falls to zero.

Source: the smooth staircase of the STE dynamics paper (arXiv:2510.10693): psi_T(v) = l_0 + sum_k D_k Phi((v - theta_k) / T), the mean of
the staircase over Gaussian noise of standard deviation T; T -> 0 gives rounding to nearest.
Symbols: l = levels, D_k = l_k - l_{k-1}, theta_k = (l_k + l_{k-1}) / 2, Phi = standard normal distribution function, all in grid units.
Differs: there it is a device of the theory at one temperature; the gradient passes straight through, as in the paper's STE.
"""

import math

import torch
from torch import Tensor

from stepwell import grids
from stepwell.formats import Format
from stepwell.methods.base import Context, Method, fitted_apart
from stepwell.methods.ste import check_quantizer
from stepwell.quantizers import Quantizer
from stepwell.schedules import Schedule, scheduled

HOTTEST = 0.5  # grid units, where psi_T of a uniform grid differs from a straight line by 0.2 % of a step
SQRT2 = math.sqrt(2)
SIGMAS = 6  # standard deviations from which on a threshold no longer counts: 1e-9 of a step
NEAR = 3  # thresholds on either side that are nearer at the hottest
MOST = 16  # levels of a grid with unequal steps, whose thresholds are visited one by one


def soft(quantizer: Quantizer, *, temperature: float | Schedule) -> Method:
    """Return straight-through training on a smoothed staircase.

    Args:
        quantizer: the grid.
        temperature: T in grid units (1 is the step of an integer grid), a number or a function of the step such as
            `schedules.exponential(0.5, 0.005, steps=...)`; 0 rounds to nearest, values above 0.5 count as 0.5.

    Raises:
        TypeError: `quantizer` is no Quantizer, or `temperature` neither a number nor a function.
        ValueError: a temperature that is negative or not finite; fp8, whose many unequal steps would be visited one by one.
    """
    check_quantizer(quantizer)
    if not quantizer.format.uniform and len(quantizer.format.values) > MOST:
        raise ValueError(f"`quantizer` must have equal steps or at most {MOST} levels: got {quantizer}. Use `parq`, which visits two.")
    return Method(quantizer, "soft", deploy=smoothed, schedules={"temperature": scheduled("temperature", temperature)})


def smoothed(weight: Tensor, context: Context) -> Tensor:
    """Return what the forward pass sees at the step's temperature."""
    quantizer, fit = context.quantizer, fitted_apart(weight, context)
    near = NEAR
    if weight.is_cpu and not torch.compiler.is_compiling():  # a number that may be looked at: fewer thresholds count when it is cold
        hot = float(context.scheduled["temperature"])
        if hot == 0:
            return quantizer.snap(weight, fit)
        near = min(NEAR, math.ceil(SIGMAS * hot))
    units, format = fit.to_units(weight), quantizer.format
    temperature = context.scheduled["temperature"].clamp(torch.finfo(torch.float32).tiny, HOTTEST)
    target = grids.round_nearest(units, format)
    lift = lift_even(units, target, format, temperature, near) if format.uniform else _lift(units, target, format, temperature)
    # without smoothing ties go where rounding takes them, not half way
    return quantizer.deliver(target + lift * (context.scheduled["temperature"] > 0), fit)


def lift_even(units: Tensor, target: Tensor, format: Format, temperature: Tensor, near: int) -> Tensor:
    """Return psi_T less the rounded weight for a grid of equal steps: each threshold above adds its share, each below takes it away."""
    rest, lift = units - target, torch.zeros_like(units)
    for step in range(near):
        above = _risen(rest - (step + 0.5), temperature) * (target <= format.high - step - 1)
        below = _risen(-rest - (step + 0.5), temperature) * (target >= format.low + step + 1)
        lift = lift + above - below
    return lift


def _lift(units: Tensor, target: Tensor, format: Format, temperature: Tensor) -> Tensor:
    """Return the same for any grid, from all its thresholds."""
    lift = torch.zeros_like(units)
    for low, high in zip(format.values, format.values[1:], strict=False):
        gained = _risen(units - (low + high) / 2, temperature) - (target >= high).to(units.dtype)
        lift = lift + gained * (high - low)
    return lift


def _risen(distance: Tensor, temperature: Tensor) -> Tensor:
    """Return Phi(distance / T)."""
    return torch.erf(distance / (temperature * SQRT2)).add_(1).div_(2)

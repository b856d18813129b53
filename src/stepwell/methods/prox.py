"""Prox-LOTION: after every step of the optimizer a proximal step of LOTION's penalty, which ends with every weight on the grid.

Source: the penalty of Kwun et al., "LOTION" (arXiv:2510.08757), Eq. 3; its proximal map is worked out here. With the optimizer's step
size eta_i as the metric and c_i = strength * eta_i * g_i, the minimum of (u - w)^2 / (2 eta_i) + strength / 2 g_i (u - lower)(upper - u)
over the weight's cell is PARQ's piecewise-affine map with slope 1 - c_i, and the nearest grid value from c_i = 1 on.
Symbols: g = curvature, v = Adam's bias-corrected second moment; eta = lr / (sqrt(v) + eps) under Adam, so that c is about strength * lr *
sqrt(v), and eta = lr where the curvature is not Adam's.
Differs from LOTION: no gradient of the penalty, so no strength is too large; float, rounded and randomly rounded weights agree at the end.
"""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from stepwell.methods.base import Context, Curvature, Method, fitted_in_place, round_nearest
from stepwell.methods.lotion import check_terms
from stepwell.methods.parq import affine
from stepwell.methods.ste import check_quantizer
from stepwell.quantizers import Quantizer
from stepwell.schedules import Schedule, scheduled

EPSILON = 1e-8  # Adam's own, as far as it matters here


def prox(
    quantizer: Quantizer,
    *,
    strength: float | Schedule,
    loss_terms: float | None = None,
    forward: Literal["latent", "nearest"] = "latent",
    curvature: Curvature | None = None,
) -> Method:
    """Return training with LOTION's proximal step.

    Args:
        quantizer: the grid. Weights beyond its range are put on its edge.
        strength: of the penalty in theory's unit, a number or a function of the step. Let it grow, from free weights to frozen ones:
            `schedules.exponential(0.1, 1000, steps=...)`.
        loss_terms: loss terms averaged per optimizer step, as in `lotion`.
        forward: "latent" trains on the latent weights; "nearest" on rounded ones with the straight-through gradient (STE + prox).
        curvature: as in `lotion`.

    Raises:
        TypeError: `quantizer` is no Quantizer, `strength` neither a number nor a function, or `curvature` neither mapping nor function.
        ValueError: a strength or a count of loss terms out of range, or an unknown `forward`.
    """
    check_quantizer(quantizer)
    if forward not in ("latent", "nearest"):
        raise ValueError(f"`forward` must be 'latent' or 'nearest': got {forward!r}.")
    if loss_terms is not None:
        check_terms(loss_terms)
    if curvature is not None and not isinstance(curvature, Mapping) and not callable(curvature):
        raise TypeError(f"`curvature` must be a mapping or a function from parameter name to a tensor: got {type(curvature).__name__}.")
    nearest = forward == "nearest"
    return Method(
        quantizer,
        "ste + prox" if nearest else "prox",
        deploy=round_nearest if nearest else None,
        prox=step,
        curvature=curvature,
        loss_terms=loss_terms,
        schedules={"strength": scheduled("strength", strength)},
        unbiased=True,
    )


def step(weight: Tensor, curvature: Tensor, context: Context) -> Tensor:
    """Return the weight after its proximal step."""
    pull = curvature * (context.scheduled["strength"] * context.loss_terms * context.lr)
    if context.correction is not None:
        pull.div_((curvature * context.correction).sqrt_().add_(EPSILON))
    return affine(weight, context.quantizer, fitted_in_place(weight, context), 1 - pull)

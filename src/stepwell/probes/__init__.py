"""Explaining a model's own loss: how far rounding moves the weights, what lies near, and which way the gradient points."""

from stepwell.probes.box_qat import box_qat
from stepwell.probes.control import control
from stepwell.probes.inward import contrast, inward
from stepwell.probes.latent import latent
from stepwell.probes.live import Log
from stepwell.probes.look import Look
from stepwell.probes.neighbours import neighbours
from stepwell.probes.over import over
from stepwell.probes.plane import plane
from stepwell.probes.points import rounded
from stepwell.probes.quadratic import exact_quadratic, quadratic
from stepwell.probes.rho import rho_cross, rho_fn, rho_layers, rho_self, rho_uniform
from stepwell.probes.segment import segment
from stepwell.probes.width import width

__all__ = [
    "Log",
    "Look",
    "box_qat",
    "contrast",
    "control",
    "exact_quadratic",
    "inward",
    "latent",
    "neighbours",
    "over",
    "plane",
    "quadratic",
    "rho_cross",
    "rho_fn",
    "rho_layers",
    "rho_self",
    "rho_uniform",
    "rounded",
    "segment",
    "width",
]

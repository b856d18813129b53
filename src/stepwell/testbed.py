"""Testbeds: quadratic losses whose rounded loss, smoothed loss and optimum are known exactly, to measure methods against.

Source: the power-law regression and the two-layer network of LOTION (arXiv:2510.08757), without any randomness: h_i = i^-exponent and
w*_i = Phi^-1(frac(i * golden ratio)), i = 1..dim, with Phi the normal distribution function.
Symbols: w* = target, H = Hessian, s_i^2 = variance of randomized rounding; E L(RR(w)) = L(E RR(w)) + 1/2 sum H_ii s_i^2, exact because
roundings are independent and the loss is quadratic.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from stepwell.ptq.exact_scale import exact_scale
from stepwell.ptq.sequential import sequential
from stepwell.quantizers import Quantizer
from stepwell.rounding import Bracket, variance

GOLDEN = 0.6180339887498949
MAX_DENSE = 16_384  # rows of a Hessian that is written down: two gigabytes


@dataclass(frozen=True)
class Testbed:
    """Regression on a power-law spectrum: `L(w) = 1/2 (w - w*)^T H (w - w*)` in float64.

    H is diagonal, or rotated: `C^T diag(h) C` with C the orthonormal DCT-II, which is dense.

    Attributes:
        dim: number of weights.
        exponent: of the spectrum, `h_i = i ** -exponent`.
        rotated: whether the spectrum lies along the cosine basis instead of the weights.
        shift: another draw of the target, `frac(i * golden ratio + shift)`; 0 is the one whose numbers are printed.

    A block that does not divide `dim` leaves a shorter last block.

    >>> from stepwell.presets import int4
    >>> t = Testbed(dim=12000, exponent=1.1)
    >>> round(t.loss(t.rtn(int4(block=None))).item(), 6), round(t.smoothed(t.target, int4(block=None)).item(), 6)
    (0.10307, 0.187179)
    """

    __test__ = False  # no test class, whatever pytest makes of the name

    dim: int = 12_000
    exponent: float = 1.1
    rotated: bool = False
    shift: float = 0.0

    def __post_init__(self) -> None:
        _check_size("dim", self.dim)
        _check_number("exponent", self.exponent)
        _check_number("shift", self.shift)

    @cached_property
    def spectrum(self) -> Tensor:
        """The eigenvalues h of H, `(dim,)`."""
        return _spectrum(self.dim, self.exponent)

    @cached_property
    def target(self) -> Tensor:
        """The weights w* of loss zero, `(dim,)`."""
        return _target(self.dim, self.shift)

    @cached_property
    def hessian_diagonal(self) -> Tensor:
        """The diagonal of H, `(dim,)`."""
        if not self.rotated:
            return self.spectrum
        # C_ki^2 = (1 + cos(2 pi k (i + 1/2) / d)) / d for k > 0, and 1 / d for k = 0
        turned = torch.polar(self.spectrum, math.pi / self.dim * torch.arange(self.dim, dtype=torch.float64))
        waves: Tensor = torch.fft.ifft(turned, norm="forward").real
        return (self.spectrum.sum() - self.spectrum[0] + waves) / self.dim

    @cached_property
    def hessian(self) -> Tensor:
        """H as a matrix, `(dim, dim)`.

        Raises:
            ValueError: more than 16,384 weights.
        """
        if self.dim > MAX_DENSE:
            raise ValueError(f"`dim` must be at most {MAX_DENSE} for a Hessian that is written down: got {self.dim}.")
        if not self.rotated:
            return torch.diag(self.spectrum)
        basis = cosines(torch.eye(self.dim, dtype=torch.float64))  # row i is column i of C
        return (basis * self.spectrum) @ basis.T

    def loss(self, weight: Tensor) -> Tensor:
        """Return the loss of weights `(dim,)`, 0-dim; differentiable."""
        error = self._checked(weight).to(torch.float64) - self.target
        error = cosines(error) if self.rotated else error
        return (self.spectrum * error * error).sum() / 2

    def smoothed(self, weight: Tensor, quantizer: Quantizer, *, scale: Tensor | None = None) -> Tensor:
        """Return `E L(RR(w))`, the mean loss under randomized rounding, 0-dim and exact; includes the bias where the grid saturates.

        Args:
            weight: `(dim,)`.
            quantizer: the grid.
            scale: `(blocks,)`, as `ptq.scale_search` returns it; None refits it by the quantizer's rule.
        """
        bracket = self._bracket(weight, quantizer, scale)
        return self.loss(bracket.x) + (self.hessian_diagonal * variance(bracket)).sum() / 2

    def rtn(self, quantizer: Quantizer) -> Tensor:
        """Return the target rounded to nearest, `(dim,)`."""
        return quantizer(self._padded(self.target, quantizer))[: self.dim]

    def gptq(self, quantizer: Quantizer) -> Tensor:
        """Return the target rounded by GPTQ in natural order without damping, `(dim,)`; on a diagonal Hessian this is `rtn`."""
        if not self.rotated:
            return self.rtn(quantizer)
        dense, weight = self.hessian, self._padded(self.target, quantizer)
        # weights that only fill the last block are uncoupled from the others
        hessian = torch.eye(len(weight), dtype=torch.float64)
        hessian[: self.dim, : self.dim] = dense
        return sequential(weight, hessian, quantizer, damping=0.0, name="target").decode()[: self.dim]

    def optimum(self, quantizer: Quantizer) -> Tensor:
        """Return the best weights that the grid can hold, `(dim,)`: best scale and codes of every block, exactly.

        Raises:
            ValueError: a rotated testbed (finding the best codes is then a closest-vector problem), or a grid without exact scales.
        """
        if self.rotated:
            raise ValueError("`rotated` must be False for an exact optimum: got True. Compare with `gptq` and `one_opt` instead.")
        weight = self._padded(self.target, quantizer)
        scale = exact_scale(weight, quantizer, self._padded(self.hessian_diagonal, quantizer))
        return quantizer(weight, scale=scale)[: self.dim]

    def one_opt(self, quantizer: Quantizer, start: Tensor | None = None) -> Tensor:
        """Return weights `(dim,)` on the target's grid that no change of a single code improves, by coordinate descent in natural order.

        Args:
            quantizer: the grid; its scales are those of the target.
            start: weights `(dim,)` to start from, rounded to that grid first; None starts from the target.
        """
        blocks, fit, _ = quantizer.prepare(self._padded(self.target, quantizer))
        if not self.rotated:
            return self.rtn(quantizer)
        begin = self.target if start is None else self._checked(start).detach().to(torch.float64)
        weight = quantizer.snap(self._padded(begin, quantizer).reshape(blocks.shape), fit).flatten()[: self.dim]
        gradient, diagonal = self.hessian @ (weight - self.target), self.hessian_diagonal
        fits = [fit.rows(block, block + 1) for block in range(len(blocks))]
        moved = True
        while moved:
            moved = False
            for i in range(self.dim):
                wanted = weight[i] - gradient[i] / diagonal[i]
                move = quantizer.snap(wanted.reshape(1, 1), fits[i // blocks.shape[1]])[0, 0] - weight[i]
                # what gains no more than rounding error could be moved back and forth for ever
                if -move * (gradient[i] + diagonal[i] * move / 2) > 1e-14 * diagonal[i] * move**2:
                    weight[i] += move
                    gradient += self.hessian[i] * move
                    moved = True
        return weight

    def _bracket(self, weight: Tensor, quantizer: Quantizer, scale: Tensor | None) -> Bracket:
        found = quantizer.bracket(self._padded(self._checked(weight).detach().to(torch.float64), quantizer), scale=scale)
        return Bracket(*(part[: self.dim] for part in found[:3]))

    def _padded(self, weight: Tensor, quantizer: Quantizer) -> Tensor:
        """Return weights with zeros that fill the last block; they change no scale."""
        return pad(weight, (0, -self.dim % quantizer.block if isinstance(quantizer.block, int) else 0))

    def _checked(self, weight: Tensor) -> Tensor:
        if not isinstance(weight, Tensor) or tuple(weight.shape) != (self.dim,):
            raise ValueError(f"`weight` must be a tensor of shape {(self.dim,)}: got {getattr(weight, 'shape', weight)!r}.")
        return weight


@dataclass(frozen=True)
class TwoLayer:
    """A two-layer linear network on the same spectrum: `L(u, V) = 1/2 sum h (V^T u / width - w*)^2` in float64.

    Attributes:
        width: hidden units k; u is `(width,)`, V is `(width, dim)`.
        dim: number of inputs.
        exponent: of the spectrum.
        shift: another draw of the target, as in `Testbed`.
    """

    width: int
    dim: int = 400
    exponent: float = 1.1
    shift: float = 0.0

    def __post_init__(self) -> None:
        _check_size("width", self.width)
        _check_size("dim", self.dim)
        _check_number("exponent", self.exponent)
        _check_number("shift", self.shift)

    @cached_property
    def spectrum(self) -> Tensor:
        """h, `(dim,)`."""
        return _spectrum(self.dim, self.exponent)

    @cached_property
    def target(self) -> Tensor:
        """w*, `(dim,)`."""
        return _target(self.dim, self.shift)

    def loss(self, outer: Tensor, inner: Tensor) -> Tensor:
        """Return the loss of u `(width,)` and V `(width, dim)`, 0-dim; differentiable."""
        self._check(outer, inner)
        error = outer @ inner / self.width - self.target
        return (self.spectrum * error * error).sum() / 2

    def gauss_newton(self, outer: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
        """Return the Gauss-Newton diagonal, `(width,)` for u and `(width, dim)` for V; differentiable."""
        self._check(outer, inner)
        factor = self.spectrum / self.width**2
        return inner**2 @ factor, outer[:, None] ** 2 * factor

    def smoothed(self, outer: Tensor, inner: Tensor, quantizer: Quantizer) -> Tensor:
        """Return the mean loss with u and V both rounded at random, 0-dim and exact."""
        self._check(outer, inner)
        (u, u_var), (v, v_var) = (
            (bracket.x, variance(bracket))
            for bracket in (quantizer.bracket(outer.to(torch.float64)), quantizer.bracket(inner.to(torch.float64)))
        )
        # Var(u v) = Var u v^2 + u^2 Var v + Var u Var v, summed over independent hidden units
        spread = u_var @ v**2 + (u**2 + u_var) @ v_var
        return self.loss(u, v) + (self.spectrum * spread).sum() / (2 * self.width**2)

    def _check(self, outer: Tensor, inner: Tensor) -> None:
        if tuple(outer.shape) != (self.width,) or tuple(inner.shape) != (self.width, self.dim):
            raise ValueError(
                f"`outer` and `inner` must be {(self.width,)} and {(self.width, self.dim)}: got {tuple(outer.shape)}, {tuple(inner.shape)}."
            )


def cosines(x: Tensor) -> Tensor:
    """Return the orthonormal DCT-II along the last dimension, `(*, d)`, by one Fourier transform of that length; differentiable."""
    d = x.shape[-1]
    folded = torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], dim=-1)
    k = torch.arange(d, dtype=x.dtype, device=x.device)
    waves = (torch.fft.fft(folded) * torch.polar(torch.full_like(k, (2 / d) ** 0.5), -math.pi / (2 * d) * k)).real
    return torch.cat([waves[..., :1] / 2**0.5, waves[..., 1:]], dim=-1)


def _spectrum(dim: int, exponent: float) -> Tensor:
    return torch.arange(1, dim + 1, dtype=torch.float64).pow(-exponent)


def _target(dim: int, shift: float) -> Tensor:
    places = (torch.arange(1, dim + 1, dtype=torch.float64) * GOLDEN + shift) % 1
    target = cast(Tensor, torch.special.ndtri(places))
    if not bool(target.isfinite().all()):
        raise ValueError(f"`shift` puts a target at infinity: got {shift!r}. Choose another.")
    return target


def _check_size(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer: got {value!r}.")


def _check_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value >= 0):
        raise ValueError(f"`{name}` must be a finite number, 0 or more: got {value!r}.")

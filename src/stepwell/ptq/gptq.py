"""GPTQ: rounding that lets every column make up for the errors of those before it, measured on calibration data.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (arXiv:2210.17323).
Layers are rounded in the order of the forward pass, each on inputs that come from the rounded layers before it. Every input, which several
projections may share, costs one pass over the batches up to it, and one Hessian is held at a time. The rounding of one weight is in
`sequential`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stepwell.modes import evaluating
from stepwell.ptq.calibration import Forward, Use, holders, run_batch, second_moment, uses
from stepwell.ptq.chosen import Chosen, chosen
from stepwell.ptq.sequential import Order, check_options, sequential
from stepwell.quantizers import Encoded, Quantizer


def gptq(
    model: nn.Module,
    quantizer: Quantizer | Mapping[str, Quantizer | None],
    batches: Iterable[Any],
    *,
    skip: Sequence[str] = (),
    damping: float = 0.01,
    order: Order = "natural",
    forward: Forward | None = None,
    done: Mapping[str, Encoded] | None = None,
    on_layer: Callable[[str, Encoded], None] | None = None,
    into: MutableMapping[str, Encoded] | None = None,
) -> dict[str, Encoded]:
    """Round a model's weights by GPTQ, in place, and return them encoded.

    The model runs in evaluation mode without gradients; what it was in is restored. After an error all weights are what they were, unless
    `into` is given.

    Args:
        model: any module; only its weights are written.
        quantizer: one grid for every selected weight, or a mapping from names or patterns to grids, in which the first match wins and None
            leaves the weight alone. Scales are fitted to the weights before they are rounded.
        batches: calibration data on the model's device; an iterator is read once and kept.
        skip: names or patterns of parameters or modules to leave alone.
        damping: added to each Hessian's diagonal, as a share of its mean.
        order: "natural", or "activation": columns with large inputs first.
        forward: `forward(model, batch)` runs the model on one batch; None calls it with the batch: a mapping by keywords, a tuple or
            list by position.
        done: weights that an earlier call encoded, for example before it was interrupted: they are written, not computed.
        on_layer: called with every name and weight as soon as it is rounded: show progress, or save it for `done`.
        into: where encoded weights go instead of the result, for example onto a disk. Then no copy of the weights is kept, so that the
            model, one layer's codes and its Hessian are all that is held; after an error some weights stay rounded.

    Returns:
        Encoded weights by parameter name, in the model's order; empty with `into`. `encoded[name].decode()` equals the float32 parameter
        bit for bit.

    Raises:
        TypeError: something that is no `Quantizer` where one belongs; one batch in place of a list of them.
        ValueError: no batches, batches that never reach a layer (which is named), inputs that are not finite, a weight whose inputs are not
            those of a Linear, Conv1d, Conv2d or Conv1D, options out of range, `done` that does not fit, and what `rtn` refuses.

    >>> from stepwell.formats import integer
    >>> layer = nn.Linear(2, 1, bias=False)
    >>> layer.weight.data = torch.tensor([[1.0, 0.4]])
    >>> x = torch.tensor([[1.0, 1.0], [1.0, 0.9]])
    >>> gptq(layer, Quantizer(integer(2), rule=0.8), [x])["weight"].decode()  # 0.8 is 0.2 too low, so 0.4 is rounded up
    tensor([[0.8000, 0.8000]])
    """
    check_options(damping, order)
    rows = chosen(model, quantizer, skip=skip)
    kept = _kept(batches)
    modules = holders(model, {row.name: row.parameter for row in rows})
    finished = _checked(done, rows)
    encoded: MutableMapping[str, Encoded] = {} if into is None else into
    run, by_name = forward or run_batch, {row.name: row for row in rows}
    with torch.no_grad(), evaluating(model), _restored_on_error(rows if into is None else []):
        order_of_use = uses(model, modules, kept, run)
        for name, one in finished.items():
            encoded[name] = one
            by_name[name].parameter.copy_(one.decode())
        for name, hessian in _hessians(model, order_of_use, kept, run, leave=set(finished)):
            row = by_name[name]
            one = sequential(row.parameter, hessian, row.quantizer, damping=damping, order=order, name=name)
            encoded[name] = one
            row.parameter.copy_(one.decode())
            if on_layer is not None:
                on_layer(name, one)
    return {row.name: encoded[row.name] for row in rows} if into is None else {}


def _kept(batches: Iterable[Any]) -> list[Any]:
    """Return the batches as a list, or refuse what is none."""
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise TypeError(f"`batches` must be an iterable of batches: got a {type(batches).__name__}. Write [batch] for a single one.")
    kept = list(batches)
    if not kept:
        raise ValueError("`batches` must hold calibration data: got no batch. A few hundred inputs are enough.")
    return kept


def _hessians(
    model: nn.Module, order_of_use: Mapping[str, Use], batches: Sequence[Any], run: Forward, *, leave: set[str]
) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter and its Hessian, measured with the weights as they are then; twins share one."""
    measured: tuple[str, Tensor] | None = None
    for name, use in order_of_use.items():
        if name not in leave:
            hessian = measured[1] if measured and measured[0] == use.twin else second_moment(model, use, batches, run)
            measured = (name, hessian)
            yield measured


def _checked(done: Mapping[str, Encoded] | None, rows: list[Chosen]) -> dict[str, Encoded]:
    """Return the weights that need not be computed, or refuse those that do not fit the model."""
    known = {row.name: row for row in rows}
    for name, one in (done or {}).items():
        if name not in known:
            raise ValueError(f"`done` holds {name!r}, which is not selected here. Names are like {', '.join(list(known)[:3])}.")
        wanted = (known[name].quantizer, tuple(known[name].parameter.shape))
        if (one.quantizer, tuple(one.codes.shape)) != wanted:
            raise ValueError(
                f"`done` holds {name!r} as {one.quantizer} {tuple(one.codes.shape)}: this call rounds it to {wanted[0]} {wanted[1]}."
            )
    return dict(done or {})


@contextmanager
def _restored_on_error(rows: list[Chosen]) -> Iterator[None]:
    """Write the weights back if anything goes wrong inside."""
    before = [row.parameter.detach().clone() for row in rows]
    try:
        yield
    except BaseException:
        for row, weight in zip(rows, before, strict=True):
            row.parameter.copy_(weight)
        raise

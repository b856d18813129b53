"""Points: places in weight space that a probe goes to, given as encoded weights, plain tensors or a quantizer, read one tensor at a time.

A point names only the tensors that it moves. Everything else (biases, norms, embeddings) stays what the model holds.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from stepwell.ptq.chosen import Chosen, chosen
from stepwell.quantizers import Encoded, Quantizer, check_weight

Weights = Mapping[str, Encoded | Tensor]
Place = dict[str, Encoded | Tensor | None]  # None: what the model holds
PIECE = 2**16  # elements of a sum that are held in float64 at once
Move = Callable[[str, Tensor], Tensor]  # (name, the model's weight) -> a tensor of the same shape


def rounded(model: nn.Module, quantizer: Quantizer | Mapping[str, Quantizer | None], *, skip: Sequence[str] = ()) -> dict[str, Encoded]:
    """Return a model's weights rounded to nearest, without writing them: the point that most probes look towards.

    Args:
        model: any module; it is read only.
        quantizer: one grid, or a mapping from names or patterns to grids in which the first match wins and None leaves a weight out.
        skip: names or patterns of parameters or modules to leave out.

    Raises:
        TypeError: something that is no `Quantizer` where one belongs.
        ValueError: no quantizable parameter, a name that matches nothing, a weight that is not finite, a block that does not divide.
    """
    return {row.name: row.quantizer.encode(row.parameter) for row in chosen(model, quantizer, skip=skip)}


def place(model: nn.Module, given: Weights | Quantizer, argument: str) -> Place:
    """Check a point against a model and return it, or raise an error that names the argument.

    A tensor that *is* the model's own weight (`dict(model.named_parameters())`) would move along with it, so it becomes None.
    """
    if isinstance(given, Quantizer):
        return dict(rounded(model, given))
    if not isinstance(given, Mapping):
        raise TypeError(
            f"`{argument}` must be a Quantizer or a mapping from parameter names to Encoded or tensors: got {type(given).__name__}. "
            "Try `stepwell.probes.rounded(model, int4())`."
        )
    if not given:
        raise ValueError(f"`{argument}` must hold at least one weight: got an empty mapping. Print `stepwell.select(model)` to see why.")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found: Place = {}
    seen: set[int] = set()
    for name, value in given.items():
        if name not in parameters:
            raise ValueError(f"`{argument}` holds {name!r}, which is no parameter of the model. Names are like {_few(parameters)}.")
        parameter = parameters[name]
        check_weight(parameter, name)
        shape = tuple(_shape(value, argument, name))
        if shape != tuple(parameter.shape):
            raise ValueError(f"`{argument}` holds {name!r} with shape {shape}: the model's has {tuple(parameter.shape)}.")
        if id(parameter) in seen:  # tied: the first name moves it
            continue
        seen.add(id(parameter))
        if isinstance(value, Tensor):
            check_weight(value, f"{argument}[{name!r}]")
        found[name] = None if isinstance(value, Tensor) and value.data_ptr() == parameter.data_ptr() else value
    return found


def matching(model: nn.Module, given: Weights | Quantizer, argument: str, like: Collection[str]) -> Place:
    """Return a second point for the weights that a first one moves; other entries, of a whole state dictionary, are not used."""
    if isinstance(given, Mapping) and given:
        missing = [name for name in like if name not in given]
        if missing:
            raise ValueError(f"`{argument}` must hold every weight that is moved: got none for {_few(missing)}.")
        given = {name: given[name] for name in like}
    return place(model, given, argument)


def weight(value: Encoded | Tensor | None, base: Tensor) -> Tensor:
    """Return one tensor of a point in the dtype and on the device of the model's weight `base`."""
    if value is None:
        return base
    return (value.decode() if isinstance(value, Encoded) else value.detach()).to(base)


def toward(target: Place) -> Move:
    """Return the displacement from the model's weights to a point."""
    return lambda name, base: weight(target[name], base) - base


def dot(one: Tensor, other: Tensor) -> float:
    """Return a scalar product, summed in float64, piece by piece: copies of whole weights in float64 would be the largest thing held."""
    one, other = one.flatten(), other.flatten()
    pieces = (slice(start, start + PIECE) for start in range(0, len(one), PIECE))
    return math.fsum(float(torch.dot(one[piece].double(), other[piece].double())) for piece in pieces)


def length(move: Move, base: Mapping[str, Tensor]) -> float:
    """Return the Euclidean length of a displacement over all its tensors."""
    total = 0.0
    for name, at in base.items():
        part = move(name, working(at))
        total += dot(part, part)
    return math.sqrt(total)


def rounding_distance(rows: Iterable[Chosen]) -> float:
    """Return the Euclidean length of the rounding error over all weights; rounded ones are held one tensor at a time."""
    squares = []
    for row in rows:
        base = working(row.parameter)
        error = row.quantizer(base).sub_(base)
        squares.append(dot(error, error))
    return math.sqrt(math.fsum(squares))


def working(parameter: Tensor) -> Tensor:
    """Return a parameter in the dtype that probes calculate in: float32, or float64 where it is float64."""
    held = parameter.detach()
    return held if held.dtype in (torch.float32, torch.float64) else held.float()


def _shape(value: object, argument: str, name: str) -> torch.Size:
    if isinstance(value, Encoded):
        return value.codes.shape
    if isinstance(value, Tensor):
        return value.shape
    raise TypeError(f"`{argument}` must hold Encoded weights or tensors: got {type(value).__name__} for {name!r}.")


def _few(names: Mapping[str, object] | Sequence[str]) -> str:
    return ", ".join(list(names)[:3])

"""Outputs: a model and a runtime on the same inputs, how far they are apart, and the certificate that says so."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from stepwell.export.certificate import Cause, Certificate, Layer
from stepwell.export.deployed import deployed, plain
from stepwell.export.noise import SinglyRounded
from stepwell.export.trace import compute, sizes
from stepwell.quantizers import Encoded

FLOOR, FACTOR = 2e-6, 4.0  # of the tolerance: see Certificate
Runtime = Callable[[tuple[Tensor, ...]], list[Any]]  # inputs -> all outputs, arrays or tensors
Arrays = list[NDArray[Any]]


class Compared(NamedTuple):
    """One set of inputs: the first floating-point output of model and runtime, and how far all of them are apart.

    Attributes:
        shapes: of the inputs, in words.
        expected, found: the first output, of the model and of the runtime, float64.
        error: largest difference of any output relative to its largest magnitude.
        noise: the same between float32 and singly rounded arithmetic, both in the model.
    """

    shapes: str
    expected: NDArray[Any]
    found: NDArray[Any]
    error: float
    noise: float


def compare(
    model: nn.Module,
    encoded: Mapping[str, Encoded],
    runtime: Runtime,
    example: tuple[Tensor, ...],
    *,
    axes: Sequence[Mapping[int, str]] = (),
    reference: Runtime | None = None,
) -> list[Compared]:
    """Run a model with the grid weights in place and a runtime, on the example and on other lengths of its open axes.

    Args:
        model: the module that was exported; left as it was.
        encoded: encoded weights by parameter name; empty takes the model as it is.
        runtime: inputs -> all outputs.
        example: real inputs.
        axes: for every input, its open axes and their names; axis 0 of the first is the batch.
        reference: what to compare with instead of the model, such as the model with a known cause of differences built in.

    Raises:
        ValueError: the model does not run on the example, or the outputs have other shapes.
    """
    example = tuple(plain(part) for part in example)
    with deployed(model, encoded), torch.no_grad():
        return [_compared(model, runtime, inputs, reference) for inputs in _inputs(example, axes)]


def certify(
    path: str | Path, layers: Iterable[Layer], runs: Sequence[Compared], *, runtime: str, version: str, causes: Sequence[Cause] = ()
) -> Certificate:
    """Return the certificate of a file or folder from what was compared.

    Args:
        path: the artifact.
        layers: one row per weight.
        runs: at least one comparison of outputs.
        runtime, version: what loaded and ran it.
        causes: what the remaining difference was traced to.
    """
    layers = tuple(layers)
    noise, error = (float(np.max([getattr(run, part) for run in runs])) for part in ("noise", "error"))  # np.max, because NaN must win
    tolerance = max(FLOOR, FACTOR * noise)
    remainder = causes[-1].after if causes else error
    equal = [known(getattr(layer, part) for layer in layers) for part in ("codes_equal", "scales_equal", "values_equal")]
    kl, top1 = _classes(runs)
    return Certificate(
        path=str(path),
        sha256=digest(Path(path)),
        runtime=runtime,
        version=version,
        codes_equal=equal[0],
        scales_equal=equal[1],
        values_equal=equal[2],
        max_relative_error=error,
        tolerance=tolerance,
        noise=noise,
        kl=kl,
        top1_agreement=top1,
        inputs=tuple(run.shapes for run in runs),
        layers=layers,
        # a file without quantized weights proves nothing; what known causes account for is no mistake of the file
        passed=bool(layers) and False not in equal and (error <= tolerance or remainder <= tolerance),
        causes=tuple(causes),
    )


def with_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> Runtime:
    """Return a runtime that is the model itself with other weights, by parameter name; to be run inside `compare`."""

    def run(inputs: tuple[Tensor, ...]) -> list[Any]:
        return [leaf for leaf in tree_leaves(torch.func.functional_call(model, dict(weights), inputs)) if isinstance(leaf, Tensor)]

    return run


def outputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> Arrays:
    """Return a model's floating-point outputs as float64 arrays.

    Raises:
        ValueError: the model does not run on these inputs.
    """
    return floating([leaf.detach().cpu() for leaf in tree_leaves(compute(model, inputs)) if isinstance(leaf, Tensor)])


def floating(found: Iterable[Any]) -> Arrays:
    """Return the floating-point ones among tensors or arrays, as float64 arrays."""
    arrays = [part.double().numpy() if isinstance(part, Tensor) and part.is_floating_point() else np.asarray(part) for part in found]
    return [part.astype(np.float64) for part in arrays if np.issubdtype(part.dtype, np.floating) and part.size]


def distance(expected: Arrays, found: Arrays) -> float:
    """Return the largest difference of any output, relative to the largest finite magnitude of that output."""
    worst = []
    for one, two in zip(expected, found, strict=True):
        with np.errstate(invalid="ignore"):
            difference = np.max(np.where(one == two, 0.0, np.abs(one - two)))  # equal infinities are equal
        largest = np.max(np.abs(one), where=np.isfinite(one), initial=0.0)
        worst.append(difference / largest if largest else difference)
    return float(np.max(worst))


def digest(path: Path) -> str:
    """Return the sha256 of a file, or of a folder's files: their names and contents, sorted by name."""
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    whole = hashlib.sha256()
    for part in sorted(part for part in path.rglob("*") if part.is_file()):
        whole.update(f"{part.relative_to(path).as_posix()}\0{digest(part)}\n".encode())
    return whole.hexdigest()


def known(flags: Iterable[bool | None]) -> bool | None:
    """Return whether all known flags are true; None where none is known."""
    told = [flag for flag in flags if flag is not None]
    return all(told) if told else None


def _compared(model: nn.Module, runtime: Runtime, inputs: tuple[Tensor, ...], reference: Runtime | None) -> Compared:
    """Run model and runtime on the same inputs."""
    plainly = outputs(model, inputs)
    expected, found = plainly if reference is None else floating(reference(inputs)), floating(runtime(inputs))
    with SinglyRounded():  # type: ignore[no-untyped-call]
        exact = outputs(model, inputs)
    if not expected or [part.shape for part in expected] != [part.shape for part in found]:
        raise ValueError(
            f"`path` and `model` must have the same floating-point outputs: the file's have shapes {[part.shape for part in found]}, "
            f"the model's {[part.shape for part in expected]}. Was the file exported from this model?"
        )
    return Compared(sizes(inputs), expected[0], found[0], distance(expected, found), distance(plainly, exact))


def _inputs(example: tuple[Tensor, ...], axes: Sequence[Mapping[int, str]]) -> Iterator[tuple[Tensor, ...]]:
    """Yield the example, and once it has run, the example with one open axis at a time cut or repeated to another length."""
    yield example
    lengths = {name: part.shape[axis] for part, opened in zip(example, axes, strict=False) for axis, name in opened.items()}
    batch = axes[0].get(0) if axes else None
    plans: list[dict[str, int]] = []
    for name, length in lengths.items():
        others = (1, length + 1) if name == batch else (max(2, length // 2) if length > 2 else length + 2,)
        plans += [{name: other} for other in others if other != length]
    for plan in plans:
        changes = [{axis: plan[name] for axis, name in opened.items() if name in plan} for opened in axes]
        yield tuple(_resize(part, change) for part, change in zip(example, changes, strict=False))


def _resize(part: Tensor, lengths: Mapping[int, int]) -> Tensor:
    """Cut or repeat a tensor along axes; the last element comes first, so that the rows are not merely the same ones again."""
    for axis, length in lengths.items():
        part = part.index_select(axis, (part.shape[axis] - 1 + torch.arange(length)) % part.shape[axis])
    return part


def _classes(runs: Sequence[Compared]) -> tuple[float | None, float | None]:
    """Return KL divergence in nats per row and top-1 agreement, over all runs; None where the output has no classes."""
    if runs[0].expected.ndim < 2 or runs[0].expected.shape[-1] < 2:
        return None, None
    pairs = [(run.expected.reshape(-1, run.expected.shape[-1]), run.found.reshape(-1, run.found.shape[-1])) for run in runs]
    expected, found = (torch.from_numpy(np.concatenate(side)).log_softmax(-1) for side in zip(*pairs, strict=True))
    kl = torch.where(expected == -torch.inf, 0.0, expected.exp() * (expected - found)).sum(-1).mean()
    return max(float(kl), 0.0), float((expected.argmax(-1) == found.argmax(-1)).double().mean())

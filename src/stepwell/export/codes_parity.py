"""Codes parity: what `stepwell.load` reads from a safetensors file of codes and scales, against the model they were taken from."""

from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from stepwell.export.certificate import Certificate, Layer
from stepwell.export.deployed import check_encoded, owners, plain
from stepwell.export.outputs import certify, compare, with_weights
from stepwell.quantizers import Encoded
from stepwell.storage import load


def check(path: Path, model: nn.Module, example: tuple[Tensor, ...], encoded: Mapping[str, Encoded]) -> Certificate:
    """Read what `stepwell.save` wrote and compare weights and outputs; arguments as in `verify`, already checked.

    Raises:
        ValueError: a file that `save` did not write, or one of another model.
    """
    found = load(path)
    if isinstance(found, Encoded):
        raise ValueError(f"`path`: {path} holds one weight without a name. Save the weights of a model as a mapping from names to them.")
    check_encoded(model, found)
    runs = compare(model, encoded, with_weights(model, {name: weight.decode().float() for name, weight in found.items()}), example)
    return certify(path, _layers(found, model, encoded), runs, runtime="PyTorch on decoded weights", version=version("torch"))


def _layers(found: Mapping[str, Encoded], model: nn.Module, encoded: Mapping[str, Encoded]) -> Iterator[Layer]:
    """Yield a row for every weight that is in the file, or should be."""
    parameters = owners(model)
    for name in [*encoded, *(name for name in found if name not in encoded)]:
        if name not in found:
            yield Layer(name, 0, "-", False, False, False, "not in the file")
            continue
        weight, expected = found[name], encoded.get(name)
        if expected is None:
            equal = torch.equal(weight.decode().float(), plain(parameters[name]))
            codes = False if encoded else None
            note = "in the file, but not in `encoded`" if encoded else "" if equal else f"the model's {name} differs"
            yield Layer(name, 1, str(weight.quantizer), codes, codes, equal, note)
            continue
        same = weight.quantizer == expected.quantizer
        codes = same and torch.equal(weight.codes, expected.codes.cpu())
        scales = same and all(_equal(getattr(weight, part), getattr(expected, part)) for part in ("scales", "tensor_scale", "zero_points"))
        equal = torch.equal(weight.decode().float(), plain(expected.decode()))
        yield Layer(name, 1, str(weight.quantizer), codes, scales, equal, "" if same else f"encoded as {expected.quantizer}")


def _equal(one: Tensor | None, two: Tensor | None) -> bool:
    """Say whether two tensors hold the same numbers, or both are absent."""
    if one is None or two is None:
        return one is two
    return torch.equal(one, two.cpu())

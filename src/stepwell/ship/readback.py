"""Readback: what was written, read again weight by weight and compared with what was encoded, without running anything."""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from stepwell.export.certificate import Certificate, Layer
from stepwell.export.outputs import digest, known
from stepwell.quantizers import Encoded
from stepwell.ship.checkpoint import Checkpoint, open_checkpoint
from stepwell.storage import load_each

Weights = Mapping[str, Encoded]


def readback(family: str, path: Path, model: nn.Module, encoded: Weights) -> list[Layer]:
    """Compare a file or folder with what was encoded.

    Args:
        family: the target's, of those that stream.
        path: what was written.
        model: for names; it may be without memory.
        encoded: what was exported, read one weight at a time.
    """
    read = {"safetensors": _ours, "gguf": _gguf, "compressed-tensors": _compressed}[family]
    found = list(read(path, model, encoded))
    seen = {layer.name for layer in found}
    return [*found, *(Layer(name, 0, "-", False, False, False, "not in the file") for name in encoded if name not in seen)]


def weights_only(path: Path, layers: Iterable[Layer], *, runtime: str, version: str) -> Certificate:
    """Return a certificate of weights alone: nothing was run, so that outputs are unknown (NaN).

    Args:
        path: what was read.
        layers: one row per weight.
        runtime, version: what read it.
    """
    rows = tuple(layers)
    equal = [known(getattr(row, part) for row in rows) for part in ("codes_equal", "scales_equal", "values_equal")]
    return Certificate(
        path=str(path), sha256=digest(path), runtime=runtime, version=version,
        codes_equal=equal[0], scales_equal=equal[1], values_equal=equal[2],
        max_relative_error=math.nan, tolerance=math.nan, noise=math.nan, kl=None, top1_agreement=None,
        inputs=(), layers=rows, passed=bool(rows) and False not in equal,
    )  # fmt: skip


def _ours(path: Path, model: nn.Module, encoded: Weights) -> Iterator[Layer]:
    """Compare codes, scales and values of what `stepwell.load` reads."""
    del model
    for name, found in load_each(path):
        if name not in encoded:
            yield Layer(name, 1, str(found.quantizer), False, False, False, "in the file, but not encoded")
            continue
        wanted = encoded[name]
        same = found.quantizer == wanted.quantizer and found.codes.shape == wanted.codes.shape
        codes = same and torch.equal(found.codes, wanted.codes) and _same(found.zero_points, wanted.zero_points)
        scales = same and torch.equal(found.scales, wanted.scales) and _same(found.tensor_scale, wanted.tensor_scale)
        yield Layer(name, 1, str(found.quantizer), codes, scales, same and torch.equal(found.decode(), wanted.decode()))


def _gguf(path: Path, model: nn.Module, encoded: Weights) -> Iterator[Layer]:
    """Compare the values that `gguf` decodes."""
    from stepwell.export import gguf_file, gguf_names

    file = gguf_file.read(path)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    unique = dict(model.named_parameters())
    places = gguf_names.names(getattr(model, "config", None), list(unique))
    first = {id(parameter): name for name, parameter in unique.items()}
    for name in encoded:
        own = first[id(parameters[name])]
        stored = file.tensors.get(places.files[own])
        if stored is None:
            continue
        value = torch.from_numpy(gguf_file.values(stored))
        value = gguf_names.separate(value, places.heads[own]) if own in places.heads else value
        yield Layer(name, 1, stored.type, None, None, torch.equal(value, encoded[name].decode().float()))


def _compressed(path: Path, model: nn.Module, encoded: Weights) -> Iterator[Layer]:
    """Compare codes and scales of a folder of compressed-tensors."""
    from stepwell.export import compressed_tensors_scheme as schemes

    del model
    folder = open_checkpoint(path)
    for name in encoded:
        weight, module = encoded[name], name.rpartition(".")[0]
        stored = _parts(folder, module)
        if not stored:
            continue
        codes, scales = schemes.held(stored, weight.quantizer, tuple(weight.codes.shape))
        same = torch.equal(codes.to(torch.int16), weight.codes.to(torch.int16))
        equal = torch.equal(scales.float(), weight.scales.float())
        yield Layer(name, 1, schemes.form(weight.quantizer), same, equal, None)


def _parts(folder: Checkpoint, module: str) -> dict[str, Tensor]:
    """Return the tensors of one module's weight."""
    names = [name for name in folder.tensors if name.rpartition(".")[0] == module and name.rpartition(".")[2].startswith("weight")]
    return {name.rpartition(".")[2]: folder.read(name) for name in names}


def _same(one: Tensor | None, two: Tensor | None) -> bool:
    return (one is None) == (two is None) and (one is None or two is None or torch.equal(one, two))

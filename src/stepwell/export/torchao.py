"""torchao: a folder that transformers loads into torchao's integer tensors, in the codes and scales that were trained."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stepwell.export.deployed import check_encoded
from stepwell.export.exported import Exported
from stepwell.export.extras import need
from stepwell.export.hf_folder import METADATA, Make, check_model, describe, entries, linear_weights, write_folder
from stepwell.export.torchao_tensors import DTYPES, check_grid, config, to_torchao
from stepwell.quantizers import Encoded, Quantizer


def torchao(
    model: nn.Module,
    encoded: Mapping[str, Encoded],
    folder: str | Path,
    *,
    tokenizer: str | Path | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> Exported:
    """Write a transformers model as a folder of torchao tensors (Intx weight-only), codes and scales kept bit for bit.

    The weights are safetensors in the layout that transformers reads for torchao; no pickle is written. Codes take a byte each, whatever
    their width. The folder's config says float32, or the dtype of the grids' `compute`. Tensors are written one at a time.

    Args:
        model: a transformers model; left as it was.
        encoded: encoded weights by parameter name, on grids of `target("torchao:...")`. Those of Linear layers keep their codes; others are
            written as float values, with the reason.
        folder: new, empty, or an earlier export, which is replaced only when the export succeeded.
        tokenizer: folder whose tokenizer files are copied along.
        weights: tensors by parameter name that stand in for the model's own, read one at a time; for a model on the meta device.

    Returns:
        Which weights are stored in codes and which are float, with the reason.

    Raises:
        ModuleNotFoundError: the extra `export` is not installed.
        TypeError, ValueError: no transformers model, weights that do not fit it, a grid that torchao's integers do not hold, grids of
            different `compute`, a float tensor that is not finite, or a folder of something else.
    """
    need("torchao", "transformers", extra="export")
    check_encoded(model, encoded)
    if not encoded:
        raise ValueError("`encoded` must hold at least one weight: got an empty mapping. Was anything selected?")
    check_model(model, "torchao")
    taken, floats = linear_weights(model, encoded)
    if not taken:
        raise ValueError(f"`encoded` must hold a weight of a Linear layer for torchao: got {', '.join(list(encoded)[:4])}.")
    found = {name: encoded[name].quantizer for name in encoded}  # once: what is asked for may be read from a disk
    grids = {module: _checked(found[name], name) for module, name in taken.items()}
    computes = {grid.compute for grid in grids.values()}
    if len(computes) > 1:
        raise ValueError(f"`encoded` must be computed in one dtype, because a model is run in one: got {sorted(map(str, computes))}.")
    packed = {name: _maker(encoded, module, name) for module, name in taken.items()}
    told = {METADATA: describe(found, floats), "format": "pt", **_metadata(model, encoded, taken)}
    write_folder(
        model,
        Path(folder),
        _flat(entries(model, encoded, packed, weights or {})),
        config=_config(model, grids),
        dtype=DTYPES[computes.pop()],
        metadata=lambda _: told,  # all of it in every file: the reader keeps the last file's list of names
        tokenizer=tokenizer,
    )
    return Exported(Path(folder), dict.fromkeys(taken.values(), 1), floats)


def _checked(grid: Quantizer, name: str) -> Quantizer:
    """Return the grid of one weight, which torchao holds; an error names the weight."""
    try:
        check_grid(grid)
    except ValueError as error:
        raise ValueError(f"`encoded` holds {name!r}, which cannot be exported. {error}") from error
    return grid


def _maker(encoded: Mapping[str, Encoded], module: str, name: str) -> Make:
    """Return a function that makes the tensor of one weight."""
    return lambda: {f"{module}.weight": to_torchao(encoded[name])}


def _flat(stored: Iterator[tuple[str, Make]]) -> Iterator[tuple[str, Make]]:
    """Yield the same entries, torchao's tensors taken apart into those that safetensors hold."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    for name, make in stored:
        yield name, lambda make=make: flatten_tensor_state_dict(dict(make()))[0]  # type: ignore[misc]


def _metadata(model: nn.Module, encoded: Mapping[str, Encoded], taken: Mapping[str, str]) -> dict[str, str]:
    """Return torchao's description of every tensor, by name: the layout of its own, one word for the others."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    told: dict[str, str] = {}
    names: list[str] = []
    for name, _ in entries(model, encoded, dict.fromkeys(taken.values(), dict), {}):
        module = name.rpartition(".")[0]
        tensor = to_torchao(encoded[taken[module]]) if name == f"{module}.weight" and module in taken else torch.zeros(1)
        one = flatten_tensor_state_dict({name: tensor})[1]
        names += json.loads(one["tensor_names"])
        told.update(one)
    return {**told, "tensor_names": json.dumps(names)}


def _config(model: nn.Module, grids: Mapping[str, Quantizer]) -> dict[str, Any]:
    """Return the `quantization_config`: one description, or one per module where the grids differ."""
    from torchao.quantization import FqnToConfig
    from transformers import TorchAoConfig

    linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    left = [path for path in linears if path not in grids]
    kinds = {module: config(grid) for module, grid in grids.items()}
    first = next(iter(kinds.values()))
    kind = first if all(other == first for other in kinds.values()) else FqnToConfig(kinds)
    return dict(TorchAoConfig(kind, modules_to_not_convert=left or None).to_dict())

"""compressed-tensors: a folder that transformers loads and vLLM serves, its Linear weights in the codes and scales that were trained."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stepwell.export import compressed_tensors_scheme as schemes
from stepwell.export.deployed import check_encoded
from stepwell.export.exported import Exported
from stepwell.export.extras import need
from stepwell.export.hf_folder import METADATA, Make, check_model, describe, entries, linear_weights, write_folder
from stepwell.quantizers import Compute, Encoded, Quantizer

DTYPES = {None: torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def compressed_tensors(
    model: nn.Module,
    encoded: Mapping[str, Encoded],
    folder: str | Path,
    *,
    tokenizer: str | Path | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> Exported:
    """Write a transformers model as a folder of compressed-tensors, codes and scales kept bit for bit.

    Integers are "pack-quantized", fp8 "float-quantized", NVFP4 and MXFP4 the formats of their name. The folder's config says float32, or
    the dtype of the grids' `compute`, in which transformers and vLLM then run the model. Tensors are written one at a time.

    Args:
        model: a transformers model; left as it was.
        encoded: encoded weights by parameter name, on grids of `target("compressed-tensors:...")`. Those of Linear layers keep their codes;
            others are written as float values, with the reason.
        folder: new, empty, or an earlier export, which is replaced only when the export succeeded.
        tokenizer: folder whose tokenizer files are copied along.
        weights: tensors by parameter name that stand in for the model's own, read one at a time; for a model on the meta device.

    Returns:
        Which weights are stored in codes and which are float, with the reason.

    Raises:
        ModuleNotFoundError: the extra `export` is not installed.
        TypeError, ValueError: no transformers model, weights that do not fit it, a grid that no format holds, grids of different
            `compute`, a float tensor that is not finite, or a folder of something else.
    """
    need("compressed_tensors", "transformers", extra="export")
    check_encoded(model, encoded)
    if not encoded:
        raise ValueError("`encoded` must hold at least one weight: got an empty mapping. Was anything selected?")
    check_model(model, "compressed-tensors")
    taken, floats = linear_weights(model, encoded)
    if not taken:
        raise ValueError(f"`encoded` must hold a weight of a Linear layer for compressed-tensors: got {', '.join(list(encoded)[:4])}.")
    found = {name: encoded[name].quantizer for name in encoded}  # once: what is asked for may be read from a disk
    grids = {module: _checked(found[name], name) for module, name in taken.items()}
    computes = {_compute(grid) for grid in grids.values()}
    if len(computes) > 1:
        raise ValueError(f"`encoded` must be computed in one dtype, because a model is run in one: got {sorted(map(str, computes))}.")
    packed = {name: _maker(encoded, module, name) for module, name in taken.items()}
    told = {METADATA: describe(found, floats), "format": "pt"}
    write_folder(
        model,
        Path(folder),
        entries(model, encoded, packed, weights or {}),
        config=_config(model, grids),
        dtype=DTYPES[computes.pop()],
        metadata=lambda _: told,
        tokenizer=tokenizer,
    )
    return Exported(Path(folder), dict.fromkeys(taken.values(), 1), floats)


def _checked(grid: Quantizer, name: str) -> Quantizer:
    """Return the grid of one weight, which a format holds; an error names the weight."""
    try:
        schemes.form(grid)
    except ValueError as error:
        raise ValueError(f"`encoded` holds {name!r}, which cannot be exported. {error}") from error
    return grid


def _compute(grid: Quantizer) -> Compute:
    """Return the dtype that a model with this grid is run in; fp4 is decoded to bfloat16, whatever the model's dtype."""
    return "bf16" if grid.format.bits == 4 and grid.format.levels is None else grid.compute


def _maker(encoded: Mapping[str, Encoded], module: str, name: str) -> Make:
    """Return a function that makes the tensors of one weight."""
    return lambda: {f"{module}.{part}": tensor for part, tensor in schemes.tensors(encoded[name]).items()}


def _config(model: nn.Module, grids: Mapping[str, Quantizer]) -> dict[str, Any]:
    """Return the `quantization_config`, checked by compressed-tensors' own classes: one group of modules per grid."""
    import compressed_tensors as library
    from compressed_tensors.quantization import QuantizationConfig

    linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    groups: dict[Any, list[str]] = {}
    for module, grid in grids.items():
        groups.setdefault((grid.format.bits, schemes.form(grid), grid.block), []).append(module)
    first = {key: next(grid for module, grid in grids.items() if module == modules[0]) for key, modules in groups.items()}
    forms = {form for _, form, _ in groups}
    config = QuantizationConfig(
        config_groups={
            f"group_{number}": {
                "targets": ["Linear"] if len(groups) == 1 else modules,
                "weights": schemes.arguments(first[key]),
                "format": key[1],
            }
            for number, (key, modules) in enumerate(groups.items())
        },
        format=forms.pop() if len(forms) == 1 else "mixed-precision",
        quantization_status="compressed",
        ignore=[path for path in linears if path not in grids],
    )
    return {**config.model_dump(mode="json"), "version": library.__version__}

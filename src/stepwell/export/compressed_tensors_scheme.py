"""compressed-tensors' schemes: which of its formats holds a grid, and the tensors that it stores for one weight.

Integer codes are packed back to back in int32 words, offset by half the code range; the scale multiplies, whatever its sign, so the "full"
grids with signed scales are legal and decoded to the bit. fp4 codes are bit patterns, two to a byte, the first in the low half.

Source: the compressors of compressed-tensors 0.20 and the loaders of transformers 5.23. Zero points are left out: these two disagree about
their shape, so no asymmetric folder loads.
"""

from typing import Any

import torch
from torch import Tensor

from stepwell.blocks import block_length, contraction
from stepwell.quantizers import Encoded, Quantizer
from stepwell.runtimes import holders, targets

_ROWS = [row for row in targets() if row.name.startswith("compressed-tensors:")]
_SCALES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PACKED, FLOAT8, NVFP4, MXFP4 = "pack-quantized", "float-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized"


def form(grid: Quantizer) -> str:
    """Return the name of the format that holds a grid.

    Raises:
        ValueError: none does; says which targets hold the grid.
    """
    if grid.axis not in (None, 1, -1) or not any(row.holds(grid) for row in _ROWS):
        names = ", ".join(f'target("{row.name}")' for row in _ROWS)
        raise ValueError(f"compressed-tensors has no format for the grid {grid}. Quantize with one of {names}. {holders(grid)}")
    if grid.format.levels is not None:
        return PACKED
    return {"fp8_e4m3": FLOAT8}.get(grid.format.name) or (NVFP4 if grid.scale_dtype == "e4m3" else MXFP4)


def arguments(grid: Quantizer) -> dict[str, Any]:
    """Return the fields of compressed-tensors' QuantizationArgs for the weights of a grid."""
    kind = form(grid)
    common = {"num_bits": grid.format.bits, "type": "int" if kind == PACKED else "float", "symmetric": True, "dynamic": False}
    if kind == NVFP4:
        return {**common, "strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}
    if kind == MXFP4:
        return {**common, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
    if isinstance(grid.block, int):
        return {**common, "strategy": "group", "group_size": grid.block}
    return {**common, "strategy": "channel" if grid.block == "channel" else "tensor"}


def tensors(encoded: Encoded) -> dict[str, Tensor]:
    """Return the tensors that hold an encoded matrix `(rows, columns)`, by their name in its module."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    grid, kind, codes = encoded.quantizer, form(encoded.quantizer), encoded.codes.cpu()
    if kind == PACKED:
        packed = pack_to_int32(codes.to(torch.int8), grid.format.bits)
        return {"weight_packed": packed, "weight_scale": _scales(encoded), "weight_shape": torch.tensor(codes.shape)}
    if kind == FLOAT8:
        scales = _scales(encoded)
        return {
            "weight": codes.to(torch.uint8).view(torch.float8_e4m3fn),
            "weight_scale": scales.reshape(1) if grid.block is None else scales,
        }
    low, high = codes.to(torch.uint8).reshape(codes.shape[0], -1, 2).unbind(-1)
    packed = low | (high << 4)
    if kind == MXFP4:
        exponents = torch.frexp(encoded.scales.cpu())[1] + 126
        return {"weight_packed": packed, "weight_scale": exponents.to(torch.uint8)}
    assert encoded.tensor_scale is not None
    return {
        "weight_packed": packed,
        "weight_scale": encoded.scales.cpu().to(torch.float8_e4m3fn),
        "weight_global_scale": inverse(encoded.tensor_scale).reshape(1),
    }


def held(stored: dict[str, Tensor], grid: Quantizer, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return the codes `(*shape)` and scales of a module's tensors, as `Encoded` has them; the counterpart of `tensors`.

    Raises:
        ValueError: tensors of another format or size.
    """
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    kind, grouped = form(grid), (shape[0], contraction(shape, None) // block_length(shape, grid.block, None)) if grid.block else (1, 1)
    try:
        if kind == PACKED:
            codes = unpack_from_int32(stored["weight_packed"], grid.format.bits, torch.Size(shape))
        elif kind == FLOAT8:
            codes = stored["weight"].contiguous().view(torch.uint8)
        else:
            packed = stored["weight_packed"]
            codes = torch.stack([packed & 15, packed >> 4], dim=-1)
        scales = stored["weight_scale"]
        scales = torch.ldexp(torch.ones(scales.shape), scales.to(torch.int32) - 127) if kind == MXFP4 else scales.float()
        return codes.reshape(shape), scales.reshape(grouped)
    except (KeyError, RuntimeError, IndexError) as error:
        raise ValueError(f"`path`: a weight of shape {shape} on {grid} is not stored as {kind}: {error}") from error


def inverse(tensor_scale: Tensor) -> Tensor:
    """Return what NVFP4 stores for the scale of the scales: by which its readers divide, so that it is one where all scales are zero."""
    scale = tensor_scale.detach().cpu().float()
    return torch.where(scale == 0, torch.ones_like(scale), 1 / scale)


def _scales(encoded: Encoded) -> Tensor:
    """Return scales in the dtype they were trained in, `(rows, blocks)`."""
    return encoded.scales.detach().cpu().to(_SCALES[encoded.quantizer.scale_dtype])

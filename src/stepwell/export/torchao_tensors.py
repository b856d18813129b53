"""torchao tensors: an encoded matrix as torchao's IntxUnpackedToInt8Tensor, and back.

Codes lie in bytes whatever their width, scales in float32, zero points in bytes; the product of scale and code is rounded to the tensor's
own dtype once, as `Quantizer(compute=)` does. torchao's packed 4-bit tensors need a GPU library and are not written.
"""

from typing import Any

import torch
from torch import Tensor

from stepwell.blocks import block_length
from stepwell.quantizers import Encoded, Quantizer
from stepwell.runtimes import holders, targets

_ROWS = [row for row in targets() if row.name.startswith("torchao:")]
DTYPES = {None: torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_grid(grid: Quantizer) -> None:
    """Refuse a grid that torchao's integers do not hold.

    Raises:
        ValueError: says which targets hold it.
    """
    if grid.axis not in (None, 1, -1) or not any(row.holds(grid) for row in _ROWS):
        names = ", ".join(f'target("{row.name}")' for row in _ROWS)
        raise ValueError(f"torchao's integers do not hold the grid {grid}. Quantize with one of {names}. {holders(grid)}")


def to_torchao(encoded: Encoded) -> Any:
    """Return an encoded matrix `(rows, columns)` as torchao's tensor."""
    from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import IntxUnpackedToInt8Tensor

    grid, codes = encoded.quantizer, encoded.codes.cpu()
    scales = encoded.scales.detach().cpu().float().contiguous()
    offset = _offset(grid)
    zeros = torch.zeros_like(scales, dtype=torch.int8)
    if encoded.zero_points is not None:
        zeros = (encoded.zero_points.cpu() - offset).to(torch.int8)
    return IntxUnpackedToInt8Tensor(
        (codes.to(torch.int16) - offset).to(torch.int8),
        scales,
        zeros,
        getattr(torch, f"int{grid.format.bits}"),
        (1, block_length(tuple(codes.shape), grid.block, None)),
        DTYPES[grid.compute],
        None,
    )


def held(stored: Any, grid: Quantizer) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, scales and zero points of torchao's tensor, as `Encoded` has them; zero points are zero where the grid has none."""
    offset = _offset(grid)
    codes = stored.qdata.to(torch.int16) + offset
    return codes, stored.scale.float(), stored.zero_point.float() + (offset if grid.format.levels == "affine" else 0)


def config(grid: Quantizer) -> Any:
    """Return torchao's own description of a grid."""
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerAxis, PerGroup

    granularity = PerGroup(grid.block) if isinstance(grid.block, int) else PerAxis(0)
    mapping = MappingType.ASYMMETRIC if grid.format.levels == "affine" else MappingType.SYMMETRIC
    return IntxWeightOnlyConfig(getattr(torch, f"int{grid.format.bits}"), granularity, mapping)


def _offset(grid: Quantizer) -> int:
    """Return what is subtracted from unsigned codes to make them signed bytes."""
    return int(2 ** (grid.format.bits - 1)) if grid.format.levels == "affine" else 0

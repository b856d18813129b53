"""Targets: the grids that runtimes hold, so that training happens on exactly what will run.

Sources: onnxruntime's contrib operator `com.microsoft.MatMulNBits`; ggml's block layouts.
"""

from dataclasses import dataclass
from typing import Literal

from stepwell.presets import intn
from stepwell.quantizers import Quantizer


@dataclass(frozen=True)
class Target:
    """One runtime's weight grid.

    Attributes:
        name: what `target()` takes.
        quantizer: the grid.
        bits: bit widths the runtime has a kernel for.
        blocks: block lengths it takes; the first is the default.
        note: one sentence for people.
    """

    name: str
    quantizer: Quantizer
    bits: tuple[int, ...]
    blocks: tuple[int, ...]
    note: str


# Symmetric kernels of both families subtract half the code range, so all 2**bits codes are usable with a signed scale: the weight of
# largest magnitude sits on the lowest code, exactly.
_TARGETS = {
    row.name: row
    for row in (
        Target(
            "onnx:matmulnbits",
            intn(4, block=32, levels="full"),
            (4, 8),
            (32, 16, 64, 128, 256),
            "onnxruntime MatMulNBits: float32 scales per block of inputs; kernels compute in float32 at accuracy level 0 or 1.",
        ),
        Target(
            "gguf:q4_0",
            intn(4, block=32, levels="full", scale_dtype="fp16"),
            (4,),
            (32,),
            "llama.cpp Q4_0: float16 scales per block of 32 inputs; kernels round activations to 8 bits.",
        ),
    )
}


def targets() -> tuple[Target, ...]:
    """Return every known runtime grid."""
    return tuple(_TARGETS.values())


def target(name: str, *, bits: int | None = None, block: int | None = None, axis: Literal[0] | None = None) -> Quantizer:
    """Return the grid of a runtime.

    Args:
        name: one of `targets()`, for example "onnx:matmulnbits" or "gguf:q4_0".
        bits: bit width where the runtime has several; None is 4.
        block: block length where the runtime has several; None is 32.
        axis: 0 for weights stored as `(in, out)`, such as GPT-2's Conv1D.

    Raises:
        ValueError: an unknown name, or bits or a block that the runtime does not have.

    >>> print(target("gguf:q4_0"))
    int4/full block 32, absmax fp16 scales
    """
    if name not in _TARGETS:
        raise ValueError(f"`name` must be one of {', '.join(_TARGETS)}: got {name!r}.")
    found = _TARGETS[name]
    bits = found.quantizer.format.bits if bits is None else bits
    block = found.blocks[0] if block is None else block
    if bits not in found.bits:
        raise ValueError(f"`bits` of {name} must be one of {found.bits}: got {bits}.")
    if block not in found.blocks:
        raise ValueError(f"`block` of {name} must be one of {sorted(found.blocks)}: got {block}.")
    return intn(bits, block=block, levels="full", scale_dtype=found.quantizer.scale_dtype, axis=axis)

"""Targets: the grids that runtimes hold, so that training happens on exactly what will run.

Sources: onnxruntime's contrib operator `com.microsoft.MatMulNBits` and ONNX's DequantizeLinear; compressed-tensors' compressors and the
kernels that vLLM has for them; torchao's IntxUnpackedToInt8Tensor; ggml's block layouts.
"""

from dataclasses import dataclass, replace
from typing import Literal

from stepwell.blocks import Block
from stepwell.formats import TERNARY, Levels, integer
from stepwell.presets import fp8, intn, mxfp4, nvfp4, ternary
from stepwell.quantizers import Compute, Quantizer
from stepwell.scales import ScaleDtype

ANY: Literal["any"] = "any"  # of blocks: whatever divides


@dataclass(frozen=True)
class Target:
    """One runtime's weight grid.

    Attributes:
        name: what `target()` takes.
        quantizer: the grid.
        bits: bit widths the runtime has a kernel for.
        blocks: block lengths it takes, "channel" for one scale per output; the first is the default, "any" stands for all others.
        note: one sentence for people.
        levels: how else integer codes of these widths may lie around zero, besides the quantizer's own way.
        scale_dtypes: what scales it stores, besides the quantizer's own dtype.
        computes: dtypes in which it may multiply code and scale, besides the quantizer's own.
        everything: whether it holds any grid at all; the lists above are then what `target()` offers.
    """

    name: str
    quantizer: Quantizer
    bits: tuple[int, ...]
    blocks: tuple[Block | Literal["any"], ...]
    note: str
    levels: tuple[Levels, ...] = ()
    scale_dtypes: tuple[ScaleDtype, ...] = ()
    computes: tuple[Compute, ...] = ()
    everything: bool = False

    def holds(self, grid: Quantizer) -> bool:
        """Say whether the runtime can hold weights on a grid, codes and scales unchanged; along which axis is not looked at."""
        if self.everything:
            return True
        own = self.quantizer
        formats = {own.format, *(integer(bits, way) for bits in self.bits for way in (own.format.levels, *self.levels) if way)}
        if own.format.levels and own.format != TERNARY and 2 in self.bits and "symmetric" in (own.format.levels, *self.levels):
            formats.add(TERNARY)  # three of the four codes of two bits
        return (
            grid.format in formats
            and grid.scale_dtype in (own.scale_dtype, *self.scale_dtypes)
            and (grid.block in self.blocks or (ANY in self.blocks and grid.block is not None))
            and (grid.format.levels != "affine" or ((grid.zero == "minimum") == (own.zero == "minimum")))
            and grid.compute in (own.compute, *self.computes)
        )


# Symmetric kernels of most families subtract half the code range, so all 2**bits codes are usable with a signed scale ("full"): the weight
# of largest magnitude sits on the lowest code, exactly. At 8 bits that gains nothing, and integer kernels are safest without -128.
_FULL4 = intn(4, block=32, levels="full")
_NARROW: tuple[ScaleDtype, ...] = ("fp16", "bf16")
_HALVES: tuple[Compute, ...] = ("fp16", "bf16")
_MARLIN: tuple[Block, ...] = (32, 64, 128, "channel")
_Q4_1 = Quantizer(integer(4, "affine"), 32, scale_dtype="fp16", zero="minimum")


def _packed(bits: int) -> Target:
    """Return compressed-tensors' pack-quantized integers."""
    kernels = "vLLM has kernels for it" if bits in (4, 8) else "read by transformers; vLLM has kernels for 4 and 8 bits only"
    grid = intn(bits, block=32, levels="full" if bits < 8 else "symmetric", scale_dtype="bf16")
    note = f"compressed-tensors, {bits}-bit codes packed, bfloat16 scales, which float32 and bfloat16 models both hold; {kernels}."
    others: tuple[Levels, ...] = ("symmetric", "full")
    return Target(f"compressed-tensors:int{bits}", grid, (bits,), (*_MARLIN, ANY), note, others, ("fp32", "fp16"), _HALVES)


def _intx(bits: int) -> Target:
    """Return torchao's weight-only integers."""
    grid = intn(bits, block=32, levels="full" if bits < 8 else "symmetric")
    note = f"torchao Intx weight-only, {bits}-bit codes in bytes (its packed 4-bit tensors need a GPU), float32 scales."
    return Target(f"torchao:int{bits}", grid, (bits,), (*_MARLIN, ANY), note, ("symmetric", "full", "affine"), _NARROW, _HALVES)


_TARGETS = {
    row.name: row
    for row in (
        Target(
            "onnx:matmulnbits",
            _FULL4,
            (2, 4, 8),
            (32, 16, 64, 128, 256),
            "onnxruntime MatMulNBits: float32 scales per block of inputs; kernels compute in float32 at accuracy level 0 or 1.",
            ("symmetric", "affine"),
            _NARROW,
        ),
        Target(
            "onnx:qdq",
            _FULL4,
            (2, 3, 4, 5, 6, 7, 8),
            (32, 16, 64, 128, 256, "channel", ANY),
            "ONNX DequantizeLinear: float32 scales; codes of 3 and of 5 to 7 bits are stored in 4 and 8, and 2 bits need opset 25.",
            ("symmetric", "affine"),
            _NARROW,
        ),
        *(_packed(bits) for bits in (8, 4, 3, 2)),
        Target(
            "compressed-tensors:fp8",
            fp8(),
            (8,),
            ("channel", None),
            "compressed-tensors float-quantized: e4m3 weights, a float32 scale per output.",
            scale_dtypes=_NARROW,
            computes=_HALVES,
        ),
        Target(
            "compressed-tensors:nvfp4",
            nvfp4(compute="bf16"),
            (4,),
            (16,),
            "compressed-tensors nvfp4-pack-quantized: e4m3 scales and the reciprocal of the tensor's scale; decoded to bfloat16.",
        ),
        Target(
            "compressed-tensors:mxfp4",
            mxfp4(compute="bf16"),
            (4,),
            (32,),
            "compressed-tensors mxfp4-pack-quantized: power-of-two scales per 32 inputs; decoded to bfloat16, exactly.",
            computes=(None,),
        ),
        *(_intx(bits) for bits in (8, 4, 3, 2)),
        Target(
            "gguf:q4_0",
            intn(4, block=32, levels="full", scale_dtype="fp16"),
            (4,),
            (32,),
            "llama.cpp Q4_0: float16 scales per block of 32 inputs; kernels round activations to 8 bits.",
            ("symmetric",),
        ),
        Target("gguf:q4_1", _Q4_1, (4,), (32,), "llama.cpp Q4_1: float16 scale and minimum per block of 32 inputs."),
        Target(
            "gguf:q8_0",
            intn(8, block=32, levels="symmetric", scale_dtype="fp16"),
            (8,),
            (32,),
            "llama.cpp Q8_0: float16 scales per block of 32 inputs.",
            ("full",),
        ),
        Target("gguf:tq1_0", ternary(block=256, scale_dtype="fp16"), (2,), (256,), "llama.cpp TQ1_0: ternary, five weights to a byte."),
        Target("gguf:tq2_0", ternary(block=256, scale_dtype="fp16"), (2,), (256,), "llama.cpp TQ2_0: ternary, four weights to a byte."),
        Target("gguf:mxfp4", mxfp4(), (4,), (32,), "llama.cpp MXFP4: power-of-two scales per 32 inputs."),
        Target(
            "safetensors",
            intn(4, block=32, levels="full"),
            (2, 3, 4, 5, 6, 7, 8),
            (32, 16, 64, 128, 256, "channel", ANY),
            "Codes and scales as they are, for any model and grid: what `stepwell.save` writes.",
            computes=_HALVES,
            everything=True,
        ),
    )
}
_FAMILIES = ("compressed-tensors", "torchao")  # without a width after the colon: the integers of `bits`


def targets() -> tuple[Target, ...]:
    """Return every known runtime grid."""
    return tuple(_TARGETS.values())


def target(
    name: str, *, bits: int | None = None, block: Block = None, axis: Literal[0] | None = None, compute: Compute = None
) -> Quantizer:
    """Return the grid of a runtime.

    Args:
        name: one of `targets()`, for example "onnx:matmulnbits" or "gguf:q4_0"; "compressed-tensors" and "torchao" are their integers.
        bits: bit width where the runtime has several; None is its default, 4 for most.
        block: block length where the runtime has several, "channel" for one scale per output; None is its default, 32 for most.
        axis: 0 for weights stored as `(in, out)`, such as GPT-2's Conv1D.
        compute: "bf16" or "fp16" where the model will be run in that dtype and the runtime then rounds `scale * code` to it.

    Raises:
        ValueError: an unknown name, or bits, a block or a dtype that the runtime does not have; says which targets do.

    >>> print(target("gguf:q4_0"))
    int4/full block 32, absmax fp16 scales
    """
    if name in _FAMILIES:
        name, bits = f"{name}:int{4 if bits is None else bits}", None
    if name not in _TARGETS:
        raise ValueError(f"`name` must be one of {', '.join([*_TARGETS, *_FAMILIES])}: got {name!r}.")
    found = _TARGETS[name]
    grid = found.quantizer
    bits = grid.format.bits if bits is None else bits
    length = grid.block if block is None else block
    if bits not in found.bits:
        others = [row.name for row in targets() if bits in row.bits and row.quantizer.format.levels and row.quantizer.format != TERNARY]
        has = f" Targets with {bits} bits: {', '.join(others)}." if others else ""
        raise ValueError(f"`bits` of {name} must be {' or '.join(map(str, found.bits))}: got {bits}.{has}")
    if length not in found.blocks and not (ANY in found.blocks and isinstance(length, int)):
        raise ValueError(f"`block` of {name} must be one of {', '.join(map(str, found.blocks))}: got {block}.")
    if compute is not None and compute not in (grid.compute, *found.computes):
        raise ValueError(f"`compute` of {name} must be {' or '.join(map(repr, (grid.compute, *found.computes)))}: got {compute!r}.")
    format = grid.format if bits == grid.format.bits else integer(bits, grid.format.levels or "symmetric")
    return replace(grid, format=format, block=length, axis=axis, compute=compute or grid.compute)


def holders(grid: Quantizer) -> str:
    """Name the targets that hold a grid, for the message of one that does not.

    >>> holders(intn(3, levels="full"))
    'Targets that hold int3/full block 32, absmax fp32 scales: onnx:qdq, compressed-tensors:int3, torchao:int3, safetensors.'
    """
    names = ", ".join(row.name for row in targets() if row.holds(grid))
    return f"Targets that hold {grid}: {names}."

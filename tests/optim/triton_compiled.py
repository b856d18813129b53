"""Compile the Triton kernel to machine code of a GPU, without one: `python tests/optim/triton_compiled.py` prints how often it did."""

from itertools import product

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from stepwell.optim import kernel_triton

HOPPER = GPUTarget("cuda", 90, 32)
POINTERS = ("shown", "weight", "grad", "first", "second", "scales")
FLAGS = ("BLENDS", "PUSHES", "FULL", "SHOWS", "HELD")


def compiled(block, flags):
    """Compile what `step` launches for blocks of this length; return its machine code."""
    width = triton.next_power_of_2(block)
    constants = {"BLOCK": block, "WIDTH": width, "ROWS": max(1, kernel_triton.TILE // width), **flags}
    names = kernel_triton._step.arg_names
    kinds = {**dict.fromkeys(names, "fp32"), **dict.fromkeys(POINTERS, "*fp32"), "rows": "i32", **dict.fromkeys(constants, "constexpr")}
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel_triton._step, signature=kinds, constexprs=places)
    return triton.compile(source, target=HOPPER, options={"num_warps": kernel_triton.WARPS}).asm


def main():
    done = 0
    for block, values in product((32, 768, kernel_triton.LONGEST), product((False, True), repeat=len(FLAGS))):
        flags = dict(zip(FLAGS, values, strict=True))
        if block > 32 and (flags["BLENDS"] or flags["FULL"]):
            continue
        code = compiled(block, flags)
        assert code["cubin"]
        assert "div.full" not in code["ptx"]  # quotients are rounded as IEEE says
        assert "sqrt.approx" not in code["ptx"]
        done += 1
    print(f"compiled {done}")


if __name__ == "__main__":
    main()

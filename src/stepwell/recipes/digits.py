"""The demo's run: handwritten digits on a small network, from full precision to 8, 4, 3 and 2 bits."""

from dataclasses import replace

from stepwell.methods.base import Method
from stepwell.methods.lotion import lotion
from stepwell.methods.ste import ste
from stepwell.presets import int2, int3, int8
from stepwell.quantizers import Quantizer
from stepwell.runtimes import target
from stepwell.train.compare import Arm, Comparison

RTN, SEARCHED, STE, LOTION, BOTH = "RTN", "RTN, searched scale", "STE-QAT", "LOTION", "STE + LOTION"
TRAINED = (STE, LOTION, BOTH)


def digits() -> Comparison:
    """Return the whole comparison; the 4-bit grid is the one that onnxruntime's MatMulNBits holds."""
    return Comparison(
        widths=(64, 96, 96, 10),
        batch=64,
        base_steps=2000,
        base_lr=3e-3,
        steps=400,
        lrs=(1e-3, 2e-3),
        grids=((8, int8()), (4, target("onnx:matmulnbits")), (3, int3()), (2, int2())),
        arms=(Arm(RTN), Arm(SEARCHED, rule="mse"), Arm(STE, _ste), Arm(LOTION, _lotion), Arm(BOTH, _both)),
        seeds=(10, 11, 12, 13, 14),
        draws=8,
    )


def quick_digits() -> Comparison:
    """Return the same story, shorter: 4, 3 and 2 bits, fewer steps and seeds, one learning rate."""
    full = digits()
    return replace(full, base_steps=1500, steps=250, lrs=(2e-3,), grids=full.grids[1:], seeds=full.seeds[:3], draws=4)


def _both(quantizer: Quantizer, loss_terms: int) -> Method:
    """STE forward and backward, with LOTION's penalty on the latent weights."""
    return lotion(quantizer, loss_terms=loss_terms, forward="nearest")


def _ste(quantizer: Quantizer, _: int) -> Method:
    """STE needs no loss terms."""
    return ste(quantizer)


def _lotion(quantizer: Quantizer, loss_terms: int) -> Method:
    """LOTION at the strength of its theory."""
    return lotion(quantizer, loss_terms=loss_terms)

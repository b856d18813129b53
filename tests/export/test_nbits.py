"""The operator's layout, against bytes written by hand, onnxruntime's own kernel, and float64 products of decoded weights."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper

import stepwell as sw
from stepwell.export import nbits
from stepwell.quantizers import Encoded, Quantizer

HOLDABLE = [
    sw.target("onnx:matmulnbits"),
    sw.target("onnx:matmulnbits", bits=8, block=64),
    sw.int4(block=16),
    sw.int4(block=48),
    sw.int4(block=128, scale_dtype="fp16"),
    sw.int4(block="channel", scale="mse"),
    sw.int4(block=None),
    sw.int4(block=32, levels="affine"),
    sw.int8(block=16, levels="affine"),
    sw.int8(block=256),
    sw.int8(block=768, scale_dtype="e8m0"),
    sw.int4(block=32, scale_dtype="e4m3"),
    sw.intn(4, block=32, axis=0, levels="affine"),
    sw.intn(8, block="channel", axis=0),
    sw.intn(4, block=None, axis=0),
    sw.target("onnx:matmulnbits", bits=2),
    sw.int2(block=16, levels="affine"),
    sw.int2(block=256),
    sw.int2(block="channel", levels="affine"),
    sw.ternary(block=64),
]


def weight(rows: int = 24, columns: int = 768) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def matrix(grid: Quantizer) -> Encoded:
    """Encode a (24, 768) weight, or its transpose where the grid's axis says so."""
    return grid.encode(weight().T.contiguous() if grid.axis == 0 else weight())


def single_node(held: nbits.Held) -> onnxruntime.InferenceSession:
    """Build a file of one operator without the exporter."""
    parts = nbits.to_inputs(held)
    outputs, inputs = held.codes.shape
    node = helper.make_node(
        "MatMulNBits", ["A", *parts], ["Y"], domain="com.microsoft",
        N=outputs, K=inputs, bits=held.bits, block_size=held.block, accuracy_level=1,
    )  # fmt: skip
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", size]) for name, size in (("A", inputs), ("Y", outputs))]
    constants = [onnx.numpy_helper.from_array(array, name) for name, array in parts.items()]
    versions = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "g", ends[:1], ends[1:], constants), opset_imports=versions, ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString())


@pytest.mark.parametrize("grid", HOLDABLE, ids=str)
@pytest.mark.parametrize("rows", [1, 5, 33])
def test_the_kernel_multiplies_with_the_decoded_weight(grid, rows):
    encoded = matrix(grid)
    decoded = encoded.decode().double()
    decoded = decoded.T if grid.axis == 0 else decoded
    x = torch.randn(rows, 768, generator=torch.Generator().manual_seed(1))
    found = single_node(nbits.hold(encoded)).run(None, {"A": x.numpy()})[0]
    # one float32 dot product of K terms errs by at most about K u sum |a||w|, u = 2**-24; the kernel scales block sums: two roundings more
    bound = (768 + 2) * 2**-24 * (x.double().abs() @ decoded.abs().T)
    assert bool(((torch.from_numpy(found).double() - x.double() @ decoded.T).abs() <= bound).all())


@pytest.mark.parametrize("grid", HOLDABLE, ids=str)
def test_operator_form_decodes_to_the_same_bits_and_survives_packing(grid):
    encoded = matrix(grid)
    held = nbits.hold(encoded)
    decoded = encoded.decode().T if grid.axis == 0 else encoded.decode()
    assert np.array_equal(held.decode(), decoded.numpy())
    parts = nbits.to_inputs(held)
    read = nbits.from_inputs(
        parts["codes"], parts["scales"], parts.get("zero_points"), outputs=24, inputs=768, bits=held.bits, block=held.block
    )
    assert all(np.array_equal(one, two) for one, two in zip(held[:3], read[:3], strict=True))
    assert read[3:] == held[3:]


def test_four_bit_bytes_by_hand():
    """Codes -8..7 become 0..15; the first of two sits in the low half; scales keep their sign; three zero points take two bytes."""
    full = sw.target("onnx:matmulnbits", block=16)
    codes = torch.tensor([[-8, 7, 0, 1, -1, *[0] * 11]], dtype=torch.int8)
    parts = nbits.to_inputs(nbits.hold(Encoded(codes, torch.tensor([[-0.5]]), full)))
    assert parts["codes"].tolist() == [[[0xF0, 0x98, 0x87, 0x88, 0x88, 0x88, 0x88, 0x88]]]
    assert parts["scales"].tolist() == [-0.5]
    assert "zero_points" not in parts
    affine = sw.int4(block=16, levels="affine")
    codes = torch.arange(48, dtype=torch.uint8).reshape(1, 48) % 16
    encoded = Encoded(codes, torch.ones(1, 3), affine, zero_points=torch.tensor([[3.0, 0.0, 15.0]]))
    parts = nbits.to_inputs(nbits.hold(encoded))
    assert parts["codes"][0, 0].tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
    assert parts["zero_points"].tolist() == [0x03, 0x0F]


def test_two_bit_bytes_by_hand():
    """Codes -2..1 become 0..3, four to a byte, the first in the lowest bits; a row's five zero points take two bytes."""
    codes = torch.tensor([[-2, -1, 0, 1, 1, 0, -1, -2, *[0] * 8]], dtype=torch.int8)
    parts = nbits.to_inputs(nbits.hold(Encoded(codes, torch.tensor([[-0.5]]), sw.int2(block=16, levels="full"))))
    assert parts["codes"].tolist() == [[[0b11100100, 0b00011011, 0b10101010, 0b10101010]]]
    codes = torch.arange(80, dtype=torch.uint8).reshape(1, 80) % 4
    encoded = Encoded(codes, torch.ones(1, 5), sw.int2(block=16, levels="affine"), zero_points=torch.tensor([[3.0, 0.0, 1.0, 2.0, 1.0]]))
    assert nbits.to_inputs(nbits.hold(encoded))["zero_points"].tolist() == [0b10010011, 0b00000001]


def test_long_blocks_are_split_and_their_scales_repeated():
    held = nbits.hold(sw.int4(block="channel").encode(weight()))
    assert held.block == 256  # the longest block that divides 768
    assert (held.scales == held.scales[:, :1]).all()


# inputs -> the longest block of the operator that divides them
@pytest.mark.parametrize(("inputs", "block"), [(32, 32), (48, 16), (64, 64), (256, 256), (320, 64), (384, 128)])
@pytest.mark.parametrize("span", [None, "channel"])
@pytest.mark.parametrize("levels", ["symmetric", "affine"])
def test_one_scale_for_all_inputs_is_repeated_over_blocks_of_one_row(inputs, block, span, levels):
    encoded = sw.int4(block=span, levels=levels).encode(weight(rows=16, columns=inputs))
    assert nbits.refusal(encoded) is None
    held = nbits.hold(encoded)
    assert (held.block, held.scales.shape) == (block, (16, inputs // block))
    assert np.array_equal(held.decode(), encoded.decode().numpy())
    x = torch.randn(3, inputs, generator=torch.Generator().manual_seed(1))
    found = torch.from_numpy(single_node(held).run(None, {"A": x.numpy()})[0]).double()
    decoded = encoded.decode().double()
    bound = (inputs + 2) * 2**-24 * (x.double().abs() @ decoded.abs().T)  # as for the kernel above
    assert bool(((found - x.double() @ decoded.T).abs() <= bound).all())


@pytest.mark.parametrize("span", [None, "channel"])
def test_inputs_that_no_block_divides_are_refused(span):
    assert "got one scale for 24 inputs" in str(nbits.refusal(sw.int4(block=span).encode(weight(rows=64, columns=24))))


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        (sw.int2(levels="mid"), "got int2/mid"),
        (sw.int3(), "got int3"),
        (sw.intn(5), "got int5"),
        (sw.int4(levels="mid"), "got int4/mid"),
        (sw.mxfp4(), "got fp4_e2m1"),
        (sw.fp8(), "got fp8_e4m3"),
        (sw.int4(block=8), "one scale for 8 inputs"),
        (sw.int4(block=24), "one scale for 24 inputs"),
        (sw.intn(4, compute="bf16"), "compute='bf16'"),
    ],
)
def test_other_grids_are_refused_by_name(grid, words):
    assert words in str(nbits.refusal(matrix(grid)))


def test_block_minima_and_double_scales_are_refused():
    from dataclasses import replace

    assert "minima" in str(nbits.refusal(replace(sw.int4(levels="affine"), zero="minimum").encode(weight())))
    assert "float64 scales" in str(nbits.refusal(sw.int4().encode(weight().double())))
    assert nbits.refusal(sw.int4(scale=0.125).encode(weight().double())) is None  # this scale float32 holds


@pytest.mark.parametrize("change", [{"inputs": 752}, {"outputs": 23}, {"bits": 8}, {"bits": 3}, {"block": 64}])
def test_arrays_that_do_not_fit_are_refused(change):
    parts = nbits.to_inputs(nbits.hold(sw.int4().encode(weight())))
    with pytest.raises(ValueError, match="MatMulNBits node"):
        nbits.from_inputs(parts["codes"], parts["scales"], None, **{"outputs": 24, "inputs": 768, "bits": 4, "block": 32, **change})

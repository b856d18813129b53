"""Encoded weights: decoding equals the call bit for bit, and other runtimes read the same numbers from our codes and scales.

The record must have room for what runtimes hold: each layout is written here by hand, from its published description, and read back by
the runtime's own code where there is one.
"""

import gguf
import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from gguf import quants
from tests.cases import Q4_0, Q4_1, QUANTIZERS, gaussian, seeded

from stepwell import packing, quantizers
from stepwell.blocks import to_blocks
from stepwell.formats import integer
from stepwell.presets import int4, intn, mxfp4, nvfp4
from stepwell.quantizers import Encoded, Quantizer
from stepwell.rounding import stochastic

HELD = {"fp16": torch.float16, "bf16": torch.bfloat16, "e8m0": torch.float8_e8m0fnu, "e4m3": torch.float8_e4m3fn}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_decoding_equals_the_call_bit_for_bit(quantizer, dtype):
    weight = gaussian(8, 64, seed=0, dtype=dtype)
    assert torch.equal(quantizer.encode(weight).decode(), quantizer(weight))
    drawn = quantizer.encode(weight, rounding=stochastic(seeded(1)))
    assert torch.equal(drawn.decode(), quantizer(weight, rounding=stochastic(seeded(1))))


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_pieces_have_the_codes_of_the_whole(quantizer, monkeypatch):
    weight = gaussian(12, 64, seed=5)
    whole = quantizer.encode(weight).codes
    assert weight.numel() < quantizers.PIECE
    for piece in (1, 96, 250):  # a block at a time, several, and a last piece that is smaller
        monkeypatch.setattr(quantizers, "PIECE", piece)
        assert torch.equal(quantizer.encode(weight).codes, whole)


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_what_is_stored_is_codes_of_the_format_and_scales_of_the_dtype(quantizer):
    encoded = quantizer.encode(gaussian(8, 64, seed=1))
    assert encoded.codes.dtype in (torch.int8, torch.uint8)
    assert encoded.codes.is_contiguous()
    assert set(encoded.codes.flatten().tolist()) <= set(quantizer.format.codes)
    narrow = HELD.get(quantizer.scale_dtype, torch.float32)
    assert torch.equal(encoded.scales.to(narrow).float(), encoded.scales)
    assert (encoded.tensor_scale is None) == (quantizer.scale_dtype != "e4m3")
    assert (encoded.zero_points is None) == (quantizer.format.levels != "affine")
    if encoded.zero_points is not None and quantizer.zero == "integer":
        assert set(encoded.zero_points.flatten().tolist()) <= set(quantizer.format.codes)


def test_decoding_refuses_codes_the_format_does_not_have():
    encoded = int4().encode(gaussian(2, 32, seed=2))
    with pytest.raises(ValueError, match=r"`codes` of int4 must lie in -7\.\.7: got -8"):
        encoded._replace(codes=torch.full_like(encoded.codes, -8)).decode()


def nibbles(codes: np.ndarray) -> np.ndarray:
    """Return ggml's `(blocks, 16)` bytes of `(blocks, 32)` unsigned codes: the first half in the low nibbles, the second in the high."""
    return (codes[:, :16] | codes[:, 16:] << 4).astype(np.uint8)


def half(values: torch.Tensor) -> np.ndarray:
    """Return the two bytes of each value in float16, which must hold it."""
    found = values.reshape(-1, 1).numpy().astype(np.float16)
    assert np.array_equal(found.astype(np.float32), values.reshape(-1, 1).numpy())
    return found.view(np.uint8)


def ggml(encoded: Encoded, kind: str) -> np.ndarray:
    """Return the bytes of an encoded weight in one of ggml's layouts, `(rows, bytes)`."""
    codes = to_blocks(encoded.codes, 32).numpy().astype(np.int32)
    if kind == "Q4_0":
        parts = [half(encoded.scales), nibbles((codes + 8).astype(np.uint8))]
    elif kind == "Q4_1":
        parts = [half(encoded.scales), half(encoded.zero_points), nibbles(codes.astype(np.uint8))]
    else:
        exponent = encoded.scales.reshape(-1, 1).numpy().astype(ml_dtypes.float8_e8m0fnu).view(np.uint8)
        parts = [exponent, nibbles(codes.astype(np.uint8))]
    return np.concatenate(parts, axis=1).reshape(encoded.codes.shape[0], -1)


@pytest.mark.parametrize(
    ("kind", "quantizer"), [("Q4_0", Q4_0), ("Q4_1", Q4_1), ("MXFP4", mxfp4()), ("MXFP4", mxfp4(rule="floor"))], ids=str
)
def test_gguf_reads_the_same_numbers_from_our_codes(kind, quantizer):
    weight = gaussian(16, 128, seed=3)
    weight[0, :32] = 0
    encoded = quantizer.encode(weight)
    theirs = quants.dequantize(ggml(encoded, kind), gguf.GGMLQuantizationType[kind])
    assert np.array_equal(theirs, encoded.decode().numpy())
    assert ggml(encoded, kind).nbytes == weight.numel() // 32 * {"Q4_0": 18, "Q4_1": 20, "MXFP4": 17}[kind]


def test_q4_0_scales_and_codes_are_the_ones_gguf_would_choose():
    weight = gaussian(16, 128, seed=4)
    theirs = quants.dequantize(quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q4_0), gguf.GGMLQuantizationType.Q4_0)
    ours = Q4_0(weight).numpy()
    # gguf divides by the scale before it is rounded to float16 and rounds ties up: codes differ beside middles only
    same = np.isclose(ours, theirs, rtol=0, atol=0)
    assert same.mean() > 0.995
    assert np.abs(ours - weight.numpy()).sum() <= np.abs(theirs - weight.numpy()).sum() * (1 + 1e-4)


@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_onnxruntime_reads_the_same_numbers_from_our_codes(bits, zeros, block):
    weight = gaussian(32, 64, seed=5)
    encoded = intn(bits, block=block, levels="affine" if zeros else "full").encode(weight)
    blocks = 64 // block
    offset = 0 if zeros else 2 ** (bits - 1)  # without zero points the operator subtracts half the range
    inputs = {
        "codes": packing.pack(encoded.codes.to(torch.int16) + offset, bits).reshape(32, blocks, block * bits // 8).numpy(),
        "scales": encoded.scales.reshape(-1).numpy(),
    }
    if zeros:
        padded = torch.nn.functional.pad(encoded.zero_points, (0, -blocks % 8)).to(torch.int16)
        inputs["zeros"] = packing.pack(padded, bits).reshape(32, -1)[:, : -(-blocks * bits // 8)].reshape(-1).numpy()
    node = onnx.helper.make_node(
        "MatMulNBits", ["x", *inputs], ["y"], domain="com.microsoft", K=64, N=32, bits=bits, block_size=block, accuracy_level=1
    )
    graph = onnx.helper.make_graph(
        [node],
        "one",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [64, 64])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [64, 32])],
        [onnx.numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in inputs.items()],
    )
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (theirs,) = session.run(None, {"x": np.eye(64, dtype=np.float32)})  # the identity reads the weights out, exactly
    assert np.array_equal(theirs.T, encoded.decode().numpy())


def test_nvfp4_is_fp4_times_fp8_times_one_float():
    weight = gaussian(8, 64, seed=6)
    encoded = nvfp4().encode(weight)
    codes = encoded.codes.numpy().astype(np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    scales = encoded.scales.numpy().astype(ml_dtypes.float8_e4m3fn)
    assert np.array_equal(scales.astype(np.float32), encoded.scales.numpy())
    assert float(scales.astype(np.float32).max()) == 448  # the tensor scale puts the largest scale on the top
    assert encoded.tensor_scale.shape == ()
    combined = scales.astype(np.float32) * np.float32(encoded.tensor_scale)
    assert np.array_equal(codes * np.repeat(combined, 16, axis=1), encoded.decode().numpy())


def test_conv1d_and_experts_keep_their_shape_and_give_scales_per_output():
    conv1d, experts = gaussian(64, 48, seed=7), gaussian(4 * 64, 24, seed=8).reshape(4, 64, 24)
    one, many = intn(4, axis=0).encode(conv1d), intn(4, axis=1, levels="full", scale_dtype="fp16").encode(experts)
    assert (one.codes.shape, one.scales.shape) == ((64, 48), (48, 2))
    assert (many.codes.shape, many.scales.shape) == ((4, 64, 24), (4 * 24, 2))
    by_hand = many.codes.float().reshape(4, 2, 32, 24) * many.scales.reshape(4, 24, 2).permute(0, 2, 1)[:, :, None]
    assert torch.equal(by_hand.reshape(4, 64, 24), many.decode())
    theirs = quants.dequantize(  # a transposed expert is a Q4_0 weight of its own
        ggml(Encoded(many.codes[1].t().contiguous(), many.scales[24:48], Q4_0), "Q4_0"), gguf.GGMLQuantizationType.Q4_0
    )
    assert np.array_equal(theirs.T, many.decode()[1].numpy())


def test_two_bit_weights_fit_in_two_bits():
    quantizer = Quantizer(integer(2, "affine"), 16)
    encoded = quantizer.encode(gaussian(4, 32, seed=9))
    packed = packing.pack(encoded.codes, 2)
    assert packed.numel() == 4 * 32 * 2 // 8
    assert torch.equal(packing.unpack(packed, quantizer.format, 128).reshape(4, 32), encoded.codes)

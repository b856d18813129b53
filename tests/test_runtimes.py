"""Targets are the grids of their runtimes."""

import pytest
from tests.cases import Q4_0, Q4_1

import stepwell as sw


def test_targets_are_the_grids_their_runtimes_hold():
    assert sw.target("gguf:q4_0") == Q4_0
    assert sw.target("onnx:matmulnbits") == sw.intn(4, block=32, levels="full")
    assert sw.target("onnx:matmulnbits", bits=8, block=128) == sw.intn(8, block=128, levels="full")
    assert sw.target("gguf:q4_0", axis=0) == sw.intn(4, block=32, levels="full", scale_dtype="fp16", axis=0)


def test_every_listed_target_can_be_built_in_every_listed_way():
    assert {target.name.partition(":")[0] for target in sw.targets()} == {"onnx", "compressed-tensors", "torchao", "gguf", "safetensors"}
    for listed in sw.targets():
        assert listed.quantizer == sw.target(listed.name)
        for bits in listed.bits:
            for block in set(listed.blocks) - {"any", None}:
                built = sw.target(listed.name, bits=bits, block=block)
                assert (built.format.bits, built.block) == (bits, block)
                assert listed.holds(built)


def test_families_take_bits():
    assert sw.target("compressed-tensors") == sw.target("compressed-tensors:int4")
    assert sw.target("torchao", bits=3) == sw.target("torchao:int3")
    assert sw.target("compressed-tensors", compute="bf16").compute == "bf16"


@pytest.mark.parametrize(
    ("grid", "held", "not_held"),
    [
        (sw.int3(levels="full"), ["onnx:qdq", "compressed-tensors:int3", "torchao:int3", "safetensors"], ["onnx:matmulnbits", "gguf:q4_0"]),
        (Q4_0, ["gguf:q4_0", "onnx:matmulnbits", "compressed-tensors:int4"], ["gguf:q8_0", "gguf:q4_1"]),
        (sw.int4(), ["onnx:qdq", "compressed-tensors:int4", "torchao:int4"], ["gguf:q4_0"]),  # float32 scales
        (sw.ternary(block=256, scale_dtype="fp16"), ["gguf:tq1_0", "gguf:tq2_0", "compressed-tensors:int2"], ["gguf:mxfp4"]),
        (sw.mxfp4(rule="floor"), ["gguf:mxfp4", "compressed-tensors:mxfp4"], ["compressed-tensors:nvfp4"]),
        (Q4_1, ["gguf:q4_1", "safetensors"], ["onnx:matmulnbits", "compressed-tensors:int4"]),
        (sw.int4(levels="affine"), ["onnx:matmulnbits", "torchao:int4"], ["gguf:q4_1", "compressed-tensors:int4"]),
        (sw.int4(block=None), ["safetensors"], ["compressed-tensors:int4", "onnx:matmulnbits"]),
        (sw.intn(4, levels="mid"), ["safetensors"], ["onnx:matmulnbits", "torchao:int4"]),
    ],
    ids=str,
)
def test_holding_a_grid_follows_its_codes_scales_and_block(grid, held, not_held):
    found = {listed.name for listed in sw.targets() if listed.holds(grid)}
    assert set(held) <= found
    assert not set(not_held) & found


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "gguf:q9_9"}, "`name`.*gguf:q4_0.*got 'gguf:q9_9'"),
        ({"name": "gguf:q4_0", "bits": 3}, "`bits`.*got 3"),
        ({"name": "onnx:matmulnbits", "bits": 3}, "got 3. Targets with 3 bits: onnx:qdq, compressed-tensors:int3, torchao:int3, safe"),
        ({"name": "gguf:q4_0", "compute": "bf16"}, "`compute`.*got 'bf16'"),
        ({"name": "gguf:q4_0", "block": 64}, "`block`.*got 64"),
        ({"name": "onnx:matmulnbits", "block": 8}, "`block`.*got 8"),
    ],
)
def test_what_a_runtime_does_not_have_is_refused_by_value(options, said):
    with pytest.raises(ValueError, match=said):
        sw.target(**options)

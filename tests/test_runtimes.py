"""Targets are the grids of their runtimes."""

import pytest
from tests.cases import Q4_0

import stepwell as sw


def test_targets_are_the_grids_their_runtimes_hold():
    assert sw.target("gguf:q4_0") == Q4_0
    assert sw.target("onnx:matmulnbits") == sw.intn(4, block=32, levels="full")
    assert sw.target("onnx:matmulnbits", bits=8, block=128) == sw.intn(8, block=128, levels="full")
    assert sw.target("gguf:q4_0", axis=0) == sw.intn(4, block=32, levels="full", scale_dtype="fp16", axis=0)


def test_every_listed_target_can_be_built_in_every_listed_way():
    assert {target.name for target in sw.targets()} >= {"onnx:matmulnbits", "gguf:q4_0"}
    for listed in sw.targets():
        assert listed.quantizer == sw.target(listed.name)
        for bits in listed.bits:
            for block in listed.blocks:
                built = sw.target(listed.name, bits=bits, block=block)
                assert (built.format.bits, built.block) == (bits, block)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "gguf:q9_9"}, "`name`.*gguf:q4_0.*got 'gguf:q9_9'"),
        ({"name": "gguf:q4_0", "bits": 3}, "`bits`.*got 3"),
        ({"name": "gguf:q4_0", "block": 64}, "`block`.*got 64"),
        ({"name": "onnx:matmulnbits", "block": 8}, "`block`.*got 8"),
    ],
)
def test_what_a_runtime_does_not_have_is_refused_by_value(options, said):
    with pytest.raises(ValueError, match=said):
        sw.target(**options)

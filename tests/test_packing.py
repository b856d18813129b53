"""Packed codes: every width, without gaps, as a big integer would hold them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.cases import FORMATS, seeded

from stepwell import packing


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("count", [1, 7, 8, 9, 1000])
def test_codes_come_back(format, count):
    chosen = torch.randint(len(format.codes), (count,), generator=seeded(count))
    codes = torch.tensor(format.codes)[chosen]
    packed = packing.pack(codes, format.bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() == packing.packed_bytes(count, format.bits) == -(-count // 8) * format.bits
    assert torch.equal(packing.unpack(packed, format, count).long(), codes)


@given(st.integers(1, 8), st.lists(st.integers(0, 255), min_size=1, max_size=40))
def test_bytes_are_one_integer_with_the_first_code_lowest(bits, numbers):
    codes = [number % 2**bits for number in numbers]
    whole = sum(code << (bits * k) for k, code in enumerate(codes))
    expected = whole.to_bytes(-(-len(codes) // 8) * bits, "little")
    assert bytes(packing.pack(torch.tensor(codes), bits).tolist()) == expected


def test_codes_beyond_one_chunk_come_back(monkeypatch):
    monkeypatch.setattr(packing, "CHUNK", 64)
    format = FORMATS[1]
    codes = torch.tensor(format.codes)[torch.randint(len(format.codes), (1000,), generator=seeded(0))]
    assert torch.equal(packing.unpack(packing.pack(codes, format.bits), format, 1000).long(), codes)


@pytest.mark.parametrize("count", [8, 17, 24])
def test_the_wrong_number_of_bytes_is_refused_by_value(count):
    packed = packing.pack(torch.zeros(16, dtype=torch.int8), 4)
    format = next(format for format in FORMATS if format.bits == 4)
    with pytest.raises(ValueError, match=rf"`packed`.*for {count} codes.*got 8"):
        packing.unpack(packed, format, count)

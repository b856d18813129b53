"""Blocks run along the contraction dimension and come back where they were."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepwell.blocks import check_block, contraction, from_blocks, scale_shape, to_blocks


@settings(max_examples=300)
@given(
    shape=st.lists(st.integers(1, 6), min_size=0, max_size=4).map(tuple),
    block=st.sampled_from([None, "channel", 1, 2, 3]),
    data=st.data(),
)
def test_blocks_come_back_where_they_were(shape, block, data):
    axis = data.draw(st.one_of(st.none(), st.integers(-len(shape), len(shape) - 1))) if shape else None
    weight = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    if isinstance(block, int) and contraction(shape, axis) % block:
        with pytest.raises(ValueError, match=f"block={block}"):
            to_blocks(weight, block, axis)
        return
    blocks = to_blocks(weight, block, axis)
    assert torch.equal(from_blocks(blocks, shape, block, axis), weight)
    rows, per_row = scale_shape(shape, block, axis)
    assert blocks.shape[0] == rows * per_row


def test_linear_blocks_are_runs_of_inputs():
    weight = torch.arange(12.0).reshape(2, 6)
    assert to_blocks(weight, 3).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert scale_shape((2, 6), 3) == (2, 2)


def test_convolution_blocks_run_over_all_but_the_output():
    weight = torch.arange(2 * 3 * 2 * 2.0).reshape(2, 3, 2, 2)
    assert to_blocks(weight, 4).tolist() == weight.reshape(2, 12).reshape(6, 4).tolist()
    assert scale_shape((2, 3, 2, 2), "channel") == (2, 1)


def test_conv1d_blocks_run_down_the_columns():
    weight = torch.arange(12.0).reshape(4, 3)  # (in, out)
    assert torch.equal(to_blocks(weight, 2, 0), to_blocks(weight.t(), 2))
    assert scale_shape((4, 3), 2, 0) == (3, 2)


def test_expert_blocks_run_along_the_middle():
    weight = torch.arange(24.0).reshape(2, 4, 3)  # (experts, in, out)
    assert torch.equal(to_blocks(weight, 2, 1), to_blocks(weight.transpose(1, 2).reshape(6, 4), 2))
    assert torch.equal(to_blocks(weight, 2, 1), to_blocks(weight, 2, -2))


def test_rows_stay_in_their_order_when_the_first_of_three_dimensions_is_contracted():
    weight = torch.arange(24.0).reshape(2, 3, 4)
    assert to_blocks(weight, "channel", 0).tolist() == [[k, k + 12] for k in range(12)]


def test_blocks_of_a_contiguous_weight_are_a_view():
    weight = torch.zeros(4, 8)
    assert to_blocks(weight, 4).data_ptr() == weight.data_ptr()


@pytest.mark.parametrize(
    ("shape", "block", "axis", "said"),
    [
        ((4, 6), 4, None, "`block` must divide.*block=4.*\\(4, 6\\)"),
        ((4, 6), 3, 0, "`block` must divide.*block=3.*\\(4, 6\\)"),
        ((0, 6), 3, None, "must have elements.*\\(0, 6\\)"),
        ((4, 6), 3, 2, "`axis`.*axis=2.*\\(4, 6\\)"),
        ((), 3, None, "`block` must divide.*block=3"),
        ((), "channel", 0, "`axis`.*axis=0"),
    ],
)
def test_what_cannot_be_blocked_is_refused_by_value(shape, block, axis, said):
    with pytest.raises(ValueError, match=said):
        to_blocks(torch.zeros(shape), block, axis)


@pytest.mark.parametrize("block", [0, -32, 1.5, True, "row", (32,)])
def test_blocks_that_are_no_length_are_refused_by_value(block):
    with pytest.raises(ValueError, match="`block` must be"):
        check_block(block, None)


@pytest.mark.parametrize("axis", [True, 1.0, "in"])
def test_axes_that_are_no_dimension_are_refused_by_value(axis):
    with pytest.raises(ValueError, match=f"`axis`.*{axis!r}"):
        check_block(32, axis)

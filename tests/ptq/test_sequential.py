"""GPTQ of one weight against the paper's algorithm, written out slowly, and the laws that follow from what it does."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.cases import REPRESENTATIVES
from tests.reference.gptq import gptq as slow

import stepwell as sw
from stepwell.ptq.sequential import sequential


def layer(rows: int = 6, columns: int = 64, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the Hessian of correlated inputs, float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns, dtype=torch.float64) + 0.3 * torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(4 * columns, columns, generator=generator, dtype=torch.float64) @ mix
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64), inputs.T @ inputs / len(inputs)


def reachable(weight: torch.Tensor, quantizer: sw.Quantizer, scale: torch.Tensor) -> np.ndarray:
    """What each weight may become, `(rows, columns, values)`: every value of the format in place of every weight."""
    return np.stack(
        [
            quantizer.encode(weight, scale=scale, rounding=lambda b, v=value: torch.full_like(b.x, v)).decode().numpy()
            for value in quantizer.format.values
        ],
        axis=-1,
    )


def lost(weight: torch.Tensor, rounded: torch.Tensor, hessian: torch.Tensor) -> float:
    return float((((rounded - weight) @ hessian) * (rounded - weight)).sum())


@pytest.mark.parametrize("quantizer", REPRESENTATIVES, ids=str)
def test_equals_the_paper_on_every_grid(quantizer):
    weight, hessian = layer()
    rounded = sequential(weight, hessian, quantizer).decode()
    scale = quantizer.scale(weight)
    places = reachable(weight, replace(quantizer, compute=None), scale)
    wanted = slow(weight.numpy(), hessian.numpy(), reachable(weight, quantizer, scale), places=places)
    assert np.abs(rounded.numpy() - wanted).max() < 1e-6


@pytest.mark.parametrize("quantizer", [sw.int3(block=16), sw.intn(4, block=32, levels="affine"), sw.intn(4, block=None)], ids=str)
def test_equals_the_paper_in_order_of_activation(quantizer):
    weight, hessian = layer(seed=1)
    hessian = hessian * torch.linspace(0.5, 2, 64, dtype=torch.float64).outer(torch.linspace(0.5, 2, 64, dtype=torch.float64))
    order = hessian.diagonal().argsort(descending=True).tolist()
    rounded = sequential(weight, hessian, quantizer, order="activation").decode()
    wanted = slow(weight.numpy(), hessian.numpy(), reachable(weight, quantizer, quantizer.scale(weight)), order=order)
    assert np.abs(rounded.numpy() - wanted).max() < 1e-6
    assert not torch.equal(rounded, sequential(weight, hessian, quantizer).decode())


def test_float32_agrees_with_float64_but_for_near_ties():
    """Wanted positions differ by some 1e-5 steps in float32, so of 16,384 weights about 2e-5 * 16,384 = 0.3 flip first, then their row."""
    weight, hessian = layer(64, 256, seed=2)
    wide = sequential(weight, hessian, sw.int4(block=64)).decode()
    narrow = sequential(weight.float(), hessian.float(), sw.int4(block=64)).decode()
    same = ((narrow - wide).abs() < 1e-5).all(1)
    assert same.float().mean() > 0.9


@pytest.mark.parametrize("columns", [1, 63, 64, 65, 200])
def test_panels_do_not_show(columns):
    weight, hessian = layer(3, columns, seed=3)
    quantizer = sw.int4(block="channel")
    rounded = sequential(weight, hessian, quantizer).decode()
    wanted = slow(weight.numpy(), hessian.numpy(), reachable(weight, quantizer, quantizer.scale(weight)))
    assert np.abs(rounded.numpy() - wanted).max() < 1e-6


def test_without_correlation_it_is_rounding_to_nearest():
    weight, _ = layer()
    for quantizer in REPRESENTATIVES:
        encoded = sequential(weight, torch.diag(torch.rand(64, dtype=torch.float64) + 0.1), quantizer)
        nearest = quantizer.encode(weight)
        assert torch.equal(encoded.decode(), nearest.decode()), quantizer
        assert torch.equal(encoded.codes, nearest.codes), quantizer
        assert torch.equal(encoded.scales, nearest.scales), quantizer


def test_loses_less_than_rounding_to_nearest():
    weight, hessian = layer(32, 128, seed=4)
    for quantizer in (sw.int4(), sw.int3(), sw.int2(levels="full"), sw.mxfp4(), sw.nvfp4()):
        rounded = sequential(weight, hessian, quantizer, damping=0.0).decode()
        assert lost(weight, rounded, hessian) < 0.8 * lost(weight, quantizer(weight), hessian), quantizer


def test_the_unit_of_the_hessian_does_not_matter():
    weight, hessian = layer()
    first, second = (sequential(weight, factor * hessian, sw.int4()).codes for factor in (1.0, 1024.0))
    assert torch.equal(first, second)


def test_given_scales_are_used_and_kept():
    weight, hessian = layer()
    quantizer = sw.int3(block=16)
    scale = sw.ptq.scale_search(weight, quantizer)
    encoded = sequential(weight, hessian, quantizer, scale=scale)
    assert torch.equal(encoded.scales, scale)
    wanted = slow(weight.numpy(), hessian.numpy(), reachable(weight, quantizer, scale))
    assert np.abs(encoded.decode().numpy() - wanted).max() < 1e-6


def test_groups_of_rows_have_their_own_hessian():
    weight, first = layer(4, seed=5)
    other, second = layer(4, seed=6)
    quantizer = sw.int4(block=32)
    both = sequential(torch.cat([weight, other]), torch.stack([first, second]), quantizer)
    apart = [sequential(weight, first, quantizer), sequential(other, second, quantizer)]
    assert torch.equal(both.codes, torch.cat([one.codes for one in apart]))
    whole = sequential(torch.cat([weight, other]), torch.stack([first, second]), sw.intn(4, block=None))
    assert whole.scales.shape == (1, 1)


def test_other_layouts_are_the_same_weight():
    weight, hessian = layer(8, 48, seed=7)
    matrix = sequential(weight, hessian, sw.intn(4, block=16))
    image = sequential(weight.reshape(8, 12, 2, 2), hessian, sw.intn(4, block=16))
    turned = sequential(weight.T.contiguous(), hessian, sw.intn(4, block=16, axis=0))
    tensor = sequential(weight.T.contiguous(), hessian, sw.intn(4, block=None, axis=0))
    assert torch.equal(image.codes, matrix.codes.reshape(8, 12, 2, 2))
    assert torch.equal(turned.codes, matrix.codes.T)
    assert torch.equal(tensor.codes, sequential(weight, hessian, sw.intn(4, block=None)).codes.T)


def test_a_zero_block_stays_zero():
    weight, hessian = layer()
    weight[:, 16:32] = 0
    decoded = sequential(weight, hessian, sw.int4(block=16)).decode()
    assert (decoded[:, 16:32] == 0).all()
    assert (decoded[:, :16] != 0).any()


def test_a_singular_hessian_is_damped_and_reported():
    weight, _ = layer()
    row = torch.linspace(-1, 1, 64, dtype=torch.float64)
    with pytest.warns(UserWarning, match="'fc.weight' is singular at damping 0: it was damped by 1e-06"):
        encoded = sequential(weight, row.outer(row), sw.int4(), damping=0.0, name="fc.weight")
    assert encoded.decode().isfinite().all()
    with pytest.warns(UserWarning, match="'weight' is zero"):
        encoded = sequential(weight, torch.zeros(64, 64), sw.int4())
    assert torch.equal(encoded.decode(), sw.int4()(weight))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"damping": -0.1}, "`damping`.*-0.1"),
        ({"damping": float("nan")}, "`damping`.*nan"),
        ({"order": "random"}, "`order`.*'random'"),
        ({"hessian": torch.eye(63)}, r"`hessian` of 'weight' must be \(64, 64\).*\(63, 63\)"),
        ({"hessian": torch.eye(64).repeat(4, 1, 1)}, r"`hessian`.*\(4, 64, 64\)"),
        ({"hessian": torch.eye(64) * float("inf")}, "`hessian` of 'weight' must be finite: got (inf|nan)"),
        ({"hessian": -torch.eye(64) + 1.1}, "`hessian` of 'weight' must be positive semidefinite"),
    ],
)
def test_bad_input_is_refused(options, words):
    weight, hessian = layer()
    arguments = {"hessian": hessian} | options
    with pytest.raises(ValueError, match=words):
        sequential(weight, arguments.pop("hessian"), sw.int4(), **arguments)

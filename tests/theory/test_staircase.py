"""The staircase rounds as the quantizers do, and refuses what is no grid."""

from types import SimpleNamespace

import numpy as np
import pytest

from stepwell.theory import Staircase


@pytest.mark.parametrize(
    ("kind", "bits", "levels", "spacing"),
    [
        ("end", 2, [-2, -2 / 3, 2 / 3, 2], 4 / 3),
        ("mid", 2, [-1.5, -0.5, 0.5, 1.5], 1.0),
        ("tread", 2, [-2, 0, 2], 2.0),
        ("tread", 3, [-2, -4 / 3, -2 / 3, 0, 2 / 3, 4 / 3, 2], 2 / 3),
        ("end", 1, [-2, 2], 4.0),
        ("mid", 1, [-1, 1], 2.0),
    ],
)
def test_levels_and_spacing_of_each_kind(kind, bits, levels, spacing):
    staircase = Staircase(bits, 2.0, kind)
    np.testing.assert_allclose(staircase.levels, levels, atol=1e-15)
    assert staircase.spacing == pytest.approx(spacing)
    assert staircase.symmetric


@pytest.mark.parametrize(
    "staircase", [Staircase(3, 1.5), Staircase(4, 2.0, "mid"), Staircase(8, 0.7, "tread"), Staircase(16, 3.0)], ids=str
)
def test_a_hard_staircase_returns_the_nearest_level(staircase):
    weight = np.random.default_rng(0).normal(size=300) * staircase.range
    nearest = [staircase.levels[np.argmin(np.abs(staircase.levels - w))] for w in weight]
    np.testing.assert_array_equal(staircase(weight), nearest)


def test_a_smooth_staircase_is_the_mean_over_gaussian_shifts():
    staircase, hard = Staircase(3, 1.5, temperature=0.3), Staircase(3, 1.5)
    shift = np.random.default_rng(0).normal(size=200_000) * 0.3
    for weight in (-2.0, 0.1, 0.7):
        draws = hard(weight + shift)
        assert abs(staircase(weight) - draws.mean()) < 5 * draws.std() / len(draws) ** 0.5


@pytest.mark.parametrize("build", ["int3", "int4 mid", "int4 full", "fp4", "ternary"])
def test_of_a_quantizer_rounds_identically(build):
    torch = pytest.importorskip("torch")
    import stepwell as sw

    quantizer = {
        "int3": lambda: sw.int3(block=None, scale=0.25),
        "int4 mid": lambda: sw.intn(4, block=None, scale=0.25, levels="mid"),
        "int4 full": lambda: sw.intn(4, block=None, scale=0.25, levels="full"),
        "fp4": lambda: sw.fp4(block=None, scale=0.25),
        "ternary": lambda: sw.ternary(block=None, scale=0.25),
    }[build]()
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)  # ties have measure zero
    np.testing.assert_array_equal(Staircase.of(quantizer)(weight.numpy()), quantizer(weight).numpy())


def test_of_reads_only_plain_numbers_and_sorts_a_signed_scale():
    quantizer = SimpleNamespace(format=SimpleNamespace(values=(-2.0, -1.0, 0.0, 1.0), bits=2), rule=-0.5)
    np.testing.assert_array_equal(Staircase.of(quantizer).levels, [-0.5, 0.0, 0.5, 1.0])


@pytest.mark.parametrize("rule", ["absmax", 0.0, float("nan"), True])
def test_of_refuses_a_scale_that_is_not_a_number(rule):
    with pytest.raises(ValueError, match="fixed scale"):
        Staircase.of(SimpleNamespace(format=SimpleNamespace(values=(-1.0, 1.0), bits=1), rule=rule))


def test_of_refuses_a_zero_point():
    with pytest.raises(ValueError, match="zero point"):
        Staircase.of(SimpleNamespace(format=SimpleNamespace(values=(0.0, 1.0), bits=1, levels="affine"), rule=1.0))


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ({"bits": 0, "range": 1.0}, "from 1 to 16: got 0"),
        ({"bits": 17, "range": 1.0}, "from 1 to 16: got 17"),
        ({"bits": 2.5, "range": 1.0}, "got 2.5"),
        ({"bits": 1, "range": 1.0, "kind": "tread"}, "at least 2"),
        ({"bits": 2, "range": -1.0}, "from 1e-06 to .*: got -1.0"),
        ({"bits": 2, "range": 0.0}, "from 1e-06 to .*: got 0.0"),
        ({"bits": 2, "range": 1e-300}, r"from 1e-06 to 1e\+06: got 1e-300"),
        ({"bits": 2, "range": 1e300}, r"from 1e-06 to 1e\+06: got 1e\+300"),
        ({"bits": 2, "range": float("inf")}, "got inf"),
        ({"bits": 2, "range": 1.0, "kind": "round"}, "got 'round'"),
        ({"bits": 2, "range": 1.0, "temperature": -0.1}, "got -0.1"),
        ({"bits": 2, "range": 1.0, "temperature": float("nan")}, "got nan"),
        ({"bits": 2, "range": 1.0, "kind": "levels"}, "got values=None"),
        ({"bits": 2, "range": 1.0, "kind": "levels", "values": (0.0, 0.0, 1.0)}, "strictly increasing"),
        ({"bits": 2, "range": 1.0, "kind": "levels", "values": (1.0,)}, "strictly increasing"),
    ],
)
def test_a_bad_staircase_is_refused_with_its_value(arguments, shown):
    with pytest.raises(ValueError, match=shown):
        Staircase(**arguments)


def test_a_range_in_words_is_refused():
    with pytest.raises(TypeError, match="`range` must be a number: got '2'"):
        Staircase(2, "2")

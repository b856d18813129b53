"""The table of language model recipes: every name makes the run it says, with the counts of parameters that the sizes are called by."""

import pickle
from itertools import pairwise

import pytest
import torch

from stepwell.recipes import lm
from stepwell.train.language import build


def test_every_name_makes_its_own_recipe():
    assert len(set(lm.names())) == len(lm.names()) == 4 * 4 * (1 + 5 * 5)  # ends and sizes, full precision and grids with methods
    for name in lm.names():
        recipe = getattr(lm, name)()
        described = recipe.described()
        assert recipe.name == name
        assert recipe == getattr(lm, name)()
        assert (described["method"] == "full precision") == name.startswith("fp_")
        assert (described["architecture"]["family"] == "olmo2") == ("olmo2" in name)
        assert recipe.cooldown == name.endswith("_cooldown")


@pytest.mark.parametrize(("name", "method"), [("int4_15m", "default"), ("int4_15m_ste", "ste"), ("int4_15m_both", "ste + lotion")])
def test_the_ending_names_the_method(name, method):
    assert getattr(lm, name)().described()["method"] == method


def test_a_recipe_counts_all_loss_terms_of_a_step():
    recipe = lm.int4_150m_lotion()
    assert recipe.loss_terms == 256 * 1024
    assert recipe.made_method().loss_terms == 256 * 1024


def test_the_rate_rises_then_falls_to_its_floor():
    recipe = lm.int4_15m()
    rates = [recipe.learning_rate(step) for step in range(recipe.steps + 1)]
    peak = rates.index(max(rates))
    assert max(rates) == recipe.lr
    assert peak == recipe.warmup - 1
    assert all(a < b for a, b in pairwise(rates[: peak + 1]))
    assert all(a >= b for a, b in pairwise(rates[peak:]))
    assert rates[-1] == 0


@pytest.mark.parametrize("name", ["int5_15m", "fp_15m_ste", "names_", "int4_150m_cooldown_lotion"])
def test_an_unknown_name_lists_the_known(name):
    with pytest.raises(AttributeError, match=r"int8, int4, int3, int2, fp4.*1m, 15m, 150m, 300m"):
        getattr(lm, name)


def test_recipes_are_functions_that_other_processes_can_be_sent():
    assert pickle.loads(pickle.dumps(lm.fp_15m))() == lm.fp_15m()


@pytest.mark.parametrize(("size", "millions"), [("1m", 1.3), ("15m", 15.4), ("150m", 149), ("300m", 298)])
def test_sizes_have_the_parameters_that_they_are_called_by(size, millions):
    with torch.device("meta"):
        model = build(getattr(lm, f"fp_{size}")().architecture, length=64, seed=0)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.03)

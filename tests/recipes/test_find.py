"""Find: our recipes by name, a user's by module or file, and errors that list what is known."""

import sys

import pytest

from stepwell.recipes.find import find
from stepwell.recipes.lm import int4_15m_both

OWN = """
from dataclasses import replace
from stepwell.recipes.lm import fp_1m

def small():
    return replace(fp_1m(), steps=3, warmup=1)

def wrong():
    return 5
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_recipes.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("own_recipes", None)


@pytest.mark.parametrize("name", ["recipes.lm:int4_15m_both", "stepwell.recipes.lm:int4_15m_both"])
def test_ours_are_found_by_name(name):
    assert find(name) == int4_15m_both()


@pytest.mark.parametrize("name", ["own_recipes:small", "own_recipes.py:small", "./own_recipes.py:small"])
def test_a_users_own_are_found_in_the_current_folder(own, name):
    assert find(name).steps == 3


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("recipes.lm:int5_15m", r"no 'int5_15m' in recipes.lm. Known: .*int4.*150m.*_lotion"),
        ("int4_150m", r"got 'int4_150m'. Known: recipes.lm:NAME"),
        ("recipes.vision:a", r"no module 'stepwell.recipes.vision'.*Known: recipes.lm"),
        ("nowhere:a", r"no module 'nowhere'"),
        ("nowhere.py:a", r"no file 'nowhere.py'"),
        ("own_recipes:large", r"no 'large' in own_recipes. Functions there: .*small"),
        ("own_recipes:wrong", r"must return a Recipe: got int"),
        ("recipes.lm:", r"got 'recipes.lm:'"),
    ],
)
def test_an_unknown_recipe_lists_the_known(own, name, said):
    with pytest.raises(ValueError, match=rf"`recipe`.*{said}"):
        find(name)


def test_what_a_users_module_misses_is_its_own_error(own):
    (own / "own_recipes.py").write_text("import not_installed_anywhere")
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        find("own_recipes:small")

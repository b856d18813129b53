"""The Trainer on two ranks (gloo, on the CPU), in copies (DDP) and in shards (FSDP2 by accelerate), against one process."""

import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from tests.integrations.trainer_subject import LENGTH, Rows
from tests.integrations.trainer_worker import attaching, trained
from tests.torchrun import cases_in, on_two_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two ranks found: weights by case and name, and numbers."""
    folder = tmp_path_factory.mktemp("trainer")
    on_two_ranks("tests.integrations.trainer_worker", folder)
    return cases_in(folder), json.loads((folder / "numbers.json").read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process, by method."""
    return {method: trained(attaching(tmp_path_factory.mktemp(method), method)) for method in ("learned", "lotion")}


@pytest.mark.parametrize("method", ["learned", "lotion"])
@pytest.mark.parametrize("spread", ["copies", "shards"])
def test_two_ranks_end_where_one_process_ends(two, alone, spread, method):
    """In float64 sums in another order differ by 1e-16 of them; a step without its penalty, or a code that flips, moves weights by 1e-3."""
    found = two[0][f"{spread} {method}"]
    assert found.keys() == alone[method].keys()
    assert max(float((found[name] - weight).abs().max()) for name, weight in alone[method].items()) < 1e-12


@pytest.mark.parametrize("kind", ["copies", "FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_two_ranks_resume_bit_for_bit(two, kind):
    assert two[1][f"resumed {kind}"] == 0


def test_best_step_is_found_and_loaded_in_shards(two):
    """`greater_is_better`, so that the best is not the last; evaluations between steps leave FSDP2's root, the head with it, whole."""
    found = two[1]["best"]
    worst = max(found["losses"], key=found["losses"].get)
    assert found["best"] == int(worst)
    assert found["end"] == pytest.approx(found["losses"][worst], abs=1e-6)
    assert len(set(found["losses"].values())) == 5
    assert found["grid"] == 15


def test_labels_of_all_ranks_are_counted(two):
    """The second step's 8 rows without their first token, of which every third lacks its last quarter."""
    labels = Rows(16).labels[8:, 1:]
    assert two[1]["terms"] == labels.ne(-100).sum() < 8 * (LENGTH - 1)

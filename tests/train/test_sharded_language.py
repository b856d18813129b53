"""A language model on two ranks (gloo, on the CPU): FSDP2 and DDP against one process, and checkpoints that change world size."""

import pytest
import torch

pytest.importorskip("transformers")
from tests.language import text_folder, tokens_in
from tests.torchrun import cases_in, on_two_ranks
from tests.train.sharded_worker import LOOKS, NAMES, furthest, looked, run, trained


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("sharded")
    text_folder(made / "data")
    return made


@pytest.fixture(scope="module")
def alone(folder):
    """One process: the run to its end, and in float64 each recipe."""
    tokens = tokens_in(folder / "tokens")
    looks = {f"looks {name}": looked(name, tokens) for name in LOOKS}
    return {"run": run(folder, "alone"), **{name: trained(name, tokens) for name in NAMES}, **looks}


@pytest.fixture(scope="module")
def two(folder, alone):
    """What two ranks found, by case and name, and what they printed."""
    printed = on_two_ranks("tests.train.sharded_worker", folder)
    return cases_in(folder), printed


@pytest.mark.parametrize("case", [*(f"shards {name}" for name in NAMES), "copies int4_1m"])
def test_twenty_steps_in_float64_equal_one_process(two, alone, case):
    """Sums of 96 terms in another order differ by 1e-16 of them, and Adam's first steps divide by their own size; a code that flips, a
    loss term that is missed or counted twice, or a gradient that is not averaged would show at the rate's 3e-3.
    """
    found, expected = two[0][case], alone[case.split()[1]]
    torch.testing.assert_close(found.pop("losses"), expected["losses"], rtol=1e-6, atol=0)  # losses are summed in float32
    assert furthest(found, {name: tensor for name, tensor in expected.items() if name != "losses"}) < 1e-9


@pytest.mark.parametrize("name", LOOKS)
def test_evaluations_between_steps_see_and_leave_what_one_process_has(two, alone, name):
    """A pass without gradients leaves FSDP2's root whole, embedding and head with it: neither stale to read nor lost to write."""
    found, expected = two[0][f"looks {name}"], alone[f"looks {name}"]
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-6, atol=0)
    assert len(set(expected["losses"].tolist())) == 6
    assert furthest(found, expected | {"losses": found["losses"]}) < 1e-9


def test_float32_run_on_two_ranks_equals_one_process_until_a_code_flips(two, alone):
    """Eight steps, none of whose 16 thousand codes flips differently; Adam may turn a sum's rounding error into a share of a step."""
    assert furthest(two[0]["run"], alone["run"]) < 1e-4


def test_two_ranks_resume_bit_for_bit(two):
    assert furthest(two[0]["again"], two[0]["run"]) == 0


def test_checkpoint_of_one_process_resumes_on_two(two, alone):
    assert furthest(two[0]["more"], alone["run"]) < 1e-4


def test_checkpoint_of_shards_resumes_under_whole_copies(two):
    assert furthest(two[0]["copies"], two[0]["run"]) < 1e-4


def test_checkpoint_of_two_ranks_resumes_on_one(folder, two):
    assert furthest(run(folder, "fewer", resume=True), two[0]["run"]) < 1e-4


def test_world_size_that_does_not_divide_the_rows_is_told_to_every_rank(two):
    for rank in range(2):
        assert f"rank {rank}: `rows` per step must be a multiple of the number of processes: got 7 rows for 2 processes." in two[1]


def test_gradient_that_is_not_finite_on_one_rank_is_named_on_both(two):
    for rank in range(2):
        assert f"rank {rank}: the gradient of model.embed_tokens.weight" in two[1]


def test_one_rank_alone_writes(folder, two):
    del two
    lines = (folder / "two" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 8
    assert sorted(path.name for path in (folder / "two" / "checkpoints").iterdir()) == ["step-000000004", "step-000000008"]


def test_error_of_the_first_process_is_raised():
    from stepwell.train.ranks import here

    def fail():
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        here("cpu").alone(fail)

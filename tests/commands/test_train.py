"""`stepwell train` as a user calls it: from text to a model that other libraries load, and bad input in one line."""

import errno
import json
import os
import shutil
import sys
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from tests.language import TEXTS, text_folder, tokens_in
from torch.nn.functional import cross_entropy

import stepwell as sw
from stepwell.commands.train import described
from stepwell.runtimes import targets

MINE = """
from tests.language import tiny

def both():
    return tiny()

def latent():
    return tiny("int2_1m_lotion")

def two():
    return tiny("int2_1m")

def float():
    return tiny("fp_1m")

def cooldown():
    return tiny("int4_1m_ste_cooldown")

def grown():
    return tiny(architecture=tiny().architecture._replace(vocabulary=310))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with recipes, texts, their tokens, and a finished run of each kind."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "mine.py").write_text(MINE)
    text_folder(folder / "texts")
    tokens_in(folder)
    (folder / "few.txt").write_text("one stair")
    shutil.copytree(folder / "data", folder / "bare")
    shutil.rmtree(folder / "bare" / "tokenizer")
    return folder


@pytest.fixture
def run(run, place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return partial(run, "train")


@pytest.mark.parametrize("recipe", ["both", "latent"])
def test_from_text_to_a_model_that_transformers_loads_and_the_grid_it_lies_on(run, place, recipe):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    code, out, _ = run(f"mine:{recipe}", "--data", "texts", "--out", recipe, "--json")
    assert code == 0
    results, folder = json.loads(out), place / recipe
    assert results == json.loads((folder / "results.json").read_text())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder / "model"), AutoTokenizer.from_pretrained(folder / "model")
    encoded = sw.load(folder / "model/encoded.safetensors")
    assert len(encoded) == 14
    assert all(torch.equal(model.get_parameter(name), one.decode()) for name, one in encoded.items())
    assert tokenizer.decode(tokenizer(TEXTS[0])["input_ids"]) == TEXTS[0]
    # the table's loss is that of the model that ships, on the text that was held out
    from stepwell.train.tokens import open_tokens

    held = open_tokens(folder / "data").held
    rows = held.rows(range(min(9, held.sequences(16))), 16)
    with torch.no_grad():
        loss = cross_entropy(model(input_ids=rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())
    assert results["losses"]["nearest"] == pytest.approx(float(loss), rel=1e-5)
    assert (folder / "loss.svg").read_text().count("<svg") == 1
    assert results["tokens"] == 8 * 6 * 16


def test_a_table_for_people_and_a_bar_on_the_other_stream(run):
    code, out, err = run("mine:float", "--data", "data", "--out", "table", "--steps", "2")
    assert code == 0
    assert "rounded to nearest (RTN)" in out
    assert "perplexity" in out
    assert "  stepwell quantize table/model OUT --target compressed-tensors:int4" in out.splitlines()
    assert "Figure: table/loss.svg" in out.splitlines()
    assert "loss" in err
    assert "\r" not in out


@pytest.mark.filterwarnings("ignore:.*saturates")
@pytest.mark.parametrize(
    ("recipe", "options", "grid", "target"),
    [
        ("both", ["--target", "gguf:q4_0"], "int4/full block 32, absmax fp16 scales", "gguf:q4_0"),
        (
            "two",
            [],
            "int2/mid block 32, absmax fp32 scales",
            "safetensors",
        ),  # the default takes half-odd codes
    ],
)
def test_the_command_that_is_printed_ships_what_was_trained(run, place, recipe, options, grid, target):
    code, out, _ = run(f"mine:{recipe}", "--data", "data", "--out", f"for_{recipe}", "--steps", "1", *options)
    assert code == 0
    assert grid in out
    assert (f"No runtime holds {grid}: --target trains for one" in out) == (target == "safetensors")
    assert out.splitlines()[-1] == f"  stepwell export for_{recipe}/model for_{recipe}/model/encoded.safetensors OUT --target {target}"
    held = next(row for row in targets() if row.name == target)
    assert all(held.holds(one.quantizer) for one in sw.load(place / f"for_{recipe}/model/encoded.safetensors").values())


def test_what_full_precision_leaves_starts_a_cooldown(run, place):
    assert run("mine:float", "--data", "data", "--out", "base")[0] == 0
    assert not (place / "base/model/encoded.safetensors").exists()
    assert run("mine:cooldown", "--data", "data", "--out", "cooled", "--start", "base", "--steps", "1", "--seed", "5")[0] == 0
    base = load_file(place / "base/model/model.safetensors")
    cooled = load_file(place / "cooled/checkpoints/step-000000001/model-00001-of-00001.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    moved = (cooled[f"optimizer.{name}.latent"] - base[name]).abs().max()
    assert 0 < float(moved) <= 3e-3 * 1.2  # one step of Adam at the rate of 3e-3, and the decay


def test_stopped_and_resumed_from_the_command_line(run, place):
    assert run("mine:both", "--data", "data", "--out", "stopped", "--save-every", "2")[0] == 0
    for path in (place / "stopped/checkpoints").glob("step-000000008"):
        (path / "checkpoint.json").write_text("{")
    code, _, err = run("mine:both", "--data", "data", "--out", "stopped", "--save-every", "2", "--resume")
    assert code == 0
    assert "refused: the checkpoint" in err
    assert "resumed after step 6" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("recipes.lm:int5_1m", "--out", "x"), "Known: recipes.lm:NAME"),
        (("mine:both", "--out", "x", "--data", "no/such/folder"), "no file or folder 'no/such/folder'"),
        (("mine:both", "--out", "x", "--data", "texts", "--tokenizer", "texts"), "is no tokenizer that can be read"),
        (("mine:grown", "--out", "x", "--data", "texts", "--start", "texts"), "`start` must be a Hugging Face folder"),
        (("mine:cooldown", "--out", "x", "--data", "data"), "`start` is missing"),
        (("mine:both", "--out", "x", "--data", "data", "--steps", "0"), "`steps` of a recipe must be a whole number"),
        (("mine:both", "--out", "x", "--data", "data", "--track", "mlflow"), "`track` must be tensorboard or wandb"),
        (("mine:both", "--out", "mine.py"), "`out`"),
        (("mine:both", "--out", "x", "--data", "data", "--target", "gguf:q9"), "`target` must be one of compressed-tensors, torchao"),
        (("mine:both", "--out", "x", "--data", "data", "--resume"), "`resume`: there is no folder x"),
        (("mine:both", "--out", "x", "--data", "few.txt"), "`data` is too short: 1 documents"),
        (("mine:both", "--out", "x", "--data", "bare"), "`data`: bare lacks its tokenizer"),
    ],
    ids=lambda value: None if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_line_and_exit_code_two(run, place, arguments, said):
    code, out, err = run(*arguments)
    line = err.strip().splitlines()[-1]
    assert (code, out) == (2, "")
    assert line.startswith("stepwell: ")
    assert said in line
    assert not (place / "x").exists()


def test_a_run_that_diverges_is_one_line_and_exit_code_one(run, place, monkeypatch):
    from stepwell.train import pretrain

    def explode(session, step):
        raise pretrain.DivergedError("step 1: the loss is nan.")

    monkeypatch.setattr(pretrain, "advance", explode)
    code, _, err = run("mine:both", "--data", "data", "--out", "diverged")
    assert code == 1
    assert "training stopped at step 1: the loss is nan. There is no checkpoint yet." in err.strip().splitlines()[-1]


def test_ctrl_c_says_how_to_go_on(run, monkeypatch):
    from stepwell.train import pretrain

    def interrupt(session, step):
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain, "advance", interrupt)
    code, _, err = run("mine:both", "--data", "data", "--out", "interrupted")
    assert code == 130
    assert "--resume goes on from the last checkpoint" in err


def test_a_full_disk_at_the_end_leaves_the_checkpoint_which_resume_finishes(run, place, monkeypatch):
    """The metrics are lost too: the table has no speed then, and all else."""
    from stepwell.train import outcome

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(outcome, "save", full)
        code, _, err = run("mine:both", "--data", "data", "--out", "full", "--steps", "2")
    assert code == 1
    assert "No space left on device). Its last checkpoint is whole; make room and start again with --resume." in err.splitlines()[-1]
    assert not [path for path in (place / "full").iterdir() if "model" in path.name]
    (place / "full/metrics.jsonl").write_text("")
    code, out, _ = run("mine:both", "--data", "data", "--out", "full", "--steps", "2", "--resume", "--json")
    assert code == 0
    assert json.loads(out)["tokens_per_second"] is None
    assert (place / "full/model/encoded.safetensors").is_file()


def test_the_bar_says_what_is_known():
    assert described({"loss": 2.5, "flips": float("nan"), "clipped": 0.25}) == "loss 2.5000  clipped 25.0 %"

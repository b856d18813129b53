"""`stepwell verify` and `stepwell export`: what was shipped passes later too, and anything that was changed does not."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.ship.models import copied, edited, llama

import stepwell as sw

pytest.importorskip("transformers")
SUBJECT = """
import torch
from torch import nn

def made(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.LayerNorm(64), nn.Linear(64, 32))
    x = torch.randn(4, 16, 32)
    return model, lambda m, b: (m(b) - b).square().mean(), list(x)

def many():
    model, loss, batches = made()
    return model, loss, [batch * (1 + place) for place, batch in enumerate(batches * 10)]

def another():
    return made(7)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "llama"
    path.mkdir()
    llama(path)
    return path


@pytest.fixture
def run(run_beside):
    return run_beside("subject_of_verify", SUBJECT)


MADE = "subject_of_verify:made"


SLOW = [
    pytest.param(*one, marks=pytest.mark.slow) for one in (("onnx:matmulnbits", "default"), ("onnx:qdq", "default"), ("onnx:qdq", "rtn"))
]


@pytest.mark.parametrize(
    ("target", "method"),
    [
        ("safetensors", "rtn"),
        ("safetensors", "default"),
        ("onnx:matmulnbits", "rtn"),
        *SLOW,
    ],
)
def test_what_was_shipped_passes_later(run, target, method):
    assert run("quantize", MADE, "out", "--target", target, "--method", method, "--steps", 8, "--json")[0] == 0
    code, out, _ = run("verify", "out", MADE, "--json")
    told = json.loads(out)
    assert (code, told["passed"], told["problems"]) == (0, True, [])
    shipped = json.loads(Path("out/certificate.json").read_text())
    assert {row["name"]: row["unchanged"] for row in told["weights"]} == {row["name"]: True for row in shipped["weights"]}
    for row, other in zip(told["weights"], sorted(shipped["weights"], key=lambda row: row["name"]), strict=True):
        assert row["error"] == pytest.approx(other["error"], rel=1e-4)
    for part in ("before", "after"):  # on the same measuring batches
        assert told["losses"][part] == pytest.approx(shipped["losses"][part], rel=1e-5)


@pytest.mark.parametrize("target", ["gguf:q4_0", "compressed-tensors", pytest.param("torchao", marks=pytest.mark.slow)])
def test_folders_and_files_of_a_llama_pass_later(run, folder, target):
    assert run("quantize", folder, "out", "--target", target, "--data", folder / "text.txt", "--method", "rtn")[0] == 0
    code, out, _ = run("verify", "out", folder, "--data", folder / "text.txt", "--json")
    told = json.loads(out)
    assert (code, told["problems"]) == (0, [])
    assert len(told["weights"]) == 15
    assert all(row["unchanged"] and row["cosine"] > 0.99 for row in told["weights"])
    shipped = json.loads(Path("out/certificate.json").read_text())
    assert told["losses"]["after"] == pytest.approx(shipped["losses"]["after"], rel=1e-4)


def test_the_same_batches_measure_later(run):
    """Training takes more batches than rounding does: without being told, `verify` takes as many as the artifact was made with."""
    options = ("--method", "default", "--steps", 8, "--batches", 4, "--json")
    shipped = json.loads(run("quantize", "subject_of_verify:many", "out", "--target", "safetensors", *options)[1])
    assert shipped["batches"] == 12
    later = json.loads(run("verify", "out", "subject_of_verify:many", "--json")[1])
    assert later["losses"]["before"] == pytest.approx(shipped["losses"]["before"], rel=1e-6)
    fewer = json.loads(run("verify", "out", "subject_of_verify:many", "--batches", 6, "--json")[1])
    assert fewer["losses"]["before"] != pytest.approx(shipped["losses"]["before"], rel=1e-6)
    edited(Path("out/certificate.json"), batches=True)
    assert run("verify", "out", "subject_of_verify:many")[0] == 0


def test_a_changed_weight_is_found_by_file_and_by_value(run, tmp_path):
    assert run("quantize", MADE, "out", "--target", "safetensors", "--method", "rtn")[0] == 0
    encoded = sw.load("out/encoded.safetensors")
    weight = encoded["0.weight"]
    weight.codes[3, 5] = (weight.codes[3, 5] + 1).clamp(-8, 7) if weight.codes[3, 5] < 7 else 6
    sw.save(encoded, "out/encoded.safetensors")
    code, out, _ = run("verify", "out", MADE)
    assert code == 1
    assert (
        "NOT PASSED: encoded.safetensors has changed since its certificate was written; 0.weight is not what the certificate names" in out
    )


def test_a_changed_norm_is_found_by_its_file(run):
    assert run("quantize", MADE, "out", "--target", "safetensors", "--method", "rtn")[0] == 0
    rest = load_file("out/rest.safetensors")
    save_file({name: tensor + 0.1 for name, tensor in rest.items()}, "out/rest.safetensors")
    code, out, _ = run("verify", "out", MADE)
    assert code == 1
    assert "rest.safetensors has changed since its certificate was written" in out


def test_another_model_s_weights_are_strangers(run):
    assert run("quantize", MADE, "out", "--target", "safetensors", "--method", "rtn")[0] == 0
    code, out, _ = run("verify", "out", "subject_of_verify:another")
    assert code == 1
    assert "2 of 2 weights are none of this model's, such as 0.weight (cosine " in out
    code, out, _ = run("verify", "out/encoded.safetensors", "subject_of_verify:another", "--json")  # without its certificate too
    assert code == 1
    told = json.loads(out)
    assert told["certified"] is False
    assert all(abs(row["cosine"]) < 0.2 and row["unchanged"] is None for row in told["weights"])


def test_files_that_are_missing_or_elsewhere_are_named(run, tmp_path):
    assert run("quantize", MADE, "out", "--target", "safetensors", "--method", "rtn")[0] == 0
    copied(tmp_path / "out", tmp_path / "less")
    (tmp_path / "less" / "rest.safetensors").unlink()
    code, out, _ = run("verify", "less", MADE)
    assert code == 1
    assert "rest.safetensors is missing" in out
    edited(tmp_path / "less" / "certificate.json", files={"../subject_of_verify.py": "0"})
    code, _, error = run("verify", "less", MADE)
    assert code == 2
    assert "names '../subject_of_verify.py', which lies elsewhere" in error


def test_saved_codes_become_an_artifact(run, tmp_path):
    sys.path.insert(0, str(tmp_path))
    from subject_of_verify import made

    model = made()[0]
    encoded = sw.ptq.rtn(model, sw.target("onnx:matmulnbits"))
    sw.save(encoded, "codes.safetensors")
    code, out, _ = run("export", MADE, "codes.safetensors", "out", "--target", "safetensors", "--json")
    told = json.loads(out)
    assert (code, told["passed"]) == (0, True)
    assert told["certificate"]["codes_equal"] is True
    assert told["choice"]["method"] == "given codes"
    assert run("verify", "out", MADE)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("verify", "gone", MADE), "`artifact`: nothing at gone"),
        (("verify", "model.bin", MADE), "model.bin is a pickle, which can run code"),
        (("verify", "noise.onnx", MADE), "noise.onnx"),
        (("verify", "noise.gguf", MADE), "noise.gguf"),
        (("verify", "noise.txt", MADE), "`artifact` must be a .safetensors, .onnx or .gguf file"),
        (("verify", "plain.safetensors", MADE), "plain.safetensors is a safetensors file, but `stepwell.save` did not write it"),
        (("verify", "codes.safetensors", MADE), "holds no quantized weight of"),
        (("verify", "codes.safetensors", MADE, "--batches", 0), "`batches` must be at least 1"),
        (("export", MADE, "codes.safetensors", "out", "--target", "safetensors"), "names 'a.weight', which `model` does not have"),
        (("export", MADE, "one.safetensors", "out", "--target", "safetensors"), "holds one weight without a name"),
        (("export", MADE, "model.bin", "out", "--target", "safetensors"), "model.bin is a pickle"),
        (("export", MADE, "gone.safetensors", "out", "--target", "safetensors"), "no file at gone.safetensors"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, arguments, words):
    for name in ("model.bin", "noise.onnx", "noise.gguf", "noise.txt"):
        (tmp_path / name).write_bytes(b"\x93noise that is nothing" * 10)
    save_file({"0.weight": torch.ones(2, 2)}, tmp_path / "plain.safetensors")
    grid = sw.int4(block=16)
    sw.save({"a.weight": grid.encode(torch.ones(2, 16))}, tmp_path / "codes.safetensors")
    sw.save(grid.encode(torch.ones(2, 16)), tmp_path / "one.safetensors")
    code, out, error = run(*arguments)
    assert (code, out) == (2, "")
    assert words in error
    assert error.startswith("stepwell: ")
    assert error.count("\n") == 1

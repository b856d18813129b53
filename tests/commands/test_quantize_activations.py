"""`stepwell quantize --activations`: what goes into the layers is rounded in the model, in the file and in a later check alike."""

import json
from pathlib import Path

import onnx
import pytest
from tests.ship.models import edited, llama

import stepwell as sw

pytest.importorskip("transformers")
SUBJECT = """
import torch
from torch import nn

def made():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 40), nn.GELU(), nn.Linear(40, 3))
    x = torch.randn(6, 64, 32)
    return model, lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]), [(one, one[:, :3].argmax(1)) for one in x]
"""
MADE = "subject_of_activations:made"
W8A8 = ("--target", "onnx:qdq", "--bits", 8, "--method", "rtn", "--activations", "int8")


@pytest.fixture
def run(run_beside):
    return run_beside("subject_of_activations", SUBJECT)


def operators(path):
    return [node.op_type for node in onnx.load(path).graph.node]


def test_static_ranges_are_those_of_the_calibration_batches_and_end_up_in_the_file(run):
    code, out, _ = run("quantize", MADE, "out", *W8A8, "--json")
    told = json.loads(out)
    assert (code, told["passed"]) == (0, True)
    # by hand: the library's own two calls, on the four batches that do not measure
    from subject_of_activations import made

    model, loss, batches = made()
    learning = [batch for k, batch in enumerate(batches) if k not in (2, 5)]
    floats = [loss(model, batches[k]).item() for k in (2, 5)]
    handle = sw.quantize_activations(model, calibrate=[batch[:1] for batch in learning], skip=["4.weight"])  # blocks do not divide 40
    sw.ptq.rtn(model, sw.target("onnx:qdq", bits=8), skip=["4.weight"])
    rounded = [loss(model, batches[k]).item() for k in (2, 5)]
    assert told["activations"]["ranges"] == {name: list(found) for name, found in handle.static.items()}
    assert (told["activations"]["scheme"], told["activations"]["batches"]) == ("int8", 4)
    assert told["losses"]["before"] == pytest.approx(sum(floats) / 2, rel=1e-6)
    assert told["losses"]["after"] == pytest.approx(sum(rounded) / 2, rel=1e-5)
    assert operators("out/model.onnx").count("QuantizeLinear") == 2


def test_a_scale_per_token_needs_no_range(run):
    code, out, _ = run("quantize", MADE, "out", "--target", "onnx:matmulnbits", "--method", "rtn", "--activations", "int8-token")
    assert code == 0
    assert "What goes into 2 layers is rounded to int8, one scale per token." in out
    assert "QuantizeLinear" not in operators("out/model.onnx")
    assert "What goes into the layers is rounded to int8, one scale per token." in run("inspect", "out")[1]
    assert run("verify", "out", MADE)[0] == 0


def test_a_later_check_rounds_as_the_certificate_says(run):
    assert run("quantize", MADE, "out", *W8A8)[0] == 0
    code, out, _ = run("verify", "out", MADE, "--json")
    told, shipped = json.loads(out), json.loads(Path("out/certificate.json").read_text())
    assert (code, told["problems"]) == (0, [])
    assert told["losses"]["after"] == pytest.approx(shipped["losses"]["after"], rel=1e-5)
    ranges = shipped["activations"]["ranges"]
    other = {name: [scale * 1.1, zero] for name, (scale, zero) in ranges.items()}
    edited(Path("out/certificate.json"), activations=shipped["activations"] | {"ranges": other})
    code, out, _ = run("verify", "out", MADE)
    assert code == 1
    assert "the runtime does not compute what the weights in the artifact say" in out
    for damage in ({"ranges": {"0": [0.0, 3]}}, {"ranges": {"0": [1.0, 300]}}, {"ranges": 3}, {"skip": None}):
        edited(Path("out/certificate.json"), activations=shipped["activations"] | damage)
        code, out, error = run("verify", "out", MADE)
        assert (code, out) == (2, "")
        assert "says of rounded activations what cannot be read" in error
    edited(Path("out/certificate.json"), activations=shipped["activations"] | {"ranges": {"0": [1.0, 3]}})
    assert "must have a range for each of the" in run("verify", "out", MADE)[2]


@pytest.mark.slow
def test_training_sees_the_rounded_activations(run):
    code, out, _ = run("quantize", MADE, "out", *W8A8[:5], "default", *W8A8[6:], "--steps", 5, "--json")
    told = json.loads(out)
    assert (code, told["passed"], told["choice"]["method"]) == (0, True, "default")
    assert operators("out/model.onnx").count("QuantizeLinear") == 2
    assert run("verify", "out", MADE)[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx:qdq", "onnx:matmulnbits"])
@pytest.mark.parametrize("scheme", ["int8", "int8-token"])
def test_a_llama_with_rounded_activations_passes_now_and_later(run, tmp_path, target, scheme):
    (tmp_path / "llama").mkdir()
    llama(tmp_path / "llama")
    text = tmp_path / "llama" / "text.txt"
    options = ("--target", target, "--bits", 8, "--data", text, "--method", "gptq", "--activations", scheme, "--json")
    code, out, error = run("quantize", tmp_path / "llama", "out", *options)
    told = json.loads(out or "{}")
    assert (code, told.get("passed")) == (0, True), error
    assert len(told["activations"]["modules"]) == 15
    assert run("verify", "out", tmp_path / "llama", "--data", text)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--target", "onnx:qdq", "--activations", "int4"), "`activations` must be int8 or int8-token: got 'int4'"),
        (("--target", "safetensors", "--activations", "int8"), "Targets with others: onnx:matmulnbits, onnx:qdq"),
        (("--target", "gguf:q8_0", "--activations", "int8-token"), "gguf:q8_0 holds float ones alone, got 'int8-token'"),
        (("--target", "nothing", "--activations", "int8"), "`target` must be one of"),
    ],
)
def test_what_cannot_be_is_one_line(run, tmp_path, arguments, words):
    code, out, error = run("quantize", MADE, "out", *arguments)
    assert (code, out) == (2, "")
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()

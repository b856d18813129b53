"""`stepwell quantize`: from a model to an artifact that its runtime loads, judged by the runtime itself; bad input is one line, and 2."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from tests.ship.models import copied, edited, llama

import stepwell as sw

pytest.importorskip("transformers")
SUBJECT = """
import torch
from torch import nn

def entropy(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])

def made(width=32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 3))
    x = torch.randn(6, 64, width)
    return model, entropy, [(one, one[:, :3].argmax(1)) for one in x]

def copying():
    model, _, batches = made()
    with torch.no_grad():
        told = [(x, model(x)) for x, _ in batches]
    return model, lambda m, b: nn.functional.mse_loss(m(b[0]), b[1]), told

def odd():
    torch.manual_seed(0)
    convolution = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*convolution, nn.Linear(32, 40), nn.Linear(40, 3))
    x = torch.randn(4, 8, 3, 6, 6)
    return model, entropy, [(one, one[:, :3, 0, 0].argmax(1)) for one in x]

def broken():
    model, loss, batches = made()
    with torch.no_grad():
        model[2].weight[1, 5] = float("nan")
    return model, loss, batches

def bypassing():
    model, _, batches = made()
    return model, lambda m, b: entropy(m[2], (m[1](m[0](b[0])), b[1])), batches
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "llama"
    path.mkdir()
    llama(path)
    return path


@pytest.fixture
def run(run_beside):
    return run_beside("subject_of_quantize", SUBJECT)


class Text(HTMLParser):
    """The words of a page, and what it would load from elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.words, self.loads = "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.loads += [value for key, value in attributes if key in ("src", "href") and value and not value.startswith(("#", "data:"))]

    def handle_data(self, data):
        self.words += data


def test_a_function_becomes_an_onnx_file_that_computes_what_the_encoded_weights_do(run, tmp_path):
    import onnxruntime

    code, out, error = run("quantize", "subject_of_quantize:made", "out", "--target", "onnx:matmulnbits", "--method", "gptq", "--json")
    assert (code, error) == (0, "")
    told = json.loads(out)
    assert told["passed"]
    assert told["choice"]["method"] == "gptq"
    assert set(os.listdir("out")) == {"model.onnx", "certificate.json", "certificate.html"}
    assert json.loads((tmp_path / "out" / "certificate.json").read_text()) == told
    for name, digest in told["files"].items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == digest
    # by hand: the same model rounded by the library, run in torch, against onnxruntime on the file
    sys.path.insert(0, str(tmp_path))
    from subject_of_quantize import made

    model, loss, batches = made()
    learning = [batch for k, batch in enumerate(batches) if k not in (2, 5)]  # a third measures, evenly spread
    sw.ptq.gptq(model, sw.target("onnx:matmulnbits"), learning, forward=loss)
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: batches[0][0].numpy()})[0]
    expected = model(batches[0][0]).detach().numpy()
    assert np.abs(found - expected).max() < 2e-6 * np.abs(expected).max()
    measured = [loss(model, batches[k]).item() for k in (2, 5)]
    assert told["losses"]["after"] == pytest.approx(sum(measured) / 2, rel=1e-5)
    # int4 codes and one float32 scale for 32 of them
    assert told["bits_per_weight"] == 5.0
    assert told["elements"] == 32 * 64 + 64 * 3


def test_a_llama_becomes_a_gguf_file_and_says_how_to_serve_it(run, folder, tmp_path):
    from gguf import GGUFReader

    code, out, _ = run("quantize", folder, "out", "--target", "gguf:q4_0", "--data", folder / "text.txt", "--method", "rtn")
    assert code == 0
    assert "Passed: loaded by PyTorch with the decoders of gguf" in out
    assert f"llama-server -m {tmp_path / 'out' / 'model.gguf'}" in out
    assert "In float: model.embed_tokens.weight (embedding)" in out
    kinds = [tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "out" / "model.gguf").tensors]
    assert kinds.count("Q4_0") == 15  # seven matrices in each of two layers, and the head
    page = Text((tmp_path / "out" / "certificate.html").read_text())
    assert page.loads == []
    assert all(word in page.words for word in ("passed", "llama-server", "model.layers.1.mlp.down_proj.weight", "4.5 bits", "gguf:q4_0"))


def test_safetensors_hold_every_tensor_of_the_model_once(run, tmp_path):
    from safetensors.torch import load_file

    (tmp_path / "half").mkdir()
    model = llama(tmp_path / "half", tied=True, dtype=torch.bfloat16, layers=1, shard="20KB")
    assert len(list((tmp_path / "half").glob("*.safetensors"))) > 1
    code, _, _ = run("quantize", tmp_path / "half", "out", "--target", "safetensors", "--bits", 3, "--skip", "*.k_proj", "--json")
    assert code == 0
    encoded, rest = sw.load(tmp_path / "out" / "encoded.safetensors"), load_file(tmp_path / "out" / "rest.safetensors")
    state = model.state_dict()
    assert set(encoded) | set(rest) >= set(state) - {"lm_head.weight"}
    assert not set(encoded) & set(rest)
    assert "model.layers.0.self_attn.k_proj.weight" in rest
    grid = sw.target("safetensors", bits=3)
    for name, weight in encoded.items():
        assert torch.equal(weight.codes, grid.encode(state[name].float()).codes)
    assert all(torch.equal(value, state[name]) for name, value in rest.items() if name in state)  # bfloat16 stays bfloat16


def test_training_moves_the_loss_that_rounding_has_lost(run):
    common = ("quantize", "subject_of_quantize:made", "--target", "safetensors", "--bits", 2, "--json")
    rounded = json.loads(run(*common[:2], "a", *common[2:], "--method", "rtn")[1])
    trained = json.loads(run(*common[:2], "b", *common[2:], "--method", "default", "--steps", 60)[1])
    assert rounded["passed"]
    assert trained["passed"]
    assert trained["losses"]["before"] == rounded["losses"]["before"]
    assert trained["losses"]["after"] < rounded["losses"]["after"]


@pytest.mark.parametrize("method", ["search", "ste", "lotion", "auto"])
def test_every_method_ends_in_an_artifact_that_passes(run, method):
    code, out, _ = run("quantize", "subject_of_quantize:made", "out", "--target", "safetensors", "--method", method, "--steps", 5, "--json")
    told = json.loads(out)
    assert (code, told["passed"]) == (0, True)
    if method == "auto":
        assert told["choice"]["method"] in ("rtn", "gptq", "default")
        assert told["choice"]["why"][0].startswith("advise: ")
    else:
        assert told["choice"] == {"method": method, "why": ["asked for"]}


def test_every_layer_gets_bits_of_its_own(run):
    arguments = ("quantize", "subject_of_quantize:made", "--target", "safetensors", "--json")
    told = json.loads(run(*arguments, "a", "--bits-per-weight", 4.5)[1])
    assert told["passed"]
    assert told["bits_per_weight"] <= 4.5
    assert told["choice"]["why"][0].startswith("the lowest loss with 4.5 bits, on the 4 batches")
    assert {row["grid"].split("/")[0] for row in told["weights"]} <= {f"int{bits}" for bits in range(2, 9)}
    tight, loose = (json.loads(run(*arguments, name, "--mixed", "--tolerance", limit)[1]) for name, limit in (("b", 0.001), ("c", 1.0)))
    assert loose["bits_per_weight"] < tight["bits_per_weight"]
    code, _, error = run(*arguments, "d", "--mixed", "--bits", 4)
    assert code == 2
    assert "`bits` is one width for all layers: got 4 with --mixed" in error


def test_what_a_block_does_not_divide_or_the_target_does_not_hold_stays_in_float_and_is_listed(run):
    told = json.loads(run("quantize", "subject_of_quantize:odd", "out", "--target", "onnx:matmulnbits", "--method", "rtn", "--json")[1])
    assert told["passed"]
    assert [row["name"] for row in told["weights"]] == ["4.weight"]
    assert told["floats"] == {
        "0.weight": "4 dimensions: onnx:matmulnbits holds matrices",
        "5.weight": "blocks of 32 do not divide its shape 3x40",
    }


def test_an_artifact_is_replaced_only_when_it_was_asked_for(run, tmp_path):
    arguments = ("quantize", "subject_of_quantize:made", "out", "--target", "safetensors", "--method", "rtn", "--json")
    assert run(*arguments)[0] == 0
    before = (tmp_path / "out" / "certificate.json").read_bytes()
    code, out, error = run(*arguments, "--bits", 8)
    assert (code, out) == (2, "")
    assert "holds an artifact already. Give another one, or --force" in error
    assert (tmp_path / "out" / "certificate.json").read_bytes() == before
    assert run(*arguments, "--bits", 8, "--force")[0] == 0
    assert json.loads((tmp_path / "out" / "certificate.json").read_text())["grid"].startswith("int8")


def test_a_full_disk_is_a_failure_that_leaves_what_was_there(run, tmp_path, monkeypatch):
    arguments = ("quantize", "subject_of_quantize:made", "out", "--target", "safetensors", "--method", "rtn", "--json", "--force")
    assert run(*arguments)[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full(self, name, tensor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("stepwell.ship.tensor_file.TensorFile.add", full)
    code, out, error = run(*arguments)
    assert (code, out) == (1, "")
    assert error.startswith("stepwell: writing ")
    assert "No space left on device. What was there before is untouched." in error
    assert error.count("\n") == 1
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == []


def test_what_the_runtime_did_not_load_is_exit_code_1(run, monkeypatch):
    from dataclasses import replace

    from stepwell.ship import quantize

    honest = quantize.verify
    monkeypatch.setattr(quantize, "verify", lambda *arguments: replace(honest(*arguments), passed=False))
    code, out, _ = run("quantize", "subject_of_quantize:made", "out", "--target", "safetensors", "--method", "rtn")
    assert code == 1
    assert "NOT PASSED" in out


@pytest.mark.parametrize(("asked", "code"), [(("--method", "rtn"), 0), (("--method", "auto"), 1), (("--mixed",), 1)])
def test_a_tolerance_that_was_aimed_at_and_missed_is_exit_code_1(run, tmp_path, asked, code):
    """The loss is the distance to the float model's own outputs: the artifact is there and whole, and what was asked for is not."""
    arguments = ("quantize", "subject_of_quantize:copying", "--target", "safetensors", "--steps", 1, *asked)
    found, out, _ = run(*arguments[:2], "a", *arguments[2:], "--tolerance", 1e-9)
    assert (found, "NOT WITHIN the tolerance of 1e-09" in out) == (code, True)
    assert json.loads((tmp_path / "a" / "certificate.json").read_text())["passed"]
    assert run(*arguments[:2], "b", *arguments[2:], "--tolerance", 100)[0] == 0


MADE = "subject_of_quantize:made"
TO_ONNX = ("--target", "onnx:matmulnbits")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((MADE, "out", "--target", "onnx:nothing"), "`target` must be one of"),
        ((MADE, "out", *TO_ONNX, "--bits", 3), "`bits` of onnx:matmulnbits must be 2 or 4 or 8: got 3. Targets with 3 bits: "),
        ((MADE, "out", *TO_ONNX, "--block", 48), "`block` of onnx:matmulnbits must be one of"),
        ((MADE, "out", *TO_ONNX, "--method", "magic"), "`method` must be one of auto, rtn,"),
        ((MADE, "out", *TO_ONNX, "--tolerance", 0), "`tolerance` must be above 0"),
        ((MADE, "out", *TO_ONNX, "--steps", 0), "`steps` must be at least 1"),
        ((MADE, "out", *TO_ONNX, "--rate", 0), "`rate` must be above 0"),
        ((MADE, "out", *TO_ONNX, "--batches", 1), "`batches` must be at least 2"),
        ((MADE, "out", *TO_ONNX, "--skip", "nothing"), "'nothing' matches no parameter"),
        ((MADE, "out", *TO_ONNX, "--window", 8), "`window` must not be given with a function"),
        ((MADE, "out", "--target", "gguf:q4_0", "--method", "rtn"), "`target` gguf:q4_0 ships Hugging Face models"),
        ((MADE, "subject_of_quantize.py", *TO_ONNX), "`out` must be a folder"),
        ((MADE, ".", *TO_ONNX), "holds other files"),
        ((MADE, "out"), "Missing option '--target'"),
        (("subject_of_quantize:broken", "out", *TO_ONNX), "`model`: 2.weight holds 1 of 192 values that are no number, such as nan"),
        (("subject_of_quantize:bypassing", "out", *TO_ONNX, "--method", "rtn"), "never calls the model itself"),
        (("nowhere", "out", *TO_ONNX), "got 'nowhere', which is no folder"),
        (("model.pt", "out", *TO_ONNX), "model.pt is a pickle, which can run code"),
        (("subject_of_quantize.py", "out", *TO_ONNX), "which is a file"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_left(run, tmp_path, arguments, words):
    before = sorted(os.listdir(tmp_path))
    code, out, error = run("quantize", *arguments)
    assert (code, out) == (2, "")
    assert words in error
    assert error.startswith("stepwell: ")
    assert error.count("\n") == 1
    assert sorted(name for name in os.listdir(tmp_path) if name != "__pycache__") == before


def test_bad_folders_are_one_line(run, folder, tmp_path):
    def refused(change, words, *options):
        copy = copied(folder, tmp_path / f"copy{len(os.listdir(tmp_path))}")
        change(copy)
        code, out, error = run("quantize", copy, "out", *TO_ONNX, *options)
        assert (code, out) == (2, "")
        assert words in error
        assert error.count("\n") == 1
        assert not (tmp_path / "out").exists()

    refused(lambda copy: (copy / "config.json").unlink(), "has no config.json")
    refused(lambda copy: (copy / "config.json").write_text("{"), "no readable JSON")
    refused(lambda copy: edited(copy / "config.json", model_type="unheard"), "unheard")
    refused(lambda copy: edited(copy / "config.json", quantization_config={"quant_method": "gptq"}), "is quantized already (gptq)")
    refused(lambda copy: (copy / "model.safetensors").rename(copy / "pytorch_model.bin"), "pickles can run code and are never read")
    refused(lambda copy: (copy / "model.safetensors").write_bytes(b"\xff" * 100), "is not a readable safetensors file")
    refused(lambda copy: edited(copy / "config.json", num_hidden_layers=3), "lack or misfit")
    refused(lambda copy: None, "`data` must be given for --method gptq", "--method", "gptq")
    refused(lambda copy: None, "`data` must be given for --activations int8", "--method", "rtn", "--activations", "int8")
    refused(lambda copy: None, "`data` must be a text file", "--data", tmp_path)


@pytest.mark.slow
def test_a_kill_while_an_artifact_is_written_leaves_the_old_one(folder, tmp_path):
    """Killed at five moments after the draft has appeared; the old artifact is what its certificate names, every time."""
    command = [sys.executable, "-m", "stepwell", "quantize", str(folder), str(tmp_path / "out"), "--target", "gguf:q4_0", "--force"]
    subprocess.run(command, check=True, capture_output=True)
    told = json.loads((tmp_path / "out" / "certificate.json").read_text())
    for moment in (0.0, 0.05, 0.1, 0.2, 0.4):
        worker = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while worker.poll() is None and not any(name.endswith(".part") for name in os.listdir(tmp_path)):
            time.sleep(0.002)
        time.sleep(moment)
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        held = json.loads((tmp_path / "out" / "certificate.json").read_text())
        for name, digest in held["files"].items():
            assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == digest
        assert held["files"] == told["files"]  # the new one would be the same to the byte
        for name in os.listdir(tmp_path):
            if name.endswith(".part"):
                shutil.rmtree(tmp_path / name)

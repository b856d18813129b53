"""llama.cpp, which `make test-runtimes` builds: files run, every kernel computes what it is known to, and what differs is named."""

import copy

import numpy as np
import pytest
import torch

import stepwell as sw
from stepwell.export import gguf_file, llama_cpp
from stepwell.export.gguf import gguf as export

from .language import language_model, tokens

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not llama_cpp.available(), reason="llama-cpp-python is not installed")]
KINDS = ("q4_0", "q4_1", "q8_0", "tq1_0", "tq2_0", "mxfp4")


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """Return a function from architecture and block type to model, encoded weights and file."""
    folder = tmp_path_factory.mktemp("llama")

    def make(name, kind):
        model = language_model(name)
        encoded = sw.ptq.rtn(copy.deepcopy(model), sw.target(f"gguf:{kind}"))
        ternary = kind if kind.startswith("tq") else "tq2_0"
        return model, encoded, export(model, encoded, folder / f"{name}-{kind}.gguf", ternary=ternary).path

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_every_kernel_rounds_activations_as_it_is_known_to(shipped, kind):
    """Given its own inputs, every product is that of the file's weights with inputs rounded to 8 bits, to float32 rounding."""
    _, encoded, path = shipped("wide llama", kind)
    ran = llama_cpp.run(path, tokens(12).tolist())
    file = gguf_file.read(path)
    assert len(ran.products) == len(encoded)
    for product in ran.products:
        stored = file.tensors[product.weight]
        assert llama_cpp.error(product, stored) < 1e-5, (product.weight, stored.type)
        plain = product.inputs @ gguf_file.values(stored).T
        if stored.type in llama_cpp.EIGHT_BIT:  # and not merely because rounding hardly matters
            assert np.abs(plain - product.outputs).max() / np.abs(plain).max() > 1e-4


@pytest.mark.parametrize("name", ["llama", "llama 3.1", "qwen2", "qwen3", "olmo2"])
def test_every_architecture_runs_and_what_differs_is_named(shipped, name):
    """A wrong order of rows, rope or norm would show in the logits: 8-bit activations move them by a few hundredths at most."""
    model, encoded, path = shipped(name, "q8_0")
    certificate = sw.verify(path, model, (tokens(2, 9),), encoded)
    assert certificate.runtime == "llama.cpp"
    assert certificate.passed
    assert not certificate.exact
    assert certificate.max_relative_error < 0.05
    assert [cause.name for cause in certificate.causes] == ["8-bit activations in llama.cpp's kernels"]
    assert certificate.remainder <= certificate.tolerance
    assert all(layer.modelled < 1e-5 for layer in certificate.layers if layer.nodes)


def test_a_tampered_file_does_not_pass(shipped, tmp_path):
    model, encoded, path = shipped("llama", "q4_0")
    content = bytearray(path.read_bytes())
    content[-40] ^= 1  # within the last matrix
    (tmp_path / "m.gguf").write_bytes(content)
    assert not sw.verify(tmp_path / "m.gguf", model, (torch.arange(8)[None],), encoded).passed

"""Files that grow tensor by tensor are what safetensors writes itself: read by its own reader, and by `stepwell.load`."""

import pytest
import torch
from safetensors.torch import load_file
from tests.cases import QUANTIZERS, gaussian

import stepwell as sw
from stepwell.ship.tensor_file import NAMES, TensorFile, write_encoded, write_tensors


def test_every_dtype_comes_back_bit_for_bit(tmp_path):
    tensors = {str(dtype): torch.arange(-3, 12).to(torch.float32).to(dtype).reshape(3, 5) for dtype in NAMES}
    tensors |= {"none": torch.tensor(2.5), 'strange " name \\ é': torch.ones(2), "empty": torch.zeros(0, 3)}
    write_tensors(tmp_path / "one", iter(tensors.items()), names=list(tensors))
    found = load_file(tmp_path / "one")
    assert set(found) == set(tensors)
    for name, value in tensors.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert found[name].reshape(-1).view(torch.uint8).tolist() == value.reshape(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_encoded_weights_come_back(tmp_path, quantizer):
    weights = {f"blocks.{k}.'\"é.weight": quantizer.encode(gaussian(8, 64, seed=k)) for k in range(3)}
    write_encoded(tmp_path / "one", iter(weights.items()), names=list(weights))
    sw.save(weights, tmp_path / "two")
    one, two = sw.load(tmp_path / "one"), sw.load(tmp_path / "two")
    assert list(one) == list(two) == list(weights)
    assert all(torch.equal(one[name].codes, two[name].codes) and torch.equal(one[name].decode(), two[name].decode()) for name in weights)


def test_a_tensor_need_not_be_contiguous_or_on_its_own(tmp_path):
    base = gaussian(6, 4, seed=0)
    write_tensors(tmp_path / "one", [("turned", base.T), ("part", base[1:3, ::2])], names=["turned", "part"])
    found = load_file(tmp_path / "one")
    assert torch.equal(found["turned"], base.T)
    assert torch.equal(found["part"], base[1:3, ::2])


def test_an_interrupted_file_is_no_safetensors(tmp_path):
    def fail():
        with TensorFile(tmp_path / "one", room=400) as file:
            file.add("a", torch.ones(3))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    with pytest.raises(Exception, match=r"[Hh]eader"):
        load_file(tmp_path / "one")


def test_an_existing_file_is_not_written_over(tmp_path):
    (tmp_path / "one").write_text("mine")
    with pytest.raises(FileExistsError):
        write_tensors(tmp_path / "one", [], names=[])
    assert (tmp_path / "one").read_text() == "mine"

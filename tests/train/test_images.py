"""CIFAR-10: read from a small parquet file made here, divided, standardised, augmented. The real files are not needed."""

import builtins
import io

import pytest
import torch

from stepwell.train.data import Images
from stepwell.train.images import cifar_folder, image_batches, load_cifar


def write(path, count, seed):
    """Write images in files' bytes as the hub does, each one colour that tells its index."""
    pyarrow = pytest.importorskip("pyarrow")
    image, parquet = pytest.importorskip("PIL.Image"), pytest.importorskip("pyarrow.parquet")
    rows = []
    for index in range(count):
        held = io.BytesIO()
        image.new("RGB", (32, 32), (index, 255 - index, index * seed % 256)).save(held, "PNG")
        rows.append({"bytes": held.getvalue(), "path": f"{index}.png"})
    parquet.write_table(pyarrow.table({"img": rows, "label": [index % 10 for index in range(count)]}), path)


@pytest.fixture
def data(tmp_path):
    (tmp_path / "cifar10").mkdir()
    write(tmp_path / "cifar10" / "train.parquet", 60, 3)
    write(tmp_path / "cifar10" / "test.parquet", 7, 200)
    return tmp_path


def test_parts_are_the_files_images_standardised_by_the_training_part(data):
    parts = load_cifar(data)
    assert [tuple(part.pixels.shape) for part in parts] == [(50, 3, 32, 32), (10, 3, 32, 32), (7, 3, 32, 32)]
    train = parts.train.pixels
    assert train.mean((0, 2, 3)).abs().max() < 1e-5
    assert (train.std((0, 2, 3)) - 1).abs().max() < 1e-5
    # red tells the index: undone by its affine map, training and validation are the sixty images, the test the seven, each with its label
    red = torch.cat([part.pixels[:, 0, 0, 0] for part in parts])
    index = ((red - red.min()) / (red[:60].max() - red.min()) * 59).round().int()
    assert sorted(index[:60].tolist()) == list(range(60))
    assert index[60:].tolist() == list(range(7))
    assert (index % 10).tolist() == torch.cat([part.labels for part in parts]).tolist()
    again = load_cifar(data)
    assert all(torch.equal(one.pixels, two.pixels) for one, two in zip(parts, again, strict=True))


def test_the_folder_comes_from_the_environment_or_the_caller(data, monkeypatch, tmp_path):
    monkeypatch.setenv("STEPWELL_DATA", str(data))
    assert cifar_folder() == data / "cifar10"
    monkeypatch.setenv("STEPWELL_DATA", "nowhere")
    assert cifar_folder(data) == data / "cifar10"
    with pytest.raises(FileNotFoundError, match=r"lacks train.parquet and test.parquet"):
        cifar_folder()
    monkeypatch.delenv("STEPWELL_DATA")
    with pytest.raises(FileNotFoundError, match=r"set STEPWELL_DATA to the folder that contains cifar10/train.parquet"):
        cifar_folder()


def test_other_columns_are_refused(data):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"image": [1], "label": [2]}), data / "cifar10" / "test.parquet")
    with pytest.raises(ValueError, match=r"must hold columns `img` and `label` with at least one row: got \['image', 'label'\]"):
        load_cifar(data)


def test_missing_pyarrow_names_the_extra(data, monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **named):
        if name.startswith("pyarrow"):
            raise ModuleNotFoundError("No module named 'pyarrow'")
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "stepwell\[bench\]"'):
        load_cifar(data)


def test_a_batch_image_is_a_training_image_shifted_and_half_the_time_mirrored():
    """One bright pixel left of the middle: it lands on all 81 shifts of two places, and the colours move together."""
    pixels = torch.zeros(1, 2, 20, 20)
    pixels[0, 0, 10, 6], pixels[0, 1, 10, 6] = 5.0, 7.0
    draws = 4000
    batch = next(image_batches(Images(pixels, torch.tensor([4])), draws, steps=1, seed=0))
    assert batch.pixels.shape == (draws, 2, 20, 20)
    assert set(batch.labels.tolist()) == {4}
    assert ((batch.pixels[:, 0] == 5) == (batch.pixels[:, 1] == 7)).all()
    counts = (batch.pixels[:, 0] == 5).sum(0)
    assert counts.sum() == draws
    # unmirrored columns 2 to 10, mirrored 19 - 6 = 13 shifted: 9 to 17; both meet in 9 and 10
    expected = torch.zeros(20, 20)
    expected[6:15, 2:11] += draws / 162
    expected[6:15, 9:18] += draws / 162
    assert counts[expected == 0].sum() == 0
    # Poisson-like counts of 25 or 49 over 144 places: five standard deviations
    assert ((counts - expected).abs() <= 5 * expected.sqrt()).all()


def test_batches_repeat_with_their_seed_and_only_with_it():
    images = Images(torch.randn(9, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(9))
    one, two, other = (list(image_batches(images, 4, steps=2, seed=seed)) for seed in (1, 1, 2))
    assert all(torch.equal(a.pixels, b.pixels) and torch.equal(a.labels, b.labels) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0].pixels, other[0].pixels)
    assert not torch.equal(one[0].pixels, one[1].pixels)

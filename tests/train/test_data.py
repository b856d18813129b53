"""The digits: the split, the standardisation, the augmentation."""

import builtins

import pytest
import torch

from stepwell.train.data import Digits, Images, batches, load_digits


@pytest.fixture(scope="module")
def digits():
    return load_digits()


def test_split_is_a_partition_of_all_images_and_always_the_same(digits):
    from sklearn.datasets import load_digits as original

    parts = digits[:3]
    assert [len(part.labels) for part in parts] == [997, 250, 550]
    together = torch.cat([part.pixels for part in parts])
    raw = torch.tensor(original().data, dtype=torch.float32)
    # standardising is one affine map: undone, the rows are the original images in another order
    low, high = together.min(), together.max()
    restored = ((together - low) / (high - low) * 16).round()
    assert sorted(map(tuple, restored.tolist())) == sorted(map(tuple, raw.tolist()))
    again = load_digits()
    assert all(torch.equal(one.pixels, two.pixels) for one, two in zip(parts, again[:3], strict=True))


def test_only_training_pixels_set_the_scale(digits):
    pixels = digits.train.pixels
    assert abs(pixels.mean()) < 1e-5  # float32 sums of 63,808 pixels: a few ulp times the square root of their number
    assert abs(pixels.std() - 1) < 1e-5
    assert abs(digits.validation.pixels.mean()) > 1e-5
    assert abs(digits.test.pixels.std() - 1) > 1e-5
    assert digits.empty == pytest.approx(pixels.min().item(), abs=1e-6)


def test_batches_repeat_with_their_seed_and_only_with_it(digits):
    one, two, other = (list(batches(digits, 16, steps=3, seed=seed)) for seed in (1, 1, 2))
    assert all(torch.equal(a.pixels, b.pixels) and torch.equal(a.labels, b.labels) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0].pixels, other[0].pixels)
    assert not torch.equal(one[0].pixels, one[1].pixels)


def test_a_batch_image_is_a_training_image_moved_by_at_most_one_pixel():
    """One bright pixel in the middle of an empty image: it lands on each of the nine places equally often, and nothing else changes."""
    pixels = torch.full((1, 8, 8), -1.0)
    pixels[0, 3, 4] = 5.0
    data = Images(pixels.view(1, 64), torch.tensor([7]))
    draws = 9000
    batch = next(batches(Digits(data, data, data, empty=-1.0), draws, steps=1, seed=0, noise=0.0))
    assert set(batch.labels.tolist()) == {7}
    bright = batch.pixels.view(-1, 8, 8) == 5.0
    assert bright.sum() == draws
    assert ((batch.pixels == -1.0).sum(1) == 63).all()
    counts = bright.sum(0)
    assert counts[2:5, 3:6].sum() == draws
    # binomial(9000, 1/9): sigma = 29.8; five of them over nine cells
    assert (counts[2:5, 3:6] - draws / 9).abs().max() < 5 * (draws * (1 / 9) * (8 / 9)) ** 0.5


def test_noise_has_the_deviation_that_was_asked_for():
    data = Images(torch.zeros(1, 64), torch.tensor([0]))
    batch = next(batches(Digits(data, data, data, empty=0.0), 4000, steps=1, seed=0, noise=0.3))
    # 256,000 draws: the standard error of the deviation is 0.3 / sqrt(512,000) = 0.0004; five of them
    assert abs(batch.pixels.std() - 0.3) < 0.0021
    assert abs(batch.pixels.mean()) < 0.003


def test_missing_scikit_learn_names_the_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **named):
        if name.startswith("sklearn"):
            raise ModuleNotFoundError("No module named 'sklearn'")
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "stepwell\[demo\]"'):
        load_digits()

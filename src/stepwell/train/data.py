"""scikit-learn's handwritten digits, split once and for all, and batches of them."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

SIDE = 8  # pixels
TRAIN, VALIDATION = 997, 250  # of 1797 images; the remaining 550 are the test set
SPLIT_SEED = 20261120  # network and budget were settled on other splits; this one was drawn once, for the results


class Images(NamedTuple):
    """Standardised images, `(count, 64)` row by row or `(count, colours, height, width)`, and their labels `(count,)`, 0 to 9."""

    pixels: Tensor
    labels: Tensor


class Digits(NamedTuple):
    """The three parts of the data, and the standardised value of an empty pixel."""

    train: Images
    validation: Images
    test: Images
    empty: float


def load_digits() -> Digits:
    """Return the 1797 digits as train (997), validation (250) and test (550) images, the same split every time.

    Standardised with one mean and one standard deviation, those of all training pixels.

    Raises:
        ModuleNotFoundError: scikit-learn, which holds the images, is not installed.
    """
    bunch = _sklearn_digits()
    pixels = torch.tensor(bunch.data, dtype=torch.float32)
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    parts = (order[:TRAIN], order[TRAIN : TRAIN + VALIDATION], order[TRAIN + VALIDATION :])
    mean, deviation = pixels[parts[0]].mean(), pixels[parts[0]].std()
    train, validation, test = (Images((pixels[part] - mean) / deviation, labels[part]) for part in parts)
    return Digits(train, validation, test, float(-mean / deviation))


def batches(digits: Digits, size: int, *, steps: int, seed: int, noise: float = 0.3) -> Iterator[Images]:
    """Yield training batches: images drawn with replacement, shifted by up to one pixel each way, with Gaussian noise.

    Args:
        digits: the data.
        size: images per batch.
        steps: number of batches.
        seed: two calls with the same seed yield the same batches.
        noise: standard deviation of the noise, in standard deviations of the pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    framed = pad(digits.train.pixels.view(-1, SIDE, SIDE), (1, 1, 1, 1), value=digits.empty)
    span = torch.arange(SIDE)
    for _ in range(steps):
        chosen = torch.randint(len(framed), (size,), generator=generator)
        rows, columns = torch.randint(3, (2, size, 1), generator=generator) + span
        shifted = framed[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]
        noisy = shifted + noise * torch.randn(shifted.shape, generator=generator)
        yield Images(noisy.flatten(1), digits.train.labels[chosen])


def _sklearn_digits() -> Any:
    """Import late: scikit-learn is an extra."""
    try:
        from sklearn import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'the handwritten digits come with scikit-learn, which is missing: pip install "stepwell[demo]"'
        ) from error
    return datasets.load_digits()

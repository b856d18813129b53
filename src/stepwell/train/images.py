"""CIFAR-10 from the two parquet files that the hub serves, a fixed part of it, and augmented batches.

Source: Krizhevsky, "Learning multiple layers of features from tiny images" (2009). The files are named by the caller or found through
STEPWELL_DATA; nothing is downloaded. Columns: `img` (a file's bytes) and `label` (0 to 9).
"""

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from stepwell.train.data import Images

VARIABLE, FOLDER = "STEPWELL_DATA", "cifar10"
TRAIN, VALIDATION = 10_000, 2_000  # of the 50,000 training images
SPLIT_SEED = 20261120
MARGIN = 4  # pixels by which a training image is shifted at most


class Cifar(NamedTuple):
    """Standardised images `(count, 3, 32, 32)` with labels, in three parts: train (10,000), validation (2,000), test (10,000)."""

    train: Images
    validation: Images
    test: Images


def cifar_folder(data: Path | None = None) -> Path:
    """Return the folder that holds `train.parquet` and `test.parquet`.

    Args:
        data: the folder that contains `cifar10/`; None reads the environment variable STEPWELL_DATA.

    Raises:
        FileNotFoundError: neither is given, or a file is not there.
    """
    given = os.environ.get(VARIABLE) if data is None else str(data)
    if not given:
        raise FileNotFoundError(
            f"CIFAR-10 is not at hand: set {VARIABLE} to the folder that contains {FOLDER}/train.parquet and test.parquet."
        )
    folder = Path(given) / FOLDER
    missing = [name for name in ("train.parquet", "test.parquet") if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"CIFAR-10 is not complete: {folder} lacks {' and '.join(missing)}. {VARIABLE} names the folder above it.")
    return folder


def load_cifar(data: Path | None = None) -> Cifar:
    """Return a fixed random part of CIFAR-10: the same images every time, wherever the files lie.

    Standardised per colour with means and standard deviations of the training part. A training file with fewer than 12,000 images is
    divided five to one.

    Args:
        data: the folder that contains `cifar10/`; None reads the environment variable STEPWELL_DATA.

    Raises:
        FileNotFoundError: no such files.
        ModuleNotFoundError: pyarrow or pillow is not installed.
        ValueError: a file without the columns `img` and `label`, or with no images.
    """
    folder = cifar_folder(data)
    whole, test = _table(folder / "train.parquet"), _table(folder / "test.parquet")
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
    first = min(TRAIN, 5 * len(whole) // 6)
    parts = [_decoded(whole, order[:first]), _decoded(whole, order[first : first + VALIDATION]), _decoded(test, range(len(test)))]
    deviation, mean = torch.std_mean(parts[0].pixels, (0, 2, 3), keepdim=True)
    return Cifar(*(Images(pixels.sub_(mean).div_(deviation), labels) for pixels, labels in parts))


def image_batches(images: Images, size: int, *, steps: int, seed: int) -> Iterator[Images]:
    """Yield training batches: images drawn with replacement, mirrored half the time, shifted by up to four pixels each way.

    Pixels that a shift uncovers take the mean colour.

    Args:
        images: standardised, `(count, colours, height, width)`.
        size: images per batch.
        steps: number of batches.
        seed: two calls with the same seed yield the same batches.
    """
    generator = torch.Generator().manual_seed(seed)
    height, width = images.pixels.shape[2:]
    for _ in range(steps):
        chosen = torch.randint(len(images.labels), (size,), generator=generator)
        rows, columns = torch.randint(2 * MARGIN + 1, (2, size, 1), generator=generator)
        mirrored = torch.rand(size, 1, generator=generator) < 0.5
        columns = columns + torch.where(mirrored, torch.arange(width - 1, -1, -1), torch.arange(width))
        framed = pad(images.pixels[chosen], (MARGIN,) * 4).movedim(1, 3)
        shifted = framed[torch.arange(size)[:, None, None], (rows + torch.arange(height))[:, :, None], columns[:, None, :]]
        yield Images(shifted.movedim(3, 1).contiguous(), images.labels[chosen])


def _table(path: Path) -> Any:
    """Return the rows of a parquet file, checked."""
    try:
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('reading CIFAR-10 needs pyarrow and pillow: pip install "stepwell[bench]"') from error
    held = parquet.ParquetFile(path)
    if not {"img", "label"} <= set(held.schema_arrow.names) or not held.metadata.num_rows:
        raise ValueError(f"{path} must hold columns `img` and `label` with at least one row: got {held.schema_arrow.names}.")
    return held.read(columns=["img", "label"])


def _decoded(table: Any, chosen: Any) -> Images:
    """Return rows of a table as `(count, 3, 32, 32)` float32, 0 to 255, and their labels."""
    import numpy as np

    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('reading CIFAR-10 needs pyarrow and pillow: pip install "stepwell[bench]"') from error
    rows = table.take(list(chosen)).to_pydict()
    pictures = [np.asarray(Image.open(io.BytesIO(one["bytes"])).convert("RGB")) for one in rows["img"]]
    pixels: Tensor = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float()
    return Images(pixels.contiguous(), torch.tensor(rows["label"], dtype=torch.int64))

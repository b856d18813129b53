"""Spill: encoded weights on a disk instead of in memory, one file each, read when they are asked for."""

from collections.abc import Iterator, MutableMapping
from pathlib import Path

from safetensors.torch import load_file, save_file

from stepwell.quantizers import Encoded, Quantizer

PARTS = ("codes", "scales", "tensor_scale", "zero_points")


class Spill(MutableMapping[str, Encoded]):
    """A mapping from names to encoded weights that holds none of them in memory; codes take a byte each on the disk."""

    def __init__(self, folder: Path) -> None:
        """Begin empty.

        Args:
            folder: made where needed; its files are the caller's to remove.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._files: dict[str, tuple[Path, Quantizer]] = {}

    def __setitem__(self, name: str, encoded: Encoded) -> None:
        file = self._files[name][0] if name in self._files else self._folder / f"{len(self._files)}.safetensors"
        tensors = {part: tensor for part in PARTS if (tensor := getattr(encoded, part)) is not None}
        save_file({part: tensor.detach().cpu().contiguous() for part, tensor in tensors.items()}, file)
        self._files[name] = (file, encoded.quantizer)

    def __getitem__(self, name: str) -> Encoded:
        file, quantizer = self._files[name]
        return Encoded(quantizer=quantizer, **load_file(file))

    def __delitem__(self, name: str) -> None:
        self._files.pop(name)[0].unlink()

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

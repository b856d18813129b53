"""Spill: encoded weights on a disk instead of in memory, one file each, read when they are asked for."""

from collections.abc import Iterator, MutableMapping
from pathlib import Path

from stepwell.quantizers import Encoded
from stepwell.storage import load, save


class Spill(MutableMapping[str, Encoded]):
    """A mapping from names to encoded weights that holds none of them in memory."""

    def __init__(self, folder: Path) -> None:
        """Begin empty.

        Args:
            folder: made where needed; its files are the caller's to remove.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._files: dict[str, Path] = {}

    def __setitem__(self, name: str, encoded: Encoded) -> None:
        file = self._files.get(name) or self._folder / f"{len(self._files)}.safetensors"
        save(encoded, file)
        self._files[name] = file

    def __getitem__(self, name: str) -> Encoded:
        encoded = load(self._files[name])
        assert isinstance(encoded, Encoded)
        return encoded

    def __delitem__(self, name: str) -> None:
        self._files.pop(name).unlink()

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

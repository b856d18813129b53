"""Exported: what an export did with every encoded weight."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Exported:
    """What an export did with every encoded weight.

    Attributes:
        path: the file or folder.
        products: parameter name -> number of places in it that hold its codes.
        floats: parameter name -> why the weight is (also) in it as grid values in float.
    """

    path: Path
    products: dict[str, int]
    floats: dict[str, str]

"""Write an ONNX graph: the old file or the new one, never half of either; what is too large for one file goes into two."""

import re
import secrets
from pathlib import Path
from typing import Any

from stepwell.export.aside import new_file

LARGEST = 2**31 - 2**20  # bytes: protobuf holds two gigabytes, less a little for the graph itself
THRESHOLD = 1024  # bytes: smaller tensors stay in the graph's own file, where shapes are looked for


def write(model: Any, path: Path) -> None:
    """Write a graph aside, then rename.

    A graph of more than two gigabytes keeps its large tensors in a second file with a name of its own, which is written first: until the
    graph's file is replaced the old pair is complete, and after that the new one is. Then the old data file goes.
    """
    import onnx_ir as ir

    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    data = path.with_name(f"{path.name}.{secrets.token_hex(4)}.data") if size > LARGEST else None
    before = data_files(path)
    try:
        with new_file(path) as aside:
            if data is None:
                ir.save(model, aside, format="protobuf")
            else:
                ir.save(model, aside, format="protobuf", external_data=data.name, size_threshold_bytes=THRESHOLD)
    except BaseException:
        if data is not None:
            data.unlink(missing_ok=True)
        raise
    for old in before:
        old.unlink(missing_ok=True)


def data_files(path: Path) -> list[Path]:
    """Return the data files beside an ONNX file that `write` gave their names; none for files of others, or where there is none."""
    name = re.compile(re.escape(path.name) + r"\.[0-9a-f]{8}\.data")
    return sorted(part for part in path.parent.iterdir() if name.fullmatch(part.name)) if path.is_file() else []

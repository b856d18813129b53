"""`stepwell inspect PATH`: what a quantized file or folder holds, read without running it."""

from pathlib import Path
from typing import Annotated

import typer

from stepwell.commands.output import Json, print_json, print_table


def inspect(
    file: Annotated[Path, typer.Argument(help="A .safetensors, .onnx or .gguf file, a Hugging Face folder, or an artifact of `quantize`.")],
    *,
    json: Json = False,
) -> None:
    """Show the quantized weights of a file or folder: grid, block, scales, bits per weight."""
    from stepwell.ship.contents import contents, described

    found = contents(file)
    if json:
        print_json(described(found, file))
        return
    count = f", {len(found.rows)} weights" if found.rows else ""
    nothing = () if found.rows else ("No quantized weight in it that this command reads.",)
    print_table(found.rows, title=f"{file.name}: {found.kind}{count}, {found.size} bytes", note="\n".join([*nothing, *found.notes]))

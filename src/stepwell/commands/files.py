"""Files that a command writes: the place is tried before work begins, and several files appear together or not at all."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryFile


def check_folder(out: Path, names: Iterable[str] = ()) -> None:
    """Refuse a folder that files of some names cannot be written into, without making it.

    Raises:
        ValueError: it is a file, or it cannot be made, or nothing can be written into it, or a folder has the name of one of the files.
    """
    for name in names:
        if (out / name).is_dir():
            raise ValueError(f"`out`: {out / name} is a folder, where a file must go. Move it away, or give another place with --out.")
    place = next(path for path in (out, *out.absolute().parents) if path.exists())
    try:
        with TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ValueError(f"`out`: cannot write into the folder {out} ({error.strerror or error}). Give another one with --out.") from error


def write_together(out: Path, texts: Mapping[str, str]) -> dict[str, str]:
    """Write files into a folder so that each is complete whenever it can be seen, and return their absolute paths by name.

    All are written under other names first; a failure until then leaves what was there.

    Args:
        out: the folder, made where needed.
        texts: name -> content.
    """
    out.mkdir(parents=True, exist_ok=True)
    waiting: dict[Path, Path] = {}
    try:
        for name, text in texts.items():
            with NamedTemporaryFile("w", dir=out, prefix=f".{name}.", encoding="utf-8", delete=False) as file:
                waiting[Path(file.name)] = out / name
                file.write(text)
        mask = os.umask(0)
        os.umask(mask)
        for draft, path in waiting.items():
            draft.chmod(0o666 & ~mask)  # a temporary file is its owner's alone
            draft.replace(path)
    finally:
        for draft in waiting:
            draft.unlink(missing_ok=True)
    return {name: str((out / name).resolve()) for name in texts}

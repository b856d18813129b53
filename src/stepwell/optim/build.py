"""Build: the C kernel, compiled at first use where a compiler is found, kept in the user's cache directory, and loaded.

The name of the compiled file tells source, compiler, flags and processor, so that a home directory may be shared between machines. It is
written beside its place and moved there, so that nobody loads half a file. Whatever fails here is no error: there is another kernel.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("kernel.c")
COMPILERS = ("cc", "gcc", "clang")
# No product and sum are fused but where the source says so, and nothing else changes a result: no -ffast-math.
FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd")
NATIVE = "-march=native"
PATIENCE = 120  # seconds


def library() -> ctypes.CDLL | None:
    """Return the compiled kernel, or None where there is no compiler or anything goes wrong."""
    compiler = found_compiler()
    if compiler is None:
        return None
    for flags in ((*FLAGS, NATIVE), FLAGS):
        try:
            name = f"kernel-{_digest(compiler, flags)}.so"
            built = _kept(compiler, flags, cache_folder() / name) or _fleeting(compiler, flags, name)
        except (OSError, RuntimeError, subprocess.SubprocessError):  # also a user without a home directory
            continue
        if built is not None:
            return built
    return None


def found_compiler() -> str | None:
    """Return the path of a C compiler: the one that CC names, else the first that is found."""
    if sys.platform == "win32":
        return None
    named = os.environ.get("CC", "").split()
    return next((path for name in (*named[:1], *COMPILERS) if (path := shutil.which(name))), None)


def cache_folder() -> Path:
    """Return the directory that keeps what was compiled."""
    base = os.environ.get("XDG_CACHE_HOME") or (Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache"))
    return Path(base) / "stepwell"


def _kept(compiler: str, flags: tuple[str, ...], target: Path) -> ctypes.CDLL | None:
    """Load the file that an earlier process compiled, or compile it there; None where the directory cannot be used."""
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _ours(target.parent):
            return None
        loaded = _load(target)
        if loaded is not None:
            return loaded
        handle, draft = tempfile.mkstemp(suffix=".so", dir=target.parent)
        os.close(handle)
        try:
            loaded = _load(Path(draft)) if _compile(compiler, flags, Path(draft)) else None
            if loaded is not None:
                os.replace(draft, target)
        finally:
            Path(draft).unlink(missing_ok=True)
    except OSError:  # a directory that cannot be written to
        return None
    return loaded


def _ours(folder: Path) -> bool:
    """Whether nobody else can put a file there that this process would run."""
    status = folder.stat()
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022


def _fleeting(compiler: str, flags: tuple[str, ...], name: str) -> ctypes.CDLL | None:
    """Compile for this process alone."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / name
        return _load(target) if _compile(compiler, flags, target) else None


def _compile(compiler: str, flags: tuple[str, ...], target: Path) -> bool:
    command = [compiler, *flags, str(SOURCE), "-o", str(target), "-lm"]
    return subprocess.run(command, capture_output=True, timeout=PATIENCE, check=False).returncode == 0


def _load(path: Path) -> ctypes.CDLL | None:
    """Load a compiled kernel; None for a file that is missing or damaged."""
    if not path.exists():
        return None
    try:
        loaded = ctypes.CDLL(str(path))
        step = loaded.stepwell_adamw
    except (OSError, AttributeError):
        return None
    step.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_int64] * 3 + [ctypes.c_void_p]
    step.restype = None
    return loaded


def _digest(compiler: str, flags: tuple[str, ...]) -> str:
    """Return a name for everything that the compiled file depends on."""
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=PATIENCE, check=False).stdout
    parts = (SOURCE.read_bytes(), compiler.encode(), version, " ".join(flags).encode(), _processor())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]


def _processor() -> bytes:
    """Return what tells one processor's instructions from another's."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    known = [line for line in dict.fromkeys(lines) if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return "\n".join([platform.machine(), platform.processor(), *known]).encode()

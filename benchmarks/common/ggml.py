"""llama.cpp's own quantizers, where llama-cpp-python is installed (extra `runtimes`): of one matrix, and of a whole file."""

import ctypes
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np


def available() -> bool:
    """Say whether llama-cpp-python is installed."""
    return find_spec("llama_cpp") is not None


def quantize(array: np.ndarray, kind: str) -> np.ndarray:
    """Return a float32 matrix as ggml's blocks of a type such as "Q4_0", by ggml itself, on one thread."""
    import gguf
    from llama_cpp import _ggml

    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    rows, columns = array.shape
    packed = np.empty((rows, columns // block * size), dtype=np.uint8)
    call = _ggml.libggml.ggml_quantize_chunk
    call.restype = ctypes.c_size_t
    call.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    written = call(int(number), array.ctypes.data, packed.ctypes.data, 0, rows, columns, None)
    assert written == packed.nbytes
    return packed


def quantize_file(source: Path, target: Path, kind: str) -> None:
    """Quantize all matrices of a GGUF file but the embedding, by llama.cpp itself, on one thread."""
    import gguf
    import llama_cpp as library

    silent: Any = library.llama_log_callback(lambda level, text, data: None)
    library.llama_log_set(silent, ctypes.c_void_p(0))
    options = library.llama_model_quantize_default_params()
    options.nthread, options.ftype = 1, int(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    options.pure, options.allow_requantize = True, True
    options.token_embedding_type = int(gguf.GGMLQuantizationType.F32)
    if library.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(options)):
        raise RuntimeError(f"llama.cpp does not quantize {source}.")

"""llama.cpp: runs a GGUF file, and holds every product of its own against what its kernels are known to compute.

Optional: needs llama-cpp-python, which is built from source. ggml multiplies blocks of codes with activations rounded to 8 bits before:
Q8_0 (blocks of 32, float16 scales) for Q4_0, Q8_0 and MXFP4, Q8_1 (the same with a float16 sum) for Q4_1, Q8_K (blocks of 256, float32
scales) for the ternary types. Given the inputs that a product really got, its output follows from that to float32 rounding. Kernels for
different processors divide in another order and round ties to the even or to the larger code.

Source: ggml's quantize_row_q8_0, q8_1 and q8_K, and its public headers for tensors and the evaluation callback.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stepwell.export import gguf_blocks, gguf_file
from stepwell.export.extras import need

Array = NDArray[np.float32]
_DIMENSIONS, _SOURCES, _NAME, _PARAMETERS = 4, 10, 64, 16  # of ggml_tensor
_MUL_MAT = b"MUL_MAT"
EIGHT_BIT = {"Q4_0": 32, "Q4_1": 32, "Q8_0": 32, "MXFP4": 32, "TQ1_0": 256, "TQ2_0": 256}  # type -> block of the rounded activations


class Product(NamedTuple):
    """One matrix product as the runtime computed it.

    Attributes:
        weight: its matrix, by its name in the file.
        inputs: `(rows, columns)` what it got.
        outputs: `(rows, outputs)` what it gave.
    """

    weight: str
    inputs: Array
    outputs: Array


class Ran(NamedTuple):
    """One run of a file: logits `(tokens, vocabulary)`, and the products with matrices of the file on the way."""

    logits: Array
    products: list[Product]


def available() -> bool:
    """Say whether llama-cpp-python is installed."""
    from importlib.util import find_spec

    return find_spec("llama_cpp") is not None


def run(path: Path, tokens: list[int]) -> Ran:
    """Run a file on one sequence of tokens, on one thread of the CPU, keys and values kept in float32.

    Raises:
        ModuleNotFoundError: llama-cpp-python is not installed.
        ValueError: llama.cpp does not load or run the file.
    """
    need("llama_cpp", extra="export")
    import llama_cpp as library

    products: list[Product] = []
    with _model(library, path) as model, _context(library, model, len(tokens), products) as context:
        batch = library.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for place, token in enumerate(tokens):
                batch.token[place], batch.pos[place] = token, place
                batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, 1
            if library.llama_decode(context, batch):
                raise ValueError(f"`path`: llama.cpp does not run {path} on {len(tokens)} tokens.")
            width = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
            rows = [np.ctypeslib.as_array(library.llama_get_logits_ith(context, place), (width,)).copy() for place in range(len(tokens))]
        finally:
            library.llama_batch_free(batch)
    return Ran(np.stack(rows), products)


def error(product: Product, stored: gguf_file.Stored) -> float:
    """Return how far a product is from what its kernel is known to give for the inputs that it got, relative to its largest output.

    Args:
        product: as it was computed.
        stored: its matrix in the file; matrices in float types do not round activations.

    Returns:
        The smallest figure over the ways in which ggml's kernels for different processors round.
    """
    weight = gguf_file.values(stored).astype(np.float64)
    if stored.type not in EIGHT_BIT:
        return _apart(product.inputs @ weight.T, product.outputs)
    rounded = list(eight_bits(product.inputs, EIGHT_BIT[stored.type]))
    if stored.type != "Q4_1":
        return min(_apart(one.values @ weight.T, product.outputs) for one in rounded)
    # minimums are multiplied with a block's sum, which is rounded to float16 by itself
    held = gguf_blocks.unpack(stored.data, gguf_blocks.KINDS[stored.type])
    assert held.minimums is not None
    units = weight - np.repeat(held.minimums, 32, axis=1)
    return min(_apart(one.values @ units.T + one.sums @ held.minimums.T, product.outputs) for one in rounded)


class Rounded(NamedTuple):
    """Activations as ggml rounds them to 8 bits: `(rows, columns)` values, and `(rows, blocks)` sums of blocks in float16."""

    values: NDArray[np.float64]
    sums: NDArray[np.float64]


def eight_bits(inputs: Array, block: int) -> Iterator[Rounded]:
    """Yield activations `(rows, columns)` as ggml rounds them to 8 bits, in every way that its kernels have; see the module."""
    blocks = inputs.reshape(-1, block)
    if block == 256:  # the value of largest magnitude sits on -127, with its sign in the scale
        largest = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)
        inverse = _over(-127, largest)
        yield _rounded(inputs, np.minimum(np.rint(blocks * inverse), 127), _over(1, inverse), _over(1, inverse))
        return
    largest = np.abs(blocks).max(1, keepdims=True)
    scale = (largest / np.float32(127)).astype(np.float32)
    for inverse in (_over(127, largest), _over(1, scale)):
        for codes in (np.rint(blocks * inverse), np.copysign(np.floor(np.abs(blocks * inverse) + np.float32(0.5)), blocks)):
            yield _rounded(inputs, codes, scale.astype(np.float16), scale)


def _rounded(inputs: Array, codes: NDArray[Any], stored: NDArray[Any], scale: Array) -> Rounded:
    """Return codes by block as activations."""
    sums = (scale * codes.sum(1, keepdims=True)).astype(np.float16)
    values = codes.astype(np.float64) * stored.astype(np.float64)
    return Rounded(values.reshape(inputs.shape), sums.astype(np.float64).reshape(len(inputs), -1))


def _over(numerator: float, denominator: Array) -> Array:
    """Return a quotient in float32 that is zero where the denominator is."""
    quotient: Array = np.divide(np.float32(numerator), denominator, out=np.zeros_like(denominator), where=denominator != 0)
    return quotient


def _apart(expected: NDArray[Any], found: Array) -> float:
    """Return the largest difference relative to the largest magnitude."""
    return float(np.abs(expected - found).max() / (np.abs(expected).max() or 1.0))


class _Tensor(ctypes.Structure):
    """ggml_tensor, as in ggml.h."""


_Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * _DIMENSIONS),
    ("nb", ctypes.c_size_t * _DIMENSIONS),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * _PARAMETERS),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(_Tensor) * _SOURCES),
    ("view_src", ctypes.POINTER(_Tensor)),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * _NAME),
]


@contextmanager
def _model(library: Any, path: Path) -> Iterator[Any]:
    """Load a file, without a word on the terminal."""
    gguf_file.read(path)  # a header that lies is refused here, by name
    silent = library.llama_log_callback(lambda level, text, data: None)
    library.llama_log_set(silent, ctypes.c_void_p(0))
    library.llama_backend_init()
    options = library.llama_model_default_params()
    options.n_gpu_layers = 0
    options.use_extra_bufts = False  # keeps the file's own blocks; else they are repacked for kernels of another order
    model = library.llama_model_load_from_file(str(path).encode(), options)
    if not model:
        raise ValueError(f"`path`: llama.cpp does not load {path}.")
    try:
        yield model
    finally:
        library.llama_model_free(model)


@contextmanager
def _context(library: Any, model: Any, length: int, products: list[Product]) -> Iterator[Any]:
    """Make a context that notes every product with a named matrix."""

    def watch(pointer: int, ask: bool, data: Any) -> bool:
        tensor = ctypes.cast(pointer, ctypes.POINTER(_Tensor)).contents
        named = bool(tensor.src[0]) and tensor.src[0].contents.name.endswith(b".weight") and bool(tensor.src[1])
        if not ask and named and _is_product(tensor):
            products.append(Product(tensor.src[0].contents.name.decode(), _matrix(tensor.src[1].contents), _matrix(tensor)))
        return named if ask else True

    callback = library.ggml_backend_sched_eval_callback(watch)
    options = library.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch = max(length, 32), max(length, 32), max(length, 32)
    options.n_threads = options.n_threads_batch = 1
    options.type_k = options.type_v = 0  # float32
    options.cb_eval = callback
    context = library.llama_init_from_model(model, options)
    if not context:
        raise ValueError("`path`: llama.cpp makes no context for the file.")
    try:
        yield context
    finally:
        library.llama_free(context)


def _is_product(tensor: _Tensor) -> bool:
    """Say whether a tensor is the product of a matrix with float32 rows, by its shapes."""
    weight, rows = tensor.src[0].contents, tensor.src[1].contents
    return bool(
        rows.type == 0 and weight.ne[0] == rows.ne[0] and weight.ne[1] == tensor.ne[0] and rows.ne[1] == tensor.ne[1] and weight.ne[1] > 1
    )


def _matrix(tensor: _Tensor) -> Array:
    """Return a contiguous float32 tensor of at most two dimensions as `(rows, columns)`."""
    columns, rows = tensor.ne[0], tensor.ne[1] * tensor.ne[2] * tensor.ne[3]
    return np.ctypeslib.as_array(ctypes.cast(tensor.data, ctypes.POINTER(ctypes.c_float)), (rows, columns)).copy()

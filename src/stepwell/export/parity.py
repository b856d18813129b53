"""Parity: is what was trained what runs? Picks the check that fits an artifact, by what the artifact is."""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from stepwell.export import codes_parity, compressed_tensors_parity, gguf_parity, onnx_parity, torchao_parity
from stepwell.export.certificate import Certificate
from stepwell.export.deployed import check_encoded
from stepwell.export.trace import check_example
from stepwell.quantizers import Encoded

_FILES = {".onnx": onnx_parity.check, ".gguf": gguf_parity.check, ".safetensors": codes_parity.check}
_FOLDERS = {"compressed-tensors": compressed_tensors_parity.check, "torchao": torchao_parity.check}
KINDS = (
    "an .onnx file, a .gguf file, a .safetensors file of `stepwell.save`, or a folder with a config.json that names compressed-tensors or "
    "torchao"
)
LARGEST = 1 << 26  # bytes of a config.json: those of the largest models take some thousands


def verify(path: str | Path, model: nn.Module, example: tuple[Tensor, ...], encoded: Mapping[str, Encoded] | None = None) -> Certificate:
    """Load an exported file or folder as a user would, and compare weights and outputs with the model it came from.

    Codes and scales are read back from the artifact. The outputs are compared on the example, and for ONNX on other batch sizes and on
    other lengths of every further axis that the file leaves open. Where a runtime computes in another way, its known causes are modelled
    or switched off one after another, and the certificate names what each accounts for. The model is left as it was; it need not hold the
    grid weights.

    Args:
        path: what an export wrote: an `.onnx`, `.gguf` or `.safetensors` file, or the folder of a transformers model.
        model: the module that was exported.
        example: real inputs, best a batch of held-out data.
        encoded: the weights that were exported, by parameter name. Without them the model itself must hold the grid weights: values are
            then compared, codes and scales cannot be.

    Returns:
        The certificate; `print` shows a table. A difference does not raise: look at `passed`.

    Raises:
        ModuleNotFoundError: the extra that the artifact needs is not installed.
        FileNotFoundError, TypeError, ValueError: no such artifact, none of the known kinds, or arguments that do not fit it.
    """
    path = Path(path)
    check_example(example)
    check_encoded(model, {} if encoded is None else encoded)
    if path.is_dir():
        return _FOLDERS[_method(path)](path, model, example, encoded or {})
    if path.suffix in _FILES:
        return _FILES[path.suffix](path, model, example, encoded or {})
    raise ValueError(f"`path` must be {KINDS}: got {path}{'' if path.exists() else ', which is not there'}.")


def _method(folder: Path) -> str:
    """Return how a folder says it is quantized.

    Raises:
        ValueError: it has no config, or is quantized in no known way.
    """
    config = folder / "config.json"
    if not config.is_file() or config.stat().st_size > LARGEST:
        raise ValueError(f"`path` must be {KINDS}: {folder} has no config.json of at most {LARGEST:,} bytes.")
    try:
        told = json.loads(config.read_text(encoding="utf-8"))["quantization_config"]["quant_method"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"`path` must be {KINDS}: the config of {folder} has no readable `quantization_config` ({error!r}).") from error
    if not isinstance(told, str) or told not in _FOLDERS:
        raise ValueError(f"`path` must be {KINDS}: the config of {folder} names {told!r}.")
    return told

"""Parity: is what was trained what runs? Picks the check that fits an artifact, by what the artifact is."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from stepwell.export import codes_parity, gguf_parity, onnx_parity
from stepwell.export.certificate import Certificate
from stepwell.export.deployed import check_encoded
from stepwell.export.trace import check_example
from stepwell.quantizers import Encoded

_FILES = {".onnx": onnx_parity.check, ".gguf": gguf_parity.check, ".safetensors": codes_parity.check}
KINDS = "an .onnx file, a .gguf file, a .safetensors file of `stepwell.save`"


def verify(path: str | Path, model: nn.Module, example: tuple[Tensor, ...], encoded: Mapping[str, Encoded] | None = None) -> Certificate:
    """Load an exported file or folder as a user would, and compare weights and outputs with the model it came from.

    Codes and scales are read back from the artifact. The outputs are compared on the example, and for ONNX on other batch sizes and on
    other lengths of every further axis that the file leaves open. Where a runtime computes in another way, its known causes are modelled
    or switched off one after another, and the certificate names what each accounts for. The model is left as it was; it need not hold the
    grid weights.

    Args:
        path: what an export wrote: an `.onnx`, `.gguf` or `.safetensors` file.
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
    if path.suffix in _FILES and not path.is_dir():
        return _FILES[path.suffix](path, model, example, encoded or {})
    raise ValueError(f"`path` must be {KINDS}: got {path}{'' if path.exists() else ', which is not there'}.")

"""Ship: one target, one file, one function; `verify` checks what a runtime loaded. Heavy packages are imported where they are used."""

from stepwell.export.certificate import Cause, Certificate, Layer
from stepwell.export.compressed_tensors import compressed_tensors
from stepwell.export.exported import Exported
from stepwell.export.gguf import gguf
from stepwell.export.onnx import onnx, onnx_qdq
from stepwell.export.parity import verify
from stepwell.export.torchao import torchao

__all__ = ["Cause", "Certificate", "Exported", "Layer", "compressed_tensors", "gguf", "onnx", "onnx_qdq", "torchao", "verify"]

"""Ship: one target, one file, one function; `verify` checks what a runtime loaded. Heavy packages are imported where they are used."""

from stepwell.export.certificate import Cause, Certificate, Layer
from stepwell.export.exported import Exported
from stepwell.export.onnx import onnx
from stepwell.export.parity import verify

__all__ = ["Cause", "Certificate", "Exported", "Layer", "onnx", "verify"]

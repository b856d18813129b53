"""Ship: one target, one file, one function; `verify` checks what a runtime loaded. Heavy packages are imported where they are used."""

from stepwell.export.certificate import Certificate
from stepwell.export.onnx import onnx
from stepwell.export.parity import verify

__all__ = ["Certificate", "onnx", "verify"]

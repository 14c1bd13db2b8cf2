"""ONNX: converted models as graphs of integer operators, for ONNX Runtime and others.

qnn.integrations.onnx.export(model, (x,), "model.onnx", dynamic_shapes=({0: "batch"},))
"""

try:
    import onnx_ir  # noqa: F401
    import onnxscript  # noqa: F401
except ImportError as error:
    raise ImportError(
        "qnn.integrations.onnx needs onnx and onnxscript: pip install 'qnn[onnx]'."
    ) from error

from qnn.integrations.onnx.build import NotTranslatableError
from qnn.integrations.onnx.export import export
from qnn.integrations.onnx.table import refusal, translations

__all__ = ["NotTranslatableError", "export", "refusal", "translations"]

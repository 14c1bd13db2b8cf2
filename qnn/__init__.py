"""qnn: compile-friendly quantised `torch.nn` layers.

import qnn
model = qnn.convert(model, "int8")
"""

from pathlib import Path as _Path

# In a checkout's root Python finds this folder before the installed package, and without its two
# lower floors, which stand beside it there.
_HERE = _Path(__file__).resolve().parent
if not (_HERE / "kernels").is_dir() and (_HERE.parent / "kernels" / "torch_private.py").is_file():
    __path__.append(str(_HERE.parent))

from qnn import (
    functional,
    kernels,
    moved,  # noqa: F401  # finds modules under their former names
    passes,
)
from qnn.calibration import parts
from qnn.calibration.doubts import CalibrationWarning
from qnn.calibration.fake_quantize import FakeQuantize, freeze_observers, unfreeze_observers
from qnn.calibration.spec import QuantSpec
from qnn.integrations import compressed_tensors, load_pretrained
from qnn.kernels import SCHEMES, Format, Scheme
from qnn.kinds import Kind, Observation, register_kind
from qnn.nn import (
    QGRU,
    QLSTM,
    Linear,
    ObservedLinear,
    ObservedMultiheadAttention,
    QGRUCell,
    QLinear,
    QLSTMCell,
    QMultiheadAttention,
    QuantizableGRU,
    QuantizableGRUCell,
    QuantizableLSTM,
    QuantizableLSTMCell,
    Quantized,
)
from qnn.verbs import Comparison, Summary, calibrate, compare, convert, prepare, sqnr, summary

__version__ = "0.1.0"
__all__ = [
    "QGRU",
    "QLSTM",
    "SCHEMES",
    "CalibrationWarning",
    "Comparison",
    "FakeQuantize",
    "Format",
    "Kind",
    "Linear",
    "Observation",
    "ObservedLinear",
    "ObservedMultiheadAttention",
    "QGRUCell",
    "QLSTMCell",
    "QLinear",
    "QMultiheadAttention",
    "QuantSpec",
    "QuantizableGRU",
    "QuantizableGRUCell",
    "QuantizableLSTM",
    "QuantizableLSTMCell",
    "Quantized",
    "Scheme",
    "Summary",
    "calibrate",
    "compare",
    "compressed_tensors",
    "convert",
    "freeze_observers",
    "functional",
    "kernels",
    "load_pretrained",
    "parts",
    "passes",
    "prepare",
    "register_kind",
    "sqnr",
    "summary",
    "unfreeze_observers",
]

"""qnn: compile-friendly quantised `torch.nn` layers.

import qnn
model = qnn.convert(model, "int8")
"""

from pathlib import Path as _Path

# In a checkout's root Python finds this folder before the installed package, and without its two
# lower floors, which stand beside it there.
_HERE = _Path(__file__).resolve().parent
if not (_HERE / "kernels").is_dir() and (_HERE.parent / "kernels" / "spec.py").is_file():
    __path__.append(str(_HERE.parent))

from qnn import functional, kernels, parts
from qnn.calibrate import calibrate
from qnn.compare import Comparison, compare, sqnr
from qnn.convert import convert
from qnn.doubts import CalibrationWarning
from qnn.fake_quantize import FakeQuantize, freeze_observers, unfreeze_observers
from qnn.kernels import SCHEMES, Format, Scheme
from qnn.linear import Linear
from qnn.load_pretrained import load_pretrained
from qnn.observed_linear import ObservedLinear
from qnn.prepare import prepare
from qnn.qcell import QGRUCell, QLSTMCell
from qnn.qlinear import QLinear
from qnn.qlstm import QGRU, QLSTM
from qnn.quant_spec import QuantSpec
from qnn.quantizable import QuantizableGRU, QuantizableLSTM
from qnn.quantizable_cell import QuantizableGRUCell, QuantizableLSTMCell
from qnn.summary import Summary, summary

__version__ = "0.1.0"
__all__ = [
    "QGRU",
    "QLSTM",
    "SCHEMES",
    "CalibrationWarning",
    "Comparison",
    "FakeQuantize",
    "Format",
    "Linear",
    "ObservedLinear",
    "QGRUCell",
    "QLSTMCell",
    "QLinear",
    "QuantSpec",
    "QuantizableGRU",
    "QuantizableGRUCell",
    "QuantizableLSTM",
    "QuantizableLSTMCell",
    "Scheme",
    "Summary",
    "calibrate",
    "compare",
    "convert",
    "freeze_observers",
    "functional",
    "kernels",
    "load_pretrained",
    "parts",
    "prepare",
    "sqnr",
    "summary",
    "unfreeze_observers",
]

"""Ground floor: formats and schemes, op declarations, their references, and the kernels of each
backend.
"""

from qnn.kernels import float_ops, int8, int8_static, recurrent, torch_private
from qnn.kernels.formats import Format
from qnn.kernels.schemes import SCHEMES, Scheme, get_scheme, training_scheme
from qnn.kernels.spec import OPS, Op

__all__ = [
    "OPS",
    "SCHEMES",
    "Format",
    "Op",
    "Scheme",
    "float_ops",
    "get_scheme",
    "int8",
    "int8_static",
    "recurrent",
    "torch_private",
    "training_scheme",
]

"""Ground floor: formats and schemes, op declarations, their references, and the kernels of each
backend.
"""

from qnn.kernels import torch_private
from qnn.kernels.cpu import native
from qnn.kernels.declare import (
    attention,
    conv,
    embedding,
    floats,
    grouped,
    histogram,
    int8,
    int16,
    norm,
    recurrent,
)
from qnn.kernels.formats import Format
from qnn.kernels.op import OPS, Op
from qnn.kernels.schemes import SCHEMES, Scheme, get_scheme, training_scheme

native.ready()  # once all are declared: it takes the place of their kernels

__all__ = [
    "OPS",
    "SCHEMES",
    "Format",
    "Op",
    "Scheme",
    "attention",
    "conv",
    "embedding",
    "floats",
    "get_scheme",
    "grouped",
    "histogram",
    "int8",
    "int16",
    "norm",
    "recurrent",
    "torch_private",
    "training_scheme",
]

"""Layers: their float state around, and their quantised, observed and training forms."""

from qnn.nn.base import Quantized
from qnn.nn.linear import Linear, ObservedLinear, QLinear
from qnn.nn.recurrent import (
    QGRU,
    QLSTM,
    QGRUCell,
    QLSTMCell,
    QuantizableGRU,
    QuantizableGRUCell,
    QuantizableLSTM,
    QuantizableLSTMCell,
)

__all__ = [
    "QGRU",
    "QLSTM",
    "Linear",
    "ObservedLinear",
    "QGRUCell",
    "QLSTMCell",
    "QLinear",
    "QuantizableGRU",
    "QuantizableGRUCell",
    "QuantizableLSTM",
    "QuantizableLSTMCell",
    "Quantized",
]

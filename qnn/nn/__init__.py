"""Layers: their float state around, and their quantised, observed and training forms."""

from qnn.nn.attention import ObservedMultiheadAttention, QMultiheadAttention
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
    "ObservedMultiheadAttention",
    "QGRUCell",
    "QLSTMCell",
    "QLinear",
    "QMultiheadAttention",
    "QuantizableGRU",
    "QuantizableGRUCell",
    "QuantizableLSTM",
    "QuantizableLSTMCell",
    "Quantized",
]

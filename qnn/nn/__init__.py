"""Layers: their float state around, and their quantised, observed and training forms."""

from qnn.nn.base import Quantized
from qnn.nn.embedding import QEmbedding, QEmbeddingBag
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
    "QEmbedding",
    "QEmbeddingBag",
    "QGRUCell",
    "QLSTMCell",
    "QLinear",
    "QuantizableGRU",
    "QuantizableGRUCell",
    "QuantizableLSTM",
    "QuantizableLSTMCell",
    "Quantized",
]

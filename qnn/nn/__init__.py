"""Layers: their float state around, and their quantised, observed and training forms."""

from qnn.nn.base import Quantized
from qnn.nn.conv import (
    ObservedConv1d,
    ObservedConv2d,
    ObservedConv3d,
    ObservedConvTranspose1d,
    ObservedConvTranspose2d,
    ObservedConvTranspose3d,
    QConv1d,
    QConv2d,
    QConv3d,
    QConvTranspose1d,
    QConvTranspose2d,
    QConvTranspose3d,
)
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
    "ObservedConv1d",
    "ObservedConv2d",
    "ObservedConv3d",
    "ObservedConvTranspose1d",
    "ObservedConvTranspose2d",
    "ObservedConvTranspose3d",
    "ObservedLinear",
    "QConv1d",
    "QConv2d",
    "QConv3d",
    "QConvTranspose1d",
    "QConvTranspose2d",
    "QConvTranspose3d",
    "QGRUCell",
    "QLSTMCell",
    "QLinear",
    "QuantizableGRU",
    "QuantizableGRUCell",
    "QuantizableLSTM",
    "QuantizableLSTMCell",
    "Quantized",
]

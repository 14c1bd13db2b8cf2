"""Recurrent layers and cells, and their kind."""

from qnn.nn.recurrent import kind
from qnn.nn.recurrent.qcell import QGRUCell, QLSTMCell
from qnn.nn.recurrent.qlstm import QGRU, QLSTM
from qnn.nn.recurrent.quantizable import QuantizableGRU, QuantizableLSTM
from qnn.nn.recurrent.quantizable_cell import QuantizableGRUCell, QuantizableLSTMCell

__all__ = [
    "QGRU",
    "QLSTM",
    "QGRUCell",
    "QLSTMCell",
    "QuantizableGRU",
    "QuantizableGRUCell",
    "QuantizableLSTM",
    "QuantizableLSTMCell",
    "kind",
]

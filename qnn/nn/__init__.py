"""Layers: their float state around, and their quantised, observed and training forms."""

from qnn.nn.attention import ObservedMultiheadAttention, QMultiheadAttention
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
from qnn.nn.embedding import QEmbedding, QEmbeddingBag
from qnn.nn.grouped import (
    ExpertsAdapter,
    GroupedLinear,
    ObservedExperts,
    ObservedGroupedLinear,
    QExperts,
    QGroupedLinear,
    register_adapter,
    unregister_adapter,
)
from qnn.nn.kv_cache import Int8KVCache
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
    "ExpertsAdapter",
    "GroupedLinear",
    "Int8KVCache",
    "Linear",
    "ObservedConv1d",
    "ObservedConv2d",
    "ObservedConv3d",
    "ObservedConvTranspose1d",
    "ObservedConvTranspose2d",
    "ObservedConvTranspose3d",
    "ObservedExperts",
    "ObservedGroupedLinear",
    "ObservedLinear",
    "ObservedMultiheadAttention",
    "QConv1d",
    "QConv2d",
    "QConv3d",
    "QConvTranspose1d",
    "QConvTranspose2d",
    "QConvTranspose3d",
    "QEmbedding",
    "QEmbeddingBag",
    "QExperts",
    "QGRUCell",
    "QGroupedLinear",
    "QLSTMCell",
    "QLinear",
    "QMultiheadAttention",
    "QuantizableGRU",
    "QuantizableGRUCell",
    "QuantizableLSTM",
    "QuantizableLSTMCell",
    "Quantized",
    "register_adapter",
    "unregister_adapter",
]

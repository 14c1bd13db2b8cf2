"""Multi-head attention, and its kind."""

from qnn.nn.attention import kind
from qnn.nn.attention.observed import ObservedMultiheadAttention
from qnn.nn.attention.quantized import QMultiheadAttention

__all__ = ["ObservedMultiheadAttention", "QMultiheadAttention", "kind"]

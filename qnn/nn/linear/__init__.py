"""Linear layers, and their kinds."""

from qnn.nn.linear import kind
from qnn.nn.linear.observed import ObservedLinear
from qnn.nn.linear.quantized import QLinear
from qnn.nn.linear.training import Linear

__all__ = ["Linear", "ObservedLinear", "QLinear", "kind"]

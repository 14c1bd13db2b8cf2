"""Stateless layer mathematics: quantise, dequantise, linear, and the one seam, `invoke_quant`."""

from qnn.functional import fusion
from qnn.functional.invoke import invoke_quant
from qnn.functional.linear import linear
from qnn.functional.quantize import dequantize, quantize
from qnn.functional.training import training_linear

__all__ = ["dequantize", "fusion", "invoke_quant", "linear", "quantize", "training_linear"]

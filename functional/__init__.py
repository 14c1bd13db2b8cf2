"""Stateless layer mathematics: quantise, dequantise, linear, LSTM and GRU, and the one seam,
`invoke_quant`.
"""

from qnn.functional.fake_quantize import fake_quantize
from qnn.functional.invoke import invoke_quant
from qnn.functional.linear import linear
from qnn.functional.quantize import dequantize, quantize
from qnn.functional.recurrent import RecurrentWeights, gru, lstm
from qnn.functional.training import training_linear
from qnn.passes import fusion

__all__ = [
    "RecurrentWeights",
    "dequantize",
    "fake_quantize",
    "fusion",
    "gru",
    "invoke_quant",
    "linear",
    "lstm",
    "quantize",
    "training_linear",
]

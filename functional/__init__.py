"""Stateless layer mathematics: quantise, dequantise, linear, convolutions, LSTM and GRU, attention,
lookups in tables, and the one seam, `invoke_quant`.
"""

import importlib
from typing import Any

from qnn.functional.conv import conv, conv_transpose
from qnn.functional.embedding import embedding, embedding_bag
from qnn.functional.fake_quantize import fake_quantize
from qnn.functional.grouped import grouped_linear, sort_by_group, unsort
from qnn.functional.invoke import invoke_quant
from qnn.functional.kv_cache import CachedRows, append_to_cache, cached_attention
from qnn.functional.linear import linear
from qnn.functional.quantize import dequantize, quantize
from qnn.functional.recurrent import RecurrentWeights, gru, lstm
from qnn.functional.sdpa import scaled_dot_product_attention
from qnn.functional.training import training_linear

__all__ = [
    "CachedRows",
    "RecurrentWeights",
    "append_to_cache",
    "cached_attention",
    "conv",
    "conv_transpose",
    "dequantize",
    "embedding",
    "embedding_bag",
    "fake_quantize",
    "grouped_linear",
    "gru",
    "invoke_quant",
    "linear",
    "lstm",
    "quantize",
    "scaled_dot_product_attention",
    "sort_by_group",
    "training_linear",
    "unsort",
]


def __getattr__(name: str) -> Any:
    """Graph passes, under the names that they had here; `qnn/moved.py` says the new ones."""
    if name in ("fusion", "cast_fusion"):
        return importlib.import_module(f"qnn.functional.{name}")
    raise AttributeError(f"module 'qnn.functional' has no attribute {name!r}")

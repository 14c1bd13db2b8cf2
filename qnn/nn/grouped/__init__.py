"""Stacks of linear layers over sorted rows, the experts that are made of two of them, and their
kinds.
"""

from qnn.nn.grouped import kind
from qnn.nn.grouped.adapters import ExpertsAdapter, register_adapter, unregister_adapter
from qnn.nn.grouped.experts import QExperts
from qnn.nn.grouped.linear import GroupedLinear
from qnn.nn.grouped.observed import ObservedGroupedLinear
from qnn.nn.grouped.observed_experts import ObservedExperts
from qnn.nn.grouped.quantized import QGroupedLinear

__all__ = [
    "ExpertsAdapter",
    "GroupedLinear",
    "ObservedExperts",
    "ObservedGroupedLinear",
    "QExperts",
    "QGroupedLinear",
    "kind",
    "register_adapter",
    "unregister_adapter",
]

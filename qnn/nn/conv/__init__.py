"""Convolutions, plain and transposed, and their kinds."""

from qnn.nn.conv import kind
from qnn.nn.conv.observed import (
    ObservedConv1d,
    ObservedConv2d,
    ObservedConv3d,
    ObservedConvTranspose1d,
    ObservedConvTranspose2d,
    ObservedConvTranspose3d,
)
from qnn.nn.conv.quantized import (
    QConv1d,
    QConv2d,
    QConv3d,
    QConvTranspose1d,
    QConvTranspose2d,
    QConvTranspose3d,
)

__all__ = [
    "ObservedConv1d",
    "ObservedConv2d",
    "ObservedConv3d",
    "ObservedConvTranspose1d",
    "ObservedConvTranspose2d",
    "ObservedConvTranspose3d",
    "QConv1d",
    "QConv2d",
    "QConv3d",
    "QConvTranspose1d",
    "QConvTranspose2d",
    "QConvTranspose3d",
    "kind",
]

"""`TrainingConv1D`: transformers' `Conv1D` that trains in low precision. Imports transformers."""

from __future__ import annotations

import torch
from transformers.pytorch_utils import Conv1D

from qnn import functional as F
from qnn.nn.values import check_input


class TrainingConv1D(Conv1D):  # type: ignore[misc]
    """What `qnn.Linear` is to `nn.Linear`: the same parameters, state and initialisation, and
    another forward. `weight` is `[in, out]`.
    """

    in_features: int
    out_features: int
    scheme: str

    @classmethod
    def from_float(cls, conv: Conv1D, scheme: str) -> TrainingConv1D:
        """A training layer around the parameters of `conv` themselves, in its mode."""
        with torch.device("meta"):
            layer = cls(conv.nf, conv.nx)
        layer.in_features, layer.out_features, layer.scheme = conv.nx, conv.nf, scheme
        layer.weight, layer.bias = conv.weight, conv.bias
        layer.train(conv.training)
        return layer

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if "weight" in self._parameters:  # as in qnn.Linear
            check_input(self, input, "weight")
        return F.training_linear(input, self.weight.t(), self.bias, scheme=self.scheme)

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, scheme={self.scheme!r})"


def plain(layer: TrainingConv1D) -> Conv1D:
    """The `Conv1D` around the same parameters, in its mode."""
    with torch.device("meta"):
        conv = Conv1D(layer.nf, layer.nx)
    conv.weight, conv.bias = layer.weight, layer.bias
    return conv.train(layer.training)

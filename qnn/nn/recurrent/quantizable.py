"""`QuantizableLSTM` and `QuantizableGRU`: `nn.LSTM` and `nn.GRU` with observation points."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qnn.nn.recurrent.quantizable_layer import QuantizableRecurrent

__all__ = ["QuantizableGRU", "QuantizableLSTM", "QuantizableRecurrent"]


class QuantizableLSTM(QuantizableRecurrent):
    """`nn.LSTM`, which can be observed, trained quantisation-aware, and compiled.

    In each layer and direction, with the gates i, f, g, o in torch's order:

        a_k = W_ih,k x + b_ih,k + W_hh,k h + b_hh,k
        c = sigmoid(a_f) · c + sigmoid(a_i) · tanh(a_g)
        h = sigmoid(a_o) · tanh(c), or W_hr (sigmoid(a_o) · tanh(c)) with a projection

    It has `nn.LSTM`'s parameters, initialisation and state dict, takes what `nn.LSTM` takes, and
    without `split_gates`, `lengths` and `observe(qat=True)` calls the same kernel. Otherwise, and
    under `torch.compile` where gradients are recorded, the steps run in a loop, which a graph
    contains T times: there is a graph for each T, so pad to a few lengths and pass `lengths`. No
    Dynamo switch is needed.

    `observe()` inserts observation points, `parts()` returns them. Their state comes in addition to
    the weights in the state dict, under `points.`. A checkpoint without it, such as `nn.LSTM`'s, is
    then refused by a strict load, because ranges that stay would not belong to the new weights:
    load first and observe afterwards, or load with `strict=False`, and the ranges stay.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size,
            device, dtype: as in `nn.LSTM`.
        split_gates: each gate is a linear layer of width H with an observation point of its own,
            and no tensor of width 4H is formed.

    Shape:
        input `[T, B, I]`, `[B, T, I]` with `batch_first`, `[T, I]`, or a PackedSequence;
        hx `(h [L·D, B, P], c [L·D, B, H])`, zeros if None, without B if the input has none;
        lengths int64 `[B]`, the padded form of a PackedSequence, for graphs: past a sequence's end
            the output is 0, h_n and c_n are those of its last step, and the reverse direction
            begins there; 0 is an empty sequence, which keeps its states;
        output `[T, B, D·P]` or as the input is, and `(h_n, c_n)` as hx; P is proj_size or H.

    Raises:
        ValueError, TypeError, RuntimeError: whatever `nn.LSTM` raises, with its words; and lengths
            of another shape or dtype, beyond T or below 0 (in a graph they count as T and 0), or
            beside a PackedSequence or an input without a batch.

    >>> lstm = QuantizableLSTM(8, 16, split_gates=True)
    >>> y, (h, c) = lstm(torch.randn(5, 2, 8), lengths=torch.tensor([5, 3]))
    >>> y.shape, h.shape
    (torch.Size([5, 2, 16]), torch.Size([1, 2, 16]))
    """

    float_class = nn.LSTM
    fused = staticmethod(torch.lstm)
    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    check_forward_args: Any = nn.LSTM.check_forward_args
    permute_hidden: Any = nn.LSTM.permute_hidden

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        split_gates: bool = False,
    ) -> None:
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
        )
        self._begin(split_gates)


class QuantizableGRU(QuantizableRecurrent):
    """`nn.GRU`, which can be observed, trained quantisation-aware, and compiled.

    In each layer and direction, with the gates r, z, n in torch's order:

        r, z = sigmoid(W_ih,k x + b_ih,k + W_hh,k h + b_hh,k) for k = r, z
        n = tanh(W_ih,n x + b_ih,n + r · (W_hh,n h + b_hh,n))
        h = (h − n) · z + n

    All else is as in `QuantizableLSTM`, with one state h instead of `(h, c)` and 3H for 4H.

    >>> gru = QuantizableGRU(8, 16, bidirectional=True).observe()
    >>> y, h = gru(torch.randn(5, 2, 8))
    >>> y.shape, h.shape, list(gru.parts(0, reverse=True))[:3]
    (torch.Size([5, 2, 32]), torch.Size([2, 2, 16]), ['input', 'hidden_state', 'input_linear_r'])
    """

    float_class = nn.GRU
    fused = staticmethod(torch.gru)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        split_gates: bool = False,
        proj_size: int | None = None,
    ) -> None:
        if proj_size is not None:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        super().__init__(
            "GRU",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
        )
        self._begin(split_gates)

"""`QLSTMCell` and `QGRUCell`: drop-in `nn.LSTMCell` and `nn.GRUCell` over quantised weights."""

from __future__ import annotations

import torch
from torch import nn

from qnn.functional.float_recurrent import States
from qnn.kernels.schemes import DEFAULT_SCHEME
from qnn.nn.recurrent.cells import Cells
from qnn.nn.recurrent.quantizable_cell import QuantizableGRUCell, QuantizableLSTMCell
from qnn.nn.recurrent.quantized import QRecurrent


class QCell(QRecurrent, Cells):
    """What `QLSTMCell` and `QGRUCell` share: a layer of one step."""

    arguments = ("input_size", "hidden_size", "bias")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        scheme: str = DEFAULT_SCHEME,
        split_gates: bool = False,
    ) -> None:
        template = self.float_class(input_size, hidden_size, bias, device="meta", dtype=dtype)
        super().__init__(template, scheme, split_gates, device)

    def _run(self, x: torch.Tensor, states: States, given: bool) -> States:
        self._check_dtype_and_device(x)
        self._check(x, states)
        states = self._apart(states) if given else states
        _, *last = self._layer(x.unsqueeze(0), states, "", None)
        # Of their own, and not views of one result.
        return tuple(state.clone() for state in last)


class QLSTMCell(QCell, nn.LSTMCell):
    """`nn.LSTMCell`, one step of an LSTM, over quantised weights, with the arithmetic of `scheme`.

    Schemes, parts and rounding are those of `QLSTM`; a loop over the steps computes what `QLSTM`
    computes of the sequence, to the bit in float32. Its state dict has `nn.LSTMCell`'s names:
    `weight_ih` and `weight_hh`, each in the tensors that `QLinear` stores a `weight` in; the biases
    in `dtype`; and for a static scheme `table`, as `QLSTM`'s `table_l0`. `load_state_dict` also
    takes `nn.LSTMCell`'s own state.

    Where a model has all steps of a sequence at once, `QLSTM` computes them in one call.

    Args:
        input_size, hidden_size, bias, device, dtype: as in `nn.LSTMCell`; `dtype` is that of the
            biases.
        scheme: one that has a recurrent layer; an error lists them. A cell of a static scheme that
            is built and not converted has to load a state before its first call.
        split_gates: kept for `dequantize` and round trips; no scheme forms a tensor of width 4H.

    Shape:
        input `[B, I]` or `[I]`; hx `(h [B, H], c [B, H])` or `(h [H], c [H])`, zeros if None;
        output `(h, c)` likewise, in the input's dtype.

    Raises:
        ValueError, TypeError, RuntimeError: what `nn.LSTMCell` raises, but for the input's dtype,
            which may be any float; an unknown scheme.

    >>> h, c = QLSTMCell(8, 16)(torch.randn(3, 8))
    >>> h.shape
    torch.Size([3, 16])
    """

    float_class = nn.LSTMCell
    observed_class = QuantizableLSTMCell
    mode = "LSTM"


class QGRUCell(QCell, nn.GRUCell):
    """`nn.GRUCell`, one step of a GRU, over quantised weights, with the arithmetic of `scheme`.

    All else is as in `QLSTMCell`, with one state h and 3H for 4H.

    >>> QGRUCell(8, 16)(torch.randn(8)).shape
    torch.Size([16])
    """

    float_class = nn.GRUCell
    observed_class = QuantizableGRUCell
    mode = "GRU"

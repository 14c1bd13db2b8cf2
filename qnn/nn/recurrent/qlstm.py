"""`QLSTM` and `QGRU`: drop-in `nn.LSTM` and `nn.GRU` that hold their weights quantised."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as torch_F

from qnn.functional.float_recurrent import States
from qnn.nn.recurrent.quantizable import QuantizableGRU, QuantizableLSTM
from qnn.nn.recurrent.quantized import QRecurrent
from qnn.nn.recurrent.sequences import Sequences

_ARGUMENTS = (
    "input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional",
)  # fmt: skip


class QSequences(QRecurrent, Sequences):
    """What `QLSTM` and `QGRU` share: all but their constructors."""

    def check_input(self, input: torch.Tensor, batch_sizes: torch.Tensor | None) -> None:
        self._check_dtype_and_device(input)
        if input.size(-1) != self.input_size:
            raise RuntimeError(
                "input.size(-1) must be equal to input_size. Expected "
                f"{self.input_size}, got {input.size(-1)}"
            )

    def _run(
        self, x: torch.Tensor, states: States, given: bool, lengths: torch.Tensor | None
    ) -> tuple[torch.Tensor, States]:
        states = self._apart(states) if given else states
        suffixes = self._suffixes()
        directions = 2 if self.bidirectional else 1
        last: list[States] = []
        for index, suffix in enumerate(suffixes):
            if index and index % directions == 0:
                x = torch_F.dropout(x, self.dropout, self.training) if self.dropout else x
            state = tuple(state[index] for state in states)
            y, *new = self._layer(x, state, suffix, lengths)
            last.append(tuple(new))
            if directions == 1:
                x = y
            elif index % 2 == 0:
                forward = y
            else:
                x = torch.cat([forward, y], -1)
        return x, tuple(torch.stack(each) for each in zip(*last, strict=True))

    # -- what other code calls on an nn.RNNBase ----------------------------------------------------

    # torch keeps its weights in a list beside the parameters, for its kernels. Here it is made when
    # it is asked for: nothing can go stale.
    _flat_weight_refs: Any = ()

    @property
    def _all_weights(self) -> list[list[str]]:  # type: ignore[override]
        kinds = ["weight_ih", "weight_hh"]
        kinds += ["bias_ih", "bias_hh"] if self.bias else []
        kinds += ["weight_hr"] if self.proj_size else []
        return [[f"{kind}{suffix}" for kind in kinds] for suffix in self._suffixes()]

    @property
    def _flat_weights_names(self) -> list[str]:  # type: ignore[override]
        return [name for names in self._all_weights for name in names]

    @property
    def _flat_weights(self) -> list[Any]:  # type: ignore[override]
        return [getattr(self, name) for name in self._flat_weights_names]

    def flatten_parameters(self) -> None:
        """Nothing: the ops take the weights as they are."""

    def _init_flat_weights(self) -> None:
        """Nothing: there is no list to fill."""

    def _update_flat_weights(self) -> None:
        """Nothing: there is no list to fill."""

    def _weights_have_changed(self) -> bool:
        return False

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)


class QLSTM(QSequences):
    """`nn.LSTM` over int8 weights, with the arithmetic of `scheme`.

    - `int8`: the rows of the input and of the hidden state are quantised in each step;
    - `int8_static`: every part of the cell has a fixed grid, which calibration has found;
    - `int8_weight`: activations stay as they are.

    Its state dict has `nn.LSTM`'s names: `weight_ih_l0` and the others int8, each with a
    `…_scale`, float32 `[rows, 1]`; the biases in `dtype`; and for `int8_static` `table_l0`, float32
    `[17, 4]`, a row `(scale, zero_point, qmin, qmax)` for each part of the cell, in the order of
    `qnn.kernels.reference.recurrent.LSTM.parts`. `load_state_dict` also takes `nn.LSTM`'s own
    state.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size,
            device, dtype: as in `nn.LSTM`; `dtype` is that of the biases.
        scheme: `"int8"`, `"int8_static"` or `"int8_weight"`. A layer of `int8_static` that is built
            and not converted has to load a state before its first call.
        split_gates: kept for `dequantize` and round trips; no scheme forms a tensor of width 4H.

    Shape:
        input `[T, B, I]`, `[B, T, I]` with `batch_first`, `[T, I]`, or a PackedSequence;
        hx `(h [L·D, B, P], c [L·D, B, H])`, zeros if None; carried from call to call it streams;
        lengths int64 `[B]`, the padded form of a PackedSequence, for graphs;
        output `[T, B, D·P]` in the input's dtype, and `(h_n, c_n)`.

    Raises:
        ValueError, TypeError, RuntimeError: what `nn.LSTM` raises, but for the input's dtype, which
            may be any float; an unknown scheme; wrong lengths.

    >>> lstm = QLSTM(64, 128, num_layers=2)
    >>> y, (h, c) = lstm(torch.randn(10, 3, 64))
    >>> y.shape, c.shape
    (torch.Size([10, 3, 128]), torch.Size([2, 3, 128]))
    """

    float_class = nn.LSTM
    observed_class = QuantizableLSTM
    arguments = (*_ARGUMENTS, "proj_size")
    mode = "LSTM"
    get_expected_cell_size: Any = nn.LSTM.get_expected_cell_size
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
        scheme: str = "int8",
        split_gates: bool = False,
    ) -> None:
        template = nn.LSTM(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            proj_size, device="meta", dtype=dtype,
        )  # fmt: skip
        super().__init__(template, scheme, split_gates, device)


class QGRU(QSequences):
    """`nn.GRU` over int8 weights, with the arithmetic of `scheme`.

    All is as in `QLSTM`, with one state: hx and h_n are `[L·D, B, H]`, there is no projection, and
    `table_l0` is `[11, 4]`, in the order of `qnn.kernels.reference.recurrent.GRU.parts`.

    >>> gru = QGRU(64, 128, bidirectional=True, scheme="int8_weight")
    >>> y, h = gru(torch.randn(10, 3, 64))
    >>> y.shape, h.shape
    (torch.Size([10, 3, 256]), torch.Size([2, 3, 128]))
    """

    float_class = nn.GRU
    observed_class = QuantizableGRU
    arguments = _ARGUMENTS
    mode = "GRU"
    proj_size = 0

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
        scheme: str = "int8",
        split_gates: bool = False,
    ) -> None:
        template = nn.GRU(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            device="meta", dtype=dtype,
        )  # fmt: skip
        super().__init__(template, scheme, split_gates, device)

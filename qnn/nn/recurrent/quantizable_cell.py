"""`QuantizableLSTMCell` and `QuantizableGRUCell`: one step, with observation points."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.nn.modules.rnn import RNNCellBase

from qnn.calibration.fake_quantize import FakeQuantize, rounds
from qnn.functional.float_recurrent import States, Weights, float_layer
from qnn.nn.recurrent.cells import NAMES, Cells
from qnn.nn.recurrent.observed import Observed

CellT = TypeVar("CellT", bound="QuantizableCell")


class QuantizableCell(Cells, Observed):
    """What `QuantizableLSTMCell` and `QuantizableGRUCell` share."""

    float_class: type[RNNCellBase]
    fused: Any
    """torch's own kernel."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        split_gates: bool = False,
    ) -> None:
        make: Any = self.float_class.__init__
        make(self, input_size, hidden_size, bias, device, dtype)
        self._begin(split_gates)

    @classmethod
    def from_float(cls: type[CellT], cell: RNNCellBase, *, split_gates: bool = False) -> CellT:
        """A quantisable cell around the parameters of `cell` themselves, in its mode.

        Raises:
            TypeError: `cell` is of another class.
        """
        if not isinstance(cell, cls.float_class):
            raise TypeError(
                f"qnn.{cls.__name__}.from_float takes an nn.{cls.float_class.__name__}, got "
                f"{type(cell).__name__}."
            )
        made = cls(*_arguments(cell), device="meta", split_gates=split_gates)
        return cast(CellT, _hand_over(cell, made))

    def to_float(self) -> RNNCellBase:
        """The `nn.LSTMCell` or `nn.GRUCell` around this cell's parameters themselves."""
        make: Any = self.float_class
        return _hand_over(self, make(*_arguments(self), device="meta"))

    def reset_parameters(self) -> None:
        # The weights alone: a learned scale is a parameter too.
        bound = self.hidden_size**-0.5 if self.hidden_size > 0 else 0
        for name in NAMES:
            if getattr(self, name) is not None:
                nn.init.uniform_(getattr(self, name), -bound, bound)

    def parts(self) -> dict[str, FakeQuantize]:
        """The observation points by part, as `QuantizableLSTM.parts`; empty if not observed."""
        return self._parts("")

    def _run(self, x: torch.Tensor, states: States, given: bool) -> States:
        if self.split_gates or self.qat:
            return self._step(x, states, given)
        last = self._fused(x, states)
        if self._observes:
            with torch.no_grad():
                self._step(x, states, given)
        return last

    def _fused(self, x: torch.Tensor, states: States) -> States:
        parameters = (getattr(self, name) for name in NAMES)
        return self._states(self.fused(x, self._returned(states), *parameters))

    def _step(self, x: torch.Tensor, states: States, given: bool) -> States:
        """The step in single operations; what it shows is observed behind it."""
        self._check(x, states)
        weights = Weights(*(getattr(self, name) for name in NAMES))
        points = self._points("")
        _, last = float_layer(
            self.mode,
            x.unsqueeze(0),
            states,
            weights.fake_quantized() if rounds(self) else weights,
            points,
            given=given,
            split_gates=self.split_gates,
        )
        self._observe("", points, reverse=False, lengths=None)
        return last

    def extra_repr(self) -> str:
        return super().extra_repr() + self._extra()


class QuantizableLSTMCell(QuantizableCell, nn.LSTMCell):
    """`nn.LSTMCell`, one step of an LSTM, which can be observed and trained quantisation-aware.

    Arithmetic, parts and `split_gates` are those of `QuantizableLSTM`; parameters, initialisation
    and state dict those of `nn.LSTMCell`. In quantisation-aware training the weights are
    fake-quantised in each call.

    Args:
        input_size, hidden_size, bias, device, dtype: as in `nn.LSTMCell`.
        split_gates: each gate is a linear layer of its own, and no tensor of width 4H is formed.

    Shape:
        input `[B, I]` or `[I]`; hx `(h [B, H], c [B, H])` or `(h [H], c [H])`, zeros if None;
        output `(h, c)` likewise.

    Raises:
        ValueError, RuntimeError: whatever `nn.LSTMCell` raises, with its words.

    >>> h, c = QuantizableLSTMCell(8, 16)(torch.randn(3, 8))
    >>> h.shape
    torch.Size([3, 16])
    """

    float_class = nn.LSTMCell
    fused = staticmethod(torch.lstm_cell)
    mode = "LSTM"


class QuantizableGRUCell(QuantizableCell, nn.GRUCell):
    """`nn.GRUCell`, one step of a GRU, which can be observed and trained quantisation-aware.

    All else is as in `QuantizableLSTMCell`, with one state h and 3H for 4H.

    >>> QuantizableGRUCell(8, 16, split_gates=True)(torch.randn(8)).shape
    torch.Size([16])
    """

    float_class = nn.GRUCell
    fused = staticmethod(torch.gru_cell)
    mode = "GRU"


def _arguments(cell: RNNCellBase) -> tuple[int, int, bool]:
    return cell.input_size, cell.hidden_size, cell.bias


def _hand_over(source: RNNCellBase, target: RNNCellBase) -> RNNCellBase:
    """Give `target` the parameters of `source` themselves, and its mode."""
    for name in NAMES:
        setattr(target, name, getattr(source, name))
    return target.train(source.training)

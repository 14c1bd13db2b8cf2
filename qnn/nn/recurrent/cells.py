"""What recurrent cells share: the shapes of inputs and states, in and out, as in `nn.LSTMCell`."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.modules.rnn import RNNCellBase

from qnn.functional.float_recurrent import States
from qnn.nn.recurrent.states import OfCell
from qnn.nn.values import of_other_kind

NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class Cells(OfCell, RNNCellBase):
    """A cell that takes what `nn.LSTMCell` or `nn.GRUCell` takes; a subclass has `_run` for a batch
    `[B, I]`.
    """

    def _run(self, x: torch.Tensor, states: States, given: bool) -> States:
        """The states after the step; `given`: not the zeros of no hx."""
        raise NotImplementedError

    def _suffixes(self) -> list[str]:
        return [""]

    def forward(self, input: torch.Tensor, hx: Any = None) -> Any:
        if not isinstance(input, torch.Tensor):
            return of_other_kind(self, input, hx)
        if input.dim() not in (1, 2):
            raise ValueError(
                f"{self.mode}Cell: Expected input to be 1D or 2D, got {input.dim()}D instead"
            )
        batched = input.dim() == 2
        x = input if batched else input.unsqueeze(0)
        if hx is None:
            # Tensors of their own: a region takes none twice.
            states: States = tuple(
                x.new_zeros(x.shape[0], self.hidden_size) for _ in self._cell.states
            )
        else:
            states = self._given(hx)
            states = states if batched else tuple(state.unsqueeze(0) for state in states)
        last = self._run(x, states, hx is not None)
        last = last if batched else tuple(state.squeeze(0) for state in last)
        return self._returned(last)

    def _given(self, hx: Any) -> States:
        """States from outside; the errors have torch's words."""
        states = self._states(hx)
        for index, state in enumerate(states):
            if state.dim() not in (1, 2):
                name = "hidden" if len(states) == 1 else f"hx[{index}]"
                raise ValueError(
                    f"{self.mode}Cell: Expected {name} to be 1D or 2D, got {state.dim()}D instead"
                )
        return states

    def _check(self, x: torch.Tensor, states: States) -> None:
        """What torch's kernel checks, in its words."""
        if x.shape[1] != self.input_size:
            raise RuntimeError(
                f"input has inconsistent input_size: got {x.shape[1]} expected {self.input_size}"
            )
        for index, state in enumerate(states):
            if state.shape[0] != x.shape[0]:
                raise RuntimeError(
                    f"Input batch size {x.shape[0]} doesn't match hidden{index} batch size "
                    f"{state.shape[0]}"
                )
            if state.shape[1] != self.hidden_size:
                raise RuntimeError(
                    f"hidden{index} has inconsistent hidden_size: got {state.shape[1]}, expected "
                    f"{self.hidden_size}"
                )

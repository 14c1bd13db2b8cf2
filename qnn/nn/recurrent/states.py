"""What a recurrent layer or cell knows of its cell: an LSTM has `(h, c)` where a GRU has `h`."""

from __future__ import annotations

from typing import Any

from qnn.functional.float_recurrent import States
from qnn.kernels.reference.recurrent import CELLS, Cell


class OfCell:
    """A layer or cell of `mode` `"LSTM"` or `"GRU"`."""

    mode: str

    @property
    def _cell(self) -> Cell:
        return CELLS[self.mode.lower()]

    def _states(self, hx: Any) -> States:
        """States as torch takes and returns them, in a tuple."""
        if len(self._cell.states) == 1:
            return (hx,)
        if not isinstance(hx, tuple | list) or len(hx) != 2:
            got = f"{len(hx)} values" if isinstance(hx, tuple | list) else type(hx).__name__
            raise TypeError(f"{type(self).__name__}: hx must be a pair (h_0, c_0), got {got}.")
        return tuple(hx)

    def _returned(self, states: States) -> Any:
        """The inverse of `_states`."""
        return states[0] if len(states) == 1 else states

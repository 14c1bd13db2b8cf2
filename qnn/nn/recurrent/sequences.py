"""What recurrent layers share: the shapes of sequences and states, in and out, as in `nn.LSTM`."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.rnn import RNNBase
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from qnn.functional.float_recurrent import States
from qnn.nn.recurrent.states import OfCell
from qnn.nn.values import of_other_kind


class Sequences(OfCell, RNNBase):
    """A recurrent layer that takes what `nn.LSTM` or `nn.GRU` takes, and has what they have; a
    subclass has `_run` for sequences `[T, B, I]`.

    It is an `nn.RNNBase`, and cannot be an `nn.LSTM`: Dynamo refuses each module that is one.
    """

    def _run(
        self, x: torch.Tensor, states: States, given: bool, lengths: torch.Tensor | None
    ) -> tuple[torch.Tensor, States]:
        """The outputs `[T, B, D·P]` and the last states; `given`: not the zeros of no hx."""
        raise NotImplementedError

    def forward(self, input: Any, hx: Any = None, lengths: Any = None) -> tuple[Any, Any]:
        if not isinstance(input, torch.Tensor | PackedSequence):
            return cast(tuple[Any, Any], of_other_kind(self, input, hx, lengths))
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError(f"{self._who}: a PackedSequence has its own lengths.")
            return self._packed(input, hx)
        if input.dim() not in (2, 3):
            raise ValueError(
                f"{self.mode}: Expected input to be 2D or 3D, got {input.dim()}D instead"
            )
        batched, along = input.dim() == 3, 0 if self.batch_first else 1
        if lengths is not None and not batched:
            raise ValueError(f"{self._who}: lengths needs a batch, and the input has none.")
        x = input if batched else input.unsqueeze(along)
        states = self._zeros(x, x.shape[along]) if hx is None else self._given(hx, batched)
        self._check(x, states, None)
        x = x.transpose(0, 1) if self.batch_first else x
        if x.shape[0] == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        if lengths is not None:
            lengths = self._checked(lengths, x)
        y, last = self._run(x, states, hx is not None, lengths)
        y = y.transpose(0, 1) if self.batch_first else y
        if not batched:
            y = y.squeeze(along)
            last = tuple(state.squeeze(1) for state in last)
        return y, self._returned(last)

    def _packed(self, input: PackedSequence, hx: Any) -> tuple[PackedSequence, Any]:
        """In the order in which the sequences are packed, the longest first."""
        data, batch_sizes, order, back = input
        if hx is None:
            states = self._zeros(data, int(batch_sizes[0]))
        else:
            states = self._states(hx)
            if order is not None:
                states = tuple(state.index_select(1, order) for state in states)
        self._check(data, states, batch_sizes)
        y, last = self._run_packed(data, batch_sizes, states, hx is not None)
        if back is not None:
            last = tuple(state.index_select(1, back) for state in last)
        return PackedSequence(y, batch_sizes, order, back), self._returned(last)

    def _run_packed(
        self, data: torch.Tensor, batch_sizes: torch.Tensor, states: States, given: bool
    ) -> tuple[torch.Tensor, States]:
        """As `_run`, of packed values to packed values: by way of the padded form."""
        x, lengths = pad_packed_sequence(PackedSequence(data, batch_sizes))
        y, last = self._run(x, states, given, lengths.to(x.device))
        return pack_padded_sequence(y, lengths).data, last

    def _zeros(self, x: torch.Tensor, batch: int) -> States:
        rows = self.num_layers * (2 if self.bidirectional else 1)
        widths = {"p": self.proj_size or self.hidden_size, "h": self.hidden_size}
        return tuple(x.new_zeros(rows, batch, widths[each]) for each in self._cell.widths)

    def _given(self, hx: Any, batched: bool) -> States:
        """States from outside, with a batch; the errors have torch's words."""
        want, kind = (3, "batched") if batched else (2, "unbatched")
        states = self._states(hx)
        if any(state.dim() != want for state in states):
            got = ", ".join(f"{state.dim()}-D" for state in states)
            names, got = ("hx", got) if len(states) == 1 else ("hx and cx", f"({got})")
            raise RuntimeError(
                f"For {kind} {want}-D input, {names} should also be {want}-D but got {got} tensor"
                + "s" * (len(states) > 1)
            )
        return states if batched else tuple(state.unsqueeze(1) for state in states)

    def _check(self, x: torch.Tensor, states: States, batch_sizes: torch.Tensor | None) -> None:
        """Raise unless the layer can take `x` and the states."""
        self.check_input(x, batch_sizes)
        for index, state in enumerate(states):
            size = self.get_expected_hidden_size(x, batch_sizes)
            if index:
                size = nn.LSTM.get_expected_cell_size(cast(Any, self), x, batch_sizes)
            which = f"hidden[{index}]" if len(states) > 1 else "hidden"
            self.check_hidden_size(state, size, f"Expected {which} size {{}}, got {{}}")

    def _checked(self, lengths: Any, x: torch.Tensor) -> torch.Tensor:
        """Lengths as an op takes them, int64, of whole numbers in any form."""
        limit, batch = x.shape[:2]
        given = lengths if isinstance(lengths, torch.Tensor) else None
        if isinstance(lengths, list | tuple) and all(type(each) is int for each in lengths):
            given = torch.tensor(lengths, dtype=torch.int64)
        if given is None or not _is_whole(given.dtype) or tuple(given.shape) != (batch,):
            got = type(lengths).__name__
            if isinstance(lengths, list | tuple):
                got = f"{lengths!r}"
            elif given is not None:
                got = f"{given.dtype} {list(given.shape)}"
            raise ValueError(
                f"{self._who}: lengths must be {batch} whole numbers, one for each sequence of the "
                f"batch, as a tensor of integers or a list; got {got}."
            )
        given = given.to(x.device, torch.int64)
        # A graph cannot raise on values: there a length beyond T counts as T, and one below 0 as 0.
        if not torch.compiler.is_compiling() and bool(((given < 0) | (given > limit)).any()):
            raise ValueError(
                f"{self._who}: lengths must lie in 0 … {limit}, the number of steps; got "
                f"{int(given.min())} … {int(given.max())}."
            )
        return given

    def _suffixes(self) -> list[str]:
        """What the names of each layer's and direction's parameters end with, in torch's order."""
        directions = ("", "_reverse") if self.bidirectional else ("",)
        return [f"_l{layer}{end}" for layer in range(self.num_layers) for end in directions]

    @property
    def _who(self) -> str:
        return f"qnn.{type(self).__name__}({self.extra_repr()})"


def _is_whole(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)

"""What `QuantizableLSTM` and `QuantizableGRU` share."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.rnn import RNNBase
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from qnn.calibration.fake_quantize import rounds
from qnn.functional.float_recurrent import States, Weights, float_recurrent, valid_steps
from qnn.kernels.torch_private import is_exporting
from qnn.nn.recurrent.observed import Observed
from qnn.nn.recurrent.sequences import Sequences

LayerT = TypeVar("LayerT", bound="QuantizableRecurrent")


class QuantizableRecurrent(Sequences, Observed):
    """All but the constructor."""

    float_class: type[RNNBase]
    fused: Any
    """torch's own kernel of all steps and layers."""

    split_gates: bool

    # -- construction -----------------------------------------------------------------------------

    @classmethod
    def from_float(cls: type[LayerT], layer: RNNBase, *, split_gates: bool = False) -> LayerT:
        """A quantisable layer around the parameters of `layer` themselves, in its mode.

        Nothing is copied: tied and shared weights stay tied, and an optimizer keeps its
        parameters.

        Raises:
            TypeError: `layer` is of another class.
        """
        if not isinstance(layer, cls.float_class):
            raise TypeError(
                f"qnn.{cls.__name__}.from_float takes an nn.{cls.float_class.__name__}, got "
                f"{type(layer).__name__}."
            )
        make: Any = cls
        return cast(LayerT, _hand_over(layer, make(**_arguments(layer), split_gates=split_gates)))

    def to_float(self) -> RNNBase:
        """The `nn.LSTM` or `nn.GRU` around this layer's parameters themselves."""
        return _hand_over(self, self.float_class(**_arguments(self)))

    def reset_parameters(self) -> None:
        # The weights alone: a learned scale is a parameter too.
        bound = self.hidden_size**-0.5
        for name in self._flat_weights_names:
            nn.init.uniform_(getattr(self, name), -bound, bound)

    # -- observation points -----------------------------------------------------------------------

    def parts(self, layer: int = 0, reverse: bool = False) -> dict[str, Any]:
        """The observation points of one layer and direction, by part; empty if not observed.

        Without `split_gates` the linears of all gates are one point: `"input_linear_i"` to
        `"input_linear_o"` are the same module.

        Raises:
            IndexError: the layer has no such layer or direction.
        """
        suffix = f"_l{layer}{'_reverse' if reverse else ''}"
        if suffix not in self._suffixes():
            raise IndexError(
                f"qnn.{type(self).__name__}.parts({layer}, {reverse}): the layer has num_layers="
                f"{self.num_layers} and bidirectional={self.bidirectional}."
            )
        return self._parts(suffix)

    # -- forward ----------------------------------------------------------------------------------

    def _run_packed(
        self, data: torch.Tensor, batch_sizes: torch.Tensor, states: States, given: bool
    ) -> tuple[torch.Tensor, States]:
        if self._steps_only:
            self._check_loop(data, states)
            return self._packed_loop(data, batch_sizes, states, given)
        y, *last = self.fused(
            data, batch_sizes, self._returned(states), *self._settings(), self.bidirectional
        )
        if self._observes:
            with torch.no_grad():
                self._packed_loop(data, batch_sizes, states, given, dropout=False)
        return y, tuple(last)

    def _packed_loop(
        self,
        data: torch.Tensor,
        batch_sizes: torch.Tensor,
        states: States,
        given: bool,
        dropout: bool = True,
    ) -> tuple[torch.Tensor, States]:
        x, lengths = pad_packed_sequence(PackedSequence(data, batch_sizes))

        def dropped(y: torch.Tensor) -> torch.Tensor:
            # On the packed values, as torch does: the same random numbers are drawn.
            kept = F.dropout(pack_padded_sequence(y, lengths).data, self.dropout)
            return pad_packed_sequence(PackedSequence(kept, batch_sizes))[0]

        y, last = self._loop(
            x, states, given, lengths.to(x.device), dropped if dropout and self._drops else None
        )
        return pack_padded_sequence(y, lengths).data, last

    def _run(
        self, x: torch.Tensor, states: States, given: bool, lengths: torch.Tensor | None
    ) -> tuple[torch.Tensor, States]:
        # torch's own kernels have no trace for training on a CPU.
        tracing = torch.compiler.is_compiling() and not is_exporting()
        if self._steps_only or lengths is not None or (tracing and torch.is_grad_enabled()):
            self._check_loop(x, states)
            return self._loop(x, states, given, lengths, self._dropout if self._drops else None)
        y, *last = self.fused(
            x, self._returned(states), *self._settings(), self.bidirectional, False
        )
        if self._observes:
            with torch.no_grad():
                self._loop(x, states, given, None, None)
        return y, tuple(last)

    def _loop(
        self,
        x: torch.Tensor,
        states: States,
        given: bool,
        lengths: torch.Tensor | None,
        dropout: Any,
    ) -> tuple[torch.Tensor, States]:
        """The steps one by one; what they show is observed behind them."""
        suffixes = self._suffixes()
        points = [self._points(suffix) for suffix in suffixes]
        weights = [self._weights(suffix) for suffix in suffixes]

        def observe(index: int) -> None:
            # At once: the steps of one layer and direction are held at a time.
            suffix = suffixes[index]
            reverse = suffix.endswith("_reverse")
            self._observe(suffix, points[index], reverse=reverse, lengths=lengths)

        return float_recurrent(
            self.mode,
            x,
            states,
            [each.fake_quantized() for each in weights] if rounds(self) else weights,
            points,
            bidirectional=self.bidirectional,
            given=given,
            valid=None if lengths is None else valid_steps(lengths, x.shape[0]),
            split_gates=self.split_gates,
            dropout=dropout,
            done=observe,
        )

    def _weights(self, suffix: str) -> Weights:
        bias_ih, bias_hh = (
            (getattr(self, f"bias_ih{suffix}"), getattr(self, f"bias_hh{suffix}"))
            if self.bias
            else (None, None)
        )
        hr = getattr(self, f"weight_hr{suffix}") if self.proj_size else None
        ih, hh = getattr(self, f"weight_ih{suffix}"), getattr(self, f"weight_hh{suffix}")
        return Weights(ih, hh, bias_ih, bias_hh, hr)

    def _settings(self) -> tuple[Any, ...]:
        weights = [getattr(self, name) for name in self._flat_weights_names]
        return weights, self.bias, self.num_layers, self.dropout, self.training

    @property
    def _steps_only(self) -> bool:
        """Whether torch's fused kernel, of all gates and without points, is no way to go."""
        return self.split_gates or self.qat

    @property
    def _drops(self) -> bool:
        return self.training and self.dropout > 0

    def _dropout(self, y: torch.Tensor) -> torch.Tensor:
        return F.dropout(y, self.dropout)

    def _check_loop(self, x: torch.Tensor, states: States) -> None:
        """What torch's kernels check, in their words."""
        others = [("hidden", state) for state in states]
        others += [("parameter", getattr(self, self._flat_weights_names[0]))]
        for name, other in others:
            if other.device != x.device:
                raise RuntimeError(
                    f"Input and {name} tensors are not at the same device, found input tensor at "
                    f"{x.device} and {name} tensor at {other.device}"
                )
        for state in states:
            if state.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
                raise RuntimeError(
                    "Input and hidden tensors are not the same dtype, found input tensor with "
                    f"{x.dtype} and hidden tensor with {state.dtype}"
                )

    @property
    def _who(self) -> str:
        return f"qnn.{type(self).__name__}({RNNBase.extra_repr(self)})"

    def extra_repr(self) -> str:
        return super().extra_repr() + self._extra()


def _arguments(layer: RNNBase) -> dict[str, Any]:
    """The constructor's arguments, for parameters that will be replaced; without dropout, whose
    warning has been given once.
    """
    names = ["input_size", "hidden_size", "num_layers", "bias", "batch_first", "bidirectional"]
    names += ["proj_size"] if layer.mode == "LSTM" else []
    return {**{name: getattr(layer, name) for name in names}, "device": "meta"}


def _hand_over(source: RNNBase, target: RNNBase) -> RNNBase:
    """Give `target` the parameters of `source` themselves, its dropout and its mode."""
    for name in source._flat_weights_names:
        setattr(target, name, getattr(source, name))
    target._init_flat_weights()
    target.dropout = source.dropout
    return target.train(source.training)

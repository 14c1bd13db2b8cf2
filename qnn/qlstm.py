"""`QLSTM` and `QGRU`: drop-in `nn.LSTM` and `nn.GRU` that hold their weights quantised."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional as torch_F
from torch.nn.modules.rnn import RNNBase

from qnn import functional as F
from qnn.backends import recurrent_backend
from qnn.base import not_finite
from qnn.forking import return_threads
from qnn.functional import RecurrentWeights
from qnn.functional.float_recurrent import States
from qnn.kernels.formats import FLOATS
from qnn.kernels.recurrent import CELLS, MAX_COLUMNS, SCHEMES
from qnn.sequences import Sequences

LayerT = TypeVar("LayerT", bound="QRecurrent")


class QRecurrent(Sequences):
    """What `QLSTM` and `QGRU` share: all but their constructors."""

    float_class: type[RNNBase]
    dtype: torch.dtype

    def __init__(self, template: RNNBase, scheme: str, split_gates: bool, device: Any) -> None:
        """Of the shapes of `template`, a float layer on the meta device."""
        nn.Module.__init__(self)
        for name in _SETTINGS:
            setattr(self, name, getattr(template, name))
        self.scheme, self.split_gates = scheme, split_gates
        self.dtype = next(template.parameters()).dtype
        if scheme not in SCHEMES:
            able = ", ".join(map(repr, SCHEMES))
            raise ValueError(f"{self._who}: scheme must be one of {able}, got {scheme!r}.")
        if self.dtype not in FLOATS:
            able = ", ".join(map(str, FLOATS))
            raise TypeError(f"{self._who}: dtype must be one of {able}, got {self.dtype}.")
        for name, parameter in template.named_parameters():
            shape = tuple(parameter.shape)
            if parameter.dim() == 1:
                self._set(name, torch.empty(shape, dtype=self.dtype, device=device), True)
                continue
            limit = MAX_COLUMNS.get(scheme, shape[1])
            if shape[1] > limit:
                raise ValueError(
                    f"{self._who}: {name} has {shape[1]} columns; beyond {limit} the int32 "
                    "sum of a row can overflow. Use scheme='int8_weight'."
                )
            self._set(name, torch.empty(shape, dtype=torch.int8, device=device))
            scale = torch.empty(shape[0], 1, dtype=torch.float32, device=device)
            self._set(f"{name}_scale", scale)
        if scheme == "int8_static":
            rows = len(CELLS[self.mode.lower()].parts)
            for suffix in self._suffixes():
                # Not calibrated: a call is an error, until a state is loaded.
                table = torch.full((rows, 4), torch.nan, dtype=torch.float32, device=device)
                self._set(f"table{suffix}", table)
        self.reset_parameters()

    def _set(self, name: str, values: torch.Tensor, requires_grad: bool = False) -> None:
        self._parameters[name] = nn.Parameter(values, requires_grad=requires_grad)

    @property
    def _device(self) -> torch.device:
        device: torch.device = self._parameters["weight_ih_l0"].device  # type: ignore[union-attr]
        return device

    @property
    def _weight_names(self) -> list[str]:
        return [name for name in self._parameters if f"{name}_scale" in self._parameters]

    @property
    def _kept(self) -> list[str]:
        """The parameters whose dtype no cast changes."""
        return [name for name in self._parameters if not name.startswith("bias")]

    def reset_parameters(self) -> None:
        """Draw the weights that the float layer would draw, and quantise them."""
        if self._device.type != "meta":
            self._take(dict(self._float(self._device).named_parameters()))

    def _take(self, floats: Mapping[str, torch.Tensor]) -> None:
        """The values of a float layer's parameters, quantised where they are weights."""
        quantized = set(self._weight_names)
        for name, value in floats.items():
            if name in quantized:
                q, scale = F.quantize(value, "int8")
                self._set(name, q)
                self._set(f"{name}_scale", scale)
            else:
                self._set(name, value.detach().clone(), value.requires_grad)

    def _float(self, device: Any) -> RNNBase:
        return self.float_class(**_arguments(self), device=device, dtype=self.dtype)

    @classmethod
    def from_float(
        cls: type[LayerT], layer: RNNBase, scheme: str = "int8", *, split_gates: bool | None = None
    ) -> LayerT:
        """The quantised twin of a float layer: same device, mode and biases.

        Args:
            layer: an `nn.LSTM` or `QuantizableLSTM` (`nn.GRU`, `QuantizableGRU`).
            scheme: as of the layer; one of `"int8_static"` is not calibrated: see `from_observed`.
            split_gates: as the layer has it, if None.

        Raises:
            TypeError: `layer` is of another class, or its weights are no plain float parameters.
            ValueError: a weight holds NaN or inf.
        """
        return cls._of(layer, scheme, split_gates)

    @classmethod
    def from_observed(cls: type[LayerT], layer: Any) -> LayerT:
        """The `int8_static` twin of a `QuantizableLSTM` (`QuantizableGRU`) that was observed.

        Raises:
            TypeError: `layer` is of another class.
            ValueError: it was not observed, a part has seen nothing, or a part's range is empty,
                infinite or NaN, or has too many bits for the int8 product; the part is named.
        """
        tables = cls.tables_of(layer)
        made = cls._of(layer, "int8_static", None)
        for suffix, table in tables.items():
            made._set(f"table{suffix}", table.to(made._device))
        return made

    @classmethod
    def tables_of(cls, layer: Any) -> dict[str, torch.Tensor]:
        """The table of each layer and direction, by the end of its name: `"_l0"`, `"_l0_reverse"`.

        Raises:
            TypeError, ValueError: as `from_observed`.
        """
        parts = getattr(layer, "parts", None)
        if not isinstance(layer, RNNBase) or not callable(parts):
            raise TypeError(
                f"qnn.{cls.__name__}.from_observed takes a qnn.{cls._quantizable()}, got "
                f"{type(layer).__name__}."
            )
        who, tables = f"qnn.{cls.__name__}.from_observed", {}
        for index in range(layer.num_layers):
            for end in ("", "_reverse") if layer.bidirectional else ("",):
                points = parts(index, bool(end))
                if not points:
                    raise ValueError(
                        f"{who}: the layer has no observation points; call layer.observe(), or "
                        "qnn.prepare on the model, and calibrate it."
                    )
                tables[f"_l{index}{end}"] = _table(CELLS[layer.mode.lower()].parts, points, who)
        return tables

    @classmethod
    def _quantizable(cls) -> str:
        return cls.__name__.replace("Q", "Quantizable", 1)

    @classmethod
    def _of(cls: type[LayerT], layer: RNNBase, scheme: str, split_gates: bool | None) -> LayerT:
        mode = cls.float_class.__name__
        if not isinstance(layer, RNNBase) or layer.mode != mode:
            raise TypeError(
                f"qnn.{cls.__name__}.from_float takes an nn.{mode} or a qnn.{cls._quantizable()}, "
                f"got {type(layer).__name__}."
            )
        floats = {name: getattr(layer, name) for name in layer._flat_weights_names}
        who = f"qnn.{cls.__name__}.from_float({layer!r})"
        for name, value in floats.items():
            if value.dtype not in FLOATS:
                raise TypeError(f"{who}: {name} must be float, got {value.dtype}.")
            if not_finite(value) is not None:
                raise ValueError(f"{who}: {name} holds NaN or inf.")
        if split_gates is None:
            split_gates = bool(getattr(layer, "split_gates", False))
        made = cls.__new__(cls)
        dtype = floats["weight_ih_l0"].dtype
        template = cls.float_class(**_arguments(layer), device="meta", dtype=dtype)
        QRecurrent.__init__(made, template, scheme, split_gates, "meta")
        made._take(floats)
        for name in [name for name in made._parameters if name.startswith("table")]:
            table = torch.full_like(made._parameters[name], torch.nan, device=made._device)
            made._set(name, table)
        return made.train(layer.training)

    def dequantize(self) -> RNNBase:
        """The float layer, `nn.LSTM` or `nn.GRU`, with the weights `weight * weight_scale`."""
        layer = self._float("meta").to_empty(device=self._device)
        quantized = set(self._weight_names)
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                mine = getattr(self, name)
                if name in quantized:
                    mine = F.dequantize(mine, getattr(self, f"{name}_scale"), self.dtype)
                parameter.copy_(mine)
        return layer.train(self.training)

    # -- forward ----------------------------------------------------------------------------------

    def check_input(self, input: torch.Tensor, batch_sizes: torch.Tensor | None) -> None:
        if input.dtype not in FLOATS:
            raise TypeError(
                f"{self._who}: the input must be float32, bfloat16, float16 or float64, got "
                f"{input.dtype}; cast it with .float()."
            )
        device = self._device
        if input.device != device:
            raise ValueError(
                f"{self._who}: the input is on {input.device}, the layer on {device}; move one of "
                "them with .to(device)."
            )
        if input.size(-1) != self.input_size:
            raise RuntimeError(
                "input.size(-1) must be equal to input_size. Expected "
                f"{self.input_size}, got {input.size(-1)}"
            )

    def _run(
        self, x: torch.Tensor, states: States, given: bool, lengths: torch.Tensor | None
    ) -> tuple[torch.Tensor, States]:
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

    def _layer(
        self, x: torch.Tensor, states: States, suffix: str, lengths: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        parameters: Any = self._parameters
        ih, hh, hr = (f"weight_{which}{suffix}" for which in ("ih", "hh", "hr"))
        weights = RecurrentWeights(
            parameters[ih],
            parameters[f"{ih}_scale"],
            parameters[hh],
            parameters[f"{hh}_scale"],
            parameters.get(f"bias_ih{suffix}"),
            parameters.get(f"bias_hh{suffix}"),
            parameters.get(hr),
            parameters.get(f"{hr}_scale"),
            parameters.get(f"table{suffix}"),
        )
        reverse = suffix.endswith("_reverse")
        if self.mode == "GRU":
            return F.gru(
                x, states[0], weights, scheme=self.scheme, lengths=lengths, reverse=reverse
            )
        h, c = states
        return F.lstm(x, (h, c), weights, scheme=self.scheme, lengths=lengths, reverse=reverse)

    # -- state ------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # A cast of the whole model reaches scales and tables. Their values stay as they are; only
        # their device follows.
        kept = {name: getattr(self, name).data for name in self._kept}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, data in kept.items():
            parameter = getattr(self, name)
            if parameter.dtype != data.dtype:
                parameter.data = data.to(parameter.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self._device)).dtype
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        who, state_dict = prefix.removesuffix(".") or self._who, dict(state_dict)
        for name in self._weight_names:
            try:
                state_dict |= self._read_weight(prefix, name, state_dict)
            except (TypeError, ValueError) as error:
                error_msgs.append(f"{who}: {error}")
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        return_threads()
        for name in self._kept:
            getattr(self, name).requires_grad_(False)

    def _read_weight(
        self, prefix: str, name: str, state: Mapping[str, Any]
    ) -> dict[str, torch.Tensor]:
        """A checkpoint's weight and scale as this layer holds them; nothing where it has none."""
        weight, scale = state.get(prefix + name), state.get(f"{prefix}{name}_scale")
        if weight is None:
            if scale is not None:
                raise ValueError(f"the state has a {name}_scale but no {name}.")
            return {}
        want = tuple(getattr(self, name).shape)
        if tuple(weight.shape) != want:
            raise ValueError(f"{name} must be {list(want)}, got {list(weight.shape)}.")
        if weight.dtype in FLOATS:
            if scale is not None:
                raise ValueError(f"{name} is {weight.dtype}, yet the state has a {name}_scale too.")
            if not_finite(weight) is not None:
                raise ValueError(f"{name} holds NaN or inf.")
            if self.scheme == "int8_static" and f"{prefix}table_l0" not in state:
                raise ValueError(
                    "the state is that of a float layer, and scheme 'int8_static' needs the ranges "
                    "of the activations: load it before qnn.prepare."
                )
            q, scale = F.quantize(weight.detach(), "int8")
            return {prefix + name: q, f"{prefix}{name}_scale": scale}
        if weight.dtype != torch.int8:
            raise TypeError(f"{name} is {weight.dtype}, but scheme {self.scheme!r} stores int8.")
        if scale is None:
            raise ValueError(f"{name} is int8, yet the state has no {name}_scale: it is truncated.")
        if not scale.is_meta and not bool((scale.isfinite() & (scale > 0)).all()):
            raise ValueError(f"{name}_scale must be positive and finite.")
        return {f"{prefix}{name}_scale": scale.float()}

    def extra_repr(self) -> str:
        text = RNNBase.extra_repr(self)  # type: ignore[arg-type]
        text += f", split_gates={self.split_gates}" if self.split_gates else ""
        return f"{text}, scheme={self.scheme!r}"

    def __repr__(self) -> str:
        if torch.compiler.is_compiling():  # torch.vmap asks for the name of what it maps
            return self._who
        return f"{type(self).__name__}({self.extra_repr()})  # {recurrent_backend(self)}"


class QLSTM(QRecurrent):
    """`nn.LSTM` over int8 weights, with the arithmetic of `scheme`.

    - `int8`: the rows of the input and of the hidden state are quantised in each step;
    - `int8_static`: every part of the cell has a fixed grid, which calibration has found;
    - `int8_weight`: activations stay as they are.

    Its state dict has `nn.LSTM`'s names: `weight_ih_l0` and the others int8, each with a
    `…_scale`, float32 `[rows, 1]`; the biases in `dtype`; and for `int8_static` `table_l0`, float32
    `[17, 4]`, a row `(scale, zero_point, qmin, qmax)` for each part of the cell, in the order of
    `qnn.kernels.recurrent.LSTM.parts`. `load_state_dict` also takes `nn.LSTM`'s own state.

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


class QGRU(QRecurrent):
    """`nn.GRU` over int8 weights, with the arithmetic of `scheme`.

    All is as in `QLSTM`, with one state: hx and h_n are `[L·D, B, H]`, there is no projection, and
    `table_l0` is `[11, 4]`, in the order of `qnn.kernels.recurrent.GRU.parts`.

    >>> gru = QGRU(64, 128, bidirectional=True, scheme="int8_weight")
    >>> y, h = gru(torch.randn(10, 3, 64))
    >>> y.shape, h.shape
    (torch.Size([10, 3, 256]), torch.Size([2, 3, 128]))
    """

    float_class = nn.GRU

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


_SETTINGS = (
    "mode", "input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout",
    "bidirectional", "proj_size",
)  # fmt: skip


def _arguments(layer: Any) -> dict[str, Any]:
    """What the constructor of a recurrent layer like `layer` takes."""
    left_out = ("mode", "proj_size") if layer.mode == "GRU" else ("mode",)
    return {name: getattr(layer, name) for name in _SETTINGS if name not in left_out}


def _table(names: tuple[str, ...], points: Mapping[str, Any], who: str) -> torch.Tensor:
    """The rows of a cell's parts; zeros for a part that stays as it is."""
    rows = []
    for name in names:
        point = points.get(name)
        if point is None:
            if name in ("input", "hidden_state"):
                raise ValueError(f"{who}: part {name!r} must be quantised: it enters a product.")
            rows.append(torch.zeros(4))
            continue
        try:
            row = point.row().cpu()
        except ValueError as error:
            raise ValueError(f"{who}: part {name!r}: {error}") from None
        if name in _OPERANDS and float(row[3] - row[2]) > 255:
            raise ValueError(
                f"{who}: part {name!r} enters an int8 product and has at most 8 bits, got "
                f"{int(row[2])} … {int(row[3])}."
            )
        rows.append(row)
    return torch.stack(rows)


_OPERANDS = ("input", "hidden_state", "projection_input")

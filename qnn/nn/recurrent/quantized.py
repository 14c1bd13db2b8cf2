"""What the quantised recurrent layers and cells share: their weights, and the ways in and out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import nn

from qnn import functional as F
from qnn.calibration.doubts import note_on
from qnn.functional import RecurrentWeights
from qnn.functional.float_recurrent import States
from qnn.kernels.backends import recurrent_backend
from qnn.kernels.formats import FLOATS
from qnn.kernels.reference.recurrent import CELLS
from qnn.kernels.schemes import STATIC, schemes_of
from qnn.nn.base import Quantized
from qnn.nn.recurrent.observed import Observed
from qnn.nn.values import Found, frozen, normal, quantize, require_float, why_not_finite

LayerT = TypeVar("LayerT", bound="QRecurrent")


class QRecurrent(Quantized):
    """The weights of one or more recurrent layers in int8, and the arithmetic of `scheme`.

    Attributes:
        float_class, observed_class: what it is made of.
        arguments: the names of what `float_class` takes, which are attributes here too.
    """

    float_class: ClassVar[type[nn.Module]]
    observed_class: ClassVar[type[Observed]]
    arguments: ClassVar[tuple[str, ...]]
    mode: str
    _suffixes: Callable[[], list[str]]
    """What the names of each layer's and direction's parameters end with, in torch's order."""

    def __init__(self, template: nn.Module, scheme: str, split_gates: bool, device: Any) -> None:
        """Of the shapes of `template`, a float layer on the meta device."""
        nn.Module.__init__(self)
        for name in self.arguments:
            setattr(self, name, getattr(template, name))
        self.scheme, self.split_gates = scheme, split_gates
        self.dtype = next(template.parameters()).dtype
        if scheme not in schemes_of(self._cell):
            able = ", ".join(map(repr, schemes_of(self._cell)))
            raise ValueError(f"{self._who}: scheme must be one of {able}, got {scheme!r}.")
        if self.dtype not in FLOATS:
            able = ", ".join(map(str, FLOATS))
            raise TypeError(f"{self._who}: dtype must be one of {able}, got {self.dtype}.")
        self._shapes: dict[str, tuple[int, int]] = {}
        for name, parameter in template._parameters.items():
            if parameter is None:  # as a cell has its biases
                self._parameters[name] = None
            elif parameter.dim() == 1:
                bias = torch.empty(parameter.shape, dtype=self.dtype, device=device)
                self._parameters[name] = nn.Parameter(bias)
            else:
                self._shapes[name] = rows, columns = parameter.shape[0], parameter.shape[1]
                limit = self._scheme.max_in_features
                if limit is not None and columns > limit:
                    raise ValueError(
                        f"{self._who}: {name} has {columns} columns; beyond {limit} the "
                        "int32 sum of a row can overflow. Use scheme='int8_weight'."
                    )
                for part_name, part in self._parts_of(name):
                    shape = part.shape(rows, columns)
                    empty = torch.empty(shape, dtype=part.dtype, device=device)
                    self._parameters[part_name] = frozen(empty)
        self._empty_calibration(device)
        self.reset_parameters()

    # -- what the base asks for -------------------------------------------------------------------

    def _weight_shapes(self) -> dict[str, tuple[int, int]]:
        return self._shapes

    def _calibration(self) -> dict[str, Found]:
        if not self._scheme.static:
            return {}
        rows = len(CELLS[self._cell].parts)
        return {f"table{suffix}": Found(torch.float32, (rows, 4)) for suffix in self._suffixes()}

    def _backend(self) -> str:
        device = next(self.parameters()).device
        return recurrent_backend(cast(str, self._scheme.op(self._cell)), device)

    @property
    def _cell(self) -> str:
        """What a scheme knows the layer's op by."""
        return self.mode.lower()

    @property
    def _who(self) -> str:
        return f"qnn.{type(self).__name__}({self.extra_repr()})"

    @property
    def matrix(self) -> tuple[int, int]:
        """The shape of the first layer's recurrent weight."""
        return next(s for name, s in self._shapes.items() if name.startswith("weight_hh"))

    @property
    def _device(self) -> torch.device:
        (name, *_) = self._shapes
        return cast(torch.Tensor, self._parameters[name]).device

    # -- from float layers and back ---------------------------------------------------------------

    def reset_parameters(self) -> None:
        """Draw the weights that the float layer would draw, and quantise them."""
        if self._device.type != "meta":
            self._take(dict(self._float(self._device).named_parameters()))

    def _take(self, floats: Mapping[str, torch.Tensor]) -> None:
        """The values of a float layer's parameters, quantised where they are weights."""
        for name, value in floats.items():
            if name in self._shapes:
                self._set_parts(name, quantize(value, self.scheme))
            else:
                made = nn.Parameter(normal(value).clone(), requires_grad=value.requires_grad)
                self._parameters[name] = made

    def _float(self, device: Any) -> nn.Module:
        arguments = {name: getattr(self, name) for name in self.arguments}
        return self.float_class(**arguments, device=device, dtype=self.dtype)

    @classmethod
    def from_float(
        cls: type[LayerT],
        layer: nn.Module,
        scheme: str = "int8",
        *,
        split_gates: bool | None = None,
    ) -> LayerT:
        """The quantised twin of a float layer: same device, mode and biases.

        Args:
            layer: torch's layer or the quantisable one: for a `QLSTM` an `nn.LSTM` or a
                `QuantizableLSTM`.
            scheme: as of the layer; one of `"int8_static"` is not calibrated: see `from_observed`.
            split_gates: as the layer has it, if None.

        Raises:
            TypeError: `layer` is of another class, or its weights are no plain float parameters.
            ValueError: a weight or bias holds NaN or inf.
        """
        return cls._of(layer, scheme, split_gates)

    @classmethod
    def from_observed(cls: type[LayerT], layer: Any) -> LayerT:
        """The `int8_static` twin of a quantisable layer that was observed: for a `QLSTM` of a
        `QuantizableLSTM`.

        Raises:
            TypeError: `layer` is of another class.
            ValueError: it was not observed, a part has seen nothing, or a part's range is empty,
                infinite or NaN, or has too many bits for the int8 product; the part is named.
        """
        tables = cls.tables_of(layer)
        made = cls._of(layer, STATIC, None)
        device = made._device
        made._set_calibration({f"table{end}": each.to(device) for end, each in tables.items()})
        note_on(made, layer.points.values())
        return made

    @classmethod
    def tables_of(cls, layer: Any) -> dict[str, torch.Tensor]:
        """The table of each layer and direction, by the end of its name: `"_l0"`, `"_l0_reverse"`;
        of a cell `""`.

        Raises:
            TypeError, ValueError: as `from_observed`.
        """
        who = f"qnn.{cls.__name__}.from_observed"
        if not isinstance(layer, cls.observed_class):
            raise TypeError(
                f"{who} takes a qnn.{cls.observed_class.__name__}, got {type(layer).__name__}."
            )
        tables = {}
        for suffix in layer._suffixes():
            points = layer._parts(suffix)
            if not points:
                raise ValueError(
                    f"{who}: the layer has no observation points; call layer.observe(), or "
                    "qnn.prepare on the model, and calibrate it."
                )
            tables[suffix] = _table(CELLS[layer.mode.lower()].parts, points, who)
        return tables

    @classmethod
    def _of(cls: type[LayerT], layer: Any, scheme: str, split_gates: bool | None) -> LayerT:
        taken = isinstance(layer, cls.float_class | cls.observed_class)
        if not taken or isinstance(layer, QRecurrent):
            raise TypeError(
                f"qnn.{cls.__name__}.from_float takes an nn.{cls.float_class.__name__} or a "
                f"qnn.{cls.observed_class.__name__}, got {type(layer).__name__}."
            )
        arguments = {name: getattr(layer, name) for name in cls.arguments}
        template = cls.float_class(**arguments, device="meta")
        floats = {name: getattr(layer, name) for name, _ in template.named_parameters()}
        who = f"qnn.{cls.__name__}.from_float({layer!r})"
        for name, value in floats.items():
            if value.dtype not in FLOATS:
                raise TypeError(f"{who}: {name} must be float, got {value.dtype}.")
            if (reason := why_not_finite(value)) is not None:
                raise ValueError(f"{who}: {name} holds {reason}.")
        if split_gates is None:
            split_gates = bool(getattr(layer, "split_gates", False))
        made = cls.__new__(cls)
        dtype = next(iter(floats.values())).dtype
        QRecurrent.__init__(made, template.to(dtype), scheme, split_gates, "meta")
        made._take(floats)
        made._empty_calibration(made._device)
        return made.train(layer.training)

    def dequantize(self) -> nn.Module:
        """The float layer, as `nn.LSTM` for a `QLSTM`, with the weights `weight * weight_scale`."""
        layer = self._float("meta").to_empty(device=self._device)
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                mine = self._dequantized(name) if name in self._shapes else self._parameters[name]
                parameter.copy_(cast(torch.Tensor, mine))
        return layer.train(self.training)

    # -- state ------------------------------------------------------------------------------------

    def _read_state(self, given: dict[str, Any]) -> dict[str, Any]:
        read = super()._read_state(given)
        mine = [name for name, parameter in self._parameters.items() if parameter is not None]
        found = next((name for name in mine if name in read and name in self._shapes), None)
        missing = [name for name in mine if name not in read]
        if found is not None and missing:
            raise ValueError(
                f"the state has a {found} but no {missing[0]}"
                + (f", and {len(missing) - 1} more are missing" if len(missing) > 1 else "")
                + ": the state of a recurrent layer is loaded whole."
            )
        return read

    def _read_found(self, name: str, found: Found, given: Mapping[str, Any]) -> torch.Tensor:
        table = super()._read_found(name, found, given)
        if not table.is_meta:
            for part, row in zip(CELLS[self._cell].parts, table.tolist(), strict=True):
                if reason := _why_not_row(part, row, bool(getattr(self, "proj_size", 0))):
                    raise ValueError(f"{name}: the part {part} {reason}.")
        return table

    def _is_foreign(self, name: str) -> bool:
        return super()._is_foreign(name) or name in {f"table{end}" for end in self._suffixes()}

    # -- forward ----------------------------------------------------------------------------------

    def _check_dtype_and_device(self, input: torch.Tensor) -> None:
        if input.dtype not in FLOATS:
            require_float(self._who, input.dtype)
        device = self._device
        if input.device != device:
            raise ValueError(
                f"{self._who}: the input is on {input.device}, the layer on {device}; move one of "
                "them with .to(device)."
            )
        if self._uncalibrated:
            self._refuse_uncalibrated()

    @staticmethod
    def _apart(states: States) -> States:
        """States from a caller as a region takes them: in a graph none may share its memory with
        another or with the input, as in `lstm(x, (zeros, zeros))` and `cell(h, (h, c))`.
        """
        if not torch.compiler.is_compiling():
            return states
        return tuple(state.clone() for state in states)

    def _layer(
        self, x: torch.Tensor, states: States, suffix: str, lengths: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        """One layer in one direction: `x [T, B, I]` and the states to `y` and the last states."""
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

    def extra_repr(self) -> str:
        text = super().extra_repr()
        text += f", split_gates={self.split_gates}" if self.split_gates else ""
        return f"{text}, scheme={self.scheme!r}"


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


def _why_not_row(part: str, row: list[float], projected: bool) -> str | None:
    """Why a row `(scale, zero_point, qmin, qmax)` of a table is no grid of its part, or None."""
    scale, point, low, high = row
    operand = part in _OPERANDS and (projected or part != "projection_input")
    if scale == 0 and not operand:
        return None  # it stays as it is
    if not 0 < scale < math.inf:
        return f"must have a positive, finite scale, got {scale:g}"
    if not all(math.isfinite(each) and each.is_integer() for each in (point, low, high)):
        return f"must have a whole zero point and whole ends, got {point:g}, {low:g}, {high:g}"
    if low > high:
        return f"must have qmin ≤ qmax, got {low:g} and {high:g}"
    if operand and (high - low > 255 or abs(low - point) > 1024):
        return f"enters an int8 product and has at most 8 bits, got {low:g} … {high:g}"
    return None

"""What the quantised recurrent layers and cells share: their weights, and the ways in and out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import nn

from qnn.calibration.doubts import note_on
from qnn.functional.float_recurrent import States
from qnn.functional.recurrent import recurrent_of
from qnn.kernels.backends import op_backend
from qnn.kernels.reference.recurrent import CELLS, Cell, why_not_operand
from qnn.kernels.schemes import DEFAULT_SCHEME, schemes_of, static_scheme
from qnn.nn.base import Quantized
from qnn.nn.recurrent.observed import Observed
from qnn.nn.recurrent.states import OfCell
from qnn.nn.values import Found, can_take, require_floats, require_input

LayerT = TypeVar("LayerT", bound="QRecurrent")


class QRecurrent(OfCell, Quantized):
    """The weights of one or more recurrent layers, and the arithmetic of `scheme`.

    Attributes:
        float_class, observed_class: what it is made of.
        arguments: the names of what `float_class` takes, which are attributes here too.
    """

    float_class: ClassVar[type[nn.Module]]
    observed_class: ClassVar[type[Observed]]
    arguments: ClassVar[tuple[str, ...]]
    _suffixes: Callable[[], list[str]]
    """What the names of each layer's and direction's parameters end with, in torch's order."""

    def __init__(self, template: nn.Module, scheme: str, split_gates: bool, device: Any) -> None:
        """Of the shapes of `template`, a float layer on the meta device."""
        nn.Module.__init__(self)
        for name in self.arguments:
            setattr(self, name, getattr(template, name))
        self.scheme, self.split_gates = scheme, split_gates
        if scheme not in schemes_of(self._cell.name):
            able = ", ".join(map(repr, schemes_of(self._cell.name)))
            raise ValueError(f"{self._who}: scheme must be one of {able}, got {scheme!r}.")
        self._set_dtype(next(template.parameters()).dtype)
        floats = {n: None if p is None else tuple(p.shape) for n, p in template._parameters.items()}
        self._shapes = {n: (s[0], s[1]) for n, s in floats.items() if s is not None and len(s) == 2}
        for name, (rows, columns) in self._shapes.items():
            if (reason := self._scheme.why_not_linear(columns, rows)) is not None:
                raise ValueError(f"{self._who}: {name}: {reason}.")
        self._others = ("table",) * self._scheme.static + ("bias_ih", "bias_hh")
        self._empty_weights(device, floats)
        self.reset_parameters()

    # -- what the base asks for -------------------------------------------------------------------

    def _weight_shapes(self) -> dict[str, tuple[int, int]]:
        return self._shapes

    def _calibration(self) -> dict[str, Found]:
        if not self._scheme.static:
            return {}
        rows = len(self._cell.parts)
        return {f"table{suffix}": Found(torch.float32, (rows, 4)) for suffix in self._suffixes()}

    def _backend(self) -> str:
        name = cast(str, self._scheme.op(self._cell.name))
        return op_backend(name, self._device, "reference, step by step")

    @property
    def _who(self) -> str:
        return f"qnn.{type(self).__name__}({self.extra_repr()})"

    @property
    def matrix(self) -> tuple[int, int]:
        """The shape of the first layer's recurrent weight."""
        return next(s for name, s in self._shapes.items() if name.startswith("weight_hh"))

    # -- from float layers and back ---------------------------------------------------------------

    def _float(self, device: Any) -> nn.Module:
        arguments = {name: getattr(self, name) for name in self.arguments}
        return self.float_class(**arguments, device=device, dtype=self.dtype)

    @classmethod
    def from_float(
        cls: type[LayerT],
        layer: nn.Module,
        scheme: str = DEFAULT_SCHEME,
        *,
        split_gates: bool | None = None,
    ) -> LayerT:
        """The quantised twin of a float layer: same device, mode and biases.

        Args:
            layer: torch's layer or the quantisable one: for a `QLSTM` an `nn.LSTM` or a
                `QuantizableLSTM`.
            scheme: as of the layer; one of a static scheme is not calibrated: see `from_observed`.
            split_gates: as the layer has it, if None.

        Raises:
            TypeError: `layer` is of another class, or its weights are no plain float parameters.
            ValueError: a weight or bias holds NaN or inf.
        """
        return cls._of(layer, scheme, split_gates)

    @classmethod
    def from_observed(cls: type[LayerT], layer: Any) -> LayerT:
        """The static twin of a quantisable layer that was observed: for a `QLSTM` of a
        `QuantizableLSTM`: in the static scheme of 16 bits where a part that enters a product has
        so many, else in that of 8.

        Raises:
            TypeError: `layer` is of another class.
            ValueError: it was not observed, a part has seen nothing, or a part's range is empty,
                infinite or NaN, or has too many bits for an integer product; the part is named.
        """
        tables = cls.tables_of(layer)
        operands = CELLS[cls.mode.lower()].operands()
        specs = [spec for name, spec in layer.specs().items() if name in operands and spec]
        made = cls._of(layer, static_scheme(*(spec.dtype for spec in specs)), None)
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
            tables[suffix] = _table(CELLS[cls.mode.lower()], points, who)
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
        require_floats(f"qnn.{cls.__name__}.from_float({layer!r})", floats)
        if split_gates is None:
            split_gates = bool(getattr(layer, "split_gates", False))
        made = cls.__new__(cls)
        dtype = next(iter(floats.values())).dtype
        QRecurrent.__init__(made, template.to(dtype), scheme, split_gates, "meta")
        made._take(floats)
        return made.train(layer.training)

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
            operands = self._cell.operands(projection=bool(getattr(self, "proj_size", 0)))
            for part, row in zip(self._cell.parts, table.tolist(), strict=True):
                bits = cast(Any, self._scheme.activation).bits if part in operands else None
                if reason := _why_not_row(row, bits):
                    raise ValueError(f"{name}: the part {part} {reason}.")
        return table

    def _is_foreign(self, name: str) -> bool:
        return super()._is_foreign(name) or name in {f"table{end}" for end in self._suffixes()}

    # -- forward ----------------------------------------------------------------------------------

    def _check_dtype_and_device(self, input: torch.Tensor) -> None:
        device = self._device
        if not can_take(input, device):
            require_input(self._who, input, device)
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
        held, hr = self._parameters.get, f"weight_hr{suffix}"
        operands = (
            *self._held(f"weight_ih{suffix}"),
            *self._held(f"weight_hh{suffix}"),
            *[held(f"{name}{suffix}") for name in self._others],
            *(self._held(hr) if hr in self._shapes else ()),
        )
        reverse = suffix.endswith("_reverse")
        return recurrent_of(self._cell.name, x, states, operands, self.scheme, lengths, reverse)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        text += f", split_gates={self.split_gates}" if self.split_gates else ""
        return f"{text}, scheme={self.scheme!r}"


def _table(cell: Cell, points: Mapping[str, Any], who: str) -> torch.Tensor:
    """The rows of a cell's parts; zeros for a part that stays as it is."""
    rows = []
    for name in cell.parts:
        point = points.get(name)
        if point is None:
            if name in cell.operands(projection=False):
                raise ValueError(f"{who}: part {name!r} must be quantised: it enters a product.")
            rows.append(torch.zeros(4))
            continue
        try:
            row = point.row().cpu()
        except ValueError as error:
            raise ValueError(f"{who}: part {name!r}: {error}") from None
        bits = 8 if point.spec.dtype.itemsize == 1 else 16
        if name in cell.operands() and (reason := why_not_operand(row.tolist(), bits)) is not None:
            raise ValueError(
                f"{who}: part {name!r} enters an integer product and must have {reason}, got "
                f"{int(row[2])} … {int(row[3])}, zero point {int(row[1])}."
            )
        rows.append(row)
    return torch.stack(rows)


def _why_not_row(row: list[float], bits: int | None) -> str | None:
    """Why a row `(scale, zero_point, qmin, qmax)` of a table is no grid of its part, or None; an
    operand of a product has at most so many bits.
    """
    scale, point, low, high = row
    if scale == 0 and bits is None:
        return None  # it stays as it is
    if not 0 < scale < math.inf:
        return f"must have a positive, finite scale, got {scale:g}"
    if not all(math.isfinite(each) and each.is_integer() for each in (point, low, high)):
        return f"must have a whole zero point and whole ends, got {point:g}, {low:g}, {high:g}"
    if low > high:
        return f"must have qmin ≤ qmax, got {low:g} and {high:g}"
    if bits is not None and (reason := why_not_operand(row, bits)) is not None:
        return f"enters an integer product and must have {reason}, got {low:g} … {high:g}"
    return None

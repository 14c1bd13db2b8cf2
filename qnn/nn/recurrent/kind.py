"""The kind of recurrent layers: LSTM and GRU, layers and cells."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.rnn import RNNBase

from qnn.calibration.parts import WIDE_OPERANDS, PartSpecs, points_of
from qnn.kernels.schemes import STATIC, get_scheme, schemes_of
from qnn.kinds import Kind, Observation, Own, register_kind
from qnn.nn.recurrent.cells import NAMES
from qnn.nn.recurrent.class_checks import ADVICE, class_checks, warn_of_class_checks
from qnn.nn.recurrent.observed import Observed
from qnn.nn.recurrent.qcell import QGRUCell, QLSTMCell
from qnn.nn.recurrent.qlstm import QGRU, QLSTM
from qnn.nn.recurrent.quantized import QRecurrent

_QUANTIZED: dict[type[nn.Module], type[QRecurrent]] = {
    known: each
    for each in (QLSTM, QGRU, QLSTMCell, QGRUCell)
    for known in (each.float_class, each.observed_class)
}
_CELL = {known: each.mode.lower() for known, each in _QUANTIZED.items()}
_OBSERVED: dict[type[nn.Module], Any] = {
    each.float_class: each.observed_class for each in _QUANTIZED.values()
}


class RecurrentKind(Kind):
    """Layers with a state from step to step."""

    name = "recurrent"
    floats = tuple(_QUANTIZED)
    titles = ("nn.LSTM", "nn.GRU")
    quantized = (QRecurrent,)
    observed = (Observed,)
    holds = frozenset({"points"})
    leaves = Kind.leaves | {
        "_flat_weights",
        "_flat_weights_names",
        "_flat_weight_refs",
        "_all_weights",
    }

    def takes(self, module: nn.Module) -> bool:
        if isinstance(module, RNNBase):
            return module.mode in ("LSTM", "GRU")
        return isinstance(module, nn.LSTMCell | nn.GRUCell)

    def is_observed(self, module: nn.Module) -> bool:
        # A quantisable layer without points is a float one.
        return isinstance(module, Observed) and module.points is not None

    def why_left(
        self, module: nn.Module, scheme: str, *, named: bool = False, training: bool = False
    ) -> str | None:
        if type(module) not in self.floats:
            kind = "nn.LSTM or nn.GRU"
            if not isinstance(module, RNNBase):
                kind = "nn.LSTMCell or nn.GRUCell"
            return f"{type(module).__name__} is a subclass of {kind} with a meaning of its own"
        if training:
            return "there is no recurrent layer that trains in low precision; see qnn.prepare"
        cell = _CELL[type(module)]
        if get_scheme(scheme).op(cell) is None:
            able = ", ".join(map(repr, schemes_of(cell)))
            return f"scheme {scheme!r} has no recurrent layer; {able} have one"
        return None

    def names(self, module: nn.Module) -> Iterable[str]:
        return module._flat_weights_names if isinstance(module, RNNBase) else NAMES

    def quantize(self, layer: nn.Module, scheme: str, own: Own) -> QRecurrent:
        kind = _QUANTIZED[type(layer)]
        if self.is_observed(layer):
            made = kind.from_observed(layer)
        else:
            made = kind.from_float(layer, scheme)
        for name, parameter in layer._parameters.items():
            if name.startswith("bias"):
                made._parameters[name] = own(parameter)
        return made

    def observe(self, layer: nn.Module, how: Observation, own: Own) -> Any:
        made = self._quantizable(layer, how)
        known = layer.specs() if isinstance(layer, Observed) else {}
        specs = known or ({} if how.scheme == STATIC else WIDE_OPERANDS)
        made.observe(PartSpecs(specs) | (how.parts or {}), qat=how.qat)
        if known:
            made.go_on_from(layer)
        for name, parameter in layer._parameters.items():
            if parameter is not None:
                setattr(made, name, own(parameter))
        return made

    def _quantizable(self, layer: nn.Module, how: Observation) -> Any:
        """The quantisable layer around the parameters."""
        split_gates = how.split_gates
        if isinstance(layer, Observed):
            split_gates, layer = split_gates or layer.split_gates, layer.to_float()
        return _OBSERVED[type(layer)].from_float(layer, split_gates=split_gates)

    def points(self, layer: nn.Module, how: Observation) -> list[str]:
        made = self._quantizable(layer, how)
        projection = bool(getattr(made, "proj_size", 0))
        return list(
            points_of(made.mode, split_gates=made.split_gates, projection=projection).values()
        )

    def check_observation(self, layer: nn.Module, how: Observation) -> None:
        self._quantizable(layer, how).observe(how.parts)

    def require_ranges(self, layer: nn.Module) -> None:
        _QUANTIZED[type(layer)].tables_of(layer)

    def after(self, who: str, model: nn.Module) -> None:
        warn_of_class_checks(who, model)

    def remarks(self, model: nn.Module) -> dict[str, str]:
        return {
            name: f"; isinstance(layer, nn.LSTM) is False here, and {', '.join(methods)} asks. "
            f"{ADVICE}"
            for name, methods in class_checks(model).items()
            if methods
        }

    def sample(self, layer: type[nn.Module], size: int) -> tuple[nn.Module, torch.Tensor]:
        steps = () if issubclass(layer, nn.RNNCellBase) else (5,)
        return layer(size, size), torch.randn(*steps, 3, size)

    def shape(self, layer: nn.Module) -> tuple[int, ...]:
        return cast(QRecurrent, layer).matrix


register_kind(RecurrentKind())

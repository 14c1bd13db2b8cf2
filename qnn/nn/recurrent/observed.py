"""What the quantisable recurrent layers and cells share: their observation points."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import nn

from qnn.calibration.fake_quantize import FakeQuantize
from qnn.calibration.parts import Specs, choose, points_of
from qnn.calibration.spec import QuantSpec
from qnn.functional.float_recurrent import Points

ObservedT = TypeVar("ObservedT", bound="Observed")


class Observed(nn.Module):
    """A layer whose parts can be observed and fake-quantised."""

    mode: str
    split_gates: bool
    qat: bool
    points: nn.ModuleDict | None
    _suffixes: Callable[[], list[str]]
    """What the names of each layer's and direction's parameters end with, in torch's order."""

    def _begin(self, split_gates: bool) -> None:
        if not isinstance(split_gates, bool):
            raise TypeError(
                f"split_gates should be of type bool, got: {type(split_gates).__name__}"
            )
        self.split_gates, self.qat = split_gates, False
        self.points = None

    def observe(self: ObservedT, parts: Specs | None = None, *, qat: bool = False) -> ObservedT:
        """Insert the observation points, or new ones in the place of those that were there.

        The parts that a layer has are `parts()`'s keys. Each is quantised as `qnn.parts.DEFAULT`
        says: operands of integer products to 8 bits, the others to 16, with fixed scales for the
        gates and observed ones for the rest.

        Without `qat` the layer's outputs and gradients stay what they were, to the bit: each call
        runs as before, and where that is torch's fused kernel, the same steps once more in a loop,
        without gradients or dropout, for the observers alone.

        With `qat` every call runs the loop, with quantised weights and with each part
        fake-quantised by what its observer knew before the call; in training mode the observers
        then see all steps.

        Args:
            parts: specs by part name with wildcards, over the defaults: the last key that matches a
                part counts, and None leaves it in float. `"input"`, `"hidden_state"` and
                `"projection_input"` must have 8 bits, or 16, symmetric. `qnn.parts` has
                `EIGHT_BIT`, `WIDE_OPERANDS` and `FIXED`.
            qat: whether to fake-quantise.

        Returns:
            The layer itself.

        Raises:
            TypeError: `parts` is no mapping from names to specs.
            ValueError: a key that matches no part, or a spec that its part cannot have.
        """
        who = f"qnn.{type(self).__name__}.observe"
        specs = choose(parts, self._names(), who)
        device = next(self.parameters()).device
        self.points = nn.ModuleDict(
            {
                f"{name}{suffix}": FakeQuantize(spec, name=f"{name}{suffix}", qat=qat).to(device)
                for suffix in self._suffixes()
                for name, spec in specs.items()
            }
        ).train(self.training)
        self.qat = qat
        return self

    def specs(self) -> dict[str, QuantSpec | None]:
        """The specs that it was observed with, as `observe` takes them; empty if it was not."""
        suffix = self._suffixes()[0]
        own = self._own(suffix)
        return (
            {
                name: own[name].spec if name in own else None
                for name in dict.fromkeys(self._names().values())
            }
            if own
            else {}
        )

    def go_on_from(self, other: Observed) -> None:
        """Let each point begin with what the one of the same name in `other` has observed."""
        if self.points is None or other.points is None:
            return
        for name, point in self.points.items():
            if name in other.points:
                cast(FakeQuantize, point).begin(cast(FakeQuantize, other.points[name]))

    def to_float(self) -> nn.Module:
        """torch's layer around this layer's parameters themselves."""
        raise NotImplementedError

    def _names(self) -> dict[str, str]:
        projection = bool(getattr(self, "proj_size", 0))
        return points_of(self.mode, split_gates=self.split_gates, projection=projection)

    def _parts(self, suffix: str) -> dict[str, FakeQuantize]:
        own = self._own(suffix)
        return {part: own[name] for part, name in self._names().items() if name in own}

    def _own(self, suffix: str) -> dict[str, FakeQuantize]:
        """The points of one layer and direction, by their names without the suffix."""
        if self.points is None:
            return {}
        # Several parts may have one point.
        names = dict.fromkeys(self._names().values())
        return {
            name: cast(FakeQuantize, self.points[f"{name}{suffix}"])
            for name in names
            if f"{name}{suffix}" in self.points
        }

    @property
    def _observes(self) -> bool:
        """Whether any point is to see this call."""
        if self.points is None:
            return False
        # With qat a point decides, and not the layer: `calibrate` wakes points in evaluation.
        points = (cast(FakeQuantize, point) for point in self.points.values())
        return any(point.observing and (point.training or not self.qat) for point in points)

    def _points(self, suffix: str) -> Points:
        """The points of one layer and direction, as its loop takes them."""
        own = self._own(suffix)
        quantizers = {name: point.quantizer for name, point in own.items()} if self.qat else {}
        watched = [name for name, point in own.items() if point.observing]
        return Points(quantizers, watched if self._observes else [])

    def _observe(
        self, suffix: str, points: Points, *, reverse: bool, lengths: torch.Tensor | None
    ) -> None:
        own = self._own(suffix)
        for name, seen in points.observed(reverse=reverse, lengths=lengths):
            own[name].observe(seen)

    def _extra(self) -> str:
        text = ", split_gates=True" if self.split_gates else ""
        return text + (", qat=True" if self.qat else "")

"""What calibration has found that makes a layer inaccurate, in words: said by `convert`, and from
then on by `summary`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable

from torch import nn

from qnn.calibration.fake_quantize import FakeQuantize
from qnn.calibration.parts import OPERANDS

# Where a converted layer keeps what is to be said of it. No state dict has it.
NOTE = "_qnn_note"
# A quarter of an end of the range; and the share of the nonzero values.
MUCH_CUT, MANY_LOST = 0.25, 0.5

OTHERWISE = (
    "qnn.prepare(model, 'int16_static'), whose grids have 16 bits, or exclude the layer, and "
    "qnn.convert(model, 'int8', include=…) it, which takes per-token scales, or convert it to "
    "'int8_weight', which leaves activations in float"
)
WIDE = "16 bits and no limit, the default"


class CalibrationWarning(UserWarning):
    """A grid that calibration has found will cost accuracy."""


def note_on(layer: nn.Module, points: Iterable[FakeQuantize]) -> None:
    """Keep on a converted layer what is to be said of its observation points."""
    doubts = [doubt for point in dict.fromkeys(points) for doubt in _doubts(point)]
    if doubts:
        layer.__dict__[NOTE] = ". ".join(doubts)


def warn_of(model: nn.Module) -> None:
    """One warning of all layers that have a note."""
    noted = {name: note for name, m in model.named_modules() if (note := getattr(m, NOTE, None))}
    if noted:
        listed = "\n".join(f"  {name or 'the layer'}: {note}" for name, note in noted.items())
        warnings.warn(
            f"qnn.convert: {len(noted)} layer(s) may be inaccurate:\n{listed}",
            CalibrationWarning,
            stacklevel=3,
        )


def _doubts(point: FakeQuantize) -> Iterable[str]:
    observer, spec = point.observer, point.spec
    if observer is None or spec.channel_axis is not None:
        return
    scale, zero_point = (value.item() for value in point.qparams())
    part = point.name.rpartition(".")[2]
    operand = re.sub(r"_l\d+(_reverse)?$", "", part) in OPERANDS
    low, high = (value.item() for value in observer.seen())
    ends = (spec.qmin - zero_point) * scale, (spec.qmax - zero_point) * scale
    learned = spec.learnable and point.qat
    if not learned and (_cut(-low, -ends[0], ends) or _cut(high, ends[1], ends)):
        by = f"observer={_name(spec.observer)}" if spec.limit is None else f"limit={spec.limit:g}"
        fix = f"a spec with observer='minmax', or {OTHERWISE}" if operand else WIDE
        yield (
            f"the range {low:.4g} … {high:.4g} of {part!r} is cut to {ends[0]:.4g} … "
            f"{ends[1]:.4g} ({by}); if the large values matter, give it {fix}"
        )
    if share := many_lost(point):
        fix = OTHERWISE if operand else f"give it {WIDE}"
        yield (
            f"{100 * share:.0f}% of the nonzero values of {part!r} fall to zero on its grid of "
            f"steps of {scale:.4g}; {fix}"
        )


def many_lost(point: FakeQuantize) -> float | None:
    """The share of the nonzero values that fall to zero on a point's grid, where it is most."""
    if point.observer is None:
        return None
    share = point.observer.share_below(point.qparams()[0].item() / 2)
    return share if share is not None and share > MANY_LOST else None


def _cut(end: float, kept: float, ends: tuple[float, float]) -> bool:
    """Whether much of an end was cut, that is not small beside the whole range."""
    return end - kept > max(MUCH_CUT * end, 0.05 * (ends[1] - ends[0]))


def _name(observer: str | type) -> str:
    return repr(observer) if isinstance(observer, str) else observer.__name__

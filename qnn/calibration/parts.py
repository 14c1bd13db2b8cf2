"""The observation points of recurrent layers: their names, and what they are quantised to.

`DEFAULT` spends 8 bits on the operands of integer products, and 16 elsewhere. The others lie over
it: `SIXTEEN_BIT` is what it does besides the operands, `EIGHT_BIT` has 8 bits there too,
`WIDE_OPERANDS` has 16 for the operands, which makes layers of `int16_static`, and `FIXED` needs no
data. Each is a mapping from part names with wildcards to specs, as
`QuantizableLSTM.observe` takes it, and serves every cell.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch

from qnn.calibration.spec import QuantSpec
from qnn.kernels.reference.recurrent import CELLS

# What enters a product of integers, in any cell.
OPERANDS = dict.fromkeys(part for cell in CELLS.values() for part in cell.operands())

Specs: TypeAlias = Mapping[str, QuantSpec | None]


class PartSpecs(dict[str, QuantSpec | None]):
    """Specs that serve every cell: a part that a layer does not have is passed over, where a plain
    mapping is refused. `PartSpecs | mapping` is one again, the right side's keys last.

    >>> (SIXTEEN_BIT | {"cell_state": None})["cell_state"] is None
    True
    """

    def __or__(self, other: Any) -> PartSpecs:  # type: ignore[override]
        # What comes later counts, so a key that is replaced must move behind the others.
        kept = {name: spec for name, spec in self.items() if name not in other}
        return PartSpecs({**kept, **other})


_SIGMOID_8 = QuantSpec(torch.uint8, scale=2**-8, zero_point=0)
_TANH_8 = QuantSpec(torch.uint8, scale=2**-7, zero_point=2**7)
_SIGMOID_16 = QuantSpec(torch.uint16, scale=2**-16, zero_point=0)
_TANH_16 = QuantSpec(torch.uint16, scale=2**-15, zero_point=2**15)
_OBSERVED_8 = QuantSpec(torch.uint8)
_OBSERVED_16 = QuantSpec(torch.int16, symmetric=True)

# Of several patterns that match a part, the last one counts.
SIXTEEN_BIT = PartSpecs(
    {
        "*_linear*": _OBSERVED_16,
        "cell_state": _OBSERVED_16,
        "*_gate": _SIGMOID_16,
        "cell_gate": _TANH_16,
        "new_gate": _TANH_16,
        "cell_tanh": _TANH_16,
    }
)
DEFAULT = PartSpecs(dict.fromkeys(OPERANDS, _OBSERVED_8)) | SIXTEEN_BIT
WIDE_OPERANDS = PartSpecs(dict.fromkeys(OPERANDS, _OBSERVED_16))
EIGHT_BIT = PartSpecs(
    {
        "*_linear*": _OBSERVED_8,
        # A few cells of a trained LSTM count up to hundreds, and 8 bits over all of that would be
        # too coarse for the others. Where the tanh alone reads them, 16 is as good; a cell that
        # counts down again from beyond it is then wrong, which `convert` says.
        "cell_state": QuantSpec(torch.uint8, limit=16.0),
        "*_gate": _SIGMOID_8,
        "cell_gate": _TANH_8,
        "new_gate": _TANH_8,
        "cell_tanh": _TANH_8,
    }
)
# The input's range alone is observed.
FIXED = PartSpecs(
    {
        "*_linear*": QuantSpec(torch.uint16, scale=2**-11, zero_point=2**15),
        "cell_state": QuantSpec(torch.int16, scale=2**-11, zero_point=0),
        "hidden_state": QuantSpec(torch.uint8, scale=2**-7, zero_point=2**7),
        "*_gate": _SIGMOID_16,
        "cell_gate": _TANH_16,
        "new_gate": _TANH_16,
        "cell_tanh": _TANH_16,
    }
)


def points_of(cell: str, *, split_gates: bool, projection: bool) -> dict[str, str]:
    """The parts that a layer has, in the table's order, each with the name of its point.

    >>> points_of("GRU", split_gates=False, projection=False)["input_linear_z"]
    'input_linear'
    """
    known = CELLS[cell.lower()]
    absent = set(known.operands()) - set(known.operands(projection=projection))
    parts = [part for part in known.parts if part not in absent]
    if split_gates:
        return {part: part for part in parts}
    return {part: part.rpartition("_")[0] if "_linear_" in part else part for part in parts}


def choose(parts: Specs | None, names: Mapping[str, str], who: str) -> dict[str, QuantSpec]:
    """The spec of each point of a layer: `DEFAULT`'s, or that of the last key in `parts` that
    matches; points without one are left out.

    Args:
        names: what `points_of` returns.
        who: the call, for errors.

    Raises:
        TypeError: `parts` is no mapping from names to specs.
        ValueError: a key that matches nothing, or a spec that its part cannot have.
    """
    points = list(dict.fromkeys(names.values()))
    parts = PartSpecs() if parts is None else parts
    check(parts, points, who, "this layer's")
    chosen: dict[str, QuantSpec] = {}
    for point in points:
        for pattern, spec in [*DEFAULT.items(), *parts.items()]:
            if not fnmatchcase(point, pattern):
                continue
            if spec is not None:
                chosen[point] = spec
            else:
                chosen.pop(point, None)
        _check_spec(point, chosen.get(point), who)
    return chosen


def check(parts: Specs, points: list[str], who: str, whose: str) -> None:
    """Raise unless `parts` is a mapping to specs whose keys match some of `points`."""
    if not isinstance(parts, Mapping):
        raise TypeError(
            f"{who}: parts must map part names to QuantSpecs, got {type(parts).__name__}."
        )
    known = points
    if isinstance(parts, PartSpecs):
        known = [
            point
            for cell in CELLS
            for split in (False, True)
            for point in points_of(cell, split_gates=split, projection=True).values()
        ]
    for pattern, spec in parts.items():
        if not isinstance(pattern, str) or not isinstance(spec, QuantSpec | None):
            raise TypeError(
                f"{who}: parts must map part names to QuantSpecs or None, got "
                f"{pattern!r}: {type(spec).__name__}."
            )
        if not any(fnmatchcase(point, pattern) for point in known):
            close = difflib.get_close_matches(pattern, known, n=3)
            hint = f" Close names: {', '.join(map(repr, close))}." if close else ""
            if "_linear_" in pattern and any(pattern in cell.parts for cell in CELLS.values()):
                hint = " A gate has a linear of its own only with split_gates=True."
            raise ValueError(
                f"{who}: parts has the key {pattern!r}, which matches none of {whose} "
                f"observation points: {', '.join(points)}.{hint}"
            )


def _can_multiply(spec: QuantSpec) -> bool:
    wide = spec.dtype == torch.int16 and spec.symmetric and spec.qmin == -spec.qmax
    return wide or spec.dtype in (torch.uint8, torch.int8)


def _check_spec(point: str, spec: QuantSpec | None, who: str) -> None:
    if point in OPERANDS and (spec is None or not _can_multiply(spec)):
        raise ValueError(
            f"{who}: {point!r} enters an integer product, so its dtype must be torch.uint8, "
            f"torch.int8, or torch.int16 with symmetric=True; got {spec}."
        )
    if spec is not None and spec.channel_axis is not None:
        raise ValueError(
            f"{who}: {point!r} must have one scale, got channel_axis={spec.channel_axis}."
        )

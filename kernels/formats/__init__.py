"""Number formats: how floats are stored, and what that stands for."""

from qnn.kernels.formats.base import (
    FLOATS,
    Format,
    Granularity,
    Part,
    finite_amax,
    grouped,
    over,
    spread,
)

__all__ = [
    "FLOATS",
    "Format",
    "Granularity",
    "Part",
    "finite_amax",
    "grouped",
    "over",
    "spread",
]

"""Number formats: how floats are stored, and what that stands for."""

from qnn.kernels.formats.base import FLOATS, Format, Granularity, Part

__all__ = ["FLOATS", "Format", "Granularity", "Part"]

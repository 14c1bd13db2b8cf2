"""Rewriting graphs: quantised nodes are read, found and built by `region`; the passes say what
Inductor is to find in their place.
"""

from qnn.passes import region
from qnn.passes.region import Region, build, match, read, regions

__all__ = ["Region", "build", "match", "read", "region", "regions"]

"""Rewriting graphs: quantised nodes are read, found and built by `region`; the passes say what
Inductor is to find in their place.
"""

from qnn.passes import fusion, region  # fusion has itself installed at the first trace
from qnn.passes.region import Region, build, match, read, regions

__all__ = ["Region", "build", "fusion", "match", "read", "region", "regions"]

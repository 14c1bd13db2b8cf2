"""Ground floor: formats and schemes, op declarations, their references, and the kernels of each
backend.
"""

from qnn.kernels import int8, torch_private
from qnn.kernels.formats import SCHEMES, Format, Scheme, get_scheme
from qnn.kernels.spec import OPS, Op

__all__ = ["OPS", "SCHEMES", "Format", "Op", "Scheme", "get_scheme", "int8", "torch_private"]

"""The ops of observers: how many values of a tensor lie where. They are most of what calibration
adds to the float model's time: torch's own scatter takes 3 to 10 ns a value, these about 1.
"""

from __future__ import annotations

from typing import Any

import torch

from qnn.kernels.op import Op
from qnn.kernels.reference.histogram import exponents_reference, histogram_reference

FLOAT, INT32, INT64 = (torch.float32,), (torch.int32,), (torch.int64,)
_COMMON: dict[str, Any] = {"native": True, "products": "0", "rowwise": False, "inference": True}

histogram = Op(
    "histogram",
    "x: c n, low: c, high: c, counts: c 4096, exponent: c, magnitudes: 256 -> "
    "low: c, high: c, counts: c 4096, exponent: c, magnitudes: 256",
    doc="each row of x taken into its ends, low and high; into counts of bins over −2^exponent … "
    "2^exponent, which grows where it has to, without zeros; and into counts by float32's exponent",
    dtypes={
        **{"x": FLOAT, "low": FLOAT, "high": FLOAT},
        **{"counts": INT64, "exponent": INT32, "magnitudes": INT64},
    },
    out=(*FLOAT, *FLOAT, *INT64, *INT32, *INT64),
    reference=histogram_reference,
    sample={"counts": (0, 99), "exponent": (-3, 3), "magnitudes": (0, 99)},
    **_COMMON,
)

exponents = Op(
    "exponents",
    "x: c n, counts: 256 -> 256",
    doc="counts of values by float32's exponent, with those of x added to them",
    dtypes={"x": FLOAT, "counts": INT64},
    out=INT64,
    reference=exponents_reference,
    sample={"counts": (0, 99)},
    **_COMMON,
)

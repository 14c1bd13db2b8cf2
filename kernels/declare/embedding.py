"""The ops of tables, derived from the formats of weights: for each a lookup of rows, and one of
bags of rows. Nothing is multiplied, and the table is never decoded as a whole.
"""

from __future__ import annotations

from typing import Any

import torch

from qnn.kernels.declare.floats import scales_of, stored_dtypes
from qnn.kernels.formats.base import FLOATS, Format
from qnn.kernels.op import OPS, Op
from qnn.kernels.reference.embedding import MODES, bag_reference, checked, embedding_reference
from qnn.kernels.schemes import SCHEMES

_IDS = (torch.int64, torch.int32)
_ROWS = 19  # of a table in samples


def _common(form: Format) -> dict[str, Any]:
    multiple = form.columns_multiple_of // form.packing
    sizes = {"n": _ROWS, "p": 3 * multiple if multiple > 1 else 23}
    spans = {p.short.format("w"): (p.span[0], p.span[1] + 1) for p in form.parts if p.span}
    return {
        "out": ("dtype",),
        "native": True,
        # The first call of a layer builds the library, although it multiplies nothing.
        "products": "0",
        "positive": scales_of(form, "w"),
        "multiples": {"p": multiple} if multiple > 1 else {},
        "sample": {**sizes, **spans, "ids": (0, _ROWS)},
    }


def _dtypes(form: Format) -> dict[str, Any]:
    return {"ids": _IDS, **stored_dtypes(form, "w"), "dtype": FLOATS}


def declare_embedding(name: str, form: Format) -> None:
    stored, columns = form.stored("w", "n", "p")
    reference = embedding_reference(form)
    Op(
        name,
        f"ids: ..., {stored}, dtype?: dtype -> ... {columns}",
        doc="the rows `ids` of the table that the parts stand for, in float32, then one cast",
        dtypes=_dtypes(form),
        reference=reference,
        kernels={"CPU": checked(name, reference)},
        **_common(form),
    )


def declare_bag(name: str, form: Format) -> None:
    stored, columns = form.stored("w", "n", "p")
    reference, common = bag_reference(form), _common(form)
    common["sample"] |= {
        "i": 11,
        "o": 6,
        "offsets": lambda sizes: torch.tensor([0, 3, 3, 4, 9, 11]),
        "padding": 4,
    }
    Op(
        name,
        f"ids: i, offsets: o, {stored}, weights?: i, mode?: str, padding?: int=-1, dtype?: dtype "
        f"-> bags(o) {columns}",
        doc="sum, mean or max of the rows of ids[offsets[b]:offsets[b+1]], each times its weight, "
        "without those of the id `padding`; zeros where a bag has none",
        dtypes={**_dtypes(form), "offsets": (torch.int64,), "weights": "dtype"},
        reference=reference,
        kernels={"CPU": checked(name, reference, bags=True)},
        differentiable=True,
        choices={"mode": MODES},
        sizes={"bags": lambda bounds: bounds - 1},
        rowwise=False,
        **common,
    )


for _scheme in SCHEMES.values():
    for _kind, _declare in (("embedding", declare_embedding), ("embedding_bag", declare_bag)):
        _name = _scheme.op(_kind)
        if _name is not None and _name not in OPS:
            _declare(_name, _scheme.weight)

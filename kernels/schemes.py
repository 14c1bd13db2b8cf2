"""Schemes: the formats of a layer's operands, such as int8 weights with per-channel scales and int8
activations with per-token ones, under the name that users write and graph nodes carry.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch

from qnn.kernels.formats import Format, nvfp4
from qnn.kernels.formats.float8 import FLOAT8
from qnn.kernels.formats.int4 import INT4
from qnn.kernels.formats.int8 import (
    INT8_CHANNEL,
    INT8_MAX_K,
    INT8_STATIC_MAX_K,
    INT8_TENSOR,
    INT8_TOKEN,
)
from qnn.kernels.formats.int16 import INT16_TENSOR, INT16_TOKEN
from qnn.kernels.formats.mxfp8 import MX
from qnn.kernels.op.declaration import not_multiple


@dataclass(frozen=True)
class Training:
    """The formats of the three products of a training step. Each operand is quantised along the
    axis that its product sums over, so a tensor has two forms: `x` along K and, for the weight's
    gradient, along M; `dy` along N and along M; `weight` along K and along N. `matmul` names the op
    of the output and of the input's gradient, `wgrad` that of the weight's gradient.
    """

    x: Format
    weight: Format
    dy: Format
    x_of_wgrad: Format
    dy_of_wgrad: Format
    matmul: str
    wgrad: str

    @property
    def stochastic(self) -> bool:
        return self.dy.stochastic or self.dy_of_wgrad.stochastic


@dataclass(frozen=True)
class Scheme:
    """What a layer stores and computes.

    `activation` is None where activations stay as they are, `training` where the scheme has no
    training layer. `static` says that the activations' scale and zero point are tensors of the
    layer, which calibration finds; else they are dynamic, taken from the tensor at hand. `ops`
    names the op of a quantised layer's forward by what the layer is, `"linear"`, `"lstm"`, …: a
    kind of layer that is not there has none in this scheme; a name alone is that of the linear op.
    The op of the gradient is found through that op's own declaration.
    """

    name: str
    weight: Format
    activation: Format | None
    ops: Mapping[str, str] | str
    compressed_format: str = "naive-quantized"
    training: Training | None = None
    max_in_features: int | None = None
    static: bool = False

    def op(self, kind: str) -> str | None:
        """The op of a kind of layer; None where the scheme has none."""
        if isinstance(self.ops, str):
            return self.ops if kind == "linear" else None
        return self.ops.get(kind)

    @property
    def linear(self) -> str:
        """The op of a linear layer, which every scheme has."""
        return cast(str, self.op("linear"))

    @property
    def trainable(self) -> bool:
        return self.training is not None

    def why_not_linear(self, in_features: int, out_features: int) -> str | None:
        """Why a linear layer of this size cannot be held in this scheme, or None."""
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if not isinstance(size, int | torch.SymInt):
                return f"{name} must be an integer, got {size!r}"
        if in_features < 1 or out_features < 1:
            return (
                "in_features and out_features must be at least 1, "
                f"got {in_features} and {out_features}; leave such a layer in float"
            )
        if self.max_in_features is not None and in_features > self.max_in_features:
            return (
                f"in_features must be at most {self.max_in_features}, beyond which the int32 sum "
                f"of a row can overflow, got {in_features}; use scheme='int8_weight' or leave the "
                "layer in float"
            )
        multiple = self.weight.columns_multiple_of
        if in_features % multiple:
            beside = f" (out_features {out_features})"
            return not_multiple("in_features", multiple, in_features, beside)
        return None


def _training(
    scheme: str, x: Format, weight: Format, dy: Format | None = None, wgrad: str = "matmul"
) -> Training:
    """The same rule for both forms of a tensor; that of `x` for `dy` too, unless it is given."""
    dy = dy or x
    return Training(x, weight, dy, x, dy, f"{scheme}_matmul", f"{scheme}_{wgrad}")


def _ops(scheme: str, *kinds: str, tables: str = "") -> dict[str, str]:
    """The ops of a scheme, `int8_linear` and so on; those of tables have no activation to quantise,
    and are the ones of `tables`, which has weights in the same format.
    """
    ops = {kind: f"{scheme}_{kind}" for kind in ("linear", "grouped_linear", *kinds)}
    return ops | {kind: f"{tables}_{kind}" for kind in (_TABLES if tables else ())}


_RECURRENT, _CONVS = ("lstm", "gru"), ("conv", "conv_transpose")
_TABLES = ("embedding", "embedding_bag")
_ROW = FLOAT8["float8_e4m3"]
_TENSOR = FLOAT8["float8_e4m3_tensor"]
_GROUP, _BLOCK = FLOAT8["float8_e4m3_group"], FLOAT8["float8_e4m3_block"]

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme(
            "int8", INT8_CHANNEL, INT8_TOKEN,
            _ops("int8", *_RECURRENT, *_CONVS, tables="int8_weight"), "int-quantized",
            max_in_features=INT8_MAX_K,
        ),
        Scheme(
            "int8_static", INT8_CHANNEL, INT8_TENSOR,
            _ops("int8_static", *_RECURRENT, *_CONVS, tables="int8_weight"), "int-quantized",
            max_in_features=INT8_STATIC_MAX_K, static=True,
        ),
        Scheme(
            "int16", INT8_CHANNEL, INT16_TOKEN,
            _ops("int16", *_RECURRENT, *_CONVS, tables="int8_weight"), "int-quantized",
        ),
        Scheme(
            "int16_static", INT8_CHANNEL, INT16_TENSOR,
            _ops("int16_static", *_RECURRENT, *_CONVS, tables="int8_weight"), "int-quantized",
            static=True,
        ),
        Scheme(
            "int8_weight", INT8_CHANNEL, None,
            _ops("int8_weight", *_RECURRENT, *_CONVS, tables="int8_weight"), "int-quantized",
        ),
        Scheme(
            "fp8", _ROW, replace(_ROW, granularity="token"), _ops("fp8", tables="fp8_weight"),
            "float-quantized",
            _training("fp8", _ROW, _ROW),
        ),
        Scheme(
            "fp8_tensor", _TENSOR, _TENSOR, _ops("fp8_tensor"), "float-quantized",
            _training("fp8_tensor", _TENSOR, _TENSOR, FLOAT8["float8_e5m2_tensor"]),
        ),
        Scheme(
            "fp8_block", _BLOCK, _GROUP, _ops("fp8_block"), "float-quantized",
            _training("fp8_block", _GROUP, _BLOCK, wgrad="wgrad"),
        ),
        Scheme(
            "mxfp8", MX, MX, _ops("mxfp8"), "mxfp8-quantized",
            _training("mxfp8", MX, MX, wgrad="wgrad"),
        ),
        Scheme(
            "nvfp4", nvfp4.ROWS, nvfp4.ROWS, _ops("nvfp4", tables="nvfp4_weight"),
            "nvfp4-pack-quantized",
            Training(
                x=nvfp4.ROWS,
                weight=nvfp4.SQUARES,
                dy=nvfp4.GRADIENT,
                x_of_wgrad=nvfp4.TRANSFORMED,
                dy_of_wgrad=nvfp4.TRANSFORMED_GRADIENT,
                matmul="nvfp4_matmul",
                wgrad="nvfp4_wgrad",
            ),
        ),
        Scheme(
            "fp8_weight", _ROW, None, _ops("fp8_weight", tables="fp8_weight"), "float-quantized",
        ),
        Scheme(
            "nvfp4_weight", nvfp4.ROWS, None, _ops("nvfp4_weight", tables="nvfp4_weight"),
            "nvfp4-pack-quantized",
        ),
        *(
            Scheme(
                key.replace("int4", "int4_weight"), form, None,
                _ops(f"{key}_weight", tables=f"{key}_weight"), "pack-quantized",
            )
            for key, form in INT4.items()
        ),
        *(
            Scheme(f"int8_{key}", form, INT8_TOKEN, _ops(f"int8_{key}"), "pack-quantized")
            for key, form in INT4.items()
        ),
    )
}  # fmt: skip

DEFAULT_SCHEME = "int8"


# The schemes that a prepared layer can be converted to, by what its activations are stored in, and
# the one that is meant where none is named.
STATIC_OF = {
    scheme.activation.storage: scheme.name
    for scheme in SCHEMES.values()
    if scheme.static and scheme.activation is not None
}
STATIC = next(iter(STATIC_OF.values()))


def static_scheme(*dtypes: torch.dtype) -> str:
    """The static scheme for activations on grids of these dtypes; uint8 is stored as int8.

    >>> static_scheme(torch.uint8, torch.int16)
    'int16_static'
    """
    return STATIC_OF.get(max(dtypes, key=lambda dtype: dtype.itemsize), STATIC)


def schemes_of(kind: str) -> list[str]:
    """The schemes that have a layer of a kind, `"linear"`, `"lstm"`, ….

    >>> schemes_of("lstm")
    ['int8', 'int8_static', 'int16', 'int16_static', 'int8_weight']
    """
    return [scheme.name for scheme in SCHEMES.values() if scheme.op(kind)]


def get_scheme(name: str) -> Scheme:
    """The scheme called `name`; a `ValueError` that lists the known ones, or a `TypeError` for what
    is not a string.
    """
    if not isinstance(name, str):
        known = ", ".join(map(repr, SCHEMES))
        raise TypeError(
            f"scheme must be a string, one of {known}; got {type(name).__name__} {name!r}."
        )
    if name not in SCHEMES:
        close = difflib.get_close_matches(name.lower(), SCHEMES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        known = ", ".join(map(repr, SCHEMES))
        raise ValueError(f"unknown scheme {name!r}: the known schemes are {known}.{hint}")
    return SCHEMES[name]


def training_scheme(name: str) -> Scheme:
    """`get_scheme`, for a scheme that has a training layer; a `ValueError` that names those."""
    scheme = get_scheme(name)
    if scheme.training is None:
        known = ", ".join(repr(s.name) for s in SCHEMES.values() if s.trainable)
        raise ValueError(
            f"scheme {name!r} has no layer for training; use one of {known}. To train adapters "
            "over a frozen base, convert with training=False: gradients flow to the input."
        )
    return scheme

"""`QMultiheadAttention`: a drop-in `nn.MultiheadAttention` with quantised projections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
from torch import nn

from qnn.calibration.doubts import note_on
from qnn.functional.attention import ROLES, linear_rows, runs
from qnn.kernels.backends import linear_backend
from qnn.kernels.schemes import static_scheme
from qnn.nn.attention.forward import APART, PACKED, Attention, arguments_of
from qnn.nn.attention.observed import ObservedMultiheadAttention
from qnn.nn.base import Quantized
from qnn.nn.linear.observed import ObservedLinear
from qnn.nn.linear.quantized import QLinear
from qnn.nn.values import Found, require_floats

AttentionT = TypeVar("AttentionT", bound="QMultiheadAttention")


class QMultiheadAttention(Attention, Quantized):
    """`nn.MultiheadAttention` with the projections of query, key, value and output in `scheme`:

        y = out_proj(softmax(q · kᵀ / √D + mask) · v), with q, k, v = linear(query, key, value)

    The projections are computed as `QLinear` computes them; the product of queries and keys, the
    softmax and the product with the values stay float: `scaled_dot_product_attention` without
    `need_weights`, and written out with it, as in torch. Where query, key and value are one tensor,
    their projections are one product; where key and value are, these two.

    Its tensors are plain and have torch's names: `in_proj_weight` `[3E, E]`, or with other `kdim`
    or `vdim` `q_proj_weight`, `k_proj_weight` and `v_proj_weight`, each in the tensors that
    `QLinear` stores a `weight` in; `in_proj_bias`, `bias_k` and `bias_v` in `dtype`; `out_proj.`,
    a `QLinear`; and for int8_static `query_scale`, `query_zero_point` and those of key and value,
    per-tensor. `layer.in_proj_weight` reads as the float weight. `load_state_dict` also takes
    `nn.MultiheadAttention`'s own state, which it quantises on the way in.

    torch's fused kernels for encoders read float weights and are not used; `qnn.summary` says where
    one was. Nested tensors, which only they take, are refused.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first,
            device: as in `nn.MultiheadAttention`.
        dtype: of the biases, and of what `dequantize()` returns; torch's default dtype if None.
        scheme: as of `QLinear`, whose limits on sizes hold for `embed_dim`, `kdim` and `vdim`.

    Shape:
        as of `nn.MultiheadAttention`: query `[L, B, E]`, or `[B, L, E]` with `batch_first`, or
        `[L, E]`, of any float dtype; the outputs in the same.

    Raises:
        ValueError: a size that the scheme does not take, or an unknown scheme; inputs or masks
            whose shapes do not fit.
        TypeError: `dtype` is not a float dtype; a nested or sparse input.

    >>> layer, x = QMultiheadAttention(64, 4, batch_first=True), torch.randn(2, 10, 64)
    >>> y, weights = layer(x, x, x)
    >>> y.shape, weights.shape
    (torch.Size([2, 10, 64]), torch.Size([2, 10, 10]))
    """

    _prefixes = (*PACKED, *APART)

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        scheme: str = "int8",
    ) -> None:
        arguments = {
            "embed_dim": embed_dim, "num_heads": num_heads, "dropout": dropout, "bias": bias,
            "add_bias_kv": add_bias_kv, "add_zero_attn": add_zero_attn, "kdim": kdim,
            "vdim": vdim, "batch_first": batch_first,
        }  # fmt: skip
        self._begin(arguments, scheme, dtype, device)
        self.out_proj = cast(
            Any, QLinear(embed_dim, embed_dim, bias, device, self.dtype, scheme=scheme)
        )
        self.reset_parameters()

    def _begin(
        self, arguments: dict[str, Any], scheme: str, dtype: torch.dtype | None, device: Any
    ) -> None:
        """All but the values and the output projection."""
        nn.Module.__init__(self)
        template = nn.MultiheadAttention(**arguments, device="meta")
        vars(self).update((n, v) for n, v in vars(template).items() if n not in vars(self))
        self._qkv_same_embed_dim, self.scheme = False, scheme
        # A bias is the first float parameter, as of QLinear.
        self._parameters["in_proj_bias"] = None
        self._set_dtype(dtype)
        floats: dict[str, Any] = {
            name: None if p is None else tuple(p.shape) for name, p in template._parameters.items()
        }
        self._shapes = {name: floats[name] for name in self._names}
        for name, (rows, columns) in self._shapes.items():
            if (reason := self._scheme.why_not_linear(columns, rows)) is not None:
                raise ValueError(f"{self._who}: {name}: {reason}.")
        self._empty_weights(device, floats)
        # Of the ops, after the parts of the weight.
        names = list(self._calibration())
        self._grids = [[n for n in names if n.startswith(role)] for role in ROLES]

    def _weight_shapes(self) -> dict[str, tuple[int, int]]:
        return self._shapes

    def _calibration(self) -> dict[str, Found]:
        scheme = self._scheme
        if not scheme.static or scheme.activation is None:
            return {}
        return {
            role + part.suffix: Found(part.dtype, (1,), part.dtype == torch.float32)
            for role in ROLES
            for part in scheme.activation.parts[1:]
        }

    def _backend(self) -> str:
        if self._uncalibrated:
            return (
                "none: not calibrated; load a calibrated state, or prepare, calibrate and convert"
            )
        return linear_backend(self._scheme, self._stored_of(self._names[0])[0])

    # -- from float layers and back ---------------------------------------------------------------

    def _float(self, device: Any) -> nn.MultiheadAttention:
        return nn.MultiheadAttention(**arguments_of(self), device=device, dtype=self.dtype)

    @classmethod
    def from_float(
        cls: type[AttentionT], layer: nn.MultiheadAttention, scheme: str = "int8"
    ) -> AttentionT:
        """The quantised twin of a float layer: same device, mode and biases.

        Raises:
            TypeError: `layer` is not an `nn.MultiheadAttention` with float parameters.
            ValueError: a parameter holds NaN or inf, or has a size that `scheme` does not take.
        """
        if not isinstance(layer, nn.MultiheadAttention) or isinstance(layer, QMultiheadAttention):
            raise TypeError(
                f"qnn.{cls.__name__}.from_float takes an nn.MultiheadAttention, got "
                f"{type(layer).__name__}."
            )
        made = cls._around(layer, scheme)
        made.out_proj = cast(Any, QLinear.from_float(layer.out_proj, scheme))
        return made

    @classmethod
    def from_observed(cls: type[AttentionT], layer: ObservedMultiheadAttention) -> AttentionT:
        """The `int8_static` layer of one that was calibrated or trained.

        Where a call had one tensor for several roles, the first of them has observed it; a role
        that observed nothing has the grid of the one before.

        Raises:
            TypeError: `layer` is not an `ObservedMultiheadAttention`.
            ValueError: it has observed nothing, or a NaN or infinite value.
        """
        made = cls._around_observed(layer)
        out = layer.out_proj
        if isinstance(out, ObservedLinear):
            made.out_proj = cast(Any, QLinear.from_observed(out))
        return made

    @classmethod
    def _around_observed(cls: type[AttentionT], layer: ObservedMultiheadAttention) -> AttentionT:
        if not isinstance(layer, ObservedMultiheadAttention):
            raise TypeError(
                f"qnn.{cls.__name__}.from_observed takes a qnn.ObservedMultiheadAttention, got "
                f"{type(layer).__name__}."
            )
        grids = [part for grid in layer.grids() for part in grid]
        dtypes = [point.spec.dtype for point in layer.points()]
        made = cls._around(layer, static_scheme(*dtypes))
        device = made._device
        found = zip(made._calibration(), grids, strict=True)
        # Copies: roles that share a grid are parameters of their own, as a file has them.
        made._set_calibration({name: part.to(device, copy=True) for name, part in found})
        note_on(made, layer.seen())
        return made

    @classmethod
    def _around(cls: type[AttentionT], layer: nn.MultiheadAttention, scheme: str) -> AttentionT:
        """With the output projection that `layer` has."""
        floats = {
            name: cast(torch.Tensor, p) for name, p in layer._parameters.items() if p is not None
        }
        require_floats(f"qnn.{cls.__name__}.from_float({layer!r})", floats)
        made = cls.__new__(cls)
        dtype = next(iter(floats.values())).dtype
        made._begin(arguments_of(layer), scheme, dtype, "meta")
        made._take(floats)
        made.out_proj = layer.out_proj
        return made.train(layer.training)

    def dequantize(self) -> nn.MultiheadAttention:
        """A float `nn.MultiheadAttention` with the weights that the stored ones stand for."""
        layer = cast(nn.MultiheadAttention, super().dequantize())
        out: Any = self.out_proj
        held = out.dequantize() if isinstance(out, Quantized) else out
        for name, value in held.named_parameters(recurse=False):
            copied = value.detach().to(self.dtype, copy=True)
            setattr(layer.out_proj, name, nn.Parameter(copied, value.requires_grad))
        return layer

    def _draw_from(self, layer: nn.Module) -> None:
        super()._draw_from(layer)
        own, drawn = self.out_proj, cast(nn.MultiheadAttention, layer).out_proj
        if isinstance(own, Quantized):
            own._draw_from(drawn)
        else:
            own.load_state_dict(drawn.state_dict())

    # -- forward ----------------------------------------------------------------------------------

    def _project(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        if self._uncalibrated:
            self._refuse_uncalibrated()
        packed, size, scheme = self._packed, self.embed_dim, self.scheme
        bias: Any = self._parameters["in_proj_bias"]
        held: Any = self._parameters
        made: list[torch.Tensor] = []
        for start, stop in runs(inputs, packed=packed):
            grid = [held[name] for name in self._grids[start]]
            rows = (size * start, size * stop)
            if packed:
                parts, own = self._held("in_proj_weight"), bias
            else:
                parts, own = self._held(APART[start]), None if bias is None else bias[slice(*rows)]
                rows = (0, size)
            y = linear_rows(inputs[start], parts, grid, own, scheme, rows)
            made += y.chunk(stop - start, -1)
        return made

    def extra_repr(self) -> str:
        dtype = "" if self.dtype == torch.float32 else f", dtype={self.dtype}"
        return f"{super().extra_repr()}{dtype}, scheme={self.scheme!r}"

    def __repr__(self) -> str:
        text = super().__repr__()
        return text if torch.compiler.is_compiling() else f"{text}\n  (out_proj): {self.out_proj!r}"

    def _is_foreign(self, name: str) -> bool:
        return super()._is_foreign(name) or name in {f"{role}_scale" for role in ROLES}

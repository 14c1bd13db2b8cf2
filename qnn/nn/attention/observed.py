"""`ObservedMultiheadAttention`: a float `nn.MultiheadAttention` on its way to `int8_static`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
from torch import nn

from qnn.calibration.fake_quantize import FakeQuantize, rounds
from qnn.calibration.spec import QuantSpec
from qnn.functional.attention import ROLES, runs
from qnn.nn.attention.forward import APART, Attention, arguments_of
from qnn.nn.linear.conv1d import as_linear
from qnn.nn.linear.observed import ObservedLinear, fake_quantize_weight, grid

AttentionT = TypeVar("AttentionT", bound="ObservedMultiheadAttention")


class ObservedMultiheadAttention(Attention):
    """An `nn.MultiheadAttention` that records the ranges of what enters its projections, for
    `QMultiheadAttention(scheme="int8_static")`.

    It computes what `nn.MultiheadAttention` computes, to rounding; with `qat` the inputs and the
    weights of the projections are fake-quantised, as `ObservedLinear` does. Query, key and value
    have a range each; of a tensor that a call has for several, the first has it.

    Its state dict is that of `nn.MultiheadAttention` and, under `query_quantize.`,
    `key_quantize.`, `value_quantize.` and `out_proj.input_quantize.`, the statistics.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first,
            device, dtype: as in `nn.MultiheadAttention`.
        spec, qat, name: as of `ObservedLinear`.

    Raises:
        ValueError: a spec that the quantised layer has no form for.

    >>> layer = ObservedMultiheadAttention.from_float(nn.MultiheadAttention(8, 2))
    >>> layer(*[torch.ones(3, 8)] * 3)[0].shape
    torch.Size([3, 8])
    """

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
        spec: QuantSpec | None = None,
        qat: bool = False,
        name: str = "",
    ) -> None:
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim,
            batch_first, device, dtype,
        )  # fmt: skip
        self._observe(spec, qat, name)
        self.out_proj = cast(Any, self._observed_output(self.out_proj))

    def _observe(self, spec: QuantSpec | None, qat: bool, name: str) -> None:
        # The spec of a linear layer's input, with its defaults and limits.
        known = ObservedLinear(1, 1, device="meta", spec=spec, qat=qat).input_quantize.spec
        self._qkv_same_embed_dim, self.qat, self.name = False, qat, name
        for role in ROLES:
            point = FakeQuantize(known, name=f"{name}.{role}" if name else role, qat=qat)
            self.add_module(f"{role}_quantize", point.to(self._at))

    def _observed_output(self, linear: nn.Linear) -> ObservedLinear:
        name = f"{self.name}.out_proj" if self.name else "out_proj"
        return ObservedLinear.from_float(as_linear(linear), self.spec, self.qat, name=name)

    @property
    def spec(self) -> QuantSpec:
        """Of the inputs."""
        return self.points()[0].spec

    @classmethod
    def from_float(
        cls: type[AttentionT],
        layer: nn.MultiheadAttention,
        spec: QuantSpec | None = None,
        qat: bool = False,
        *,
        name: str = "",
    ) -> AttentionT:
        """An observed layer around the parameters of `layer` themselves, in its mode.

        Raises:
            TypeError: `layer` is not a plain `nn.MultiheadAttention`.
            ValueError: a spec that the constructor refuses.
        """
        if type(layer) is not nn.MultiheadAttention:
            raise TypeError(
                f"qnn.{cls.__name__}.from_float takes an nn.MultiheadAttention, got "
                f"{type(layer).__name__}."
            )
        made = cls._around(layer, spec, qat, name)
        made.out_proj = cast(Any, made._observed_output(layer.out_proj))
        return made.train(layer.training)

    @classmethod
    def _around(
        cls: type[AttentionT],
        layer: nn.MultiheadAttention,
        spec: QuantSpec | None,
        qat: bool,
        name: str,
    ) -> AttentionT:
        """With the output projection that `layer` has."""
        made = cls.__new__(cls)
        nn.MultiheadAttention.__init__(made, **arguments_of(layer), device="meta")
        for key, parameter in layer._parameters.items():
            made._parameters[key] = parameter
        made.out_proj = layer.out_proj
        made._observe(spec, qat, name)
        return made.train(layer.training)

    def points(self) -> list[FakeQuantize]:
        """The observation points of query, key and value."""
        return [cast(FakeQuantize, self._modules[f"{role}_quantize"]) for role in ROLES]

    def seen(self) -> list[FakeQuantize]:
        """Those that have a range; the first in any case."""
        first, *others = self.points()
        return [first, *(point for point in others if _has_seen(point))]

    def grids(self) -> list[tuple[torch.Tensor, ...]]:
        """Scale and zero point of query, key and value.

        Raises:
            ValueError: nothing was observed, or a NaN or infinite value.
        """
        seen, found = self.seen(), list[tuple[torch.Tensor, ...]]()
        for point in self.points():
            found.append(grid(point) if point in seen else found[-1])
        return found

    def _project(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        packed, size, points = self._packed, self.embed_dim, self.points()
        bias, made = self.in_proj_bias, list[torch.Tensor]()
        for start, stop in runs(inputs, packed=packed):
            rows = slice(size * start, size * stop)
            weight: Any = self.in_proj_weight if packed else getattr(self, APART[start])
            weight = fake_quantize_weight(weight) if rounds(self) else weight
            y = nn.functional.linear(
                points[start](inputs[start]),
                weight[rows] if packed else weight,
                None if bias is None else bias[rows],
            )
            made += y.chunk(stop - start, -1)
        return made

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, qat={self.qat}"


def _has_seen(point: FakeQuantize) -> bool:
    observer = point.observer
    return observer is None or int(observer.count) > 0

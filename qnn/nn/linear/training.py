"""`Linear`: an `nn.Linear` that trains in low precision."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from qnn import functional as F
from qnn.kernels import training_scheme
from qnn.kernels.formats import FLOATS
from qnn.nn.values import check_input, of_other_kind


class Linear(nn.Linear):
    """`y = x · weightᵀ + bias`, whose output and gradients are quantised products.

    It holds what `nn.Linear` holds, float parameters and the same state dict, draws the same
    weights from the same seed, and quantises them, the input and the gradient in each step:

        y = quantize(x) · quantize(weight)ᵀ + bias
        dx = quantize(dy) · quantize(weight),   dweight = quantize(dy)ᵀ · quantize(x)

    each along the axis that is summed over, with float32 sums (`qnn.functional.training_linear`).
    For the backward it keeps the quantised input, about half of bfloat16's bytes, or a quarter in
    nvfp4. `qnn.convert(model, scheme)` makes a trained model ready for deployment.

    Args:
        in_features, out_features, bias, device, dtype: as in `nn.Linear`.
        scheme: `"fp8"` (a scale per row), `"fp8_tensor"`, `"fp8_block"`, `"mxfp8"` or `"nvfp4"`.

    Shape:
        input `[..., in_features]`, any number of leading axes, also empty;
        output `[..., out_features]`, in the input's dtype.

    Raises:
        ValueError: a size that the scheme does not take, or a scheme that is unknown or that has no
            training layer.
        TypeError: `dtype` is not a float dtype.

    >>> layer = Linear(768, 3072, scheme="fp8")
    >>> layer(torch.randn(4, 128, 768)).sum().backward()
    >>> layer.weight.grad.shape
    torch.Size([3072, 768])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        scheme: str = "fp8",
    ) -> None:
        who = f"qnn.Linear({in_features}, {out_features}, scheme={scheme!r})"
        reason = training_scheme(scheme).why_not_linear(in_features, out_features)
        if reason is not None:
            raise ValueError(f"{who}: {reason}.")
        dtype = dtype or torch.get_default_dtype()
        if dtype not in FLOATS:
            raise TypeError(
                f"{who}: dtype must be one of {', '.join(map(str, FLOATS))}; got {dtype}."
            )
        super().__init__(in_features, out_features, bias, device, dtype)
        self.scheme = scheme

    @classmethod
    def from_float(cls, linear: nn.Linear, scheme: str = "fp8") -> Linear:
        """A training layer around the parameters of `linear` themselves, in its mode; `linear` may
        be one of another scheme.

        Raises:
            TypeError: `linear` is not an `nn.Linear` with float parameters.
            ValueError: a size or scheme that the constructor refuses.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(
                f"qnn.Linear.from_float takes an nn.Linear, got {type(linear).__name__}."
            )
        sizes = linear.in_features, linear.out_features
        layer = cls(*sizes, False, device="meta", dtype=linear.weight.dtype, scheme=scheme)
        layer.weight = linear.weight
        layer.bias = linear.bias
        return layer.train(linear.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if type(input) is not torch.Tensor and (y := of_other_kind(self, input)) is not None:
            return cast(torch.Tensor, y)
        # A parametrisation, pruning and FSDP1 leave no parameter of that name; the function checks
        # its arguments too, in words about itself.
        if "weight" in self._parameters:
            check_input(self, input, "weight")
        return F.training_linear(input, self.weight, self.bias, scheme=self.scheme)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scheme={self.scheme!r}"

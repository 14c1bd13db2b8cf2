"""`GroupedLinear`: the float layer that `QGroupedLinear` stands for."""

from __future__ import annotations

import math

import torch
from torch import nn

from qnn.functional.grouped import float_grouped_linear


class GroupedLinear(nn.Module):
    """`y = x · weight[e]ᵀ + bias[e]` for the rows of each group `e`.

    Args:
        num_groups: how many weights there are.
        in_features, out_features, bias, device, dtype: as in `nn.Linear`, of each.

    Shape:
        input `[M, in_features]`, rows sorted by their group, and `offsets` int32 `[num_groups]`,
        the ends of the groups, as `qnn.functional.sort_by_group` gives them;
        output `[M, out_features]`, zeros in rows after the last group.

    >>> layer = GroupedLinear(4, 16, 8)
    >>> layer(torch.randn(5, 16), torch.tensor([2, 2, 4, 5], dtype=torch.int32)).shape
    torch.Size([5, 8])
    """

    def __init__(
        self,
        num_groups: int,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_groups, self.in_features, self.out_features = num_groups, in_features, out_features
        shape = (num_groups, out_features, in_features)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(shape[:2], device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw what `nn.Linear` draws, for each group."""
        bound = 1 / math.sqrt(max(self.in_features, 1))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, input: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return float_grouped_linear(input, self.weight, offsets, self.bias)

    def extra_repr(self) -> str:
        return (
            f"num_groups={self.num_groups}, in_features={self.in_features}, "
            f"out_features={self.out_features}, bias={self.bias is not None}"
        )

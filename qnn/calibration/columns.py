"""What calibration keeps of each column of a layer's input, for smoothing."""

from __future__ import annotations

import torch

LOW, HIGH, COUNT, SQUARES = range(4)


class Columns:
    """Of each of K columns the least and the largest value, how many there were and the sum of
    their squares: float64 `[4, K]`, in one tensor.
    """

    @staticmethod
    def none(columns: int) -> torch.Tensor:
        """Of no values."""
        start = torch.tensor([torch.inf, -torch.inf, 0, 0], dtype=torch.float64)
        return start[:, None].repeat(1, columns)

    @staticmethod
    def of(x: torch.Tensor) -> torch.Tensor:
        """Of the values of `x` `[..., K]`, which is not empty."""
        return Columns.with_values(Columns.none(x.shape[-1]).to(x.device), x)

    @staticmethod
    def with_values(one: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Of those of `one` and of `x`, which is not empty."""
        rows = x.reshape(-1, x.shape[-1])
        # Not aminmax, nor a norm in float64, which take ten times as long.
        low, high = torch.minimum(one[LOW], rows.amin(0)), torch.maximum(one[HIGH], rows.amax(0))
        squares = one[SQUARES] + rows.float().square().sum(0)
        return torch.stack([low, high, one[COUNT] + rows.shape[0], squares])

    @staticmethod
    def joined(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
        """Of the values of both."""
        low, high = torch.minimum(one[LOW], two[LOW]), torch.maximum(one[HIGH], two[HIGH])
        return torch.cat([low[None], high[None], one[COUNT:] + two[COUNT:]])

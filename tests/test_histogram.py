"""The ops that count values for observers, with values that are hard to count."""

from __future__ import annotations

import pytest
import torch
from parameterized import parameterized

from qnn.kernels import OPS

from .common import same_bits

# More than one table, and more than one thread's share, from so many values on.
SIZES = (0, 1, 5, 513, 40_000, 200_001)


def values(n: int, rows: int, odd: bool) -> torch.Tensor:
    """Of a scale for each row, with zeros, numbers below float32's normal ones, perhaps NaN."""
    x = torch.randn(rows, n) * torch.tensor([1e-3, 1.0, 50.0])[:rows, None]
    special = [0.0, -0.0, 1e-42, -1e-42, 2.0, -2.0, 3.4e38]
    special += [torch.nan, torch.inf, -torch.inf] if odd else []
    if n > len(special):
        x[:, : len(special)] = torch.tensor(special)
        x[0, : len(special)] = 0  # an ordinary row beside them
    return x


@pytest.mark.usefixtures("library", "threads")
class TestCounts:
    @parameterized.expand([(n, rows) for n in SIZES for rows in (1, 3)])
    def test_as_the_reference(self, n: int, rows: int) -> None:
        for odd, threads in ((False, 1), (True, 3)):
            torch.set_num_threads(threads)
            x = values(n, rows, odd)
            before = (
                torch.randn(rows),
                torch.randn(rows),
                torch.randint(99, (rows, 4096)),
                torch.tensor([0, -115, 2], dtype=torch.int32)[:rows],
                torch.randint(99, (256,)),
            )
            op = OPS["histogram"]
            for got, want in zip(op.call(x, *before), op.reference(x, *before), strict=True):
                assert same_bits(got.nan_to_num(7.0), want.nan_to_num(7.0))
                assert torch.equal(got.isnan(), want.isnan())
            op = OPS["exponents"]
            assert torch.equal(op.call(x, before[-1]), op.reference(x, before[-1]))

    def test_every_value_but_zeros_is_in_a_bin(self) -> None:
        x = values(40_000, 3, False)
        ends, none = torch.zeros(3), torch.zeros(3, 4096, dtype=torch.int64)
        start = torch.full((3,), -115, dtype=torch.int32), torch.zeros(256, dtype=torch.int64)
        _, _, counts, exponent, magnitudes = OPS["histogram"].call(x, ends, ends, none, *start)
        assert torch.equal(counts.sum(1), (x != 0).sum(1))
        assert int(magnitudes.sum()) == x.numel()
        assert torch.equal(exponent, x.abs().amax(1).log2().floor().int() + 1)
        # As numpy counts them: bin k holds k ≤ x < k + 1.
        bins = (x[1] * 2.0 ** (11 - int(exponent[1]))).floor().long() + 2048
        want = torch.bincount(bins, minlength=4096)
        want[2048] -= (x[1] == 0).sum()
        assert torch.equal(counts[1], want)

    def test_an_exponent_that_no_grid_has(self) -> None:
        """It writes nowhere else."""
        none = torch.zeros(1, 4096, dtype=torch.int64), torch.zeros(256, dtype=torch.int64)
        x, ends = torch.randn(1, 100), torch.zeros(1)
        for exponent in (-(2**31), -1000, 1000, 2**31 - 1):
            grid = torch.tensor([exponent], dtype=torch.int32)
            counts = OPS["histogram"].call(x, ends, ends, none[0], grid, none[1])[2]
            assert int(counts.sum()) == 100

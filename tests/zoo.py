"""A small model for each kind of layer, for tests that go over all kinds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import qnn
from qnn.kernels import get_scheme

WIDTH = 32  # a group of each scheme with groups
Inputs = tuple[torch.Tensor, ...]


def images(batch: int = 2, height: int = 9, width: int = 10, channels: int = 3) -> torch.Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))


class Convolutions(nn.Module):
    """A stem, an inverted residual with a depthwise layer, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8))
        self.body = nn.Sequential(
            nn.Conv2d(8, 16, 1), nn.ReLU6(), nn.Conv2d(16, 16, 3, padding=1, groups=16),
            nn.Hardswish(), nn.Conv2d(16, 8, 1),
        )  # fmt: skip
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        result: torch.Tensor = self.head((x + self.body(x)).mean((2, 3)))
        return result


class Upwards(nn.Module):
    """Down and up again, in one and two axes."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, 2, 1)
        self.up = nn.ConvTranspose2d(8, 4, 3, 2, 1, 1)
        self.line = nn.ConvTranspose1d(4, 6, 2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.line(self.up(self.down(x).relu()).mean(2))
        return result


class Words(nn.Module):
    """A table and a bag of the same ids, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, WIDTH, padding_idx=0)
        self.bag = nn.EmbeddingBag(50, WIDTH, mode="mean")
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.table(ids) + self.bag(ids)[:, None])
        return result


class Attention(nn.Module):
    """To itself, and to something else."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.other = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = x + self.own(x, x, x, need_weights=False)[0]
        result: torch.Tensor = self.other(x, y, y)[0]
        return result


class Experts(nn.Module):
    """Fused experts as transformers has them, in plain torch."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 2 * WIDTH, WIDTH) / WIDTH**0.5)
        self.down_proj = nn.Parameter(torch.randn(3, WIDTH, WIDTH) / WIDTH**0.5)
        self.act_fn = nn.SiLU()

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        first = torch.einsum("th,enh->ten", hidden_states, self.gate_up_proj)
        gate, up = first.chunk(2, -1)
        every = torch.einsum("ten,ehn->teh", self.act_fn(gate) * up, self.down_proj)
        chosen = every.gather(1, top_k_index[..., None].expand(-1, -1, WIDTH))
        return (chosen * top_k_weights[..., None]).sum(1)


qnn.register_adapter(Experts, qnn.ExpertsAdapter())


class Mixture(nn.Module):
    """A router, its experts, and a grouped layer over the rows that it sorts."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, 3), Experts()
        self.grouped = qnn.GroupedLinear(3, WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, index = self.router(x).softmax(-1).topk(2)
        y = self.experts(x, index, weights)
        order, offsets = qnn.functional.sort_by_group(index, 3)
        rows = self.grouped(y[order // 2], offsets)
        return qnn.functional.unsort(rows, order).unflatten(0, index.shape).sum(1)


class Cells(nn.Module):
    """A recurrent layer and a cell."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.cell = nn.LSTM(WIDTH, 16, batch_first=True), nn.GRUCell(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.cell(self.lstm(x)[0][:, -1])
        return result


@dataclass(frozen=True)
class Entry:
    make: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]  # of a batch
    schemes: tuple[str, ...]


def _steps(batch: int, steps: int = 6) -> torch.Tensor:
    make = torch.Generator().manual_seed(2)
    return torch.randn(batch, steps, WIDTH, generator=make)


INT8 = ("int8", "int8_static", "int8_weight")
ZOO = {
    "convolutions": Entry(Convolutions, lambda batch: (images(batch),), INT8),
    "transposed": Entry(Upwards, lambda batch: (images(batch, 8, 8),), INT8),
    "words": Entry(
        Words,
        lambda batch: ((torch.arange(batch * 5) * 7 % 50).view(batch, 5),),
        ("int8_weight", "fp8_weight", "nvfp4_weight", "int4_weight_g32"),
    ),
    "attention": Entry(
        Attention,
        lambda batch: (_steps(batch), _steps(batch, 4)),
        ("int8", "int8_static", "fp8_weight", "int8_int4_g32", "nvfp4"),
    ),
    "mixture": Entry(
        Mixture,
        lambda batch: (_steps(batch)[:, 0],),
        ("int8", "int8_weight", "fp8", "int4_weight_asym_g32"),
    ),
    "cells": Entry(Cells, lambda batch: (_steps(batch),), INT8),
}
GRID = [(name, scheme) for name, entry in ZOO.items() for scheme in entry.schemes]
# One scheme of each, that of most users.
FIRST = [(name, "int8_weight" if name == "words" else "int8") for name in ZOO]


def floats(name: str) -> nn.Module:
    torch.manual_seed(0)
    return ZOO[name].make().eval()


def quantised(name: str, scheme: str) -> Any:
    """The model of `floats`, with all of its layers in `scheme`."""
    model = floats(name)
    if get_scheme(scheme).static:
        return qnn.convert(qnn.calibrate(qnn.prepare(model), [ZOO[name].inputs(4)], progress=False))
    tables = {nn.Embedding: scheme, nn.EmbeddingBag: scheme} if name == "words" else {}
    return qnn.convert(model, {"*": scheme, **tables})

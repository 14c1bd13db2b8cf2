"""The model of bench_fp8.py: a block of Llama 3, with random weights."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn


class Attention(nn.Module):
    """Causal, with fewer heads of keys and values than of queries."""

    def __init__(self, hidden: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.size = hidden // heads
        self.q = nn.Linear(hidden, hidden, bias=False)
        self.k = nn.Linear(hidden, kv_heads * self.size, bias=False)
        self.v = nn.Linear(hidden, kv_heads * self.size, bias=False)
        self.o = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            y.unflatten(-1, (-1, self.size)).transpose(1, 2)
            for y in (self.q(x), self.k(x), self.v(x))
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, ffn, bias=False)
        self.up = nn.Linear(hidden, ffn, bias=False)
        self.down = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Without the rotary embedding, which costs every variant the same."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, ffn: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.RMSNorm(hidden, eps=1e-5) for _ in range(2))
        self.attention = Attention(hidden, heads, kv_heads)
        self.mlp = SwiGLU(hidden, ffn)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def with_layers(module: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """`module`, or a copy around the same parameters, with what `make` makes of linear layers."""
    if isinstance(module, nn.Linear):
        return make(module)
    twin = copy.deepcopy(module, {id(p): p for p in module.parameters()})
    linears = [name for name, child in twin.named_modules() if isinstance(child, nn.Linear)]
    for name in linears:
        parent, _, last = name.rpartition(".")
        setattr(twin.get_submodule(parent), last, make(twin.get_submodule(name)))  # type: ignore[arg-type]
    return twin

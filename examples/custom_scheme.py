"""A scheme of one's own: nf4 weights in a small network, a fused op for them, and training.

The library has no nf4. Its weights (Dettmers et al., QLoRA, 2023) are the entries of a table of 16
numbers, quantiles of the normal distribution, with a scale for each 64 of a row: 4.5 bits a weight.
All that is needed is a function of torch operations that decodes them, called through
`qnn.functional.invoke_quant`. The layer then runs eagerly, compiles, exports and trains, and its
decoding is one node of each graph, which a pattern finds.

    python examples/custom_scheme.py           # half a minute on two cores, most of it compiling
    python examples/custom_scheme.py --tiny

It prints accuracy on handwritten digits, the error against float32, and bytes: in float32, in nf4,
after training adapters, scales and biases on the frozen codes, and compiled without and with a pass
that gives decoding and product to an op of the example's own.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch._higher_order_ops import invoke_quant as node
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.pattern_matcher import Arg, CallFunction, Ignored, PatternMatcherPass
from torch._inductor.pattern_matcher import register_graph_pattern as register
from torch.nn import functional as F

import qnn

aten = torch.ops.aten
BLOCK, RANK, TRAINED = 64, 4, 1400


# 1. The scheme.
def nf4_table() -> torch.Tensor:
    """The 16 values, from -1 to 1, with an exact zero."""
    positive, negative = (torch.linspace(0.9677083, 0.5, n)[:-1] for n in (9, 8))
    quantiles = torch.special.ndtri(torch.cat((positive, negative, torch.tensor([0.5]))))
    quantiles[8:15] *= -1
    return quantiles.sort().values / quantiles.max()


def encode(w: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`[N, K]` to codes `[N, K / 2]`, two a byte, and scales `[N, K / 64]`: the absmax."""
    blocks = w.unflatten(1, (-1, BLOCK))
    scale = blocks.abs().amax(-1).clamp_min(1e-12)
    between = (table[1:] + table[:-1]) / 2
    index = torch.bucketize((blocks / scale[..., None]).flatten(1), between).to(torch.uint8)
    return index[:, ::2] << 4 | index[:, 1::2], scale


def decode(codes: torch.Tensor, table: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The weight, as `[K, N]`."""
    index = torch.stack((codes >> 4, codes & 15), -1).flatten(1).int()
    return (table[index].unflatten(1, (-1, BLOCK)) * scale[..., None]).flatten(1).t()


# 2. The layer.
class NF4Linear(nn.Module):
    """An `nn.Linear` with frozen codes; scales, bias and an adapter of low rank may be trained."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("table", nf4_table())
        codes, scale = encode(linear.weight.detach(), self.table)
        self.register_buffer("codes", codes)
        self.scale, self.bias = nn.Parameter(scale), nn.Parameter(linear.bias.detach().clone())
        self.down = nn.Parameter(torch.randn(linear.in_features, RANK) / linear.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(RANK, linear.out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        operands = self.codes, self.table, self.scale
        w = qnn.functional.invoke_quant(decode, *operands, scheme="nf4")
        return torch.mm(x, w) + torch.mm(torch.mm(x, self.down), self.up) + self.bias


# 3. An op that decodes as it multiplies. Yours would call a kernel; this one saves memory alone.
calls = 0


@torch.library.custom_op("example::nf4_mm", mutates_args=())
def nf4_mm(
    x: torch.Tensor, codes: torch.Tensor, table: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    global calls
    calls += 1
    rows = zip(codes.split(256), scale.split(256), strict=True)
    return torch.cat([x @ decode(c, table, s) for c, s in rows], 1)


@nf4_mm.register_fake
def _(
    x: torch.Tensor, codes: torch.Tensor, table: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    return x.new_empty(len(x), len(codes))


# 4. The pattern, and the pass that applies it. Its uuid is part of the key of Inductor's caches.
patterns = PatternMatcherPass()
decoded = CallFunction(node, Ignored(), Arg(), Arg(), Arg(), scheme="nf4")


@register(CallFunction(aten.mm.default, Arg(), decoded), pass_dict=patterns)
def fuse(match, x, codes, table, scale) -> None:
    match.replace_by_example(torch.ops.example.nf4_mm.default, [x, codes, table, scale])


class Fuse(CustomGraphPass):
    def __call__(self, graph: torch.fx.Graph) -> None:
        patterns.apply(graph)

    def uuid(self) -> bytes:
        return get_hash_for_files((__file__,))


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """All images, `[1797, 64]` from 0 to 1, and their digits, in a fixed random order."""
    held = load_digits()
    order = torch.randperm(len(held.data), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(held.data, dtype=torch.float32) / 16
    return images[order], torch.tensor(held.target)[order]


def train(model: nn.Module, x: torch.Tensor, wanted: torch.Tensor, epochs: int, call) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(100):
            F.cross_entropy(call(x[rows]), wanted[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description="nf4 weights through qnn's seam.")
    parser.add_argument("--tiny", action="store_true", help="a smaller network, fewer epochs")
    width, epochs = (128, 4) if parser.parse_args().tiny else (512, 15)
    torch.manual_seed(0)
    (x, wanted), layers = digits(), (nn.Linear(64, width), nn.Linear(width, width))
    seen, known, unseen, right = x[:TRAINED], wanted[:TRAINED], x[TRAINED:], wanted[TRAINED:]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), nn.Linear(width, 10))
    train(model, seen, known, epochs, model)
    with torch.no_grad():
        reference = model(unseen)
    print(f"{'':26}{'accuracy':>9}{'SQNR dB':>9}{'bytes':>9}")

    def row(label: str, call, size: int) -> torch.Tensor:
        with torch.no_grad():
            y = call(unseen)
        accuracy = 100 * (y.argmax(-1) == right).float().mean().item()
        error = "" if "trained" in label else f"{qnn.sqnr(reference, y):.1f}"
        print(f"{label:26}{accuracy:8.2f}%{error:>9}{size:9}")
        return y

    row("float32", model, sum(layer.weight.nbytes for layer in layers))
    for name in ("0", "2"):  # the last layer stays as it is
        model.set_submodule(name, NF4Linear(model.get_submodule(name)))
    size = sum(model[i].codes.nbytes + model[i].scale.nbytes for i in (0, 2))
    row("nf4", model, size)
    codes = [model[i].codes.clone() for i in (0, 2)]
    # Compiled, the gradient of `decode` is one more node: scheme `nf4_backward`.
    train(model, seen, known, epochs, torch.compile(model, fullgraph=True))
    eager = row("nf4, trained", model, size)
    assert all(torch.equal(model[i].codes, was) for i, was in zip((0, 2), codes, strict=True))

    compiled = row("nf4, trained, compiled", torch.compile(model, fullgraph=True), size)
    torch.compiler.reset()
    present = config.post_grad_custom_pre_pass  # None, one pass, or several: they stay
    several = present if isinstance(present, (list, tuple)) else [present] if present else []
    with config.patch(post_grad_custom_pre_pass=[*several, Fuse()]):
        fused = row("nf4, trained, and fused", torch.compile(model, fullgraph=True), size)
    print(f"\nexample::nf4_mm was called {calls} times, for 2 layers")
    for label, y in {"without": compiled, "with": fused}.items():
        print(f"largest difference from eager, {label} the pass: {(y - eager).abs().max():.1e}")


if __name__ == "__main__":
    main()

"""An int8 model leaves Python: `torch.export`, a file, an AOTInductor package, a fresh process.

A converted model is exported once, with batch and sequence length left open. In the exported graph
each quantised layer is one `invoke_quant_packed` node that carries the name of its scheme, so that
a compiler pass can find it; the weights are plain int8 tensors. The saved program and the compiled
package are then run by a process that has never seen the model, at another batch size.

The program repeats eager bit for bit. The package has Inductor's own softmax, LayerNorm and GELU,
which round the last bit of a float differently; that moves an int8 code by one step here and there,
so its output differs from eager's, by less than quantising moved it (the row `float32, eager`).

    python examples/export_aoti.py             # a small encoder; half a minute, most of it g++
    python examples/export_aoti.py --minilm    # all-MiniLM-L6-v2; see quickstart.py for its weights
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import qnn  # whoever loads a program or a package needs it too: it registers the operators

PROGRAM, PACKAGE, CASE = "program.pt2", "package.pt2", "case.pt"


class Block(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.qkv, self.project = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.mlp = nn.Sequential(nn.Linear(size, 4 * size), nn.GELU(), nn.Linear(4 * size, size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, -1, 64)).permute(2, 0, 3, 1, 4)
        x = x + self.project(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class MiniLM(nn.Module):
    """Token ids `[B, T]` to sentence embeddings `[B, 384]`, without padding."""

    def __init__(self) -> None:
        from minilm import load_minilm

        super().__init__()
        self.bert = load_minilm()[0]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.bert(input_ids=ids).last_hidden_state.mean(1), dim=-1)


def milliseconds(call: Callable[[], torch.Tensor], repeats: int = 20) -> float:
    """The median of `repeats` calls, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def build(folder: Path, minilm: bool) -> None:
    """Convert, export, save and compile; leave an input, and what the models give, beside it."""
    torch.manual_seed(0)
    small = nn.Sequential(nn.Embedding(1000, 256), Block(256), Block(256))
    original = MiniLM().eval() if minilm else small.eval()
    model = qnn.convert(original, "int8")

    dynamic = ({0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("tokens", max=512)},)
    ids = torch.randint(1000, (4, 48))
    program = torch.export.export(model, (ids,), dynamic_shapes=dynamic)
    regions = qnn.passes.regions(program)
    print(f"{len(regions)} quantised layers in the exported graph, the first of them:")
    for region in regions[:4]:
        x, weight = (region.arguments[name].meta["val"] for name in ("x", "w"))
        sizes = f"{list(x.shape)} by {weight.dtype} {list(weight.shape)}"
        print(f"  {region.node.name:22} scheme={region.scheme!r}: {sizes}")

    torch.export.save(program, folder / PROGRAM)
    torch._inductor.aoti_compile_and_package(program, package_path=str(folder / PACKAGE))
    for name in (PROGRAM, PACKAGE):
        print(f"{name:12} {(folder / name).stat().st_size / 1e6:6.1f} MB")

    ids = torch.randint(1000, (7, 33))
    eager = {"float32": original, "int8": model}
    case = {name: (m(ids), milliseconds(lambda m=m: m(ids))) for name, m in eager.items()}
    torch.save({"ids": ids, **case}, folder / CASE)


def load(folder: Path) -> None:
    """Run both files, with nothing of the model's Python code at hand."""
    case = torch.load(folder / CASE)
    ids, expected = case["ids"], case["int8"][0]

    def row(label: str, output: torch.Tensor, time_taken: float) -> None:
        difference = output - expected
        largest, mean = difference.abs().max().item(), difference.square().mean().sqrt().item()
        print(f"{label:20}{largest:12.1e}{mean:12.1e}{time_taken:10.2f}")

    print(f"\nin a fresh process, input {list(ids.shape)}; differences from eager int8")
    print(f"{'':20}{'largest':>12}{'rms':>12}{'ms':>10}")
    row("float32, eager", *case["float32"])
    row("int8, eager", *case["int8"])
    program = torch.export.load(folder / PROGRAM).module()
    row("exported program", program(ids), milliseconds(lambda: program(ids)))
    package = torch._inductor.aoti_load_package(str(folder / PACKAGE))
    row("AOTInductor package", package(ids), milliseconds(lambda: package(ids)))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Export an int8 model and run it elsewhere.")
    parser.add_argument("--minilm", action="store_true", help="all-MiniLM-L6-v2, real weights")
    parser.add_argument("--out", type=Path, default=Path("out/export"), help="folder of the files")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        load(arguments.load)
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    build(arguments.out, arguments.minilm)
    sys.stdout.flush()
    subprocess.run([sys.executable, __file__, "--load", arguments.out], check=True)


if __name__ == "__main__":
    main()

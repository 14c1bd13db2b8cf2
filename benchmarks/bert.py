"""The model of bench_model.py: an encoder like BERT-base, with random weights and random tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from variants import Task


@dataclass(frozen=True)
class Size:
    layers: int
    batch: int
    tokens: int
    calibration: int

    def __str__(self) -> str:
        layers = "1 layer" if self.layers == 1 else f"{self.layers} layers"
        return f"BertModel, {layers}, {self.batch}x{self.tokens} tokens"


FULL = Size(layers=6, batch=4, tokens=128, calibration=8)
QUICK = Size(layers=1, batch=2, tokens=32, calibration=2)


class Encoder(nn.Module):
    """`BertModel` with plain tensors as its outputs, which every exporter takes."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        self.bert = BertModel(BertConfig(num_hidden_layers=layers))

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = self.bert(input_ids)
        return output.last_hidden_state, output.pooler_output


def make_task(size: Size) -> Task:
    torch.manual_seed(0)
    model = Encoder(size.layers).eval()
    shape, words = (size.batch, size.tokens), model.bert.config.vocab_size
    calibration = tuple(torch.randint(words, shape) for _ in range(size.calibration))
    return Task(model, torch.randint(words, shape), calibration, transformer=True)


def operations(model: nn.Module, size: Size) -> int:
    """Of the linear layers, which are what is quantised.

    A layer [N, K] takes N·K multiplications and as many additions for each token. One of
    BERT-base's layers has four matrices of 768x768 and two of 768x3072, 7.08 M weights, so that six
    layers and 512 tokens take 2 · 6 · 7.08 M · 512 = 43.5 G operations. Left out: the attention's
    two products, which stay in float, 2 · 2 · 128 · 768 operations for each token and layer, 1.2 G
    in all; and the pooler, which sees four tokens. The weights are 170 MB in float32, 42 in int8.
    """
    layers = model.get_submodule("bert.encoder")
    weights = sum(m.weight.numel() for m in layers.modules() if isinstance(m, nn.Linear))
    return 2 * weights * size.batch * size.tokens

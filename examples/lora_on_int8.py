"""LoRA adapters trained over a frozen int8 base, with peft as it is.

`qnn.QLinear` is an `nn.Linear`, so peft wraps it without knowing of qnn, and its gradient flows to
the input, so what stands before it learns. The task: tell from which of eight topics of Python's
help a passage comes, as the topic whose title lies nearest. At the end the base is shown to be the
same to the last bit, and the saved adapter to give the same output on a freshly converted base.

    python examples/lora_on_int8.py           # all-MiniLM-L6-v2; see quickstart.py for its weights
    python examples/lora_on_int8.py --tiny    # a random BERT of two layers, some seconds
"""

from __future__ import annotations

import argparse
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F

import qnn

from minilm import embed, help_passages, load_minilm

Encode = Callable[[list[str]], dict[str, torch.Tensor]]
CLASSES = 8


def int8_encoder(tiny: bool) -> tuple[nn.Module, Encode]:
    """A converted model, the same at each call, and what turns texts into its inputs."""
    if not tiny:
        model, tokenizer = load_minilm()
        return qnn.convert(model, "int8"), lambda texts: dict(
            tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
        )
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=2000, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=256,
    )  # fmt: skip

    def encode(texts: list[str]) -> dict[str, torch.Tensor]:
        hashed = [[zlib.crc32(word.encode()) % 1999 + 1 for word in t.split()] for t in texts]
        ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in hashed], batch_first=True)
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}

    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    return qnn.convert(model, "int8"), encode


def task() -> tuple[list[str], list[tuple[str, int]], list[tuple[str, int]]]:
    """The titles of the largest topics, and labelled passages to train on and to test on."""
    from pydoc_data.topics import topics

    passages = help_passages()
    largest = [t for t, _ in Counter(topic for topic, _ in passages).most_common(CLASSES)]
    labelled = [(text, largest.index(topic)) for topic, text in passages if topic in largest]
    titles = [topics[name].strip().split("\n")[0] for name in largest]
    return titles, [p for i, p in enumerate(labelled) if i % 4], labelled[::4]


def scores(model: nn.Module, encode: Encode, texts: list[str], titles: list[str]) -> torch.Tensor:
    """Logits `[texts, titles]`: cosines, sharpened."""
    return 20 * embed(model, encode(texts)) @ embed(model, encode(titles)).T


@torch.no_grad()
def accuracy(
    model: nn.Module, encode: Encode, test: list[tuple[str, int]], titles: list[str]
) -> float:
    model.eval()
    guesses = scores(model, encode, [text for text, _ in test], titles).argmax(-1)
    return (guesses == torch.tensor([label for _, label in test])).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description="LoRA over an int8 base.")
    parser.add_argument("--tiny", action="store_true", help="a small random BERT, no real weights")
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()

    titles, train, test = task()
    base, encode = int8_encoder(arguments.tiny)
    frozen = [(tensor, tensor.clone()) for tensor in (*base.parameters(), *base.buffers())]
    model = get_peft_model(base, LoraConfig(r=8, target_modules=["query", "value"]))
    model.print_trainable_parameters()
    print(f"accuracy before: {accuracy(model, encode, test, titles):.3f}")

    torch.manual_seed(0)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-3)
    losses = []
    model.train()
    for step in range(1, arguments.steps + 1):
        batch = [train[i] for i in torch.randperm(len(train))[:24].tolist()]
        logits = scores(model, encode, [text for text, _ in batch], titles)
        loss = F.cross_entropy(logits, torch.tensor([label for _, label in batch]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 5 == 0:
            mean = sum(losses[-5:]) / 5
            print(f"step {step:3}  loss {mean:.3f} {'#' * round(25 * mean)}")

    print(f"accuracy after: {accuracy(model, encode, test, titles):.3f}")
    untouched = all(torch.equal(now, then) for now, then in frozen)
    print(f"int8 base untouched: {untouched} ({len(frozen)} tensors)")

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        reloaded = PeftModel.from_pretrained(int8_encoder(arguments.tiny)[0], folder).eval()
    texts = [text for text, _ in test[:16]]
    with torch.no_grad():
        equal = torch.equal(*(scores(m, encode, texts, titles) for m in (model, reloaded)))
    print(f"adapter on a freshly converted base gives the same output: {equal}")


if __name__ == "__main__":
    main()

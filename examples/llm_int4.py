"""A language model on a CPU: tokens a second in float32, bfloat16, int8 and with int4 weights.

At one token after the other a CPU waits for the weights to come from memory, so what counts is how
many bytes they have. The model is a Llama with random weights, unless a folder has a real one; the
weights decide what it says and not how fast.

    pip install -e ".[examples]"
    python examples/llm_int4.py                           # 0.2 billion weights, half a minute
    python examples/llm_int4.py --folder ~/models/llama   # what from_pretrained takes
    python examples/llm_int4.py --schemes int4_weight_g32 nvfp4_weight --tokens 64

Each variant continues the same prompt with `generate`, greedily. "same tokens" is the share of
float32's tokens that a variant would have chosen too when it reads that text: one that writes its
own differs for good after the first other token. "SQNR" is that of the scores, in dB.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

import qnn


class Progress(BaseStreamer):
    """A bar of the tokens, and when each came."""

    def __init__(self, tokens: int, name: str) -> None:
        self.bar = tqdm(total=tokens, desc=f"{name:>16}", unit="token")
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        if self.times:  # the first call brings the prompt
            self.bar.update(value.numel())
        self.times.append(time.perf_counter())

    def end(self) -> None:
        self.bar.close()


def load(folder: str | None, tiny: bool) -> nn.Module:
    """The float32 model."""
    if folder is not None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(0)
    hidden, layers = (128, 2) if tiny else (1024, 12)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4 // 128 * 128,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        vocab_size=2048 if tiny else 16384,
        # Of trained models the scores differ by more than random weights make them.
        initializer_range=0.05,
    )
    return LlamaForCausalLM(config).eval()


def variants(schemes: list[str]) -> dict[str, Callable[[nn.Module], nn.Module]]:
    """Each makes its model of the float32 one, which may be changed: it is loaded anew."""
    made: dict[str, Callable[[nn.Module], nn.Module]] = {
        "float32": lambda model: model,
        "bfloat16": lambda model: model.to(torch.bfloat16),
    }
    for scheme in schemes:
        made[scheme] = lambda model, scheme=scheme: qnn.convert(model, scheme, inplace=True)
    return made


def size(model: nn.Module) -> int:
    """Bytes of the parameters, shared ones once."""
    return sum(parameter.nbytes for parameter in model.parameters())


@torch.inference_mode()
def generate(model: Any, prompt: torch.Tensor, tokens: int, name: str) -> tuple[Any, float, float]:
    """The text; the seconds to its first token; and the tokens a second after it."""
    options = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    model.generate(prompt, max_new_tokens=2, **options)  # builds and tests the kernels
    progress = Progress(tokens, name)
    text = model.generate(
        prompt, max_new_tokens=tokens, min_new_tokens=tokens, streamer=progress, **options
    )
    begun, first, *_, last = progress.times
    return text, first - begun, (tokens - 1) / (last - first)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description="Tokens a second of a language model on a CPU.")
    parser.add_argument("--folder", help="a model on disk; random weights if not given")
    parser.add_argument("--tokens", type=int, default=32, help="how many to generate")
    parser.add_argument("--prompt", type=int, default=64, help="how many it begins with")
    parser.add_argument("--schemes", nargs="+", default=["int8", "int8_weight", "int4_weight"])
    parser.add_argument("--tiny", action="store_true", help="a model of some 100,000 weights")
    arguments = parser.parse_args()
    if arguments.tokens < 3 or arguments.prompt < 1:
        parser.error("at least 3 --tokens and a --prompt of 1: fewer have no speed")

    table = []
    for name, make in variants(arguments.schemes).items():
        model: Any = make(load(arguments.folder, arguments.tiny))
        if not table:
            generator = torch.Generator().manual_seed(1)
            vocabulary = model.config.vocab_size
            prompt = torch.randint(1, vocabulary, (1, arguments.prompt), generator=generator)
        text, first, speed = generate(model, prompt, arguments.tokens, name)
        if not table:
            reference, expected = text, model(text).logits[0, arguments.prompt - 1 : -1]
        scores = model(reference).logits[0, arguments.prompt - 1 : -1].float()
        same = (scores.argmax(-1) == expected.argmax(-1)).double().mean().item()
        near = qnn.sqnr(expected, scores) if table else float("inf")
        table.append((name, size(model) / 1e6, first * 1e3, speed, same, near))
        del model
        gc.collect()

    print(f"\n{arguments.prompt} tokens of prompt, {torch.get_num_threads()} threads")
    titles = "MB", "first token, ms", "tokens/s", "same tokens", "SQNR, dB"
    print(f"{'':16}" + "".join(f"{title:>17}" for title in titles))
    for name, megabytes, first, speed, same, near in table:
        print(f"{name:16}{megabytes:17.1f}{first:17.1f}{speed:17.1f}{same:17.2f}{near:17.1f}")


if __name__ == "__main__":
    main()

"""A small GPT on Python's own documentation, trained in bfloat16 and in float8, mxfp8 and nvfp4.

The model is plain torch. One line, `qnn.convert(model, scheme, training=True, exclude="head")`,
makes the three products of every linear layer but the last quantised ones; each block is compiled
with `fullgraph=True`. All runs take the same weights and the same batches. At the end every model
is converted once more, to be deployed, judged on the validation text, and asked for some text.

    python examples/train_gpt_fp8.py                     # all, some 9 minutes of processor time
    python examples/train_gpt_fp8.py --tiny              # bfloat16 and fp8, half a minute
    python examples/train_gpt_fp8.py --scheme nvfp4      # one scheme, beside bfloat16
    python examples/train_gpt_fp8.py --resume            # go on after an interruption
    python examples/train_gpt_fp8.py --fsdp              # two processes, parameters sharded
    torchrun --nproc-per-node 8 examples/train_gpt_fp8.py --fsdp --device cuda

On a CPU float8 is emulated: the losses are those of the formats, the speed is not.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import distributed, multiprocessing, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from tqdm import tqdm

import qnn

SCHEMES = [name for name, scheme in qnn.SCHEMES.items() if scheme.trainable]
BASELINE = "bfloat16"
VOCABULARY = 256  # the bytes of UTF-8
FULL = {
    "width": 128, "depth": 2, "heads": 4, "context": 64, "batch": 8, "steps": 400, "every": 40,
    "valid": 60, "characters": 160,
}  # fmt: skip
TINY = {
    "width": 64, "depth": 2, "heads": 2, "context": 32, "batch": 8, "steps": 24, "every": 12,
    "valid": 4, "characters": 40,
}  # fmt: skip


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions: pairs of `x [..., T, D]` turned by an angle that grows along T."""
    half = x.shape[-1] // 2
    rates = 1000.0 ** -(torch.arange(half, device=x.device) / half)
    angle = torch.arange(x.shape[-2], device=x.device)[:, None] * rates
    a, b, cos, sin = *x.float().chunk(2, -1), angle.cos(), angle.sin()
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1).to(x.dtype)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY)
        for name, weight in self.named_parameters():
            if name.endswith(("proj.weight", "down.weight")):  # they write to the residual stream
                nn.init.normal_(weight, std=(2 * depth * width) ** -0.5)
            elif weight.dim() == 2:
                nn.init.normal_(weight, std=0.3 if name == "token.weight" else width**-0.5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.token(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)).float()


def build(scheme: str, a: argparse.Namespace) -> GPT:
    """The same float model for every scheme; the scheme decides how its products are computed."""
    torch.manual_seed(a.seed)
    model = GPT(a.width, a.depth, a.heads).to(a.device)
    if scheme != BASELINE:
        model = qnn.convert(model, scheme, training=True, exclude="head")
    torch.manual_seed(a.seed + a.rank)  # of what nvfp4 rounds by chance
    return model


def texts(a: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """The bytes of Python's help: every tenth topic validates, the others train."""
    ordered = list(topics.values())
    parts = [
        "\n".join(t for i, t in enumerate(ordered) if (i % 10 == 0) == held) for held in (0, 1)
    ]
    train, valid = (torch.tensor(list(part.encode())) for part in parts)
    rows = valid.unfold(0, a.context + 1, a.context)
    return train, rows[: a.valid * a.batch]


def batch(train: torch.Tensor, step: int, a: argparse.Namespace) -> torch.Tensor:
    """`[batch, context + 1]`, drawn from the number of the step alone; a rank takes its share."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(train) - a.context, (a.batch,), generator=generator)
    rows = train[starts[:, None] + torch.arange(a.context + 1)]
    return rows[a.rank :: a.world].to(a.device)


def loss_of(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next byte, in nats. Parameters are float32, products bfloat16."""
    with torch.autocast(rows.device.type, torch.bfloat16):
        logits = model(rows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def validate(model: nn.Module, valid: torch.Tensor, a: argparse.Namespace) -> float:
    losses = [loss_of(model, rows.to(a.device)) for rows in valid.split(a.batch)]
    return torch.stack(losses).mean().item()


class Trainer:
    """A model, its optimizer, and what a checkpoint holds of the run so far."""

    def __init__(self, scheme: str, a: argparse.Namespace) -> None:
        self.scheme, self.a = scheme, a
        self.model = build(scheme, a)
        torch.compiler.reset()  # of one function it keeps eight versions at most
        for block in self.model.blocks:
            # Not the whole model: equal blocks share one compilation, and the hooks of FSDP, which
            # gather the parameters of a block, cannot be in a graph.
            block.compile(fullgraph=True)
        if a.fsdp:
            mesh = init_device_mesh(a.device.type, (a.world,))
            for module in (*self.model.blocks, self.model):
                fully_shard(module, mesh=mesh)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=a.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        self.losses: list[float] = []  # of each step
        self.valid: list[tuple[int, float]] = []
        self.speed: list[float] = []  # tokens a second, between two validations
        self.path = a.out / f"{scheme}.pt"
        # What nvfp4 draws from, to round gradients by chance.
        self.random = torch.cuda if a.device.type == "cuda" else torch

    def fit(self, train: torch.Tensor, valid: torch.Tensor) -> None:
        a, start = self.a, len(self.losses)
        last = min(a.steps, a.stop or a.steps)
        bar = tqdm(
            range(start, last), self.scheme, initial=start, total=a.steps, disable=a.rank > 0
        )
        pending: list[torch.Tensor] = []
        began = time.perf_counter()
        for step in bar:
            for group in self.optimizer.param_groups:
                group["lr"] = a.lr * rate(step, a.steps)
            loss = loss_of(self.model, batch(train, step, a))
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            pending.append(loss.detach())
            if (step + 1) % a.every and step + 1 < last:
                continue
            losses = torch.stack(pending)
            if a.world > 1:
                distributed.all_reduce(losses)
                losses /= a.world
            self.losses += losses.tolist()  # the one wait for a GPU
            self.speed.append(len(pending) * a.batch * a.context / (time.perf_counter() - began))
            self.valid.append((step + 1, validate(self.model, valid, a)))
            self.save()
            bar.set_postfix(train=f"{self.losses[-1]:.3f}", valid=f"{self.valid[-1][1]:.3f}")
            pending, began = [], time.perf_counter()

    def save(self) -> None:
        """Whole tensors, whatever the number of processes, and the random state of each."""
        a, random = self.a, [self.random.get_rng_state()]
        if a.world > 1:
            random *= a.world
            distributed.all_gather_object(random, random[0])
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        model, optimizer = get_state_dict(self.model, self.optimizer, options=options)
        if a.rank == 0:
            state = {"model": model, "optimizer": optimizer, "random": random}
            state |= {"losses": self.losses, "valid": self.valid, "speed": self.speed}
            torch.save(state, self.path.with_suffix(".new"))
            self.path.with_suffix(".new").replace(self.path)  # never half a file

    def load(self) -> None:
        state = torch.load(self.path, weights_only=True)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(full_state_dict=True),
        )
        self.losses, self.valid, self.speed = state["losses"], state["valid"], state["speed"]
        if len(state["random"]) == self.a.world:
            self.random.set_rng_state(state["random"][self.a.rank])


def rate(step: int, steps: int) -> float:
    """Of the learning rate: up over a twentieth of the steps, then down along a cosine."""
    warm = max(1, steps // 20)
    turn = math.pi * max(0, step - warm) / max(1, steps - warm)
    return min(1, (step + 1) / warm) * (0.55 + 0.45 * math.cos(turn))


def deploy(run: Trainer, valid: torch.Tensor) -> dict[str, Any]:
    """The trained model in the scheme's own storage: its loss, its bytes, and some text of it."""
    a, scheme = run.a, run.scheme
    model = build(scheme, a)
    model.load_state_dict(torch.load(run.path, weights_only=True)["model"])
    if scheme != BASELINE:
        model = qnn.convert(model, scheme, exclude="head", inplace=True)
    model.eval()
    layers = [module for module in model.blocks.modules() if isinstance(module, nn.Linear)]
    size = sum(t.nbytes for layer in layers for t in layer.state_dict().values())
    if scheme == BASELINE:
        size //= 2  # it would be stored in bfloat16
    return {"loss": validate(model, valid, a), "bytes": size, "text": sample(model, a)}


@torch.no_grad()
def sample(model: nn.Module, a: argparse.Namespace) -> str:
    generator = torch.Generator().manual_seed(a.seed)
    tokens = torch.tensor([list(b"The ")], device=a.device)
    for _ in range(a.characters):
        with torch.autocast(a.device.type, torch.bfloat16):
            logits = model(tokens[:, -a.context :])[0, -1]
        chances = torch.softmax(logits.cpu() / 0.7, -1)
        drawn = torch.multinomial(chances, 1, generator=generator)
        tokens = torch.cat((tokens, drawn[None].to(a.device)), 1)
    return bytes(tokens[0].tolist()).decode(errors="replace")


def report(runs: list[Trainer], deployed: list[dict[str, Any]]) -> None:
    base = runs[0].valid[-1][1]
    titles = ("valid loss", "ratio", "deployed", "layers, kB", "tokens/s")
    print(f"\n{'':12}" + "".join(f"{title:>12}" for title in titles))
    for run, small in zip(runs, deployed, strict=True):
        loss = run.valid[-1][1]
        print(
            f"{run.scheme:12}{loss:12.4f}{loss / base:12.4f}{small['loss']:12.4f}"
            f"{small['bytes'] / 1e3:12.0f}{statistics.median(run.speed):12.0f}"
        )
    for run, small in zip(runs, deployed, strict=True):
        print(f"\n{run.scheme}: {' '.join(small['text'].split())}")


def plot(runs: list[Trainer], path: Path) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    base = dict(runs[0].valid)
    for i, run in enumerate(runs):
        colour = "black" if run.scheme == BASELINE else f"C{i - 1}"
        losses = torch.tensor(run.losses)
        width = max(1, len(losses) // 20)
        smooth = losses.unfold(0, width, 1).mean(-1)
        steps, valid = zip(*run.valid, strict=True)
        left.plot(range(width, len(losses) + 1), smooth, lw=1, color=colour, label=run.scheme)
        left.plot(steps, valid, "o", ms=3, color=colour)
        above = [(step, 100 * (loss / base[step] - 1)) for step, loss in run.valid if step in base]
        right.plot(*zip(*above, strict=True), "o-", ms=3, lw=1, color=colour, label=run.scheme)
    left.set(xlabel="step", ylabel="loss, nats a byte", title="Training (lines), validation (dots)")
    right.set(xlabel="step", ylabel="%", title=f"Validation loss above that of {BASELINE}")
    left.legend(frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)


def work(a: argparse.Namespace) -> None:
    """Every scheme in turn, in this process or as one rank of several."""
    train, valid = texts(a)
    runs, deployed = [], []
    for scheme in a.schemes:
        run = Trainer(scheme, a)
        if a.resume and run.path.exists():
            run.load()
        run.fit(train, valid)
        if a.rank == 0 and len(run.losses) == a.steps:
            runs.append(run)
            deployed.append(deploy(run, valid))
    if a.rank == 0 and len(runs) == len(a.schemes):
        report(runs, deployed)
        plot(runs, a.plot)
        print(f"\nplot: {a.plot}, checkpoints: {a.out}")


def rank_of_many(rank: int, a: argparse.Namespace, address: str) -> None:
    a.rank = rank
    torch.set_num_threads(max(1, torch.get_num_threads() // a.world))
    if a.device.type == "cuda":
        a.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)))
        torch.cuda.set_device(a.device)
    backend = "cpu:gloo,cuda:nccl" if a.device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, address, rank=rank, world_size=a.world)
    work(a)
    distributed.barrier()
    distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of gloo may still want the interpreter; one that shuts down would abort them.
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description="A small GPT in bfloat16 and in float8.")
    parser.add_argument("--scheme", action="append", choices=SCHEMES, help="all if left out")
    parser.add_argument("--tiny", action="store_true", help="a small model, few steps")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--stop", type=int, help="stop after this step, as an interruption would")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints")
    parser.add_argument("--fsdp", action="store_true", help="two processes, or those of torchrun")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--out", type=Path, default=Path("out/train_gpt_fp8"), help="checkpoints")
    parser.add_argument("--plot", type=Path, help="the picture; beside the checkpoints if left out")
    a = parser.parse_args()
    parser.set_defaults(**(TINY if a.tiny else FULL))
    a = parser.parse_args()
    a.schemes = [BASELINE, *(a.scheme or (["fp8"] if a.tiny else SCHEMES))]
    a.plot = a.plot or a.out / "losses.png"
    a.out.mkdir(parents=True, exist_ok=True)
    a.rank, a.world = 0, int(os.environ.get("WORLD_SIZE", 2)) if a.fsdp else 1
    if a.batch % a.world:
        parser.error(f"{a.world} processes cannot share a batch of {a.batch} evenly")
    if a.tiny:
        torch.set_num_threads(1)  # so little work costs more to share than to do
    if not a.fsdp:
        work(a)
    elif "RANK" in os.environ:  # torchrun
        rank_of_many(int(os.environ["RANK"]), a, "env://")
    else:
        with tempfile.TemporaryDirectory() as folder:
            multiprocessing.spawn(rank_of_many, (a, f"file://{folder}/rendezvous"), nprocs=2)


if __name__ == "__main__":
    main()

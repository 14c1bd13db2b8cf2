"""Two processes: FSDP2, DDP and tensor parallel training, checkpoints, and sharded inference.

Two workers are started once and run the checks of all tests. A check is a function of the rank; it
fails on either.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import functools
import itertools
import os
import sys
import tempfile
import time
import traceback
import unittest.mock
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from parameterized import parameterized
from torch import nn

import qnn
from qnn import functional as F

from . import zoo
from .common import need_sharded_integers

TRAINING = [scheme.name for scheme in qnn.SCHEMES.values() if scheme.trainable]
Tensors = list[torch.Tensor]
TIMEOUT = 300  # seconds a check; none takes 20 on a quiet machine


# Two workers ----------------------------------------------------------------------------------


def _work(rank: int, folder: str, calls: Any) -> None:
    log = os.open(f"{folder}/{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )
    while (call := calls.recv()) is not None:
        check, arguments = call
        try:
            torch.manual_seed(0)
            check(rank, *arguments)
            if "torch._dynamo" in sys.modules:
                torch._dynamo.reset()
            dist.barrier()
            failure = None
        except BaseException:
            failure = traceback.format_exc()
        calls.send(failure)
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    # Threads of gloo and autograd may want the GIL, and a Python that finalises ends them by abort.
    os._exit(0)


class Workers:
    """Both ranks, each waiting for calls at its end of a pipe."""

    running: Workers | None = None

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.logs = [Path(self.folder.name) / str(rank) for rank in range(2)]
        for log in self.logs:
            log.touch()
        context = mp.get_context("spawn")
        ends = [context.Pipe() for _ in range(2)]
        self.pipes = [ours for ours, _ in ends]
        self.processes = [
            context.Process(target=_work, args=(rank, self.folder.name, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(ends)
        ]
        for process in self.processes:
            process.start()
        for _, theirs in ends:
            theirs.close()  # so that ours ends when the worker does

    def call(self, check: Callable[..., None], arguments: tuple[Any, ...]) -> str | None:
        """What went wrong on the rank that said so first."""
        for pipe in self.pipes:
            pipe.send((check, arguments))
        deadline, waiting = time.monotonic() + TIMEOUT, {0, 1}
        while waiting and time.monotonic() < deadline:
            for rank in sorted(waiting):
                try:
                    if self.pipes[rank].poll(0.02):
                        failure = self.pipes[rank].recv()
                        waiting.remove(rank)
                        if failure is not None:
                            return f"rank {rank}: {failure}"
                except (EOFError, ConnectionError):
                    return f"rank {rank} died"
        return f"no answer from {sorted(waiting)} in {TIMEOUT} s" if waiting else None

    def said(self) -> str:
        return "\n".join(f"rank {log.name} said:\n{log.read_text()}" for log in self.logs)

    def stop(self, kill: bool) -> None:
        with contextlib.suppress(BrokenPipeError):
            for pipe in [] if kill else self.pipes:
                pipe.send(None)
        for process in self.processes:
            process.join(0 if kill else 20)
            process.kill()
            process.join()
        self.folder.cleanup()


def both_ranks(check: Callable[..., None], *arguments: Any) -> None:
    """Run `check(rank, *arguments)` on both; an AssertionError with all they said if one fails."""
    if Workers.running is None:
        Workers.running = Workers()
    workers = Workers.running
    failure = workers.call(check, arguments)
    if failure is not None:
        said = workers.said()
        workers.stop(kill=True)
        Workers.running = None
        raise AssertionError(f"{failure}\n{said}")


def tearDownModule() -> None:
    if Workers.running is not None:
        Workers.running.stop(kill=False)
        Workers.running = None


def mesh(*sizes: int, names: tuple[str, ...] | None = None) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


# What is trained ------------------------------------------------------------------------------


class Block(nn.Module):
    """With hidden=160 or 176, a half of which fills no block of 32 or of 16."""

    def __init__(self, width: int = 96, hidden: int = 160) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(nn.functional.gelu(self.up(x)))
        return y


def model(scheme: str) -> nn.Sequential:
    """37 rows are not shared evenly."""
    torch.manual_seed(1)
    layers = nn.Sequential(Block(), Block(), nn.Linear(96, 37))
    return qnn.convert(layers, scheme, training=True)


OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
}


def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        x = torch.randn(2, 20, 96, generator=generator)
        yield x, x[..., :37].sin() + 0.5


def seed(step: int, rank: int) -> None:
    """Where the stochastic rounding of nvfp4 starts from."""
    torch.manual_seed(100 + 2 * step + rank)


def train(call: nn.Module, optimiser: str, parts: list[slice]) -> tuple[Tensors, Tensors]:
    """The losses and the parameters of a training that takes a batch part by part."""
    step_of = OPTIMISERS[optimiser](call.parameters())
    losses = []
    for step, (x, target) in enumerate(batches()):
        for part in parts:
            seed(step, part.start or 0)
            loss = nn.functional.mse_loss(call(x[part]), target[part])
            (loss / len(parts)).backward()
            losses.append(loss.detach())
        step_of.step()
        step_of.zero_grad()
    mean = torch.stack(losses).view(-1, len(parts)).mean(1)
    return [mean], [whole(p) for p in call.parameters()]


HALVES = [slice(0, 1), slice(1, 2)]


@functools.cache
def train_alone(scheme: str, optimiser: str, halves: bool) -> tuple[Tensors, Tensors]:
    return train(model(scheme), optimiser, HALVES if halves else [slice(None)])


def whole(tensor: Any) -> torch.Tensor:
    tensor = tensor.detach()
    result: torch.Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return result


def close(what: str, got: Tensors, want: Tensors, limit: float) -> None:
    """|got − want| / |want| over all tensors."""
    a, b = (torch.cat([t.flatten() for t in tensors]) for tensors in (got, want))
    distance = ((a - b).norm() / b.norm()).item()
    print(f"{what}: {distance:.2g} of {limit}", flush=True)
    assert distance <= limit, f"{what}: off by {distance:.2g}, which is more than {limit}"


def check_training(
    rank: int, wrapped: nn.Module, scheme: str, optimiser: str, compiled: bool = False
) -> None:
    """A training on half a batch a process, against two in one process.

    One takes the halves one after the other, which is the same arithmetic; compiled, nvfp4 draws
    its noise in another order. The other takes the whole batch, where columns are quantised along
    both halves, and the noise is another again: gradients of 4 bits differ by 20%, of which AdamW's
    first steps take hardly more than the signs.
    """
    (losses,), parameters = train(wrapped, optimiser, [HALVES[rank]])
    dist.all_reduce(losses)
    for halves in (True, False):
        want_losses, want = train_alone(scheme, optimiser, halves)
        exact = halves and not (compiled and scheme == "nvfp4")
        limit = 1e-6 if exact else 0.03 if scheme == "nvfp4" else 0.01
        close(f"losses, {halves=}", [losses / 2], want_losses, min(limit, 0.01))
        close(f"parameters, {halves=}", parameters, want, limit)


# FSDP2 and DDP --------------------------------------------------------------------------------


def fully_sharded(
    rank: int, scheme: str, optimiser: str, checkpointed: bool = False, backend: str | None = None
) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.fsdp import fully_shard

    layers: Any = model(scheme)
    for i in range(2):
        if checkpointed:
            layers[i] = checkpoint_wrapper(layers[i])
        if backend is not None:
            layers[i].compile(fullgraph=True, backend=backend)
        fully_shard(layers[i], mesh=mesh(2))
    fully_shard(layers, mesh=mesh(2))
    check_training(rank, layers, scheme, optimiser, backend is not None)


def compiled_outside(rank: int, scheme: str) -> None:
    """FSDP2's hooks break the graph, so that fullgraph=True is for the blocks alone."""
    from torch.distributed.fsdp import fully_shard

    x, _ = next(batches())
    x = x[HALVES[rank]]
    layers: Any = fully_shard(model(scheme), mesh=mesh(2))
    gradients = []
    for call in (layers, torch.compile(layers, backend="aot_eager")):
        call(x).square().mean().backward()
        gradients.append([whole(p.grad) for p in layers.parameters()])
        layers.zero_grad()
    close("gradients", *reversed(gradients), 1e-6)


def gathered_in_bfloat16(rank: int, scheme: str) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    layers: Any = fully_shard(model(scheme), mesh=mesh(2), mp_policy=policy)
    x, _ = next(batches())
    got = layers(x[HALVES[rank]])
    want = model(scheme).bfloat16()(x[HALVES[rank]].bfloat16())
    assert got.dtype == torch.bfloat16, got.dtype
    assert torch.equal(got, want)
    got.square().mean().backward()
    for name, parameter in layers.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert whole(parameter.grad).norm() > 0, name


class TestFSDP2:
    @parameterized.expand(itertools.product(TRAINING, OPTIMISERS))
    def test_trains(self, scheme: str, optimiser: str) -> None:
        both_ranks(fully_sharded, scheme, optimiser)

    @parameterized.expand(TRAINING)
    def test_activation_checkpointing(self, scheme: str) -> None:
        both_ranks(fully_sharded, scheme, "sgd", True)

    @parameterized.expand([("mxfp8", False), ("nvfp4", True)])
    def test_compiled_blocks(self, scheme: str, checkpointed: bool) -> None:
        both_ranks(fully_sharded, scheme, "adamw", checkpointed, "aot_eager")

    def test_blocks_compiled_by_inductor(self) -> None:
        both_ranks(fully_sharded, "fp8", "sgd", True, "inductor")

    def test_compiled_outside(self) -> None:
        both_ranks(compiled_outside, "fp8")

    @parameterized.expand(["fp8", "mxfp8", "nvfp4"])
    def test_gathered_in_bfloat16(self, scheme: str) -> None:
        both_ranks(gathered_in_bfloat16, scheme)


def replicated(rank: int, scheme: str, optimiser: str, compiled: bool) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    # Small buckets, at each of which Dynamo splits the graph.
    with unittest.mock.patch.object(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1 << 14):
        wrapped = nn.parallel.DistributedDataParallel(model(scheme), bucket_cap_mb=1 / 64)
        if compiled:
            graphs = CompileCounterWithBackend("aot_eager")
            wrapped.compile(backend=graphs)
        check_training(rank, wrapped, scheme, optimiser, compiled)
    assert not compiled or graphs.frame_count > 2, graphs.frame_count


class TestDDP:
    @parameterized.expand(itertools.product(TRAINING, OPTIMISERS))
    def test_trains(self, scheme: str, optimiser: str) -> None:
        both_ranks(replicated, scheme, optimiser, False)

    def test_compiled(self) -> None:
        both_ranks(replicated, "mxfp8", "sgd", True)


# Tensor parallel ------------------------------------------------------------------------------


def parallel(block: Block, over: Any, **options: Any) -> Any:
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    up = ColwiseParallel(
        input_layouts=options.get("layout"), use_local_output=options.get("local", True)
    )
    down = RowwiseParallel(output_layouts=options.get("layout"))
    return parallelize_module(block, over, {"up": up, "down": down})


def by_hand(block: Block, x: torch.Tensor, scheme: str) -> torch.Tensor:
    """What two processes compute of a block, one after the other, each with its own noise."""
    noise = []
    for rank in range(2):
        seed(0, rank)
        noise.append(torch.get_rng_state())

    def local(rank: int, *operands: torch.Tensor) -> torch.Tensor:
        torch.set_rng_state(noise[rank])
        y = F.training_linear(*operands, scheme=scheme)
        noise[rank] = torch.get_rng_state()
        return y

    up = zip(block.up.weight.chunk(2), block.up.bias.chunk(2), strict=True)
    hidden = [nn.functional.gelu(local(r, x, w, b)) for r, (w, b) in enumerate(up)]
    down = enumerate(zip(hidden, block.down.weight.chunk(2, 1), strict=True))
    y: torch.Tensor = sum(local(r, h, w) for r, (h, w) in down) + block.down.bias
    return y


def step(block: nn.Module, y: torch.Tensor, x: torch.Tensor, dy: torch.Tensor) -> Tensors:
    """The output, the gradients, and the parameters behind a step of the optimiser."""
    y.backward(dy)
    gradients = [x.grad, *(p.grad for p in block.parameters())]
    torch.optim.AdamW(block.parameters(), lr=1e-3).step()
    return [whole(t) for t in (y, *gradients, *block.parameters())]


NAMES = ["y", "dx", *(f"{d}{w}.{p}" for d in "d " for w in ("up", "down") for p in ("w", "b"))]


def tensor_parallel(rank: int, scheme: str, kind: str, hidden: int = 160) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    torch.manual_seed(3)
    plain = Block(hidden=176 if scheme == "nvfp4" else hidden)
    hand, single, split = (
        qnn.convert(copy.deepcopy(plain), scheme, training=True) for _ in range(3)
    )
    x, dy = torch.randn(4, 10, 96), torch.randn(4, 10, 96)
    over, options, given = mesh(2), {}, x.clone()
    if kind == "sequence":  # each process holds half of the tokens outside the two layers
        options["layout"] = Shard(1)
        given = x.chunk(2, 1)[rank].clone()
    elif kind == "dtensor":
        options["local"] = False
        given = distribute_tensor(x, over, [Replicate()])
    elif kind == "fsdp":
        both = mesh(1, 2, names=("dp", "tp"))
        over = both["tp"]
    split = parallel(split, over, **options)
    if kind == "fsdp":
        fully_shard(split, mesh=both["dp"])
    elif kind in ("aot_eager", "inductor"):
        split.compile(fullgraph=True, backend=kind)

    seed(0, rank)
    given.requires_grad_()
    y = split(given)
    if kind == "sequence":
        got = step(split, y, given, dy.chunk(2, 1)[rank])
        got[:2] = [whole(DTensor.from_local(part, over, [Shard(1)])) for part in got[:2]]
    else:
        got = step(split, y, given, dy)
    # torch 2.11 gathers the gradient of a weight that is cut unevenly along its columns.
    if hidden % 2 == 0 or torch.__version__ >= "2.12":
        for parameter in split.parameters():
            assert parameter.grad.placements == parameter.placements

    given = x.clone().requires_grad_()
    want = step(hand, by_hand(hand, given, scheme), given, dy)
    # Compiled, the noise is drawn in another order.
    if scheme != "nvfp4" or kind not in ("aot_eager", "inductor"):
        for name, a, b in zip(NAMES, got, want, strict=True):
            close(name, [a], [b], 1e-6)

    # Whatever the shards, the error against float arithmetic is that of one process.
    given = x.clone().requires_grad_()
    one = step(single, single(given), given, dy)
    given = x.clone().requires_grad_()
    exact = step(plain, plain(given), given, dy)
    for name, a, b, c in zip(NAMES[:5], got, one, exact, strict=False):
        mine, other = qnn.sqnr(c, a), qnn.sqnr(c, b)
        assert mine > other - 1, f"{name}: {mine:.1f} dB in two processes, {other:.1f} dB in one"
    close("parameters", got[6:], one[6:], 0.03 if scheme == "nvfp4" else 0.01)


def uneven(rank: int) -> None:
    """81 and 80 hidden features; a local output does not say so, and is refused."""
    tensor_parallel(rank, "fp8", "dtensor", 161)
    split = parallel(qnn.convert(Block(hidden=161), "fp8", training=True), mesh(2))
    with pytest.raises(ValueError, match=r"must be \[..., 161\], got \(2, 16[02]\)"):
        split(torch.randn(2, 96))


def less_than_a_row_each(rank: int, scheme: str) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    single = qnn.Linear(64, 1, scheme=scheme)
    split = qnn.Linear(64, 1, scheme=scheme)
    split.load_state_dict(single.state_dict())
    split = parallelize_module(split, mesh(2), ColwiseParallel(use_local_output=False))
    x = torch.randn(5, 64)
    results = []
    for layer in (split, single):
        seed(0, 0)
        given = x.clone().requires_grad_()
        y = layer(given)
        y.sum().backward()
        results.append([whole(t) for t in (y, given.grad, layer.weight.grad, layer.bias.grad)])
    for name, a, b in zip(("y", "dx", "dw", "db"), *results, strict=True):
        close(name, [a], [b], 1e-6)


def other_placements(rank: int, scheme: str) -> None:
    """Each placement of the weight with each of the input, None for a plain tensor."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.manual_seed(4)
    plain, dy = nn.Linear(32, 48), torch.randn(8, 48)
    over, placements = mesh(2), (Shard(0), Shard(1), Replicate())
    for of_weight, of_x, dtype in itertools.product(
        placements, (*placements, None), (torch.float32, torch.bfloat16)
    ):
        layer = qnn.Linear(32, 48, scheme=scheme)
        of_bias = of_weight if of_weight == Shard(0) else Replicate()
        layer.weight = nn.Parameter(distribute_tensor(plain.weight.detach(), over, [of_weight]))
        layer.bias = nn.Parameter(distribute_tensor(plain.bias.detach(), over, [of_bias]))
        x = torch.randn(8, 32).to(dtype)
        given: Any = x.clone() if of_x is None else distribute_tensor(x, over, [of_x])
        given.requires_grad_()
        y = layer(given)
        assert y.dtype == dtype, f"{y.dtype} of {dtype}"
        y.backward(distribute_tensor(dy.to(dtype), over, [Replicate()]))
        x = x.float()
        want = plain(x).detach(), dy @ plain.weight.detach(), dy.mT @ x, dy.sum(0)
        got = y, given.grad, layer.weight.grad, layer.bias.grad
        assert all(p.grad.placements == p.placements for p in layer.parameters())
        assert of_x is None or given.grad.placements == (of_x,)
        for name, a, b in zip(("y", "dx", "dw", "db"), got, want, strict=True):
            db = qnn.sqnr(b, whole(a).float())
            assert db > 20, f"weight {of_weight}, x {of_x} {dtype}: {db:.1f} dB in {name}"


def half_distributed(rank: int) -> None:
    """The input or the weight alone: an error that says so."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    layer, x = qnn.Linear(32, 48), torch.randn(2, 32)
    with pytest.raises(ValueError, match="x is a DTensor, weight a plain tensor; parallelize"):
        layer(distribute_tensor(x, mesh(2), [Replicate()]))
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh(2), [Shard(0)]))
    with pytest.raises(ValueError, match="bias a plain tensor; distribute both"):
        layer(x)
    both = mesh(1, 2, names=("dp", "tp"))
    weight = distribute_tensor(torch.randn(48, 32), both, [Shard(0), Shard(1)])
    with pytest.raises(ValueError, match="a mesh of 2 axes"):
        F.training_linear(x, weight)


def tensor_parallel_of_size_one(rank: int, scheme: str) -> None:
    from torch.distributed.fsdp import fully_shard

    both = mesh(2, 1, names=("dp", "tp"))
    layers: Any = model(scheme)
    for i in range(2):
        fully_shard(parallel(layers[i], both["tp"]), mesh=both["dp"])
    fully_shard(layers, mesh=both["dp"])
    check_training(rank, layers, scheme, "adamw")


class TestTensorParallel:
    @parameterized.expand(itertools.product(TRAINING, ["plain", "dtensor", "sequence", "fsdp"]))
    def test_block(self, scheme: str, kind: str) -> None:
        both_ranks(tensor_parallel, scheme, kind)

    @parameterized.expand([("mxfp8", "aot_eager"), ("nvfp4", "aot_eager"), ("fp8", "inductor")])
    def test_compiled(self, scheme: str, backend: str) -> None:
        both_ranks(tensor_parallel, scheme, backend)

    def test_uneven(self) -> None:
        both_ranks(uneven)

    @parameterized.expand(TRAINING)
    def test_less_than_a_row_each(self, scheme: str) -> None:
        both_ranks(less_than_a_row_each, scheme)

    @parameterized.expand(["fp8", "mxfp8"])
    def test_other_placements(self, scheme: str) -> None:
        both_ranks(other_placements, scheme)

    def test_half_distributed(self) -> None:
        both_ranks(half_distributed)

    def test_mesh_of_two_axes(self) -> None:
        both_ranks(tensor_parallel_of_size_one, "fp8")


# Checkpoints ----------------------------------------------------------------------------------


def saved(rank: int, kind: str, folder: str) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    layers: Any = model("fp8")
    if kind == "fsdp":
        fully_shard(layers, mesh=mesh(2))
    else:
        parallel(layers[0], mesh(2))
    dcp.save(get_model_state_dict(layers), checkpoint_id=folder)


class TestCheckpoint:
    @parameterized.expand(["fsdp", "tensor_parallel"])
    def test_loads_in_one_process(self, kind: str) -> None:
        import torch.distributed.checkpoint as dcp

        with tempfile.TemporaryDirectory() as folder:
            both_ranks(saved, kind, folder)
            for fresh in (
                nn.Sequential(Block(), Block(), nn.Linear(96, 37)),
                qnn.convert(
                    nn.Sequential(Block(), Block(), nn.Linear(96, 37)), "mxfp8", training=True
                ),
            ):
                state = fresh.state_dict()
                dcp.load(state, checkpoint_id=folder, no_dist=True)
                fresh.load_state_dict(state)
                for a, b in zip(fresh.parameters(), model("fp8").parameters(), strict=True):
                    assert torch.equal(a, b)


# Sharded inference ----------------------------------------------------------------------------


def sharded_inference(rank: int, scheme: str) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(5)
    width, hidden = (128, 256) if "int4" in scheme else (96, 160)
    layers = nn.Sequential(Block(width, hidden), Block(width, hidden)).eval()
    x = torch.randn(2, 20, width)
    if scheme.endswith("_static"):
        layers = qnn.convert(qnn.calibrate(qnn.prepare(layers, scheme), [x]))
    else:
        layers = qnn.convert(layers, scheme)
    want = layers(x)
    want.square().mean().backward()
    gradients = [p.grad for p in layers.parameters() if p.grad is not None]
    before = {name: tensor.detach().clone() for name, tensor in layers.named_parameters()}
    for block in layers:
        fully_shard(block, mesh=mesh(2))
    fully_shard(layers, mesh=mesh(2))
    layers.zero_grad()
    with torch.no_grad():
        assert torch.equal(layers(x), want)
    layers(x).square().mean().backward()
    biases = [whole(p.grad) for p in layers.parameters() if p.grad is not None]
    close("gradients of biases", biases, gradients, 1e-6)
    for name, tensor in layers.state_dict().items():
        rows = before[name].chunk(2)[rank:][:1]
        mine = tensor.to_local()
        assert mine.dtype == before[name].dtype, name
        assert [t.tolist() for t in rows] == [mine.tolist()] * len(rows), name
        assert rows or mine.numel() == 0, name


def sharded_kind(rank: int, name: str, scheme: str) -> None:
    """A model of the zoo, each layer by itself and as a whole; FSDP2 refuses convolutions,
    unless they are kept whole."""
    from torch.distributed.fsdp import fully_shard

    layers, x = zoo.quantised(name, scheme), zoo.ZOO[name].inputs(3)
    want = layers(*x)
    inside_first = [m for m in reversed(list(layers.modules())) if isinstance(m, qnn.Quantized)]
    if any(isinstance(each, nn.Conv2d) for each in inside_first):  # whose weights are channels-last
        with pytest.raises(NotImplementedError, match="does not support non-contiguous parameters"):
            fully_shard(layers, mesh=mesh(2))
        layers = zoo.quantised(name, scheme)
        frozen = {each for each in layers.parameters() if not each.requires_grad}
        assert torch.equal(fully_shard(layers, mesh=mesh(2), ignored_params=frozen)(*x), want)
        return
    for layer in (*inside_first, layers):
        fully_shard(layer, mesh=mesh(2))
    assert all(hasattr(p, "to_local") for p in layers.parameters())
    assert torch.equal(layers(*x), want)


class TestInference:
    @parameterized.expand(zoo.FIRST)
    def test_every_kind(self, name: str, scheme: str) -> None:
        need_sharded_integers()
        both_ranks(sharded_kind, name, scheme)

    @parameterized.expand(qnn.SCHEMES)
    def test_fsdp2(self, scheme: str) -> None:
        layer = qnn.QLinear(128, 32, scheme=scheme)
        if not all(part.is_floating_point() for part in layer.parameters()):
            need_sharded_integers()
        both_ranks(sharded_inference, scheme)


# Calibration and quantisation-aware training ----------------------------------------------------

OBSERVERS = ("minmax", "moving_average", "histogram", "mse", "percentile")


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(6, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.rnn(x)[0])
        return result


def reader(observer: str = "minmax", *, learnable: bool = False, qat: bool = False) -> nn.Module:
    torch.manual_seed(0)
    spec = functools.partial(qnn.QuantSpec, observer=observer, learnable=learnable)
    parts = {"*": spec(torch.uint8), "*_linear": spec(torch.int16, symmetric=True)}
    return qnn.prepare(Reader(), parts=parts, qat=qat)


def shown(rank: int, count: int) -> Tensors:
    """Batches whose ranges differ between ranks, in both directions."""
    generator = torch.Generator().manual_seed(rank)
    batches = [torch.rand(9, 4, 6, generator=generator) for _ in range(count)]
    return [batch * (5 * rank + 1) - rank for batch in batches]


def alike(model: nn.Module) -> None:
    """All ranks hold the same state."""
    mine = {name: tensor.tolist() for name, tensor in model.state_dict().items()}
    every: list[Any] = [None, None]
    dist.all_gather_object(every, mine)
    assert every[0].keys() == every[1].keys()
    differing = [name for name in mine if every[0][name] != every[1][name]]
    assert not differing, differing


def calibrated_together(rank: int, observer: str, counts: tuple[int, int], wrapped: bool) -> None:
    together, alone = reader(observer), reader(observer)
    given = nn.parallel.DistributedDataParallel(together) if wrapped else together
    assert qnn.calibrate(given, shown(rank, counts[rank])) is given
    alike(together)
    for each, count in enumerate(counts):
        for batch in shown(each, count):
            if observer == "moving_average":  # which knows an order: added up by their counts
                one = reader(observer)
                one(batch)
                for mine, other in zip(points(alone), points(one), strict=True):
                    mine.merge(other)
            else:
                alone(batch)
    if observer == "moving_average" and max(counts) > 1:
        return
    for mine, other in zip(points(together), points(alone), strict=True):
        for tensor, want in zip(mine.buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(tensor, want, rtol=1e-6, atol=0)
    state = {name: tensor.clone() for name, tensor in together.state_dict().items()}
    batches = shown(rank, 1)
    qnn.calibrate(given, batches if rank else [])  # what was common before counts once
    alike(together)
    for name, tensor in together.state_dict().items():
        if name.endswith("input_l0.observer.count"):
            assert int(tensor - state[name]) == batches[0].numel(), name


def points(model: nn.Module) -> list[qnn.FakeQuantize]:
    return [module for module in model.modules() if isinstance(module, qnn.FakeQuantize)]


def not_calibrated(rank: int) -> None:
    """Every rank raises, none waits, and each keeps what it has."""
    model, batches = reader(), shown(rank, 2)
    broken = [batches[0], batches[1][..., :3]] if rank else batches
    words = "must be equal to input_size" if rank else "process 1 of 2 has failed, .*input_size"
    with pytest.raises(RuntimeError, match=words):
        qnn.calibrate(model, broken)
    assert int(points(model)[0].observer.count) == (1 if rank else 2) * batches[0].numel()
    with pytest.raises(ValueError, match="there are no batches"):
        qnn.calibrate(model, [])
    other = reader("mse" if rank else "minmax")
    with pytest.raises(RuntimeError, match="process 1 of 2 has other observation points"):
        qnn.calibrate(other, batches)
    frozen = qnn.freeze_observers(reader()) if rank else reader()
    with pytest.raises((RuntimeError, ValueError), match="frozen or fixed"):
        qnn.calibrate(frozen, batches)
    if rank == 0:
        qnn.calibrate(model, batches, sync=False)
    qnn.calibrate(model, batches, sync=dist.group.WORLD)
    alike(model)


def trained_together(rank: int, observer: str, learnable: bool) -> None:
    model = reader(observer, learnable=learnable, qat=True).train()
    parallel = nn.parallel.DistributedDataParallel(model)
    optimiser = torch.optim.SGD(parallel.parameters(), 1e-2)
    for batch in shown(rank, 3):
        parallel(batch).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
        alike(model)
    _, high = model.rnn.parts()["input"].observer.seen()
    assert high > 2.5  # rank 0 has seen 1 at most
    parallel.eval()(shown(rank, 1)[0])
    qnn.freeze_observers(model)
    parallel.train()(shown(0, 1)[0] * 100)
    alike(model)
    qnn.convert(model)


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, 6, 3, bias=False), nn.BatchNorm1d(6, eps=1e-3)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.norm(self.conv(x)).relu().mean(-1))
        return result


def graph_trained_together(rank: int) -> None:
    """A graph that is prepared for training; its BatchNorm normalises by each process's batch."""
    batches = [batch.transpose(1, 2)[:, :4] for batch in shown(rank, 3)]
    program = torch.export.export(
        Convolved(), (batches[0],), dynamic_shapes=({0: torch.export.Dim.AUTO},)
    )
    model: Any = qnn.pt2e.prepare_qat_pt2e(program, qnn.pt2e.Int8Quantizer("int8_static"))
    parallel = nn.parallel.DistributedDataParallel(model)
    optimiser = torch.optim.SGD(parallel.parameters(), 1e-2)
    for batch in batches:
        parallel(batch).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    parallel.eval()(batches[0])  # the buffers of rank 0 are sent at the start of a forward
    weights = [p.detach().flatten().tolist() for p in model.parameters()]
    every: list[Any] = [None, None]
    dist.all_gather_object(every, weights)
    assert every[0] == every[1]
    _, high = model.conv.input_quantize.observer.seen()
    assert high > 2.5  # rank 0 has seen 1 at most
    x = shown(0, 1)[0].transpose(1, 2)[:, :4]
    want = model(x)
    assert qnn.sqnr(want, qnn.pt2e.convert_pt2e(model)(x)) > 50


def graph_calibrated_together(rank: int, by_hand: bool) -> None:
    """Each process shows its own batches; the integers are those of one that has seen all."""
    everything = [[b.transpose(1, 2)[:, :4] for b in shown(each, 2)] for each in (0, 1)]
    torch.manual_seed(0)
    net, sizes = Convolved().eval(), ({0: torch.export.Dim.AUTO},)
    program = torch.export.export(net, (everything[0][0],), dynamic_shapes=sizes)

    def prepared() -> Any:
        return qnn.pt2e.prepare_pt2e(program, qnn.pt2e.Int8Quantizer("int8_static"))

    together, alone = prepared(), prepared()
    qnn.calibrate(together, everything[rank], sync=not by_hand)
    if by_hand:  # as a program of the user's own merges
        states: list[Any] = [None, None]
        dist.all_gather_object(states, together.state_dict())
        other = prepared()
        together.load_state_dict(states[0]), other.load_state_dict(states[1])
        for mine, its in zip(points(together), points(other), strict=True):
            mine.merge(its)
    qnn.calibrate(alone, [*everything[0], *everything[1]], sync=False)
    alike(together)
    got, want = (qnn.pt2e.convert_pt2e(each) for each in (together, alone))
    for name, value in want.state_dict().items():
        torch.testing.assert_close(got.state_dict()[name], value, rtol=1e-6, atol=0, msg=name)
    assert torch.equal(got(everything[0][0]), want(everything[0][0]))


def observed_by_calls(rank: int) -> None:
    """Without `calibrate`, in the forward of DDP alone."""
    model = reader()
    parallel = nn.parallel.DistributedDataParallel(model)
    with torch.no_grad():
        for batch in shown(rank, 2):
            parallel(batch)
    alike(model)
    want = reader()
    for batch in (*shown(0, 2), *shown(1, 2)):
        want(batch)
    for mine, other in zip(points(model), points(want), strict=True):
        assert torch.equal(mine.qparams()[0], other.qparams()[0])
        assert torch.equal(mine.observer.count, other.observer.count)


def compiled_together(rank: int) -> None:
    """A graph breaks where the processes are added up, and is whole after that."""
    parts = {"input": qnn.QuantSpec(torch.int8, learnable=True)}
    model = qnn.prepare(nn.Sequential(nn.Linear(6, 4)), parts=parts, qat=True)
    parallel = torch.compile(nn.parallel.DistributedDataParallel(model.train()), backend="eager")
    parallel(shown(rank, 1)[0]).square().mean().backward()
    alike(model)
    qnn.freeze_observers(model)
    torch._dynamo.reset()
    frozen = nn.parallel.DistributedDataParallel(
        torch.compile(model, fullgraph=True, backend="eager")
    )
    frozen(shown(rank, 1)[0]).square().mean().backward()
    alike(model)
    torch._dynamo.reset()
    qnn.unfreeze_observers(model)
    with pytest.raises(Exception, match="ends that"):
        frozen(shown(rank, 1)[0])


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, swap: bool) -> torch.Tensor:
        result: torch.Tensor = self.a(self.b(x)) if swap else self.b(self.a(x))
        return result


def other_ways(rank: int) -> None:
    model = qnn.prepare(Branches(), qat=True).train()
    with pytest.raises(RuntimeError, match="another process observes another part"):
        nn.parallel.DistributedDataParallel(model)(torch.randn(3, 4), bool(rank))


def continued(rank: int) -> None:
    """From calibration to training: the same start on each rank."""
    calibrated = qnn.calibrate(reader(), shown(rank, 2))
    model = qnn.prepare(calibrated, qat=True).train()
    alike(model)
    parallel = nn.parallel.DistributedDataParallel(model)
    parallel(shown(rank, 1)[0]).square().mean().backward()
    alike(model)


class TestCalibration:
    @parameterized.expand(
        [
            (observer, counts, wrapped)
            for observer in OBSERVERS
            for counts, wrapped in (((1, 1), False), ((0, 2), True))
        ]
    )
    def test_ranges_are_those_of_all_ranks(
        self, observer: str, counts: tuple[int, int], wrapped: bool
    ) -> None:
        both_ranks(calibrated_together, observer, counts, wrapped)

    def test_errors_reach_every_rank(self) -> None:
        both_ranks(not_calibrated)

    @parameterized.expand([("moving_average", True), ("mse", False), ("histogram", True)])
    def test_grids_in_training_are_alike(self, observer: str, learnable: bool) -> None:
        both_ranks(trained_together, observer, learnable)

    def test_a_graph(self) -> None:
        both_ranks(graph_trained_together)

    @parameterized.expand([(False,), (True,)])
    def test_a_graph_that_is_calibrated(self, by_hand: bool) -> None:
        both_ranks(graph_calibrated_together, by_hand)

    def test_compiled_steps(self) -> None:
        both_ranks(compiled_together)

    def test_plain_calls(self) -> None:
        both_ranks(observed_by_calls)

    def test_ranks_that_take_other_ways(self) -> None:
        both_ranks(other_ways)

    def test_calibrated_then_trained(self) -> None:
        both_ranks(continued)

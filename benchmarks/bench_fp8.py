"""Low precision on a GPU: training a linear layer and a Llama-style block, and deployed weights.

    python benchmarks/bench_fp8.py                      # docs/benchmarks/bench_fp8.{csv,md}
    python benchmarks/bench_fp8.py --everywhere         # compiled variants in every size
    python benchmarks/bench_fp8.py --budget 300         # begin no case after so many seconds
    python benchmarks/bench_fp8.py --only 'fp8|torchao' # some variants, and bfloat16
    python benchmarks/bench_fp8.py --tiny               # a CPU: that it runs, and nothing else

A training row is one step: the forward and the gradients to the input and to every parameter, all
casts included. `products` is no layer but what cannot be left out of one: its three scaled products
alone, on operands that are quantised already. An inference row reads each weight from memory: the
calls go through so many copies that each has left the L2 cache before its next turn; `graph` is the
replay of a CUDA graph of them.

A variant has no time where its output or a gradient is too far from float32, or where the self-test
of a kernel that it would use is red on this GPU. Without a GPU float8 is emulated: sizes are tiny,
no aim is judged, and nothing is written unless `--out` says where.

Counts. A step of `y = x · wᵀ` takes three products of 2·M·N·K operations: at M = 16384 and
K = N = 8192 that is 6.6 T. At M = 1 a layer reads N·K weights, 2 bytes each in bfloat16, 1 in
float8 with 4 a row for the scale, and 0.5 + 1/16 in nvfp4: at best 2 and 3.6 times as fast.
"""

from __future__ import annotations

import copy
import csv
import dataclasses
import functools
import gc
import importlib
import logging
import math
import re
import time
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import qnn
from qnn.kernels import OPS, SCHEMES
from qnn.kernels.cuda import backends
from qnn.kernels.formats import Format

from cuda_timing import Gpu, captured, clock_mhz, interleave, peak_megabytes
from harness import (
    Effort,
    Machine,
    Measurement,
    Run,
    Unavailable,
    Variant,
    argument_parser,
    command_line,
    progress,
)
from report import number, table

BFLOAT16 = "nn.Linear"
TENSORWISE, ROWWISE = "torchao tensorwise", "torchao rowwise"
WEIGHT_ONLY = "torchao float8 weight"
ENGINE = "TransformerEngine current"
TRAINED = tuple(scheme.name for scheme in SCHEMES.values() if scheme.trainable)
DEPLOYED = ("fp8_weight", "nvfp4_weight")
# The torchao variant that a qnn scheme stands against: that of the same granularity, or else the
# nearest that torchao trains with on Hopper.
PEERS = {f"qnn {scheme}": ROWWISE for scheme in TRAINED} | {
    "qnn fp8_tensor": TENSORWISE,
    ENGINE: TENSORWISE,
    **{f"qnn {scheme}": WEIGHT_ONLY for scheme in DEPLOYED},
    **{peer: peer for peer in (ROWWISE, TENSORWISE, WEIGHT_ONLY)},
}

# The lowest SQNR in dB of an output or gradient, of normal data: 3 dB or more under what the
# references give, which moves by 1 dB from K = N = 64 to 1024. A lost scale, term or gradient costs
# far more. In a block errors go through seven layers: up to 7.4 dB less was seen there.
FLOORS = {
    BFLOAT16: 40.0,
    "qnn fp8": 25.0,
    "qnn fp8_tensor": 21.0,
    "qnn fp8_block": 25.0,
    "qnn mxfp8": 25.0,
    "qnn nvfp4": 12.0,
    "qnn fp8_weight": 28.0,
    "qnn nvfp4_weight": 17.0,
    TENSORWISE: 21.0,
    ROWWISE: 25.0,
    WEIGHT_ONLY: 28.0,
    ENGINE: 21.0,
}
BLOCK_LOSS = 9.0
EMULATED = "float8 is emulated on this CPU"


# -- cases ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A training step of one linear layer."""

    m: int
    k: int
    n: int
    compiled: bool = True
    section = "Training: one linear layer"

    def __str__(self) -> str:
        return f"M={self.m}, {self.k}->{self.n}"


@dataclass(frozen=True)
class Llama:
    """A training step of one block."""

    batch: int
    length: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    compiled: bool = True
    section = "Training: a Llama-style block"

    def __str__(self) -> str:
        return (
            f"hidden {self.hidden}, {self.heads} heads, {self.kv_heads} of keys, MLP {self.ffn}; "
            f"{self.batch} sequences of {self.length}"
        )


@dataclass(frozen=True)
class Decode:
    """A few rows through one layer, with its weight in memory."""

    m: int
    k: int
    n: int
    compiled: bool = True
    section = "Inference: weights from memory"

    def __str__(self) -> str:
        return f"M={self.m}, {self.k}->{self.n}"


Case = Layer | Llama | Decode

AIMED = Layer(16384, 8192, 8192)
_DECODE_ROWS = (1, 2, 4, 8, 16, 64)
_DECODE_SIZES = ((8192, 8192), (4096, 14336), (4096, 4096))


def _cases() -> tuple[Case, ...]:
    """The most telling ones first: a run may have to end before the last."""
    first = (
        AIMED,
        Llama(4, 2048, hidden=4096, heads=32, kv_heads=8, ffn=14336),
        *(Decode(m, *_DECODE_SIZES[0]) for m in _DECODE_ROWS),
        Layer(1024, 1024, 1024),
        Layer(8192, 4096, 14336),
        *(Decode(m, *_DECODE_SIZES[1]) for m in _DECODE_ROWS),
        Layer(2048, 4096, 4096),
        Layer(512, 512, 512, compiled=False),
    )
    grid = [
        Layer(m, k, n, compiled=False)
        for m in (2048, 8192, 16384)
        for k, n in ((4096, 4096), (8192, 8192), (4096, 14336))
    ]
    known = {(c.m, c.k, c.n) for c in first if isinstance(c, Layer)}
    last = [Decode(m, *_DECODE_SIZES[2]) for m in _DECODE_ROWS]
    return (*first, *(c for c in grid if (c.m, c.k, c.n) not in known), *last)


TINY: tuple[Case, ...] = (
    Layer(16, 64, 64),
    Llama(1, 16, hidden=64, heads=2, kv_heads=1, ffn=64, compiled=False),
    Decode(1, 64, 64),
)


# -- models --------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Causal, with fewer heads of keys and values than of queries."""

    def __init__(self, hidden: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.size = hidden // heads
        self.q = nn.Linear(hidden, hidden, bias=False)
        self.k = nn.Linear(hidden, kv_heads * self.size, bias=False)
        self.v = nn.Linear(hidden, kv_heads * self.size, bias=False)
        self.o = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            y.unflatten(-1, (-1, self.size)).transpose(1, 2)
            for y in (self.q(x), self.k(x), self.v(x))
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, ffn, bias=False)
        self.up = nn.Linear(hidden, ffn, bias=False)
        self.down = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """A block of Llama 3, without the rotary embedding, which costs every variant the same."""

    def __init__(self, case: Llama) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.RMSNorm(case.hidden, eps=1e-5) for _ in range(2))
        self.attention = Attention(case.hidden, case.heads, case.kv_heads)
        self.mlp = SwiGLU(case.hidden, case.ffn)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def with_layers(module: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """`module`, or a copy around the same parameters, with what `make` makes of linear layers."""
    if isinstance(module, nn.Linear):
        return make(module)
    twin = copy.deepcopy(module, {id(p): p for p in module.parameters()})
    linears = [name for name, child in twin.named_modules() if isinstance(child, nn.Linear)]
    for name in linears:
        parent, _, last = name.rpartition(".")
        setattr(twin.get_submodule(parent), last, make(twin.get_submodule(name)))  # type: ignore[arg-type]
    return twin


def step_of(module: nn.Module, x: torch.Tensor, dy: torch.Tensor, forward: Any = None) -> Any:
    """A step: `[y, dx, gradients to the parameters]`, into fresh memory."""
    wanted = (x, *module.parameters())
    call = forward or module

    def step() -> list[torch.Tensor]:
        y = call(x)
        return [y.detach(), *torch.autograd.grad(y, wanted, dy)]

    return step


def compiled(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """`torch.compile` of a function of its own: Dynamo keeps compiled code with the code object
    that it is of, and tries what was compiled for other variants first.
    """

    def forward(*args: Any) -> Any:
        return function(*args)

    own = types.FunctionType(
        forward.__code__.replace(), forward.__globals__, closure=forward.__closure__
    )
    return torch.compile(own, fullgraph=True, dynamic=False, backend=backend)  # type: ignore[return-value]


# -- training variants ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Training:
    """A module in bfloat16, whose parameters all variants share, and a step's operands."""

    module: nn.Module
    x: torch.Tensor
    dy: torch.Tensor
    reference: list[torch.Tensor]
    backend: str
    operations: float
    tokens: int
    copies: int = 1


def training_task(case: Layer | Llama, device: torch.device, backend: str) -> Training:
    torch.manual_seed(0)
    if isinstance(case, Layer):
        shape, width = (case.m, case.k), case.n
        make = partial(nn.Linear, case.k, case.n, bias=False)
    else:
        shape, width = (case.batch, case.length, case.hidden), case.hidden
        make = partial(Block, case)
    with device:
        module = make()
        x, dy = torch.randn(shape), torch.randn(*shape[:-1], width)
    module, x, dy = module.bfloat16(), x.bfloat16().requires_grad_(), dy.bfloat16()
    exact = copy.deepcopy(module).float()
    reference = step_of(exact, x.detach().float().requires_grad_(), dy.float())()
    tokens = math.prod(shape[:-1])
    weights = sum(p.numel() for p in module.parameters() if p.dim() == 2)
    operations = 6.0 * tokens * weights
    if isinstance(case, Llama):  # scores and values, halved by the mask, there and twice back
        operations += 6.0 * case.batch * case.hidden * case.length**2
    return Training(module, x, dy, reference, backend, operations, tokens)


def _bfloat16(mode: str, task: Training, _: torch.dtype) -> Run:
    if mode == "products":
        x, w, dy = operands(task)
        return Run(lambda: [x @ w.mT, dy @ w, dy.mT @ x])
    return _stepping(task.module, task, mode)


def _stepping(module: nn.Module, task: Training, mode: str, note: str = "") -> Run:
    forward = compiled(module, task.backend) if mode == "compiled" else module
    return Run(step_of(module, task.x, task.dy, forward), note)


def operands(task: Training) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if not isinstance(task.module, nn.Linear):
        raise Unavailable("one linear layer alone has products")
    return task.x.detach(), task.module.weight.detach(), task.dy


def _qnn(scheme: str, mode: str, task: Training, dtype: torch.dtype) -> Run:
    note = served(training_ops(scheme), task.x.device)
    if mode == "products":
        return Run(_qnn_products(scheme, task, dtype), note)
    make = partial(qnn.Linear.from_float, scheme=scheme)
    return _stepping(with_layers(task.module, make), task, mode, note)


def training_ops(scheme: str) -> tuple[str, ...]:
    """Every op of a training step, the products first."""
    t = SCHEMES[scheme].training
    assert t is not None
    casts = (f"{form.key}_quantize{which}" for form in (t.x, t.dy) for which in ("", "_both"))
    return (t.matmul, t.wgrad, *casts, f"{t.weight.key}_quantize")


def _qnn_products(scheme: str, task: Training, dtype: torch.dtype) -> Callable[[], Any]:
    """The three products of a step on operands that are quantised already."""
    t = SCHEMES[scheme].training
    assert t is not None
    x, w, dy = operands(task)
    seed = torch.tensor([1], device=x.device)

    def cast(form: Format, value: torch.Tensor, which: str = "") -> tuple[torch.Tensor, ...]:
        op = OPS[f"{form.key}_quantize{which}"].overload
        return tuple(op(value, seed) if form.stochastic else op(value))

    multiply, multiply_wgrad = OPS[t.matmul].overload, OPS[t.wgrad].overload
    of_y = (*cast(t.x, x), *cast(t.weight, w), None, dtype)
    of_dx = (*cast(t.dy, dy), *cast(t.weight, w.mT), None, dtype)
    of_dw = (*cast(t.dy, dy, "_columns"), *cast(t.x, x, "_columns"), None, dtype)
    return lambda: [multiply(*of_y), multiply(*of_dx), multiply_wgrad(*of_dw)]


def served(ops: Iterable[str], device: torch.device) -> str:
    """Which kernel multiplies; a `RuntimeError` where the self-test of one of `ops` is red."""
    if device.type != "cuda":
        return EMULATED
    states = {op: backends.state(op, device) for op in ops}
    red = [
        f"{op}, {entry.kernel}: {reason}"
        for op, state in states.items()
        for entry, reason in state.passed_over
    ]
    if red:
        raise RuntimeError(f"red self-test of {'; '.join(red)}")
    entry = next(iter(states.values())).entry
    return f"{entry.kernel or 'reference'}: {entry.reason}"


def _torchao(recipe: str, mode: str, task: Training, _: torch.dtype) -> Run:
    float8 = needed("torchao.float8")
    note = "" if task.x.is_cuda else EMULATED
    if mode == "products":
        return Run(_torch_products(recipe, task), note or "torch._scaled_mm")
    config = float8.Float8LinearConfig.from_recipe_name(recipe)
    if not task.x.is_cuda:
        config = dataclasses.replace(config, emulate=True)
    make = partial(float8.convert_to_float8_training, config=config)
    return _stepping(with_layers(task.module, make), task, mode, note)


def _torch_products(recipe: str, task: Training) -> Callable[[], Any]:
    """What torchao multiplies with, on operands that are laid out for it already."""

    def cast(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        value = value.float()
        amax = value.abs().amax(1, keepdim=True) if recipe == "rowwise" else value.abs().amax()
        scale = amax / 448
        return (value / scale).to(torch.float8_e4m3fn).contiguous(), scale

    def product(a: torch.Tensor, b: torch.Tensor, fast: bool) -> Callable[[], torch.Tensor]:
        (aq, sa), (bq, sb) = cast(a), cast(b)
        return partial(
            torch._scaled_mm, aq, bq.t(), scale_a=sa, scale_b=sb.t() if sb.dim() else sb,
            out_dtype=torch.bfloat16, use_fast_accum=fast,
        )  # fmt: skip

    x, w, dy = operands(task)
    calls = product(x, w, True), product(dy, w.mT, False), product(dy.mT, x.mT, False)
    return lambda: [call() for call in calls]


def _transformer_engine(mode: str, task: Training, dtype: torch.dtype) -> Run:
    te, recipes = needed("transformer_engine.pytorch"), needed("transformer_engine.common.recipe")
    if not task.x.is_cuda:
        raise Unavailable("needs a GPU")
    recipe = recipes.Float8CurrentScaling()

    def make(linear: nn.Linear) -> nn.Module:
        sizes = linear.in_features, linear.out_features
        layer = te.Linear(*sizes, bias=False, params_dtype=dtype, device=str(linear.weight.device))
        layer.weight.data = linear.weight.data
        return layer

    module = with_layers(task.module, make)

    def forward(x: torch.Tensor) -> torch.Tensor:
        enabled = (
            te.autocast(enabled=True, recipe=recipe)
            if hasattr(te, "autocast")
            else te.fp8_autocast(enabled=True, fp8_recipe=recipe)
        )
        with enabled:
            return module(x)

    return Run(step_of(module, task.x, task.dy, forward))


def needed(module: str) -> Any:
    """An optional module, or `Unavailable` where it is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise Unavailable(f"not installed ({error.name})") from error


def _variants(builders: dict[str, Any], modes: Sequence[str]) -> list[Variant[Any]]:
    return [
        Variant(family, "bf16", mode, partial(build, mode))
        for family, build in builders.items()
        for mode in modes
        if family != ENGINE or mode == "eager"  # it leaves the graph of torch.compile
    ]


def training_variants(case: Layer | Llama, everywhere: bool) -> list[Variant[Any]]:
    """torchao after qnn: `convert_to_float8_training` changes Inductor's code for maxima for good,
    which what was compiled before does not see.
    """
    builders = {
        BFLOAT16: _bfloat16,
        **{f"qnn {scheme}": partial(_qnn, scheme) for scheme in TRAINED},
        ROWWISE: partial(_torchao, "rowwise"),
        TENSORWISE: partial(_torchao, "tensorwise"),
        ENGINE: _transformer_engine,
    }
    modes = ["eager"]
    if case.compiled or everywhere:
        modes.append("compiled")
    if isinstance(case, Layer):
        modes.append("products")
    return _variants(builders, modes)


# -- inference variants --------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Deployed:
    """A bfloat16 layer and the rows; a variant makes `copies` of what it makes of the layer."""

    module: nn.Linear
    x: torch.Tensor
    reference: list[torch.Tensor]
    backend: str
    operations: float
    tokens: int
    copies: int

    def cycle(self, layers: Sequence[Callable[[torch.Tensor], torch.Tensor]]) -> Callable[[], Any]:
        """All copies, one after the other; the output is that of the last."""

        def run() -> list[torch.Tensor]:
            y = self.x
            for layer in layers:
                y = layer(self.x)
            return [y]

        return run


def deployed_task(case: Decode, device: torch.device, backend: str) -> Deployed:
    torch.manual_seed(0)
    with device:
        module, x = nn.Linear(case.k, case.n, bias=False), torch.randn(case.m, case.k)
    module, x = module.bfloat16().eval(), x.bfloat16()
    copies = 2
    if device.type == "cuda":  # four times L2 of the smallest format's weights
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        copies += math.ceil(4 * l2 / (case.k * case.n / 2))
    reference = [nn.functional.linear(x.float(), module.weight.detach().float())]
    operations = 2.0 * case.m * case.k * case.n
    return Deployed(module, x, reference, backend, operations, case.m, copies)


def bytes_read(layer: nn.Module, x: torch.Tensor) -> int:
    """What a call has to read: everything that the layer holds, and its input."""
    return sum(t.numel() * t.element_size() for t in (*layer.state_dict().values(), x))


def _replayed(cycle: Callable[[], Any], mode: str, task: Deployed, note: str) -> Run:
    if mode != "graph":
        return Run(cycle, note)
    if not task.x.is_cuda:
        raise Unavailable("CUDA graphs need a GPU")
    cycle()  # what compiles or tests itself on its first call does it here
    replay, outputs = captured(cycle)

    def run() -> list[torch.Tensor]:
        replay()
        return outputs

    return Run(run, note)


def _deployed_bfloat16(mode: str, task: Deployed, _: torch.dtype) -> Run:
    return _replayed(task.cycle(_copies(task.module, task.copies)), mode, task, "")


def _deployed_qnn(scheme: str, mode: str, task: Deployed, _: torch.dtype) -> Run:
    note = served([SCHEMES[scheme].linear], task.x.device)
    layer = qnn.QLinear.from_float(task.module, scheme)
    return _replayed(task.cycle(_copies(layer, task.copies)), mode, task, note)


def _copies(layer: nn.Module, count: int) -> list[nn.Module]:
    return [layer, *(copy.deepcopy(layer) for _ in range(count - 1))]


def _deployed_torchao(mode: str, task: Deployed, _: torch.dtype) -> Run:
    """Compiled in both modes: eager, torchao decodes the weight into memory. One compiled function
    serves all copies, whose weights are its argument.
    """
    quantization = needed("torchao.quantization")
    layer = copy.deepcopy(task.module)
    config = quantization.Float8WeightOnlyConfig(set_inductor_config=False)
    quantization.quantize_(layer, config)
    linear = compiled(nn.functional.linear, task.backend)
    layers = [
        functools.partial(lambda w, x: linear(x, w), each.weight.detach())
        for each in _copies(layer, task.copies)
    ]
    return _replayed(task.cycle(layers), mode, task, "compiled")


def deployed_variants() -> list[Variant[Any]]:
    builders = {
        BFLOAT16: _deployed_bfloat16,
        **{f"qnn {scheme}": partial(_deployed_qnn, scheme) for scheme in DEPLOYED},
        WEIGHT_ONLY: _deployed_torchao,
    }
    return _variants(builders, ["eager", "graph"])


# -- measuring -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row(Measurement):
    """`median_ms` and `speedup` are of the wall time, `sqnr_db` is the lowest of all outputs,
    `megabytes` the memory that a call adds at its peak. Ratios are to bfloat16 and torchao in the
    same case and mode.
    """

    device_ms: float | None = None
    host_ms: float | None = None
    tokens_s: float | None = None
    device_speedup: float | None = None
    over_torchao: float | None = None
    device_over_torchao: float | None = None
    sm_mhz: int | None = None


def prepared(variant: Variant[Any], task: Any) -> tuple[Run | None, Row]:
    """A variant that is ready, and its row without times. Whatever goes wrong in it is a result."""
    fields = (variant.name, variant.family, variant.precision, variant.mode)
    try:
        run = variant.build(task, torch.bfloat16)
        got: Any = run.call()
        levels = [qnn.sqnr(r, g) for r, g in zip(task.reference, got, strict=True)]
    except Unavailable as error:
        return None, Row("", *fields, "unavailable", str(error))
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0][:160]
        return None, Row("", *fields, "failed", f"{type(error).__name__}: {first_line}")
    # Python's min passes over a NaN that is not the first.
    sqnr = math.nan if any(map(math.isnan, levels)) else min(levels)
    floor = FLOORS[variant.family] - (BLOCK_LOSS if isinstance(task.module, Block) else 0)
    if not sqnr >= floor:
        note = f"SQNR {sqnr:.1f} dB, under {floor:.0f}"
        return None, Row("", *fields, "failed", note, sqnr_db=sqnr)
    return run, Row("", *fields, "ok", run.note, sqnr_db=sqnr)


def measure(case: Case, task: Any, variants: Sequence[Variant[Any]], effort: Effort) -> list[Row]:
    """A row for each variant: set up and checked one after the other, then timed in turns."""
    device, calls, rows, memory = task.x.device, {}, {}, {}
    for variant in variants:
        progress(f"{case}: {variant.name}")
        run, row = prepared(variant, task)
        rows[variant.name] = dataclasses.replace(row, case=str(case))
        if run is not None:
            calls[variant.name] = run.call
            memory[variant.name] = peak_megabytes(run.call, device)
    progress(f"{case}: timing")
    samples = interleave(calls, effort, device)
    clock = clock_mhz(device)
    for name, taken in samples.items():
        wall, on_device, host = (
            None if seconds is None else seconds / task.copies
            for seconds in (taken.median(kind) for kind in ("wall", "device", "host"))
        )
        assert wall is not None
        per_ms = [None if seconds is None else seconds * 1e3 for seconds in (on_device, host)]
        rows[name] = dataclasses.replace(
            rows[name],
            median_ms=wall * 1e3,
            min_ms=min(taken.wall) / task.copies * 1e3,
            device_ms=per_ms[0],
            host_ms=per_ms[1],
            tokens_s=task.tokens / wall,
            tops=task.operations / wall / 1e12,
            megabytes=memory[name],
            samples=len(taken.wall),
            sm_mhz=clock,
        )
    return with_ratios(list(rows.values()))


def with_ratios(rows: list[Row]) -> list[Row]:
    """With each time's ratio to bfloat16's and to torchao's, where both have one."""
    by_variant = {(row.family, row.mode): row for row in rows}

    def ratio(row: Row, family: str | None, kind: str) -> float | None:
        other = None if family is None else by_variant.get((family, row.mode))
        theirs, ours = (None if r is None else getattr(r, kind) for r in (other, row))
        return None if theirs is None or ours is None else theirs / ours

    return [
        dataclasses.replace(
            row,
            speedup=ratio(row, BFLOAT16, "median_ms"),
            device_speedup=ratio(row, BFLOAT16, "device_ms"),
            over_torchao=ratio(row, PEERS.get(row.family), "median_ms"),
            device_over_torchao=ratio(row, PEERS.get(row.family), "device_ms"),
        )
        for row in rows
    ]


def measure_case(
    case: Case, device: torch.device, effort: Effort, only: str, everywhere: bool, backend: str
) -> list[Row]:
    task: Training | Deployed
    if isinstance(case, Decode):
        with torch.no_grad():
            task = deployed_task(case, device, backend)
            chosen = _select(deployed_variants(), only)
            rows = [
                dataclasses.replace(row, gb_s=_gigabytes_a_second(row, task))
                for row in measure(case, task, chosen, effort)
            ]
    else:
        task = training_task(case, device, backend)
        rows = measure(case, task, _select(training_variants(case, everywhere), only), effort)
    del task
    torch._dynamo.reset()  # between cases: no compiled variant outlives its case
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return rows


def _select(variants: list[Variant[Any]], only: str) -> list[Variant[Any]]:
    """Those whose name matches, and always bfloat16."""
    return [v for v in variants if v.family == BFLOAT16 or re.search(only, v.name)]


def _gigabytes_a_second(row: Row, task: Deployed) -> float | None:
    """The bytes of one layer and its input, by the time on the device."""
    milliseconds = row.device_ms or row.median_ms
    if milliseconds is None:
        return None
    scheme = row.family.removeprefix("qnn ")
    if scheme in SCHEMES:
        layer: nn.Module = qnn.QLinear.from_float(task.module, scheme)
        count = bytes_read(layer, task.x)
    elif row.family == WEIGHT_ONLY:
        count = bytes_read(qnn.QLinear.from_float(task.module, "fp8_weight"), task.x)
    else:
        count = bytes_read(task.module, task.x)
    return count / milliseconds / 1e6


# -- tables --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Aim:
    """At least `goal` times as fast as bfloat16, at every case of `cases` that was measured."""

    what: str
    family: str
    mode: str
    goal: float
    cases: tuple[str, ...]

    def judged(self, rows: Sequence[Row]) -> tuple[str, str]:
        """The lowest ratio and the verdict; why there is none where a case has no time."""
        found = [r for r in rows if r.case in self.cases and r.family == self.family]
        found = [r for r in found if r.mode == self.mode]
        without = [r for r in found if r.speedup is None]
        if not found:
            return "-", "not measured"
        if without:
            return "-", f"not judged: {without[0].case}: {without[0].remark}"
        lowest = min(r.speedup for r in found if r.speedup is not None)
        missing = len(self.cases) - len(found)
        partly = f", {missing} of {len(self.cases)} cases not measured" if missing else ""
        return f"{lowest:.2f}x", f"{'met' if lowest >= self.goal else '**missed**'}{partly}"


_FEW_ROWS = tuple(str(Decode(m, k, n)) for k, n in _DECODE_SIZES for m in _DECODE_ROWS if m <= 8)
AIMS = (
    Aim("row-wise float8", "qnn fp8", "compiled", 1.5, (str(AIMED),)),
    Aim("tensor-wise float8", "qnn fp8_tensor", "compiled", 1.6, (str(AIMED),)),
    Aim("block-wise float8", "qnn fp8_block", "compiled", 1.4, (str(AIMED),)),
    Aim("weights in nvfp4, M = 1 to 8", "qnn nvfp4_weight", "graph", 2.5, _FEW_ROWS),
    Aim("weights in float8, M = 1 to 8", "qnn fp8_weight", "graph", 1.7, _FEW_ROWS),
)


def aims_table(rows: Sequence[Row]) -> str:
    body = [(a.what, a.mode, f"{a.goal}x", *a.judged(rows)) for a in AIMS]
    head = ("times as fast as bfloat16", "mode", "aim", "lowest", "verdict")
    return table(head, body, left=(0, 1, 4))


def times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def case_table(case: Case, rows: Sequence[Row]) -> str:
    return (_inference_table if isinstance(case, Decode) else _training_table)(rows)


def _training_table(rows: Sequence[Row]) -> str:
    products = {row.family: row for row in rows if row.mode == "products"}
    head = [
        *("variant", "ms", "device ms", "launch ms", "bf16 / this", "torchao / this"),
        *("tokens/s", "TFLOP/s", "peak MB", "SQNR dB", "remark"),
    ]
    body = []
    for row in rows:
        if row.mode == "products":
            continue
        cells = [
            f"{row.family} {row.mode}",
            number(row.median_ms),
            number(row.device_ms),
            number(row.host_ms),
            times(row.speedup),
            times(row.over_torchao),
            "-" if row.tokens_s is None else f"{row.tokens_s:,.0f}",
            number(row.tops),
            number(row.megabytes),
            number(row.sqnr_db),
            row.remark,
        ]
        if products:
            alone = products.get(row.family)
            cells[6:6] = [_products_cell(alone)]
        body.append(cells)
    if products:
        head[6:6] = ["products alone ms (bf16 / this)"]
    return table(head, body, left=(0, len(head) - 1))


def _products_cell(row: Row | None) -> str:
    if row is None or row.median_ms is None:
        return "-" if row is None or row.status == "unavailable" else row.status
    if row.device_ms is None:
        return f"{number(row.median_ms)} ({times(row.speedup)})"
    return f"{number(row.device_ms)} ({times(row.device_speedup)})"


def _inference_table(rows: Sequence[Row]) -> str:
    def micro(milliseconds: float | None) -> str:
        return number(None if milliseconds is None else milliseconds * 1e3)

    head = (
        *("variant", "µs", "device µs", "launch µs", "bf16 / this", "torchao / this"),
        *("GB/s read", "SQNR dB", "remark"),
    )
    body = [
        (
            f"{row.family} {row.mode}",
            *map(micro, (row.median_ms, row.device_ms, row.host_ms)),
            times(row.speedup),
            times(row.over_torchao),
            number(row.gb_s),
            number(row.sqnr_db),
            row.remark,
        )
        for row in rows
    ]
    return table(head, body, left=(0, 8))


def without_time(rows: Sequence[Row]) -> str:
    """Every variant that was tried and has no time, why, and in how many cases."""
    counts = Counter((row.variant, row.remark) for row in rows if row.median_ms is None)
    listed = [f"- {name}: {remark} (cases: {count})" for (name, remark), count in counts.items()]
    return "\n".join(["## Without a time", "", *(listed or ["None."])])


_LEGEND = (
    "`ms` is the median of a call by the host's clock, from an idle device to the end of its last "
    "kernel; `device` the same from kernel to kernel, with the whole call in the queue before; "
    "`launch` what it takes to get it there. `bf16 / this` and `torchao / this` are ratios of `ms` "
    "to the same mode of bfloat16 and of torchao's nearest recipe: over 1 this row is faster. "
    "`products alone` is the three scaled products of a step on quantised operands, on the device."
)


def page(done: dict[Case, list[Row]], left_out: Sequence[Case], gpu: Gpu | None) -> str:
    """The Markdown page."""
    rows = [row for found in done.values() for row in found]
    clocks = [row.sm_mhz for row in rows if row.sm_mhz is not None]
    clock = f" Multiprocessor clock {min(clocks)} to {max(clocks)} MHz." if clocks else ""
    parts = [
        "# Low precision on a GPU",
        f"`{command_line()}`; every figure is in [bench_fp8.csv](bench_fp8.csv).",
        f"{gpu or f'No GPU: {EMULATED}, quote no figure'}.{clock} {Machine.here()}.",
        _LEGEND,
    ]
    if gpu is not None:
        parts.append(f"## Aims\n\n{aims_table(rows)}")
    for section in dict.fromkeys(case.section for case in done):
        parts.append(f"## {section}")
        parts += [
            f"### {case}\n\n{case_table(case, found)}"
            for case, found in done.items()
            if case.section == section
        ]
    parts.append(without_time(rows))
    if left_out:
        listed = "\n".join(f"- {case.section}: {case}" for case in left_out)
        parts.append(f"## Not begun\n\nThe time was up before these cases:\n\n{listed}")
    return "\n\n".join(parts) + "\n"


def save(out: Path, done: dict[Case, list[Row]], left_out: Sequence[Case], gpu: Gpu | None) -> None:
    """`bench_fp8.csv` with a row a measurement, the machine and the GPU; and `bench_fp8.md`."""
    out.mkdir(parents=True, exist_ok=True)
    where = {**(gpu.columns() if gpu is not None else {"gpu": "none"}), **Machine.here().columns()}
    records = [
        {
            key: f"{value:.6g}" if isinstance(value, float) else value
            for key, value in {
                "section": case.section, **dataclasses.asdict(row), **where,
            }.items()
        }
        for case, rows in done.items()
        for row in rows
    ]  # fmt: skip
    with (out / "bench_fp8.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
    (out / "bench_fp8.md").write_text(page(done, left_out, gpu))


def main() -> None:
    parser = argument_parser(__doc__)
    parser.set_defaults(out=None)
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU; nothing to quote")
    parser.add_argument("--everywhere", action="store_true", help="compiled in every size")
    parser.add_argument(
        "--budget", type=float, default=math.inf, metavar="SECONDS", help="then begin no case"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.verbose:
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    gpu = Gpu.here(device)
    if gpu is None:
        print(f"No GPU: {EMULATED}. Tiny sizes, to see that everything runs; quote no figure.")
    tiny = options.tiny or gpu is None
    cases = TINY if tiny else _cases()[:3] if options.quick else _cases()
    short = tiny or options.quick
    effort = Effort(3, 1.0, 0.001) if short else Effort(rounds=7, seconds=10.0, turn=0.05)
    # Tracing is what tiny sizes test: Inductor would spend a minute in the compiler of C++.
    backend = "aot_eager" if tiny else "inductor"
    out = options.out or (Path("docs/benchmarks") if gpu is not None and not tiny else None)

    done: dict[Case, list[Row]] = {}
    end = time.perf_counter() + options.budget
    for i, case in enumerate(cases):
        if time.perf_counter() > end:
            progress(f"the time is up before {len(cases) - i} of {len(cases)} cases")
            break
        done[case] = measure_case(case, device, effort, options.only, options.everywhere, backend)
        print(f"\n{case.section}: {case}\n{case_table(case, done[case])}", flush=True)
        if out is not None:  # each time: whoever ends the run early keeps what there is
            save(out, done, cases[i + 1 :], gpu)
    rows = [row for found in done.values() for row in found]
    print(f"\n{without_time(rows)}")
    if gpu is not None:
        print(f"\n{aims_table(rows)}")
    print(f"\n{gpu or 'no GPU'}\n{Machine.here()}")
    print(f"written: {out / 'bench_fp8.csv'}, {out / 'bench_fp8.md'}" if out else "nothing written")


if __name__ == "__main__":
    main()

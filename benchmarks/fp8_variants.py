"""What bench_fp8.py times: a training step, and a deployed layer; in qnn and its peers.

A builder takes a task and a dtype and returns a `Run`, or raises `Unavailable`, as in variants.py.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

import qnn
from qnn.kernels import OPS, SCHEMES
from qnn.kernels.cuda import backends
from qnn.kernels.formats import Format

from harness import Case, Run, Unavailable, Variant, compiled, inductor_settings, needs
from llama import Block, with_layers
from timing import captured

Call = Callable[[], torch.Tensor]

BFLOAT16 = "nn.Linear"
TENSORWISE, ROWWISE = "torchao tensorwise", "torchao rowwise"
WEIGHT_ONLY = "torchao float8 weight"
ENGINE = "TransformerEngine current"
TRAINED = tuple(scheme.name for scheme in SCHEMES.values() if scheme.trainable)
DEPLOYED = ("fp8_weight", "nvfp4_weight")
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


# -- sizes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A training step of one linear layer."""

    m: int
    k: int
    n: int
    compiled: bool = True
    section = "Training: one linear layer"

    @property
    def tokens(self) -> int:
        return self.m

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

    @property
    def tokens(self) -> int:
        return self.batch * self.length

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
    section = "Inference: weights from memory"

    @property
    def tokens(self) -> int:
        return self.m

    def __str__(self) -> str:
        return f"M={self.m}, {self.k}->{self.n}"


Size = Step | Llama | Decode


# -- training ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Training:
    """A module in bfloat16, whose parameters all variants share, and a step's operands."""

    module: nn.Module
    x: torch.Tensor
    dy: torch.Tensor
    backend: str


def training_case(size: Step | Llama, device: torch.device, backend: str) -> Case[Training]:
    torch.manual_seed(0)
    if isinstance(size, Step):
        shape, width = (size.m, size.k), size.n
        make = partial(nn.Linear, size.k, size.n, bias=False)
    else:
        shape, width = (size.batch, size.length, size.hidden), size.hidden
        make = partial(Block, size.hidden, size.heads, size.kv_heads, size.ffn)
    with device:
        module = make()
        x, dy = torch.randn(shape), torch.randn(*shape[:-1], width)
    module, x, dy = module.bfloat16(), x.bfloat16().requires_grad_(), dy.bfloat16()
    exact = copy.deepcopy(module).float()
    reference = step_of(exact, x.detach().float().requires_grad_(), dy.float())()
    weights = sum(p.numel() for p in module.parameters() if p.dim() == 2)
    operations, loss = 6.0 * size.tokens * weights, 0.0
    if isinstance(size, Llama):  # scores and values, halved by the mask, there and twice back
        operations += 6.0 * size.batch * size.hidden * size.length**2
        loss = BLOCK_LOSS
    return Case(
        size.section,
        str(size),
        Training(module, x, dy, backend),
        reference,
        operations,
        floor=lambda family: FLOORS[family] - loss,
        training=True,
        device=device,
    )


def step_of(module: nn.Module, x: torch.Tensor, dy: torch.Tensor, forward: Any = None) -> Any:
    """A step: `[y, dx, gradients to the parameters]`, into fresh memory."""
    wanted = (x, *module.parameters())
    call = forward or module

    def step() -> list[torch.Tensor]:
        y = call(x)
        return [y.detach(), *torch.autograd.grad(y, wanted, dy)]

    return step


def _bfloat16(mode: str, task: Training, _: torch.dtype) -> Run:
    if mode == "products":
        x, w, dy = operands(task)
        return Run(lambda: [x @ w.mT, dy @ w, dy.mT @ x], output=list)
    return _stepping(task.module, task, mode)


def _stepping(module: nn.Module, task: Training, mode: str, note: str = "") -> Run:
    forward = compiled(module, task.backend) if mode == "compiled" else module
    return Run(step_of(module, task.x, task.dy, forward), note, list)


def operands(task: Training) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if not isinstance(task.module, nn.Linear):
        raise Unavailable("one linear layer alone has products")
    return task.x.detach(), task.module.weight.detach(), task.dy


def _qnn(scheme: str, mode: str, task: Training, dtype: torch.dtype) -> Run:
    note = served(training_ops(scheme), task.x.device)
    if mode == "products":
        return Run(_qnn_products(scheme, task, dtype), note, list)
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
    float8 = needs("torchao.float8")
    note = "" if task.x.is_cuda else EMULATED
    if mode == "products":
        return Run(_torch_products(recipe, task), note or "torch._scaled_mm", list)
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
    te, recipes = needs("transformer_engine.pytorch"), needs("transformer_engine.common.recipe")
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

    return Run(step_of(module, task.x, task.dy, forward), output=list)


def _variants(builders: dict[str, Any], modes: Sequence[str]) -> list[Variant[Any]]:
    return [
        Variant(family, "bf16", mode, partial(_alone, partial(build, mode)))
        for family, build in builders.items()
        for mode in modes
        if family != ENGINE or mode == "eager"  # it leaves the graph of torch.compile
    ]


def _alone(build: Callable[[Any, torch.dtype], Run], task: Any, dtype: torch.dtype) -> Run:
    """Built, and called once for all that is compiled then, without a trace in the settings."""
    with inductor_settings():
        run = build(task, dtype)
        run.call()
        return run


def training_variants(size: Step | Llama, everywhere: bool) -> list[Variant[Any]]:
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
    if size.compiled or everywhere:
        modes.append("compiled")
    if isinstance(size, Step):
        modes.append("products")
    return _variants(builders, modes)


# -- inference -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Deployed:
    """A bfloat16 layer and the rows; a variant makes `copies` of what it makes of the layer."""

    module: nn.Linear
    x: torch.Tensor
    backend: str
    copies: int

    def cycle(self, layers: Sequence[Callable[[torch.Tensor], torch.Tensor]]) -> Call:
        """All copies, one after the other; the output is that of the last."""

        def run() -> torch.Tensor:
            y = self.x
            for layer in layers:
                y = layer(self.x)
            return y

        return run


def deployed_case(size: Decode, device: torch.device, backend: str) -> Case[Deployed]:
    torch.manual_seed(0)
    with device:
        module, x = nn.Linear(size.k, size.n, bias=False), torch.randn(size.m, size.k)
    module, x = module.bfloat16().eval(), x.bfloat16()
    copies = 2
    if device.type == "cuda":  # four times L2 of the smallest format's weights
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        copies += math.ceil(4 * l2 / (size.k * size.n / 2))
    reference = nn.functional.linear(x.float(), module.weight.detach().float())
    return Case(
        size.section,
        str(size),
        Deployed(module, x, backend, copies),
        reference,
        2.0 * size.m * size.k * size.n,
        floor=FLOORS.__getitem__,
        device=device,
    )


def bytes_read(layer: nn.Module, x: torch.Tensor) -> int:
    """What a call has to read: everything that the layer holds, and its input."""
    return sum(t.numel() * t.element_size() for t in (*layer.state_dict().values(), x))


def _replayed(cycle: Call, mode: str, task: Deployed, note: str) -> Run:
    if mode != "graph":
        return Run(cycle, note, repeats=task.copies)
    if not task.x.is_cuda:
        raise Unavailable("CUDA graphs need a GPU")
    cycle()  # what compiles or tests itself on its first call does it here
    replay, output = captured(cycle)

    def run() -> torch.Tensor:
        replay()
        return output

    return Run(run, note, repeats=task.copies)


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
    quantization = needs("torchao.quantization")
    layer = copy.deepcopy(task.module)
    config = quantization.Float8WeightOnlyConfig(set_inductor_config=False)
    quantization.quantize_(layer, config)
    linear = compiled(nn.functional.linear, task.backend)
    layers = [
        partial(lambda w, x: linear(x, w), each.weight.detach())
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

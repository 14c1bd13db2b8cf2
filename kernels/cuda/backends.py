"""Which CUDA kernel serves an op on a GPU: a table, and a test before it is believed.

`TABLE` is read from above; the first row that has the op, the GPU's compute capability and the CUDA
version applies. Before a row's kernel serves an op on a device it must reproduce known answers
there, once a process: those of the reference on the CPU, at sizes that whole tiles fit and at odd
ones. One that fails or raises is passed over, with the reason, which `state` gives to
`python -m qnn doctor`, and the next row is tried. The last is the reference itself.

Neither importing this module nor `choose` imports Triton or initialises CUDA.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch

from qnn.kernels.formats import Format
from qnn.kernels.formats.float8 import FLOAT8
from qnn.kernels.schemes import SCHEMES
from qnn.kernels.torch_private import plain_dispatch

Capability = tuple[int, int]


@dataclass(frozen=True)
class Entry:
    """A row of the table.

    Attributes:
        ops: patterns of op names.
        low, high: compute capabilities, from `low` on and below `high`.
        kernel: the kernel's name, or None for the reference.
        reason: why, or what it is that runs.
        cuda: the CUDA version that torch must be built with, at least.
    """

    ops: tuple[str, ...]
    low: Capability
    high: Capability | None
    kernel: str | None
    reason: str
    cuda: Capability = (0, 0)

    def has(self, op: str) -> bool:
        return any(fnmatchcase(op, pattern) for pattern in self.ops)

    def serves(self, capability: Capability, cuda: Capability | None) -> bool:
        """Whether it runs on a GPU of `capability`; `cuda` None is any version."""
        known = cuda is None or cuda >= self.cuda
        return known and self.low <= capability and (self.high is None or capability < self.high)


_CASTS = ("float8_*_quantize*", "mxfp8_quantize*", "nvfp4*_quantize*")
_FP8 = ("fp8_matmul", "fp8_linear", "fp8_tensor_matmul", "fp8_tensor_linear")
_BLOCK = ("fp8_block_matmul", "fp8_block_wgrad", "fp8_block_linear")
_MXFP8 = ("mxfp8_matmul", "mxfp8_wgrad", "mxfp8_linear")
_NVFP4 = ("nvfp4_matmul", "nvfp4_wgrad", "nvfp4_linear")
_WEIGHT = ("fp8*_weight_linear", "mxfp8_weight_linear", "nvfp4_weight_linear")

TABLE: tuple[Entry, ...] = (
    Entry(_CASTS, (8, 9), None, "cast", "Triton, one pass, casts in hardware"),
    Entry(_CASTS, (8, 0), (8, 9), "cast", "Triton, one pass, float8 by integer arithmetic"),
    Entry(_FP8, (8, 9), None, "scaled_mm", "float8 tensor cores"),
    Entry(_FP8, (8, 0), None, "triton", "decoded, on bfloat16 tensor cores"),
    Entry(_BLOCK, (9, 0), (10, 0), "scaled_mm", "float8 tensor cores; only on these", (12, 9)),
    Entry(_BLOCK, (8, 0), None, "triton", "decoded, on bfloat16 tensor cores"),
    Entry(_MXFP8, (10, 0), (12, 0), "scaled_mm", "mxfp8 tensor cores", (12, 8)),
    Entry(_MXFP8, (8, 0), None, "triton", "decoded, on bfloat16 tensor cores"),
    Entry(_NVFP4, (10, 0), None, "scaled_mm", "nvfp4 tensor cores", (12, 8)),
    Entry(_NVFP4, (8, 0), None, "triton", "decoded, on bfloat16 tensor cores"),
    Entry(_WEIGHT, (8, 0), None, "weight_only", "Triton, the weight decoded in registers"),
    Entry(
        ("*_dequantize", "*_linear_dgrad"), (0, 0), None, None,
        "the reference, in torch operations: no kernel has been written",
    ),
    Entry(("*",), (0, 0), None, None, "the reference, in torch operations: kernels want 8.0"),
)  # fmt: skip


def candidates(
    op: str, capability: Capability, cuda: Capability | None = None
) -> tuple[Entry, ...]:
    """The rows that apply, best first; the last is the reference."""
    return tuple(e for e in TABLE if e.has(op) and e.serves(capability, cuda))


def choose(op: str, capability: Capability, cuda: Capability | None = None) -> Entry:
    """The row for `op` on a GPU of `capability`, with any CUDA version or with `cuda`."""
    return candidates(op, capability, cuda)[0]


def table() -> list[tuple[str, str, str, str]]:
    """Ops, GPUs, kernel and reason of each row, to print."""

    def devices(entry: Entry) -> str:
        low = "{}.{}".format(*entry.low)
        span = (
            f"{low} and up"
            if entry.high is None
            else f"{low} to below {entry.high[0]}.{entry.high[1]}"
        )
        return span + (" with CUDA {}.{}".format(*entry.cuda) if any(entry.cuda) else "")

    return [(", ".join(e.ops), devices(e), e.kernel or "reference", e.reason) for e in TABLE]


# What an op's kernels are made of.


@dataclass(frozen=True)
class Role:
    """What an op does with which formats: `cast` with that of the rows and that of the columns, one
    of which may be None; `matmul` with two; `linear` with the activation's, or None where that
    stays as it is, and the weight's.
    """

    kind: str
    first: Format | None
    second: Format | None

    @property
    def stochastic(self) -> bool:
        return any(form is not None and form.stochastic for form in (self.first, self.second))


@functools.cache
def roles() -> dict[str, Role]:
    """The role of each op that has a kernel."""
    trained = [scheme.training for scheme in SCHEMES.values() if scheme.training is not None]
    forms: list[Format] = list(FLOAT8.values())
    result: dict[str, Role] = {}
    for t in trained:
        forms += [t.x, t.weight, t.dy, t.x_of_wgrad, t.dy_of_wgrad]
        for form, other in ((t.x, t.x_of_wgrad), (t.dy, t.dy_of_wgrad)):
            result[f"{form.key}_quantize_both"] = Role("cast", form, other)
            result[f"{form.key}_quantize_columns"] = Role("cast", None, other)
        result[t.wgrad] = Role("matmul", t.dy_of_wgrad, t.x_of_wgrad)
        result[t.matmul] = Role("matmul", t.x, t.weight)
    for form in forms:
        result[f"{form.key}_quantize"] = Role("cast", form, None)
    for scheme in SCHEMES.values():
        if scheme.training is not None and scheme.activation is not None:
            result[f"{scheme.name}_linear"] = Role("linear", scheme.activation, scheme.weight)
            result[f"{scheme.name}_weight_linear"] = Role("linear", None, scheme.weight)
    return result


def build(op: str, name: str) -> Callable[..., Any]:
    """The kernel called `name` in the table, for `op`."""
    from qnn.kernels.cuda import cast, gemm, weight_only  # import Triton

    role = roles()[op]
    if role.kind == "cast":
        return cast.quantize(role.first, role.second)
    if role.second is None:
        raise ValueError(f"{op} has no second format")
    if role.first is None:
        return weight_only.linear(role.second)
    if name == "scaled_mm":
        product = gemm.scaled_matmul(role.first, role.second, fast=role.kind == "linear")
    else:
        product = gemm.triton_matmul(role.first, role.second)
    if role.kind == "matmul":
        return product
    return gemm.linear(role.first, role.second, cast.quantize(role.first), product)


# Known answers.

# (M, N, K): whole tiles and odd sizes; and for a product one row and a few, and a long sum, which
# have kernels of their own.
_SIZES = ((256, 384, 512), (37, 61, 199))
_PRODUCT_SIZES = (*_SIZES, (1, 61, 199), (3, 130, 2200))


def _quantized(form: Format, x: torch.Tensor, seed: int) -> tuple[torch.Tensor, ...]:
    seeds = torch.tensor([seed], device="cpu") if form.stochastic else None
    return tuple(part.contiguous() for part in form.quantize(x, seeds))


def _examples(role: Role) -> Iterator[tuple[tuple[Any, ...], torch.Tensor | None]]:
    """Arguments on the CPU, and for a product the sum of its terms' magnitudes."""
    generator = torch.Generator("cpu").manual_seed(20)

    def normal(*shape: int) -> torch.Tensor:
        # Rows of different sizes, so that a scale in a wrong place shows.
        x = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
        return x * torch.logspace(-2, 2, len(x), base=2, device="cpu", dtype=torch.float32)[:, None]

    if role.kind == "cast":
        for m, _, k in _SIZES:
            x = normal(m, k).bfloat16()
            x[m // 2], x[3] = 0, x[3] * 1e20
            x[1, 5], x[2, 7] = torch.nan, torch.inf
            seed = torch.tensor([2**40 + 7], device="cpu")
            yield (x, seed) if role.stochastic else (x,), None
        return
    if role.second is None:
        raise ValueError("a product has two formats")
    for m, n, k in _PRODUCT_SIZES:
        x, w, bias = normal(m, k), normal(n, k), normal(n, 1).flatten()
        terms = x.abs() @ w.abs().mT + bias.abs()
        weight = _quantized(role.second, w, 2)
        for dtype in (torch.bfloat16, torch.float32):
            if role.kind == "matmul" and role.first is not None:
                yield (*_quantized(role.first, x, 1), *weight, bias, dtype), terms
            else:
                yield (x.to(dtype), *weight, bias), terms


def _check(op: str, function: Callable[..., Any], device: torch.device) -> None:
    """Raise an ArithmeticError where `function` is wrong on `device`."""
    from qnn.kernels.op import OPS
    from qnn.kernels.reference.floats import quantize_reference  # which imports this package

    role = roles()[op]
    casts = role.kind == "cast"
    # The op's own has room for two groups, which is made after the kernel too.
    reference = quantize_reference(role.first, role.second) if casts else OPS[op].reference
    for args, terms in _examples(role):
        wanted = reference(*args)
        given = function(*(a.to(device) if isinstance(a, torch.Tensor) else a for a in args))
        wanted, given = (t if isinstance(t, tuple) else (t,) for t in (wanted, given))
        for want, got in zip(wanted, (t.to("cpu") for t in given), strict=True):
            if (want.shape, want.dtype) != (got.shape, got.dtype):
                raise ArithmeticError(f"{list(got.shape)} {got.dtype} for {list(want.shape)}")
            if terms is None:
                wrong = (_bits(want) != _bits(got)).sum().item()
                size = list(args[0].shape)
            else:
                # Fast accumulation keeps 14 bits; a cast to bfloat16, and one before the bias, 8.
                # A wrong scale or a lost term is far above both.
                near = terms * 2**-10 + want.float().abs() * 2**-7
                wrong = (~((got.float() - want.float()).abs() <= near)).sum().item()
                size = [want.shape[0], want.shape[1], args[0].shape[1]]
            if wrong:
                raise ArithmeticError(f"{wrong} of {want.numel()} wrong at {size}")


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.uint8 if x.dtype.itemsize == 1 else torch.int32)


# What runs.


@dataclass(frozen=True)
class State:
    """What serves an op on a device, and the rows that were passed over, with the reason."""

    entry: Entry
    function: Callable[..., Any]
    passed_over: tuple[tuple[Entry, str], ...]


def _gpu(device: torch.device) -> tuple[Capability, Capability | None]:
    """Compute capability and CUDA version. The table knows no AMD GPU: one has capability 0."""
    if torch.version.hip is not None:
        return (0, 0), None
    version = tuple(int(part) for part in (torch.version.cuda or "0.0").split(".")[:2])
    return torch.cuda.get_device_capability(device), (version[0], version[1])


@functools.cache
def state(op: str, device: torch.device) -> State:
    """Test the rows for `op` on `device` in turn, the first time."""
    from qnn.kernels.op import OPS

    passed: list[tuple[Entry, str]] = []
    for entry in candidates(op, *_gpu(device)):
        if entry.kernel is None:
            return State(entry, OPS[op].reference, tuple(passed))
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"qnn::{op} is tested on its first call, which cannot be captured in a CUDA graph; "
                "call it once before the capture."
            )
        try:
            with plain_dispatch():
                function = build(op, entry.kernel)
                _check(op, function, device)
        # Whatever a compiler, a driver or a library raises is a reason not to use it here.
        except Exception as fault:
            message = str(fault).strip().partition("\n")[0]
            passed.append((entry, f"{type(fault).__name__}: {message}"))
        else:
            return State(entry, function, tuple(passed))
    raise AssertionError(f"{op}: the table does not end in the reference")


def kernel(op: str) -> Callable[..., Any]:
    """The CUDA kernel of `op`: what `state` finds for the device of the first argument."""

    def run(*args: Any) -> Any:
        return state(op, args[0].device).function(*args)

    return run


def has_kernel(op: str, entries: Sequence[Entry] = TABLE) -> bool:
    """Whether any GPU has something better than the reference."""
    return any(entry.kernel is not None and entry.has(op) for entry in entries)

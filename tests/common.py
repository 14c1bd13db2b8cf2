"""What several test files share: layers, sizes, and child processes."""

from __future__ import annotations

import inspect
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

import qnn
from qnn.kernels import OPS
from qnn.kernels.cpu import int8_linear as cpu

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
# Odd sizes (M, K, N), where blocks, tails and padding end in different places.
SIZES = (
    (1, 1, 1),
    (1, 37, 63),
    (5, 64, 64),
    (37, 63, 199),
    (63, 760, 37),
    (199, 37, 760),
    (2, 4100, 3),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def weights(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A full-range int8 weight, with -128 and rows of extremes, and its scale."""
    w = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    w[0], w[-1] = 127, -128
    return w, torch.rand(n, 1) * 0.02 + 1e-3


def examples(short: int, long: int) -> pytest.MarkDecorator:
    """So many random calls, or many where the long tests run."""
    few = pytest.param(short, marks=pytest.mark.short, id=f"{short}")
    many = pytest.param(long, marks=pytest.mark.long, id=f"{long}")
    return pytest.mark.parametrize("examples", [few, many])


def sum_bound(
    sizes: torch.Tensor, roundings: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """How far a sum in `dtype` may be from the exact one, added in any order.

    `sizes` is Σ|xᵢ wᵢ|, the sizes of all that is added; `roundings` is the largest number that one
    term goes through: K for a sum of K products, one more for each scale and each bias. With u half
    a unit in the last place, at worst each of them moves the result by u · `sizes`. Rounding errors
    that are as good as independent move it by at most 8 √roundings · u · `sizes`: by Hoeffding's
    inequality 2 exp(-8²/2) = 3e-14 of all results go beyond. The lesser of both, so no BLAS and no
    instruction set has a part in it.
    """
    info = torch.finfo(dtype)
    steps = min(roundings, 8 * math.sqrt(roundings))
    return sizes.double() * (steps * info.eps / 2) + roundings * info.smallest_normal


def mlp(scheme: str = "int8", dtype: torch.dtype = torch.float32) -> nn.Module:
    """Two layers around a ReLU, all of whose values are the same in every mode."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, 32, bias=False))
    return qnn.convert(model, scheme).to(dtype).eval()


def same_bits(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Equal in shape, dtype and every bit: codes, NaN and the sign of zero."""
    return (got.shape, got.dtype) == (want.shape, want.dtype) and torch.equal(
        got.detach().flatten().view(torch.uint8), want.detach().flatten().view(torch.uint8)
    )


def need_sharded_integers() -> None:
    """A skip where FSDP2 gives every parameter gradients at first, as torch 2.11 does."""
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

    source = inspect.getsource(FSDPParam._init_sharded_param)
    if "requires_grad=param.requires_grad" not in source:
        pytest.skip(f"fully_shard of torch {torch.__version__} takes no integer parameters")


@contextmanager
def python_kernels() -> Iterator[None]:
    """The int8 ops as they run where no library could be built: through torch calls."""
    library = torch.library.Library("qnn", "IMPL", "CPU")
    kernels = {
        "int8_quantize": cpu.quantize,
        "int8_linear": cpu.linear,
        "int8_rows_linear": cpu.rows_linear,
        "int8_static_linear": cpu.static_linear,
        "int8_static_rows_linear": cpu.static_rows_linear,
        "int8_weight_linear": cpu.weight_linear,
    }
    for name, kernel in kernels.items():
        for each in (name, f"{name}_no_grad"):
            library.impl(each, OPS[name]._checked(kernel), allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def calls_of(run: Callable[[], object]) -> int:
    """How many functions `run` calls, C's too: what it costs, whatever else the machine does."""
    count = 0

    def profile(frame: object, event: str, arg: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(before)
    return count


# Imports torch, its compiler and qnn once, runs nothing, and is forked for each call of `forked`.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload([__name__, "torch._inductor.compile_fx"])


def _main(code: str, out: str, err: str) -> None:
    os.dup2(os.open(out, os.O_WRONLY | os.O_APPEND), 1)
    os.dup2(os.open(err, os.O_WRONLY | os.O_APPEND), 2)
    exec(compile(code, "<child>", "exec"), {"__name__": "__main__"})  # noqa: S102 - a test's own
    sys.stdout.flush()


def forked(code: str, timeout: int = 300) -> str:
    """Run `code` in a process that has imported torch and qnn, and done no more; its standard
    output, or an AssertionError with all it said. `child` is for what asks about imports or sets
    what they read.
    """
    with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as err:
        process = _SERVER.Process(target=_main, args=(textwrap.dedent(code), out.name, err.name))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
        text, more = (Path(file.name).read_text(errors="replace") for file in (out, err))
        assert process.exitcode == 0, f"child ended with {process.exitcode}:\n{text}\n{more}"
    return text


def forked_script(path: Path, *arguments: str, cwd: Path, timeout: int = 600) -> str:
    """Run a script as `python path arguments` does, in a process of `forked`."""
    # One thread: results are what is tested, and two busy processes that each spin on every core
    # of a small machine take ten times as long.
    return forked(
        f"""
        import os, runpy, sys, torch
        torch.set_num_threads(1)
        os.environ |= {{"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}}
        os.chdir({str(cwd)!r})
        sys.path.insert(0, {str(path.parent)!r})
        sys.argv = [{str(path)!r}, *{arguments!r}]
        runpy.run_path(sys.argv[0], run_name="__main__")
        """,
        timeout,
    )


def child(code: str, timeout: int = 300, **environment: str) -> str:
    """Run `code` in a fresh process; its standard output, or an AssertionError with all it said."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, f"child failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout

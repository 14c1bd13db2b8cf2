"""Of models in processes of their own: memory at rest, and the time to the first output.

    python benchmarks/model_memory.py resident 'qnn int8 bf16 eager'
    python benchmarks/model_memory.py first-output 'qnn int8 bf16 compiled'

each print one line of JSON; bench_model.py calls them, and reads the tables from here.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters

import qnn
from qnn.kernels.cpu import native

from bert import FULL, QUICK, make_task
from fresh_process import ask, child_parser, reply, resident_bytes
from harness import DTYPES, named, row_of
from report import Part, number, table
from variants import VARIANTS

_AT_REST = (
    "float fp32 eager",
    "float bf16 eager",
    "qnn int8 fp32 eager",
    "qnn int8 bf16 eager",
)
_COMPILED = (
    "float bf16 compiled",
    "qnn int8 bf16 compiled",
    "qnn int8 fp32 compiled",
    "torchao int8 bf16 compiled+frozen",
)


# -- in the fresh process ------------------------------------------------------------------------


def _warm_up(dtype: torch.dtype) -> None:
    """Code, threads and their buffers, which are no part of a model."""
    layer, x = nn.Linear(768, 768).eval(), torch.randn(512, 768)
    layer.to(dtype)(x.to(dtype))
    qnn.convert(layer.float(), "int8").to(dtype)(x.to(dtype))
    words = torch.randn(2, 12, 128, 64, dtype=dtype)
    nn.functional.scaled_dot_product_attention(words, words, words)


def _resident(name: str, quick: bool) -> dict[str, Any]:
    """The model alone, after one call: with whatever a layer keeps from its first call on."""
    variant = named(VARIANTS, name)
    dtype = DTYPES[variant.precision]
    task = make_task(QUICK)  # transformers loads what it needs
    _warm_up(dtype)
    del task
    before = resident_bytes()
    task = make_task(QUICK if quick else FULL)
    model, x = task.model, task.input
    del task
    if variant.family == "qnn int8":
        model = qnn.convert(model, "int8")
    model = model.to(dtype)
    model(x)
    after = resident_bytes()
    state = {id(t): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    linear = {
        id(t): t.nbytes
        for module in model.modules()
        if isinstance(module, (nn.Linear, qnn.QLinear))
        for t in [*module.parameters(), *module.buffers()]
    }
    resident = None if before is None or after is None else after - before
    return {
        "linear": sum(linear.values()),
        "state": sum(state.values()),
        "resident": resident,
    }


def _first_output(name: str, quick: bool) -> dict[str, Any]:
    """From the float32 model in memory to the first output: quantise, compile, call.

    qnn's kernels are there already: an installation builds them once, compiling or not.
    """
    native.ensure()
    variant = named(VARIANTS, name)
    task = make_task(QUICK if quick else FULL)
    start = time.perf_counter()
    variant.build(task, DTYPES[variant.precision]).call()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "cached": counters["inductor"]["fxgraph_cache_hit"] > 0}


# -- in the benchmark ----------------------------------------------------------------------------


def model_at_rest(case: str, quick: bool) -> Part:
    """Memory of a model that has been called once, each in a fresh process, against float32.

    Bytes of parameters and buffers: an int8 layer [N, K] has N·K of weight and 4·N of scales, and
    its bias; embeddings and norms stay float. Resident is what the process grew by.
    """
    answers = {name: ask(__file__, "resident", name, quick=quick) for name in _AT_REST}
    first, body, rows = answers[_AT_REST[0]], [], []
    for name, answer in answers.items():
        if "error" in answer:
            body.append((name, f"failed: {answer['error']}", "-", "-"))
            continue
        cells = []
        for key in ("linear", "state", "resident"):
            value, float32 = answer.get(key), first.get(key)
            share = f" ({value / float32:.2f}x)" if value and float32 else ""
            cells.append("-" if value is None else f"{value / 1e6:.1f}{share}")
            if value is not None:
                row = row_of(f"{case}, {key} at rest", named(VARIANTS, name), "ok", "")
                rows.append(replace(row, megabytes=value / 1e6))
        body.append((name, *cells))
    head = ("MB at rest (over float32)", "linear layers", "all state", "resident")
    return rows, table(head, body)


def starts(case: str, quick: bool, only: Sequence[str] = _COMPILED) -> Part:
    """Time to the first output: with an empty cache of compiled code, and in a second process."""
    body, rows = [], []
    for name in only:
        with tempfile.TemporaryDirectory(prefix="qnn-bench-") as folder:
            cold, warm = (
                ask(__file__, "first-output", name, quick=quick, TORCHINDUCTOR_CACHE_DIR=folder)
                for _ in range(2)
            )
        error = cold.get("error") or warm.get("error")
        if error:
            body.append((name, f"failed: {error}", "-", "-", "-"))
            continue
        ratio, found = (
            f"{cold['seconds'] / warm['seconds']:.1f}x",
            "yes" if warm["cached"] else "no",
        )
        body.append((name, number(cold["seconds"]), number(warm["seconds"]), ratio, found))
        for kind, answer in (("cold", cold), ("warm", warm)):
            row = row_of(f"{case}, {kind} start", named(VARIANTS, name), "ok", "")
            rows.append(replace(row, median_ms=answer["seconds"] * 1e3, samples=1))
    head = ("seconds to the first output", "cold", "warm", "cold / warm", "code from the cache")
    return rows, table(head, body)


def main() -> None:
    parser = child_parser(__doc__)
    parser.add_argument("what", choices=("resident", "first-output"))
    parser.add_argument("name", choices=[v.name for v in VARIANTS])
    options = parser.parse_args()
    work = {"resident": _resident, "first-output": _first_output}[options.what]
    reply(options, lambda: torch.no_grad()(work)(options.name, options.quick))


if __name__ == "__main__":
    main()

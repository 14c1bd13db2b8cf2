"""Of recurrent layers in processes of their own: memory at rest, and what `split_gates` takes.

    python benchmarks/lstm_memory.py at-rest 'qnn int8 fp32 eager'
    python benchmarks/lstm_memory.py split 'QuantizableLSTM' step --split-gates

each print one line of JSON; bench_lstm.py calls them, and reads the tables from here.
"""

from __future__ import annotations

import gc
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import qnn

from fresh_process import ask, child_parser, reply, resident_bytes
from harness import DTYPES, Measurement, named, row_of
from lstm_variants import VARIANTS
from report import Part, number, table
from timing import seconds
from variants import Task

# Of two layers of this size float32 takes 59 MB: enough beside what a library itself takes.
AT_REST, AT_REST_QUICK = (512, 1024, 2), (64, 64, 1)
_AT_REST = (
    "float fp32 eager",
    "float bf16 eager",
    "qnn int8 fp32 eager",
    "qnn int8_static fp32 eager",
    "qnn int8_weight fp32 eager",
    "torch.ao int8 fp32 x86",
    "ONNX Runtime int8 fp32 dynamic",
    "OpenVINO int8 fp32 NNCF",
)
SPLIT, SPLIT_QUICK = (100, 16, 256, 512), (5, 2, 16, 16)
_LAYERS = ("QuantizableLSTM", "QuantizableLSTM, qat", "QLSTM")
_WHAT = ("forward", "step")


# -- in the fresh process ------------------------------------------------------------------------


def recurrent_task(
    inputs: int, hidden: int, layers: int, steps: int = 10, kind: type = nn.LSTM
) -> Task:
    torch.manual_seed(0)
    layer = kind(inputs, hidden, layers).eval()
    calibration = tuple(torch.randn(steps, 4, inputs) for _ in range(4))
    return Task(layer, torch.randn(steps, 1, inputs), calibration)


def _grown(name: str, quick: bool) -> dict[str, Any]:
    """What the process grows by, beyond the float layer, for one more that has been called.

    The first one, which stays, takes what every process takes once: code, threads, buffers.
    """
    variant = named(VARIANTS, name)
    dtype = DTYPES[variant.precision]
    size = AT_REST_QUICK if quick else AT_REST
    first, task = variant.build(recurrent_task(*size), dtype), recurrent_task(*size)
    first.call()
    _forget()
    float32 = sum(parameter.nbytes for parameter in task.model.parameters())
    before = resident_bytes()
    run = variant.build(task, dtype)
    run.call()
    _forget()
    after = resident_bytes()
    del first, run
    grown = None if before is None or after is None else after - before
    return {"float32": float32, "resident": grown}


def _forget() -> None:
    """Drop what building keeps between the cases of a benchmark."""
    import lstm_variants

    for cached in ("_quantized_lstm", "_onnx_lstm", "_openvino_lstm"):
        getattr(lstm_variants, cached).cache_clear()
    gc.collect()


def _layer(name: str, split_gates: bool, inputs: int, hidden: int) -> nn.Module:
    torch.manual_seed(0)
    if name == "QLSTM":
        return qnn.QLSTM(inputs, hidden, split_gates=split_gates)
    layer = qnn.QuantizableLSTM(inputs, hidden, split_gates=split_gates)
    return layer.observe(qat=True) if name.endswith("qat") else layer


def _peak(reset: bool = False) -> int | None:
    """The most bytes that this process had in memory since the last reset; None without /proc."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
            return None
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _split(name: str, what: str, split_gates: bool, quick: bool) -> dict[str, Any]:
    steps, batch, inputs, hidden = SPLIT_QUICK if quick else SPLIT
    layer = _layer(name, split_gates, inputs, hidden)
    layer.train(what == "step")
    x = torch.randn(steps, batch, inputs, requires_grad=what == "step")

    def call(x: torch.Tensor) -> None:
        with torch.set_grad_enabled(what == "step"):
            y = layer(x)[0]
            if what == "step":
                y.square().mean().backward()
        layer.zero_grad()

    call(x[:2].detach().requires_grad_(what == "step"))  # code, threads, kernels, and observing
    x.grad = None
    before = resident_bytes()
    _peak(reset=True)
    call(x)
    peak = _peak()
    times = [seconds(lambda: call(x)) for _ in range(2 if quick else 7)]
    grown = None if before is None or peak is None else max(0, peak - before)
    return {"peak": grown, "seconds": statistics.median(times)}


# -- in the benchmark ----------------------------------------------------------------------------


def layer_at_rest(quick: bool) -> Part:
    """Bytes of one more layer that has been called, over those of float32's parameters."""
    inputs, hidden, layers = AT_REST_QUICK if quick else AT_REST
    case = f"LSTM, I={inputs}, H={hidden}, layers={layers}, resident at rest"
    body, rows = [], []
    for name in _AT_REST:
        variant = named(VARIANTS, name)
        answer = ask(__file__, "at-rest", name, quick=quick)
        grown = answer.get("resident")
        if grown is None:
            body.append((name, f"failed: {answer.get('error', 'no /proc')}", "-"))
            continue
        body.append((name, number(grown / 1e6), f"{grown / answer['float32']:.2f}x"))
        rows.append(replace(row_of(case, variant, "ok", ""), megabytes=grown / 1e6))
    head = ("one more takes", "MB", "of float32's parameters")
    return rows, f"{case}.\n\n{table(head, body)}"


def split_gates(quick: bool) -> Part:
    """Peak memory beyond the layer's own, and time, with `split_gates` and without."""
    steps, batch, inputs, hidden = SPLIT_QUICK if quick else SPLIT
    case = f"LSTM, T={steps}, B={batch}, I={inputs}, H={hidden}, float32"
    body, rows = [], []
    for layer in _LAYERS:
        for what in _WHAT:
            found = [
                ask(__file__, "split", layer, what, *flag, quick=quick)
                for flag in ((), ("--split-gates",))
            ]
            label = "forward" if what == "forward" else "training step"
            error = next((each["error"] for each in found if "error" in each), None)
            if error is not None:
                body.append((layer, label, f"failed: {error}", "-", "-", "-", "-", "-"))
                continue
            cells = []
            for key, unit in (("peak", 1e-6), ("seconds", 1e3)):
                one, split = (None if each[key] is None else each[key] * unit for each in found)
                ratio = f"{split / one:.2f}x" if one and split else "-"
                cells += [number(one), number(split), ratio]
            body.append((layer, label, *cells))
            for split, each in zip((False, True), found, strict=True):
                fields = (case, f"{layer}, {label}, split_gates={split}", f"qnn {layer}", "fp32")
                peak = None if each["peak"] is None else each["peak"] / 1e6
                rows.append(
                    Measurement(
                        *fields, label, "ok", "", median_ms=each["seconds"] * 1e3, megabytes=peak
                    )
                )
    head = (*("layer", "call", "peak MB", "split", "ratio", "median ms", "split", "ratio"),)
    return rows, f"{case}.\n\n{table(head, body, left=(0, 1))}"


def main() -> None:
    parser = child_parser(__doc__)
    parser.add_argument("what", choices=("at-rest", "split"))
    parser.add_argument("name", choices=(*_AT_REST, *_LAYERS))
    parser.add_argument("call", choices=_WHAT, nargs="?", default="forward")
    parser.add_argument("--split-gates", action="store_true")
    options = parser.parse_args()
    name, quick = options.name, options.quick
    work = {
        "at-rest": lambda: torch.no_grad()(_grown)(name, quick),
        "split": lambda: _split(name, options.call, options.split_gates, quick),
    }
    reply(options, work[options.what])


if __name__ == "__main__":
    main()

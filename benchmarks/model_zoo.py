"""What becomes of stock models: size, accuracy, fullgraph compile, export, save and load.

    python benchmarks/model_zoo.py        # docs/benchmarks/model_zoo.*; goes on where it ended
    python benchmarks/model_zoo.py --fresh --only 'bert|llama' --schemes int8
    python benchmarks/model_zoo.py --inductor    # compile with Inductor, not with its front alone
    python benchmarks/model_zoo.py --no-graphs   # neither compile nor export: much faster

Each model and scheme runs in a process of its own, with a time limit. A model that is refused is a
row with its reason; a step that fails is tried on the float model, and the row says if that fails
too. What is not installed is a row as well.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import importlib
import importlib.metadata
import json
import multiprocessing
import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import qnn

from report import table
from stock_models import MODELS, build

SCHEMES = ("int8", "fp8", "nvfp4_weight", "int4_weight_g32")  # 96 is a usual width of theirs
COLUMNS = (
    "model", "library", "scheme", "layers", "quantised_kB", "was_kB", "left_kB", "sqnr_dB",
    "fullgraph", "export", "reload", "remark",
)  # fmt: skip
DOCS = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"
# Linear layers of a class of their own whose arithmetic is that of nn.Linear.
INCLUDE = {"falcon": ("FalconLinear",), "pyg": ("Linear",)}

Call = Callable[[nn.Module], Any]


def first(output: Any) -> torch.Tensor:
    """The first tensor of an output."""
    while not isinstance(output, torch.Tensor):
        output = next(iter(output.values())) if hasattr(output, "values") else output[0]
    return output


def caller(inputs: Any) -> Call:
    def call(model: nn.Module) -> torch.Tensor:
        torch.manual_seed(0)
        return first(model(**inputs) if isinstance(inputs, dict) else model(*inputs))

    return call


def converted(name: str, model: nn.Module, scheme: str) -> nn.Module:
    kinds = INCLUDE.get(name.partition("_")[0], ())
    options: dict[str, Any] = {}
    if kinds:  # named: they are subclasses that qnn does not take by itself
        found = {type(m) for m in model.modules() if type(m).__name__ in (*kinds, "Linear")}
        options["include"] = sorted(found, key=str)
    return qnn.convert(model, scheme, on_unsupported="skip", **options)


def fullgraph(model: nn.Module, call: Call, backend: str) -> str:
    want = call(model)
    torch._dynamo.reset()
    return agrees(want, call(torch.compile(model, fullgraph=True, backend=backend)))


def exported(model: nn.Module, call: Call, inputs: Any) -> str:
    want = call(model)
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (tuple(inputs), None)
    torch.manual_seed(0)
    return agrees(want, call(torch.export.export(model, args, kwargs).module()))


def agrees(want: torch.Tensor, got: torch.Tensor) -> str:
    """`yes`, unless the two differ by more than rounding elsewhere in the model explains."""
    decibels = qnn.sqnr(want, got)
    return "yes" if decibels > 50 else f"differs: {decibels:.0f} dB"


def reloaded(name: str, model: nn.Module, call: Call, scheme: str) -> str:
    """Bit for bit: through `save_pretrained` where there is one, else by the state dict."""
    with tempfile.TemporaryDirectory() as folder:
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(folder)
            again = qnn.load_pretrained(type(model), folder)
        else:
            path = Path(folder) / "model.pt"
            torch.save(model.state_dict(), path)
            again = converted(name, build(name)[0], scheme)
            with torch.no_grad():
                for parameter in again.parameters():
                    parameter.zero_()
            again.load_state_dict(torch.load(path, weights_only=True))
        return "yes" if torch.equal(call(model), call(again)) else "differs"


def step(work: Callable[[], str], of_float: Callable[[], str] | None = None) -> tuple[str, str]:
    """What a step gives, and the remark: an error by its kind and first line."""
    try:
        return work(), ""
    except Exception as error:
        line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        remark = f"{type(error).__name__}: {line[:110]}"
    if of_float is not None and step(of_float)[0] != "yes":
        return "no, nor float", ""
    return "no", remark


@torch.no_grad()
def row(name: str, scheme: str, backend: str | None) -> dict[str, str]:
    """All that is said of one model in one scheme."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    result = dict.fromkeys(COLUMNS, "")
    result |= {"model": name, "library": MODELS[name][0], "scheme": scheme}
    try:
        model, inputs = build(name)
    except ImportError as error:
        return result | {"remark": f"not installed: {error}"}
    call = caller(inputs)
    try:
        twin = converted(name, model, scheme)
    except (TypeError, ValueError) as error:
        lines = str(error).splitlines()
        return result | {
            "remark": "refused: " + " ".join(line.strip() for line in lines[-2:])[:200]
        }
    rows = qnn.summary(twin).rows
    done = [each for each in rows if each.scheme is not None]
    left = sum(each.bytes_after for each in rows if each.scheme is None)
    result |= {
        "layers": str(len(done)),
        "was_kB": f"{sum(each.bytes_before for each in done) / 1e3:.1f}",
        "quantised_kB": f"{sum(each.bytes_after for each in done) / 1e3:.1f}",
        "left_kB": f"{left / 1e3:.1f}",
    }
    result["sqnr_dB"], remark = step(lambda: f"{qnn.sqnr(call(model), call(twin)):.1f}")
    remarks = [remark]
    if backend is not None and not remark:
        for key, work in {
            "fullgraph": lambda m: fullgraph(m, call, backend),
            "export": lambda m: exported(m, call, inputs),
        }.items():
            result[key], remark = step(lambda w=work: w(twin), lambda w=work: w(model))  # type: ignore[misc]
            remarks.append(remark and f"{key}: {remark}")
    result["reload"], remark = step(lambda: reloaded(name, twin, call, scheme))
    remarks.append(remark and f"reload: {remark}")
    return result | {"remark": "; ".join(filter(None, remarks))}


def _child(sender: Any, *args: Any) -> None:
    try:
        sender.send(row(*args))
    except Exception as error:
        sender.send({"remark": f"{type(error).__name__}: {error}"[:200]})


def apart(name: str, scheme: str, backend: str | None, seconds: float) -> dict[str, str]:
    """`row` in a process of its own, forked from this one, which has imported the libraries."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(
        target=_child, args=(sender, name, scheme, backend)
    )
    process.start()
    sender.close()
    result = dict.fromkeys(COLUMNS, "")
    result |= {"model": name, "library": MODELS[name][0], "scheme": scheme}
    try:
        if receiver.poll(seconds):
            result |= receiver.recv()
        else:
            result["remark"] = f"ended after {seconds:.0f} s"
    except EOFError:
        process.join()
        result["remark"] = f"the process ended with {process.exitcode}"
    process.kill()
    process.join()
    return result


def without_its_operators() -> None:
    """torchvision asks for two operators while it is imported, which some builds for CPUs lack."""
    for name in ("nms", "qnms"):
        try:
            torch.library.define(
                f"torchvision::{name}", "(Tensor dets, Tensor scores, float threshold) -> Tensor"
            )
        except RuntimeError:  # it is there
            continue


def page(rows: list[dict[str, str]], backend: str, machine: str) -> str:
    """The table: a row for a model, its schemes beside each other."""
    schemes = list(dict.fromkeys(r["scheme"] for r in rows))
    by_model: dict[str, dict[str, dict[str, str]]] = {}
    for each in rows:
        by_model.setdefault(each["model"], {})[each["scheme"]] = each
    head = ["model", "library", "layers", "kB float", "left float"]
    head += [f"{s}: kB, dB" for s in schemes] + ["fullgraph", "export", "save and load"]
    body, notes = [], []
    for name, found in by_model.items():
        some = next((r for r in found.values() if r["layers"]), next(iter(found.values())))
        cells = [name, some["library"], *(some[k] or "-" for k in ("layers", "was_kB", "left_kB"))]
        for scheme in schemes:
            one = found.get(scheme)
            measured = one is not None and one["quantised_kB"]
            cells.append(f"{one['quantised_kB']}, {one['sqnr_dB']}" if one and measured else "-")
        for key in ("fullgraph", "export", "reload"):
            values = {r[key] for r in found.values() if r[key]}
            cells.append(" / ".join(sorted(values)) or "-")
        body.append(cells)
        remarks = {r["remark"]: None for r in found.values() if r["remark"]}
        notes += [f"- **{name}**: {remark}" for remark in remarks]
    whole = [r for r in rows if r["layers"]]
    good = [r for r in whole if {r["fullgraph"], r["export"], r["reload"]} <= {"yes", ""}]
    parts = [
        f"# {len(by_model)} models",
        f"`python benchmarks/model_zoo.py`; {machine}. Small configurations with random weights "
        "(real ones for minilm). Sizes are those of the layers that are quantised, before and "
        "after, and of all that stays float. The SQNR compares the outputs. Compiled means "
        f"`fullgraph=True` with the backend {backend!r}; loaded means the same bits again after "
        "`save_pretrained` and `qnn.load_pretrained`, or by the state dict. `no, nor float`: the "
        "float model cannot either.",
        f"{len(rows)} rows: {len(whole)} converted, {len(good)} of them with every step that was "
        "run (`-`: not run).",
        table(head, body, left=(0, 1)),
    ]
    if notes:
        parts.append("Refused, or not whole:\n\n" + "\n".join(notes))
    return "\n\n".join(parts) + "\n"


def versions() -> str:
    names = ("torch", *dict.fromkeys(library for library, _ in MODELS.values()))
    found = []
    for name in (*names, "qnn"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join([*found, datetime.date.today().isoformat()])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="models whose name matches this pattern")
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--fresh", action="store_true", help="forget the rows that are there")
    parser.add_argument("--inductor", action="store_true")
    parser.add_argument("--no-graphs", action="store_true", help="neither compile nor export")
    parser.add_argument("--seconds", type=float, default=300, help="for one model and scheme")
    parser.add_argument("--out", type=Path, default=DOCS)
    options = parser.parse_args()
    path = options.out / "model_zoo.csv"
    backend = "inductor" if options.inductor else "eager"
    rows: list[dict[str, str]] = []
    if path.is_file() and not options.fresh:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    # A row without graphs is done again where graphs are asked for.
    known = {
        (r["model"], r["scheme"])
        for r in rows
        if options.no_graphs or r["fullgraph"] or not r["layers"]
    }
    without_its_operators()
    for library in {library for library, _ in MODELS.values()}:
        try:
            importlib.import_module(library)
        except ImportError as error:
            print(f"{library}: {error}")
    # What the libraries import late is imported here once, and not in every process.
    for name, graphs in (("bert", None), ("raw_parameters", backend)):
        step(lambda name=name, graphs=graphs: str(row(name, "int8", graphs)))  # type: ignore[misc]
    for scheme in options.schemes.split(","):
        for name in MODELS:
            if (name, scheme) in known or not re.search(options.only, name):
                continue
            graphs = None if options.no_graphs else backend
            rows = [r for r in rows if (r["model"], r["scheme"]) != (name, scheme)]
            rows.append(apart(name, scheme, graphs, options.seconds))
            print(json.dumps(rows[-1]), flush=True)
            order = list(MODELS)
            rows.sort(key=lambda r: (order.index(r["model"]), SCHEMES.index(r["scheme"])))
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
    (options.out / "model_zoo.md").write_text(page(rows, backend, versions()))


if __name__ == "__main__":
    main()

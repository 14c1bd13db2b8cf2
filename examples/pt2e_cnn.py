"""Graph mode on a small ResNet: post-training, quantisation-aware, exported, packaged.

The network of convnet_int8.py is trained on scikit-learn's digits and exported. Then

- static: `prepare_pt2e`, `qnn.calibrate` on some training images, `convert_pt2e`;
- trained: `prepare_qat_pt2e`, some epochs of quantisation-aware training with BatchNorms of their
  own, `convert_pt2e`, which folds them;
- each is exported again, and the trained one packaged by AOTInductor, without freezing, and run by
  a process that has never seen the model.

    python examples/pt2e_cnn.py           # two to three minutes on two cores
    python examples/pt2e_cnn.py --tiny    # a first look

It prints accuracy on images that were not trained on, bytes and milliseconds, and draws the error
that each layer makes.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from convnet_int8 import BATCH, TRAINED, digits, measure, plot, resnet, train
from torch import nn

import qnn  # whoever loads a program or a package needs it too: it registers the operators
from qnn.pt2e import Int8Quantizer, convert_pt2e, prepare_pt2e, prepare_qat_pt2e

FULL = {"width": 24, "epochs": 14, "more": 4, "repeats": 9}
TINY = {"width": 8, "epochs": 8, "more": 1, "repeats": 2}
PROGRAM, PACKAGE, CASE = "program.pt2", "package.pt2", "case.pt"


def exported(model: nn.Module, images: torch.Tensor) -> Any:
    """The graph, for batches of any size."""
    shapes = ({0: torch.export.Dim("batch", min=2, max=4096)},)
    return torch.export.export(model, (images[:BATCH],), dynamic_shapes=shapes)


def leave(folder: Path, model: nn.Module, images: torch.Tensor) -> None:
    """Save the program and the package, and a case with its result."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        program = exported(model, images)
        print(f"\n{len(qnn.passes.regions(program))} quantised regions in the exported graph")
        torch.export.save(program, folder / PROGRAM)
        torch._inductor.aoti_compile_and_package(program, package_path=str(folder / PACKAGE))
        torch.save({"images": images, "logits": model(images)}, folder / CASE)


def load(folder: Path) -> None:
    """Run both files, with nothing of the model's Python code at hand."""
    case = torch.load(folder / CASE)
    runs: dict[str, Callable[..., torch.Tensor]] = {
        "exported program": torch.export.load(folder / PROGRAM).module(),
        "AOTInductor package": torch._inductor.aoti_load_package(str(folder / PACKAGE)),
    }
    for name, run in runs.items():
        logits, times = run(case["images"]), []
        for _ in range(10):
            began = time.perf_counter()
            run(case["images"])
            times.append(1e3 * (time.perf_counter() - began))
        same = (logits.argmax(-1) == case["logits"].argmax(-1)).float().mean().item()
        db = qnn.sqnr(case["logits"], logits)
        print(
            f"in a fresh process, {name}: {100 * same:.1f}% of the digits as in eager, "
            f"{db:.0f} dB, {statistics.median(times):.2f} ms"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="A small ResNet, quantised as a graph.")
    parser.add_argument("--tiny", action="store_true", help="a small model, few epochs")
    parser.add_argument("--epochs", type=int, help="of training in float32")
    parser.add_argument("--more", type=int, help="epochs of quantisation-aware training")
    parser.add_argument("--width", type=int, help="channels of the first block")
    parser.add_argument("--out", type=Path, default=Path("out/pt2e_cnn"), help="plot and files")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    parser.set_defaults(**(TINY if parser.parse_known_args()[0].tiny else FULL))
    a = parser.parse_args()
    if a.load:
        load(a.load)
        return
    torch.manual_seed(0)

    images, wanted = digits()
    model = resnet(a.width)
    train(model, images[:TRAINED], wanted[:TRAINED], a.epochs)
    program = exported(model, images)
    quantizer = Int8Quantizer("int8_static")

    prepared = prepare_pt2e(program, quantizer)
    static = convert_pt2e(qnn.calibrate(prepared, images[:512].split(BATCH)))

    prepared = prepare_qat_pt2e(program, quantizer)
    train(prepared, images[:TRAINED], wanted[:TRAINED], a.more, rate=4e-4)
    trained = convert_pt2e(prepared)
    print(f"\n{qnn.summary(trained)}")

    unseen, right = images[TRAINED:], wanted[TRAINED:]
    models = {"float32": model, "static": static, "trained": trained}
    with torch.no_grad():
        models["compiled"] = torch.compile(trained, fullgraph=True)
        print(f"\n{'':10}{'accuracy':>9}{'bytes':>9}{'ms a batch':>12}")
        for name, (accuracy, ms) in measure(models, unseen, right, a.repeats).items():
            size = sum(tensor.nbytes for tensor in models[name].state_dict().values())
            print(f"{name:10}{accuracy:8.2f}%{size:9}{ms:12.2f}")

    a.out.mkdir(parents=True, exist_ok=True)
    fused = qnn.fuse(model)
    plot(a.out / "pt2e_cnn.png", {"static": qnn.compare(fused, static, unseen)})
    leave(a.out, trained, unseen)
    sys.stdout.flush()
    subprocess.run([sys.executable, __file__, "--load", a.out], check=True)
    print(f"plot: {a.out / 'pt2e_cnn.png'}")


if __name__ == "__main__":
    main()

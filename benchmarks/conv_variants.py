"""Ways to run a convolution network on a CPU, in qnn and its peers.

All get the float32 network in eval mode. Float and qnn run it in channels-last memory, where
torch's own convolutions are fastest; the peers choose their layout themselves. Static variants are
calibrated on the same images.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness import Run, Variant, inductor_settings, needs
from variants import (
    Task,
    compiled_run,
    float_compiled,
    float_eager,
    onnx_session,
    openvino,
    qnn_compiled,
    qnn_eager,
    qnn_packaged,
    scratch,
)


def float_frozen(task: Task, dtype: torch.dtype) -> Run:
    """Weights in oneDNN's own order, BatchNorm folded."""
    with inductor_settings(freezing=True):
        return float_compiled(task, dtype)


# -- torchao -----------------------------------------------------------------------------------


def torchao_pt2e(task: Task, dtype: torch.dtype) -> Run:
    """Export, calibrate, convert, and freeze: the way that torchao documents for a CPU."""
    from torch._dynamo.utils import counters

    pt2e = needs("torchao.quantization.pt2e.quantize_pt2e")
    with inductor_settings(freezing=True):
        x86 = needs("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
        exported = torch.export.export(copy.deepcopy(task.model), (task.input,)).module()
        prepared = pt2e.prepare_pt2e(exported, quantizer)
        batch = len(task.input)  # the graph takes this batch alone
        for image in task.calibration:
            prepared(image.expand(batch, *image.shape[1:]).contiguous())
        model: Any = pt2e.convert_pt2e(prepared)
        counters["inductor"].clear()
        run = compiled_run(model, task.input)
    packed = counters["inductor"]["qconv_weight_prepack_matcher_count"]
    return Run(run.call, f"prepacked: {packed} convolutions")


# -- ONNX Runtime ------------------------------------------------------------------------------


@functools.cache
def _onnx_static(model: nn.Module, calibration: tuple[torch.Tensor, ...]) -> Path:
    """The network in ONNX with QDQ nodes, calibrated, and a batch of any size."""
    needs("onnxruntime")
    needs("onnxscript")
    quantization = needs("onnxruntime.quantization")
    preparation = needs("onnxruntime.quantization.shape_inference")
    folder = Path(tempfile.mkdtemp(dir=scratch()))
    exported, prepared, quantised = (folder / f"{n}.onnx" for n in ("float", "pre", "int8"))
    torch.onnx.export(
        copy.deepcopy(model),
        (calibration[0],),
        exported,
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim.AUTO},),
        external_data=False,
        verbose=False,
    )
    preparation.quant_pre_process(exported, prepared)
    name = needs("onnx").load(prepared).graph.input[0].name

    class Reader(quantization.CalibrationDataReader):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            self.batches = iter([{name: image.numpy()} for image in calibration])

        def get_next(self) -> Any:
            return next(self.batches, None)

    quantization.quantize_static(
        prepared,
        quantised,
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        weight_type=quantization.QuantType.QInt8,
        activation_type=quantization.QuantType.QUInt8,
    )
    return quantised


def onnxruntime_static(task: Task, dtype: torch.dtype) -> Run:
    return Run(onnx_session(_onnx_static(task.model, task.calibration), task.input))


VARIANTS: tuple[Variant[Task], ...] = (
    Variant("float", "fp32", "eager", float_eager),
    Variant("float", "fp32", "compiled", float_compiled),
    Variant("float", "fp32", "compiled+frozen", float_frozen),
    Variant("float", "bf16", "compiled", float_compiled),
    Variant("qnn int8", "fp32", "eager", qnn_eager),
    Variant("qnn int8", "fp32", "compiled", qnn_compiled),
    Variant("qnn int8_static", "fp32", "eager", partial(qnn_eager, scheme="int8_static")),
    Variant("qnn int8_static", "fp32", "compiled", partial(qnn_compiled, scheme="int8_static")),
    Variant("qnn int8_static", "fp32", "AOTInductor", partial(qnn_packaged, scheme="int8_static")),
    Variant("qnn int8_weight", "fp32", "compiled", partial(qnn_compiled, scheme="int8_weight")),
    Variant("torchao PT2E", "fp32", "compiled+frozen", torchao_pt2e),
    Variant("ONNX Runtime int8", "fp32", "static", onnxruntime_static),
    Variant("OpenVINO int8", "fp32", "NNCF", openvino),
)

# Transposed layers, in eager mode.
TRANSPOSED: tuple[Variant[Task], ...] = (
    Variant("float", "fp32", "eager", float_eager),
    Variant("float", "bf16", "eager", float_eager),
    *(
        Variant(f"qnn {scheme}", "fp32", "eager", partial(qnn_eager, scheme=scheme))
        for scheme in ("int8_weight", "int8", "int8_static", "int16")
    ),
)

"""Ways to run an `nn.LSTM` or `nn.GRU` on a CPU, in qnn and its peers.

Every variant has the whole sequence in one call, from a zero state, and answers with the outputs
`[T, B, D·H]` and the last states, or with the outputs alone. Peers named int8 multiply in int8 with
8-bit weights; their input and output is float32 where `fp32` stands.
"""

from __future__ import annotations

import copy
import functools
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._dynamo import config as dynamo

import qnn

from harness import Run, Unavailable, Variant, first_tensor, inductor_settings, needs
from variants import (
    Task,
    compiled_run,
    float_eager,
    onnx_session,
    openvino_call,
    openvino_compiled,
    quantised_onnx,
    quantized_engine,
    scratch,
)

# -- float ---------------------------------------------------------------------------------------


def lstm_float_compiled(task: Task, dtype: torch.dtype) -> Run:
    """Dynamo refuses recurrent layers of torch unless it is told otherwise."""
    if isinstance(task.model, nn.GRU):
        raise Unavailable("Inductor unrolls every step of a GRU, and compiles for minutes")
    with dynamo.patch(allow_rnn=True):
        run = compiled_run(task.model_in(dtype), task.input_in(dtype))

    def call() -> object:
        with dynamo.patch(allow_rnn=True):  # a guard of what was compiled
            return run.call()

    return Run(call, "with torch._dynamo.config.allow_rnn")


# -- qnn -----------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _quantized_lstm(
    model: nn.Module, calibration: tuple[torch.Tensor, ...], scheme: str, sixteen: bool
) -> nn.Module:
    if scheme != "int8_static":
        return qnn.convert(model, scheme)
    prepared = qnn.prepare(model, parts=None if sixteen else qnn.parts.EIGHT_BIT)
    return qnn.convert(qnn.calibrate(prepared, calibration, progress=False))


def qnn_layer(task: Task, dtype: torch.dtype, scheme: str, sixteen: bool = False) -> nn.Module:
    layer = _quantized_lstm(task.model, task.calibration, scheme, sixteen)
    return copy.deepcopy(layer).to(dtype)


def qnn_backend(layer: nn.Module) -> str:
    """What runs, in a few words."""
    (row,) = qnn.summary(layer).rows
    return (row.backend or "").split(";")[0].removeprefix("cpu: ").split(",")[0].split(":")[0]


def qnn_lstm_eager(
    task: Task, dtype: torch.dtype, *, scheme: str = "int8", sixteen: bool = False
) -> Run:
    layer, x = qnn_layer(task, dtype, scheme, sixteen), task.input_in(dtype)
    layer(x)  # builds the kernels where that is due
    return Run(partial(layer, x), qnn_backend(layer))


def qnn_lstm_compiled(task: Task, dtype: torch.dtype, *, scheme: str = "int8") -> Run:
    layer = qnn_layer(task, dtype, scheme)
    with inductor_settings():
        run = compiled_run(layer, task.input_in(dtype))
    return Run(run.call, qnn_backend(layer))


# -- torch.ao ------------------------------------------------------------------------------------


def torch_ao_lstm(task: Task, dtype: torch.dtype, *, engine: str) -> Run:
    """Dynamic quantisation, with the kernels of one engine."""
    if engine not in torch.backends.quantized.supported_engines:
        raise Unavailable("this build of torch has no such engine")
    holder = nn.Sequential(task.model_in(dtype))  # a bare layer has no parent to be swapped in
    with quantized_engine(engine):
        torch.ao.quantization.quantize_dynamic(holder, {type(task.model)}, inplace=True)
    layer, x = holder[0], task.input_in(dtype)

    def call() -> object:
        with quantized_engine(engine):
            return layer(x)

    return Run(call)


# -- ONNX Runtime --------------------------------------------------------------------------------


class _Outputs(nn.Module):
    """The outputs without the last states, which the peers' tracers would name one by one."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = copy.deepcopy(layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(x)[0]
        return y


@functools.lru_cache(maxsize=2)
def _onnx_lstm(model: nn.Module, example: torch.Tensor) -> tuple[Path, Path]:
    """The layer in ONNX, and the same dynamically quantised, for a batch of any size.

    By the older exporter: the newer one takes a minute for a recurrent layer, and cuts its weights
    into constants that ONNX Runtime then does not quantise.
    """
    needs("onnxruntime")
    needs("onnx")
    exported = Path(tempfile.mkdtemp(dir=scratch())) / "float.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Outputs(model),
            (example,),
            str(exported),
            dynamo=False,
            input_names=["x"],
            output_names=["y"],
            dynamic_axes={"x": {1: "batch"}, "y": {1: "batch"}},
        )
    return exported, quantised_onnx(exported)


def onnxruntime_lstm(task: Task, dtype: torch.dtype, *, quantised: bool) -> Run:
    needs("onnxruntime")
    if quantised and isinstance(task.model, nn.GRU):
        raise Unavailable("it has no quantised GRU")
    path = _onnx_lstm(task.model, task.calibration[0])[quantised]
    return Run(onnx_session(path, task.input_in(dtype)))


# -- OpenVINO ------------------------------------------------------------------------------------


def _batch_first(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(0, 1).contiguous()


@functools.lru_cache(maxsize=4)
def _openvino_lstm(
    model: nn.Module, calibration: tuple[torch.Tensor, ...], quantised: bool
) -> tuple[Any, int]:
    """The layer in OpenVINO, quantised by NNCF or not, and how many tensors NNCF quantises.

    With the batch in front: only then does OpenVINO take its kernel of all steps, which is up to
    four times as fast as its loop, and the only one in int8.
    """
    ov = needs("openvino")
    layer = copy.deepcopy(model)
    layer.batch_first = True
    data = [_batch_first(x) for x in calibration]
    converted = ov.convert_model(_Outputs(layer), example_input=data[0])
    if quantised:
        nncf = needs("nncf")
        converted = nncf.quantize(
            converted,
            nncf.Dataset([x.numpy() for x in data]),
            subset_size=len(data),
            preset=nncf.QuantizationPreset.MIXED,  # 0.4 dB more than its default
        )
    kinds = [op.get_type_name() for op in converted.get_ops()]
    return converted, kinds.count("FakeQuantize")


def openvino_lstm(task: Task, dtype: torch.dtype, *, quantised: bool) -> Run:
    needs("openvino")
    model, points = _openvino_lstm(task.model, task.calibration, quantised)
    if quantised and not points:
        raise Unavailable("NNCF leaves this layer in float")
    x = _batch_first(task.input)
    model = model.clone()
    model.reshape(list(x.shape))
    ready = openvino_compiled(model, dtype)
    return Run(
        openvino_call(ready, x), _kernel(ready), lambda result: first_tensor(result).transpose(0, 1)
    )


def _kernel(compiled: Any) -> str:
    """RNNSeq is its kernel of all steps, TensorIterator its loop over single ones."""
    infos = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    kinds = [(info["layerType"].value, info["runtimePrecision"].value) for info in infos]
    found = [f"{kind} {precision}" for kind, precision in kinds if kind in _KERNELS]
    return f"runs as {', '.join(dict.fromkeys(found)) or 'other nodes'}"


_KERNELS = ("RNNSeq", "RNNCell", "TensorIterator")


VARIANTS: tuple[Variant[Task], ...] = (
    Variant("float", "fp32", "eager", float_eager),
    Variant("float", "fp32", "compiled", lstm_float_compiled),
    Variant("float", "bf16", "eager", float_eager),
    Variant("float", "bf16", "compiled", lstm_float_compiled),
    *(
        Variant(f"qnn {scheme}", precision, "eager", partial(qnn_lstm_eager, scheme=scheme))
        for scheme in ("int8", "int8_static", "int8_weight")
        for precision in ("fp32", "bf16")
    ),
    Variant(
        "qnn int8_static",
        "fp32",
        "16-bit parts",
        partial(qnn_lstm_eager, scheme="int8_static", sixteen=True),
    ),
    Variant("qnn int8", "fp32", "compiled", qnn_lstm_compiled),
    Variant(
        "qnn int8_static", "fp32", "compiled", partial(qnn_lstm_compiled, scheme="int8_static")
    ),
    *(
        Variant("torch.ao int8", "fp32", engine, partial(torch_ao_lstm, engine=engine))
        for engine in ("x86", "fbgemm", "onednn", "qnnpack")
    ),
    Variant("ONNX Runtime", "fp32", "float", partial(onnxruntime_lstm, quantised=False)),
    Variant("ONNX Runtime int8", "fp32", "dynamic", partial(onnxruntime_lstm, quantised=True)),
    Variant("OpenVINO", "fp32", "float", partial(openvino_lstm, quantised=False)),
    Variant("OpenVINO", "bf16", "float", partial(openvino_lstm, quantised=False)),
    Variant("OpenVINO int8", "fp32", "NNCF", partial(openvino_lstm, quantised=True)),
    Variant("OpenVINO int8", "bf16", "NNCF", partial(openvino_lstm, quantised=True)),
)

"""The one registry of variants: ways to run a float32 model on a CPU, in qnn and its peers.

A builder takes a `Task` and a dtype and returns a `Run`, or raises `Unavailable`. It works on its
own copy of the model, compiles into its own cache, and leaves no setting of the process changed.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import functools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import qnn

from harness import Run, Variant, compiled, inductor_settings, needs
from timing import fastest


@dataclass(frozen=True, eq=False)
class Task:
    """A float32 model in eval mode and its input.

    `calibration` holds more inputs, of any batch size: for static quantisation, and for tracing.
    Tasks that share `model` and `calibration` share what is derived from them. `memory_format` is
    that of images in float and in qnn; peers choose their own.
    """

    model: nn.Module
    input: torch.Tensor
    calibration: tuple[torch.Tensor, ...]
    transformer: bool = False
    memory_format: torch.memory_format = torch.preserve_format

    def model_in(self, dtype: torch.dtype) -> nn.Module:
        return self._placed(copy.deepcopy(self.model), dtype)

    def input_in(self, dtype: torch.dtype) -> torch.Tensor:
        if not self.input.is_floating_point():
            return self.input
        is_image = self.input.dim() == 4
        return self.input.to(
            dtype, memory_format=self.memory_format if is_image else torch.preserve_format
        )

    def quantized_in(self, dtype: torch.dtype, scheme: str) -> nn.Module:
        """The model by `qnn.convert`, its BatchNorm layers folded."""
        return self._placed(copy.deepcopy(_quantized(self.model, self.calibration, scheme)), dtype)

    def _placed(self, model: nn.Module, dtype: torch.dtype) -> nn.Module:
        return model.to(dtype=dtype, memory_format=self.memory_format)  # type: ignore[call-overload]


@functools.lru_cache(maxsize=4)
def _quantized(model: nn.Module, calibration: tuple[torch.Tensor, ...], scheme: str) -> nn.Module:
    has_norms = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    fused = qnn.fuse(model, calibration[0]) if has_norms else model
    if scheme != "int8_static":
        return qnn.convert(fused, scheme)
    return qnn.convert(qnn.calibrate(qnn.prepare(fused), calibration, progress=False))


def compiled_run(model: nn.Module, x: torch.Tensor, note: str = "") -> Run:
    """`torch.compile` and the first call, under the settings of this moment."""
    call = partial(compiled(model), x)
    call()
    return Run(call, note)


# -- float and qnn -----------------------------------------------------------------------------


def float_eager(task: Task, dtype: torch.dtype) -> Run:
    return Run(partial(task.model_in(dtype), task.input_in(dtype)))


def float_compiled(task: Task, dtype: torch.dtype) -> Run:
    return compiled_run(task.model_in(dtype), task.input_in(dtype))


def qnn_eager(task: Task, dtype: torch.dtype, *, scheme: str = "int8") -> Run:
    return Run(partial(task.quantized_in(dtype, scheme), task.input_in(dtype)))


def qnn_compiled(task: Task, dtype: torch.dtype, *, scheme: str = "int8") -> Run:
    """Tracing qnn's ops adds its pass to Inductor's settings; peers are compiled without it."""
    with inductor_settings():
        return compiled_run(task.quantized_in(dtype, scheme), task.input_in(dtype))


def packaged_run(model: nn.Module, x: torch.Tensor) -> Run:
    """Exported and packaged by AOTInductor, for this batch; under the settings of this moment."""
    path = Path(tempfile.mkdtemp(dir=scratch())) / "model.pt2"
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    package: Any = torch._inductor.aoti_load_package(str(path))
    return Run(partial(package, x))


def qnn_packaged(task: Task, dtype: torch.dtype, *, scheme: str = "int8") -> Run:
    with inductor_settings():
        return packaged_run(task.quantized_in(dtype, scheme), task.input_in(dtype))


# -- torch.ao ----------------------------------------------------------------------------------


@contextlib.contextmanager
def quantized_engine(name: str) -> Iterator[None]:
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = name
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


def torch_ao(task: Task, dtype: torch.dtype) -> Run:
    """Dynamic quantisation, on the fastest of this build's engines.

    Where there are others, qnnpack is not tried: it is made for phones, and took eight times as
    long as they did (six layers of BERT-base, 2 Zen 4 cores).
    """
    models: dict[str, nn.Module] = {}
    engines = [e for e in torch.backends.quantized.supported_engines if e != "none"]
    for engine in [e for e in engines if e != "qnnpack"] or engines:
        holder = nn.Sequential(task.model_in(dtype))  # a bare layer has no parent to be swapped in
        with quantized_engine(engine):
            torch.ao.quantization.quantize_dynamic(holder, {nn.Linear}, inplace=True)
        models[engine] = holder[0]
    runs = {name: partial(model, task.input_in(dtype)) for name, model in models.items()}
    best, note = fastest(runs)
    return Run(runs[best], note)


# -- torchao -----------------------------------------------------------------------------------


def _torchao_model(task: Task, dtype: torch.dtype) -> nn.Module:
    quantization = needs("torchao.quantization")
    model = task.model_in(dtype)
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
    return model


def torchao_eager(task: Task, dtype: torch.dtype) -> Run:
    with inductor_settings():
        return Run(partial(_torchao_model(task, dtype), task.input_in(dtype)))


def torchao_compiled(task: Task, dtype: torch.dtype) -> Run:
    with inductor_settings():
        return compiled_run(_torchao_model(task, dtype), task.input_in(dtype))


def torchao_frozen(task: Task, dtype: torch.dtype) -> Run:
    """The way to prepacked oneDNN kernels: torchao's X86 passes.

    Importing its X86 quantiser registers them, in a list that is read only when weights are frozen.
    """
    from torch._dynamo.utils import counters
    from torch._inductor import config

    with inductor_settings(freezing=True):
        x86 = needs("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
        config.pre_grad_custom_pass = (
            x86.quant_lift_up
        )  # as the import does, but only the first one
        model = _torchao_model(task, dtype)
        counters["inductor"].clear()
        run = compiled_run(model, task.input_in(dtype))
    packed = counters["inductor"]["qlinear_weight_prepack_matcher_count"]
    layers = sum(isinstance(module, nn.Linear) for module in model.modules())
    return Run(run.call, f"prepacked: {packed} of {layers} linear layers")


# -- ONNX Runtime ------------------------------------------------------------------------------


@functools.cache
def scratch() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="qnn-bench-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


@functools.cache
def _onnx_int8(model: nn.Module, example: torch.Tensor) -> Path:
    """The model in ONNX, dynamically quantised, with a batch of any size."""
    needs("onnxruntime")
    needs("onnxscript")
    exported = Path(tempfile.mkdtemp(dir=scratch())) / "float.onnx"
    torch.onnx.export(
        copy.deepcopy(model),
        (example,),
        exported,
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim.AUTO},),
        external_data=False,
        verbose=False,
    )
    return quantised_onnx(exported)


def onnx_session(path: Path, x: torch.Tensor) -> Callable[[], object]:
    """A call of the file's model with `x`."""
    ort = needs("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its idle threads would spin on after its turn, and a layer of 0.9 ms in torch then took 5 to
    # 16 ms (2 cores). ONNX Runtime itself is not slower for it: within a call it still spins.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return partial(session.run, None, {session.get_inputs()[0].name: x.numpy()})


def quantised_onnx(exported: Path) -> Path:
    """The file's model, dynamically quantised."""
    quantization = needs("onnxruntime.quantization")
    preparation = needs("onnxruntime.quantization.shape_inference")
    prepared, quantised = (exported.with_name(f"{name}.onnx") for name in ("pre", "int8"))
    preparation.quant_pre_process(exported, prepared)
    quantization.quantize_dynamic(
        prepared, quantised, per_channel=True, weight_type=quantization.QuantType.QInt8
    )
    return quantised


def onnxruntime(task: Task, dtype: torch.dtype) -> Run:
    return Run(onnx_session(_onnx_int8(task.model, task.calibration[0]), task.input_in(dtype)))


# -- OpenVINO ----------------------------------------------------------------------------------


@functools.cache
def _openvino_int8(
    model: nn.Module, calibration: tuple[torch.Tensor, ...], transformer: bool
) -> Any:
    """The model in OpenVINO, statically quantised by NNCF, with a batch of any size."""
    openvino, nncf = needs("openvino"), needs("nncf")
    return nncf.quantize(
        openvino.convert_model(copy.deepcopy(model), example_input=calibration[0]),
        nncf.Dataset([x.numpy() for x in calibration]),
        model_type=nncf.ModelType.TRANSFORMER if transformer else None,
        subset_size=len(calibration),
    )


def openvino_compiled(model: Any, dtype: torch.dtype) -> Any:
    """The model on the CPU. `dtype` is its precision hint: what it computes in where it does not
    compute in int8, and where the CPU is good at it. Input and output stay float32.
    """
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32" if dtype == torch.float32 else "bf16",
    }
    return needs("openvino").Core().compile_model(model, "CPU", settings)


def openvino_call(model: Any, x: torch.Tensor) -> Callable[[], object]:
    infer = model.create_infer_request().infer
    return partial(infer, [x.numpy()], share_inputs=True, share_outputs=True)


def openvino(task: Task, dtype: torch.dtype) -> Run:
    needs("openvino")
    model = _openvino_int8(task.model, task.calibration, task.transformer).clone()
    model.reshape(list(task.input.shape))
    ready = openvino_compiled(model, dtype)
    chosen = ready.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    return Run(openvino_call(ready, task.input), f"precision: {chosen}")


BASELINE = "float fp32 eager"
VARIANTS: tuple[Variant[Task], ...] = (
    Variant("float", "fp32", "eager", float_eager),
    Variant("float", "fp32", "compiled", float_compiled),
    Variant("float", "bf16", "eager", float_eager),
    Variant("float", "bf16", "compiled", float_compiled),
    Variant("qnn int8", "fp32", "eager", qnn_eager),
    Variant("qnn int8", "fp32", "compiled", qnn_compiled),
    Variant("qnn int8", "bf16", "eager", qnn_eager),
    Variant("qnn int8", "bf16", "compiled", qnn_compiled),
    Variant("torch.ao int8", "fp32", "eager", torch_ao),
    Variant("torchao int8", "fp32", "eager", torchao_eager),
    Variant("torchao int8", "fp32", "compiled", torchao_compiled),
    Variant("torchao int8", "fp32", "compiled+frozen", torchao_frozen),
    Variant("torchao int8", "bf16", "eager", torchao_eager),
    Variant("torchao int8", "bf16", "compiled", torchao_compiled),
    Variant("torchao int8", "bf16", "compiled+frozen", torchao_frozen),
    Variant("ONNX Runtime int8", "fp32", "dynamic", onnxruntime),
    Variant("OpenVINO int8", "fp32", "NNCF", openvino),
    Variant("OpenVINO int8", "bf16", "NNCF", openvino),
)

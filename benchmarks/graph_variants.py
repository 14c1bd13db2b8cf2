"""Ways to run a quantised graph on a CPU: `qnn.pt2e` compiled, frozen and packaged, and its peers.

All get the float32 model in eval mode, and the same inputs for calibration.
"""

from __future__ import annotations

import copy
import functools
from functools import partial

import torch
from torch import nn

import qnn

from conv_variants import float_frozen, torchao_pt2e
from harness import Run, Variant, inductor_settings
from variants import Task, compiled_run, float_compiled, openvino, packaged_run


@functools.lru_cache(maxsize=4)
def _converted_graph(
    model: nn.Module, calibration: tuple[torch.Tensor, ...], scheme: str
) -> torch.fx.GraphModule:
    """The model's graph, for batches of any size, prepared, calibrated and converted."""
    from qnn import pt2e

    shapes = ({0: torch.export.Dim("batch", min=2, max=4096)},)
    program = torch.export.export(
        copy.deepcopy(model), (torch.cat(calibration[:2]),), dynamic_shapes=shapes
    )
    prepared = pt2e.prepare_pt2e(program, pt2e.Int8Quantizer(scheme))
    if scheme == "int8_static":
        qnn.calibrate(prepared, [torch.cat([x, x]) for x in calibration], progress=False)
    return pt2e.convert_pt2e(prepared)


def _graph_of(task: Task, scheme: str) -> nn.Module:
    model = copy.deepcopy(_converted_graph(task.model, task.calibration, scheme))
    return model.to(memory_format=task.memory_format)  # type: ignore[call-overload]


def qnn_graph(
    task: Task, dtype: torch.dtype, *, scheme: str = "int8_static", freezing: bool = False
) -> Run:
    with inductor_settings(freezing=freezing):
        return compiled_run(_graph_of(task, scheme), task.input_in(dtype))


def qnn_graph_packaged(task: Task, dtype: torch.dtype, *, scheme: str = "int8_static") -> Run:
    with inductor_settings():
        return packaged_run(_graph_of(task, scheme), task.input_in(dtype))


VARIANTS: tuple[Variant[Task], ...] = (
    Variant("float", "fp32", "compiled", float_compiled),
    Variant("float", "fp32", "compiled+frozen", float_frozen),
    Variant("qnn int8_static", "fp32", "compiled", qnn_graph),
    Variant("qnn int8_static", "fp32", "compiled+frozen", partial(qnn_graph, freezing=True)),
    Variant("qnn int8_static", "fp32", "AOTInductor", qnn_graph_packaged),
    Variant("qnn int8", "fp32", "compiled", partial(qnn_graph, scheme="int8")),
    Variant("torchao PT2E", "fp32", "compiled+frozen", torchao_pt2e),
    Variant("OpenVINO int8", "fp32", "NNCF", openvino),
)

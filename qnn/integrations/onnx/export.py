"""`torch.onnx.export` with qnn's translations, and what it needs before and after."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import optimizer
from torch import nn

from qnn.integrations.onnx.build import NotTranslatableError
from qnn.integrations.onnx.table import translations
from qnn.kinds import is_prepared, is_training

_WHO = "qnn.integrations.onnx.export"
# What lays weights out anew, if it is of constants; whatever their size.
_LAYS_OUT = ("Transpose", "Reshape", "Unsqueeze", "Squeeze", "BitwiseXor")
_BYTES = 1 << 31


def export(
    model: nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...] = (),
    f: str | os.PathLike[str] | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    custom_translation_table: Mapping[Any, Callable[..., Any]] | None = None,
    **options: Any,
) -> torch.onnx.ONNXProgram:
    """Export a converted model to ONNX, with integer operators where qnn multiplies integers.

    `torch.onnx.export(model, args, dynamo=True, …)` with the table of `translations()`, after a
    look at the model, and with the weights laid out once for all as the operators read them.

    Args:
        model: in evaluation mode, converted by `qnn.convert` or `qnn.pt2e.convert`; or an exported
            program of one.
        args, kwargs: of a call, as for `torch.onnx.export`.
        f: where to write the file; None to write none.
        custom_translation_table: of the caller's own operators.
        options: others of `torch.onnx.export`, such as `dynamic_shapes`, `input_names`,
            `opset_version` (18 or later; float8 needs 19).

    Returns:
        the program, as of `torch.onnx.export`: `program.model_proto`, `program.save(path)`.

    Raises:
        ValueError: a model in training mode, or one that is observed and not converted.
        NotTranslatableError: a call that has no ONNX operators, with the reason.
    """
    if isinstance(model, nn.Module):
        _check(model)
    elif not isinstance(model, torch.export.ExportedProgram):
        raise TypeError(
            f"{_WHO} takes an nn.Module or an ExportedProgram, got {type(model).__name__}."
        )
    table = {**translations(), **(custom_translation_table or {})}
    given = {**options, "dynamo": True, "custom_translation_table": table}
    try:
        with torch.no_grad():
            program = torch.onnx.export(model, args, kwargs=dict(kwargs or {}), **given)
    except Exception as error:
        if (cause := _cause(error)) is not None:
            raise cause from error
        raise
    assert program is not None  # noqa: S101  # of dynamo=True
    if options.get("optimize", True):
        optimizer.fold_constants(
            program.model,
            input_size_limit=_BYTES,
            output_size_limit=_BYTES,
            should_fold=_should_fold,
        )
        optimizer.remove_unused_nodes(program.model)
    if f is not None:
        program.save(f)
    return program


def _should_fold(node: ir.Node) -> bool:
    """Whether to compute a node of constants now: weights become what the operators read. Nothing
    is decoded, to floats or to codes of more bits, which would make the file larger.
    """
    first = node.inputs[0] if node.inputs else None
    dtype = None if first is None else first.dtype
    if node.op_type in ("BitShift", "BitwiseAnd"):
        return bool(dtype == ir.DataType.UINT32)  # the words of 4-bit weights
    if node.op_type == "Cast":
        to = ir.DataType(node.attributes["to"].as_int())
        return to in (ir.DataType.UINT32, ir.DataType.UINT8)
    if node.op_type == "Concat":
        return bool(dtype == ir.DataType.UINT8 and len(node.inputs) == 4)  # their bytes
    return node.op_type in _LAYS_OUT


def _check(model: nn.Module) -> None:
    """Raise a ValueError for a model that is not ready."""
    for name, module in model.named_modules():
        shown = f"{_WHO}: {name or 'the model'} ({type(module).__name__})"
        if is_prepared(module):
            raise ValueError(
                f"{shown} is observed and not converted; call qnn.convert(model) first."
            )
        if is_training(module):
            raise ValueError(
                f"{shown} is a layer for training, which quantises its weight in each step; export "
                "qnn.convert(model, scheme) of the float model that has these weights."
            )
    if model.training:
        raise ValueError(f"{_WHO}: the model is in training mode; call model.eval() first.")


def _cause(error: BaseException) -> NotTranslatableError | None:
    """Ours, among what the exporter wraps it in."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, NotTranslatableError):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None

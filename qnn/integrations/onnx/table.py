"""The translation table, derived from the schemes: a rule for each kind of layer, applied to the
formats of each scheme. What has no rule is refused, with a reason.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import evaluator

from qnn.integrations.onnx import convolutions, layers, recurrent
from qnn.integrations.onnx.build import NotTranslatableError, Value, op
from qnn.integrations.onnx.layers import Rule
from qnn.kernels import OPS, Op
from qnn.kernels.declare.norm import NORMS
from qnn.kernels.reference.recurrent import GRU, LSTM
from qnn.kernels.schemes import SCHEMES, Scheme
from qnn.kernels.torch_private import invoke_quant_packed
from qnn.kernels.user_region import REGION_RESULT

_WHO = "qnn.integrations.onnx"


# The rule of a kind of layer, by the names in `Scheme.ops`.
KINDS: dict[str, Callable[[Scheme], Rule]] = {
    "linear": layers.linear,
    "grouped_linear": layers.grouped_linear,
    "conv": convolutions.conv,
    "conv_transpose": functools.partial(convolutions.conv, transposed=True),
    "embedding": layers.embedding,
    "embedding_bag": layers.embedding_bag,
    "lstm": functools.partial(recurrent.recurrent, LSTM),
    "gru": functools.partial(recurrent.recurrent, GRU),
}


def _rules() -> dict[str, Rule]:
    """By the names of the ops."""
    found: dict[str, Rule] = {"int8_quantize": layers.int8_quantize}
    for scheme in SCHEMES.values():
        for kind, make in KINDS.items():
            name = scheme.op(kind)
            # A table of several schemes has the one weight format that they share.
            if name is not None and name not in found:
                found[name] = make(scheme)
        weight = f"{scheme.weight.key}_dequantize"
        found.setdefault(weight, layers.dequantize(scheme.weight))
    found["int8_dequantize"] = layers.int8_dequantize
    return found


_TRAINING = (
    "it is part of a training step or of a gradient; export for inference: qnn.convert the model "
    "without training=True, and call eval()"
)
_COMPILED = "only a pass of torch.compile writes it; export the model before it is compiled"
_PREPARED = "it observes ranges; call qnn.convert on the prepared model first"
_CAST = "ONNX models of qnn hold weights that are quantised already; quantise before the export"
_ATTENTION = (
    "ONNX has no attention in integers; export a model that calls torch's "
    "scaled_dot_product_attention: attn_implementation='sdpa' in transformers"
)
_CACHE = (
    "ONNX has no attention over codes, and no tensor that is written in place; export a model that "
    "computes without qnn.Int8KVCache"
)
_NO_LAYER = "no layer of a converted model calls it: it is part of a gradient"

_COMPILED_OPS = {"int8_rows_linear", "int8_static_rows_linear", "int8_static_quantize", *NORMS}
_COMPILED_OPS |= {f"int8_{name}_conv" for name in ("codes", "chain", "fork")}


def refusal(name: str) -> str | None:
    """Why the op of this name has no translation, or None."""
    if name in RULES:
        return None
    if name in _COMPILED_OPS:
        return _COMPILED
    if name in ("histogram", "exponents"):
        return _PREPARED
    if name == "int8_attention":
        return _ATTENTION
    if name.startswith("int8_kv_"):
        return _CACHE
    if name.endswith(("_dgrad", "_matmul", "_wgrad", "_columns", "_both")):
        return _TRAINING
    if name.endswith(("_quantize", "_dequantize")):
        return _CAST
    if name.endswith("_weight_linear") or name.endswith("_weight_grouped_linear"):
        return _NO_LAYER
    return "it is not an op of the library; give its own in custom_translation_table"


RULES = _rules()


def translations() -> dict[Any, Callable[..., Any]]:
    """The `custom_translation_table` of `torch.onnx.export` for models that qnn has converted.

        torch.onnx.export(model, args, "model.onnx", dynamo=True,
                          custom_translation_table=qnn.integrations.onnx.translations())

    It has all ops of qnn: those that a converted model calls become ONNX operators, and the others
    raise a `NotTranslatableError` with the reason. `export` does the same, checks the model first,
    and makes a smaller graph.
    """
    table: dict[Any, Callable[..., Any]] = {
        each.overload: _translation(each, RULES.get(name)) for name, each in OPS.items()
    }
    return {**table, invoke_quant_packed: _region, REGION_RESULT: _region_result}


def _translation(declared: Op, rule: Rule | None) -> Callable[..., Any]:
    """The function that the exporter calls in the place of the op."""
    names = [arg.name for arg in declared.inputs]

    def translate(*args: Any, **kwargs: Any) -> Any:
        if rule is None:
            raise NotTranslatableError(
                f"{_WHO}: qnn::{declared.name} has no translation to ONNX: "
                f"{refusal(declared.name)}."
            )
        given = dict(zip(names, args, strict=False)) | kwargs
        return rule(
            {arg.name: given.get(arg.name, _default(declared, arg)) for arg in declared.inputs}
        )

    parameters, hints = [], dict[str, Any]()
    for arg in declared.inputs:
        default = _default(declared, arg) if arg.optional else inspect.Parameter.empty
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters.append(inspect.Parameter(arg.name, kind, default=default))
        if (hint := _hint(arg)) is not None:
            hints[arg.name] = hint
    # The exporter reads what is an attribute, and what a tensor, from the signature.
    translate.__name__ = declared.name
    translate.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    translate.__annotations__ = hints
    return translate


def _default(declared: Op, arg: Any) -> Any:
    value = declared.default(arg)
    return int(ir.DataType.FLOAT) if isinstance(value, torch.dtype) else value


def _hint(arg: Any) -> Any:
    if arg.kind == "str":
        return str
    if arg.is_integers:
        return Sequence[int] if arg.kind.endswith("]") else int
    return int if arg.kind == "ScalarType" else None


def _region(body: Any, *operands: Value, scheme: str = "", quant_options: Any = None) -> Any:
    """A region is a call of the function that its body became; the exporter puts it in line."""
    call = ir.Node(body.domain, body.name, list(operands), num_outputs=len(body.outputs))
    evaluator.default().nodes.append(call)
    return call.outputs


def _region_result(y: Value, codegen_low_precision: bool = True, backward: bool = False) -> Value:
    return op.Identity(y)

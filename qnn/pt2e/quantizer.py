"""Quantizers: which nodes of an exported graph are quantised, and in which scheme."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from qnn.kernels import get_scheme
from qnn.kernels.schemes import STATIC
from qnn.kinds import kind_of, qualified
from qnn.pt2e import attention
from qnn.pt2e import graph as graphs
from qnn.pt2e.bodies import CONDITION
from qnn.pt2e.graph import ANNOTATION
from qnn.pt2e.layers import Call, operators, read
from qnn.pt2e.observers import SYMMETRIC, underlying

SDPA = torch.ops.aten.scaled_dot_product_attention


@dataclass(frozen=True)
class SchemeAnnotation:
    """A node that becomes a layer of a scheme. Its fields besides `scheme` are those that every
    annotation has, so that tools which read specs find none.
    """

    scheme: str
    input_qspec_map: dict[Node, Any] = field(default_factory=dict)
    output_qspec: Any = None
    allow_implicit_sharing: bool = True
    _annotated: bool = True


class Quantizer:
    """What `prepare_pt2e` asks. A subclass writes `meta["quantization_annotation"]` of nodes.

    The order: `transform_for_annotation`, `annotate`, `validate`; then observers are inserted.
    """

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """Rewrite the graph before it is annotated; what is returned counts."""
        return model

    def annotate(self, model: GraphModule) -> GraphModule | None:
        """Annotate nodes; what is returned does not count."""
        raise NotImplementedError(f"{type(self).__name__} has no annotate(model).")

    def validate(self, model: GraphModule) -> None:
        """Raise for annotations that cannot be met. It is called always."""

    @classmethod
    def get_supported_operators(cls) -> list[Any]:
        """What the quantizer knows."""
        return []


class Int8Quantizer(Quantizer):
    """Chooses a scheme for each layer of the graph, by rules.

    A rule for a module's name counts before one for its class, that before one for the operator,
    and that before the rule for all. Of several for names the last one counts; of several classes
    around a node the innermost, and of one class the last rule. A scheme is a name as `qnn.convert`
    takes it: `"int8_static"` has grids from calibration, `"int8"` a scale per token, and
    `"int8_weight"` float activations. `None` leaves alone. A config of specs (`QuantizationConfig`,
    of any library) stands for the scheme that its dtypes are.

    Embedding tables are taken where a rule names them, by their module, class or operator.
    `scaled_dot_product_attention` is computed in 8 bits where a rule names that operator, and no
    rule for its module says None: it loses more than a layer does.

    Args:
        scheme: the rule for all; as `set_global(scheme)`.

    >>> quantizer = Int8Quantizer("int8_static").set_module_name("head", None)
    >>> quantizer.set_op_type(torch.ops.aten.conv2d, "int8")
    Int8Quantizer(everything: int8_static; aten.conv2d: int8; 'head': None)
    """

    def __init__(self, scheme: str | None = None) -> None:
        self._global: str | None = None
        self._has_global = False
        self._types: dict[Any, str | None] = {}
        self._modules: dict[str, str | None] = {}
        self._names: dict[str, str | None] = {}
        self._filter: Callable[[Node], bool] | None = None
        self.reasons: dict[str, str] = {}
        self.annotates_inner_graphs = True
        if scheme is not None:
            self.set_global(scheme)

    # -- rules ------------------------------------------------------------------------------------

    def set_global(self, scheme: Any) -> Int8Quantizer:
        """The scheme of what no other rule is for."""
        self._global, self._has_global = _scheme("set_global", scheme), True
        return self

    def set_op_type(self, op: Any, scheme: Any) -> Int8Quantizer:
        """The scheme of an operator: `torch.ops.aten.conv2d`, an overload of it, or the function
        `torch.matmul`, `torch.nn.functional.linear`.

        Raises:
            ValueError: not an operator; the message has those that are taken.
        """
        self._types[_operator(op)] = _scheme("set_op_type", scheme)
        return self

    def set_module_type(self, kind: type[nn.Module] | str, scheme: Any) -> Int8Quantizer:
        """The scheme of all inside of modules of a class; a string is its qualified name."""
        if not isinstance(kind, type | str):
            raise TypeError(
                f"Int8Quantizer.set_module_type takes a class of modules, got {kind!r}."
            )
        name = kind if isinstance(kind, str) else qualified(kind)
        self._modules.pop(name, None)
        self._modules[name] = _scheme("set_module_type", scheme)
        return self

    def set_module_name(self, name: str, scheme: Any) -> Int8Quantizer:
        """The scheme of a module and all inside of it; `*`, `?` and `[seq]` are wildcards.

        Whole parts of a name count: `"sub"` is not `"subway"`.
        """
        if not isinstance(name, str):
            raise TypeError(f"Int8Quantizer.set_module_name takes a name, got {name!r}.")
        name = re.sub(r"^L\['self'\]\.", "", name)
        self._names.pop(name, None)
        self._names[name] = _scheme("set_module_name", scheme)
        return self

    def set_filter_function(self, wanted: Callable[[Node], bool] | None) -> Int8Quantizer:
        """Only nodes for which `wanted(node)` is true."""
        if wanted is not None and not callable(wanted):
            raise TypeError(
                f"Int8Quantizer.set_filter_function takes a function of nodes, got {wanted!r}."
            )
        self._filter = wanted
        return self

    # The names that users of other quantizers know.
    set_operator_type = set_function_type_qconfig = set_op_type
    set_module_type_qconfig = set_module_type
    set_module_name_qconfig = set_module_name

    def __repr__(self) -> str:
        rules = [f"everything: {self._global}"] if self._has_global else []
        rules += [f"{op}: {scheme}" for op, scheme in self._types.items()]
        rules += [f"{name}: {scheme}" for name, scheme in self._modules.items()]
        rules += [f"{name!r}: {scheme}" for name, scheme in self._names.items()]
        return f"Int8Quantizer({'; '.join(rules)})"

    # -- what prepare_pt2e calls ------------------------------------------------------------------

    def annotate(self, model: GraphModule) -> GraphModule:
        """Annotate the calls of layers; `reasons` has why others were left alone, by node."""
        if not (self._has_global or self._types or self._modules or self._names):
            raise ValueError(
                "Int8Quantizer has no rule; give it one: Int8Quantizer('int8_static'), or "
                ".set_global, .set_op_type, .set_module_type, .set_module_name."
            )
        self.reasons, met = {}, set[Any]()
        for graph in graphs.graphs(model):
            for node in graph.graph.nodes:
                if node.op == "call_function":
                    self._annotate(graph, node, met)
        self._check_rules(model, met)
        return model

    def _annotate(self, graph: GraphModule, node: Node, met: set[Any]) -> None:
        rule, scheme = self._rule(node)
        met.update(self._matching(node))
        if node.target is attention.OPERATOR and self._takes_attention(node, rule, scheme):
            return
        found = read(graph, node)
        if found is None or graphs.is_annotated(node):
            return
        reason = found if isinstance(found, str) else None
        if isinstance(found, Call):
            kind = kind_of(found.layer)
            if kind is None:
                return  # a norm, a dropout
            if rule is None:
                reason = "no rule is for it"
            elif scheme is None:
                reason = f"the rule for {rule} says None"
            elif CONDITION in node.meta:
                reason = "it says whether a loop goes on: other numbers are another count of turns"
            elif self._filter is not None and not self._filter(node):
                reason = "the filter function says no"
            elif kind.when_named and rule == "everything":
                reason = kind.when_named
        if reason is not None:
            self.reasons[graphs.title(node)] = reason
        elif scheme is not None:
            node.meta[ANNOTATION] = SchemeAnnotation(scheme)

    def _takes_attention(self, node: Node, rule: str | None, scheme: str | None) -> bool:
        """Note the scheme of a call of attention, or why it is not taken."""
        named = [s for op, s in self._types.items() if op in (node.target, SDPA)]
        if not named or named[-1] is None:
            return False
        if scheme is None:
            reason: str | None = f"the rule for {rule} says None"
        elif self._filter is not None and not self._filter(node):
            reason = "the filter function says no"
        else:
            reason = attention.why_not(node, named[-1])
        if reason is None:
            node.meta[attention.SCHEME] = named[-1]
        else:
            self.reasons[graphs.title(node)] = reason
        return True

    def _rule(self, node: Node) -> tuple[str | None, str | None]:
        """The rule that counts for a node, in words, and its scheme."""
        path = graphs.path(node)
        names = [name for name, _ in path if name]
        for pattern, scheme in reversed(self._names.items()):
            if any(_matches(name, pattern) for name in names):
                return repr(pattern), scheme
        for _, kind in reversed(path):
            for name, scheme in reversed(self._modules.items()):
                if _same_class(kind, name):
                    return name, scheme
        for op, scheme in reversed(self._types.items()):
            if node.target is op or getattr(node.target, "overloadpacket", None) is op:
                return str(op), scheme
        return ("everything", self._global) if self._has_global else (None, None)

    def _matching(self, node: Node) -> Iterable[Any]:
        path = graphs.path(node)
        for pattern in self._names:
            if any(_matches(name, pattern) for name, _ in path):
                yield pattern
        for name in self._modules:
            if any(_same_class(kind, name) for _, kind in path):
                yield name
        for op in self._types:
            if node.target is op or getattr(node.target, "overloadpacket", None) is op:
                yield op

    def _check_rules(self, model: GraphModule, met: set[Any]) -> None:
        """Raise for a rule that matches nothing: a name that was mistyped would go unseen."""
        names = {
            name for g in graphs.graphs(model) for n in g.graph.nodes for name, _ in graphs.path(n)
        }
        for rule in (*self._names, *self._modules, *self._types):
            if rule in met:
                continue
            hint = ""
            if isinstance(rule, str) and (close := difflib.get_close_matches(rule, names, n=3)):
                hint = f" Close names: {', '.join(map(repr, close))}."
            raise ValueError(f"Int8Quantizer: the rule for {rule} matches nothing.{hint}")

    @classmethod
    def get_supported_operators(cls) -> list[Any]:
        """The operators that are taken: calls of layers, and attention."""
        return [*operators(), attention.OPERATOR]


class ComposableQuantizer(Quantizer):
    """Several quantizers, in order: what one has annotated stays.

    Raises:
        RuntimeError: in `annotate`, one that changes or removes the annotation of another.
    """

    def __init__(self, quantizers: Iterable[Any]) -> None:
        self.quantizers = list(quantizers)
        if not self.quantizers:
            raise ValueError("ComposableQuantizer takes one quantizer at least, got none.")

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        for each in self.quantizers:
            model = call_if_there(each, "transform_for_annotation", model) or model
        return model

    def annotate(self, model: GraphModule) -> GraphModule:
        for each in self.quantizers:
            before = {
                node: node.meta[ANNOTATION]
                for node in model.graph.nodes
                if graphs.is_annotated(node)
            }
            each.annotate(model)
            for node, annotation in before.items():
                if node.meta.get(ANNOTATION) is not annotation:
                    raise RuntimeError(
                        f"ComposableQuantizer: {type(each).__name__} changed the annotation of "
                        f"{graphs.told(node)}, which a quantizer before it had made."
                    )
        return model

    def validate(self, model: GraphModule) -> None:
        for each in self.quantizers:
            call_if_there(each, "validate", model)

    def prepare_obs_or_fq_callback(self, model: GraphModule, observers: Any) -> None:
        """That of each quantizer, in order."""
        for each in self.quantizers:
            call_if_there(each, "prepare_obs_or_fq_callback", model, observers)

    @property
    def reasons(self) -> dict[str, str]:
        """Why nodes were left alone, by node; what a later quantizer took is not among them."""
        return {
            name: reason
            for each in self.quantizers
            for name, reason in getattr(each, "reasons", {}).items()
        }


def call_if_there(quantizer: Any, name: str, *args: Any) -> Any:
    """A method that quantizers may have."""
    method = getattr(quantizer, name, None)
    return None if method is None else method(*args)


def _scheme(setter: str, scheme: Any) -> str | None:
    """The name of a scheme that rules may say."""
    if scheme is None:
        return None
    config = getattr(scheme, "config", scheme)  # of an OperatorConfig
    if hasattr(config, "weight") and hasattr(config, "input_activation"):
        return _of_config(setter, config)
    if not isinstance(scheme, str):
        raise TypeError(
            f"Int8Quantizer.{setter} takes the name of a scheme, such as {STATIC!r}, a config of "
            f"specs, or None, got {scheme!r}."
        )
    try:
        return get_scheme(scheme).name
    except ValueError as error:
        raise ValueError(f"Int8Quantizer.{setter}: {error}") from None


def _of_config(setter: str, config: Any) -> str:
    """The scheme that a config's dtypes are; ranges and observers are the scheme's."""
    weight, x = config.weight, config.input_activation
    is_int8 = weight is not None and underlying(weight.dtype) == torch.int8
    if is_int8 and weight.qscheme in SYMMETRIC:
        dtype = None if x is None else underlying(x.dtype)
        if dtype in (None, torch.float32):
            return "int8_weight"
        if dtype in (torch.int8, torch.uint8):
            return "int8" if x.is_dynamic else STATIC
        if dtype == torch.int16 and not x.is_dynamic and x.qscheme in SYMMETRIC:
            return "int16_static"
    raise ValueError(
        f"Int8Quantizer.{setter}: no scheme has weights as {weight} with inputs as {x}; a "
        "symmetric int8 weight goes with inputs of 8 bits, static or dynamic, of 16 bits, static "
        "and symmetric, or of float32."
    )


_FUNCTIONS: dict[Any, Any] = {
    torch.matmul: torch.ops.aten.matmul,
    torch.bmm: torch.ops.aten.bmm,
    torch.mm: torch.ops.aten.mm,
    torch.addmm: torch.ops.aten.addmm,
    torch.conv1d: torch.ops.aten.conv1d,
    torch.conv2d: torch.ops.aten.conv2d,
    torch.conv3d: torch.ops.aten.conv3d,
    torch.conv_transpose1d: torch.ops.aten.conv_transpose1d,
    torch.conv_transpose2d: torch.ops.aten.conv_transpose2d,
    torch.conv_transpose3d: torch.ops.aten.conv_transpose3d,
    nn.functional.linear: torch.ops.aten.linear,
    nn.functional.embedding: torch.ops.aten.embedding,
    nn.functional.embedding_bag: torch.ops.aten.embedding_bag,
    nn.functional.scaled_dot_product_attention: SDPA,
}


def _operator(op: Any) -> Any:
    """The operator that a function is, or the operator itself."""
    found = _FUNCTIONS.get(op, op) if callable(op) else op
    if isinstance(found, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return found
    known = ", ".join(
        sorted({str(each.overloadpacket) for each in Int8Quantizer.get_supported_operators()})
    )
    raise ValueError(
        f"Int8Quantizer.set_op_type takes an operator, such as torch.ops.aten.linear, got {op!r}; "
        f"those that it takes are {known}."
    )


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern is for a module or one around it, by whole parts of the name."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


def _same_class(kind: str, name: str) -> bool:
    return kind == name or kind.rpartition(".")[2] == name

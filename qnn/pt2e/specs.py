"""What a quantizer writes on the nodes of an exported graph: specs of edges and outputs, and the
annotation that holds them.

The classes have the fields of torchao's. Those of torchao and of `torch.ao` serve as well: specs
are read by their attributes, and neither library is imported.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.fx import Node

from qnn.pt2e.graph import ANNOTATION, path, spelt, told

Q_ANNOTATION_KEY = ANNOTATION
WHY_LEFT = "why_left_in_float"
"""The key of `node.meta` under which a node that was annotated, and is left as it is, has the
reason."""

EdgeOrNode: TypeAlias = tuple[Node, Node] | Node
"""A place in a graph: an edge, as producer and consumer, or the output of a node."""

OperatorPatternType: TypeAlias = list[Callable[..., Any]]


class QuantizationSpecBase:
    """What says how a tensor is quantised."""


@dataclass(frozen=True)
class QuantizationSpec(QuantizationSpecBase):
    """How a tensor is quantised, and what finds its range.

    Args:
        dtype: an integer or float8 dtype; float16 is a cast down and up, float32 changes nothing.
        observer_or_fake_quant_ctr: a class, or a `with_args` of one at any depth, which is called
            with all other fields as keywords; or the name or class of one of qnn's observers, as
            `QuantSpec` takes it. If None qnn's observer and fake-quantiser serve.
        quant_min, quant_max: the range of the integers; that of `dtype` if None.
        qscheme: `torch.per_tensor_affine` and its like; None leaves it to the observer.
        ch_axis: the axis with a scale for each element, for a qscheme per channel.
        is_dynamic: the scale is found in the graph, from the tensor at hand.

    Raises:
        ValueError: `quant_min` above `quant_max`, or a negative `ch_axis`.

    >>> QuantizationSpec(torch.int8, qscheme=torch.per_channel_symmetric, ch_axis=0).ch_axis
    0
    """

    dtype: torch.dtype
    observer_or_fake_quant_ctr: Any = None
    quant_min: int | None = None
    quant_max: int | None = None
    qscheme: torch.qscheme | None = None
    ch_axis: int | None = None
    is_dynamic: bool = False

    def __post_init__(self) -> None:
        who, least, most = "qnn.pt2e.QuantizationSpec", self.quant_min, self.quant_max
        if least is not None and most is not None and least > most:
            raise ValueError(f"{who}: quant_min {least} must not be above quant_max {most}.")
        if self.ch_axis is not None and self.ch_axis < 0:
            raise ValueError(f"{who}: ch_axis must be at least 0, got {self.ch_axis}.")


@dataclass(frozen=True)
class FixedQParamsQuantizationSpec(QuantizationSpecBase):
    """A scale and a zero point that are known: nothing is observed, and the graph has them as they
    are given, in float32.
    """

    dtype: torch.dtype
    scale: float
    zero_point: int
    quant_min: int | None = None
    quant_max: int | None = None
    qscheme: torch.qscheme | None = None
    is_dynamic: bool = False


@dataclass(frozen=True)
class SharedQuantizationSpec(QuantizationSpecBase):
    """The observer of another place in the graph, the same object: one scale and zero point."""

    edge_or_node: EdgeOrNode


@dataclass(frozen=True)
class DerivedQuantizationSpec(QuantizationSpecBase):
    """A scale and a zero point that follow from those of other places, such as a bias on the grid
    of input times weight: `derive_qparams_fn(observers) -> (scale, zero_point)` is called when the
    model is converted, with the observers in the order of `derived_from`.
    """

    derived_from: list[EdgeOrNode]
    derive_qparams_fn: Callable[[list[Any]], tuple[torch.Tensor, torch.Tensor]]
    dtype: torch.dtype
    quant_min: int | None = None
    quant_max: int | None = None
    qscheme: torch.qscheme | None = None
    ch_axis: int | None = None
    is_dynamic: bool = False


@dataclass
class QuantizationAnnotation:
    """How the inputs and the output of one node are quantised.

    Args:
        input_qspec_map: specs by the node that produces an input; None leaves an edge as it is.
        output_qspec: of the output; all that read it read it quantised.
        allow_implicit_sharing: an input whose spec equals that of its producer's output, or of
            another reader of it, has one observer with it.
    """

    input_qspec_map: dict[Node, Any] = field(default_factory=dict)
    output_qspec: Any = None
    allow_implicit_sharing: bool = True
    _annotated: bool = False


@dataclass(frozen=True)
class QuantizationConfig:
    """The specs of an operator's tensors, by what they are to it."""

    input_activation: QuantizationSpec | None
    output_activation: QuantizationSpec | None
    weight: QuantizationSpec | None
    bias: QuantizationSpec | None
    is_qat: bool = False


class OperatorConfig(NamedTuple):
    """A config, and the operators that a quantizer takes with it."""

    config: QuantizationConfig
    operators: list[OperatorPatternType]


_ACTIVATIONS = (torch.per_tensor_affine, torch.per_tensor_symmetric)
_WEIGHTS = (torch.per_tensor_symmetric, torch.per_channel_symmetric, None)


def get_input_act_qspec(quantization_config: Any) -> Any:
    """The spec that a config has for input activations, or None; a ValueError unless it is
    per-tensor.
    """
    return _spec_of(quantization_config, "input_activation", _ACTIVATIONS)


def get_output_act_qspec(quantization_config: Any) -> Any:
    """The spec that a config has for the output, or None; a ValueError unless it is per-tensor."""
    return _spec_of(quantization_config, "output_activation", _ACTIVATIONS)


def get_weight_qspec(quantization_config: Any) -> Any:
    """The spec that a config has for weights, or None; a ValueError unless it is symmetric."""
    return _spec_of(quantization_config, "weight", _WEIGHTS)


def get_bias_qspec(quantization_config: Any) -> Any:
    """The spec that a config has for biases, or None; a ValueError unless it is float32."""
    spec = getattr(quantization_config, "bias", None)
    if spec is not None and spec.dtype != torch.float32:
        raise ValueError(f"qnn.pt2e: a bias of a config stays float32, got {spec}.")
    return spec


def _spec_of(config: Any, name: str, accepted: tuple[torch.qscheme | None, ...]) -> Any:
    spec = getattr(config, name, None)
    if spec is not None and spec.qscheme not in accepted:
        able = ", ".join(map(str, accepted))
        raise ValueError(f"qnn.pt2e: the qscheme of {name} must be one of {able}; got {spec}.")
    return spec


def annotate_input_qspec_map(node: Node, input_node: Node, qspec: Any) -> None:
    """Say how the edge from `input_node` to `node` is quantised."""
    _annotation_on(node).input_qspec_map[input_node] = qspec


def annotate_output_qspec(node: Node, qspec: Any) -> None:
    """Say how the output of `node` is quantised."""
    _annotation_on(node).output_qspec = qspec


def _annotation_on(node: Node) -> Any:
    annotation = node.meta.setdefault(Q_ANNOTATION_KEY, QuantizationAnnotation())
    if (scheme := getattr(annotation, "scheme", None)) is not None:
        raise RuntimeError(
            f"qnn.pt2e: {told(node)} has the scheme {scheme!r} by another quantizer, and takes no "
            "specs; leave annotated nodes alone."
        )
    if annotation.input_qspec_map is None:
        annotation.input_qspec_map = {}
    return annotation


def is_valid_annotation(annotation: Any) -> bool:
    """Whether an annotation says anything."""
    if annotation is None:
        return False
    return bool(annotation.input_qspec_map) or annotation.output_qspec is not None


def specs_on(node: Node) -> Any:
    """The annotation of a node, where it has specs; None for one that names a scheme, or none."""
    annotation = node.meta.get(Q_ANNOTATION_KEY)
    if getattr(annotation, "scheme", None) is not None or not is_valid_annotation(annotation):
        return None
    return annotation


def get_module_name_filter(module_name: str) -> Callable[[Node], bool]:
    """Whether a node comes from the module of this path, or from one below it."""
    wanted = spelt(module_name)

    def is_inside(node: Node) -> bool:
        return any(name == wanted for name, _ in path(node))

    return is_inside


def retarget_annotations(
    graph: torch.fx.Graph, replaced: Mapping[Node, Node] | None = None
) -> None:
    """Have annotations that refer to nodes which were replaced refer to the new ones: keys of input
    maps, and the places that shared and derived specs name. Those of a copied graph, whose nodes
    still name the ones that they are copies of, refer to their own.
    """
    named = {node.name: node for node in graph.nodes}

    def new(node: Any) -> Any:
        if replaced and node in replaced:
            return replaced[node]
        copied = isinstance(node, Node) and node.graph is not graph
        return named.get(node.name, node) if copied else node

    def place(at: Any) -> Any:
        return tuple(map(new, at)) if isinstance(at, tuple) else new(at)

    def spec(old: Any) -> Any:
        changes: dict[str, Any] = {}
        if hasattr(old, "edge_or_node"):
            changes["edge_or_node"] = place(old.edge_or_node)
        if hasattr(old, "derived_from"):
            changes["derived_from"] = [place(at) for at in old.derived_from]
        if not changes or all(getattr(old, name) == value for name, value in changes.items()):
            return old
        made = object.__new__(type(old))  # of any library's class, which may be frozen
        for name, value in {**vars(old), **changes}.items():
            object.__setattr__(made, name, value)
        return made

    for node in graph.nodes:
        if (annotation := specs_on(node)) is None:
            continue
        old = annotation.input_qspec_map or {}
        inputs = {place(key): spec(value) for key, value in old.items()}
        output = spec(annotation.output_qspec)
        if output is annotation.output_qspec and all(
            a is b
            for pair in zip(inputs.items(), old.items(), strict=True)
            for a, b in zip(*pair, strict=True)
        ):
            continue
        node.meta[Q_ANNOTATION_KEY] = changed = copy.copy(annotation)  # a copied graph shares it
        changed.input_qspec_map, changed.output_qspec = inputs, output

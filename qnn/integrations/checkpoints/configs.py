"""What a `quantization_config` says of each layer: one reader for each `quant_method`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qnn.integrations.checkpoints.layouts import Layout, layouts_of
from qnn.integrations.checkpoints.numbers import Numbers

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Group:
    """Layers that are stored alike.

    Attributes:
        layouts: the rows of the table that they may be in.
        weights, activations: their numbers; no activations where these stay as they are.
        targets: names, `re:` patterns or classes.
        scheme: the name of ours, where the file says it.
    """

    layouts: tuple[Layout, ...]
    weights: Numbers
    activations: Numbers | None = None
    targets: tuple[str, ...] = ("Linear",)
    scheme: str | None = None


@dataclass(frozen=True)
class Description:
    """What a config says. `exact` if a layer that no group names is float; otherwise the tensors
    say which layers are.
    """

    method: str
    groups: tuple[Group, ...]
    ignore: tuple[str, ...] = ()
    exact: bool = False
    extras: frozenset[str] = field(default=frozenset())

    def group_of(self, name: str) -> Group | None:
        """The group of a linear layer, or None: a name counts before a pattern, and that before a
        class.
        """
        if any(matches(name, each) for each in self.ignore):
            return None
        for rank in (_is_name, _is_pattern, is_class):
            for group in self.groups:
                if any(rank(each) and matches(name, each) for each in group.targets):
                    return group
        return None


def matches(name: str, target: str) -> bool:
    """Whether a target of compressed-tensors is a linear layer with this name."""
    if _is_pattern(target):
        return re.match(target.removeprefix("re:"), name) is not None
    return name == target or (target == "Linear" and bool(name))


def _is_name(target: str) -> bool:
    return not _is_pattern(target) and not is_class(target)


def _is_pattern(target: str) -> bool:
    return target.startswith("re:")


def is_class(target: str) -> bool:
    """Whether a target means all linear layers."""
    return target in ("Linear", "LinearBase")


def describe(config: Config) -> Description:
    """What a config says.

    Raises:
        ValueError: a method or a form that is not in the table.
    """
    method = str(config.get("quant_method", "")).lower()
    reader = _READERS.get(method)
    if reader is None:
        known = ", ".join(map(repr, _READERS))
        raise ValueError(f"its config says quant_method {method!r}; those that are read: {known}.")
    try:
        return reader(config)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"its quantization_config is not one of {method!r}: {type(error).__name__}: {error}"
        ) from None


def _compressed(config: Config) -> Description:
    if config.get("quantization_status", "compressed") != "compressed":
        raise ValueError(
            f"its tensors are {config['quantization_status']!r}, and only compressed ones are read."
        )
    for key in ("sparsity_config", "transform_config"):
        if held := _real(config.get(key)):
            raise ValueError(f"its config has a {key}, which no layer of qnn computes: {held}.")
    cache = config.get("kv_cache_scheme")
    groups = [
        _group(group, config.get("format"), config.get("qnn", {}).get(name))
        for name, group in config["config_groups"].items()
    ]
    return Description(
        "compressed-tensors",
        tuple(groups),
        tuple(config.get("ignore") or ()),
        exact=True,
        extras=_CACHE if cache else frozenset(),
    )


# Scales of a key-value cache: the attention's, and no layer's.
_CACHE = frozenset({"k_scale", "v_scale", "k_zero_point", "v_zero_point"})


def _real(config: Any) -> Any:
    """A config that says more than that there is nothing."""
    empty = not config or config.get("format") == "dense" or not any(config.values())
    return None if empty else config


def _group(group: Config, whole: str | None, scheme: str | None) -> Group:
    form = group.get("format") or whole
    weights = Numbers.of_args(group["weights"])
    known = layouts_of("compressed-tensors", form)
    if form == "mixed-precision" or form is None:
        known = layouts_of("compressed-tensors")
    if not known:
        names = sorted({each.format for each in layouts_of("compressed-tensors")})
        raise ValueError(f"its config says format {form!r}; those that are read: {names}.")
    able = tuple(each for each in known if each.why_not(weights) is None)
    if not able:
        raise ValueError(f"its config says format {form!r}: {known[0].why_not(weights)}.")
    if weights.dynamic or group.get("output_activations"):
        raise ValueError("its config has dynamic weights or quantised outputs, which no layer has.")
    given = group.get("input_activations")
    activations = Numbers.of_args(given) if given else None
    return Group(able, weights, activations, tuple(group["targets"]), scheme)


def _fp8(config: Config) -> Description:
    block = config.get("weight_block_size")
    dynamic = config.get("activation_scheme", "dynamic") == "dynamic"
    if block:
        down, across = block
        weights = Numbers("float", 8, "block", block=(int(down), int(across)))
        activations = Numbers("float", 8, "group", group=int(across), dynamic=dynamic)
    else:
        weights = Numbers("float", 8, "tensor")
        activations = Numbers("float", 8, "tensor", dynamic=dynamic)
    return _one("fp8", config, weights, activations)


def _modelopt(config: Config) -> Description:
    algo = str(config.get("quant_algo"))
    if algo == "NVFP4":
        group = int(config.get("group_size") or 16)
        weights = Numbers("float", 4, "group", group=group, scale="e4m3")
        activations = Numbers("float", 4, "group", group=group, scale="e4m3")
    elif algo == "FP8":
        weights = activations = Numbers("float", 8, "tensor")
    else:
        raise ValueError(f"its config says quant_algo {algo!r}; 'NVFP4' and 'FP8' are read.")
    cache = config.get("kv_cache_quant_algo") or config.get("kv_cache_scheme")
    found = _one("modelopt", config, weights, activations)
    return Description(found.method, found.groups, extras=_CACHE if cache else frozenset())


def _awq(config: Config) -> Description:
    version = str(config.get("version", "gemm")).lower()
    if version != "gemm":
        raise ValueError(f"its config says version {version!r} of AWQ; 'gemm' is read.")
    weights = _int4(config, symmetric=not config.get("zero_point", True))
    return _one("awq", config, weights, None)


def _gptq(config: Config) -> Description:
    form = str(config.get("checkpoint_format") or "gptq").lower()
    if config.get("is_marlin_format"):
        form = "marlin"
    if not layouts_of("gptq", form):
        raise ValueError(f"its config says checkpoint_format {form!r}; 'gptq', 'gptq_v2' are read.")
    weights = _int4(config, symmetric=bool(config.get("sym", True)))
    group = Group(tuple(layouts_of("gptq", form)), weights)
    return Description("gptq", (group,))


def _int4(config: Config, *, symmetric: bool) -> Numbers:
    bits = config.get("bits", config.get("w_bit", 4))
    if bits != 4:
        raise ValueError(f"its config says {bits} bits; int4 is read.")
    size = int(config.get("group_size", config.get("q_group_size", 128)))
    per = "group" if size > 0 else "channel"
    return Numbers("int", 4, per, group=max(size, 0), symmetric=symmetric)


def _gpt_oss(config: Config) -> Description:
    return Description("mxfp4", ())


def _one(method: str, config: Config, weights: Numbers, activations: Numbers | None) -> Description:
    known = layouts_of(method)
    able = tuple(each for each in known if each.why_not(weights) is None)
    if not able:
        raise ValueError(f"its config says {weights}, which is not read.")
    return Description(method, (Group(able, weights, activations),))


_READERS: dict[str, Callable[[Config], Description]] = {
    "compressed-tensors": _compressed,
    "fp8": _fp8,
    "modelopt": _modelopt,
    "awq": _awq,
    "gptq": _gptq,
    "mxfp4": _gpt_oss,
}

__all__ = ["Description", "Group", "describe", "is_class", "matches"]

"""From the files of any format in the table to the state of our layers, or to floats."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from qnn.integrations.checkpoints.configs import Description, Group, describe, is_class, matches
from qnn.integrations.checkpoints.experts import fused
from qnn.integrations.checkpoints.files import Files
from qnn.integrations.checkpoints.fit import Tensors, decode, fits
from qnn.integrations.checkpoints.layouts import FLOATS, Layout, by_tensors, last_names
from qnn.integrations.checkpoints.numbers import ACTIVATIONS, STORED, scheme_for
from qnn.kernels import get_scheme

_SHOWN = 5


@dataclass
class Read:
    """A checkpoint in our form.

    Attributes:
        state: all tensors, by the names of compressed-tensors; what is not changed stays mapped.
        schemes: of the layers that are quantised.
        floats: the layers that were decoded.
        description: what the config says.
    """

    state: Tensors
    schemes: dict[str, str] = field(default_factory=dict)
    floats: set[str] = field(default_factory=set)
    description: Description | None = None


def read(
    files: Files,
    *,
    activations: str = STORED,
    dequantize: bool | Callable[[str], torch.dtype] = False,
) -> Read:
    """The state of a checkpoint that something else than qnn wrote.

    Args:
        files: the checkpoint.
        activations: as of `load_checkpoint`.
        dequantize: decode every layer, into the dtype that this gives for its name.

    Raises:
        ValueError: what it holds is not what its config says, or has no scheme.
    """
    who = str(files.path)
    if activations not in ACTIVATIONS:
        raise ValueError(
            f"qnn: activations must be one of {', '.join(map(repr, ACTIVATIONS))}, got "
            f"{activations!r}."
        )
    layers, rest = _layers(files)
    if not files.config:
        raise ValueError(_no_config(who, layers))
    try:
        description = describe(files.config)
    except ValueError as error:
        raise ValueError(f"{who}: {error}") from None
    if description.method == "mxfp4":
        try:
            if layers:
                raise ValueError(
                    f"its config says 'mxfp4', and {min(layers)} is quantised otherwise"
                )
            state, schemes = fused(rest, dequantize)
        except ValueError as error:
            raise ValueError(f"{who}: {error}.") from None
        return Read(state, schemes, description=description)
    rest = _without_cache(who, description, layers, rest, activations, bool(dequantize))
    result, refused = Read(dict(rest), description=description), dict[str, str]()
    _check_which(who, description, layers, rest)
    for name, tensors in layers.items():
        group = description.group_of(name)
        try:
            if group is None:
                raise ValueError(
                    f"the file has {_named(tensors)} for it, and the config says that it is float"
                )
            found, scheme = _layer(tensors, group, activations, dequantize, name)
        except (ValueError, RuntimeError) as error:
            refused[name] = str(error)
            continue
        result.state |= {f"{name}.{leaf}": tensor for leaf, tensor in found.items()}
        if scheme is None:
            result.floats.add(name)
        else:
            result.schemes[name] = scheme
    if refused:
        raise ValueError(_listed(f"{who}: {len(refused)} layer(s) cannot be read", refused))
    return result


def _layers(files: Files) -> tuple[dict[str, Tensors], Tensors]:
    """The tensors of quantised layers, by the layer, and all others."""
    known = last_names()
    owners = set[str]()
    for name, tensor in files.tensors.items():
        owner, _, leaf = name.rpartition(".")
        coded = leaf == "weight" and tensor.dtype not in FLOATS and tensor.dim() == 2
        if coded or leaf in known:
            owners.add(owner)
    layers = dict[str, Tensors]()
    rest = Tensors()
    for name, tensor in files.tensors.items():
        owner, _, leaf = name.rpartition(".")
        if owner in owners and leaf in known | {"weight"}:
            layers.setdefault(owner, {})[leaf] = tensor
        else:
            rest[name] = tensor
    return layers, rest


def _without_cache(
    who: str,
    description: Description,
    layers: dict[str, Tensors],
    rest: Tensors,
    activations: str,
    dequantize: bool,
) -> Tensors:
    """The rest without the scales of a key-value cache, which no layer has."""
    cache = [name for name in rest if name.rpartition(".")[2] in description.extras]
    if description.extras and activations == STORED and not dequantize:
        raise ValueError(
            f"{who}: its config has the key-value cache quantised, which is not read; pass "
            "activations='dynamic' or 'float' to have the cache in float."
        )
    return {name: tensor for name, tensor in rest.items() if name not in cache}


def _check_which(
    who: str, description: Description, layers: dict[str, Tensors], rest: Tensors
) -> None:
    """Raise where other layers are quantised than the config says."""
    if not layers:
        raise ValueError(
            f"{who}: its config says {description.method!r}, and all of its tensors are floats."
        )
    if not description.exact:
        return
    matrices = [full for full, each in rest.items() if each.dim() == 2 and full.endswith(".weight")]
    names = [full.removesuffix(".weight") for full in matrices]
    check_floats(who, description, names, by_class=False)


def check_floats(
    who: str, description: Description, names: Iterable[str], *, by_class: bool
) -> None:
    """Raise where the config says that layers are quantised whose weights are float. Whether one is
    a linear layer, which a class means, only a model says.
    """
    wrong = {
        name: "its weight is float, and the config says that it is quantised"
        for name in names
        if (group := description.group_of(name)) is not None
        and (by_class or any(matches(name, t) for t in group.targets if not is_class(t)))
    }
    if wrong:
        raise ValueError(_listed(f"{who}: {len(wrong)} layer(s) are not as described", wrong))


def _layer(
    tensors: Tensors,
    group: Group,
    activations: str,
    dequantize: bool | Callable[[str], torch.dtype],
    name: str,
) -> tuple[Tensors, str | None]:
    """The tensors of a layer in the scheme that holds it exactly; the float weight if
    `dequantize`.
    """
    layout = _layout(tensors, group)
    shape = layout.shape(tensors) or (0, 0)
    common = layout.common(tensors, group.weights)
    if callable(dequantize):
        return {"weight": decode(group.weights, common, shape).to(dequantize(name))}, None
    failed = None
    for fit in fits(group.weights, common, shape):
        scheme = scheme_for(fit.form, group.activations, activations)
        if scheme is None:
            continue
        try:
            return _held(fit.make(), scheme), scheme
        except ValueError as error:
            failed = str(error)
    if failed:
        raise ValueError(f"{failed}; pass dequantize=True for float layers")
    raise ValueError(_no_scheme(group, common, shape))


def _layout(tensors: Tensors, group: Group) -> Layout:
    """The row of the table that the tensors are in."""
    failed = list[str]()
    for layout in group.layouts:
        try:
            if extra := tensors.keys() - layout.names:
                raise ValueError(f"{layout.name} has no {min(extra)}")
            layout.check(tensors, group.weights)
        except ValueError as error:
            failed.append(str(error))
        else:
            return layout
    could = by_tensors(tensors)
    hint = f"; by its tensors it is {' or '.join(could)}" if could else ""
    if any(f"{each.name} ({each.method})" in could for each in group.layouts):
        hint = ""  # it is that, with a fault
    raise ValueError(failed[0] + hint)


def _held(tensors: Tensors, scheme: str) -> Tensors:
    """What a layer of this scheme has in a file."""
    form = get_scheme(scheme)
    names = {"weight" + part.suffix for part in form.weight.on_disk}
    found = {name: tensor for name, tensor in tensors.items() if name in names}
    if form.static and form.activation is not None:
        if "input_scale" not in tensors:
            raise ValueError("input_scale is missing, and the config says static activations")
        found["input_scale"] = tensors["input_scale"].reshape(1)
        zero = tensors.get("input_zero_point", torch.zeros(1, dtype=torch.int8))
        if any(part.suffix == "_zero_point" for part in form.activation.parts):
            found["input_zero_point"] = zero.reshape(1)
    return found


def _no_scheme(group: Group, common: Tensors, shape: tuple[int, int]) -> str:
    """That no scheme has this arithmetic, and what to do."""
    forms = [fit.form for fit in fits(group.weights, common, shape)]
    able = dict[str, str]()
    for wanted in ACTIVATIONS[1:]:
        found = (scheme_for(form, group.activations, wanted) for form in forms)
        if first := next(filter(None, found), None):
            able[wanted] = first
    words = f"no scheme has weights {group.weights}"
    if forms and group.activations is not None:
        words += f" with activations {group.activations}"
    ways = [f"activations={wanted!r} reads it as {name!r}" for wanted, name in able.items()]
    return "; ".join((words, *ways, "dequantize=True gives float layers"))


def _no_config(who: str, layers: dict[str, Tensors]) -> str:
    if not layers:
        return (
            f"{who} is a float checkpoint: load it into the float model, and convert that, or load "
            "it into a converted one."
        )
    name, tensors = next(iter(layers.items()))
    return (
        f"{who}: {name} has {_named(tensors)}, and no quantization_config in a config.json beside "
        "it says how it is quantised."
    )


def _named(tensors: Tensors) -> str:
    return ", ".join(f"{n} {str(t.dtype).removeprefix('torch.')}" for n, t in tensors.items())


def _listed(title: str, reasons: dict[str, str]) -> str:
    """Layers with their reasons, the first few."""
    lines = [f"  {name}: {reason}" for name, reason in list(reasons.items())[:_SHOWN]]
    more = [f"  and {len(reasons) - _SHOWN} more"] if len(reasons) > _SHOWN else []
    return "\n".join([f"{title}:", *lines, *more])


__all__ = ["Read", "check_floats", "read"]

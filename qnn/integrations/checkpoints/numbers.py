"""What a config says of the numbers of a weight or an activation, in one form for all writers, and
the scheme that computes exactly that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from qnn.kernels import SCHEMES, Scheme

# What `activations=` takes.
STORED, DYNAMIC, FLOAT = "stored", "dynamic", "float"
ACTIVATIONS = (STORED, DYNAMIC, FLOAT)

_BYTES = {torch.uint8: "e8m0", torch.float8_e4m3fn: "e4m3"}


@dataclass(frozen=True)
class Numbers:
    """How a tensor is stored.

    Attributes:
        type: `"int"` or `"float"`.
        bits: of a value.
        per: what shares a scale: `"tensor"`, `"channel"`, `"token"`, `"group"`, `"block"`.
        group: neighbours in a row that share one.
        block: rows and columns that do.
        symmetric: whether there is no zero point.
        scale: `"float"`; `"e8m0"`, bytes of exponents; `"e4m3"`, with a second scale.
        dynamic: whether the scale is found from the tensor at hand.
    """

    type: str
    bits: int
    per: str
    group: int = 0
    block: tuple[int, int] | None = None
    symmetric: bool = True
    scale: str = "float"
    dynamic: bool = False

    @classmethod
    def of_args(cls, args: Mapping[str, Any]) -> Numbers:
        """From a group's `weights` or `input_activations`, as compressed-tensors writes them.

        Raises:
            ValueError: values that are none of the convention's.
        """
        group, per = args.get("group_size"), args.get("strategy")
        if per is None:
            per = "tensor" if group is None else "group" if group > 0 else "channel"
        block = args.get("block_structure")
        block = block.split("x") if isinstance(block, str) else block
        scale = str(args.get("scale_dtype") or "").removeprefix("torch.")
        per = str(per).lower()
        return cls(
            type=str(args.get("type", "int")).lower(),
            bits=int(args.get("num_bits", 8)),
            per={"tensor_group": "group"}.get(per, per),
            group=int(group) if per.endswith("group") and group else 0,
            block=(int(block[0]), int(block[1])) if block else None,
            symmetric=bool(args.get("symmetric", True)),
            scale="e4m3" if per == "tensor_group" else "e8m0" if scale == "uint8" else "float",
            # "local" is a scale of groups from the tensor at hand, under one that is stored.
            dynamic=args.get("dynamic", False) is True,
        )

    @classmethod
    def of_scheme(cls, scheme: Scheme) -> Numbers | None:
        """Of a scheme's activations."""
        form = scheme.activation
        if form is None:
            return None
        found = cls.of_args({**form.compressed, "dynamic": not scheme.static})
        return replace(found, scale=_BYTES.get(form.scale_dtype, "float"))

    def __str__(self) -> str:
        size = {"group": f" of {self.group}", "block": f" of {self.block}"}.get(self.per, "")
        scale = "" if self.scale == "float" else f", {self.scale} scales"
        sides = "" if self.symmetric else ", with zero points"
        moving = ", dynamic" if self.dynamic else ""
        return f"{self.type}{self.bits} per-{self.per}{size}{scale}{sides}{moving}"


def scheme_for(
    form: str, activations: Numbers | None, wanted: str, *, static: bool = False
) -> str | None:
    """The scheme with weights in the format of this key, whose activations are what a file says
    (`wanted="stored"`), or are quantised by the tensor at hand (`"dynamic"`), or stay as they are
    (`"float"`); None where there is none.
    """
    for scheme in SCHEMES.values():
        if scheme.weight.key != form or scheme.op("linear") is None:
            continue
        if wanted == FLOAT or activations is None:
            found = scheme.activation is None
        else:
            found = any(_same(scheme, each) for each in _readings(activations, wanted))
        if found:
            return scheme.name
    return None


def _readings(activations: Numbers, wanted: str) -> Iterator[Numbers]:
    if wanted == STORED:
        yield activations
        if activations.per == "tensor" and activations.type == "int" and activations.bits == 8:
            yield replace(activations, symmetric=False)  # whose zero point may be zero
        return
    free = replace(activations, dynamic=True, symmetric=True)
    yield free
    yield replace(free, per="token") if free.per == "tensor" else free


def _same(scheme: Scheme, activations: Numbers) -> bool:
    return Numbers.of_scheme(scheme) == activations


def require_stored(who: str, activations: str) -> None:
    """Raise where other activations are asked for than those of a file of qnn's."""
    if activations != STORED:
        raise ValueError(
            f"{who}: activations={activations!r} is for the files of other writers; this one names "
            "its schemes. Load it into a model of another scheme: model.load_state_dict(…)."
        )


__all__ = [
    "ACTIVATIONS",
    "DYNAMIC",
    "FLOAT",
    "STORED",
    "Numbers",
    "require_stored",
    "scheme_for",
]

"""From a spec to the observer that serves it: qnn's own, or what the spec's constructor makes.

An observer is a module that returns its input and has `calculate_qparams()`, `dtype`, `qscheme`,
`quant_min` and `quant_max`; and of a qscheme per channel `ch_axis`. Those of other libraries are
called as they are.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from qnn.calibration.fake_quantize import FakeQuantize
from qnn.calibration.spec import QuantSpec
from qnn.calibration.statistics import Observer
from qnn.functional.fake_quantize import fake_quantize
from qnn.functional.ranges import min_max
from qnn.kernels.torch_private import quantized_decomposed
from qnn.pt2e.groups import innermost

PER_CHANNEL = (
    torch.per_channel_affine,
    torch.per_channel_symmetric,
    torch.per_channel_affine_float_qparams,
)
_PER_TENSOR = (torch.per_tensor_affine, torch.per_tensor_symmetric)
SYMMETRIC = (torch.per_tensor_symmetric, torch.per_channel_symmetric)
# The dtypes of torch's quantised tensors, and what holds their integers.
_UNDERLYING = {torch.quint8: torch.uint8, torch.qint8: torch.int8, torch.qint32: torch.int32}
INTEGERS = (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.int32)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def underlying(dtype: torch.dtype) -> torch.dtype:
    """The dtype that values on a grid are held in."""
    return _UNDERLYING.get(dtype, dtype)


def whole_range(dtype: torch.dtype) -> tuple[int, int]:
    """The least and the greatest value of a dtype."""
    dtype = underlying(dtype)
    info: Any = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    return int(info.min), int(info.max)


def range_of(of: Any) -> tuple[int, int]:
    """The range of the integers of a spec or an observer."""
    least, most = whole_range(of.dtype)
    qmin, qmax = getattr(of, "quant_min", None), getattr(of, "quant_max", None)
    return least if qmin is None else int(qmin), most if qmax is None else int(qmax)


def is_observer(module: Any) -> bool:
    """Whether a module observes what passes through it, by what it can be asked."""
    return isinstance(module, nn.Module) and callable(getattr(module, "calculate_qparams", None))


class Point(nn.Module):
    """An observer that sees nothing: the fields of its spec."""

    passing: torch.Tensor

    def __init__(self, spec: Any, qat: bool) -> None:
        super().__init__()
        self.dtype, self.qscheme = spec.dtype, spec.qscheme
        self.quant_min, self.quant_max = range_of(spec)
        self.ch_axis = getattr(spec, "ch_axis", None)
        self.is_dynamic = bool(spec.is_dynamic)
        self.qat = self.rounding = qat
        if qat:
            self.register_buffer("passing", torch.zeros((), dtype=torch.bool))

    def pass_on(self, passing: bool = True) -> None:
        """As `FakeQuantize.pass_on`."""
        if self.qat:
            self.rounding = not passing
            self.passing.fill_(passing)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.qat and not self.passing.is_meta:
            self.rounding = not bool(self.passing)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        raise RuntimeError(f"qnn.pt2e: {type(self).__name__} has no scale; it is {self}.")

    def extra_repr(self) -> str:
        dynamic = ", is_dynamic=True" if self.is_dynamic else ""
        return f"{self.dtype}, {self.qscheme}{dynamic}"


class CastPoint(Point):
    """A tensor that stays float: float32 as it is, float16 cast down and up."""


class DynamicPoint(Point):
    """A tensor whose scale is found in the graph; in quantisation-aware training it has that of the
    tensor at hand.
    """

    eps = torch.finfo(torch.float32).eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.rounding:
            return x
        ops = quantized_decomposed()
        symmetric = self.qscheme in SYMMETRIC
        choose = ops.choose_qparams_symmetric if symmetric else ops.choose_qparams
        qmin, qmax = self.quant_min, self.quant_max
        with torch.no_grad():
            scale, zero = choose.tensor(x.detach(), qmin, qmax, self.eps, underlying(self.dtype))
        return fake_quantize(x, scale.float().reshape(1), zero.reshape(1), qmin, qmax)


class FixedPoint(Point):
    """A scale and a zero point that were given."""

    scale: torch.Tensor
    zero_point: torch.Tensor

    def __init__(self, spec: Any, qat: bool) -> None:
        super().__init__(spec, qat)
        self.qscheme = self.qscheme or torch.per_tensor_affine
        self.register_buffer("scale", torch.tensor([float(spec.scale)], dtype=torch.float32))
        zero_point = torch.tensor([int(spec.zero_point)], dtype=torch.int32)
        self.register_buffer("zero_point", zero_point)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.rounding or underlying(self.dtype) not in INTEGERS:
            return x
        return fake_quantize(x, self.scale, self.zero_point, self.quant_min, self.quant_max)

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.scale, self.zero_point


class DerivedPoint(Point):
    """A scale and a zero point that follow from those of other observers."""

    def __init__(self, spec: Any, qat: bool, sources: Sequence[nn.Module]) -> None:
        super().__init__(spec, qat)
        if self.qscheme in PER_CHANNEL and self.ch_axis is None:
            raise ValueError(
                "qnn.pt2e: a derived spec per channel must have a ch_axis, got None in "
                f"{spec.dtype}, {spec.qscheme}."
            )
        self.qscheme = self.qscheme or torch.per_tensor_affine
        self.derive: Callable[[list[Any]], tuple[torch.Tensor, torch.Tensor]] = (
            spec.derive_qparams_fn
        )
        # Not submodules: the state dict has them once, where they stand.
        self.__dict__["sources"] = list(sources)

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.derive(self.__dict__["sources"])


class ObservedPoint(FakeQuantize):
    """qnn's observation point, with the attributes by which code written for torchao asks one."""

    is_dynamic = False
    dtype = property(lambda self: self.spec.dtype)
    quant_min = property(lambda self: self.spec.qmin)
    quant_max = property(lambda self: self.spec.qmax)
    ch_axis = property(lambda self: self.spec.channel_axis)

    @property
    def qscheme(self) -> torch.qscheme:
        per_channel = self.spec.channel_axis is not None
        if self.spec.symmetric:
            return torch.per_channel_symmetric if per_channel else torch.per_tensor_symmetric
        return torch.per_channel_affine if per_channel else torch.per_tensor_affine

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point, float32 and int32 `[C]`."""
        return self.qparams()


class WeightPoint(ObservedPoint):
    """The point of a weight: its range is that of the weight as it is, at each call, so that what
    is trained is what is converted.
    """

    def quantize(self, x: torch.Tensor) -> torch.Tensor:
        if not self.rounding:
            return x
        axis = self.spec.channel_axis
        with torch.no_grad():
            rows = x.reshape(1, -1) if axis is None else x.movedim(axis, 0).flatten(1)
            scale, zero = self.spec.qparams(*min_max(rows))
        qmin, qmax = self.spec.qmin, self.spec.qmax
        return fake_quantize(x, scale, zero, qmin, qmax, channel_axis=axis)


def make_observer(
    spec: Any, *, qat: bool, constant: bool, name: str, sources: Sequence[nn.Module] = ()
) -> nn.Module:
    """The observer that a spec asks for.

    Args:
        spec: any but a shared one.
        qat: whether qnn's own fake-quantise.
        constant: the tensor is a weight: its range is that of its values.
        name: of the place, for errors.
        sources: the observers that a derived spec names.

    Raises:
        ValueError, TypeError: a spec that says something impossible, with the place.
    """
    try:
        if hasattr(spec, "derive_qparams_fn"):
            return DerivedPoint(spec, qat, sources)
        if hasattr(spec, "scale") and hasattr(spec, "zero_point"):
            if spec.is_dynamic:
                raise ValueError("qparams that are fixed cannot be dynamic")
            return FixedPoint(spec, qat)
        if not isinstance(getattr(spec, "dtype", None), torch.dtype):
            raise TypeError(f"{spec!r} is not a spec: it has no dtype")
        constructor = getattr(spec, "observer_or_fake_quant_ctr", None)
        if _is_own(constructor):
            return _own(spec, constructor, qat, constant, name)
        return _foreign(spec, constructor)
    except (TypeError, ValueError) as error:
        raise type(error)(f"qnn.pt2e: the spec of ({name}): {error}") from error


def _is_own(constructor: Any) -> bool:
    own = isinstance(constructor, type) and issubclass(constructor, Observer)
    return constructor is None or isinstance(constructor, str) or own


def _own(spec: Any, observer: Any, qat: bool, constant: bool, name: str) -> nn.Module:
    dtype = underlying(spec.dtype)
    if dtype in (torch.float16, torch.float32):
        return CastPoint(spec, qat)
    qscheme = spec.qscheme or (torch.per_tensor_affine if spec.ch_axis is None else None)
    if spec.is_dynamic:
        if qscheme not in _PER_TENSOR or dtype not in (torch.int8, torch.uint8):
            raise ValueError(
                "qnn's dynamic point is per-tensor, in int8 or uint8; got "
                f"{spec.dtype}, {spec.qscheme}. Give an observer_or_fake_quant_ctr for others"
            )
        return DynamicPoint(dataclasses.replace(spec, qscheme=qscheme), qat)
    if qscheme not in (*_PER_TENSOR, *PER_CHANNEL[:2]):
        raise ValueError(
            f"qnn's observers know no qscheme {spec.qscheme}; give an observer_or_fake_quant_ctr"
        )
    if qscheme in PER_CHANNEL and spec.ch_axis is None:
        raise ValueError(f"the qscheme {qscheme} needs a ch_axis")
    kind = WeightPoint if constant and observer is None else ObservedPoint
    if observer is None:
        observer = "minmax" if constant else "moving_average" if qat else "histogram"
    qmin, qmax = range_of(spec)
    return kind(
        QuantSpec(
            dtype,
            symmetric=qscheme in SYMMETRIC,
            channel_axis=spec.ch_axis if qscheme in PER_CHANNEL else None,
            qmin=qmin,
            qmax=qmax,
            observer=observer,
        ),
        name=name,
        qat=qat,
    )


def _foreign(spec: Any, constructor: Any) -> nn.Module:
    """What a constructor makes of the fields of a spec, which win over keywords given earlier."""
    made_by = innermost(constructor)
    known = [f.name for f in dataclasses.fields(spec)] if dataclasses.is_dataclass(spec) else None
    names = known or ["dtype", "quant_min", "quant_max", "qscheme", "ch_axis", "is_dynamic"]
    fields = {name: copy.deepcopy(getattr(spec, name)) for name in names if hasattr(spec, name)}
    fields.pop("observer_or_fake_quant_ctr", None)
    per_channel = fields.get("qscheme") in PER_CHANNEL and _takes(made_by, "ch_axis")
    if not per_channel and "PerChannel" not in getattr(made_by, "__name__", ""):
        fields.pop("ch_axis", None)
    made = constructor(**fields)
    if not isinstance(made, nn.Module):
        raise TypeError(f"{made_by} makes a {type(made).__name__}, which is not a module")
    return made


def _takes(called: Any, name: str) -> bool:
    try:
        parameters = inspect.signature(called).parameters
    except (TypeError, ValueError):
        return True
    kinds = {parameter.kind for parameter in parameters.values()}
    return name in parameters or inspect.Parameter.VAR_KEYWORD in kinds


def saw_nothing(observer: nn.Module) -> bool:
    """Whether an observer that needs data has seen none, of any library."""
    inner = getattr(observer, "activation_post_process", None)
    if isinstance(inner, nn.Module):
        return saw_nothing(inner)
    if isinstance(observer, FakeQuantize):
        return observer.observer is not None and not int(observer.observer.count)
    if getattr(observer, "is_dynamic", False):
        return False
    low, high = (getattr(observer, name, None) for name in ("min_val", "max_val"))
    if isinstance(low, torch.Tensor) and isinstance(high, torch.Tensor):
        return not low.numel() or bool((low > high).any())
    return hasattr(observer, "block_size") and observer.block_size is None

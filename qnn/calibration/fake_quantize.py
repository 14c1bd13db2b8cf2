"""`FakeQuantize`: one observation point of a model that is being prepared for quantisation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from qnn.calibration.observers import make_observer
from qnn.calibration.spec import QuantSpec
from qnn.calibration.statistics import Observer, Statistics
from qnn.functional.fake_quantize import grid_of, on_grid
from qnn.kernels.torch_private import in_several

ModelT = TypeVar("ModelT", bound=nn.Module)


class FakeQuantize(Statistics):
    """Records the range of what passes, and in quantisation-aware training fake-quantises it.

    Without `qat` it returns its input itself, and records in training and evaluation alike until
    it is frozen. With `qat` it records in training mode, and fake-quantises in both: in evaluation
    it changes nothing. Fake-quantising is `qnn.functional.fake_quantize`, with the range of all
    that was recorded up to and with this input; nothing recorded leaves the input as it is, and a
    NaN or infinite range makes it NaN.

    In the forward of a `DistributedDataParallel` it records what all processes see, so that ranges,
    and the first value of a learned scale, are the same in each. A graph breaks there.

    Args:
        spec: how to quantise, and how to find the range.
        name: of the part, for errors.
        qat: whether to fake-quantise.
        channels: the size of `spec.channel_axis`; found at the first observation if None.

    >>> point = FakeQuantize(QuantSpec(torch.int8, symmetric=True), name="input", qat=True)
    >>> point(torch.tensor([0.3, -1.27]))
    tensor([ 0.3000, -1.2700])
    >>> point.eval()(torch.tensor([0.304, 9.0]))
    tensor([0.3000, 1.2700])
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    frozen: torch.Tensor
    passing: torch.Tensor
    observer: Observer | None
    _later: ClassVar[tuple[str, ...]] = ("frozen", "passing")

    def __init__(
        self,
        spec: QuantSpec,
        *,
        name: str = "",
        qat: bool = False,
        channels: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(spec, QuantSpec):
            raise TypeError(f"qnn.FakeQuantize takes a QuantSpec, got {type(spec).__name__}.")
        self.spec, self.name, self.qat = spec, name, qat
        self.observing = not spec.fixed  # and not frozen; a graph must not read a tensor for it
        self.rounding = qat  # and not passing
        if qat:
            self.register_buffer("passing", torch.zeros((), dtype=torch.bool))
        self.alone = False  # while calibrating, which adds up the processes itself
        self.observer = None
        size = 1 if spec.channel_axis is None else channels or 0
        if spec.fixed:
            scale = torch.tensor(spec.scale, dtype=torch.float32).reshape(-1)
            zero = torch.tensor(spec.zero_point, dtype=torch.int32).reshape(-1).expand_as(scale)
            self.register_buffer("scale", scale)
            self.register_buffer("zero_point", zero.clone())
        else:
            self.observer = make_observer(spec, name=name, channels=channels)
            self.register_buffer("frozen", torch.zeros((), dtype=torch.bool))
            if spec.learnable and qat and not size:
                raise ValueError(f"{self.who}: a learnable scale for each channel needs channels=.")
            self._declare("scale", (size,), torch.float32, 0.0)
            self._declare("zero_point", (size,), torch.int32, 0)
        if spec.learnable and qat:
            scale = self.scale
            del self.scale
            self.scale = nn.Parameter(scale)
        self.register_load_state_dict_post_hook(_refresh_what_was_loaded)  # type: ignore[no-untyped-call]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training or not self.qat:
            self.observe(x)
        return self.quantize(x)

    def observe(self, x: torch.Tensor) -> None:
        """Record the range of `x`, while `observing`."""
        if not self.observing or self.observer is None:
            return
        if not self.alone and in_several():
            from qnn.calibration.ranks_in_step import observe_together

            observe_together(self.observer, x)
        else:
            self.observer.observe(x)
        if self.qat:
            self.refresh()

    def freeze(self, frozen: bool = True) -> None:
        """Stop recording, or go on; a fixed scale stays fixed. The state dict has it."""
        if self.observer is not None:
            self.observing = not frozen
            self.frozen.fill_(frozen)

    def pass_on(self, passing: bool = True) -> None:
        """Leave inputs as they are, or fake-quantise again; both are recorded. The state dict has
        it.
        """
        if self.qat:
            self.rounding = not passing
            self.passing.fill_(passing)

    @torch.no_grad()
    def refresh(self, anew: bool = False) -> None:
        """With `qat`: take scale and zero point from the observer; a scale that is learned once, or
        `anew`.
        """
        observer = self.observer
        if observer is None or not self.qat:
            return
        scale, zero = self.spec.qparams(*observer.low_high())
        self._grow(scale.shape[0], self.who)
        nothing = observer.count == 0
        if self.spec.learnable and not anew:
            scale = torch.where(self.scale == 0, scale, self.scale)
            zero = torch.where(self.scale == 0, zero, self.zero_point)
        self.scale.copy_(torch.where(nothing, 0, scale))
        self.zero_point.copy_(torch.where(nothing, 0, zero))

    def quantize(self, x: torch.Tensor) -> torch.Tensor:
        """`x` fake-quantised with what is known by now; `x` itself without `qat`."""
        quantize = self.quantizer(x)
        return x if quantize is None else quantize(x)

    def quantizer(self, like: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """`quantize` with what is known by now, for many tensors with the shape and dtype of
        `like`; None where it would change nothing.
        """
        if not self.rounding or not self.scale.shape[0]:
            return None
        # Inductor would recompute a mask of the backward from these buffers, which observing
        # changes before then. It keeps what a concatenation returns.
        scale, zero = torch.stack([self.scale, self.zero_point.float()]).unbind(0)
        unknown = scale.detach() == 0
        if self.spec.learnable:
            # A scale may have been trained to the other side of zero.
            scale = scale.abs().clamp_min(torch.finfo(torch.float32).tiny)
            scale = _scale_gradient(scale, like, self.spec.qmax)
        scale = torch.where(unknown, 1.0, scale)
        axis, qmin, qmax = self.spec.channel_axis, self.spec.qmin, self.spec.qmax
        grid = grid_of(scale, zero, qmin, qmax, like, axis)
        if self.spec.fixed:
            return lambda x: on_grid(x, grid)
        if axis is not None:
            unknown = unknown.reshape(grid[-1].shape)
        return lambda x: torch.where(unknown, x, on_grid(x, grid))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if self.observer is not None and not self.frozen.is_meta:
            self.observing = not bool(self.frozen)
        if self.qat and not self.passing.is_meta:
            self.rounding = not bool(self.passing)

    def qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point, float32 and int32: per-tensor `[1]`, per-channel `[C]`.

        Raises:
            ValueError: nothing was observed, or the range is infinite or NaN; with the part's name.
        """
        if self.observer is not None and not (self.spec.learnable and self.qat):
            return self.observer.qparams()
        scale = self.scale.detach().abs()
        if not self.spec.fixed and bool((scale == 0).any()):
            raise ValueError(f"{self.who}: no scale yet; train for a step first.")
        if not bool(scale.isfinite().all()):
            raise ValueError(f"{self.who}: the scale is {self.scale.tolist()}; it must be finite.")
        return scale.clamp_min(torch.finfo(torch.float32).tiny), self.zero_point.clone()

    def row(self) -> torch.Tensor:
        """`(scale, zero_point, qmin, qmax)`, float32 `[4]`: a row of a recurrent op's table.

        Raises:
            ValueError: as `qparams`, or there is more than one scale.
        """
        scale, zero = self.qparams()
        if scale.numel() != 1:
            raise ValueError(f"{self.who}: {scale.numel()} scales; a table has room for one.")
        return torch.cat([scale, zero.float(), scale.new_tensor([self.spec.qmin, self.spec.qmax])])

    @property
    def columns(self) -> torch.Tensor | None:
        """What the observer has of the input's columns, where it watches them: `Columns`."""
        return None if self.observer is None else self.observer.columns

    def merge(self, other: FakeQuantize) -> None:
        """Add what `other` has observed, such as the same point in another process."""
        if (self.observer is None) != (other.observer is None):
            raise ValueError(f"{self.who}.merge: one of the two is fixed.")
        if self.observer is not None:
            self.observer.merge(other.observer)
            self.refresh()

    def begin(self, other: FakeQuantize) -> None:
        """Go on from what another point has observed, such as one for calibration: from all of it
        with the same spec, else from its range, where this one's observer is of a kind that holds
        no more than that. Frozen stays frozen.
        """
        mine, its = self.observer, other.observer
        if mine is None or its is None:
            return
        if int(its.count):
            if type(mine) is type(its) and self.spec == other.spec:
                mine.merge(its)
            else:
                its.check()
                mine.begin(*its.low_high(), int(its.count))
                if mine.magnitudes is not None and its.magnitudes is not None:
                    mine.magnitudes.copy_(its.magnitudes)
            self.refresh(anew=True)
        self.freeze(not other.observing)

    def reset(self) -> None:
        """Forget what was observed; a fixed scale stays."""
        if self.observer is not None:
            self.observer.reset()
            with torch.no_grad():
                self.scale.zero_()
                self.zero_point.zero_()

    @property
    def who(self) -> str:
        """The observation point, for errors."""
        return f"qnn.FakeQuantize {self.name!r}" if self.name else "qnn.FakeQuantize"

    def extra_repr(self) -> str:
        state = ", qat=True" if self.qat else ""
        state += "" if self.observing or self.spec.fixed else ", frozen"
        return (f"{self.name!r}, " if self.name else "") + f"{self.spec}{state}"


def _refresh_what_was_loaded(point: Any, _: Any) -> None:
    """Take the scale from statistics that come from a point without one: for calibration."""
    observer = point.observer
    if observer is None or not point.qat or observer.count.is_meta or not int(observer.count):
        return
    if not bool(point.scale.detach().any()):
        point.refresh(anew=True)


def _scale_gradient(scale: torch.Tensor, x: torch.Tensor, qmax: int) -> torch.Tensor:
    """`scale`, whose gradient is multiplied by `1 / sqrt(values · qmax)`, where `values` share one
    scale (LSQ, section 2.2).
    """
    count = x.numel()
    # A size that Dynamo knows is an int to it, and torch 2.11 has no trace for sym_max of one.
    values = (max(count, 1) if isinstance(count, int) else torch.sym_max(count, 1)) / scale.numel()
    fixed = scale.detach()
    result: torch.Tensor = fixed + (scale - fixed) * (values * qmax) ** -0.5
    return result


def rounds(layer: Any) -> bool:
    """Whether an observed layer fake-quantises its weights: trained for it, and unless its points
    pass on what they see.
    """
    return layer.qat and all(point.rounding for point in observation_points(layer))


def freeze_observers(model: ModelT) -> ModelT:
    """Stop recording at every observation point in `model`; returns it.

    In quantisation-aware training the scales then stay as they are, but for learned ones. It is
    part of the state dict: a model that is loaded from it is frozen too.

    Raises:
        ValueError: the model has no observation points.
    """
    return _set_frozen(model, True, "qnn.freeze_observers")


def unfreeze_observers(model: ModelT) -> ModelT:
    """Record again at every observation point in `model`, after `freeze_observers`; returns it.

    What was recorded before still counts. A fixed scale stays fixed.

    Raises:
        ValueError: the model has no observation points.
    """
    return _set_frozen(model, False, "qnn.unfreeze_observers")


def _set_frozen(model: ModelT, frozen: bool, who: str) -> ModelT:
    points = list(observation_points(model))
    if not points:
        raise ValueError(f"{who}: the model has no observation points; qnn.prepare inserts them.")
    for point in points:
        point.freeze(frozen)
    return model


def observation_points(model: nn.Module) -> Iterable[FakeQuantize]:
    """The observation points of `model`."""
    return (module for module in model.modules() if isinstance(module, FakeQuantize))


__all__ = [
    "FakeQuantize",
    "freeze_observers",
    "observation_points",
    "rounds",
    "unfreeze_observers",
]

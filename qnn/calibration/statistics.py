"""What observers and observation points share: statistics in buffers, and the observers' base."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from qnn.calibration.columns import Columns
from qnn.calibration.ranks import of_all
from qnn.calibration.spec import QuantSpec
from qnn.functional.ranges import counted_by_exponent

_Self = TypeVar("_Self", bound="Statistics")


class Statistics(nn.Module):
    """A module with a row of float32 and integer buffers for each channel, which keep their dtypes
    through `.half()`. Before the number of channels is known it is 0.
    """

    _rows: dict[str, float]
    """The buffers with an axis of channels, and what they begin with."""

    _later: ClassVar[tuple[str, ...]] = ()
    """Buffers that files of former versions do not have; they keep their values then."""

    def __init__(self) -> None:
        super().__init__()
        self._rows = {}

    def _declare(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, value: float) -> None:
        self._rows[name] = value
        self.register_buffer(name, torch.full(shape, value, dtype=dtype))

    def _grow(self, channels: int, who: str) -> None:
        """Make room for `channels`, once."""
        for name in self._rows:
            old = getattr(self, name)
            if old.shape[0] == channels:
                continue
            if old.shape[0]:
                raise ValueError(
                    f"{who}: the tensor has {channels} channels, but {old.shape[0]} before."
                )
            value = self._rows[name]
            setattr(self, name, torch.full_like(old.new_empty(channels, *old.shape[1:]), value))

    def _apply(
        self: _Self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> _Self:
        kept = {name: tensor.data for name, tensor in [*self._own()]}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, data in kept.items():
            tensor = getattr(self, name)
            if tensor.dtype != data.dtype:
                tensor.data = data.to(tensor.device)
        return self

    def _own(self) -> list[tuple[str, torch.Tensor]]:
        return [(k, v) for k, v in {**self._buffers, **self._parameters}.items() if v is not None]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        own = dict(self._own())
        given = {name for name in own if prefix + name in state_dict}
        if given:
            later = {name: own[name] for name in self._later if name in own and name not in given}
            state_dict = state_dict | {prefix + name: value for name, value in later.items()}
        for name in self._rows.keys() & given:
            tensor = state_dict[prefix + name]
            if own[name].shape[:1] == (0,) and tensor.dim() == own[name].dim():
                setattr(self, name, own[name].new_empty(tensor.shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class Observer(Statistics):
    """Finds the range of what it is shown; the base of the others.

    A subclass declares its statistics, and defines `_update(x)`, where `x` is `[C, n]` (C = 1 for
    per-tensor scales), `_merge(other)`, and `low_high()`; and `seen()` where these
    are not the ends of what was seen.

    For a tensor of 8 bits or fewer it also counts how many values have which exponent, for
    `share_below`; and after `watch_columns` what each column of its last axis holds.

    Args:
        spec: the integers and the axis of the channels.
        name: of the part that is observed, for errors.
        channels: how many there are; found at the first observation if None.
    """

    count: torch.Tensor
    magnitudes: torch.Tensor | None
    """Of float32's exponents, the sign left out: how often each was seen, int64 `[256]`."""
    columns: torch.Tensor | None
    """`Columns`, where they are watched: float64 `[4, K]`."""

    _later: ClassVar[tuple[str, ...]] = ("magnitudes", "columns")

    def __init__(self, spec: QuantSpec, *, name: str = "", channels: int | None = None) -> None:
        super().__init__()
        self.spec, self.name = spec, name
        self._channels = 1 if spec.channel_axis is None else channels or 0
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        counted = spec.channel_axis is None and spec.qmax - spec.qmin <= 255
        self.register_buffer("magnitudes", torch.zeros(256, dtype=torch.int64) if counted else None)
        self.register_buffer("columns", None)
        self.kept: torch.Tensor | None = None  # [B, T], of a batch [B, T, K]: not padding

    def watch_columns(self, columns: int) -> None:
        """From now on keep, beside the range, what `Columns` says of each of the last axis'
        `columns`.
        """
        self.columns = Columns.none(columns).to(self.count.device)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if self.columns is None:  # a model for training has no use for those of calibration
            state_dict = {k: v for k, v in state_dict.items() if k != f"{prefix}columns"}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    # What subclasses define.

    def _update(self, x: torch.Tensor) -> None:
        raise NotImplementedError

    def _merge(self, other: Any) -> None:
        raise NotImplementedError(
            f"{self.who} defines no _merge(other), which adding up several processes needs."
        )

    def low_high(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The range for each channel, float32 `[C]`; NaN or infinite where such a value was seen,
        and without meaning where nothing was.
        """
        raise NotImplementedError

    def seen(self) -> tuple[torch.Tensor, torch.Tensor]:
        """As `low_high`, before anything was clipped."""
        return self.low_high()

    def _take(self, batch: Any) -> None:
        """Add a batch of which all processes have seen a share, as `_update` adds a tensor."""
        self._merge(batch)

    def begin(self, low: torch.Tensor, high: torch.Tensor, count: int) -> None:
        """Go on from a range that another kind of observer has found in `count` values; one that
        holds more than a range starts anew.
        """

    # What they have.

    @torch.no_grad()
    def observe(self, x: torch.Tensor, group: dist.ProcessGroup | None = None) -> None:
        """Take the values of `x`, which stays as it is, into the statistics; an empty one changes
        nothing. A NaN is remembered.

        With a `group` of processes, each takes the values of all; each has to come here.
        """
        if group is not None:
            batch = self.empty()
            if self.spec.channel_axis is not None and x.numel() == 0:
                batch._grow(x.shape[self.spec.channel_axis], self.who)
            batch.observe(x)
            self._add(of_all(batch, group), self._take)
            return
        # A size that is traced is not zero: torch compiles empty tensors apart.
        if any(isinstance(size, int) and size == 0 for size in x.shape):
            return
        x = x.detach()
        own = self._buffers  # each takes 1 µs as an attribute
        columns, magnitudes = own["columns"], own["magnitudes"]
        if columns is not None:
            columns.copy_(Columns.with_values(columns, self._without_padding(x)))
        axis = self.spec.channel_axis
        if axis is None:
            x = x.reshape(1, -1)
        else:
            if not -x.dim() <= axis < x.dim():
                raise ValueError(
                    f"{self.who}: channel_axis is {axis}, but the tensor is {list(x.shape)}."
                )
            x = x.movedim(axis, 0)
            self._grow(x.shape[0], self.who)
            x = x.reshape(x.shape[0], -1)
        self._update(x)
        self.count.add_(x.shape[1])
        if magnitudes is not None:
            self._count_magnitudes(x, magnitudes)

    def _count_magnitudes(self, x: torch.Tensor, magnitudes: torch.Tensor) -> None:
        magnitudes.copy_(counted_by_exponent(x, magnitudes))

    def _without_padding(self, x: torch.Tensor) -> torch.Tensor:
        if self.kept is None or self.kept.device != x.device or x.shape[:-1] != self.kept.shape:
            return x
        return x[self.kept]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`observe`, and `x` itself."""
        self.observe(x)
        return x

    def qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point, float32 and int32 `[C]`, by the rule of `QuantSpec.qparams`.

        Raises:
            ValueError: nothing was observed, or a NaN or an infinite value.
        """
        self.check()
        return self.spec.qparams(*self.low_high())

    def check(self) -> None:
        """Raise a ValueError, with the part's name, where there is no finite range."""
        if not int(self.count):
            raise ValueError(
                f"{self.who}: nothing was observed; run qnn.calibrate(model, batches) first."
            )
        low, high = self.low_high()
        bad = ~(low.isfinite() & high.isfinite())
        if bool(bad.any()):
            what = "NaN" if bool((low.isnan() | high.isnan())[bad].any()) else "infinite values"
            what = f"{what} were observed"
        else:
            scale, _ = self.spec.qparams(low, high)
            bad, what = ~scale.isfinite(), "its length is beyond float32"
        if bool(bad.any()):
            (at, *_) = bad.nonzero().flatten().tolist()
            where = "" if self.spec.channel_axis is None else f" of channel {at}"
            raise ValueError(
                f"{self.who}: the range{where} is {low[at].item():g} … {high[at].item():g}, since "
                f"{what}; leave out the batch that has such values, or this part."
            )

    def share_below(self, limit: float) -> float | None:
        """The share of nonzero values whose magnitude lies below `limit`, a float32, taken to lie
        evenly between two powers of two; None where that was not counted.
        """
        if self.magnitudes is None:
            return None
        counts = self.magnitudes.double().cpu()
        counts[0] = 0  # zeros, and numbers that are hardly more
        total = float(counts.sum())
        if not total:
            return None
        bits = int(torch.tensor(limit, dtype=torch.float32).view(torch.int32))
        exponent, fraction = bits >> 23, (bits & (2**23 - 1)) / 2**23
        return float(counts[:exponent].sum() + fraction * counts[exponent]) / total

    def empty(self: Any) -> Any:
        """Another one that has seen nothing, with as many channels, on the same device."""
        rows = next(iter(self._rows), None)
        channels = getattr(self, rows).shape[0] if rows else None
        made = type(self)(self.spec, name=self.name, channels=channels or None)
        if self.columns is not None:
            made.watch_columns(self.columns.shape[1])
        return made.to(self.count.device)

    def merge(self: Any, other: Any) -> None:
        """Add what `other`, of the same kind, has seen, as if this one had."""
        if type(other) is not type(self) or other.spec != self.spec:
            raise ValueError(
                f"{self.who}.merge: the other must be a {type(self).__name__} of {self.spec}, got "
                f"{other!r}."
            )
        self._add(other, self._merge)

    @torch.no_grad()
    def _add(self, other: Any, how: Callable[[Any], None]) -> None:
        rows = next(iter(other._rows), None)
        channels = getattr(other, rows).shape[0] if rows else 0
        if rows and not channels:
            return
        if channels:
            self._grow(channels, f"{self.who}.merge")
        how(other)
        self.count.copy_(self.count + other.count)
        if self.magnitudes is not None:
            self.magnitudes.copy_(self.magnitudes + other.magnitudes)
        if self.columns is not None and other.columns is not None:
            self.columns.copy_(Columns.joined(self.columns, other.columns))

    def reset(self) -> None:
        """Forget everything."""
        self.count.zero_()
        if self.magnitudes is not None:
            self.magnitudes.zero_()
        if self.columns is not None:
            self.columns.copy_(Columns.none(self.columns.shape[1]))
        for name, value in self._rows.items():
            getattr(self, name).fill_(value)

    @property
    def who(self) -> str:
        """The observer, for errors."""
        return f"{type(self).__name__} of {self.name!r}" if self.name else type(self).__name__

    def extra_repr(self) -> str:
        return f"{self.spec}"

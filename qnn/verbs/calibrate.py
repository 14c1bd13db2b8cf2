"""`calibrate`: show a prepared model its data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Any, TypeVar

import torch
from torch import nn

from qnn.calibration.fake_quantize import FakeQuantize, observation_points
from qnn.calibration.ranks import several
from qnn.calibration.shares import Shares
from qnn.calibration.statistics import Statistics
from qnn.kernels.cpu.forking import return_threads
from qnn.verbs.checks import require_module
from qnn.verbs.progress import Meter, check_progress

ModelT = TypeVar("ModelT", bound=nn.Module)


def calibrate(
    model: ModelT,
    batches: Iterable[Any],
    *,
    progress: bool | str = True,
    sync: Any = True,
) -> ModelT:
    """Run `model` on `batches`, so that its observers record the ranges.

    It runs in evaluation mode and without gradients; every module's mode is as before at the end,
    and so are the model's own buffers, such as a key-value cache that the forward writes to.
    Nothing is moved between devices. A few hundred samples that are like those of use are enough.
    What smoothing needs of each column leaves out the padding that an `attention_mask`
    `[B, T]` shows, where a batch is a mapping with one.

    Where `torch.distributed` is initialised, each process shows its own batches, as many as it has,
    and at the end all of them have the ranges of all: every process has to make the call.

    Args:
        model: with observation points, as `qnn.prepare` returns it; also inside a
            `DistributedDataParallel`.
        batches: for each call a tensor, a tuple or list (positional arguments), a mapping (keyword
            arguments), or any other object, such as a `PackedSequence` or another namedtuple.
        progress: a line on stderr: True if stderr is a terminal, `"always"` in any case, False
            never.
        sync: whether to add up the processes: those of the default group, or of the
            `torch.distributed.ProcessGroup` given; False for a call that one process makes alone.

    Returns:
        `model`.

    Raises:
        ValueError: the model has no observation points or all are frozen or fixed, or there are no
            batches, in no process.
        RuntimeError: another process has failed, or has other observation points.

    >>> import qnn
    >>> layer = qnn.ObservedLinear.from_float(nn.Linear(4, 2))
    >>> _ = calibrate(layer, [torch.randn(8, 4) for _ in range(3)])
    >>> qnn.QLinear.from_observed(layer).scheme
    'int8_static'
    """
    group = None if sync is True else sync
    if sync is False or not several(group):
        done = _run(model, batches, _points(model, batches), progress)
    else:
        done = _run_together(model, batches, progress, group)
    if not done:
        raise ValueError("qnn.calibrate: there are no batches; nothing was observed.")
    return model


def _points(model: nn.Module, batches: Any) -> list[FakeQuantize]:
    """The observation points of the model, if the arguments make sense."""
    require_module("qnn.calibrate", model)
    if isinstance(batches, (torch.Tensor, Mapping)) or is_namedtuple(batches):
        raise TypeError(
            f"qnn.calibrate: batches is a {type(batches).__name__}, one batch; pass [batch]."
        )
    points = list(observation_points(model))
    others = map(observes, model.modules())
    if not points and any(others):  # another library's, in a graph: they see what runs
        return []
    if not points:
        raise ValueError(
            "qnn.calibrate: the model has no observation points; qnn.prepare(model) inserts them."
        )
    if not any(point.observing for point in points):
        raise ValueError(
            f"qnn.calibrate: all {len(points)} observation points are frozen or fixed; "
            "qnn.unfreeze_observers(model) wakes those that were frozen."
        )
    return points


def _run_together(
    model: nn.Module, batches: Iterable[Any], progress: bool | str, group: Any
) -> int:
    """`_run`, and the statistics of all processes in each. One that fails says so to the others,
    which would wait for it otherwise.
    """
    points, failure, done = list[FakeQuantize](), None, 0
    try:
        points = _points(model, batches)
    except Exception as error:
        failure = error
    shares = Shares(points, group)
    try:
        if failure is None:
            done = _run(model, batches, points, progress)
    except Exception as error:
        failure = error
    try:
        return shares.join(failure, done)
    except BaseException:
        shares.undo()
        raise


def _run(
    model: nn.Module, batches: Iterable[Any], points: list[FakeQuantize], progress: bool | str
) -> int:
    """How many batches there were."""
    check_progress("qnn.calibrate", progress)
    put_back = remember_buffers(model)
    # Its forward talks to the other processes, which may have fewer batches.
    parallel = isinstance(model, nn.parallel.DistributedDataParallel)
    called = model.module if parallel else model
    modes = [(module, module.training) for module in model.modules()]
    total = len(batches) if isinstance(batches, Sized) else None
    meter = Meter("qnn.calibrate", "batch", total, progress)
    model.eval()
    for point in points:
        point.alone = True
        point.training = point.qat  # in evaluation one for training would record nothing
    try:
        with torch.no_grad():
            for batch in meter.each(batches):
                _set_kept(points, batch)
                call(called, batch)
    finally:
        for module, training in modes:
            module.training = training
        for point in points:
            point.alone = False
        _set_kept(points, None)
        put_back()
        return_threads()
    return meter.done


def _set_kept(points: list[FakeQuantize], batch: Any) -> None:
    """Tell the observers which rows of a batch are not padding, by its `attention_mask`."""
    for point in points:
        if point.observer is not None:
            point.observer.kept = kept_of(batch)


def kept_of(batch: Any) -> torch.Tensor | None:
    """Which rows of a batch are not padding, by its `attention_mask` `[B, T]`; None if unknown."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or not bool(mask.any()):
        return None
    return mask.bool()


def observes(module: nn.Module) -> bool:
    """Whether a module is an observer of another library."""
    return callable(getattr(module, "calculate_qparams", None))


def remember_buffers(model: nn.Module) -> Callable[[], None]:
    """What puts the buffers back that running the model changes, such as a key-value cache; what
    observers have recorded stays.
    """
    ours = {
        id(module)
        for point in model.modules()
        if isinstance(point, Statistics) or observes(point)
        for module in point.modules()
    }
    held = [
        (module, name, tensor, tensor._version, tensor.detach().clone())
        for module in model.modules()
        if id(module) not in ours
        for name, tensor in module._buffers.items()
        if tensor is not None and not tensor.is_inference()
    ]

    def put_back() -> None:
        for module, name, tensor, version, value in held:
            if tensor._version != version:
                with torch.no_grad():
                    tensor.copy_(value)
            module._buffers[name] = tensor

    return put_back


def call(model: Any, batch: Any) -> Any:
    """`model` on a batch: a tuple or list is its positional arguments, a mapping its keyword
    arguments, and anything else, a namedtuple too, its one argument.
    """
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)) and not is_namedtuple(batch):
        return model(*batch)
    return model(batch)


def is_namedtuple(value: Any) -> bool:
    return isinstance(value, tuple) and hasattr(value, "_fields")

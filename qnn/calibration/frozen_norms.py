"""`freeze_bn`: BatchNorms that normalise by their running statistics also in training."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

ModelT = TypeVar("ModelT", bound=nn.Module)


class _Frozen:
    """A BatchNorm that stays in evaluation mode, whatever mode its model is in."""

    def train(self, mode: bool = True) -> Any:
        return super().train(False)  # type: ignore[misc]


class FrozenBatchNorm1d(_Frozen, nn.BatchNorm1d):
    """An `nn.BatchNorm1d` that `qnn.freeze_bn` has frozen."""


class FrozenBatchNorm2d(_Frozen, nn.BatchNorm2d):
    """An `nn.BatchNorm2d` that `qnn.freeze_bn` has frozen."""


class FrozenBatchNorm3d(_Frozen, nn.BatchNorm3d):
    """An `nn.BatchNorm3d` that `qnn.freeze_bn` has frozen."""


class FrozenSyncBatchNorm(_Frozen, nn.SyncBatchNorm):
    """An `nn.SyncBatchNorm` that `qnn.freeze_bn` has frozen."""


_FROZEN: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: FrozenBatchNorm1d,
    nn.BatchNorm2d: FrozenBatchNorm2d,
    nn.BatchNorm3d: FrozenBatchNorm3d,
    nn.SyncBatchNorm: FrozenSyncBatchNorm,
}


def freeze_bn(model: ModelT) -> ModelT:
    """Let every BatchNorm in `model` normalise by its running statistics, in training mode too, and
    leave these as they are; returns it. Its weight and bias are still trained.

    The end of quantisation-aware training: what is trained then is what is folded and deployed.

    Raises:
        ValueError: the model has no BatchNorm with running statistics.
    """
    return _change(model, _FROZEN, "qnn.freeze_bn")


def unfreeze_bn(model: ModelT) -> ModelT:
    """Undo `freeze_bn`; the BatchNorms are in the mode of the model.

    Raises:
        ValueError: no BatchNorm of the model is frozen.
    """
    back = {frozen: plain for plain, frozen in _FROZEN.items()}
    return _change(model, back, "qnn.unfreeze_bn", model.training)


def _change(
    model: ModelT, kinds: dict[type[nn.Module], type[nn.Module]], who: str, mode: bool = False
) -> ModelT:
    found: list[Any] = [
        module
        for module in model.modules()
        if type(module) in kinds and getattr(module, "running_mean", None) is not None
    ]
    if not found:
        what = "frozen BatchNorm" if who == "qnn.unfreeze_bn" else "BatchNorm with statistics"
        raise ValueError(f"{who}: the model has no {what}.")
    for module in found:
        # The class alone: parameters, buffers, hooks and names stay.
        module.__class__ = kinds[type(module)]
        module.train(mode)
    return model


__all__ = ["freeze_bn", "unfreeze_bn"]

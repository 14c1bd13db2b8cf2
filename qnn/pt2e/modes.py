"""Names of torch's flow that a model of qnn's does not need: its `train()` and `eval()` work."""

from __future__ import annotations

from typing import TypeVar

from torch import nn
from torch.fx import GraphModule

from qnn.calibration.fake_quantize import FakeQuantize

ModelT = TypeVar("ModelT", bound=nn.Module)


def move_exported_model_to_train(model: ModelT) -> ModelT:
    """`model.train()`."""
    return model.train()


def move_exported_model_to_eval(model: ModelT) -> ModelT:
    """`model.eval()`."""
    return model.eval()


def allow_exported_model_train_eval(model: ModelT) -> ModelT:
    """`model` itself: both work already."""
    return model


def model_is_exported(model: nn.Module) -> bool:
    """Whether `model` is a graph that comes from `torch.export`."""
    return isinstance(model, GraphModule) and any("val" in n.meta for n in model.graph.nodes)


def enable_observer(module: nn.Module) -> None:
    """For `model.apply`: record ranges again; as `qnn.unfreeze_observers`, and for the observers of
    other libraries that have this as a method.
    """
    _switch(module, True)


def disable_observer(module: nn.Module) -> None:
    """For `model.apply`: record no ranges; as `qnn.freeze_observers`, and for the observers of
    other libraries that have this as a method.
    """
    _switch(module, False)


def _switch(module: nn.Module, on: bool) -> None:
    if isinstance(module, FakeQuantize):
        module.freeze(not on)
        return
    own = getattr(module, "enable_observer" if on else "disable_observer", None)
    if callable(own):
        own()

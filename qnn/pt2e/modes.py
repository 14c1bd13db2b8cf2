"""Names of torch's flow that a model of qnn's does not need: its `train()` and `eval()` work."""

from __future__ import annotations

from typing import TypeVar

from torch import nn
from torch.fx import GraphModule

from qnn.calibration.fake_quantize import FakeQuantize
from qnn.pt2e.observers import Point

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
    if isinstance(module, FakeQuantize):
        module.freeze(False)
    else:
        _own(module, "enable_observer")


def disable_observer(module: nn.Module) -> None:
    """For `model.apply`: record no ranges; as `qnn.freeze_observers`, and for the observers of
    other libraries that have this as a method.
    """
    if isinstance(module, FakeQuantize):
        module.freeze()
    else:
        _own(module, "disable_observer")


def enable_fake_quant(module: nn.Module) -> None:
    """For `model.apply`: fake-quantise again, after `disable_fake_quant`."""
    if isinstance(module, FakeQuantize | Point):
        module.pass_on(False)
    else:
        _own(module, "enable_fake_quant")


def disable_fake_quant(module: nn.Module) -> None:
    """For `model.apply`: fake-quantise nothing, and go on recording ranges; for the fake-quantisers
    of other libraries that have this as a method too.
    """
    if isinstance(module, FakeQuantize | Point):
        module.pass_on()
    else:
        _own(module, "disable_fake_quant")


def _own(module: nn.Module, name: str) -> None:
    if callable(own := getattr(module, name, None)):
        own()

"""Lightning: training with products in float8, mxfp8 or nvfp4, as a plug-in for the precision.

from qnn.integrations.lightning import TrainingPrecision

trainer = Trainer(plugins=TrainingPrecision("fp8", exclude="head"))
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.fabric.plugins.precision.precision import Precision as _FabricPrecision
from lightning.pytorch.plugins.precision import Precision as _Precision
from torch import nn

from qnn.kernels.torch_private import tree_map_only
from qnn.nn import Linear
from qnn.verbs.convert import SchemeMap, convert

_AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16}


class _Converting:
    precision: Any

    def __init__(
        self,
        scheme: str | SchemeMap = "fp8",
        *,
        precision: str = "bf16-mixed",
        device_type: str | None = None,
        **options: Any,
    ) -> None:
        who = f"qnn.integrations.lightning.{type(self).__name__}"
        if precision not in _AUTOCAST:
            able = " or ".join(map(repr, _AUTOCAST))
            raise ValueError(
                f"{who}: precision must be {able}, got {precision!r}. For another one call "
                "qnn.convert(self, scheme, training=True, inplace=True) in configure_model, and "
                "give that precision to the trainer."
            )
        for name in ("training", "inplace"):
            if name in options:
                raise TypeError(f"{who}: {name} is True, and cannot be given.")
        self.scheme, self.precision, self.options = scheme, precision, options
        found = torch.accelerator.current_accelerator()
        self.device_type = device_type or ("cpu" if found is None else found.type)

    def convert_module(self, module: nn.Module) -> nn.Module:
        """The module itself, converted, unless it has layers of `qnn.Linear` already."""
        if any(isinstance(each, Linear) for each in module.modules()):
            return module
        made: nn.Module = convert(module, self.scheme, training=True, inplace=True, **self.options)
        return made

    def forward_context(self) -> AbstractContextManager[Any]:
        dtype = _AUTOCAST[self.precision]
        return nullcontext() if dtype is None else torch.autocast(self.device_type, dtype)


class TrainingPrecision(_Converting, _Precision):  # type: ignore[misc]
    """`Trainer(plugins=TrainingPrecision("fp8"))`: the linear layers of the module become
    `qnn.Linear`, with the same parameters, before the optimizers are made.

    Checkpoints are those of the float model. A module that shards its weights in
    `configure_model`, or wants some other precision, calls `qnn.convert` there.

    Args:
        scheme: as of `qnn.convert(…, training=True)`.
        precision: `"bf16-mixed"`, autocast to bfloat16, or `"32-true"`.
        device_type: of autocast; that of the accelerator, else `"cpu"`, if None.
        options: of `qnn.convert`: `include`, `exclude`, `on_unsupported`, ….

    Raises:
        ValueError: another precision; in `fit`, a layer that the scheme does not take.

        trainer = Trainer(max_epochs=3, plugins=TrainingPrecision("mxfp8", exclude="head"))
    """


class FabricTrainingPrecision(_Converting, _FabricPrecision):  # type: ignore[misc]
    """`TrainingPrecision` for `Fabric(plugins=…)`: `fabric.setup` converts the module. Results come
    in torch's default dtype, as with Fabric's own mixed precision.
    """

    def convert_output(self, data: Any) -> Any:
        def cast(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(torch.get_default_dtype()) if tensor.is_floating_point() else tensor

        return tree_map_only(torch.Tensor, cast, data)


__all__ = ["FabricTrainingPrecision", "TrainingPrecision"]

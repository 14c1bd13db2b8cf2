"""peft: LoRA over quantised layers, merged with one rounding and unmerged without any.

    from qnn.integrations.peft import get_peft_model, load_adapter

    model = get_peft_model(converted, LoraConfig(r=8, target_modules="all-linear"))
    again = load_adapter(another_converted, folder)

peft takes quantised layers for the float ones, whose `weight` they show. The classes here are used
where a config was given to `register`, which goes through peft's own `_register_custom_module`;
both calls above do so.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import peft
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import layer as lora
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from qnn.functional.tensor_parallel import is_distributed
from qnn.nn import QConv1d, QConv2d, QConv3d, QEmbedding, QLinear
from qnn.nn.base import Quantized

if "config" not in inspect.signature(lora.Linear.update_layer).parameters:
    raise ImportError(
        f"qnn.integrations.peft needs peft 0.21 or newer, got {peft.__version__}: "
        "pip install -U peft."
    )

ConfigT = TypeVar("ConfigT", bound=PeftConfig)


@dataclass
class _Codes:
    """What a layer holds at one time, and a hash of it."""

    parts: tuple[torch.Tensor, ...]
    bias: torch.Tensor | None

    @classmethod
    def of(cls, layer: Quantized) -> _Codes:
        bias = layer._parameters.get("bias")
        held = tuple(part.detach() for part in layer._held("weight"))
        return cls(held, None if bias is None else bias.detach().clone())

    def put(self, layer: Quantized, bias: bool) -> None:
        for held, part in zip(layer._stored_of("weight"), self.parts, strict=True):
            held.data = part.to(held.device)
        if bias and self.bias is not None:
            held = cast(nn.Parameter, layer._parameters["bias"])
            held.data = self.bias.to(held.device, held.dtype)

    def hash(self) -> list[int]:
        plain = [part.contiguous().flatten().view(torch.uint8) for part in self.parts]
        return [int(torch.hash_tensor(part)) for part in plain]


class _Adapted:
    """Adapters over a quantised layer, of one of peft's classes, which follows in the order of
    bases. Its forward is peft's.

    To merge, peft's own code adds to a float layer in the place of the quantised one, in float32,
    and the sum is quantised once, from the codes before the first merge on. `unmerge` puts these
    codes back.
    """

    _former: _Codes | None = None
    _written: list[int] | None = None

    def update_layer(self: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = kwargs["config"]
        if config.init_lora_weights == "loftq":
            raise ValueError(
                "qnn: init_lora_weights='loftq' quantises a float base in a format of its own, and "
                f"{self.get_base_layer()._who} is quantised already; use init_lora_weights=True, "
                "'pissa' or 'olora'."
            )
        if config.fan_in_fan_out and isinstance(self.get_base_layer(), QLinear):
            # Conv1D has its weight [in, out], a quantised layer has it [out, in]; the adapter's own
            # matrices, and the config that is saved with them, are the same for both.
            kwargs["config"] = copy.copy(config)
            kwargs["config"].fan_in_fan_out = self.fan_in_fan_out = False
        super().update_layer(adapter_name, *args, **kwargs)  # type: ignore[misc]

    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As of peft. The weight with all merged adapters is rounded once, however many they are
        and in how many calls they come.

        Raises:
            ValueError: an adapter holds NaN or inf; nothing has changed then.
            TypeError: the layer is sharded.
        """
        base = self.get_base_layer()
        if not isinstance(base, Quantized):  # the float layer in its place
            super().merge(safe_merge, adapter_names)  # type: ignore[misc]
            return
        names = check_adapters_to_merge(self, adapter_names)
        if not names:
            return
        held = base._stored_of("weight")[0]
        if is_distributed(held) or held.is_meta:
            what = "sharded" if is_distributed(held) else "on the meta device"
            raise TypeError(
                f"qnn: adapters cannot be merged into {base._who}, which is {what}; load the "
                "adapter onto a model that is whole on a device, and merge there."
            )
        before, now = list(self.merged_adapters), _Codes.of(base)
        self._require_ours(base)
        former = self._former or now
        former.put(base, bias=self._biased(before))
        self.merged_adapters = []
        try:
            floats = _in_float(base)
            weight, bias = floats.weight.clone(), getattr(floats, "bias", None)
            bias = None if bias is None else bias.clone()
            with _in_place_of(self, base, floats):
                super().merge(safe_merge, [*before, *names])  # type: ignore[misc]
            if not torch.equal(weight, floats.weight):
                base._write("weight", floats.weight.detach())
            if bias is not None and not torch.equal(bias, floats.bias):
                held_bias = cast(nn.Parameter, base._parameters["bias"])
                held_bias.data = floats.bias.detach().to(held_bias.dtype)
        except BaseException:
            now.put(base, bias=True)
            self.merged_adapters = before
            raise
        self._former, self._written = former, _Codes.of(base).hash()

    def unmerge(self: Any) -> None:
        """As of peft, with the codes, and so the results, from before the merge, bit for bit.

        Raises:
            RuntimeError: something else has written to the weight since.
        """
        base = self.get_base_layer()
        if not isinstance(base, Quantized):
            super().unmerge()  # type: ignore[misc]
            return
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._require_ours(base)
        cast(_Codes, self._former).put(base, bias=self._biased(self.merged_adapters))
        self.merged_adapters = []
        self._former = self._written = None

    def _biased(self: Any, names: list[str]) -> bool:
        return any(self.lora_bias.get(name) for name in names)

    def _require_ours(self: Any, base: Quantized) -> None:
        if self._former is not None and _Codes.of(base).hash() != self._written:
            raise RuntimeError(
                f"qnn: the weight of {base._who} was written to since adapters were merged into "
                "it, by load_state_dict, or by a layer that shares it; what it was before is not "
                "known. Load the converted model again."
            )


class QLoraLinear(_Adapted, lora.Linear):  # type: ignore[misc]
    """LoRA, DoRA and their kin over a `qnn.QLinear`."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        if (name := kwargs.pop("parameter_name", None)) is not None:
            raise ValueError(
                f"qnn: {cast(Any, base_layer)._who}: target_parameters names its {name}, which is "
                "quantised; name the layer in target_modules."
            )
        super().__init__(base_layer, adapter_name, **kwargs)


class QLoraEmbedding(_Adapted, lora.Embedding):  # type: ignore[misc]
    """LoRA over a `qnn.QEmbedding`."""

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if kwargs["config"].use_dora:
            raise ValueError(
                "qnn: DoRA needs the whole table in float at every call, and "
                f"{self.base_layer._who} is quantised; leave it out of target_modules, or "
                "use_dora=False."
            )
        super().update_layer(adapter_name, *args, **kwargs)


class _QLoraConv(_Adapted):
    def update_layer(self: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # peft makes the adapters of the class that the layer has.
        base = self.get_base_layer()
        with _in_place_of(self, base, base.dequantize()):
            super().update_layer(adapter_name, *args, **kwargs)


class QLoraConv1d(_QLoraConv, lora.Conv1d):  # type: ignore[misc]
    """LoRA over a `qnn.QConv1d`."""


class QLoraConv2d(_QLoraConv, lora.Conv2d):  # type: ignore[misc]
    """LoRA over a `qnn.QConv2d`."""


class QLoraConv3d(_QLoraConv, lora.Conv3d):  # type: ignore[misc]
    """LoRA over a `qnn.QConv3d`."""


def _refuse(target: Any, *args: Any, **kwargs: Any) -> nn.Module:
    base = getattr(target, "base_layer", target)
    able = ", ".join(f"qnn.{cls.__name__}" for cls in _CLASSES if cls is not Quantized)
    raise ValueError(
        f"qnn: LoRA has no adapter for {base._who}; target_modules may name layers of {able}. "
        "Leave a layer that needs one in float: convert(…, exclude=…)."
    )


_CLASSES: dict[type[nn.Module], Any] = {
    QLinear: QLoraLinear,
    QEmbedding: QLoraEmbedding,
    QConv1d: QLoraConv1d,
    QConv2d: QLoraConv2d,
    QConv3d: QLoraConv3d,
    Quantized: _refuse,
}


def register(config: ConfigT) -> ConfigT:
    """The config itself, whose adapters over quantised layers will be those of this module.

    For what makes adapters itself: `model.add_adapter(register(config))` of transformers. It is not
    saved with the adapter; `load_adapter` registers anew.

    Raises:
        TypeError: the config is not a `LoraConfig`.
    """
    if type(config) is not LoraConfig:
        raise TypeError(
            "qnn.integrations.peft.register takes a peft.LoraConfig, got "
            f"{type(config).__name__}; give that to peft.get_peft_model as it is."
        )
    config._register_custom_module(_CLASSES)
    return config


def _require_floats(model: nn.Module, config: Any) -> None:
    """Refuse to train copies of quantised layers."""
    names = tuple(getattr(config, "modules_to_save", None) or ())
    bad = [
        name
        for name, module in model.named_modules()
        if name.endswith(names) and any(isinstance(each, Quantized) for each in module.modules())
    ]
    if names and bad:
        raise ValueError(
            f"qnn: modules_to_save means {', '.join(bad[:5])}, which is quantised and cannot be "
            "trained; leave it in float: convert(…, exclude=…)."
        )


def get_peft_model(model: nn.Module, config: PeftConfig, **options: Any) -> Any:
    """`peft.get_peft_model` of a converted model; a `LoraConfig` is registered.

    Args:
        model: a converted model, which peft changes in place.
        config: of any method of peft.
        options: of `peft.get_peft_model`.

    Raises:
        ValueError: `modules_to_save` names a quantised layer, or a target has no adapter.

        model = get_peft_model(converted, LoraConfig(r=8, target_modules="all-linear"))
    """
    _require_floats(model, config)
    return peft.get_peft_model(model, _registered(config), **options)


def _registered(config: PeftConfig) -> PeftConfig:
    return register(config) if type(config) is LoraConfig else config


def load_adapter(
    model: nn.Module,
    folder: str | Path,
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
    **options: Any,
) -> PeftModel:
    """The model with the adapter that `save_pretrained` of peft wrote.

    Args:
        model: a converted model, or a `PeftModel` over one, which gets one adapter more.
        folder: where the adapter was saved, or a name on the hub.
        adapter_name: the name that it gets.
        is_trainable: whether it will be trained on.
        options: of `PeftModel.from_pretrained` or `PeftModel.load_adapter`.

    Raises:
        ValueError: the model has an adapter of that name; what `get_peft_model` refuses.
    """
    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = not is_trainable
    _require_floats(model, _registered(config))
    if not isinstance(model, PeftModel):
        return PeftModel.from_pretrained(
            model, str(folder), adapter_name, is_trainable, config, **options
        )
    if adapter_name in model.peft_config:
        raise ValueError(
            f"qnn.integrations.peft.load_adapter: the model has an adapter {adapter_name!r}; give "
            "another adapter_name."
        )
    model.add_adapter(adapter_name, config)
    model.load_adapter(str(folder), adapter_name, is_trainable, **options)
    if is_trainable:
        model.set_requires_grad(adapter_name)
    return model


def _in_float(layer: Quantized) -> Any:
    """The float layer with the same weights, in float32 at least."""
    wide = torch.promote_types(layer.dtype, torch.float32)
    floats = layer._float("meta")
    floats.weight = nn.Parameter(layer._dequantized("weight", wide), requires_grad=False)
    if (bias := layer._parameters.get("bias")) is not None:
        floats.bias = nn.Parameter(bias.detach().to(wide, copy=True), requires_grad=False)
    return floats


@contextlib.contextmanager
def _in_place_of(adapted: Any, base: nn.Module, other: nn.Module) -> Iterator[None]:
    while adapted.base_layer is not base:
        adapted = adapted.base_layer
    adapted.base_layer = other
    try:
        yield
    finally:
        adapted.base_layer = base


__all__ = [
    "QLoraConv1d",
    "QLoraConv2d",
    "QLoraConv3d",
    "QLoraEmbedding",
    "QLoraLinear",
    "get_peft_model",
    "load_adapter",
    "register",
]

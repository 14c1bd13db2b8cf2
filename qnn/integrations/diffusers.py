"""diffusers: `from_pretrained(path, quantization_config=qnn.Int8Config())`, and the way back, for a
model or a pipeline's components.

Importing this module registers it with diffusers. A config of qnn's does so too, where diffusers is
imported before it is made; `import qnn` does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from accelerate.utils import set_module_tensor_to_device
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer

from qnn.integrations.arrivals import Arrivals, dequantize, excluded, layers_of
from qnn.integrations.compressed_tensors import (
    DIFFUSERS_METHOD,
    describe,
    schemes_of,
    smoothed_of,
)
from qnn.integrations.transformers import QnnConfig
from qnn.nn import QLinear
from qnn.verbs.convert import convert
from qnn.verbs.plan import run_hooks


class QnnDiffusersQuantizer(DiffusersQuantizer):  # type: ignore[misc]
    """Quantises what `from_pretrained` reads, or reads what was saved quantised."""

    is_serializable = True
    is_trainable = True  # adapters
    is_compileable = True
    use_keep_in_fp32_modules = True
    quantization_config: QnnConfig

    def __init__(self, quantization_config: QnnConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self.arrivals: Arrivals | None = None
        self.missing: list[str] = []

    def validate_environment(self, device_map: Any = None, **_: Any) -> None:
        on_disk = isinstance(device_map, Mapping) and "disk" in device_map.values()
        if on_disk or device_map == "disk":
            raise ValueError(
                "qnn: diffusers writes what it offloads to the disk before it asks a quantizer; "
                f"got device_map={device_map!r}. Use one without 'disk', or "
                "pipeline.enable_model_cpu_offload()."
            )

    @property
    def supports_parallel_loading(self) -> bool:
        return False

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        config = self.quantization_config
        if config.described is None:
            self.arrivals = Arrivals(
                model,
                config.scheme,
                exclude=excluded(model, config.modules_to_not_convert) or None,
                on_unsupported=config.on_unsupported,
                tied={},
            )
            return
        found = {"quantization_config": config.described}
        convert(model, schemes_of(found, model), inplace=True, progress=False)
        for name in smoothed_of(found, model):
            cast(QLinear, model.get_submodule(name))._smooth(True)
        for layer in layers_of(model).values():
            layer._empty_weights("meta", on_disk=True)

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        layers = layers_of(model)
        odd = sorted(key for key in missing_keys if key.rpartition(".")[0] in layers)
        if odd:
            raise ValueError(
                f"qnn: the file of {type(model).__name__} has no {', '.join(odd[:5])}, which its "
                "config describes."
            )
        self.missing = missing_keys
        return missing_keys

    def check_if_quantized_param(
        self, model: Any, param_value: Any, param_name: str, state_dict: Any, **_: Any
    ) -> bool:
        if self.arrivals is not None:
            return self.arrivals.expects(param_name)
        return param_name.rpartition(".")[0] in layers_of(model)

    def create_quantized_param(
        self,
        model: Any,
        param_value: torch.Tensor,
        param_name: str,
        target_device: Any,
        state_dict: dict[str, torch.Tensor],
        *_: Any,
        **__: Any,
    ) -> None:
        if self.arrivals is not None:
            value = param_value.to(target_device)
            if not self.arrivals.take(param_name, value):
                set_module_tensor_to_device(model, param_name, target_device, value=value)
            return
        name, leaf = param_name.rsplit(".", 1)
        module = layers_of(model)[name]
        # The reader has cast it to the model's dtype; scales and codes are as they are in the file.
        own = leaf in {*module._kept()} | module._disk_names()
        value = (state_dict[param_name] if own else param_value).to(target_device)
        module._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        arrivals, self.arrivals = self.arrivals, None
        if arrivals is not None:
            arrivals.raise_refused(type(model).__name__)
            arrivals.finish(self.missing)
        else:
            for name, layer in layers_of(model).items():
                state = layer.state_dict()  # set one by one; a layer's own reading checks them
                layer._empty_weights("meta")
                try:
                    layer.load_state_dict(state, assign=True)
                except RuntimeError as error:
                    raise ValueError(f"qnn: {type(model).__name__}: {name}: {error}") from None
        run_hooks("qnn.convert", model)
        return model

    def _dequantize(self, model: Any) -> Any:
        dequantize(model)
        describe(model)
        return model


class _Described(QnnConfig):
    """The `quantization_config` of a file that qnn wrote."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], *_: Any, **__: Any) -> QnnConfig:
        return QnnConfig(described=config_dict)


auto.AUTO_QUANTIZATION_CONFIG_MAPPING["qnn"] = QnnConfig
auto.AUTO_QUANTIZATION_CONFIG_MAPPING[DIFFUSERS_METHOD] = _Described
auto.AUTO_QUANTIZER_MAPPING["qnn"] = QnnDiffusersQuantizer

"""transformers: `from_pretrained(path, quantization_config=qnn.Int8Config())`, and the way back.

Importing this module registers it with transformers, and `attn_implementation="qnn_int8"` too;
`import qnn` does not.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Mapping
from enum import Enum
from importlib import import_module
from typing import Any, cast

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from qnn.integrations import attention
from qnn.integrations.arrivals import Arrivals, dequantize, excluded, layers_of
from qnn.integrations.checkpoints.pretrained import layers_in
from qnn.integrations.compressed_tensors import describe, schemes_of, smoothed_of
from qnn.integrations.kv_cache import Int8Cache as Int8Cache  # for those who use it
from qnn.kernels import SCHEMES, get_scheme
from qnn.nn import QLinear
from qnn.nn.base import Quantized
from qnn.nn.values import needs_calibration
from qnn.verbs import patterns
from qnn.verbs.convert import SchemeMap, convert
from qnn.verbs.plan import after_swap, run_hooks

logger = logging.get_logger("transformers.qnn")


class Method(str, Enum):
    """The name of qnn's method, as transformers and diffusers have those of theirs."""

    QNN = "qnn"


@auto.register_quantization_config("qnn")
class QnnConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What `from_pretrained(…, quantization_config=…)` does to a float checkpoint: each tensor is
    quantised as it is read, and the result is that of `qnn.convert(model, scheme)`, bit for bit.

    `qnn.Int8Config()` is `QnnConfig("int8")`, `qnn.Fp8WeightConfig()` is `QnnConfig("fp8_weight")`,
    and so on for each scheme that needs no calibration.

    Args:
        scheme: a scheme's name or `{pattern: scheme}`, as `qnn.convert` takes it.
        modules_to_not_convert: names of modules that stay float, with wildcards, whole or their
            last parts: `"lm_head"`, `"layers.0"`; none if None.
        on_unsupported: `"error"`, or `"skip"` to leave float what a scheme cannot take.

    Raises:
        ValueError: an unknown scheme, or one that needs calibration.
        TypeError: an argument of the wrong kind.

        model = AutoModel.from_pretrained(path, quantization_config=qnn.Int8Config())
    """

    def __init__(
        self,
        scheme: str | SchemeMap = "int8",
        modules_to_not_convert: list[str] | None = None,
        on_unsupported: str = "error",
        *,
        quant_method: str = "qnn",
        described: Mapping[str, Any] | None = None,
    ) -> None:
        self.quant_method, self.described = Method.QNN, described
        self.scheme, self.on_unsupported = scheme, on_unsupported
        self.modules_to_not_convert = modules_to_not_convert
        if on_unsupported not in ("error", "skip"):
            raise ValueError(
                f"qnn.QnnConfig: on_unsupported must be 'error' or 'skip', got {on_unsupported!r}."
            )
        names = modules_to_not_convert
        if isinstance(names, str) or not all(isinstance(name, str) for name in names or ()):
            raise TypeError(
                "qnn.QnnConfig: modules_to_not_convert takes a list of names of modules, got "
                f"{names!r}."
            )
        for name in scheme.values() if isinstance(scheme, Mapping) else [scheme]:
            try:
                static = name is not None and get_scheme(name).static
            except (TypeError, ValueError) as error:
                raise type(error)(f"qnn.QnnConfig: {error}") from None
            if static:
                raise ValueError(
                    f"qnn.QnnConfig({name!r}): {needs_calibration(cast(str, name))}; then "
                    "save_pretrained and from_pretrained."
                )
        if "diffusers" in sys.modules:
            import_module("qnn.integrations.diffusers")  # which knows this class then

    def to_dict(self) -> dict[str, Any]:
        """What a config says while the model is loaded; a saved one has the description."""
        if self.described is not None:
            return dict(self.described)
        scheme = self.scheme
        if isinstance(scheme, Mapping):
            scheme = {patterns.describe(pattern): name for pattern, name in scheme.items()}
        return {**vars(self), "scheme": scheme}


@auto.register_quantizer("qnn")
class QnnQuantizer(HfQuantizer):  # type: ignore[misc]
    """Quantises what `from_pretrained` reads, or reads what was saved quantised."""

    is_trainable = True  # adapters
    is_compileable = True

    def __init__(self, quantization_config: QnnConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self.arrivals: Arrivals | None = None
        self.info: Any = None
        self.tied: dict[str, str] = {}
        self.shared: dict[str, str] = {}
        if self.pre_quantized and quantization_config.described is None:
            raise ValueError(
                "qnn: the config says quant_method 'qnn', which no file of qnn's does, and nothing "
                "of the layers. For a float checkpoint pass quantization_config=qnn.Int8Config() "
                "to from_pretrained, and remove it from the config."
            )

    def is_serializable(self) -> bool:
        return True

    # -- before -----------------------------------------------------------------------------------

    def validate_environment(self, device_map: Any = None, **_: Any) -> None:
        on_disk = isinstance(device_map, dict) and "disk" in device_map.values()
        if on_disk and not self.pre_quantized:
            raise ValueError(
                "qnn: from_pretrained(…, quantization_config=…) cannot offload to the disk what it "
                f"quantises: the files there are float; got device_map={device_map!r}. Load "
                'without "disk", save_pretrained, and load that folder with this device_map.'
            )

    def update_attn_implementation(self, config: Any) -> Any:
        # Asked before the dtype is settled. Where the first float parameter is a scale or a code,
        # transformers has saved its dtype for the model's.
        described = self.quantization_config.described
        if self.pre_quantized and (dtype := described.get("qnn_dtype")):
            config.dtype = getattr(torch, dtype)
        return config

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        self.tied = dict(model.all_tied_weights_keys)
        self.dtype = torch.get_default_dtype()  # that of the call, while the model is built
        if self.pre_quantized:
            self._expect_layers(model)
        else:
            config = self.quantization_config
            self.arrivals = Arrivals(
                model,
                config.scheme,
                exclude=excluded(model, config.modules_to_not_convert) or None,
                on_unsupported=config.on_unsupported,
                tied=self.tied,
            )
        # What the checkpoint lacked is told to this method of the model, and to no quantizer.
        told = model.mark_tied_weights_as_initialized

        def mark_tied_weights_as_initialized(info: Any) -> None:
            del model.mark_tied_weights_as_initialized
            self._all_read(model, info)
            told(info)

        model.mark_tied_weights_as_initialized = mark_tied_weights_as_initialized

    def _expect_layers(self, model: Any) -> None:
        described = self.quantization_config.described
        if foreign := described.get("layers"):
            # What something else than qnn wrote is not a file that is to be read by others.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                convert(model, layers_in(model, foreign), inplace=True, progress=False)
        else:
            found = {"quantization_config": described}
            convert(model, schemes_of(found, model), inplace=True, progress=False)
            for name in smoothed_of(found, model):
                cast(QLinear, model.get_submodule(name))._smooth(True)
        layers = layers_of(model)
        for layer in layers.values():
            layer._empty_weights("meta", on_disk=True)
            for parameter in layer._parameters.values():
                # What is offloaded to the disk stays as it is here, and is not to be drawn.
                if parameter is not None:
                    cast(Any, parameter)._is_hf_initialized = True
        model.all_tied_weights_keys = _tied_parts(self.tied, layers)

    # -- while tensors are read -------------------------------------------------------------------

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        if self.arrivals is None:
            return param_name.rpartition(".")[0] in layers_of(model)  # it reads its own state
        # A parameter of another dtype than the model's keeps it, as in the float model. Its reader
        # goes by that, and its layer is converted at the end.
        expected = self.arrivals.expects(param_name)
        return expected and self.arrivals.parameter(param_name).dtype == self.dtype

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        if self.arrivals is None or not self.arrivals.expects(param_name):
            return param.element_size()
        return self.arrivals.bytes_of(param_name)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantise(self)

    # -- after ------------------------------------------------------------------------------------

    def _all_read(self, model: Any, info: Any) -> None:
        """All that the checkpoint has is read, and nothing is drawn yet."""
        self.info = info
        if self.arrivals is None:
            for layer in layers_of(model).values():
                stored = {*layer._kept()} | layer._disk_names()
                for name in stored & layer._parameters.keys():
                    # The reader makes whatever is float trainable, scales too.
                    cast(nn.Parameter, layer._parameters[name]).requires_grad_(False)
            return
        self._missing = set(info.missing_keys)
        self.arrivals.raise_refused(_who(model))
        # Those share their codes already.
        self.shared = {t: s for t, s in self.tied.items() if self.arrivals.is_shared(t)}
        model.all_tied_weights_keys = {t: s for t, s in self.tied.items() if t not in self.shared}

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        arrivals, self.arrivals = self.arrivals, None
        if arrivals is None:
            _check(model, self.info)
            layers, left = layers_of(model), model.all_tied_weights_keys.keys()
            model.all_tied_weights_keys = {
                t: s for t, s in self.tied.items() if _tied_parts({t: s}, layers).keys() <= left
            }
            if not _offloaded(model):
                model.tie_weights(recompute_mapping=False)  # each layer has read its own state
            model.config.quantization_config = dict(self.quantization_config.described)
            describe(model)
        else:
            arrivals.finish(self._missing)
            for target, source in self.shared.items():
                if target not in arrivals.untied:
                    model.all_tied_weights_keys[target] = source
                    continue
                logger.warning(
                    f"qnn: the config ties {target} to {source}, and the checkpoint has another "
                    "tensor for each: they are not tied."
                )
            if arrivals.left:
                listed = ", ".join(f"{name} ({why})" for name, why in arrivals.left.items())
                logger.warning(f"qnn: {_who(model)}: stays float: {listed}.")
            del model.config.quantization_config
            run_hooks("qnn.convert", model)
        self.info = None
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        if _offloaded(model):
            raise ValueError(
                f"qnn: {_who(model)}.dequantize(): layers are offloaded to the disk; load the "
                "model without offload."
            )
        dequantize(model)
        model.tie_weights(recompute_mapping=False)
        wanted, own = (
            getattr(torch, d) if isinstance(d, str) else d for d in (dtype, model.config.dtype)
        )
        return model.to(wanted) if wanted not in (None, own) else model


class _Quantise(ConversionOps):  # type: ignore[misc]
    """Hands what is read to the layer that it is for."""

    def __init__(self, quantizer: QnnQuantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], **options: Any) -> dict[str, Any]:
        arrivals = cast(Arrivals, self.quantizer.arrivals)
        left, missing = {}, options["missing_keys"]
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            if names := arrivals.take(name, tensor):
                missing -= names
            else:
                left[name] = value
        return left


def _who(model: Any) -> str:
    return f"{type(model).__name__}.from_pretrained({model.config.name_or_path!r})"


def _tied_parts(tied: dict[str, str], layers: dict[str, Quantized]) -> dict[str, str]:
    """Which tensor of a file stands for which other one, `{target: source}`, from that of weights:
    of two quantised layers all that the weight is stored in.
    """
    result = {}
    for target, source in tied.items():
        layer, weight = layers.get(source.rpartition(".")[0]), target.rpartition(".")[0]
        if layer is None or weight not in layers:
            result[target] = source
        else:
            ends = [part.suffix for part in layer._scheme.weight.on_disk]
            result |= {target + end: source + end for end in ends}
    return result


def _offloaded(model: nn.Module) -> list[str]:
    """The quantised layers whose tensors stay on the disk."""
    return [
        name
        for name, layer in layers_of(model).items()
        if any(p is not None and p.is_meta for p in layer._parameters.values())
    ]


def _check(model: Any, info: Any) -> None:
    """Refuse what transformers' reader leaves to a log line, and have each layer read its state."""
    who, layers = _who(model), layers_of(model)
    missing = [key for key in info.missing_keys if key.rpartition(".")[0] in layers]
    if missing:
        raise ValueError(f"{who}: the file has no {', '.join(sorted(missing)[:5])}.")
    modules = dict(model.named_modules())
    scales = [key.rpartition(".") for key in info.unexpected_keys if key.endswith("_scale")]
    odd = sorted({n for n, _, leaf in scales if n in modules and leaf.startswith("weight")})
    if odd:
        raise ValueError(
            f"{who}: the file has quantised {', '.join(odd[:5])}, which the config does not "
            "describe."
        )
    offloaded = set(_offloaded(model))
    for name, layer in layers.items():
        if name in offloaded:
            _expect_parts(f"{who}: {name}", layer)
        else:
            # The reader sets parameters one by one; a layer's own reading checks them together.
            state = layer.state_dict()
            layer._empty_weights("meta")
            try:
                layer.load_state_dict(state, assign=True)
            except RuntimeError as error:
                raise ValueError(f"{who}: {name}: {error}") from None


def _expect_parts(who: str, layer: Quantized) -> None:
    """Have room for what a file holds for a layer that is read at each call, past the layer."""
    form = layer._scheme.weight
    on_disk = {part.suffix: part for part in form.on_disk}
    if any(on_disk.get(part.suffix) != part for part in form.parts) or layer._calibration():
        raise ValueError(
            f"{who}: a layer of scheme {layer.scheme!r} cannot be offloaded to the disk, where its "
            "tensors are packed otherwise, or wait for a check; keep it on a device in device_map."
        )
    layer._empty_weights("meta")


@after_swap
def _attach(who: str, model: nn.Module) -> None:
    """A model that `convert` has changed knows its quantizer, for `model.dequantize()`."""
    if who != "qnn.convert":
        return
    seen = set[int]()
    for module in model.modules():
        if not isinstance(module, PreTrainedModel) or id(module) in seen:
            continue
        seen |= {id(each) for each in module.modules()}
        described = getattr(module.config, "quantization_config", None)
        known = getattr(module, "hf_quantizer", None)
        if isinstance(described, dict) and "qnn" in described and known is None:
            module.hf_quantizer = QnnQuantizer(QnnConfig(described=described))


_KNOWN: Any = auto.AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"]


class _Described(_KNOWN):  # type: ignore[misc]
    """The `quantization_config` of a file of the compressed-tensors convention: one that qnn wrote
    is read into qnn's layers.
    """

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], *args: Any, **options: Any) -> Any:
        if config_dict.get("qnn"):
            return QnnConfig(described=config_dict)
        return _KNOWN.from_dict(config_dict, *args, **options)


auto.AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"] = _Described
attention.register()


def named(scheme: str) -> str:
    """`Int8WeightConfig`, of `int8_weight`."""
    return "".join(part.capitalize() for part in scheme.split("_")) + "Config"


def __getattr__(name: str) -> Any:
    """`Int8Config`, `Fp8WeightConfig`, …: `QnnConfig` of a scheme."""
    for scheme in SCHEMES:
        if named(scheme) == name and not get_scheme(scheme).static:
            return functools.partial(QnnConfig, scheme)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

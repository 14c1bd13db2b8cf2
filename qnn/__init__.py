"""qnn: compile-friendly quantised `torch.nn` layers.

import qnn
model = qnn.convert(model, "int8")
"""

from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

# In a checkout's root Python finds this folder before the installed package, and without its two
# lower floors, which stand beside it there.
_HERE = _Path(__file__).resolve().parent
if not (_HERE / "kernels").is_dir() and (_HERE.parent / "kernels" / "torch_private.py").is_file():
    __path__.append(str(_HERE.parent))

from qnn import (
    functional,
    kernels,
    moved,  # noqa: F401  # finds modules under their former names
    passes,
)
from qnn.calibration import parts
from qnn.calibration.doubts import CalibrationWarning
from qnn.calibration.fake_quantize import FakeQuantize, freeze_observers, unfreeze_observers
from qnn.calibration.frozen_norms import freeze_bn, unfreeze_bn
from qnn.calibration.spec import QuantSpec
from qnn.integrations import (
    compressed_tensors,
    load_checkpoint,
    load_pretrained,
    save_checkpoint,
    share_scales,
)
from qnn.kernels import SCHEMES, Format, Scheme
from qnn.kinds import Kind, Observation, register_kind
from qnn.nn import (
    QGRU,
    QLSTM,
    ExpertsAdapter,
    GroupedLinear,
    Int8KVCache,
    Linear,
    ObservedConv1d,
    ObservedConv2d,
    ObservedConv3d,
    ObservedConvTranspose1d,
    ObservedConvTranspose2d,
    ObservedConvTranspose3d,
    ObservedExperts,
    ObservedGroupedLinear,
    ObservedLinear,
    ObservedMultiheadAttention,
    QConv1d,
    QConv2d,
    QConv3d,
    QConvTranspose1d,
    QConvTranspose2d,
    QConvTranspose3d,
    QEmbedding,
    QEmbeddingBag,
    QExperts,
    QGroupedLinear,
    QGRUCell,
    QLinear,
    QLSTMCell,
    QMultiheadAttention,
    QuantizableGRU,
    QuantizableGRUCell,
    QuantizableLSTM,
    QuantizableLSTMCell,
    Quantized,
    register_adapter,
)
from qnn.verbs import (
    Bench,
    Comparison,
    Sensitivity,
    Summary,
    bench,
    calibrate,
    compare,
    convert,
    correct_bias,
    fuse,
    prepare,
    sensitivity,
    smooth,
    sqnr,
    summary,
)

__version__ = "0.1.0"
__all__ = [
    "QGRU",
    "QLSTM",
    "SCHEMES",
    "Bench",
    "CalibrationWarning",
    "Comparison",
    "ExpertsAdapter",
    "FakeQuantize",
    "Format",
    "GroupedLinear",
    "Int8KVCache",
    "Kind",
    "Linear",
    "Observation",
    "ObservedConv1d",
    "ObservedConv2d",
    "ObservedConv3d",
    "ObservedConvTranspose1d",
    "ObservedConvTranspose2d",
    "ObservedConvTranspose3d",
    "ObservedExperts",
    "ObservedGroupedLinear",
    "ObservedLinear",
    "ObservedMultiheadAttention",
    "QConv1d",
    "QConv2d",
    "QConv3d",
    "QConvTranspose1d",
    "QConvTranspose2d",
    "QConvTranspose3d",
    "QEmbedding",
    "QEmbeddingBag",
    "QExperts",
    "QGRUCell",
    "QGroupedLinear",
    "QLSTMCell",
    "QLinear",
    "QMultiheadAttention",
    "QuantSpec",
    "QuantizableGRU",
    "QuantizableGRUCell",
    "QuantizableLSTM",
    "QuantizableLSTMCell",
    "Quantized",
    "Scheme",
    "Sensitivity",
    "Summary",
    "bench",
    "calibrate",
    "compare",
    "compressed_tensors",
    "convert",
    "correct_bias",
    "freeze_bn",
    "freeze_observers",
    "functional",
    "fuse",
    "kernels",
    "load_checkpoint",
    "load_pretrained",
    "parts",
    "passes",
    "prepare",
    "pt2e",
    "register_adapter",
    "register_kind",
    "save_checkpoint",
    "sensitivity",
    "share_scales",
    "smooth",
    "sqnr",
    "summary",
    "unfreeze_bn",
    "unfreeze_observers",
]

if _TYPE_CHECKING:
    from qnn import pt2e


def __getattr__(name: str) -> _Any:
    """`qnn.pt2e`, and what `from_pretrained` of transformers takes (`qnn.QnnConfig`,
    `qnn.Int8Config`, …), imported when they are first named: who converts modules needs neither.
    """
    from importlib import import_module

    if name == "pt2e":
        return import_module("qnn.pt2e")
    schemes = {scheme.replace("_", "") for scheme in ("qnn", *SCHEMES)}
    if name.endswith("Config") and name.removesuffix("Config").lower() in schemes:
        try:
            return getattr(import_module("qnn.integrations.transformers"), name)
        except ModuleNotFoundError as error:
            raise ImportError(
                f"qnn.{name} needs transformers, which is not installed: pip install "
                f"'transformers>=5.0' ({error})."
            ) from None
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Quantising exported graphs: prepare, calibrate or train, convert.

program = torch.export.export(model, args)
prepared = prepare_pt2e(program, Int8Quantizer("int8_static"))
qnn.calibrate(prepared, batches)
quantised = convert_pt2e(prepared)
"""

from qnn.pt2e.convert import convert_pt2e
from qnn.pt2e.modes import (
    allow_exported_model_train_eval,
    disable_observer,
    enable_observer,
    model_is_exported,
    move_exported_model_to_eval,
    move_exported_model_to_train,
)
from qnn.pt2e.prepare import prepare_pt2e, prepare_qat_pt2e
from qnn.pt2e.quantizer import ComposableQuantizer, Int8Quantizer, Quantizer, SchemeAnnotation

__all__ = [
    "ComposableQuantizer",
    "Int8Quantizer",
    "Quantizer",
    "SchemeAnnotation",
    "allow_exported_model_train_eval",
    "convert_pt2e",
    "disable_observer",
    "enable_observer",
    "model_is_exported",
    "move_exported_model_to_eval",
    "move_exported_model_to_train",
    "prepare_pt2e",
    "prepare_qat_pt2e",
]

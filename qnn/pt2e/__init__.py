"""Quantising exported graphs: prepare, calibrate or train, convert.

program = torch.export.export(model, args)
prepared = prepare_pt2e(program, Int8Quantizer("int8_static"))
qnn.calibrate(prepared, batches)
quantised = convert_pt2e(prepared)
"""

from qnn.pt2e.convert import convert_pt2e
from qnn.pt2e.prepare import prepare_pt2e, prepare_qat_pt2e
from qnn.pt2e.quantizer import ComposableQuantizer, Int8Quantizer, Quantizer, SchemeAnnotation

__all__ = [
    "ComposableQuantizer",
    "Int8Quantizer",
    "Quantizer",
    "SchemeAnnotation",
    "convert_pt2e",
    "prepare_pt2e",
    "prepare_qat_pt2e",
]

"""Quantising exported graphs: prepare, calibrate or train, convert.

program = torch.export.export(model, args)
prepared = prepare_pt2e(program, Int8Quantizer("int8_static"))
qnn.calibrate(prepared, batches)
quantised = convert_pt2e(prepared)
"""

from qnn.pt2e.convert import convert_pt2e
from qnn.pt2e.modes import (
    allow_exported_model_train_eval,
    disable_fake_quant,
    disable_observer,
    enable_fake_quant,
    enable_observer,
    model_is_exported,
    move_exported_model_to_eval,
    move_exported_model_to_train,
)
from qnn.pt2e.prepare import prepare_pt2e, prepare_qat_pt2e
from qnn.pt2e.quantizer import ComposableQuantizer, Int8Quantizer, Quantizer, SchemeAnnotation
from qnn.pt2e.specs import (
    Q_ANNOTATION_KEY,
    DerivedQuantizationSpec,
    EdgeOrNode,
    FixedQParamsQuantizationSpec,
    OperatorConfig,
    OperatorPatternType,
    QuantizationAnnotation,
    QuantizationConfig,
    QuantizationSpec,
    QuantizationSpecBase,
    SharedQuantizationSpec,
    annotate_input_qspec_map,
    annotate_output_qspec,
    get_bias_qspec,
    get_input_act_qspec,
    get_module_name_filter,
    get_output_act_qspec,
    get_weight_qspec,
    is_valid_annotation,
)

__all__ = [
    "Q_ANNOTATION_KEY",
    "ComposableQuantizer",
    "DerivedQuantizationSpec",
    "EdgeOrNode",
    "FixedQParamsQuantizationSpec",
    "Int8Quantizer",
    "OperatorConfig",
    "OperatorPatternType",
    "QuantizationAnnotation",
    "QuantizationConfig",
    "QuantizationSpec",
    "QuantizationSpecBase",
    "Quantizer",
    "SchemeAnnotation",
    "SharedQuantizationSpec",
    "allow_exported_model_train_eval",
    "annotate_input_qspec_map",
    "annotate_output_qspec",
    "convert_pt2e",
    "disable_fake_quant",
    "disable_observer",
    "enable_fake_quant",
    "enable_observer",
    "get_bias_qspec",
    "get_input_act_qspec",
    "get_module_name_filter",
    "get_output_act_qspec",
    "get_weight_qspec",
    "is_valid_annotation",
    "model_is_exported",
    "move_exported_model_to_eval",
    "move_exported_model_to_train",
    "prepare_pt2e",
    "prepare_qat_pt2e",
]

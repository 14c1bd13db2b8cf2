from __future__ import annotations

import dataclasses

import pytest
import torch
from parameterized import parameterized

from qnn.kernels import OPS, SCHEMES, get_scheme
from qnn.kernels.formats.int8 import INT8_MAX_K


class TestSchemes:
    def test_is_frozen(self) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            get_scheme("int8").name = "other"  # type: ignore[misc]

    def test_each_scheme_names_a_declared_op_with_a_gradient(self) -> None:
        for scheme in SCHEMES.values():
            op = OPS[scheme.linear]
            assert op.backward
            assert all(name in OPS for name in op.backward.values())
            assert f"{scheme.weight.key}_quantize" in OPS
            assert f"{scheme.weight.key}_dequantize" in OPS

    def test_unknown_name_lists_the_known_and_the_nearest(self) -> None:
        with pytest.raises(ValueError, match=r"'int8', 'int8_static'.*Did you mean 'int8'"):
            get_scheme("int9")

    @parameterized.expand([(7,), (None,), (torch.int8,)])
    def test_wrong_type(self, name: object) -> None:
        with pytest.raises(TypeError, match="scheme must be a string, one of 'int8'"):
            get_scheme(name)  # type: ignore[arg-type]

    def test_longest_row_whose_sum_fits_int32(self) -> None:
        assert 127 * 128 * INT8_MAX_K < 2**31
        assert 127 * 128 * (INT8_MAX_K + 1) >= 2**31
        assert get_scheme("int8").why_not_linear(INT8_MAX_K, 1) is None
        assert "int8_weight" in str(get_scheme("int8").why_not_linear(INT8_MAX_K + 1, 1))
        assert get_scheme("int8_weight").why_not_linear(INT8_MAX_K + 1, 1) is None

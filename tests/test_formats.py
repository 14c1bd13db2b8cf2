from __future__ import annotations

import dataclasses
import unittest

import torch
from parameterized import parameterized

from qnn.kernels import OPS, SCHEMES, get_scheme
from qnn.kernels.formats.int8 import INT8_MAX_K


class TestSchemes(unittest.TestCase):
    def test_is_frozen(self) -> None:
        with self.assertRaises(dataclasses.FrozenInstanceError):
            get_scheme("int8").name = "other"  # type: ignore[misc]

    def test_each_scheme_names_a_declared_op_with_a_gradient(self) -> None:
        for scheme in SCHEMES.values():
            op = OPS[scheme.linear]
            self.assertTrue(op.backward)
            self.assertTrue(all(name in OPS for name in op.backward.values()))
            self.assertIn(f"{scheme.weight.key}_quantize", OPS)
            self.assertIn(f"{scheme.weight.key}_dequantize", OPS)

    def test_unknown_name_lists_the_known_and_the_nearest(self) -> None:
        with self.assertRaisesRegex(ValueError, r"'int8', 'int8_static'.*Did you mean 'int8'"):
            get_scheme("int9")

    @parameterized.expand([(7,), (None,), (torch.int8,)])
    def test_wrong_type(self, name: object) -> None:
        with self.assertRaisesRegex(TypeError, "scheme must be a string, one of 'int8'"):
            get_scheme(name)  # type: ignore[arg-type]

    def test_longest_row_whose_sum_fits_int32(self) -> None:
        self.assertLess(127 * 128 * INT8_MAX_K, 2**31)
        self.assertGreaterEqual(127 * 128 * (INT8_MAX_K + 1), 2**31)
        self.assertIsNone(get_scheme("int8").why_not_linear(INT8_MAX_K, 1))
        self.assertIn("int8_weight", str(get_scheme("int8").why_not_linear(INT8_MAX_K + 1, 1)))
        self.assertIsNone(get_scheme("int8_weight").why_not_linear(INT8_MAX_K + 1, 1))

"""What `repr`, `summary` and `doctor` say of a backend is what runs."""

from __future__ import annotations

import contextlib
import unittest
from unittest import mock

from parameterized import parameterized

import qnn
from qnn.kernels import OPS, get_scheme
from qnn.kernels.cpu import native
from qnn.kernels.cpu.engines import Report
from qnn.verbs import doctor

LOADED = native.Status("built", tiers=(("amx", "no"), ("avx2", "ok")))
ABSENT = native.Status("absent", reason="no compiler")
DYNAMIC = [name for name, scheme in qnn.SCHEMES.items() if not scheme.static]


class TestLinear(unittest.TestCase):
    @parameterized.expand(DYNAMIC)
    def test_casts_are_those_of_activations(self, name: str) -> None:
        layer, scheme = qnn.QLinear(128, 128, scheme=name), get_scheme(name)
        op = OPS[scheme.linear]
        for has in (op.native, False):
            for status in (LOADED, ABSENT):
                with (
                    contextlib.ExitStack() as stack,
                    mock.patch.object(native, "ready", return_value=status),
                ):
                    for each in OPS.values():
                        stack.enter_context(mock.patch.object(each, "native", has and each.native))
                    text = layer._backend()
                if scheme.activation is None:
                    self.assertNotIn("activations", text)
                if has:
                    self.assertNotIn("torch operations", text)
                elif scheme.activation is not None:
                    self.assertIn("activations cast in torch operations", text)
                native_runs = "avx2: passed the known-answer test; not amx: no" in text
                self.assertNotEqual(native_runs, "not native: " in text, text)
                if status is ABSENT:
                    self.assertFalse(native_runs)


class TestDoctor(unittest.TestCase):
    @parameterized.expand([("loaded", LOADED), ("absent", ABSENT)])
    def test_without_vnni(self, _: str, status: native.Status) -> None:
        def tested(name: str) -> Report:
            return Report(name, name == "exact", "wrong integers" if name == "onednn" else "passed")

        with (
            mock.patch.object(native, "status", return_value=status),
            mock.patch.object(doctor, "self_test", tested),
        ):
            text = doctor.render(doctor.report())
        self.assertIn("no VNNI instructions", text)
        self.assertEqual("int8 runs on exact float32 GEMMs" in text, status is ABSENT)
        self.assertEqual("the native kernels run" in text, status is LOADED)
        self.assertRegex(text, r"exact +" + ("ready" if status is LOADED else "used"))


if __name__ == "__main__":
    unittest.main()

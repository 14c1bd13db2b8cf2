"""What `repr`, `summary` and `doctor` say of a backend is what runs."""

from __future__ import annotations

import contextlib
import re
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


class TestLinear:
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
                    assert "activations" not in text
                if has:
                    assert "torch operations" not in text
                elif scheme.activation is not None:
                    assert "activations cast in torch operations" in text
                native_runs = "avx2: passed the known-answer test; not amx: no" in text
                assert native_runs != ("not native: " in text), text
                if status is ABSENT:
                    assert not native_runs


class TestDoctor:
    @parameterized.expand([("loaded", LOADED), ("absent", ABSENT)])
    def test_without_vnni(self, _: str, status: native.Status) -> None:
        def tested(name: str) -> Report:
            return Report(name, name == "exact", "wrong integers" if name == "onednn" else "passed")

        with (
            mock.patch.object(native, "status", return_value=status),
            mock.patch.object(doctor, "self_test", tested),
        ):
            text = doctor.render(doctor.report())
        assert "no VNNI instructions" in text
        assert ("int8 runs on exact float32 GEMMs" in text) == (status is ABSENT)
        assert ("the native kernels run" in text) == (status is LOADED)
        assert re.search(r"exact +" + ("ready" if status is LOADED else "used"), text)

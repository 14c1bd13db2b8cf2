"""`layer.weight` of a quantised layer: a float tensor to read, and no write to it is lost."""

from __future__ import annotations

import copy
import io
import operator
import pickle
import unittest
from collections.abc import Callable
from typing import Any

import pytest
import torch
from parameterized import parameterized
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as pruning

import qnn
from qnn.nn.weight_view import FloatWeight

from .common import same_bits

SCHEMES = (
    "int8", "fp8", "mxfp8", "nvfp4", "int8_weight", "nvfp4_weight", "int4_weight_g32",
    "int4_weight_asym_g32",
)  # fmt: skip
N, K = 16, 32


def layer(scheme: str = "int8", **options: Any) -> qnn.QLinear:
    torch.manual_seed(0)
    return qnn.QLinear(K, N, scheme=scheme, **options)


def floats(module: qnn.QLinear) -> torch.Tensor:
    return module.dequantize().weight.detach()


def quantised(values: torch.Tensor, scheme: str) -> torch.Tensor:
    """The float weight of a layer that was converted from `values`."""
    plain = nn.Linear(K, N, bias=False)
    plain.weight.data = values
    return floats(qnn.QLinear.from_float(plain, scheme))


class TestReads(unittest.TestCase):
    @parameterized.expand([(s, d) for s in SCHEMES for d in (torch.float32, torch.bfloat16)])
    def test_looks_like_a_float_weight(self, scheme: str, dtype: torch.dtype) -> None:
        module = layer(scheme).to(dtype)
        weight, plain = module.weight, nn.Linear(K, N).to(dtype).weight
        for ask in (
            "shape", "dtype", "device", "layout", "ndim", "is_cuda", "is_meta", "is_leaf",
            "grad", "grad_fn", "is_sparse", "is_quantized", "is_nested",
        ):  # fmt: skip
            self.assertEqual(getattr(weight, ask), getattr(plain, ask), ask)
        for ask in (
            "numel",
            "element_size",
            "dim",
            "size",
            "stride",
            "is_contiguous",
            "is_floating_point",
        ):
            self.assertEqual(getattr(weight, ask)(), getattr(plain, ask)(), ask)
        self.assertFalse(weight.requires_grad)
        self.assertIsInstance(weight, nn.Parameter)
        self.assertEqual(weight.T.shape, (K, N))
        self.assertIn("float view of qnn.QLinear(32, 16", repr(weight))

    @parameterized.expand([(s,) for s in SCHEMES])
    def test_values(self, scheme: str) -> None:
        module, x = layer(scheme), torch.randn(3, K)
        want = floats(module)
        for name, use in USES.items():
            got = use(module.weight, x)
            torch.testing.assert_close(got, use(want, x), rtol=1e-6, atol=1e-6, msg=name)
        self.assertEqual(module.weight.tolist(), want.tolist())
        self.assertTrue((module.weight.numpy() == want.numpy()).all())
        for twin in (
            copy.deepcopy(module.weight),
            pickle.loads(pickle.dumps(module.weight)),
            module.weight.clone(),
            saved(module.weight),
        ):
            self.assertNotIsInstance(twin, FloatWeight)
            self.assertTrue(torch.equal(twin, want))

    @parameterized.expand([("int8",), ("nvfp4",)])
    def test_traced(self, scheme: str) -> None:
        """Every tracer sees the decoded weight; compiled, and exported too, no copy is kept."""
        module, x = layer(scheme), torch.randn(3, K)

        class Reader(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = module

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.inner(x).to(self.inner.weight.dtype) + x @ self.inner.weight.t()

        reader = Reader()
        want = reader(x)
        torch.testing.assert_close(want, module(x) + x @ floats(module).T)
        self.assertTrue(
            torch.equal(torch.compile(reader, backend="eager", fullgraph=True)(x), want)
        )
        for strict in (True, False):
            exported = torch.export.export(reader, (x,), strict=strict)
            self.assertTrue(torch.equal(exported.module()(x), want))
            self.assertTrue(
                all(
                    not t.dtype.is_floating_point
                    or t.dim() < 2
                    or t.shape[1] != K
                    or t.dtype.itemsize == 1
                    for t in exported.state_dict.values()
                )
            )
        with torch.no_grad():
            traced = torch.jit.trace(reader, x)
            self.assertTrue(torch.equal(traced(x), want))

    def test_transforms(self) -> None:
        module, x = layer(), torch.randn(3, K)
        plain = floats(module)
        want = x @ plain.T
        self.assertTrue(
            torch.equal(
                torch.vmap(lambda v: module.weight @ v)(x),
                torch.vmap(lambda v: plain @ v)(x),
            )
        )
        gradient = torch.func.grad(lambda v: (v @ module.weight.T).sum())(x)
        torch.testing.assert_close(gradient, floats(module).sum(0).expand(3, K))
        x.requires_grad_()
        (x @ module.weight.T).sum().backward()
        torch.testing.assert_close(x.grad, gradient)
        torch.testing.assert_close(want, x.detach() @ module.weight.T)

    def test_is_no_parameter(self) -> None:
        module = nn.Sequential(layer())
        self.assertEqual(
            {p.dtype for n, p in module.named_parameters() if "weight" in n},
            {torch.int8, torch.float32},
        )
        self.assertEqual(module.state_dict()["0.weight"].dtype, torch.int8)
        self.assertIs(module[0].get_parameter("weight"), module[0].stored[0])
        codes = torch.ones(N, K, dtype=torch.int8)
        x = torch.randn(2, K)
        state = {**dict(module.named_parameters()), "0.weight": codes}
        want = copy.deepcopy(module)
        want[0].stored[0].data = codes
        self.assertTrue(torch.equal(torch.func.functional_call(module, state, (x,)), want(x)))

    def test_no_reference_is_kept(self) -> None:
        module = layer()
        keys = set(vars(module))
        _ = module.weight + 1
        self.assertEqual(set(vars(module)), keys)

    def test_set_in_the_dtype_that_it_shows(self) -> None:
        """As accelerate does, which writes `_parameters`: codes survive as floats."""
        for scheme in ("int8", "fp8", "mxfp8"):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                module, x = layer(scheme).to(dtype), torch.randn(2, K, dtype=dtype)
                want, state = module(x), copy.deepcopy(module.state_dict())
                codes = module.stored[0].to(module.weight.dtype)
                module._parameters["weight"] = nn.Parameter(codes, requires_grad=False)
                if dtype == torch.float16:
                    compiled = torch.compile(module, backend="eager", fullgraph=True)
                    self.assertTrue(torch.equal(compiled(x), want))
                self.assertTrue(torch.equal(module(x), want))
                self.assertIs(module.stored[0].dtype, module._storage)  # and take their room again
                self.assertTrue(torch.equal(module.weight, qnn.QLinear.dequantize(module).weight))
                for name, tensor in module.state_dict().items():
                    self.assertTrue(same_bits(tensor, state[name]), name)


def saved(tensor: torch.Tensor) -> torch.Tensor:
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    loaded: torch.Tensor = torch.load(file, weights_only=True)
    return loaded


USES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "linear": lambda w, x: nn.functional.linear(x, w),
    "matmul": lambda w, x: x @ w.T,
    "transpose": lambda w, x: w.t() + 0,
    "cat": lambda w, x: torch.cat([w, w]),
    "slice": lambda w, x: w[1:3] * 2,
    "einsum": lambda w, x: torch.einsum("nk,bk->bn", w, x),
    "chunk": lambda w, x: w.chunk(2)[1] + 0,
    "norm": lambda w, x: w.norm(dim=1),
    "view": lambda w, x: w.view(-1).sum(),
    "float64": lambda w, x: w.double(),
    "detach": lambda w, x: w.detach().clone(),
    "data": lambda w, x: w.data * 1,
    "qr": lambda w, x: torch.linalg.qr(w.contiguous())[1],
    "embedding": lambda w, x: nn.functional.embedding(torch.tensor([1, 2]), w),
}

NEW = torch.linspace(-1, 1, N * K).view(N, K)


def assign_data(module: Any, value: torch.Tensor) -> None:
    module.weight.data = value


def add_data(module: Any, value: torch.Tensor) -> None:
    module.weight.data += value - floats(module)


def index(module: Any, value: torch.Tensor) -> None:
    module.weight[:] = value


def index_data(module: Any, value: torch.Tensor) -> None:
    module.weight.data[:N] = value


def added(module: Any, value: torch.Tensor) -> None:
    with torch.no_grad():
        module.weight.zero_().add_(value)


def init(module: Any, value: torch.Tensor) -> None:
    nn.init.normal_(module.weight)
    nn.init.zeros_(module.weight)
    module.weight += value


WRITES: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "assign": lambda m, v: setattr(m, "weight", v),
    "assign a parameter": lambda m, v: setattr(m, "weight", nn.Parameter(v)),
    "assign data": assign_data,
    "add to data": add_data,
    "copy_": lambda m, v: m.weight.copy_(v),
    "data.copy_": lambda m, v: m.weight.data.copy_(v),
    "detach().copy_": lambda m, v: m.weight.detach().copy_(v),
    "index": index,
    "index of data": index_data,
    "operators": added,
    "init": init,
    "out": lambda m, v: torch.mul(v, 1, out=m.weight),
    "foreach": lambda m, v: torch._foreach_copy_([m.weight], [v]),
    "float64": lambda m, v: setattr(m, "weight", v.double()),
}  # fmt: skip


class TestWrites(unittest.TestCase):
    @parameterized.expand([(w, s) for w in WRITES for s in ("int8", "fp8", "nvfp4")])
    def test_is_quantised_into_the_layer(self, write: str, scheme: str) -> None:
        module, x = layer(scheme), torch.randn(2, K)
        WRITES[write](module, NEW.clone())
        want = quantised(NEW, scheme)
        torch.testing.assert_close(floats(module), want, rtol=0, atol=2e-6)
        twin = qnn.QLinear.from_float(nn.Linear(K, N), scheme)
        twin.load_state_dict({**module.state_dict()})
        self.assertTrue(torch.equal(module(x), twin(x)))
        for name, tensor in zip(module._stored, module.stored, strict=True):
            self.assertIs(type(tensor), nn.Parameter, name)
            self.assertFalse(tensor.requires_grad)
        self.assertEqual(
            [n for n, _ in module.named_parameters() if n not in module._stored], ["bias"]
        )

    @parameterized.expand(
        [(w, s) for w in ("assign", "assign data", "copy_", "index") for s in ("int8", "nvfp4")]
    )
    def test_nan_is_refused(self, write: str, scheme: str) -> None:
        module = layer(scheme)
        state = copy.deepcopy(module.state_dict())
        bad = NEW.clone()
        bad[3, 4] = float("nan")
        with self.assertRaisesRegex(
            ValueError, r"qnn.QLinear\(32, 16, .*weight holds NaN or inf in row 3"
        ):
            WRITES[write](module, bad)
        self.unchanged(module, state)

    def unchanged(self, module: nn.Module, state: dict[str, torch.Tensor]) -> None:
        self.assertEqual(list(module.state_dict()), list(state))
        for name, tensor in module.state_dict().items():
            self.assertTrue(same_bits(tensor, state[name]), name)

    @parameterized.expand(
        [
            (
                "shape",
                lambda m: setattr(m, "weight", torch.zeros(3, 4)),
                r"must be \[16, 32\], got \[3, 4\]",
            ),
            ("shape of data", lambda m: assign_data(m, torch.zeros(K, N)), r"must be \[16, 32\]"),
            (
                "integers",
                lambda m: setattr(m, "weight", torch.zeros(N, K, dtype=torch.int64)),
                "takes floats",
            ),
            (
                "beyond float32",
                lambda m: setattr(m, "weight", NEW.double() * 1e300),
                "beyond float32",
            ),
            ("row", lambda m: m.weight[0].zero_(), "part or a view"),
            ("transposed", lambda m: m.weight.T.mul_(2), "part or a view"),
            ("flat", lambda m: m.weight.view(-1).fill_(1), "part or a view"),
            ("chunk", lambda m: m.weight.chunk(2)[0].zero_(), "part or a view"),
            (
                "part of data",
                lambda m: operator.setitem(m.weight.data[0], 0, 1.0),
                "part or a view",
            ),
            ("numpy", lambda m: operator.setitem(m.weight.numpy(), 0, 1.0), "read-only"),
            ("out of a part", lambda m: torch.neg(NEW[0], out=m.weight[0]), "part or a view"),
            ("trained", lambda m: m.weight.requires_grad_(), "takes no gradient"),
            ("a parameter of it", lambda m: nn.Parameter(m.weight), "takes no gradient"),
            (
                "gradient",
                lambda m: m.weight.add_(NEW.clone().requires_grad_()),
                "gradient .* would be lost",
            ),
            (
                "product",
                lambda m: setattr(m, "weight", NEW.clone().requires_grad_() * 2),
                "would be lost",
            ),
            ("storage", lambda m: m.weight.untyped_storage(), "no memory"),
            ("orthogonal", lambda m: nn.init.orthogonal_(m.weight), "part or a view"),
            (
                "pruning",
                lambda m: pruning.l1_unstructured(m, "weight", 0.5),
                "cannot be parametrised",
            ),
            (
                "parametrised",
                lambda m: parametrize.register_parametrization(m, "weight", nn.Identity()),
                "cannot be parametrised",
            ),
            ("weight_norm", nn.utils.weight_norm, "cannot be parametrised"),
            ("layer trained", lambda m: m.requires_grad_(), "cannot be trained"),
        ]
    )
    def test_refused(self, _: str, write: Callable[[Any], Any], message: str) -> None:
        module = layer()
        state = copy.deepcopy(module.state_dict())
        with self.assertRaisesRegex((TypeError, ValueError), message):
            write(module)
        self.unchanged(module, state)

    @parameterized.expand([(s,) for s in SCHEMES])
    def test_codes_are_stored_as_they_are(self, scheme: str) -> None:
        other = layer(scheme)
        other.weight = NEW
        for wrap in (
            torch.Tensor.clone,
            lambda t: nn.Parameter(t.detach().clone(), requires_grad=False),
        ):
            module = layer(scheme)
            scale = module.stored[1].clone()
            module.weight = wrap(other.stored[0])
            self.assertTrue(same_bits(module.stored[0], other.stored[0]))
            self.assertTrue(same_bits(module.stored[1], scale))
            module(torch.randn(2, K))

    def test_nan_codes_are_refused(self) -> None:
        for scheme in ("fp8", "mxfp8"):
            module = layer(scheme)
            state = copy.deepcopy(module.state_dict())
            codes = module.stored[0].detach().clone()
            codes.view(torch.uint8)[2, 0] = 0x7F
            for write in (lambda m, c: setattr(m, "weight", c), assign_data):
                with self.assertRaisesRegex(ValueError, "codes hold NaN in row 2"):
                    write(module, codes)
            self.unchanged(module, state)

    @parameterized.expand([("fp8",), ("nvfp4",), ("int8",)])
    def test_codes_are_never_trained_in_silence(self, scheme: str) -> None:
        """float8 codes may be asked for a gradient, which there is none of."""
        module = layer(scheme)
        with self.assertRaises((TypeError, RuntimeError)):
            nn.Sequential(module).requires_grad_()  # torch's own words for integers
            module(torch.randn(2, K))

    def test_ties_follow_writes_in_place(self) -> None:
        model = nn.Sequential(nn.Linear(K, K), nn.Linear(K, K))
        model[1].weight = model[0].weight
        model = qnn.convert(model)
        model[0].weight.data += 1
        self.assertTrue(torch.equal(floats(model[0]), floats(model[1])))
        model[0].weight = torch.zeros(K, K)
        self.assertFalse(torch.equal(floats(model[0]), floats(model[1])))

    def test_a_meta_layer_takes_values(self) -> None:
        for scheme in ("int8", "nvfp4"):
            module = qnn.QLinear(K, N, False, device="meta", scheme=scheme)
            module.weight = NEW
            self.assertTrue(torch.equal(floats(module), quantised(NEW, scheme)))


class TestRecurrent(unittest.TestCase):
    """Each weight of a recurrent layer or cell, by its own name."""

    @parameterized.expand([("lstm", qnn.QLSTM), ("gru", qnn.QGRU), ("cell", qnn.QLSTMCell)])
    def test_reads_and_writes(self, _: str, kind: Any) -> None:
        module = kind(K, N)
        plain = module.dequantize()
        names = [name for name, p in plain.named_parameters() if p.dim() == 2]
        self.assertEqual(len(names), 2)
        for name in names:
            want = getattr(plain, name).detach()
            weight = getattr(module, name)
            self.assertIsInstance(weight, FloatWeight)
            self.assertEqual((weight.dtype, weight.shape), (torch.float32, want.shape))
            self.assertTrue(torch.equal(weight, want))
            self.assertEqual(module.state_dict()[name].dtype, torch.int8)
            getattr(module, name).data += 1
            torch.testing.assert_close(getattr(module, name) + 0, want + 1, rtol=0.02, atol=0.02)
            setattr(module, name, want)
            self.assertTrue(torch.equal(module.dequantize().get_parameter(name), want))
            state = copy.deepcopy(module.state_dict())
            for bad in (torch.full_like(want, torch.nan), want[1:], want.long()):
                with self.assertRaisesRegex((TypeError, ValueError), name):
                    setattr(module, name, bad)
            for key, tensor in module.state_dict().items():
                self.assertTrue(same_bits(tensor, state[key]), key)
        x = torch.randn(3, K)
        called = torch.compile(
            lambda: getattr(module, names[0]).sum(), backend="eager", fullgraph=True
        )
        torch.testing.assert_close(called(), getattr(plain, names[0]).sum())
        module(x)


class TestNeighbours(unittest.TestCase):
    def test_peft_merges(self) -> None:
        peft = pytest.importorskip("peft", reason="needs the extra 'examples'")
        for scheme in ("int8", "nvfp4_weight"):
            for safe in (False, True):
                torch.manual_seed(0)
                model = qnn.convert(
                    nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, K)), scheme
                )
                x = torch.randn(8, K)
                config = peft.LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False)
                adapted = peft.get_peft_model(model, config).eval()
                with torch.no_grad():
                    want = adapted(x)
                    merged = adapted.merge_and_unload(safe_merge=safe)
                    self.assertGreater(qnn.sqnr(want, merged(x)), 30 if scheme == "int8" else 12)
                self.assertIs(type(merged[0]), qnn.QLinear)

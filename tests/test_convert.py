from __future__ import annotations

import copy
import io
import itertools
import unittest
import warnings
from typing import Any
from unittest import mock

import torch
from parameterized import parameterized
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm

import qnn
from qnn import QLinear

from .common import child, forked, need_sharded_integers


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 32)
        self.act = nn.ReLU()
        self.down = nn.Linear(32, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.act(self.up(x)))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(16, 8))


def converted(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, QLinear)]


class TestSelection(unittest.TestCase):
    @parameterized.expand(
        [
            ({}, ["0.up", "0.down", "1.up", "1.down", "2"]),
            ({"include": "0.*"}, ["0.up", "0.down"]),
            ({"include": "0"}, ["0.up", "0.down"]),
            ({"include": Block}, ["0.up", "0.down", "1.up", "1.down"]),
            ({"include": ["*.up", "2"]}, ["0.up", "1.up", "2"]),
            ({"include": nn.Linear, "exclude": "*.down"}, ["0.up", "1.up", "2"]),
            (
                {"exclude": lambda name, m: isinstance(m, nn.Linear) and m.bias is None},
                ["0.up", "1.up", "2"],
            ),
            ({"exclude": lambda _, m: m.out_features < 16}, ["0.up", "0.down", "1.up", "1.down"]),
            ({"exclude": (Block, "nothing*")}, None),
            ({"exclude": Block}, ["2"]),
        ]
    )
    def test_patterns(self, kwargs: dict[str, Any], want: list[str] | None) -> None:
        if want is None:
            with self.assertRaisesRegex(
                ValueError, "exclude pattern 'nothing\\*' matches no module"
            ):
                qnn.convert(net(), **kwargs)
            return
        self.assertEqual(converted(qnn.convert(net(), **kwargs)), want)

    def test_a_map_of_schemes_takes_the_last_match(self) -> None:
        model = qnn.convert(net(), {"*": "int8", Block: "int8_weight", "1": None, "1.up": "int8"})
        schemes = {n: m.scheme for n, m in model.named_modules() if isinstance(m, QLinear)}
        self.assertEqual(
            schemes,
            {"0.up": "int8_weight", "0.down": "int8_weight", "1.up": "int8", "2": "int8"},
        )
        reasons = {row.name: row.reason for row in qnn.summary(model).rows}
        self.assertEqual(reasons["1.down"], "the scheme map says None")
        model = qnn.convert(net(), {"0": "int8"})
        self.assertEqual(converted(model), ["0.up", "0.down"])
        self.assertIn("no pattern", str(qnn.summary(model).rows[-1].reason))

    @parameterized.expand(
        [
            (("int9",), {}, ValueError, "Did you mean 'int8'"),
            ((8,), {}, TypeError, "qnn.convert: scheme must be a string"),
            (("",), {}, ValueError, "unknown scheme ''"),
            (({},), {}, ValueError, "scheme is an empty dict"),
            (({"x.*": "int8"},), {}, ValueError, r"scheme pattern 'x\.\*' matches no module"),
            (({"*": "int9"},), {}, ValueError, "unknown scheme 'int9'"),
            (("INT8",), {}, ValueError, "unknown scheme .INT8.*Did you mean .int8.[?]"),
            (
                ("int8",),
                {"include": "layer.*"},
                ValueError,
                r"Names are those of model.named_modules",
            ),
            (("int8",), {"include": "0.upp"}, ValueError, "Close names: '0.up'"),
            (("int8",), {"exclude": nn.Conv2d}, ValueError, "exclude pattern Conv2d matches no"),
            (("int8",), {"include": 3}, TypeError, "include takes names with wildcards.*got int 3"),
            (("int8",), {"include": ["2", None]}, TypeError, "got NoneType None"),
            (("int8",), {"include": nn.Linear(2, 2)}, TypeError, "include takes names.*got Linear"),
            (("int8",), {"training": True}, ValueError, "no layer for training; use one of"),
            (
                ("int8",),
                {"on_unsupported": "warn"},
                ValueError,
                "must be 'error' or 'skip', got 'warn'",
            ),
            (("int8",), {"exclude": "*"}, ValueError, "every layer is left alone"),
            (("int8",), {"include": "0.act"}, ValueError, "2: matches no include pattern"),
        ]
    )
    def test_bad_arguments(self, args: Any, kwargs: Any, kind: Any, message: str) -> None:
        for inplace in (False, True):
            model = net()
            before = str(model)
            with self.assertRaisesRegex(kind, message):
                qnn.convert(model, *args, inplace=inplace, **kwargs)
            self.assertEqual(str(model), before)

    def test_nothing_to_convert(self) -> None:
        with self.assertRaisesRegex(
            ValueError,
            r"has no nn.Linear, nn.LSTM or nn.GRU, only "
            r"torch.nn.modules.conv.Conv2d \(2, 3.0 kB\), torch.nn.modules.conv.Conv1d \(1, 8 B\), "
            r"torch.nn.modules.activation.ReLU \(2\)",
        ):
            qnn.convert(
                nn.Sequential(
                    nn.Conv1d(1, 1, 1), *(nn.Conv2d(1, 38, 3) for _ in "ab"), nn.ReLU(), nn.ReLU()
                )
            )
        with self.assertRaisesRegex(TypeError, "takes an nn.Module, got int"):
            qnn.convert(3)  # type: ignore[type-var]
        with self.assertRaisesRegex(ValueError, "converted already .5 QLinear, scheme 'int8'"):
            qnn.convert(qnn.convert(net()))
        with self.assertRaisesRegex(ValueError, "converted already"):
            qnn.convert(QLinear(4, 4))

    def test_in_steps(self) -> None:
        model = qnn.convert(qnn.convert(net(), include="0"), "int8_weight", include="1")
        self.assertEqual(converted(model), ["0.up", "0.down", "1.up", "1.down"])


class TestResult(unittest.TestCase):
    def test_a_copy_leaves_the_original_untouched(self) -> None:
        model = net()
        state = copy.deepcopy(model.state_dict())
        twin = qnn.convert(model)
        self.assertEqual(converted(model), [])
        twin[0].up.bias.data.zero_()
        for name, tensor in model.state_dict().items():
            self.assertTrue(torch.equal(tensor, state[name]))
        self.assertFalse({id(p) for p in model.parameters()} & {id(p) for p in twin.parameters()})

    def test_in_place(self) -> None:
        model, x = net(), torch.randn(3, 16)
        want = qnn.convert(model)(x)
        norm = model[0].act
        self.assertIs(qnn.convert(model, inplace=True), model)
        self.assertTrue(torch.equal(model(x), want))
        self.assertIs(model[0].act, norm)
        self.assertIsInstance(qnn.convert(nn.Linear(3, 4), inplace=True), QLinear)
        self.assertIsInstance(qnn.convert(nn.Linear(3, 4)), QLinear)

    def test_shared_modules_stay_shared(self) -> None:
        for inplace in (False, True):
            shared = Block()
            model = nn.Sequential(shared, shared, nn.Sequential(shared.up))
            out = qnn.convert(model, inplace=inplace)
            self.assertIs(out[0], out[1])
            self.assertIs(out[0].up, out[2][0])
            self.assertIsInstance(out[0].up, QLinear)

    def test_tied_weights_stay_tied(self) -> None:
        for inplace in (False, True):
            model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
            model[1].weight = model[0].weight
            out = qnn.convert(model, inplace=inplace)
            self.assertIs(out[0].stored[0], out[1].stored[0])
            self.assertIs(out[0].weight_scale, out[1].weight_scale)
            self.assertIsNot(out[0].stored[0], out[2].stored[0])
            self.assertIsNot(out[0].bias, out[1].bias)
            half = copy.deepcopy(out).half()
            self.assertIs(half[0].weight_scale, half[1].weight_scale)
            self.assertEqual(half[0].weight_scale.dtype, torch.float32)

    def test_a_weight_tied_to_a_float_user_is_left_alone(self) -> None:
        model = nn.ModuleDict({"emb": nn.Embedding(10, 8), "proj": nn.Linear(8, 8)})
        model["head"] = nn.Linear(8, 10, bias=False)
        model["head"].weight = model["emb"].weight
        out = qnn.convert(model)
        self.assertEqual(converted(out), ["proj"])
        self.assertIs(out["head"].weight, out["emb"].weight)
        reasons = {row.name: row.reason for row in qnn.summary(out).rows}
        self.assertIn("tied to 'emb' (Embedding), which stays in float", str(reasons["head"]))
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        model[1].weight = model[0].weight
        with self.assertRaisesRegex(ValueError, "share one weight but would get"):
            qnn.convert(model, {"0": "int8", "1": "int8_weight"})

    def test_hooks_mode_attributes_and_requires_grad(self) -> None:
        for inplace in (False, True):
            model = net().eval()
            model[1].train()
            model[0].down.weight.requires_grad_(False)
            model[2].bias.requires_grad_(False)
            model[2].tag = ["kept"]
            calls: list[str] = []
            handle = model[2].register_forward_hook(lambda *a, c=calls: c.append("forward"))
            model[2].register_forward_pre_hook(lambda *a, c=calls: c.append("pre"))
            model[2].register_full_backward_hook(lambda *a, c=calls: c.append("backward"))
            model[2].register_state_dict_post_hook(lambda *a, c=calls: c.append("state"))
            out = qnn.convert(model, inplace=inplace)
            out(torch.randn(2, 16, requires_grad=True)).sum().backward()
            out.state_dict()
            self.assertEqual(calls, ["pre", "forward", "backward", "state"])
            self.assertEqual(out[2].tag, ["kept"])
            self.assertEqual(
                [m.training for m in (out[0].up, out[1].up, out[2])], [False, True, False]
            )
            self.assertFalse(out[2].bias.requires_grad)
            self.assertTrue(out[0].up.bias.requires_grad)
            calls.clear()
            if inplace:
                handle.remove()
                out(torch.randn(2, 16))
                self.assertNotIn("forward", calls)

    def test_untouched_parameters_keep_requires_grad(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Conv1d(1, 1, 1))
        model[1].weight.requires_grad_(False)
        out = qnn.convert(model)
        self.assertFalse(out[1].weight.requires_grad)
        self.assertTrue(out[1].bias.requires_grad and out[2].weight.requires_grad)

    def test_meta_device(self) -> None:
        with torch.device("meta"):
            model = net()
        out = qnn.convert(model)
        self.assertTrue(all(p.is_meta for p in out.parameters()))
        real = net()
        out.load_state_dict(real.state_dict(), assign=True)  # a float checkpoint
        x = torch.randn(3, 16)
        self.assertTrue(torch.equal(out(x), qnn.convert(real)(x)))

    def test_a_float_state_loads_into_a_converted_model(self) -> None:
        other = net()
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(1.5)
        out = qnn.convert(net())
        out.load_state_dict(other.state_dict())
        x = torch.randn(3, 16)
        self.assertTrue(torch.equal(out(x), qnn.convert(other)(x)))

    def test_state_round_trip(self) -> None:
        out, x = qnn.convert(net()), torch.randn(3, 16)
        file = io.BytesIO()
        torch.save(out.state_dict(), file)
        file.seek(0)
        fresh = qnn.convert(net().apply(lambda m: m))
        fresh.load_state_dict(torch.load(file, weights_only=True))
        self.assertTrue(torch.equal(fresh(x), out(x)))

    @parameterized.expand([(True, 1.15), (False, 1.55)])
    def test_peak_memory(self, inplace: bool, most: float) -> None:
        """In place: the float model and less than two layers; a copy: the int8 model besides."""
        out = child(
            f"""
            import ctypes, gc, resource, torch, qnn
            from torch import nn
            def resident():
                with open("/proc/self/statm") as file:
                    return int(file.read().split()[1]) * 4096
            def peak():
                with open("/proc/self/status") as file:
                    return int(next(l for l in file if l.startswith("VmHWM")).split()[1]) * 1024
            qnn.convert(nn.Linear(2048, 2048))(torch.randn(1, 2048))
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            start = resident()
            model = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(16)))
            size = 16 * 2048 * 2048 * 4
            open("/proc/self/clear_refs", "w").write("5")
            model = qnn.convert(model, inplace={inplace})
            print((peak() - start) / size)
            """
        )
        self.assertLessEqual(float(out), most)


class Tagged(nn.Linear):
    pass


class TestUnsupported(unittest.TestCase):
    def cases(self) -> dict[str, tuple[nn.Module, str]]:
        nan, parametrized, normed, pruned, empty = (nn.Linear(4, 4) for _ in range(5))
        nan.weight.data[1, 2] = float("nan")
        parametrizations.weight_norm(parametrized)
        spectral_norm(normed)
        prune.l1_unstructured(pruned, "weight", 0.5)
        empty.weight, empty.in_features = nn.Parameter(torch.empty(4, 0)), 0
        integer = nn.Linear(4, 4)
        integer.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int32), requires_grad=False)
        return {
            "nan": (nan, "1 NaN or inf of 16 values"),
            "parametrized": (parametrized, "remove_parametrizations"),
            "spectral": (normed, "weight_orig"),
            "pruned": (pruned, "weight_mask"),
            "empty": (empty, "at least 1, got 0 and 4"),
            "integer": (integer, "its weight is torch.int32"),
        }

    def test_error_names_all_and_changes_nothing(self) -> None:
        cases = self.cases()
        model = nn.ModuleDict({"good": nn.Linear(4, 4)} | {k: m for k, (m, _) in cases.items()})
        before = list(model.children())
        with self.assertRaises(ValueError) as caught:
            qnn.convert(model, inplace=True)
        for name, (_, reason) in cases.items():
            self.assertRegex(str(caught.exception), f"  {name}: .*{reason}")
        self.assertIn("6 layer(s) cannot be converted", str(caught.exception))
        self.assertEqual(list(model.children()), before)

    def test_skip_keeps_and_reports(self) -> None:
        for name, (layer, reason) in self.cases().items():
            model = nn.ModuleDict({"good": nn.Linear(4, 4), name: layer})
            kind = type(layer)
            out = qnn.convert(model, on_unsupported="skip", inplace=True)
            self.assertIsInstance(out["good"], QLinear)
            self.assertIs(type(out[name]), kind)
            text = str(qnn.summary(out))
            self.assertIn(reason, text)
            if parametrize.is_parametrized(layer):
                self.assertEqual(out[name](torch.randn(2, 4)).shape, (2, 4))

    def test_a_tensor_subclass_is_refused(self) -> None:
        need_sharded_integers()
        forked(
            """
            import torch, qnn
            from torch import nn
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard
            import os, torch.distributed as dist
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
            store = dist.HashStore()
            dist.init_process_group("gloo", rank=0, world_size=1, store=store)
            model = nn.Sequential(nn.Linear(4, 4))
            fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
            try:
                qnn.convert(model)
            except ValueError as error:
                assert "its weight is a DTensor" in str(error), error
            else:
                raise AssertionError("a sharded model was converted")
            model = qnn.convert(nn.Sequential(nn.Linear(4, 4)))
            sharded = fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
            assert sharded(torch.randn(2, 4)).shape == (2, 4)
            """
        )

    def test_subclasses_are_left_alone(self) -> None:
        model = nn.Sequential(Tagged(4, 4), nn.Linear(4, 4), nn.MultiheadAttention(4, 2))
        out = qnn.convert(model)
        self.assertEqual(converted(out), ["1"])
        reasons = {row.name: str(row.reason) for row in qnn.summary(out).rows}
        self.assertIn("Tagged is a subclass of nn.Linear", reasons["0"])
        self.assertIn("fused parameter", reasons["2"])
        self.assertIn("NonDynamicallyQuantizableLinear", reasons["2.out_proj"])

    def test_a_layer_without_sizes(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4))
        for verb in (qnn.convert, qnn.prepare):
            with self.assertRaisesRegex(ValueError, "1: it is not initialised.*one batch first"):
                verb(model)
            model = verb(nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4)), exclude="1")
            self.assertIn("one batch first", str(qnn.summary(model)))
        with self.assertRaisesRegex(ValueError, "1 took no input yet .* run one batch first"):
            qnn.convert(nn.Sequential(nn.Linear(4, 4), nn.LazyBatchNorm1d()))

    def test_little_is_said(self) -> None:
        def model() -> nn.Module:
            return nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 1), nn.Linear(1, 1))

        for convert in (qnn.convert, lambda m: qnn.convert(m, inplace=True)):
            with self.assertWarnsRegex(
                UserWarning,
                r"1\.0% of the parameters' bytes .*torch.nn.modules.sparse.Embedding \(25.6 kB\)",
            ) as caught:
                convert(model())
            self.assertEqual(caught.filename, __file__)
        with warnings.catch_warnings():  # what patterns leave is left on purpose
            warnings.simplefilter("error")
            qnn.convert(model(), include="1")
            qnn.convert(nn.Sequential(nn.Linear(64, 64), nn.Linear(4, 4)), exclude="0")
            qnn.convert(nn.Sequential(nn.Linear(64, 64), nn.Linear(4, 4)), {"1": "int8"})

    def test_many_reasons_are_cut(self) -> None:
        model = nn.Sequential(*(Tagged(4, 4) for _ in range(30)), nn.Conv1d(4, 4, 1))
        with self.assertRaisesRegex(
            ValueError, r"(?s)  and 10 more.*no layer that qnn knows: torch.nn.modules.conv.Conv1d"
        ):
            qnn.convert(model)


class TestTraining(unittest.TestCase):
    """Into training, to another scheme, back, and on to deployment."""

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        model = nn.ModuleDict({"embedding": nn.Embedding(32, 64), "norm": nn.BatchNorm1d(64)})
        model["first"], model["second"] = nn.Linear(64, 64), nn.Linear(64, 64)
        model["head"] = nn.Linear(64, 32, bias=False)
        model["head"].weight = model["embedding"].weight
        return model

    def identities(self, model: nn.Module) -> dict[str, int]:
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
        return {name: id(tensor) for name, tensor in named}

    def test_every_tensor_is_shared(self) -> None:
        model = self.model()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        twin = qnn.convert(model, "fp8", training=True)
        self.assertIsNot(twin, model)
        self.assertIs(type(model["first"]), nn.Linear)
        self.assertEqual(self.identities(twin), self.identities(model))
        before = twin["norm"].weight.detach().clone()
        x = twin["norm"](twin["embedding"](torch.randint(32, (8,))))
        twin["head"](twin["second"](twin["first"](x))).square().mean().backward()
        optimizer.step()
        self.assertFalse(torch.equal(before, twin["norm"].weight))
        self.assertEqual(int(model["norm"].num_batches_tracked), 1)
        # Without training it is a copy as ever.
        self.assertFalse(
            set(self.identities(qnn.convert(model)).values()) & set(self.identities(model).values())
        )

    @parameterized.expand([(False,), (True,)])
    def test_to_another_scheme_and_back(self, inplace: bool) -> None:
        model = self.model()
        want = self.identities(model)
        model = qnn.convert(model, "fp8", training=True, inplace=inplace)
        model["first"].register_forward_hook(lambda *_: calls.append(1))
        calls: list[int] = []
        for scheme, schemes in (
            ("mxfp8", ["mxfp8"] * 3),
            ({"first": "nvfp4"}, ["nvfp4", "mxfp8", "mxfp8"]),
            ({"second": None, "first": "fp8"}, ["fp8", None, "mxfp8"]),
            ({"*": None}, [None] * 3),
            ("fp8_block", ["fp8_block"] * 3),
        ):
            model = qnn.convert(model, scheme, training=True, inplace=inplace)
            layers = [model[name] for name in ("first", "second", "head")]
            self.assertEqual([getattr(layer, "scheme", None) for layer in layers], schemes)
            for layer, held in zip(layers, schemes, strict=True):
                self.assertIs(type(layer), nn.Linear if held is None else qnn.Linear)
            self.assertEqual(self.identities(model), want)
            model["first"](torch.randn(2, 64))
            self.assertEqual(calls.pop(), 1)
        reasons = {row.name: row.reason for row in qnn.summary(model).rows}
        self.assertIsNone(reasons["first"])

    @parameterized.expand([(False,), (True,)])
    def test_deployment_ends_training(self, inplace: bool) -> None:
        model = qnn.convert(self.model(), "fp8", training=True, inplace=inplace)
        out = qnn.convert(model.eval(), {"*": "fp8", "second": None}, inplace=inplace)
        kinds = [type(out[name]) for name in ("first", "second", "head")]
        self.assertEqual(kinds, [QLinear, nn.Linear, nn.Linear])
        self.assertIs(out["head"].weight, out["embedding"].weight)
        reasons = {row.name: str(row.reason) for row in qnn.summary(out).rows}
        self.assertIn("tied to 'embedding' (Embedding), which stays in float", reasons["head"])
        self.assertEqual(reasons["second"], "the scheme map says None")
        with self.assertRaisesRegex(ValueError, "converted already .*layer.dequantize.. gives"):
            qnn.convert(nn.Sequential(out["first"]), {"*": None})

    def test_subclasses_of_the_training_layer(self) -> None:
        class Inherits(qnn.Linear):
            pass

        class Doubles(qnn.Linear):
            def forward(self, input: torch.Tensor) -> torch.Tensor:
                return 2 * super().forward(input)

        model = nn.Sequential(Inherits(32, 32), Doubles(32, 32), qnn.Linear(32, 32))
        for options in ({}, {"training": True}):
            out = qnn.convert(model, "mxfp8", **options)
            self.assertEqual([type(m) for m in out[:2]], [Inherits, Doubles])
            self.assertEqual(out[2].scheme, "mxfp8")
        back = qnn.convert(model, {"*": None}, training=True)
        self.assertEqual([type(m) for m in back], [Inherits, Doubles, nn.Linear])
        out = qnn.convert(model, "fp8", include=[Inherits, Doubles, "2"])
        self.assertEqual([type(m) for m in out], [QLinear, Doubles, QLinear])

    @parameterized.expand(
        [
            ("weight_norm", parametrizations.weight_norm),
            ("spectral_norm", parametrizations.spectral_norm),
            ("orthogonal", parametrizations.orthogonal),
            ("old weight_norm", torch.nn.utils.weight_norm),
            ("old spectral_norm", spectral_norm),
            ("pruned", lambda m: prune.l1_unstructured(m, "weight", 0.5)),
            ("pruned rows", lambda m: prune.ln_structured(m, "weight", 0.5, 2, 0)),
        ]
    )
    def test_computed_weights(self, _: str, change: Any) -> None:
        float_layer, layer = nn.Linear(64, 32), qnn.Linear(64, 32, scheme="fp8")
        layer.load_state_dict(float_layer.state_dict())
        grads = []
        for each in (float_layer, layer):
            torch.manual_seed(1)
            x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
            changed = change(each)
            y = changed(x)
            (y * torch.linspace(-1, 1, 32)).sum().backward()
            grads.append([y, x.grad, *(p.grad for p in changed.parameters())])
        for want, got in zip(*grads, strict=True):
            self.assertGreater(qnn.sqnr(want, got), 15)
        for scheme, options in (("fp8", {}), ({"*": None}, {"training": True})):
            with self.assertRaisesRegex(ValueError, "parametrized|holds more than weights"):
                qnn.convert(nn.Sequential(layer), scheme, **options)

    def test_weights_that_are_views(self) -> None:
        """As FSDP1 sets them: plain tensors, of one flat parameter."""
        layer = qnn.Linear(64, 32, scheme="fp8")
        flat = nn.Parameter(torch.cat([layer.weight.detach().ravel(), layer.bias.detach()]))
        for name, part in (("weight", flat[: 64 * 32].view(32, 64)), ("bias", flat[64 * 32 :])):
            del layer._parameters[name]
            object.__setattr__(layer, name, part)
        layer(torch.randn(5, 64)).sum().backward()
        self.assertTrue((flat.grad != 0).all())
        with self.assertRaisesRegex(ValueError, "x must be .*got .5, 63"):
            layer(torch.randn(5, 63))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class TestProgress(unittest.TestCase):
    def run_with(self, progress: Any, seconds: float, terminal: bool = False) -> str:
        clock = itertools.count(step=seconds)
        text = Terminal() if terminal else io.StringIO()
        with (
            mock.patch("sys.stderr", text),
            mock.patch("time.monotonic", side_effect=clock),
        ):
            qnn.convert(net(), progress=progress)
            qnn.prepare(net(), progress=progress)
        return text.getvalue()

    def test_a_line(self) -> None:
        always = self.run_with("always", 0.001)
        for verb in ("convert", "prepare"):
            self.assertRegex(always, f"\rqnn.{verb}: layer 5/5, [0-9.]+ s\n")
        for quiet in (False, True):  # stderr is no terminal here
            self.assertEqual(self.run_with(quiet, 10), "")
        self.assertEqual(self.run_with(True, 0.001, terminal=True), "")  # it took no time
        self.assertIn("\rqnn.convert: layer 1/5", self.run_with(True, 3, terminal=True))
        self.assertEqual(self.run_with(False, 3, terminal=True), "")
        for verb in (qnn.convert, qnn.prepare):
            with self.assertRaisesRegex(ValueError, "progress must be True, False or 'always'"):
                verb(net(), progress="yes")


class TestTransformerEncoder(unittest.TestCase):
    """torch's fused path reads the raw weights of the linears; converted, it must not run."""

    def test_all_grad_modes_with_and_without_padding(self) -> None:
        model = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2, enable_nested_tensor=True
        ).eval()
        out = qnn.convert(model)
        self.assertEqual(len(converted(out)), 4)
        x = torch.randn(2, 6, 32)
        padding = torch.zeros(2, 6, dtype=torch.bool)
        padding[1, 4:] = True
        for grad in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
            with grad:
                self.assertGreater(qnn.sqnr(model(x), out(x)), 30)
                got = out(x, src_key_padding_mask=padding)[1, :4]
                want = model(x, src_key_padding_mask=padding)[1, :4]
                self.assertGreater(qnn.sqnr(want, got), 30)
        self.assertIs(type(model.layers[0].linear1), nn.Linear)
        self.assertTrue(model.layers[0].activation_relu_or_gelu)

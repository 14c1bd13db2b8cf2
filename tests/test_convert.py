from __future__ import annotations

import copy
import io
import itertools
import re
import warnings
from typing import Any
from unittest import mock

import pytest
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


class TestSelection:
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
            with pytest.raises(ValueError, match="exclude pattern 'nothing\\*' matches no module"):
                qnn.convert(net(), **kwargs)
            return
        assert converted(qnn.convert(net(), **kwargs)) == want

    def test_a_map_of_schemes_takes_the_last_match(self) -> None:
        model = qnn.convert(net(), {"*": "int8", Block: "int8_weight", "1": None, "1.up": "int8"})
        schemes = {n: m.scheme for n, m in model.named_modules() if isinstance(m, QLinear)}
        assert schemes == {
            "0.up": "int8_weight",
            "0.down": "int8_weight",
            "1.up": "int8",
            "2": "int8",
        }
        reasons = {row.name: row.reason for row in qnn.summary(model).rows}
        assert reasons["1.down"] == "the scheme map says None"
        model = qnn.convert(net(), {"0": "int8"})
        assert converted(model) == ["0.up", "0.down"]
        assert "no pattern" in str(qnn.summary(model).rows[-1].reason)

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
            with pytest.raises(kind, match=message):
                qnn.convert(model, *args, inplace=inplace, **kwargs)
            assert str(model) == before

    def test_nothing_to_convert(self) -> None:
        with pytest.raises(
            ValueError,
            match=r"has no nn.Linear, .*, nn.LSTM or nn.GRU.*, only "
            r"torch.nn.modules.normalization.LayerNorm \(2, 3.0 kB\), "
            r"torch.nn.modules.activation.PReLU \(1, 4 B\), "
            r"torch.nn.modules.activation.ReLU \(2\)",
        ):
            qnn.convert(
                nn.Sequential(nn.PReLU(), *(nn.LayerNorm(190) for _ in "ab"), nn.ReLU(), nn.ReLU())
            )
        with pytest.raises(TypeError, match=r"takes an nn.Module, got int"):
            qnn.convert(3)  # type: ignore[type-var]
        with pytest.raises(ValueError, match=r"converted already .5 QLinear, scheme 'int8'"):
            qnn.convert(qnn.convert(net()))
        with pytest.raises(ValueError, match="converted already"):
            qnn.convert(QLinear(4, 4))

    def test_in_steps(self) -> None:
        model = qnn.convert(qnn.convert(net(), include="0"), "int8_weight", include="1")
        assert converted(model) == ["0.up", "0.down", "1.up", "1.down"]


class TestResult:
    def test_a_copy_leaves_the_original_untouched(self) -> None:
        model = net()
        state = copy.deepcopy(model.state_dict())
        twin = qnn.convert(model)
        assert converted(model) == []
        twin[0].up.bias.data.zero_()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, state[name])
        assert not {id(p) for p in model.parameters()} & {id(p) for p in twin.parameters()}

    def test_in_place(self) -> None:
        model, x = net(), torch.randn(3, 16)
        want = qnn.convert(model)(x)
        norm = model[0].act
        assert qnn.convert(model, inplace=True) is model
        assert torch.equal(model(x), want)
        assert model[0].act is norm
        assert isinstance(qnn.convert(nn.Linear(3, 4), inplace=True), QLinear)
        assert isinstance(qnn.convert(nn.Linear(3, 4)), QLinear)

    def test_shared_modules_stay_shared(self) -> None:
        for inplace in (False, True):
            shared = Block()
            model = nn.Sequential(shared, shared, nn.Sequential(shared.up))
            out = qnn.convert(model, inplace=inplace)
            assert out[0] is out[1]
            assert out[0].up is out[2][0]
            assert isinstance(out[0].up, QLinear)

    def test_tied_weights_stay_tied(self) -> None:
        for inplace in (False, True):
            model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
            model[1].weight = model[0].weight
            out = qnn.convert(model, inplace=inplace)
            assert out[0].stored[0] is out[1].stored[0]
            assert out[0].weight_scale is out[1].weight_scale
            assert out[0].stored[0] is not out[2].stored[0]
            assert out[0].bias is not out[1].bias
            half = copy.deepcopy(out).half()
            assert half[0].weight_scale is half[1].weight_scale
            assert half[0].weight_scale.dtype == torch.float32

    def test_a_weight_tied_to_a_float_user_is_left_alone(self) -> None:
        model = nn.ModuleDict({"emb": nn.Embedding(10, 8), "proj": nn.Linear(8, 8)})
        model["head"] = nn.Linear(8, 10, bias=False)
        model["head"].weight = model["emb"].weight
        out = qnn.convert(model)
        assert converted(out) == ["proj"]
        assert out["head"].weight is out["emb"].weight
        reasons = {row.name: row.reason for row in qnn.summary(out).rows}
        assert "tied to 'emb' (Embedding), which stays in float" in str(reasons["head"])
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        model[1].weight = model[0].weight
        with pytest.raises(ValueError, match="share one weight but would get"):
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
            assert calls == ["pre", "forward", "backward", "state"]
            assert out[2].tag == ["kept"]
            assert [m.training for m in (out[0].up, out[1].up, out[2])] == [False, True, False]
            assert not out[2].bias.requires_grad
            assert out[0].up.bias.requires_grad
            calls.clear()
            if inplace:
                handle.remove()
                out(torch.randn(2, 16))
                assert "forward" not in calls

    def test_untouched_parameters_keep_requires_grad(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.PReLU())
        model[1].weight.requires_grad_(False)
        out = qnn.convert(model)
        assert not out[1].weight.requires_grad
        assert out[1].bias.requires_grad
        assert out[2].weight.requires_grad

    def test_meta_device(self) -> None:
        with torch.device("meta"):
            model = net()
        out = qnn.convert(model)
        assert all(p.is_meta for p in out.parameters())
        real = net()
        out.load_state_dict(real.state_dict(), assign=True)  # a float checkpoint
        x = torch.randn(3, 16)
        assert torch.equal(out(x), qnn.convert(real)(x))

    def test_a_float_state_loads_into_a_converted_model(self) -> None:
        other = net()
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(1.5)
        out = qnn.convert(net())
        out.load_state_dict(other.state_dict())
        x = torch.randn(3, 16)
        assert torch.equal(out(x), qnn.convert(other)(x))

    def test_state_round_trip(self) -> None:
        out, x = qnn.convert(net()), torch.randn(3, 16)
        file = io.BytesIO()
        torch.save(out.state_dict(), file)
        file.seek(0)
        fresh = qnn.convert(net().apply(lambda m: m))
        fresh.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(fresh(x), out(x))

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
        assert float(out) <= most


class Tagged(nn.Linear):
    pass


class TestUnsupported:
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
        with pytest.raises(ValueError, match=r"6 layer\(s\) cannot be converted") as caught:
            qnn.convert(model, inplace=True)
        for name, (_, reason) in cases.items():
            assert re.search(f"  {name}: .*{reason}", str(caught.value))
        assert list(model.children()) == before

    def test_skip_keeps_and_reports(self) -> None:
        for name, (layer, reason) in self.cases().items():
            model = nn.ModuleDict({"good": nn.Linear(4, 4), name: layer})
            kind = type(layer)
            out = qnn.convert(model, on_unsupported="skip", inplace=True)
            assert isinstance(out["good"], QLinear)
            assert type(out[name]) is kind
            text = str(qnn.summary(out))
            assert reason in text
            if parametrize.is_parametrized(layer):
                assert out[name](torch.randn(2, 4)).shape == (2, 4)

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
        assert converted(out) == ["1"]
        reasons = {row.name: str(row.reason) for row in qnn.summary(out).rows}
        assert "Tagged is a subclass of nn.Linear" in reasons["0"]
        assert "fused parameter" in reasons["2"]
        assert "NonDynamicallyQuantizableLinear" in reasons["2.out_proj"]

    def test_a_layer_without_sizes(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4))
        for verb in (qnn.convert, qnn.prepare):
            with pytest.raises(ValueError, match=r"1: it is not initialised.*one batch first"):
                verb(model)
            model = verb(nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4)), exclude="1")
            assert "one batch first" in str(qnn.summary(model))
        with pytest.raises(ValueError, match=r"1 took no input yet .* run one batch first"):
            qnn.convert(nn.Sequential(nn.Linear(4, 4), nn.LazyBatchNorm1d()))

    def test_little_is_said(self) -> None:
        def model() -> nn.Module:
            return nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 1), nn.Linear(1, 1))

        for convert in (qnn.convert, lambda m: qnn.convert(m, inplace=True)):
            with pytest.warns(
                UserWarning,
                match=r"1\.0% of the parameters' bytes .*torch.nn.modules.sparse.Embedding"
                r" \(25.6 kB\)",
            ) as caught:
                convert(model())
            assert {warning.filename for warning in caught} == {__file__}
        with warnings.catch_warnings():  # what patterns leave is left on purpose
            warnings.simplefilter("error")
            qnn.convert(model(), include="1")
            qnn.convert(nn.Sequential(nn.Linear(64, 64), nn.Linear(4, 4)), exclude="0")
            qnn.convert(nn.Sequential(nn.Linear(64, 64), nn.Linear(4, 4)), {"1": "int8"})

    def test_many_reasons_are_cut(self) -> None:
        model = nn.Sequential(*(Tagged(4, 4) for _ in range(30)), nn.LayerNorm(4))
        with pytest.raises(
            ValueError,
            match=r"(?s)  and 10 more.*no layer that qnn knows: torch.nn.modules.normalization",
        ):
            qnn.convert(model)


class TestTraining:
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
        assert twin is not model
        assert type(model["first"]) is nn.Linear
        assert self.identities(twin) == self.identities(model)
        before = twin["norm"].weight.detach().clone()
        x = twin["norm"](twin["embedding"](torch.randint(32, (8,))))
        twin["head"](twin["second"](twin["first"](x))).square().mean().backward()
        optimizer.step()
        assert not torch.equal(before, twin["norm"].weight)
        assert int(model["norm"].num_batches_tracked) == 1
        # Without training it is a copy as ever.
        assert not set(self.identities(qnn.convert(model)).values()) & set(
            self.identities(model).values()
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
            assert [getattr(layer, "scheme", None) for layer in layers] == schemes
            for layer, held in zip(layers, schemes, strict=True):
                assert type(layer) is (nn.Linear if held is None else qnn.Linear)
            assert self.identities(model) == want
            model["first"](torch.randn(2, 64))
            assert calls.pop() == 1
        reasons = {row.name: row.reason for row in qnn.summary(model).rows}
        assert reasons["first"] is None

    @parameterized.expand([(False,), (True,)])
    def test_deployment_ends_training(self, inplace: bool) -> None:
        model = qnn.convert(self.model(), "fp8", training=True, inplace=inplace)
        out = qnn.convert(model.eval(), {"*": "fp8", "second": None}, inplace=inplace)
        kinds = [type(out[name]) for name in ("first", "second", "head")]
        assert kinds == [QLinear, nn.Linear, nn.Linear]
        assert out["head"].weight is out["embedding"].weight
        reasons = {row.name: str(row.reason) for row in qnn.summary(out).rows}
        assert "tied to 'embedding' (Embedding), which stays in float" in reasons["head"]
        assert reasons["second"] == "the scheme map says None"
        with pytest.raises(ValueError, match=r"converted already .*layer.dequantize.. gives"):
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
            assert [type(m) for m in out[:2]] == [Inherits, Doubles]
            assert out[2].scheme == "mxfp8"
        back = qnn.convert(model, {"*": None}, training=True)
        assert [type(m) for m in back] == [Inherits, Doubles, nn.Linear]
        out = qnn.convert(model, "fp8", include=[Inherits, Doubles, "2"])
        assert [type(m) for m in out] == [QLinear, Doubles, QLinear]

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
            assert qnn.sqnr(want, got) > 15
        for scheme, options in (("fp8", {}), ({"*": None}, {"training": True})):
            with pytest.raises(ValueError, match=r"parametrized|holds more than weights"):
                qnn.convert(nn.Sequential(layer), scheme, **options)

    def test_weights_that_are_views(self) -> None:
        """As FSDP1 sets them: plain tensors, of one flat parameter."""
        layer = qnn.Linear(64, 32, scheme="fp8")
        flat = nn.Parameter(torch.cat([layer.weight.detach().ravel(), layer.bias.detach()]))
        for name, part in (("weight", flat[: 64 * 32].view(32, 64)), ("bias", flat[64 * 32 :])):
            del layer._parameters[name]
            object.__setattr__(layer, name, part)
        layer(torch.randn(5, 64)).sum().backward()
        assert (flat.grad != 0).all()
        with pytest.raises(ValueError, match=r"x must be .*got .5, 63"):
            layer(torch.randn(5, 63))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class TestProgress:
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
            assert re.search(f"\rqnn.{verb}: layer 5/5, [0-9.]+ s\n", always)
        for quiet in (False, True):  # stderr is no terminal here
            assert self.run_with(quiet, 10) == ""
        assert self.run_with(True, 0.001, terminal=True) == ""  # it took no time
        assert "\rqnn.convert: layer 1/5" in self.run_with(True, 3, terminal=True)
        assert self.run_with(False, 3, terminal=True) == ""
        for verb in (qnn.convert, qnn.prepare):
            with pytest.raises(ValueError, match="progress must be True, False or 'always'"):
                verb(net(), progress="yes")


class TestTransformerEncoder:
    """torch's fused path reads the raw weights of the linears; converted, it must not run."""

    def test_all_grad_modes_with_and_without_padding(self) -> None:
        model = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2, enable_nested_tensor=True
        ).eval()
        out = qnn.convert(model)
        assert len(converted(out)) == 4
        x = torch.randn(2, 6, 32)
        padding = torch.zeros(2, 6, dtype=torch.bool)
        padding[1, 4:] = True
        for grad in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
            with grad:
                assert qnn.sqnr(model(x), out(x)) > 30
                got = out(x, src_key_padding_mask=padding)[1, :4]
                want = model(x, src_key_padding_mask=padding)[1, :4]
                assert qnn.sqnr(want, got) > 30
        assert type(model.layers[0].linear1) is nn.Linear
        assert model.layers[0].activation_relu_or_gelu

"""Codes between static convolutions: where the compiler passes them, and where it must not."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from parameterized import parameterized
from torch import nn
from torch._inductor import config
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F

import qnn
from qnn import passes

from .common import forked, same_bits
from .test_fusion import appended

aten = torch.ops.aten
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KEPT, QUANTIZE = "int8_static_conv", "int8_static_quantize"
CHAIN, FORK, CODES = "int8_chain_conv", "int8_fork_conv", "int8_codes_conv"


def block(channels: int, out: int, kernel: int, *more: nn.Module, **options: Any) -> nn.Sequential:
    """A convolution with its BatchNorm."""
    layer = nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False, **options)
    return nn.Sequential(layer, nn.BatchNorm2d(out), *more)


class Basic(nn.Module):
    """A block of ResNet-18."""

    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.first = block(channels, out, 3, nn.ReLU(), stride=stride)
        self.second = block(out, out, 3)
        self.short = block(channels, out, 1, stride=stride) if stride > 1 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(self.first(x))
        y += self.short(x)
        return F.relu(y)


class Inverted(nn.Module):
    """A block of MobileNetV2."""

    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        wide = 3 * channels
        self.layers = nn.Sequential(
            block(channels, wide, 1, nn.ReLU6()),
            block(wide, wide, 3, nn.ReLU6(), groups=wide, stride=stride),
            block(wide, out, 1),
        )
        self.added = (channels, stride) == (out, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x) if self.added else self.layers(x)


# What two blocks give is read as codes, and added; on the grid of one layer where two read it.
RESNET = (
    lambda: nn.Sequential(Basic(6, 6), Basic(6, 6), Basic(6, 8, 2)),
    {QUANTIZE: 2, CHAIN: 3, FORK: 2, CODES: 2},
)
# What the first block gives is added, too; what the second gives is read by the third alone.
MOBILENET = (
    lambda: nn.Sequential(Inverted(4, 6), Inverted(6, 6), Inverted(6, 8, 2)),
    {QUANTIZE: 1, CHAIN: 7, FORK: 1, CODES: 1},
)
NETWORKS = {"ResNet": RESNET, "MobileNetV2": MOBILENET}


def image(*sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(1)) * 2


def static(model: nn.Module, x: torch.Tensor, dtype: torch.dtype = torch.float32) -> Any:
    """`model` with BatchNorm folded, calibrated and converted."""
    torch.manual_seed(5)
    norms = [module for module in model.eval().modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    model = qnn.prepare(qnn.fuse(model) if norms else model)
    return qnn.convert(qnn.calibrate(model, [x], progress=False)).to(dtype)


def network(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, torch.Tensor]:
    torch.manual_seed(4)
    model = NETWORKS[name][0]()
    x = image(2, next(m for m in model.modules() if isinstance(m, nn.Conv2d)).in_channels, 9, 10)
    return static(model, x, dtype), x.to(dtype)


def compiled(fn: Any, *args: Any, **options: Any) -> tuple[Any, Counter[str]]:
    """The result of the compiled `fn`, and the ops of its graph."""
    calls: Counter[str] = Counter()

    def count(graph: torch.fx.Graph) -> None:  # the graphs inside of regions come first
        calls.clear()
        calls.update(found.op.name for found in passes.match(graph.nodes))
        left = (aten.relu.default, aten.add.Tensor, aten.constant_pad_nd.default)
        calls.update(str(node.target) for node in graph.nodes if node.target in left)

    torch._dynamo.reset()
    with config.patch(post_grad_custom_post_pass=appended(count)):  # nothing is cached
        return torch.compile(fn, fullgraph=True, **options)(*args), calls


@torch.no_grad()
def check(fn: Any, *args: Any, calls: dict[str, int], **options: Any) -> None:
    got, found = compiled(fn, *args, **options)
    assert found == Counter(calls), fn
    want = fn(*args)
    for one, other in zip(*(v if isinstance(v, tuple) else (v,) for v in (got, want)), strict=True):
        assert same_bits(one, other)
        assert one.stride() == other.stride()


class TestNetworks:
    @parameterized.expand(
        [("ResNet", dtype) for dtype in DTYPES[:2]]
        + [("MobileNetV2", dtype) for dtype in DTYPES[1:]]
    )
    def test_same_bits_as_eager(self, name: str, dtype: torch.dtype) -> None:
        model, x = network(name, dtype)
        last = x.to(memory_format=torch.channels_last)
        check(model, last if dtype == torch.bfloat16 else x, calls=NETWORKS[name][1])

    def test_any_batch_without_recompiling(self) -> None:
        model, x = network("ResNet")
        with torch.no_grad():
            _, found = compiled(model, x, dynamic=True)
            assert found == Counter(NETWORKS["ResNet"][1])
            run = torch.compile(model, fullgraph=True, dynamic=True)
            with torch._dynamo.config.patch(error_on_recompile=True):
                for size in ((3, 9, 10), (5, 12, 11), (7, 4, 4)):
                    x = image(size[0], x.shape[1], *size[1:])
                    assert same_bits(run(x), model(x))

    def test_a_sample_with_nan_or_inf_is_lost_alone(self) -> None:
        model, x = network("ResNet")
        x = torch.cat([x, x, x])
        x[1, 2, 3, 4], x[3, 0, 0, 0] = float("nan"), -float("inf")
        with torch.no_grad():
            got, found = compiled(model, x)
            assert found[CHAIN]
            assert same_bits(got.nan_to_num(7e7), model(x).nan_to_num(7e7))
        finite = got.isfinite().flatten(1)
        assert torch.equal(finite.all(1), finite.any(1))
        assert finite.all(1).tolist() == [True, False, True, False, True, True]

    def test_one_that_overflows_on_the_way(self) -> None:
        """Float16 has no such number, and int8 could hold it."""
        layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))
        model, x = static(layers, image(2, 3, 5, 5)), image(2, 3, 5, 5).half()
        with torch.no_grad():
            model[0].weight_scale.mul_(1e6)
        model, x[1] = model.half(), 0.0
        with torch.no_grad():
            got, found = compiled(model, x)
            assert found == Counter({QUANTIZE: 1, CHAIN: 1, CODES: 1})
            assert bool(got[0].isnan().all())
            assert same_bits(got[1], model(x)[1])
            assert bool(model(x)[0].isnan().all())

    def test_training(self) -> None:
        model, x = static(Basic(6, 6), image(2, 6, 5, 5)), image(2, 6, 5, 5)
        params = [p for p in model.parameters() if p.requires_grad]

        def gradients(y: torch.Tensor) -> Any:
            return torch.autograd.grad(y.square().sum(), [x, *params])

        x.requires_grad_()
        y = torch.compile(model, fullgraph=True)(x)
        assert same_bits(y, model(x))
        for one, other in zip(gradients(y), gradients(model(x)), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)

    def test_packaged_by_aotinductor_and_run_in_a_fresh_process(self) -> None:
        model, x = static(Basic(6, 6), image(2, 6, 5, 5)), image(2, 6, 5, 5)
        seen: list[str] = []
        every = appended(lambda graph: seen.extend(str(n.target) for n in graph.nodes))
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            where = Path(folder)
            shapes = ({0: torch.export.Dim("batch")},)
            program = torch.export.export(model, (x,), dynamic_shapes=shapes)
            with config.patch(post_grad_custom_post_pass=every):
                package = torch._inductor.aoti_compile_and_package(
                    program, package_path=str(where / "model.pt2")
                )
            # An op that takes a dtype is called with another one by packages of torch 2.11.
            joined = torch.__version__ >= "2.12"
            assert (f"qnn.{CHAIN}.default" in seen) == joined
            x = torch.cat([x, -x, x])
            torch.save(x, where / "x.pt")
            forked(
                f"""
                import torch, qnn
                model = torch._inductor.aoti_load_package({package!r})
                torch.save(model(torch.load({str(where / "x.pt")!r})), {str(where / "y.pt")!r})
                """
            )
            assert same_bits(torch.load(where / "y.pt"), model(x))


class TestJoined:
    @parameterized.expand([(1,), (2,), (3,)])
    def test_of_any_number_of_axes(self, axes: int) -> None:
        kind: Any = getattr(nn, f"Conv{axes}d")
        layers = nn.Sequential(kind(4, 6, 3), nn.Hardswish(), kind(6, 4, 2, bias=False))
        x = image(2, 4, *[6] * axes)
        check(static(layers, x), x, calls={QUANTIZE: 1, CHAIN: 1, CODES: 1})

    def test_without_a_batch(self) -> None:
        layers, x = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 4, 2)), image(4, 6, 6)
        check(static(layers, x), x, calls={QUANTIZE: 1, CHAIN: 1, CODES: 1})

    def test_one_grid_and_two_readers(self) -> None:
        a, b = static(nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 4, 2)), x := image(2, 4, 6, 6))

        def fn(x: torch.Tensor) -> Any:
            y = a(x).relu()
            return b(y), b(y) * 2

        check(fn, x, calls={QUANTIZE: 1, CHAIN: 1, CODES: 2})

    def test_a_layer_that_is_called_twice(self) -> None:
        (layer,) = static(nn.Sequential(nn.Conv2d(4, 4, 3)), x := image(2, 4, 9, 9))

        def fn(x: torch.Tensor) -> torch.Tensor:
            return layer(layer(layer(x)).relu())

        check(fn, x, calls={QUANTIZE: 1, CHAIN: 2, CODES: 1})


class TestBoth:
    """What a layer reads as codes, and another node in float."""

    def check(self, read: Callable[..., Any], **more: int) -> None:
        x = image(2, 4, 8, 8)
        layers = static(nn.Sequential(*(nn.Conv2d(4, 4, 3) for _ in range(3))), x)

        def fn(x: torch.Tensor) -> Any:
            return read(layers[0](x), *layers[1:])

        check(fn, x, calls={QUANTIZE: 1, FORK: 1, CODES: 1, **more})

    def test_returned(self) -> None:
        self.check(lambda y, b, c: (y, b(y)))

    def test_read_on_two_grids(self) -> None:
        self.check(lambda y, b, c: (b(y), c(y)), **{KEPT: 1})

    def test_read_by_another_operation(self) -> None:
        self.check(lambda y, b, c: (b(y), y.mean()))

    def test_residual_of_its_own_reader(self) -> None:
        self.check(lambda y, b, c: b(F.pad(y, (1, 1, 1, 1))) + y)

    @parameterized.expand([("nan", float("nan")), ("inf", float("inf"))])
    def test_a_sample_that_is_not_finite_stays_so(self, _: str, odd: float) -> None:
        x = image(3, 4, 8, 8)
        a, b = static(nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)), x)
        x[1, 2, 3, 4] = odd

        def fn(x: torch.Tensor) -> Any:
            y = a(x)
            return y, b(y)

        with torch.no_grad():
            got, want = compiled(fn, x)[0], fn(x)
        for one, other in zip(got, want, strict=True):
            assert same_bits(one.nan_to_num(7), other.nan_to_num(7))
            assert other.isnan().flatten(1).all(1).tolist() == [False, True, False]


class Fire(nn.Module):
    """A block of SqueezeNet."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, 3, 1)
        self.one, self.three = nn.Conv2d(3, out, 1), nn.Conv2d(3, out, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.squeeze(x).relu()
        return torch.cat([self.one(x).relu(), self.three(x).relu()], 1)


class TestConcatenated:
    def blocks(self) -> tuple[Any, torch.Tensor]:
        torch.manual_seed(6)
        x = image(2, 4, 7, 6)
        return static(nn.Sequential(Fire(4, 4), Fire(8, 5)), x), x

    # In each block one layer reads codes, and the other its own grid: floats.
    BLOCKS: ClassVar = {QUANTIZE: 2, FORK: 2, CHAIN: 2, CODES: 1, KEPT: 1}

    def test_along_the_channels(self) -> None:
        network, x = self.blocks()
        check(network, x, calls=self.BLOCKS)
        check(network, x.to(memory_format=torch.channels_last), calls=self.BLOCKS)

    def test_a_sample_with_nan_in_one_part(self) -> None:
        x = image(2, 4, 7, 6)
        a, b = static(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)), x)
        last = static(nn.Sequential(nn.Conv2d(8, 4, 3)), image(2, 8, 7, 6))
        other = x.clone()
        other[1, 0, 0, 0] = float("nan")

        def fn(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            return last(torch.cat([a(x), b(other)], 1))

        with torch.no_grad():
            got, calls = compiled(fn, x, other)
            want = fn(x, other)
        assert calls == Counter({QUANTIZE: 2, CHAIN: 2, CODES: 1})
        assert same_bits(got.nan_to_num(7), want.nan_to_num(7))
        assert got.isnan().flatten(1).all(1).tolist() == [False, True]

    def test_what_is_read_elsewhere_too(self) -> None:
        x = image(2, 4, 7, 6)
        a, b, c = static(nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(3))), x)
        last = static(nn.Sequential(nn.Conv2d(8, 4, 3)), image(2, 8, 7, 6))

        def whole(x: torch.Tensor) -> Any:
            y = torch.cat([a(x), b(x)], 1)
            return last(y), y

        def part(x: torch.Tensor) -> Any:
            y = a(x)
            return last(torch.cat([y, b(x)], 1)), y

        def another_grid(x: torch.Tensor) -> Any:
            y = a(x)
            return c(y), last(torch.cat([y, b(x)], 1))

        def one_is_float(x: torch.Tensor) -> Any:
            return last(torch.cat([a(x), x], 1))

        def rows(x: torch.Tensor) -> Any:
            return c(torch.cat([a(x), b(x)], 2))

        check(whole, x, calls={QUANTIZE: 2, FORK: 2, CODES: 1})
        check(part, x, calls={QUANTIZE: 2, FORK: 1, CHAIN: 1, CODES: 1})
        check(another_grid, x, calls={QUANTIZE: 1, FORK: 1, CODES: 1, KEPT: 2})
        check(one_is_float, x, calls={KEPT: 2})
        check(rows, x, calls={KEPT: 3})


class TestPadding:
    """Zeros that a model puts around an image become the convolution's own."""

    @torch.no_grad()
    def check(self, fn: Callable[..., Any], x: torch.Tensor, folds: bool = True) -> None:
        got, calls = compiled(fn, x)
        assert same_bits(got, fn(x))
        pads = [name for name in calls if "pad" in name]
        assert (not pads) == folds, calls

    @parameterized.expand([("int8",), ("int8_static",), ("int16",), ("int8_weight",)])
    def test_of_any_scheme(self, scheme: str) -> None:
        x = image(2, 4, 7, 8)
        layer = nn.Sequential(nn.ZeroPad2d((0, 1, 2, 1)), nn.Conv2d(4, 6, 3, padding=1, stride=2))
        layer = static(layer, x) if scheme == "int8_static" else qnn.convert(layer.eval(), scheme)
        self.check(layer, x)
        self.check(layer, x.to(memory_format=torch.channels_last))

    @parameterized.expand([(1, (2, 1)), (2, (0, 1, 0, 1)), (3, (1, 1, 0, 2, 2, 0)), (2, (3, 0))])
    def test_of_any_number_of_axes(self, axes: int, zeros: tuple[int, ...]) -> None:
        kind: Any = getattr(nn, f"Conv{axes}d")
        layer = qnn.convert(nn.Sequential(kind(4, 6, 3), nn.ReLU()).eval(), "int8")
        x = image(2, 4, *[6] * axes)
        self.check(lambda x: layer(F.pad(x, zeros)), x)
        self.check(lambda x: layer(F.pad(x, zeros)), x[0])

    def test_chains_of_codes_pass_it(self) -> None:
        x = image(2, 4, 8, 8)
        layers = nn.Conv2d(4, 6, 1), nn.ReLU6(), nn.ZeroPad2d((0, 1, 0, 1))
        depthwise = nn.Conv2d(6, 6, 3, stride=2, groups=6)
        network = static(nn.Sequential(*layers, depthwise, nn.Conv2d(6, 4, 1)), x)
        check(network, x, calls={QUANTIZE: 1, CHAIN: 2, CODES: 1})

    def test_left_alone(self) -> None:
        x = image(2, 4, 8, 8)
        layer = qnn.convert(nn.Sequential(nn.Conv2d(4, 4, 3)).eval(), "int8")
        for fn in (
            lambda x: layer(F.pad(x, (1, 1), value=1.0)),
            lambda x: layer(F.pad(x, (1, -1))),
            lambda x: layer(F.pad(x[:, :3], (0, 0, 0, 0, 0, 1))),  # a channel
            lambda x: layer(F.pad(x, (1, 1)).mT),
        ):
            self.check(fn, x, folds=False)
        up = qnn.convert(nn.Sequential(nn.ConvTranspose2d(4, 4, 3)).eval(), "int8")
        self.check(lambda x: up(F.pad(x, (1, 1))), x, folds=False)

    def test_read_by_others_too(self) -> None:
        layer = qnn.convert(nn.Sequential(nn.Conv2d(4, 4, 3)).eval(), "int8")

        def fn(x: torch.Tensor) -> torch.Tensor:
            padded = F.pad(x, (1, 1, 1, 1))
            return layer(padded) * padded.amax()

        self.check(fn, image(2, 4, 8, 8), folds=False)

    def test_any_size_without_recompiling(self) -> None:
        layer = qnn.convert(nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(4, 4, 3)).eval())
        run = torch.compile(layer, fullgraph=True, dynamic=True)
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
            for sizes in ((3, 9, 10), (5, 12, 11), (7, 5, 6)):
                x = image(sizes[0], 4, *sizes[1:])
                assert same_bits(run(x), layer(x))

    def test_gradients_are_those_of_eager(self) -> None:
        layer = qnn.convert(nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(4, 4, 3)).eval())
        grads = []
        for run in (layer, torch.compile(layer, fullgraph=True)):
            x = image(2, 4, 6, 6).requires_grad_()
            run(x).square().sum().backward()
            grads.append(x.grad)
        torch.testing.assert_close(*grads)


class TestLeftAlone:
    @parameterized.expand([("int8",), ("int8_weight",)])
    def test_other_schemes(self, scheme: str) -> None:
        layers, x = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 4, 2)), image(2, 4, 6, 6)
        check(qnn.convert(layers.eval(), scheme), x, calls={f"{scheme}_conv": 2})

    def test_readers_of_something_else(self) -> None:
        x = image(2, 4, 8, 8)
        a, b = static(nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)), x)

        def pooled(x: torch.Tensor) -> Any:
            return b(F.max_pool2d(a(x), 2))

        def other_order(x: torch.Tensor) -> Any:
            return b(a(x).mT)

        def other_shape(x: torch.Tensor) -> Any:
            return b(a(x).view(2, 4, 4, 9))

        def one_sample(x: torch.Tensor) -> Any:
            return b(a(x)[:1])

        for fn in (pooled, other_order, other_shape, one_sample):
            check(fn, x, calls={KEPT: 2})

    def test_transposed(self) -> None:
        layers, x = (
            nn.Sequential(nn.Conv2d(4, 6, 3), nn.ConvTranspose2d(6, 4, 2)),
            image(2, 4, 6, 6),
        )
        check(static(layers, x), x, calls={KEPT: 1, f"{KEPT}_transpose": 1})

    def test_switched_off_with_inductors_own_patterns(self) -> None:
        layers, x = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 4, 2)), image(2, 4, 6, 6)
        check(static(layers, x), x, calls={KEPT: 2}, options={"pattern_matcher": False})


class TestLayout:
    @torch.no_grad()
    def test_channels_last_images_stay_so(self) -> None:
        """Inductor may lay out anew what it computes, and what a pass inserted read."""
        x = image(1, 4, 40, 40).contiguous(memory_format=torch.channels_last)
        model = static(
            nn.Sequential(block(4, 4, 3), nn.MaxPool2d(3, 2, 1), block(4, 8, 3), block(8, 8, 3)), x
        )
        run = torch.compile(model, fullgraph=True)
        got, (code,) = run_and_get_code(run, x)
        made = re.findall(r"assert_size_stride\(\w+, \(([^)]*)\), \(([^)]*)\), '([^']*)'\)", code)
        images = [
            strides.split(", ")
            for sizes, strides, op in made
            if "_quantize" in op or "_chain_conv" in op
            if sizes.split(", ")[1] != "1"
        ]
        assert len(images) == 2
        assert all(strides[1] == "1" for strides in images)
        assert same_bits(got, model(x))

"""Every declared op, whatever it is, is held to its declaration: the grids walk the registry."""

from __future__ import annotations

import inspect
import itertools
import re
import textwrap
from typing import Any

import pytest
import torch
from parameterized import parameterized
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import qnn.functional as F
from qnn.kernels import OPS, Op
from qnn.kernels.formats import int8
from qnn.kernels.formats.int8 import INT8_STATIC_MAX_K
from qnn.kernels.op import fast_check, parse_axis, parse_signature
from qnn.kernels.op.fast_check import source_of
from qnn.kernels.schemes import get_scheme

from .common import same_bits

EVERY_OP = [(op.name, op) for op in OPS.values()]
# Two roundings of the dtype; the arithmetic of float64 results is float32.
EPS = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10, torch.float64: 1e-6}
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# int32: words of codes; int64: counts
CODES = (torch.int8, torch.uint8, torch.int32, torch.int64, *FLOAT8)


Args = tuple[Any, ...]


def as_tuple(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)


def fresh(op: Op, args: Args) -> Args:
    """The arguments, with copies of those that the op writes to."""
    return tuple(a.clone() if i in op.written else a for i, a in enumerate(args))


def outcome(op: Op, call: Any, args: Args, **options: Any) -> tuple[torch.Tensor, ...]:
    """The results of a call, and what it has written."""
    given = fresh(op, args)
    results = as_tuple(call(*given, **options))
    return (*results, *(given[i] for i in op.written))


def alike(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal codes; floats but for the order of a sum."""
    if got.dtype in CODES:
        assert same_bits(got, want)
    else:
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-3)


def opcheck(op: Op, args: Args) -> None:
    # Torch's own check of mutation adds up its arguments, which it cannot for float8.
    some = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    called = outcome(op, op.overload, args)
    tensors = [a for a in (*called, *args) if isinstance(a, torch.Tensor)]
    has_float8 = any(tensor.dtype in FLOAT8 for tensor in tensors)
    options = {"test_utils": some} if has_float8 else {}
    torch.library.opcheck(op.overload, fresh(op, args), **options)


def form(op: Op) -> str:
    """The name without what tells the members of a family of formats apart, which one loop
    declares: `int4_asym_g32_weight_linear` is an `int4_weight_linear`.
    """
    variants = r"_(g\d+|asym|e4m3|e5m2|tensor|group|block|stochastic|hadamard|square)(?=_)"
    return re.sub(variants, "", op.name)


FIRST_OF_FORM = {form(op): op for op in reversed(OPS.values())}


def first_empty_and_bare(op: Op) -> list[str]:
    """At most three samples of the first dtype: the first, one without rows, one left bare."""
    labels = [label for label, _ in op.samples()]
    dtype = labels[0].split("-")[0]
    empty = [label for label in labels if label.startswith(f"{dtype}-0")]
    bare = [label for label in labels if label.startswith(dtype) and label.endswith("-bare")]
    return list(dict.fromkeys([labels[0], *empty[:1], *bare[:1]]))


@pytest.mark.usefixtures("poisoned_memory")
class TestEveryOp:
    @parameterized.expand(EVERY_OP)
    def test_samples(self, _: str, op: Op) -> None:
        """One real call of each sample answers all of it: the fake, the reference and float64."""
        count = 0
        for _, args in op.samples():
            real = outcome(op, op.overload, args)
            self.fake_equals_real(op, args, real)
            self.real_equals_reference(op, args, real)
            count += 1
        alone = len(op.dtypes[op.inputs[0].name]) == 1 and not any(a.has_lead for a in op.inputs)
        assert count > 1 or alone

    def fake_equals_real(self, op: Op, args: Args, real: tuple[torch.Tensor, ...]) -> None:
        with FakeTensorMode() as mode:
            fake = as_tuple(
                op.overload(
                    *(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args)
                )
            )
        assert len(fake) + len(op.written) == len(real)
        assert all(real[i].shape == args[j].shape for i, j in enumerate(op.written, len(fake)))
        storages = [a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)]
        for got, want in zip(fake, real, strict=False):
            assert (got.shape, got.dtype, got.stride(), got.device) == (
                want.shape,
                want.dtype,
                want.stride(),
                want.device,
            )
            assert want.numel() == 0 or want.untyped_storage().data_ptr() not in storages
            assert want._base is None

    def real_equals_reference(self, op: Op, args: Args, real: tuple[torch.Tensor, ...]) -> None:
        wanted = outcome(op, op.reference, args)
        if op.written:
            assert all(
                same_bits(got, want) for got, want in zip(real[:-1], wanted[:-1], strict=True)
            )
            return
        for got, want, rule in zip(real, wanted, op.out, strict=True):
            if any(out in CODES for out in op.out) and rule != "dtype":  # that of floats beside
                assert same_bits(got, want)
            else:
                error = (got.double() - want.double()).norm()
                assert error.item() <= EPS[got.dtype] * want.double().norm().item()
        if any(out in CODES for out in op.out):
            return  # codes: held to the reference bit for bit
        (got,) = real
        exact = op.reference(*args, compute=torch.float64)
        assert exact.dtype == torch.float64
        error = (got.double() - exact).norm()
        # Between float32 and float64 a part of a cell may be rounded to the neighbour on its grid.
        eps = 2.0**-8 if op.name.endswith(("_lstm", "_gru")) else EPS[got.dtype]
        assert error.item() <= eps * exact.norm().item()

    @parameterized.expand(EVERY_OP)
    def test_an_input_that_needs_a_gradient_changes_no_value(self, _: str, op: Op) -> None:
        _, args = next(op.samples())
        if args[0].dtype.is_floating_point:
            wanting = (args[0].clone().requires_grad_(), *args[1:])
            if op.written:  # no result could tell that a gradient is lost
                with pytest.raises(NotImplementedError, match=r"call it under torch\.no_grad"):
                    op.overload(*fresh(op, wanting))
                return
            pairs = zip(as_tuple(op.overload(*wanting)), as_tuple(op.overload(*args)), strict=True)
            assert all(same_bits(got, want) for got, want in pairs)

    @parameterized.expand(EVERY_OP)
    def test_opcheck(self, _: str, op: Op) -> None:
        """Of the first dtype: rows, none, and with all left out that may be; of the other ops of a
        form rows alone, whose other samples' fakes are held by `test_samples`.
        """
        labels = first_empty_and_bare(op)
        for label, args in op.samples():
            if label in labels[: None if op is FIRST_OF_FORM[form(op)] else 1]:
                opcheck(op, args)

    @parameterized.expand([(op.name, op) for op in FIRST_OF_FORM.values()])
    @pytest.mark.long
    def test_opcheck_of_more_samples(self, _: str, op: Op) -> None:
        """The first of each other dtype."""
        first = {label.split("-")[0]: label for label, _ in reversed(list(op.samples()))}
        _, *others = reversed(first.values())
        for label, args in op.samples():
            if label in others:
                opcheck(op, args)

    @parameterized.expand(EVERY_OP)
    def test_vmap(self, _: str, op: Op) -> None:
        _, args = next(op.samples())
        for which, arg in enumerate(op.inputs):
            if arg.axes is None:
                continue
            stacked = list(args)
            stacked[which] = torch.stack([args[which], args[which]])
            in_dims = tuple(0 if i == which else None for i in range(len(args)))
            if op.written:
                self.vmap_of_written(op, args, which)
                continue
            mapped = torch.vmap(op.overload, in_dims=in_dims)(*stacked)
            for got, want in zip(as_tuple(mapped), as_tuple(op.overload(*args)), strict=True):
                alike(got, torch.stack([want, want]))

    def vmap_of_written(self, op: Op, args: Args, which: int) -> None:
        """With all that is written mapped; else elements would write to the same place."""
        in_dims = tuple(0 if i in {which, *op.written} else None for i in range(len(args)))
        given = tuple(
            arg if axis is None else torch.stack([arg, arg])
            for arg, axis in zip(args, in_dims, strict=True)
        )

        def call(*elements: Any) -> Any:
            op.overload(*elements)
            return elements[op.written[0]]  # a mapped function returns something

        torch.vmap(call, in_dims=in_dims)(*given)
        for i, want in zip(op.written, outcome(op, op.overload, args), strict=True):
            alike(given[i], torch.stack([want, want]))
        only = tuple(0 if i == which else None for i in range(len(args)))
        with pytest.raises(ValueError, match="is written in place"):
            torch.vmap(call, in_dims=only)(
                *(torch.stack([a, a]) if i == which else a for i, a in enumerate(args))
            )

    @parameterized.expand(EVERY_OP)
    def test_the_fast_check_agrees_with_the_one_that_explains(self, _: str, op: Op) -> None:
        _, args = next(op.samples())
        assert op._fits(*args)
        tensors = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor)]
        for i in tensors:
            value = args[i]
            wrong = [value.to(torch.int64), value[..., :-1], value.unsqueeze(-1)]
            if len(tensors) > 1:
                wrong.append(value.to("meta"))
            if value.dim():
                wrong.append(value.flatten()[0])
            for bad in wrong:
                changed = (*args[:i], bad, *args[i + 1 :])
                assert self.passes(op, changed) == self.explained(op, changed), (op.name, i)
        for i, arg in enumerate(op.inputs):
            if arg.kind in ("str", "ScalarType"):
                for other in (torch.int64, *op.dtypes["dtype"]) if arg.kind != "str" else ("", "?"):
                    changed = (*args[:i], other, *args[i + 1 :])
                    assert op._fits(*changed) == self.explained(op, changed), other

    def passes(self, op: Op, args: tuple[Any, ...]) -> bool:
        """What `require` asks before it explains."""
        return op._fits(*args) and (op.rule is None or op.rule(*args) is None)

    def explained(self, op: Op, args: tuple[Any, ...]) -> bool:
        """Whether `check` lets the arguments pass; if not, its error repeats the call."""
        try:
            op.check(*args)
        except (TypeError, ValueError) as error:
            said = str(error)
        else:
            return True
        assert f"qnn::{op.name}(" in said
        return False

    @parameterized.expand(EVERY_OP)
    def test_what_is_left_out_is_at_its_default(self, _: str, op: Op) -> None:
        """Torch drops it on the way to the kernel, to the fake and to the vmap rule."""
        _, args = next(op.samples())
        required = sum(not arg.optional for arg in op.inputs)
        given, whole = args[:required], (*args[:required], *op.tails[required])
        assert len(whole) == len(args)
        op.check(*given)
        for short, full in zip(as_tuple(op.fake(*given)), as_tuple(op.fake(*whole)), strict=True):
            assert (short.shape, short.dtype) == (full.shape, full.dtype)
        if op.written:
            return  # one that leaves something out has no mapped axis to write to
        mapped = torch.vmap(op.overload, in_dims=(0, *[None] * (required - 1)))
        stacked = as_tuple(mapped(args[0][None], *given[1:]))
        for y, short, full in zip(
            stacked, as_tuple(op.overload(*given)), as_tuple(op.overload(*whole)), strict=True
        ):
            assert same_bits(short, full)
            alike(y[0], full)


class TestGradients:
    """For every subset of requires_grad: what is asked for is there, and nothing else."""

    @parameterized.expand(
        itertools.product(("int8", "int8_weight"), (False, True), (False, True), (False, True))
    )
    def test_subsets(self, scheme: str, of_x: bool, with_bias: bool, of_bias: bool) -> None:
        import qnn.functional as F

        w, sw = F.quantize(torch.randn(9, 7), scheme)
        results = {}
        for compiled in (False, True):
            torch.manual_seed(1)
            x = torch.randn(2, 3, 7, requires_grad=of_x)
            bias = torch.randn(9, requires_grad=of_bias) if with_bias else None

            def run(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
                return F.linear(x, w, sw, bias, scheme=scheme)

            call = torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run
            y = call(x, bias)
            assert y.requires_grad == (of_x or (with_bias and of_bias))
            dy = torch.randn_like(y)
            if y.requires_grad:
                y.backward(dy)
            assert (x.grad is not None) == of_x
            if x.grad is not None:
                torch.testing.assert_close(x.grad, dy @ F.dequantize(w, sw))
            if bias is not None:
                assert (bias.grad is not None) == of_bias
                if bias.grad is not None:
                    torch.testing.assert_close(bias.grad, dy.sum((0, 1)))
            results[compiled] = (y.detach(), x.grad, None if bias is None else bias.grad)
        for eager, comp in zip(results[False], results[True], strict=True):
            assert (eager is None) == (comp is None)
            if eager is not None:
                assert torch.equal(eager, comp)
                assert eager.stride() == comp.stride()


class TestDeclaration:
    def setup_method(self) -> None:
        self.x = torch.randn(2, 3, 4)

    def declare(self, name: str, signature: str, **kwargs: Any) -> Op:
        def reference(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x * y[..., None]

        floats = (torch.float32,)
        declared = {"dtypes": {"x": floats, "y": floats}, "out": ("x",), "reference": reference}
        op = Op(name, signature, doc="", **{**declared, **kwargs})
        del OPS[name]  # the grids above walk what is shipped
        return op

    def test_leading_axes_alone(self) -> None:
        op = self.declare("test_scale", "x: ... k, y: ... -> ... k")
        x, y = torch.randn(2, 3, 4), torch.randn(2, 3)
        assert torch.equal(op.overload(x, y), x * y[..., None])
        assert op.fake(x, y).shape == (2, 3, 4)
        for bad in (torch.randn(2), torch.randn(3, 2), torch.randn(2, 3, 1)):
            assert not op._fits(x, bad)
            with pytest.raises(ValueError, match=r"y must begin with \(2, 3\)"):
                op.overload(x, bad)

    def test_an_optional_argument_names_no_new_axis(self) -> None:
        with pytest.raises(ValueError, match="the optional y is the first with n"):
            self.declare("test_optional", "x: ... k, y?: n -> ... k")

    @parameterized.expand(
        [
            ("x: ... k -> ... m", "no argument says the size of 'm' in the result y"),
            ("x: ... k, y: ... k-1 -> ... k", "'k-1' of y is not an axis"),
            ("x: ... k, y: ... k//2 -> ... k", "'k//2' of y is not an axis"),
            ("x: ... k, x: ... k -> ... k", "two arguments are called x"),
            ("x: ... k, in: ... k -> ... k", "'in' cannot name an argument"),
            ("x: ... k, z: ... k -> ... k", "dtypes lacks z"),
            ("x: ... k ... -> ... k", "'...' of x must come first"),
            ("x ... k -> ... k", "no ':' before its axes"),
            ("x: n k -> ... k", "no argument has the leading axes"),
            ("x: b h, y: b h -> b h-1", "'h-1' of y is not an axis"),
            ("x: b h, y: b k/2 -> b h", "no argument before y says the size of 'k' in k/2"),
            ("x: b h, y: h? -> b h", "y is marked after its axes; write 'y?: h'"),
            ("x: b h, n: str[] -> b h", "n is a list of str; only integers come in lists"),
            ("x: b h, n: int=two -> b h", "n has the default 'two', which is not int"),
            ("x: b h, n: bool=1 -> b h", "n has the default '1', which is not bool"),
            ("x: b h, n: float=a -> b h", "n has the default 'a', which is not float"),
            ("x: b h, n: int -> b f(h, n)", "the declaration has no function 'f'"),
            ("x: (b h)[2] -> b h", "'(b h)[2]' of x is not an axis"),
            ("x: b h -> ()", "no result, and no argument marked '!' that it writes to"),
            ("x!?: b h -> ()", "x is written, so it cannot be left out"),
            ("x: b, n!: int -> ()", "n is marked '!' and is not a tensor"),
            ("x!: (b h)[e] -> ()", "x is marked '!' and is a list; name each tensor"),
        ]
    )
    def test_a_mistake_is_an_error_of_the_declaration(self, signature: str, reason: str) -> None:
        with pytest.raises(ValueError, match=re.escape(reason)) as caught:
            self.declare("test_mistake", signature)
        assert f"test_mistake: signature {signature!r}" in str(caught.value)

    def test_a_convolution(self) -> None:
        """Integers, one or two to an argument, a flag, and sizes by a function."""

        def reference(
            x: torch.Tensor, weight: torch.Tensor, stride: Any, bias: Any, pad: int, flip: bool
        ) -> torch.Tensor:
            weight = weight.flip(-1) if flip else weight
            return nn.functional.conv2d(x, weight, bias, list(stride), pad)

        floats = (torch.float32,)
        op = self.declare(
            "test_conv2d",
            "x: b c h w, weight: o c kh kw, stride: int[2], bias?: o, pad: int=0, flip: bool=False "
            "-> b o out(h, kh, stride[0], pad) out(w, kw, stride[1], pad)",
            dtypes=dict.fromkeys(("x", "weight", "bias"), floats), reference=reference,
            sizes={"out": lambda size, kernel, step, pad: (size + 2 * pad - kernel) // step + 1},
            sample={"h": 8, "w": 9, "kh": 3, "kw": 2, "b": 2, "c": 3, "o": 4, "stride": [2, 1]},
        )  # fmt: skip
        assert op.schema == (
            "test_conv2d(Tensor x, Tensor weight, int[2] stride, Tensor? bias=None, int pad=0, "
            "bool flip=False) -> Tensor"
        )
        x, weight, bias = torch.randn(2, 3, 8, 9), torch.randn(4, 3, 3, 2), torch.randn(4)
        for args in ([2, 1], None, 0, False), ([1, 1], bias, 1, True), ([3, 2], bias, 2, False):
            op.require(x, weight, *args)
            got, want = op.overload(x, weight, *args), reference(x, weight, *args)
            assert torch.equal(got, want)
            assert op.fake(x, weight, *args).shape == want.shape
        assert torch.equal(op.overload(x, weight, 2), op.overload(x, weight, [2, 2]))
        bad = torch.randn(4, 2, 3, 2)
        assert not op._fits(x, bad, [1, 1], None, 0, False)
        with pytest.raises(ValueError, match=r"weight must be \[o, c, kh, kw\] with c = 3 as in x"):
            op.overload(x, bad, [1, 1])
        compiled = torch.compile(op.overload, fullgraph=True, backend="aot_eager", dynamic=True)
        for height in (8, 11):
            x = torch.randn(2, 3, height, 9)
            assert torch.equal(compiled(x, weight, [2, 1]), op.overload(x, weight, [2, 1]))
        for _, args in op.samples():
            assert op.fake(*args).shape == op.overload(*args).shape

    def test_a_grouped_linear(self) -> None:
        """Lists of tensors, as many as there are groups."""

        def reference(x: torch.Tensor, ws: list[torch.Tensor]) -> torch.Tensor:
            return torch.stack([a @ w.mT for a, w in zip(x, ws, strict=True)])

        floats = (torch.float32,)
        op = self.declare(
            "test_grouped", "x: e m k, ws: (n k)[e] -> e m n",
            dtypes={"x": floats, "ws": floats}, reference=reference,
        )  # fmt: skip
        assert op.schema == "test_grouped(Tensor x, Tensor[] ws) -> Tensor"
        x, ws = torch.randn(3, 5, 4), [torch.randn(6, 4) for _ in range(3)]
        want = torch.einsum("emk,enk->emn", x, torch.stack(ws))
        torch.testing.assert_close(op.overload(x, ws), want)
        assert op.fake(x, ws).shape == (3, 5, 6)
        op.require(x, ws)
        for bad, reason in (
            (ws[:2], r"ws must be \[n, k\] with e = 3 as in x, got 2"),
            ([*ws[:2], torch.randn(6, 5)], r"ws\[2\] must be \[n, k\] with k = 4 as in x"),
            ([*ws[:2], torch.randn(7, 4)], r"ws\[2\] must be \[n, k\] with n = 6 as in ws\[0\]"),
            ([], "ws must hold a tensor at least"),
        ):
            assert not op._fits(x, bad)
            with pytest.raises(ValueError, match=reason):
                op.overload(x, bad)
        with pytest.raises(TypeError, match=r"ws\[1\] must be one of torch.float32"):
            op.overload(x, [ws[0], ws[1].double(), ws[2]])
        compiled = torch.compile(lambda x, ws: op.overload(x, ws), fullgraph=True, backend="eager")
        assert torch.equal(compiled(x, ws), op.overload(x, ws))
        _, args = next(op.samples())
        op.require(*args)

    def test_choices_and_defaults(self) -> None:
        def reference(x: torch.Tensor, mode: str, out: torch.dtype) -> torch.Tensor:
            return (-x if mode == "minus" else x + 0).to(out)

        floats = (torch.float32, torch.float64)
        op = self.declare(
            "test_choice", "x: ..., mode?: str, out?: dtype -> ...", reference=reference,
            dtypes={"x": floats, "out": floats}, out=("out",),
            choices={"mode": ("plus", "minus")},
        )  # fmt: skip
        assert op.schema == 'test_choice(Tensor x, str mode="plus", ScalarType out=float) -> Tensor'
        assert torch.equal(op.overload(self.x), self.x)
        assert torch.equal(op.overload(self.x, mode="minus"), -self.x)
        assert op.overload(self.x, out=torch.float64).dtype == torch.float64
        with pytest.raises(
            ValueError,
            match=r"test_choice\(x=float32\[2, 3, 4\], mode='times'\): "
            r"mode must be one of 'plus', 'minus', got 'times'",
        ):
            op.overload(self.x, "times")
        with pytest.raises(TypeError, match=r"out must be one of torch.float32, torch.float64"):
            op.overload(self.x, "plus", torch.int8)

    def test_the_dtype_of_another_argument(self) -> None:
        dtypes = {"x": (torch.float32, torch.float64), "y": "x"}
        op = self.declare("test_same", "x: ... k, y: ... -> ... k", dtypes=dtypes)
        y = torch.randn(2, 3)
        assert op.overload(self.x.double(), y.double()).dtype == torch.float64
        with pytest.raises(
            TypeError, match=r"y must be torch.float64 as x, got torch.float32; cast it"
        ):
            op.overload(self.x.double(), y)


class TestLimits:
    """int32 sums the products of an axis up to its limit; a longer row is refused."""

    @parameterized.expand(
        [
            ("int8_linear", int8.INT8_MAX_K),
            ("int8_rows_linear", int8.INT8_ROWS_MAX_K),
            ("int8_static_linear", INT8_STATIC_MAX_K),
        ]
    )
    def test_linear(self, name: str, limit: int) -> None:
        op = OPS[name]
        for k in (limit, limit + 1):
            w, one = torch.full((1, k), -128, dtype=torch.int8), torch.ones(1, 1)
            given = {
                "int8_linear": (torch.ones(1, k), w, one),
                "int8_rows_linear": (w, one, w, one),
                "int8_static_linear": (
                    torch.full((1, k), 1e3), w, one, torch.ones(1), w[0, :1],
                ),
            }[name]  # fmt: skip
            if k == limit:
                want = op.reference(*given, compute=torch.float64)
                torch.testing.assert_close(op.overload(*given).double(), want, rtol=1e-6, atol=0)
                continue
            for call in (op.overload, op.fake, op.call, op._checked(op.reference)):
                words = rf"k must be at most {limit}, beyond .* got {limit + 1}; use .* int8_weight"
                with pytest.raises(ValueError, match=words):
                    call(*given)

    @parameterized.expand(["int4_quantize", "int4_weight_linear", "int4_g32_linear_dgrad"])
    def test_whole_groups(self, name: str) -> None:
        """A row that is not whole groups is refused, where a group takes no zeros at its end."""
        op = OPS[name]
        ((axis, multiple),) = op.multiples.items()
        sizes = {"n": 3, axis: multiple + 1}
        args = [
            torch.empty([each.size(sizes) for each in arg.tail], dtype=sample.dtype)
            for arg, sample in zip(op.inputs, next(op.samples())[1], strict=True)
            if not arg.optional
        ]
        for call in (op.overload, op.fake, op.call, op._checked(op.reference)):
            words = f"multiple of {multiple}, got {multiple + 1}; pad to {2 * multiple} or exclude"
            with pytest.raises(ValueError, match=f"{axis} must be a {words} the layer"):
                call(*args)

    @parameterized.expand(itertools.product(("int8", "int8_static"), ("lstm", "gru"), "ih"))
    def test_recurrent(self, scheme: str, cell: str, axis: str) -> None:
        """Each operand by itself; of a static grid the codes that its table has."""
        op = OPS[f"{scheme}_{cell}"]
        limit = op.limits[axis]
        assert limit == get_scheme(scheme).max_in_features
        sizes = {"t": 1, "b": 1, "i": 1, "h": 1, "p": 1, axis: limit + 1}
        args = [
            torch.empty([axis.size(sizes) for axis in arg.tail], device="meta", dtype=sample.dtype)
            for arg, sample in zip(op.inputs, next(op.samples())[1], strict=True)
            if not arg.optional
        ]
        with pytest.raises(ValueError, match=f"{axis} must be at most {limit}, beyond which"):
            op.check(*args)

    def test_a_table_with_large_codes_has_a_smaller_limit(self) -> None:
        op = OPS["int8_static_gru"]
        args = list(next(op.samples())[1])
        names = [arg.name for arg in op.inputs]
        k = 20_000
        args[names.index("x")] = torch.zeros(1, 3, k)
        args[names.index("w_ih")] = torch.zeros(63, k, dtype=torch.int8)
        args[names.index("lengths")] = None
        op.overload(*args)
        args[names.index("table")][0] = torch.tensor([0.03, -900.0, 0.0, 255.0])
        for call in (op.overload, op.reference):
            with pytest.raises(ValueError, match="codes of up to 1155, of which an int32 sum"):
                call(*args)


class TestSignature:
    def test_parse(self) -> None:
        inputs, outputs = parse_signature(
            "op", "x: ... k, w: n k, bias?: n, how?: str, dtype?: dtype -> ... n"
        )
        x, _, bias, how, dtype = inputs
        assert (x.name, x.has_lead, [a.name for a in x.tail]) == ("x", True, ["k"])
        assert (bias.optional, str(bias), bias.kind) == (True, "[n]", "Tensor")
        assert (how.axes, how.kind, dtype.kind) == (None, "str", "ScalarType")
        assert [str(each) for each in outputs] == ["[..., n]"]

    @parameterized.expand(
        [
            ("k", 300), ("7", 7), ("k/128", 3), ("k/512>2", 2), ("p*2", 10), ("k/16*8", 152),
            ("t*b*p+b*2", 48), ("f(k, p)", 305),
        ]
    )  # fmt: skip
    def test_size_of_an_axis(self, text: str, size: int) -> None:
        """By numbers and by the source of the fast check."""
        sizes, functions = {"k": 300, "p": 5, "t": 2, "b": 4}, {"f": lambda k, p: k + p}
        axis = parse_axis(text)
        assert axis.size(sizes, functions) == size
        assert eval(axis.source(), {**sizes, **functions}) == size  # noqa: S307

    def test_what_follows_an_optional_argument_is_optional(self) -> None:
        with pytest.raises(ValueError, match="dtype must be optional, as bias is"):
            parse_signature("op", "x: ... n, bias?: n, dtype: dtype -> ... n")

    def test_the_fast_check_reads_as_its_page_says(self) -> None:
        inputs, _ = parse_signature("op", "x: ... k, w: n k -> ... n")
        floats = (torch.float32,)
        source = source_of(inputs, {"x": floats, "w": floats}, {}, {})
        page = inspect.getdoc(fast_check) or ""
        assert textwrap.indent(source, "    ") in page

    def test_schema(self) -> None:
        assert OPS["int8_linear"].schema == (
            "int8_linear(Tensor x, Tensor w, Tensor sw, Tensor? bias=None, "
            'Tensor? residual=None, str activation="none") -> Tensor'
        )
        assert OPS["int8_quantize"].schema == "int8_quantize(Tensor x) -> (Tensor, Tensor)"
        assert OPS["int8_kv_append"].schema == (
            "int8_kv_append(Tensor k, Tensor v, Tensor(c!) keys, Tensor(d!) key_scale, "
            "Tensor(e!) values, Tensor(f!) value_scale, Tensor(g!) length) -> ()"
        )

    def test_no_arrow(self) -> None:
        with pytest.raises(ValueError, match="has no '->'"):
            parse_signature("op", "x: n")

    def test_errors_repeat_the_call(self) -> None:
        w, sw = torch.zeros(4, 8, dtype=torch.int8), torch.ones(4, 1)
        with pytest.raises(
            ValueError,
            match=r"qnn::int8_linear\(x=float32\[2, 7\], w=int8\[4, 8\], sw=float32\[4, 1\]\): "
            r"w must be \[n, k\] with k = 7 as in x, got \[4, 8\]",
        ):
            torch.ops.qnn.int8_linear(torch.zeros(2, 7), w, sw, None)
        integers = torch.zeros(2, 8, dtype=torch.int64)
        with pytest.raises(TypeError, match=r"x must be one of torch.float32"):
            F.linear(integers, w, sw)
        # The op itself, where it is C++: torch lets that raise a ValueError, not a TypeError.
        with pytest.raises((TypeError, ValueError), match=r"x must be one of torch.float32"):
            torch.ops.qnn.int8_linear(integers, w, sw, None)
        with pytest.raises(ValueError, match=r"sw must be \[n, 1\], got \[4\]"):
            torch.ops.qnn.int8_linear(torch.zeros(2, 8), w, torch.ones(4), None)

"""`qnn.Int8KVCache`: what is appended, what is attended to, in graphs, and what is refused."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from parameterized import parameterized
from torch.nn import functional as TF

import qnn
import qnn.functional as F
from qnn.kernels import OPS

from .common import DTYPES, same_bits

B, H, G, S, D, E = 2, 6, 2, 40, 64, 48


def tokens(count: int = S, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values."""
    make = torch.Generator().manual_seed(0)
    shapes = ((B, H, count, D), (B, G, count, D), (B, G, count, E))
    return tuple(torch.randn(shape, generator=make).to(dtype) for shape in shapes)


def some(of: tuple[torch.Tensor, ...], start: int, stop: int) -> list[torch.Tensor]:
    return [each[:, :, start:stop] for each in of]


def cache(**sizes: Any) -> qnn.Int8KVCache:
    given = {"batch_size": B, "max_seq_len": S, "num_kv_heads": G, "head_dim": D, "value_dim": E}
    return qnn.Int8KVCache(**{**given, **sizes})


def over_floats(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)


class TestMeaning:
    @parameterized.expand(DTYPES)
    def test_the_bits_of_attention_over_the_floats(self, dtype: torch.dtype) -> None:
        """A prompt, a chunk, then a token at a time."""
        c, all_of = cache(), tokens(dtype=dtype)
        q, k, v = all_of
        assert same_bits(c(*some(all_of, 0, 20)), over_floats(*some(all_of, 0, 20), is_causal=True))
        seen = torch.ones(25, 25, dtype=torch.bool).tril()[20:]
        got = c(*some(all_of, 20, 25))
        want = over_floats(q[:, :, 20:25], k[:, :, :25], v[:, :, :25], attn_mask=seen)
        assert same_bits(got, want)
        for i in range(25, 32):
            got = c(*some(all_of, i, i + 1))
            want = over_floats(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1])
            assert same_bits(got, want)
        assert c.length.tolist() == [32, 32]

    def test_near_float_attention(self) -> None:
        c, (q, k, v) = cache(), tokens()
        c.update(k, v)
        want = TF.scaled_dot_product_attention(q[:, :, -1:], k, v, enable_gqa=True)
        assert qnn.sqnr(c.attend(q[:, :, -1:]), want) > 36

    def test_the_parts(self) -> None:
        """Codes and scales are those of `quantize`, and only the appended places change."""
        c, (_, k, v) = cache(), tokens()
        c.key_scale.fill_(7.0)
        c.update(k[:, :, :3], v[:, :, :3])
        c.update(k[:, :, 3:5], v[:, :, 3:5])
        for codes, scale, x in ((c.keys, c.key_scale, k), (c.values, c.value_scale, v)):
            want, step = F.quantize(x[:, :, :5], scheme="int8")
            assert same_bits(codes[:, :, :5], want)
            assert same_bits(scale[:, :, :5], step[..., 0])
            assert not codes[:, :, 5:].any()
        assert bool((c.key_scale[:, :, 5:] == 7.0).all())

    def test_rows_without_codes_and_bad_ones(self) -> None:
        c, (q, k, v) = cache(), tokens(4)
        k, v = k.clone(), v.clone()
        k[:, :, 0], v[:, :, 1] = 0, 0
        v[0, 1, 2, 5], k[1, 0, 3, 0] = math.nan, math.inf
        c.update(k, v)
        assert not c.key_scale[:, :, 0].any()
        assert not c.value_scale[:, :, 1].any()
        assert c.key_scale[0, 1, 2].isnan()
        assert c.key_scale[1, 0, 3].isnan()
        y = c.attend(q, is_causal=True)
        want = over_floats(q, k, v, is_causal=True)
        assert same_bits(y.nan_to_num(7e7), want.nan_to_num(7e7))
        bad = y.isnan().any(-1)  # of the heads of queries that share the keys, who see it
        assert bool(bad[0, 3:, 2:].all())
        assert bool(bad[1, :3, 3:].all())
        assert int(bad.sum()) == 3 * 2 + 3 * 1

    def test_sequences_of_different_lengths(self) -> None:
        c, all_of = cache(), tokens()
        q, k, v = all_of
        c.update(k[:, :, :20], v[:, :, :20])
        c.length[0] = 11
        y = c.attend(q[:, :, :3])
        for i, length in enumerate((11, 20)):
            seen = torch.ones(length, length, dtype=torch.bool).tril()[-3:]
            rows = [k[i : i + 1, :, :length], v[i : i + 1, :, :length]]
            want = over_floats(q[i : i + 1, :, :3], *rows, attn_mask=seen)
            assert same_bits(y[i : i + 1], want)
        c.update(k[:, :, 20:22], v[:, :, 20:22])
        assert c.length.tolist() == [13, 22]
        step = F.quantize(k[:, :, 20:22], scheme="int8")[1][..., 0]
        assert same_bits(c.key_scale[0, :, 11:13], step[0])
        assert same_bits(c.key_scale[1, :, 20:22], step[1])

    def test_masks(self) -> None:
        """Of all places, or of the tokens alone; bool, or added; what is after them is hidden."""
        c, (q, k, v) = cache(), tokens()
        c.update(k[:, :, :30], v[:, :, :30])
        c.keys[:, :, 30:], c.key_scale[:, :, 30:], c.value_scale[:, :, 30:] = 99, math.nan, 1e30
        make = torch.Generator().manual_seed(1)
        seen = torch.rand(B, 1, 4, S, generator=make) > 0.3
        seen[..., 0] = True
        added = torch.randn(1, H, 1, S, generator=make)
        for mask in (seen, added, seen[..., :1].expand(B, 1, 4, 1)):
            got = c.attend(q[:, :, :4], mask)
            narrow = mask if mask.shape[-1] == 1 else mask[..., :30]
            want = over_floats(q[:, :, :4], k[:, :, :30], v[:, :, :30], attn_mask=narrow)
            assert same_bits(got, want)
            assert same_bits(c.attend(q[:, :, :4], narrow), want)

    def test_no_tokens(self) -> None:
        c, (q, _, _) = cache(), tokens()
        assert not c.attend(q[:, :, :1]).any()

    def test_all_see_all(self) -> None:
        c, (q, k, v) = cache(), tokens()
        c.update(k, v)
        assert same_bits(c.attend(q, is_causal=False), over_floats(q, k, v))
        assert same_bits(c.attend(q, is_causal=False, scale=0.5), over_floats(q, k, v, scale=0.5))


class TestState:
    def test_crop_reset_and_reorder(self) -> None:
        c, all_of = cache(), tokens()
        q, k, v = all_of
        c.update(k[:, :, :20], v[:, :, :20])
        c.crop(-3)
        assert c.length.tolist() == [17, 17]
        c.crop(12)
        assert c.length.tolist() == [12, 12]
        where = c.keys.data_ptr()
        c.reorder(torch.tensor([1, 1]))
        assert c.keys.data_ptr() == where
        got = c.attend(q[:1, :, :1].expand(B, -1, -1, -1))
        want = over_floats(q[:1, :, :1], k[1:, :, :12], v[1:, :, :12])
        assert same_bits(got, want.expand_as(got))
        c.reorder(torch.tensor([0]))
        assert c.keys.shape[0] == c.length.shape[0] == 1
        assert same_bits(c.attend(q[:1, :, :1]), want)
        c.reset()
        assert c.length.tolist() == [0]

    def test_memory(self) -> None:
        """2 · D + 8 bytes a place and head."""
        c = cache(head_dim=128, value_dim=128)
        parts = (c.keys, c.key_scale, c.values, c.value_scale)
        held = sum(part.numel() * part.element_size() for part in parts)
        floats = 2 * B * G * S * 128 * 4
        assert held == B * G * S * (2 * 128 + 8)
        assert held / floats < 0.26

    def test_casts_and_copies(self) -> None:
        c, (q, k, v) = cache(), tokens()
        c.update(k[:, :, :5], v[:, :, :5])
        other = copy.deepcopy(c).bfloat16()
        assert other.key_scale.dtype == other.value_scale.dtype == torch.float32
        assert same_bits(other.attend(q[:, :, :1]), c.attend(q[:, :, :1]))
        assert not c.state_dict()
        assert cache(device="meta").keys.is_meta
        assert repr(c) == "Int8KVCache(2, 40, 2, 64, 48)"

    def test_autograd_sees_that_it_is_written(self) -> None:
        c, (_, k, v) = cache(), tokens()
        before = c.keys._version
        c.update(k[:, :, :1], v[:, :, :1])
        OPS["int8_kv_append"].overload(k[:, :, :1], v[:, :, :1], c.keys, c.key_scale, c.values,
                                       c.value_scale, c.length)  # fmt: skip
        assert c.keys._version == before + 2
        with torch.inference_mode():
            inside = cache()
            inside.update(k[:, :, :1], v[:, :, :1])


class TestErrors:
    def test_words(self) -> None:
        c, (q, k, v) = cache(), tokens()
        c.update(k[:, :, :39], v[:, :, :39])
        state = c.keys.clone()
        for run, kind, words in (
            (lambda: c.update(k[:, :, :2], v[:, :, :2]), ValueError,
             "the cache holds 40 tokens at most: there are 39, and 2 more; make it larger"),
            (lambda: c.update(k[:, :1, :1], v[:, :1, :1]), ValueError, "keys must be"),
            (lambda: c.update(k[:, :, :1].double(), v[:, :, :1]), TypeError, "v must be"),
            (lambda: c.attend(q[0]), ValueError, r"query must be \[B, H, L, D\]"),
            (lambda: c.attend(q[:, :5, :1]), ValueError, "must divide those of q, 5, got 2"),
            (lambda: c.attend(torch.ones(B, H, 40, D)), ValueError,
             "length must be at least 40, got 39; append their keys and values first"),
            (lambda: c.attend(q[:, :, :2], torch.ones(3, 40)), ValueError, "attn_mask must broad"),
            (lambda: c.attend(q[:, :, :2], torch.ones(2, 40), True), ValueError, "exclude each"),
            (lambda: c.attend(q[:, :, :1], torch.ones(1, 30)), ValueError,
             "length must be from 0 to 30, the tokens that the cache holds, got 39"),
            (lambda: c.attend(q[:, :, :1].requires_grad_()), NotImplementedError, "is for infer"),
            (lambda: c.update(k[:, :, :1], v[:, :, :1].requires_grad_()), NotImplementedError,
             "no gradient with respect to v. It writes codes in place"),
            (lambda: cache(max_seq_len=0), ValueError, "max_seq_len must be at least 1, got 0"),
        ):  # fmt: skip
            with pytest.raises(kind, match=words):
                run()
        assert same_bits(c.keys, state)
        assert c.length.tolist() == [39, 39]


class TestGraphs:
    @parameterized.expand([("inductor",), ("aot_eager",)])
    def test_one_graph_for_every_length(self, backend: str) -> None:
        c, all_of = cache(), tokens()
        frames = torch._dynamo.testing.CompileCounterWithBackend(backend)
        step = torch.compile(c, backend=frames, fullgraph=True)
        want = cache()
        with torch.no_grad():
            c(*some(all_of, 0, 20)), want(*some(all_of, 0, 20))
            where = c.keys.data_ptr()
            for i in range(20, 26):
                one = [each.contiguous() for each in some(all_of, i, i + 1)]
                assert same_bits(step(*one), want(*one))
        assert frames.frame_count == 1
        assert c.keys.data_ptr() == where
        assert same_bits(c.keys, want.keys)
        assert c.length.tolist() == [26, 26]

    def test_it_appends_in_place(self) -> None:
        """Functionalised, and written in place again: nothing of the cache is copied."""
        from torch._inductor.utils import run_and_get_code

        c, all_of = cache(), tokens()
        with torch.no_grad():
            _, (code,) = run_and_get_code(torch.compile(c, fullgraph=True), *some(all_of, 0, 1))
        assert code.count("int8_kv_append.default(") == 1
        assert code.count("int8_kv_attention.default(") == 1
        made = re.findall(r"= empty_strided_cpu\(\(([^)]*)\)", code)
        assert f"{B}, {G}, {S}, {D}" not in made
        assert ".copy_(" not in code
        assert "aten.clone" not in code

    def test_the_node_has_its_scheme(self) -> None:
        c, all_of = cache(), tokens()
        found: list[Any] = []

        def look(graph: torch.fx.GraphModule, _: Any) -> Any:
            found.extend(n for n in graph.graph.nodes if n.op == "call_function")
            return graph

        with torch.no_grad():
            torch.compile(c, backend=look, fullgraph=True)(*some(all_of, 0, 1))
        packed = torch.ops.higher_order.invoke_quant_packed
        assert [n.kwargs["scheme"] for n in found if n.target is packed] == ["int8"]
        assert torch.ops.qnn.int8_kv_append.default in {n.target for n in found}

    def test_a_cache_that_is_full_says_so(self) -> None:
        c, all_of = cache(max_seq_len=1), tokens()
        step = torch.compile(c, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            step(*some(all_of, 0, 1))
            with pytest.raises(ValueError, match="holds 1 tokens at most"):
                step(*some(all_of, 1, 2))

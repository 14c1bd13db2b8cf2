from __future__ import annotations

import json
import re

import pytest
import torch
from torch import nn

import qnn

from .common import forked


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(10, 16)
        self.rnn = nn.RNN(16, 16)
        self.attention = nn.MultiheadAttention(16, 2)
        self.conv = nn.Conv1d(16, 16, 3)
        self.norm = nn.LayerNorm(16)
        self.first = nn.Linear(16, 32)
        self.second = nn.Linear(32, 16, bias=False)
        self.scale = nn.Parameter(torch.ones(3))


class TestSummary:
    def setup_method(self) -> None:
        self.model = qnn.convert(Mixed(), exclude="second")
        self.summary = qnn.summary(self.model)
        self.rows = {row.name: row for row in self.summary.rows}

    def test_takes_models(self) -> None:
        with pytest.raises(TypeError, match=r"qnn\.summary takes an nn\.Module, got str"):
            qnn.summary("model.pt")  # type: ignore[arg-type]

    def test_every_parameter_is_counted_once(self) -> None:
        held = sum(t.numel() * t.element_size() for t in self.model.state_dict().values())
        assert self.summary.bytes_after == held
        floats = sum(t.numel() * t.element_size() for t in Mixed().state_dict().values())
        assert self.summary.bytes_before == floats
        tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
        tied[1].weight = tied[0].weight
        assert qnn.summary(qnn.convert(tied)).bytes_after == 16 + 16

    def test_rows(self) -> None:
        row = self.rows["first"]
        assert (row.layer, row.scheme, row.shape) == ("QLinear", "int8", (32, 16))
        assert (row.bytes_before, row.bytes_after) == (32 * 17 * 4, 32 * (16 + 4 + 4))
        assert "cpu: " in str(row.backend)
        assert row.reason is None
        assert self.rows["second"].reason == "matches the exclude pattern 'second'"

    def test_nothing_is_skipped_without_a_reason(self) -> None:
        for row in self.summary.rows:
            assert row.backend or row.reason, row
        for name in ("rnn", "attention", "conv", "emb", "norm", ""):
            assert name in self.rows

    def test_text_and_dict(self) -> None:
        text = str(self.summary)
        assert text == repr(self.summary)
        assert text.startswith("name")
        assert "there is no quantised nn.RNN" in text
        assert len(text.splitlines()) <= len(self.rows) + len(self.summary.totals) + 7
        data = json.loads(json.dumps(self.summary.to_dict()))
        assert len(data["totals"]) == len(self.summary.totals)
        assert len(data["rows"]) == len(self.rows)
        assert data["bytes_after"] == self.summary.bytes_after

    def test_totals_by_reason(self) -> None:
        totals = self.summary.totals
        left = [row for row in self.summary.rows if row.reason is not None]
        assert sum(total.bytes for total in totals) == sum(r.bytes_after for r in left)
        assert sum(total.layers for total in totals) == len(left)
        assert [t.bytes for t in totals] == sorted((t.bytes for t in totals), reverse=True)
        ties = nn.ModuleDict({name: nn.Linear(8, 8, bias=False) for name in "abcd"})
        ties["x"], ties["y"] = nn.Embedding(8, 8), nn.Embedding(8, 8)
        ties["x"].weight, ties["y"].weight = ties["a"].weight, ties["b"].weight
        totals = qnn.summary(qnn.convert(ties)).totals
        assert [(t.layers, t.bytes) for t in totals] == [(2, 512), (2, 0)]
        assert "its weight is tied to (Embedding)" in totals[0].reason

    def test_what_is_probably_a_weight(self) -> None:
        class Experts(nn.Module):
            def __init__(self, width: int) -> None:
                super().__init__()
                self.up = nn.Parameter(torch.ones(4, width, 16))
                self.pos_embed = nn.Parameter(torch.ones(1, 7, 16))
                self.gain = nn.Parameter(torch.ones(1, 1, 16))

        class Router(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight, self.other = (nn.Parameter(torch.ones(4, 16)) for _ in "ab")

        table = qnn.summary(nn.Sequential(Experts(8), Experts(32), Router()))
        words = [str(row.reason) for row in table.rows]
        assert words[0] == (
            "Experts has no quantised layer; up [4, 8, 16] (2.0 kB) is probably a weight that "
            "stays float"
        )
        assert re.search(r"weight \[4, 16\] .*, other \[4, 16\] .* each is probably a", words[2])
        reasons = [total.reason for total in table.totals]
        assert reasons == ["Experts has no quantised layer", "Router has no quantised layer"]

    def test_specific_reasons(self) -> None:
        model = nn.Sequential(nn.MultiheadAttention(8, 2, kdim=4, vdim=6), nn.LazyLinear(3))
        model.append(nn.LazyConv1d(3, 3)).append(nn.LazyBatchNorm1d())
        words = {row.name: str(row.reason) for row in qnn.summary(model).rows}
        assert words["0"] == "not converted"
        assert "weight nn.MultiheadAttention, in float, only reads" in words["0.out_proj"]
        for name in "123":
            assert "run one batch first" in words[name]

    def test_float_and_meta_models(self) -> None:
        rows = qnn.summary(nn.Sequential(nn.Linear(2, 2))).rows
        assert [row.reason for row in rows] == ["not converted"]
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(2, 2))
        assert "meta" in str(qnn.summary(qnn.convert(model)).rows[0].backend)
        assert qnn.summary(nn.ReLU()).rows == []

    def test_summary_and_convert_leave_no_pack(self) -> None:
        out = forked(
            """
            import torch, qnn
            from qnn.kernels.cpu import pack
            from torch import nn
            before = pack.count()
            model = qnn.convert(nn.Sequential(nn.Linear(512, 512)))
            str(qnn.summary(model)), repr(model)
            print(pack.count() - before)
            """
        )
        assert out.strip() == "0"

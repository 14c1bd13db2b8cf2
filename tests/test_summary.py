from __future__ import annotations

import json
import unittest

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


class TestSummary(unittest.TestCase):
    def setUp(self) -> None:
        self.model = qnn.convert(Mixed(), exclude="second")
        self.summary = qnn.summary(self.model)
        self.rows = {row.name: row for row in self.summary.rows}

    def test_every_parameter_is_counted_once(self) -> None:
        held = sum(t.numel() * t.element_size() for t in self.model.state_dict().values())
        self.assertEqual(self.summary.bytes_after, held)
        floats = sum(t.numel() * t.element_size() for t in Mixed().state_dict().values())
        self.assertEqual(self.summary.bytes_before, floats)
        tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
        tied[1].weight = tied[0].weight
        self.assertEqual(qnn.summary(qnn.convert(tied)).bytes_after, 16 + 16)

    def test_rows(self) -> None:
        row = self.rows["first"]
        self.assertEqual((row.layer, row.scheme, row.shape), ("QLinear", "int8", (32, 16)))
        self.assertEqual((row.bytes_before, row.bytes_after), (32 * 17 * 4, 32 * (16 + 4 + 4)))
        self.assertIn("cpu: ", str(row.backend))
        self.assertIsNone(row.reason)
        self.assertEqual(self.rows["second"].reason, "matches the exclude pattern 'second'")

    def test_nothing_is_skipped_without_a_reason(self) -> None:
        for row in self.summary.rows:
            self.assertTrue(row.backend or row.reason, row)
        for name in ("rnn", "attention", "conv", "emb", "norm", ""):
            self.assertIn(name, self.rows)

    def test_text_and_dict(self) -> None:
        text = str(self.summary)
        self.assertEqual(text, repr(self.summary))
        self.assertTrue(text.startswith("name"))
        self.assertIn("there is no quantised nn.RNN", text)
        self.assertLessEqual(len(text.splitlines()), len(self.rows) + 4)
        data = json.loads(json.dumps(self.summary.to_dict()))
        self.assertEqual(len(data["rows"]), len(self.rows))
        self.assertEqual(data["bytes_after"], self.summary.bytes_after)

    def test_float_and_meta_models(self) -> None:
        rows = qnn.summary(nn.Sequential(nn.Linear(2, 2))).rows
        self.assertEqual([row.reason for row in rows], ["not converted"])
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(2, 2))
        self.assertIn("meta", str(qnn.summary(qnn.convert(model)).rows[0].backend))
        self.assertEqual(qnn.summary(nn.ReLU()).rows, [])

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
        self.assertEqual(out.strip(), "0")

"""State that a graph writes anew, held in integers; the numbers are those of the list of
behaviours.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import qnn
from qnn.pt2e import convert_pt2e, prepare_pt2e

from .pt2e import ACT, SIGNED, annotate, aten, ops
from .test_pt2e_rules import Annotates


class State(nn.Module):
    """A state that two operators read, and that ends in a copy."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.s, self.l = nn.Buffer(torch.zeros(3, 4)), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.l(x + self.s) + self.s.relu())
        self.write(y)
        return y * 2

    def write(self, y: torch.Tensor) -> None:
        self.s.copy_(y)


def write(gm: Any, read: Any = SIGNED) -> None:
    """The state is read on a grid and written on another."""
    for node in gm.graph.nodes:
        if node.target in (aten.add.Tensor, aten.relu.default):
            annotate(node, {each: read for each in node.args if str(each.target) == "s"})
        if node.target is aten.tanh.default:
            annotate(node, {}, ACT)


def prepared(model: nn.Module, x: torch.Tensor, read: Any = SIGNED) -> Any:
    program = torch.export.export(model.eval(), (x,))
    gm = prepare_pt2e(program, Annotates(lambda gm: write(gm, read)))
    return qnn.calibrate(gm, [torch.randn(3, 4) * 2 for _ in range(20)], progress=False)


@pytest.mark.parametrize("read", [ACT, SIGNED], ids=["one_grid", "two_grids"])
@pytest.mark.parametrize("form", ["layers", "qdq"])
@torch.no_grad()
def test_b172_the_grid_of_the_write_serves_all_reads(read: Any, form: Any) -> None:
    x = torch.randn(3, 4)
    gm = prepared(model := State(), x, read)
    done = convert_pt2e(gm, form=form, fold_quantize_into_mutable_buffers=True)
    assert done.s.dtype == torch.uint8
    assert dict(done.named_buffers())["s"] is done.s
    (quantize,) = [
        n for n in done.graph.nodes if "quantize_per_tensor" in n.name and n.name[0] == "q"
    ]
    (copied,) = [n for n in done.graph.nodes if n.target is aten.copy_.default]
    assert copied.args[1] is quantize
    grids = {n.args[1:] for n in done.graph.nodes if "dequantize_per_tensor" in n.name}
    assert grids == {quantize.args[1:]}
    program = torch.export.export(copy.deepcopy(done), (x,)).run_decompositions()
    assert "s" in {spec.target for spec in program.graph_signature.output_specs}
    again = program.module()
    for _ in range(4):
        x = torch.randn(3, 4)
        want, got = model(x), done(x)
        assert qnn.sqnr(want, got) > 25
        assert torch.equal(got, again(x))
        assert done.s.dtype == again.s.dtype == torch.uint8


def test_b173_off_by_default_and_never_without_copy() -> None:
    class Adds(State):
        def write(self, y: torch.Tensor) -> None:
            self.s.add_(y)

    class Late(State):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + self.s

    x = torch.randn(3, 4)
    assert convert_pt2e(prepared(State(), x)).s.dtype == torch.float32
    for kind, why in ((Adds, "and not once by copy_"), (Late, "the result of copy_ is read")):
        done = convert_pt2e(prepared(kind(), x), fold_quantize_into_mutable_buffers=True)
        assert done.s.dtype == torch.float32
        (row,) = [row for row in qnn.summary(done).rows if row.name == "s"]
        assert why in str(row.reason)
        assert "copy_" in ops(done) or kind is Adds


def test_b174_b98_aliases_and_flags() -> None:
    gm = prepared(State(), torch.randn(3, 4))
    gm.register_buffer("other", gm.s[:1])
    with pytest.raises(ValueError, match="memory is that of 'other' too"):
        convert_pt2e(gm, fold_quantize_into_mutable_buffers=True)
    with pytest.raises(ValueError, match="leave fold_quantize True"):
        convert_pt2e(gm, fold_quantize=False, fold_quantize_into_mutable_buffers=True)
    with pytest.raises(ValueError, match="must be True or False, got 1"):
        convert_pt2e(gm, fold_quantize_into_mutable_buffers=1)  # type: ignore[arg-type]

"""The table of layers × schemes × modes: complete, and true of each layer that it names."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import qnn
from qnn.passes import regions

ROOT = Path(__file__).resolve().parent.parent


def docs_module(name: str) -> Any:
    path = ROOT / "docs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"docs_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


support = docs_module("support")
ROWS = list(support.supported())


def is_compiled(row: Any) -> bool:
    """Whether Dynamo compiles it here: the first row of a layer, and of a kind's every pair of
    classes of formats; int4 with other groups is the same code. Every row is exported.
    """

    def formats(each: Any) -> tuple[type, type]:
        return type(each.scheme.weight), type(each.scheme.activation)

    def first(key: Any) -> bool:
        return next(each for each in ROWS if key(each) == key(row)) is row

    return first(lambda each: each.layer) or first(lambda each: (each.kind.name, formats(each)))


def test_every_scheme_and_kind_has_a_row() -> None:
    assert {row.scheme.name for row in ROWS} == set(qnn.SCHEMES)
    assert {row.kind.name for row in ROWS} >= {"linear", "recurrent"}
    table = support.table()
    for row in ROWS:
        lines = [each for each in table.splitlines() if f"| `{row.op.name}` |" in each]
        (line,) = (each for each in lines if f"`nn.{row.layer.__name__}`" in each)
        assert f"`{row.scheme.name}`" in line


def test_readme_names_every_scheme() -> None:
    text = (ROOT / "README.md").read_text()
    for scheme in qnn.SCHEMES:
        assert any(line.startswith("| `") and f"`{scheme}`" in line for line in text.splitlines())


@pytest.mark.parametrize("term", ["per-tensor", "per-channel", "per-token", "per-group"])
def test_the_terms_of_the_field_are_found(term: str) -> None:
    """Where a reader from elsewhere searches: what has such scales says so in the field's words."""
    places = ["README.md", "docs/index.md", "docs/glossary.md", "docs/numerics.md"]
    texts = {place: (ROOT / place).read_text() for place in places}
    texts["Format"] = str(qnn.Format.__doc__)
    if term != "per-token":  # which a weight cannot have
        texts["QLinear"] = str(qnn.QLinear.__doc__)
    if term in ("per-tensor", "per-channel"):  # what observers find
        texts["QuantSpec"] = str(qnn.QuantSpec.__doc__)
        texts["fake_quantize"] = str(qnn.functional.fake_quantize.__doc__)
    assert [place for place, text in texts.items() if term not in text] == []


def test_the_landing_page_has_the_table() -> None:
    assert "<!-- support table -->" in (ROOT / "docs" / "index.md").read_text()


class OfItself(nn.Sequential):
    """Self-attention, called as the other layers are."""

    def forward(self, x: torch.Tensor) -> Any:
        return self[0](x, x, x)


class TestRow:
    """What a row says, done with its layer."""

    @pytest.fixture(params=ROWS, ids=lambda row: f"{row.layer.__name__}-{row.scheme.name}")
    def row(self, request: pytest.FixtureRequest) -> Any:
        return request.param

    @pytest.fixture
    def model(self, row: Any) -> nn.Sequential:
        around = OfItself if row.kind.name == "attention" else nn.Sequential
        return around(row.kind.sample(row.layer, support.SIZE)[0]).eval()

    @pytest.fixture
    def x(self, row: Any) -> torch.Tensor:
        _, x = row.kind.sample(row.layer, support.SIZE)
        assert isinstance(x, torch.Tensor)
        return x

    @pytest.fixture
    def small(self, row: Any, model: nn.Sequential, x: torch.Tensor) -> nn.Module:
        if row.scheme.static and row.kind.observed:
            return qnn.convert(qnn.calibrate(qnn.prepare(model, row.scheme.name), [x]))
        return qnn.convert(model, {row.layer: row.scheme.name})

    def test_modes(self, row: Any, model: nn.Sequential, small: nn.Module, x: torch.Tensor) -> None:
        eager = tree_leaves(small(x))
        for got, want in zip(eager, tree_leaves(model(x)), strict=True):
            assert qnn.sqnr(want, got) > 10
        assert row.is_traced
        exported = torch.export.export(small, (x,))
        runs: list[Any] = [exported.module()]
        if is_compiled(row):
            runs.append(torch.compile(small, fullgraph=True, backend="aot_eager"))
        for run in runs:
            for got, want in zip(tree_leaves(run(x)), eager, strict=True):
                assert torch.equal(got, want)
        ((op, scheme),) = {(region.op.name, region.scheme) for region in regions(exported)}
        assert (op, scheme) == (row.op.name, row.scheme.name)

    def test_gradient(self, row: Any, small: nn.Module, x: torch.Tensor) -> None:
        if not x.is_floating_point():
            assert not row.gradient
            assert not small(x).requires_grad  # ids have none, and a frozen table
            return
        x.requires_grad_()
        sum(leaf.sum() for leaf in tree_leaves(small(x))).backward()
        assert row.gradient
        assert x.grad is not None
        assert bool(x.grad.any())

    def test_training(self, row: Any, model: nn.Sequential, x: torch.Tensor) -> None:
        if not row.trains:
            with pytest.raises(ValueError, match="train"):
                qnn.convert(model, row.scheme.name, include=row.layer, training=True)
            return
        training = qnn.convert(model, row.scheme.name, training=True)
        training(x).sum().backward()
        assert training[0].weight.grad is not None

    def test_qat(self, row: Any, model: nn.Sequential, x: torch.Tensor) -> None:
        if not row.kind.observed:
            assert not row.qat
            return
        static = row.scheme.name if row.scheme.static else "int8_static"
        prepared = qnn.prepare(model, static, qat=True).train()
        sum(leaf.sum() for leaf in tree_leaves(prepared(x))).backward()
        scheme = next(each.scheme for each in qnn.summary(qnn.convert(prepared)).rows)
        assert row.qat == (scheme == row.scheme.name)

    def test_disk(self, row: Any, small: nn.Module) -> None:
        config = qnn.compressed_tensors.quantization_config(small)
        (group,) = config["config_groups"].values()
        own = group["format"].endswith("use qnn.load_pretrained")
        assert row.disk == ("qnn's own" if own else f"`{group['format']}`")

    def test_backend(self, row: Any, small: Any) -> None:
        said = small[0]._backend()
        product = "activations cast in torch operations" in said
        missing = "there is no native kernel" in said
        assert row.cpp == (False if missing else "product" if product else True)

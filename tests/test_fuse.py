"""`qnn.fuse`: BatchNorms into the layers before them, and nothing else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from parameterized import parameterized
from torch import nn

import qnn


def lived_in(model: nn.Module) -> nn.Module:
    """In evaluation mode, with statistics, scales and shifts that do something."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
            assert module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.3, 3)
            if module.affine:
                module.weight.data.uniform_(-1, 2)
                module.bias.data.normal_()
    return model.eval()


class Residual(nn.Module):
    """ResNet's block."""

    def __init__(self, c: int, o: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c, o, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(o)
        self.conv2 = nn.Conv2d(o, o, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(o)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Sequential(nn.Conv2d(c, o, 1, stride, bias=False), nn.BatchNorm2d(o))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.down(x))  # type: ignore[no-any-return]


class Inverted(nn.Module):
    """MobileNetV2's block."""

    def __init__(self, c: int, wide: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Sequential(nn.Conv2d(c, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()),
            nn.Sequential(
                nn.Conv2d(wide, wide, 3, 1, 1, groups=wide, bias=False),
                nn.BatchNorm2d(wide),
                nn.ReLU6(),
            ),
            nn.Conv2d(wide, c, 1, bias=False),
            nn.BatchNorm2d(c),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x)  # type: ignore[no-any-return]


def resnet() -> nn.Module:
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
    return lived_in(nn.Sequential(stem, Residual(8, 8, 1), Residual(8, 12, 2)))


def mobilenet() -> nn.Module:
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU6())
    return lived_in(nn.Sequential(stem, Inverted(8, 24), Inverted(8, 24)))


def norms(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._NormBase)]


IMAGE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


class Pair(nn.Module):
    """A layer and a BatchNorm, called as `how` says."""

    def __init__(self, how: Any, layer: nn.Module | None = None, norm: Any = None) -> None:
        super().__init__()
        self.conv = layer or nn.Conv2d(3, 4, 3)
        self.bn = norm or nn.BatchNorm2d(4)
        self.other = nn.Conv2d(3, 4, 3)
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.how(self, x)
        return y


# Each calls the pair in a way in which it must stay as it is, with a word of the reason.
NOT_A_PAIR: dict[str, tuple[Any, str]] = {
    "a result that is added elsewhere": (
        lambda m, x: m.bn(y := m.conv(x)) + y,
        "'conv' also goes to .*add",
    ),
    "a result that is returned": (
        lambda m, x: (m.bn(y := m.conv(x)), y),
        "'conv' also goes to the model's output",
    ),
    "a view of the result elsewhere": (
        lambda m, x: m.bn(y := m.conv(x)).flatten() + y.flatten(),
        "also goes to .*(view|flatten)",
    ),
    "an activation between": (lambda m, x: m.bn(m.conv(x).relu()), "its input comes from"),
    "a sum before": (lambda m, x: m.bn(m.conv(x) + 1), "its input comes from"),
    "two layers into one norm": (
        lambda m, x: m.bn(m.conv(x)) + m.bn(m.other(x)),
        "its input comes from 'conv' and 'other'",
    ),
    "a norm before the layer": (
        lambda m, x: m.conv(m.bn(x.repeat(1, 2, 1, 1)[:, :4])[:, :3]),
        "its input comes from",
    ),
    "a layer that is called again without": (
        lambda m, x: m.bn(m.conv(x)) + m.conv(x * 2).relu(),
        "'conv' also goes to",
    ),
    "a weight that is read": (
        lambda m, x: m.bn(m.conv(x)) * m.conv.weight.sum(),
        "the tensors of 'conv' are read outside of it",
    ),
    "statistics that are read": (
        lambda m, x: m.bn(m.conv(x)) + m.bn.running_mean.sum(),
        "the tensors of 'bn' are read outside of it",
    ),
    "a norm that is not called": (lambda m, x: m.conv(x), "the model does not call it"),
}  # fmt: skip


class TestModels:
    @parameterized.expand([("resnet", resnet), ("mobilenet", mobilenet)])
    def test_by_graph_and_by_run(self, _: str, make: Any) -> None:
        torch.manual_seed(0)
        model = make()
        want = model(IMAGE)
        for inputs in (None, IMAGE, (IMAGE,)):
            fused = qnn.fuse(model, inputs)
            assert norms(fused) == []
            assert qnn.sqnr(want, fused(IMAGE)) > 100
            assert not fused.training
        assert len(norms(model)) > 5
        assert torch.equal(model(IMAGE), want)

    def test_in_place(self) -> None:
        torch.manual_seed(0)
        model = resnet()
        want = model(IMAGE)
        assert qnn.fuse(model, IMAGE, inplace=True) is model
        assert norms(model) == []
        assert qnn.sqnr(want, model(IMAGE)) > 100

    def test_summary_names_what_was_folded(self) -> None:
        torch.manual_seed(0)
        rows = {row.name: row for row in qnn.summary(qnn.fuse(resnet())).rows}
        assert (rows["1.conv1"].reason or "").endswith("; BatchNorm 1.bn1 folded in")

    def test_summary_keeps_why_one_was_not(self) -> None:
        layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)
        fused = qnn.fuse(lived_in(nn.Sequential(*layers)), IMAGE)
        assert norms(fused) == ["3"]
        reasons = {row.name: row.reason for row in qnn.summary(fused).rows}
        assert reasons["3"] == (
            "not folded: its input comes from an operation, not from one convolution or linear "
            "layer"
        )


class TestLayers:
    @parameterized.expand(
        [
            (nn.Conv1d(6, 4, 3, groups=2), nn.BatchNorm1d(4), (2, 6, 9)),
            (nn.Conv2d(6, 4, 3, bias=False), nn.BatchNorm2d(4), (2, 6, 9, 9)),
            (nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4, affine=False), (2, 6, 9, 9)),
            (nn.Conv2d(6, 4, 3), nn.SyncBatchNorm(4), (2, 6, 9, 9)),
            (nn.Conv3d(6, 4, 2), nn.BatchNorm3d(4, eps=0.1), (2, 6, 3, 3, 3)),
            (nn.ConvTranspose1d(6, 4, 3), nn.BatchNorm1d(4), (2, 6, 9)),
            (nn.ConvTranspose2d(6, 8, 3, 2, groups=2), nn.BatchNorm2d(8), (2, 6, 5, 5)),
            (nn.ConvTranspose3d(6, 4, 2, bias=False), nn.BatchNorm3d(4), (2, 6, 3, 3, 3)),
            (nn.Linear(6, 4), nn.BatchNorm1d(4), (5, 6)),
        ]
    )
    def test_folded(self, layer: nn.Module, norm: nn.Module, shape: tuple[int, ...]) -> None:
        model, x = lived_in(nn.Sequential(layer, norm, nn.ReLU())), torch.randn(shape)
        fused = qnn.fuse(model, x)
        assert type(fused[1]) is nn.Identity
        assert type(fused[0]) is type(layer)
        assert fused[0] is not layer
        assert fused[0].bias.requires_grad
        assert qnn.sqnr(model(x), fused(x)) > 110

    def test_subclasses(self) -> None:
        """One that builds itself otherwise is folded, and one that computes otherwise is not."""
        depthwise = type("Depthwise", (nn.Conv2d,), {})(3, 3, 3, groups=3)
        fused = qnn.fuse(lived_in(nn.Sequential(depthwise, nn.BatchNorm2d(3))))
        assert type(fused[0]) is type(depthwise)

        class Standardised(nn.Conv2d):
            def forward(self, input: torch.Tensor) -> torch.Tensor:
                return self._conv_forward(input, self.weight / self.weight.std(), self.bias)

        model = lived_in(nn.Sequential(Standardised(3, 4, 3), nn.BatchNorm2d(4)))
        for inputs in (None, IMAGE):
            with pytest.raises(ValueError, match="1: not folded: its input comes from"):
                qnn.fuse(model, inputs)

    def test_other_dtypes(self) -> None:
        for dtype in (torch.float64, torch.bfloat16, torch.float16):
            model = lived_in(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).to(dtype)
            fused = qnn.fuse(model, IMAGE.to(dtype))
            assert {p.dtype for p in fused.parameters()} == {dtype}
            bound = 200 if dtype == torch.float64 else 30
            assert qnn.sqnr(model(IMAGE.to(dtype)), fused(IMAGE.to(dtype))) > bound

    def test_channels_last_stays(self) -> None:
        model = lived_in(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        assert qnn.fuse(model)[0].weight.is_contiguous(memory_format=torch.channels_last)

    def test_a_norm_over_other_axes_than_the_layers(self) -> None:
        """As many tokens as features: the shapes fit, and the axes do not."""
        model, x = lived_in(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))), torch.randn(2, 4, 6)
        for inputs, word in ((None, "give an example"), (x, "an axis that is not that of '0'")):
            with pytest.raises(ValueError, match=word):
                qnn.fuse(model, inputs)
        images = lived_in(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm2d(4)))
        for inputs in (None, torch.randn(2, 4, 3, 6)):
            with pytest.raises(ValueError, match="an axis that is not that of '0'"):
                qnn.fuse(images, inputs)

    def test_frozen_norms_of_other_libraries(self) -> None:
        class FrozenBatchNorm2d(nn.Module):
            def __init__(self, n: int, eps: float = 1e-5) -> None:
                super().__init__()
                for name in ("weight", "bias", "running_mean", "running_var"):
                    self.register_buffer(name, torch.rand(n) + 0.5)
                self.eps, self.factor = eps, 1.0

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                weight, bias, mean, var = (b[:, None, None] for b in self._buffers.values())  # type: ignore[index]
                y: torch.Tensor = (x - mean) * (
                    var + self.eps
                ).rsqrt() * weight * self.factor + bias
                return y

        model = nn.Sequential(nn.Conv2d(3, 4, 3), FrozenBatchNorm2d(4))
        for inputs in (None, IMAGE):
            fused = qnn.fuse(model, inputs)
            assert type(fused[1]) is nn.Identity
            assert qnn.sqnr(model(IMAGE), fused(IMAGE)) > 110
        model[1].factor = 2.0
        with pytest.raises(ValueError, match=r"FrozenBatchNorm2d is not weight"):
            qnn.fuse(model)


class TestPairs:
    @parameterized.expand([(name, *case) for name, case in NOT_A_PAIR.items()])
    def test_not_a_pair(self, _: str, how: Any, reason: str) -> None:
        model = lived_in(Pair(how))
        before = copy.deepcopy(model.state_dict())
        for inputs in (None, IMAGE):
            with pytest.raises(ValueError, match=f"nothing to fold:\n  bn: not folded: .*{reason}"):
                qnn.fuse(model, inputs)
        assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())

    def test_one_pair_called_twice_is_one(self) -> None:
        model = lived_in(Pair(lambda m, x: m.bn(m.conv(x)) + m.bn(m.conv(x * 2))))
        for inputs in (None, IMAGE):
            fused = qnn.fuse(model, inputs)
            assert qnn.sqnr(model(IMAGE), fused(IMAGE)) > 110

    def test_a_list_that_names_the_norm_follows(self) -> None:
        model = lived_in(Pair(lambda m, x: m.steps[1](m.steps[0](x))))
        model.steps = [model.conv, model.bn]  # type: ignore[assignment]
        for inputs in (None, IMAGE):
            fused = qnn.fuse(model, inputs)
            assert fused.steps == [fused.conv, fused.bn]
            assert qnn.sqnr(model(IMAGE), fused(IMAGE)) > 110

    def test_an_inplace_activation_on_the_result(self) -> None:
        model = lived_in(Pair(lambda m, x: m.bn(y := m.conv(x)) + y.relu_()))
        for inputs in (None, IMAGE):
            with pytest.raises(ValueError, match=r"also goes to .*relu_"):
                qnn.fuse(model, inputs)

    def test_python_that_depends_on_tensors(self) -> None:
        def how(m: Any, x: torch.Tensor) -> Any:
            return m.bn(m.conv(x)) if x.sum() > -1e9 else x

        model = lived_in(Pair(how))
        with pytest.raises(ValueError, match=r"torch.fx cannot trace .*qnn.fuse\(model, inputs\)"):
            qnn.fuse(model)
        assert qnn.sqnr(model(IMAGE), qnn.fuse(model, IMAGE)(IMAGE)) > 110

    def test_outputs_are_compared(self) -> None:
        """A model that asks for the class of its norm, and does otherwise without one."""

        def how(m: Any, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = m.bn(m.conv(x))
            return y if isinstance(m.bn, nn.BatchNorm2d) else -y

        model = lived_in(Pair(how))
        state = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=r"agree to -?\d+.\d dB alone"):
            qnn.fuse(model, IMAGE, inplace=True)
        assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items())


class TestRefused:
    @parameterized.expand(
        [
            ("training", lambda m: m.train(), "it is in training mode; call model.eval"),
            (
                "no statistics",
                lambda m: setattr(m, "1", nn.BatchNorm2d(4, track_running_stats=False).eval()),
                "no running statistics",
            ),
            (
                "hook on the layer",
                lambda m: m[0].register_forward_hook(lambda *_: None),
                "of '0': it has hooks",
            ),
            (
                "hook on the norm",
                lambda m: m[1].register_forward_pre_hook(lambda *_: None),
                "it has hooks",
            ),
            (
                "shared weight",
                lambda m: m.append(nn.Conv2d(4, 3, 3)) and setattr(m[2], "weight", m[0].weight),
                "'0' are shared with another layer",
            ),
            (
                "overflow",
                lambda m: m[1].running_var.fill_(float("nan")),
                "would not be finite",
            ),
            (
                "weight norm",
                lambda m: nn.utils.parametrizations.weight_norm(m[0]),
                "its input comes from|of '0'",
            ),
            (
                "subclass",
                lambda m: setattr(m, "1", type("Own", (nn.BatchNorm2d,), {})(4).eval()),
                "subclass of BatchNorm with a meaning of its own",
            ),
            (
                "own forward",
                lambda m: setattr(m[1], "forward", lambda x: x),
                "a forward of its own",
            ),
        ]
    )
    def test_with_a_reason(self, _: str, change: Any, reason: str) -> None:
        model = lived_in(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
        change(model)
        with pytest.raises(ValueError, match=f"1: not folded: .*({reason})"):
            qnn.fuse(model)

    def test_arguments(self) -> None:
        with pytest.raises(ValueError, match="the model has no BatchNorm"):
            qnn.fuse(nn.Linear(3, 3))
        with pytest.raises(TypeError, match=r"qnn.fuse takes an nn.Module, got str"):
            qnn.fuse("model")  # type: ignore[type-var]

"""Graph mode: recurrent layers, tables, convolutions and BatchNorms with all their arguments."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from parameterized import parameterized
from torch import nn

import qnn
from qnn import pt2e
from qnn.pt2e import Int8Quantizer
from tests.test_pt2e_graphs import DYNAMIC, SCHEMES, quantised, reasons, schemes, why


class Recurrent(nn.Module):
    def __init__(self, kind: Any, **options: Any) -> None:
        super().__init__()
        self.rnn = kind(6, 8, **options)

    def forward(self, x: torch.Tensor, h: Any = None) -> Any:
        return self.rnn(x, h)


class TestRecurrent:
    @parameterized.expand(
        [
            (nn.LSTM, {"num_layers": 2, "bidirectional": True, "batch_first": True}, 3),
            (nn.LSTM, {"proj_size": 4, "bias": False}, 3),
            (nn.LSTM, {"num_layers": 2, "dropout": 0.3}, 3),
            (nn.LSTM, {}, 2),
            (nn.GRU, {"num_layers": 2, "bidirectional": True, "bias": False}, 3),
            (nn.GRU, {"batch_first": True}, 3),
            (nn.GRU, {}, 2),
        ]
    )
    def test_layers(self, kind: Any, options: Any, axes: int) -> None:
        args = (torch.randn(*[3, 5, 6][3 - axes :]),)
        for (scheme,) in SCHEMES:
            model = Recurrent(kind, **options)
            graph = quantised(model, args, scheme)
            assert schemes(graph) == {"rnn": scheme}
            other = model if scheme == "int8" else qnn.prepare(model)
            if scheme != "int8":
                other(*args)
            other = qnn.convert(other, None if scheme != "int8" else scheme)
            theirs = other.state_dict()
            assert {k: v.tolist() for k, v in graph.state_dict().items()} == {
                k: v.tolist() for k, v in theirs.items()
            }

    @parameterized.expand(SCHEMES)
    def test_states_cells_and_calls_in_a_row(self, scheme: str) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.rnn, self.c = nn.LSTM(6, 6), nn.LSTMCell(6, 8)
                self.g = nn.GRUCell(8, 8, bias=False)

            def forward(self, x: torch.Tensor, h: torch.Tensor) -> Any:
                y, s = self.rnn(x, (h, h))
                y, (h, _) = self.rnn(y, s)
                a = b = g = y.new_zeros(y.shape[1], 8)
                for each in y:
                    a, b = self.c(each, (a, b))
                    g = self.g(a, g)
                return g, b, h

        graph = quantised(Net(), (torch.randn(3, 5, 6), torch.randn(1, 5, 6)), scheme, db=20)
        assert schemes(graph) == {"rnn": scheme, "c": scheme, "g": scheme}
        called = [n.target for n in graph.graph.find_nodes(op="call_module")]
        assert {name: called.count(name) for name in ("rnn", "c", "g")} == {
            "rnn": 2,
            "c": 3,
            "g": 3,
        }

    def test_what_there_is_no_layer_for(self) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.rnn, self.fc = nn.RNN(6, 8), nn.Bilinear(8, 8, 4)
                self.out = nn.Linear(4, 4)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                y, _ = self.rnn(x)
                return self.out(self.fc(y, y))

        graph = quantised(Net(), (torch.randn(3, 5, 6),), "int8")
        assert why(graph, "rnn_tanh") == "there is no quantised nn.RNN, only LSTM and GRU"
        assert why(graph, "bilinear") == "there is no quantised nn.Bilinear"
        (line,) = [name for name in reasons(graph) if name.startswith("rnn_tanh")]
        assert "in 'rnn', test_pt2e_layers.py:" in line

    @parameterized.expand([("mean", None, False), ("sum", 3, True), ("max", None, False)])
    def test_bags(self, mode: str, padding: int | None, flat: bool) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.e = nn.EmbeddingBag(20, 8, mode=mode, padding_idx=padding)
                self.fc = nn.Linear(8, 4)

            def forward(self, ids: torch.Tensor, offsets: Any = None) -> torch.Tensor:
                return self.fc(self.e(ids, offsets))

        ids = torch.randint(20, (3, 4))
        args = (ids,) if flat else (ids.flatten(), torch.tensor([0, 3, 7]))
        rule = lambda q: q.set_module_type(nn.EmbeddingBag, "int8_weight")  # noqa: E731
        graph = quantised(Net(), args, "int8_static", rule)
        assert schemes(graph) == {"e": "int8_weight", "fc": "int8_static"}


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 8, 3, padding="same", dilation=2, groups=2)
        self.b = nn.Conv2d(8, 4, 3, padding=1, padding_mode="circular")
        self.c = nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, padding=1, groups=2)
        self.d = nn.Conv2d(6, 4, 3, padding="valid")
        self.e = nn.Conv2d(4, 2, (3, 1), padding=(1, 0), padding_mode="replicate")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.e(self.d(self.c(self.b(self.a(x)))))


class OtherAxes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv1d(4, 8, 3, padding="same")
        self.b = nn.ConvTranspose1d(8, 4, 3, stride=2, output_padding=1)
        self.c = nn.Conv3d(1, 2, 3, padding=1)
        self.d = nn.ConvTranspose3d(2, 2, 2, stride=2, output_padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.b(self.a(x)).unsqueeze(1).unsqueeze(-1)
        return self.d(self.c(y.expand(-1, -1, -1, -1, 3)))


class TestConvolutions:
    @parameterized.expand(
        [
            (Convolutions, (2, 4, 8, 8), True),
            (Convolutions, (4, 8, 8), False),
            (OtherAxes, (2, 4, 8), True),
        ]
    )
    def test_arguments(self, kind: Any, size: tuple[int, ...], batched: bool) -> None:
        for (scheme,) in SCHEMES:
            shapes = ({0: DYNAMIC},) if batched else None
            graph = quantised(model := kind(), (torch.randn(size),), scheme, shapes=shapes)
            assert set(schemes(graph).values()) == {scheme}
            if batched:
                x = torch.randn(5, *size[1:])
                assert qnn.sqnr(model(x), graph(x)) > 25


class Bn(nn.Module):
    """One convolution and BatchNorm, of two calls or three."""

    def __init__(self, third: bool) -> None:
        super().__init__()
        self.c, self.b = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4, eps=1e-3)
        self.third = third

    def forward(self, x: torch.Tensor) -> Any:
        p, q = (self.b(self.c(each)) for each in x.chunk(2, 1))
        return (p + q, self.c(x[:, :1])) if self.third else p + q


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l, self.bl = nn.Linear(4, 6), nn.BatchNorm1d(6)
        self.l3, self.b3 = nn.Linear(4, 6), nn.BatchNorm1d(5)
        self.first, self.drop = nn.BatchNorm2d(3), nn.Dropout(0.3, inplace=True)
        self.c, self.bc = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False)
        self.d, self.bd = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)
        self.e, self.be = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor, i: torch.Tensor) -> Any:
        y = self.bd(self.d(F.relu_(self.bc(self.c(self.first(i))))))
        y = self.e(self.drop(y))
        return self.bl(self.l(x[:, 0])), self.b3(self.l3(x)), self.be(y) + y


class TestBatchNorm:
    """E4 of the hard cases, and which folds are exact."""

    @parameterized.expand([(s, third) for (s,) in SCHEMES for third in (False, True)])
    def test_b115_b116_several_calls(self, scheme: str, third: bool) -> None:
        (model := Bn(third))(torch.randn(9, 2, 6, 6) * 3 + 1)
        graph = quantised(model, (torch.randn(2, 2, 6, 6),), scheme)
        assert schemes(graph) == {"c": scheme, "b": None} if third else {"c": scheme}
        if third:
            assert "also read by conv2d_2, without this BatchNorm" in why(graph, "b")
            assert sum(n.target == "b" for n in graph.graph.nodes) == 2

    @parameterized.expand(SCHEMES)
    def test_b116_b118_conditions(self, scheme: str) -> None:
        model, args = Norms(), (torch.randn(3, 5, 4), torch.randn(2, 3, 4, 4))
        model(*args)
        graph = quantised(model, args, scheme)
        left = {
            name: reason.removeprefix("not folded: ") for name, reason in reasons(graph).items()
        }
        assert left == {
            "first": "no convolution or linear layer is before it",
            "bd": "it has no running statistics, and so normalises by each batch's own",
            "b3": "it normalises an axis that is not that of the layer's outputs",
            "be": "the layer's result is also read by add",
        }
        assert {n: s for n, s in schemes(graph).items() if s} == dict.fromkeys("cdel", scheme) | {
            "l3": scheme
        }

    def test_dropout_in_place_in_training(self) -> None:
        model, args = Norms(), (torch.randn(3, 5, 4), torch.randn(2, 3, 4, 4))
        program = torch.export.export(model.train(), args)
        graph = pt2e.prepare_qat_pt2e(program, Int8Quantizer("int8_static"))
        assert graph.drop.p == 0.3
        assert graph.drop.inplace
        graph(*args)[2].sum().backward()
        assert graph.eval()(*args)[2].isfinite().all()

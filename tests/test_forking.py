"""A child that is forked after a verb runs: no thread of the parent's is waited for."""

from __future__ import annotations

import os

import pytest

from .common import child

# Weights large enough for torch to share work on them. A child that hangs is ended by its alarm.
SETUP = """
import copy, os, signal, sys, torch
from torch import nn
import qnn
with torch.no_grad():
    qnn.QLinear(8, 8)(torch.ones(1, 8))  # builds the native kernels, if anything is to be built

class Model(nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.embedding = nn.Embedding(256, 256)
        self.linear = nn.Linear(256, 256)
        self.rnn = rnn(256, 64) if rnn else nn.Identity()
    def forward(self, x):
        return self.rnn(self.linear(self.embedding(x)))

x = torch.arange(192).view(64, 3)

def runs(what, model, x=x):
    pid = os.fork()
    if not pid:
        signal.alarm(30)
        with torch.no_grad():
            model(x)
            torch.ones(300, 300) @ torch.ones(300, 300)
        os._exit(0)
    if os.waitpid(pid, 0)[1] != 0:
        print("hangs:", what)

def models():
    for scheme in qnn.SCHEMES:
        if not scheme.endswith("_static"):
            rnn = {"int8": nn.LSTM, "int8_weight": nn.GRU}.get(scheme)
            yield scheme, Model(rnn).eval()
"""


CASES = """
for scheme, model in models():
    state, converted = model.state_dict(), qnn.convert(model, scheme)
    runs("convert: " + scheme, converted)
    for given in (state, converted.state_dict()):
        for name, layer in converted.named_children():
            if not isinstance(layer, nn.Embedding):  # torch's own loading leaves threads behind
                start = name + "."
                layer.load_state_dict({k.removeprefix(start): v for k, v in given.items()
                                       if k.startswith(start)})
        runs("loading: " + scheme, converted)
    runs("in place: " + scheme, qnn.convert(model, scheme, inplace=True))
for scheme in ("fp8", "mxfp8", "nvfp4"):
    runs("training: " + scheme, qnn.convert(Model(None), scheme, training=True))
for rnn, qat in ((nn.LSTM, False), (nn.GRU, True)):
    model = qnn.prepare(Model(rnn), qat=qat)
    runs("prepare", model)
    qnn.calibrate(model, [x])
    runs("calibrate", model)
    runs("convert", qnn.convert(model))
for scheme in ("int8", "nvfp4"):
    rows, linear = torch.ones(64, 192), nn.Linear(192, 256)
    runs("a new layer", qnn.QLinear(192, 256, scheme=scheme), rows)
    layer = qnn.QLinear.from_float(linear, scheme)
    runs("from_float", layer, rows)
    layer.weight = linear.weight.detach()
    runs("a new weight", layer, rows)
runs("a new LSTM", qnn.QLSTM(192, 64), torch.ones(16, 3, 192))
model = Model(None)
model(x)
runs("convert after a forward pass", qnn.convert(model))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
class TestFork:
    def test_the_child_runs(self) -> None:
        assert child(SETUP + CASES, OMP_NUM_THREADS="3") == ""

"""LoRA of peft over quantised layers: `qnn.integrations.peft`."""

from __future__ import annotations

import copy
import pickle
import tempfile
import warnings
from typing import Any

import pytest
import torch
from parameterized import parameterized
from torch import nn

import qnn
from qnn.nn.base import Quantized

peft = pytest.importorskip("peft", reason="needs the extra 'examples'")
from qnn.integrations import peft as qnn_peft  # noqa: E402

# Other groups of int4 are the same code.
SCHEMES = [n for n, scheme in qnn.SCHEMES.items() if not scheme.static and "_g" not in n]
FOUR_BITS = ("nvfp4", "int4", "int8_int4")


class Net(nn.Module):
    """One layer of each kind that adapters go around."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 32)
        self.conv = nn.Conv1d(32, 128, 3, padding=1)
        self.up, self.down = nn.Linear(128, 128), nn.Linear(128, 128)
        self.head = nn.Linear(128, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.table(ids).transpose(1, 2)).transpose(1, 2)
        result: torch.Tensor = self.head(x + self.down(torch.relu(self.up(x))))
        return result


IDS = torch.arange(24).reshape(3, 8)
LINEAR = ["up", "down"]
EVERY = ["table", "conv", "up", "down"]


def converted(scheme: Any = "int8") -> nn.Module:
    torch.manual_seed(0)
    schemes = {"*": "int8_weight", "up": scheme, "down": scheme, nn.Embedding: "int8_weight"}
    return qnn.convert(Net().eval(), schemes, exclude="head")


def adapted(base: nn.Module, targets: list[str] = LINEAR, ours: bool = True, **options: Any) -> Any:
    """A model with random adapters; those of two calls are the same."""
    torch.manual_seed(1)
    options = {"r": 4, "init_lora_weights": False, **options}
    config = peft.LoraConfig(target_modules=targets, **options)
    get_peft_model = qnn_peft.get_peft_model if ours else peft.get_peft_model
    model = get_peft_model(copy.deepcopy(base), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name and options["init_lora_weights"] is False:
            parameter.data.mul_(0.5)
    return model


def in_float(model: nn.Module) -> nn.Module:
    """The float model with the weights that the stored ones stand for."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, Quantized):
            model.set_submodule(name, module.dequantize())
    return model


def same_state(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    now = model.state_dict()
    assert now.keys() == state.keys()
    for name, tensor in state.items():
        assert now[name].dtype == tensor.dtype, name
        assert now[name].tolist() == tensor.tolist(), name


def trained(model: Any, steps: int = 4) -> list[float]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser, losses = torch.optim.AdamW(parameters, lr=1e-2), []
    torch.manual_seed(2)
    target = torch.randn(3, 8, 8)
    for _ in range(steps):
        loss = (model(IDS) - target).square().mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses


def learns(model: Any) -> bool:
    losses = trained(model.train())
    model.eval()
    return losses[-1] < losses[0]


class TestMerge:
    @parameterized.expand(SCHEMES)
    def test_schemes(self, scheme: str) -> None:
        """Trained, merged with one rounding, and unmerged to the codes from before."""
        model = adapted(converted(scheme))
        assert type(model.base_model.model.up) is qnn_peft.QLoraLinear
        assert learns(model)
        with torch.no_grad():
            want, state = model(IDS), copy.deepcopy(model.state_dict())
            up, x = model.base_model.model.up, torch.randn(5, 128)
            codes = [part.tolist() for part in up.base_layer.stored]
            exact = up.base_layer.weight.clone() + up.get_delta_weight("default")
            model.merge_adapter()
            assert [part.tolist() for part in up.base_layer.stored] != codes
            once = qnn.QLinear(128, 128, scheme=scheme)
            once.weight = exact
            for mine, its in zip(up.base_layer.stored, once.stored, strict=True):
                assert mine.tolist() == its.tolist()
            assert qnn.sqnr(want, model(IDS)) > (12 if scheme.startswith(FOUR_BITS) else 25)
            assert torch.equal(up(x), up.base_layer(x))
            model.unmerge_adapter()
            same_state(model, state)
            assert torch.equal(model(IDS), want)

    @parameterized.expand(
        [
            ("lora", {}),
            ("dora", {"use_dora": True}),
            ("rslora", {"use_rslora": True}),
            ("bias", {"lora_bias": True}),
        ]
    )
    def test_variants(self, name: str, options: dict[str, Any]) -> None:
        """Those of peft over the float model with the same weights."""
        base, targets = converted("int8_weight"), ["conv", *LINEAR]
        mine = adapted(base, targets, **options)
        theirs = adapted(in_float(base), targets, ours=False, **options)
        with torch.no_grad():
            want, state = mine(IDS), copy.deepcopy(mine.state_dict())
            assert qnn.sqnr(theirs(IDS), want) > 100
            for safe in (False, True):
                mine.merge_adapter(safe_merge=safe)
                theirs.merge_adapter(safe_merge=safe)
                for layer in targets:
                    got = getattr(mine.base_model.model, layer).base_layer
                    plain = getattr(theirs.base_model.model, layer).base_layer
                    assert qnn.sqnr(plain.weight, got.weight) > 40
                    torch.testing.assert_close(got.bias, plain.bias)
                assert qnn.sqnr(theirs(IDS), mine(IDS)) > 30
                mine.unmerge_adapter()
                theirs.unmerge_adapter()
                same_state(mine, state)
                assert torch.equal(mine(IDS), want)

    @parameterized.expand([(False,), (True,)])
    def test_several_adapters(self, dora: bool) -> None:
        """Rounded once, whether they come in one call or in two."""
        models = [adapted(converted(), use_dora=dora) for _ in range(2)]
        for model in models:
            torch.manual_seed(3)
            config = peft.LoraConfig(r=2, target_modules=LINEAR, init_lora_weights=False)
            model.add_adapter("other", config)
            model.base_model.set_adapter(["default", "other"])
        at_once, in_turn = models
        state = copy.deepcopy(in_turn.state_dict())
        want = in_turn(IDS)
        at_once.merge_adapter()
        in_turn.merge_adapter(["default"])
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            in_turn.merge_adapter(["other"])
        assert any("additionally merging other" in str(each.message) for each in said)
        same_state(in_turn, at_once.state_dict())
        if not dora:
            assert qnn.sqnr(want, in_turn(IDS)) > 25
        in_turn.unmerge_adapter()
        same_state(in_turn, state)
        assert torch.equal(in_turn(IDS), want)
        with pytest.warns(UserWarning, match="Already unmerged"):
            in_turn.unmerge_adapter()

    def test_unload(self) -> None:
        base = converted()
        model = adapted(base, EVERY)
        want = model(IDS)
        assert torch.equal(copy.deepcopy(model).unload()(IDS), base(IDS))
        for safe in (False, True):
            merged = copy.deepcopy(model).merge_and_unload(safe_merge=safe)
            assert type(merged.up) is qnn.QLinear
            assert type(merged.conv) is qnn.QConv1d
            assert type(merged.table) is qnn.QEmbedding
            assert qnn.sqnr(want, merged(IDS)) > 25

    def test_nothing_learned_changes_no_code(self) -> None:
        base = converted("int4_weight")
        model = adapted(base, init_lora_weights=True)
        assert torch.equal(model(IDS), base(IDS))
        same_state(model.merge_and_unload(), base.state_dict())

    def test_disabled_and_copied_while_merged(self) -> None:
        model = adapted(converted())
        base, want, state = model.unload, model(IDS), copy.deepcopy(model.state_dict())
        model.merge_adapter()
        merged = model(IDS)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(IDS), merged)
            twin.unmerge_adapter()
            same_state(twin, state)
        with model.disable_adapter():  # peft unmerges for that
            assert torch.equal(model(IDS), converted()(IDS))
        assert torch.equal(model(IDS), want)
        assert base()

    def test_half_precision_adds_in_float32(self) -> None:
        model = adapted(converted().to(torch.bfloat16))
        up, state = model.base_model.model.up, copy.deepcopy(model.state_dict())
        base = up.base_layer
        exact = base._layout.dequantize(base.stored, torch.float32, "int8")
        exact = exact + up.get_delta_weight("default").float()
        model.merge_adapter()
        once = qnn.QLinear(128, 128)
        once.weight = exact.detach()
        assert torch.equal(base.stored[0], once.stored[0])
        model.unmerge_adapter()
        same_state(model, state)

    def test_a_smoothed_static_layer(self) -> None:
        torch.manual_seed(0)
        net, ids = Net().eval(), IDS
        net.up.weight.data[:, 3] *= 30
        net.conv.weight.data[5] *= 40
        model = qnn.prepare(net, "int8_static", include=LINEAR)
        base = qnn.convert(qnn.calibrate(model, [ids]))
        assert any(layer._smoothed for layer in (base.up, base.down))
        model = adapted(base)
        with torch.no_grad():
            want, state = model(ids), copy.deepcopy(model.state_dict())
            model.merge_adapter()
            assert qnn.sqnr(want, model(ids)) > 20
            model.unmerge_adapter()
            same_state(model, state)


class TestNotMerged:
    """What cannot be merged is refused, and changes nothing."""

    @parameterized.expand([(False,), (True,)])
    def test_nan(self, safe: bool) -> None:
        model = adapted(converted())
        torch.manual_seed(3)
        model.add_adapter(
            "broken", peft.LoraConfig(r=2, target_modules=LINEAR, init_lora_weights=False)
        )
        up = model.base_model.model.up
        up.lora_A["broken"].weight.data[0, 0] = torch.nan
        up.merge(adapter_names=["default"])
        state = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match="NaN"):
            up.merge(safe, ["broken"])
        assert up.merged_adapters == ["default"]
        now = model.state_dict()
        assert all(now[name].tolist() == t.tolist() for name, t in state.items() if "A" not in name)
        up.unmerge()
        assert torch.equal(model.base_model.model.up.base_layer.stored[0], converted().up.stored[0])

    def test_weights_that_were_written_since(self) -> None:
        model, other = adapted(converted()), adapted(converted("int8"))
        model.merge_adapter()
        model.load_state_dict(other.state_dict())
        with pytest.raises(RuntimeError, match="was written to since adapters were merged"):
            model.unmerge_adapter()

    def test_two_layers_of_one_weight(self) -> None:
        net = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
        base = qnn.convert(net)
        base[2].weight = base[0].weight
        assert base[2].stored[0] is base[0].stored[0]
        model = adapted(base, ["0", "2"])
        model.merge_adapter()
        with pytest.raises(RuntimeError, match="a layer that shares it"):
            model.unmerge_adapter()


class TestTargets:
    @parameterized.expand(
        [
            ("Conv1d", nn.Conv1d, (9,)),
            ("Conv2d", nn.Conv2d, (9, 9)),
            ("Conv3d", nn.Conv3d, (5,) * 3),
        ]
    )
    def test_convolutions(self, name: str, cls: Any, size: tuple[int, ...]) -> None:
        torch.manual_seed(0)
        base = qnn.convert(nn.Sequential(cls(8, 16, 3, stride=2, padding=1)), "int8_weight")
        x = torch.randn(2, 8, *size)
        model = adapted(base, ["0"])
        assert type(model.base_model.model[0]) is getattr(qnn_peft, f"QLora{name}")
        theirs = adapted(in_float(base), ["0"], ours=False)
        assert type(model.base_model.model[0].lora_A["default"]) is cls
        want = model(x)
        assert qnn.sqnr(theirs(x), want) > 100
        want.square().mean().backward()
        assert all(bool(p.grad.any()) for p in model.parameters() if p.requires_grad)
        model.merge_adapter()
        assert qnn.sqnr(want, model(x)) > 30
        model.unmerge_adapter()
        assert torch.equal(model(x), want)
        again = adapted(base, ["0"])
        again.load_state_dict(model.state_dict())
        assert torch.equal(again(x), want)

    def test_grouped_convolution(self) -> None:
        base = qnn.convert(nn.Sequential(nn.Conv2d(8, 16, 3, groups=4)), "int8_weight")
        with pytest.warns(UserWarning, match="Merging is not supported"):
            model = adapted(base, ["0"])
        x, state = torch.randn(2, 8, 9, 9), copy.deepcopy(model.state_dict())
        with pytest.warns(UserWarning, match="Merging is not supported"):
            theirs = adapted(in_float(base), ["0"], ours=False)
        assert qnn.sqnr(theirs(x), model(x)) > 100
        with pytest.raises(NotImplementedError, match="groups > 1"):
            model.merge_adapter()
        same_state(model, state)

    def test_embedding(self) -> None:
        base = converted()
        model = adapted(base, ["table"])
        theirs = adapted(in_float(base), ["table"], ours=False)
        table, want = model.base_model.model.table, model(IDS)
        assert type(table) is qnn_peft.QLoraEmbedding
        assert qnn.sqnr(theirs(IDS), want) > 25
        assert qnn.sqnr(theirs.base_model.model.table(IDS), table(IDS)) > 100
        assert learns(model)
        want = model(IDS)
        model.merge_adapter()
        assert qnn.sqnr(want, model(IDS)) > 25
        model.unmerge_adapter()
        assert torch.equal(model(IDS), want)
        with pytest.raises(ValueError, match="DoRA needs the whole table in float"):
            adapted(base, ["table"], use_dora=True)

    def test_conv1d_of_transformers(self) -> None:
        """Whose float weight is [in, out]; the adapter is that of the float model."""
        transformers = pytest.importorskip("transformers", reason="needs the extra 'examples'")
        torch.manual_seed(0)
        size = {"n_embd": 64, "n_layer": 1, "n_head": 2, "vocab_size": 50, "n_positions": 32}
        net = transformers.GPT2Model(transformers.GPT2Config(**size)).eval()
        for options in ({}, {"use_dora": True}):
            options = {"fan_in_fan_out": True, **options}
            theirs = adapted(net, ["c_attn"], ours=False, **options)
            mine = adapted(qnn.convert(net, "int8_weight"), ["c_attn"], **options)
            assert mine.peft_config["default"].fan_in_fan_out is True
            state = peft.get_peft_model_state_dict(theirs)
            peft.set_peft_model_state_dict(mine, state)
            want, got = theirs(IDS).last_hidden_state, mine(IDS).last_hidden_state
            assert qnn.sqnr(want, got) > 30
            mine.merge_adapter()
            assert qnn.sqnr(got, mine(IDS).last_hidden_state) > 30
            mine.unmerge_adapter()
            assert torch.equal(mine(IDS).last_hidden_state, got)

    def test_refused(self) -> None:
        lstm = qnn.convert(nn.Sequential(nn.LSTM(8, 8)), "int8")
        with pytest.raises(ValueError, match=r"no adapter for qnn\.QLSTM"):
            adapted(lstm, ["0"])
        with pytest.raises(ValueError, match="name the layer in target_modules"):
            adapted(converted(), [], target_parameters=["up.weight"])
        with pytest.raises(ValueError, match="quantised already"):
            adapted(converted(), init_lora_weights="loftq", loftq_config={"loftq_bits": 4})
        with pytest.raises(TypeError, match=r"takes a peft\.LoraConfig, got IA3Config"):
            qnn_peft.register(peft.IA3Config())

    def test_modules_to_save(self) -> None:
        """A float head is trained beside the adapters; a quantised layer is not."""
        model = adapted(converted(), modules_to_save=["head"])
        assert learns(model)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            again = qnn_peft.load_adapter(converted(), folder).eval()
        assert torch.equal(again(IDS), model(IDS))
        for scheme in ("int8", "fp8"):
            with pytest.raises(ValueError, match="means down, which is quantised"):
                adapted(converted(scheme), ["up"], modules_to_save=["down"])


class TestStarts:
    @parameterized.expand(
        [
            (init, scheme)
            for init in ("pissa", "olora")
            for scheme in ("int8_weight", "nvfp4_weight")
        ]
    )
    def test_that_change_the_base(self, init: str, scheme: str) -> None:
        """The base is rounded once, so the start errs as the layer itself does; an adapter that
        was trained so is loaded onto a fresh base exactly.
        """
        base = converted(scheme)
        model = adapted(base, init_lora_weights=init)
        assert qnn.sqnr(base(IDS), model(IDS)) > (38 if scheme == "int8_weight" else 12)
        trained(model.train())
        with tempfile.TemporaryDirectory() as folder:
            model.eval().save_pretrained(folder)
            again = qnn_peft.load_adapter(copy.deepcopy(base), folder).eval()
        assert torch.equal(again(IDS), model(IDS))

    def test_eva(self) -> None:
        """Which reads activations and not the weight."""
        base = converted()
        config = peft.LoraConfig(
            r=4, target_modules=LINEAR, init_lora_weights="eva", eva_config=peft.EvaConfig()
        )
        model = peft.get_peft_model(copy.deepcopy(base), qnn_peft.register(config)).eval()
        loader = [IDS, IDS.flip(0), IDS + 1]
        peft.initialize_lora_eva_weights(
            model,
            loader,
            forward_fn=lambda net, ids: net(ids),
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=None,
            show_progress_bar=False,
        )
        assert torch.equal(model(IDS), base(IDS))
        assert learns(model)

"""Lightning over `qnn.Linear` and over quantised layers."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from parameterized import parameterized
from torch import nn

import qnn

lightning = pytest.importorskip("lightning", reason="needs the extra 'dev'")
from qnn.integrations.lightning import FabricTrainingPrecision, TrainingPrecision  # noqa: E402


class Net(lightning.LightningModule):  # type: ignore[misc]
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
        self.head = nn.Linear(64, 5)
        self.layers = [self.body[0], self.body[2]]  # which the module calls by another way
        self.dtypes: list[torch.dtype] = []
        self.losses: list[float] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, last = self.layers
        result: torch.Tensor = self.head(last(self.body[1](first(x))))
        return result

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        x, target = batch
        y = self(x)
        self.dtypes.append(y.dtype)
        loss = nn.functional.cross_entropy(y.float(), target)
        self.losses.append(loss.item())
        return loss

    def test_step(self, batch: Any, index: int) -> None:
        self.log("loss", nn.functional.cross_entropy(self(batch[0]).float(), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def data() -> Any:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 64, generator=generator)
    return torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, x[:, :5].argmax(1)), batch_size=8
    )


def trainer(folder: str, epochs: int, **options: Any) -> Any:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return lightning.Trainer(
        accelerator="cpu", max_epochs=epochs, default_root_dir=folder, **quiet, **options
    )


class TestTrainer:
    @parameterized.expand([("fp8", "bf16-mixed"), ("mxfp8", "32-true")])
    def test_trains_and_resumes_to_the_bit(self, scheme: str, precision: str) -> None:
        def plugin() -> TrainingPrecision:
            return TrainingPrecision(scheme, precision=precision, exclude="head")

        with tempfile.TemporaryDirectory() as folder:
            whole, first, second = Net(), Net(), Net(1)
            parameters = list(map(id, whole.parameters()))
            trainer(folder, 4, plugins=plugin()).fit(whole, data())
            assert [type(each) for each in whole.layers] == [qnn.Linear, qnn.Linear]
            assert whole.layers[0] is whole.body[0]
            assert type(whole.head) is nn.Linear
            assert list(map(id, whole.parameters())) == parameters
            wide = torch.bfloat16 if precision == "bf16-mixed" else torch.float32
            assert set(whole.dtypes) == {wide}
            assert whole.losses[-1] < 0.8 * whole.losses[0]
            half = trainer(folder, 2, plugins=plugin())
            half.fit(first, data())
            half.save_checkpoint(f"{folder}/half.ckpt")
            rest = trainer(folder, 4, plugins=plugin())
            rest.fit(second, data(), ckpt_path=f"{folder}/half.ckpt", weights_only=False)
            assert first.losses + second.losses == whole.losses
            for mine, its in zip(second.parameters(), whole.parameters(), strict=True):
                assert torch.equal(mine, its)
            (tested,) = rest.test(second, data(), verbose=False)  # asks the plug-in once more
            assert tested["loss"] < whole.losses[0]
            saved = torch.load(f"{folder}/half.ckpt", weights_only=False)["state_dict"]
            assert saved.keys() == Net().state_dict().keys()
            Net().load_state_dict(saved)  # a float model

    def test_what_is_computed(self) -> None:
        """The losses of a loop by hand."""
        mine, by_hand = Net(), Net()
        with tempfile.TemporaryDirectory() as folder:
            plugin = TrainingPrecision("fp8_block", precision="32-true")
            trainer(folder, 2, plugins=plugin).fit(mine, data())
        qnn.convert(by_hand, "fp8_block", training=True, inplace=True)
        optimiser = by_hand.configure_optimizers()
        for _ in range(2):
            for i, batch in enumerate(data()):
                by_hand.training_step(batch, i).backward()
                optimiser.step()
                optimiser.zero_grad()
        assert mine.losses == by_hand.losses

    def test_converted_before(self) -> None:
        """A module that converts itself is left as it is."""
        net = qnn.convert(Net(), {"body.0": "mxfp8"}, training=True, inplace=True)
        assert TrainingPrecision("fp8").convert_module(net) is net
        assert type(net.body[2]) is nn.Linear

    def test_refused(self) -> None:
        with pytest.raises(ValueError, match="precision must be '32-true' or 'bf16-mixed'"):
            TrainingPrecision("fp8", precision="16-mixed")
        with pytest.raises(TypeError, match="inplace is True"):
            TrainingPrecision("fp8", inplace=False)
        with pytest.raises(ValueError, match="training"):
            TrainingPrecision("int8").convert_module(Net())

    @parameterized.expand(["32-true", "bf16-mixed", "bf16-true"])
    def test_adapters_over_int8(self, precision: str) -> None:
        """Lightning's own precisions leave codes and scales as they are."""
        peft = pytest.importorskip("peft", reason="needs the extra 'examples'")
        from qnn.integrations.peft import get_peft_model

        net = Net()
        base = qnn.convert(net.body, "int8")
        stored = copy.deepcopy(base.state_dict())
        net.body = get_peft_model(base, peft.LoraConfig(r=4, target_modules=["0", "2"]))
        net.layers = []
        net.forward = lambda x: net.head(net.body(x))
        with tempfile.TemporaryDirectory() as folder:
            trainer(folder, 3, precision=precision).fit(net, data())
            assert net.losses[-1] < net.losses[0]
            path = next(Path(folder).rglob("*.ckpt"))
            saved = torch.load(path, weights_only=False)["state_dict"]
        for name in ("0", "2"):
            for part in ("weight", "weight_scale"):
                got = saved[f"body.base_model.model.{name}.base_layer.{part}"]
                assert got.dtype == stored[f"{name}.{part}"].dtype
                assert torch.equal(got, stored[f"{name}.{part}"])


class TestFabric:
    def test_trains(self) -> None:
        fabric = lightning.Fabric(
            accelerator="cpu", plugins=FabricTrainingPrecision("fp8", exclude="head")
        )
        net = Net()
        model, optimiser = fabric.setup(net, net.configure_optimizers())
        assert type(net.body[0]) is qnn.Linear
        losses = []
        for _ in range(3):
            for x, target in fabric.setup_dataloaders(data()):
                y = model(x)
                assert y.dtype == torch.float32  # Fabric casts it back
                loss = nn.functional.cross_entropy(y, target)
                fabric.backward(loss)
                optimiser.step()
                optimiser.zero_grad()
                losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0]

"""accelerate over converted models: files, device maps, offload, and training in 8 bits."""

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

accelerate = pytest.importorskip("accelerate", reason="needs the extra 'examples'")
st = pytest.importorskip("safetensors.torch", reason="needs the extra 'dev'")
from qnn.integrations.accelerate import dispatch, load_checkpoint_and_dispatch  # noqa: E402

SCHEMES = ["int8", "int8_static", "fp8", "mxfp8", "nvfp4", "int4_weight", "int4_weight_asym"]
CPU = torch.device("cpu")
MAPS: list[Any] = [
    None,
    {"": "cpu"},
    {"0": "cpu", "1": "cpu", "2": "disk", "3": "disk"},
    {"": "disk"},
    "auto",
]


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = (nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128), nn.Linear(128, 32, bias=False))
    return nn.Sequential(*layers).eval()


def converted(scheme: str, seed: int = 0) -> nn.Module:
    if scheme != "int8_static":
        return qnn.convert(net(seed), scheme)
    batch = torch.randn(64, 128, generator=torch.Generator().manual_seed(seed))
    return qnn.convert(qnn.calibrate(qnn.prepare(net(seed), smooth=False), [batch]))


def skeleton(scheme: str) -> nn.Module:
    """A converted model of no values."""
    with torch.device("meta"):
        return qnn.convert(net(), scheme, progress=False)


def held(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


class TestDispatch:
    @parameterized.expand(
        [(scheme, i) for scheme in SCHEMES for i in range(len(MAPS)) if i > 1 or scheme == "int8"]
    )
    def test_load_checkpoint(self, scheme: str, which: int) -> None:
        model, x = converted(scheme), torch.randn(3, 128)
        want, place = model(x), MAPS[which]
        with tempfile.TemporaryDirectory() as folder:
            st.save_file(model.state_dict(), f"{folder}/model.safetensors")
            # What another model has left there is written over.
            accelerate.utils.offload_state_dict(f"{folder}/off", held(converted(scheme, 1)))
            got = load_checkpoint_and_dispatch(
                skeleton(scheme), folder, place, offload_folder=f"{folder}/off"
            )
            for _ in range(2):
                assert torch.equal(got(x), want)
            disk = isinstance(place, dict) and "disk" in place.values()
            assert any(p.is_meta for p in got.parameters()) == disk

    @parameterized.expand(SCHEMES)
    def test_offload(self, scheme: str) -> None:
        """accelerate's own calls, given what the layers hold."""
        model, x = converted(scheme), torch.randn(3, 128)
        want = model(x)
        offloaded = accelerate.cpu_offload(copy.deepcopy(model), CPU, state_dict=held(model))
        assert all(p.is_meta for p in offloaded.parameters())
        for _ in range(2):
            assert torch.equal(offloaded(x), want)
        with tempfile.TemporaryDirectory() as folder:
            accelerate.utils.offload_state_dict(folder, held(model))
            offloaded = accelerate.disk_offload(copy.deepcopy(model), folder, CPU)
            assert all(p.is_meta for p in offloaded.parameters())
            for _ in range(2):
                assert torch.equal(offloaded(x), want)

    @parameterized.expand(["int8", "fp8", "nvfp4"])
    def test_a_float_file(self, scheme: str) -> None:
        """Quantised here; accelerate alone would set floats where codes are, which is an error."""
        x = torch.randn(3, 128)
        with tempfile.TemporaryDirectory() as folder:
            st.save_file(net(1).state_dict(), f"{folder}/model.safetensors")
            got = load_checkpoint_and_dispatch(skeleton(scheme), f"{folder}/model.safetensors")
            assert torch.equal(got(x), converted(scheme, 1)(x))
            error, words = TypeError, "that are no codes of"
            if scheme == "nvfp4":  # whose codes have a name that the file lacks
                error, words = ValueError, "does not have a parameter or a buffer named weight"
            with pytest.raises(error, match=words):
                accelerate.load_checkpoint_and_dispatch(
                    converted(scheme), folder, {"": "cpu"}, strict=True
                )

    def test_plain_accelerate(self) -> None:
        """For the formats whose file has what a layer holds."""
        x = torch.randn(3, 128)
        for scheme in ("int8", "fp8_block", "nvfp4"):
            model = converted(scheme)
            with tempfile.TemporaryDirectory() as folder:
                accelerate.Accelerator().save_model(model, folder)
                got = accelerate.load_checkpoint_and_dispatch(
                    skeleton(scheme), folder, MAPS[2], offload_folder=f"{folder}/off", strict=True
                )
                assert torch.equal(got(x), model(x))

    def test_refused(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.safetensors"
            with pytest.raises(ValueError, match="nor a folder that has one"):
                load_checkpoint_and_dispatch(skeleton("int8"), folder)
            with pytest.raises(ValueError, match="is not a safetensors file"):
                load_checkpoint_and_dispatch(skeleton("int8"), path)
            state = converted("int8").state_dict()
            del state["2.weight_scale"]
            st.save_file(state, path)
            with pytest.raises(RuntimeError, match="truncated"):
                load_checkpoint_and_dispatch(skeleton("int8"), folder)
        with pytest.raises(ValueError, match="say where with offload_folder"):
            dispatch(converted("int8"), MAPS[2])

    def test_sizes_are_those_of_codes(self) -> None:
        """What `device_map="auto"` goes by."""
        sizes = [accelerate.utils.compute_module_sizes(m)[""] for m in (net(), converted("int8"))]
        assert sizes[1] < 0.3 * sizes[0]


def trained(model: nn.Module, steps: range, accelerator: Any, state: str = "") -> list[float]:
    """Losses; the state is loaded first, and saved in the end."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimiser = accelerator.prepare(model, optimiser)
    model.train()
    torch.manual_seed(5)
    if steps.start:
        accelerator.load_state(state)
    losses = []
    batch = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    for _ in steps:
        loss = (model(batch) - batch[:, :32].sin()).square().mean()
        accelerator.backward(loss)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    if state and not steps.start:
        accelerator.save_state(state)
    return losses


class TestTraining:
    @parameterized.expand([("fp8", "bf16"), ("nvfp4", "no")])
    def test_goes_on_to_the_bit(self, scheme: str, mixed: str) -> None:
        """`accelerate` has recipes of other libraries for "fp8"; here the model is converted."""
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = accelerate.Accelerator(mixed_precision=mixed, cpu=True)

        def build(seed: int) -> nn.Module:
            return qnn.convert(net(seed), scheme, training=True, exclude="3")

        whole, first, second = build(0), build(0), build(1)
        with tempfile.TemporaryDirectory() as folder:
            want = trained(whole, range(6), accelerator)
            accelerator.free_memory()
            losses = trained(first, range(3), accelerator, folder)
            accelerator.free_memory()
            losses += trained(second, range(3, 6), accelerator, folder)
            plain = accelerator.unwrap_model(second, keep_fp32_wrapper=False)
        assert losses == want
        assert want[-1] < want[0]
        fresh = net(2)
        fresh.load_state_dict(plain.state_dict())  # a float model
        for mine, its in zip(fresh.parameters(), whole.parameters(), strict=True):
            assert torch.equal(mine, its)
        small = qnn.convert(plain, scheme, exclude="3").eval()
        x = torch.randn(4, 128)
        assert qnn.sqnr(plain.eval()(x), small(x)) > (60 if scheme == "fp8" else 15)


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(100, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids.sum() % 2}


class TestTrainer:
    """transformers' `Trainer`, which runs on accelerate."""

    @staticmethod
    def classifier(seed: int = 0) -> Any:
        transformers = pytest.importorskip("transformers", reason="needs the extra 'examples'")
        torch.manual_seed(seed)
        size = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
        config = transformers.BertConfig(num_hidden_layers=1, vocab_size=100, **size)
        return transformers.BertForSequenceClassification(config)

    @staticmethod
    def trainer(model: Any, folder: str, steps: int) -> Any:
        transformers = pytest.importorskip("transformers", reason="needs the extra 'examples'")
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            save_steps=2,
            logging_steps=1,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        return transformers.Trainer(model, arguments, train_dataset=Rows())

    def test_training_layers(self) -> None:
        """`Trainer` asks nothing of them; a checkpoint is that of the float model, and a run that
        goes on from one ends with the same bits.
        """
        with tempfile.TemporaryDirectory() as folder:
            models = [self.classifier(seed) for seed in (0, 1)]
            for model in models:
                qnn.convert(model, "fp8", training=True, exclude="classifier", inplace=True)
            assert sum(isinstance(m, qnn.Linear) for m in models[0].modules()) == 7
            whole = self.trainer(models[0], folder, 4)
            whole.train()
            losses = [each["loss"] for each in whole.state.log_history if "loss" in each]
            assert len(losses) == 4
            assert losses[-1] < losses[0]
            rest = self.trainer(models[1], folder, 4)
            rest.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
            plain = type(models[0]).from_pretrained(f"{folder}/checkpoint-4")
        for name, tensor in models[0].state_dict().items():
            assert torch.equal(models[1].state_dict()[name], tensor), name
            assert torch.equal(plain.state_dict()[name], tensor), name
        assert not any(isinstance(m, qnn.Linear) for m in plain.modules())

    def test_from_quantised_to_training(self) -> None:
        """A model that was loaded quantised is refused, and taken once its layers are float."""
        with tempfile.TemporaryDirectory() as folder:
            float_model = self.classifier()
            float_model.save_pretrained(folder)
            load = type(float_model).from_pretrained
            model = load(folder, quantization_config=qnn.Int8Config())
            with pytest.raises(ValueError, match="attach trainable adapters"):
                self.trainer(model, folder, 1)
            plain = qnn.convert(model.dequantize(), "mxfp8", training=True)
            self.trainer(plain, folder, 1).train()
        assert type(plain.classifier) is qnn.Linear

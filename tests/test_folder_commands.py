"""`python -m qnn summary | convert | bench | sensitivity` on a folder of transformers'."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import qnn
from qnn.__main__ import main

transformers = pytest.importorskip("transformers", reason="needs the extra 'examples'")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "small", "models", "find", "much"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64,
    )  # fmt: skip
    transformers.BertForMaskedLM(config).save_pretrained(path)
    (path / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizer(str(path / "vocab.txt")).save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """No warnings of layers that are too small to gain."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "qnn.bench: ")
        yield


def called(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    code = main(list(map(str, arguments)))
    out, err = capsys.readouterr()
    return code, out, err


class TestCommands:
    def test_summary(self, folder: Path, capsys: Any) -> None:
        code, out, _ = called(capsys, "summary", folder)
        assert code == 0
        assert "bert.encoder.layer.0.output.dense" in out
        code, out, _ = called(capsys, "summary", folder, "--json")
        assert {row["layer"] for row in json.loads(out)["rows"]} >= {"Linear", "Embedding"}

    def test_convert(self, folder: Path, tmp_path: Path, capsys: Any) -> None:
        out = tmp_path / "int8"
        code, told, _ = called(capsys, "convert", folder, out, "--exclude", "cls")
        assert code == 0
        assert "bytes of" in told
        model = qnn.load_pretrained(transformers.BertForMaskedLM, out).eval()
        assert isinstance(model.bert.encoder.layer[0].output.dense, qnn.QLinear)
        assert isinstance(model.cls.predictions.transform.dense, torch.nn.Linear)
        ids = torch.arange(9)[None]
        with torch.no_grad():
            want = qnn.convert(
                transformers.BertForMaskedLM.from_pretrained(folder).eval(), exclude="cls"
            )
            assert torch.equal(model(ids).logits, want(ids).logits)
        assert transformers.AutoTokenizer.from_pretrained(out)("small models")["input_ids"]
        assert not list(out.glob("*.bin"))
        code, told, _ = called(capsys, "summary", out)
        assert "QLinear" in told
        code, _, err = called(capsys, "convert", folder, out)
        assert code == 1
        assert err.startswith("python -m qnn convert: ")
        assert "exists and is not an empty folder; nothing was written" in err
        code, _, err = called(capsys, "convert", out, tmp_path / "again", "--exclude", "cls")
        assert code == 1
        assert "nothing to convert" in err
        assert not (tmp_path / "again").exists()

    def test_bench(self, folder: Path, tmp_path: Path, capsys: Any) -> None:
        options = ("--tokens", 8, "--seconds", 0.01)
        code, out, _ = called(capsys, "bench", folder, "--json", *options)
        assert code == 0
        model, other = json.loads(out)["rows"]
        assert model["layers"] > other["layers"] == 0
        torch.save({"input_ids": torch.arange(9)[None]}, tmp_path / "batch.pt")
        called(capsys, "convert", folder, tmp_path / "int8")
        code, out, _ = called(
            capsys, "bench", tmp_path / "int8", "--other", folder, "--inputs",
            tmp_path / "batch.pt", *options,
        )  # fmt: skip
        assert code == 0
        assert "model / other: " in out

    def test_sensitivity(self, folder: Path, tmp_path: Path, capsys: Any) -> None:
        code, out, err = called(capsys, "sensitivity", folder, "--tokens", 8, "--json")
        assert code == 0
        assert "random tokens, which are not what the model meets" in err
        rows = json.loads(out)["rows"]
        assert "bert.encoder.layer.0.output.dense" in {row["name"] for row in rows}
        texts = tmp_path / "texts.txt"
        texts.write_text("small models\n\nfind much\nmuch much small models find")
        code, out, err = called(
            capsys, "sensitivity", folder, "--texts", texts, "--batch", 2, "--tokens", 8,
            "--include", "*.layer.0.*", "--budget-bytes", 40_000,
        )  # fmt: skip
        assert code == 0
        assert "random tokens" not in err
        assert out.startswith("layer ")
        schemes = json.loads(out[out.index("{") :])
        assert set(schemes.values()) == {"int8", None}
        model = transformers.BertForMaskedLM.from_pretrained(folder)
        held = qnn.convert(model, schemes).state_dict(keep_vars=True).values()
        size = sum(t.numel() * t.element_size() for t in {id(t): t for t in held}.values())
        assert size <= 40_000


class TestErrors:
    def check(self, capsys: Any, folder: Path, words: str, command: str = "summary") -> None:
        code, _, err = called(capsys, command, folder)
        assert code == 1
        assert err.startswith(f"python -m qnn {command}: ")
        assert words in err

    def test_wrong_folders(self, folder: Path, tmp_path: Path, capsys: Any) -> None:
        self.check(
            capsys, tmp_path / "none", "is not a folder; give one that save_pretrained wrote"
        )
        self.check(capsys, tmp_path, "has no config.json; give one", "bench")
        config = tmp_path / "config.json"
        config.write_text("{")
        self.check(capsys, tmp_path, "is not JSON")
        config.write_text("[]")
        self.check(capsys, tmp_path, "holds a list; a config is an object")
        config.write_text('{"architectures": ["Nothing"]}')
        self.check(capsys, tmp_path, "names the class 'Nothing', which transformers ")
        config.write_text((folder / "config.json").read_text())
        self.check(capsys, tmp_path, "no file named", "sensitivity")

    def test_without_transformers(self, folder: Path, capsys: Any) -> None:
        with mock.patch.dict(sys.modules, transformers=None):
            self.check(
                capsys, folder, "model folders need transformers, which is not installed: pip"
            )

    def test_wrong_options(self, folder: Path, tmp_path: Path, capsys: Any) -> None:
        texts = tmp_path / "empty.txt"
        texts.write_text("\n")
        for options, words in (
            (["--scheme", "int9"], "unknown scheme"),
            (["--texts", texts], "has no lines of text"),
            (["--include", "nothing"], "matches no module"),
            (["--tokens", 8, "--budget-bytes", 10], "budget_bytes=10 (10 B) cannot be reached"),
        ):
            code, _, err = called(capsys, "sensitivity", folder, *options)
            assert code == 1
            assert words in err

    def test_a_model_without_a_vocabulary(self, tmp_path: Path, capsys: Any) -> None:
        config = transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
            image_size=16, patch_size=8,
        )  # fmt: skip
        transformers.ViTModel(config).save_pretrained(tmp_path)
        code, _, err = called(capsys, "bench", tmp_path)
        assert code == 1
        assert "ViTModel has no vocabulary to take random tokens from; save batches with" in err
        torch.save({"pixel_values": torch.randn(1, 3, 16, 16)}, tmp_path / "batch.pt")
        options = ("--inputs", tmp_path / "batch.pt", "--seconds", 0.01)
        assert called(capsys, "bench", tmp_path, *options)[0] == 0

"""The files of a checkpoint: tensors that stay mapped from them, and what its configs say."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch

_INDEX = "model.safetensors.index.json"


class Files:
    """The safetensors files of a folder, or one file, and its `config.json`.

    Attributes:
        tensors: all tensors by name, memory-mapped.
        config: the `quantization_config`; empty where there is none.
    """

    def __init__(self, path: str | Path) -> None:
        """
        Raises:
            ValueError: there are no such files, they are cut off, or the index and the files name
                different tensors.
        """
        self.path = Path(path)
        self.folder = self.path if self.path.is_dir() else self.path.parent
        self.tensors = dict[str, torch.Tensor]()
        for file in self._parts():
            found = _load(file)
            if twice := found.keys() & self.tensors.keys():
                raise ValueError(f"{file}: it has {min(twice)}, which another file has too.")
            self.tensors |= found
        self._check_index()
        self.config = self._config()

    def _parts(self) -> list[Path]:
        if self.path.is_file():
            if self.path.suffix != ".safetensors":
                raise ValueError(f"{self.path}: a checkpoint is a .safetensors file or a folder.")
            self.index = None
            return [self.path]
        if not self.path.is_dir():
            raise ValueError(f"{self.path} is not a folder nor a file.")
        self.index = _json(self.path / _INDEX, "weight_map")
        if self.index is not None:
            names = sorted(set(map(str, self.index.values())))
            if bad := [n for n in names if Path(n).name != n]:
                raise ValueError(
                    f"{self.path / _INDEX} names a file of another folder: {bad[0]!r}."
                )
            parts = [self.path / name for name in names]
            if missing := [part.name for part in parts if not part.is_file()]:
                raise ValueError(f"{self.path} has no {missing[0]}, which its index names.")
            return parts
        parts = sorted(self.path.glob("*.safetensors"))
        if not parts:
            raise ValueError(f"{self.path} has no .safetensors file; pickles are not read.")
        if len(parts) > 1:
            raise ValueError(
                f"{self.path} has {len(parts)} .safetensors files and no {_INDEX}: it is not known "
                "which belong together; name one file."
            )
        return parts

    def _check_index(self) -> None:
        if self.index is None:
            return
        if missing := self.index.keys() - self.tensors.keys():
            raise ValueError(
                f"{self.path / _INDEX} names {min(missing)}, which is in none of the files."
            )

    def _config(self) -> dict[str, Any]:
        found = (_json(self.folder / "config.json") or {}).get("quantization_config")
        if not found:
            beside = _json(self.folder / "hf_quant_config.json", "quantization")
            found = {"quant_method": "modelopt", **beside} if beside else {}
        if not isinstance(found, dict):
            raise ValueError(f"{self.folder}: its quantization_config is not an object.")
        return found


def _load(file: Path) -> dict[str, torch.Tensor]:
    try:
        load_file: Any = importlib.import_module("safetensors.torch").load_file
    except ModuleNotFoundError as error:
        raise ImportError(
            f"checkpoints need safetensors, which is not installed: pip install safetensors "
            f"({error})."
        ) from None
    try:
        found: dict[str, torch.Tensor] = load_file(file)
    except Exception as error:  # safetensors has one class for all that is wrong with a file
        raise ValueError(f"{file} cannot be read, and may be cut off: {error}") from None
    return found


def _json(file: Path, key: str = "") -> Any:
    """An object of a file, or of a key in it; None where there is no such file."""
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    found = found.get(key) if key and isinstance(found, dict) else found
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no object{f' {key!r}' if key else ''}.")
    return found


__all__ = ["Files"]

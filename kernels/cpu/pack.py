"""Packed weights, cached by the ops.

A module holds a plain int8 weight; what an engine makes of it lives here, keyed on the weight's
memory and dropped with its storage, so nothing of it is ever saved, copied, pickled or traced. A
pack is used only while the weight is unchanged:

- writes that autograd can see (`neg_()`, an optimiser, `load_state_dict`) move the tensor's version
  counter;
- writes behind its back (`.data`, NumPy) do not, but one that changes any of the middle 256 bytes
  is seen all the same;
- an inference tensor has no version counter, so its pack is never kept. `qnn.QLinear` never holds
  one.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from ctypes import string_at
from typing import Any, NamedTuple

import torch

_SAMPLE = 256


class _Entry(NamedTuple):
    make: Callable[[torch.Tensor], Any]
    storage: weakref.ref[torch.UntypedStorage]
    version: int
    shape: torch.Size
    middle: int
    sample: bytes
    pack: Any


_PACKS: dict[int, _Entry] = {}
_LOCK = threading.RLock()


def packed(w: torch.Tensor, make: Callable[[torch.Tensor], Any]) -> Any:
    """`make(w)`, from the cache while `w` is unchanged. Any thread may call it."""
    if w.is_inference() or not w.is_contiguous():
        return make(w.contiguous())
    entry = _PACKS.get(w.data_ptr())
    if entry is not None and _is_current(entry, w, make):
        return entry.pack
    with _LOCK:
        entry = _PACKS.get(w.data_ptr())
        if entry is None or not _is_current(entry, w, make):
            entry = _add(w, make)
        return entry.pack


def _is_current(entry: _Entry, w: torch.Tensor, make: Callable[[torch.Tensor], Any]) -> bool:
    return (
        entry.version == w._version
        and entry.shape == w.shape
        and entry.make is make
        and entry.storage() is w.untyped_storage()
        and string_at(entry.middle, len(entry.sample)) == entry.sample
    )


def _add(w: torch.Tensor, make: Callable[[torch.Tensor], Any]) -> _Entry:
    key, size = w.data_ptr(), min(_SAMPLE, w.numel())
    _PACKS.pop(key, None)  # freed before its successor is made
    middle = key + (w.numel() - size) // 2

    def drop(storage: weakref.ref[torch.UntypedStorage]) -> None:
        if key in _PACKS and _PACKS[key].storage is storage:
            del _PACKS[key]

    storage = weakref.ref(w.untyped_storage(), drop)
    entry = _Entry(make, storage, w._version, w.shape, middle, string_at(middle, size), make(w))
    _PACKS[key] = entry
    return entry


def is_packed(w: torch.Tensor) -> bool:
    """Whether a pack of this weight is held."""
    return w.device.type == "cpu" and w.data_ptr() in _PACKS


def count() -> int:
    """How many packs are held in this process."""
    return len(_PACKS)

"""The library of the C++ kernels: found, built and loaded, once a process.

It is looked for in the package (a wheel may bring it), then in the user's cache (`cache.py`). It
counts only if its digest (`toolchain.digest`) is that of the sources in the package. Where there is
none, the first call that needs it builds it, once for each user and digest. A build that failed is
remembered and not tried again, in any process, before `python -m qnn build`.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO

import torch

from qnn.kernels.cpu import cache
from qnn.kernels.cpu.toolchain import (
    LIBRARY,
    RECORD,
    BuildError,
    Compiler,
    NoCompilerError,
    Record,
    build_library,
    digest,
    find_compiler,
)
from qnn.kernels.torch_private import plain_dispatch

__all__ = [
    "CSRC",
    "BuildError",
    "Status",
    "build",
    "ensure",
    "find",
    "preferred",
    "ready",
    "replaces",
    "serves",
    "status",
]

# Through the links of an editable install, to the sources themselves.
CSRC = Path(__file__).resolve().parent / "csrc"

State = Literal["prebuilt", "built", "absent", "failed", "disabled"]


@dataclass(frozen=True)
class Status:
    """What became of the native kernels in this process.

    Attributes:
        state: `prebuilt` or `built` if the library is loaded; `absent` if there is none yet, or no
            compiler to build it; `failed` if building or loading went wrong; `disabled` where
            there are no native kernels for the system.
        path: the library.
        reason: why it is not loaded, and what to do.
        compiler: what built it, or would.
        missing: the tiers that this compiler was too old for.
        tiers: what the loaded library says of each tier on this CPU, the best first.
    """

    state: State
    path: Path | None = None
    reason: str = ""
    compiler: str = ""
    missing: tuple[str, ...] = ()
    tiers: tuple[tuple[str, str], ...] = ()

    @property
    def loaded(self) -> bool:
        return self.state in ("prebuilt", "built")


class _Replaceable(Protocol):
    name: str

    def enable(self, key: str) -> None: ...

    def disable(self, key: str) -> None: ...

    def declare_direct(self) -> None: ...

    def go_direct(self) -> None: ...


_RECURRENT = ("int8", "int8_static", "int8_weight")
# The ops whose CPU kernels the library brings. It is loaded once all of them are declared: else the
# kernel of a later declaration would lie over its own.
_BROUGHT = {
    "int8_quantize",
    "int8_linear",
    "int8_rows_linear",
    "int8_static_linear",
    "int8_weight_linear",
    "fp8_weight_linear",
    "nvfp4_weight_linear",
    *(f"{scheme}_{cell}" for scheme in _RECURRENT for cell in ("lstm", "gru")),
}
_replaced: list[_Replaceable] = []


def replaces(*ops: _Replaceable) -> None:
    """Name declared ops whose CPU kernels the library brings; with the last of them it is loaded,
    if it is there.
    """
    _replaced.extend(ops)
    for op in ops:
        op.declare_direct()
    if {op.name for op in _replaced} >= _BROUGHT:
        ready()


def serves(op: _Replaceable) -> bool:
    """Whether the library, where it is loaded, brings the CPU kernel of an op."""
    return op in _replaced


def preferred(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The CPU kernel of `qnn::name` while the library is not loaded: the first call builds it and
    goes through it; where that cannot be, `kernel` serves.
    """

    def run(*args: Any) -> Any:
        if ensure().loaded:
            return getattr(torch.ops.qnn, name).default(*args)
        return kernel(*args)

    return run


_NOT_BUILT = Status(
    "absent", reason="not built yet: the first int8 call builds it, or python -m qnn build"
)
_lock = threading.Lock()
_final: Status | None = None  # decided once a process


def _renew_lock() -> None:
    """A child that was forked in the middle of a build waits for the file lock, not for a thread
    that it does not have.
    """
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def find(csrc: Path = CSRC) -> Path | None:
    """The library of these sources, if there is one. Compiles nothing and runs nothing."""
    if _disabled(csrc):
        return None
    key = digest(csrc)
    brought, record = csrc.parent / LIBRARY, Record.read(csrc.parent / RECORD)
    if record is not None and record.digest == key and brought.is_file():
        return brought
    return next((path for f in cache.folders(key) if (path := f / LIBRARY).is_file()), None)


def build(*, force: bool = False, log: TextIO | None = None, csrc: Path = CSRC) -> Path:
    """The library of these sources, built if there is none, or again with `force`.

    Progress goes to `log`, one line. An earlier failure is forgotten. When several processes call
    at once, one builds and the others wait for it.

    Raises:
        BuildError: with what to do about it.
    """
    return _build(csrc, force=force, asked=True, log=log)


def ready(csrc: Path = CSRC) -> Status:
    """Load the library if there is one; compiles nothing, prints nothing, raises nothing."""
    global _final
    if _final is not None:
        return _final
    with _lock:
        if _final is not None:
            return _final
        try:
            path = find(csrc)
            if path is None:
                return _not_loaded(csrc)
        except OSError as error:
            return Status("failed", reason=f"cannot read the sources or the cache: {error}")
        _final = _open(path, csrc)
        return _final


def ensure(csrc: Path = CSRC) -> Status:
    """Load the library, building it if need be. Decides once a process, and raises nothing."""
    global _final
    if _final is not None:
        return _final
    with _lock:
        if _final is None:
            _final = _built(csrc)
        return _final


def status(csrc: Path = CSRC) -> Status:
    """As `ready`, and asks which compiler would build what is not there; for `doctor`."""
    now = ready(csrc)
    if now is not _NOT_BUILT:
        return now
    try:
        return replace(now, compiler=find_compiler().name)
    except NoCompilerError as error:
        return Status("absent", reason=str(error))


def _disabled(csrc: Path) -> str:
    if sys.platform != "linux":
        return f"there are no native kernels for {platform.system()}, only for Linux"
    if not next(csrc.glob("*.cpp"), None):
        return f"this installation has no C++ sources in {csrc}: install qnn again"
    return ""


def _not_loaded(csrc: Path) -> Status:
    why = _disabled(csrc)
    if why:
        return Status("disabled", reason=why)
    failures = map(cache.failure, cache.folders(digest(csrc)))
    reason = next(filter(None, failures), "")
    return Status("failed", reason=reason) if reason else _NOT_BUILT


def _built(csrc: Path) -> Status:
    why = _disabled(csrc)
    if why:
        return Status("disabled", reason=why)
    try:
        return _open(_build(csrc, force=False, asked=False, log=sys.stderr), csrc)
    except NoCompilerError as error:
        return Status("absent", reason=str(error))
    except BuildError as error:
        return Status("failed", reason=str(error))


def _open(path: Path, csrc: Path) -> Status:
    try:
        _load(path)
    except OSError as error:
        return Status(
            "failed", path, f"{path} does not load: {error}; try python -m qnn build --force"
        )
    record = Record.read(path.with_name(RECORD)) or Record("", "unknown", ())
    return Status(
        "prebuilt" if path.parent == csrc.parent else "built",
        path,
        compiler=record.compiler,
        missing=record.missing,
        tiers=_tiers(),
    )


def _load(path: Path) -> None:
    """Put the library's kernels in the place of the Python ones."""
    for op in _replaced:
        op.disable("CPU")
    try:
        torch.ops.load_library(str(path))
    except OSError:
        for op in _replaced:
            op.enable("CPU")
        raise
    for op in _replaced:
        op.go_direct()


def _tiers() -> tuple[tuple[str, str], ...]:
    """`(("amx", "no CPU support"), ("avx2", "ok"), …)`; empty if the library does not say."""
    try:
        with plain_dispatch():
            text = torch.ops.qnn.cpu_tiers()
    except (AttributeError, RuntimeError):
        return ()
    pairs = (part.partition(":") for part in str(text).split(","))
    return tuple((name.strip(), state.strip()) for name, colon, state in pairs if colon)


def _build(csrc: Path, *, force: bool, asked: bool, log: TextIO | None) -> Path:
    """Who has asked for it gets another try after a failure, and hears the reason from the error
    alone.
    """
    why = _disabled(csrc)
    if why:
        raise BuildError(why)
    try:
        found, key = find(csrc), digest(csrc)
    except OSError as error:
        raise BuildError(f"cannot read the sources or the cache: {error}") from error
    if found is not None and not force:
        return found
    if found is not None and found.parent == csrc.parent:
        raise BuildError(f"the package brings {found}, built from these sources: delete it first")
    with cache.locked(key) as folder:
        library = folder / LIBRARY
        if library.is_file() and not force:  # another process was first
            return library
        known = "" if asked else cache.failure(folder)
        if known:
            raise BuildError(known)
        _build_in(folder, csrc, key, asked, log)
        return library


def _build_in(folder: Path, csrc: Path, key: str, asked: bool, log: TextIO | None) -> None:
    compiler = find_compiler()
    for leftover in folder.glob("tmp-*"):  # of a builder that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    line, torch_folder, outcome = _Line(log, compiler), Path(torch.__path__[0]), "interrupted"
    try:
        with tempfile.TemporaryDirectory(
            prefix="tmp-", dir=folder, ignore_cleanup_errors=True
        ) as scratch:
            build_library(
                csrc, folder / LIBRARY, torch_folder, Path(scratch), compiler=compiler, key=key,
                progress=line.step,
            )  # fmt: skip
        cache.forget(folder)
        outcome = f"done in {time.perf_counter() - line.start:.1f} s"
    except (BuildError, OSError) as error:
        reason = cache.remember(folder, error)
        outcome = "failed" if asked else f"failed: {reason}"
        raise BuildError(reason) from error
    finally:
        line.end(outcome)


class _Line:
    """The one line of progress; it counts only where it can be written over."""

    def __init__(self, stream: TextIO | None, compiler: Compiler) -> None:
        self.start = time.perf_counter()
        self._stream = stream
        self._text = f"qnn: building int8 kernels with {compiler.name} (once, ~20 s) ... "
        self._counts = stream is not None and not stream.closed and stream.isatty()
        self._say(self._text)

    def step(self, done: int, total: int) -> None:
        if self._counts:
            self._say(f"\r{self._text}{done}/{total}")

    def end(self, text: str) -> None:
        self._say(f"\r{self._text}{text}\n" if self._counts else f"{text}\n")

    def _say(self, text: str) -> None:
        if self._stream is None:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # closed, or a pipe without a reader: building goes on
            self._stream = None

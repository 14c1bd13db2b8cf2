"""The library of the C++ kernels: found, built and loaded, once a process.

It is looked for in the package (a wheel may bring it), then in the user's cache (`cache.py`). It
counts only if its digest (`toolchain.digest`) is that of the sources in the package, if it is what
was built, byte for byte, and if nobody else could have put it there (`trust.py`). Where there is
none, the first call that needs it builds it, once for each user and digest. A build that failed is
remembered and not tried again, in any process, before `python -m qnn build`.
"""

from __future__ import annotations

import errno
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TextIO

import torch

from qnn.kernels.cpu import cache
from qnn.kernels.cpu.toolchain import (
    LIBRARY,
    RECORD,
    BuildError,
    Compiler,
    FullError,
    NoCompilerError,
    Record,
    build_library,
    digest,
    find_compiler,
)
from qnn.kernels.op import OPS, on_first_call
from qnn.kernels.torch_private import plain_dispatch

__all__ = [
    "CSRC",
    "BuildError",
    "Status",
    "build",
    "ensure",
    "find",
    "passed_over",
    "ready",
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
        passed_over: libraries and folders that were not taken, each with the reason.
        tiers: what the loaded library says of each tier on this CPU, the best first.
    """

    state: State
    path: Path | None = None
    reason: str = ""
    compiler: str = ""
    missing: tuple[str, ...] = ()
    tiers: tuple[tuple[str, str], ...] = ()
    passed_over: tuple[str, ...] = ()

    @property
    def loaded(self) -> bool:
        return self.state in ("prebuilt", "built")


_NOT_BUILT = Status(
    "absent", reason="not built yet: the first call that needs it builds it, or python -m qnn build"
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
    return None if _disabled(csrc) else _look(csrc)[0]


def passed_over(csrc: Path = CSRC) -> tuple[str, ...]:
    """Libraries and folders that are not taken, each with the reason."""
    try:
        return () if _disabled(csrc) else _look(csrc)[1]
    except OSError as error:
        return (f"{csrc}: {error.strerror}",)


# Libraries that were what was built and did not load, with the loader's words.
_unloadable: dict[Path, str] = {}
_NOT_MAPPED = "failed to map segment"  # what the loader says where no code may run from


def _look(csrc: Path) -> tuple[Path | None, tuple[str, ...]]:
    """The first library that may be loaded, and what was passed over on the way to it."""
    key, passed_over = digest(csrc), list[str]()
    for path, why_not in _candidates(csrc, key):
        why_not = why_not or _unloadable.get(path, "")
        if not why_not:
            return path, tuple(passed_over)
        passed_over.append(f"{path}: {why_not}")
    return None, tuple(passed_over)


def _candidates(csrc: Path, key: str) -> Iterator[tuple[Path, str]]:
    # Whoever could change the package could change its Python too.
    brought = csrc.parent / LIBRARY
    if os.path.lexists(brought):
        yield brought, cache.why_not_library(brought, key, owned=False)
    yield from cache.libraries(key)


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
        why = _disabled(csrc)
        if why:
            return Status("disabled", reason=why)
        try:
            while True:
                path, passed_over = _look(csrc)
                if path is None:
                    return _not_loaded(csrc, passed_over)
                opened = _open(path, csrc)
                if opened.loaded or _NOT_MAPPED not in opened.reason:
                    _final = replace(opened, passed_over=passed_over)
                    return _final
        except OSError as error:
            return Status("failed", reason=f"cannot read the sources or the cache: {error}")


def ensure(csrc: Path = CSRC) -> Status:
    """Load the library, building it if need be. Decides once a process, and raises nothing."""
    global _final
    if _final is not None:
        return _final
    with _lock:
        if _final is None:
            _final = _built(csrc)
        return _final


@on_first_call
def _there() -> bool:
    return ensure().loaded


def status(csrc: Path = CSRC) -> Status:
    """As `ready`, and asks which compiler would build what is not there; for `doctor`."""
    now = ready(csrc)
    if now.reason != _NOT_BUILT.reason:
        return now
    obstacle = cache.obstacle(digest(csrc))
    try:
        return replace(
            now,
            compiler=find_compiler().name,
            reason=f"not built yet: {obstacle}" if obstacle else now.reason,
        )
    except NoCompilerError as error:
        return replace(now, reason=str(error))


def _disabled(csrc: Path) -> str:
    if sys.platform != "linux":
        return f"there are no native kernels for {platform.system()}, only for Linux"
    if (path := cache.forbidden()) is not None:
        return f"native code is forbidden by {path}"
    if not next(csrc.rglob("*.cpp"), None):
        return f"this installation has no C++ sources in {csrc}: install qnn again"
    return ""


def _not_loaded(csrc: Path, passed_over: tuple[str, ...] = ()) -> Status:
    reason = cache.failure(digest(csrc))
    now = Status("failed", reason=reason) if reason else _NOT_BUILT
    return replace(now, passed_over=passed_over) if passed_over else now


def _built(csrc: Path) -> Status:
    why = _disabled(csrc)
    if why:
        return Status("disabled", reason=why)
    try:
        while True:
            path = _build(csrc, force=False, asked=False, log=sys.stderr)
            opened = _open(path, csrc)
            if opened.loaded or _NOT_MAPPED not in opened.reason:
                break  # else it is passed over from now on
    except NoCompilerError as error:
        opened = Status("absent", reason=str(error))
    except (BuildError, OSError) as error:
        opened = Status("failed", reason=str(error))
    return replace(opened, passed_over=passed_over(csrc))


def _open(path: Path, csrc: Path) -> Status:
    try:
        _load(path)
    except OSError as error:
        _unloadable[path] = f"does not load: {error}"
        return Status(
            "failed", path, f"{path} does not load: {error}; try python -m qnn build --force"
        )
    record = Record.read(path.with_name(RECORD)) or Record("", "unknown", (), 0, "")
    return Status(
        "prebuilt" if path.parent == csrc.parent else "built",
        path,
        compiler=record.compiler,
        missing=record.missing,
        tiers=_tiers(),
    )


def _load(path: Path) -> None:
    """Load the library, and let it have the place of the Python kernels."""
    torch.ops.load_library(str(path))
    with plain_dispatch():
        for op in OPS.values():
            if op.native:
                op.go_native(torch.ops.qnn.cpu_declare)


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
    # Where a library could not be mapped, another would not be.
    skipped = {} if asked else {path.parent: why for path, why in _unloadable.items()}
    try:
        found, key = _look(csrc)[0], digest(csrc)
        if found is not None and not force:
            return found
        if found is not None and found.parent == csrc.parent:
            raise BuildError(
                f"the package brings {found}, built from these sources: delete it first"
            )
        while True:
            with cache.locked(key, lambda line: _say(log, line), skipped) as folder:
                library = folder / LIBRARY
                if not force and not cache.why_not_library(library, key):
                    return library  # another process was first
                known = "" if asked else cache.failure_in(folder)
                if known:
                    raise BuildError(known)
                try:
                    _build_in(folder, csrc, key, asked, log)
                    return library
                except FullError as error:
                    skipped[folder] = str(error)  # the next one may lie on another disk
    except OSError as error:
        raise BuildError(f"cannot read the sources or the cache: {error}") from error


def _build_in(folder: Path, csrc: Path, key: str, asked: bool, log: TextIO | None) -> None:
    compiler = find_compiler()
    for leftover in folder.glob("tmp-*"):  # of a builder that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    line, torch_folder, outcome = _Line(log, compiler), Path(torch.__path__[0]), "interrupted"

    def step(done: int, total: int) -> None:
        cache.sign_of_life(folder)
        line.step(done, total)

    try:
        with tempfile.TemporaryDirectory(
            prefix="tmp-", dir=folder, ignore_cleanup_errors=True
        ) as scratch:
            build_library(
                csrc, folder / LIBRARY, torch_folder, Path(scratch), compiler=compiler, key=key,
                progress=step,
            )  # fmt: skip
        cache.forget(folder)
        outcome = f"done in {time.perf_counter() - line.start:.1f} s"
    except (BuildError, OSError) as error:
        if isinstance(error, FullError) or getattr(error, "errno", 0) in _FULL:
            outcome = "failed: the disk is full"
            raise FullError("the disk is full") from error
        reason = cache.remember(folder, error)
        outcome = "failed" if asked else f"failed: {reason}"
        raise BuildError(reason) from error
    finally:
        line.end(outcome)


_FULL = (errno.ENOSPC, errno.EDQUOT)


class _Line:
    """The one line of progress; it counts only where it can be written over."""

    def __init__(self, stream: TextIO | None, compiler: Compiler) -> None:
        self.start = time.perf_counter()
        self._stream = stream
        self._text = f"qnn: building int8 kernels with {compiler.name} (once, ~30 s) ... "
        self._counts = stream is not None and not stream.closed and stream.isatty()
        self._say(self._text)

    def step(self, done: int, total: int) -> None:
        if self._counts:
            self._say(f"\r{self._text}{done}/{total}")

    def end(self, text: str) -> None:
        self._say(f"\r{self._text}{text}\n" if self._counts else f"{text}\n")

    def _say(self, text: str) -> None:
        if not _say(self._stream, text):
            self._stream = None


def _say(stream: TextIO | None, text: str) -> bool:
    """Whether it could be said."""
    try:
        if stream is not None:
            stream.write(text)
            stream.flush()
    except (OSError, ValueError):  # closed, or a pipe without a reader: building goes on
        return False
    return stream is not None

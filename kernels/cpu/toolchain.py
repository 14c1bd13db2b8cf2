"""From a folder of C++ sources to one shared library, with the compiler of this machine.

Needs the standard library only: `setup.py` uses it too, before qnn can be imported. Where the
result lies, and who builds when several processes start at once, is decided in `native.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

LIBRARY = "libqnn_cpu.so"
RECORD = "libqnn_cpu.json"

# The target version keeps torch's headers, of whatever release, to the stable interface of 2.11,
# the oldest torch of qnn: the library is tied to no torch release, and the digest names none.
COMMON = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-ffp-contract=off",  # a float product is rounded before it is added, as the references do
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    *("-Wall", "-Wextra"),
    # Vectors are passed between functions of one file only; and GCC 12 suspects its own headers.
    *("-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"),
)
# No rpath: the libtorch_cpu that `import torch` has loaded satisfies the library.
LINK = ("-shared", "-ltorch_cpu", "-ltorch")

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"),
    *("-mfma", "-mf16c"),
)
# Files for x86-64 alone, with their flags; each runs only where the CPU has what it was built for.
MACHINE_FLAGS = {
    "avx2.cpp": _AVX2,
    "avx_vnni.cpp": (*_AVX2, "-mavxvnni"),
    "avx512_vnni.cpp": _AVX512,
    "amx.cpp": (*_AVX512, "-mamx-tile", "-mamx-int8", "-mamx-bf16"),
}
# A tier whose file leaves to another's what both would compile alike is not built without it.
BASES = {"amx.cpp": "avx512_vnni.cpp", "avx_vnni.cpp": "avx2.cpp"}
# Of the files that are no tier's: they check and hand over. With -O1 an eager call of 64 by 64
# takes 16.4 µs and not 15.7.
CALM = ("-O2",)


class BuildError(RuntimeError):
    """Why there is no library, and what to do about it; `log` has the compiler's own words."""

    def __init__(self, reason: str, log: str = "") -> None:
        super().__init__(reason)
        self.log = log


class FullError(BuildError):
    """The disk has no room for the build."""


_FULL = ("No space left on device", "Disk quota exceeded")


class NoCompilerError(BuildError):
    """No C++ compiler was found, so that nothing was tried."""


@dataclass(frozen=True)
class Compiler:
    """A command, such as `("/usr/bin/ccache", "g++")`, and the first line of its `--version`."""

    command: tuple[str, ...]
    version: str

    @property
    def name(self) -> str:
        """`g++ 12.2.0`"""
        number = re.search(r"\d+\.\d+(\.\d+)*", self.version)
        program = next(word for word in reversed(self.command) if not word.startswith("-"))
        return " ".join([Path(program).name, *([number[0]] if number else [])])


@dataclass(frozen=True)
class Record:
    """What is written beside a library: the digest of its sources, the compiler, the tiers that
    this compiler is too old for, and what the library is known by.
    """

    digest: str
    compiler: str
    missing: tuple[str, ...]
    size: int
    sha256: str

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(vars(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path, text: Callable[[Path], str] = Path.read_text) -> Record | None:
        """The record, or None where there is none that can be read; `text` reads the file."""
        try:
            data = json.loads(text(path))
            missing = tuple(map(str, data["missing"]))
            size, sha256 = int(data["size"]), str(data["sha256"])
            return cls(str(data["digest"]), str(data["compiler"]), missing, size, sha256)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None


def digest(csrc: Path) -> str:
    """16 hex digits over the paths and contents of the sources, the flags and the machine.

    Neither the compiler nor torch is part of it: asking the one costs a process, and the other
    offers the same interface from 2.11 on.
    """
    table = (COMMON, LINK, MACHINE_FLAGS, BASES, CALM, platform.machine())
    total = hashlib.sha256(repr(table).encode())
    for path in sorted([*csrc.rglob("*.cpp"), *csrc.rglob("*.h")]):
        content, name = path.read_bytes(), path.relative_to(csrc).as_posix()
        total.update(f"{name} {len(content)} ".encode() + content)
    return total.hexdigest()[:16]


def find_compiler() -> Compiler:
    """`$CXX`, or the first of c++, g++ and clang++ on the PATH.

    Raises:
        NoCompilerError: there is none.
    """
    chosen = os.environ.get("CXX", "").strip()
    if chosen:
        fix = "; set CXX to a compiler, or unset it to use c++, g++ or clang++"
        try:
            words = shlex.split(chosen)
        except ValueError as error:
            raise NoCompilerError(
                f"no C++ compiler: CXX is {chosen!r}, which is not a command ({error}){fix}"
            ) from None
        path = shutil.which(words[0]) if words else None
        if path is None:
            raise NoCompilerError(
                f"no C++ compiler: CXX is {chosen!r}, which is not a program here{fix}"
            )
        command = (path, *words[1:])
    else:
        fix = "; install g++ or clang++, or set CXX"
        paths = [path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))]
        if not paths:
            raise NoCompilerError(f"no C++ compiler{fix}")
        command = (paths[0],)
    code, version = _version(command)
    if code != 0:
        how = f"exit code {code}" if isinstance(code, int) else code
        raise NoCompilerError(
            f"no C++ compiler: {shlex.join(command)} does not run (--version: {how}){fix}"
        )
    return Compiler(command, version)


# Seconds in which a compiler says its version, compiles one line, and compiles or links a file: in
# 0.01, 0.1 and 10 where nothing else runs.
_SAID, _TRIED, _COMPILED = 20.0, 60.0, 600.0


def _version(command: tuple[str, ...]) -> tuple[int | str, str]:
    """The outcome of `--version`, and the first line of what it says."""
    end, out = os.pipe()
    try:
        code = _Process([*command, "--version"], out, subprocess.DEVNULL).wait(_SAID)
        os.set_blocking(end, False)  # whoever holds the other end still
        output = os.read(end, 1 << 16).decode(errors="replace")
    except BlockingIOError:
        output = ""
    except OSError as error:
        code, output = error.strerror or str(error), ""
    finally:
        os.close(end)
        os.close(out)
    return code, next(iter(output.splitlines()), "version unknown")


class _Process:
    """A command in a process group of its own, which ends with all that it has started."""

    def __init__(
        self, command: list[str], out: int, err: int, environment: dict[str, str] | None = None
    ) -> None:
        self._start = time.monotonic()
        self._process = subprocess.Popen(  # noqa: S603, the user's own compiler
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment,
            start_new_session=True,  # Ctrl-C is for Python, which then stops them all
        )  # fmt: skip

    def poll(self, limit: float) -> int | str | None:
        """Its exit code; None while it runs; after `limit` seconds it is stopped, in words."""
        code = self._process.poll()
        if code is None and time.monotonic() - self._start > limit:
            self.stop()
            return f"stopped after {limit:.0f} s"
        return code

    def wait(self, limit: float) -> int | str:
        try:
            while (code := self.poll(limit)) is None:
                time.sleep(0.005)
        finally:
            self.stop()
        return code

    def stop(self) -> None:
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def build_library(
    csrc: Path,
    target: Path,
    torch_folder: Path,
    scratch: Path,
    *,
    compiler: Compiler,
    key: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Record:
    """Compile and link the `.cpp` files in `csrc` and its folders to `target`, with its record
    beside it. Their names are unique; `csrc` itself is where includes are looked for.

    Objects lie in `scratch`, on the same file system as `target`, which appears whole or not at
    all. `key` is the digest of the sources, `progress(done, total)` counts commands.

    Raises:
        BuildError: a file does not compile, the library does not link, torch has no headers, or
            the sources have changed meanwhile.
    """
    include, lib = torch_folder / "include", torch_folder / "lib"
    if not (include / "torch" / "csrc" / "stable").is_dir():
        raise BuildError(f"torch has no C++ headers in {include}: install torch from its wheel")
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    wanted = [p for p in sorted(csrc.rglob("*.cpp")) if x86 or p.name not in MACHINE_FLAGS]
    tiers = [path.name for path in wanted if path.name in MACHINE_FLAGS]
    refused = _refused(compiler, tiers, scratch)
    left_out = [name for name in MACHINE_FLAGS if name in refused or name not in tiers]
    defines = [f"-DQNN_NO_{Path(name).stem.upper()}" for name in left_out]

    compiled = [path for path in wanted if path.name not in refused]
    objects = [scratch / f"{path.stem}.o" for path in compiled]
    commands = {}
    for path, out in zip(compiled, objects, strict=True):
        # Files for every machine hear which of the others were left out.
        calm = () if path.name == "portable.cpp" else CALM
        flags = MACHINE_FLAGS.get(path.name, (*calm, *defines))
        commands[path.name] = [
            *(*compiler.command, *COMMON, *flags, f"-I{csrc}", "-isystem", str(include)),
            *("-c", str(path), "-o", str(out)),
        ]
    total = len(commands) + 1
    _run_all(compiler, commands, scratch, lambda done: progress(done, total))
    make_local([path for path in objects if f"{path.stem}.cpp" in MACHINE_FLAGS], scratch)
    whole = scratch / LIBRARY
    link = [*compiler.command, *map(str, objects), "-o", str(whole), f"-L{lib}", *LINK]
    _run_all(compiler, {LIBRARY: link}, scratch, lambda done: progress(total, total))
    if digest(csrc) != key:
        raise BuildError(f"the sources in {csrc} changed while they were compiled: build again")
    with whole.open("rb") as file:  # a power cut must not leave a name without its bytes
        os.fsync(file.fileno())
        content = file.read()
    record = Record(
        key,
        f"{compiler.name} ({shlex.join(compiler.command)})",
        tuple(Path(name).stem for name in refused),
        len(content),
        hashlib.sha256(content).hexdigest(),
    )
    record.write(scratch / RECORD)
    whole.chmod(0o755)  # whatever the umask is, nobody else may write to what will be loaded
    (scratch / RECORD).chmod(0o644)
    _replace(scratch / RECORD, target.with_name(RECORD))
    _replace(whole, target)
    return record


def make_local(objects: list[Path], scratch: Path) -> None:
    """Leave a tier's object no global name but the tier's. Of an inline function that several
    objects have the linker keeps one copy, perhaps one with instructions that this CPU lacks. The
    sources share none; this holds whatever a compiler makes of them. Where there is no program for
    it, or it fails, the objects stay as they are.
    """
    program = shutil.which("objcopy") or shutil.which("llvm-objcopy")
    for path in objects if program else []:
        tier = f"_ZN3qnn{len(path.stem)}{path.stem}E"
        # Out of its group, else a function would still be one for all objects.
        options = [f"--keep-global-symbol={tier}", "--remove-section=.group"]
        command = [str(program), *options, str(path)]
        quiet = subprocess.DEVNULL
        _Process(command, quiet, quiet, _environment(scratch)).wait(_TRIED)


def _replace(new: Path, old: Path) -> None:
    if old.is_dir() and not old.is_symlink():  # which no file replaces
        shutil.rmtree(old)
    os.replace(new, old)


def _refused(compiler: Compiler, names: list[str], scratch: Path) -> list[str]:
    """The files whose flags, or whose base's, the compiler does not know, each asked with one line
    of C++.
    """
    line = scratch / "flags.cc"
    line.write_text("int flags;\n")
    asked = {
        name: _Process(
            [*compiler.command, *MACHINE_FLAGS[name], "-c", str(line), "-o", f"{scratch / name}.o"],
            subprocess.DEVNULL, subprocess.DEVNULL, _environment(scratch),
        )
        for name in names
    }  # fmt: skip
    codes = {name: process.wait(_TRIED) for name, process in asked.items()}
    stopped = next((code for code in codes.values() if isinstance(code, str)), None)
    if stopped is not None:
        raise BuildError(f"{compiler.name} could not compile one line (it was {stopped})")
    known = [name for name, code in codes.items() if code == 0]
    return [n for n in names if n not in known or BASES.get(n, n) not in known]


def _environment(scratch: Path) -> dict[str, str]:
    """A compiler's own files lie in `scratch` too, and not on another disk, which may be full."""
    return {**os.environ, "TMPDIR": str(scratch)}


def _run_all(
    compiler: Compiler,
    commands: dict[str, list[str]],
    scratch: Path,
    finished: Callable[[int], None],
) -> None:
    """Run all commands, one a core at a time; the first failure stops the rest. `finished(count)`
    is called at least twice a second.
    """
    waiting = list(commands)
    running: dict[str, _Process] = {}
    done, told = 0, time.monotonic()
    try:
        while waiting or running:
            while waiting and len(running) < _cores():
                name = waiting.pop(0)
                with (scratch / f"{name}.log").open("wb") as log:
                    running[name] = _Process(
                        commands[name], log.fileno(), log.fileno(), _environment(scratch)
                    )
            for name, process in list(running.items()):
                code = process.poll(_COMPILED)
                if code is None:
                    continue
                del running[name]
                if code != 0:
                    raise _failure(compiler, name, commands[name], code, scratch)
                done += 1
                finished(done)
            if time.monotonic() - told > 0.5:
                told = time.monotonic()
                finished(done)
            time.sleep(0.01)
    finally:
        for process in running.values():
            process.stop()


def _failure(
    compiler: Compiler, name: str, command: list[str], code: int | str, scratch: Path
) -> BuildError:
    output = (scratch / f"{name}.log").read_text(encoding="utf-8", errors="replace")[:20_000]
    if isinstance(code, str):
        how = f"was {code}"
    else:
        how = f"was killed by signal {-code}" if code < 0 else f"gave exit code {code}"
    lines = output.splitlines() or ["no output"]
    told = next((line for line in lines if "error" in line.lower()), lines[-1]).strip()
    told = told.replace(f"{scratch}{os.sep}", "")[:300]
    verb = "link" if name == LIBRARY else "compile"
    kind = FullError if any(words in output for words in _FULL) else BuildError
    return kind(
        f"{compiler.name} could not {verb} {name} ({how}): {told}",
        f"{compiler.version}\n{shlex.join(command)}\n{name} {how}\n\n{output}",
    )


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def build_into(folder: Path, csrc: Path, torch_folder: Path) -> Record:
    """Build `csrc` into `folder`, for a wheel: no lock, no cache."""
    with tempfile.TemporaryDirectory(prefix="tmp-", dir=folder) as scratch:
        return build_library(
            csrc, folder / LIBRARY, torch_folder, Path(scratch), compiler=find_compiler(),
            key=digest(csrc),
        )  # fmt: skip

"""The C++ kernels without torch: `tests/cpp/kernel_test.cpp` holds every tier against plain loops.

It is built here in several ways: as the package builds the kernels, with operands at guard pages;
with AMX emulated and AVX-VNNI in AVX-512's encoding, so that their code runs on CPUs without them;
with AVX2's products of bytes for weights that would not have them;
under sanitizers; and for CPUs that QEMU plays.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from qnn.kernels.cpu.native import CSRC
from qnn.kernels.cpu.toolchain import (
    COMMON,
    MACHINE_FLAGS,
    Compiler,
    NoCompilerError,
    find_compiler,
)

from .tiers import TIERS

CPP = Path(__file__).parent / "cpp"
X86 = platform.machine().lower() in ("x86_64", "amd64")
on_x86 = pytest.mark.skipif(not X86, reason="tiers of x86-64")

_AVX512 = MACHINE_FLAGS["avx512_vnni.cpp"]
_AVX2 = MACHINE_FLAGS["avx2.cpp"]
_CPUINFO = Path("/proc/cpuinfo")
_HAS_VNNI = _CPUINFO.exists() and "avx512_vnni" in _CPUINFO.read_text()
_NO_AVX512 = _CPUINFO.exists() and not _HAS_VNNI
without_avx512 = pytest.mark.skipif(X86 and _HAS_VNNI, reason="AVX-512 has 16 lanes")
EMULATED = {
    "amx.cpp": (*_AVX512, "-DQNN_EMULATE_AMX", f"-I{CPP}"),
    "avx_vnni.cpp": (*_AVX2, "-mavx512vl", "-mavx512vnni", "-DQNN_EVEX")
    if _HAS_VNNI
    else (*_AVX2, "-DQNN_EMULATE_VNNI"),
    # Bytes, whatever the weights are.
    "avx2.cpp": (*_AVX2, "-DQNN_ALWAYS_BYTES"),
}
_CALM = (*(flag for flag in COMMON if flag != "-O3"), "-O1")
_SANITIZED = (*_CALM, "-g1", "-DQNN_HEAP")


@dataclass(frozen=True)
class Variant:
    """A way to build the driver: the tiers' flags, those of every file, and the compiler."""

    tiers: tuple[tuple[str, tuple[str, ...]], ...]
    flags: tuple[str, ...] = COMMON
    link: tuple[str, ...] = ()
    compiler: tuple[str, ...] | None = None

    @property
    def defines(self) -> list[str]:
        """What tells the driver which tiers it is linked without."""
        names = [name for name, _ in self.tiers]
        return [f"-DQNN_NO_{Path(n).stem.upper()}" for n in MACHINE_FLAGS if n not in names]


def variant(machine: dict[str, tuple[str, ...]], **rest: tuple[str, ...]) -> Variant:
    return Variant((*machine.items(), ("portable.cpp", ())), **rest)


_X86_FLAGS = MACHINE_FLAGS if X86 else {}
# Those that the CPU can run; emulated AMX is in AVX-512's encoding.
_X86_EMULATED = {
    name: flags
    for name, flags in ({**MACHINE_FLAGS, **EMULATED} if X86 else {}).items()
    if not (_NO_AVX512 and "-mavx512f" in flags)
}
PACKAGED = variant(_X86_FLAGS)
PLAIN = variant(_X86_EMULATED)
# As many lanes as AVX-512, for a CPU without it. With -O3 it takes a minute to compile.
WIDE = variant({}, flags=(*_CALM, "-DQNN_LANES=16"))
_UNDEFINED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
ADDRESSES = variant(_X86_EMULATED, flags=(*_SANITIZED, *_UNDEFINED), link=_UNDEFINED)
# The loops that threads run are the same in every tier; AMX alone has state of a thread.
THREADS = variant(
    {n: flags for n, flags in _X86_EMULATED.items() if n in ("amx.cpp", "avx512_vnni.cpp")},
    flags=(*_SANITIZED, "-fsanitize=thread"),
    link=("-fsanitize=thread",),
)
AARCH64 = variant({}, link=("-static",), compiler=("aarch64-linux-gnu-g++",))


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


class Drivers:
    """The drivers, each built when it is first asked for, and kept for the next run: in a folder
    that is named by what the sources say.
    """

    def __init__(self, cache: Path, compiler: Compiler) -> None:
        sources = sorted(p for folder in (CSRC, CPP) for p in folder.rglob("*") if p.is_file())
        self.folder = cache / digest([(path.name, path.read_bytes()) for path in sources])
        for other in cache.iterdir():
            if other != self.folder:
                shutil.rmtree(other)
        self.folder.mkdir(exist_ok=True)
        self.compiler = compiler
        self.versions: dict[tuple[str, ...], str] = {}

    def __getitem__(self, wanted: Variant) -> Path:
        command = wanted.compiler or self.compiler.command
        objects = self.objects_of(wanted)
        return self._made("kernel_test", [*command, *wanted.link, "-pthread", *objects], command)

    def _made(self, name: str, job: Sequence[str | Path], command: tuple[str, ...]) -> Path:
        """What `job` makes, which is run if no run before has done so."""
        if command not in self.versions:
            self.versions[command] = run([*command, "--version"])
        made = self.folder / digest(list(map(str, job)), self.versions[command]) / name
        if not made.exists():
            made.parent.mkdir(exist_ok=True)
            unfinished = made.with_suffix(f".{os.getpid()}")
            run([*job, "-o", unfinished])
            unfinished.replace(made)
        return made

    def objects_of(self, wanted: Variant) -> list[Path]:
        command = wanted.compiler or self.compiler.command
        known = tuple(t for t in wanted.tiers if not t[1] or self._knows(command, t[1]))
        wanted = replace(wanted, tiers=known)
        # -w: the compiler's own headers warn under sanitizers.
        base = (*command, *wanted.flags, "-w", "-pthread", f"-I{CSRC}", "-c")
        jobs: list[tuple[str | Path, ...]]
        jobs = [(*base, *flags, CSRC / "tiers" / name) for name, flags in known]
        # Sanitizers look at the kernels alone: the driver's loops would be several times slower.
        plain = [word for word in base if not word.startswith(("-fsanitize", "-fno-sanitize"))]
        jobs.append((*plain, *wanted.defines, CPP / "kernel_test.cpp"))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            made = lambda job: self._made(f"{Path(job[-1]).stem}.o", job, command)  # noqa: E731
            return list(pool.map(made, jobs))

    @staticmethod
    def _knows(command: tuple[str, ...], flags: tuple[str, ...]) -> bool:
        asked = [*command, *flags, "-x", "c++", "-fsyntax-only", os.devnull]
        return subprocess.run(asked, capture_output=True, check=False).returncode == 0


def run(command: list[str | Path], **environment: str) -> str:
    """The standard output; a failure shows what was said, cut to its end."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words, capture_output=True, text=True, errors="replace", check=False, timeout=900,
        env={**os.environ, **environment},
    )  # fmt: skip
    said = f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    assert done.returncode == 0, f"{' '.join(words)} gave {done.returncode}:\n{said}"
    return done.stdout


def check(
    driver: list[str | Path], cases: int, seed: int, tiers: str = "all", kind: str = ""
) -> list[str]:
    """Run so many calls of each tier; the names of the tiers that ran."""
    names = run([*driver]).split() if tiers == "all" else tiers.split(",")
    ran = run([*driver, tiers, str(cases), str(seed), *([kind] if kind else [])]).splitlines()
    assert ran == [f"{name}: {cases} cases, 0 failed" for name in names], ran
    return names


def cases(short: int, long: int) -> pytest.MarkDecorator:
    """A few calls, or many other ones where the long tests run."""
    few = pytest.param(short, 1, marks=pytest.mark.short)
    many = pytest.param(long, 1_000_000, marks=pytest.mark.long)
    return pytest.mark.parametrize(("cases", "seed"), [few, many])


@pytest.fixture(scope="module")
def drivers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Drivers:
    try:
        compiler = find_compiler()
    except NoCompilerError as error:
        pytest.skip(str(error))
    kept = request.config.pluginmanager.hasplugin("cacheprovider")
    return Drivers(
        request.config.cache.mkdir("drivers") if kept else tmp_path_factory.mktemp("drivers"),
        compiler,
    )


def program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"no {name} here")
    return path


def test_every_source_is_driven() -> None:
    paths = [*CSRC.rglob("*.cpp")]
    names = {path.name for path in paths}
    assert len(names) == len(paths)  # objects lie in one folder
    tiers = {*MACHINE_FLAGS, "portable.cpp"}
    assert {Path(name).stem for name in tiers} == {*TIERS}
    families = {
        f"{family}ops.cpp"
        for family in (
            "",
            "attention_",
            "cache_",
            "conv_",
            "conv_transpose_",
            "embedding_",
            "grouped_",
            "histogram_",
            "norm_",
            "recurrent_",
        )
    }
    assert names == tiers | families | {"arguments.cpp", "tier_choice.cpp"}


@cases(200, 2000)
def test_random_calls(drivers: Drivers, cases: int, seed: int) -> None:
    ran = check([drivers[PLAIN]], cases, seed)
    assert ran == [tier for tier in TIERS if tier in ran]
    assert "portable" in ran


@cases(100, 1000)
def test_random_convolutions(drivers: Drivers, cases: int, seed: int) -> None:
    check([drivers[PLAIN]], cases, seed, kind="conv")


@without_avx512
@cases(100, 1000)
def test_random_convolutions_of_16_lanes(drivers: Drivers, cases: int, seed: int) -> None:
    check([drivers[WIDE]], cases, seed, kind="conv")


@cases(100, 600)
def test_random_attention(drivers: Drivers, cases: int, seed: int) -> None:
    check([drivers[PLAIN]], cases, seed, kind="attention")


@without_avx512
@cases(60, 600)
def test_random_attention_of_16_lanes(drivers: Drivers, cases: int, seed: int) -> None:
    check([drivers[WIDE]], cases, seed, kind="attention")


@on_x86
def test_the_emulated_product_of_bfloat16_is_the_units(drivers: Drivers) -> None:
    flags = MACHINE_FLAGS["amx.cpp"]
    if not drivers._knows(drivers.compiler.command, flags):
        pytest.skip("this compiler does not know AMX")
    command = [*drivers.compiler.command, *COMMON, *flags, "-w", CPP / "amx_unit_test.cpp"]
    made = drivers._made("amx_unit_test", command, drivers.compiler.command)
    done = subprocess.run([made], capture_output=True, text=True, check=False)
    if done.returncode == 2:
        pytest.skip("this CPU has no bfloat16 products of AMX")
    assert done.returncode == 0, done.stdout


@on_x86
@cases(200, 1000)
def test_random_calls_on_real_units(drivers: Drivers, cases: int, seed: int) -> None:
    """Where a CPU has what the build above emulates."""
    here = run([drivers[PACKAGED]]).split()
    real = [tier for tier in ("amx", "avx_vnni") if tier in here]
    if not real:
        pytest.skip("this CPU has neither AMX nor AVX-VNNI")
    check([drivers[PACKAGED]], cases, seed, ",".join(real))


@cases(40, 400)
def test_random_calls_under_address_and_undefined_sanitizers(
    drivers: Drivers, cases: int, seed: int
) -> None:
    check([drivers[ADDRESSES]], cases, seed)


@cases(20, 100)
def test_random_calls_under_the_thread_sanitizer(drivers: Drivers, cases: int, seed: int) -> None:
    driver: list[str | Path] = [drivers[THREADS]]
    if shutil.which("setarch"):  # older runtimes cannot bear how far Linux moves addresses now
        driver = ["setarch", "-R", *driver]
    check(driver, cases, seed)


@cases(20, 150)
def test_random_calls_on_aarch64(drivers: Drivers, cases: int, seed: int) -> None:
    program("aarch64-linux-gnu-g++")
    assert check([program("qemu-aarch64"), drivers[AARCH64]], cases, seed) == ["portable"]


@on_x86
@pytest.mark.parametrize(("cpu", "tiers"), [("Nehalem", "portable"), ("Haswell", "avx2,portable")])
@cases(20, 100)
def test_older_cpus(drivers: Drivers, cpu: str, tiers: str, cases: int, seed: int) -> None:
    """A library with all tiers runs those that the CPU has, and they hold no newer instruction."""
    driver = [program("qemu-x86_64"), "-cpu", cpu, drivers[PACKAGED]]
    assert check(driver, cases, seed) == tiers.split(",")


@on_x86
def test_tiers_share_no_code(drivers: Drivers) -> None:
    """The linker keeps one copy of a shared inline function: it may be the one for another CPU."""
    nm = program("nm")
    for file in drivers.objects_of(PACKAGED):
        if f"{file.stem}.cpp" in MACHINE_FLAGS:
            symbols = run([nm, "-C", "--defined-only", "--extern-only", file]).splitlines()
            names = [line.split(maxsplit=2)[2] for line in symbols]
            shared = [name for name in names if not name.startswith("DW.ref.")]
            assert shared == [f"qnn::{file.stem}"]

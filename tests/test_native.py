"""How the C++ kernels are built and found: once, by one process, whole or not at all.

Everything here runs on a small source folder of its own, in a cache of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from parameterized import parameterized

from qnn import __main__ as command
from qnn.kernels.cpu import native, toolchain
from qnn.verbs import doctor

from .common import calls_of, forked

ROOT = Path(__file__).resolve().parent.parent

OPS = """
#include "common.h"
#ifdef QNN_NO_AVX_VNNI
extern "C" __attribute__((visibility("default"))) int without_avx_vnni() { return 1; }
#endif
extern "C" __attribute__((visibility("default"))) int answer() { return kAnswer + portable(); }
"""
STABLE_OPS = """
#include <torch/csrc/stable/library.h>
#include "common.h"
int64_t answer() { return kAnswer + portable(); }
STABLE_TORCH_LIBRARY(qnn_fake, m) { m.def("answer() -> int"); }
STABLE_TORCH_LIBRARY_IMPL(qnn_fake, CompositeExplicitAutograd, m) {
  m.impl("answer", TORCH_BOX(&answer));
}
"""
COMMON_H = "constexpr int kAnswer = 41;\nint portable();\n"
PORTABLE = '#include "common.h"\nint portable() { return 1; }\n'
AVX2 = "#include <immintrin.h>\nint avx2(__m256i x) { return _mm256_extract_epi32(x, 0); }\n"
OBJCOPY = ("objcopy", "llvm-objcopy")
# Two tiers with an inline function of one name, as a compiler may make of a template.
SHARED = """
template <class T> __attribute__((noinline)) T shared(T x) {{ return x + {number}; }}
namespace qnn {{
struct Tier {{ int (*run)(int); }};
extern const Tier {name};
constexpr Tier {name} = {{shared<int>}};
}}
"""
BOTH = """
namespace qnn { struct Tier { int (*run)(int); }; extern const Tier avx2, avx_vnni; }
extern "C" __attribute__((visibility("default"))) int both() {
  return 10 * qnn::avx2.run(0) + qnn::avx_vnni.run(0);
}
"""

# Writes down each call; fails while a file `broken` is there, is slow while a file `slow` is.
WRAPPER = """#!/bin/sh
echo "$@" >> {folder}/calls
case "$*" in
*" -c "*)
    if [ -e {folder}/broken ]; then echo "error: broken on purpose" >&2; exit 1; fi
    if [ -e {folder}/slow ]; then sleep 8; fi ;;
esac
exec {compiler} "$@"
"""

try:
    COMPILER = toolchain.find_compiler().command[0]
except native.BuildError:
    COMPILER = ""


class Case:
    """A source folder, an empty cache and a compiler that counts its calls."""

    @pytest.fixture(autouse=True)
    def _places(self) -> Iterator[None]:
        if not sys.platform.startswith("linux"):
            pytest.skip("native kernels are built on Linux only")
        if not COMPILER:
            pytest.skip("no C++ compiler here")
        with contextlib.ExitStack() as stack:
            self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            self.csrc = self.folder / "package" / "csrc"
            self.csrc.mkdir(parents=True)
            for name, text in (
                ("ops.cpp", OPS),
                ("portable.cpp", PORTABLE),
                ("common.h", COMMON_H),
            ):
                (self.csrc / name).write_text(text)
            self.wrapper = self.folder / "wrapper"
            self.wrapper.write_text(WRAPPER.format(folder=self.folder, compiler=COMPILER))
            self.wrapper.chmod(0o755)
            temporary = self.folder / "tmp"
            temporary.mkdir()
            cache = str(self.folder / "cache")
            stack.enter_context(
                mock.patch.dict(
                    os.environ, XDG_CACHE_HOME=cache, TMPDIR=str(temporary), CXX=str(self.wrapper)
                )
            )
            stack.enter_context(mock.patch.object(tempfile, "tempdir", str(temporary)))
            yield

    def build(self, **options: object) -> Path:
        return native.build(csrc=self.csrc, **options)

    def find(self) -> Path | None:
        return native.find(self.csrc)

    def compiled(self, name: str = "portable.cpp") -> int:
        """How often a file was compiled."""
        calls = self.folder / "calls"
        lines = calls.read_text().splitlines() if calls.exists() else []
        return sum(f"/{name} " in line for line in lines)

    def tried(self) -> int:
        """How many builds began, each of which asks the compiler who it is."""
        return (self.folder / "calls").read_text().splitlines().count("--version")

    def fresh(self, code: str) -> tuple[str, str]:
        """Standard output and error of a fresh process, with `csrc` and `native` at hand."""
        done = subprocess.run(
            [sys.executable, "-c", "import os, sys, time, pathlib, torch\n"
             f"from qnn.kernels.cpu import native\ncsrc = pathlib.Path({str(self.csrc)!r})\n"
             "native._final = None  # whatever import qnn has loaded\n"
             f"native.OPS = {{}}  # of which these sources have none\n{code}"],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr


class TestDigest(Case):
    def test_covers_sources_and_headers_alone(self) -> None:
        before = toolchain.digest(self.csrc)
        (self.csrc / "notes.txt").write_text("not a source")
        (self.csrc / "ops.cpp").touch()
        assert toolchain.digest(self.csrc) == before
        for name in ("ops.cpp", "common.h"):
            (self.csrc / name).write_text((self.csrc / name).read_text() + "// changed\n")
            after = toolchain.digest(self.csrc)
            assert after != before
            before = after
        (self.csrc / "ops.cpp").rename(self.csrc / "sop.cpp")
        assert toolchain.digest(self.csrc) != before

    def test_covers_flags(self) -> None:
        before = toolchain.digest(self.csrc)
        with mock.patch.object(toolchain, "COMMON", (*toolchain.COMMON, "-g")):
            assert toolchain.digest(self.csrc) != before


class TestFind(Case):
    def test_quick_and_without_the_compiler(self) -> None:
        assert self.find() is None
        assert calls_of(self.find) < 2000  # 348; some 1 ms
        assert not (self.folder / "calls").exists()
        assert not (self.folder / "cache").exists()
        assert list((self.folder / "tmp").iterdir()) == []

    def test_a_changed_source_is_another_library(self) -> None:
        first = self.build()
        assert self.find() == first
        (self.csrc / "common.h").write_text(COMMON_H.replace("41", "1"))
        assert self.find() is None
        second = self.build()
        assert first != second
        assert [ctypes.CDLL(str(p)).answer() for p in (first, second)] == [42, 2]

    def test_prebuilt_beside_the_sources(self) -> None:
        built = self.build()
        for path in (built, built.with_name(toolchain.RECORD)):
            shutil.copy(path, self.csrc.parent)
        assert self.find() == self.csrc.parent / toolchain.LIBRARY
        with pytest.raises(native.BuildError, match=r"the package brings .* delete it"):
            self.build(force=True)
        (self.csrc / "portable.cpp").write_text(PORTABLE + "// changed\n")
        assert self.find() is None  # a library of other sources does not count

    def test_a_temporary_folder_that_others_can_write_to(self) -> None:
        os.environ["XDG_CACHE_HOME"] = str(self.wrapper / "below a file")
        base = self.folder / "tmp" / f"qnn-{os.getuid()}"
        assert self.build().parent.parent == base
        assert self.find() is not None
        base.chmod(0o777)
        assert self.find() is None
        with pytest.raises(native.BuildError, match=r"is not a folder.*set XDG_CACHE_HOME"):
            self.build()


class TestBuild(Case):
    def test_once(self) -> None:
        path = self.build()
        assert self.build() == path
        assert self.compiled() == 1
        assert self.build(force=True) == path
        assert self.compiled() == 2
        record = toolchain.Record.read(path.with_name(toolchain.RECORD))
        assert record is not None
        assert record.digest == toolchain.digest(self.csrc)
        assert "wrapper" in record.compiler
        assert sorted(p.name for p in path.parent.iterdir()) == [
            "libqnn_cpu.json",
            "libqnn_cpu.so",
            "lock",
        ]

    @parameterized.expand([("avx_vnni",), ("avx2", "avx_vnni")])
    def test_a_compiler_too_old_for_a_tier_or_its_base(self, *missing: str) -> None:
        if platform.machine() != "x86_64":
            pytest.skip("the tiers are for x86-64")
        for name in ("avx2", "avx_vnni"):
            (self.csrc / f"{name}.cpp").write_text(AVX2.replace("avx2", name))
        text = self.wrapper.read_text()
        refused = "*-mavxvnni*)" if len(missing) == 1 else "*-mavxvnni*) ;; *-mavx2*)"
        self.wrapper.write_text(text.replace(" in\n", f" in\n{refused} exit 1 ;;\n", 1))
        path = self.build()
        record = toolchain.Record.read(path.with_name(toolchain.RECORD))
        assert record is not None
        assert record.missing == missing
        assert (self.compiled("avx2.cpp"), self.compiled("avx_vnni.cpp")) == (2 - len(missing), 0)
        assert ctypes.CDLL(str(path)).without_avx_vnni() == 1

    @parameterized.expand(OBJCOPY)
    def test_tiers_share_no_function(self, program: str) -> None:
        """Each runs its own, whatever the compiler makes of the sources."""
        path = shutil.which(program)
        if platform.machine() != "x86_64" or path is None:
            pytest.skip(f"tiers are for x86-64, and there must be {program}")
        for number, name in enumerate(("avx2", "avx_vnni"), 1):
            (self.csrc / f"{name}.cpp").write_text(SHARED.format(number=number, name=name))
        (self.csrc / "ops.cpp").write_text(OPS + BOTH)
        which = shutil.which
        there = lambda name: None if name in OBJCOPY and name != program else which(name)  # noqa: E731
        with mock.patch.object(shutil, "which", there):
            library = self.build()
        assert ctypes.CDLL(str(library)).both() == 12

    def test_one_line_of_progress(self) -> None:
        plain = io.StringIO()
        self.build(log=plain)
        assert re.search(r"\Aqnn: building .* \.\.\. done in \d+\.\d s\n\Z", plain.getvalue())
        self.build(log=plain)
        assert plain.getvalue().count("\n") == 1
        terminal = io.StringIO()
        terminal.isatty = lambda: True  # type: ignore[method-assign]
        self.build(log=terminal, force=True)
        assert re.search(r"\r.*1/3\r.*2/3\r.*3/3\r.*done in \d+\.\d s\n\Z", terminal.getvalue())
        closed = io.StringIO()
        closed.close()
        self.build(log=closed, force=True)

    def test_interrupted(self) -> None:
        terminal = io.StringIO()
        terminal.isatty = lambda: True  # type: ignore[method-assign]
        with (
            mock.patch.object(native._Line, "step", side_effect=KeyboardInterrupt),
            pytest.raises(KeyboardInterrupt),
        ):
            self.build(log=terminal)
        assert terminal.getvalue().endswith("interrupted\n")
        assert native._not_loaded(self.csrc).state == "absent"  # not a failure
        assert self.build().is_file()


class TestFailure(Case):
    def test_no_compiler(self) -> None:
        os.environ["CXX"] = "nowhere-to-be-found"
        with pytest.raises(native.BuildError, match=r"CXX is 'nowhere-to-be-found'.*unset it"):
            self.build()
        os.environ.pop("CXX")
        with (
            mock.patch.dict(os.environ, PATH=str(self.csrc)),
            pytest.raises(native.BuildError, match=r"install g\+\+ or clang\+\+, or set CXX"),
        ):
            self.build()

    def test_no_compiler_says_nothing(self) -> None:
        os.environ["CXX"] = "nowhere-to-be-found"
        out, err = self.fresh(
            "for status in (native.ensure(csrc), native.ensure(csrc), native.status(csrc)):\n"
            "    print(status.state, status.reason)"
        )
        assert out.count("absent no C++ compiler: CXX is") == 3, out
        assert err == ""

    def test_broken_source(self) -> None:
        (self.csrc / "portable.cpp").write_text('#include "common.h"\nint portable() { return }\n')
        with pytest.raises(
            native.BuildError,
            match=r"could not compile portable.cpp.*error.*the log is .*build.log",
        ):
            self.build(log=(log := io.StringIO()))
        assert log.getvalue().endswith("... failed\n")  # the error has the reason
        (path,) = (self.folder / "cache").rglob("build.log")
        assert "portable.cpp:2" in path.read_text()
        assert list(path.parent.glob("tmp-*")) == []

    def test_remembered_until_build_is_called(self) -> None:
        (self.folder / "broken").touch()
        out, err = self.fresh(
            "for i in range(3):\n"
            "    if not os.fork():\n"
            "        for i in range(2):\n"
            "            status = native.ensure(csrc)\n"
            "        print(status.state, status.reason, flush=True)\n"
            "        os._exit(0)\n"
            "    os.wait()\n"
            "print(native.ready(csrc).state)\n"
        )
        assert out.count("failed wrapper 1") == 3, out  # as in "wrapper 12.2.0 could not"
        assert out.count("broken on purpose; the log is") == 3, out
        assert out.endswith("failed\n")
        assert err.count("\n") == 1, err
        assert "... failed: wrapper" in err
        assert self.tried() == 1
        with pytest.raises(native.BuildError):
            self.build()  # asked for: tried again
        assert self.tried() == 2
        (self.folder / "broken").unlink()
        assert self.build().is_file()
        assert native._not_loaded(self.csrc).state == "absent"  # and forgotten

    def test_sources_that_change_meanwhile(self) -> None:
        def change(*_: object) -> None:
            (self.csrc / "common.h").write_text(COMMON_H + "// changed\n")

        with (
            mock.patch.object(native._Line, "step", change),
            pytest.raises(native.BuildError, match="changed while they were compiled"),
        ):
            self.build()
        assert self.find() is None

    def test_a_library_that_does_not_load(self) -> None:
        def broken(path: Path) -> None:
            raise OSError(f"{path}: undefined symbol: x")

        path = self.build()
        with mock.patch.object(native, "_load", broken), mock.patch.object(native, "_final", None):
            status = native.ensure(self.csrc)
        native._unloadable.clear()
        assert (status.state, status.path) == ("failed", path)
        assert re.search("undefined symbol.*try python -m qnn build --force", status.reason)
        assert self.compiled() == 1  # another would not load either

    def test_a_damaged_library_is_built_again(self) -> None:
        path = self.build()
        path.write_bytes(path.read_bytes()[:1000])
        assert self.find() is None
        assert ctypes.CDLL(str(self.build())).answer() == 42
        assert self.compiled() == 2

    def test_no_sources(self) -> None:
        shutil.rmtree(self.csrc)
        assert self.find() is None
        with pytest.raises(native.BuildError, match=r"no C.. sources in .*install qnn again"):
            self.build()


class TestProcesses(Case):
    def test_eight_at_once(self) -> None:
        (self.csrc / "ops.cpp").write_text(STABLE_OPS)
        (self.csrc / "common.h").write_text(f"#include <cstdint>\n{COMMON_H}")
        out, err = self.fresh(
            "start = time.time() + 0.5\n"
            "for i in range(8):\n"
            "    if not os.fork():\n"
            "        time.sleep(max(0, start - time.time()))\n"
            "        status = native.ensure(csrc)\n"
            "        answer = torch.ops.qnn_fake.answer()\n"
            "        os.write(1, f'{status.state} {answer}\\n'.encode())  # in one piece\n"
            "        os._exit(0)\n"
            "for i in range(8):\n"
            "    os.wait()\n"
            "print(native.ready(csrc).state)\n"
        )
        assert out == "built 42\n" * 8 + "built\n"
        assert (self.compiled(), self.compiled("ops.cpp")) == (1, 1)
        assert (err.count("building"), err.count("done in")) == (1, 1), err

    def test_builder_killed_midway(self) -> None:
        (self.folder / "slow").touch()
        self.fresh(
            "pid = os.fork()\n"
            "if not pid:\n"
            "    native.build(csrc=csrc)\n"
            "    os._exit(0)\n"
            "cache = pathlib.Path(os.environ['XDG_CACHE_HOME'])\n"
            "while not list(cache.glob('qnn/*/tmp-*/*.log')):\n"
            "    time.sleep(0.01)\n"
            "os.kill(pid, 9)\n"
            "os.wait()\n"
        )
        leftovers = list((self.folder / "cache").glob("qnn/*/tmp-*"))
        assert len(leftovers) == 1
        assert self.find() is None
        (self.folder / "slow").unlink()
        assert ctypes.CDLL(str(self.build())).answer() == 42
        assert list((self.folder / "cache").glob("qnn/*/tmp-*")) == []


class TestStatus:
    def test_tiers(self) -> None:
        for text, expected in (
            ("amx:no CPU support, avx2:ok", (("amx", "no CPU support"), ("avx2", "ok"))),
            ("avx2:wrong: 3 of 4,portable", (("avx2", "wrong: 3 of 4"),)),
            ("", ()),
        ):
            with mock.patch.object(torch.ops.qnn, "cpu_tiers", lambda t=text: t, create=True):
                assert native._tiers() == expected

    def test_doctor(self) -> None:
        built = native.Status(
            "built", Path("/some/libqnn_cpu.so"), compiler="g++ 10.2.1 (/usr/bin/g++)",
            missing=("avx_vnni",), tiers=(("avx2", "ok"), ("portable", "ok")),
        )  # fmt: skip
        absent = native.Status("absent", reason="no C++ compiler: install g++")
        for status, words in (
            (built, ("state    built", "avx2: ok, portable: ok", "lack avx_vnni", "build --force")),
            (absent, ("state    absent: no C++ compiler", "no native int8 kernels: no C++")),
        ):
            with mock.patch.object(native, "status", lambda status=status: status):
                data = doctor.report()
            assert data["native"]["state"] == status.state
            for word in words:
                assert word in doctor.render(data)

    def test_command(self) -> None:
        for outcome, code in ((Path("/some/where.so"), 0), (native.BuildError("no luck"), 1)):
            out, err = io.StringIO(), io.StringIO()
            with (
                mock.patch.object(native, "build", side_effect=[outcome]) as build,
                mock.patch.object(native, "passed_over", return_value=()),
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(err),
            ):
                assert command.main(["build", "--force"]) == code
            assert build.call_args.kwargs["force"]
            expected = ("/some/where.so\n", "") if code == 0 else (
                "", "python -m qnn build: no luck\n"
            )  # fmt: skip
            assert (out.getvalue(), err.getvalue()) == expected

    def test_fork_and_threads(self) -> None:
        """A child forked while a thread builds does not wait for that thread."""
        forked(
            """
            import os
            from qnn.kernels.cpu import native
            with native._lock:
                pid = os.fork()
                if not pid:
                    os._exit(0 if native._lock.acquire(timeout=5) else 1)
                assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            """
        )


class TestWheel(Case):
    def test_prebuilt(self) -> None:
        tree = self.folder / "tree"
        for name in ("qnn", "functional", "kernels"):
            shutil.copytree(
                ROOT / name, tree / name, ignore=shutil.ignore_patterns("csrc", "__pycache__")
            )
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, tree)
        shutil.copytree(self.csrc, tree / "kernels" / "cpu" / "csrc")
        subprocess.run(
            [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation",
             "--disable-pip-version-check", "-w", str(self.folder), str(tree)],
            check=True, env={**os.environ, "QNN_PREBUILD": "1"},
        )  # fmt: skip
        (wheel,) = self.folder.glob("*.whl")
        assert re.search(r"-py3-none-linux_\w+\.whl$", wheel.name)
        target = self.folder / "installed"
        zipfile.ZipFile(wheel).extractall(target)
        cpu = target / "qnn" / "kernels" / "cpu"
        assert native.find(cpu / "csrc") == cpu / toolchain.LIBRARY
        assert {path.name for path in target.iterdir() if not path.name.endswith(".dist-info")} == {
            "qnn"
        }

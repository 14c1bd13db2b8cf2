"""Which libraries are loaded, and what is passed over for which reason. Nothing is compiled."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from parameterized import parameterized

from qnn import __main__ as command
from qnn.kernels.cpu import cache, native, toolchain, trust
from qnn.kernels.cpu.toolchain import LIBRARY, RECORD, Record
from qnn.verbs import doctor

OTHER = 1234  # a user who is nobody's


def put(folder: Path, key: str, content: bytes = b"a library") -> Path:
    """What a build leaves in a folder."""
    for path in (*reversed(folder.parents), folder):
        path.mkdir(mode=0o755, exist_ok=True)
    record = Record(key, "g++", (), len(content), hashlib.sha256(content).hexdigest())
    record.write(folder / RECORD)
    (folder / LIBRARY).write_bytes(content)
    for name in (RECORD, LIBRARY):
        (folder / name).chmod(0o644)
    return folder / LIBRARY


@contextlib.contextmanager
def as_user(uid: int) -> Iterator[None]:
    os.setegid(uid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


class Case:
    """Sources and three places: a cache, a home and a temporary folder."""

    @pytest.fixture(autouse=True)
    def _places(self) -> Iterator[None]:
        if not sys.platform.startswith("linux"):
            pytest.skip("native kernels are built on Linux only")
        with contextlib.ExitStack() as stack:
            self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            self.folder.chmod(0o755)
            self.csrc = self.folder / "package" / "csrc"
            self.csrc.mkdir(parents=True)
            (self.csrc / "ops.cpp").write_text("int answer();")
            self.key = toolchain.digest(self.csrc)
            for name in ("above", "home", "tmp"):
                (self.folder / name).mkdir(mode=0o755)
            self.base = self.folder / "above" / "cache"
            self.compiler = self.script('[ "$1" = --version ] && echo fake 1.0')
            stack.enter_context(
                mock.patch.dict(
                    os.environ, XDG_CACHE_HOME=str(self.base), HOME=str(self.folder / "home"),
                    XDG_CONFIG_HOME=str(self.folder / "config"), CXX=str(self.compiler),
                )
            )  # fmt: skip
            temporary = str(self.folder / "tmp")
            stack.enter_context(mock.patch.object(tempfile, "tempdir", temporary))
            stack.enter_context(mock.patch.object(native, "build_library", self.built))
            stack.enter_context(mock.patch.object(native, "_load", self.loaded))
            stack.enter_context(mock.patch.object(native, "_final", None))
            stack.enter_context(mock.patch.dict(native._unloadable, clear=True))
            self.loads: list[Path] = []
            yield

    def script(self, text: str, name: str = "compiler") -> Path:
        path = self.folder / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return path

    def built(self, csrc: Path, target: Path, *_: object, **__: object) -> None:
        shutil.rmtree(target) if target.is_dir() and not target.is_symlink() else None
        target.unlink(missing_ok=True)
        record = target.with_name(RECORD)
        shutil.rmtree(record) if record.is_dir() else record.unlink(missing_ok=True)
        put(target.parent, self.key, b"built")

    def loaded(self, path: Path) -> None:
        self.loads.append(path)

    @property
    def place(self) -> Path:
        """The folder of the first choice."""
        return next(cache.folders(self.key))

    @property
    def temporary(self) -> Path:
        return self.folder / "tmp" / f"qnn-{os.geteuid()}"

    def passed_over(self) -> str:
        found, reasons = native._look(self.csrc)
        assert found is None
        return "\n".join(reasons)


def _file(change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: change(folder / LIBRARY)


def _record(change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: change(folder / RECORD)


def _instead(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        path.rename(path.with_name(f"moved {path.name}"))
        make(path)

    return change


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)


# What may be in the place of a library or of its record, in a folder that is ours.
DAMAGED = [
    ("cut_off", _file(lambda p: p.write_bytes(b"a li")), "has 4 bytes, and 9 were built"),
    ("emptied", _file(lambda p: p.write_bytes(b"")), "has 0 bytes"),
    ("longer", _file(lambda p: p.write_bytes(p.read_bytes() * 2)), "has 18 bytes"),
    ("flipped", _file(_flip), "is not what was built"),
    ("a_folder", _file(_instead(lambda p: p.mkdir())), "not a regular file"),
    ("a_full_folder", _file(_instead(lambda p: (p / "x").mkdir(parents=True))), "not a regular"),
    ("a_pipe", _file(_instead(os.mkfifo)), "not a regular file"),
    ("a_link", _file(_instead(lambda p: p.symlink_to(f"moved {p.name}"))), "is a symbolic link"),
    ("a_dangling_link", _file(_instead(lambda p: p.symlink_to("x"))), "is a symbolic link"),
    ("all_may_write", _file(lambda p: p.chmod(0o666)), "written to by others (mode 666)"),
    ("a_group_may_write", _file(lambda p: p.chmod(0o664)), "written to by others"),
    ("no_record", _record(Path.unlink), f"has no {RECORD}"),
    ("record_is_no_json", _record(lambda p: p.write_text("{")), f"has no {RECORD}"),
    ("record_is_a_list", _record(lambda p: p.write_text("[]")), f"has no {RECORD}"),
    ("record_is_deep", _record(lambda p: p.write_text("[" * 100_000)), f"has no {RECORD}"),
    ("record_is_binary", _record(lambda p: p.write_bytes(b"\xff\0")), f"has no {RECORD}"),
    ("record_is_a_folder", _record(_instead(lambda p: p.mkdir())), f"has no {RECORD}"),
    ("record_is_a_pipe", _record(_instead(os.mkfifo)), f"has no {RECORD}"),
    ("record_all_may_write", _record(lambda p: p.chmod(0o666)), f"has no {RECORD}"),
    ("record_without_size",
     _record(lambda p: p.write_text('{"digest": "x", "compiler": "c", "missing": []}')),
     f"has no {RECORD}"),
]  # fmt: skip


class TestFile(Case):
    def test_a_good_one_is_taken(self) -> None:
        library = put(self.place, self.key)
        assert native._look(self.csrc) == (library, ())
        assert native.ready(self.csrc).path == library
        assert self.loads == [library]

    @parameterized.expand(DAMAGED)
    def test_passed_over(self, _: str, change: Callable[[Path], object], words: str) -> None:
        library = put(self.place, self.key)
        change(self.place)
        assert f"{library}: {words}"[: len(str(library)) + 2] in self.passed_over()
        assert words in self.passed_over()
        status = native.ready(self.csrc)
        assert (status.state, self.loads) == ("absent", [])
        assert words in "\n".join(status.passed_over)
        assert os.path.lexists(library)  # looking deletes nothing
        # The folder is ours, so a build puts a good one there.
        assert native.build(csrc=self.csrc) == library
        assert native._look(self.csrc) == (library, ())

    def test_the_next_folder_serves(self) -> None:
        put(self.place, self.key).write_bytes(b"bad")
        good = put(self.temporary / self.place.name, self.key)
        status = native.ready(self.csrc)
        assert (status.path, status.loaded) == (good, True)
        assert "has 3 bytes" in status.passed_over[0]

    @parameterized.expand(DAMAGED[:9])
    def test_in_a_wheel(self, _: str, change: Callable[[Path], object], words: str) -> None:
        put(self.csrc.parent, self.key)
        assert native.find(self.csrc) == self.csrc.parent / LIBRARY
        change(self.csrc.parent)
        assert words in self.passed_over()
        assert native.build(csrc=self.csrc) == self.place / LIBRARY


class TestFolder(Case):
    @parameterized.expand(
        [
            (name, up, mode)
            for name, up in (("key", 0), ("qnn", 1), ("base", 2), ("above", 3))
            for mode in (0o777, 0o1777, 0o757)
        ]
        + [("key", 0, 0o775), ("qnn", 1, 0o770)]
    )
    def test_others_may_write(self, _: str, up: int, mode: int) -> None:
        library = put(self.place, self.key)
        place = (self.place, *self.place.parents)[up]
        place.chmod(mode)
        if up >= 2 and mode & 0o1000:  # as /tmp: what is ours stays ours
            assert native.find(self.csrc) == library
            return
        assert f"{place} can be written to by others (mode {mode:o})" in self.passed_over()
        built = native.build(csrc=self.csrc)
        assert built.parent.parent == self.temporary
        assert library.read_bytes() == b"a library"

    def test_of_another_group(self) -> None:
        put(self.place, self.key)
        self.base.chmod(0o775)
        if os.getuid() == 0:
            assert native.find(self.csrc) is not None  # root's own group
            os.chown(self.base, 0, OTHER)
            assert "can be written to by others" in self.passed_over()

    @parameterized.expand([("file", -1), ("key", 0), ("qnn", 1), ("base", 2), ("above", 3)])
    def test_of_another_user(self, _: str, up: int) -> None:
        if os.getuid() != 0:
            pytest.skip("only root can give files away")
        library = put(self.place, self.key)
        place = library if up < 0 else (self.place, *self.place.parents)[up]
        os.chown(place, OTHER, OTHER)
        assert f"belongs to user {OTHER}, and not to root" in self.passed_over()
        assert native.build(csrc=self.csrc).parent.parent == self.temporary
        assert library.read_bytes() == b"a library"  # it is not ours to replace
        with as_user(OTHER):  # to whom it is their own, and the rest is root's
            assert native.find(self.csrc) == library

    def test_planted_by_another_user_where_all_may_write(self) -> None:
        if os.getuid() != 0:
            pytest.skip("only root can become another user")
        self.base.mkdir()
        self.base.chmod(0o1777)
        with as_user(OTHER):
            put(self.place, self.key, b"planted")
        assert f"belongs to user {OTHER}" in self.passed_over()
        assert (native.ready(self.csrc).loaded, self.loads) == (False, [])

    def test_links(self) -> None:
        real = self.folder / "real"
        put(real / "qnn" / self.place.name, self.key)
        self.base.symlink_to(real)
        assert native.find(self.csrc) == self.place / LIBRARY
        (self.base.parent / "relative").symlink_to("../above/cache")
        os.environ["XDG_CACHE_HOME"] = str(self.base.parent / "relative")
        assert native.find(self.csrc) == self.place / LIBRARY
        real.chmod(0o777)
        assert f"{real} can be written to" in self.passed_over()
        real.chmod(0o755)
        if os.getuid() == 0:
            os.chown(self.base, OTHER, OTHER, follow_symlinks=False)
            assert f"{self.base} belongs to user" in self.passed_over()

    def test_links_in_a_circle(self) -> None:
        self.base.symlink_to(self.base)
        assert "too many symbolic links" in self.passed_over()
        assert native.build(csrc=self.csrc).parent.parent == self.temporary

    def test_new_folders_are_the_users_own(self) -> None:
        before = os.umask(0)
        try:
            library = native.build(csrc=self.csrc)
        finally:
            os.umask(before)
        assert library.parent == self.place
        assert native.find(self.csrc) == library
        lock = (library.parent / "lock").stat()
        assert lock.st_mode & 0o777 == 0o600  # who can read a file can lock it


class TestPlaces(Case):
    """Each way in which a folder fails has one that serves."""

    def serves_elsewhere(self, words: str) -> None:
        assert native.build(csrc=self.csrc).parent.parent == self.temporary
        path, passed_over = native._look(self.csrc)
        assert (path and path.parent.parent) == self.temporary
        if words:
            assert words in "\n".join(passed_over)

    def test_a_relative_path(self) -> None:
        os.environ["XDG_CACHE_HOME"] = "somewhere"
        assert "XDG_CACHE_HOME is not an absolute path" in self.passed_over()
        built = native.build(csrc=self.csrc)
        assert built.parent.parent == self.folder / "home" / ".cache" / "qnn"

    def test_no_home(self) -> None:
        os.environ["XDG_CACHE_HOME"] = ""
        home = self.folder / "nowhere"
        os.environ["HOME"] = str(home)
        self.serves_elsewhere(f"{home} is not there")
        assert not home.exists()

    def test_a_home_that_cannot_be_read(self) -> None:
        if os.getuid() != 0:
            pytest.skip("only root can become another user")
        os.environ["XDG_CACHE_HOME"] = ""
        (self.folder / "home").chmod(0o700)
        (self.folder / "tmp").chmod(0o1777)
        with as_user(OTHER):
            self.serves_elsewhere("cannot be read: Permission denied")

    def test_a_cache_that_cannot_be_written(self) -> None:
        if os.getuid() != 0:
            pytest.skip("root writes everywhere")
        (self.folder / "tmp").chmod(0o1777)
        with as_user(OTHER):
            self.serves_elsewhere("")

    @parameterized.expand([("file", "is not a folder"), ("long", "File name too long")])
    def test_a_path_that_cannot_be(self, name: str, words: str) -> None:
        below = self.compiler / "below" if name == "file" else self.base / ("x" * 300)
        os.environ["XDG_CACHE_HOME"] = str(below)
        self.serves_elsewhere(words)

    def test_noexec(self) -> None:
        real = os.statvfs
        above = str(self.base.parent)

        def statvfs(path: str | Path) -> object:
            found = real(path)
            flags = os.ST_NOEXEC if str(path).startswith(above) else 0
            return SimpleNamespace(
                f_flag=flags, f_blocks=found.f_blocks, f_frsize=1 << 20, f_bavail=99, f_bfree=99
            )

        put(self.place, self.key)
        with mock.patch.object(os, "statvfs", statvfs):
            self.serves_elsewhere("runs no code (noexec)")

    def test_a_place_where_no_code_may_be_mapped(self) -> None:
        """As where a security module forbids it: only the loader says so."""

        def load(path: Path) -> None:
            if self.base in path.parents:
                raise OSError(f"{path}: failed to map segment from shared object")
            self.loads.append(path)

        with mock.patch.object(native, "_load", load), contextlib.redirect_stderr(io.StringIO()):
            status = native.ensure(self.csrc)
        assert status.path is not None
        assert (status.state, status.path.parent.parent) == ("built", self.temporary)
        assert "failed to map segment" in "\n".join(status.passed_over)

    def test_no_room(self) -> None:
        full = SimpleNamespace(f_flag=0, f_blocks=1 << 20, f_frsize=4096, f_bavail=2, f_bfree=2)
        with (
            mock.patch.object(os, "statvfs", return_value=full),
            pytest.raises(native.BuildError, match="the disk is full: 8 kB are free"),
        ):
            native.build(csrc=self.csrc)

    @parameterized.expand(
        [
            ("of_the_compiler", toolchain.FullError("No space left on device")),
            ("of_the_disk", OSError(errno.ENOSPC, "No space left on device")),
            ("of_a_quota", OSError(errno.EDQUOT, "Disk quota exceeded")),
        ]
    )
    def test_a_disk_that_becomes_full(self, _: str, error: Exception) -> None:
        def build(csrc: Path, target: Path, *_: object, **__: object) -> None:
            if self.base in target.parents:
                raise error
            self.built(csrc, target)

        with mock.patch.object(native, "build_library", build):
            self.serves_elsewhere("")
        with (
            mock.patch.object(native, "build_library", side_effect=error),
            pytest.raises(native.BuildError, match=r"the disk is full.*set XDG_CACHE_HOME"),
        ):
            native.build(csrc=self.csrc, force=True)

    def test_nothing_at_all(self) -> None:
        os.environ["XDG_CACHE_HOME"] = str(self.compiler / "below")
        with (
            mock.patch.object(tempfile, "gettempdir", side_effect=FileNotFoundError(2, "none")),
            contextlib.redirect_stderr(io.StringIO()) as said,
        ):
            status = native.ensure(self.csrc)
        assert (status.state, said.getvalue()) == ("failed", "")
        assert "there is no temporary folder" in status.reason

    def test_doctor_says_that_nothing_can_be_built(self) -> None:
        assert "the first call that needs it" in native.status(self.csrc).reason
        full = SimpleNamespace(f_flag=0, f_blocks=1 << 20, f_frsize=4096, f_bavail=2, f_bfree=2)
        with mock.patch.object(os, "statvfs", return_value=full):
            assert re.search(
                "not built yet: no folder .*the disk is full", native.status(self.csrc).reason
            )

    @parameterized.expand([("lock", Path.mkdir), ("failed.json", Path.mkdir), ("x", os.mkfifo)])
    def test_odd_content(self, name: str, make: Callable[[Path], object]) -> None:
        self.place.mkdir(parents=True)
        make(self.place / name)
        assert native._not_loaded(self.csrc).state == "absent"
        built = native.build(csrc=self.csrc)
        assert (built.parent == self.place) == (name != "lock")
        assert native.find(self.csrc) == built


class TestProcesses(Case):
    def test_a_file_that_goes_away_meanwhile(self) -> None:
        self.place.mkdir(parents=True)
        gone = mock.Mock(stat=mock.Mock(side_effect=FileNotFoundError(2, "none")))
        with mock.patch.object(os, "scandir", return_value=[gone]):
            assert cache._why_not_ours(self.place) == ""


class TestLock(Case):
    @pytest.fixture(autouse=True)
    def _locked(self, _places: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        limits = {"_QUIET": 0.05, "_QUIET_AT_WORK": 0.1, "_NO_SIGN": 0.3, "_LONGEST": 0.6}
        for name, value in limits.items():
            monkeypatch.setattr(cache, name, value)
        self.place.mkdir(parents=True)
        with (self.place / "lock").open("a") as self.lock:
            fcntl.flock(self.lock, fcntl.LOCK_EX)
            yield

    def test_without_a_sign_of_life(self) -> None:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            status = native.ensure(self.csrc)
        assert status.state == "failed"
        assert re.search(r"another process has held .*lock for \d+ s.*no sign of", status.reason)
        assert said.getvalue().count("\n") == 1
        assert "another process builds the kernels, waiting" in said.getvalue()

    def test_a_builder_at_work(self) -> None:
        done = threading.Event()

        def work() -> None:
            while not done.wait(0.05):
                cache.sign_of_life(self.place)

        thread = threading.Thread(target=work)
        thread.start()
        start = time.monotonic()
        try:
            with pytest.raises(native.BuildError, match="is still building"):
                native.build(csrc=self.csrc)
        finally:
            done.set()
            thread.join()
        assert time.monotonic() - start > 0.55

    def test_let_go(self) -> None:
        timer = threading.Timer(0.1, fcntl.flock, (self.lock, fcntl.LOCK_UN))
        timer.start()
        assert native.build(csrc=self.csrc).is_file()
        timer.join()

    def test_doctor_says_it(self) -> None:
        assert re.search(
            "another process builds it, or holds .*lock", native.status(self.csrc).reason
        )
        fcntl.flock(self.lock, fcntl.LOCK_UN)
        assert "not built yet" in native.status(self.csrc).reason


class TestCompiler(Case):
    @parameterized.expand(
        [
            (text,)
            for text in (
                "'", '"', "g++ -DX='", "''", '""', "'' -O2", "#", "\\", "/", ".", "~", "$(x)",
                "/nowhere/g++", "nowhere-to-be-found", "none", "false", "sh -c 'exit 3'",
                "\udcff", "a\nb", "=", "-", "--version",
            )
        ]
    )  # fmt: skip
    def test_none(self, chosen: str) -> None:
        os.environ["CXX"] = chosen
        with contextlib.redirect_stderr(io.StringIO()) as said:
            status = native.ensure(self.csrc)
        assert (status.state, said.getvalue()) == ("absent", "")
        assert re.search(r"^no C\+\+ compiler: .*(set|unset)", status.reason)
        native._final = None
        assert native.status(self.csrc).reason.startswith("no C++ compiler: ")

    def test_scripts(self) -> None:
        hangs = self.script("sleep 100 & sleep 100", "hangs")
        broken = self.script("echo error >&2; exit 1", "broken")
        killed = self.script("kill -9 $$", "killed")
        plain = self.folder / "plain"
        plain.write_bytes(b"\x7fELF")
        plain.chmod(0o755)
        start = time.monotonic()
        with mock.patch.object(toolchain, "_SAID", 0.2):
            for script, words in (
                (hangs, "stopped after 0 s"),
                (broken, "exit code 1"),
                (killed, "exit code -9"),
                (plain, "Exec format error"),
            ):
                os.environ["CXX"] = str(script)
                with pytest.raises(toolchain.NoCompilerError, match=words):
                    toolchain.find_compiler()
        assert time.monotonic() - start < 20

    @parameterized.expand(
        [("{}",), ("{} -O2",), ("env {} -I x",), ("  {}  ",), ("'{}' -DX=\"a b\"",)]
    )
    def test_taken(self, form: str) -> None:
        os.environ["CXX"] = form.format(self.compiler)
        loud = self.script("echo a warning >&2; echo fake 1.0; exit 0")
        assert loud == self.compiler
        assert "1.0" in toolchain.find_compiler().name

    def test_one_that_hangs_over_a_file(self) -> None:
        self.script('[ "$1" = --version ] && echo fake 1.0 && exit 0; sleep 100')
        compiler = toolchain.find_compiler()
        with (
            mock.patch.object(toolchain, "_TRIED", 0.2),
            pytest.raises(toolchain.BuildError, match=r"one line .it was stopped after"),
        ):
            toolchain._refused(compiler, ["avx2.cpp"], self.folder)
        with mock.patch.object(toolchain, "_COMPILED", 0.2):
            command = [str(self.compiler), "-c", "x.cpp"]
            with pytest.raises(toolchain.BuildError, match=r"x.cpp .was stopped after"):
                toolchain._run_all(compiler, {"x.cpp": command}, self.folder, lambda done: None)

    def test_a_full_disk_in_the_compilers_words(self) -> None:
        self.script("echo 'fatal error: No space left on device' >&2; exit 1")
        compiler = toolchain.Compiler((str(self.compiler),), "fake 1.0")
        with pytest.raises(toolchain.FullError):
            toolchain._run_all(
                compiler, {"x.cpp": [str(self.compiler)]}, self.folder, lambda done: None
            )


class TestForbidden(Case):
    @parameterized.expand([("XDG_CONFIG_HOME", "config"), ("XDG_CONFIG_DIRS", "shared")])
    def test_by_a_file(self, variable: str, name: str) -> None:
        library = put(self.place, self.key)
        path = self.folder / name / "qnn" / "no-native-code"
        path.parent.mkdir(parents=True)
        path.touch()
        with mock.patch.dict(os.environ, {variable: str(self.folder / name)}):
            for status in (native.ready(self.csrc), native.ensure(self.csrc)):
                assert status.state == "disabled"
                assert f"forbidden by {path}" in status.reason
            assert native.find(self.csrc) is None
            with pytest.raises(native.BuildError, match="forbidden by"):
                native.build(csrc=self.csrc)
        assert self.loads == []
        path.unlink()
        native._final = None
        assert native.ready(self.csrc).path == library


class TestDoctor(Case):
    def test_names_what_was_passed_over(self) -> None:
        put(self.place, self.key).write_bytes(b"bad")
        status = native.status(self.csrc)
        with mock.patch.object(native, "status", return_value=status):
            data = doctor.report()
        (line,) = data["native"]["passed_over"]
        assert "has 3 bytes" in line
        assert f"passed over: {line}" in doctor.render(data)

    def test_build_names_it_too(self) -> None:
        library = put(self.place, self.key)
        for options in ([], ["--force"]):
            library.write_bytes(b"bad")
            out, err = io.StringIO(), io.StringIO()
            with (
                mock.patch.object(native, "passed_over", partial(native.passed_over, self.csrc)),
                mock.patch.object(native, "build", partial(native.build, csrc=self.csrc)),
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(err),
            ):
                assert command.main(["build", *options]) == 0
            assert out.getvalue() == f"{library}\n"
            assert f"passed over: {library}: has 3 bytes" in err.getvalue()

    def test_a_path_of_any_bytes(self) -> None:
        os.environ["XDG_CACHE_HOME"] = str(self.folder / "\udcff")
        put(self.place, self.key).write_bytes(b"bad")
        with (
            mock.patch.object(native, "CSRC", self.csrc),
            mock.patch.object(doctor, "report", return_value={"path": str(self.place)}),
            mock.patch.object(doctor, "render", lambda data: data["path"]),
        ):
            for words in (["doctor"], ["doctor", "--json"]):
                out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
                with contextlib.redirect_stdout(out):
                    assert command.main(words) == 0
        assert native.build(csrc=self.csrc).is_file()

    def test_json(self) -> None:
        status = native.Status("absent", reason="x", passed_over=("/a: b",))
        with mock.patch.object(native, "status", return_value=status):
            assert json.loads(json.dumps(doctor.report()))["native"]["passed_over"] == ["/a: b"]


class TestTrust:
    def test_what_is_not_there_is_no_reason(self) -> None:
        assert trust.why_not_folder(Path("/nowhere-to-be-found/x/y")) == ""

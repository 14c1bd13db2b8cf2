"""Where built libraries lie, and how several processes agree on them.

`$XDG_CACHE_HOME/qnn` or `~/.cache/qnn`, else a folder of the user's own under the temporary one,
holds a folder for each digest of the sources: the library with its record, a lock, and, after a
build that failed, the reason and the log. A folder, or a file, that somebody else could have
written (`trust.py`) is passed over.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from qnn.kernels.cpu import trust
from qnn.kernels.cpu.toolchain import LIBRARY, RECORD, BuildError, Record

_FAILED = "failed.json"
_LOG = "build.log"
_LOCK = "lock"
_FORBIDDEN = "no-native-code"

# Seconds of waiting for the lock: until it is said where its holder shows no sign of life, until it
# is said where it does (it has said itself that it builds); and how long one waits at all.
_QUIET, _QUIET_AT_WORK = 2.0, 30.0
_NO_SIGN, _LONGEST = 20.0, 120.0
_ROOM = 32 << 20  # bytes that a build needs


def forbidden() -> Path | None:
    """The file by which the user, or the machine, forbids native code, if there is one:
    `qnn/no-native-code` in a folder for configurations.
    """
    chosen = os.environ.get("XDG_CONFIG_HOME", "")
    home = chosen if os.path.isabs(chosen) else os.path.join(os.path.expanduser("~"), ".config")
    shared = os.environ.get("XDG_CONFIG_DIRS") or "/etc/xdg"
    for base in (home, *shared.split(":")):
        path = os.path.join(base, "qnn", _FORBIDDEN)
        if os.path.isabs(base) and os.path.lexists(path):
            return Path(path)
    return None


def folders(key: str) -> Iterator[Path]:
    """Where a library of this digest may lie, in the order of preference."""
    return (folder for folder, _ in places(key))


def places(key: str) -> Iterator[tuple[Path, str]]:
    """`…/qnn/linux-x86_64-glibc2.36-0123456789abcdef`, in the order of preference, each with the
    reason why it is passed over, if there is one. (A home may be shared by machines with another C
    library.)
    """
    libc = os.confstr("CS_GNU_LIBC_VERSION") if "CS_GNU_LIBC_VERSION" in os.confstr_names else None
    name = "-".join(
        (sys.platform, platform.machine(), (libc or "other libc").replace(" ", ""), key)
    )
    for base, why_not in _bases():
        folder = base / name
        try:
            yield folder, why_not or trust.why_not_folder(folder, (base, folder)) or _noexec(folder)
        except OSError as error:
            yield folder, f"cannot be read: {error.strerror}"


def _bases() -> Iterator[tuple[Path, str]]:
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(chosen):
        yield Path(chosen, "qnn"), ""
    else:
        if chosen:
            yield Path(chosen, "qnn"), "XDG_CACHE_HOME is not an absolute path, so it is not used"
        home = os.path.expanduser("~")
        if not os.path.isabs(home):
            yield Path(home, ".cache", "qnn"), "this user has no home"
        else:
            there = os.path.lexists(home)
            yield Path(home, ".cache", "qnn"), "" if there else f"{home} is not there"
    try:
        yield Path(tempfile.gettempdir(), f"qnn-{os.geteuid()}"), ""
    except OSError as error:
        yield Path("/tmp"), f"there is no temporary folder: {error.strerror}"  # noqa: S108


def _existing(folder: Path) -> Path:
    return next((p for p in (folder, *folder.parents) if p.exists()), folder)


def _noexec(folder: Path) -> str:
    try:
        flags = os.statvfs(_existing(folder)).f_flag
    except OSError:
        return ""
    return "lies on a file system that runs no code (noexec)" if flags & os.ST_NOEXEC else ""


def libraries(key: str) -> Iterator[tuple[Path, str]]:
    """The libraries of a digest, each with the reason why it is passed over, if there is one; and
    the folders that are passed over.
    """
    for folder, why_not in places(key):
        library = folder / LIBRARY
        if why_not:
            yield folder, why_not
        elif os.path.lexists(library):
            yield library, why_not_library(library, key)


def why_not_library(library: Path, key: str, *, owned: bool = True) -> str:
    """Why a library is not the one that was built from the sources of this digest, or nothing."""
    record = Record.read(library.with_name(RECORD), lambda path: trust.read(path, owned=owned))
    if record is None:
        return f"has no {RECORD} beside it that can be read"
    if record.digest != key:
        return "was built from other sources"
    return trust.why_not_file(library, record.size, record.sha256, owned=owned)


@contextmanager
def locked(key: str, say: Callable[[str], object], skipped: Mapping[Path, str]) -> Iterator[Path]:
    """The first folder that can be written, with its lock held. The kernel lets go of the lock of a
    process that ends, however it ends.

    `say` is told once if another process holds the lock for longer than a moment. `skipped` folders
    are not taken, for a reason each.

    Raises:
        BuildError: there is no such folder, or the lock is held for too long.
    """
    refused = []
    for folder, why_not in places(key):
        lock, why_not = None, why_not or skipped.get(folder, "")
        if why_not:
            refused.append(f"{folder} ({why_not})")
            continue
        try:
            _make(folder)
            # What appeared meanwhile is another's.
            why_not = trust.why_not_folder(folder, (folder.parent, folder)) or _why_not_ours(folder)
            if not why_not:
                lock = _open_lock(folder)
                _wait(lock, folder / _LOCK, say)
        except OSError as error:
            why_not = error.strerror or str(error)
        if why_not or lock is None:
            refused.append(f"{folder} ({why_not})")
            continue
        import fcntl  # not on Windows

        try:
            yield folder
        finally:
            # Closing alone would leave the lock to a child that was forked meanwhile.
            fcntl.flock(lock, fcntl.LOCK_UN)
            os.close(lock)
        return
    raise BuildError(
        f"no folder for the library can be written: {', '.join(refused) or 'there is no home'}; "
        "set XDG_CACHE_HOME to one"
    )


def _make(folder: Path) -> None:
    """Folders that nobody else can write to, whatever the umask is."""
    for path in (*reversed(folder.parents), folder):
        if not path.exists():
            path.mkdir(mode=0o755, exist_ok=True)


def _why_not_ours(folder: Path) -> str:
    """Why nothing may be built there: what would be replaced is not ours, or there is no room."""
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):  # another process is at work
            if entry.stat(follow_symlinks=False).st_uid != os.geteuid():
                return f"its {entry.name} belongs to another user"
    return no_room(folder)


def no_room(folder: Path) -> str:
    """Why a build does not fit on the disk, or nothing."""
    found = os.statvfs(folder)
    free = (found.f_bfree if os.geteuid() == 0 else found.f_bavail) * found.f_frsize
    if found.f_blocks == 0 or free >= _ROOM:  # some file systems do not count
        return ""
    return f"the disk is full: {free >> 10} kB are free, and a build needs {_ROOM >> 20} MB"


def _open_lock(folder: Path) -> int:
    # Nobody else may open it: who can read a file can lock it.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    return os.open(folder / _LOCK, flags, 0o600)


def _wait(lock: int, path: Path, say: Callable[[str], object]) -> None:
    """Hold the lock, or close it and raise."""
    import fcntl  # not on Windows

    start = seen = time.monotonic()
    sign, said = os.fstat(lock).st_mtime_ns, False
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass
        except BaseException:  # a file system without locks
            os.close(lock)
            raise
        now = time.monotonic()
        if os.fstat(lock).st_mtime_ns != sign:
            seen, sign = now, os.fstat(lock).st_mtime_ns
        if not said and (now - seen >= _QUIET or now - start >= _QUIET_AT_WORK):
            said = True
            say(f"qnn: another process builds the kernels, waiting for it ({path}) ...\n")
        if now - seen >= _NO_SIGN or now - start >= _LONGEST:
            os.close(lock)
            raise BuildError(
                f"another process has held {path} for {now - start:.0f} s, and "
                + ("is still building" if now - seen < _NO_SIGN else "shows no sign of life")
                + "; end it, then run python -m qnn build"
            )
        time.sleep(0.02)


def sign_of_life(folder: Path) -> None:
    """Tell those who wait for the lock of `folder` that its holder is at work."""
    with contextlib.suppress(OSError):
        os.utime(folder / _LOCK)


def obstacle(key: str) -> str:
    """What keeps a build from beginning at this moment, or nothing; writes nothing."""
    refused = []
    for folder, why_not in places(key):
        try:
            near = _existing(folder)
            writable = os.access(near, os.W_OK | os.X_OK)
            why_not = why_not or ("" if writable else "cannot be written") or no_room(near)
        except OSError as error:
            why_not = f"cannot be read: {error.strerror}"
        if not why_not:
            return f"another process builds it, or holds {folder / _LOCK}" if _held(folder) else ""
        refused.append(f"{folder} ({why_not})")
    return f"no folder for the library can be written: {', '.join(refused)}"


def _held(folder: Path) -> bool:
    """Whether another process holds the lock at this moment."""
    import fcntl  # not on Windows

    try:
        lock = os.open(folder / _LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(lock)
    return False


def failure(key: str) -> str:
    """Why an earlier build failed, or nothing."""
    return next((why for f, bad in places(key) if not bad and (why := failure_in(f))), "")


def failure_in(folder: Path) -> str:
    try:
        return str(json.loads(trust.read(folder / _FAILED))["reason"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""


def remember(folder: Path, error: BuildError | OSError) -> str:
    """Leave a failure and its log for other processes; the reason, with where the log is."""
    reason, log = str(error), folder / _LOG
    try:
        if isinstance(error, BuildError) and error.log:
            log.write_text(error.log, encoding="utf-8", errors="backslashreplace")
            reason += f"; the log is {log}"
        reason += "; fix it, then run python -m qnn build"
        (folder / _FAILED).write_text(json.dumps({"reason": reason}), encoding="utf-8")
    except OSError as full:
        reason += f" (and {full})"
    return reason


def forget(folder: Path) -> None:
    """Nothing has failed there."""
    for name in (_FAILED, _LOG):
        with contextlib.suppress(OSError):
            (folder / name).unlink(missing_ok=True)

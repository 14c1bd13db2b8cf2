"""Where built libraries lie, and how several processes agree on them.

`$XDG_CACHE_HOME/qnn` or `~/.cache/qnn`, else a folder of the user's own under the temporary one,
holds a folder for each digest of the sources: the library with its record, a lock, and, after a
build that failed, the reason and the log.
"""

from __future__ import annotations

import json
import os
import platform
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qnn.kernels.cpu.toolchain import BuildError

_FAILED = "failed.json"
_LOG = "build.log"


def folders(key: str, *, create: bool = False) -> Iterator[Path]:
    """`…/qnn/linux-x86_64-glibc2.36-0123456789abcdef`, in the order of preference: a home may be
    shared by machines with another C library. With `create`, the temporary base is made.
    """
    libc = os.confstr("CS_GNU_LIBC_VERSION") if "CS_GNU_LIBC_VERSION" in os.confstr_names else None
    name = "-".join(
        (sys.platform, platform.machine(), (libc or "other libc").replace(" ", ""), key)
    )
    for base in _bases(create):
        yield base / name


def _bases(create: bool) -> Iterator[Path]:
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    home = chosen if os.path.isabs(chosen) else os.path.join(os.path.expanduser("~"), ".cache")
    if os.path.isabs(home):
        yield Path(home, "qnn")
    # Anyone may write to the temporary folder: only one that nobody else can write to is trusted.
    try:
        base = Path(tempfile.gettempdir(), f"qnn-{os.getuid()}")
        if create:
            base.mkdir(mode=0o700, exist_ok=True)
        found = base.lstat()
    except OSError:
        return
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
        yield base


@contextmanager
def locked(key: str) -> Iterator[Path]:
    """The first folder that can be written, with its lock held. The kernel lets go of the lock of a
    process that ends, however it ends.

    Raises:
        BuildError: there is no such folder.
    """
    import fcntl  # not on Windows

    refused = []
    for folder in folders(key, create=True):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / "lock").open("a")
        except OSError as error:
            refused.append(f"{folder} ({error.strerror})")
            continue
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as error:  # a file system without locks
                refused.append(f"{folder} ({error.strerror})")
                continue
            try:
                yield folder
            finally:
                # Closing alone would leave the lock to a child that was forked meanwhile.
                fcntl.flock(lock, fcntl.LOCK_UN)
            return
    raise BuildError(
        f"no folder for the library can be written: {', '.join(refused) or 'there is no home'}; "
        "set XDG_CACHE_HOME to one"
    )


def failure(folder: Path) -> str:
    """Why an earlier build failed there, or nothing."""
    try:
        return str(json.loads((folder / _FAILED).read_text(encoding="utf-8"))["reason"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def remember(folder: Path, error: BuildError | OSError) -> str:
    """Leave a failure and its log for other processes; the reason, with where the log is."""
    reason, log = str(error), folder / _LOG
    try:
        if isinstance(error, BuildError) and error.log:
            log.write_text(error.log, encoding="utf-8")
            reason += f"; the log is {log}"
        reason += "; mend it, then run python -m qnn build"
        (folder / _FAILED).write_text(json.dumps({"reason": reason}), encoding="utf-8")
    except OSError as full:
        reason += f" (and {full})"
    return reason


def forget(folder: Path) -> None:
    """Nothing has failed there."""
    for name in (_FAILED, _LOG):
        (folder / name).unlink(missing_ok=True)

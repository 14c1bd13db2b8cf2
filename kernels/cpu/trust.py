"""What a library passes before it is opened: its code runs in this process.

Every folder on the way to it, and the file, must belong to root or to the user of this process, and
nobody else may be able to write to them. The standard library only, and POSIX.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterable
from pathlib import Path

_MOST_LINKS = 40  # as the kernel
_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def why_not_folder(path: Path, own: Iterable[Path] = ()) -> str:
    """Why somebody else may choose what lies in this folder, or nothing; what is not there yet is
    no reason.

    Folders that all can write to are taken where they have the sticky bit, as /tmp has, and folders
    that a group can write to where it is the owner's own. The folders `own` are qnn's: only their
    owner may write to them. Symbolic links are followed where they belong to root or to the user.
    """
    reason = _why_not_way(path)
    for folder in own:
        if reason:
            break
        try:
            mode = os.stat(folder).st_mode
        except FileNotFoundError:
            break
        except OSError as error:
            return f"{folder} cannot be read: {error.strerror}"
        if mode & _OTHERS:
            mode = stat.S_IMODE(mode)
            reason = f"{folder} can be written to by others (mode {mode:o}): chmod go-w"
    return reason


def why_not_file(path: Path, size: int, sha256: str, *, owned: bool = True) -> str:
    """Why this file is not the one that was built, or why somebody else may have written it."""
    try:
        content = _content(path, owned)
    except OSError as error:
        return _words(error)
    if len(content) != size:
        return f"has {len(content)} bytes, and {size} were built: it was cut off or changed"
    if hashlib.sha256(content).hexdigest() != sha256:
        return "is not what was built: it was changed, or damaged (another SHA-256)"
    return ""


def read(path: Path, *, owned: bool = True) -> str:
    """The text of a small file.

    Raises:
        OSError: it cannot be read, is not a regular file, or somebody else may have written it.
    """
    return _content(path, owned, 1 << 20).decode(errors="replace")


def is_trusted(uid: int) -> bool:
    return uid in (0, os.geteuid())


def _content(path: Path, owned: bool, most: int = 1 << 28) -> bytes:
    # A pipe would wait for a writer; a link may lead anywhere.
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "is not a regular file")
        if owned and not is_trusted(found.st_uid):
            raise OSError(errno.EPERM, _belongs(found.st_uid))
        if owned and found.st_mode & _OTHERS:
            mode = stat.S_IMODE(found.st_mode)
            raise OSError(errno.EPERM, f"can be written to by others (mode {mode:o})")
        if found.st_size > most:
            raise OSError(errno.EFBIG, f"has {found.st_size} bytes, too many")
        with open(file, "rb", closefd=False) as stream:
            return stream.read(most)
    finally:
        os.close(file)


def _words(error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return "is a symbolic link"
    own = error.errno in (errno.EINVAL, errno.EPERM, errno.EFBIG) and error.filename is None
    return str(error.strerror) if own else f"cannot be read: {error.strerror}"


def _why_not_way(path: Path) -> str:
    here, names, links = Path("/"), list(reversed(path.parts[1:])), 0
    while names:
        there = here / names.pop()
        try:
            found = os.lstat(there)
        except FileNotFoundError:
            return ""
        except OSError as error:
            return f"{there} cannot be read: {error.strerror}"
        if not is_trusted(found.st_uid):
            return f"{there} {_belongs(found.st_uid)}"
        if stat.S_ISLNK(found.st_mode):
            links += 1
            if links > _MOST_LINKS:
                return f"{path} has too many symbolic links"
            target = Path(os.readlink(there))
            here = Path("/") if target.is_absolute() else here
            names += reversed(target.parts[1:] if target.is_absolute() else target.parts)
            continue
        if not stat.S_ISDIR(found.st_mode):
            return f"{there} is not a folder"
        if not found.st_mode & stat.S_ISVTX and _written_by_others(found):
            mode = stat.S_IMODE(found.st_mode)
            return f"{there} can be written to by others (mode {mode:o})"
        here = here.parent if there.name == ".." else there
    return ""


def _written_by_others(found: os.stat_result) -> bool:
    if found.st_mode & stat.S_IWOTH:
        return True
    if not found.st_mode & stat.S_IWGRP:
        return False
    import grp  # not on Windows
    import pwd

    # Where each user has a group of their own, folders are often left open to that group.
    try:
        owner, group = pwd.getpwuid(found.st_uid), grp.getgrgid(found.st_gid)
    except KeyError:
        return True
    return (
        owner.pw_gid != group.gr_gid
        or owner.pw_name != group.gr_name
        or set(group.gr_mem) - {owner.pw_name} != set()
    )


def _belongs(uid: int) -> str:
    import pwd  # not on Windows

    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = f"user {uid}"
    return f"belongs to {name}, and not to root or to the user of this process"

"""What a killed process leaves beside a folder that it was writing: found by the next that writes there, and removed."""

import contextlib
import glob
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path


try:
    import fcntl
except ImportError:  # Windows, where nothing tells whether somebody writes there
    fcntl = None  # type: ignore[assignment]

TEMPORARY, REPLACED = "tmp", "old"
_NAME = re.compile(rf"\.(?P<name>.+)\.[0-9a-f]{{12}}\.(?P<kind>{TEMPORARY}|{REPLACED})")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """
    Writes a file whole or not at all.

    Args:
        path (`Path`):
            The file.

    Yields:
        `Path`: A hidden file beside it, to be written; it takes the place of `path` when the body ends well.
    """
    temporary = path.with_name(f".{path.name}.{TEMPORARY}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sibling(folder: Path, token: str, kind: str) -> Path:
    """
    The name under which a folder is kept while it is written or replaced.

    Args:
        folder (`Path`):
            The folder to be.
        token (`str`):
            Twelve hexadecimal digits of this write.
        kind (`str`):
            `TEMPORARY` or `REPLACED`.

    Returns:
        `Path`: A hidden folder beside it.
    """
    return folder.parent / f".{folder.name}.{token}.{kind}"


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """
    Marks a folder as in use for as long as the process lives, under whatever name, where the file system can lock.

    Args:
        folder (`Path`):
            The folder.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def clear_leftovers(folder: Path) -> None:
    """
    Removes what processes that are dead have left beside a folder, and puts back what one was about to replace.

    Args:
        folder (`Path`):
            The folder to be written.
    """
    for path in sorted(folder.parent.glob(f".{glob.escape(folder.name)}.*")):
        found = _NAME.fullmatch(path.name)
        if found is None or found["name"] != folder.name or path.is_symlink() or not path.is_dir() or _is_held(path):
            continue
        if found["kind"] == REPLACED and not folder.exists():
            os.rename(path, folder)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _is_held(folder: Path) -> bool:
    """Whether a process writes there. Where the file system cannot tell, one does."""
    if fcntl is None:
        return True
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False

"""A disk that fills up: a small file system of its own where one can be mounted, a limit on the size of files elsewhere."""

import os
import shutil
import subprocess
from pathlib import Path

from command_lives import Life


_MEGABYTES = 256
# Bytes: the limit holds for the log of the command too, whose disk is not full
_LARGEST_LOG = 65_536


class Disk:
    """
    Folder for the rounds, on a disk that can be filled.

    Args:
        folder (`Path`):
            Folder to be; it goes with the context, unless something in it is to be looked at.

    Attributes:
        mounted (`bool`): Whether it is a file system of its own.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.mounted = False

    def __enter__(self) -> "Disk":
        self.folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={_MEGABYTES}m", "tmpfs", str(self.folder)]
        try:
            self.mounted = subprocess.run(command, capture_output=True).returncode == 0
        except FileNotFoundError:  # no `mount` here
            self.mounted = False
        return self

    def __exit__(self, *exc_info) -> None:
        self.relieve()
        if self.mounted:
            kept = self.folder.with_name("kept")
            if any(self.folder.iterdir()):
                shutil.copytree(self.folder, kept, symlinks=True)
            subprocess.run(["umount", "-l", str(self.folder)], check=True, capture_output=True)
            self.folder.rmdir()
            if kept.is_dir():
                kept.rename(self.folder)

    def fill(self, life: Life, left: int) -> None:
        """Leaves so many bytes of room, for a command that runs."""
        if not self.mounted:
            life.limit_files(max(left, _LARGEST_LOG))
            return
        ballast = os.open(self.folder / "ballast", os.O_WRONLY | os.O_CREAT)
        try:
            while (free := self._free()) > max(left, 4096):
                os.posix_fallocate(ballast, os.fstat(ballast).st_size, free - left)
        except OSError:  # the command was faster
            pass
        finally:
            os.close(ballast)

    def relieve(self) -> None:
        """Makes room again."""
        (self.folder / "ballast").unlink(missing_ok=True)

    def _free(self) -> int:
        found = os.statvfs(self.folder)
        return found.f_bavail * found.f_frsize

"""Disks that are full: a limit that the kernel sets on files, and a small file system where that may be mounted."""

import contextlib
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let the kernel refuse writes of this process beyond `size` bytes of a file (EFBIG), root or not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path | None]:
    """A file system of its own with so much space, at `folder`; None where this process may not mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill_disk(folder: Path) -> Path:
    """A file that takes all the space that is left; delete it to have space again."""
    file = folder / "filler"
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as output:
        while True:
            output.write(bytes(2**16))
    with contextlib.suppress(OSError), file.open("ab", buffering=0) as output:
        while True:
            output.write(bytes(1))
    return file

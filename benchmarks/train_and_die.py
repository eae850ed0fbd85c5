"""`sparring` that kills itself (SIGKILL) while it writes a file; kill_and_resume.py starts it.

    python benchmarks/train_and_die.py FILE NUMBER PLACE EVERY_BATCH train --out ...

FILE: the name of the file, such as checkpoint.pt. NUMBER: at its how-manieth write, from 1 (0: never). PLACE: before
(the neighbour file is open, without a byte), middle (half of the bytes are on the disk), written (all of them are, but
the file is not in place yet), renamed (it just is). EVERY_BATCH: 1 saves a checkpoint after every batch, 0 as usual.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PLACES = ("before", "middle", "written", "renamed")


def die() -> None:
    """As by the kernel: no handler runs, nothing is flushed or cleaned up."""
    if sys.platform == "win32":
        os._exit(137)
    os.kill(os.getpid(), signal.SIGKILL)


def arm(file: str, number: int, place: str) -> None:
    """From now on the `number`-th atomic write of `file` ends this process at `place`."""
    assert place in PLACES, place
    opened: list[str] = []
    real_open, real_fsync, real_replace = Path.open, os.fsync, Path.replace

    def due(where: str) -> bool:
        mine = bool(opened) and opened[-1].startswith(f".{file}.") and opened[-1].endswith(".part")
        return mine and where == place and opened.count(opened[-1]) == number

    def open_(self: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        stream = real_open(self, mode, *args, **options)
        if mode == "wb":
            opened.append(self.name)
            if due("before"):
                die()
        return stream

    def fsync(descriptor: int) -> None:
        if due("middle"):
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            real_fsync(descriptor)
            die()
        real_fsync(descriptor)

    def replace(self: Path, target: Any) -> Path:
        if due("written"):
            die()
        moved = real_replace(self, target)
        if due("renamed"):
            die()
        return moved

    def patch(owner: Any, name: str, function: Callable[..., Any]) -> None:
        setattr(owner, name, function)

    patch(Path, "open", open_)
    patch(os, "fsync", fsync)
    patch(Path, "replace", replace)


def main() -> None:
    file, number, place, every_batch, *arguments = sys.argv[1:]
    import torch

    from sparring.app import cli
    from sparring.app import train_run as runs

    torch.set_num_threads(1)
    if every_batch == "1":
        runs.SECONDS_BETWEEN_CHECKPOINTS = -1.0
    if int(number):
        arm(file, int(number), place)
    sys.argv = ["sparring", *arguments]
    cli.main()


if __name__ == "__main__":
    main()

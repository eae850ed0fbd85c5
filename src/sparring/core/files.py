"""Writing files so that a killed process or a full disk never leaves half of one."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Lets `write` fill a neighbour file, then puts it in place in one step; the old file stays when that fails.

    The neighbour, .NAME.MACHINE-PROCESS.part, is no other process's; what killed ones of this machine left is deleted.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    machine = platform.node()
    temporary = path.with_name(f".{path.name}.{machine}-{os.getpid()}.part")
    try:
        with temporary.open("wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    start = f".{path.name}.{machine}-"
    for left in path.parent.iterdir():
        if left.name.startswith(start) and left.suffix == ".part" and _ended(left.stem.removeprefix(start)):
            left.unlink(missing_ok=True)


def _ended(process: str) -> bool:
    """Whether no process of this machine has that number, as far as it can be told."""
    if os.name != "posix" or not process.isdigit():
        return False
    try:
        os.kill(int(process), 0)  # asks only
    except OSError as error:
        return isinstance(error, ProcessLookupError)
    return False


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Makes the folder and holds it for this process; raises ValueError while another process holds it.

    The hold ends with the process, however that ends. A folder that was made for this and got nothing is deleted.
    """
    from filelock import FileLock, Timeout

    existed = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"{folder} is in use: another process writes there. Wait until it has ended, or choose another folder"
        ) from None
    try:
        yield
    finally:
        (folder / ".lock").unlink(missing_ok=True)  # while it is held: who waits for the old file sees that it is gone
        lock.release()
        if not existed:
            with suppress(OSError):
                folder.rmdir()


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically."""
    write_atomically(path, lambda stream: stream.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON atomically; raises ValueError for NaN, which JSON does not know."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, what: str) -> Any:
    """The content of a JSON file; raises ValueError that names `what` was to be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is not there; it should hold {what}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} should hold {what}, but it is not valid JSON ({error})") from None

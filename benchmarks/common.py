"""What the benchmarks share: results kept line by line, and tables that say where they come from."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch


class Lines:
    """JSON lines in a file, one per finished part. A part that is there is not computed again.

    A last line cut off by a kill is dropped, and overwritten by the next `add`.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.records = path, []
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        self.records = [json.loads(line) for line in whole.splitlines()]
        if whole != text:
            path.write_text(whole, encoding="utf-8")

    def find(self, **key: Any) -> dict[str, Any] | None:
        """The record with these values, or None."""
        return next((r for r in self.records if all(r.get(k) == v for k, v in key.items())), None)

    def add(self, record: dict[str, Any]) -> dict[str, Any]:
        """Keeps the record and returns it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.records.append(record)
        return record


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def provenance(*, seed: Any, n: Any, packages: Sequence[str] = ()) -> str:
    """Where a table comes from: command, seed, number of examples, machine and versions."""
    versions = [f"Python {platform.python_version()}"]
    for package in ("sparring", "torch", *packages):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} is not installed")
    return "\n".join(
        (
            f"- Command: `python {shlex.join([Path(sys.argv[0]).as_posix(), *sys.argv[1:]])}`",
            f"- Seed: {seed}; n: {n}",
            f"- Machine: {cpu()}, {os.cpu_count()} processors, {torch.get_num_threads()} threads",
            f"- Versions: {', '.join(versions)}",
        )
    )


def cpu() -> str:
    """The name of the processor."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return next(line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %"


def share_text(share: Any, digits: int = 1) -> str:
    """A share with its interval."""
    return f"{percent(share.value, digits)} ({100 * share.low:.{digits}f} to {100 * share.high:.{digits}f})"

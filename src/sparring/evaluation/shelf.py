"""The folder where the parts of an unfinished evaluation are kept, so that one that was killed can go on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from sparring.evaluation.parts import Part, read_key, read_part, write_part


class Key(NamedTuple):
    """A batch: its number, the running number of its first example, and the digest of its content."""

    number: int
    first: int
    content: str


class OtherSettings(ValueError):
    """A folder holds parts of an evaluation with other settings."""


class Shelf:
    """The folder where the parts of one evaluation are kept, numbered by batch.

    settings: plain data by name; a part counts only for the settings, the batch and the place that it was made from.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder, self.settings = Path(folder), json.loads(json.dumps(settings))

    def numbers(self) -> list[int]:
        """The batches that have a part, as far as the names tell."""
        return sorted(int(path.stem) for path in self.folder.glob("[0-9]*.npz") if path.stem.isdigit())

    def check(self) -> None:
        """Raises OtherSettings where a whole part was made with other settings, and says which."""
        for path in sorted(self.folder.glob("[0-9]*.npz")):
            key = read_key(path)
            if key is None:  # computed again
                continue
            found = key["settings"]
            names = sorted({*found, *self.settings})
            differ = [name for name in names if found.get(name) != self.settings.get(name)]
            if differ:
                told = ", ".join(_difference(name, found.get(name), self.settings.get(name)) for name in differ)
                raise OtherSettings(
                    f"{self.folder} holds parts of an evaluation with other settings: {told}. Put together they would "
                    "mean nothing; choose another folder, or delete that one"
                )

    def read(self, batch: Key) -> Part | None:
        """The part of a batch; None when it must be computed (again)."""
        return read_part(self._path(batch), self._told(batch))

    def require(self, batch: Key) -> Part:
        """The part that another process has written; RuntimeError when it is not there."""
        part = self.read(batch)
        if part is None:
            raise RuntimeError(
                f"the part of batch {batch.number} is not in {self.folder}, though its process has finished. All "
                "processes must see the same folder, and the same batches in the same order (unshuffled)"
            )
        return part

    def write(self, batch: Key, part: Part) -> None:
        """Keeps the part of a batch."""
        write_part(self._path(batch), part, self._told(batch))

    def clear(self) -> None:
        """Deletes the parts, and the folder when nothing else is in it."""
        for pattern in ("[0-9]*.npz", ".[0-9]*.npz.part"):
            for path in self.folder.glob(pattern):
                path.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()

    def _path(self, batch: Key) -> Path:
        return self.folder / f"{batch.number:06d}.npz"

    def _told(self, batch: Key) -> dict[str, Any]:
        return {"settings": self.settings, **batch._asdict()}


def _difference(name: str, there: Any, here: Any) -> str:
    short = all(isinstance(value, (int, float, str)) and len(str(value)) < 40 for value in (there, here))
    return f"{name} ({there!r} there, {here!r} here)" if short else name

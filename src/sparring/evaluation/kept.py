"""The folder where the finished batches of an evaluation are kept, so that one that was killed can go on.

settings.json says what was evaluated, and one .npz for each batch, named by its number, what came out.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from sparring.core.files import write_atomically, write_text
from sparring.core.types import Cost
from sparring.core.unpacking import read_npz
from sparring.evaluation.fingerprint import digest
from sparring.evaluation.one_batch import AttackRecord, BatchOutcome

_log = logging.getLogger("sparring")
_PATTERNS = ("[0-9]*.npz", "settings.json", ".[0-9]*.npz.*part", ".settings.json.*part")
_GROUPS = ("table", "stands_at", "gallery")  # the tensors of an outcome


class BatchKey(NamedTuple):
    """A batch: its number, the running number of its first example, and the digest of its content."""

    number: int
    first: int
    content: str


class OtherSettings(ValueError):
    """A folder holds batches of an evaluation with other settings."""


class Kept:
    """The batches of one evaluation in a folder.

    settings: plain data by name. A batch counts only for the settings, the examples and the place it was made from; one
    that is damaged counts as not there. Several processes may keep batches in a folder, and clear it, at any time.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder, self.settings = Path(folder), json.loads(json.dumps(settings))
        self._text = json.dumps(self.settings, indent=2, sort_keys=True)
        self._digest = digest(self._text)

    def numbers(self) -> list[int]:
        """The batches that are there, as far as the names tell."""
        return sorted(int(path.stem) for path in self.folder.glob("[0-9]*.npz") if path.stem.isdigit())

    def other_settings(self) -> str:
        """A sentence that says which other settings the batches there were made with; "" where all is well."""
        try:
            text = (self.folder / "settings.json").read_text(encoding="utf-8")
            found = dict(json.loads(text))
            names = sorted({*found, *self.settings})
        except (OSError, ValueError, TypeError):  # without them no batch of other settings counts
            return ""
        differ = [name for name in names if found.get(name) != self.settings.get(name)]
        theirs = digest(text)
        if not differ or not any(_read(path)[0].get("settings") == theirs for path in self.folder.glob("[0-9]*.npz")):
            return ""
        told = ", ".join(_difference(name, found.get(name), self.settings.get(name)) for name in differ)
        return (
            f"{self.folder} holds batches of an evaluation with other settings: {told}. Put together they would mean "
            "nothing; choose another folder, or delete that one"
        )

    def read(self, key: BatchKey) -> BatchOutcome | None:
        """What came out of a batch; None when it must be computed (again)."""
        made_from, outcome = _read(self._path(key))
        if outcome is None or made_from != self._proof(key):
            return None
        asked = [attack[0] for attack in self.settings.get("attacks", [])]
        if told := contradiction(outcome, asked):
            _log.info("%s contradicts itself (%s); its batch is computed again", self._path(key), told)
            return None
        return outcome

    def write(self, key: BatchKey, outcome: BatchOutcome) -> None:
        """Keeps what came out of a batch, in an .npz without pickle."""
        told = {
            "made_from": self._proof(key), "attacks": outcome.attacks, "curve_attacks": outcome.curve_attacks,
            "cost": outcome.cost, "seconds": outcome.seconds,
        }  # fmt: skip
        arrays: dict[str, Any] = {
            f"{group}/{name}": value.numpy() for group in _GROUPS for name, value in getattr(outcome, group).items()
        }
        told["content"] = _content(arrays, told)
        arrays["text"] = np.frombuffer(json.dumps(told, default=vars).encode(), dtype=np.uint8)
        settings = self.folder / "settings.json"
        for last in (False, False, True):
            try:
                if not settings.exists() or settings.read_text(encoding="utf-8") != self._text:
                    write_text(settings, self._text)
                return write_atomically(self._path(key), lambda stream: np.savez(stream, **arrays))
            except FileNotFoundError:  # another process has just cleared the folder
                if last:
                    raise

    def _path(self, key: BatchKey) -> Path:
        return self.folder / f"{key.number:06d}.npz"

    def _proof(self, key: BatchKey) -> dict[str, Any]:
        return {"settings": self._digest, **key._asdict()}


def clear(folder: Path) -> None:
    """Deletes the batches that are kept in a folder, and the folder when nothing else is in it."""
    for pattern in _PATTERNS:
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def _read(path: Path) -> tuple[dict[str, Any], BatchOutcome | None]:
    """What the outcome in a file was made from, and the outcome; ({}, None) where the file is none or damaged."""
    try:
        plain = read_npz(path.read_bytes(), str(path))
        told = json.loads(plain.pop("text").tobytes())
        if told.pop("content") != _content(plain, told):
            raise ValueError("its content is not what was written")
        arrays = {name: torch.from_numpy(value) for name, value in plain.items()}
        parts: dict[str, Any] = {group: {} for group in _GROUPS}
        for name, value in arrays.items():
            group, _, rest = name.partition("/")
            parts[group][float(rest) if group == "stands_at" else rest] = value
        for name in ("attacks", "curve_attacks"):
            parts[name] = [AttackRecord(**{**counts, "cost": Cost(*counts["cost"])}) for counts in told[name]]
        return told["made_from"], BatchOutcome(**parts, cost=Cost(*told["cost"]), seconds=told["seconds"])
    except FileNotFoundError:
        return {}, None
    except Exception as error:  # a damaged zip file fails in many ways
        _log.info("%s is damaged (%s: %s); its batch is computed again", path, type(error).__name__, error)
        return {}, None


def _content(arrays: Mapping[str, np.ndarray], told: Mapping[str, Any]) -> str:
    """The digest of all that a file holds."""
    plain = json.loads(json.dumps(told, default=vars))
    held = (digest(name, torch.from_numpy(arrays[name])) for name in sorted(arrays))
    return digest(json.dumps(plain, sort_keys=True), *held)


def contradiction(outcome: BatchOutcome, asked: Sequence[str] = ()) -> str:
    """What in an outcome cannot be, in words; "" where all fits: lengths, flags, shares, counts and the attacks asked.

    A digest tells of accidents; this of files that somebody wrote, who can make a digest, too.
    """
    table, attacks = outcome.table, outcome.attacks
    lengths = {len(column) if column.ndim else -1 for column in (*table.values(), *outcome.stands_at.values())}
    if len(lengths) != 1 or -1 in lengths:
        return "columns of different lengths"
    flags = {name: table[name] for name in ("correct", "robust", "certified") if name in table}
    if any(column.dtype != torch.bool for column in (*flags.values(), *outcome.stands_at.values())):
        return "flags that are neither true nor false"
    if asked and [record.name for record in attacks] != list(asked):
        return f"the attacks {', '.join(record.name for record in attacks)}"
    for record in (*attacks, *outcome.curve_attacks):
        counts = (*record.cost, record.ran_on, record.broke, record.standing_after, record.skipped, record.seconds)
        if min(*counts, *record.rejected.values()) < 0 or record.broke > record.ran_on or math.isinf(sum(counts)):
            return f"counts of {record.name}"
    if "correct" not in table:
        return ""
    shares = [table[name] for name in ("clean_confidence", "adversarial_confidence", "margin_left")]
    if not all(bool(((share >= 0) & (share <= 1)).all()) for share in shares):
        return "shares outside 0 to 1"
    right, stands, broken_by = flags["correct"], flags["robust"], table["broken_by"]
    wrong = (right & (table["clean_prediction"] != table["label"])).any() or (stands & ~right).any()
    broke = [int((broken_by == number).sum()) for number in range(len(attacks))]
    if bool(wrong) or bool(((broken_by >= 0) != (right & ~stands)).any()) or broke != [a.broke for a in attacks]:
        return "verdicts that contradict each other"
    return ""


def _difference(name: str, there: Any, here: Any) -> str:
    short = all(isinstance(value, (int, float, str)) and len(str(value)) < 40 for value in (there, here))
    return f"{name} ({there!r} there, {here!r} here)" if short else name

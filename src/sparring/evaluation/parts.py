"""What is known about one batch: a record that adds up with others, and a file that is whole or does not count."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparring.core.files import write_atomically
from sparring.core.types import Cost
from sparring.results.findings import Finding

_log = logging.getLogger("sparring")


@dataclass
class Part:
    """Everything about some examples, on the CPU.

    columns: a value per example (B,). stands_at: radius factor -> (B,) bool. attacks, curve_attacks: what each attack
    did there (`AttackRecord.counts`). gallery: some turned examples. seconds: of work.
    """

    columns: dict[str, Tensor] = field(default_factory=dict)
    stands_at: dict[float, Tensor] = field(default_factory=dict)
    attacks: list[dict[str, Any]] = field(default_factory=list)
    curve_attacks: list[dict[str, Any]] = field(default_factory=list)
    gallery: dict[str, Tensor] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)
    seconds: float = 0.0


def merge(parts: Iterable[Part], gallery_size: int) -> Part:
    """One part of them all, in that order; of the pictures only the first `gallery_size` are kept, also meanwhile.

    Raises ValueError when there is none.
    """
    kept: list[Part] = []
    room = gallery_size
    for part in parts:
        gallery = {name: value[:room].clone() for name, value in part.gallery.items()} if room else {}
        room -= len(gallery.get("index", ()))
        kept.append(replace(part, gallery=gallery))
    if not kept:
        raise ValueError("there is nothing to evaluate: not one batch was given")
    whole = kept[0]
    for part in kept[1:]:
        whole = Part(
            attacks=_plus(whole.attacks, part.attacks), curve_attacks=_plus(whole.curve_attacks, part.curve_attacks),
            findings=whole.findings + part.findings, cost=whole.cost.plus(part.cost),
            seconds=whole.seconds + part.seconds,
        )  # fmt: skip
    whole.columns = _joined([part.columns for part in kept])
    whole.stands_at = _joined([part.stands_at for part in kept])
    whole.gallery = _joined([part.gallery for part in kept if part.gallery])
    return whole


def _plus(a: Any, b: Any) -> Any:
    """Plain data, added number by number."""
    if isinstance(a, dict):
        return {name: _plus(value, b[name]) for name, value in a.items()}
    return [_plus(x, y) for x, y in zip(a, b, strict=True)] if isinstance(a, list) else a + b


def _joined(tables: Sequence[dict[Any, Tensor]]) -> dict[Any, Tensor]:
    return {name: torch.cat([table[name] for table in tables]) for name in (tables[0] if tables else ())}


def write_part(path: Path, part: Part, key: Mapping[str, Any]) -> None:
    """Writes an .npz without pickle, atomically. `key` (plain data) says what the part was made from."""
    told = {
        "key": key, "factors": list(part.stands_at), "attacks": part.attacks, "curve_attacks": part.curve_attacks,
        "findings": [asdict(finding) for finding in part.findings], "cost": part.cost, "seconds": part.seconds,
    }  # fmt: skip
    arrays = {f"column/{name}": value.numpy() for name, value in part.columns.items()}
    arrays |= {f"stands/{i}": value.numpy() for i, value in enumerate(part.stands_at.values())}
    arrays |= {f"gallery/{name}": value.numpy() for name, value in part.gallery.items()}
    arrays["text"] = np.frombuffer(json.dumps(told).encode(), dtype=np.uint8)
    named: dict[str, Any] = dict(arrays)
    write_atomically(path, lambda stream: np.savez(stream, **named))


def read_key(path: Path) -> Any:
    """What the part in a file was made from; None when it is damaged."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            return json.loads(file["text"].tobytes())["key"]
    except Exception:  # see `read_part`, which says so
        return None


def read_part(path: Path, key: Mapping[str, Any]) -> Part | None:
    """The part in a file; None when there is none, it is damaged, or it was made from something else."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            arrays = {name: torch.from_numpy(file[name]) for name in file.files}
        told = json.loads(arrays.pop("text").numpy().tobytes())
        if told["key"] != key:
            return None
        groups: dict[str, dict[str, Tensor]] = {"column": {}, "stands": {}, "gallery": {}}
        for name, value in arrays.items():
            group, _, rest = name.partition("/")
            groups[group][rest] = value
        return Part(
            groups["column"], {factor: groups["stands"][str(i)] for i, factor in enumerate(told["factors"])},
            told["attacks"], told["curve_attacks"], groups["gallery"], [Finding(**f) for f in told["findings"]],
            Cost(*told["cost"]), told["seconds"],
        )  # fmt: skip
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged zip file fails in many ways
        _log.info("%s is damaged (%s: %s); its batch is computed again", path, type(error).__name__, error)
        return None

"""What a reader of a verdict must know, and the one word that all of it comes to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Level = Literal["note", "suspect", "invalid"]
Verdict = Literal["TRUSTED", "SUSPECT", "INVALID"]


@dataclass(frozen=True)
class Finding:
    """A short name, a sentence that says what was seen and why it matters, its numbers, and what to do next.

    level: "note" informs; "suspect" means that the number may be too high; "invalid" that it means nothing.
    """

    name: str
    sentence: str
    numbers: Mapping[str, Any] = field(default_factory=dict)
    level: Level = "note"
    next_step: str = ""

    def __post_init__(self) -> None:
        if self.level not in get_args(Level):
            raise ValueError(f"level of finding {self.name!r}: got {self.level!r}, expected {get_args(Level)}")

    @property
    def severity(self) -> int:
        """0 for a note, 1 for suspect, 2 for invalid."""
        return get_args(Level).index(self.level)


def verdict(findings: Iterable[Finding]) -> Verdict:
    """INVALID or SUSPECT if any finding says so, else TRUSTED.

    >>> verdict([Finding("random_output", "Two looks differ.", level="suspect")])
    'SUSPECT'
    """
    worst: Verdict = get_args(Verdict)[max((finding.severity for finding in findings), default=0)]
    return worst

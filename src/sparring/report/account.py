"""What became of the examples, attack by attack, and what each attack cost: plain numbers from a results file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from sparring.report.results import LEVELS, Run


class Part(NamedTuple):
    """A share of all examples: from `start`, `share` wide, `num` examples; `kind` is how it is drawn."""

    kind: str
    words: str
    start: float
    share: float
    num: int


class Bracket(NamedTuple):
    """Robust accuracy lies in [lower, upper]; lower is None without a certificate, and `reason` says why."""

    lower: float | None
    upper: float
    parts: tuple[Part, ...]
    certificate: str
    reason: str


_CERTIFICATES = {"interval_margin": "interval bounds"}


def bracket(results: Mapping[str, Any]) -> Bracket:
    """The range of robust accuracy, and the parts of all examples: their shares add up to 1."""
    clean, robust, certified = (results.get(f"{kind}_accuracy") for kind in ("clean", "robust", "certified"))
    assert clean and robust  # the reader refuses files without them
    n = int(clean["n"])
    right, stand, proven = (_count(share, n) for share in (clean, robust, certified))
    unproven = "stands, but is not certified" if certified else "stands: no attack broke it"
    counts = (
        ("certified", "certified: no change can break it", proven),
        ("stands", unproven, stand - proven),
        ("broken", "broken by an attack", right - stand),
        ("wrong", "wrong without any attack", n - right),
    )
    parts, start = [], 0
    for kind, words, count in counts:
        if kind != "certified" or certified:
            parts.append(Part(kind, words, start / n, count / n, count))
        start += count
    told = results.get("certification") or {}
    name = str(told.get("name") or "a certificate")
    reason = str(told.get("reason") or "these results were made without one")
    lower = certified["value"] if certified else None
    return Bracket(lower, robust["value"], tuple(parts), _CERTIFICATES.get(name, name), reason)


def _count(share: Mapping[str, Any] | None, n: int) -> int:
    return round(share["value"] * n) if share else 0


class Line(NamedTuple):
    """One attack of the cascade; None where the file does not say. Passes are forwards + 2 x backwards per image."""

    name: str
    options: str
    ran_on: int | None
    skipped: int | None
    near: float | None
    broke: int | None
    robust_after: float | None
    rejected: int
    passes: float | None
    share: float | None
    seconds: float | None


class Cascade(NamedTuple):
    """The attacks in order; `passes` of them all, `whole` with the curve and the checks (per image, None unknown)."""

    lines: tuple[Line, ...]
    passes: float | None
    seconds: float | None
    broke: int
    whole: float | None
    complete: bool

    @property
    def skipping(self) -> bool:
        """Whether any attack left examples out because they were too far from falling."""
        return any(line.skipped for line in self.lines)

    @property
    def rejecting(self) -> bool:
        return any(line.rejected for line in self.lines)


def cascade(results: Mapping[str, Any]) -> Cascade:
    """What each attack ran on, skipped, broke and cost."""
    attacks, n = results["attacks"], results["robust_accuracy"]["n"]
    costs = [a.get("cost") or {} for a in attacks]
    passes = [_passes(cost, n) for cost in costs]
    total = sum(p for p in passes if p is not None)
    lines = [_line(a, p, p / total if p is not None and total else None) for a, p in zip(attacks, passes, strict=True)]
    seconds = [line.seconds for line in lines]
    known = bool(lines) and None not in passes
    return Cascade(
        tuple(lines), total if known else None,
        sum(s for s in seconds if s is not None) if known and None not in seconds else None,
        sum(line.broke or 0 for line in lines), _passes(results.get("cost") or {}, n),
        known and all(line.broke is not None and line.robust_after is not None for line in lines),
    )  # fmt: skip


def _line(attack: Mapping[str, Any], passes: float | None, share: float | None) -> Line:
    name, _, options = str(attack.get("name", "an attack")).partition(":")
    settings = attack.get("settings")
    if not options and isinstance(settings, Mapping):
        options = ",".join(f"{k}={settings[k]}" for k in ("num_steps", "restarts") if settings.get(k) is not None)
    near = re.search(r"\b(?:near|margin_at_most)=(\d*\.?\d+)", options)
    rejected = sum(v for v in (attack.get("rejected") or {}).values() if isinstance(v, int))
    return Line(
        name, options.replace(",", ", "), attack.get("ran_on"), attack.get("skipped"),
        attack.get("near", float(near[1]) if near else None), attack.get("broke"), attack.get("robust_after"), rejected,
        passes, share, (attack.get("cost") or {}).get("seconds"),
    )  # fmt: skip


def _passes(cost: Mapping[str, Any], n: int) -> float | None:
    """Forwards + 2 x backwards per image."""
    forwards, backwards = cost.get("forwards"), cost.get("backwards")
    return None if forwards is None or backwards is None else (forwards + 2 * backwards) / n


class Margins(NamedTuple):
    """Share of the clean margin left to each example that stands without a certificate, ascending."""

    left: tuple[float, ...]
    certified: int

    def below(self, share: float) -> int:
        return sum(left < share for left in self.left)


def margins(run: Run) -> Margins | None:
    """How far from falling the standing examples are; None when the files do not tell."""
    standing = [e for e in (run.examples or {}).values() if e.robust]
    left = [e.margin_left for e in standing if not e.certified]
    known = [share for share in left if share is not None]
    told = any(e.margin_left is not None for e in (run.examples or {}).values())
    return Margins(tuple(sorted(known)), len(standing) - len(left)) if told else None


def worst_first(runs: list[Run]) -> list[tuple[Run, dict[str, Any]]]:
    """Every finding with its run: invalid, then suspect, then notes; otherwise in the order of the files."""
    order = list(reversed(LEVELS))
    found = [(run, {"level": "note", **finding}) for run in runs for finding in run.results["findings"]]
    return sorted(found, key=lambda pair: order.index(pair[1]["level"]))

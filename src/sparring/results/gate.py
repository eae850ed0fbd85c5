"""The gate for CI: does an evaluation keep what it must keep? Every check passes or fails with one sentence.

Shares are compared as counts, exactly: 450 of 1000 is at least 0.45. A result that answers another question than its
baseline is an error, not a failure.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from sparring.results.compare import attacks_of, compare, differences, shared_examples
from sparring.results.read import StoredEvaluation, locate, read_evaluation
from sparring.results.schema import Metric
from sparring.results.statistics import wilson

SHORT = {"robust_accuracy": "--min-robust", "clean_accuracy": "--min-clean"}
SHARES = (*SHORT, "certified_accuracy", "attack_success")


class GateCheck(NamedTuple):
    """One thing that was asked, whether it holds, and the numbers in a sentence."""

    name: str
    passed: bool
    sentence: str


@dataclass(frozen=True)
class Decision:
    """Every check, and notes: what a reader should know but what decides nothing."""

    checks: tuple[GateCheck, ...]
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


@dataclass(frozen=True, kw_only=True)
class Demands:
    """What is asked of an evaluation, metrics by name. Raises ValueError for what cannot be asked.

    least, most: bounds; with `confident` the end of the 95 % interval must keep them, not the value itself. max_drop:
    how much worse than the baseline's a value may be, whichever way is worse; always the values themselves.
    require_verdict: the least verdict, which must then be there; without it INVALID fails, SUSPECT fails unless
    allow_suspect, and an absent verdict is a note.
    """

    least: Mapping[str, float] = field(default_factory=dict)
    most: Mapping[str, float] = field(default_factory=dict)
    max_drop: Mapping[str, float] = field(default_factory=dict)
    baseline: StoredEvaluation | None = None
    require_verdict: str | None = None
    allow_suspect: bool = False
    confident: bool = False

    def __post_init__(self) -> None:
        for kind in ("least", "most", "max_drop"):
            for name, value in getattr(self, kind).items():
                _check_bound(kind, name, value, share=name in SHARES)
        if bool(self.max_drop) != (self.baseline is not None):
            raise ValueError(
                "--max-drop and --baseline go together: the one says how far the accuracy may fall, the other from "
                "where. Give both, such as --baseline old.json --max-drop 0.01, or neither"
            )
        if self.require_verdict not in (None, "TRUSTED", "SUSPECT"):
            raise ValueError(
                f"--require-verdict {self.require_verdict}: expected TRUSTED, or SUSPECT for at least that; "
                "INVALID always fails"
            )
        if self.require_verdict == "TRUSTED" and self.allow_suspect:
            raise ValueError("--require-verdict TRUSTED and --allow-suspect contradict each other; leave one out")
        if self.confident and not self.least and not self.most:
            raise ValueError("--confident is about --min-robust, --min-clean, --min and --max; give at least one")
        if self.confident and any(name in SHARES and value == 1 for name, value in self.least.items()):
            raise ValueError("--confident with a minimum of 1: its lower end is below 1 for every n; ask less")


def read_bounds(option: str, texts: Iterable[str], plain: Iterable[str] = ()) -> dict[str, float]:
    """Bounds by name from texts NAME=VALUE; a VALUE alone is for the `plain` names. Raises ValueError.

    >>> read_bounds("--max", ["attack_success=0.3"])
    {'attack_success': 0.3}
    """
    found: dict[str, float] = {}
    for text in texts:
        name, equals, value = text.rpartition("=")
        names = [name.strip()] if equals else list(plain)
        try:
            found |= dict.fromkeys(names, float(value))
        except ValueError:
            names = []
        if not names or not all(names):
            form = "VALUE or NAME=VALUE" if plain else "NAME=VALUE"
            raise ValueError(f"{option} {text}: expected {form}, such as {option} robust_accuracy=0.45")
    return found


def read_baseline(baseline: Path, judged: Path) -> StoredEvaluation:
    """What to compare with; ValueError when it is the very file that is judged, or will be written over."""
    if locate(baseline).resolve() == locate(judged).resolve():
        raise ValueError(
            f"{locate(baseline)} is the result itself, so nothing could ever drop; copy the results that you want to "
            "keep to a place of their own, and name that as --baseline"
        )
    return read_evaluation(baseline)


def judge(judged: StoredEvaluation, demands: Demands) -> Decision:
    """Every demand on an evaluation. Raises ValueError when nothing is asked, or of another question than the baseline.

    `judge(read_evaluation("run"), Demands(least={"robust_accuracy": 0.45})).passed` is whether 45 % hold.
    """
    if demands.baseline is not None:
        _same_question(judged, demands.baseline)
    checks = (*_verdict(judged, demands), *_bounds(judged, demands), *_drops(judged, demands))
    if not checks:
        raise ValueError(
            "nothing to check: the file has no verdict and no threshold was given, so the gate would always be open; "
            "give --min-robust, --min-clean, --min, --max, or --baseline with --max-drop"
        )
    return Decision(checks, tuple(_notes(judged, demands)))


def _verdict(judged: StoredEvaluation, demands: Demands) -> Iterator[GateCheck]:
    word, asked = judged.results.verdict, demands.require_verdict
    if word is None:
        if asked:
            sentence = f"there is no verdict in this file; --require-verdict {asked} needs one, so evaluate again"
            yield GateCheck("verdict", False, sentence)
        return
    seen = [finding.name for finding in judged.results.findings if finding.level == word.lower()]
    because = f" ({', '.join(seen)})" if seen else ""
    if word == "INVALID":
        yield GateCheck("verdict", False, f"verdict INVALID{because}: the numbers mean nothing until that is mended")
    elif word == "SUSPECT":
        allowed = demands.allow_suspect or asked == "SUSPECT"
        advice = f"--require-verdict {asked} needs better" if asked else "or allow it: sparring gate --allow-suspect"
        advice = "allowed" if allowed else f"robust accuracy may be too high; see the findings; {advice}"
        yield GateCheck("verdict", allowed, f"verdict SUSPECT{because}: {advice}")
    else:
        yield GateCheck("verdict", True, f"verdict {word}")


def _bounds(judged: StoredEvaluation, demands: Demands) -> Iterator[GateCheck]:
    how = " with --confident" if demands.confident else ""
    for kind, bounds in (("least", demands.least), ("most", demands.most)):
        for name, value in bounds.items():
            metric = _metric(judged, name)
            _check_bound(kind, name, value, share=metric.count is not None)
            passed, needs = _keeps(metric, _exact(value), kind == "least", demands.confident)
            sentence = f"{_in_words(name, metric)}; {_asked(kind, name, value)}{how} {needs}"
            yield GateCheck(f"{'min' if kind == 'least' else 'max'}_{name}", passed, sentence)


def _drops(judged: StoredEvaluation, demands: Demands) -> Iterator[GateCheck]:
    for name, drop in demands.max_drop.items() if demands.baseline else ():
        metric, before = _metric(judged, name), _metric(demands.baseline, name)
        up, now, then = metric.higher_is_better, _value(metric), _value(before)
        passed, needs = _keeps(metric, then - _exact(drop) if up else then + _exact(drop), up, False)
        change = f"{float(now - then):+.4g} from the baseline's {before.value:.6g}"
        if metric.count is not None and before.count is not None:
            of = "" if before.n == metric.n else f" of {before.n}"
            change = f"{float(100 * (now - then)):+.2f} points from the baseline's {before.count}{of}"
        sentence = f"{_in_words(name, metric)}, {change}; {_asked('max_drop', name, drop)} {needs}"
        yield GateCheck(f"drop_{name}", passed, sentence)


def _keeps(metric: Metric, bound: Fraction, least: bool, confident: bool) -> tuple[bool, str]:
    """Whether the metric keeps an exact bound, and what would do."""
    if metric.count is None:
        end = (metric.low if least else metric.high) if confident else metric.value
        return (_exact(end) >= bound if least else _exact(end) <= bound), f"{'needs' if least else 'allows'} " + (
            f"{float(bound):.6g}"
        )
    n, counts = metric.n, range(metric.n + 1)
    if least:
        needed = max(0, math.ceil(bound * n))
        if confident:  # n + 1 where none does
            needed = bisect_left(counts, float(bound), key=lambda count: wilson(count, n).low)
        what = f"{needed}" if needed <= n else f"more than all {n}: measure more examples"
        return metric.count >= needed, f"needs {what}"
    allowed = min(n, math.floor(bound * n))
    if confident:
        allowed = bisect_right(counts, float(bound), key=lambda count: wilson(count, n).high) - 1
    return metric.count <= allowed, f"allows {allowed if allowed >= 0 else 'fewer than none: measure more examples'}"


def _notes(judged: StoredEvaluation, demands: Demands) -> Iterator[str]:
    if judged.results.verdict is None and not demands.require_verdict:
        yield "there is no verdict in this file (made with --no-checks): nobody checked whether it holds"
    base = demands.baseline
    if base is None:
        return
    if base.results.verdict in ("SUSPECT", "INVALID"):
        yield f"the baseline's own verdict is {base.results.verdict}, so the drop from it may say little"
    if attacks_of(judged.results) != attacks_of(base.results):
        yield "the baseline was measured with other attacks, which may explain a difference; evaluate it again"
    test = compare(base, judged).robust.test
    if test:
        yield (
            f"example by example: {test.only_b} robust only now, {test.only_a} only in the baseline, "
            f"McNemar's exact p = {test.p_value:.2g} (for information; it does not decide)"
        )


def _same_question(judged: StoredEvaluation, base: StoredEvaluation) -> None:
    """Raises ValueError unless the two were asked the same, of the same examples as far as the tables tell."""
    for what, then, now in differences(base.results, judged.results):
        raise ValueError(
            f"the baseline has another {what}: {then}, and the result has {now}. A drop between them would mean "
            "nothing; evaluate the baseline's model in the same way, or name another baseline"
        )
    if judged.rows is None or base.rows is None:
        return
    index, why_not = shared_examples(base, judged)
    if why_not or len(index) < len(base.rows):
        why_not = why_not or f"{len(base.rows) - len(index)} examples are in one of the two evaluations only."
        raise ValueError(f"the baseline is about other examples: {why_not} Evaluate both on the same data and split")


def _metric(stored: StoredEvaluation | None, name: str) -> Metric:
    found = stored.results.metrics if stored else {}
    if name not in found:
        raise ValueError(f"there is no {name} in the results of {stored.name if stored else ''}, so nothing can be "
                         f"asked of it; there are {', '.join(found)}")  # fmt: skip
    return found[name]


def _check_bound(kind: str, name: str, value: float, share: bool) -> None:
    if share and not 0 <= value <= 1:
        hint = f"; did you mean {value / 100:g}?" if 1 < value <= 100 else ""
        raise ValueError(f"{_asked(kind, name, value)}: expected a share between 0 and 1, not per cent{hint}")
    if not math.isfinite(value) or (kind == "max_drop" and value < 0):
        raise ValueError(f"{_asked(kind, name, value)}: expected a number that {name} could have")


def _asked(kind: str, name: str, value: float) -> str:
    """A demand as it is typed."""
    if kind == "max_drop":
        return f"--max-drop {value:g}" if name in SHORT else f"--max-drop {name}={value:g}"
    if kind == "least" and name in SHORT:
        return f"{SHORT[name]} {value:g}"
    return f"{'--min' if kind == 'least' else '--max'} {name}={value:g}"


def _in_words(name: str, metric: Metric) -> str:
    words = name.replace("_", " ")
    return (
        f"{words} {metric.value:.6g}"
        if metric.count is None
        else (f"{words} {metric.count / metric.n:.1%} ({metric.count} of {metric.n})")
    )


def _value(metric: Metric) -> Fraction:
    return _exact(metric.value) if metric.count is None else Fraction(metric.count, metric.n)


def _exact(value: float) -> Fraction:
    """The decimal number that was typed: 0.45 is 45/100, not the float beside it."""
    return Fraction(str(float(value)))

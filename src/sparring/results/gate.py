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
from sparring.results.schema import Metric, Results
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
        for kind, bounds in (("min", self.least), ("max", self.most), ("max-drop", self.max_drop)):
            for name, value in bounds.items():
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
    checks = [*_verdict(judged.results, demands), *_bounds(judged.results, demands)]
    notes = []
    if judged.results.verdict is None and not demands.require_verdict:
        notes.append("there is no verdict in this file (made with --no-checks): nobody checked whether it holds")
    if demands.baseline is not None:
        _same_question(judged, demands.baseline)
        checks += _drops(judged.results, demands.baseline.results, demands.max_drop)
        notes += _on_baseline(judged, demands.baseline)
    if not checks:
        raise ValueError(
            "nothing to check: the file has no verdict and no threshold was given, so the gate would always be open; "
            "give --min-robust, --min-clean, --min, --max, or --baseline with --max-drop"
        )
    return Decision(tuple(checks), tuple(notes))


def _verdict(results: Results, demands: Demands) -> Iterator[GateCheck]:
    word, asked = results.verdict, demands.require_verdict
    seen = [finding.name for finding in results.findings if finding.level == str(word).lower()]
    because = f" ({', '.join(seen)})" if seen else ""
    if word is None and asked:
        sentence = f"there is no verdict in this file; --require-verdict {asked} needs one, so evaluate again"
        yield GateCheck("verdict", False, sentence)
    elif word == "INVALID":
        yield GateCheck("verdict", False, f"verdict INVALID{because}: the numbers mean nothing until that is mended")
    elif word == "SUSPECT":
        allowed = demands.allow_suspect or asked == "SUSPECT"
        advice = f"--require-verdict {asked} needs better" if asked else "or allow it: sparring gate --allow-suspect"
        advice = "allowed" if allowed else f"robust accuracy may be too high; see the findings; {advice}"
        yield GateCheck("verdict", allowed, f"verdict SUSPECT{because}: {advice}")
    elif word:
        yield GateCheck("verdict", True, f"verdict {word}")


def _bounds(results: Results, demands: Demands) -> Iterator[GateCheck]:
    how = " with --confident" if demands.confident else ""
    for kind, bounds in (("min", demands.least), ("max", demands.most)):
        for name, value in bounds.items():
            metric = _metric(results, name)
            _check_bound(kind, name, value, share=metric.count is not None)
            passed, needs = _keeps(metric, _exact(value), kind == "min", demands.confident)
            sentence = f"{_in_words(name, metric)}; {_asked(kind, name, value)}{how} {needs}"
            yield GateCheck(f"{kind}_{name}", passed, sentence)


def _drops(results: Results, base: Results, max_drop: Mapping[str, float]) -> Iterator[GateCheck]:
    for name, drop in max_drop.items():
        metric, before = _metric(results, name), _metric(base, name)
        up, now, then = metric.higher_is_better, _value(metric), _value(before)
        passed, needs = _keeps(metric, then - _exact(drop) if up else then + _exact(drop), up, False)
        change = f"{float(now - then):+.4g} from the baseline's {before.value:.6g}"
        if metric.count is not None and before.count is not None:
            of = "" if before.n == metric.n else f" of {before.n}"
            change = f"{float(100 * (now - then)):+.2f} points from the baseline's {before.count}{of}"
        sentence = f"{_in_words(name, metric)}, {change}; {_asked('max-drop', name, drop)} {needs}"
        yield GateCheck(f"drop_{name}", passed, sentence)


def _keeps(metric: Metric, bound: Fraction, least: bool, confident: bool) -> tuple[bool, str]:
    """Whether the metric keeps an exact bound, and what would do."""
    if metric.count is None:
        end = _exact((metric.low if least else metric.high) if confident else metric.value)
        return (end >= bound if least else end <= bound), f"{'needs' if least else 'allows'} {float(bound):.6g}"
    n, counts = metric.n, range(metric.n + 1)
    if least:
        needed = max(0, math.ceil(bound * n))
        if confident:  # n + 1 where none does
            needed = bisect_left(counts, float(bound), key=lambda count: wilson(count, n).low)
        return metric.count >= needed, f"needs {needed if needed <= n else f'more than all {n}: measure more examples'}"
    allowed = min(n, math.floor(bound * n))
    if confident:
        allowed = bisect_right(counts, float(bound), key=lambda count: wilson(count, n).high) - 1
    return metric.count <= allowed, f"allows {allowed if allowed >= 0 else 'fewer than none: measure more examples'}"


def _on_baseline(judged: StoredEvaluation, base: StoredEvaluation) -> Iterator[str]:
    if base.results.verdict in ("SUSPECT", "INVALID"):
        yield f"the baseline's own verdict is {base.results.verdict}, so the drop from it may say little"
    if attacks_of(judged.results) != attacks_of(base.results):
        yield "the baseline was measured with other attacks, which may explain a difference; evaluate it again"
    if test := compare(base, judged).robust.test:
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
    pairs, why_not = shared_examples(base, judged)
    if len(pairs) < len(base.rows):
        why_not = why_not or f"{len(base.rows) - len(pairs)} examples are in one of the two evaluations only."
        raise ValueError(f"the baseline is about other examples: {why_not} Evaluate both on the same data and split")


def _metric(results: Results, name: str) -> Metric:
    if name not in results.metrics:
        raise ValueError(f"there is no {name} in the results of {results.name}, so nothing can be asked of it; "
                         f"there are {', '.join(results.metrics)}")  # fmt: skip
    return results.metrics[name]


def _check_bound(kind: str, name: str, value: float, share: bool) -> None:
    if share and not 0 <= value <= 1:
        hint = f"; did you mean {value / 100:g}?" if 1 < value <= 100 else ""
        raise ValueError(f"{_asked(kind, name, value)}: expected a share between 0 and 1, not per cent{hint}")
    if not math.isfinite(value) or (kind == "max-drop" and value < 0):
        raise ValueError(f"{_asked(kind, name, value)}: expected a number that {name} could have")


def _asked(kind: str, name: str, value: float) -> str:
    """A demand as it is typed."""
    if name in SHORT and kind != "max":
        return f"{SHORT[name] if kind == 'min' else '--max-drop'} {value:g}"
    return f"--{kind} {name}={value:g}"


def _in_words(name: str, metric: Metric) -> str:
    words = name.replace("_", " ")
    if metric.count is None:
        return f"{words} {metric.value:.6g}"
    return f"{words} {metric.count / metric.n:.1%} ({metric.count} of {metric.n})"


def _value(metric: Metric) -> Fraction:
    return _exact(metric.value) if metric.count is None else Fraction(metric.count, metric.n)


def _exact(value: float) -> Fraction:
    """The decimal number that was typed: 0.45 is 45/100, not the float beside it."""
    return Fraction(str(float(value)))

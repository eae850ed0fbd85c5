"""The gate for CI: does a results file keep what it must keep? Every check passes or fails with one sentence.

Shares are compared as counts, exactly: 450 of 1000 is at least 0.45. A result that answers another question than its
baseline is an error, not a failure.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from sparring.results.compare import pair
from sparring.results.read import locate, read_results, read_rows
from sparring.results.statistics import wilson

Record = Mapping[str, Any]  # the content of results.json
SHARES = {"robust": "robust_accuracy", "clean": "clean_accuracy"}


class Check(NamedTuple):
    """One thing that was asked, whether it holds, and the numbers in a sentence."""

    name: str
    passed: bool
    sentence: str


@dataclass(frozen=True)
class Decision:
    """Every check, and notes: what a reader should know but what decides nothing."""

    checks: tuple[Check, ...]
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


@dataclass(frozen=True, kw_only=True)
class Demands:
    """What is asked of a result. Raises ValueError for what cannot be asked.

    min_robust, min_clean: least shares in [0, 1]; with `confident` the lower end of the 95 % Wilson interval must reach
    them, not the share itself. max_drop, baseline: by how much (share in [0, 1]) either accuracy may lie below the
    baseline's; always the shares themselves. require_verdict: the least verdict, which must then be there; without it
    INVALID fails, SUSPECT fails unless allow_suspect, and an absent verdict (older files) is a note.
    """

    min_robust: float | None = None
    min_clean: float | None = None
    max_drop: float | None = None
    baseline: Record | None = None
    require_verdict: str | None = None
    allow_suspect: bool = False
    confident: bool = False

    def __post_init__(self) -> None:
        for name in ("min_robust", "min_clean", "max_drop"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                hint = f"; did you mean {value / 100:g}?" if 1 < value <= 100 else ""
                raise ValueError(f"{_option(name)} {value:g}: expected a share between 0 and 1, not per cent{hint}")
        if (self.max_drop is None) != (self.baseline is None):
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
        if self.confident and self.min_robust is None and self.min_clean is None:
            raise ValueError("--confident is about --min-robust and --min-clean; give at least one of them")
        if self.confident and 1 in (self.min_robust, self.min_clean):
            raise ValueError("--confident with a minimum of 1: its lower end is below 1 for every n; ask less")


def judge(record: Record, demands: Demands) -> Decision:
    """Every demand on the content of a results.json. Raises ValueError when nothing is asked, or of another question.

    >>> share = {"value": 0.45, "n": 1000, "count": 450}
    >>> decision = judge({"robust_accuracy": share, "clean_accuracy": share}, Demands(min_robust=0.45, min_clean=0.5))
    >>> [check.passed for check in decision.checks]
    [True, False]
    >>> decision.checks[1].sentence
    'clean accuracy 45.0% (450 of 1000); --min-clean 0.5 needs 500'
    """
    if demands.baseline is not None:
        _same_question(record, demands.baseline)
    checks = (*_verdict(record, demands), *_least(record, demands), *_drops(record, demands))
    if not checks:
        raise ValueError(
            "nothing to check: the file has no verdict and no threshold was given, so the gate would always be open; "
            "give --min-robust, --min-clean, or --baseline with --max-drop"
        )
    return Decision(checks, tuple(_notes(record, demands)))


def _verdict(record: Record, demands: Demands) -> Iterator[Check]:
    word, asked = record.get("verdict"), demands.require_verdict
    if word is None:
        if asked:
            sentence = f"there is no verdict in this file; --require-verdict {asked} needs one, so evaluate again"
            yield Check("verdict", False, sentence)
        return
    seen = [str(f["name"]) for f in record.get("findings", []) if f.get("level") == word.lower() and "name" in f]
    because = f" ({', '.join(seen)})" if seen else ""
    if word == "INVALID":
        yield Check("verdict", False, f"verdict INVALID{because}: the numbers mean nothing until that is mended")
    elif word == "SUSPECT":
        allowed = demands.allow_suspect or asked == "SUSPECT"
        advice = f"--require-verdict {asked} needs better" if asked else "or allow it: sparring gate --allow-suspect"
        advice = "allowed" if allowed else f"robust accuracy may be too high; see the findings; {advice}"
        yield Check("verdict", allowed, f"verdict SUSPECT{because}: {advice}")
    else:
        yield Check("verdict", True, f"verdict {word}")


def _least(record: Record, demands: Demands) -> Iterator[Check]:
    for name, least in (("robust", demands.min_robust), ("clean", demands.min_clean)):
        if least is None:
            continue
        share = record[SHARES[name]]
        needed = _needed(least, share["n"], demands.confident)
        how = " with --confident" if demands.confident else ""
        what = f"{needed}" if needed <= share["n"] else f"more than all {share['n']}: measure more examples"
        sentence = f"{_in_words(name, share)}; --min-{name} {least:g}{how} needs {what}"
        yield Check(f"min_{name}", share["count"] >= needed, sentence)


def _needed(least: float, n: int, confident: bool) -> int:
    """The smallest count of n that will do; n + 1 where none does."""
    if confident:
        return bisect_left(range(n + 1), least, key=lambda count: wilson(count, n).low)
    return math.ceil(_exact(least) * n)


def _drops(record: Record, demands: Demands) -> Iterator[Check]:
    if demands.baseline is None or demands.max_drop is None:
        return
    for name, key in SHARES.items():
        share, before = record[key], demands.baseline[key]["count"]
        needed = max(0, math.ceil(before - _exact(demands.max_drop) * share["n"]))
        change = 100 * (share["count"] - before) / share["n"]
        sentence = (
            f"{_in_words(name, share)}, {change:+.2f} points from the baseline's {before}; "
            f"--max-drop {demands.max_drop:g} needs {needed}"
        )
        yield Check(f"drop_{name}", share["count"] >= needed, sentence)


def _notes(record: Record, demands: Demands) -> Iterator[str]:
    if record.get("verdict") is None and not demands.require_verdict:
        yield "there is no verdict in this file (an older version, or --no-checks): nobody checked whether it holds"
    base = demands.baseline
    if base is None:
        return
    if base.get("verdict") in ("SUSPECT", "INVALID"):
        yield f"the baseline's own verdict is {base['verdict']}, so the drop from it may say little"
    if _attacks(record) != _attacks(base):
        yield "the baseline was measured with other attacks, which may explain a difference; evaluate it again"


def _same_question(record: Record, base: Record) -> None:
    """Raises ValueError unless the two were asked the same: threat, data, split, number of examples."""
    for what, now, then in (
        ("threat", record["threat"], base["threat"]),
        ("data", record["data"]["name"], base["data"]["name"]),
        ("split", record["data"]["split"], base["data"]["split"]),
        ("number of examples", record["robust_accuracy"]["n"], base["robust_accuracy"]["n"]),
    ):
        if now != then:
            raise ValueError(
                f"the baseline has another {what}: {then}, and the result has {now}. A drop between them would mean "
                "nothing; evaluate the baseline's model in the same way, or name another baseline"
            )


def _attacks(record: Record) -> list[Any]:
    return [(attack.get("name"), attack.get("settings")) for attack in record.get("attacks", [])]


def _in_words(name: str, share: Record) -> str:
    return f"{name} accuracy {share['count'] / share['n']:.1%} ({share['count']} of {share['n']})"


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _exact(value: float) -> Fraction:
    """The decimal number that was typed: 0.45 is 45/100, not the float beside it."""
    return Fraction(str(float(value)))


# What is read from disk


def read_baseline(baseline: Path, judged: Path) -> Record:
    """The results to compare with; ValueError when they are the very file that is judged, or will be written over."""
    if locate(baseline).resolve() == locate(judged).resolve():
        raise ValueError(
            f"{locate(baseline)} is the result itself, so nothing could ever drop; copy the results that you want to "
            "keep to a place of their own, and name that as --baseline"
        )
    return read_results(baseline)


def paired(result: Path, baseline: Path) -> str | None:
    """McNemar's test between the examples.csv beside two results, in a sentence; None when one has no such file.

    Raises ValueError when a table is damaged, or the two do not hold the same examples with the same labels.
    """
    tables = [locate(path).with_name("examples.csv") for path in (result, baseline)]
    if tables[0].resolve() == tables[1].resolve() or not all(table.exists() for table in tables):
        return None
    rows = [read_rows(table) for table in tables]
    for path, table, row in zip((result, baseline), tables, rows, strict=True):
        share = read_results(path)["robust_accuracy"]
        if (sum(r.robust for r in row.values()), len(row)) != (share["count"], share["n"]):
            return f"not compared example by example: {table} is not the table of the results beside it"
    test = pair(*rows)
    return (
        f"example by example: {test.only_a} robust only now, {test.only_b} only in the baseline, "
        f"McNemar's exact p = {test.p_value:.2g} (for information; it does not decide)"
    )

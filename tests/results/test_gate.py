"""The gate. Oracles: integer arithmetic, Wilson's interval solved by hand, and the sentences that its page shows."""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from command import Outcome
from command import call as sparring
from sparring.app.cli import app
from sparring.results.gate import Demands, GateCheck, judge, read_baseline, read_bounds
from sparring.results.read import StoredEvaluation, locate, read_evaluation
from sparring.results.schema import Results, Row
from sparring.results.statistics import examples_needed, wilson

Z95 = 1.959963984540054
PAGE = (Path(__file__).parents[2] / "docs" / "gate.md").read_text(encoding="utf-8")


def check_error(outcome: Outcome, fragments: tuple[str, ...]) -> None:
    """One line, exit code 2, the fragments in it."""
    assert outcome.code == 2 and len(outcome.err.splitlines()) == 1, outcome
    for fragment in fragments:
        assert fragment in outcome.err, (fragment, outcome.err)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def share(count: int, n: int) -> dict[str, Any]:
    return {"value": count / n, "low": 0.0, "high": 1.0, "n": n, "count": count}  # the gate makes its own interval


def record(robust: int = 450, clean: int = 850, n: int = 1000, **changes: Any) -> dict[str, Any]:
    """What results.json holds, as far as the gate reads it; changes["metrics"] are added to the two accuracies."""
    metrics = {"clean_accuracy": share(clean, n), "robust_accuracy": share(robust, n)} | changes.pop("metrics", {})
    found = {
        "schema": "sparring.results/2", "name": "net", "metrics": metrics,
        "data": {"kind": "images", "name": "digits", "split": "test"},
        "threat": {"text": "linf:8/255", "words": "Little."}, "verdict": "TRUSTED",
        "attacks": [attack("pgd", {"num_steps": 40}, clean - robust, robust / n)],
    }  # fmt: skip
    return found | changes


def attack(name: str, settings: Any, broke: int, after: float) -> dict[str, Any]:
    cost = {"forwards": 0, "backwards": 0, "seconds": 0.0}
    told = {"ran_on": 1000, "skipped": 0, "broke": broke, "robust_after": after, "rejected": {}, "cost": cost}
    return {"name": name, "settings": settings, **told}


def stored(**changes: Any) -> StoredEvaluation:
    return StoredEvaluation(Results.model_validate_json(json.dumps(record(**changes))))


SHORT = {"min_robust": "robust_accuracy", "min_clean": "clean_accuracy"}


def demands(**options: Any) -> Demands:
    """Demands from the short options of the command line."""
    short = {name: options.pop(name, None) for name in SHORT}
    least = {SHORT[name]: float(value) for name, value in short.items() if value is not None}
    if "max_drop" in options:
        options["max_drop"] = read_bounds("--max-drop", [str(options["max_drop"])], SHORT.values())
    return Demands(least=least | options.pop("least", {}), **options)


def failing(found: StoredEvaluation, **options: Any) -> list[str]:
    return [check.name for check in judge(found, demands(**options)).checks if not check.passed]


# What fails ------------------------------------------------------------------------------------------------------

BASE = stored()
DROP = {"baseline": BASE, "max_drop": 0.01}
SUSPECT, INVALID, OLD = ({"verdict": word} for word in ("SUSPECT", "INVALID", None))

OWN = {"metrics": {
    "certified_accuracy": share(200, 1000), "attack_success": share(400, 850) | {"higher_is_better": False},
    "distance": {"value": 12.5, "low": 12.0, "high": 13.0, "n": 1000, "higher_is_better": False},
}}  # fmt: skip

TABLE: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    # thresholds
    ({}, {"min_robust": 0.45}, []),
    ({"robust": 449}, {"min_robust": 0.45}, ["min_robust_accuracy"]),
    ({"robust": 449}, {"min_clean": 0.8}, []),
    ({"clean": 799}, {"min_clean": 0.8, "min_robust": 0.45}, ["min_clean_accuracy"]),
    ({"robust": 0, "clean": 0}, {"min_clean": 0.8, "min_robust": 0.45}, ["min_robust_accuracy", "min_clean_accuracy"]),
    ({"robust": 0, "clean": 0}, {"min_clean": 0, "min_robust": 0.0}, []),
    ({"robust": 999, "clean": 1000}, {"min_clean": 1, "min_robust": 1.0}, ["min_robust_accuracy"]),
    # any metric, either way
    (OWN, {"least": {"certified_accuracy": 0.2}, "most": {"attack_success": 0.5}}, []),
    (OWN, {"least": {"certified_accuracy": 0.2001}}, ["min_certified_accuracy"]),
    (OWN, {"most": {"attack_success": 0.4699}}, ["max_attack_success"]),
    (OWN, {"most": {"attack_success": 0.5, "distance": 12.5}}, []),
    (OWN, {"most": {"distance": 12.49}, "least": {"distance": 12.51}}, ["min_distance", "max_distance"]),
    (OWN, {"most": {"distance": 12.5}, "confident": True}, ["max_distance"]),
    (OWN, {"most": {"distance": 13}, "least": {"distance": 12}, "confident": True}, []),
    (OWN, {"most": {"attack_success": 0.5}, "confident": True}, ["max_attack_success"]),
    (OWN, {"most": {"attack_success": 0.51}, "confident": True}, []),
    # the interval
    ({"robust": 480}, {"min_robust": 0.45, "confident": True}, ["min_robust_accuracy"]),
    ({"robust": 481}, {"min_robust": 0.45, "confident": True}, []),
    (
        {"robust": 0, "clean": 4, "n": 4},
        {"min_robust": 0, "min_clean": 0.52, "confident": True},
        ["min_clean_accuracy"],
    ),
    # a baseline
    ({}, DROP, []),
    ({"robust": 900, "clean": 1000}, DROP, []),
    ({"robust": 440, "clean": 840}, DROP, []),
    ({"robust": 439, "clean": 840}, DROP, ["drop_robust_accuracy"]),
    ({"robust": 440, "clean": 839}, DROP, ["drop_clean_accuracy"]),
    ({"robust": 0, "clean": 0}, DROP, ["drop_robust_accuracy", "drop_clean_accuracy"]),
    ({"robust": 0, "clean": 0}, DROP | {"max_drop": 1}, []),
    ({"robust": 449}, DROP | {"max_drop": 0}, ["drop_robust_accuracy"]),
    ({"robust": 439}, DROP | {"min_robust": 0.439, "confident": True}, ["min_robust_accuracy", "drop_robust_accuracy"]),
    # verdicts
    ({}, {}, []),
    ({} | INVALID, {}, ["verdict"]),
    ({} | INVALID, {"allow_suspect": True}, ["verdict"]),
    ({} | INVALID, {"require_verdict": "SUSPECT"}, ["verdict"]),
    ({} | SUSPECT, {}, ["verdict"]),
    ({} | SUSPECT, {"allow_suspect": True}, []),
    ({} | SUSPECT, {"require_verdict": "SUSPECT"}, []),
    ({} | SUSPECT, {"require_verdict": "TRUSTED"}, ["verdict"]),
    ({}, {"require_verdict": "TRUSTED"}, []),
    ({}, {"require_verdict": "SUSPECT"}, []),
    ({} | OLD, {"min_robust": 0.45}, []),
    ({"verdict": None}, {"min_robust": 0.45}, []),
    ({} | OLD, {"require_verdict": "TRUSTED"}, ["verdict"]),
    ({} | OLD, {"require_verdict": "SUSPECT"}, ["verdict"]),
    ({"robust": 1} | INVALID, {"min_robust": 0.45} | DROP, ["verdict", "min_robust_accuracy", "drop_robust_accuracy"]),
]


@pytest.mark.parametrize(("changes", "options", "expected"), TABLE)
def test_what_fails(changes: dict[str, Any], options: dict[str, Any], expected: list[str]) -> None:
    found = stored(**changes)
    assert failing(found, **options) == expected
    decision = judge(found, demands(**options))
    assert decision.passed == (not expected)
    assert all("\n" not in check.sentence for check in decision.checks)


@pytest.mark.parametrize("n", [1, 3, 7, 100, 250, 1000])
def test_thresholds_and_drops_are_those_of_whole_numbers(n: int) -> None:
    """Thousandths as typed: floats would fail 0.29 of 100, and a fall from 0.8 to 0.7 with max_drop 0.1."""
    base, counts = stored(robust=n // 2, clean=n // 2, n=n), range(n + 1)
    records = [stored(robust=count, clean=n, n=n) for count in counts]
    for k in [*range(0, 1001, 77), 70, 100, 290, 450, 500, 570, 1000]:
        typed = k / 1000
        least, drop = demands(min_robust=typed), demands(baseline=base, max_drop=typed)
        passes = [judge(found, least).passed for found in records]
        assert passes == [1000 * count >= k * n for count in counts], typed
        passes = [judge(found, drop).passed for found in records]
        assert passes == [1000 * (n // 2 - count) <= k * n for count in counts], typed


def test_no_surprise_by_floats() -> None:
    assert 0.29 * 100 < 29 and 0.07 * 100 > 7 and 0.8 - 0.1 > 0.7  # what a comparison of floats would stumble over
    assert not failing(stored(robust=29, clean=29, n=100), min_robust=0.29)
    assert not failing(stored(robust=7, clean=7, n=100), min_robust=0.07)
    assert not failing(stored(robust=7, clean=7, n=10), baseline=stored(robust=8, clean=8, n=10), max_drop=0.1)
    assert failing(stored(robust=449_999_999, clean=10**9, n=10**9), min_robust=0.45) == ["min_robust_accuracy"]


@pytest.mark.parametrize("n", [1, 4, 25])
def test_confident_is_wilsons_interval_solved_for_the_threshold(n: int) -> None:
    # low >= t is the same as: p >= t and (p - t)^2 >= z^2 t (1 - t) / n
    for t in (0.0, 0.05, 0.21, 0.45, 0.8, 0.99):
        for count in range(n + 1):
            gap = count / n - t
            expected = t == 0 or (gap >= 0 and gap**2 >= Z95**2 * t * (1 - t) / n)
            assert (not failing(stored(robust=count, clean=count, n=n), min_robust=t, confident=True)) == expected, (
                count,
                t,
            )


def test_sentences_say_what_would_have_done() -> None:
    few = stored(robust=4, clean=4, n=4, verdict=None)
    (check,) = judge(few, demands(min_clean=0.8, confident=True)).checks
    assert check == GateCheck(
        "min_clean_accuracy", False,
        "clean accuracy 100.0% (4 of 4); --min-clean 0.8 with --confident needs more than all 4: measure more examples",
    )  # fmt: skip
    levels = {"zero_gradients": "suspect", "missing classes": "note", "old": "note", "more_steps": "suspect"}
    findings = [{"name": name, "sentence": "So.", "level": level} for name, level in levels.items()]
    (check,) = judge(stored(findings=findings, verdict="SUSPECT"), Demands()).checks
    assert check.sentence.startswith("verdict SUSPECT (zero_gradients, more_steps): ")


def test_sentences_of_other_metrics() -> None:
    found = stored(**OWN, verdict=None)

    def said(**options: Any) -> str:
        (check,) = judge(found, Demands(**options)).checks
        return check.sentence

    assert (
        said(most={"attack_success": 0.5}) == "attack success 47.1% (400 of 850); --max attack_success=0.5 allows 425"
    )
    assert said(least={"distance": 12}) == "distance 12.5; --min distance=12 needs 12"
    assert said(most={"attack_success": 0.001}, confident=True).endswith(
        "allows fewer than none: measure more examples"
    )
    then = OWN["metrics"] | {
        "distance": OWN["metrics"]["distance"] | {"value": 12.25},
        "attack_success": share(300, 800),
    }
    base = stored(metrics=then, verdict=None)
    assert said(max_drop={"distance": 0.2}, baseline=base) == (
        "distance 12.5, +0.25 from the baseline's 12.25; --max-drop distance=0.2 allows 12.45"
    )
    assert said(max_drop={"attack_success": 0.1}, baseline=base) == (
        "attack success 47.1% (400 of 850), +9.56 points from the baseline's 300 of 800; "
        "--max-drop attack_success=0.1 allows 403"
    )


@pytest.mark.parametrize(("drop", "expected"), [(0.25, []), (0.24, ["drop_distance"])])
def test_worse_is_what_the_metric_says(drop: float, expected: list[str]) -> None:
    lower = OWN["metrics"]["distance"]
    for now, then, up in ((12.5, 12.25, False), (12.25, 12.5, True)):
        found, base = (stored(metrics={"distance": lower | {"value": value, "higher_is_better": up}})
                       for value in (now, then))  # fmt: skip
        assert failing(found, baseline=base, max_drop=f"distance={drop}") == expected
        assert failing(base, baseline=found, max_drop="distance=0") == []  # the other way it is better


def test_metrics_that_are_not_there() -> None:
    with pytest.raises(ValueError, match=r"no certified_accuracy in the results of net.* clean_accuracy, robust_acc"):
        judge(stored(), Demands(least={"certified_accuracy": 0.1}))
    with pytest.raises(ValueError, match="there is no distance"):
        judge(stored(**OWN), Demands(max_drop={"distance": 0.1}, baseline=stored()))
    with pytest.raises(ValueError, match=r"--min reached=45: expected a share.*did you mean 0.45"):
        judge(stored(metrics={"reached": share(4, 10)}), Demands(least={"reached": 45}))


@pytest.mark.parametrize("text", ["robust_accuracy", "=0.5", "a=", "a=b", ""])
def test_bounds_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="expected NAME=VALUE, such as"):
        read_bounds("--min", [text])
    with pytest.raises(ValueError, match="expected VALUE or NAME=VALUE"):
        read_bounds("--max-drop", [text], ("clean_accuracy",))


def test_bounds_from_text() -> None:
    assert read_bounds("--min", ["a=0.5", " b = -1e3", "a=0.25"]) == {"a": 0.25, "b": -1000.0}
    assert read_bounds("--max-drop", ["0.01", "c=2"], ("a", "b")) == {"a": 0.01, "b": 0.01, "c": 2.0}


def test_notes() -> None:
    def notes(found: StoredEvaluation, **options: Any) -> list[str]:
        return list(judge(found, demands(**options)).notes)

    assert notes(stored(), **DROP) == []
    assert [n for n in notes(stored(verdict=None), min_clean=0) if "there is no verdict" in n]
    assert notes(stored(verdict=None), require_verdict="TRUSTED") == []  # that is a failure, not a note
    (note,) = notes(stored(), baseline=stored(verdict="INVALID"), max_drop=0)
    assert "baseline's own verdict is INVALID" in note
    other = stored(attacks=[attack("pgd", {"num_steps": 2}, 400, 0.45)])
    (note,) = notes(stored(), baseline=other, max_drop=0)
    assert "other attacks" in note


# What cannot be asked --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"min_robust": 1.01}, r"--min-robust 1.01: expected a share.*did you mean 0.0101"),
        ({"min_robust": 45.0}, "did you mean 0.45"),
        ({"min_clean": -0.1}, r"--min-clean -0.1: expected a share between 0 and 1, not per cent$"),
        ({"min_clean": math.nan}, "--min-clean nan"),
        ({"min_clean": math.inf}, "--min-clean inf"),
        ({"max_drop": 1.5, "baseline": BASE}, "--max-drop 1.5"),
        ({"max_drop": 0.01}, "go together"),
        ({"least": {"distance": math.nan}}, "--min distance=nan: expected a number"),
        ({"max_drop": "distance=-1", "baseline": BASE}, "--max-drop distance=-1"),
        ({"max_drop": 0}, "go together"),
        ({"baseline": BASE}, "go together"),
        ({"require_verdict": "INVALID"}, "--require-verdict INVALID"),
        ({"require_verdict": "trusted"}, "expected TRUSTED"),
        ({"require_verdict": "TRUSTED", "allow_suspect": True}, "contradict"),
        ({"confident": True}, "--confident is about"),
        ({"confident": True, **DROP}, "--confident is about"),
        ({"confident": True, "min_clean": 1.0}, "below 1 for every n"),
    ],
)
def test_demands_that_cannot_be(options: dict[str, Any], fragment: str) -> None:
    with pytest.raises(ValueError, match=fragment):
        demands(**options)


EUCLID = {"text": "l2:1", "words": ""}
DIGITS = {"kind": "images", "name": "digits", "split": "test"}


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"threat": {"text": "linf:4/255", "words": ""}}, "another threat: linf:4/255, and the result has linf:8/255"),
        ({"threat": {"text": "linf:8/255", "words": "", "settings": {"schema": "b"}}}, "another threat: .*schema"),
        ({"data": DIGITS | {"kind": "text"}}, "another kind of input: text"),
        ({"data": DIGITS | {"name": "mnist"}}, "another data: mnist"),
        ({"data": DIGITS | {"split": "train"}}, "another split: train"),
        ({"data": DIGITS | {"settings": {"size": 4}}}, "another way of reading: {'size': 4}"),
        ({"n": 2000}, "another number of examples: 2000, and the result has 1000"),
    ],
)
def test_a_baseline_that_answers_another_question(changes: dict[str, Any], fragment: str) -> None:
    with pytest.raises(ValueError, match=fragment):
        judge(stored(), demands(baseline=stored(**changes), max_drop=0.01))


def test_a_gate_that_is_always_open() -> None:
    with pytest.raises(ValueError, match="nothing to check"):
        judge(stored(verdict=None), Demands())
    with pytest.raises(ValueError, match="nothing to check"):
        judge(stored(verdict=None), Demands(allow_suspect=True))


# Files -----------------------------------------------------------------------------------------------------------


def save(folder: Path, right: list[int] | None = None, labels: list[int] | None = None, **changes: Any) -> Path:
    """A folder with results.json, and examples.csv when `right` says what its column robust holds (all are clean)."""
    folder.mkdir(parents=True)
    if right is not None:
        changes = {"robust": sum(right), "clean": len(right), "n": len(right)} | changes
        labels = labels or [0] * len(right)
        fell = [[r, "" if r else "pgd"] for r in right]
        rows = [f"{i},{labels[i]},{labels[i]},0.9,1,{r},{by},,,,{r}," for i, (r, by) in enumerate(fell)]
        (folder / "examples.csv").write_text("\n".join([",".join(Row._fields), *rows]) + "\n", encoding="utf-8")
    (folder / "results.json").write_text(json.dumps(record(**changes)), encoding="utf-8")
    return folder


def test_a_path_means_a_file_an_evaluation_or_a_run(tmp_path: Path) -> None:
    file = save(tmp_path / "run" / "evaluation") / "results.json"
    assert {locate(path) for path in (tmp_path / "run", file.parent, file)} == {file}
    for path in (tmp_path / "run", file.parent, file):
        assert read_evaluation(path) == stored()
        outcome = sparring("gate", str(path), "--min-robust", "0.451")
        assert outcome.code == 1 and outcome.out.splitlines()[0] == "pass: verdict TRUSTED"
        expected = "FAIL: robust accuracy 45.0% (450 of 1000); --min-robust 0.451 needs 451"
        assert outcome.out.splitlines()[1:] == [expected]
    (tmp_path / "run" / "results.json").write_text("{}")
    assert locate(tmp_path / "run") == file  # as in `sparring report`, the run's evaluation comes first


def test_paired(tmp_path: Path) -> None:
    then = save(tmp_path / "then", [1] * 10 + [0] * 5)
    now = save(tmp_path / "now", [0] * 10 + [0] * 5)

    def note(baseline: Path) -> str:
        asked = demands(baseline=read_baseline(baseline, now), max_drop=1)
        return " ".join(judge(read_evaluation(now), asked).notes)

    sentence = note(then / "results.json")
    assert sentence.startswith("example by example: 0 robust only now, 10 only in the baseline")
    assert f"p = {2 / 2**10:.2g} " in sentence
    assert note(save(tmp_path / "bare", robust=5, clean=15, n=15)) == ""
    (now / "old.json").write_text((then / "results.json").read_text())
    assert note(now / "old.json") == ""  # the table beside it is that of the result
    with pytest.raises(ValueError, match="15 examples have another label"):
        note(save(tmp_path / "other", [1] * 15, labels=[1] * 15))


def test_a_baseline_is_not_the_result_itself(tmp_path: Path) -> None:
    file = save(tmp_path / "run" / "evaluation") / "results.json"
    for judged in (tmp_path / "run", file.parent, file):
        with pytest.raises(ValueError, match="the result itself"):
            read_baseline(file, judged)
    assert read_baseline(file, save(tmp_path / "other")) == stored()


# The command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "code"),
    [("--min-robust 0.45 --min-clean 0.8", 0), ("--min-robust 0.46", 1), ("--baseline {w}/base --max-drop 0.01", 0),
     ("--baseline {w}/base/results.json --max-drop 0.005", 1), ("--min-robust 0.45 --confident", 1),
     ("--require-verdict TRUSTED", 0), ("", 0)],
)  # fmt: skip
def test_exit_codes(options: str, code: int, tmp_path: Path) -> None:
    save(tmp_path / "now")
    save(tmp_path / "base", robust=458)
    before = content(tmp_path)
    outcome = sparring("gate", str(tmp_path / "now"), *options.format(w=tmp_path).split())
    assert outcome.code == code and outcome.err == ""
    lines = outcome.out.splitlines()
    assert lines and all(line.startswith(("pass: ", "FAIL: ")) for line in lines)
    assert any(line.startswith("FAIL: ") for line in lines) == (code == 1)
    assert content(tmp_path) == before


def test_notes_and_the_paired_test_go_to_standard_error(tmp_path: Path) -> None:
    save(tmp_path / "now", [1, 1, 0, 0], verdict=None)
    save(tmp_path / "base", [0, 1, 1, 0])
    arguments = ("--baseline", str(tmp_path / "base"), "--max-drop", "0")
    outcome = sparring("gate", str(tmp_path / "now"), *arguments)
    assert outcome.code == 0 and "note" not in outcome.out
    notes = outcome.err.splitlines()
    assert [line[:26] for line in notes] == ["note: there is no verdict ", "note: example by example: "]
    assert "1 robust only now, 1 only in the baseline, McNemar's exact p = 1 " in notes[1]


def damaged(**changes: Any) -> str:
    return json.dumps(record(**changes))


def without(key: str) -> str:
    return json.dumps({name: value for name, value in record().items() if name != key})


def metric(value: Any) -> str:
    return damaged(metrics={"robust_accuracy": value}, attacks=[])


BAD: dict[str, tuple[str | bytes | None, str, tuple[str, ...]]] = {
    "missing": (None, "", ("results.json", "not there")),
    "empty": ("", "", ("not valid JSON",)),
    "half": ('{"schema": "spar', "", ("not valid JSON",)),
    "bytes": (b"\xff\xfe\x00", "", ("not valid JSON",)),
    "list": ("[1]", "", ("sparring.results/2", "list")),
    "no schema": ("{}", "", ("sparring.results/2", "nothing")),
    "another schema": (damaged(schema="sparring.results/9"), "", ("sparring.results/2", "sparring.results/9")),
    "of 0.1": (damaged(schema="sparring.results/1", command="sparring evaluate run"), "",
               ("Sparring 0.1", "measure again: sparring evaluate run")),
    "of 0.1 without a command": (damaged(schema="sparring.results/1"), "", ("0.1", "measure again: `sparring eval")),
    "no threat": (without("threat"), "", ("threat: Field required",)),
    "threat a text": (damaged(threat="linf:1"), "", ("threat: Input should be an object, got 'linf:1'",)),
    "no split": (damaged(data={"kind": "images", "name": "digits"}), "", ("data.split",)),
    "a word too many": (damaged(speed=3), "", ("speed: Extra inputs are not permitted",)),
    "no metrics": (without("metrics"), "", ("metrics: Field required",)),
    "accuracy a number": (metric(0.45), "", ("metrics.robust_accuracy", "0.45")),
    "accuracy without a count": (metric(share(4, 10) | {"count": None}), "", ("with a count",)),
    "count over n": (metric(share(4, 10) | {"value": 1.1, "count": 11}), "", ("robust_accuracy", "11 of 10")),
    "count half": (metric(share(4, 10) | {"count": 4.5}), "", ("robust_accuracy.count", "integer")),
    "count true": (metric(share(1, 1) | {"count": True}), "", ("robust_accuracy.count", "integer")),
    "n zero": (metric(share(4, 10) | {"n": 0}), "", ("robust_accuracy", "n >= 1")),
    "value of another": (metric(share(4, 10) | {"value": 0.5}), "", ("value = count / n",)),
    "value NaN": (metric(share(4, 10) | {"value": math.nan}), "", ("robust_accuracy.value", "finite")),
    "two n": (metric(share(4, 10)), "", ("same examples", "1000 and 10")),
    "more robust than clean": (metric(share(900, 1000)), "", ("clean >= robust",)),
    "verdict of its own": (damaged(verdict="FINE"), "", ("verdict", "TRUSTED", "'FINE'")),
    "verdict a list": (damaged(verdict=["TRUSTED"]), "", ("verdict",)),
    "verdict milder": (damaged(findings=[{"name": "a", "sentence": "b", "level": "suspect"}]), "", ("no milder",)),
    "findings a word": (damaged(findings="none"), "", ("findings", "'none'")),
    "attacks of words": (damaged(attacks=["pgd"]), "", ("attacks[0]", "'pgd'")),
    "attacks that broke others": (damaged(attacks=[attack("pgd", {}, 3, 0.45)]), "", ("850", "broke 3", "450")),
    "bound of nothing": (damaged(), "--min certified_accuracy=0.3", ("no certified_accuracy", "clean_accuracy")),
    "bound without name": (damaged(), "--max 0.3", ("--max 0.3", "NAME=VALUE")),
    "bound per cent": (damaged(), "--max attack_success=30", ("--max attack_success=30", "did you mean 0.3?")),
    "threshold per cent": (damaged(), "--min-robust 45", ("--min-robust 45", "did you mean 0.45?")),
    "threshold negative": (damaged(), "--min-clean=-0.1", ("--min-clean -0.1",)),
    "threshold nan": (damaged(), "--min-clean nan", ("--min-clean nan",)),
    "threshold a word": (damaged(), "--min-clean most", ("--min-clean", "valid")),
    "drop over one": (damaged(), "--baseline {w}/base --max-drop 2", ("--max-drop 2",)),
    "drop from nowhere": (damaged(), "--max-drop 0.01", ("--baseline", "go together")),
    "baseline alone": (damaged(), "--baseline {w}/base", ("--max-drop", "go together")),
    "baseline missing": (damaged(), "--baseline {w}/none --max-drop 0", ("none", "not there")),
    "baseline an empty folder": (damaged(), "--baseline {w}/empty --max-drop 0", ("empty", "results.json")),
    "baseline damaged": (damaged(), "--baseline {w}/broken.json --max-drop 0", ("broken.json", "not valid JSON")),
    "baseline itself": (damaged(), "--baseline {w}/now --max-drop 0", ("the result itself",)),
    "baseline of another threat": (damaged(threat=EUCLID), "--baseline {w}/base --max-drop 0", ("threat", "l2:1")),
    "baseline of another n": (damaged(n=4000), "--baseline {w}/base --max-drop 0", ("number of examples", "4000")),
    "verdict unknown": (damaged(), "--require-verdict GOOD", ("--require-verdict GOOD", "TRUSTED")),
    "nothing to check": (damaged(verdict=None), "", ("nothing to check",)),
    "unknown option": (damaged(), "--min-accuracy 0.5", ("--min-accuracy",)),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, tmp_path: Path) -> None:
    text, options, fragments = BAD[name]
    save(tmp_path / "base")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "now").mkdir()
    file = tmp_path / "now" / "results.json"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    outcome = sparring("gate", str(file), *options.format(w=tmp_path).split())
    check_error(outcome, fragments)
    assert outcome.out == ""


def test_other_examples_under_the_same_name_are_an_error(tmp_path: Path) -> None:
    save(tmp_path / "now", [1, 1, 0], labels=[0, 1, 2])
    save(tmp_path / "base", [1, 1, 0], labels=[0, 2, 1])
    outcome = sparring("gate", str(tmp_path / "now"), "--baseline", str(tmp_path / "base"), "--max-drop", "0")
    check_error(outcome, ("2 examples have another label", "other examples"))
    assert outcome.out == ""


def test_any_metric_from_the_command_line(tmp_path: Path) -> None:
    now, base = save(tmp_path / "now", **OWN), save(tmp_path / "base", **OWN)
    options = ("--min", "certified_accuracy=0.2", "--min", "clean_accuracy=0.8", "--max", "attack_success=0.4")
    drop = ("--baseline", str(base), "--max-drop", "0.01", "--max-drop", "distance=0.5")
    outcome = sparring("gate", str(now), *options, *drop)
    assert (
        outcome.code == 1 and [line[:4] for line in outcome.out.splitlines()] == ["pass"] * 3 + ["FAIL"] + ["pass"] * 3
    )
    assert "FAIL: attack success 47.1% (400 of 850); --max attack_success=0.4 allows 340" in outcome.out
    assert "--min-clean 0.8 needs 800" in outcome.out  # the same as the short option


# sparring evaluate -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a network of chance, and an evaluation of it."""
    w = tmp_path_factory.mktemp("shop")
    draw = np.random.default_rng(0)
    sides = {"train": np.arange(60) % 3, "test": np.arange(30) % 3}
    x = {f"x_{side}": (0.3 * draw.random((len(y), 5)) + 0.6 * np.eye(5)[y]).astype("f4") for side, y in sides.items()}
    np.savez(w / "data.npz", **x, **{f"y_{side}": y for side, y in sides.items()})
    (w / "nets.py").write_text(
        "import torch\n\n\ndef fixed():\n    net = torch.nn.Linear(5, 3)\n    with torch.no_grad():\n"
        "        net.weight.copy_(torch.eye(3, 5))\n        net.bias.zero_()\n    return net\n"
    )
    assert evaluate(w, w / "base").code == 0
    return w


FAST = ("--attacks", "fgsm", "--no-checks")


def evaluate(w: Path, out: Path, *options: str) -> Any:
    arguments = ("--model", f"{w / 'nets.py'}:fixed", "--data", str(w / "data.npz"), "--threat", "linf:0.1")
    return sparring("evaluate", *arguments, *FAST, "--out", str(out), *options)


def test_evaluate_exits_1_after_writing_everything(shop: Path, tmp_path: Path) -> None:
    clean = read_evaluation(shop / "base").results.metrics["clean_accuracy"]
    assert clean.count == clean.n == 30  # so the gates below are about what they say
    base = ("--baseline", str(shop / "base"), "--max-drop", "0")
    outcome = evaluate(shop, tmp_path / "good", "--min-clean", "1", "--min-robust", "0", *base)
    assert outcome.code == 0, outcome
    assert [line[:4] for line in outcome.out.splitlines()[-4:]] == ["pass"] * 4
    outcome = evaluate(shop, tmp_path / "wider", "--threat", "linf:0.45", "--min-robust", "0.9", "--min-clean", "0.5")
    assert outcome.code == 1 and f"report: {tmp_path / 'wider' / 'report.html'}" in outcome.err
    robust, clean_line = outcome.out.splitlines()[-2:]
    assert robust.startswith("FAIL: robust accuracy") and robust.endswith("of 30); --min-robust 0.9 needs 27")
    assert clean_line.startswith("pass: clean accuracy 100.0% (30 of 30)")
    for folder in ("good", "wider"):
        assert {"results.json", "examples.csv", "report.html"} <= content(tmp_path / folder).keys()
    assert sparring("gate", str(tmp_path / "wider"), "--min-robust", "0.9").code == 1  # the same, later
    for option in ("--min-robust", "--min-clean"):  # 0 is a threshold too
        assert f"{option} 0 needs 0" in evaluate(shop, tmp_path / "zero", option, "0").out


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ("--min-robust 45", ("did you mean 0.45?",)),
        ("--max-drop 0.1", ("go together",)),
        ("--baseline {shop}/base", ("go together",)),
        ("--baseline {shop}/none --max-drop 0.1", ("none", "not there")),
    ],
)
def test_evaluate_refuses_at_once(options: str, fragments: tuple[str, ...], shop: Path, tmp_path: Path) -> None:
    outcome = evaluate(shop, tmp_path / "out", *options.format(shop=shop).split())
    check_error(outcome, fragments)
    assert not (tmp_path / "out").exists()


def test_evaluate_does_not_write_over_its_baseline(shop: Path) -> None:
    before = content(shop)
    for baseline in (shop / "base", shop / "base" / "results.json"):
        outcome = evaluate(shop, shop / "base", "--baseline", str(baseline), "--max-drop", "0.1")
        check_error(outcome, ("the result itself",))
    assert content(shop) == before


# The page --------------------------------------------------------------------------------------------------------


def test_the_page_shows_what_the_gate_says() -> None:
    shown = re.search(r"```text\n(.*?)```", PAGE, re.DOTALL)
    asked = demands(min_robust=0.45, min_clean=0.8, baseline=BASE, max_drop=0.01)
    checks = judge(stored(robust=439, verdict=None), asked).checks
    lines = [f"{'pass' if check.passed else 'FAIL'}: {check.sentence}" for check in checks]
    assert shown and shown[1].splitlines() == lines


def test_the_page_knows_the_numbers_of_examples() -> None:
    rows = re.findall(r"^\| (\d+) points?\b[^|]*\|([^|]+)\|([^|]+)\|([^|]+)\|$", PAGE, re.MULTILINE)
    assert [int(row[0]) for row in rows] == [20, 10, 6, 4, 2, 1]
    for points, *numbers in rows:
        expected = [examples_needed(int(points) / 100, s) for s in (0.5, 0.8, 0.95)]
        assert [int(number.replace(",", "")) for number in numbers] == expected
    for n, needed in ((1000, 481), (200, 104)):
        assert wilson(needed, n).low >= 0.45 > wilson(needed - 1, n).low
    assert "with 1,000 examples\n0.45 needs 481 right, with 200 it needs 104" in PAGE


def test_the_pages_workflow_is_one() -> None:
    yaml = pytest.importorskip("yaml")
    text = re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert text
    (job,) = yaml.safe_load(text[1])["jobs"].values()
    commands = [shlex.split(step["run"]) for step in job["steps"] if step.get("run", "").startswith("sparring ")]
    assert [command[1] for command in commands] == ["evaluate", "gate"]
    group: Any = typer.main.get_command(app)
    for _, *arguments in commands:
        name, command, rest = group.resolve_command(group.make_context("sparring", list(arguments)), arguments)
        values = command.make_context(name, rest).params
        if name == "gate":
            assert (values["min_robust"], values["baseline"]) == (0.45, Path("baseline"))
            asked = ("min_robust", "min_clean", "require_verdict", "allow_suspect", "confident")
            demands(**{key: values[key] for key in asked})

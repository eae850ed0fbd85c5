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
from test_cli import NETS, arrays, check_error, content, sparring

from sparring.app.cli import app
from sparring.results.gate import Check, Demands, judge, paired, read_baseline
from sparring.results.read import locate, read_results
from sparring.results.statistics import examples_needed, wilson

Z95 = 1.959963984540054
PAGE = (Path(__file__).parents[2] / "docs" / "gate.md").read_text(encoding="utf-8")


def share(count: int, n: int) -> dict[str, Any]:
    return {"value": count / n, "low": 0.0, "high": 1.0, "n": n, "count": count}  # the gate makes its own interval


def record(robust: int = 450, clean: int = 850, n: int = 1000, **changes: Any) -> dict[str, Any]:
    """What results.json holds, as far as the gate reads it."""
    found = {
        "schema": "sparring.results/1", "name": "net", "data": {"name": "digits", "split": "test"},
        "threat": "linf:8/255", "clean_accuracy": share(clean, n), "robust_accuracy": share(robust, n),
        "attacks": [{"name": "pgd", "settings": {"num_steps": 40}}], "findings": [], "verdict": "TRUSTED",
    }  # fmt: skip
    return {key: value for key, value in (found | changes).items() if value != "absent"}


def failing(found: dict[str, Any], **options: Any) -> list[str]:
    return [check.name for check in judge(found, Demands(**options)).checks if not check.passed]


# What fails ------------------------------------------------------------------------------------------------------

BASE = record(450, 850)
DROP = {"baseline": BASE, "max_drop": 0.01}
SUSPECT, INVALID, OLD = ({"verdict": word} for word in ("SUSPECT", "INVALID", "absent"))

TABLE: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    # thresholds
    ({}, {"min_robust": 0.45}, []),
    ({"robust": 449}, {"min_robust": 0.45}, ["min_robust"]),
    ({"robust": 449}, {"min_clean": 0.8}, []),
    ({"clean": 799}, {"min_clean": 0.8, "min_robust": 0.45}, ["min_clean"]),
    ({"robust": 0, "clean": 0}, {"min_clean": 0.8, "min_robust": 0.45}, ["min_robust", "min_clean"]),
    ({"robust": 0, "clean": 0}, {"min_clean": 0, "min_robust": 0.0}, []),
    ({"robust": 999, "clean": 1000}, {"min_clean": 1, "min_robust": 1.0}, ["min_robust"]),
    # the interval
    ({"robust": 480}, {"min_robust": 0.45, "confident": True}, ["min_robust"]),
    ({"robust": 481}, {"min_robust": 0.45, "confident": True}, []),
    ({"robust": 0, "clean": 4, "n": 4}, {"min_robust": 0, "min_clean": 0.52, "confident": True}, ["min_clean"]),
    # a baseline
    ({}, DROP, []),
    ({"robust": 900, "clean": 1000}, DROP, []),
    ({"robust": 440, "clean": 840}, DROP, []),
    ({"robust": 439, "clean": 840}, DROP, ["drop_robust"]),
    ({"robust": 440, "clean": 839}, DROP, ["drop_clean"]),
    ({"robust": 0, "clean": 0}, DROP, ["drop_robust", "drop_clean"]),
    ({"robust": 0, "clean": 0}, DROP | {"max_drop": 1}, []),
    ({"robust": 449}, DROP | {"max_drop": 0}, ["drop_robust"]),
    ({"robust": 439}, DROP | {"min_robust": 0.439, "confident": True}, ["min_robust", "drop_robust"]),
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
    ({"robust": 1} | INVALID, {"min_robust": 0.45} | DROP, ["verdict", "min_robust", "drop_robust"]),
]


@pytest.mark.parametrize(("changes", "options", "expected"), TABLE)
def test_what_fails(changes: dict[str, Any], options: dict[str, Any], expected: list[str]) -> None:
    found = record(**changes)
    before = json.dumps(found)
    assert failing(found, **options) == expected
    assert json.dumps(found) == before
    decision = judge(found, Demands(**options))
    assert decision.passed == (not expected)
    assert all("\n" not in check.sentence for check in decision.checks)


@pytest.mark.parametrize("n", [1, 3, 7, 100, 250, 1000])
def test_thresholds_and_drops_are_those_of_whole_numbers(n: int) -> None:
    """Thousandths as typed: floats would fail 0.29 of 100, and a fall from 0.8 to 0.7 with max_drop 0.1."""
    base, counts = record(n // 2, n // 2, n), range(n + 1)
    records = [record(count, n, n) for count in counts]
    for k in [*range(0, 1001, 77), 70, 100, 290, 450, 500, 570, 1000]:
        typed = k / 1000
        least, drop = Demands(min_robust=typed), Demands(baseline=base, max_drop=typed)
        passes = [judge(found, least).passed for found in records]
        assert passes == [1000 * count >= k * n for count in counts], typed
        passes = [judge(found, drop).passed for found in records]
        assert passes == [1000 * (n // 2 - count) <= k * n for count in counts], typed


def test_no_surprise_by_floats() -> None:
    assert 0.29 * 100 < 29 and 0.07 * 100 > 7 and 0.8 - 0.1 > 0.7  # what a comparison of floats would stumble over
    assert not failing(record(29, 29, 100), min_robust=0.29)
    assert not failing(record(7, 7, 100), min_robust=0.07)
    assert not failing(record(7, 7, 10), baseline=record(8, 8, 10), max_drop=0.1)
    assert failing(record(449_999_999, 10**9, 10**9), min_robust=0.45) == ["min_robust"]


@pytest.mark.parametrize("n", [1, 4, 25])
def test_confident_is_wilsons_interval_solved_for_the_threshold(n: int) -> None:
    # low >= t is the same as: p >= t and (p - t)^2 >= z^2 t (1 - t) / n
    for t in (0.0, 0.05, 0.21, 0.45, 0.8, 0.99):
        for count in range(n + 1):
            gap = count / n - t
            expected = t == 0 or (gap >= 0 and gap**2 >= Z95**2 * t * (1 - t) / n)
            assert (not failing(record(count, count, n), min_robust=t, confident=True)) == expected, (count, t)


def test_sentences_say_what_would_have_done() -> None:
    few = record(4, 4, 4)
    (check,) = judge(few | {"verdict": None}, Demands(min_clean=0.8, confident=True)).checks
    assert check == Check(
        "min_clean", False,
        "clean accuracy 100.0% (4 of 4); --min-clean 0.8 with --confident needs more than all 4: measure more examples",
    )  # fmt: skip
    findings = [
        {"name": "zero_gradients", "level": "suspect"}, {"name": "missing classes", "level": "note"}, {"name": "old"},
        {"name": "more_steps", "level": "suspect"}, {"level": "suspect"},
    ]  # fmt: skip
    (check,) = judge(record(findings=findings, verdict="SUSPECT"), Demands()).checks
    assert check.sentence.startswith("verdict SUSPECT (zero_gradients, more_steps): ")


def test_notes() -> None:
    def notes(found: dict[str, Any], **options: Any) -> list[str]:
        return list(judge(found, Demands(**options)).notes)

    assert notes(record(), **DROP) == []
    assert [n for n in notes(record(verdict="absent"), min_clean=0) if "there is no verdict" in n]
    assert notes(record(verdict="absent"), require_verdict="TRUSTED") == []  # that is a failure, not a note
    (note,) = notes(record(), baseline=BASE | {"verdict": "INVALID"}, max_drop=0)
    assert "baseline's own verdict is INVALID" in note
    (note,) = notes(record(), baseline=BASE | {"attacks": [{"name": "pgd", "settings": {"num_steps": 2}}]}, max_drop=0)
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
        Demands(**options)


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"threat": "linf:4/255"}, "another threat: linf:4/255, and the result has linf:8/255"),
        ({"data": {"name": "mnist", "split": "test"}}, "another data: mnist"),
        ({"data": {"name": "digits", "split": "train"}}, "another split: train"),
        ({"n": 2000}, "another number of examples: 2000, and the result has 1000"),
    ],
)
def test_a_baseline_that_answers_another_question(changes: dict[str, Any], fragment: str) -> None:
    with pytest.raises(ValueError, match=fragment):
        judge(record(), Demands(baseline=record(**changes), max_drop=0.01))


def test_a_gate_that_is_always_open() -> None:
    with pytest.raises(ValueError, match="nothing to check"):
        judge(record(verdict="absent"), Demands())
    with pytest.raises(ValueError, match="nothing to check"):
        judge(record(verdict="absent"), Demands(allow_suspect=True))


# Files -----------------------------------------------------------------------------------------------------------


def save(folder: Path, right: list[int] | None = None, labels: list[int] | None = None, **changes: Any) -> Path:
    """A folder with results.json, and examples.csv when `right` says what its column robust holds."""
    folder.mkdir(parents=True)
    if right is not None:
        changes = {"robust": sum(right), "clean": len(right), "n": len(right)} | changes
        labels = labels or [0] * len(right)
        rows = "".join(f"{i},{labels[i]},{r}\n" for i, r in enumerate(right))
        (folder / "examples.csv").write_text("index,label,robust\n" + rows, encoding="utf-8")
    (folder / "results.json").write_text(json.dumps(record(**changes)), encoding="utf-8")
    return folder


def test_a_path_means_a_file_an_evaluation_or_a_run(tmp_path: Path) -> None:
    file = save(tmp_path / "run" / "evaluation") / "results.json"
    assert {locate(path) for path in (tmp_path / "run", file.parent, file)} == {file}
    for path in (tmp_path / "run", file.parent, file):
        assert read_results(path) == record()
        outcome = sparring("gate", str(path), "--min-robust", "0.451")
        assert outcome.code == 1 and outcome.out.splitlines()[0] == "pass: verdict TRUSTED"
        expected = "FAIL: robust accuracy 45.0% (450 of 1000); --min-robust 0.451 needs 451"
        assert outcome.out.splitlines()[1:] == [expected]
    (tmp_path / "run" / "results.json").write_text("{}")
    assert locate(tmp_path / "run") == file  # as in `sparring report`, the run's evaluation comes first


def test_paired(tmp_path: Path) -> None:
    then = save(tmp_path / "then", [1] * 10 + [0] * 5)
    now = save(tmp_path / "now", [0] * 10 + [0] * 5)
    sentence = paired(now, then / "results.json")
    assert sentence and sentence.startswith("example by example: 0 robust only now, 10 only in the baseline")
    assert f"p = {2 / 2**10:.2g} " in sentence
    assert paired(now, save(tmp_path / "bare")) is None
    (now / "old.json").write_text((then / "results.json").read_text())
    assert paired(now, now / "old.json") is None  # the table beside it is that of the result
    stale = save(tmp_path / "stale", [1] * 15, robust_accuracy=share(14, 15))
    assert "stale/examples.csv is not the table" in str(paired(now, stale)).replace("\\", "/")
    with pytest.raises(ValueError, match="another label"):
        paired(now, save(tmp_path / "other", [1] * 15, labels=[1] * 15))


def test_a_baseline_is_not_the_result_itself(tmp_path: Path) -> None:
    file = save(tmp_path / "run" / "evaluation") / "results.json"
    for judged in (tmp_path / "run", file.parent, file):
        with pytest.raises(ValueError, match="the result itself"):
            read_baseline(file, judged)
    assert read_baseline(file, save(tmp_path / "other")) == record()


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
    save(tmp_path / "now", [1, 1, 0, 0], verdict="absent")
    save(tmp_path / "base", [0, 1, 1, 0])
    arguments = ("--baseline", str(tmp_path / "base"), "--max-drop", "0")
    outcome = sparring("gate", str(tmp_path / "now"), *arguments)
    assert outcome.code == 0 and "note" not in outcome.out
    notes = outcome.err.splitlines()
    assert [line[:26] for line in notes] == ["note: there is no verdict ", "note: example by example: "]
    assert "1 robust only now, 1 only in the baseline, McNemar's exact p = 1 " in notes[1]


def damaged(**changes: Any) -> str:
    return json.dumps(record(**changes))


BAD: dict[str, tuple[str | bytes | None, str, tuple[str, ...]]] = {
    "missing": (None, "", ("results.json", "not there")),
    "empty": ("", "", ("not valid JSON",)),
    "half": ('{"schema": "spar', "", ("not valid JSON",)),
    "bytes": (b"\xff\xfe\x00", "", ("not valid JSON",)),
    "list": ("[1]", "", ("sparring.results/1", "list")),
    "no schema": ("{}", "", ("sparring.results/1", "nothing")),
    "another schema": (damaged(schema="sparring.results/9"), "", ("sparring.results/1", "sparring.results/9")),
    "no threat": (damaged(threat="absent"), "", ("text at threat", "None")),
    "data a name": (damaged(data="digits"), "", ("text at data.name",)),
    "no split": (damaged(data={"name": "digits"}), "", ("text at data.split",)),
    "no accuracy": (damaged(clean_accuracy="absent"), "", ("clean_accuracy", "None")),
    "accuracy a number": (damaged(robust_accuracy=0.45), "", ("robust_accuracy", "0.45")),
    "count over n": (damaged(robust_accuracy={"value": 1.1, "n": 10, "count": 11}), "", ("robust_accuracy",)),
    "count half": (damaged(robust_accuracy={"value": 0.45, "n": 10, "count": 4.5}), "", ("robust_accuracy",)),
    "count true": (damaged(robust_accuracy={"value": 1.0, "n": 1, "count": True}), "", ("robust_accuracy",)),
    "n zero": (damaged(robust_accuracy={"value": 0.0, "n": 0, "count": 0}), "", ("robust_accuracy",)),
    "value of another": (damaged(robust_accuracy={"value": 0.5, "n": 10, "count": 4}), "", ("count / n",)),
    "value NaN": (damaged(robust_accuracy={"value": math.nan, "n": 10, "count": 4}), "", ("count / n",)),
    "two n": (damaged(robust_accuracy=share(4, 10)), "", ("same examples", "1000 and 10")),
    "verdict of its own": (damaged(verdict="FINE"), "", ("TRUSTED, SUSPECT, INVALID", "'FINE'")),
    "verdict a list": (damaged(verdict=["TRUSTED"]), "", ("at verdict",)),
    "findings a word": (damaged(findings="none"), "", ("a list of objects at findings",)),
    "attacks of words": (damaged(attacks=["pgd"]), "", ("a list of objects at attacks",)),
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
    "baseline of another threat": (damaged(threat="l2:1"), "--baseline {w}/base --max-drop 0", ("threat", "l2:1")),
    "baseline of another n": (damaged(n=4000), "--baseline {w}/base --max-drop 0", ("number of examples", "4000")),
    "verdict unknown": (damaged(), "--require-verdict GOOD", ("--require-verdict GOOD", "TRUSTED")),
    "nothing to check": (damaged(verdict="absent"), "", ("nothing to check",)),
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
    check_error(outcome, ("2 examples have another label",))
    assert outcome.out == ""


# sparring evaluate -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a network of chance, and an evaluation of it."""
    w = tmp_path_factory.mktemp("shop")
    np.savez(w / "data.npz", **arrays())
    (w / "nets.py").write_text(
        NETS + "def fixed():\n"
        "    net = good()\n"
        "    with torch.no_grad():\n"
        "        net.linear.weight.copy_(torch.eye(3, 5))\n"
        "        net.linear.bias.zero_()\n"
        "    return net\n"
    )
    assert evaluate(w, w / "base").code == 0
    return w


FAST = ("--attacks", "fgsm", "--no-checks")


def evaluate(w: Path, out: Path, *options: str) -> Any:
    arguments = ("--model", f"{w / 'nets.py'}:fixed", "--data", str(w / "data.npz"), "--threat", "linf:0.1")
    return sparring("evaluate", *arguments, *FAST, "--out", str(out), *options)


def test_evaluate_exits_1_after_writing_everything(shop: Path, tmp_path: Path) -> None:
    clean = read_results(shop / "base")["clean_accuracy"]
    assert clean["count"] == clean["n"] == 30  # so the gates below are about what they say
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
    demands = Demands(min_robust=0.45, min_clean=0.8, baseline=BASE, max_drop=0.01)
    checks = judge(record(439, 850, verdict="absent"), demands).checks
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
            Demands(**{key: values[key] for key in asked})

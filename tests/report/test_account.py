"""What the page says of verdict, bracket, findings, cascade and margins, and which files it refuses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pages import N, attack, changed, metrics, right, sha_of, share, text_of, write_run
from scipy.stats import binom

from sparring.report import write_report
from sparring.report.page import bracket, cascade, margins
from sparring.results.read import read_evaluation

CLEAN, ROBUST, PROVEN = 380, 240, 60
REASON = "interval bounds have no rule for <LayerNorm>"


ATTACKS = [
    attack("apgd:num_steps=5", 320, 100, 0.7, (6 * N, 5 * N)),
    attack("apgd-t:num_steps=20", 200, 40, 0.6, (40 * N, 30 * N), skipped=20, margin_at_most=0.7),
    attack("square:num_queries=500", 55, 0, 0.6, (284 * N, 0), skipped=125, margin_at_most=0.15),
]
FINDINGS = [
    {"name": "b_note", "level": "note", "sentence": "A note.", "numbers": {"share": 0.25}, "next_step": ""},
    {"name": "old", "sentence": "No level.", "numbers": {}},
    {"name": "c_suspect", "level": "suspect", "sentence": "Odd <i>it</i>.", "numbers": {}, "next_step": "Do & look."},
    {"name": "a_invalid", "level": "invalid", "sentence": "Wrong.", "numbers": {}, "next_step": "Repeat."},
]


def new_run(folder: Path, name: str = "New", **changes: Any) -> Path:
    """A folder with everything that evaluations know: 380 of 400 right, 240 stand, 60 of them certified."""
    clean, robust = right(CLEAN), right(ROBUST)
    told: dict[str, Any] = {
        "attacks": ATTACKS, "verdict": "TRUSTED",
        "certification": {"name": "interval_margin", "settings": "interval_margin"}, "sanity": {"seconds": 3.5},
        "curve": [], "training": None,  # whose plots take time
    }  # fmt: skip
    rows = {"left": np.where(robust, np.linspace(0.001, 0.999, N), 0.0), "certified": right(PROVEN)}
    return write_run(folder, name, clean, robust, **(rows | told | changes))


def page(tmp_path: Path, *folders: Path) -> str:
    return text_of(write_report(folders, tmp_path / "page.html"))


def test_the_bracket_adds_up_and_is_the_record(tmp_path: Path) -> None:
    run = new_run(tmp_path / "a")
    told = bracket(read_evaluation(run).results)
    assert [(p.kind, p.num) for p in told] == [("certified", 60), ("stands", 180), ("broken", 140), ("wrong", 20)]
    assert sum(p.num for p in told) == N and sum(p.share for p in told) == pytest.approx(1, abs=1e-12)
    assert [p.start for p in told] == pytest.approx([0, 0.15, 0.6, 0.95])  # each begins where the last one ends
    text = page(tmp_path, run)
    assert "between 15.0 % (certified by interval bounds, for every permitted change) and 60.0 % (attacked" in text
    for part in ("15.0 % certified:", "45.0 % stands, but is not certified (180)", "35.0 % broken by an attack (140)",
                 "5.0 % wrong without any attack (20)"):  # fmt: skip
        assert part in text


def test_no_certificate_and_a_tight_one(tmp_path: Path) -> None:
    why = {"certified": None, "certification": {"name": None, "reason": REASON}}
    none, tight = new_run(tmp_path / "a", **why), new_run(tmp_path / "b", certified=right(ROBUST))
    told = bracket(read_evaluation(none).results)
    assert [p.num for p in told] == [240, 140, 20]
    text = page(tmp_path, none, tight)
    assert "No lower limit is certified: interval bounds have no rule for &lt;LayerNorm&gt;." in text
    assert "is exactly 60.0 %" in text and text.count("A stronger attack could still lower it.") == 1


WORDS = {"TRUSTED": "found none", "SUSPECT": "Read the findings", "INVALID": "says nothing", None: "were not run"}


@pytest.mark.parametrize(("verdict", "says"), WORDS.items())
def test_the_verdict_stands_beside_the_number(tmp_path: Path, verdict: str | None, says: str) -> None:
    text = page(tmp_path, new_run(tmp_path / "a", verdict=verdict))
    word = f"measurement {(verdict or 'not checked').lower()}"
    assert re.search(rf"60\.0 % under attack\. \S {word} ", text) and says in text
    assert not any(f" {other} " in text for other in WORDS if other not in (None, verdict))


def test_results_without_checks_certificate_and_table_still_make_a_page(tmp_path: Path) -> None:
    old = write_run(tmp_path / "a", "Old", right(CLEAN), right(ROBUST))
    (old / "examples.csv").unlink()
    text = page(tmp_path, old)
    assert "60.0 % under attack. ? measurement not checked" in text and "these results were made without one." in text
    assert "How close the standing ones are" not in text and "skipped as too far" not in text
    assert margins(read_evaluation(old)) is None
    unchecked = page(tmp_path, changed(old, findings=FINDINGS))
    assert "a finding below already speaks against it" in unchecked and "speaks against it" not in text


def test_findings_come_worst_first_with_what_to_do(tmp_path: Path) -> None:
    plain = new_run(tmp_path / "a", "First", findings=FINDINGS[:2])
    bad = new_run(tmp_path / "b", "Second", findings=FINDINGS, verdict="INVALID")
    text = page(tmp_path, plain, bad)
    order = ["invalid Second: a invalid.", "suspect Second: c suspect.", "note First: b note.", "note First: old.",
             "note Second: b note.", "note Second: old."]  # fmt: skip
    places = [text.index(said) for said in order]
    assert places == sorted(places) and places[-1] < text.rindex("What was tried")
    assert "What to do next: Do &amp; look." in text and "share 0.25" in text
    assert "Odd &lt;i&gt;it&lt;/i&gt;." in text and text.count("What to do next:") == 2
    assert "The verdict on Second is INVALID: its share" in text and "The verdict on First" not in text


def test_the_cascade_is_the_record(tmp_path: Path) -> None:
    run = new_run(tmp_path / "a")
    told = cascade(read_evaluation(run).results)
    assert [line.passes for line in told.lines] == [16, 100, 284] and told.passes == 400  # forwards + 2 x backwards
    assert [line.share for line in told.lines] == [0.04, 0.25, 0.71] and told.seconds == 4.5
    assert [line.attack.margin_at_most for line in told.lines] == [None, 0.7, 0.15]
    assert sum(line.attack.broke for line in told.lines) == CLEAN - ROBUST and told.whole == 6250
    text = page(tmp_path, run)
    assert "1. apgd num_steps=5 320 0 100 70.0 % 16 4.0 % 1.5 s" in text
    assert "2. apgd-t num_steps=20 200 20 over 70 % left 40 60.0 % 100 25.0 % 1.5 s" in text
    assert "3. square num_queries=500 55 125 over 15 % left 0 60.0 % 284 71.0 % 1.5 s" in text
    assert "all attacks 140 60.0 % 400 4.5 s" in text and "400 passes per image in total" in text
    assert "The sanity checks took 3.5 s more." in text and "“Skipped as too far”" in text
    plot = re.search(
        r'label="Attacks on New.*?</svg>', (tmp_path / "page.html").read_text(encoding="utf-8"), flags=re.S
    )
    assert plot and all(f">{drawn}</text>" in plot[0] for drawn in ("none", "100", "40", "16", "284"))


def test_margins_of_what_stands_without_a_certificate(tmp_path: Path) -> None:
    run = new_run(tmp_path / "a")
    told = margins(read_evaluation(run))
    left = np.linspace(0.001, 0.999, N)[PROVEN:ROBUST]
    assert told is not None and told.left == pytest.approx(left) and told.certified == PROVEN
    assert told.below(0.3) == int((left < 0.3).sum()) > 0
    text = page(tmp_path, run)
    assert "180 examples stand without a certificate; 0 of them have less than 10 %" in text
    assert "60 certified examples are left out" in text
    assert "No example stands, so there is nothing to measure." in page(
        tmp_path, write_run(run, "A", right(N), right(0))
    )


def test_two_measurements_of_one_model(tmp_path: Path) -> None:
    model = {"name": "cnn", "parameters": 5, "weights": "w", "sha256": sha_of("w")}
    strong = [*ATTACKS, attack("square", 240, 8, 0.58, (3600 * N, 0))]
    fast, full = new_run(tmp_path / "a", "fast", model=model), tmp_path / "b"
    write_run(full, "full", right(CLEAN), right(232), model=model, attacks=strong, verdict="TRUSTED")
    text = page(tmp_path, fast, full)
    assert "full leaves 2.0 points fewer standing than fast, for 10 times the passes." in text
    p = 2 * binom.cdf(0, 8, 0.5)
    assert f"0 are right only in full and 8 only in fast (McNemar's exact test, p = {p:.2g})" in text
    assert "if both measurements were equally strong" in text and "full is the stronger measurement" in text
    assert "different attacks" not in text and "Hardening" not in text and "hardening" not in text
    assert "The two agree on each of the same 400 examples." in text  # the clean answers
    other = page(tmp_path, fast, changed(full, model=model | {"sha256": sha_of("v")}))
    assert "Measured with different attacks" in other and "What hardening changed" in other


def proven(metric: Any) -> dict[str, Any]:
    return {"metrics": metrics(right(CLEAN), right(ROBUST), certified_accuracy=metric)}


ODD: list[tuple[dict[str, Any], str]] = [
    ({"verdict": "trusted"}, "verdict: Input should be 'TRUSTED', 'SUSPECT' or 'INVALID', got 'trusted'"),
    ({"findings": FINDINGS}, "no milder than its findings, got TRUSTED; they say INVALID"),
    ({"findings": [FINDINGS[1] | {"level": "bad"}]}, "findings[0].level: Input should be 'note', 'suspect' or"),
    (proven(0.5), "metrics.certified_accuracy: Input should be an object, got 0.5"),
    (proven({"value": None}), "metrics.certified_accuracy.value: Input should be a valid number, got None"),
    (proven(share(right(250))), "clean >= robust >= certified accuracy, got counts [380, 240, 250]"),
    (proven(share(right(20, 100))), "of the same examples, got n 400 and 400 and 100"),
    ({"attacks": [*ATTACKS[:2], ATTACKS[2] | {"broke": 3}]}, "the attacks broke 143, but 240 are robust"),
    ({"attacks": [ATTACKS[0] | {"broke": "many"}]}, "attacks[0].broke: Input should be a valid integer, got 'many'"),
    ({"attacks": [ATTACKS[0] | {"cost": {"forwards": -1}}]}, "attacks[0].cost.forwards: Input should be greater than"),
    ({"attacks": [ATTACKS[0] | {"cost": 5}]}, "attacks[0].cost: Input should be an object, got 5"),
]


@pytest.mark.parametrize(("changes", "says"), ODD, ids=[says[-40:] for _, says in ODD])
def test_odd_results_are_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    run = changed(new_run(tmp_path / "a"), **changes)
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        write_report([run], tmp_path / "page.html")
    assert str(run / "results.json") in str(caught.value) and not (tmp_path / "page.html").exists()


def test_a_margin_that_is_no_share_is_refused(tmp_path: Path) -> None:
    run = new_run(tmp_path / "a")
    write_run(run, "A", right(N), right(0), left=np.full(N, 1.5))
    with pytest.raises(ValueError, match=r"margin_left 1.5, which is no share"):
        write_report([run], tmp_path / "page.html")

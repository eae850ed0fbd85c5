"""Many runs as one table. Oracles: statistics by hand, the binomial test of SciPy, rows grouped by construction."""

from __future__ import annotations

import csv
import io
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pages import write_run
from scipy.stats import binomtest

from command import call
from sparring.results.read import read_evaluation
from sparring.results.table import tables_of

N = 60


def flags(seed: int, share: float) -> np.ndarray:
    return np.random.default_rng(seed).random(N) < share


def evaluation(
    folder: Path, robust: np.ndarray, *, seed: int | None = 0, recipe: str = "pgd-at", **changes: Any
) -> Path:
    """seed None: of a model whose training nobody told."""
    config = {"recipe": recipe, "seed": seed, "epochs": changes.pop("epochs", 9), "device": f"cuda:{seed}"}
    told = {"training": None if seed is None else {"config": config, "seconds": 10.0 + seed, "checkpoint": "best"}}
    return write_run(folder, folder.name, np.ones(N, dtype=bool), robust, **(told | changes))


def of(*folders: Path) -> Any:
    return tables_of([read_evaluation(folder) for folder in folders])


def test_runs_that_differ_only_in_the_seed_are_one_row(tmp_path: Path) -> None:
    stands = [flags(seed, 0.6) for seed in range(3)]
    runs = [evaluation(tmp_path / f"a{seed}", stands[seed], seed=seed) for seed in range(3)]
    (table,) = of(*runs)
    (row,) = table.rows
    shares = [float(s.mean()) for s in stands]
    assert (row.label, row.runs, row.seeds, row.n) == ("pgd-at", ("a0", "a1", "a2"), (0, 1, 2), N)
    assert row.robust == pytest.approx((sum(shares) / 3, statistics.stdev(shares)))
    assert row.clean == (1.0, 0.0) and row.training_seconds == 11.0 and row.against is None
    intervals = [read_evaluation(run).results.metrics["robust_accuracy"] for run in runs]
    assert (row.low, row.high) == (min(i.low for i in intervals), max(i.high for i in intervals))
    # fgsm and pgd of `write_run`: 5000 + 200 000 forwards, 4600 + 184 000 backwards, whatever the examples
    assert row.passes == pytest.approx((205_000 + 2 * 188_600) / N)


@pytest.mark.parametrize(
    "other",
    [{"recipe": "trades"}, {"epochs": 10}, {"seed": None}, {"seed": 0},
     {"certification": {"name": "interval"}}, {"model": {"name": "wider"}}],
    ids=["recipe", "a setting", "training unknown", "the same seed again", "certificate", "architecture"],
)  # fmt: skip
def test_what_differs_in_more_than_the_seed_has_a_row_of_its_own(tmp_path: Path, other: dict[str, Any]) -> None:
    first = evaluation(tmp_path / "a", flags(0, 0.5), seed=0)
    second = evaluation(tmp_path / "b", flags(1, 0.5), **({"seed": 1} | other))
    (table,) = of(first, second)
    assert len(table.rows) == 2 and len({row.label for row in table.rows}) == 2
    if other == {"epochs": 10}:
        assert [row.label for row in table.rows] == ["pgd-at epochs=9", "pgd-at epochs=10"]


def test_mcnemar_is_that_of_scipy_and_of_several_seeds_the_largest(tmp_path: Path) -> None:
    base, other = [flags(seed, 0.3) for seed in (0, 1)], [flags(seed, 0.8) for seed in (10, 11)]
    runs = [evaluation(tmp_path / f"base{s}", base[s], seed=s, recipe="standard") for s in (0, 1)]
    runs += [evaluation(tmp_path / f"other{s}", other[s], seed=s) for s in (1, 0)]
    (table,) = of(*runs)
    found = table.rows[1].against
    assert found is not None and table.rows[0].against is None
    expected = []
    for one, two in zip(base, other, strict=True):
        lost, won = int((one & ~two).sum()), int((two & ~one).sum())
        expected.append(binomtest(lost, lost + won).pvalue)
    assert found.p_value == pytest.approx(max(expected), rel=1e-9)
    assert found.difference == pytest.approx(np.mean(other) - np.mean(base))
    assert (found.num_pairs, found.n, found.sure) == (2, N, True)


def test_seeds_that_disagree_in_direction_prove_nothing(tmp_path: Path) -> None:
    few, many = flags(0, 0.1), flags(1, 0.95)
    runs = [evaluation(tmp_path / f"a{s}", r, seed=s, recipe="standard") for s, r in enumerate((few, many))]
    runs += [evaluation(tmp_path / f"b{s}", r, seed=s) for s, r in enumerate((many, few))]
    against = of(*runs)[0].rows[1].against
    assert against.p_value == 1.0 and not against.sure and against.difference == pytest.approx(0)


def test_bonferroni_counts_the_rows(tmp_path: Path) -> None:
    base = np.arange(N) < 20
    better = np.arange(N) < 26  # six won, none lost: p = 2 / 64 = 0.03125, beyond chance in one look and not in two
    first, second = evaluation(tmp_path / "a", base, recipe="standard"), evaluation(tmp_path / "b", better)
    third = evaluation(tmp_path / "c", base, recipe="trades")
    alone, among = of(first, second)[0].rows[1].against, of(first, second, third)[0].rows[1].against
    assert alone.p_value == among.p_value == 2 / 64
    assert alone.sure and not among.sure


def test_examples_that_are_not_shared_are_not_paired(tmp_path: Path) -> None:
    first = evaluation(tmp_path / "a", flags(0, 0.5))
    second = evaluation(tmp_path / "b", flags(1, 0.5), recipe="trades", index=np.arange(N) + N)
    row = of(first, second)[0].rows[1]
    assert row.against is None and "no example in common" in row.why_not
    assert "not paired" in call("compare", str(first), str(second))[1]


def test_the_worst_verdict_counts_and_one_that_is_missing_too(tmp_path: Path) -> None:
    doubtful = {"name": "odd", "sentence": "So.", "numbers": {}, "level": "suspect", "next_step": "Go."}
    a = evaluation(tmp_path / "a", flags(0, 0.5), seed=0, verdict="TRUSTED")
    b = evaluation(tmp_path / "b", flags(1, 0.5), seed=1, verdict="SUSPECT", findings=[doubtful])
    c = evaluation(tmp_path / "c", flags(2, 0.5), seed=2)
    assert of(a, b)[0].rows[0].verdict == "SUSPECT" and of(a, b, c)[0].rows[0].verdict is None
    assert "the verdict is SUSPECT" in call("compare", str(a), str(b))[1]


def test_other_questions_stand_in_other_tables(tmp_path: Path) -> None:
    a = evaluation(tmp_path / "a", flags(0, 0.5))
    b = evaluation(tmp_path / "b", flags(1, 0.5), threat={"text": "l2:1", "words": "Far.", "radius": 1.0})
    c = evaluation(tmp_path / "c", flags(2, 0.5), recipe="trades")
    found = of(a, b, c)
    assert [[run for row in table.rows for run in row.runs] for table in found] == [["a", "c"], ["b"]]
    code, out, _ = call("compare", str(a), str(b), str(c))
    assert code == 0 and "2 different questions" in out and "l2:1: Far." in out


def test_csv_and_markdown_hold_the_same_numbers(tmp_path: Path) -> None:
    stands = [flags(seed, 0.6) for seed in range(3)]
    runs = [evaluation(tmp_path / f"a{seed}", stands[seed], seed=seed) for seed in (0, 1)]
    runs.append(evaluation(tmp_path / "b|c\x07", stands[2], seed=None))
    _, out, _ = call("compare", *map(str, runs), "--format", "csv")
    lines = list(csv.DictReader(io.StringIO(out)))
    assert [line["model"] for line in lines] == ["pgd-at", "b|c\x07"]
    assert float(lines[0]["robust"]) == pytest.approx(np.mean(stands[:2]), abs=1e-6)
    assert lines[0]["seeds"] == "0 1" and lines[1]["seeds"] == lines[1]["training_seconds"] == ""
    assert float(lines[1]["difference"]) == pytest.approx(stands[2].mean() - stands[0].mean(), abs=1e-6)
    _, out, _ = call("compare", *map(str, runs), "--format", "markdown")
    rows = [line for line in out.splitlines() if line.startswith("|")]
    assert len(rows) == 4 and {row.replace("\\|", "").count("|") for row in rows} == {11}
    assert "\x07" not in out and f"{100 * stands[2].mean():.1f} %" in rows[3]


def test_folders_that_hold_nothing_are_told(tmp_path: Path) -> None:
    code, _, err = call("compare", str(tmp_path / "away"))
    assert code == 2 and "is not there" in err
    (tmp_path / "runs" / "later").mkdir(parents=True)
    code, _, err = call("compare", str(tmp_path / "runs"))
    assert code == 2 and "holds no results" in err
    (tmp_path / "runs" / "later" / "config.json").write_text("{}")
    code, _, err = call("compare", str(tmp_path / "runs" / "later"))
    assert code == 2 and "sparring evaluate" in err
    evaluation(tmp_path / "runs" / "now", flags(0, 0.5))
    code, out, err = call("compare", str(tmp_path / "runs"), str(tmp_path / "runs" / "now"))
    assert code == 0 and out.count("pgd-at") == 1 and "left out, not evaluated yet" in err
    code, _, err = call("compare", str(tmp_path / "runs"), "--format", "xml")
    assert code == 2 and "'xml' is not one of" in err

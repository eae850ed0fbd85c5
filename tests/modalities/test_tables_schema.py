"""`sparring schema`. Oracles: tables made by hand, whose types, laws and breaches are known; memory that stays flat."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from command import call
from sparring.modalities import load_data
from sparring.modalities.tables import Schema, cells
from sparring.modalities.tables.audit import check_table
from sparring.modalities.tables.draft import draft_schema

HEADER = "id,length,digits,Flow Bytes/s,rate,port,kind,same,gap,y"


def flows(path: Path, num: int = 400, seed: int = 0) -> Path:
    """digits <= length, often at the limit; gap is empty in every tenth row."""
    draw = np.random.default_rng(seed)
    length = draw.integers(4, 90, num)
    digits = np.where(draw.random(num) < 0.3, length, draw.integers(0, length))
    size = np.where(draw.random(num) < 0.02, 10**8, draw.integers(1, 300, num))
    rate, port, kind = draw.integers(0, 101, num) / 100, draw.integers(0, 2, num), draw.integers(0, 3, num)
    gap = [f"{length[i] / 7:.6f}" if i % 10 else "" for i in range(num)]
    lines = [HEADER] + [
        f"user-{i},{length[i]},{digits[i]},{size[i]},{rate[i]:.2f},{['no', 'yes'][port[i]]},{'abc'[kind[i]]},7,"
        f"{gap[i]},{['good', 'bad'][i % 2]}"
        for i in range(num)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_draft_knows_types_ranges_steps_and_scales_and_reads_its_own_data(tmp_path: Path) -> None:
    data = flows(tmp_path / "t.csv")
    text = draft_schema(str(data), "y", "bad", out=tmp_path / "t.toml")
    assert (tmp_path / "t.toml").read_text() == text
    found = {column.name: column for column in Schema.of(text).columns}
    assert {name: column.type for name, column in found.items()} == {
        "length": "integer", "digits": "integer", "Flow Bytes/s": "integer", "rate": "real", "port": "boolean",
        "kind": "category", "same": "integer", "gap": "real",
    }  # fmt: skip
    rows = [line.split(",") for line in data.read_text().splitlines()[1:]]
    length = np.array([float(row[1]) for row in rows])
    assert (found["length"].low, found["length"].high) == (length.min(), length.max())
    q10, q90 = np.quantile(length, [0.1, 0.9])
    assert found["length"].unit == pytest.approx((q90 - q10) / 2.56, rel=0.05)
    assert found["rate"].step == 0.01 and found["gap"].step == 0 and found["kind"].values == ("a", "b", "c")
    assert found["Flow Bytes/s"].scale == "log" and found["length"].scale == "linear"
    assert found["gap"].missing == np.floor(found["gap"].low) - 1 and found["length"].missing is None
    assert 'ignore = ["id"]' in text and "40 cells hold no number" in text and "the same in all rows" in text
    assert all(column.change == "any" for column in found.values())
    read = load_data(f"table:{data},schema={tmp_path / 't.toml'}")
    assert len(read.y_train) + len(read.y_test) == 400
    told = check_table(tmp_path / "t.toml", str(data))
    assert told[0].startswith("column 'gap': range") and "40 rows: 2, 12, 22, ..." in told[0]  # what stands for empty
    assert told[1:-1] == ["column 'same': 7 in all rows"] and "400 rows, 200 of them attacked" in told[-1]


def test_laws_are_candidates_in_comments_that_hold_everywhere_and_become_rules_without_the_mark(tmp_path: Path) -> None:
    data = flows(tmp_path / "t.csv")
    text = draft_schema(str(data), "y", "bad")
    assert Schema.of(text).rules == () and "most are accidents" in text
    laws = [line[1:] for line in text.splitlines() if line.startswith(("#[[", "#rule"))]
    assert any("digits <= length" in law for law in laws) and not any("length <= digits" in law for law in laws)
    (tmp_path / "laws.toml").write_text(text + "\n".join(laws) + "\n")
    told = check_table(tmp_path / "laws.toml", str(data))
    assert not [line for line in told[:-1] if line.startswith("rule ") and "broken" in line]
    assert f"{len(laws) // 2} rules, which 0 rows break" in told[-1] and len(laws) >= 2
    data.write_text(data.read_text().replace("\nuser-7,", "\nuser-7,0,5,1,0.5,no,a,7,1,bad\nuser-7,"))
    assert "digits <= length" not in draft_schema(str(data), "y", "bad")


RULES = """
[[relations]]
name = "good"
rule = "digits <= length"
[[relations]]
name = "broken"
rule = "digits <= 60"
[[relations]]
name = "empty"
rule = "0 <= length or 0 < digits"
[[relations]]
name = "not his"
rule = "rate <= 0.95"
[[relations]]
name = "follows"
rule = "gap = max(gap, 0)"
"""


def test_a_check_names_rows_and_rules_that_break_that_forbid_nothing_and_that_never_bind(tmp_path: Path) -> None:
    data, schema = flows(tmp_path / "t.csv"), tmp_path / "t.toml"
    text = draft_schema(str(data), "y", "bad")
    text = re.sub('step = 0.01(.*?)change = "any"', r'step = 0.05\1change = "none"', text)
    schema.write_text(text + RULES)
    told = {line.partition(": ")[0]: line for line in check_table(schema, str(data))}
    rows = [line.split(",") for line in data.read_text().splitlines()[1:]]
    many = [i + 2 for i, row in enumerate(rows) if int(row[2]) > 60]
    assert told["rule 'broken'"] == (f"rule 'broken': broken by {len(many)} rows: {many[0]}, {many[1]}, {many[2]}, ...")
    assert "does it forbid anything" in told["rule 'empty'"] and "rule 'good'" not in told
    assert "never binds" in told["rule 'not his'"]
    uneven = sum(round(100 * float(row[4])) % 5 > 0 for row in rows)
    assert told["column 'rate'"].startswith(f"column 'rate': step 0.05: broken by {uneven} rows")
    negative = sum(row[8] == "" for row in rows)  # missing is below 0, from which gap = max(gap, 0) does not follow
    assert f"broken by {negative} rows" in told["rule 'follows'"] or "rule 'follows'" not in told


@pytest.mark.parametrize(
    ("label", "attacked", "sentence"),
    [("z", "bad", "has no column 'z'; it has 'id'"), ("y", "Bad", "no row has the label 'Bad'; there are 'good' (200)"),
     ("y", "bad,worse", "'worse'")],
)  # fmt: skip
def test_what_cannot_be_drafted_is_told(tmp_path: Path, label: str, attacked: str, sentence: str) -> None:
    data = flows(tmp_path / "t.csv")
    code, _, err = call("schema", "draft", str(data), "--label", label, "--attacked", attacked)
    assert code == 2 and sentence in err


@pytest.mark.parametrize(
    ("header", "sentence"),
    [("a,,y", "2, '', has no name"), ("a,a ,y", "1, 'a', is there twice"), ("a,{b},y", "2, .*braces or quotes")],
)
def test_names_that_no_schema_can_have_are_told(tmp_path: Path, header: str, sentence: str) -> None:
    (tmp_path / "t.csv").write_text(f"{header}\n1,2,x\n2,3,z\n")
    with pytest.raises(ValueError, match=f"the column {sentence}"):
        draft_schema(str(tmp_path / "t.csv"), "y", "x")


def test_the_command_line_drafts_and_checks(tmp_path: Path) -> None:
    data, out = flows(tmp_path / "t.csv"), tmp_path / "t.toml"
    code, said, err = call("schema", "draft", str(data), "--label", "y", "--attacked", "bad", "--out", str(out))
    assert code == 0 and f"sparring schema check {out} {data}" in said and out.exists(), err
    assert call("schema", "draft", str(data), "--label", "y", "--attacked", "bad", "--out", str(out)).code == 2
    code, said, err = call("schema", "check", str(out), str(data))
    assert code == 0 and said.splitlines()[-1].startswith("400 rows, 200 of them attacked ('good' 200, 'bad' 200)"), err
    printed = call("schema", "draft", str(data), "--label", "y", "--attacked", "bad").out
    assert printed == out.read_text()
    data.write_text(data.read_text().replace("user-3,", "user-3,x"))
    code, _, err = call("schema", "check", str(out), str(data))
    assert code == 2 and "column 'length', row 5: got 'x" in err


def test_chunks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, schema = flows(tmp_path / "t.csv"), tmp_path / "t.toml"
    text = draft_schema(str(data), "y", "bad", out=schema)
    told, read = check_table(schema, str(data)), load_data(f"table:{data},schema={schema}")
    monkeypatch.setattr(cells, "ROWS_AT_ONCE", 7)
    assert draft_schema(str(data), "y", "bad") == text and check_table(schema, str(data)) == told
    again = load_data(f"table:{data},schema={schema},seed=0,test_share=0.2")
    assert (again.x_train["rows"] == read.x_train["rows"]).all()


PEAK = """
import resource, sys
from sparring.modalities.tables.audit import check_table
check_table(sys.argv[1], sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_the_memory_of_a_check_does_not_grow_with_the_file(tmp_path: Path) -> None:
    flows(tmp_path / "small.csv", 40_000)
    draft_schema(str(tmp_path / "small.csv"), "y", "bad", out=tmp_path / "t.toml")
    header, *rows = (tmp_path / "small.csv").read_text().splitlines()
    (tmp_path / "large.csv").write_text("\n".join([header, *(rows * 8)]) + "\n")
    peaks = []
    for name in ("small.csv", "large.csv"):
        command = [sys.executable, "-c", PEAK, str(tmp_path / "t.toml"), str(tmp_path / name)]
        peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    assert peaks[1] < 1.1 * peaks[0], peaks


def test_a_check_tells_how_often_the_header_stands_again(tmp_path: Path) -> None:
    data, schema = flows(tmp_path / "t.csv"), tmp_path / "t.toml"
    schema.write_text(draft_schema(str(data), "y", "bad"))
    told = check_table(schema, str(data))
    header, *rows = data.read_text().splitlines()
    data.write_text("\n".join([header, *rows, header, header]) + "\n")
    assert check_table(schema, str(data)) == ["the header stands again in 2 rows, which are left out", *told]
